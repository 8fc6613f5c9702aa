"""All figures and pictures. Drawing needs no display.

A figure spans one or two columns of a paper and is written as PNG or PDF.
"""

import textwrap
import warnings
from itertools import cycle
from pathlib import Path

import cv2
import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionPatch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import Bbox

import utils
from utils import UserError

# Color-blind safe palette of Okabe and Ito.
TEACHER, STUDENT, OVERLAP, WRONG = "#E69F00", "#0072B2", "#009E73", "#D55E00"
COLORS = (STUDENT, WRONG, OVERLAP, "#CC79A7", TEACHER, "#56B4E9", "#000000", "#F0E442")
LINE_COLORS = COLORS[:-1]  # yellow is too light for lines on white
MARKERS = "o^sDvP*X"
LINE_STYLES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1.5, 1, 1.5)))
PANELS = {  # logged value: (title, unit)
    "loss": ("Loss", "nats"),
    "knn_top1": ("Online k-NN", "top-1 accuracy (%)"),
    "entropy_share": ("Entropy of the teacher’s outputs", "share of ln K"),
    "matched_patches": ("Matched patches", "per pair of views"),
}
MAX_CLASSES = 24  # in the legend of a map
SUFFIXES = (".png", ".pdf")
WIDTH = 7.0  # of a figure over two columns, in inches


def shown(name) -> str:
    """Return a name that matplotlib displays literally.

    `$` is escaped, since it would start mathematics. A leading `_` is preceded by a space, since matplotlib hides such
    legend entries.
    """
    return (" " if name.startswith("_") else "") + utils.printable(name).replace("$", r"\$")


def check_output(path) -> None:
    """Create the folder of a figure's file.

    Raises:
        UserError: the suffix is unknown, the path is a folder, or the folder cannot be written to.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"cannot write {path}: found the suffix {path.suffix!r}, expected {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise UserError(f"cannot write {path}: found a folder, expected a file name")
    utils.make_folder(path.parent, "the folder of --output")


def save(figure, path) -> None:
    """Write a figure as PNG or PDF, depending on the suffix. A warning of matplotlib becomes one line on stderr."""
    check_output(path)
    with rc_context({"pdf.fonttype": 42}), warnings.catch_warnings(record=True) as caught:  # fonts that can be edited
        figure.savefig(path)
    for text in dict.fromkeys(utils.first_line(warning.message) for warning in caught):
        utils.warn(f"{path}: {text}")


def to_picture(pixels) -> np.ndarray:
    """Turn a view of one image, a tensor [3, S, S], into an array [S, S, 3]."""
    return pixels.permute(1, 2, 0).numpy()


def enlarge(cells, patch_size) -> np.ndarray:
    """Repeat each cell of an array [rows, columns, ...] over the pixels of its patch: [H, W, ...]."""
    return cells.repeat(patch_size, 0).repeat(patch_size, 1)


def heat_map(values, patch_size) -> np.ndarray:
    """Turn an attention map [rows, columns] into colors, uint8 [H, W, 3], scaled to the map's maximum."""
    colors = colormaps["inferno"](values / max(values.max(), 1e-12))[..., :3]
    return enlarge((255 * colors).round().astype(np.uint8), patch_size)


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
    """Lay out rows of pictures on white, each picture scaled to the height `side`: uint8 [H, W, 3].

    Small pictures are enlarged with hard edges, large ones are averaged.
    """
    lines = []
    for row in rows:
        line = []
        for picture in row:
            size = (max(round(picture.shape[1] * side / picture.shape[0]), 1), side)
            how = cv2.INTER_NEAREST if side >= picture.shape[0] else cv2.INTER_AREA
            picture = cv2.resize(picture, size, interpolation=how)
            line.append(np.pad(picture, ((0, gap), (0, gap), (0, 0)), constant_values=255))
        lines.append(np.concatenate(line, 1))
    width = max(line.shape[1] for line in lines)
    lines = [np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0)), constant_values=255) for line in lines]
    return np.concatenate(lines)


def draw_attention(images, attentions, masks, patch_size, threshold) -> Figure:
    """Draw the attention of the CLS token, head by head, as DINO's figures do.

    Args:
        images: {name: uint8 [H, W, 3]}.
        attentions: [heads + 1, rows, columns] per image, from CLS to the patches; the last map is the mean over heads.
        masks: booleans of the same shape, the patches that hold most of the attention.
        patch_size: side of a patch in pixels.
        threshold: share of the attention that a mask holds, for the label.

    Returns:
        the attention maps, each scaled to its maximum, above the image with the patches outside the mask dimmed
    """
    lines = []
    for (name, image), attention, mask in zip(images.items(), attentions, masks, strict=True):
        panels = [(shown(name), image, f"{threshold:.0%} of the\nattention")]
        titles = [*(f"head {head}" for head in range(1, len(attention))), "mean"]
        for title, values, kept in zip(titles, attention, mask, strict=True):
            dimmed = np.where(enlarge(kept, patch_size)[..., None], image, 255 - (255 - image) // 5)
            panels.append((title, heat_map(values, patch_size), dimmed))
        lines += [panels[start : start + 7] for start in range(0, len(panels), 7)]
    return _draw_panels(lines, "Attention of CLS in the last block", 0.22, "CC")


def draw_features(images, colors, patch_size, explained) -> Figure:
    """Draw images above their patch features as colors, up to four images in a row.

    Args:
        images: {name: uint8 [H, W, 3]}.
        colors: uint8 [rows, columns, 3] per image, the first three principal components.
        explained: share of the variance per component, [3].
    """
    pairs = zip(images.items(), colors, strict=True)
    panels = [(shown(name), image, enlarge(color, patch_size)) for (name, image), color in pairs]
    shares = ", ".join(f"{share:.0%}" for share in explained)
    title = f"Patch features: first three principal components as red, green, blue ({shares} of the variance)"
    return _draw_panels([panels[start : start + 4] for start in range(0, len(panels), 4)], title, 0.2, "SN")


def _draw_panels(lines, title, gap, anchors):
    """Draw lines of panels: a title, an image, and below it another image or a text.

    Args:
        lines: lists of panels (title, uint8 [H, W, 3], uint8 [H, W, 3] or text).
        gap: height of a panel's title in inches.
        anchors: matplotlib's anchors of the upper and the lower images in their cells.
    """
    columns = max(map(len, lines))
    ratios = [max(above.shape[0] / above.shape[1] for _, above, _ in line) for line in lines]
    height = sum(2 * WIDTH / columns * ratio + gap for ratio in ratios) + 0.25
    figure = _figure(height, title, w_pad=0.01, h_pad=0.02, hspace=0.0, wspace=0.0)
    axes = figure.subplots(2 * len(lines), columns, squeeze=False, height_ratios=np.repeat(ratios, 2))
    for axis in axes.flat:
        axis.axis("off")
    for line, uppers, lowers in zip(lines, axes[::2], axes[1::2], strict=True):
        for (name, above, below), upper, lower in zip(line, uppers, lowers, strict=False):
            upper.imshow(above)
            upper.set_title(name, fontsize=8)
            upper.set_anchor(anchors[0])
            lower.set_anchor(anchors[1])
            if isinstance(below, str):
                lower.text(0.5, 0.5, below, fontsize=8, ha="center", va="center", transform=lower.transAxes)
            else:
                lower.imshow(below)
    return figure


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
        the teacher's crop above the student's. The two patches of a pair have the same number and a line between them.
        The color of a pair by features shows its distance from geometry.
    """
    columns = [("By geometry", idx_a, colormaps["plasma"](np.linspace(0, 0.95, len(idx_a))))]
    width_ratios, height = [1.7, 1], 5.4
    if found_a is not None:
        distance = patch_distance(found_a, idx_a, crops[0].shape[1] // patch_size)
        colors = (STUDENT, OVERLAP, WRONG)
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
        labels = ("same patch as by geometry", "adjacent patch", "other patch")
        figure.legend(handles, labels, loc="outside lower right", ncols=3, fontsize=8, frameon=False)
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
        style = {"facecolor": OVERLAP, "alpha": 0.25, "edgecolor": "none", "label": "intersection"}
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
        for axis, crop, token in zip(axes, crops, (token_a, token_b), strict=True):
            columns = crop.shape[1] // patch_size
            square = _square(axis, *_place(token, columns), patch_size, facecolor=color, alpha=0.3, edgecolor="none")
            style = {"color": "white", "fontsize": min(6.0, 100 / columns), "ha": "center", "va": "center"}
            # Texts of the figure, not of the axis, so that they lie above the figure's lines.
            place = {"transform": axis.transData, "zorder": 3, "path_effects": outline}
            figure.text(*square.get_center(), str(number), **place, **style)
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


def draw_image_neighbours(images, similarities, names) -> Figure:
    """Draw a query and its nearest images, the nearest first, up to six panels in a row.

    Args:
        images: uint8 [H, W, 3] each, of any size; the first is the query.
        similarities: cosine between the CLS features of the query and of each other image.
        names: one per other image.
    """
    titles = ["query", *(f"{shown(name)}\n{s:.2f}" for name, s in zip(names, similarities, strict=True))]
    columns = min(len(titles), 6)
    rows = -(-len(titles) // columns)
    figure = _figure(rows * (WIDTH / columns + 0.4) + 0.3, "Nearest images by cosine of the CLS features")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, image, title in zip(axes, images, titles, strict=False):
        axis.imshow(image)
        _bare(axis, title, TEACHER if title == "query" else None)
    for axis in axes[len(titles) :]:
        axis.axis("off")
    return figure


def draw_patch_neighbours(images, similarities, patch, nearest, patch_size) -> Figure:
    """Draw one patch and the patches most similar to it.

    Args:
        images: {name: uint8 [H, W, 3]}, the first contains the query patch.
        similarities: [rows, columns] per image, cosine between each patch and the query.
        patch: (row, column) of the query.
        nearest: k triples (image, row, column).

    Returns:
        the images with the query and its neighbours in frames, above the cosines of all patches
    """
    ratio = max(image.shape[0] / image.shape[1] for image in images.values())
    height = 2 * WIDTH / max(len(images), 2) * ratio + 0.9
    title = f"A patch (red frame) and its {len(nearest)} nearest (blue frames)"
    figure = _figure(height, title, w_pad=0.02, h_pad=0.05, hspace=0.0, wspace=0.0)
    axes = figure.subplots(2, len(images), squeeze=False)
    scale = {"cmap": "cividis", "vmin": min(similarity.min() for similarity in similarities), "vmax": 1}
    for upper, lower, name, similarity in zip(*axes, images, similarities, strict=True):
        upper.imshow(images[name])
        _bare(upper, shown(name))
        heat = lower.imshow(enlarge(similarity, patch_size), **scale)
        _bare(lower)
    frames = [(axes[0, i], row, column, STUDENT) for i, row, column in nearest]
    for axis, row, column, color in [*frames, *((axis, *patch, WRONG) for axis in axes[:, 0])]:
        _square(axis, row, column, patch_size, fill=False, edgecolor=color, linewidth=1.2)
    bar = figure.colorbar(heat, ax=axes, location="bottom", fraction=0.04, aspect=50, pad=0.01)
    bar.set_label("cosine to the query patch", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def draw_map(points, labels, classes, title) -> Figure:
    """Draw labeled points in the plane; color and marker show the class.

    Args:
        points: [n, 2].
        labels: ints [n], indices into `classes`.
        classes: names. The legend lists the MAX_CLASSES largest classes.
    """
    figure = _figure(4.6)
    axis = figure.subplots()
    labels = np.asarray(labels)
    counts = np.bincount(labels, minlength=len(classes))
    in_legend = np.argsort(-counts, kind="stable")[:MAX_CLASSES]
    for label in np.flatnonzero(counts):
        color, marker = COLORS[label % len(COLORS)], MARKERS[label // len(COLORS) % len(MARKERS)]
        name = shown(str(classes[label])) if label in in_legend else None
        style = {"color": color, "marker": marker, "s": 14, "linewidths": 0.3, "edgecolors": "white"}
        axis.scatter(*points[labels == label].T, label=name, **style)
    _bare(axis)
    axis.set_title(title, fontsize=9)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, markerscale=1.3)
    return figure


def draw_curves(curves) -> Figure:
    """Draw the logs of runs over epochs, one panel per entry of PANELS with values, one column (8.5 cm) wide.

    Args:
        curves: {label: {name of a panel: array [4, n]}}. The rows are epochs trained, mean, standard deviation (NaN if
            there is only one run) and number of runs.
    """
    names = [name for name in PANELS if any(curve[name].size for curve in curves.values())]
    labels = [textwrap.fill(shown(label), 52) for label in curves]
    banded = any(np.isfinite(curve[name][2]).any() for curve in curves.values() for name in names)
    columns = 2 if max(map(len, labels)) <= 21 else 1
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
