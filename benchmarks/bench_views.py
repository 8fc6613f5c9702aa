"""Time a multi-crop of 2 + 8 views on one core against DINO's with torchvision and PIL, in images per second.

    python -m benchmarks.bench_views

From decoded photographs of 500×375 pixels to uint8 views. JPEG decoding and normalization are timed separately. The
stages of loading are those of a training that reads JPEG files.
"""

import copy
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch.utils.data import Dataset

import main_lgssl
from augment import MEAN, STD, MultiCrop, normalize
from benchmarks.machine import machine, print_table, seconds_of
from support.arguments import ArgumentParser, number
from support.decoding import read_image
from support.images import ResizedArray
from support.loader import LoadedBatch, Workers
from utils import Process

SIZE = 500, 375  # width and height of the photographs


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=number(int, 1), default=40, help="images per batch")
    parser.add_argument("--rounds", type=number(int, 1), default=5, help="number of measurements, the median counts")
    args = parser.parse_args()

    from torchvision import transforms  # not at the top: importing it takes longer than torch

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    print(f"{machine()}; one core, batch {args.batch_size}")

    photos = photographs()
    images = [photo.resize(SIZE, Image.Resampling.LANCZOS) for photo in photos]
    images = [images[i % 2] for i in range(args.batch_size)]
    indices = list(range(args.batch_size))
    resize, plain = ResizedArray(256), plain_multi_crop()
    batch, image, patches = MultiCrop(), MultiCrop(geometry="image"), MultiCrop(patch_side=16)
    sides = {
        "torchvision and PIL": lambda step: [plain(image) for image in images],
        "lgssl, --geometry batch": lambda step: batch(list(map(resize, images)), indices, 0, step),
        "lgssl, --geometry image": lambda step: image(list(map(resize, images)), indices, 0, step),
        "lgssl, --patch_augmentation": lambda step: patches(list(map(resize, images)), indices, 0, step),
    }
    seconds = {name: [] for name in sides}
    for step in range(1 + args.rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side(step)
            seconds[name].append((time.perf_counter() - start) / args.batch_size)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    slowest = medians["torchvision and PIL"]
    print_table(
        ("views", "ms/image", "images/s per core", "faster"),
        [(name, f"{t * 1e3:.2f}", f"{1 / t:.0f}", f"{slowest / t:.1f}×") for name, t in medians.items()],
    )
    usual, *others = (t for name, t in medians.items() if name.startswith("lgssl"))
    ratios = [f"{other / usual:.2f}" for other in others]
    print(f"as long as --geometry batch: --geometry image {ratios[0]} times, --patch_augmentation {ratios[1]} times")
    views = [view.pixels for view in batch(list(map(resize, images)), indices, 0, 0)]
    by_image = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    pil = [Image.fromarray(view[0].permute(1, 2, 0).numpy()) for view in views]
    own = min(seconds_of(lambda: [normalize(view) for view in views], 10)) / args.batch_size * 1e3
    plain = min(seconds_of(lambda: [by_image(view) for view in pil], 10)) * 1e3
    print(f"normalization, not counted: {own:.2f} ms per image here, on the device; {plain:.2f} ms as in DINO\n")

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(folder, args.batch_size)
        print_stages(folder, args.batch_size, args.rounds)
        for size in (SIZE, (2000, 1500)):
            path = Path(folder) / f"of {size[0]}.jpg"
            photos[0].resize(size, Image.Resampling.LANCZOS).save(path, quality=90)
            whole, reduced = (min(seconds_of(lambda: resize(read_image(path, *side)), 10)) for side in ((), (512,)))
            rows.append((f"{size[0]}×{size[1]}", f"{whole * 1e3:.1f}", f"{reduced * 1e3:.1f}"))
    print_table(("JPEG to 256×256", "ms, all pixels", "ms, at reduced size"), rows)


def photographs() -> list:
    """Return scikit-learn's two photographs of 640×427 pixels as PIL images."""
    from sklearn.datasets import load_sample_image

    return [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]


def write_photographs(folder, count) -> None:
    """Write JPEG files, random crops of the two photographs, about as large as ImageNet's: 100 kB on average."""
    rng, sources = np.random.default_rng(0), photographs()
    for i in range(count):
        source = sources[i % 2]
        width, height = np.multiply(rng.uniform(0.7, 1) * source.height / SIZE[1], SIZE)
        left, top = rng.uniform(0, source.width - width), rng.uniform(0, source.height - height)
        image = source.resize(SIZE, Image.Resampling.LANCZOS, (left, top, left + width, top + height))
        image = ImageOps.mirror(image) if rng.random() < 0.5 else image
        image.save(Path(folder) / f"{i}.jpg", quality=97)


def print_stages(folder, batch_size, rounds) -> float:
    """Print the time of each stage of the loading of JPEG files, and of one data-loading worker.

    The stages are timed in this process, which is to have one thread, and those of a worker by its batches' arrivals.

    Returns:
        images per second of the worker, with --distort_on device
    """
    args = main_lgssl.parse_arguments(["--data_path", str(folder), "--batch_size_per_gpu", str(batch_size)])
    images = main_lgssl.open_images(args).train
    decoded = copy.copy(images)
    decoded.transform = None
    what = args, images, range(1 + rounds), Process(0, 1, torch.device("cpu")), Workers(1)
    loaders = [main_lgssl.build_loader(*what, distort_on=place) for place in ("device", "workers")]
    on_device, in_workers = (loader.dataset for loader in loaders)
    seconds = []
    for key in loaders[0].sampler:
        batches = lambda: [decoded[i] for i in key[2]], lambda: on_device[key], lambda: in_workers[key]
        seconds.append([seconds_of(batch, 1)[0] for batch in batches])
    decoding, undistorted, distorted = np.median(seconds[1:], 0) / batch_size
    arrivals = [[time.perf_counter() for _ in loader] for loader in loaders]
    worker, distorting_worker = np.median(np.diff(arrivals), 1) / batch_size
    stages = {
        "decoding": decoding,
        "resizing, crops, flips and matches": undistorted - decoding,
        "photometric distortion": distorted - undistorted,
        "sending, of undistorted views": worker - undistorted,
        "a worker, --distort_on device": worker,
        "a worker, --distort_on workers": distorting_worker,
    }
    kilobytes = statistics.mean(path.stat().st_size for path in Path(folder).iterdir()) / 1e3
    header = (f"one core, JPEGs of {SIZE[0]}×{SIZE[1]}, mean {kilobytes:.0f} kB", "ms/image", "images/s")
    print_table(header, [(name, f"{t * 1e3:.2f}", f"{1 / t:.0f}") for name, t in stages.items()])
    print()
    return 1 / worker


class PlainBatches(Dataset):
    """DINO's loading of image files with torchvision and PIL, as a data set of LoadedBatches with given matches.

    Args:
        paths: the files.
        matches: of the batches of the first steps, which repeat.
    """

    def __init__(self, paths, matches):
        self.paths, self.matches, self.multi_crop = paths, matches, plain_multi_crop()

    def __getitem__(self, key):
        _, step, indices = key
        images = [self.multi_crop(Image.open(self.paths[i]).convert("RGB")) for i in indices]
        views = [torch.stack(of_view) for of_view in zip(*images, strict=True)]
        pixels = [torch.cat(views[:2]), torch.cat(views[2:])]
        return LoadedBatch(pixels, None, self.matches[step % len(self.matches)], {})


def plain_multi_crop() -> Callable:
    """Return a function from a PIL image to 2 + 8 views [3, S, S], with DINO's parameters."""
    from torchvision import transforms

    jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
    flip_and_color = [transforms.RandomHorizontalFlip(), jitter, transforms.RandomGrayscale(p=0.2)]

    def blur(image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    def view(size, scale, blur_prob, solarize_prob):
        crop = transforms.RandomResizedCrop(size, scale=scale, interpolation=transforms.InterpolationMode.BICUBIC)
        blurred = transforms.RandomApply([transforms.Lambda(blur)], p=blur_prob)
        solarized = transforms.RandomApply([transforms.Lambda(ImageOps.solarize)], p=solarize_prob)
        return transforms.Compose([crop, *flip_and_color, blurred, solarized, transforms.PILToTensor()])

    views = [view(224, (0.4, 1.0), 1.0, 0.0), view(224, (0.4, 1.0), 0.1, 0.2)] + [view(96, (0.05, 0.4), 0.5, 0.0)] * 8
    return lambda image: [view(image) for view in views]


if __name__ == "__main__":
    main()
