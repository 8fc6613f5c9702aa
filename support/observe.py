"""Observing a training run: online k-NN and segmentation, pictures for TensorBoard, and the environment of the run."""

import contextlib
import copy
import datetime
import functools
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from augment import resize
from patch_matching import match_patches
from support import features
from support.dense import (
    IGNORED,
    AnnotatedImages,
    knn_segment,
    patch_memory,
    patch_tokens,
    segmentation_confusion,
    segmentation_metrics,
    voc_folder,
)
from support.evaluation import check_splits, classification_metrics, knn_votes
from support.features import eval_transform, extract_features, normalized_cls
from support.images import ImageList, LabeledImages
from support.loader import ViewBatches, Workers, fit_workers
from support.resources import usable_cores
from support.sources import DataSpec, build_dataset
from utils import VERSION, UserError, warn
from vision_transformer import VisionTransformer

NEIGHBOURS = 10
MAX_REFERENCES, MAX_QUERIES = 5000, 1000  # maximum number of images, to bound the time of the online k-NN
MAX_ANNOTATED, MAX_PATCHES = {"train": 500, "val": 100}, 20000  # the same for the online segmentation, and its memory


def is_due(epoch: int, every: int, epochs: int) -> bool:
    """Return True after every `every`-th epoch and after the last one. Epochs count from 0; `every` 0 is never."""
    return every > 0 and ((epoch + 1) % every == 0 or epoch + 1 == epochs)


class OnlineKNN:
    """k-NN accuracy of a network during training, as in `eval_knn.py` with K = 10, on a limited number of images.

    Queries are validation images. If the data set has none, queries are training images that are held out of the
    references; the network is trained on them, without their labels. At most MAX_REFERENCES training and MAX_QUERIES
    validation images are used, always the same. Unreadable images are replaced by black ones, with a warning: the
    evaluation must not end the training.

    Args:
        train: labeled training data set.
        spec: names the images, to open the validation images.
        crop_size: side of the images in pixels.
        batch_size, num_workers: images per batch and data-loading workers.

    Raises:
        UserError: images have no labels, or training and validation images have different classes.
    """

    def __init__(self, train: LabeledImages, spec: DataSpec, crop_size: int, batch_size: int, num_workers: int):
        train = copy.copy(train)
        train.transform = eval_transform(crop_size)
        if isinstance(train, ImageList):
            train.min_side = None
        rng = np.random.default_rng(0)
        data_path = spec.data_path or spec.dataset
        if not train.has_splits and not spec.tuning:
            check_splits({"train": train}, data_path)
            shuffled = rng.permutation(len(train))
            held_out = min(MAX_QUERIES, max(len(train) // 5, 1))
            chosen = {"val": (train, shuffled[:held_out]), "train": (train, shuffled[held_out:][:MAX_REFERENCES])}
        else:
            val = build_dataset(spec, "val", train.transform)
            check_splits({"train": train, "val": val}, data_path)
            limits = {"train": (train, MAX_REFERENCES), "val": (val, MAX_QUERIES)}
            chosen = {split: (x, rng.permutation(len(x))[:limit]) for split, (x, limit) in limits.items()}
        if not len(chosen["train"][1]):
            raise UserError(f"found {len(train)} images, too few for online k-NN")
        self.num_classes = len(train.classes)
        self.labels = {split: torch.tensor(images.labels)[indices] for split, (images, indices) in chosen.items()}
        self.splits = {s: BlackForBad(Subset(x, i.tolist()), crop_size) for s, (x, i) in chosen.items()}
        self.batch_size, self.num_workers = batch_size, num_workers
        self.batch_bytes = batch_size * 12 * crop_size**2  # 3 floats per pixel

    def __call__(self, backbone: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> float | None:
        """Return the top-1 accuracy in percent on rank 0 and None on other ranks. A collective call.

        Args:
            backbone: normalized images [B, 3, S, S] -> tokens [B, 1+P, D].
            device: device of the backbone.
        """
        references, queries = (
            extract_features(
                normalized_cls(backbone), self.splits[split], device, self.batch_size, self.num_workers, title=None
            )
            for split in ("train", "val")
        )
        if references is None or queries is None:
            return None
        references, queries, k = references.to(device), queries.to(device), min(NEIGHBOURS, len(references))
        votes = knn_votes(references, self.labels["train"].to(device), queries, self.num_classes, k)
        return classification_metrics(votes, self.labels["val"].to(device))["top1"]


class OnlineSegmentation:
    """k-NN segmentation by a network during training, as in `eval_dense.py knn-segmentation`, on limited images.

    The memory has at most MAX_PATCHES patches of MAX_ANNOTATED["train"] images. Queries are at most
    MAX_ANNOTATED["val"] images, or, in a folder without validation images, training images that are held out of the
    memory. They are always the same. Unreadable images are ignored, with a warning: the evaluation must not end the
    training.

    Args:
        data_path: folder of annotated images, see `AnnotatedImages`.
        side: side of the images in pixels, a multiple of the patch.
        batch_size, num_workers: images per batch and data-loading workers.
        intensity_range: of the training images.

    Raises:
        UserError: see `AnnotatedImages`, or a single image is annotated.
    """

    def __init__(
        self,
        data_path: str,
        side: int,
        batch_size: int,
        num_workers: int,
        intensity_range: Sequence[float] | None = None,
    ) -> None:
        train, rng = ReadableImages(data_path, "train", side), np.random.default_rng(0)
        if voc_folder(Path(data_path)) or (Path(data_path) / "images" / "val").exists():
            val = ReadableImages(data_path, "val", side, train.classes)
            chosen = {"train": rng.permutation(len(train)), "val": rng.permutation(len(val))}
        else:
            val, shuffled, held_out = copy.copy(train), rng.permutation(len(train)), -(-len(train) // 5)
            chosen = {"train": shuffled[held_out:], "val": shuffled[:held_out]}
        if not len(chosen["train"]):
            raise UserError(f"{data_path} has {len(train)} annotated image, too few for a memory and queries")
        self.splits = {"train": train, "val": val}
        for split, images in self.splits.items():
            images.keep(sorted(chosen[split][: MAX_ANNOTATED[split]].tolist()))
            images.use_intensity_range(intensity_range)
        self.batch_size, self.num_workers = batch_size, num_workers
        self.batch_bytes = batch_size * train.item_bytes

    def __call__(self, backbone: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> float | None:
        """Return the mean IoU of all classes in percent, or None if no patch is annotated. A collective call.

        Args:
            backbone: normalized images [B, 3, S, S] -> tokens [B, 1+P, D].
            device: device of the backbone.
        """
        network, how = patch_tokens(backbone), (device, self.batch_size, self.num_workers)
        try:
            memory, shares = patch_memory(network, self.splits["train"], *how, MAX_PATCHES)
        except UserError as error:
            warn(f"no online segmentation: {error}")
            return None
        scorer = functools.partial(knn_segment, memory, shares)
        confusion = segmentation_confusion(network, scorer, self.splits["val"], *how)
        return segmentation_metrics(confusion, self.splits["val"].classes)["miou"]


class ReadableImages(AnnotatedImages):
    """Annotated images where an unreadable one is black and its pixels are ignored, with a warning."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        try:
            return super().__getitem__(index)
        except UserError as error:
            warn(f"{error}; online segmentation ignores the image")
            return torch.zeros(3, self.side, self.side), torch.full((self.side, self.side), IGNORED)


def fit_all_workers(
    num_workers: int, batch_bytes: float, evaluations: Sequence[OnlineKNN | OnlineSegmentation]
) -> Workers:
    """Return the training's data-loading workers, see `fit_workers`. To be called before a loader is open.

    The loader of an online evaluation is open at the same time, one after the other. They keep their workers if the
    batches of all fit into the shared memory. Otherwise they load images without workers.
    """
    largest = max((evaluation.batch_bytes for evaluation in evaluations), default=0)
    if fit_workers(num_workers, batch_bytes + largest, quiet=True) == Workers(num_workers):
        return Workers(num_workers)
    for evaluation in evaluations:
        evaluation.num_workers = 0
    return fit_workers(num_workers, batch_bytes)


class BlackForBad(Dataset):
    """A data set that replaces unreadable images by black ones, with a warning."""

    def __init__(self, dataset: Subset, crop_size: int):
        self.dataset, self.crop_size = dataset, crop_size

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        try:
            return self.dataset[index]
        except UserError as error:
            warn(f"{error}; online k-NN uses a black image")
            return torch.zeros(3, self.crop_size, self.crop_size), -1


@torch.no_grad()
def training_pictures(
    backbone: VisionTransformer, view_batches: ViewBatches, key: tuple[int, int, list[int]]
) -> dict[str, np.ndarray]:
    """Return pictures of one image, {name: uint8 [H, W, 3]}.

    Args:
        backbone: the network.
        view_batches: makes the views.
        key: key of a batch with one image, (epoch, step, [sample index]).

    Returns:
        views: the teacher's first global view above each other view of the student, with matched patches in the same
            color.
        attention: attention of CLS in the last block, per head, and the mean over heads, see `figures.attention_map`.
        features: the first three principal components of the patch features as colors, if they differ.

        Each part of a picture is labeled.
    """
    from support import figures  # imports matplotlib, which only this process needs

    image, (views, _) = view_batches.readable_image(key[2][0], {}), view_batches.make_views(key)
    rule, patch_size = view_batches.rule, view_batches.patch_size
    grids = [(view.pixels.shape[-1] // patch_size,) * 2 for view in views]
    size = grids[0][0] * patch_size  # a rest of the pixels is in no patch
    pixels = [figures.to_picture(view.pixels[0]) for view in views]
    names = [
        f"{kind} view {i}" for kind, count in (("global", 2), ("local", len(views) - 2)) for i in range(1, 1 + count)
    ]
    above, below = [], []
    for name, view, picture, grid in zip(names[1:], views[1:], pixels[1:], grids[1:], strict=True):
        idx_a = idx_b = torch.zeros(1, dtype=torch.int64)  # only CLS
        if rule is not None:
            box_a, flip_a, box_b, flip_b = views[0].boxes[0], views[0].flips[0], view.boxes[0], view.flips[0]
            idx_a, idx_b = match_patches(box_a, flip_a, grids[0], box_b, flip_b, grid, rule)
        tinted = figures.tint_patches(pixels[0], idx_a[1:].numpy(), grids[0][1], patch_size)
        above.append((f"teacher: {names[0]}", tinted))
        below.append((f"student: {name}", figures.tint_patches(picture, idx_b[1:].numpy(), grid[1], patch_size)))

    resized = resize(image, (size, size), "bicubic")
    heads = features.cls_attention(backbone, resized)
    titles = [*(f"head {head}" for head in range(1, len(heads) + 1)), "mean of heads"]
    maps = [figures.attention_map(head, patch_size) for head in (*heads, heads.mean(0))]
    maps = [(f"{title}: {text.replace('×', 'x')}", colors) for title, (text, colors) in zip(titles, maps, strict=True)]
    (colors,), explained = features.principal_colors([features.patch_features(backbone, resized)], [resized])
    title = "patch features" if explained.any() else "no structure"
    return {
        "views": figures.tile([above, below]),
        "attention": figures.tile([[("image", resized), *maps]]),
        "features": figures.tile([[("image", resized), (title, figures.enlarge(colors, patch_size))]]),
    }


PACKAGES = "torch torchvision timm numpy pillow opencv-python-headless safetensors scikit-learn matplotlib tensorboard"


def environment() -> dict[str, Any]:
    """Return the environment of a run: time, command line, version, git commit, packages and machine."""
    root = Path(__file__).parent.parent

    def git(*words: str) -> str | None:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # git is missing, or this is no repository
            return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        return None

    packages = dict.fromkeys(PACKAGES.split())
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # another one may provide the same modules
            packages[name] = importlib.metadata.version(name)
    own = git("rev-parse", "--show-toplevel") == str(root.resolve())  # False inside another repository
    changes = git("status", "--porcelain", "--untracked-files=no") if own else None
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "version": VERSION,
        "git_commit": git("rev-parse", "HEAD") if own else None,
        "git_changed": bool(changes) if changes is not None else None,
        "python": platform.python_version(),
        "packages": packages,
        "system": platform.platform(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_cores": usable_cores(),
        "threads": torch.get_num_threads(),
    }
