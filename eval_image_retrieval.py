"""Image retrieval on revisited Oxford and Paris (paper, section 4.3.2; DINO's protocol).

    python eval_image_retrieval.py --data_path FOLDER --dataset roxford5k --pretrained_weights OUT/checkpoint.pth

FOLDER holds roxford5k/gnd_roxford5k.pkl and roxford5k/jpg. The database is ranked by the cosine of the CLS tokens. Runs
on GPUs or CPUs, in one process or under torchrun. Writes a JSON result to the folder of the checkpoint.
"""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from support import evaluation
from support.arguments import bool_flag, number
from support.evaluation import features_of_all
from support.features import to_pixels
from support.images import ImageList
from support.plain_pickle import read_plain_pickle
from support.sources import add_intensity_range
from utils import UserError, init_distributed, run_main
from vision_transformer import VisionTransformer

KINDS = ("easy", "hard", "junk")
# The relevant kinds of images per protocol; the other kinds are removed from the ranking.
PROTOCOLS = {"easy": ("easy",), "medium": ("easy", "hard"), "hard": ("hard",)}
CUTOFFS = (1, 5, 10)
SETTINGS = {"roxford5k": (224, False), "rparis6k": (512, True)}  # side and multiscale, from the README of DINO


class RevisitedRetrieval:
    """Revisited Oxford (roxford5k) or Paris (rparis6k).

    Args:
        root: folder with NAME/gnd_NAME.pkl and NAME/jpg/*.jpg.

    Attributes:
        database, queries: paths of the images.
        boxes: per query, (left, top, right, bottom) in whole pixels.
        relevance: per query, {"easy", "hard", "junk"} with database indices.

    Raises:
        UserError: a file is missing, or the ground truth is not the official one.
    """

    def __init__(self, root: str | Path, name: str) -> None:
        folder = Path(root) / name
        path = folder / f"gnd_{name}.pkl"
        layout = f"expected {path} and {folder}/jpg/*.jpg"
        if not os.path.isfile(path):
            raise UserError(f"no ground truth {path}: {layout}")
        contents = read_plain_pickle(path)
        try:
            names = contents["qimlist"], contents["imlist"]
            self.queries, self.database = ([folder / "jpg" / (image + ".jpg") for image in part] for part in names)
            entries = [contents["gnd"][i] for i in range(len(self.queries))]
            self.boxes = [tuple(round(value) for value in entry["bbx"]) for entry in entries]
            self.relevance = [{kind: list(entry[kind]) for kind in KINDS} for entry in entries]
            for kinds, (left, top, right, bottom) in zip(self.relevance, self.boxes, strict=True):
                indices = sum(kinds.values(), [])
                is_valid = set(indices) <= set(range(len(self.database))) and len(set(indices)) == len(indices) > 0
                if not (is_valid and left < right and top < bottom):
                    raise ValueError
            if not entries:
                raise ValueError
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"cannot read {path}: it is not the ground truth of {name}") from error
        missing = [path for path in self.queries + self.database if not os.path.isfile(path)]
        if missing:
            raise UserError(f"{len(missing)} images are missing, the first is {missing[0]}: {layout}")


def retrieval_features(backbone: VisionTransformer, multiscale: bool, images: torch.Tensor) -> torch.Tensor:
    """Return the L2-normalized CLS tokens of images: [B, 3, H, W] -> [B, D].

    `multiscale` averages the CLS tokens at 1, 1/√2 and 1/2 of the size. Scales smaller than a patch are skipped.
    """
    total = backbone(images)[:, 0]
    for scale in (2**-0.5, 0.5) if multiscale else ():
        if min(images.shape[-2:]) * scale >= max(backbone.patch_embed.patch_size):
            scaled = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
            total = total + backbone(scaled)[:, 0]
    return F.normalize(total)


def score(similarity: np.ndarray, relevance: list[dict[str, list[int]]], protocol: str) -> dict[str, Any]:
    """Score a ranking by a protocol of revisited Oxford and Paris (Radenović et al., CVPR 2018).

    Args:
        similarity: array [database, queries].
        relevance: per query, {"easy", "hard", "junk"} with database indices.
        protocol: "easy", "medium" or "hard".

    Returns:
        {"map", "mp" (at 1, 5 and 10), "aps"} in [0, 1]. A query without relevant images has the average precision None
        and does not count in the means.
    """
    aps: list[float | None] = []
    precisions = []
    ranking = np.argsort(-np.asarray(similarity), axis=0, kind="stable")  # [database, queries]
    for column, kinds in zip(ranking.T, relevance, strict=True):
        relevant = sum((kinds[kind] for kind in PROTOCOLS[protocol]), [])
        ignored = sum((kinds[kind] for kind in KINDS if kind not in PROTOCOLS[protocol]), [])
        if not relevant:
            aps.append(None)
            continue
        kept = column[~np.isin(column, ignored)]
        ranks = np.flatnonzero(np.isin(kept, relevant))
        aps.append(evaluation.average_precision(ranks.tolist(), len(relevant)))
        # The cutoff is lowered to the last relevant image if that ranks higher.
        precisions.append([(ranks < depth).sum() / depth for depth in np.minimum(CUTOFFS, ranks[-1] + 1)])
    known = [ap for ap in aps if ap is not None]
    if not known:
        return {"map": None, "mp": None, "aps": aps}
    return {"map": float(np.mean(known)), "mp": np.mean(precisions, axis=0).tolist(), "aps": aps}


class RetrievalImages(ImageList):
    """Images of a benchmark, shrunk to at most `side` pixels with their aspect and normalized: float [3, H, W].

    Args:
        boxes: per image, the part to crop, (left, top, right, bottom) in pixels. A crop is shrunk by the factor of its
            whole image.

    Raises:
        UserError: an image is thinner than a patch after shrinking.
    """

    def __init__(self, paths: list[Path], side: int, patch_size: int, boxes: list | None = None) -> None:
        super().__init__(paths, None, upright=False)
        self.boxes, self.side, self.patch_size, self.to_pixels = boxes, side, patch_size, to_pixels()

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = super().__getitem__(index)
        crop = image.crop(self.boxes[index]) if self.boxes else image
        side = self.side * (max(crop.size) / max(image.size))
        crop.thumbnail((side, side), Image.Resampling.LANCZOS)
        if min(crop.size) < self.patch_size:
            thin = f"{min(crop.size)} pixels thin at --imsize {self.side}, a patch has {self.patch_size}"
            raise UserError(f"{self.paths[index]} is {thin}: give a larger --imsize, or remove the image")
        return self.to_pixels(crop), label


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line and fill in the defaults of the data set."""
    parser = evaluation.model_parser(__doc__)
    add = parser.add_argument_group("protocol").add_argument
    add("--imsize", type=number(int, 1), help="longer side in pixels; default: 224 for roxford5k, 512 for rparis6k")
    add("--multiscale", type=bool_flag, help="average features at three scales; default: true only for rparis6k")
    add("--crop_queries", type=bool_flag, default=False, help="crop queries to their boxes, unlike DINO")
    evaluation.add_use_cuda(add)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=SETTINGS, default="roxford5k", help="revisited Oxford or Paris")
    add("--data_path", required=True, help="folder with DATASET/gnd_DATASET.pkl and DATASET/jpg")
    add_intensity_range(add)
    evaluation.add_computation_arguments(parser)
    args = parser.parse_args(argv)
    side, multiscale = SETTINGS[args.dataset]
    args.imsize = side if args.imsize is None else args.imsize
    args.multiscale = multiscale if args.multiscale is None else args.multiscale
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Extract the features on all processes, then rank on rank 0."""
    args = parse_arguments(argv)
    benchmark = RevisitedRetrieval(args.data_path, args.dataset)
    backbone, made_with, _ = evaluation.open_model(evaluation.model_spec(args), args.imsize)
    new = partial(RetrievalImages, side=args.imsize, patch_size=max(backbone.patch_embed.patch_size))
    boxes = benchmark.boxes if args.crop_queries else None
    datasets = {"queries": new(benchmark.queries, boxes=boxes), "database": new(benchmark.database)}
    for dataset in datasets.values():
        dataset.use_intensity_range(args.intensity_range or made_with.get("intensity_range"))
    images = {name: len(dataset) for name, dataset in datasets.items()}
    result = evaluation.Result(args.dataset, args, backbone, made_with, images=images)

    rank, _, device = init_distributed(args.dist_url)
    network = partial(retrieval_features, backbone.to(device), args.multiscale)
    # The images have different sizes: a batch holds one.
    features = features_of_all(network, datasets, device, batch_size=1, num_workers=args.num_workers)
    evaluation.leave_process_group()
    if rank > 0:
        return
    search_device = torch.device("cpu") if args.use_cuda is False else device
    database, queries = (features[name].to(search_device) for name in ("database", "queries"))
    similarity = (database @ queries.T).cpu().numpy()
    scores = {protocol: score(similarity, benchmark.relevance, protocol) for protocol in PROTOCOLS}
    lines = []
    for protocol, scored in scores.items():
        if scored["map"] is not None:
            at = ", ".join(f"mP@{cutoff} {100 * p:.2f}" for cutoff, p in zip(CUTOFFS, scored["mp"], strict=True))
            lines.append(f"{args.dataset} {protocol}: mAP {100 * scored['map']:.2f}, {at}")
    numbers = {kind: {name: scored[kind] for name, scored in scores.items()} for kind in ("map", "mp", "aps")}
    result.publish(lines, **numbers)


if __name__ == "__main__":
    run_main(main)
