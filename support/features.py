"""Features of images: of whole data sets, computed by any number of processes, and the tokens of a single image."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms.v2 as T
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from augment import MEAN, STD, normalize
from support.decoding import MAX_PIXELS
from support.loader import fit_workers, open_loader
from utils import UserError
from vision_transformer import VisionTransformer

Network = Callable[[Tensor], Tensor]  # images [B, 3, H, W] -> features [B, D]
GATHERED_ROWS = 512  # features per process that are gathered at a time
UNIFORM_LEVELS = 4  # gray levels


def to_pixels() -> Callable:
    """Return the transform PIL image -> normalized float [3, H, W]."""
    return T.Compose([T.PILToTensor(), T.ToDtype(torch.float32, scale=True), T.Normalize(MEAN, STD)])


def eval_transform(crop_size: int) -> Callable:
    """Return DINO's evaluation transform: PIL image -> normalized float [3, crop_size, crop_size].

    The shorter side is resized to 8/7 of `crop_size`, then the center is cropped: 256 and 224 by default in DINO.
    """
    resize = partial(resize_shorter_side, side=crop_size * 8 // 7)
    return T.Compose([resize, T.CenterCrop(crop_size), to_pixels()])


def resize_shorter_side(image: Image.Image, side: int) -> Image.Image:
    """Resize a PIL image to a shorter side of `side` pixels, keeping the aspect ratio.

    Raises:
        UserError: the resized image would have more than MAX_PIXELS.
    """
    width, height = (side * length // min(image.size) for length in image.size)
    if width * height > MAX_PIXELS:
        raise UserError(f"{image.width}x{image.height} pixels are too elongated for a shorter side of {side}")
    return image.resize((width, height), Image.Resampling.BICUBIC)


def whole_transform(side: int) -> Callable:
    """Return the transform PIL image -> normalized float [3, side, side] that resizes without cropping."""
    return T.Compose([T.Resize((side, side), T.InterpolationMode.BICUBIC), to_pixels()])


class RawPixels(nn.Module):
    """A baseline without a network, whose only token is the image minus a mean image [3, S, S], flattened."""

    mean: Tensor

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.embed_dim, self.blocks = mean.numel(), [None]

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, S, S] to tokens [B, 1, 3·S²]."""
        return (images - self.mean).flatten(1)[:, None]

    def get_intermediate_layers(self, images: Tensor, n: int) -> list[Tensor]:
        return [self(images)] * n


def normalized_cls(backbone: Network) -> Network:
    """Return a network: images [B, 3, H, W] -> L2-normalized CLS tokens [B, D], whose dot product is the cosine."""
    return lambda images: F.normalize(backbone(images)[:, 0])


def normalized_patches_mean(backbone: Network) -> Network:
    """Return a network: images [B, 3, H, W] -> L2-normalized means of the patch tokens [B, D]."""
    return lambda images: F.normalize(backbone(images)[:, 1:].mean(1))


@torch.no_grad()
def extract_features(
    network: Network,
    dataset: Dataset,
    device: torch.device,
    batch_size: int = 64,
    num_workers: int = 2,
    title: str | None = "features",
) -> Tensor | None:
    """Apply a network to all images of a data set.

    Rank r computes images r, r + world_size, ..., so that each image is computed once. The features are gathered once,
    at the end. Each process holds the features of its own images; rank 0 holds all of them at the end.

    Args:
        network: on `device`.
        dataset: data set of (normalized image, label). Images of different sizes need a batch size of 1.
        title: text of the progress bar; None: no progress bar.

    Returns:
        features [n, D] on the CPU, of the network's type, in the order of the data set; None on other ranks than 0
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    total = len(dataset)  # type: ignore[arg-type] # all of ours have a length
    own = range(rank, total, world_size)
    batch_bytes = batch_size * dataset[own[0]][0].nbytes if num_workers and own else 0  # as if all had one size
    workers = fit_workers(num_workers, batch_bytes)
    loader = open_loader(Subset(dataset, own), workers, device, batch_size=batch_size)
    bar = tqdm(loader, title, unit="batch", disable=rank > 0 or title is None or not sys.stderr.isatty())
    features, done = torch.empty(0), 0
    for images, _ in bar:
        batch = network(images.to(device, non_blocking=True)).cpu()
        if done == 0:
            features = torch.empty(len(own), batch.shape[1], dtype=batch.dtype)
        features[done : done + len(batch)] = batch
        done += len(batch)
    return features if world_size == 1 else _gather_interleaved(features, total)


def _gather_interleaved(features: Tensor, total: int) -> Tensor | None:
    """Gather the features of `extract_features` on rank 0; rank r holds those of images r, r + world_size, ..."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    everything = torch.empty(total, *features.shape[1:], dtype=features.dtype) if rank == 0 else None
    for start in range(0, -(-total // world_size), GATHERED_ROWS):
        rows = slice(start, start + GATHERED_ROWS)
        gathered: list[Any] | None = [None] * world_size if rank == 0 else None
        dist.gather_object(features[rows].clone(), gathered)  # a slice would be sent with all of its tensor
        for r, features_of_rank in enumerate(gathered or []):
            if everything is not None and len(features_of_rank):
                everything[r::world_size][rows] = features_of_rank
    return everything


def network_input(image: np.ndarray, device: torch.device | str) -> Tensor:
    """Convert an image to a network's input: uint8 [H, W, 3] -> normalized float [1, 3, H, W] on `device`."""
    return normalize(torch.from_numpy(np.ascontiguousarray(image)).to(device).permute(2, 0, 1)[None])


@torch.no_grad()
def cls_attention(backbone: VisionTransformer, image: np.ndarray) -> np.ndarray:
    """Return the attention of CLS to the patches in the last block, which sums to at most 1 per head.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        [heads, rows, columns]
    """
    attention = backbone.get_last_selfattention(network_input(image, backbone.cls_token.device))
    columns = image.shape[1] // backbone.patch_embed.patch_size[1]
    return attention[0, :, 0, 1:].unflatten(1, (-1, columns)).cpu().numpy()  # from [heads, P]


@torch.no_grad()
def patch_features(backbone: VisionTransformer, image: np.ndarray) -> Tensor:
    """Return the patch tokens after the last norm: uint8 [H, W, 3] -> [rows, columns, D]."""
    tokens = backbone.forward(network_input(image, backbone.cls_token.device))
    columns = image.shape[1] // backbone.patch_embed.patch_size[1]
    return tokens[0, 1:].unflatten(0, (-1, columns)).cpu()


def principal_colors(features: list[Tensor], images: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Map patch features to colors: the first three principal components over the patches of all images.

    An image whose pixels differ by at most UNIFORM_LEVELS is gray and not part of the components, whose colors would
    show amplified noise.

    Args:
        features: [rows, columns, D] per image.
        images: uint8 [H, W, 3].

    Returns:
        (colors, explained): per image uint8 [rows, columns, 3], with the middle 98 % of each component's values scaled
        to 0-255; and the share of the variance that each component explains, [3], 0 if all images are uniform
    """
    colors = [np.full((*f.shape[:2], 3), 128, np.uint8) for f in features]
    chosen = [i for i, image in enumerate(images) if np.ptp(image, (0, 1)).max() > UNIFORM_LEVELS]
    if not chosen:
        return colors, np.zeros(3)
    everything = torch.cat([features[i].flatten(0, 1) for i in chosen]).double()
    mean = everything.mean(0)
    covariance = (everything - mean).T @ (everything - mean) / len(everything)
    variance, axes = torch.linalg.eigh(covariance)
    axes, explained = axes[:, -3:].flip(1), variance[-3:].flip(0) / variance.sum().clamp(min=1e-12)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # fix the arbitrary sign of each axis
    projected = {i: (features[i].double() - mean) @ axes for i in chosen}
    low, high = np.quantile(torch.cat([p.flatten(0, 1) for p in projected.values()]), (0.01, 0.99), axis=0)
    for i, p in projected.items():
        colors[i] = (255 * ((p.numpy() - low) / np.maximum(high - low, 1e-12)).clip(0, 1)).round().astype(np.uint8)
    return colors, explained.numpy()
