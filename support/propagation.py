"""Propagation of masks through videos by patch features: DAVIS-2017's data, DINO's protocol, DAVIS's measures."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from support.decoding import image_size
from support.dense import IGNORED, read_mask
from support.features import to_pixels
from support.files import atomic_write, make_folder, read_text
from utils import UserError

DAVIS = "ImageSets/2017/val.txt", "JPEGImages/480p", "Annotations/480p"
SIMILARITIES = 2**24  # cosines that are computed at a time


class Video(NamedTuple):
    """The frames of a video, of (width, height) pixels, and the annotations, by number of the frame."""

    name: str
    frames: list[Path]
    masks: dict[int, Path]
    size: tuple[int, int]


def read_davis(root: Path) -> list[Video]:
    """Find the validation videos in DAVIS-2017's layout, see docs/dense.md.

    Raises:
        UserError: the layout is another one; a video has fewer than two frames, images of several sizes, or no object
            in the annotation of its first frame.
    """
    listing, images, annotations = (root / place for place in DAVIS)
    layout = f"expected DAVIS-2017's {listing}, {images}/VIDEO/*.jpg and {annotations}/VIDEO/*.png"
    names = read_text(listing).split() if os.path.isfile(listing) else []
    if not names:
        raise UserError(f"{listing} is missing or lists no video: {layout}")
    videos = []
    for name in names:
        frames = sorted((images / name).glob("*.jpg")) if name == os.path.basename(name) else []
        if len(frames) < 2:
            raise UserError(f"the video {name} has {len(frames)} frames, expected at least 2: {layout}")
        paths, size = [annotations / name / f"{frame.stem}.png" for frame in frames], image_size(frames[0])
        masks = {i: path for i, path in enumerate(paths) if path.is_file()}
        if 0 not in masks or not {*np.unique(np.asarray(read_mask(masks[0])))} - {0, IGNORED}:
            raise UserError(f"{paths[0]} is missing or has no object: the first frame needs an annotation; {layout}")
        for path in [*frames, *masks.values()]:
            if (found := image_size(path)) != size:
                expected = "expected {}x{} as the first frame of the video".format(*size)
                raise UserError(f"{path} has {found[0]}x{found[1]} pixels, {expected}")
        videos.append(Video(name, frames, masks, size))
    return videos


def davis_size(size: tuple[int, int], short_side: int, patch_size: int) -> list[int]:
    """Return the size to which DINO resizes frames: the longer side is cut to a multiple of 64 pixels.

    If 64 is no multiple of the patch size, both sides are cut to multiples of that.
    """
    short, unit, least = short_side // patch_size * patch_size, patch_size if 64 % patch_size else 64, min(size)
    return [short if side == least else max(short * side // least // unit * unit, short) for side in size]


def frame_pixels(size: Sequence[int], image: Image.Image) -> Tensor:
    """Resize a frame to (width, height) without antialiasing, as DINO does, and normalize it: [3, height, width]."""
    return to_pixels()(Image.fromarray(cv2.resize(np.asarray(image), size)))


def propagate_labels(
    features: Tensor,
    first_labels: Tensor,
    grid: tuple[int, int],
    num_classes: int,
    n_last_frames: int = 7,
    radius: int | None = 12,
    topk: int = 5,
    temperature: float = 0.1,
) -> Tensor:
    """Propagate the labels of a video's first frame to the others by patch features, as DINO does on DAVIS-2017.

    The soft label of a patch is a mean over its context: the first frame and the `n_last_frames` before its own, with
    their soft labels. Weights are exp(cosine / temperature) of the `topk` patches with the highest cosines among all
    frames of the context, and of those that tie with the last one.

    The search is exact and works through a frame in bands of patch rows. On 480p at patch size 8 (60×107 patches,
    D = 384, 8 frames of context) it needs at most 0.5 GB of scratch memory; beside it lie the features, twice, 20 MB a
    frame, and the soft labels, 26 kB a frame and class.

    Args:
        features: [T, h·w, D], patches in rows, not necessarily normalized.
        first_labels: ints [h, w], classes from 0.
        grid: (h, w).
        num_classes: C.
        radius: a patch sees patches at most so many rows and columns away. 0 or None: all patches.

    Returns:
        soft labels [T-1, C, h, w] of the frames after the first; the sum over the classes is 1
    """
    rows, columns = grid
    reach = radius or max(grid)
    tokens = F.normalize(features, dim=-1).unflatten(1, grid)  # [T, h, w, D]
    labels = tokens.new_zeros(len(tokens), rows, columns, num_classes)
    labels[0] = F.one_hot(first_labels.long(), num_classes)
    row, column = (torch.arange(length, device=tokens.device) for length in grid)
    near_columns = (column[:, None] - column).abs() <= reach  # [w, w]
    for t in range(1, len(tokens)):
        context = [0, *range(max(1, t - n_last_frames), t)]
        band = max(1, SIMILARITIES // (len(context) * rows * columns**2))
        for top in range(0, rows, band):
            own, seen = slice(top, top + band), slice(max(0, top - reach), top + band + reach)
            sources = tokens[context, seen].flatten(0, 2)  # [n·R·w, D]
            near_rows = (row[own, None] - row[seen]).abs() <= reach  # [r, R]
            near = near_rows[:, None, None, :, None] & near_columns[None, :, None, None, :]  # [r, w, 1, R, w]
            cosines = (tokens[t, own] @ sources.T).unflatten(2, (len(context), -1, columns))  # [r, w, n, R, w]
            cosines = cosines.masked_fill_(~near, -torch.inf).flatten(2)
            lowest = cosines.topk(min(topk, cosines.shape[2])).values[..., -1:]
            weights = cosines.masked_fill_(cosines < lowest, -torch.inf).div_(temperature).softmax(2)
            labels[t, own] = weights @ labels[context, seen].flatten(0, 2)
    return labels[1:].permute(0, 3, 1, 2)


def masks_of_soft_labels(soft_labels: Tensor, patch_size: int) -> np.ndarray:
    """Turn propagated labels into masks as DINO does: upsampled, each class scaled to [0, 1], the highest one taken.

    Args:
        soft_labels: [T, C, h, w].
        patch_size: p.

    Returns:
        uint8 [T, h·p, w·p], classes
    """
    masks = []
    for frame in soft_labels:  # one at a time, for memory
        pixels = F.interpolate(frame[None], scale_factor=patch_size, mode="bilinear")[0]
        low, high = (bound[:, None, None] for bound in pixels.flatten(1).aminmax(dim=1))
        masks.append(((pixels - low) / (high - low).clamp(min=1e-12)).argmax(0).byte().cpu().numpy())
    return np.stack(masks)


def region_similarity(mask: np.ndarray, truth: np.ndarray) -> float:
    """Return DAVIS's J, the intersection over union of two bool masks [H, W]; 1 if both are empty."""
    union = (mask | truth).sum()
    return float((mask & truth).sum() / union) if union else 1.0


def boundary_measure(mask: np.ndarray, truth: np.ndarray, tolerance: float = 0.008) -> float:
    """Return DAVIS's F, the harmonic mean of precision and recall of the boundary pixels.

    A boundary pixel is right if the other mask has one in a disk around it, whose radius is `tolerance` times the
    image's diagonal, rounded up. A pixel is on the boundary if its right, lower or lower right neighbour differs.

    Args:
        mask, truth: bool [H, W].
    """
    radius = int(np.ceil(tolerance * np.hypot(*mask.shape)))
    offsets = np.arange(-radius, radius + 1) ** 2
    disk = (offsets[:, None] + offsets <= radius**2).astype(np.uint8)
    boundaries, reached = [], []
    for region in (mask, truth):
        padded = np.pad(region, (0, 1), "edge")
        others = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
        boundaries.append(np.logical_or.reduce([region != other for other in others]))
        reached.append(cv2.dilate(boundaries[-1].astype(np.uint8), disk) > 0)
    found, true = (int(boundary.sum()) for boundary in boundaries)
    if not found or not true:
        return float(found == true)
    precision, recall = (boundaries[0] & reached[1]).sum() / found, (boundaries[1] & reached[0]).sum() / true
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def propagated_masks(
    features: Tensor, first_mask: np.ndarray, grid: tuple[int, int], patch_size: int, **options: Any
) -> np.ndarray:
    """Propagate the annotation of a video's first frame and scale it to the size of the annotation, as DINO does.

    Args:
        features: [T, h·w, D].
        first_mask: labels, uint8 [H, W]; IGNORED counts as background, 0.
        grid: (h, w).
        options: of `propagate_labels`.

    Returns:
        uint8 [T, H, W]; the first is `first_mask`
    """
    labels = np.where(first_mask == IGNORED, 0, first_mask)
    small = np.array(Image.fromarray(labels).resize(grid[::-1], Image.Resampling.NEAREST))
    first_labels = torch.tensor(small, device=features.device)
    soft_labels = propagate_labels(features, first_labels, grid, int(labels.max()) + 1, **options)
    size, masks = first_mask.shape[::-1], map(Image.fromarray, masks_of_soft_labels(soft_labels, patch_size))
    return np.stack([first_mask, *(np.array(mask.resize(size, Image.Resampling.NEAREST)) for mask in masks)])


def write_masks(masks: np.ndarray, video: Video, folder: Path) -> None:
    """Write masks in DAVIS's layout for results, FOLDER/VIDEO/FRAME.png, with the palette of the first annotation.

    Args:
        masks: labels, uint8 [T, H, W].

    Raises:
        UserError: a file cannot be written.
    """
    palette = read_mask(video.masks[0]).getpalette() or [level for level in range(256) for _ in "RGB"]
    make_folder(folder / video.name, "the folder of the masks")
    for mask, frame in zip(masks, video.frames, strict=True):
        picture = Image.fromarray(mask)
        picture.putpalette(palette)
        with atomic_write(folder / video.name / f"{frame.stem}.png") as temporary:
            picture.save(temporary, "PNG")


def video_scores(masks: np.ndarray, truths: Mapping[int, np.ndarray]) -> dict[int, dict[str, float]]:
    """Return DAVIS's J and F in percent of each object in the first frame, {label: {"j", "f"}}.

    Means over the annotated frames except the first and the last one; {} without such frames.

    Args:
        masks: labels, uint8 [T, H, W]; the first is the annotation.
        truths: {number of the frame: annotation, uint8 [H, W]}. IGNORED does not count.
    """
    objects = sorted({*np.unique(masks[0]).tolist()} - {0, IGNORED})
    scores: dict[int, list[tuple[float, float]]] = {}
    for t, truth in truths.items():
        for label in objects if 0 < t < len(masks) - 1 else []:
            pair = (masks[t] == label) & (truth != IGNORED), truth == label
            scores.setdefault(label, []).append((region_similarity(*pair), boundary_measure(*pair)))
    return {label: dict(zip("jf", (100 * np.mean(pairs, 0)).tolist(), strict=True)) for label, pairs in scores.items()}
