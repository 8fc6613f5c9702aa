import numpy as np
import pytest
from matplotlib.patches import Rectangle
from PIL import Image

import patch_matching
from datasets import to_uint8
from figures import LINE_COLOURS, OVERLAP, draw_crops, draw_curves, draw_matches, save, to_picture
from patch_matching import match_patches
from utils import UserError


@pytest.fixture
def drawn(photographs):
    image = to_uint8(photographs[0])
    crops, boxes, flips = draw_crops(image, (224, 96), ((0.4, 1), (0.05, 0.4)), seed=1)
    image, *crops = map(to_picture, (image, *crops))
    idx_a, idx_b = match_patches(boxes[0], flips[0], (14, 14), boxes[1], flips[1], (6, 6))
    figure = draw_matches(image, crops, boxes, flips, 16, idx_a, idx_b)
    return figure, boxes, (idx_a, idx_b)


def test_numbers_stand_on_the_matched_patches(drawn):
    figure, _, tokens = drawn
    for axis, idx, columns in zip(figure.axes[1:], tokens, (14, 6), strict=True):
        assert len(axis.texts) == len(idx) - 1 > 0
        for number, (text, token) in enumerate(zip(axis.texts, idx[1:].tolist(), strict=True), start=1):
            assert text.get_text() == str(number)
            x, y = (int(v // 16) for v in text.xy)
            assert 1 + y * columns + x == token


def test_boxes_and_intersection_stand_on_the_image(drawn):
    figure, boxes, _ = drawn
    rectangles = [p for p in figure.axes[0].patches if isinstance(p, Rectangle)]
    assert [(r.get_y(), r.get_x(), r.get_height(), r.get_width()) for r in rectangles[:2]] == [tuple(b) for b in boxes]
    mask = np.zeros((2, 427, 640), bool)
    for m, (top, left, height, width) in zip(mask, boxes, strict=True):
        m[top : top + height, left : left + width] = True
    rows, columns = np.nonzero(mask.all(0))
    overlap = rectangles[2]
    assert overlap.get_label() == "Intersection"
    assert OVERLAP.lower() == "#009e73"
    assert (overlap.get_y(), overlap.get_x()) == (rows.min(), columns.min())
    assert (overlap.get_height(), overlap.get_width()) == (np.ptp(rows) + 1, np.ptp(columns) + 1)


def test_command_draws_a_file_or_says_why_not(tmp_path, capsys):
    for name in ("m.png", "m.pdf"):
        patch_matching.main(["--output", str(tmp_path / name), "--seed", "1"])
        assert f"30 matched patches, drawn in {tmp_path / name}" in capsys.readouterr().out
        assert (tmp_path / name).stat().st_size > 10000
    with pytest.raises(UserError, match="cannot write .*m.xyz"):
        patch_matching.main(["--output", str(tmp_path / "m.xyz")])
    with pytest.raises(UserError, match="cannot read image"):
        patch_matching.main([str(tmp_path / "absent.png")])


def curve(level, seeds=3, points=20):
    """Return a curve as `draw_curves` takes it, level with a deviation of 1."""
    x = np.arange(1.0, points + 1)
    return np.stack([x, np.full(points, level), np.full(points, 1.0 if seeds > 1 else np.nan), np.full(points, seeds)])


def run_curves(level, seeds=3):
    names = ("loss", "knn_top1", "entropy_share", "matched_patches")
    return {name: curve(level, seeds) for name in names}


def test_curves_are_told_apart_by_colour_and_style():
    axes = draw_curves({f"setting {i}": run_curves(i + 10) for i in range(28)}).axes
    assert [axis.get_ylabel() for axis in axes] == ["nats", "top-1 accuracy (%)", "share of ln K", "per pair of views"]
    assert axes[-1].get_xlabel() == "epochs"
    for axis in axes:
        looks = {(line.get_color(), str(line._dash_pattern)) for line in axis.lines}
        assert len(looks) == 28
        assert {colour for colour, _ in looks} == set(LINE_COLOURS)
        assert len(axis.collections) == 28


def test_only_panels_with_something_are_drawn():
    nothing = np.empty((4, 0))
    one = {**run_curves(3.0), "knn_top1": nothing, "entropy_share": nothing}
    figure = draw_curves({"a": one, "b": {**one, "matched_patches": nothing}})
    assert [axis.get_title() for axis in figure.axes] == ["Loss", "Matched patches"]
    assert [len(axis.lines[1].get_xdata()) for axis in figure.axes] == [20, 0]


def test_losses_of_different_size_share_a_panel():
    def scale(*levels):
        return draw_curves({str(level): run_curves(level) for level in levels}).axes[0]

    assert scale(4.0, 5.0).get_yscale() == "linear"
    assert scale(4.0, 30.0).get_yscale() == "log"
    assert scale(4.0, 30.0).get_ylabel() == "nats, log scale"


@pytest.mark.parametrize("label", ["loss cls", "loss lambda, λ 0.5, geometry image, lr 0.0005, " * 3])
def test_everything_stands_inside_a_column_and_can_be_read(label):
    figure = draw_curves({f"{label} {i}": run_curves(4.0 + i) for i in range(3)})
    figure.draw_without_rendering()
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
    figure = draw_curves({"a": run_curves(4.0, seeds=1)})
    assert figure.legends[0].get_title().get_text() == ""
    for suffix, start in ((".png", b"\x89PNG"), (".pdf", b"%PDF")):
        save(figure, tmp_path / f"c{suffix}")
        assert (tmp_path / f"c{suffix}").read_bytes().startswith(start)
    assert b"/Type3" not in (tmp_path / "c.pdf").read_bytes()
    for name in ("c", "c.xyz", "c.png/c.png"):
        with pytest.raises(UserError, match="cannot write"):
            save(figure, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.pdf", "c.png"]


def test_crops_are_cut_where_their_boxes_say(photographs):
    for seed in range(4):
        crops, boxes, flips = draw_crops(to_uint8(photographs[0]), (32, 16), ((0.4, 1), (0.1, 0.4)), seed)
        for crop, (top, left, height, width), flip, size in zip(crops, boxes, flips, (32, 16), strict=True):
            cut = photographs[0].crop((left, top, left + width, top + height))
            expected = np.asarray(cut.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
            expected = expected[:, ::-1] if flip else expected
            assert np.abs(to_picture(crop) - expected).max() <= 2
