"""All figures and pictures. Drawing needs no display.

A figure spans one or two columns of a paper and is written as PNG or PDF. Many images are drawn on several pages.
"""

import contextlib
import os
import textwrap
import warnings
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib.style
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import ConnectionPatch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import Bbox
from numpy.typing import ArrayLike

from support.files import atomic_write, make_folder
from utils import UserError, first_line, printable, warn

# Color-blind safe palette of Okabe and Ito. Frames of views have other colors than matches.
TEACHER, STUDENT = "#E69F00", "#0072B2"
SAME, ADJACENT, OTHER = "#009E73", "#F0E442", "#CC79A7"
COLORS = (STUDENT, "#D55E00", SAME, OTHER, TEACHER, "#56B4E9", "#000000", ADJACENT, "#999999", "#882255")
LINE_COLORS = COLORS[:7]  # yellow is too light for lines on white
LINE_STYLES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1.5, 1, 1.5)))
HEAT = colormaps["inferno"]  # of attention and cosines: bright is high
PANELS = {  # logged value: (title, unit)
    "loss": ("Loss", "nats"),
    "knn_top1": ("Online k-NN", "top-1 accuracy (%)"),
    "entropy_share": ("Entropy of the teacher’s outputs", "share of ln K"),
    "matched_patches": ("Matched patches", "per pair of views"),
}
MAX_CURVES = len(LINE_COLORS) * len(LINE_STYLES)
MAX_PAIRS = 1024  # of patches, in a figure of matches
SUFFIXES = (".png", ".pdf")
LABEL_HEIGHT = 18  # of a picture in a tile, in pixels
NO_STRUCTURE = "no structure:\nthe patches hardly differ"
WIDTH, PAGE_HEIGHT = 7.0, 10.0  # of a figure over two columns and of a full page, in inches
MAX_NAMED = 100  # classes of a map
# Draws the same whatever a matplotlibrc says. `$` in a name starts no formula, and the fonts of a PDF can be edited.
plain_style = matplotlib.style.context(["default", {"text.parse_math": False, "pdf.fonttype": 42}])
Images = dict[str, np.ndarray]  # {name: uint8 [H, W, 3]}
Arrays = Sequence[np.ndarray]


class Panel(NamedTuple):
    """A title, of one or two lines, and pictures below each other: uint8 [H, W, 3], or a text instead of one."""

    title: str
    pictures: list[np.ndarray | str]


Lines = list[list[Panel]]


def fit(name: str, width: float, size: float = 8, lines: int = 1) -> str:
    """Break a name into at most `lines` lines of about `width` inches, and replace the middle of a longer name by `…`.

    Args:
        name: a leading `_` is preceded by a space, since matplotlib leaves such names out of legends.
        size: of the font, in points.
    """
    characters = int(width * 72 / size / 0.7)  # a wide character of DejaVu Sans is 0.7 times as wide as its size
    half = characters * lines // 2
    name = printable(name)
    name = name if len(name) <= 2 * half else f"{name[: half - 1]}…{name[-half:]}"
    return (" " if name.startswith("_") else "") + "\n".join(
        textwrap.wrap(name, characters, max_lines=lines, placeholder="…")
    )


def check_output(path: str | os.PathLike) -> None:
    """Create the folder of a figure's file.

    Raises:
        UserError: the suffix is unknown, the path is a folder or a file that matplotlib did not write, such as an input
            image after --output, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"cannot write {path}: found the suffix {path.suffix!r}, expected {' or '.join(SUFFIXES)}")
    make_folder(path.parent, "the folder of --output")
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(f"{path}.tmp")  # fails if the name is too long
        if path.is_dir():
            raise UserError(f"cannot write {path}: found a folder, expected a file name")
        if path.exists() and b"Matplotlib" not in path.read_bytes():
            raise UserError(f"cannot write {path}: found a file that is not a figure, expected a new name or a figure")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another file") from error


@plain_style
def save(pages: Sequence[Figure], path: str | os.PathLike) -> list[Path]:
    """Write figures as PNG or PDF, depending on the suffix, and return the paths: NAME.png, NAME-2.png, ...

    Characters that the font lacks become one line on stderr, and so does each warning of matplotlib.
    """
    path = Path(path)
    paths = [path, *(path.with_stem(f"{path.stem}-{number}") for number in range(2, len(pages) + 1))]
    with warnings.catch_warnings(record=True) as caught:
        for figure, file in zip(pages, paths, strict=True):
            check_output(file)
            with atomic_write(file) as temporary:
                figure.savefig(temporary, format=path.suffix[1:].lower())
    texts = [first_line(warning.message) for warning in caught]
    texts = ["the font lacks characters of some names" if text.startswith("Glyph ") else text for text in texts]
    for text in dict.fromkeys(texts):
        warn(f"{path}: {text}")
    return paths


def to_picture(pixels: torch.Tensor) -> np.ndarray:
    """Turn a view of one image, a tensor [3, S, S], into an array [S, S, 3]."""
    return pixels.permute(1, 2, 0).numpy()


def enlarge(cells: np.ndarray, patch_size: int) -> np.ndarray:
    """Repeat each cell of an array [rows, columns, ...] over the pixels of its patch: [H, W, ...]."""
    return cells.repeat(patch_size, 0).repeat(patch_size, 1)


def heat_map(values: np.ndarray, patch_size: int) -> np.ndarray:
    """Turn an attention map [rows, columns] into colors, uint8 [H, W, 3], scaled to the map's maximum."""
    return enlarge(_heat(values / max(values.max(), 1e-12)), patch_size)


def _heat(values: np.ndarray) -> np.ndarray:
    """Turn values in [0, 1] into colors, uint8 [..., 3]."""
    return (255 * HEAT(values)[..., :3]).round().astype(np.uint8)


def tint_patches(image: np.ndarray, tokens: np.ndarray, columns: int, patch_size: int) -> np.ndarray:
    """Tint patches of an image, each in its own color. Pictures with equally many tokens use the same colors.

    Args:
        image: uint8 [H, W, 3].
        tokens: ints [n], numbers of patch tokens; patch 1 is the first.
        columns: number of patches in a row.

    Returns:
        uint8 [H, W, 3]
    """
    tint, share = np.zeros((*image.shape[:2], 3)), np.zeros((*image.shape[:2], 1))
    colors = 255 * colormaps["turbo"](np.linspace(0.05, 0.95, len(tokens)))[:, :3]
    for row, column, color in zip(*_place(tokens, columns), colors, strict=True):
        cell = slice(row * patch_size, (row + 1) * patch_size), slice(column * patch_size, (column + 1) * patch_size)
        tint[cell], share[cell] = color, 0.6
    return (image * (1 - share) + tint * share).round().astype(np.uint8)


def tile(rows: Sequence[Sequence[tuple[str, np.ndarray]]], side: int = 160, gap: int = 4) -> np.ndarray:
    """Lay out rows of labeled pictures on white, each picture scaled to the height `side`: uint8 [H, W, 3].

    Small pictures are enlarged with hard edges, large ones are averaged.

    Args:
        rows: lists of (label in ASCII, uint8 [h, w, 3]).
    """
    lines = []
    for row in rows:
        line = []
        for label, picture in row:
            size = (max(round(picture.shape[1] * side / picture.shape[0]), 1), side)
            interpolation = cv2.INTER_NEAREST if side >= picture.shape[0] else cv2.INTER_AREA
            picture = cv2.resize(picture, size, interpolation=interpolation)
            picture = np.pad(picture, ((LABEL_HEIGHT, gap), (0, gap), (0, 0)), constant_values=255)
            place = (2, LABEL_HEIGHT - 5)
            cv2.putText(picture, label, place, cv2.FONT_HERSHEY_SIMPLEX, 0.38, color=(0, 0, 0), lineType=cv2.LINE_AA)
            line.append(picture)
        lines.append(np.concatenate(line, 1))
    width = max(line.shape[1] for line in lines)
    lines = [np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0)), constant_values=255) for line in lines]
    return np.concatenate(lines)


@plain_style
def draw_attention(
    images: Images, attentions: Arrays, masks: Arrays, patch_size: int, threshold: float
) -> list[Figure]:
    """Draw the attention of the CLS token, head by head, as DINO's figures do.

    Args:
        images: {name: uint8 [H, W, 3]}.
        attentions: [heads + 1, rows, columns] per image, from CLS to the patches; the last map is the mean over heads.
        masks: booleans of the same shape, the patches that hold most of the attention.
        patch_size: side of a patch in pixels.
        threshold: share of the attention that a mask holds, for the label.

    Returns:
        pages with the attention maps, each scaled to its maximum, above the image with the patches outside the mask
        grayed out
    """
    lines: Lines = []
    for (name, image), attention, mask in zip(images.items(), attentions, masks, strict=True):
        panels = [Panel(name, [image, f"not grayed out:\n{threshold:.0%} of the\nattention"])]
        titles = [*(f"head {head}" for head in range(1, len(attention))), "mean of heads"]
        for title, values, kept in zip(titles, attention, mask, strict=True):
            grayed = np.where(enlarge(kept, patch_size)[..., None], image, 160 + image // 5)
            panels.append(Panel(title, [heat_map(values, patch_size), grayed]))
        lines += _in_lines(panels, 7)
    title = "Attention of CLS in the last block, scaled per map"
    return _draw_panels(lines, title, len(lines) // len(images), ("low", "high"))


@plain_style
def draw_features(images: Images, colors: Arrays, patch_size: int, explained: np.ndarray) -> list[Figure]:
    """Draw images above their patch features as colors, up to four images in a row.

    Args:
        images: {name: uint8 [H, W, 3]}.
        colors: uint8 [rows, columns, 3] per image, the first three principal components. A single color is labeled
            "no structure".
        explained: share of the variance per component, [3].

    Returns:
        pages
    """
    panels = []
    for (name, image), color in zip(images.items(), colors, strict=True):
        flat = not np.ptp(color, (0, 1)).any()
        panels.append(Panel(name, [image, NO_STRUCTURE if flat else enlarge(color, patch_size)]))
    title = "Patch features: first three principal components as red, green, blue"
    if explained.any():
        title += f" ({', '.join(f'{share:.0%}' for share in explained)} of the variance)"
    return _draw_panels(_in_lines(panels, 4), title)


def _in_lines(panels: list[Panel], columns: int) -> Lines:
    """Break a list of panels into lines of at most `columns`."""
    return [panels[start : start + columns] for start in range(0, len(panels), columns)]


def _draw_panels(lines: Lines, title: str, together: int = 1, ends: tuple[str, str] | None = None) -> list[Figure]:
    """Draw lines of panels in equal cells, on as many pages as needed.

    Args:
        together: number of lines that must be on one page.
        ends: texts at the low and at the high end of a bar with the colors of HEAT, the last axis of a page. None draws
            no bar.
    """
    columns, depth = max(2, *map(len, lines)), len(lines[0][0].pictures)
    panels = [panel for line in lines for panel in line]
    shapes = [panel.pictures[0].shape for panel in panels if isinstance(panel.pictures[0], np.ndarray)]
    cell_height = WIDTH / columns * np.clip(max(height / width for height, width, _ in shapes), 0.25, 1.5)
    line_height = 0.25 + 0.13 * max("\n" in panel.title for panel in panels) + depth * cell_height
    header = 0.3 if ends is None else 0.65
    per_page = max(int((PAGE_HEIGHT - header) / line_height) // together, 1) * together
    pages = [lines[start : start + per_page] for start in range(0, len(lines), per_page)]
    figures = []
    for number, page in enumerate(pages, start=1):
        text = title if len(pages) == 1 else f"{title} (page {number} of {len(pages)})"
        figure = _figure(header + len(page) * line_height, text)
        grid = figure.add_gridspec(len(page) * depth, columns)
        for row, line in enumerate(page):
            for column, panel in enumerate(line):
                for i, picture in enumerate(panel.pictures):
                    axis = figure.add_subplot(grid[row * depth + i, column], anchor="N")
                    axis.axis("off")
                    if isinstance(picture, str):
                        axis.text(0.5, 0.5, picture, fontsize=8, ha="center", va="center")
                    else:
                        axis.imshow(picture)
                    if i == 0:
                        parts = [fit(part, WIDTH / columns) for part in panel.title.split("\n")]
                        axis.set_title("\n".join(parts), fontsize=8, pad=3)
        if ends is not None:
            colors, cells = ScalarMappable(cmap=HEAT), figure.axes
            bar = figure.colorbar(colors, ax=cells, location="bottom", shrink=0.2, aspect=12, panchor=False)
            bar.set_ticks([0, 1], labels=ends, fontsize=8)
        figures.append(figure)
    return figures


def _figure(height: float, title: str = "") -> Figure:
    """Return an empty figure over two columns, `height` inches high."""
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    figure = Figure(figsize=(WIDTH, height), dpi=200, layout=layout)
    figure.suptitle(title, x=0.01, ha="left", fontsize=9, wrap=True)
    return figure


def _bare(axis: Axes, title: str = "", color: str | None = None) -> None:
    """Remove the ticks of an axis, set its title, and frame it in a color."""
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=8)
    if color is not None:
        axis.spines[:].set(color=color, linewidth=2)


@plain_style
def draw_matches(
    image: np.ndarray,
    crops: Arrays,
    boxes: Sequence[Sequence[int]],
    flips: Sequence[bool],
    patch_size: int,
    idx_a: ArrayLike,
    idx_b: ArrayLike,
    nearest_a: ArrayLike | None = None,
) -> Figure:
    """Draw two crops of an image and their matched patches (the paper's Figures 2 and 3).

    Args:
        image: uint8 [H, W, 3].
        crops: uint8 [S, S, 3] and [s, s, 3], the teacher's and the student's, as the networks see them.
        boxes: (top, left, height, width) of each crop in the image.
        flips: whether each crop is mirrored.
        patch_size: side of a patch in pixels of the crops.
        idx_a, idx_b: ints [n], tokens of the teacher's and the student's patches that geometry matches, without CLS.
        nearest_a: ints [n], the teacher's patch nearest in feature space to each of `idx_b`. None draws geometry only.

    Returns:
        the image with both boxes and their intersection, the pairs by geometry, and the pairs by features, each with
        the teacher's crop above the student's. The two patches of a pair have the same number and a line between them;
        a patch of several pairs has the first number and `+`. The color of a pair by features shows its distance from
        geometry. Frames have other colors than pairs.
    """
    idx_a, idx_b = np.asarray(idx_a), np.asarray(idx_b)
    columns = [("By geometry", idx_a, colormaps["summer"](np.linspace(0, 1, len(idx_a))))]
    width_ratios, height = [1.7, 1], 5.4
    distance_colors = (SAME, ADJACENT, OTHER)
    if nearest_a is not None:
        nearest_a = np.asarray(nearest_a)
        distance = patch_distance(nearest_a, idx_a, crops[0].shape[1] // patch_size)
        title = "By features" + (f": {(distance == 0).mean():.0%} the same" if len(distance) else "")
        columns.append((title, nearest_a, to_rgba_array([distance_colors[min(d, 2)] for d in distance])))
        width_ratios, height = [1.25, 1, 1], 4.4
    figure = _figure(height)
    grid = figure.add_gridspec(2, len(width_ratios), width_ratios=width_ratios)
    _draw_boxes(figure.add_subplot(grid[:, 0]), image, boxes)
    for number, (title, tokens_a, pair_colors) in enumerate(columns, start=1):
        axes = [figure.add_subplot(grid[row, number]) for row in (0, 1)]
        _draw_pairs(axes, crops, patch_size, (tokens_a, idx_b), pair_colors)
        axes[0].set_title(title, fontsize=8)
    for axis, whose, crop, flip in zip(figure.axes[1:3], ("teacher", "student"), crops, flips, strict=True):
        label = f"{whose}’s view\n{crop.shape[0]}×{crop.shape[1]}"
        axis.set_ylabel(label + (", mirrored" if flip else ""), fontsize=8)
    if nearest_a is not None:
        handles = [Rectangle((0, 0), 1, 1, color=color) for color in distance_colors]
        labels = ["same patch as by geometry", "adjacent patch", "other patch"]
        if len(np.unique(nearest_a)) < len(nearest_a):
            handles.append(Rectangle((0, 0), 1, 1, fill=False, linewidth=0))
            labels.append("5+: pair 5 and others")
        figure.legend(handles, labels, loc="outside lower right", ncols=4, fontsize=8, frameon=False)
    return figure


def _draw_boxes(axis: Axes, image: np.ndarray, boxes: Sequence[Sequence[int]]) -> None:
    """Draw an image with the boxes of its two crops and their intersection."""
    axis.imshow(image)
    bounds = [Bbox.from_bounds(left, top, width, height) for top, left, height, width in boxes]
    for box, label, color in zip(bounds, ("teacher’s view", "student’s view"), (TEACHER, STUDENT), strict=True):
        frame = Rectangle(box.min, box.width, box.height, fill=False, edgecolor=color, linewidth=2, label=label)
        axis.add_patch(frame)
    both = Bbox.intersection(bounds[0], bounds[1])
    if both is not None and both.width and both.height:
        area = Rectangle(both.min, both.width, both.height, color=SAME, alpha=0.25, linewidth=0, label="intersection")
        axis.add_patch(area)
    _bare(axis, "Image")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.03), fontsize=8, frameon=False)


def _draw_pairs(axes: Sequence[Axes], crops: Arrays, patch_size: int, tokens: Arrays, colors: np.ndarray) -> None:
    """Draw the teacher's and the student's crop, and per pair its two patches, equally numbered, and a line."""
    centers = []
    for axis, crop, frame, own_tokens in zip(axes, crops, (TEACHER, STUDENT), tokens, strict=True):
        axis.imshow(crop)
        _bare(axis, color=frame)
        columns = crop.shape[1] // patch_size
        rows_and_columns = np.stack(_place(own_tokens, columns), 1)
        for (row, column), color in zip(rows_and_columns, colors, strict=True):
            corner = (column * patch_size - 0.5, row * patch_size - 0.5)
            axis.add_patch(Rectangle(corner, patch_size, patch_size, facecolor=color, alpha=0.3, edgecolor="none"))
        centers.append((rows_and_columns[:, ::-1] + 0.5) * patch_size - 0.5)
        for token in np.unique(own_tokens):
            first, *others = np.flatnonzero(own_tokens == token)
            x, y = centers[-1][first]
            label, size = f"{first + 1}{'+' if others else ''}", min(6.0, 100 / columns) * (0.8 if others else 1)
            # A text of the figure, not of the axis, so that it lies above the figure's lines.
            text = axes[0].figure.text(x, y, label, color="white", fontsize=size, ha="center", va="center")
            text.set(transform=axis.transData, zorder=3, path_effects=[withStroke(linewidth=1, foreground="black")])
    for center_a, center_b, color in zip(centers[0], centers[1], colors, strict=True):
        line = ConnectionPatch(center_a, center_b, "data", "data", axesA=axes[0], axesB=axes[1])
        line.set(color=color, linewidth=0.8, alpha=0.7)
        axes[0].figure.add_artist(line)


def _place(tokens: ArrayLike, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (row, column) of a patch token, or of an array of them; patch 1 is the first."""
    return np.divmod(np.asarray(tokens) - 1, columns)


def patch_distance(tokens: ArrayLike, other_tokens: ArrayLike, columns: int) -> np.ndarray:
    """Return how many patches apart tokens are: 0 is the same patch, 1 is one of the eight around it.

    Args:
        tokens, other_tokens: ints [n]; patch 1 is the first.
        columns: number of patches in a row.

    Returns:
        ints [n], the larger of the distances in rows and in columns
    """
    return np.abs(np.subtract(_place(tokens, columns), _place(other_tokens, columns))).max(0)


@plain_style
def draw_image_neighbours(images: Arrays, similarities: Sequence[float], names: Sequence[str]) -> list[Figure]:
    """Draw a query and its nearest images, the nearest first, up to six panels in a row.

    Args:
        images: uint8 [H, W, 3] each, of any size; the first is the query.
        similarities: cosine between the CLS features of the query and of each other image.
        names: one per other image.

    Returns:
        pages
    """
    titles = ["query", *(f"{printable(name)}\n{s:.3f}" for name, s in zip(names, similarities, strict=True))]
    lines = _in_lines([Panel(title, [image]) for title, image in zip(titles, images, strict=True)], 6)
    pages = _draw_panels(lines, "Query (orange frame) and its nearest images, by cosine of the CLS features")
    _frame(pages[0].axes[0], 0, 0, images[0].shape[:2], TEACHER)
    return pages


@plain_style
def draw_patch_neighbours(
    images: Images,
    similarities: Arrays,
    patch: tuple[int, int],
    nearest: Sequence[tuple[int, int, int]],
    patch_size: int,
) -> list[Figure]:
    """Draw one patch and the patches most similar to it, up to four images in a row.

    Args:
        images: {name: uint8 [H, W, 3]}, the first contains the query patch.
        similarities: [rows, columns] per image, cosine between each patch and the query.
        patch: (row, column) of the query.
        nearest: k triples (image, row, column).

    Returns:
        pages with the images, the query and its neighbours in frames, above the cosines of all patches
    """
    low = min(similarity.min() for similarity in similarities)
    panels = []
    for (name, image), similarity in zip(images.items(), similarities, strict=True):
        panels.append(Panel(name, [image, enlarge(_heat((similarity - low) / max(1 - low, 1e-12)), patch_size)]))
    title = f"A patch (orange frame) and its {len(nearest)} nearest (blue frames)"
    pages = _draw_panels(_in_lines(panels, 4), title, ends=(f"cosine {low:.2f}", "1"))
    axes = [axis for page in pages for axis in page.axes[:-1]]  # without the bars
    for i, row, column in nearest:
        _frame(axes[2 * i], row * patch_size, column * patch_size, (patch_size, patch_size), STUDENT)
    for axis in axes[:2]:
        _frame(axis, patch[0] * patch_size, patch[1] * patch_size, (patch_size, patch_size), TEACHER)
    return pages


def _frame(axis: Axes, top: int, left: int, size: tuple[int, int], color: str) -> None:
    """Draw an outlined frame around pixels of an image; `size` is (height, width)."""
    outline = "black" if color == TEACHER else "white"  # bright and dark frames can be seen on all images
    frame = Rectangle((left - 0.5, top - 0.5), size[1], size[0], fill=False, edgecolor=color, linewidth=1)
    frame.set(clip_on=False, path_effects=[withStroke(linewidth=1.6, foreground=outline)])
    axis.add_patch(frame)


@plain_style
def draw_map(points: np.ndarray, labels: ArrayLike, classes: Sequence[str], title: str) -> Figure:
    """Draw labeled points in the plane; the color shows the class.

    Args:
        points: [n, 2].
        labels: ints [n], indices into `classes`.
        classes: names. A legend names at most MAX_NAMED classes. More classes than COLORS are told apart by numbers,
            each at the median of its points.
    """
    labels = np.asarray(labels)
    present = np.unique(labels)
    numbered, named = len(present) > len(COLORS), len(present) <= MAX_NAMED
    # Successive hues lie far apart. Darker ones can be read on white.
    colors = 0.8 * colormaps["hsv"](0.618 * np.arange(len(present)) % 1)[:, :3] if numbered else COLORS
    columns = 4
    figure = _figure(4.6 + 0.13 * -(-len(present) // columns) * named, title)
    axis = figure.subplots()
    _bare(axis)
    for number, (label, color) in enumerate(zip(present, colors, strict=False), start=1):
        own = points[labels == label]
        name = fit(f"{number} {classes[label]}" if numbered else classes[label], 1.5, size=7)
        axis.scatter(own[:, 0], own[:, 1], s=12, color=color, linewidths=0.3, edgecolors="white", label=name)
        if numbered and named:
            text = axis.annotate(
                str(number), np.median(own, 0), color=0.7 * color, fontsize=7, ha="center", va="center"
            )
            text.set_path_effects([withStroke(linewidth=2, foreground="white")])
    if named:
        figure.legend(loc="outside lower left", ncols=columns, fontsize=7, frameon=False, markerscale=1.5)
    return figure


@plain_style
def draw_curves(curves: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Draw the logs of runs over epochs, one panel per entry of PANELS with values, one column (8.5 cm) wide.

    Args:
        curves: {label: {name of a panel: array [4, n]}}. The rows are epochs trained, mean, standard deviation (NaN if
            there is only one run) and number of runs.
    """
    if len(curves) > MAX_CURVES:
        raise UserError(f"found {len(curves)} settings, a figure tells at most {MAX_CURVES} apart: give fewer runs")
    names = [name for name in PANELS if any(curve[name].size for curve in curves.values())]
    labels = [fit(label, 2.75, size=7, lines=5) for label in curves]
    banded = any(np.isfinite(curve[name][2]).any() for curve in curves.values() for name in names)
    columns = 2 if max(map(len, labels)) <= 18 else 1
    lines = sum(1 + label.count("\n") for label in labels) / columns + banded
    # 0.45 inches for the axis label and margins, 1.2 per panel, 0.13 per line of the legend
    figure = Figure(figsize=(3.35, 0.45 + 1.2 * len(names) + 0.13 * lines), dpi=300, layout="constrained")
    axes = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    for axis, name in zip(axes, names, strict=True):
        # Line styles tell the curves apart in print without colors.
        for curve, color, line_style in zip(curves.values(), cycle(LINE_COLORS), cycle(LINE_STYLES)):
            epochs, mean, deviation, _ = curve[name]
            marker = "o" if len(epochs) < 10 else ""  # a single point draws no line
            axis.plot(epochs, mean, marker=marker, markersize=2, color=color, linestyle=line_style, linewidth=1.1)
            if np.isfinite(deviation).any():
                axis.fill_between(epochs, mean - deviation, mean + deviation, color=color, alpha=0.2, linewidth=0)
        title, unit = PANELS[name]
        values = np.concatenate([curve[name][1] for curve in curves.values()])
        if name == "loss" and 0 < 5 * values.min() < values.max():  # sum and mean losses in one panel
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set(minor_locator=NullLocator(), major_formatter="{x:g}")
            unit += ", log scale"
        else:
            axis.locator_params(axis="y", nbins=5)  # as many labels whatever the layout, which depends on them
        axis.set_title(title, fontsize=8, pad=3)
        axis.set_ylabel(unit, fontsize=7)
        axis.tick_params(labelsize=7, width=0.6, length=2.5)
        axis.grid(linewidth=0.3, alpha=0.5)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_linewidth(0.6)
    axes[-1].set_xlabel("epochs", fontsize=7)
    figure.align_ylabels(axes)
    look: dict[str, Any] = {"fontsize": 7, "title_fontsize": 7, "frameon": False, "handlelength": 3}
    look["title"] = "mean ± one standard deviation over seeds" if banded else None
    figure.legend(axes[0].lines, labels, loc="outside lower left", ncols=columns, **look)
    return figure
