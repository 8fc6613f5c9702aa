"""Patch matching: which patch tokens of two crops of an image show the same place (paper, section 3.3).

Geometry only: boxes and flips in, indices of matched tokens out. The rules "paper" and "nearest" compute with integers,
so that a patch that is exactly half covered is treated alike on every machine. "released" rounds floats as the authors'
code does.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

Ints = Sequence[int] | np.ndarray
Rule = str | None  # a key of RULES; None matches only CLS


class Matches(NamedTuple):
    """The matched tokens of a batch, as indices into the outputs of the networks.

    A network outputs its views one after the other, each with all B images. Token t of image b in view v is row
    `B * (tokens per image in earlier views) + b * (tokens per image in view v) + t` of the flattened output.

    Only tokens with a match are listed. They are sorted by image, then by view, then by position.
    """

    teacher_row: torch.Tensor  # [Nt] rows of the teacher's output
    teacher_position: torch.Tensor  # [Nt] index of each token in its view; 0 is CLS
    student_row: torch.Tensor  # [Ns] rows of the student's output
    # M is the largest number of matches of a student token. If a token has no m-th match, row m of teacher_idx and of
    # num_matched is 0: padding.
    teacher_idx: torch.Tensor  # [M, Ns] m-th match of each student token, as an index into teacher_row
    num_matched: torch.Tensor  # [M, Ns] number of tokens matched in the same pair of views, including CLS
    student_cls: torch.Tensor  # [B * V] indices into student_row of the CLS tokens
    student_patch: torch.Tensor  # [Ns - B * V] indices into student_row of the patch tokens
    teacher_count: torch.Tensor  # [B] number of teacher tokens per image
    student_count: torch.Tensor  # [B] number of student tokens per image

    def to(self, device: torch.device) -> "Matches":
        """Move the index tensors to a device. The two counts stay on the CPU, where they determine tensor shapes."""
        indices = {name: getattr(self, name).to(device, non_blocking=True) for name in self._fields[:-2]}
        return self._replace(**indices)

    def student_kinds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the indices into `student_row` of (CLS tokens, patch tokens)."""
        return self.student_cls, self.student_patch

    def is_cls(self) -> torch.Tensor:
        """Return booleans [M, Ns]: whether the match is CLS with CLS. Each pair of views of an image has one."""
        return (self.teacher_position[self.teacher_idx] == 0) & (self.num_matched > 0)


def match_patches(
    box_a: Ints, flip_a: bool, grid_a: Ints, box_b: Ints, flip_b: bool, grid_b: Ints, rule: str = "paper"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the matched tokens of two crops of one image.

    Args:
        box_a, box_b: (top, left, height, width) of each crop, in whole pixels of the image.
        flip_a, flip_b: whether the crop was flipped horizontally after cropping.
        grid_a, grid_b: (rows, columns) of patches in the resized crop.
        rule: how patches are matched.
            "paper" (section 3.3, Figure 2): a patch is a candidate if the intersection of the boxes covers more than
            half of its width and more than half of its height. With R and R' candidate rows in the two crops,
            min(R, R') evenly spaced rows are kept in each; likewise for columns.
            "released": the same selection, but candidates are found by rounding as in the authors' code.
            "nearest" (not in the paper): each patch of crop b whose center lies in box a is matched with the patch of
            crop a that contains the center.

    Returns:
        (idx_a, idx_b): LongTensors [n] of token indices. The first is 0, CLS. Patches are numbered from 1 in row-major
        order of the crop as the network sees it, after the flip. The order of "paper" and "released" is by row and
        column of the image, the order of "nearest" by idx_b.

    Raises:
        ValueError: the rule is unknown, or a box or grid is empty.

    Example: crop b is the right half of crop a. It has two columns of patches where a has one, and keeps the first.

        >>> match_patches((0, 0, 8, 8), False, (2, 2), (0, 4, 8, 4), False, (2, 2))
        (tensor([0, 2, 4]), tensor([0, 1, 3]))
    """
    boxes, flips, grids = np.array([[box_a], [box_b]]), np.array([[flip_a], [flip_b]]), np.array([grid_a, grid_b])
    pairs = _matched_pairs(boxes, flips, grids, teacher_views=1, rule=rule)
    return torch.from_numpy(pairs.teacher_token), torch.from_numpy(pairs.student_token)


def match_views(
    boxes: ArrayLike, flips: ArrayLike, grids: ArrayLike, batch_size: int, teacher_views: int = 2, rule: Rule = "paper"
) -> Matches:
    """Match each teacher view with every other view of the same image, for a whole batch.

    Args:
        boxes: integers [V, G, 4], (top, left, height, width) of V views of G images in pixels. G is `batch_size`, or 1
            if the batch shares its geometry.
        flips: booleans [V, G].
        grids: integers [V, 2], (rows, columns) of patches per view.
        batch_size: B.
        teacher_views: number of views that the teacher sees. They come first.
        rule: see `match_patches`; None matches only CLS with CLS.

    Returns:
        Matches of all pairs (teacher view i, student view j) with i != j.

    Raises:
        ValueError: the rule is unknown, a box or grid is empty, or G is neither 1 nor B.
    """
    num_images = np.asarray(flips).shape[1]
    if num_images not in (1, batch_size):
        raise ValueError(f"boxes of {num_images} images for a batch of {batch_size}, expected 1 or {batch_size}")
    pairs = _matched_pairs(boxes, flips, grids, teacher_views, rule)
    tokens = 1 + np.prod(np.asarray(grids, np.int64), axis=1)  # [V] tokens per image in each view
    first = np.cumsum(tokens) - tokens  # [V] tokens per image in earlier views

    def listed(view: np.ndarray, token: np.ndarray, total: int) -> tuple[np.ndarray, ...]:
        """Return the matched tokens of a network with `total` tokens per image, and where the pairs have theirs.

        Returns:
            (rows in the network's output, positions, number of tokens per image, index of each pair's token)
        """
        slot = pairs.image * total + first[view] + token  # [n], numbers the tokens image by image
        occurs = np.zeros(num_images * total, bool)
        occurs[slot] = True
        slots, idx = np.flatnonzero(occurs), (np.cumsum(occurs) - 1)[slot]
        count = np.bincount(slots // total, minlength=num_images)
        if num_images < batch_size:  # shared geometry: every image has the same tokens
            slots, count = (slots + total * np.arange(batch_size)[:, None]).ravel(), np.repeat(count, batch_size)
        image, place = np.divmod(slots, total)
        its_view = np.searchsorted(first, place, side="right") - 1
        position = place - first[its_view]
        return batch_size * first[its_view] + image * tokens[its_view] + position, position, count, idx

    teacher_row, teacher_position, teacher_count, teacher_idx = listed(
        pairs.teacher_view, pairs.teacher_token, tokens[:teacher_views].sum()
    )
    student_row, student_position, student_count, student_idx = listed(
        pairs.student_view, pairs.student_token, tokens.sum()
    )

    # Arrange the pairs as m-th matches of their student tokens.
    num_matches = np.bincount(student_idx)  # per student token
    order = np.argsort(student_idx, kind="stable")
    m = np.arange(len(order)) - (np.cumsum(num_matches) - num_matches)[student_idx[order]]
    table = np.zeros((2, num_matches.max(), len(num_matches)), np.int64)  # teacher_idx, num_matched
    table[:, m, student_idx[order]] = teacher_idx[order], pairs.num_matched[order]
    if num_images < batch_size:  # shared geometry: repeat the matches for every image
        table = np.tile(table, batch_size)
        table[0] += np.repeat(np.arange(batch_size) * teacher_count[0], len(num_matches)) * (table[1] > 0)
    return Matches(
        teacher_row=torch.from_numpy(teacher_row),
        teacher_position=torch.from_numpy(teacher_position),
        student_row=torch.from_numpy(student_row),
        teacher_idx=torch.from_numpy(table[0]),
        num_matched=torch.from_numpy(table[1]),
        student_cls=torch.from_numpy(np.flatnonzero(student_position == 0)),
        student_patch=torch.from_numpy(np.flatnonzero(student_position)),
        teacher_count=torch.from_numpy(teacher_count),
        student_count=torch.from_numpy(student_count),
    )


class _Pairs(NamedTuple):
    """n matched pairs of tokens, sorted by image, then teacher view, then student view.

    The first pair of every (image, teacher view, student view) is CLS with CLS, token 0.
    """

    image: np.ndarray  # [n]
    teacher_view: np.ndarray  # [n]
    teacher_token: np.ndarray  # [n]
    student_view: np.ndarray  # [n]
    student_token: np.ndarray  # [n]
    num_matched: np.ndarray  # [n] matched tokens in the same pair of views, including CLS


def _matched_pairs(boxes: ArrayLike, flips: ArrayLike, grids: ArrayLike, teacher_views: int, rule: Rule) -> _Pairs:
    """Return the _Pairs of G images; arguments as in `match_views`."""
    if rule is not None and rule not in RULES:
        raise ValueError(f"unknown matching rule {rule!r}, expected one of {', '.join(RULES)}")
    boxes, flips, grids = np.asarray(boxes, np.int64), np.asarray(flips, bool), np.asarray(grids, np.int64)
    if boxes[..., 2:].min() < 1 or grids.min() < 1:
        raise ValueError("expected boxes of at least 1x1 pixels and grids of at least 1x1 patches")
    num_views, num_images = flips.shape
    # [2, V']: indices of the teacher view and of the student view, which differ
    view_pairs = np.array(np.nonzero(np.arange(teacher_views)[:, None] != np.arange(num_views)))
    num_pairs = view_pairs.shape[1]

    if rule is None:
        counts = np.zeros((num_images, num_pairs, 2), np.int64)
        rows = columns = np.zeros((num_images, 2, num_pairs, 1), np.int64)
    else:
        # Rows and columns are matched independently, both along the last axis.
        sides = boxes.swapaxes(0, 1)[:, view_pairs]  # [G, 2, V', 4]
        counts, index = RULES[rule](sides[..., :2], sides[..., 2:], grids[view_pairs])
        flipped = flips.T[:, view_pairs, None]  # [G, 2, V', 1]
        rows, columns = index[..., 0, :], index[..., 1, :]  # [G, 2, V', at least n]
        if rule == "nearest":  # ordered by the student's tokens: start a flipped student view at its right edge
            i = np.arange(columns.shape[-1])
            i = np.where(flipped[:, 1], np.maximum(counts[..., 1:] - 1 - i, 0), i)
            columns = np.take_along_axis(columns, i[:, None], -1)
        columns = np.where(flipped, grids[view_pairs, 1:] - 1 - columns, columns)

    # Concatenate the pairs of views. Each has CLS first, then all combinations of its rows and columns.
    length = 1 + (counts[..., 0] * counts[..., 1]).ravel()
    start = np.cumsum(length) - length
    pair = np.repeat(np.arange(len(length)), length)  # [n] index of (image, pair of views)
    row, column = np.divmod(np.arange(len(pair)) - start[pair] - 1, np.maximum(counts[..., 1].ravel(), 1)[pair])
    # Number of patches above a row, and left of a column: [2, G * V', at least n]
    above, left = (x.swapaxes(0, 1).reshape(2, len(length), -1) for x in (rows * grids[view_pairs, 1:], columns))
    tokens = 1 + above[:, pair, row] + left[:, pair, column]  # [2, n]
    tokens[:, start] = 0
    image, view_pair = np.divmod(pair, num_pairs)
    teacher_view, student_view = view_pairs[:, view_pair]
    return _Pairs(image, teacher_view, tokens[0], student_view, tokens[1], length[pair])


# A rule matches many pairs of views along both axes at once, for G images, V' pairs of views, two sides (teacher,
# student) and two axes (rows, columns).
# Arguments: start and length of the boxes in pixels, [G, 2, V', 2]; number of patches along each axis, [2, V', 2].
# Results: n [G, V', 2], number of matched patches along each axis; index [G, 2, V', 2, at least n], patch numbers from
# the top or left of the image. Entries of index after the first n are ignored.
Matched = tuple[np.ndarray, np.ndarray]


def _match_paper(start: np.ndarray, length: np.ndarray, patches: np.ndarray) -> Matched:
    low, high = _intersect(start, length)
    # In units of 1 / patches of a pixel, a patch is `length` long and patch p starts at p * length.
    low, high = (low - start) * patches, (high - start) * patches
    # More than half of patch p lies beyond low if 2 * low < (2p + 1) * length, and likewise before high.
    first = (2 * low + length) // (2 * length)
    count = -((length - 2 * high) // (2 * length)) - first
    # A single patch may satisfy both conditions and still be covered by half or less: test its coverage.
    covered = np.minimum(high, (first + 1) * length) - np.maximum(low, first * length)
    return _spread(first, count * ((count > 1) | (count == 1) & (2 * covered > length)) * (low < high))


def _match_released(start: np.ndarray, length: np.ndarray, patches: np.ndarray) -> Matched:
    low, high = _intersect(start, length)
    # The authors' code multiplies by a quotient: patches * (low - start) / length may round to another patch.
    first = np.rint(patches * ((low - start) / length)).astype(np.int64)
    count = np.rint(patches * ((high - low) / length)).astype(np.int64)
    return _spread(first, np.where(low < high, np.minimum(count, patches - first), 0))


def _match_nearest(start: np.ndarray, length: np.ndarray, patches: np.ndarray) -> Matched:
    (start_t, start_s), (length_t, length_s), (patches_t, patches_s) = (
        np.moveaxis(x, -3, 0)[..., None] for x in (start, length, patches)
    )
    p = np.arange(patches_s.max())
    # Center of the student's patch p relative to the teacher's box, in units of 1 / (2 * patches_s) pixel.
    center = 2 * patches_s * (start_s - start_t) + (2 * p + 1) * length_s
    inside = (center >= 0) & (center < 2 * patches_s * length_t) & (p < patches_s)
    index_s = np.minimum(inside.argmax(-1)[..., None] + p, patches_s - 1)  # the patches inside are contiguous
    center = np.take_along_axis(center, index_s, -1)
    return inside.sum(-1), np.stack([center * patches_t // (2 * patches_s * length_t), index_s], 1)


RULES = {"paper": _match_paper, "released": _match_released, "nearest": _match_nearest}


def _intersect(start: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the interval [low, high) that both boxes share, each [G, 1, V', 2]; empty if low >= high."""
    end = start + length
    return np.maximum(start[:, :1], start[:, 1:]), np.minimum(end[:, :1], end[:, 1:])


def _spread(first: np.ndarray, count: np.ndarray) -> Matched:
    """Keep n = min(count of both sides) evenly spaced patches per side, floor(linspace(0, count - 1, n))."""
    n = np.minimum(count[:, 0], count[:, 1])
    i, gaps = np.arange(max(n.max(), 1)), np.maximum(n - 1, 1)
    return n, first[..., None] + i * (count - 1)[..., None] // gaps[:, None, ..., None]
