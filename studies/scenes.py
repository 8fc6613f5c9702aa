"""Scenes: images of several objects with exact masks, composed of photographs from Debian packages.

A scene is a square crop of a wallpaper with 2 to 4 small stamps, cut-out photographs of Tux Paint, and a large one on
top, whose class is the label of the image. The objects of a scene are hardly related to each other, so that the whole
images of two crops say little about each other, but their common patches do (paper, section 3.1).
"""

import colorsys
import itertools
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from support.decoding import opened, read_image
from utils import UserError

STAMPS = Path("usr/share/tuxpaint/stamps")
WALLPAPERS = ("usr/share/backgrounds/**/*.jpg", "usr/share/wallpapers/*/contents/images/*.jpg")
PACKAGES = "tuxpaint-stamps-default mate-backgrounds ukui-wallpapers plasma-workspace-wallpapers"
PACKAGES += " lomiri-wallpapers-20.04 lomiri-wallpapers-16.04"
CLASSES = {  # class: folders of its stamps
    "bird": ["animals/birds"],
    "fruit": ["food/fruit"],
    "flower": ["plants/flowers"],
    "vegetable": ["food/vegetables", "food/nuts"],
    "mammal": ["animals/mammals", "animals/marsupials"],
    "fish": ["animals/fish", "animals/mammals/aquatic"],
    "vehicle": ["vehicles", "military/vehicles"],
    "tool": ["household"],
    "clothes": ["clothes"],
    "coin": ["symbols/money"],
    "sign": ["town/roadsigns"],
    "space": ["space"],
}
NO_STAMPS = ("cartoon", "_mirror", "_flip")  # in the paths of drawings and of copies
TRAIN_STAMPS, TRAIN_WALLPAPERS = 0.7, 0.75  # shares; the others are only in the validation scenes of `new`
SMALL, LARGE = (0.2, 0.4), (0.45, 0.7)  # longer side of a stamp as a share of the scene's side
MAX_ANGLE = 20  # degrees


class Material(NamedTuple):
    """What scenes are made of, for training or for validation.

    Attributes:
        stamps: per class, RGBA images.
        wallpapers: RGB images.
    """

    stamps: list[list[Image.Image]]
    wallpapers: list[Image.Image]


class Part(NamedTuple):
    """A part of the data set.

    Attributes:
        folder: its folder, where {} stands for images and masks.
        validation: whether it is made of the material for validation.
        stream: second number of the keys of its scenes, see `make_scene`.
        scenes: number of scenes.
    """

    folder: str
    validation: bool
    stream: int
    scenes: int


def read_packages(folder: Path, size: int, seed: int) -> tuple[Material, Material]:
    """Read the stamps and wallpapers of unpacked Debian packages, shrunk to what scenes need.

    Args:
        folder: folder to which `dpkg -x` unpacked PACKAGES.
        size: side of the scenes in pixels.
        seed: which stamps and wallpapers are for training.

    Returns:
        material for training, for validation

    Raises:
        UserError: a class has no stamps, there are no wallpapers, or an image cannot be read.
    """
    train, val = Material([], []), Material([], [])
    for number, (name, folders) in enumerate(CLASSES.items()):
        paths = {path for part in folders for path in (folder / STAMPS / part).rglob("*.png")}
        unwanted = [*NO_STAMPS, *(["aquatic"] if name == "mammal" else [])]
        chosen = [path for path in sorted(paths) if not any(word in str(path.relative_to(folder)) for word in unwanted)]
        stamps = [_stamp(path, size) for path in chosen]
        for material, part in zip((train, val), _split(stamps, TRAIN_STAMPS, (seed, number)), strict=True):
            if not part:
                raise UserError(f"found {len(stamps)} stamps of {name} in {folder / STAMPS}: unpack {PACKAGES}")
            material.stamps.append(part)
    largest: dict[str, Path] = {}  # a wallpaper may be there in several sizes, named WIDTHxHEIGHT
    for path in sorted(path for pattern in WALLPAPERS for path in folder.glob(pattern)):
        wallpaper = re.sub(r"_?\d+x\d+$", "", str(path.with_suffix("")))
        largest[wallpaper] = max(path, largest.get(wallpaper, path), key=lambda p: p.stat().st_size)
    wallpapers = [read_image(path) for path in largest.values()]
    for image in wallpapers:
        image.thumbnail((8 * size, 8 * size))
    for material, part in zip((train, val), _split(wallpapers, TRAIN_WALLPAPERS, (seed, len(CLASSES))), strict=True):
        if not part:
            raise UserError(f"found {len(wallpapers)} JPEG wallpapers in {folder}/usr/share: unpack {PACKAGES}")
        material.wallpapers.extend(part)
    return train, val


def _stamp(path: Path, size: int) -> Image.Image:
    """Read a stamp, cut to what is visible of it."""
    with opened(path) as file:
        image = file.convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox())
    image.thumbnail((size, size))
    return image


def _split(items: Sequence[Image.Image], share: float, key: tuple[int, int]) -> tuple[list, list]:
    order = np.random.default_rng(key).permutation(len(items))
    first = round(share * len(items))
    return [items[i] for i in order[:first]], [items[i] for i in order[first:]]


def make_scene(material: Material, size: int, key: Sequence[int]) -> tuple[Image.Image, np.ndarray, int]:
    """Compose a scene.

    Args:
        size: side of the scene in pixels.
        key: determines the scene, (seed, part, index).

    Returns:
        (RGB image, mask uint8 [size, size], class of the large object); classes from 1, 0 is the background
    """
    rng = np.random.default_rng(key)
    wallpaper = material.wallpapers[rng.integers(len(material.wallpapers))]
    side = rng.uniform(0.5, 1) * min(wallpaper.size)
    left, top = (rng.uniform(0, length - side) for length in wallpaper.size)
    scene = wallpaper.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side), 2)
    mask, label = np.zeros((size, size), np.uint8), 0
    for shares in [SMALL] * rng.integers(2, 5) + [LARGE]:
        label = int(rng.integers(len(material.stamps))) + 1
        stamps = material.stamps[label - 1]
        stamp = stamps[rng.integers(len(stamps))]
        scale = rng.uniform(*shares) * size / max(stamp.size)
        stamp = stamp.resize([max(1, round(scale * length)) for length in stamp.size], reducing_gap=2)
        if rng.integers(2):
            stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        stamp = stamp.rotate(rng.uniform(-MAX_ANGLE, MAX_ANGLE), Image.Resampling.BICUBIC, expand=True)
        x, y = (int(rng.integers(size - length + 1)) for length in stamp.size)
        scene.paste(stamp, (x, y), stamp)
        mask[y : y + stamp.height, x : x + stamp.width][np.asarray(stamp.getchannel("A")) > 127] = label
    return scene, mask, label


def make_scenes(packages: Path, output: Path, train: int, val: int, size: int, seed: int, jobs: int) -> None:
    """Write scenes with masks and class folders.

    OUTPUT/seen and OUTPUT/new hold images/{train,val}/CLASS/*.png and masks/{train,val}/CLASS/*.png. Both have the same
    training scenes. The validation scenes of `seen` are new scenes of the stamps and wallpapers for training, those of
    `new` consist of stamps and wallpapers that no training scene has.

    Args:
        train, val: numbers of scenes per folder.
        size: side of the scenes in pixels.
        jobs: number of processes.

    Raises:
        UserError: see `read_packages`, or OUTPUT exists or cannot be written.
    """
    if output.exists():
        raise UserError(f"--output {output} exists: give a new folder, or remove it")
    unfinished = output.with_name(f"{output.name}.unfinished")
    materials = read_packages(packages, size, seed)
    parts = [
        Part("seen/{}/train", False, 0, train),
        Part("seen/{}/val", False, 1, val),
        Part("new/{}/val", True, 2, val),
    ]
    names = [*CLASSES]
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        for part in parts:
            for kind, name in itertools.product(("images", "masks"), names):
                (unfinished / part.folder.format(kind) / name).mkdir(parents=True)
        for name in ("seen", "new"):
            (unfinished / name / "classes.txt").write_text("\n".join(["background", *names]) + "\n")
        for kind in ("images", "masks"):
            (unfinished / "new" / kind / "train").symlink_to(Path("../../seen") / kind / "train")
        with ProcessPoolExecutor(jobs, initializer=_keep, initargs=(materials, unfinished, size, seed)) as pool:
            for part in parts:
                list(pool.map(_write_scene, [part] * part.scenes, range(part.scenes), chunksize=64))
        unfinished.rename(output)
    except OSError as error:
        raise UserError(f"cannot write the scenes of --output {output}: {error.strerror}") from error
    print(f"{train} training and 2 × {val} validation scenes in {output}")


_state: tuple[tuple[Material, Material], Path, int, int]  # of a process


def _keep(*state) -> None:
    global _state
    _state = state


def _write_scene(part: Part, index: int) -> None:
    materials, output, size, seed = _state
    image, mask, label = make_scene(materials[part.validation], size, (seed, part.stream, index))
    for kind, picture in (("images", image), ("masks", palette_image(mask))):
        picture.save(output / part.folder.format(kind) / [*CLASSES][label - 1] / f"{index:06}.png")


def palette_image(mask: np.ndarray) -> Image.Image:
    """Return a mask as a palette image with one color per class."""
    picture = Image.fromarray(mask)
    colors = [colorsys.hsv_to_rgb(i / len(CLASSES), 0.8, 1 - 0.3 * (i % 2)) for i in range(len(CLASSES))]
    picture.putpalette([0, 0, 0, *(round(255 * value) for color in colors for value in color)])
    return picture
