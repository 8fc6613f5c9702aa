import warnings

import numpy as np
import pytest
import torch
from matplotlib import font_manager, rc_context
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import ConnectionPatch
from matplotlib.transforms import Bbox
from PIL import Image

from patch_matching import match_patches
from support import figures
from utils import UserError, printable

LONG = ["a name of two hundred characters " * 6, "x" * 200, "$x_$ \\alpha $ \\", "line\nbreak\ttab", "été", "_a"]
BOXES, FLIPS = ((10, 20, 300, 300), (100, 250, 192, 192)), (False, True)


def draw(photographs, boxes=BOXES, nearest_a=None):
    """Return (figure of crops of 224 and 96 pixels, (idx_a, idx_b) of their matches without CLS)."""
    crops = [
        np.array(photographs[0].crop((left, top, left + width, top + height)).resize((size, size)))
        for (top, left, height, width), size in zip(boxes, (224, 96), strict=True)
    ]
    idx_a, idx_b = match_patches(boxes[0], FLIPS[0], (14, 14), boxes[1], FLIPS[1], (6, 6))
    idx_a, idx_b = idx_a[1:], idx_b[1:]
    nearest = nearest_a and nearest_a(idx_a)
    figure = figures.draw_matches(np.array(photographs[0]), crops, boxes, FLIPS, 16, idx_a, idx_b, nearest)
    return figure, (idx_a, idx_b)


def tokens_at(points, columns):
    return [1 + int(y // 16) * columns + int(x // 16) for x, y in points]


def texts_on(figure, axis):
    """Return {text: position} of a figure's texts on an axis."""
    return {t.get_text(): t.get_position() for t in figure.texts if t.get_transform() == axis.transData}


def test_classes_have_the_colors_of_pascal_voc():
    """The colors that the palettes of its masks have, and white for ignored pixels."""
    truth = np.array([[0, 1, 2], [15, 20, 255]])
    image = np.zeros((4, 6, 3), np.uint8)
    names = [f"class {i}" for i in range(21)]
    (page,) = figures.draw_segmentation({"a": image, "b": image}, 2 * [truth], [truth, 0 * truth], names)
    pictures = [np.asarray(axis.images[0].get_array()) for axis in page.axes]
    assert [picture.shape for picture in pictures] == 2 * [image.shape, (2, 3, 3), (2, 3, 3)]
    colors = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [0, 64, 128], [255, 255, 255]]
    assert pictures[1].reshape(-1, 3).tolist() == colors
    assert not pictures[5].any()
    (legend,) = page.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    page.draw_without_rendering()
    bottom = min(axis.get_window_extent().y0 for axis in page.axes)
    assert 0 <= legend.get_window_extent().y0 < legend.get_window_extent().y1 < bottom


def test_matched_patches_have_the_same_color_and_some_a_number_and_a_line(photographs):
    """Few enough that the views can be seen, in numbers of at least 5 points where the figure is 8.5 cm wide."""
    for boxes, share in ((BOXES, 1), (((10, 20, 300, 300), (260, 100, 96, 96)), 0.5)):
        figure, (idx_a, idx_b) = draw(photographs, boxes)
        assert (len(idx_a) > 9) == (share == 1)
        numbered = [round(i * (len(idx_a) - 1) / 8) for i in range(9)] if share == 1 else range(len(idx_a))
        assert figure.axes[1].get_title() == f"By geometry\n{len(idx_a)} pairs{', 9 numbered' * (share == 1)}"
        lines = [artist for artist in figure.artists if isinstance(artist, ConnectionPatch)]
        colors = [patch.get_facecolor()[:3] for patch in figure.axes[1].patches]
        assert len(set(colors)) == len(idx_a) > 0
        assert [line.get_edgecolor()[:3] for line in lines] == [colors[n] for n in numbered]
        for i, (axis, idx, columns) in enumerate(zip(figure.axes[1:], (idx_a, idx_b), (14, 6), strict=True)):
            numbers, expected = texts_on(figure, axis), idx[list(numbered)].tolist()
            assert tokens_at([numbers[str(n + 1)] for n in range(len(numbers))], columns) == expected
            assert tokens_at([(line.xy1, line.xy2)[i] for line in lines], columns) == expected
            assert [line.axesA if i == 0 else line.axesB for line in lines] == [axis] * len(expected)
            corners = [(patch.get_x() + 1, patch.get_y() + 1) for patch in axis.patches]
            assert tokens_at(corners, columns) == idx.tolist()
            assert [patch.get_facecolor()[:3] for patch in axis.patches] == colors
        sizes = [text.get_fontsize() for text in figure.texts if text.get_text().isdigit()]
        assert min(sizes) * 8.5 / 2.54 / figure.get_figwidth() >= 5


def test_pairs_by_features_are_colored_by_their_distance(photographs):
    figure, (idx_a, _) = draw(photographs, nearest_a=lambda idx: idx - torch.arange(len(idx)) % 3)  # 0 to 2 to the left
    assert ((idx_a - 1) % 14 >= 2).all()  # so that all shifted patches stay in their row
    patches = figure.axes[3].patches
    colors = [to_hex(patch.get_facecolor()).upper() for patch in patches]
    assert colors == [(figures.SAME, figures.ADJACENT, figures.OTHER)[i % 3] for i in range(len(idx_a))]
    nearest = tokens_at([(patch.get_x() + 1, patch.get_y() + 1) for patch in patches], 14)
    assert nearest == [token - i % 3 for i, token in enumerate(idx_a.tolist())]
    assert figure.axes[3].get_title() == f"By features\n{(len(idx_a) + 2) // 3 / len(idx_a):.0%} the same"
    # Frames have other colors than pairs.
    frames = [to_rgb(figures.TEACHER), to_rgb(figures.STUDENT)]
    pairs = {tuple(patch.get_facecolor()[:3]) for axis in figure.axes[1:] for patch in axis.patches}
    assert len(pairs) == len(idx_a) + 3
    assert min(np.abs(np.subtract(frame, pair)).max() for frame in frames for pair in pairs) > 0.2


def test_patches_of_several_pairs_have_one_number(photographs):
    figure, _ = draw(photographs, nearest_a=lambda idx: idx[:1].expand(len(idx)))
    assert list(texts_on(figure, figure.axes[3])) == ["1"]
    assert sorted(texts_on(figure, figure.axes[4])) == [str(n + 1) for n in range(9)]


def test_boxes_stand_on_the_image(photographs):
    figure, _ = draw(photographs)
    labels = [axis.get_ylabel() for axis in figure.axes[1:]]
    assert labels == ["teacher’s view\n224×224", "student’s view\n96×96, mirrored"]
    frames = [to_hex(axis.spines["left"].get_edgecolor()).upper() for axis in figure.axes[1:]]
    boxes = figure.axes[0].patches
    assert frames == [to_hex(box.get_edgecolor()).upper() for box in boxes] == [figures.TEACHER, figures.STUDENT]
    assert [(r.get_y(), r.get_x(), r.get_height(), r.get_width()) for r in boxes] == list(BOXES)


def test_distance_counts_patches_in_rows_and_columns():
    found = torch.tensor([8, 9, 14, 10, 6, 7])  # in a grid of 4 rows and 6 columns
    assert figures.patch_distance(found, torch.tensor([8, 8, 8, 8, 7, 6]), 6).tolist() == [0, 1, 1, 2, 5, 5]


@pytest.mark.parametrize("nearest_a", [None, lambda idx: idx])
def test_crops_may_have_nothing_in_common(photographs, nearest_a):
    figure, (idx_a, _) = draw(photographs, boxes=((0, 0, 100, 100), (200, 300, 96, 96)), nearest_a=nearest_a)
    assert len(idx_a) == len(figure.artists) == 0
    assert not any(texts_on(figure, axis) for axis in figure.axes)
    assert len(figure.axes[0].patches) == 2


def curve(level, seeds, points=20):
    """Return a constant curve for `figures.draw_curves`, with a deviation of 1."""
    x = np.arange(1.0, points + 1)
    return np.stack([x, np.full(points, level), np.full(points, 1.0 if seeds > 1 else np.nan)])


def run_curves(level, seeds=3):
    names = ("loss", "knn_top1", "entropy_share", "matched_patches")
    return {name: curve(level, seeds) for name in names}


def test_curves_are_told_apart_by_color_and_style():
    axes = figures.draw_curves({f"setting {i}": run_curves(i + 10) for i in range(28)}).axes
    assert [axis.get_ylabel() for axis in axes] == ["nats", "top-1 accuracy (%)", "share of ln K", "per pair of views"]
    assert axes[-1].get_xlabel() == "epochs"
    for axis in axes:
        looks = {(line.get_color(), str(line._dash_pattern)) for line in axis.lines}
        assert len(looks) == 28
        assert {color for color, _ in looks} == set(figures.LINE_COLORS)
        assert len(axis.collections) == 28


def test_only_panels_with_something_are_drawn():
    nothing = np.empty((3, 0))
    one = {**run_curves(3.0), "knn_top1": nothing, "entropy_share": nothing}
    figure = figures.draw_curves({"a": one, "b": {**one, "matched_patches": nothing}})
    assert [axis.get_title() for axis in figure.axes] == ["Loss", "Matched patches"]
    assert [len(axis.lines[1].get_xdata()) for axis in figure.axes] == [20, 0]


def test_panels_of_a_row_share_their_axes():
    cls, patches = "entropy_share, CLS", "entropy_share, patches"
    rows = [(cls, patches), ("gradient, CLS", "gradient, patches")]
    falling, zero = curve(1.0, 1) / [[1], [10], [1]] ** np.arange(20), curve(0.0, 1)
    curves = {
        "DINO": {cls: curve(0.3, 1), "gradient, CLS": falling, "gradient, patches": zero},
        "λ = 0.5": {cls: curve(0.9, 1), patches: curve(0.2, 1), "gradient, CLS": falling},
    }
    figure = figures.draw_curves(curves, rows, [("#000000", "-"), ("#000000", "--")])
    check_texts(figure)
    left, right, *gradients = figure.axes
    assert [axis.get_title() for axis in (left, right)] == [
        f"Entropy of the teacher’s outputs, {x}" for x in ("CLS", "patches")
    ]
    assert left.get_ylim() == right.get_ylim()
    assert left.get_ylim()[0] < 0.2 < 0.9 < left.get_ylim()[1]
    assert [(line.get_color(), line.get_linestyle()) for line in right.lines] == [("#000000", "-"), ("#000000", "--")]
    assert [axis.get_yscale() for axis in gradients] == ["log", "log"]
    assert gradients[1].get_ylim()[0] > 1e-22  # a gradient of 0 is in no panel


def test_losses_of_different_size_share_a_panel():
    for high, scale in ((5.0, "linear"), (30.0, "log")):
        figure = figures.draw_curves({"a": run_curves(4.0), "b": run_curves(high)})
        assert figure.axes[0].get_yscale() == scale


@pytest.mark.parametrize(
    "labels", [["loss cls", "loss mean"], [*LONG, "loss lambda, λ 0.5, geometry image, lr 0.0005, " * 3]]
)
def test_everything_stands_inside_a_column_and_can_be_read(labels):
    figure = figures.draw_curves({label: run_curves(4.0 + i) for i, label in enumerate(labels)})
    check_texts(figure)
    width, height = figure.get_size_inches()
    assert width == pytest.approx(8.5 / 2.54, abs=0.01)
    box = figure.get_tightbbox()
    assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0
    legend = figure.legends[0]
    texts = [*legend.get_texts(), legend.get_title()]
    texts += [t for axis in figure.axes for t in (axis.title, axis.yaxis.label, *axis.get_yticklabels())]
    assert min(text.get_fontsize() for text in texts) >= 7
    lowest = min(axis.get_tightbbox().y0 for axis in figure.axes)
    assert legend.get_window_extent().y1 <= lowest
    assert all(axis.get_window_extent().height / figure.dpi > 0.6 for axis in figure.axes)
    assert legend.get_title().get_text() == "mean ± one standard deviation over seeds"


def test_a_figure_is_written_as_png_or_pdf(tmp_path):
    figure = figures.draw_curves({"a": run_curves(4.0, seeds=1)})
    assert figure.legends[0].get_title().get_text() == ""
    for suffix, start in ((".png", b"\x89PNG"), (".pdf", b"%PDF")):
        assert figures.save([figure], tmp_path / f"c{suffix}") == [tmp_path / f"c{suffix}"]
        assert (tmp_path / f"c{suffix}").read_bytes().startswith(start)
    assert b"/Type3" not in (tmp_path / "c.pdf").read_bytes()
    (tmp_path / "d.png").mkdir()
    for name in ("c", "c.xyz", "c.png/c.png", "d.png", f"{'n' * 300}.png"):
        with pytest.raises(UserError, match="cannot write"):
            figures.save([figure], tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.pdf", "c.png", "d.png"]


def check_texts(figure):
    """Check that no two texts of a figure overlap, and that each is inside of it."""
    figure.draw_without_rendering()
    legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
    texts = [*figure.texts, *(text for legend in legends for text in legend.get_texts())]
    texts += [text for axis in figure.axes for text in (axis.title, axis.yaxis.label, axis.xaxis.label, *axis.texts)]
    texts = [text for text in texts if text.get_text().strip()]
    boxes = [text.get_window_extent() for text in texts]
    for i, box in enumerate(boxes):
        assert -1 <= box.x0 <= box.x1 <= figure.bbox.width + 1, texts[i].get_text()
        assert -1 <= box.y0 <= box.y1 <= figure.bbox.height + 1, texts[i].get_text()
        for other, text in zip(boxes[:i], texts, strict=False):
            both = Bbox.intersection(box, other)
            assert both is None or min(both.width, both.height) < 1, (texts[i].get_text(), text.get_text())


def long_names(count):
    return [f"{i} {LONG[i % len(LONG)]} {i}" for i in range(count)]


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize(("count", "shape"), [(1, (400, 8)), (3, (8, 400)), (4, (48, 32))])
def test_texts_of_panels_do_not_overlap(count, shape):
    images = {name: noise(*shape) for name in long_names(count)}
    rows, columns = shape[0] // 8, shape[1] // 8
    maps = [np.random.default_rng(0).random((8, rows, columns))] * count
    colors = [noise(rows, columns), np.full((rows, columns, 3), 128, np.uint8)] * count
    cosines = [np.linspace(-1, 1, rows * columns).reshape(rows, columns)] * count
    places = [(0, 0, 0), *((i, rows - 1, columns - 1) for i in range(count))]
    pages = [
        *figures.draw_attention(images, maps, [m > 0.5 for m in maps], 8, 0.6),
        *figures.draw_features(images, colors[:count], 8, np.array([0.5, 0.25, 0.125])),
        *figures.draw_patch_neighbours(images, cosines, places, 8),
        *figures.draw_image_neighbours(list(images.values()), [0.98765] * (count - 1), list(images)[1:]),
    ]
    for page in (pages[0], *pages[-3:]):
        check_texts(page)
    assert all(max(page.get_size_inches() * page.dpi) < 2**16 for page in pages)
    titles = [axis.get_title() for page in pages for axis in page.axes]
    assert sum(title.startswith("head 3\nmax") for title in titles) == count


def pictures_of(figure):
    """Return the place of each picture of a figure in inches."""
    figure.draw_without_rendering()
    return [axis.get_window_extent().transformed(figure.dpi_scale_trans.inverted()) for axis in figure.axes]


@pytest.mark.parametrize("heads", [1, 3, 12])
def test_images_of_any_shape_fill_the_pages(heads):
    """In particular portraits between landscapes. At most the cell below an image, and a last page, are empty."""
    shapes = [(32, 48), (48, 32), (32, 32), (32, 64), (48, 32), (32, 48), (40, 56), (48, 40)]
    images = {f"{i}": noise(*shape) for i, shape in enumerate(shapes)}
    maps = [np.random.default_rng(0).random((heads + 1, shape[0] // 8, shape[1] // 8)) for shape in shapes]
    neighbours = figures.draw_image_neighbours(list(images.values()), [0.5] * 7, list(images)[1:])
    for pages, filled in (
        (figures.draw_attention(images, maps, [m > 0.5 for m in maps], 8, 0.6), 0.6),
        (figures.draw_features(images, [m[0, ..., None].repeat(3, -1) for m in maps], 8, np.zeros(3)), 0.8),
        (neighbours, 0.7),
    ):
        assert sum(len(page.axes) for page in pages) in (8, 16, 8 * (2 * heads + 3))
        for page in pages:
            places, (width, height) = pictures_of(page), page.get_size_inches()
            assert (width, height <= figures.PAGE_HEIGHT) == (figures.WIDTH, True)
            assert sum(place.width * place.height for place in places) > filled * width * height
            check_texts(page)
            for axis, place in zip(page.axes, places, strict=True):
                rows, columns, _ = axis.images[0].get_array().shape
                assert place.width / place.height == pytest.approx(columns / rows, rel=0.01)


def test_a_flat_map_of_attention_looks_flat():
    """Attention of 0.8 to 1.2 times the uniform one, and of 12.8 times."""
    flat, peaked = np.ones((4, 4)), np.full((4, 4), 0.1)
    flat[0, 0], flat[0, 1], peaked[0, 0] = 1.2, 0.8, 6.0  # the last one of a sum of 7.5: 12.8 times the mean
    maps = [np.stack([flat, peaked]) / 16]
    (figure,) = figures.draw_attention({"a": noise(32, 32)}, maps, [maps[0] > 0], 8, 0.6)
    assert [a.get_title() for a in figure.axes[1::2]] == [
        "head 1\nmax 1.2 × uniform",
        "mean of heads\nmax 13 × uniform",
    ]
    shown = [np.asarray(axis.images[0].get_array())[::8, ::8] for axis in figure.axes[1::2]]
    for picture, values, bright in ((shown[0], flat, 3), (shown[1], peaked, 6)):
        np.testing.assert_allclose(picture, 255 * figures.HEAT(values / bright)[..., :3], atol=1)
    assert "at least 3 × uniform" in figure.texts[0].get_text()


def test_no_structure_is_said_above_the_colors():
    images = {"flat": np.full((16, 16, 3), 90, np.uint8), "rich": noise(16, 16)}
    colors = [np.full((2, 2, 3), 128, np.uint8), noise(2, 2)]
    (figure,) = figures.draw_features(images, colors, 8, np.array([0.6, 0.3, 0.1]))
    assert [axis.get_title() for axis in figure.axes[::2]] == ["flat\nno structure", "rich"]
    assert "(60%, 30%, 10% of the variance)" in figure.texts[0].get_text()
    (figure,) = figures.draw_features({"flat": images["flat"]}, colors[:1], 8, np.zeros(3))
    assert "%" not in figure.texts[0].get_text()


def test_bright_is_high():
    brightness = figures.HEAT(np.linspace(0, 1, 64))[:, :3] @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(brightness) > 0).all()
    cosines = [np.array([[1, 0.5], [-0.25, 0]]), np.full((2, 2), -0.25)]
    places = [(0, 0, 0), (0, 0, 1)]
    (figure,) = figures.draw_patch_neighbours({"a": noise(16, 16), "b": noise(16, 16)}, cosines, places, 8)
    a, b = (np.asarray(axis.images[0].get_array())[::8, ::8] for axis in figure.axes[1::2])
    np.testing.assert_allclose(a[0, 1], 255 * np.array(figures.HEAT(0.6)[:3]), atol=1)
    assert (b == a[1, 0]).all()  # one scale for all images
    assert "from -0.25 (dark) to 1 (bright)" in figure.texts[0].get_text()
    frames = [(p.get_x() + 0.5, p.get_y() + 0.5, to_hex(p.get_edgecolor()).upper()) for p in figure.axes[0].patches]
    assert frames == [(8, 0, figures.STUDENT), (0, 0, figures.TEACHER)]


def test_cosines_have_three_decimals():
    (figure,) = figures.draw_image_neighbours([noise(9, 9)] * 3, [0.98765, 0.5], ["a/b", "c/d"])
    assert [axis.get_title() for axis in figure.axes] == ["query", "a/b\n0.988", "c/d\n0.500"]


@pytest.mark.parametrize("name", LONG)
def test_long_names_lose_their_middle(name):
    assert figures.fit("short", 12) == "short"
    for characters in (6, 12, 38):
        text = figures.fit(name, characters).strip()
        assert len(text) <= characters
        first, *last = text.split("…")
        assert printable(name).strip().startswith(first.strip())
        assert not last or printable(name).strip().endswith(last[0].strip())


def test_names_are_taken_literally():
    figure = figures.draw_map(np.eye(3, 2), [0, 1, 2], ["_a", "$b_$", "c"], "$x$")
    texts = [*figure.legends[0].get_texts(), figure.texts[0]]
    assert [text.get_text() for text in texts] == ["1: _a", "2: $b_$", "3: c", "$x$"]
    assert not any(text.get_parse_math() for text in texts)


def test_classes_are_told_apart_by_color_and_number():
    rng = np.random.default_rng(0)
    figure = figures.draw_map(rng.random((40, 2)), np.arange(40) % 10, long_names(10), "title")
    check_texts(figure)
    colors = {to_hex(points.get_facecolor()[0]) for points in figure.axes[0].collections}
    assert len(colors) == len(figure.legends[0].get_texts()) == len(figures.COLORS) == 10

    points, labels = rng.normal(size=(3000, 2)), np.repeat(np.arange(100), 30)
    figure = figures.draw_map(points, labels, [f"class {i}" for i in range(100)], "title")
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [f"{i + 1}: class {i}" for i in range(100)]
    assert figure.get_figheight() <= figures.PAGE_HEIGHT
    for i, (text, dots) in enumerate(zip(figure.axes[0].texts, figure.axes[0].collections, strict=True)):
        assert text.get_text() == str(i + 1)
        assert text.xy == pytest.approx(np.median(points[labels == i], 0))
        np.testing.assert_array_equal(dots.get_offsets(), points[labels == i])

    figure = figures.draw_map(rng.random((101, 2)), np.arange(101), [str(i) for i in range(101)], "title")
    assert (figure.legends, list(figure.axes[0].texts)) == ([], [])
    assert len({to_hex(dots.get_facecolor()[0]) for dots in figure.axes[0].collections}) > 90


def test_settings_that_no_look_tells_apart_are_refused():
    with pytest.raises(UserError, match="found 29 settings, a figure tells at most 28 apart"):
        figures.draw_curves({str(i): run_curves(i) for i in range(29)})


def test_pages_are_numbered_and_other_files_are_kept(tmp_path):
    pages = figures.draw_features({f"{i} 名": noise(8, 8) for i in range(9)}, [noise(1, 1)] * 9, 8, np.zeros(3))
    assert len(pages) > 1
    names = ["a.png", *(f"a-{number}.png" for number in range(2, len(pages) + 1))]
    for _ in range(2):  # figures may be replaced
        assert figures.save(pages, tmp_path / "a.png") == [tmp_path / name for name in names]
    photo = tmp_path / "photo.png"
    Image.fromarray(noise(8, 8)).save(photo)
    before = photo.read_bytes()
    with pytest.raises(UserError, match="photo.png: found a file that is not a figure"):
        figures.check_output(photo)
    assert photo.read_bytes() == before


@pytest.mark.parametrize("installed", [True, False])
def test_characters_that_the_font_lacks_are_drawn_with_another(tmp_path, monkeypatch, capsys, installed):
    """An installed font that has them, or boxes and one warning for all files."""
    figures.fallback_fonts.cache_clear()
    mono = font_manager.findfont("DejaVu Sans Mono")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [mono, __file__] if installed else [])
    pages = figures.draw_features({f"{i} \u2312 été": noise(8, 8) for i in range(9)}, [noise(1, 1)] * 9, 8, np.zeros(3))
    for name in ("a.png", "a.pdf"):
        figures.save(pages, tmp_path / name)
    errors = capsys.readouterr().err.splitlines()
    if installed:
        with warnings.catch_warnings(action="error"):
            pages[0].draw_without_rendering()
        assert errors == []
    else:
        (error,) = errors
        assert error.startswith("warning: no installed font has \u2312: drawn as boxes; install one, such as ")


def test_wide_characters_take_more_room():
    names = ["北京的故宫博物院和很长很长的名字一二三四五六七八九十", "東京タワー", "x" * 200]
    assert figures.fit(names[0], 12) == "北京的…七八九十"
    assert figures.wrap(names[1], 6, 2) == "東京タワ\nー"
    assert figures.fit(names[2], 12) == "xxxxx…xxxxxx"


def test_pictures_in_a_tile_are_labeled():
    for text in ("teacher: global view 1", "mean of heads: max 8000 x uniform"):
        plain, labeled = (figures.tile([[(label, noise(16, 16))] * 2]) for label in ("", text))
        assert plain.shape == labeled.shape == (figures.LABEL_HEIGHT + 164, 2 * 164, 3)
        changed = (plain != labeled).any(-1)
        assert changed[: figures.LABEL_HEIGHT].any()
        assert not changed[figures.LABEL_HEIGHT :].any()
        assert not changed[:, 162:166].any()  # a label is inside of its picture's width


def test_no_setting_changes_a_figure(tmp_path):
    def draw(path):
        figures.save(figures.draw_image_neighbours([noise(9, 9)] * 2, [1], ["$"]), path)
        return path.read_bytes()

    plain = draw(tmp_path / "a.png")
    with rc_context({"text.usetex": True, "figure.dpi": 1, "savefig.dpi": 5, "font.size": 30}):
        assert draw(tmp_path / "b.png") == plain
