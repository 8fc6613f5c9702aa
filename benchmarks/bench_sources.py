"""Time reading the same JPEGs of 500×375 pixels from a folder, parquet files and tars on one core.

    python -m benchmarks.bench_sources

Rounds alternate between the sources. Files are in the page cache. Times are CPU time, so that other work on the machine
adds little. Start-up is the time of opening the training images.
"""

import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.machine import machine, print_table
from support.arguments import ArgumentParser, number
from support.images import ResizedArray
from support.sources import DataSpec, build_dataset

PER_SHARD = 1000  # images per tar


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=number(int, 1), default=400, help="number of images")
    parser.add_argument("--rounds", type=number(int, 1), default=9, help="number of measurements, the median counts")
    parser.add_argument("--start_images", type=number(int, 1), default=100_000, help="number of small images whose "
        "start-up is timed")  # fmt: skip
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}; CPU time of one core, {args.images} images")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = f"{folder}/cache"  # before `datasets` is imported
        named, _ = write_sources(Path(folder) / "large", photographs(args.images))
        print_table(("source", "ms/image", "images/s per core", "of the folder's"), throughput(named, args.rounds))
        print()
        small = [encoded(Image.new("RGB", (8, 8), (i, 0, 0))) for i in range(20)]
        named, writing = write_sources(Path(folder) / "small", (small[i % 20] for i in range(args.start_images)))
        rows = []
        for name, spec in named.items():
            seconds = []
            for _ in range(4):
                start = time.process_time()
                build_dataset(spec)
                seconds.append(time.process_time() - start)
            rows.append((name, f"{seconds[0]:.3f}", f"{statistics.median(seconds[1:]):.3f}", f"{writing[name]:.0f}"))
        print_table((f"start with {args.start_images} images", "s, first", "s, later", "s, writing the data"), rows)


def photographs(count: int) -> Iterator[bytes]:
    """Yield encoded crops of 500×375 pixels of scikit-learn's photographs."""
    from sklearn.datasets import load_sample_image

    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    rng = np.random.default_rng(0)
    for i in range(count):
        left, top = int(rng.integers(140)), int(rng.integers(52))
        yield encoded(photos[i % 2].crop((left, top, left + 500, top + 375)))


def encoded(image: Image.Image) -> bytes:
    """Return an image as a JPEG of quality 90."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def write_sources(folder: Path, images: Iterable[bytes]) -> tuple[dict[str, DataSpec], dict[str, float]]:
    """Write encoded images in three ways, in the same order.

    Returns:
        ({source: DataSpec}, {source: seconds})
    """
    import datasets

    images = list(images)
    seconds = {}
    start = time.process_time()
    for label in range(2):
        (folder / f"folder/{label}").mkdir(parents=True)
    for i, contents in enumerate(images):
        (folder / f"folder/{2 * i // len(images)}/{i:07}.jpg").write_bytes(contents)
    seconds["folder"] = time.process_time() - start

    start = time.process_time()
    (folder / "tar").mkdir()
    for first in range(0, len(images), PER_SHARD):
        with tarfile.open(folder / f"tar/{first // PER_SHARD:04}.tar", "w") as archive:
            for i, contents in enumerate(images[first : first + PER_SHARD], start=first):
                for name, data in ((f"{i:07}.jpg", contents), (f"{i:07}.cls", b"%d" % (2 * i // len(images)))):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    seconds["tar"] = time.process_time() - start

    start = time.process_time()
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["0", "1"])})
    (folder / "parquet").mkdir()
    for first in range(0, len(images), 10 * PER_SHARD):
        part = images[first : first + 10 * PER_SHARD]
        stored = [{"bytes": contents, "path": None} for contents in part]
        labels = [2 * i // len(images) for i in range(first, first + len(part))]
        rows = datasets.Dataset.from_dict({"image": stored, "label": labels}, features)
        rows.to_parquet(folder / f"parquet/train-{first // (10 * PER_SHARD):04}.parquet")
    seconds["parquet"] = time.process_time() - start
    specs = {"folder": DataSpec("folder", folder / "folder")}
    return {**specs, **{name: DataSpec(f"hf:{folder}/{name}") for name in ("parquet", "tar")}}, seconds


def throughput(named: dict[str, DataSpec], rounds: int) -> list[tuple[str, str, str, str]]:
    """Return rows of the table: time of decoding and resizing to 256×256, in a random order."""
    sides = {name: build_dataset(spec, transform=ResizedArray(256)) for name, spec in named.items()}
    (count,) = {len(images) for images in sides.values()}
    seconds = {name: [] for name in sides}
    for i in range(1 + rounds):
        order = np.random.default_rng(i).permutation(count).tolist()
        for name, images in sides.items():
            start = time.process_time()
            for index in order:
                images[index]
            seconds[name].append((time.process_time() - start) / count)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return [(n, f"{t * 1e3:.2f}", f"{1 / t:.0f}", f"{medians['folder'] / t:.3f}") for n, t in medians.items()]


if __name__ == "__main__":
    main()
