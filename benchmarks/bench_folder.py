"""Time the start-up of a training on a large folder of images.

python -m benchmarks.bench_folder

The images are hard links of a few small PNGs in class folders, in a temporary folder: seconds to make, and no disk
space but for the names. The folders have just been written, so that the system still has them in memory; it takes
longer from a cold disk or over a network. Start-up is opening the images and hashing their names, as each training
does. Times are CPU time, so that other work on the machine adds little.
"""

import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.machine import machine, print_table
from support.arguments import ArgumentParser, number
from support.checkpoints import hash_of_names
from support.sources import DataSpec, build_dataset

MAX_LINKS = 60_000  # of one file; ext4 has 65,000


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    natural = number(int, 1)
    parser.add_argument("--files", type=natural, default=1_000_000, help="number of images")
    parser.add_argument("--classes", type=number(int, 2), default=1000, help="number of class folders")
    parser.add_argument("--images", type=natural, default=20, help="number of different PNGs")
    parser.add_argument("--rounds", type=natural, default=3, help="number of measurements")
    parser.add_argument("--folder", help="where the temporary folder is made. Default: the system's")
    args = parser.parse_args()
    if args.files < args.classes or args.files > args.images * MAX_LINKS:
        parser.error(f"--files {args.files}: expected {args.classes} to {args.images * MAX_LINKS}")
    print(f"{machine()}; {args.files} images in {args.classes} folders")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder) / "images"
        write_links(root, args.files, args.classes, args.images)
        times = [start_up(root) for _ in range(args.rounds)]
    rows = [(i + 1, f"{a:.2f}", f"{b:.2f}", f"{a + b:.2f}") for i, (a, b) in enumerate(times)]
    print_table(("start-up", "images, s", "hash of names, s", "together, s"), rows)


def write_links(root: Path, files: int, classes: int, images: int) -> None:
    """Write images and link them from class folders."""
    rng = np.random.default_rng(0)
    sources = [root.parent / f"{i}.png" for i in range(images)]
    for source in sources:
        source.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(source)
    for label in range(classes):
        folder = root / f"n{label:08}"
        folder.mkdir(parents=True)
        for i in range(label, files, classes):
            os.link(sources[i % images], folder / f"n{label:08}_{i:08}.png")


def start_up(root: Path) -> tuple[float, float]:
    """Return (seconds to open the images, seconds to hash their names)."""
    start = time.process_time()
    dataset = build_dataset(DataSpec("folder", root))
    opened = time.process_time()
    hash_of_names(dataset)
    return opened - start, time.process_time() - opened


if __name__ == "__main__":
    main()
