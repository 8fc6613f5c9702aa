"""Every picture that is drawn. Nothing here needs a display.

Figures are 7 inches wide, two columns of a paper, or one column, and written as PNG or PDF.
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

import utils
from utils import UserError

# Okabe and Ito's colours, which colour-blind readers can tell apart.
TEACHER, STUDENT, OVERLAP = "#E69F00", "#0072B2", "#009E73"
WRONG = "#D55E00"
COLOURS = (STUDENT, WRONG, OVERLAP, "#CC79A7", TEACHER, "#56B4E9", "#000000", "#F0E442")
LINE_COLOURS = COLOURS[:-1]  # yellow is too light for lines on white
MARKERS = "o^sDvP*X"
LINE_STYLES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1.5, 1, 1.5)))
PANELS = {  # what a run logs: title and unit
    "loss": ("Loss", "nats"),
    "knn_top1": ("Online k-NN", "top-1 accuracy (%)"),
    "entropy_share": ("Entropy of the teacher’s outputs", "share of ln K"),
    "matched_patches": ("Matched patches", "per pair of views"),
}

SUFFIXES = (".png", ".pdf")
WIDTH = 7.0  # inches


def shown(name):
    """Return a name as matplotlib shows it: without mathematics between dollars, and not hidden for a leading _."""
    return (" " if name.startswith("_") else "") + utils.printable(name).replace("$", r"\$")


def check_output(path):
    """Make the folder of a figure, and raise UserError where it cannot be written there, or has an unknown suffix."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"cannot write {path}: found the suffix {path.suffix!r}, expected {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise UserError(f"cannot write {path}: found a folder, expected a file name")
    utils.make_folder(path.parent, "the folder of --output")


def save(figure, path):
    """Write a figure as PNG or PDF, by the suffix."""
    check_output(path)
    with rc_context({"pdf.fonttype": 42}), warnings.catch_warnings(record=True) as caught:  # fonts that can be edited
        figure.savefig(path)
    for text in dict.fromkeys(utils.first_line(warning.message) for warning in caught):
        utils.warn(f"{path}: {text}")


def to_picture(pixels):
    """Turn a view of one image, a tensor [3, S, S], into an array [S, S, 3]."""
    return pixels.permute(1, 2, 0).numpy()


def bare(axis, title=None):
    """Leave an axis without ticks."""
    axis.set(xticks=[], yticks=[])
    if title is not None:
        axis.set_title(title, fontsize=8)


# --- pictures of tokens, as arrays


def enlarge(cells, patch_size):
    """Repeat every cell of an array [rows, columns, ...] so often that it covers its patch."""
    return cells.repeat(patch_size, 0).repeat(patch_size, 1)


def heat_map(values, patch_size):
    """Turn an attention map [rows, columns] into colours, uint8 [H, W, 3], scaled to its largest value."""
    colours = colormaps["inferno"](values / max(values.max(), 1e-12))[..., :3]
    return enlarge((255 * colours).round().astype(np.uint8), patch_size)


def tint_patches(image, tokens, columns, patch_size):
    """Tint patches of an image, the n-th of them in the n-th of n colours.

    Args:
        image: uint8 [H, W, 3].
        tokens: n token numbers, patches counting from 1.
        columns: patches in a row.
    """
    tint, share = np.zeros((*image.shape[:2], 3)), np.zeros((*image.shape[:2], 1))
    colours = 255 * colormaps["turbo"](np.linspace(0.05, 0.95, max(len(tokens), 1)))[:, :3]
    for token, colour in zip(tokens, colours, strict=False):
        row, column = _place(int(token), columns)
        cell = slice(row * patch_size, (row + 1) * patch_size), slice(column * patch_size, (column + 1) * patch_size)
        tint[cell], share[cell] = colour, 0.6
    return (image * (1 - share) + tint * share).round().astype(np.uint8)


def tile(rows, side=160, gap=4):
    """Lay out pictures in rows, each brought to the height `side`, on white: one picture uint8 [H, W, 3].

    Small ones keep hard edges, large ones are averaged.
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


# --- figures of a network


def draw_attention(images, attentions, masks, names, patch_size, threshold):
    """Draw what the CLS token attends to, head by head (as DINO's figures).

    Args:
        images: uint8 [H, W, 3] each.
        attentions: [heads, rows, columns] each, of CLS to the patches.
        masks: booleans of the same shape: the patches that hold most of the attention.
        names: of the images.
        threshold: share of the attention that the masks keep, for the title.

    Returns:
        matplotlib Figure. Above, the attention, each map scaled to its largest value; below, the image where the mask
        is, and dimmed elsewhere. The last column has the mean over heads, with a mask of its own.
    """
    per_row = 7
    blocks = []  # (image number, panels of a pair of rows)
    for i, attention in enumerate(attentions):
        panels = [None, *range(len(attention))]
        blocks += [(i, panels[start : start + per_row]) for start in range(0, len(panels), per_row)]
    columns = min(per_row, max(len(panels) for _, panels in blocks))
    ratios = [image.shape[0] / image.shape[1] for image in images]
    side = WIDTH / columns
    height = sum(2 * side * ratios[i] + 0.22 for i, _ in blocks) + 0.25
    figure = Figure(figsize=(WIDTH, height), dpi=200, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.02, hspace=0.0, wspace=0.0)
    heights = [ratios[i] for i, _ in blocks for _ in ("above", "below")]
    axes = figure.subplots(2 * len(blocks), columns, squeeze=False, height_ratios=heights)
    for axis in axes.flat:
        axis.axis("off")
    for (i, panels), above, below in zip(blocks, axes[::2], axes[1::2], strict=True):
        image, attention = images[i], attentions[i]
        names_of_heads = [f"head {head + 1}" for head in range(len(attention) - 1)] + ["mean"]
        for panel, up, down in zip(panels, above, below, strict=False):
            if panel is None:
                up.imshow(image)
                up.set_title(shown(names[i]), fontsize=8)
                text = f"{threshold:.0%} of the\nattention"
                down.text(0.5, 0.5, text, fontsize=8, ha="center", va="center", transform=down.transAxes)
                continue
            up.imshow(heat_map(attention[panel], patch_size))
            up.set_title(names_of_heads[panel], fontsize=8)
            mask = enlarge(masks[i][panel], patch_size)[..., None]
            down.imshow(np.where(mask, image, 255 - (255 - image) // 5))
    figure.suptitle("Attention of CLS in the last block", fontsize=9)
    return figure


def draw_features(images, colours, names, patch_size, explained):
    """Draw images above their patch features as colours.

    Args:
        images: uint8 [H, W, 3] each.
        colours: uint8 [rows, columns, 3] each, the first three principal components.
        explained: share of the variance in these components, [3].

    Returns:
        matplotlib Figure of two rows of panels, up to four images side by side
    """
    columns = min(len(images), 4)
    lines = -(-len(images) // columns)
    ratios = [image.shape[0] / image.shape[1] for image in images]
    ratios = [max(ratios[columns * line :][:columns]) for line in range(lines)]
    height = sum(2 * WIDTH / columns * ratio + 0.2 for ratio in ratios) + 0.25
    figure = Figure(figsize=(WIDTH, height), dpi=200, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.02, hspace=0.0, wspace=0.0)
    heights = [ratio for ratio in ratios for _ in ("above", "below")]
    axes = figure.subplots(2 * lines, columns, squeeze=False, height_ratios=heights)
    for axes_of_row, anchor in zip(axes, lines * ["S", "N"], strict=True):
        for axis in axes_of_row:
            axis.axis("off")
            axis.set_anchor(anchor)
    for i, (image, colour, name) in enumerate(zip(images, colours, names, strict=True)):
        line, column = divmod(i, columns)
        axes[2 * line, column].imshow(image)
        axes[2 * line, column].set_title(shown(name), fontsize=8)
        axes[2 * line + 1, column].imshow(enlarge(colour, patch_size))
    shares = ", ".join(f"{share:.0%}" for share in explained)
    title = "Patch features: first three principal components as red, green, blue"
    figure.suptitle(f"{title} ({shares} of the variance)", fontsize=9)
    return figure


def draw_matches(image, crops, boxes, flips, patch_size, idx_a, idx_b, found_a=None):
    """Draw two crops of an image and their matched patches (the paper's Figures 2 and 3).

    Args:
        image: uint8 [H, W, 3].
        crops: uint8 [S, S, 3] and [s, s, 3], the teacher's and the student's, as the network sees them.
        boxes: (top, left, height, width) of each in the image.
        flips: whether each is mirrored.
        patch_size: in pixels of the crops.
        idx_a, idx_b: [n] patches of the two that geometry matches, counting from 1, without CLS.
        found_a: [n] the teacher's patch nearest in feature space to each of idx_b; None draws the geometry alone.

    Returns:
        matplotlib Figure of the image with the two boxes and their intersection, the geometric pairs, and the pairs by
        features, each with the teacher's crop above the student's. The two patches of a pair have the same number and
        a line between them; the colour of a pair by features says how far it is from geometry.
    """
    width_ratios, height = ([1.7, 1], 5.4) if found_a is None else ([1.25, 1, 1], 4.4)
    figure = Figure(figsize=(WIDTH, height), dpi=200, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.02, hspace=0.06, wspace=0.02)
    grid = figure.add_gridspec(2, len(width_ratios), width_ratios=width_ratios)
    _draw_boxes(figure.add_subplot(grid[:, 0]), image, boxes)

    axes = [figure.add_subplot(grid[row, 1]) for row in (0, 1)]
    for axis, whose, crop, flip in zip(axes, ("teacher", "student"), crops, flips, strict=True):
        label = f"{whose}’s view\n{crop.shape[0]}×{crop.shape[1]}"
        axis.set_ylabel(label + (", mirrored" if flip else ""), fontsize=8)
    colours = colormaps["plasma"](np.linspace(0, 0.95, max(len(idx_a), 1)))[: len(idx_a)]
    _draw_pairs(figure, axes, crops, patch_size, idx_a, idx_b, colours)
    axes[0].set_title("By geometry", fontsize=8)
    if found_a is None:
        return figure

    axes = [figure.add_subplot(grid[row, 2]) for row in (0, 1)]
    columns = crops[0].shape[1] // patch_size
    distance = np.abs(np.subtract(_place(found_a, columns), _place(idx_a, columns))).max(0)  # in patches
    colours, labels = (STUDENT, OVERLAP, WRONG), ("the same patch as by geometry", "one around it", "another patch")
    _draw_pairs(figure, axes, crops, patch_size, found_a, idx_b, [colours[min(d, 2)] for d in distance])
    axes[0].set_title("By features" + (f": {(distance == 0).mean():.0%} the same" if len(distance) else ""), fontsize=8)
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
    figure.legend(handles, labels, loc="outside lower right", ncols=3, fontsize=8, frameon=False)
    return figure


def _draw_boxes(axis, image, boxes):
    """Draw an image with the boxes of its two crops, and their intersection."""
    axis.imshow(image)
    for (top, left, height, width), name, colour in zip(
        boxes, ("teacher’s view", "student’s view"), (TEACHER, STUDENT), strict=True
    ):
        style = {"fill": False, "edgecolor": colour, "linewidth": 2, "label": name}
        axis.add_patch(Rectangle((left, top), width, height, **style))
    (top_a, left_a, height_a, width_a), (top_b, left_b, height_b, width_b) = boxes
    top, left = max(top_a, top_b), max(left_a, left_b)
    bottom, right = min(top_a + height_a, top_b + height_b), min(left_a + width_a, left_b + width_b)
    if top < bottom and left < right:
        style = {"facecolor": OVERLAP, "alpha": 0.25, "edgecolor": "none", "label": "intersection"}
        axis.add_patch(Rectangle((left, top), right - left, bottom - top, **style))
    bare(axis, "Image")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.03), fontsize=8, frameon=False)


def _draw_pairs(figure, axes, crops, patch_size, tokens_a, tokens_b, colours):
    """Draw the teacher's and the student's crop, and for each pair its two patches, numbered alike, and a line."""
    for axis, crop, colour in zip(axes, crops, (TEACHER, STUDENT), strict=True):
        axis.imshow(crop)
        bare(axis)
        for spine in axis.spines.values():
            spine.set(color=colour, linewidth=2)
    for number, (token_a, token_b, colour) in enumerate(zip(tokens_a, tokens_b, colours, strict=True), start=1):
        centres = []
        for axis, crop, token in zip(axes, crops, (token_a, token_b), strict=True):
            columns = crop.shape[1] // patch_size
            row, column = _place(token, columns)
            left, top = column * patch_size - 0.5, row * patch_size - 0.5
            square = {"facecolor": colour, "alpha": 0.3, "edgecolor": "none"}
            axis.add_patch(Rectangle((left, top), patch_size, patch_size, **square))
            x, y = left + patch_size / 2, top + patch_size / 2
            style = {"color": "white", "fontsize": min(6.0, 100 / columns), "ha": "center", "va": "center"}
            outline = [withStroke(linewidth=1, foreground="black")]
            # Of the figure, to stand above its lines.
            figure.text(x, y, str(number), transform=axis.transData, zorder=3, path_effects=outline, **style)
            centres.append((x, y))
        line = {"color": colour, "linewidth": 0.8, "alpha": 0.7}
        figure.add_artist(ConnectionPatch(centres[0], centres[1], "data", "data", axesA=axes[0], axesB=axes[1], **line))


def _place(token, columns):
    """Return (row, column) of a patch, or of an array of them."""
    return np.divmod(np.asarray(token) - 1, columns)


def draw_image_neighbours(query, images, similarities, names):
    """Draw a query and its nearest images, the nearest first.

    Args:
        query: uint8 [H, W, 3].
        images: the same, each of its own size.
        similarities: their cosines.
        names: of the images, or classes.

    Returns:
        matplotlib Figure, up to six panels in a row
    """
    columns = min(len(images) + 1, 6)
    rows = -(-(len(images) + 1) // columns)
    figure = Figure(figsize=(WIDTH, rows * (WIDTH / columns + 0.4) + 0.3), dpi=200, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(images) + 1 :]:
        axis.axis("off")
    axes[0].imshow(query)
    bare(axes[0], "query")
    for spine in axes[0].spines.values():
        spine.set(color=TEACHER, linewidth=2)
    for axis, image, similarity, name in zip(axes[1:], images, similarities, names, strict=False):
        axis.imshow(image)
        bare(axis, f"{shown(name)}\n{similarity:.2f}")
    figure.suptitle("Nearest images by the cosine of CLS", fontsize=9)
    return figure


def draw_patch_neighbours(images, similarities, patch, nearest, names, patch_size):
    """Draw where the patches are that resemble one patch.

    Args:
        images: uint8 [H, W, 3] each, the first holding the query.
        similarities: [rows, columns] each, cosines of all patches with the query.
        patch: (row, column) of the query.
        nearest: k triples (image, row, column).
        names: of the images.

    Returns:
        matplotlib Figure: the images with the query and its neighbours in frames above, all cosines below
    """
    columns = len(images)
    ratio = max(image.shape[0] / image.shape[1] for image in images)
    height = 2 * WIDTH / max(columns, 2) * ratio + 0.9
    figure = Figure(figsize=(WIDTH, height), dpi=200, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03, hspace=0.0, wspace=0.0)
    axes = figure.subplots(2, columns, squeeze=False)
    scale = {"cmap": "cividis", "vmin": min(similarity.min() for similarity in similarities), "vmax": 1}
    for axis, below, image, similarity, name in zip(axes[0], axes[1], images, similarities, names, strict=True):
        axis.imshow(image)
        bare(axis, shown(name))
        heat = below.imshow(enlarge(similarity, patch_size), **scale)
        bare(below)
    for i, row, column in nearest:
        _frame(axes[0, i], row, column, patch_size, STUDENT)
    row, column = patch
    for axis in axes[:, 0]:
        _frame(axis, row, column, patch_size, WRONG)
    bar = figure.colorbar(heat, ax=axes, location="bottom", fraction=0.04, aspect=50, pad=0.01)
    bar.set_label("cosine with the features of the query", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(f"A patch (red frame) and its {len(nearest)} nearest (blue frames)", fontsize=9)
    return figure


def _frame(axis, row, column, patch_size, colour):
    corner = (column * patch_size - 0.5, row * patch_size - 0.5)
    axis.add_patch(Rectangle(corner, patch_size, patch_size, fill=False, edgecolor=colour, linewidth=1.2))


MAX_CLASSES = 24  # in the legend of a map


def draw_map(points, labels, classes, title):
    """Draw labelled points in the plane; colour and marker say the class.

    Args:
        points: [n, 2].
        labels: ints [n], places in `classes`.
        classes: names. The legend has the MAX_CLASSES largest ones.

    Returns:
        matplotlib Figure
    """
    figure = Figure(figsize=(WIDTH, 4.6), dpi=200, layout="constrained")
    axis = figure.subplots()
    labels = np.asarray(labels)
    counts = np.bincount(labels, minlength=len(classes))
    in_legend = set(np.argsort(-counts, kind="stable")[:MAX_CLASSES].tolist())
    for label in np.flatnonzero(counts):
        own = points[labels == label]
        colour, marker = COLOURS[label % len(COLOURS)], MARKERS[label // len(COLOURS) % len(MARKERS)]
        name = shown(str(classes[label])) if label in in_legend else None
        style = {"color": colour, "marker": marker, "s": 14, "linewidths": 0.3, "edgecolors": "white"}
        axis.scatter(own[:, 0], own[:, 1], label=name, **style)
    bare(axis)
    axis.set_title(title, fontsize=9)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, markerscale=1.3)
    return figure


def draw_curves(curves):
    """Draw the logs of runs over epochs, a panel for each of PANELS that there is something of, a column wide (8.5 cm).

    Args:
        curves: {label: {name of a panel: array [4, n]}}, the rows being epochs trained, mean, standard deviation (NaN
            where there is none) and number of seeds.

    Returns:
        matplotlib Figure
    """
    names = [name for name in PANELS if any(curve[name].size for curve in curves.values())]
    labels = []
    for label, curve in curves.items():
        seeds = sorted({int(n) for name in names for n in curve[name][3]})
        count = " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
        labels.append(textwrap.fill(f"{shown(label)} ({count} {'seed' if count == '1' else 'seeds'})", 52))
    banded = any(np.isfinite(curve[name][2]).any() for curve in curves.values() for name in names)
    columns = 2 if max(map(len, labels)) <= 21 else 1
    lines = sum(1 + label.count("\n") for label in labels) / columns + banded

    figure = Figure(figsize=(3.35, 0.45 + 1.2 * len(names) + 0.13 * lines), dpi=300, layout="constrained")
    axes = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    # The styles tell lines apart in print without colours, too.
    looks = [
        {"color": colour, "linestyle": style, "linewidth": 1.1}
        for _, colour, style in zip(curves, cycle(LINE_COLOURS), cycle(LINE_STYLES))
    ]
    for axis, name in zip(axes, names, strict=True):
        for look, curve in zip(looks, curves.values(), strict=True):
            epochs, mean, deviation, _ = curve[name]
            few = {"marker": "o", "markersize": 2} if 0 < len(epochs) < 10 else {}  # one point alone makes no line
            axis.plot(epochs, mean, **look, **few)
            if np.isfinite(deviation).any():
                band = {"color": look["color"], "alpha": 0.2, "linewidth": 0}
                axis.fill_between(epochs, mean - deviation, mean + deviation, **band)
        title, unit = PANELS[name]
        values = np.concatenate([curve[name][1] for curve in curves.values()])
        if name == "loss" and 0 < 5 * values.min() < values.max():  # a sum and a mean over patches
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(NullLocator())
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
    handles = [Line2D([], [], **look) for look in looks]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, **style)
    return figure
