"""Image retrieval on revisited Oxford and Paris (paper, section 4.3.2; DINO's protocol).

    python eval_image_retrieval.py --data_path FOLDER --dataset roxford5k --pretrained_weights OUT/checkpoint.pth

FOLDER holds roxford5k/gnd_roxford5k.pkl and roxford5k/jpg. Ranks the database by the cosine of the CLS tokens. Runs in
one process or under torchrun, and writes a JSON result beside the checkpoint.
"""

from pathlib import Path

import numpy as np
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

import utils
from support import evaluation
from support.arguments import ArgumentParser, bool_flag, number
from support.features import extract_features, to_pixels
from support.images import ImageList, image_size
from support.plain_pickle import read_plain_pickle
from utils import UserError

# What counts as relevant, and what is taken out of the ranking, in each of the three protocols.
PROTOCOLS = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
CUTOFFS = (1, 5, 10)
SETTINGS = {"roxford5k": (224, False), "rparis6k": (512, True)}  # side and multiscale of the authors' README


class RevisitedRetrieval:
    """Revisited Oxford (roxford5k) or Paris (rparis6k).

    Args:
        root: folder that holds NAME/gnd_NAME.pkl and NAME/jpg/*.jpg.

    Attributes:
        database, queries: paths of the images.
        boxes: of each query, (left, top, right, bottom) in pixels.
        relevance: of each query {"easy", "hard", "junk"}: places in the database.

    Raises:
        UserError: a file is missing or is not what it should be.
    """

    def __init__(self, root, name):
        folder = Path(root) / name
        path = folder / f"gnd_{name}.pkl"
        layout = f"expected {folder}/gnd_{name}.pkl and {folder}/jpg/*.jpg"
        if not path.is_file():
            raise UserError(f"no ground truth {path}: {layout}")
        contents = read_plain_pickle(path)
        try:
            names = {key: [str(name) for name in contents[key]] for key in ("imlist", "qimlist")}
            self.relevance = [
                {kind: np.array(entry[kind], np.int64).ravel().tolist() for kind in ("easy", "hard", "junk")}
                for entry in contents["gnd"]
            ]
            self.boxes = [tuple(float(value) for value in entry["bbx"]) for entry in contents["gnd"]]
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{path} is no ground truth of {name}: expected imlist, qimlist, and gnd with easy, hard, junk and bbx"
            ) from error
        self.database, self.queries = (
            [folder / "jpg" / f"{name}.jpg" for name in names[key]] for key in ("imlist", "qimlist")
        )
        if len(self.queries) != len(self.relevance):
            raise UserError(f"{path} has {len(self.queries)} queries, but relevance for {len(self.relevance)}")
        if not self.queries:
            raise UserError(f"{path} has no queries")
        for query, relevance, box in zip(names["qimlist"], self.relevance, self.boxes, strict=True):
            if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
                raise UserError(f"{path}: query {query} has the box {box}, expected left, top, right, bottom")
            both = set(relevance["easy"] + relevance["hard"]) & set(relevance["junk"])
            if both or set(relevance["easy"]) & set(relevance["hard"]):
                raise UserError(f"{path}: query {query} has images that are more than one of easy, hard and junk")
            wrong = [i for places in relevance.values() for i in places if not 0 <= i < len(self.database)]
            if wrong:
                raise UserError(f"{path}: query {query} names image {wrong[0]} of {len(self.database)}")
            if not relevance["easy"] + relevance["hard"]:
                raise UserError(f"{path}: query {query} has no relevant image, neither easy nor hard")
        missing = [path for path in self.queries + self.database if not path.is_file()]
        if missing:
            raise UserError(f"{len(missing)} images are missing, the first is {missing[0]}: {layout}")


def retrieval_features(backbone, images, multiscale):
    """Return unit vectors of images: [B, 3, H, W] -> [B, D].

    With `multiscale` the mean of the CLS tokens at 1, 1/√2 and 1/2 of the size. Sizes below a patch are left out.
    """
    scales = (1, 2**-0.5, 0.5) if multiscale else (1,)
    total = 0
    for scale in scales:
        scaled = images
        if scale != 1:
            if min(images.shape[-2:]) * scale < max(backbone.patch_embed.patch_size):
                continue
            scaled = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
        total = total + backbone(scaled)[:, 0]
    return F.normalize(total)


def precision_at(ranks, cutoff):
    """Return the share of relevant images in the first `cutoff`, or down to the last relevant one if that is earlier.

    Args:
        ranks: array of the relevant images' ascending places, from 0.
    """
    depth = min(int(ranks[-1]) + 1, cutoff)
    return float((ranks < depth).sum() / depth)


def score(similarity, relevance, protocol):
    """Score a ranking by a protocol of revisited Oxford and Paris (Radenović et al., CVPR 2018).

    Args:
        similarity: array [database, queries].
        relevance: of each query {"easy", "hard", "junk"}: places in the database.
        protocol: "easy", "medium" or "hard".

    Returns:
        {"map", "mp" (at 1, 5 and 10), "aps"}, from 0 to 1. A query without a relevant image is left out of the means,
        its average precision is None.
    """
    relevant_kinds, ignored_kinds = PROTOCOLS[protocol]
    aps, precisions = [], []
    ranking = np.argsort(-np.asarray(similarity), axis=0, kind="stable")  # [database, queries]
    for column, kinds in zip(ranking.T, relevance, strict=True):
        relevant = sum((kinds[kind] for kind in relevant_kinds), [])
        ignored = sum((kinds[kind] for kind in ignored_kinds), [])
        if not relevant:
            aps.append(None)
            continue
        kept = column[~np.isin(column, ignored)]
        ranks = np.flatnonzero(np.isin(kept, relevant))
        aps.append(evaluation.average_precision(ranks.tolist(), len(relevant)))
        precisions.append([precision_at(ranks, cutoff) for cutoff in CUTOFFS])
    known = [ap for ap in aps if ap is not None]
    if not known:
        return {"map": None, "mp": None, "aps": aps}
    return {"map": float(np.mean(known)), "mp": np.mean(precisions, axis=0).tolist(), "aps": aps}


class Shrink:
    """PIL image -> normalised float [3, H, W], the longer side at most `side`, the aspect kept."""

    def __init__(self, side):
        self.side, self.to_pixels = side, to_pixels()

    def __call__(self, image, factor=1.0):
        side = self.side * factor
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        return self.to_pixels(image)


class CroppedQueries(ImageList):
    """Queries cut to their boxes, (left, top, right, bottom) in pixels, and shrunk as much as the whole images."""

    def __init__(self, paths, boxes, shrink):
        super().__init__(paths, None, upright=False)
        self.boxes, self.shrink = boxes, shrink

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        crop = image.crop(self.boxes[index])
        return self.shrink(crop, max(crop.size) / max(image.size)), label


def check_sizes(paths, boxes, side, patch_size):
    """Raise UserError where an image, or the part of it in its box, is thinner than a patch once it is shrunk."""
    for path, box in zip(paths, boxes, strict=True):
        size = image_size(path)
        box_size = (box[2] - box[0], box[3] - box[1]) if box else size
        thickness = min(box_size) * min(1, side / max(size))
        if thickness < patch_size:
            raise UserError(
                f"{path} is {thickness:.1f} pixels thin at --imsize {side}, a patch of the network {patch_size}: "
                "take a larger --imsize, or leave the image out"
            )


def parse_arguments(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog="@FILE reads options from a file.")
    evaluation.add_model_arguments(parser)
    # fmt: off
    add = parser.add_argument_group("protocol").add_argument
    add("--imsize", type=number(int, 1), help="larger side of the images, which keep their aspect; default: 224 for "
        "roxford5k, 512 for rparis6k")
    add("--multiscale", type=bool_flag, help="mean over three scales; default: false for roxford5k, true for rparis6k")
    add("--crop_queries", type=bool_flag, default=False, help="cut queries to their boxes, as the benchmark's authors "
        "do; DINO takes them whole")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=SETTINGS, default="roxford5k", help="revisited Oxford or Paris")
    add("--data_path", required=True, help="folder that holds DATASET/gnd_DATASET.pkl and DATASET/jpg")
    # fmt: on
    evaluation.add_computation_arguments(parser)
    args = parser.parse_args(argv)
    side, multiscale = SETTINGS[args.dataset]
    if args.imsize is None:
        args.imsize = side
    if args.multiscale is None:
        args.multiscale = multiscale
    return args


def main(argv=None):
    args = parse_arguments(argv)
    benchmark = RevisitedRetrieval(args.data_path, args.dataset)
    backbone, made_with, _ = evaluation.open_model(
        args.pretrained_weights,
        arch=args.arch,
        patch_size=args.patch_size,
        checkpoint_key=args.checkpoint_key,
        seed=args.seed,
        img_size=args.imsize,
    )
    path = evaluation.result_file(args.output_dir, args.pretrained_weights, args.dataset)
    boxes = benchmark.boxes if args.crop_queries else [None] * len(benchmark.queries)
    for paths, their_boxes in ((benchmark.queries, boxes), (benchmark.database, [None] * len(benchmark.database))):
        check_sizes(paths, their_boxes, args.imsize, max(backbone.patch_embed.patch_size))

    rank, world_size, device = utils.init_distributed(args.dist_url)
    backbone.to(device)
    shrink = Shrink(args.imsize)
    image_lists = {
        "queries": ImageList(benchmark.queries, shrink, upright=False),
        "database": ImageList(benchmark.database, shrink, upright=False),
    }
    if args.crop_queries:
        image_lists["queries"] = CroppedQueries(benchmark.queries, benchmark.boxes, shrink)
    features = {
        name: extract_features(
            lambda batch: retrieval_features(backbone, batch, args.multiscale),
            images,
            device,
            batch_size=1,  # the images have different sizes
            num_workers=args.num_workers,
            title=name,
        )
        for name, images in image_lists.items()
    }
    if rank == 0:
        similarity = (features["database"] @ features["queries"].T).numpy()
        result = {"map": {}, "mp": {}, "aps": {}}
        for protocol in PROTOCOLS:
            scored = score(similarity, benchmark.relevance, protocol)
            for kind, values in result.items():
                values[protocol] = scored[kind]
            if scored["map"] is not None:
                at = ", ".join(f"mP@{cutoff} {100 * p:.2f}" for cutoff, p in zip(CUTOFFS, scored["mp"], strict=True))
                print(f"{args.dataset} {protocol}: mAP {100 * scored['map']:.2f}, {at}", flush=True)
        result["images"] = {name: len(images) for name, images in image_lists.items()}
        evaluation.write_result(path, result, made_with, args)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
