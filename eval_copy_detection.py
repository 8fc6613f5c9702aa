"""Copy detection on INRIA Copydays (paper, section 4.3.1; DINO's protocol).

    python reproduce.py lists IMAGENET --output_dir LISTS
    python eval_copy_detection.py --data_path COPYDAYS --pretrained_weights OUT/checkpoint.pth \\
        --whitening_path LISTS/whitening.txt --distractors_path LISTS/distractors.txt

Each distorted image is a query. The database holds the originals and the distractors. The paper reports the mean
average precision (mAP) of the "strong" queries. Runs on GPUs or CPUs, in one process or under torchrun. Writes a JSON
result to the folder of the checkpoint.
"""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from support import evaluation
from support.arguments import DEFAULT_CLASSES, class_file, number
from support.evaluation import features_of_all
from support.features import whole_transform
from support.folders import ImageFolder, class_name, has_image_name, listed_folders, listed_images
from support.images import ImageList
from support.sources import add_intensity_range
from utils import UserError, init_distributed, run_main, warn
from vision_transformer import VisionTransformer

COPYDAYS_BLOCKS = ["original", "strong"]
COPYDAYS_BLOCKS += [f"jpegqual/{quality}" for quality in (3, 5, 8, 10, 15, 20, 30, 50, 75)]
COPYDAYS_BLOCKS += [f"crops/{percent}" for percent in (10, 15, 20, 30, 40, 50, 60, 70, 80)]


def copydays(root: str | Path) -> tuple[dict[str, list[Path]], dict[str, list[list[int]]]]:
    """Find the images of INRIA Copydays.

    Args:
        root: folder with `original/*.jpg` and `strong/*.jpg`, and optionally `jpegqual/*/*.jpg` and `crops/*/*.jpg`.

    Returns:
        (blocks, positives). `blocks` maps "original", "strong", ... to lists of paths. `positives` maps each block
        except "original" to one list per image: the indices in `blocks["original"]` of the images whose names begin
        with the same four characters.

    Raises:
        UserError: a required folder has no images, or an image has no original.
    """
    root = Path(root)
    blocks = {}
    for name in COPYDAYS_BLOCKS:
        folder = root / name
        paths = sorted(path for path in folder.glob("*") if has_image_name(path.name))
        if not paths and name in ("original", "strong"):
            expected = f"Copydays is {root}/original/*.jpg and {root}/strong/*.jpg"
            raise UserError(f"no images in {folder}: {expected}, and optionally jpegqual/*/*.jpg and crops/*/*.jpg")
        if paths:
            blocks[name] = paths
    scenes = [path.name[:4] for path in blocks["original"]]
    positives = {}
    for name in list(blocks)[1:]:
        positives[name] = [[i for i, scene in enumerate(scenes) if scene == path.name[:4]] for path in blocks[name]]
        if [] in positives[name]:
            path = blocks[name][positives[name].index([])]
            raise UserError(f"{path} has no original: expected {root}/original/{path.name[:4]}*.jpg")
    return blocks, positives


def copydays_lists(
    root: Path, num_whitening: int, num_distractors: int, seed: int = 0, classes: str | Path = DEFAULT_CLASSES
) -> tuple[list[str], list[str]]:
    """Draw the two disjoint sets of images of the paper's section 4.3.1 from ImageNet without ImageNet-100's classes.

    Args:
        root: ImageNet's training images in class folders, or the folder that holds `train` and `val`.
        seed: equal seeds draw equal lists from equal images.
        classes: the class folders to exclude, see `arguments.class_file`.

    Returns:
        (whitening, distractors): lists of absolute paths

    Raises:
        UserError: a class is missing, or there are too few images.
    """
    folder = ImageFolder(root)
    excluded = {class_name(path.name) for path in listed_folders(folder.parts, class_file(classes))}
    labeled = zip(folder.paths, folder.labels, strict=True)
    paths = [path for path, label in labeled if label >= 0 and folder.classes[label] not in excluded]
    count = num_whitening + num_distractors
    if len(paths) < count:
        raise UserError(f"{root} has {len(paths)} images outside the classes of {classes}, expected at least {count}")
    drawn = np.random.default_rng(seed).choice(len(paths), count, replace=False)
    chosen = [os.path.abspath(paths[i]) for i in drawn]
    return chosen[:num_whitening], chosen[num_whitening:]


def copy_features(backbone: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """Concatenate CLS token and GeM-pooled patch tokens (exponent 4): images [B, 3, H, W] -> [B, 2D]."""
    tokens = backbone(images)
    gem = tokens[:, 1:].clamp(min=1e-6).pow(4).mean(1).pow(0.25)
    return torch.cat([tokens[:, 0], gem], dim=1)


class Whitening:
    """PCA whitening as in DINO, fitted on other images. The covariance is that of the uncentered features.

    Eigenvalues below 1e-5 of the largest are raised to that value.

    Args:
        features: [n, D], converted to float64 in chunks of [4096, D].
    """

    def __init__(self, features: torch.Tensor) -> None:
        chunks = features.split(4096)
        self.mean = sum(chunk.sum(0, dtype=torch.float64) for chunk in chunks) / len(features)  # [D]
        values, vectors = torch.linalg.eigh(sum(chunk.double().T @ chunk.double() for chunk in chunks) / len(features))
        self.projection = vectors * values.clamp(min=1e-5 * values.max()) ** -0.5  # [D, D]

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Subtract the mean from features [n, D] and whiten them."""
        return ((features.double() - self.mean) @ self.projection).float()


def mean_average_precision(similarity: torch.Tensor, positives: list[list[int]], topk: int = 0) -> float:
    """Return the mean of the queries' average precisions.

    Args:
        similarity: [queries, database].
        positives: per query, the database indices of its relevant images.
        topk: number of results to consider per query; 0 ranks the whole database.
    """
    ranking = similarity.topk(min(topk or similarity.shape[1], similarity.shape[1])).indices.numpy()
    precisions = []
    for row, relevant in zip(ranking, positives, strict=True):
        ranks = np.flatnonzero(np.isin(row, relevant)).tolist()
        precisions.append(evaluation.average_precision(ranks, len(relevant)))
    return sum(precisions) / len(precisions)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = evaluation.model_parser(__doc__)
    add = parser.add_argument_group("protocol").add_argument
    add("--imsize", type=number(int, 1), default=320, help="resize images to a square of this side in pixels")
    add("--topk", type=number(int, 0), default=20, help="results to consider per query; 0: the whole database")
    evaluation.add_use_cuda(add)
    add = parser.add_argument_group("data").add_argument
    add("--data_path", required=True, help="folder of Copydays, with original and strong")
    add("--whitening_path", help="folder or list of images on which to fit the whitening; default: no whitening")
    add("--distractors_path", help="folder or list of images to add to the database; default: none")
    add_intensity_range(add)
    evaluation.add_computation_arguments(parser, batch_size=16)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Extract the features on all processes, then rank on rank 0."""
    args = parse_arguments(argv)
    blocks, positives = copydays(args.data_path)
    others = {"distractors": args.distractors_path, "whitening": args.whitening_path}
    paths = blocks | {name: listed_images(source) if source else [] for name, source in others.items()}
    images = {name: len(files) for name, files in paths.items()}
    backbone, made_with, _ = evaluation.open_model(evaluation.model_spec(args), args.imsize)
    result = evaluation.Result("copydays", args, backbone, made_with, images=images)

    rank, _, device = init_distributed(args.dist_url)
    backbone.to(device)
    if rank == 0 and 0 < images["whitening"] < 2 * backbone.embed_dim:
        warn(f"{images['whitening']} whitening images do not span the {2 * backbone.embed_dim} features: give more")
    transform = whole_transform(args.imsize)
    datasets = {name: ImageList(files, transform, upright=False) for name, files in paths.items() if files}
    for dataset in datasets.values():
        dataset.use_intensity_range(args.intensity_range or made_with.get("intensity_range"))
    network = partial(copy_features, backbone)
    features = features_of_all(network, datasets, device, args.batch_size_per_gpu, args.num_workers)
    evaluation.leave_process_group()
    if rank > 0:
        return
    whiten = Whitening(features["whitening"]) if "whitening" in features else lambda x: x
    database = torch.cat([features[name] for name in ("original", "distractors") if name in features])
    search_device = torch.device("cpu") if args.use_cuda is False else device
    database = F.normalize(whiten(database)).to(search_device)
    scores, lines = {}, []
    for name in positives:
        queries = F.normalize(whiten(features[name])).to(search_device)
        scores[name] = mean_average_precision((queries @ database.T).cpu(), positives[name], args.topk)
        lines.append(f"copy detection, {name}: mAP {scores[name]:.3f}")
    result.publish(lines, map=scores)


if __name__ == "__main__":
    run_main(main)
