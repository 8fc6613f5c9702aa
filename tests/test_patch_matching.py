import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_matching import RULES, match_patches, match_views

NAMED = ("paper", "released", "nearest")  # a rule that is added need not have their properties


@pytest.mark.parametrize("rule", NAMED)
def test_golden_cases(golden, rule):
    cases = golden("patch_matching.json")["cases"]
    assert len(cases) == 120
    for case in cases:
        grids = [(case[side] // case["patch_size"],) * 2 for side in ("side1", "side2")]
        idx_a, idx_b = match_patches(case["box1"], case["flip1"], grids[0], case["box2"], case["flip2"], grids[1], rule)
        assert (idx_a.tolist(), idx_b.tolist()) == (case[rule]["crop1"], case[rule]["crop2"])


def naive_paper_axis(start_a, length_a, n_a, start_b, length_b, n_b):
    """Match one axis by the text of section 3.3, patch by patch, in exact fractions of a patch."""
    low, high = max(start_a, start_b), min(start_a + length_a, start_b + length_b)
    covered = []
    for start, length, n in ((start_a, length_a, n_a), (start_b, length_b, n_b)):
        overlaps = [min(n * (high - start), (p + 1) * length) - max(n * (low - start), p * length) for p in range(n)]
        covered.append([p for p in range(n) if 2 * overlaps[p] > length])
    n = min(map(len, covered))
    return [[c[i * (len(c) - 1) // max(n - 1, 1)] for i in range(n)] for c in covered]


sides = st.integers(1, 60)
boxes = st.tuples(st.integers(0, 60), st.integers(0, 60), sides, sides)
grids = st.tuples(st.integers(1, 9), st.integers(1, 9))
rules = st.sampled_from(NAMED)


@given(boxes, grids, boxes, grids)
@settings(max_examples=300, deadline=None)
def test_paper_rule_agrees_with_its_text_patch_by_patch(box_a, grid_a, box_b, grid_b):
    rows_a, rows_b = naive_paper_axis(box_a[0], box_a[2], grid_a[0], box_b[0], box_b[2], grid_b[0])
    cols_a, cols_b = naive_paper_axis(box_a[1], box_a[3], grid_a[1], box_b[1], box_b[3], grid_b[1])
    idx_a, idx_b = match_patches(box_a, False, grid_a, box_b, False, grid_b)
    assert idx_a.tolist() == [0] + [1 + r * grid_a[1] + c for r in rows_a for c in cols_a]
    assert idx_b.tolist() == [0] + [1 + r * grid_b[1] + c for r in rows_b for c in cols_b]


@given(boxes, grids, boxes, grids)
@settings(max_examples=200, deadline=None)
def test_nearest_rule_agrees_with_centers(box_a, grid_a, box_b, grid_b):
    pairs = [(0, 0)]
    for r in range(grid_b[0]):
        for c in range(grid_b[1]):
            # Centre of b's patch in a's patch units, times 2 * grid_b to stay in whole numbers.
            y = (2 * grid_b[0] * (box_b[0] - box_a[0]) + (2 * r + 1) * box_b[2]) * grid_a[0]
            x = (2 * grid_b[1] * (box_b[1] - box_a[1]) + (2 * c + 1) * box_b[3]) * grid_a[1]
            row, column = y // (2 * grid_b[0] * box_a[2]), x // (2 * grid_b[1] * box_a[3])
            if 0 <= row < grid_a[0] and 0 <= column < grid_a[1]:
                pairs.append((1 + row * grid_a[1] + column, 1 + r * grid_b[1] + c))
    idx_a, idx_b = match_patches(box_a, False, grid_a, box_b, False, grid_b, "nearest")
    assert list(zip(idx_a.tolist(), idx_b.tolist(), strict=True)) == pairs


@pytest.mark.parametrize(("length", "offset"), [(56, 29), (112, 58), (168, 87), (224, 116)])
def test_released_rule_multiplies_a_rounded_quotient(length, offset):
    """As the authors' code: with 28 patches a side, `round(28 * offset / length)` would be one patch lower here."""
    first, count = round(28 * (offset / length)), round(28 * ((length - offset) / length))
    assert first == round(28 * offset / length) + 1
    box_b = (offset, 0, length - offset, length)
    idx_a, _ = match_patches((0, 0, length, length), False, (28, 1), box_b, False, (28, 1), "released")
    assert idx_a[1:].tolist() == list(range(1 + first, 1 + min(first + count, 28)))


def mirror(indices, grid):
    row, column = np.divmod(np.asarray(indices) - 1, grid[1])
    return np.where(np.asarray(indices) == 0, 0, 1 + row * grid[1] + grid[1] - 1 - column)


@given(boxes, grids, st.booleans(), boxes, grids, st.booleans(), rules)
@settings(deadline=None)
def test_flipping_a_view_and_mirroring_its_indices_changes_nothing(box_a, grid_a, flip_a, box_b, grid_b, flip_b, rule):
    pairs = {
        tuple(p) for p in torch.stack(match_patches(box_a, flip_a, grid_a, box_b, flip_b, grid_b, rule)).T.tolist()
    }
    idx_a, idx_b = match_patches(box_a, not flip_a, grid_a, box_b, flip_b, grid_b, rule)
    assert set(zip(mirror(idx_a, grid_a), idx_b.tolist(), strict=True)) == pairs
    idx_a, idx_b = match_patches(box_a, flip_a, grid_a, box_b, not flip_b, grid_b, rule)
    assert set(zip(idx_a.tolist(), mirror(idx_b, grid_b), strict=True)) == pairs


@given(boxes, st.booleans(), boxes, st.booleans(), grids)
@settings(deadline=None)
def test_exchanging_crops_of_one_size_exchanges_the_lists(box_a, flip_a, box_b, flip_b, grid):
    idx_a, idx_b = match_patches(box_a, flip_a, grid, box_b, flip_b, grid)
    swapped_b, swapped_a = match_patches(box_b, flip_b, grid, box_a, flip_a, grid)
    assert idx_a.tolist() == swapped_a.tolist()
    assert idx_b.tolist() == swapped_b.tolist()


@given(boxes, grids, st.booleans(), boxes, grids, st.booleans(), rules)
@settings(max_examples=200, deadline=None)
def test_indices_are_in_range_and_start_with_cls(box_a, grid_a, flip_a, box_b, grid_b, flip_b, rule):
    idx_a, idx_b = match_patches(box_a, flip_a, grid_a, box_b, flip_b, grid_b, rule)
    assert idx_a.dtype == idx_b.dtype == torch.int64
    assert len(idx_a) == len(idx_b)
    assert idx_a[0] == idx_b[0] == 0
    for idx, grid in ((idx_a, grid_a), (idx_b, grid_b)):
        assert all(1 <= i <= grid[0] * grid[1] for i in idx[1:].tolist())
    if rule == "paper":
        assert len(set(idx_a.tolist())) == len(set(idx_b.tolist())) == len(idx_a)
    if rule == "nearest":
        assert idx_b.tolist() == sorted(set(idx_b.tolist()))


@pytest.mark.parametrize("rule", NAMED)
@given(box=boxes, grid=grids, flip=st.booleans())
@settings(deadline=None)
def test_identical_views_give_the_identity(rule, box, grid, flip):
    idx_a, idx_b = match_patches(box, flip, grid, box, flip, grid, rule)
    assert sorted(idx_a.tolist()) == list(range(1 + grid[0] * grid[1]))
    assert idx_a.tolist() == idx_b.tolist()


@pytest.mark.parametrize("rule", RULES)
def test_views_without_overlap_match_cls_only(rule):
    for other in ((0, 100, 50, 50), (100, 0, 50, 50), (50, 0, 50, 50)):
        idx_a, idx_b = match_patches((0, 0, 50, 50), True, (4, 4), other, False, (3, 3), rule)
        assert idx_a.tolist() == idx_b.tolist() == [0]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="unknown matching rule 'neareset'"):
        match_patches((0, 0, 9, 9), False, (3, 3), (0, 0, 9, 9), False, (3, 3), "neareset")
    with pytest.raises(ValueError, match="at least 1x1 pixels"):
        match_patches((0, 0, 0, 9), False, (3, 3), (0, 0, 9, 9), False, (3, 3))


def random_views(images, seed=0):
    rng = np.random.default_rng(seed)
    size = np.concatenate([rng.integers(150, 257, (2, images, 2)), rng.integers(50, 150, (3, images, 2))])
    return np.concatenate([rng.integers(0, 257 - size), size], -1), rng.random((5, images)) < 0.5


GRIDS = [(14, 14)] * 2 + [(6, 6)] * 3


def naive_pairs(boxes, flips, batch_size, rule):
    """Return [(image, i, token, j, token, matched tokens)] by one call of match_patches for each image and (i, j)."""
    pairs = []
    for image in range(batch_size):
        g = image if flips.shape[1] > 1 else 0
        for i in range(2):
            for j in range(5):
                if i == j:
                    continue
                idx_a, idx_b = [torch.zeros(1, dtype=torch.int64)] * 2
                if rule:
                    a, b = ((boxes[v, g], flips[v, g], GRIDS[v]) for v in (i, j))
                    idx_a, idx_b = match_patches(*a, *b, rule)
                pairs += [(image, i, t, j, s, len(idx_a)) for t, s in zip(idx_a.tolist(), idx_b.tolist(), strict=True)]
    return pairs


@pytest.mark.parametrize("rule", [*RULES, None])
@pytest.mark.parametrize("images", [1, 4])
def test_the_table_of_a_batch_has_the_matches_of_every_pair_of_views(rule, images):
    batch, tokens = 4, [197, 197, 37, 37, 37]
    boxes, flips = random_views(images)
    matches = match_views(boxes, flips, GRIDS, batch, rule=rule)
    # Every token of the networks' outputs says which (view, image, token) it is.
    labels = torch.cat(
        [torch.cartesian_prod(torch.tensor([v]), torch.arange(batch), torch.arange(n)) for v, n in enumerate(tokens)]
    )
    teacher, student = labels[matches.teacher_row], labels[matches.student_row]
    found = []
    for teacher_idx, num_matched in zip(matches.teacher_idx, matches.num_matched, strict=True):
        for t, s, count in zip(teacher[teacher_idx].tolist(), student.tolist(), num_matched.tolist(), strict=True):
            if count:
                assert t[1] == s[1]
                found.append((t[1], t[0], t[2], s[0], s[2], count))
    assert sorted(found) == sorted(naive_pairs(boxes, flips, batch, rule))
    assert matches.teacher_position.tolist() == teacher[:, 2].tolist()
    is_cls, of_student = student[:, 2] == 0, matches.student_kinds()
    assert [kind.tolist() for kind in of_student] == [
        is_cls.nonzero()[:, 0].tolist(),
        (~is_cls).nonzero()[:, 0].tolist(),
    ]
    both_cls = (teacher[matches.teacher_idx][..., 2] == 0) & (student[:, 2] == 0)
    assert torch.equal(matches.is_cls(), both_cls & (matches.num_matched > 0))
    assert matches.is_cls().sum() == batch * 2 * 4


@pytest.mark.parametrize("rule", [*RULES, None])
@pytest.mark.parametrize("images", [1, 4])
def test_the_table_is_sorted_by_image_and_has_each_token_once(rule, images):
    batch = 4
    matches = match_views(*random_views(images), GRIDS, batch, rule=rule)
    views = ((0, 197), (197, 197), (394, 37), (431, 37), (468, 37))  # tokens of an image in the views before, and in it
    rows_of_image = [{b * n + batch * first + t for first, n in views for t in range(n)} for b in range(batch)]
    teacher_counts, student_counts = matches.teacher_count.tolist(), matches.student_count.tolist()
    for rows, counts in ((matches.teacher_row, teacher_counts), (matches.student_row, student_counts)):
        assert len(set(rows.tolist())) == len(rows) == sum(counts)  # each token once
        for own, chunk in zip(rows_of_image, rows.split(counts), strict=True):
            assert set(chunk.tolist()) <= own
    num_matches = (matches.num_matched > 0).sum(0)
    assert num_matches.min() > 0
    used = matches.teacher_idx[matches.num_matched > 0]
    assert set(used.tolist()) == set(range(len(matches.teacher_row)))


def test_boxes_of_another_number_of_images_are_named():
    with pytest.raises(ValueError, match="boxes of 4 images for a batch of 7"):
        match_views(*random_views(4), GRIDS, 7)
