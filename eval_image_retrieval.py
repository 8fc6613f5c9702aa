"""Image retrieval on revisited Oxford and Paris (paper, section 4.3.2; DINO's protocol).

    python eval_image_retrieval.py --data_path FOLDER --dataset roxford5k --pretrained_weights OUT/checkpoint.pth

FOLDER holds roxford5k/gnd_roxford5k.pkl and roxford5k/jpg. Ranks the database by the cosine of the CLS tokens. Runs in
one process or under torchrun, and writes a JSON result beside the checkpoint.
"""

import numpy as np
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

import evaluation
import utils
from datasets import ImageList, RevisitedRetrieval, image_size
from features import extract_features, to_pixels
from utils import UserError, bool_flag, number

# What counts as relevant, and what is taken out of the ranking, in each of the three protocols.
PROTOCOLS = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
CUTOFFS = (1, 5, 10)
SETTINGS = {"roxford5k": (224, False), "rparis6k": (512, True)}  # side and multiscale of the authors' README


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
        part = image.crop(self.boxes[index])
        return self.shrink(part, max(part.size) / max(image.size)), label


def check_sizes(paths, boxes, side, patch_size):
    """Raise UserError where an image, or the part of it in its box, is thinner than a patch once it is shrunk."""
    for path, box in zip(paths, boxes, strict=True):
        size = image_size(path)
        part = (box[2] - box[0], box[3] - box[1]) if box else size
        thickness = min(part) * min(1, side / max(size))
        if thickness < patch_size:
            raise UserError(
                f"{path} is {thickness:.1f} pixels thin at --imsize {side}, a patch of the network {patch_size}: "
                "take a larger --imsize, or leave the image out"
            )


def parse_arguments(argv=None):
    parser = utils.ArgumentParser(description=__doc__.splitlines()[0], epilog="@FILE reads options from a file.")
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
    model = (args.pretrained_weights, args.arch, args.patch_size, args.checkpoint_key)
    backbone, made_with, _ = evaluation.open_model(*model, args.seed, args.imsize)
    path = evaluation.result_file(args.output_dir, args.pretrained_weights, args.dataset)
    boxes = benchmark.boxes if args.crop_queries else [None] * len(benchmark.queries)
    for paths, their_boxes in ((benchmark.queries, boxes), (benchmark.database, [None] * len(benchmark.database))):
        check_sizes(paths, their_boxes, args.imsize, max(backbone.patch_embed.patch_size))

    rank, world_size, device = utils.init_distributed(args.dist_url)
    backbone.to(device)
    shrink = Shrink(args.imsize)
    parts = {
        "queries": ImageList(benchmark.queries, shrink, upright=False),
        "database": ImageList(benchmark.database, shrink, upright=False),
    }
    if args.crop_queries:
        parts["queries"] = CroppedQueries(benchmark.queries, benchmark.boxes, shrink)
    features = {
        name: extract_features(
            lambda images: retrieval_features(backbone, images, args.multiscale),
            part,
            device,
            1,  # the images have different sizes
            args.num_workers,
            name,
        )
        for name, part in parts.items()
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
        result["images"] = {name: len(part) for name, part in parts.items()}
        evaluation.write_result(path, result, made_with, args)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
