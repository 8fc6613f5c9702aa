"""Time patch matching of all pairs of views, with crops shared by the batch and with crops drawn per image.

python -m benchmarks.bench_matching
"""

import numpy as np

from augment import RandomResizedCrop
from benchmarks.machine import machine, print_table, seconds_of
from patch_matching import RULES, _matched_pairs, match_patches, match_views
from support.arguments import ArgumentParser, number


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=number(int, 1), default=64, help="number of images in a batch")
    parser.add_argument("--local_crops_number", type=number(int, 0), default=8, help="number of local views")
    args = parser.parse_args()
    print(machine())
    grids = [(14, 14)] * 2 + [(6, 6)] * args.local_crops_number
    pairs = 2 * (len(grids) - 1)
    rows = []
    for images, name in ((1, "shared by the batch"), (args.images, f"per image, {args.images} images")):
        boxes, flips = draw_geometry(images, args.local_crops_number)
        for rule in RULES:
            together = median_us(lambda r=rule, b=boxes, f=flips: _matched_pairs(b, f, grids, 2, r))
            single = median_us(lambda r=rule, b=boxes, f=flips: one_by_one(b, f, grids, r), repeats=200 // images + 1)
            table = median_us(lambda r=rule, b=boxes, f=flips: match_views(b, f, grids, args.images, rule=r))
            matches = match_views(boxes, flips, grids, args.images, rule=rule)
            transfer = median_us(lambda m=matches: [x.clone() for x in m])
            size = sum(x.nbytes for x in matches) / 1e6
            cells = (f"{together:.0f}", f"{single:.0f}", f"{single / together:.0f}×", f"{table - together:.0f}")
            rows.append((name, rule, *cells, f"{size:.2f}", f"{transfer:.0f}"))
    header = ("crops", "rule", f"all {pairs} pairs, µs", "pair by pair, µs", "faster")
    print_table((*header, f"table of {args.images} images, µs", "its size, MB", "copying it, µs"), rows)
    pixels = args.images * 3 * (2 * 224**2 + args.local_crops_number * 96**2) / 1e6
    print(f"\nThe data-loading processes do all of this. The pixels of such a batch take {pixels:.1f} MB.")


def draw_geometry(images, local_crops_number) -> tuple:
    """Return boxes [V, images, 4] and flips [V, images] of the paper's crops of images of 256×256 pixels."""
    rng = np.random.default_rng(0)
    crops = [RandomResizedCrop(224, (0.4, 1.0))] * 2 + [RandomResizedCrop(96, (0.05, 0.4))] * local_crops_number
    boxes = [[crop.draw_box(rng, 256, 256) for _ in range(images)] for crop in crops]
    return np.array(boxes), rng.random((len(crops), images)) < 0.5


def one_by_one(boxes, flips, grids, rule) -> None:
    """Match with one call of match_patches per image and pair of views."""
    for image in range(boxes.shape[1]):
        sides = [(boxes[v, image], flips[v, image], grid) for v, grid in enumerate(grids)]
        for i in range(2):
            for j in range(len(grids)):
                if i != j:
                    match_patches(*sides[i], *sides[j], rule)


def median_us(call, repeats=200) -> float:
    """Return the median time of a call in microseconds."""
    return np.median(seconds_of(call, repeats)) * 1e6


if __name__ == "__main__":
    main()
