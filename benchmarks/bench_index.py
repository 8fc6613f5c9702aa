"""Time the start-up of a training on a large folder, the first time and with its index.

python -m benchmarks.bench_index

The images are hard links of a few small PNGs in class folders, in a temporary folder: seconds to make, and no disk
space but for the names. The folders have just been written, so that the system still has them in memory; the first
time takes longer from a cold disk or over a network. Start-up is what `main_lgssl.py` does with the images before it
builds the networks: open them, check them, hold images out for the online k-NN, and hash their names.
"""

import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import main_lgssl
from benchmarks.machine import machine, print_table
from support import index
from support.arguments import ArgumentParser, number
from support.checkpoints import hash_of_names

MAX_LINKS = 60_000  # of one file; ext4 has 65,000


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    natural = number(int, 1)
    parser.add_argument("--files", type=natural, default=1_000_000, help="number of images")
    parser.add_argument("--classes", type=number(int, 2), default=1000, help="number of class folders")
    parser.add_argument("--images", type=natural, default=20, help="number of different PNGs")
    parser.add_argument("--rounds", type=natural, default=3, help="number of measurements with the index")
    parser.add_argument("--folder", help="where the temporary folder is made. Default: the system's")
    args = parser.parse_args()
    if args.files < args.classes or args.files > args.images * MAX_LINKS:
        parser.error(f"--files {args.files}: expected {args.classes} to {args.images * MAX_LINKS}")
    print(f"{machine()}; {args.files} images in {args.classes} folders")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder) / "images"
        write_links(root, args.files, args.classes, args.images)
        time.sleep(index.SETTLED + 0.1)  # a folder that has just changed gets no index
        runs = [("first, reads the folders", start_up(root))]
        runs += [(f"with the index, {i + 1}", start_up(root)) for i in range(args.rounds)]
        size = sum(place.stat().st_size for place in index.places(root) if place.exists())
    if len({names for _, (*_, names) in runs}) > 1:
        raise RuntimeError("the names differ")
    rows = [(n, f"{a:.2f}", f"{b:.2f}", f"{a + b:.2f}") for n, (a, b, _) in runs]
    print_table(("start-up", "images and k-NN, s", "hash of names, s", "together, s"), rows)
    print(f"index: {size / 1e6:.1f} MB")


def write_links(root, files, classes, images) -> None:
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


def start_up(root) -> tuple[float, float, str]:
    """Return (seconds to open the images, seconds to hash their names, hash)."""
    args = main_lgssl.parse_arguments(["--data_path", str(root)])
    start = time.perf_counter()
    dataset, online_knn, reason = main_lgssl.open_images(args)
    opened = time.perf_counter()
    if online_knn is None:
        raise RuntimeError(reason)
    names = hash_of_names(dataset)
    return opened - start, time.perf_counter() - opened, names


if __name__ == "__main__":
    main()
