"""Copy detection on INRIA Copydays (paper, section 4.3.1; DINO's protocol).

    python reproduce.py lists IMAGENET --output_dir LISTS
    python eval_copy_detection.py --data_path COPYDAYS --pretrained_weights OUT/checkpoint.pth \\
        --whitening_path LISTS/whitening.txt --distractors_path LISTS/distractors.txt

Distorted images look for their originals among the originals and distractors; the mean average precision over the
"strong" ones is the paper's number. Runs in one process or under torchrun, and writes a JSON result beside the
checkpoint.
"""

import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms.v2 as T
from torchvision.transforms import InterpolationMode

import utils
from support import evaluation
from support.arguments import ArgumentParser, number
from support.features import extract_features, to_pixels
from support.images import IMAGENET100_CLASSES, ImageFolder, ImageList, has_image_name, listed_folders, listed_images
from utils import UserError

COPYDAYS_SIZES = {"original": 157, "strong": 229}
COPYDAYS_BLOCKS = ["strong"]
COPYDAYS_BLOCKS += [f"jpegqual/{quality}" for quality in (3, 5, 8, 10, 15, 20, 30, 50, 75)]
COPYDAYS_BLOCKS += [f"crops/{percent}" for percent in (10, 15, 20, 30, 40, 50, 60, 70, 80)]


def copydays(root):
    """Find the images of INRIA Copydays.

    Args:
        root: folder with `original/*.jpg`, `strong/*.jpg`, and where present `jpegqual/*/*.jpg` and `crops/*/*.jpg`.

    Returns:
        (blocks, positives): lists of paths, {"original": ..., "strong": ..., ...}, and for each block but the originals
        the places in `blocks["original"]` that each of its images is a copy of: those whose names begin with the same
        four characters.

    Raises:
        UserError: the layout is another, or an image has no original.
    """
    root = Path(root)
    blocks = {}
    for name in ["original", *COPYDAYS_BLOCKS]:
        folder = root / name
        paths = [path for path in folder.iterdir() if has_image_name(path.name)] if folder.is_dir() else []
        if not paths and name in COPYDAYS_SIZES:
            raise UserError(
                f"no images in {folder}: Copydays is {root}/original/*.jpg and {root}/strong/*.jpg, "
                "and where present jpegqual/*/*.jpg and crops/*/*.jpg"
            )
        if paths:
            blocks[name] = sorted(paths)
    positives = {}
    for name in list(blocks)[1:]:
        positives[name] = [
            [i for i, original in enumerate(blocks["original"]) if original.name[:4] == path.name[:4]]
            for path in blocks[name]
        ]
        for path, originals in zip(blocks[name], positives[name], strict=True):
            if not originals:
                raise UserError(f"{path} has no original: expected {root}/original/{path.name[:4]}*.jpg")
    return blocks, positives


def copydays_lists(root, count_whitening=20000, count_distractors=10000, seed=0, classes=IMAGENET100_CLASSES):
    """Draw the two disjoint sets of images of the paper's section 4.3.1: ImageNet without the classes of ImageNet-100.

    Args:
        root: ImageNet's training images in class folders, or the folder that holds `train` and `val`.
        seed: with the same images the same lists.
        classes: file with the class folders to leave out.

    Returns:
        (whitening, distractors): lists of absolute paths

    Raises:
        UserError: a class is missing, or there are too few images.
    """
    folder = ImageFolder(root)
    left_out = {path.name for path in listed_folders(folder.root, classes)}
    paths = [
        path
        for path, label in zip(folder.paths, folder.labels, strict=True)
        if label >= 0 and folder.classes[label] not in left_out
    ]
    count = count_whitening + count_distractors
    if len(paths) < count:
        raise UserError(f"{root} has {len(paths)} images outside the classes of {classes}, expected at least {count}")
    drawn = np.random.default_rng(seed).choice(len(paths), count, replace=False)
    chosen = [os.path.abspath(paths[i]) for i in drawn]
    return chosen[:count_whitening], chosen[count_whitening:]


def copy_features(backbone, images):
    """Return the CLS token beside the patch tokens pooled by GeM with exponent 4: [B, 3, H, W] -> [B, 2D]."""
    tokens = backbone(images)
    gem = tokens[:, 1:].clamp(min=1e-6).pow(4).mean(1).pow(0.25)
    return torch.cat([tokens[:, 0], gem], dim=1)


class Whitening:
    """Whitening by PCA, learned on other images as DINO does: covariance of the features as they are, uncentred.

    Directions with less than 1e-5 of the largest eigenvalue are scaled as if they had that much.

    Args:
        features: [n, D]. In chunks they are taken to float64 [4096, D].
    """

    def __init__(self, features):
        chunks = features.split(4096)
        self.mean = sum(chunk.sum(0, dtype=torch.float64) for chunk in chunks) / len(features)  # [D]
        covariance = sum(chunk.double().T @ chunk.double() for chunk in chunks) / len(features)
        values, vectors = torch.linalg.eigh(covariance)
        self.projection = vectors * values.clamp(min=1e-5 * values.max()) ** -0.5  # [D, D]

    def __call__(self, features):
        """Map features [n, D] to whitened ones [n, D], the mean taken off."""
        return ((features.double() - self.mean) @ self.projection).float()


def mean_average_precision(similarity, positives, topk=0):
    """Return the mean over the queries of their average precision.

    Args:
        similarity: [queries, database].
        positives: of each query the places of its relevant images in the database.
        topk: length of the result that is looked at; 0 ranks the whole database.
    """
    ranking = similarity.topk(min(topk or similarity.shape[1], similarity.shape[1])).indices.numpy()
    precisions = [
        evaluation.average_precision(np.flatnonzero(np.isin(row, relevant)).tolist(), len(relevant))
        for row, relevant in zip(ranking, positives, strict=True)
    ]
    return sum(precisions) / len(precisions)


def parse_arguments(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog="@FILE reads options from a file.")
    evaluation.add_model_arguments(parser)
    # fmt: off
    add = parser.add_argument_group("protocol").add_argument
    add("--imsize", type=number(int, 1), default=320, help="images are resized to this square")
    add("--topk", type=number(int, 0), default=20, help="results looked at per query; 0 ranks the whole database")
    add = parser.add_argument_group("data").add_argument
    add("--data_path", required=True, help="Copydays: folder with original and strong")
    add("--whitening_path", help="folder or list of images to learn the whitening on; default: no whitening")
    add("--distractors_path", help="folder or list of images to add to the database; default: none")
    # fmt: on
    evaluation.add_computation_arguments(parser, batch_size=16)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    blocks, positives = copydays(args.data_path)
    others = {}
    for name, source in (("distractors", args.distractors_path), ("whitening", args.whitening_path)):
        others[name] = listed_images(source) if source else []
    backbone, made_with, _ = evaluation.open_model(
        args.pretrained_weights,
        arch=args.arch,
        patch_size=args.patch_size,
        checkpoint_key=args.checkpoint_key,
        seed=args.seed,
        img_size=args.imsize,
    )
    path = evaluation.result_file(args.output_dir, args.pretrained_weights, "copydays")

    rank, world_size, device = utils.init_distributed(args.dist_url)
    backbone.to(device)
    if rank == 0:
        for name, paths in blocks.items():
            size = COPYDAYS_SIZES.get(name, COPYDAYS_SIZES["original"])
            if len(paths) != size:
                print(f"note: {name} has {len(paths)} images, the official one {size}", flush=True)
        if 0 < len(others["whitening"]) < 2 * backbone.embed_dim:
            count, dims = len(others["whitening"]), 2 * backbone.embed_dim
            utils.warn(f"whitening: {count} images do not span the {dims} dimensions of the features, give more")
    transform = T.Compose([T.Resize((args.imsize, args.imsize), InterpolationMode.BICUBIC), to_pixels()])
    features = {}
    for name, paths in {**blocks, **others}.items():
        if paths:
            features[name] = extract_features(
                lambda images: copy_features(backbone, images),
                ImageList(paths, transform, upright=False),
                device,
                batch_size=args.batch_size_per_gpu,
                num_workers=args.num_workers,
                title=name,
            )
    if rank == 0:
        whiten = Whitening(features["whitening"]) if others["whitening"] else lambda x: x
        database = torch.cat([features[name] for name in ("original", "distractors") if name in features])
        database = F.normalize(whiten(database))
        score = {}
        for name in positives:
            queries = F.normalize(whiten(features[name]))
            score[name] = mean_average_precision(queries @ database.T, positives[name], args.topk)
            print(f"copy detection, {name}: mAP {score[name]:.3f}", flush=True)
        images = {name: len(paths) for name, paths in {**blocks, **others}.items()}
        evaluation.write_result(path, {"map": score, "images": images}, made_with, args)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
