"""Every picture that is drawn. Nothing here needs a display."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

import augment
from datasets import read_image, to_uint8

# Okabe and Ito's colours, which colour-blind readers can tell apart.
TEACHER, STUDENT, OVERLAP = "#E69F00", "#0072B2", "#009E73"


def example_photograph():
    """Return the path of a photograph that scikit-learn ships, 640×427 pixels."""
    import sklearn.datasets

    return Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"


def draw_two_crops(path, sizes, scales, seed):
    """Read an image and cut a teacher's and a student's crop out of it.

    Args:
        sizes, scales: of the two crops: side in pixels after resizing, (low, high) share of the image's area.
        seed: of box and flip.

    Returns:
        (image [H, W, 3], crops two arrays [S, S, 3], boxes [2, 4], flips [2])
    """
    image = to_uint8(read_image(path))
    rng = np.random.default_rng(seed)
    boxes = [augment.random_box(rng, *image.shape[-2:], scale) for scale in scales]
    flips = [bool(rng.random() < 0.5) for _ in scales]
    crops = [augment.crop_and_resize(image[None], box, size)[0] for box, size in zip(boxes, sizes, strict=True)]
    crops = [crop.flip(-1) if flip else crop for crop, flip in zip(crops, flips, strict=True)]
    crops = [crop.permute(1, 2, 0).numpy() for crop in crops]
    return image.permute(1, 2, 0).numpy(), crops, boxes, flips


def draw_matches(image, crops, boxes, flips, patch_size, idx_a, idx_b):
    """Draw two crops of an image and their matched patches, numbered alike (the paper's Figures 2 and 3).

    Args:
        image: uint8 [H, W, 3].
        crops: two arrays [S, S, 3], the teacher's and the student's, as the network sees them.
        boxes: (top, left, height, width) of each in the image.
        flips: whether each is mirrored.
        patch_size: in pixels of the crops.
        idx_a, idx_b: matched tokens, from `match_patches`.

    Returns:
        matplotlib Figure of three panels: the boxes and their intersection in the image, and the two crops.
    """
    height, width = image.shape[:2]
    ratio = width / height
    figure = Figure(figsize=(2.6 * (ratio + 2.2), 3.1), dpi=200, layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=[ratio, 1, 1])

    axes[0].imshow(image)
    names = ("Teacher’s crop", "Student’s crop")
    for box, name, colour in zip(boxes, names, (TEACHER, STUDENT), strict=True):
        top, left, h, w = box
        axes[0].add_patch(Rectangle((left, top), w, h, fill=False, edgecolor=colour, linewidth=2.5, label=name))
    (top_a, left_a, h_a, w_a), (top_b, left_b, h_b, w_b) = boxes
    top, left = max(top_a, top_b), max(left_a, left_b)
    bottom, right = min(top_a + h_a, top_b + h_b), min(left_a + w_a, left_b + w_b)
    if top < bottom and left < right:
        style = {"facecolor": OVERLAP, "alpha": 0.25, "edgecolor": "none", "label": "Intersection"}
        axes[0].add_patch(Rectangle((left, top), right - left, bottom - top, **style))
    axes[0].set_title("Image", fontsize=9)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)

    matched = len(idx_a) - 1
    for axis, crop, flip, tokens, name, colour in zip(
        axes[1:], crops, flips, (idx_a, idx_b), names, (TEACHER, STUDENT), strict=True
    ):
        axis.imshow(crop)
        side = crop.shape[0]
        columns = crop.shape[1] // patch_size
        lines = {"color": "white", "linewidth": 0.4, "alpha": 0.6}
        for edge in range(patch_size, side, patch_size):
            axis.axhline(edge - 0.5, **lines)
            axis.axvline(edge - 0.5, **lines)
        font = min(8.0, 95 / columns)
        for number, token in enumerate(tokens[1:].tolist(), start=1):
            row, column = divmod(token - 1, columns)
            x, y = column * patch_size - 0.5, row * patch_size - 0.5
            fill = colormaps["plasma"](number / (matched + 1))
            axis.add_patch(Rectangle((x, y), patch_size, patch_size, facecolor=fill, alpha=0.28, edgecolor="none"))
            centre = (x + patch_size / 2, y + patch_size / 2)
            outline = [withStroke(linewidth=1.2, foreground="black")]
            axis.annotate(
                str(number), centre, color="white", fontsize=font, ha="center", va="center", path_effects=outline
            )
        for spine in axis.spines.values():
            spine.set(color=colour, linewidth=2.5)
        axis.set_title(f"{name}, {side}×{side}" + (", mirrored" if flip else ""), fontsize=9)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    return figure
