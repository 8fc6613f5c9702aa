"""Time a multi-crop of 2 + 8 views on one core against DINO's with torchvision and PIL, in images per second.

    python -m benchmarks.bench_views

From decoded photographs of 500×375 pixels to uint8 views. JPEG decoding and normalization are timed separately.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import torch
from PIL import Image, ImageFilter, ImageOps

from augment import MEAN, STD, MultiCrop, normalize
from benchmarks.machine import machine, print_table, seconds_of
from support.arguments import ArgumentParser, number
from support.decoding import read_image
from support.images import ResizedArray


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=number(int, 1), default=40, help="images per batch")
    parser.add_argument("--rounds", type=number(int, 1), default=5, help="number of measurements, the median counts")
    args = parser.parse_args()

    # Not at the top: importing them takes longer than torch.
    from sklearn.datasets import load_sample_image
    from torchvision import transforms

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    print(f"{machine()}; one core, batch {args.batch_size}")

    photographs = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    images = [photo.resize((500, 375), Image.Resampling.LANCZOS) for photo in photographs]
    images = [images[i % 2] for i in range(args.batch_size)]
    indices = list(range(args.batch_size))
    resize, plain = ResizedArray(256), plain_multi_crop()
    multi_crops = {geometry: MultiCrop(geometry=geometry) for geometry in ("batch", "image")}
    sides = {
        "torchvision and PIL": lambda step: [plain(image) for image in images],
        "lgssl, --geometry batch": lambda step: multi_crops["batch"](list(map(resize, images)), indices, 0, step),
        "lgssl, --geometry image": lambda step: multi_crops["image"](list(map(resize, images)), indices, 0, step),
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
    batch, image = medians["lgssl, --geometry batch"], medians["lgssl, --geometry image"]
    print(f"--geometry image takes {image / batch:.2f} times as long as batch")
    views = [view.pixels for view in multi_crops["batch"](list(map(resize, images)), indices, 0, 0)]
    by_image = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    pil = [Image.fromarray(view[0].permute(1, 2, 0).numpy()) for view in views]
    own = min(seconds_of(lambda: [normalize(view) for view in views], 10)) / args.batch_size * 1e3
    plain = min(seconds_of(lambda: [by_image(view) for view in pil], 10)) * 1e3
    print(f"normalization, not counted: {own:.2f} ms per image here, on the device; {plain:.2f} ms as in DINO\n")

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in ((500, 375), (2000, 1500)):
            path = Path(folder) / f"{size[0]}.jpg"
            photographs[0].resize(size, Image.Resampling.LANCZOS).save(path, quality=90)
            whole, reduced = (min(seconds_of(lambda: resize(read_image(path, *side)), 10)) for side in ((), (512,)))
            rows.append((f"{size[0]}×{size[1]}", f"{whole * 1e3:.1f}", f"{reduced * 1e3:.1f}"))
    print_table(("JPEG to 256×256", "ms, all pixels", "ms, at reduced size"), rows)


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
