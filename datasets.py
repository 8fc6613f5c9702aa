"""Where images come from: folders, CIFAR-10, ImageNet subsets, built-in digits and photographs, Copydays, Oxford/Paris.

Every data set gives (image, label): the image as PIL RGB, or what `transform` makes of it; the label as an int, -1
where there is none.

    python datasets.py IMAGENET --output_dir LISTS

writes the two lists of images that copy detection needs, see `copydays_lists`.
"""

import importlib
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import Dataset, Sampler

import utils
from plain_pickle import read_plain_pickle
from utils import UserError

DATASETS = ("folder", "cifar10", "imagenet100", "digits", "photographs")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".tif", ".tiff", ".webp")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
MOST_PIXELS = 2**26  # 8192×8192: 200 MB to decode; --on_bad_image says what happens to a larger one
IMAGENET100_CLASSES = Path(__file__).parent / "recipes" / "imagenet100_cmc.txt"


def build_dataset(name, data_path=None, split="train", transform=None, classes=None, download=False, least_side=None):
    """Open a data set.

    Args:
        name: "folder", all images below `data_path`, classes being its direct subfolders, if any;
            "imagenet100", the same restricted to a list of classes;
            "cifar10", torchvision's CIFAR-10 in `data_path`;
            "digits", scikit-learn's 1,797 scanned digits of 8×8 pixels, 1,400 for training and 397 for validation.
            "photographs", cuttings of photographs that scikit-learn and scikit-image ship.
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
    if name == "photographs":
        return Photographs(split, transform)
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
        root: the folder of the part that is read.
        upright: see `read_image`.
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
        self.root, self.transform, self.least_side, self.upright = root, transform, least_side, True
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
        image = read_image(self.paths[index], self.least_side, self.upright)
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


# name: (package that ships it, its place there)
PHOTOGRAPHS = {name: ("sklearn.datasets", f"images/{name}.jpg") for name in ("china", "flower")} | {
    name.split(".")[0]: ("skimage.data", name)
    for name in (
        "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png gravel.png "
        "hubble_deep_field.jpg moon.png motorcycle_left.png retina.jpg rocket.jpg"
    ).split()
}


def photograph(name):
    """Return the path of one of PHOTOGRAPHS, which are on the disk with scikit-learn and scikit-image.

    Raises:
        UserError: scikit-image is not installed, or lacks it.
    """
    package, place = PHOTOGRAPHS[name]
    try:
        path = Path(importlib.import_module(package).__file__).parent / place
    except ImportError as error:
        raise UserError(f"the photograph {name} comes with scikit-image: pip install scikit-image") from error
    if not path.is_file():
        raise UserError(f"this scikit-image lacks {path}: pip install --upgrade scikit-image")
    return path


class Photographs(Dataset):
    """Square cuttings of 15 photographs, the label being the photograph: something to learn from without a download.

    A photograph is brought to a shorter side of 320 pixels, a cutting has 128. Those for training lie anywhere but in
    the last 128 columns, those for validation there.
    """

    SIDE, CUTTINGS = 128, {"train": 100, "val": 20}  # of a photograph

    def __init__(self, split="train", transform=None):
        self.transform, self.images, self.classes, self.labels = transform, [], [], []
        for label, name in enumerate(sorted(PHOTOGRAPHS)):
            image = read_image(photograph(name))
            scale = 320 / min(image.size)
            image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
            count, last = self.CUTTINGS[split], image.width - self.SIDE
            rng = np.random.default_rng((label, split == "val"))
            lefts = [last] * count if split == "val" else rng.integers(last - self.SIDE + 1, size=count)
            tops = rng.integers(image.height - self.SIDE + 1, size=count)
            for left, top in zip(map(int, lefts), map(int, tops), strict=True):
                self.images.append(image.crop((left, top, left + self.SIDE, top + self.SIDE)))
            self.classes.append(name)
            self.labels += [label] * count

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
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


class ImageList(Dataset):
    """The images of a list of paths, without labels.

    Args:
        upright: see `read_image`.
    """

    def __init__(self, paths, transform=None, upright=True):
        self.paths, self.transform, self.upright = list(map(str, paths)), transform, upright
        self.labels = [-1] * len(self.paths)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = read_image(self.paths[index], upright=self.upright)
        return (self.transform(image) if self.transform else image), -1


def listed_images(source):
    """Return the paths of the images below a folder, as ImageFolder, or of those that a text file lists, one a line.

    A relative path in a file is looked for beside the file.

    Raises:
        UserError: there is no such folder or file, or it names no image, or one that is missing.
    """
    source = Path(source)
    if source.is_dir():
        return [Path(path) for path in ImageFolder(source).paths]
    try:
        paths = [source.parent / line.strip() for line in source.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"cannot read {source} ({reason}): expected a folder of images, or a list of paths") from error
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        found = (
            f"{len(missing)} of its {len(paths)} images are missing, the first is {missing[0]}" if missing else "empty"
        )
        raise UserError(f"the list {source} cannot be used: {found}")
    return paths


# --- Copydays

COPYDAYS_SIZES = {"original": 157, "strong": 229}
COPYDAYS_BLOCKS = ["strong"]
COPYDAYS_BLOCKS += [f"jpegqual/{quality}" for quality in (3, 5, 8, 10, 15, 20, 30, 50, 75)]
COPYDAYS_BLOCKS += [f"crops/{percent}" for percent in (10, 15, 20, 30, 40, 50, 60, 70, 80)]


def copydays(root):
    """Find the images of INRIA Copydays.

    Args:
        root: folder with `original/*.jpg`, `strong/*.jpg`, and where present `jpegqual/*/*.jpg` and `crops/*/*.jpg`.

    Returns:
        (blocks, positives): lists of paths, {"original": ..., "strong": ..., ...}, and for each block but the originals
        the places in `blocks["original"]` that each of its images is a copy of: those whose names begin with the same
        four characters.

    Raises:
        UserError: the layout is another, or an image has no original.
    """
    root = Path(root)
    blocks = {}
    for name in ["original", *COPYDAYS_BLOCKS]:
        folder = root / name
        paths = [path for path in folder.iterdir() if _has_image_name(path.name)] if folder.is_dir() else []
        if not paths and name in COPYDAYS_SIZES:
            raise UserError(
                f"no images in {folder}: Copydays is {root}/original/*.jpg and {root}/strong/*.jpg, "
                "and where present jpegqual/*/*.jpg and crops/*/*.jpg"
            )
        if paths:
            blocks[name] = sorted(paths)
    positives = {}
    for name in list(blocks)[1:]:
        positives[name] = [
            [i for i, original in enumerate(blocks["original"]) if original.name[:4] == path.name[:4]]
            for path in blocks[name]
        ]
        for path, found in zip(blocks[name], positives[name], strict=True):
            if not found:
                raise UserError(f"{path} has no original: expected {root}/original/{path.name[:4]}*.jpg")
    return blocks, positives


def copydays_lists(root, count_whitening=20000, count_distractors=10000, seed=0, classes=IMAGENET100_CLASSES):
    """Draw the two disjoint sets of images of the paper's section 4.3.1: ImageNet without the classes of ImageNet-100.

    Args:
        root: ImageNet's training images in class folders, or the folder that holds `train` and `val`.
        seed: with the same images the same lists.
        classes: file with the class folders to leave out.

    Returns:
        (whitening, distractors): lists of absolute paths

    Raises:
        UserError: a class is missing, or there are too few images.
    """
    folder = ImageFolder(root)
    left_out = {path.name for path in _listed_folders(folder.root, classes)}
    paths = [
        path
        for path, label in zip(folder.paths, folder.labels, strict=True)
        if label >= 0 and folder.classes[label] not in left_out
    ]
    count = count_whitening + count_distractors
    if len(paths) < count:
        raise UserError(f"{root} has {len(paths)} images outside the classes of {classes}, expected at least {count}")
    drawn = np.random.default_rng(seed).choice(len(paths), count, replace=False)
    chosen = [os.path.abspath(paths[i]) for i in drawn]
    return chosen[:count_whitening], chosen[count_whitening:]


# --- revisited Oxford and Paris


class RevisitedRetrieval:
    """Revisited Oxford (roxford5k) or Paris (rparis6k).

    Args:
        root: folder that holds NAME/gnd_NAME.pkl and NAME/jpg/*.jpg.

    Attributes:
        database, queries: paths of the images.
        boxes: of each query, (left, top, right, bottom) in pixels.
        relevance: of each query {"easy", "hard", "junk"}: places in the database.

    Raises:
        UserError: a file is missing or is not what it should be.
    """

    def __init__(self, root, name):
        folder = Path(root) / name
        path = folder / f"gnd_{name}.pkl"
        layout = f"expected {folder}/gnd_{name}.pkl and {folder}/jpg/*.jpg"
        if not path.is_file():
            raise UserError(f"no ground truth {path}: {layout}")
        contents = read_plain_pickle(path)
        try:
            names = {part: [str(name) for name in contents[part]] for part in ("imlist", "qimlist")}
            self.relevance = [
                {kind: np.array(entry[kind], np.int64).ravel().tolist() for kind in ("easy", "hard", "junk")}
                for entry in contents["gnd"]
            ]
            self.boxes = [tuple(float(value) for value in entry["bbx"]) for entry in contents["gnd"]]
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{path} is no ground truth of {name}: expected imlist, qimlist, and gnd with easy, hard, junk and bbx"
            ) from error
        self.database, self.queries = (
            [folder / "jpg" / f"{name}.jpg" for name in names[part]] for part in ("imlist", "qimlist")
        )
        if len(self.queries) != len(self.relevance):
            raise UserError(f"{path} has {len(self.queries)} queries, but relevance for {len(self.relevance)}")
        if not self.queries:
            raise UserError(f"{path} has no queries")
        for query, relevance, box in zip(names["qimlist"], self.relevance, self.boxes, strict=True):
            if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
                raise UserError(f"{path}: query {query} has the box {box}, expected left, top, right, bottom")
            both = set(relevance["easy"] + relevance["hard"]) & set(relevance["junk"])
            if both or set(relevance["easy"]) & set(relevance["hard"]):
                raise UserError(f"{path}: query {query} has images that are more than one of easy, hard and junk")
            wrong = [i for part in relevance.values() for i in part if not 0 <= i < len(self.database)]
            if wrong:
                raise UserError(f"{path}: query {query} names image {wrong[0]} of {len(self.database)}")
            if not relevance["easy"] + relevance["hard"]:
                raise UserError(f"{path}: query {query} has no relevant image, neither easy nor hard")
        missing = [path for path in self.queries + self.database if not path.is_file()]
        if missing:
            raise UserError(f"{len(missing)} images are missing, the first is {missing[0]}: {layout}")


# --- reading


def _has_image_name(name):
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def read_image(path, least_side=None, upright=True):
    """Decode an image of any PIL mode to RGB, transparent parts on white.

    Args:
        least_side: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, as far as both sides keep that many pixels.
        upright: turn it by its EXIF tag.

    What decodes, and what counts as bad:

    | file | outcome |
    |---|---|
    | grayscale, palette, bilevel, CMYK, with transparency | decodes |
    | 16-bit grayscale | decodes, scaled to 8 bits |
    | animated, or of several pages | decodes, the first |
    | 1×1, 20,000×10 | decodes |
    | with a broken EXIF block | decodes, not turned |
    | with a broken ICC profile | decodes; profiles are not applied |
    | truncated, empty, no image, damaged | bad |
    | more than MOST_PIXELS by its header | bad, and not decoded |
    | of another format than FORMATS, whatever its name | bad: some of Pillow's decoders start other programs |

    Raises:
        UserError: it is bad.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels are more than {MOST_PIXELS}")
            if least_side:
                image.draft(None, (least_side, least_side))
            image.load()
            if upright:
                image = _turned_upright(image)
            if image.mode.startswith("I"):
                levels = np.asarray(image, np.int64)
                return Image.fromarray((levels.clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                return Image.alpha_composite(white, image).convert("RGB")
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise _unreadable(path, error) from error


def _unreadable(path, error):
    return UserError(f"cannot read image {path}: {utils.first_line(error)}")


def _turned_upright(image):
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the block is broken, and the image is as good without it
        return image


def image_size(path):
    """Return (width, height) as a file's header says them.

    Raises:
        UserError: it has no such header.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except Exception as error:
        raise _unreadable(path, error) from error


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
    samples for any number of processes and of accumulated batches. An incomplete last step is left out, or, without
    `drop_last`, shared out as far as it goes: then the last batches may be short or empty.

    Attributes:
        epoch: of the next iteration.
        first_step: of the next iteration, within the epoch; those before are left out.
        steps: in an epoch.
    """

    def __init__(self, length, batch_size, accum_steps=1, rank=0, world_size=1, seed=0, drop_last=True):
        self.length, self.batch_size, self.accum_steps = length, batch_size, accum_steps
        self.rank, self.world_size, self.seed = rank, world_size, seed
        step_size = batch_size * accum_steps * world_size
        self.steps = length // step_size if drop_last else -(-length // step_size)
        self.epoch = self.first_step = 0

    def __len__(self):
        return (self.steps - self.first_step) * self.accum_steps

    def __iter__(self):
        samples = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        for i in range(self.first_step, self.steps):
            for part in range(self.accum_steps):
                start = ((i * self.world_size + self.rank) * self.accum_steps + part) * self.batch_size
                yield self.epoch, self.epoch * self.steps + i, samples[start : start + self.batch_size].tolist()


def main(argv=None):
    parser = utils.ArgumentParser(description="Write the lists of images that copy detection needs (section 4.3.1).")
    add = parser.add_argument_group("images").add_argument
    add("imagenet", help="ImageNet: class folders, or train and val with class folders")
    add("--classes", default=IMAGENET100_CLASSES, help="file with the class folders to leave out")
    add = parser.add_argument_group("lists").add_argument
    add("--output_dir", default=".", help="folder of whitening.txt and distractors.txt")
    add("--whitening", type=utils.number(int, 1), default=20000, help="number of images in whitening.txt")
    add("--distractors", type=utils.number(int, 1), default=10000, help="number of images in distractors.txt")
    add("--seed", type=utils.number(int, 0), default=0, help="of the drawing")
    args = parser.parse_args(argv)
    lists = copydays_lists(args.imagenet, args.whitening, args.distractors, args.seed, args.classes)
    folder = Path(args.output_dir)
    for name, paths in zip(("whitening", "distractors"), lists, strict=True):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            utils.write_text("".join(f"{path}\n" for path in paths), folder / f"{name}.txt")
        except OSError as error:
            raise UserError(f"cannot write to --output_dir {folder}: {error.strerror}") from error
        print(f"{len(paths)} images in {folder / name}.txt", flush=True)


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
