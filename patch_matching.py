"""Patch matching: which patch tokens of two crops of one image show the same place (paper, section 3.3).

Geometry only: boxes and flips in, matched tokens out. The rules compute in integers, so that a patch that is covered by
exactly one half falls on the same side on every machine; only "released" rounds floats, as the authors' code does.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch


class Matches(NamedTuple):
    """The matched tokens of a batch, laid out for indexing the networks' outputs and for the loss.

    A network sees the views one after the other, each with all images of the batch. Token t of image b in view v is row
    `B * (tokens of one image in the views before v) + b * (tokens of view v) + t` of its flattened output.

    Tokens that have no match are left out. The others are sorted by image. Of the student tokens of an image, those
    with most matches come first, so that those with more than m matches are a prefix of the image's tokens.
    """

    teacher_row: torch.Tensor  # [Nt] rows of the teacher's output
    teacher_position: torch.Tensor  # [Nt] position of each token in its view; 0 is CLS
    student_row: torch.Tensor  # [Ns] rows of the student's output
    # M is the largest number of matches of a student token. Where a token has no m-th match, both entries are 0.
    teacher_idx: torch.Tensor  # [M, Ns] m-th match of each student token, an index into teacher_row
    num_matched: torch.Tensor  # [M, Ns] tokens matched in the same pair of views, CLS included
    teacher_count: torch.Tensor  # [B] teacher tokens of each image
    student_count: torch.Tensor  # [M, B] student tokens of each image with more than m matches

    def to(self, device):
        """Move the tensors that index others to a device. The two counts shape the work and stay on the CPU."""
        *indices, teacher_count, student_count = self
        return Matches(*(x.to(device, non_blocking=True) for x in indices), teacher_count, student_count)

    def is_cls(self):
        """Return booleans [M, Ns], whether CLS is matched with CLS: once in every pair of views of every image."""
        return (self.teacher_position[self.teacher_idx] == 0) & (self.num_matched > 0)


def match_patches(box_a, flip_a, grid_a, box_b, flip_b, grid_b, rule="paper"):
    """Return the matched tokens of two crops of one image.

    Args:
        box_a, box_b: (top, left, height, width) of the crops, in whole pixels of the same image.
        flip_a, flip_b: whether the crop was mirrored horizontally after it had been cut out.
        grid_a, grid_b: (rows, columns) of patches that the network cuts the resized crop into.
        rule: how patches are matched.
            "paper" (section 3.3, Figure 2): a patch counts when the intersection of the boxes covers more than half of
            its width and more than half of its height; of the R and R' rows that count on the two sides min(R, R')
            evenly spread ones are kept, and of the columns likewise.
            "released": the same, with the region found by rounding as in the authors' code.
            "nearest" (not in the paper): every patch of b whose centre lies in box a, with the patch of a around it.

    Returns:
        (idx_a, idx_b): LongTensors [n] of token numbers. 0 is CLS and always first; patches count from 1, row by row,
        as the network sees the crop. "paper" and "released" are ordered by row and column of the image, "nearest" by
        idx_b.

    Raises:
        ValueError: an unknown rule, an empty box or grid.
    """
    boxes, flips = np.asarray([[box_a], [box_b]]), np.asarray([[flip_a], [flip_b]])
    pairs = _matched_pairs(boxes, flips, [grid_a, grid_b], teacher_views=1, rule=rule)
    return torch.from_numpy(pairs.teacher_token), torch.from_numpy(pairs.student_token)


def match_views(boxes, flips, grids, batch_size, teacher_views=2, rule="paper"):
    """Match every teacher view with every other view of the same image, for a whole batch.

    Args:
        boxes: integers [V, G, 4], (top, left, height, width) of V views of G images, in pixels of each image. G is
            `batch_size`, or 1 where the batch shares its geometry.
        flips: booleans [V, G].
        grids: V pairs (rows, columns) of patches.
        batch_size: B.
        teacher_views: how many of the views, the first ones, the teacher sees.
        rule: see `match_patches`; None matches CLS with CLS alone.

    Returns:
        Matches of the pairs (i, j) with teacher view i, student view j and i != j.

    Raises:
        ValueError: an unknown rule, an empty box or grid, or boxes of another number of images.
    """
    num_images = np.asarray(flips).shape[1]
    if num_images not in (1, batch_size):
        raise ValueError(f"boxes of {num_images} images for a batch of {batch_size}, expected 1 or {batch_size}")
    pairs = _matched_pairs(boxes, flips, grids, teacher_views, rule)
    tokens = 1 + np.prod(np.asarray(grids, np.int64), axis=1)  # [V] tokens of one image in each view
    first = np.cumsum(tokens) - tokens  # [V] tokens of one image in the views before
    teacher_total, student_total = tokens[:teacher_views].sum(), tokens.sum()

    # Number the tokens image by image, and keep the slots of those that are matched.
    teacher_slot = pairs.image * teacher_total + first[pairs.teacher_view] + pairs.teacher_token  # [n] of each pair
    student_slot = pairs.image * student_total + first[pairs.student_view] + pairs.student_token
    teacher_slots, teacher_idx = _used(teacher_slot, num_images * teacher_total)
    num_matches = np.bincount(student_slot, minlength=num_images * student_total)
    student_slots = np.flatnonzero(num_matches)
    student_slots = student_slots[np.lexsort((-num_matches[student_slots], student_slots // student_total))]
    num_matches, student_image = num_matches[student_slots], student_slots // student_total  # [Ns]

    # Sort the pairs by student token, in this order of the tokens, and lay them out as m-th matches.
    place = np.empty(num_images * student_total, np.int64)
    place[student_slots] = np.arange(len(student_slots))
    by_student = np.argsort(place[student_slot], kind="stable")
    student_idx = place[student_slot][by_student]
    m = np.arange(len(by_student)) - (np.cumsum(num_matches) - num_matches)[student_idx]
    table = np.zeros((2, num_matches.max(), len(student_slots)), np.int64)  # teacher_idx, num_matched
    table[:, m, student_idx] = teacher_idx[by_student], pairs.num_matched[by_student]
    teacher_count = np.bincount(teacher_slots // teacher_total, minlength=num_images)
    student_count = [np.bincount(student_image[num_matches > m], minlength=num_images) for m in range(table.shape[1])]
    student_count = np.stack(student_count)  # [M, G]

    if num_images < batch_size:  # the geometry is shared: the same for every image
        image = np.arange(batch_size)[:, None]
        table = np.tile(table, batch_size)
        table[0] += np.repeat(image[:, 0] * len(teacher_slots), len(student_slots)) * (table[1] > 0)
        teacher_slots = (teacher_slots + teacher_total * image).ravel()
        student_slots = (student_slots + student_total * image).ravel()
        teacher_count, student_count = np.repeat(teacher_count, batch_size), np.repeat(student_count, batch_size, 1)

    def rows_and_positions(slots, total):
        image, slot = np.divmod(slots, total)
        view = np.searchsorted(first, slot, side="right") - 1
        position = slot - first[view]
        return batch_size * first[view] + image * tokens[view] + position, position

    teacher_row, teacher_position = rows_and_positions(teacher_slots, teacher_total)
    student_row, _ = rows_and_positions(student_slots, student_total)
    columns = (teacher_row, teacher_position, student_row, *table, teacher_count, student_count)
    return Matches(*map(torch.from_numpy, columns))


def _used(slot, total):
    """Return the numbers below `total` that occur in `slot`, ascending, and for each of `slot` its place among them."""
    used = np.zeros(total, bool)
    used[slot] = True
    return np.flatnonzero(used), (np.cumsum(used) - 1)[slot]


class _Pairs(NamedTuple):
    """Matched tokens of many pairs of views: n entries, sorted by image, then teacher view, then student view.

    In every (image, teacher view, student view) the first entry is CLS with CLS (token 0).
    """

    image: np.ndarray  # [n]
    teacher_view: np.ndarray  # [n]
    teacher_token: np.ndarray  # [n]
    student_view: np.ndarray  # [n]
    student_token: np.ndarray  # [n]
    num_matched: np.ndarray  # [n] entries of the same pair of views, CLS included


def _matched_pairs(boxes, flips, grids, teacher_views, rule):
    """Return the _Pairs of `match_views`, of G images."""
    if rule is not None and rule not in RULES:
        raise ValueError(f"unknown matching rule {rule!r}, expected one of {', '.join(RULES)}")
    boxes, flips, grids = np.asarray(boxes, np.int64), np.asarray(flips, bool), np.asarray(grids, np.int64)
    if boxes[..., 2:].min() < 1 or grids.min() < 1:
        raise ValueError("boxes and grids must be at least one pixel and one patch high and wide")
    num_views, num_images = flips.shape
    view_pairs = _view_pairs(teacher_views, num_views)  # [2, V']: teacher views, student views
    num_pairs = view_pairs.shape[1]

    if rule is None:
        counts = np.zeros((num_images, num_pairs, 2), np.int64)
        rows = columns = np.zeros((num_images, 2, num_pairs, 1), np.int64)
    else:
        # A box is an interval of rows and an interval of columns, and so is all that follows from it.
        sides = boxes.swapaxes(0, 1)[:, view_pairs]  # [G, 2, V', 4]
        counts, index = RULES[rule](sides[..., :2], sides[..., 2:], grids[view_pairs])
        flipped = flips.T[:, view_pairs, None]  # [G, 2, V', 1]
        rows, columns = index[..., 0, :], index[..., 1, :]  # [G, 2, V', at least n]
        if rule == "nearest":  # ordered by the student's tokens: a mirrored student view is walked from its right edge
            i = np.arange(columns.shape[-1])
            i = np.where(flipped[:, 1], np.maximum(counts[..., 1:] - 1 - i, 0), i)
            columns = np.take_along_axis(columns, i[:, None], -1)
        columns = np.where(flipped, grids[view_pairs, 1:] - 1 - columns, columns)

    # Lay the pairs of views out one behind the other: CLS, then the kept rows times the kept columns.
    length = 1 + (counts[..., 0] * counts[..., 1]).ravel()
    start = np.cumsum(length) - length
    pair = np.repeat(np.arange(len(length)), length)  # [n] pair of views of an image
    row, column = np.divmod(np.arange(len(pair)) - start[pair] - 1, np.maximum(counts[..., 1].ravel(), 1)[pair])
    rows = rows * grids[view_pairs, 1:]
    rows, columns = (x.swapaxes(0, 1).reshape(2, len(length), -1) for x in (rows, columns))
    tokens = 1 + rows[:, pair, row] + columns[:, pair, column]  # [2, n]
    tokens[:, start] = 0
    image, view_pair = np.divmod(pair, num_pairs)
    teacher_view, student_view = view_pairs[:, view_pair]
    return _Pairs(image, teacher_view, tokens[0], student_view, tokens[1], length[pair])


@functools.lru_cache
def _view_pairs(teacher_views, num_views):
    return np.array([(i, j) for i in range(teacher_views) for j in range(num_views) if i != j]).T


# A rule of RULES matches the patches of many pairs of views along both axes at once, for G images, two sides (teacher
# view, student view), V' pairs of views and two axes (rows, columns).
# Arguments: start and length [G, 2, V', 2] of the boxes in pixels, and the number of patches [2, V', 2] along them.
# Results: n [G, V', 2], how many patches are matched along an axis, and index [G, 2, V', 2, at least n], their numbers
# from the top and from the left of the image. What index holds behind the first n is ignored.


def _match_paper(start, length, patches):
    low, high = _intersect(start, length)
    # In units of 1 / patches of a pixel a patch is `length` long and patch p begins at p * length.
    low, high = (low - start) * patches, (high - start) * patches
    # Patch p reaches half of itself beyond low where 2 * low < (2p + 1) * length, and before high likewise.
    first = (2 * low + length) // (2 * length)
    count = -((length - 2 * high) // (2 * length)) - first
    # Both may hold for one patch that sticks out of the intersection on both sides.
    covered = np.minimum(high, (first + 1) * length) - np.maximum(low, first * length)
    return _spread(first, count * ((count > 1) | (count == 1) & (2 * covered > length)) * (low < high))


def _match_released(start, length, patches):
    low, high = _intersect(start, length)
    first = np.rint(patches * (low - start) / length).astype(np.int64)
    count = np.rint(patches * (high - low) / length).astype(np.int64)
    return _spread(first, np.where(low < high, np.minimum(count, patches - first), 0))


def _match_nearest(start, length, patches):
    (start_t, start_s), (length_t, length_s), (patches_t, patches_s) = (
        np.moveaxis(x, -3, 0)[..., None] for x in (start, length, patches)
    )
    p = np.arange(patches_s.max())
    # Centre of the student's patch p from the start of the teacher's box, in units of 1 / (2 patches_s) pixel.
    centre = 2 * patches_s * (start_s - start_t) + (2 * p + 1) * length_s
    inside = (centre >= 0) & (centre < 2 * patches_s * length_t) & (p < patches_s)
    index_s = np.minimum(inside.argmax(-1)[..., None] + p, patches_s - 1)  # the patches inside are neighbours
    centre = np.take_along_axis(centre, index_s, -1)
    return inside.sum(-1), np.stack([centre * patches_t // (2 * patches_s * length_t), index_s], 1)


RULES = {"paper": _match_paper, "released": _match_released, "nearest": _match_nearest}


def _intersect(start, length):
    """Return the first pixel and the one after the last that both sides hold, [G, 1, M, 2]; empty where low >= high."""
    end = start + length
    return np.maximum(start[:, :1], start[:, 1:]), np.minimum(end[:, :1], end[:, 1:])


def _spread(first, count):
    """Keep as many patches on both sides as the one with fewer has, evenly spread: floor(linspace(0, count - 1, n))."""
    n = np.minimum(count[:, 0], count[:, 1])
    i, gaps = np.arange(max(n.max(), 1)), np.maximum(n - 1, 1)
    return n, first[..., None] + i * (count - 1)[..., None] // gaps[:, None, ..., None]
