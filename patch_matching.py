"""Patch matching: which patch tokens of two crops of one image show the same place (paper, section 3.3).

Geometry only: boxes and flips in, the table of corresponding tokens out. All arithmetic is on integers, so that a
patch that is covered by exactly one half falls on the same side on every machine.

`python patch_matching.py IMAGE` draws two crops of an image and their matched patches.
"""

from typing import NamedTuple

import numpy as np
import torch

RULES = ("paper", "released", "nearest")


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
    pair_t, pair_s = np.array([(i, j) for i in range(teacher_views) for j in range(views) if i != j]).T
    # One entry per (image, pair of views), image-major.
    image = np.repeat(np.arange(images), len(pair_t))
    t, s = np.tile(pair_t, images), np.tile(pair_s, images)

    if rule is None:
        n_rows = n_cols = np.zeros(len(image), np.int64)
    else:
        box_t, box_s, flip_t, flip_s = boxes[t, image], boxes[s, image], flips[t, image], flips[s, image]
        grid_t, grid_s = grids[t], grids[s]
        # A box is an interval of rows and an interval of columns, and so is everything that follows from it.
        match_axis = _AXIS_RULES[rule]
        n_rows, row_t, row_s = match_axis(box_t[:, 0::2], grid_t[:, 0], box_s[:, 0::2], grid_s[:, 0])
        n_cols, col_t, col_s = match_axis(box_t[:, 1::2], grid_t[:, 1], box_s[:, 1::2], grid_s[:, 1])
        if rule == "nearest":  # ordered by the student's tokens: a mirrored student view is walked from its right edge
            backwards = np.where(
                flip_s[:, None], n_cols[:, None] - 1 - np.arange(col_s.shape[1]), np.arange(col_s.shape[1])
            )
            backwards = np.maximum(backwards, 0)
            col_t, col_s = np.take_along_axis(col_t, backwards, 1), np.take_along_axis(col_s, backwards, 1)
        col_t = np.where(flip_t[:, None], grid_t[:, 1:] - 1 - col_t, col_t)
        col_s = np.where(flip_s[:, None], grid_s[:, 1:] - 1 - col_s, col_s)

    # Lay the runs out one behind the other: CLS, then the kept rows times the kept columns.
    length = 1 + n_rows * n_cols
    run = np.repeat(np.arange(len(length)), length)
    start = np.cumsum(length) - length
    teacher_token = np.zeros(len(run), np.int64)
    student_token = np.zeros(len(run), np.int64)
    if rule is not None:
        is_patch = np.ones(len(run), bool)
        is_patch[start] = False
        p = run[is_patch]  # the run of each matched patch
        within = np.flatnonzero(is_patch) - start[p] - 1
        r, c = np.divmod(within, n_cols[p])
        teacher_token[is_patch] = 1 + row_t[p, r] * grid_t[p, 1] + col_t[p, c]
        student_token[is_patch] = 1 + row_s[p, r] * grid_s[p, 1] + col_s[p, c]
    return Matches(image[run], t[run], teacher_token, s[run], student_token, length[run])


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


# One axis of the rules. Arguments are, for M pairs of crops, interval [M, 2] = (start, length) in pixels and the number
# of patches [M] along it. The result is n [M], how many patches are matched, and two arrays [M, at least n] of patch
# numbers in the order of the image; what stands behind the first n of a row is meaningless.


def _match_axis_paper(interval_a, patches_a, interval_b, patches_b):
    overlap = _intersect(interval_a, interval_b)
    return _spread(*_half_covered(interval_a, patches_a, *overlap), *_half_covered(interval_b, patches_b, *overlap))


def _match_axis_released(interval_a, patches_a, interval_b, patches_b):
    overlap = _intersect(interval_a, interval_b)
    return _spread(*_rounded(interval_a, patches_a, *overlap), *_rounded(interval_b, patches_b, *overlap))


def _match_axis_nearest(interval_a, patches_a, interval_b, patches_b):
    (start_a, length_a), (start_b, length_b) = interval_a.T[..., None], interval_b.T[..., None]
    patches_a, patches_b = patches_a[:, None], patches_b[:, None]
    b = np.arange(patches_b.max())
    # Centre of patch b from the start of interval a, in units of 1 / (2 patches_b) pixel.
    centre = 2 * patches_b * (start_b - start_a) + (2 * b + 1) * length_b
    inside = (centre >= 0) & (centre < 2 * patches_b * length_a) & (b < patches_b)
    n, first = inside.sum(1), inside.argmax(1)
    index_b = np.minimum(first[:, None] + b, patches_b - 1)  # the patches inside are neighbours
    centre = np.take_along_axis(centre, index_b, 1)
    return n, centre * patches_a // (2 * patches_b * length_a), index_b


_AXIS_RULES = {"paper": _match_axis_paper, "released": _match_axis_released, "nearest": _match_axis_nearest}


def _intersect(interval_a, interval_b):
    """Return the first pixel and the one after the last that both intervals hold; empty where low >= high."""
    low = np.maximum(interval_a[:, 0], interval_b[:, 0])
    high = np.minimum(interval_a.sum(1), interval_b.sum(1))
    return low, high


def _half_covered(interval, patches, low, high):
    """Return (first, count) of the patches of which [low, high) covers more than one half."""
    start, length = interval.T
    # In units of 1 / patches of a pixel a patch is `length` long and patch p begins at p * length.
    low, high = (low - start) * patches, (high - start) * patches
    # Patch p reaches half of itself beyond low where 2 * low < (2p + 1) * length, and before high likewise.
    first = (2 * low - length) // (2 * length) + 1
    last = -((length - 2 * high) // (2 * length)) - 1
    # Both may hold for one patch that sticks out of the intersection on both sides.
    covered = np.minimum(high, (first + 1) * length) - np.maximum(low, first * length)
    count = np.where((first == last) & (2 * covered <= length), 0, last - first + 1)
    return first, np.where(low < high, np.maximum(count, 0), 0)


def _rounded(interval, patches, low, high):
    """Return (first, count) of the intersection's patches as the authors' code rounds them (half to even)."""
    start, length = interval.T
    first = np.rint(patches * (low - start) / length).astype(np.int64)
    count = np.rint(patches * (high - low) / length).astype(np.int64)
    return first, np.where(low < high, np.minimum(count, patches - first), 0)


def _spread(first_a, count_a, first_b, count_b):
    """Keep min(count_a, count_b) patches of each side, evenly spread: floor(linspace(0, count - 1, n))."""
    n = np.minimum(count_a, count_b)
    i, gaps = np.arange(max(n.max(), 1)), np.maximum(n - 1, 1)[:, None]
    spread_a, spread_b = i * (count_a[:, None] - 1) // gaps, i * (count_b[:, None] - 1) // gaps
    return n, first_a[:, None] + spread_a, first_b[:, None] + spread_b


def main(argv=None):
    import figures
    from utils import ArgumentParser, UserError, number

    parser = ArgumentParser(description="Draw two crops of an image and their matched patches, numbered alike.")
    parser.add_argument("image", nargs="?", help="default: a photograph that scikit-learn ships")
    parser.add_argument("--output", default="matches.png", help="file to write, PNG or PDF")
    parser.add_argument("--matching", choices=RULES, default="paper", help="how patches are matched")
    parser.add_argument("--patch_size", type=number(int, 1), default=16, help="side of a patch in pixels")
    parser.add_argument(
        "--global_crops_size", type=number(int, 1), default=224, help="side of the teacher's crop in pixels"
    )
    parser.add_argument(
        "--local_crops_size", type=number(int, 1), default=96, help="side of the student's crop in pixels"
    )
    parser.add_argument(
        "--global_crops_scale",
        type=number(float, 1e-6, 1),
        nargs=2,
        default=[0.4, 1.0],
        help="share of the image's area",
    )
    parser.add_argument(
        "--local_crops_scale",
        type=number(float, 1e-6, 1),
        nargs=2,
        default=[0.05, 0.4],
        help="share of the image's area",
    )
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of boxes and flips")
    args = parser.parse_args(argv)
    parser.check_crops(args)

    sizes = (args.global_crops_size, args.local_crops_size)
    path = args.image or figures.example_photograph()
    scales = (args.global_crops_scale, args.local_crops_scale)
    image, crops, boxes, flips = figures.draw_two_crops(path, sizes, scales, args.seed)
    grid_a, grid_b = ((size // args.patch_size,) * 2 for size in sizes)
    idx_a, idx_b = match_patches(boxes[0], flips[0], grid_a, boxes[1], flips[1], grid_b, args.matching)
    figure = figures.draw_matches(image, crops, boxes, flips, args.patch_size, idx_a, idx_b)
    try:
        figure.savefig(args.output)
    except (OSError, ValueError) as error:  # ValueError: a format that matplotlib does not know
        raise UserError(f"cannot write {args.output}: {error}") from error
    print(f"{len(idx_a) - 1} matched patches, drawn in {args.output}")


if __name__ == "__main__":
    from utils import one_line_errors

    with one_line_errors():
        main()
