"""Patch matching: which patch tokens of two crops of one image show the same place (paper, section 3.3).

Geometry only: boxes and flips in, the table of corresponding tokens out. All arithmetic is on integers, so that a
patch that is covered by exactly one half falls on the same side on every machine.

`python patch_matching.py IMAGE` draws two crops of an image and their matched patches.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch


class Matches(NamedTuple):
    """Matched tokens of many pairs of views: n entries, sorted by image, then teacher view, then student view.

    Every (image, teacher view, student view) has a run of entries; its first one is CLS with CLS (token 0).
    """

    image: np.ndarray  # [n]
    teacher_view: np.ndarray  # [n]
    teacher_token: np.ndarray  # [n]
    student_view: np.ndarray  # [n]
    student_token: np.ndarray  # [n]
    run_length: np.ndarray  # [n] number of entries of the run that this one belongs to, CLS included


class MatchTable(NamedTuple):
    """The matches of a whole batch, ready to index the networks' outputs. All LongTensors, sorted by image.

    A network sees the views one after the other, each with all images of the batch, so token t of image b in view v is
    row `B * (tokens of one image in the views before v) + b * (tokens of view v) + t` of its flattened output.
    """

    teacher_row: torch.Tensor  # [Nt] rows of the teacher's output that are matched at least once
    student_row: torch.Tensor  # [Ns]
    teacher_position: torch.Tensor  # [Nt] token position of each teacher row in its view, 0 is CLS
    teacher_idx: torch.Tensor  # [n] into teacher_row
    student_idx: torch.Tensor  # [n] into student_row
    image: torch.Tensor  # [n]
    run_length: torch.Tensor  # [n] matched tokens of this pair of views, CLS included


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
    boxes = np.asarray([[box_a], [box_b]])
    flips = np.asarray([[flip_a], [flip_b]])
    matches = match_views(boxes, flips, [grid_a, grid_b], teacher_views=1, rule=rule)
    return torch.from_numpy(matches.teacher_token), torch.from_numpy(matches.student_token)


def match_views(boxes, flips, grids, teacher_views=2, rule="paper"):
    """Match every teacher view with every other view of the same image, for many images at once.

    Args:
        boxes: integers [V, G, 4], (top, left, height, width) of V views of G images, in pixels of each image. Where a
            batch shares its geometry, G is 1.
        flips: booleans [V, G].
        grids: V pairs (rows, columns) of patches.
        teacher_views: how many of the views, the first ones, the teacher sees.
        rule: see `match_patches`; None matches CLS with CLS alone.

    Returns:
        Matches. The pairs are (i, j) with teacher view i, student view j and i != j.
    """
    if rule is not None and rule not in RULES:
        raise ValueError(f"unknown matching rule {rule!r}, expected one of {', '.join(RULES)}")
    boxes, flips, grids = np.asarray(boxes, np.int64), np.asarray(flips, bool), np.asarray(grids, np.int64)
    if boxes[..., 2:].min() < 1 or grids.min() < 1:
        raise ValueError("boxes and grids must be at least one pixel and one patch high and wide")
    views, images = flips.shape
    pairs = _view_pairs(teacher_views, views)  # [2, M]: teacher views, student views
    M = pairs.shape[1]

    if rule is None:
        counts, index = np.zeros((images, M, 2), np.int64), np.zeros((images, 2, M, 2, 1), np.int64)
    else:
        # A box is an interval of rows and an interval of columns, and so is all that follows from it.
        sides = boxes.swapaxes(0, 1)[:, pairs]  # [G, 2, M, 4]
        counts, index = RULES[rule](sides[..., :2], sides[..., 2:], grids[pairs])
        flipped = flips.T[:, pairs, None]  # [G, 2, M, 1]
        columns = index[..., 1, :]
        if rule == "nearest":  # ordered by the student's tokens: a mirrored student view is walked from its right edge
            i = np.arange(columns.shape[-1])
            i = np.where(flipped[:, 1], np.maximum(counts[..., 1:] - 1 - i, 0), i)
            columns = np.take_along_axis(columns, i[:, None], -1)
        index[..., 1, :] = np.where(flipped, grids[pairs, 1:] - 1 - columns, columns)

    # Lay the runs out one behind the other: CLS, then the kept rows times the kept columns.
    length = 1 + (counts[..., 0] * counts[..., 1]).ravel()
    start = np.cumsum(length) - length
    run = np.repeat(np.arange(len(length)), length)
    row, column = np.divmod(np.arange(len(run)) - start[run] - 1, np.maximum(counts[..., 1].ravel(), 1)[run])
    index[..., 0, :] *= grids[pairs, 1:]
    rows, columns = index.transpose(3, 1, 0, 2, 4).reshape(2, 2, len(length), -1)
    tokens = 1 + rows[:, run, row] + columns[:, run, column]  # [2, n]
    tokens[:, start] = 0
    image, pair = np.divmod(run, M)
    return Matches(image, pairs[0, pair], tokens[0], pairs[1, pair], tokens[1], length[run])


@functools.lru_cache
def _view_pairs(teacher_views, views):
    return np.array([(i, j) for i in range(teacher_views) for j in range(views) if i != j]).T


def batch_table(matches, batch_size, tokens_per_view, teacher_views=2):
    """Turn matches into the rows and pairs of a whole batch.

    Args:
        matches: from `match_views`, of G = batch_size images or of one geometry that all images share.
        batch_size: B.
        tokens_per_view: tokens of one image in each of the V views, CLS included.
        teacher_views: how many of the views the teacher sees.

    Returns:
        MatchTable
    """
    tokens = np.asarray(tokens_per_view, np.int64)
    first = np.cumsum(tokens) - tokens  # tokens of one image in the views before
    images = int(matches.image[-1]) + 1
    if images not in (1, batch_size):
        raise ValueError(f"matches of {images} images for a batch of {batch_size}, expected 1 or {batch_size}")

    def rows_and_index(view, token, total):
        slot = matches.image * total + first[view] + token  # numbers the tokens image by image
        used = np.zeros(images * total, bool)
        used[slot] = True
        index = (np.cumsum(used) - 1)[slot]
        slots = np.flatnonzero(used)
        if images < batch_size:  # a shared geometry: the same list for every image
            index = (index + len(slots) * np.arange(batch_size)[:, None]).ravel()
            slots = (slots + total * np.arange(batch_size)[:, None]).ravel()
        image, slot = np.divmod(slots, total)
        view = np.searchsorted(first, slot, side="right") - 1
        position = slot - first[view]
        return batch_size * first[view] + image * tokens[view] + position, position, index

    teacher_total = int(tokens[:teacher_views].sum())
    teacher_row, teacher_position, teacher_idx = rows_and_index(
        matches.teacher_view, matches.teacher_token, teacher_total
    )
    student_row, _, student_idx = rows_and_index(matches.student_view, matches.student_token, int(tokens.sum()))
    repeats = batch_size // images
    image = np.repeat(np.arange(batch_size), len(matches.image)) if repeats > 1 else matches.image
    run_length = np.tile(matches.run_length, repeats)
    columns = (teacher_row, student_row, teacher_position, teacher_idx, student_idx, image, run_length)
    return MatchTable(*(torch.from_numpy(column) for column in columns))


# RULES, for G images, two sides (teacher view, student view), M pairs of views and two axes (rows, columns).
# Arguments are start and length [G, 2, M, 2] of the intervals in pixels, and the patches [2, M, 2] along them. Results
# are n [G, M, 2], how many patches are matched, and numbers of patches [G, 2, M, 2, at least n] in the order of the
# image; what stands behind the first n of them is meaningless.


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


def main(argv=None):
    from utils import ArgumentParser, number

    parser = ArgumentParser(description="Draw two crops of an image and their matched patches, numbered alike.")
    side, share = number(int, 1), number(float, 1e-6, 1)
    add = parser.add_argument_group("picture").add_argument
    add("image", nargs="?", help="the image; default: a photograph that scikit-learn ships")
    add("--output", default="matches.png", help="file to write, PNG or PDF")
    add = parser.add_argument_group("crops").add_argument
    add("--global_crops_size", type=side, default=224, help="side of the teacher's crop in pixels")
    add("--local_crops_size", type=side, default=96, help="side of the student's crop in pixels")
    add("--global_crops_scale", type=share, nargs=2, default=[0.4, 1.0], help="share of the image's area")
    add("--local_crops_scale", type=share, nargs=2, default=[0.05, 0.4], help="share of the image's area")
    add("--seed", type=number(int, 0), default=0, help="of boxes and flips")
    add = parser.add_argument_group("matching").add_argument
    add("--matching", choices=RULES, default="paper", help="how patches are matched")
    add("--patch_size", type=side, default=16, help="side of a patch in pixels")
    args = parser.parse_args(argv)
    parser.check_crops(args)

    import figures
    from datasets import photograph, read_image, to_uint8

    figures.check_output(args.output)
    image = to_uint8(read_image(args.image or photograph("china")))
    sizes = (args.global_crops_size, args.local_crops_size)
    scales = (args.global_crops_scale, args.local_crops_scale)
    crops, boxes, flips = figures.draw_crops(image, sizes, scales, args.seed)
    grid_a, grid_b = ((size // args.patch_size,) * 2 for size in sizes)
    idx_a, idx_b = match_patches(boxes[0], flips[0], grid_a, boxes[1], flips[1], grid_b, args.matching)
    image, *crops = map(figures.to_picture, (image, *crops))
    figure = figures.draw_matches(image, crops, boxes, flips, args.patch_size, idx_a, idx_b)
    figures.save(figure, args.output)
    print(f"{len(idx_a) - 1} matched patches, drawn in {args.output}")


if __name__ == "__main__":
    from utils import one_line_errors

    with one_line_errors():
        main()
