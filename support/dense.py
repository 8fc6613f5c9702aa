"""Segmentation by the patch tokens of a frozen network: annotated images, k-NN over patches, a linear layer, IoU."""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Subset

from augment import MEAN, STD
from support.decoding import image_size, opened
from support.features import Network, whole_transform
from support.folders import listed_images, read_lines
from support.images import ImageList, Paths
from support.loader import fit_workers, open_loader
from utils import UserError, printable

IGNORED = 255  # label of the pixels that count for nothing
BATCH = 60  # images per step of the linear layer
SIMILARITIES = 2**26  # computed at a time, 256 MiB
VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()
Grid = tuple[int, int]  # rows and columns of patches
Scorer = Callable[[Tensor], Tensor]  # tokens [m, D] -> scores of the classes [m, C]


class AnnotatedImages(ImageList):
    """The images of a split with a mask each, which gives the class of every pixel.

    Item i is (normalized float [3, S, S], LongTensor [S, S]): the image resized without cropping, bicubic, and its mask
    resized to the nearest pixel.

    The folder holds images/SPLIT/NAME.* and masks/SPLIT/NAME.png, in subfolders or not, or it is the folder VOC2012 of
    Pascal VOC, or holds VOCdevkit/VOC2012. A mask is an image with a palette or 8-bit gray levels, whose values are
    classes, or IGNORED. All masks are read once when a split is opened.

    Args:
        data_path: the folder.
        split: "train" or "val".
        side: S, in pixels.
        classes: names of the classes, of another split. None: Pascal VOC's; or the lines of classes.txt in the folder;
            or numbers up to the largest label.

    Raises:
        UserError: there are no images, a mask is missing, cannot be read or has another size than its image, a label
            is beyond the classes, all pixels are ignored, or there is only one class.
    """

    def __init__(self, data_path: str | Path, split: str, side: int, classes: Sequence[str] | None = None) -> None:
        root = voc_folder(Path(data_path))
        paths, masks = annotated_files(Path(data_path), split) if root is None else voc_files(root, split)
        super().__init__(paths, whole_transform(side), upright=False)
        self.root, self.side, self.masks = root or Path(data_path), side, Paths(map(str, masks))
        names = self.root / "classes.txt"
        known = classes or (VOC_CLASSES if root else read_lines(names) if names.exists() else None)
        if known and len({*known}) < len(known):
            raise UserError(f"{names} names a class twice: expected a name per line, all different")
        used = np.zeros(IGNORED + 1, bool)
        for i, path in enumerate(self.paths):
            mask = np.asarray(read_mask(self.masks[i]))
            self.labels[i] = zlib.crc32(mask.tobytes())  # tells results on other masks apart
            if mask.shape[::-1] != (size := image_size(path)):
                sides = [f"{width}x{height} pixels" for width, height in (mask.shape[::-1], size)]
                raise UserError(f"the mask {printable(self.masks[i])} has {sides[0]}, its image {sides[1]}")
            labels = np.bincount(mask.ravel(), minlength=len(used)) > 0
            if known and (beyond := np.flatnonzero(labels[len(known) : IGNORED])).size:
                found = f"the mask {printable(self.masks[i])} has the label {beyond[0] + len(known)}"
                of = "the training masks or classes.txt" if classes else names.name if names.exists() else "Pascal VOC"
                raise UserError(f"{found}: expected 0 to {len(known) - 1}, the classes of {of}, or {IGNORED} to ignore")
            used |= labels
        if not used[:IGNORED].any():
            raise UserError(f"no {split} image of {data_path} is annotated: all pixels of its masks are {IGNORED}")
        self.classes = known or [str(label) for label in range(np.flatnonzero(used[:IGNORED])[-1] + 1)]
        if len(self.classes) < 2:
            raise UserError(f"the {split} masks of {data_path} have only one class, {self.classes[0]}: expected two")

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def item_bytes(self) -> int:
        return 20 * self.side**2  # 3 floats and an int64 per pixel

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return super().__getitem__(index)[0], self.mask(index, self.side)

    def mask(self, index: int, side: int) -> Tensor:
        """Return a mask resized to the nearest pixel: LongTensor [side, side]."""
        image = read_mask(self.masks[index]).resize((side, side), Image.Resampling.NEAREST)
        return torch.from_numpy(np.array(image)).long()

    def keep(self, indices: Sequence[int]) -> None:
        super().keep(indices)
        self.masks = self.masks.keep(indices)


def read_mask(path: str | Path) -> Image.Image:
    """Read a mask: an image in Pillow's mode L or P, whose values are classes, or IGNORED.

    Raises:
        UserError: the file cannot be read, or is an image in another mode.
    """
    with opened(path) as image:
        if image.mode not in ("L", "P"):
            raise ValueError(f"found a mask in mode {image.mode}, expected a palette or 8-bit gray levels")
        return image.copy()


def open_annotated(data_path: str | Path, side: int) -> dict[str, AnnotatedImages]:
    """Open both splits of a folder, {"train": images, "val": images}, with the same classes. See AnnotatedImages.

    Raises:
        UserError: as AnnotatedImages.
    """
    train = AnnotatedImages(data_path, "train", side)
    return {"train": train, "val": AnnotatedImages(data_path, "val", side, train.classes)}


def voc_folder(data_path: Path) -> Path | None:
    """Return the folder VOC2012 that a path is or contains, or None."""
    folders = data_path, data_path / "VOCdevkit" / "VOC2012"
    return next((folder for folder in folders if (folder / "ImageSets" / "Segmentation").is_dir()), None)


def voc_files(root: Path, split: str) -> tuple[list[Path], list[Path]]:
    """Return the images and masks of a split of Pascal VOC, given its folder VOC2012."""
    names = read_lines(root / "ImageSets" / "Segmentation" / f"{split}.txt")
    images = [root / "JPEGImages" / f"{name}.jpg" for name in names]
    return existing(images), existing([root / "SegmentationClass" / f"{name}.png" for name in names])


def annotated_files(root: Path, split: str) -> tuple[list[Path], list[Path]]:
    """Return the images below images/SPLIT, sorted, and their masks below masks/SPLIT."""
    folder, masks = root / "images" / split, root / "masks" / split
    if not folder.is_dir() or not masks.is_dir():
        lacks = f"images/{split} or masks/{split}: expected images and masks, each with train and val"
        raise UserError(f"{root} lacks {lacks}; or Pascal VOC's VOCdevkit/VOC2012")
    images = listed_images(folder)
    return images, existing([(masks / path.relative_to(folder)).with_suffix(".png") for path in images])


def existing(paths: list[Path]) -> list[Path]:
    """Return the paths. Raises UserError if a file is missing."""
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(f"{len(missing)} of {len(paths)} files are missing, the first is {printable(missing[0])}")
    return paths


class PatchColors(nn.Module):
    """A baseline without a network: the colors of a patch and its place.

    A token has the cosine and the sine of 14 angles: of red, green and blue in the four quarters of the patch, and of
    its row and column. So the cosine of two tokens falls with the difference of each of these.
    """

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.register_buffer("side", torch.tensor(patch_size))  # so that the hash of the network depends on it

    def forward(self, images: Tensor) -> Tensor:
        """Map normalized images [B, 3, H, W] to tokens [B, 1+P, 28]. The CLS token is 0."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        h, w = (side // self.patch_size for side in images.shape[2:])
        colors = F.pixel_unshuffle(F.adaptive_avg_pool2d(images * std + mean, (2 * h, 2 * w)), 2)  # [B, 12, h, w]
        rows, columns = (torch.linspace(-1, 1, n).to(images) for n in (h, w))
        place = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(len(images), -1, -1, -1)
        angles = torch.cat([1.5 * math.pi * colors, place], 1)  # black and white are 3/4 of a turn apart
        weights = images.new_tensor([0.5] * 12 + [1, 1])[:, None, None]  # a color has four parts
        tokens = torch.cat([weights * angles.cos(), weights * angles.sin()], 1)
        return F.pad(tokens.flatten(2).transpose(1, 2), (0, 0, 1, 0))


def patch_tokens(backbone: Network, normalized: bool = True) -> Network:
    """Return a network: images [B, 3, H, W] -> patch tokens [B, P, D], L2-normalized or as they are."""
    return lambda images: F.normalize(backbone(images)[:, 1:], dim=2) if normalized else backbone(images)[:, 1:]


def patch_shares(masks: Tensor, grid: Grid, num_classes: int, ignore_index: int = IGNORED) -> Tensor:
    """Return the share of each class among the pixels of a patch.

    Args:
        masks: LongTensor [n, H, W].
        grid: (h, w), numbers of patches, which divide H and W.

    Returns:
        float [n, h*w, num_classes]. An ignored pixel counts for no class: the shares of its patch sum to less than 1.
    """
    (n, height, width), (h, w) = masks.shape, grid
    pixels = masks.reshape(n, h, height // h, w, width // w).transpose(2, 3).reshape(n * h * w, -1)
    index = torch.arange(n * h * w, device=masks.device)[:, None] * num_classes + pixels
    counts = torch.bincount(index[pixels != ignore_index], minlength=n * h * w * num_classes)
    return counts.view(n, h * w, num_classes) / pixels.shape[1]


def knn_segment(memory: Tensor, shares: Tensor, queries: Tensor, k: int = 30, temperature: float = 0.02) -> Tensor:
    """Label patches by the k most similar patches of a memory (in-context segmentation, Hummingbird).

    A query gets the mean of its neighbours' class shares, weighted by the softmax of similarity / temperature. The
    similarity is the dot product: L2-normalize the tokens first to get the cosine. The search is exact, in chunks of
    at most SIMILARITIES.

    Args:
        memory, queries: tokens [M, D] and [m, D].
        shares: [M, C], see `patch_shares`.
        k: number of neighbours; M if that is less.

    Returns:
        [m, C]
    """
    scores = queries.new_zeros(len(queries), shares.shape[1])
    k = min(k, len(memory))
    chunk = max(1, SIMILARITIES // max(len(memory), k * shares.shape[1]))
    for tokens, scores_of_chunk in zip(queries.split(chunk), scores.split(chunk), strict=True):
        similarity, neighbours = (tokens @ memory.T).topk(k)  # [chunk, k]
        weights = (similarity / temperature).softmax(1)
        scores_of_chunk += (weights[:, None] @ shares[neighbours].to(weights))[:, 0]
    return scores


def match_features(features_a: Tensor, features_b: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest neighbour of each feature by cosine, exactly.

    Args:
        features_a, features_b: [n, D] and [m, D], not necessarily normalized.

    Returns:
        (index, similarity): for each of a, its neighbour in b, LongTensor [n], and their cosine, [n]
    """
    a, b = F.normalize(features_a, dim=1), F.normalize(features_b, dim=1)
    best = [(chunk @ b.T).max(1) for chunk in a.split(max(1, SIMILARITIES // len(b)))]
    return torch.cat([chunk.indices for chunk in best]), torch.cat([chunk.values for chunk in best])


def train_layer(
    tokens: Tensor,
    masks: Tensor,
    num_classes: int,
    device: torch.device,
    lr: float = 0.01,
    epochs: int = 25,
    drop_at: int = 20,
    seed: int = 0,
) -> nn.Linear:
    """Train a linear layer that classifies patches, by SGD on interpolated logits (Leopart's protocol).

    Momentum is 0.9, weight decay 1e-4, a step has BATCH images. Weights are drawn with standard deviation 0.01. The
    loss is the mean cross-entropy over the pixels of a step that are not ignored.

    Args:
        tokens: [n, P, D] of square images, on the CPU.
        masks: uint8 [n, S, S]. Logits are interpolated to S×S.
        drop_at: number of epochs after which the learning rate is divided by 10.

    Raises:
        UserError: the loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(tokens.shape[2], num_classes, dtype=tokens.dtype)
    nn.init.normal_(layer.weight, std=0.01, generator=generator)
    nn.init.zeros_(layer.bias)
    layer.to(device)
    optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = lr * (0.1 if epoch >= drop_at else 1)
        for indices in torch.randperm(len(tokens), generator=generator).split(BATCH):
            logits = interpolated(layer(tokens[indices].to(device)), square(tokens), masks.shape[1])
            targets = masks[indices].to(device).long()
            total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
            loss = total / (targets != IGNORED).sum().clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if not loss.isfinite():
            raise UserError(f"the loss of the linear layer is {loss.item()} in epoch {epoch + 1}: use a smaller --lr")
    return layer


def interpolated(scores: Tensor, grid: Grid, size: int) -> Tensor:
    """Interpolate the scores of patches bilinearly: [n, h*w, C] with the grid (h, w) -> [n, C, size, size]."""
    return F.interpolate(scores.transpose(1, 2).unflatten(2, grid), (size, size), mode="bilinear")


def upsample(scores: Tensor, grid: Grid, size: int) -> Tensor:
    """Interpolate the classes' scores of patches bilinearly, and return the best class of each pixel.

    Args:
        scores: [n, h*w, C].
        grid: (h, w).
        size: side of the result in pixels.

    Returns:
        LongTensor [n, size, size]
    """
    return torch.cat([interpolated(part, grid, size).argmax(1) for part in scores.split(8)])


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int = IGNORED) -> Tensor:
    """Count pixels by true and predicted class. The matrices of parts of a data set add up.

    Args:
        prediction, target: LongTensors of the same shape.

    Returns:
        LongTensor [num_classes, num_classes], with true classes in rows. Pixels whose target is ignored do not count.
    """
    kept = target != ignore_index
    index = target[kept] * num_classes + prediction[kept]
    return torch.bincount(index, minlength=num_classes**2).view(num_classes, num_classes)


def class_ious(confusion: Tensor) -> Tensor:
    """Return the intersection over union of each class: double [C], NaN for a class that does not occur."""
    confusion = confusion.double()
    both = confusion.diagonal()
    return both / (confusion.sum(0) + confusion.sum(1) - both)


def segmentation_metrics(confusion: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Return the metrics of a segmentation in percent: mean IoU, that without class 0, pixel accuracy, IoU per class.

    A class that occurs neither in the masks nor in the prediction has the IoU None and does not count in the means.

    Args:
        confusion: see `confusion_matrix`.
        classes: their names. Class 0 is the background.
    """
    ious = 100 * class_ious(confusion).cpu()
    accuracy = 100 * confusion.diagonal().sum().double() / confusion.sum()
    means = {"miou": ious.nanmean(), "miou_objects": ious[1:].nanmean(), "pixel_accuracy": accuracy}
    defined = {name: None if value.isnan() else float(value) for name, value in means.items()}
    return defined | {"iou": {c: None if v.isnan() else float(v) for c, v in zip(classes, ious, strict=True)}}


def mean_iou(prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int = IGNORED) -> float:
    """Return the mean intersection over union, in [0, 1], of the classes that occur in the prediction or the target.

    Args:
        prediction, target: LongTensors [n, H, W]. Pixels whose target is `ignore_index` do not count.
    """
    return float(class_ious(confusion_matrix(prediction, target, num_classes, ignore_index)).nanmean())


def annotated_batches(
    images: AnnotatedImages, device: torch.device, batch_size: int, num_workers: int
) -> Iterator[tuple[range, Tensor, Tensor]]:
    """Yield (indices, images [b, 3, S, S], masks [b, S, S]) of this process's share of a data set, on a device.

    Rank r has the images r, r + world_size, ...
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = range(rank, len(images), world_size)
    workers = fit_workers(num_workers, batch_size * images.item_bytes)
    loader = open_loader(Subset(images, own), workers, device, batch_size=batch_size)
    for i, (pixels, masks) in enumerate(loader):
        on_device = (x.to(device, non_blocking=True) for x in (pixels, masks))
        yield own[i * batch_size : (i + 1) * batch_size], *on_device


@torch.no_grad()
def patch_memory(
    network: Network,
    images: AnnotatedImages,
    device: torch.device,
    batch_size: int,
    num_workers: int = 2,
    memory_size: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Extract the patches of annotated images and their classes, with all processes: the memory of `knn_segment`.

    Args:
        network: images [B, 3, S, S] -> tokens [B, P, D], see `patch_tokens`; on `device`.
        memory_size: number of patches, drawn from all with `seed`; only these are held. None: all. Of these, patches
            with ignored pixels alone are left out.

    Returns:
        (tokens [M, D], shares [M, C]) on `device`, the same on all processes, in the order of the images

    Raises:
        UserError: no patch is left.
    """
    rows, chosen = [], torch.empty(0)
    for indices, pixels, masks in annotated_batches(images, device, batch_size, num_workers):
        tokens = network(pixels)
        shares, count = patch_shares(masks, square(tokens), images.num_classes), tokens.shape[1]
        if not len(chosen):
            order = torch.randperm(len(images) * count, generator=torch.Generator().manual_seed(seed))
            chosen = torch.zeros(len(order), dtype=torch.bool).index_fill(0, order[:memory_size], True)
        places = torch.tensor(indices)[:, None] * count + torch.arange(count)
        kept = chosen[places] & (shares.sum(2) > 0).cpu()
        rows.append((places[kept], tokens.cpu()[kept], shares.cpu()[kept]))
    if dist.is_initialized():
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, rows)
        rows = sum(gathered, [])
    order, memory, of_memory = (torch.cat(parts) for parts in zip(*rows, strict=True))
    if not len(order):
        raise UserError(f"no patch of the memory has a label, of {len(images)} training images: use more patches")
    if dist.is_initialized():
        order = order.argsort()
        memory, of_memory = memory[order], of_memory[order]
    return memory.to(device), of_memory.to(device)


def square(tokens: Tensor) -> Grid:
    """Return the grid of the patches of square images, given their tokens [B, P, D]."""
    return (math.isqrt(tokens.shape[1]),) * 2


@torch.no_grad()
def segment(network: Network, scorer: Scorer, images: Tensor) -> Tensor:
    """Return the class of each pixel: images [B, 3, S, S] -> LongTensor [B, S, S].

    Args:
        network: images -> tokens [B, P, D].
        scorer: of tokens, such as `knn_segment` with a memory.
    """
    tokens = network(images)
    scores = scorer(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
    return upsample(scores, square(tokens), images.shape[-1])


def segmentation_confusion(
    network: Network,
    scorer: Scorer,
    images: AnnotatedImages,
    device: torch.device,
    batch_size: int,
    num_workers: int = 2,
) -> Tensor:
    """Segment annotated images with all processes and return the confusion matrix of all pixels, see `segment`."""
    confusion = torch.zeros(images.num_classes, images.num_classes, dtype=torch.long, device=device)
    for _, pixels, masks in annotated_batches(images, device, batch_size, num_workers):
        confusion += confusion_matrix(segment(network, scorer, pixels), masks, images.num_classes)
    if dist.is_initialized():
        dist.all_reduce(confusion)
    return confusion
