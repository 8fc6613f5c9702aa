"""Where images come from: folders, CIFAR-10, ImageNet subsets and the built-in digits.

Every data set gives (image, label): the image as PIL RGB, or what `transform` makes of it; the label as an int, -1
where there is none.
"""

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import Dataset, Sampler

from utils import UserError

DATASETS = ("folder", "cifar10", "imagenet100", "digits")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".tif", ".tiff", ".webp")
IMAGENET100_CLASSES = Path(__file__).parent / "recipes" / "imagenet100_cmc.txt"


def build_dataset(name, data_path=None, split="train", transform=None, classes=None, download=False, least_side=None):
    """Open a data set.

    Args:
        name: "folder", all images below `data_path`, classes being its direct subfolders, if any;
            "imagenet100", the same restricted to a list of classes;
            "cifar10", torchvision's CIFAR-10 in `data_path`;
            "digits", scikit-learn's 1,797 scanned digits of 8×8 pixels, 1,400 for training and 397 for validation.
        data_path: the folder. Where it has the subfolders `train` and `val`, the one that `split` names is read.
        split: "train" or "val".
        transform: applied to the PIL image.
        classes: a file with one class folder per line; "imagenet100" has a list of its own.
        download: let torchvision fetch CIFAR-10 where it is missing.
        least_side: see `read_image`.

    Raises:
        UserError: the folder or a class is missing, or there are no images.
    """
    if name == "digits":
        return Digits(split, transform)
    if data_path is None:
        raise UserError(f"--dataset {name} needs --data_path, the folder of the images")
    if name == "cifar10":
        return _cifar10(data_path, split, transform, download)
    if name == "imagenet100":
        classes = classes or IMAGENET100_CLASSES
    return ImageFolder(data_path, split, transform, classes, least_side)


class ImageFolder(Dataset):
    """Images below a folder, sorted by path. See `build_dataset`.

    Attributes:
        paths: of the images.
        classes: names of the class folders, the label being the place in this list.
        labels: int per image; -1 for an image that lies in no class folder.
    """

    def __init__(self, root, split="train", transform=None, classes_file=None, least_side=None):
        root = Path(root)
        if not root.is_dir():
            raise UserError(f"no folder {root}: --data_path takes a folder of images, with or without class subfolders")
        if (root / "train").is_dir() and (root / "val").is_dir():
            root = root / split
        self.transform, self.least_side = transform, least_side
        if classes_file is not None:
            folders, loose = _listed_folders(root, classes_file), []
        else:
            entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
            folders = [entry for entry in entries if entry.is_dir()]
            loose = [str(entry) for entry in entries if _has_image_name(entry.name) and not entry.is_dir()]
        found = [(path, -1) for path in loose]
        for label, folder in enumerate(folders):
            # Walking does not ask for the status of each file, of which there may be a million.
            below = [os.path.join(top, name) for top, _, names in os.walk(folder, followlinks=True) for name in names]
            found += [(path, label) for path in sorted(below) if _has_image_name(os.path.basename(path))]
        if not found:
            raise UserError(f"no images below {root}, expected files that end in {' '.join(IMAGE_SUFFIXES)}")
        self.paths, self.labels = [path for path, _ in found], [label for _, label in found]
        self.classes = [folder.name for folder in folders]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = read_image(self.paths[index], self.least_side)
        return (self.transform(image) if self.transform else image), self.labels[index]


class Digits(Dataset):
    """scikit-learn's copy of the UCI handwritten digits, a fixed random split of 1,400 / 397 images."""

    def __init__(self, split="train", transform=None):
        from sklearn.datasets import load_digits  # takes a second, and is rarely needed

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.images))
        order = order[:1400] if split == "train" else order[1400:]
        self.images = np.round(digits.images[order] * (255 / 16)).astype(np.uint8)  # [n, 8, 8], ink is white
        self.labels = digits.target[order].tolist()
        self.classes = [str(i) for i in range(10)]
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = Image.fromarray(self.images[index]).convert("RGB")
        return (self.transform(image) if self.transform else image), self.labels[index]


def _cifar10(data_path, split, transform, download):
    from torchvision.datasets import CIFAR10

    try:
        dataset = CIFAR10(data_path, train=split == "train", transform=transform, download=download)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"no CIFAR-10 in {data_path}, expected {data_path}/cifar-10-batches-py; --download fetches it"
        ) from error
    dataset.labels = dataset.targets
    return dataset


def _listed_folders(root, classes_file):
    try:
        names = Path(classes_file).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list of classes {classes_file}: {error}") from error
    missing = [name for name in names if not (root / name).is_dir()]
    if not names:
        raise UserError(f"the list of classes {classes_file} is empty, expected one class folder a line")
    if missing:
        found = f"lacks {len(missing)} of the {len(names)} class folders in {classes_file}"
        raise UserError(f"{root} {found}, the first is {missing[0]}")
    return [root / name for name in names]


def _has_image_name(name):
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def read_image(path, least_side=None):
    """Decode an image of any PIL mode to RGB, turned upright by its EXIF tag, transparent parts on white.

    16-bit grayscale is scaled to 8 bits. Of several frames the first is taken. A JPEG is decoded at 1/2, 1/4 or 1/8 of
    its size, as far as both sides keep `least_side` pixels.

    Raises:
        UserError: the file cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            if least_side:
                image.draft(None, (least_side, least_side))
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                levels = np.asarray(image, np.int64)
                return Image.fromarray((levels.clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                return Image.alpha_composite(white, image).convert("RGB")
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise UserError(
            f"cannot read image {path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def to_uint8(image):
    """Turn a PIL image into a uint8 tensor [3, H, W]; in memory the colours of a pixel lie together."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class ResizeToTensor:
    """PIL image -> uint8 tensor [3, size, size] (bilinear, aspect not kept); of its own size where `size` is 0."""

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        if self.size and image.size != (self.size, self.size):
            # Antialiased, and with Pillow's result to a level, in a quarter of its time.
            pixels = torch.from_numpy(np.array(image))[None].permute(0, 3, 1, 2)
            return F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)[0]
        return to_uint8(image)


class BatchOrder(Sampler):
    """The keys (epoch, step, sample indices) of one process's batches, shuffled by (seed, epoch).

    A step has `accum_steps` keys. What all processes take in one step is a run of the shuffled samples, the same
    samples for any number of processes and of accumulated batches. An incomplete last step is left out.

    Attributes:
        epoch: of the next iteration.
        steps: in an epoch.
    """

    def __init__(self, length, batch_size, accum_steps=1, rank=0, world_size=1, seed=0):
        self.length, self.batch_size, self.accum_steps = length, batch_size, accum_steps
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.steps = length // (batch_size * accum_steps * world_size)
        self.epoch = 0

    def __len__(self):
        return self.steps * self.accum_steps

    def __iter__(self):
        samples = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        for i in range(self.steps):
            for part in range(self.accum_steps):
                start = ((i * self.world_size + self.rank) * self.accum_steps + part) * self.batch_size
                yield self.epoch, self.epoch * self.steps + i, samples[start : start + self.batch_size].tolist()
