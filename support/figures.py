"""All figures and pictures. Drawing needs no display.

A figure spans one or two columns of a paper and is written as PNG or PDF. Many images are drawn on several pages.
"""

import contextlib
import os
import textwrap
import unicodedata
import warnings
from collections.abc import Sequence
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import cv2
import matplotlib.style
import numpy as np
import torch
from matplotlib import colormaps, font_manager
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import ConnectionPatch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from numpy.typing import ArrayLike
from PIL import Image

from support.files import atomic_write, make_folder
from utils import UserError, printable, warn

# Color-blind safe palette of Okabe and Ito. Frames of views have other colors than matches.
TEACHER, STUDENT = "#E69F00", "#0072B2"
SAME, ADJACENT, OTHER = "#009E73", "#F0E442", "#CC79A7"
COLORS = (STUDENT, "#D55E00", SAME, OTHER, TEACHER, "#56B4E9", "#000000", ADJACENT, "#999999", "#882255")
LINE_COLORS = COLORS[:7]  # yellow is too light for lines on white
LineStyle = str | tuple[int, tuple[float, ...]]
LINE_STYLES: tuple[LineStyle, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1.5, 1, 1.5)))
HEAT = colormaps["inferno"]  # of attention and cosines: bright is high
PANELS = {  # logged value: (title, unit)
    "loss": ("Loss", "nats"),
    "knn_top1": ("Online k-NN", "top-1 accuracy (%)"),
    "dense_miou": ("Online segmentation", "mIoU (%)"),
    "entropy_share": ("Entropy of the teacher’s outputs", "share of ln K"),
    "output_information": ("Information in the teacher’s outputs", "nats"),
    "gradient": ("Gradient on CLS features", "norm"),
    "matched_patches": ("Matched patches", "per pair of views"),
}
MAX_CURVES = len(LINE_COLORS) * len(LINE_STYLES)
SUFFIXES, ANIMATED_SUFFIXES = (".png", ".pdf"), (".webp", ".gif")
ANIMATION = b"animation of visualize.py"  # in a file, marks it as one that may be replaced
FRAME_TIME = 100  # of an animation, in milliseconds
LABEL_HEIGHT = 18  # of a picture in a tile, in pixels
WIDTH, PAGE_HEIGHT = 7.0, 10.0  # of a figure over two columns and of a full page, in inches
GAP = 0.05  # between pictures, in inches
BRIGHT = 3  # times uniform attention that is bright in a map without a higher one, so that a flat map looks flat
MAX_NAMED = 100  # classes of a map
MAX_NUMBERED = 9  # pairs of patches, so that a number is a digit
# Draws the same whatever a matplotlibrc says. `$` in a name starts no formula, and the fonts of a PDF can be edited.
STYLE = {"text.parse_math": False, "pdf.fonttype": 42, "font.size": 8, "figure.titlesize": 9, "axes.titlesize": 8}
STYLE |= dict.fromkeys(("axes.labelsize", "xtick.labelsize", "ytick.labelsize"), 7)
STYLE |= {"legend.fontsize": 7, "legend.title_fontsize": 7, "legend.frameon": False}
plain_style = matplotlib.style.context(["default", STYLE])
Images = dict[str, np.ndarray]  # {name: uint8 [H, W, 3]}
Arrays = Sequence[np.ndarray]
Places = Sequence[tuple[int, int, int]]  # (image, row, column)
Pages = list[Figure]
Strip = Sequence[tuple[int, np.ndarray, np.ndarray, np.ndarray | None]]  # (number, image, mask, truth) of some frames


class Panel(NamedTuple):
    """A title, of one or two lines, and pictures below each other: uint8 [H, W, 3]."""

    title: str
    pictures: list[np.ndarray]


def fit(name: str, characters: int) -> str:
    """Make a name printable, and replace the middle of a name that is wider than some `characters` by `…`.

    A leading `_` is preceded by a space, since matplotlib leaves such names out of legends.
    """
    name, characters = printable(name), number_of_characters(name, characters)
    name = name if len(name) <= characters else f"{name[: characters // 2 - 1]}…{name[-(characters // 2) :]}"
    return " " + name if name.startswith("_") else name


def wrap(name: str, characters: int, lines: int) -> str:
    """Wrap a name in lines of some `characters`, and cut it by `fit` to about that many lines."""
    width = number_of_characters(name, characters)
    return textwrap.fill(fit(name, lines * characters), width, break_on_hyphens=False)


def number_of_characters(name: str, characters: int) -> int:
    """Return how many characters of a name take the width of some Latin ones: fewer if it is Chinese, for example."""
    return characters * 2 // 3 if any(unicodedata.east_asian_width(c) in "WF" for c in name) else characters


def check_output(path: str | os.PathLike, option: str = "--output", animated: bool = False) -> None:
    """Create the folder of a figure's file, or of an animation's.

    Args:
        option: the option that names the file, for messages.

    Raises:
        UserError: the suffix is unknown, the folder cannot be written to, or the path is a folder or a file that
            `save` or `save_animation` did not write, such as an input image after --output.
    """
    path, suffixes = Path(path), ANIMATED_SUFFIXES if animated else SUFFIXES
    if path.suffix.lower() not in suffixes:
        raise UserError(f"cannot write {path}: found the suffix {path.suffix!r}, expected {' or '.join(suffixes)}")
    make_folder(path.parent, f"the folder of {option}")
    try:
        if path.exists() and (ANIMATION if animated else b"Matplotlib") not in path.read_bytes():
            raise UserError(f"cannot write {path}: found a file that is not a figure, expected a new name or a figure")
    except OSError as error:  # a folder, or a name that is too long
        raise UserError(f"cannot write {path}: {error.strerror}; give the name of a file in a folder") from error


@plain_style
def save(pages: Sequence[Figure], path: str | os.PathLike) -> list[Path]:
    """Write figures as PNG or PDF, depending on the suffix, and return the paths: NAME.png, NAME-2.png, ..."""
    path = Path(path)
    paths = [path, *(path.with_stem(f"{path.stem}-{number}") for number in range(2, len(pages) + 1))]
    texts = [text for page in pages for text in page.findobj(Text)]
    own = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    characters = {ord(character) for text in texts for character in text.get_text() if character.isprintable()}
    if missing := frozenset(characters - own.keys()):
        for text in texts:
            text.set_fontfamily(["DejaVu Sans", *fallback_fonts(missing)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # characters that the font lacks become boxes
        for figure, file in zip(pages, paths, strict=True):
            check_output(file)
            with atomic_write(file) as temporary:
                figure.savefig(temporary, format=path.suffix[1:].lower())
    return paths


def save_animation(frames: Arrays, path: str | os.PathLike) -> list[Path]:
    """Write an endless animation of frames, uint8 [H, W, 3], as WebP or GIF, depending on the suffix. Return [path]."""
    path = Path(path)
    first, *others = map(Image.fromarray, frames)
    with atomic_write(path) as temporary:
        options = {"save_all": True, "append_images": others, "duration": FRAME_TIME, "loop": 0}
        first.save(temporary, path.suffix[1:].upper(), comment=ANIMATION, xmp=ANIMATION, **options)
    return [path]


@cache
def fallback_fonts(missing: frozenset[int]) -> list[str]:
    """Return families of installed fonts that have characters, given by number. Warn of characters that no font has."""
    found, families = {}, []
    for path in sorted(font_manager.findSystemFonts()):
        with contextlib.suppress(RuntimeError, OSError):  # a damaged font
            font = font_manager.get_font(path)
            if font.scalable and "LastResort" not in path:  # its characters are boxes
                found[path] = missing & font.get_charmap().keys()
    for path in sorted(found, key=lambda path: (-len(found[path]), "Regular" not in path)):
        if found[path] & missing:
            font_manager.fontManager.addfont(path)  # it may be newer than matplotlib's list
            families.append(font_manager.get_font(path).family_name)
            missing -= found[path]
    if missing:
        named = "".join(map(chr, sorted(missing)[:10])) + "…" * (len(missing) > 10)
        warn(f"no installed font has {named}: drawn as boxes; install one, such as Debian's package fonts-noto-cjk")
    return families


def to_picture(pixels: torch.Tensor) -> np.ndarray:
    """Turn a view of one image, a tensor [3, S, S], into an array [S, S, 3]."""
    return pixels.permute(1, 2, 0).numpy()


def enlarge(cells: np.ndarray, patch_size: int) -> np.ndarray:
    """Repeat each cell of an array [rows, columns, ...] over the pixels of its patch: [H, W, ...]."""
    return cells.repeat(patch_size, 0).repeat(patch_size, 1)


def heat_map(values: np.ndarray, patch_size: int, highest: float | None = None) -> np.ndarray:
    """Turn values per patch [rows, columns] into colors, uint8 [H, W, 3]; `highest`, or the maximum, is bright."""
    share = values / max(highest or values.max(), 1e-12)
    return enlarge((255 * HEAT(share)[..., :3]).round().astype(np.uint8), patch_size)


def attention_map(values: np.ndarray, patch_size: int) -> tuple[str, np.ndarray]:
    """Return the maximum of attention [rows, columns] in words, as a multiple of uniform attention, and its heat map.

    The colors begin at 0. They end at the maximum, or at BRIGHT times uniform attention if that is more.
    """
    uniform = max(values.mean(), 1e-12)
    times = values.max() / uniform
    text = f"max {times:.{1 if times < 10 else 0}f} × uniform"
    return text, heat_map(values, patch_size, max(values.max(), BRIGHT * uniform))


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

    Small pictures are enlarged with hard edges, large ones are averaged. Long labels are written smaller.

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
            font, place, scale = cv2.FONT_HERSHEY_SIMPLEX, (2, LABEL_HEIGHT - 5), 0.38
            while cv2.getTextSize(label, font, scale, 1)[0][0] > size[0] - 4 and scale > 0.1:
                scale *= 0.9
            cv2.putText(picture, label, place, font, scale, color=(0, 0, 0), lineType=cv2.LINE_AA)
            line.append(picture)
        lines.append(np.concatenate(line, 1))
    width = max(line.shape[1] for line in lines)
    lines = [np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0)), constant_values=255) for line in lines]
    return np.concatenate(lines)


@plain_style
def draw_attention(images: Images, attentions: Arrays, masks: Arrays, patch_size: int, threshold: float) -> Pages:
    """Draw the attention of the CLS token, head by head, as DINO's figures do.

    Args:
        images: {name: uint8 [H, W, 3]}.
        attentions: [heads + 1, rows, columns] per image, from CLS to the patches; the last map is the mean over heads.
        masks: booleans of the same shape, the patches that hold most of the attention.
        patch_size: side of a patch in pixels.
        threshold: share of the attention that a mask holds, for the title.

    Returns:
        pages with the attention maps, see `attention_map`, above the image with the patches outside the mask grayed out
    """
    groups = []
    for (name, image), attention, mask in zip(images.items(), attentions, masks, strict=True):
        panels = [Panel(name, [image])]
        titles = [*(f"head {head}" for head in range(1, len(attention))), "mean of heads"]
        for title, values, kept in zip(titles, attention, mask, strict=True):
            grayed = np.where(enlarge(kept, patch_size)[..., None], image, 160 + image // 5)
            text, colors = attention_map(values, patch_size)
            panels.append(Panel(f"{title}\n{text}", [colors, grayed]))
        groups.append(panels)
    title = f"CLS attention in the last block (bright: maximum, at least {BRIGHT} × uniform)"
    return _draw_panels(groups, 5, f"{title} and the patches with {threshold:.0%} of it")


@plain_style
def draw_features(images: Images, colors: Arrays, patch_size: int, explained: np.ndarray) -> Pages:
    """Draw images above their patch features as colors, up to four images in a row.

    Args:
        images: {name: uint8 [H, W, 3]}.
        colors: uint8 [rows, columns, 3] per image, the first three principal components. A single color is titled
            "no structure".
        explained: share of the variance per component, [3].

    Returns:
        pages
    """
    panels = []
    for (name, image), color in zip(images.items(), colors, strict=True):
        structure = "" if np.ptp(color, (0, 1)).any() else "\nno structure"
        panels.append(Panel(name + structure, [image, enlarge(color, patch_size)]))
    title = "Patch features: first three principal components as red, green, blue"
    if explained.any():
        title += f" ({', '.join(f'{share:.0%}' for share in explained)} of the variance)"
    return _draw_panels([panels], 4, title)


@plain_style
def draw_segmentation(images: Images, truths: Arrays, predictions: Arrays, classes: Sequence[str]) -> Pages:
    """Draw images above their true and predicted classes, up to six images in a row.

    Args:
        images: {name: uint8 [H, W, 3]}.
        truths, predictions: ints [h, w] per image, indices of `classes`; 255 is ignored and white.
        classes: names, of which the first MAX_NAMED are in the legend.

    Returns:
        pages
    """
    bits = np.arange(256)[:, None] >> np.arange(3)  # Pascal VOC's colors: three bits at a time, the lowest ones first
    colors = sum(((bits >> 3 * i) & 1) << 7 - i for i in range(3)).astype(np.uint8)  # type: ignore[union-attr]
    colors[255] = 255
    pictures = zip(images.items(), truths, predictions, strict=True)
    panels = [Panel(name, [image, colors[truth], colors[found]]) for (name, image), truth, found in pictures]
    handles = [Rectangle((0, 0), 1, 1, color=colors[i] / 255) for i in range(min(len(classes), MAX_NAMED))]
    footer = 0.1 + 0.15 * -(-len(handles) // 7)
    pages = _draw_panels([panels], 6, "Images, their true classes and the predicted classes", footer)
    for page in pages:
        names = [fit(name, 12) for name in classes[: len(handles)]]
        page.legend(handles, names, loc="lower center", ncols=7, handlelength=1, borderaxespad=0)
    return pages


@plain_style
def draw_propagation(strips: dict[str, Strip]) -> Pages:
    """Draw a film strip per video: frames with the masks over them, above the annotated truth where there is one.

    Args:
        strips: {name of the video: its frames}. The mask of the first frame is given.
    """
    groups, truths = [], False
    for name, strip in strips.items():
        panels = list[Panel]()
        for number, image, mask, truth in strip:
            shown = [mask] if truth is None or not panels else [mask, truth]
            truths = truths or len(shown) == 2
            title = f"frame {number}" if panels else f"{fit(name, 20)}: given"
            panels.append(Panel(title, [tint_masks(image, labels) for labels in shown]))
        groups.append(panels)
    below = "; below, where annotated: truth" if truths else ""
    return _draw_panels(groups, 4, f"Masks propagated from the first frame by patch features{below}")


def tint_masks(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Tint the objects of an image, each in its own color, with an outline.

    Args:
        image: uint8 [H, W, 3].
        labels: ints [H, W]. 0 and 255 have no tint.

    Returns:
        uint8 [H, W, 3]
    """
    picture = image.copy()
    for label in np.setdiff1d(labels, (0, 255)):
        color = np.array(to_rgba_array(COLORS[(label - 1) % len(COLORS)])[0, :3]) * 255
        inside = (labels == label).astype(np.uint8)
        width = max(min(labels.shape) // 120, 1)
        outline = inside.astype(bool) & (cv2.erode(inside, np.ones((2 * width + 1, 2 * width + 1), np.uint8)) == 0)
        picture[inside == 1] = (0.5 * image[inside == 1] + 0.5 * color).round()
        picture[outline] = color.round()
    return picture


@plain_style
def draw_correspondence(pairs: Sequence[tuple[Arrays, np.ndarray, np.ndarray, np.ndarray]]) -> Pages:
    """Draw pairs of images side by side, with a line from each point to the nearest patch of the other image.

    Args:
        pairs: (pictures, points, found, right): two of uint8 [S, S, 3], the points in the first and the patches found
            in the second as (x, y) in pixels, [n, 2] each, and whether they are right, bool [n].

    Returns:
        pages; lines of right matches are green, of wrong ones vermilion
    """
    panels, gap = [], 8
    for pictures, _, _, right in pairs:
        picture = np.concatenate([np.pad(pictures[0], ((0, 0), (0, gap), (0, 0)), constant_values=255), pictures[1]], 1)
        panels.append(Panel(f"{right.sum()} of {len(right)} right", [picture]))
    pages = _draw_panels([panels], 2, "Points and their nearest patches by features: right (green), wrong (vermilion)")
    axes = [axis for page in pages for axis in page.axes]
    for axis, (pictures, points, found, right) in zip(axes, pairs, strict=True):
        axis.autoscale(False)
        for point, place, is_right in zip(points, found + [pictures[0].shape[1] + gap, 0], right, strict=True):
            color = SAME if is_right else COLORS[1]
            (line,) = axis.plot(
                *np.stack([point, place], 1) - 0.5, color=color, linewidth=0.8, marker="o", markersize=2
            )
            line.set_path_effects([withStroke(linewidth=1.4, foreground="white")])
    return pages


def _draw_panels(groups: Sequence[Sequence[Panel]], columns: int, title: str, footer: float = 0) -> Pages:
    """Draw panels in lines of at most `columns`, on as many pages as needed. Each group begins a line.

    The pictures of a line are equally high and fill its width, unless they would be too high. A page has `footer`
    inches below them.
    """
    header, axes = textwrap.wrap(title, 105), []
    figures: Pages = []
    start = y = 0.1 + 0.15 * len(header)  # all lengths are in inches, from the top left
    highest = min(1.5 * WIDTH / min(columns, max(2, *map(len, groups))), WIDTH / 2)
    for group in groups:
        count = -(-len(group) // -(-len(group) // columns))  # in a line
        for line in (group[first : first + count] for first in range(0, len(group), count)):
            shapes = np.array([panel.pictures[0].shape for panel in line])
            ratios = (shapes[:, 1] / shapes[:, 0]).clip(0.6, 3)  # so that titles have room
            height = min((WIDTH - GAP * (count + 1)) / (ratios.mean() * count), highest)
            # A character is about 0.075 inches wide.
            titles = [
                "\n".join(wrap(text, max(int(width / 0.075), 6), lines=2) for text in panel.title.split("\n"))
                for panel, width in zip(line, height * ratios, strict=True)
            ]
            above = 0.06 + 0.13 * (1 + max(text.count("\n") for text in titles))
            below = max(len(panel.pictures) for panel in line) * (height + GAP)
            if not figures or y + above + below + footer > PAGE_HEIGHT:
                figures.append(Figure(dpi=200))
                y = start
            x = GAP
            for panel, text, width in zip(line, titles, height * ratios, strict=True):
                for i, picture in enumerate(panel.pictures):
                    axis = figures[-1].add_axes((0, 0, 1, 1), anchor="N", title="" if i else text)
                    axis.axis("off")
                    axis.imshow(picture)
                    axes.append((figures[-1], axis, x, y + above + i * (height + GAP), width, height))
                x += width + GAP
            y += above + below
            figures[-1].set_size_inches(WIDTH, y + footer)
            figures[-1].suptitle("\n".join(header), x=0.01, y=1 - 0.05 / (y + footer), ha="left", va="top")
    for figure, axis, x, y, width, height in axes:
        total = figure.get_figheight()
        axis.set_position((x / WIDTH, 1 - (y + height) / total, width / WIDTH, height / total))
    return figures


def _figure(height: float, title: str = "", width: float = WIDTH) -> Figure:
    """Return an empty figure over two columns, `height` inches high, or of another width with as many pixels."""
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    figure = Figure(figsize=(width, height), dpi=200 * WIDTH / width, layout=layout)
    figure.suptitle(title, x=0.01, ha="left", wrap=True)
    return figure


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
        the image with both boxes, the pairs by geometry, and the pairs by features, each with the teacher's crop above
        the student's. Patches of all pairs are tinted. At most MAX_NUMBERED pairs, spread over the others, have a
        number on both patches and a line between them; of several pairs of a patch the first one numbers it. The color
        of a pair by features shows its distance from geometry. Frames have other colors than pairs. The numbers can be
        read in one column (8.5 cm), too.
    """
    idx_a, idx_b = np.asarray(idx_a), np.asarray(idx_b)
    some = f", {MAX_NUMBERED} numbered" if len(idx_a) > MAX_NUMBERED else ""
    pairs = [(f"By geometry\n{len(idx_a)} pairs{some}", idx_a, colormaps["summer"](np.linspace(0, 1, len(idx_a))))]
    figure = _figure(4.0 if nearest_a is None else 3.3, width=5.0)
    if nearest_a is not None:
        distance = patch_distance(nearest_a, idx_a, crops[0].shape[1] // patch_size)
        title = "By features\n" + (f"{(distance == 0).mean():.0%} the same" if len(distance) else "")
        colors = (SAME, ADJACENT, OTHER)
        pairs.append((title, np.asarray(nearest_a), to_rgba_array([colors[min(d, 2)] for d in distance])))
        handles = [Rectangle((0, 0), 1, 1, color=color) for color in colors]
        labels = ["same patch as by geometry", "adjacent patch", "other patch"]
        figure.legend(handles, labels, loc="outside lower right", ncols=3)
    grid = figure.add_gridspec(2, 1 + len(pairs), width_ratios=[1.5, *[1] * len(pairs)])
    whole = figure.add_subplot(grid[:, 0], title="Image", xticks=[], yticks=[])
    whole.imshow(image)
    for (top, left, height, width), color in zip(boxes, (TEACHER, STUDENT), strict=True):
        whole.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=color, linewidth=2))
    for number, (title, tokens_a, pair_colors) in enumerate(pairs, start=1):
        axes = [figure.add_subplot(grid[row, number], xticks=[], yticks=[]) for row in (0, 1)]
        axes[0].set_title(title)
        _draw_pairs(axes, crops, patch_size, (tokens_a, idx_b), pair_colors)
    for axis, whose, crop, flip in zip(figure.axes[1:3], ("teacher", "student"), crops, flips, strict=True):
        axis.set_ylabel(f"{whose}’s view\n{crop.shape[0]}×{crop.shape[1]}{', mirrored' if flip else ''}")
    return figure


def _draw_pairs(axes: Sequence[Axes], crops: Arrays, patch_size: int, tokens: Arrays, colors: np.ndarray) -> None:
    """Draw the teacher's and the student's crop, the patches of all pairs, and numbers and lines of some."""
    figure, centers = axes[0].figure, []
    count = len(colors)
    numbered = np.linspace(0, count - 1, min(count, MAX_NUMBERED)).round().astype(int)
    for axis, crop, frame, own_tokens in zip(axes, crops, (TEACHER, STUDENT), tokens, strict=True):
        axis.imshow(crop)
        axis.spines[:].set(color=frame, linewidth=2)
        columns = crop.shape[1] // patch_size
        corners = np.stack(_place(own_tokens, columns)[::-1], 1) * patch_size - 0.5  # (x, y) each
        for corner, color in zip(corners, colors, strict=True):
            axis.add_patch(Rectangle(corner, patch_size, patch_size, facecolor=color, alpha=0.3, edgecolor="none"))
        centers.append(corners + patch_size / 2)
        for first in np.unique(own_tokens[numbered], return_index=True)[1]:
            # A text of the figure, not of the axis, so that it lies above the figure's lines.
            x, y = centers[-1][numbered[first]]
            text = figure.text(x, y, str(first + 1), transform=axis.transData, color="white", ha="center", va="center")
            text.set(path_effects=[withStroke(linewidth=1.2, foreground="black")], zorder=3)
    for i in numbered:
        line = ConnectionPatch(centers[0][i], centers[1][i], "data", "data", axesA=axes[0], axesB=axes[1])
        line.set(color=colors[i], linewidth=0.6, alpha=0.7)
        figure.add_artist(line)


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
def draw_image_neighbours(images: Arrays, similarities: Sequence[float], names: Sequence[str]) -> Pages:
    """Draw a query and its nearest images, the nearest first, up to six panels in a row.

    Args:
        images: uint8 [H, W, 3] each, of any size; the first is the query.
        similarities: cosine between the CLS features of the query and of each other image.
        names: one per other image.

    Returns:
        pages
    """
    titles = ["query", *(f"{printable(name)}\n{s:.3f}" for name, s in zip(names, similarities, strict=True))]
    panels = [Panel(title, [image]) for title, image in zip(titles, images, strict=True)]
    return _draw_panels([panels], 6, "Query and its nearest images, by cosine of the CLS features")


@plain_style
def draw_patch_neighbours(images: Images, similarities: Arrays, places: Places, patch_size: int, of: str = "") -> Pages:
    """Draw one patch and the patches most similar to it, up to four images in a row.

    Args:
        images: {name: uint8 [H, W, 3]}, the first contains the query patch.
        similarities: [rows, columns] per image, cosine between each patch and the query.
        places: the query and the patches that are nearest to it.
        of: where the nearest patches were searched, for the title.

    Returns:
        pages with the images, the query and its neighbours in frames, above the cosines of all patches
    """
    low = min(similarity.min() for similarity in similarities)
    panels = [
        Panel(name, [image, heat_map(similarity - low, patch_size, highest=1 - low)])
        for (name, image), similarity in zip(images.items(), similarities, strict=True)
    ]
    title = f"A patch (orange), its {len(places) - 1} nearest{of} (blue), cosines from {low:.2f} (dark) to 1 (bright)"
    pages = _draw_panels([panels], 4, title)
    axes = [axis for page in pages for axis in page.axes]
    for number, (i, row, column) in reversed(list(enumerate(places))):  # the query last, above the others
        corner = (column * patch_size - 0.5, row * patch_size - 0.5)
        frame = Rectangle(corner, patch_size, patch_size, fill=False, edgecolor=STUDENT if number else TEACHER)
        frame.set(clip_on=False, path_effects=[withStroke(linewidth=1.6, foreground="white")])
        axes[2 * i].add_patch(frame)
    return pages


@plain_style
def draw_map(points: np.ndarray, labels: ArrayLike, classes: Sequence[str], title: str) -> Figure:
    """Draw labeled points in the plane; the color shows the class.

    Args:
        points: [n, 2].
        labels: ints [n], indices into `classes`.
        classes: names. Numbers, each at the median of a class, and a legend name at most MAX_NAMED of them.
    """
    labels = np.asarray(labels)
    present = np.unique(labels)
    named = len(present) <= MAX_NAMED
    # Successive hues lie far apart. Darker ones can be read on white.
    hues = 0.8 * colormaps["hsv"](0.618 * np.arange(len(present)) % 1)[:, :3]
    figure = _figure(4.6 + 0.13 * -(-len(present) // 4) * named, title)
    axis = figure.add_subplot(xticks=[], yticks=[])
    for number, label in enumerate(present, start=1):
        own, name = points[labels == label], fit(f"{number}: {classes[label]}", 22)
        color = hues[number - 1] if len(present) > len(COLORS) else COLORS[number - 1]
        axis.scatter(own[:, 0], own[:, 1], s=12, color=color, linewidths=0.3, edgecolors="white", label=name)
        if named:
            text = axis.annotate(str(number), np.median(own, 0), ha="center", va="center")
            text.set_path_effects([withStroke(linewidth=2, foreground="white")])
    if named:
        figure.legend(loc="outside lower left", ncols=4, markerscale=1.5)
    return figure


@plain_style
def draw_curves(
    curves: dict[str, dict[str, np.ndarray]],
    rows: Sequence[Sequence[str]] | None = None,
    looks: Sequence[tuple[str, LineStyle]] | None = None,
) -> Figure:
    """Draw the logs of runs over epochs, a panel per name, one column (8.5 cm) of a paper wide, or two.

    Args:
        curves: {label: {name: array [3, n]}}. A name is an entry of PANELS, to which text may be added after a comma,
            "loss, K = 64". The rows are epochs trained, mean, and standard deviation (NaN if there is only one run).
        rows: names of the panels in each row, which share their axes; by default one row per name with values.
        looks: color and line style of each label; by default all differ in both.
    """
    if len(curves) > MAX_CURVES:
        raise UserError(f"found {len(curves)} settings, a figure tells at most {MAX_CURVES} apart: give fewer runs")
    filled = dict.fromkeys(name for curve in curves.values() for name in curve if curve[name].size)
    rows = rows or [[name] for panel in PANELS for name in filled if name.partition(",")[0] == panel]
    names, columns = [name for row in rows for name in row], len(rows[0])
    looks = looks or list(islice(zip(cycle(LINE_COLORS), cycle(LINE_STYLES)), len(curves)))
    drawn = {name: [curve.get(name, np.empty((3, 0))) for curve in curves.values()] for name in names}
    labels = [wrap(label, 40, 25) for label in curves]
    banded = any(np.isfinite(deviation).any() for panel in drawn.values() for _, _, deviation in panel)
    lines = sum(1 + label.count("\n") for label in labels) + banded
    # 0.45 inches for the axis label and margins, 1.2 per panel, 0.13 per line of the legend
    size = (3.35 if columns == 1 else WIDTH, 0.45 + 1.2 * len(rows) + 0.13 * -(-lines // columns))
    figure = Figure(figsize=size, dpi=300, layout="constrained")
    axes = figure.subplots(len(rows), columns, sharex=True, sharey="row", squeeze=False)
    for axis, name in zip(axes.flat, names, strict=True):
        # Line styles tell the curves apart in print without colors.
        for (epochs, mean, deviation), (color, line_style) in zip(drawn[name], looks, strict=True):
            marker = "o" if 0 < len(epochs) < 10 else ""  # a single point draws no line
            axis.plot(epochs, mean, marker=marker, markersize=2, color=color, linestyle=line_style, linewidth=1.1)
            axis.fill_between(epochs, mean - deviation, mean + deviation, color=color, alpha=0.2, linewidth=0)
        panel, comma, rest = name.partition(",")
        axis.set_title(PANELS[panel][0] + comma + rest, pad=3)
        if axis in axes[:, 0]:
            axis.set_ylabel(PANELS[panel][1])
        losses = np.concatenate([mean for _, mean, _ in drawn[name]]) if panel == "loss" else np.ones(1)
        if 0 < 5 * losses.min() < losses.max():  # sum and mean losses in one panel
            axis.set_yscale("log", subs=[2, 5])
            axis.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
        elif panel == "gradient":
            axis.set_yscale("log", nonpositive="mask")
            axis.yaxis.set(major_formatter="{x:g}", minor_formatter="")
        else:
            axis.locator_params(axis="y", nbins=5)  # as many labels whatever the layout, which depends on them
        axis.grid(linewidth=0.3, alpha=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("epochs")
    figure.align_ylabels(axes)
    title = "mean ± one standard deviation over seeds" if banded else ""
    figure.legend(axes[0, 0].lines, labels, title=title, loc="outside lower left", handlelength=3, ncols=columns)
    return figure
