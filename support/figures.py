"""All figures and pictures. Drawing needs no display.

A figure spans one or two columns of a paper and is written as PNG or PDF. Many images are drawn on several pages.
"""

import contextlib
import os
import re
import warnings
from functools import cache
from itertools import cycle
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # matplotlib refuses to be imported with an unknown backend

import cv2
import matplotlib
import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionPatch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.textpath import TextToPath
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import Bbox

from support.files import atomic_write, make_folder
from utils import UserError, first_line, printable, warn

matplotlib.rcdefaults()  # a matplotlibrc may ask for LaTeX or for another layout
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


@cache
def _character_width(character):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about characters that the font lacks: `save` warns of them
        return TextToPath().get_text_width_height_descent(character, FontProperties(size=100), ismath=False)[0]


def text_width(text, size) -> float:
    """Return the width of a text in inches without kerning, at a font size in points."""
    return sum(map(_character_width, text)) * size / 100 / 72


def shown(name, width=WIDTH, size=8, lines=1) -> str:
    """Return a name that matplotlib displays literally, on at most `lines` lines of at most `width` inches.

    The middle of a longer name is replaced by `…`. `$` is escaped, since it would start mathematics. A leading `_` is
    preceded by a space, since matplotlib hides such legend entries.
    """
    name = printable(name)
    wrapped = [name]
    for kept in range(min(len(name), 300), 2, -1):
        text = name if kept == len(name) else f"{name[: -(-kept // 2)]}…{name[len(name) - kept // 2 :]}"
        if text_width(text, size) <= lines * width and len(wrapped := _wrap(text, width, size)) <= lines:
            break
    return (" " if name.startswith("_") else "") + "\n".join(wrapped).replace("$", r"\$")


def _wrap(text, width, size):
    """Break a text into lines of at most `width` inches, between words if possible."""
    lines = [""]
    for part in re.findall(r"\s*\S+\s*$|\s*\S+|\s+", text):
        if text_width(lines[-1] + part, size) <= width:
            lines[-1] += part
            continue
        lines.append("")
        for character in part.lstrip():
            if text_width(lines[-1] + character, size) > width:
                lines.append("")
            lines[-1] += character
    return [line for line in lines if line]


def check_output(path) -> None:
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


def save(pages, path) -> list[Path]:
    """Write figures as PNG or PDF, depending on the suffix, and return the paths: NAME.png, NAME-2.png, ...

    Characters that the font lacks become one line on stderr, and so does each warning of matplotlib.
    """
    path = Path(path)
    paths = [path, *(path.with_stem(f"{path.stem}-{number}") for number in range(2, len(pages) + 1))]
    with rc_context({"pdf.fonttype": 42}), warnings.catch_warnings(record=True) as caught:  # fonts that can be edited
        for figure, file in zip(pages, paths, strict=True):
            check_output(file)
            with atomic_write(file) as temporary:
                figure.draw_without_rendering()  # ticks that the layout changes need the layout once more
                figure.savefig(temporary, format=path.suffix[1:].lower())
    texts = [first_line(warning.message) for warning in caught]
    texts = ["the font lacks characters of some names" if text.startswith("Glyph ") else text for text in texts]
    for text in dict.fromkeys(texts):
        warn(f"{path}: {text}")
    return paths


def to_picture(pixels) -> np.ndarray:
    """Turn a view of one image, a tensor [3, S, S], into an array [S, S, 3]."""
    return pixels.permute(1, 2, 0).numpy()


def enlarge(cells, patch_size) -> np.ndarray:
    """Repeat each cell of an array [rows, columns, ...] over the pixels of its patch: [H, W, ...]."""
    return cells.repeat(patch_size, 0).repeat(patch_size, 1)


def heat_map(values, patch_size) -> np.ndarray:
    """Turn an attention map [rows, columns] into colors, uint8 [H, W, 3], scaled to the map's maximum."""
    return enlarge(_heat(values / max(values.max(), 1e-12)), patch_size)


def _heat(values):
    """Turn values in [0, 1] into colors, uint8 [..., 3]."""
    return (255 * HEAT(values)[..., :3]).round().astype(np.uint8)


def tint_patches(image, tokens, columns, patch_size) -> np.ndarray:
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


def tile(rows, side=160, gap=4) -> np.ndarray:
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
            how = cv2.INTER_NEAREST if side >= picture.shape[0] else cv2.INTER_AREA
            picture = cv2.resize(picture, size, interpolation=how)
            picture = np.pad(picture, ((LABEL_HEIGHT, gap), (0, gap), (0, 0)), constant_values=255)
            place = {"org": (2, LABEL_HEIGHT - 5), "fontFace": cv2.FONT_HERSHEY_SIMPLEX, "fontScale": 0.38}
            line.append(cv2.putText(picture, label, **place, color=(0, 0, 0), lineType=cv2.LINE_AA))
        lines.append(np.concatenate(line, 1))
    width = max(line.shape[1] for line in lines)
    lines = [np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0)), constant_values=255) for line in lines]
    return np.concatenate(lines)


def draw_attention(images, attentions, masks, patch_size, threshold) -> list[Figure]:
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
    lines = []
    for (name, image), attention, mask in zip(images.items(), attentions, masks, strict=True):
        panels = [(name, image, f"not grayed out:\n{threshold:.0%} of the\nattention")]
        titles = [*(f"head {head}" for head in range(1, len(attention))), "mean of heads"]
        for title, values, kept in zip(titles, attention, mask, strict=True):
            grayed = np.where(enlarge(kept, patch_size)[..., None], image, 160 + image // 5)
            panels.append((title, heat_map(values, patch_size), grayed))
        lines += [panels[start : start + 7] for start in range(0, len(panels), 7)]
    title = "Attention of CLS in the last block, scaled per map"
    return _draw_panels(lines, title, len(lines) // len(images), ("low", "high"))


def draw_features(images, colors, patch_size, explained) -> list[Figure]:
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
        panels.append((name, image, enlarge(color, patch_size) if np.ptp(color, (0, 1)).any() else NO_STRUCTURE))
    title = "Patch features: first three principal components as red, green, blue"
    if explained.any():
        title += f" ({', '.join(f'{share:.0%}' for share in explained)} of the variance)"
    return _draw_panels([panels[start : start + 4] for start in range(0, len(panels), 4)], title)


def _draw_panels(lines, title, together=1, ends=None):
    """Draw lines of panels in equal cells, on as many pages as needed.

    Args:
        lines: lists of panels (title, picture, ...). The pictures of a panel, uint8 [H, W, 3] or a text, are below each
            other, in axes of their own. A title may have two lines.
        together: number of lines that must be on one page.
        ends: texts at the low and at the high end of a bar with the colors of HEAT. None draws no bar.

    Returns:
        pages
    """
    columns, pictures = max(2, *map(len, lines)), len(lines[0][0]) - 1
    ratio = np.clip(max(panel[1].shape[0] / panel[1].shape[1] for line in lines for panel in line), 0.25, 1.5)
    width, gap, header = WIDTH / columns, 0.05, 0.3
    title_height = 0.06 + 0.13 * (1 + max("\n" in panel[0] for line in lines for panel in line))
    cell_height = (width - gap) * ratio
    line_height = title_height + pictures * (cell_height + gap) + 0.06
    per_page = max(int((PAGE_HEIGHT - header) / line_height) // together, 1) * together
    pages = [lines[start : start + per_page] for start in range(0, len(lines), per_page)]
    figures = []
    for number, page in enumerate(pages, start=1):
        height = header + len(page) * line_height
        figure = Figure(figsize=(WIDTH, height), dpi=200)
        text = title if len(pages) == 1 else f"{title} (page {number} of {len(pages)})"
        figure.text(gap / WIDTH, 1 - header / 2 / height, text, fontsize=9, va="center")
        if ends is not None:
            bar = figure.add_axes(((WIDTH - 1.5) / WIDTH, 1 - 0.65 * header / height, 1 / WIDTH, 0.3 * header / height))
            bar.imshow(HEAT(np.linspace(0, 1, 256))[None], aspect="auto")
            _bare(bar)
            bar.text(-0.05, 0.5, ends[0], fontsize=8, ha="right", va="center", transform=bar.transAxes)
            bar.text(1.05, 0.5, ends[1], fontsize=8, ha="left", va="center", transform=bar.transAxes)
        for row, line in enumerate(page):
            for column, (name, *stack) in enumerate(line):
                for depth, picture in enumerate(stack):
                    below = header + row * line_height + title_height + depth * (cell_height + gap) + cell_height
                    place = (column * width + gap / 2, height - below, width - gap, cell_height)
                    axis = figure.add_axes(np.divide(place, (WIDTH, height) * 2), anchor="N")
                    axis.axis("off")
                    if isinstance(picture, str):
                        axis.text(0.5, 0.5, picture, fontsize=8, ha="center", va="center", transform=axis.transAxes)
                    else:
                        axis.imshow(picture)
                    if depth == 0:
                        axis.set_title(
                            "\n".join(shown(part, width - gap) for part in name.split("\n")), fontsize=8, pad=3
                        )
        figures.append(figure)
    return figures


def _figure(height, title=None, **pads):
    """Return an empty figure over two columns; `pads` are those of matplotlib's constrained layout, in inches."""
    figure = Figure(figsize=(WIDTH, height), dpi=200, layout="constrained")
    figure.get_layout_engine().set(**pads)
    if title is not None:
        figure.suptitle(title, fontsize=9)
    return figure


def _bare(axis, title="", color=None):
    """Remove the ticks of an axis, set its title, and frame it in a color."""
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=8)
    if color is not None:
        axis.spines[:].set(color=color, linewidth=2)


def draw_matches(image, crops, boxes, flips, patch_size, idx_a, idx_b, found_a=None) -> Figure:
    """Draw two crops of an image and their matched patches (the paper's Figures 2 and 3).

    Args:
        image: uint8 [H, W, 3].
        crops: uint8 [S, S, 3] and [s, s, 3], the teacher's and the student's, as the networks see them.
        boxes: (top, left, height, width) of each crop in the image.
        flips: whether each crop is mirrored.
        patch_size: side of a patch in pixels of the crops.
        idx_a, idx_b: ints [n], tokens of the teacher's and the student's patches that geometry matches, without CLS.
        found_a: ints [n], the teacher's patch nearest in feature space to each of `idx_b`. None draws geometry only.

    Returns:
        the image with both boxes and their intersection, the pairs by geometry, and the pairs by features, each with
        the teacher's crop above the student's. The two patches of a pair have the same number and a line between them;
        a patch of several pairs has the first number and `+`. The color of a pair by features shows its distance from
        geometry. Frames have other colors than pairs.
    """
    columns = [("By geometry", idx_a, colormaps["summer"](np.linspace(0, 1, len(idx_a))))]
    width_ratios, height = [1.7, 1], 5.4
    if found_a is not None:
        distance = patch_distance(found_a, idx_a, crops[0].shape[1] // patch_size)
        colors = (SAME, ADJACENT, OTHER)
        title = "By features" + (f": {(distance == 0).mean():.0%} the same" if len(distance) else "")
        columns.append((title, found_a, [colors[min(d, 2)] for d in distance]))
        width_ratios, height = [1.25, 1, 1], 4.4
    figure = _figure(height, w_pad=0.04, h_pad=0.02, hspace=0.06, wspace=0.02)
    grid = figure.add_gridspec(2, len(width_ratios), width_ratios=width_ratios)
    _draw_boxes(figure.add_subplot(grid[:, 0]), image, boxes)
    for number, (title, tokens_a, pair_colors) in enumerate(columns, start=1):
        axes = [figure.add_subplot(grid[row, number]) for row in (0, 1)]
        _draw_pairs(figure, axes, crops, patch_size, tokens_a, idx_b, pair_colors)
        axes[0].set_title(title, fontsize=8)
    for axis, whose, crop, flip in zip(figure.axes[1:3], ("teacher", "student"), crops, flips, strict=True):
        label = f"{whose}’s view\n{crop.shape[0]}×{crop.shape[1]}"
        axis.set_ylabel(label + (", mirrored" if flip else ""), fontsize=8)
    if found_a is not None:
        handles = [Rectangle((0, 0), 1, 1, color=color) for color in colors]
        labels = ["same patch as by geometry", "adjacent patch", "other patch"]
        if len(set(np.asarray(found_a).tolist())) < len(found_a):
            handles.append(Line2D([], [], linestyle="none"))
            labels.append("5+: pair 5 and others")
        figure.legend(handles, labels, loc="outside lower right", ncols=4, fontsize=8, frameon=False)
    return figure


def _draw_boxes(axis, image, boxes):
    """Draw an image with the boxes of its two crops and their intersection."""
    axis.imshow(image)
    looks = (("teacher’s view", TEACHER), ("student’s view", STUDENT))
    for (top, left, height, width), (label, color) in zip(boxes, looks, strict=True):
        style = {"fill": False, "edgecolor": color, "linewidth": 2, "label": label}
        axis.add_patch(Rectangle((left, top), width, height, **style))
    both = Bbox.intersection(*(Bbox.from_bounds(left, top, width, height) for top, left, height, width in boxes))
    if both is not None and both.width and both.height:
        style = {"facecolor": SAME, "alpha": 0.25, "edgecolor": "none", "label": "intersection"}
        axis.add_patch(Rectangle(both.min, both.width, both.height, **style))
    _bare(axis, "Image")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.03), fontsize=8, frameon=False)


def _draw_pairs(figure, axes, crops, patch_size, tokens_a, tokens_b, colors):
    """Draw the teacher's and the student's crop, and per pair its two patches, equally numbered, and a line."""
    for axis, crop, color in zip(axes, crops, (TEACHER, STUDENT), strict=True):
        axis.imshow(crop)
        _bare(axis, color=color)
    outline = [withStroke(linewidth=1, foreground="black")]
    for number, (token_a, token_b, color) in enumerate(zip(tokens_a, tokens_b, colors, strict=True), start=1):
        centers = []
        for axis, crop, token, tokens in zip(axes, crops, (token_a, token_b), (tokens_a, tokens_b), strict=True):
            columns = crop.shape[1] // patch_size
            square = _square(axis, *_place(token, columns), patch_size, facecolor=color, alpha=0.3, edgecolor="none")
            style = {"color": "white", "fontsize": min(6.0, 100 / columns), "ha": "center", "va": "center"}
            first, *others = 1 + np.flatnonzero(np.asarray(tokens) == int(token))
            if number == first:
                # Texts of the figure, not of the axis, so that they lie above the figure's lines.
                place = {"transform": axis.transData, "zorder": 3, "path_effects": outline}
                style["fontsize"] *= 0.8 if others else 1
                figure.text(*square.get_center(), f"{number}{'+' if others else ''}", **place, **style)
            centers.append(square.get_center())
        line = {"color": color, "linewidth": 0.8, "alpha": 0.7}
        figure.add_artist(ConnectionPatch(*centers, "data", "data", axesA=axes[0], axesB=axes[1], **line))


def _place(tokens, columns):
    """Return (row, column) of a patch token, or of an array of them; patch 1 is the first."""
    return np.divmod(np.asarray(tokens) - 1, columns)


def patch_distance(tokens, other_tokens, columns) -> np.ndarray:
    """Return how many patches apart tokens are: 0 is the same patch, 1 is one of the eight around it.

    Args:
        tokens, other_tokens: ints [n]; patch 1 is the first.
        columns: number of patches in a row.

    Returns:
        ints [n], the larger of the distances in rows and in columns
    """
    return np.abs(np.subtract(_place(tokens, columns), _place(other_tokens, columns))).max(0)


def _square(axis, row, column, patch_size, **style):
    """Draw the square of a patch, and return it."""
    corner = (column * patch_size - 0.5, row * patch_size - 0.5)
    return axis.add_patch(Rectangle(corner, patch_size, patch_size, **style))


def draw_image_neighbours(images, similarities, names) -> list[Figure]:
    """Draw a query and its nearest images, the nearest first, up to six panels in a row.

    Args:
        images: uint8 [H, W, 3] each, of any size; the first is the query.
        similarities: cosine between the CLS features of the query and of each other image.
        names: one per other image.

    Returns:
        pages
    """
    titles = ["query", *(f"{printable(name)}\n{s:.3f}" for name, s in zip(names, similarities, strict=True))]
    panels = list(zip(titles, images, strict=True))
    lines = [panels[start : start + 6] for start in range(0, len(panels), 6)]
    pages = _draw_panels(lines, "Query (orange frame) and its nearest images, by cosine of the CLS features")
    _frame(pages[0].axes[0], 0, 0, images[0].shape[:2], TEACHER)
    return pages


def draw_patch_neighbours(images, similarities, patch, nearest, patch_size) -> list[Figure]:
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
    heats = [enlarge(_heat((s - low) / max(1 - low, 1e-12)), patch_size) for s in similarities]
    panels = list(zip(images, images.values(), heats, strict=True))
    lines = [panels[start : start + 4] for start in range(0, len(panels), 4)]
    title = f"A patch (orange frame) and its {len(nearest)} nearest (blue frames)"
    pages = _draw_panels(lines, title, ends=(f"cosine {low:.2f}", "1"))
    axes = [axis for page in pages for axis in page.axes[1:]]  # without the bars
    frames = [(axes[2 * i], row, column, STUDENT) for i, row, column in nearest]
    for axis, row, column, color in [*frames, *((axis, *patch, TEACHER) for axis in axes[:2])]:
        _frame(axis, row * patch_size, column * patch_size, (patch_size, patch_size), color)
    return pages


def _frame(axis, top, left, size, color):
    """Draw an outlined frame around pixels of an image."""
    outline = "black" if color == TEACHER else "white"  # bright and dark frames can be seen on all images
    style = {"edgecolor": color, "linewidth": 1, "path_effects": [withStroke(linewidth=1.6, foreground=outline)]}
    axis.add_patch(Rectangle((left - 0.5, top - 0.5), size[1], size[0], fill=False, clip_on=False, **style))


def draw_map(points, labels, classes, title) -> Figure:
    """Draw labeled points in the plane; the color shows the class.

    Args:
        points: [n, 2].
        labels: ints [n], indices into `classes`.
        classes: names. Up to len(COLORS) classes are named in a legend, more at their median point if there is room.
    """
    figure = Figure(figsize=(WIDTH, 4.6), dpi=200)
    labels = np.asarray(labels)
    found, counts = np.unique(labels, return_counts=True)
    names = [shown(str(classes[label]), 1.8) for label in found]
    in_legend = len(found) <= len(COLORS)
    hues = 0.618 * np.arange(len(found)) % 1  # neighbours in the list of classes differ
    colors = (
        COLORS if in_legend else hsv_to_rgb(np.stack([hues, hues**0, 0.75 - 0.25 * (hues > 0.1) * (hues < 0.55)], 1))
    )
    size = np.array([WIDTH - 0.1 - (0.3 + max(text_width(name, 8) for name in names)) * in_legend, 4.25])
    axis = figure.add_axes((0.05 / WIDTH, 0.05 / 4.6, *(size / (WIDTH, 4.6))))
    low, high = points.min(0), points.max(0)
    places = 0.15 + (points - low) / np.maximum(high - low, 1e-12) * (size - 0.3)  # in inches
    for label, name, color in zip(found, names, colors, strict=False):
        axis.scatter(*places[labels == label].T, s=12, color=color, linewidths=0.3, edgecolors="white", label=name)
    axis.set(xlim=(0, size[0]), ylim=(0, size[1]))
    _bare(axis)
    figure.text(0.05 / WIDTH, 1 - 0.15 / 4.6, title, fontsize=9, va="center")
    if in_legend:
        place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0}
        axis.legend(**place, fontsize=8, frameon=False, markerscale=1.5, handletextpad=0.1)
        return figure
    centers = np.stack([np.median(places[labels == label], 0) for label in found])
    widths = np.array([0.06 + text_width(name, 7) for name in names])
    outline = {"path_effects": [withStroke(linewidth=2, foreground="white")]}
    for i, (x, y) in _label_places(centers, widths, 0.12, size, np.argsort(-counts, kind="stable")).items():
        axis.plot(
            *zip(centers[i], (x, y), strict=True), color=colors[i], linewidth=0.6
        )  # hidden by a label that is near
        axis.text(x, y, names[i], color=colors[i], fontsize=7, ha="center", va="center", **outline)
    if hidden := len(found) - len(axis.texts):
        figure.text(
            1 - 0.05 / WIDTH, 1 - 0.15 / 4.6, f"no room for {hidden} names", fontsize=8, ha="right", va="center"
        )
    return figure


def _label_places(centers, widths, height, size, order):
    """Place labels near their centers, without overlap and inside a plane.

    Args:
        centers: [n, 2].
        widths: [n], of the labels, in the units of the centers.
        height: of each label.
        size: width and height of the plane.
        order: indices of the labels, the most important first.

    Returns:
        {index: (x, y) of the middle of a label}, without the labels that find no place nearby
    """
    radius, angle = np.meshgrid(np.arange(0, 1.2, 0.06), np.linspace(0, 2 * np.pi, 24, endpoint=False), indexing="ij")
    shifts = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(-1, 2)
    placed = {}
    for i in order:
        half = np.array([widths[i], height]) / 2
        tried = centers[i] + shifts
        free = ((tried - half >= 0) & (tried + half <= size)).all(1)
        for j, other in placed.items():
            free &= (np.abs(tried - other) >= half + np.array([widths[j], height]) / 2).any(1)
        if free.any():
            placed[i] = tried[free.argmax()]
    return placed


def draw_curves(curves) -> Figure:
    """Draw the logs of runs over epochs, one panel per entry of PANELS with values, one column (8.5 cm) wide.

    Args:
        curves: {label: {name of a panel: array [4, n]}}. The rows are epochs trained, mean, standard deviation (NaN if
            there is only one run) and number of runs.
    """
    if len(curves) > MAX_CURVES:
        raise UserError(f"found {len(curves)} settings, a figure tells at most {MAX_CURVES} apart: give fewer runs")
    names = [name for name in PANELS if any(curve[name].size for curve in curves.values())]
    labels = [shown(label, 2.75, 7, lines=5) for label in curves]
    banded = any(np.isfinite(curve[name][2]).any() for curve in curves.values() for name in names)
    columns = 2 if max(text_width(label, 7) for label in labels) <= 1.1 else 1
    lines = sum(1 + label.count("\n") for label in labels) / columns + banded
    # 0.45 inches for the axis label and margins, 1.2 per panel, 0.13 per line of the legend
    figure = Figure(figsize=(3.35, 0.45 + 1.2 * len(names) + 0.13 * lines), dpi=300, layout="constrained")
    axes = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    # Line styles tell the curves apart in print without colors.
    styles = zip(curves, cycle(LINE_COLORS), cycle(LINE_STYLES))
    looks = [{"color": color, "linestyle": style, "linewidth": 1.1} for _, color, style in styles]
    for axis, name in zip(axes, names, strict=True):
        for look, curve in zip(looks, curves.values(), strict=True):
            epochs, mean, deviation, _ = curve[name]
            few = {"marker": "o", "markersize": 2} if len(epochs) < 10 else {}  # a single point draws no line
            axis.plot(epochs, mean, **look, **few)
            if np.isfinite(deviation).any():
                band = {"color": look["color"], "alpha": 0.2, "linewidth": 0}
                axis.fill_between(epochs, mean - deviation, mean + deviation, **band)
        title, unit = PANELS[name]
        values = np.concatenate([curve[name][1] for curve in curves.values()])
        if name == "loss" and 0 < 5 * values.min() < values.max():  # sum and mean losses in one panel
            axis.set_yscale("log")
            ticks = {"major_locator": LogLocator(subs=(1, 2, 5)), "minor_locator": NullLocator()}
            axis.yaxis.set(major_formatter="{x:g}", **ticks)
            unit += ", log scale"
        axis.set_title(title, fontsize=8, pad=3)
        axis.set_ylabel(unit, fontsize=7)
        axis.tick_params(labelsize=7, width=0.6, length=2.5)
        axis.grid(linewidth=0.3, alpha=0.5)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_linewidth(0.6)
    axes[-1].set_xlabel("epochs", fontsize=7)
    figure.align_ylabels(axes)
    style = {"fontsize": 7, "frameon": False, "handlelength": 3, "borderaxespad": 0.2, "labelspacing": 0.3}
    if banded:
        style |= {"title": "mean ± one standard deviation over seeds", "title_fontsize": 7}
    figure.legend(
        [Line2D([], [], **look) for look in looks], labels, loc="outside lower center", ncols=columns, **style
    )
    return figure
