import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import ConnectionPatch, Rectangle

from patch_matching import match_patches
from support.figures import (
    LINE_COLORS,
    OVERLAP,
    STUDENT,
    TEACHER,
    WRONG,
    draw_curves,
    draw_matches,
    patch_distance,
    save,
)
from utils import UserError

BOXES, FLIPS = ((10, 20, 300, 300), (100, 250, 192, 192)), (False, True)


def draw(photographs, boxes=BOXES, found_a=None):
    """Return (figure of crops of 224 and 96 pixels, (idx_a, idx_b) of their matches without CLS)."""
    crops = [
        np.array(photographs[0].crop((left, top, left + width, top + height)).resize((size, size)))
        for (top, left, height, width), size in zip(boxes, (224, 96), strict=True)
    ]
    idx_a, idx_b = match_patches(boxes[0], FLIPS[0], (14, 14), boxes[1], FLIPS[1], (6, 6))
    idx_a, idx_b = idx_a[1:], idx_b[1:]
    found = None if found_a is None else found_a(idx_a)
    return draw_matches(np.array(photographs[0]), crops, boxes, FLIPS, 16, idx_a, idx_b, found), (idx_a, idx_b)


def tokens_at(points, columns):
    return [1 + int(y // 16) * columns + int(x // 16) for x, y in points]


def test_matched_patches_have_the_same_number_and_color_and_a_line(photographs):
    figure, (idx_a, idx_b) = draw(photographs)
    assert len(idx_a) > 0
    assert [text.get_text() for text in figure.texts] == [str(n + 1) for n in range(len(idx_a)) for _ in "ab"]
    lines = [artist for artist in figure.artists if isinstance(artist, ConnectionPatch)]
    colors = [line.get_edgecolor()[:3] for line in lines]
    assert len(set(colors)) == len(idx_a)
    for i, (axis, idx, columns) in enumerate(zip(figure.axes[1:], (idx_a, idx_b), (14, 6), strict=True)):
        assert tokens_at([text.get_position() for text in figure.texts[i::2]], columns) == idx.tolist()
        assert tokens_at([(line.xy1, line.xy2)[i] for line in lines], columns) == idx.tolist()
        assert [line.axesA if i == 0 else line.axesB for line in lines] == [axis] * len(idx)
        assert tokens_at([(patch.get_x() + 1, patch.get_y() + 1) for patch in axis.patches], columns) == idx.tolist()
        assert [patch.get_facecolor()[:3] for patch in axis.patches] == colors


def test_crops_say_whose_they_are(photographs):
    figure, _ = draw(photographs)
    labels = [axis.get_ylabel() for axis in figure.axes[1:]]
    assert labels == ["teacher’s view\n224×224", "student’s view\n96×96, mirrored"]
    frames = [to_hex(axis.spines["left"].get_edgecolor()).upper() for axis in figure.axes[1:]]
    assert frames == [to_hex(box.get_edgecolor()).upper() for box in figure.axes[0].patches[:2]] == [TEACHER, STUDENT]


def test_pairs_by_features_are_colored_by_their_distance(photographs):
    figure, (idx_a, _) = draw(photographs, found_a=lambda idx: idx - torch.arange(len(idx)) % 3)  # 0 to 2 to the left
    assert ((idx_a - 1) % 14 >= 2).all()  # so that all shifted patches stay in their row
    lines = figure.artists[len(idx_a) :]
    assert [to_hex(line.get_edgecolor()).upper() for line in lines] == [
        (STUDENT, OVERLAP, WRONG)[i % 3] for i in range(len(idx_a))
    ]
    found = tokens_at([line.xy1 for line in lines], 14)
    assert found == [token - i % 3 for i, token in enumerate(idx_a.tolist())]
    assert figure.axes[3].get_title() == f"By features: {(len(idx_a) + 2) // 3 / len(idx_a):.0%} the same"


def test_boxes_and_intersection_stand_on_the_image(photographs):
    figure, _ = draw(photographs)
    rectangles = [p for p in figure.axes[0].patches if isinstance(p, Rectangle)]
    assert [(r.get_y(), r.get_x(), r.get_height(), r.get_width()) for r in rectangles[:2]] == list(BOXES)
    mask = np.zeros((2, 427, 640), bool)
    for m, (top, left, height, width) in zip(mask, BOXES, strict=True):
        m[top : top + height, left : left + width] = True
    rows, columns = np.nonzero(mask.all(0))
    overlap = rectangles[2]
    assert overlap.get_label() == "intersection"
    assert OVERLAP.lower() == "#009e73"
    assert (overlap.get_y(), overlap.get_x()) == (rows.min(), columns.min())
    assert (overlap.get_height(), overlap.get_width()) == (np.ptp(rows) + 1, np.ptp(columns) + 1)


def test_distance_counts_patches_in_rows_and_columns():
    found = torch.tensor([8, 9, 14, 10, 6, 7])  # in a grid of 4 rows and 6 columns
    assert patch_distance(found, torch.tensor([8, 8, 8, 8, 7, 6]), 6).tolist() == [0, 1, 1, 2, 5, 5]


@pytest.mark.parametrize("found_a", [None, lambda idx: idx])
def test_crops_may_have_nothing_in_common(photographs, found_a):
    figure, (idx_a, _) = draw(photographs, boxes=((0, 0, 100, 100), (200, 300, 96, 96)), found_a=found_a)
    assert len(idx_a) == len(figure.artists) == len(figure.texts) == 0
    assert len(figure.axes[0].patches) == 2
    figure.draw_without_rendering()


def curve(level, seeds=3, points=20):
    """Return a constant curve for `draw_curves`, with a deviation of 1."""
    x = np.arange(1.0, points + 1)
    return np.stack([x, np.full(points, level), np.full(points, 1.0 if seeds > 1 else np.nan), np.full(points, seeds)])


def run_curves(level, seeds=3):
    names = ("loss", "knn_top1", "entropy_share", "matched_patches")
    return {name: curve(level, seeds) for name in names}


def test_curves_are_told_apart_by_color_and_style():
    axes = draw_curves({f"setting {i}": run_curves(i + 10) for i in range(28)}).axes
    assert [axis.get_ylabel() for axis in axes] == ["nats", "top-1 accuracy (%)", "share of ln K", "per pair of views"]
    assert axes[-1].get_xlabel() == "epochs"
    for axis in axes:
        looks = {(line.get_color(), str(line._dash_pattern)) for line in axis.lines}
        assert len(looks) == 28
        assert {color for color, _ in looks} == set(LINE_COLORS)
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
