import numpy as np
import pytest
from matplotlib.patches import Rectangle

import patch_matching
from figures import OVERLAP, draw_matches, draw_two_crops
from patch_matching import match_patches
from utils import UserError


@pytest.fixture
def drawn(tmp_path, photographs):
    photographs[0].save(tmp_path / "i.png")
    sizes = (224, 96)
    image, crops, boxes, flips = draw_two_crops(tmp_path / "i.png", sizes, ((0.4, 1), (0.05, 0.4)), seed=1)
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
