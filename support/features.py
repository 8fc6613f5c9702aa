"""Features of images: of whole data sets, computed by any number of processes, and the tokens of a single image."""

import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms.v2 as T
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from augment import MEAN, STD, normalize
from support.decoding import MAX_PIXELS
from utils import UserError
from vision_transformer import VisionTransformer

GATHERED_NUMBERS = 2**23  # numbers per process that are gathered at a time
UNIFORM_LEVELS = 4  # gray levels
LEAST_VARIANCE = 0.02  # share of the second moment. A uniform image has 0.004, a photograph of the moon 0.13


def to_pixels() -> Callable:
    """Return the transform PIL image -> normalized float [3, H, W]."""
    return T.Compose([T.PILToTensor(), T.ToDtype(torch.float32, scale=True), T.Normalize(MEAN, STD)])


def eval_transform(crop_size: int) -> Callable:
    """Return DINO's evaluation transform: PIL image -> normalized float [3, crop_size, crop_size].

    The shorter side is resized to 8/7 of `crop_size`, then the center is cropped: 256 and 224 by default in DINO.
    """
    return T.Compose([ResizeShorterSide(crop_size * 8 // 7), T.CenterCrop(crop_size), to_pixels()])


class ResizeShorterSide:
    """Resize a PIL image to a shorter side of `side` pixels, keeping the aspect ratio.

    Raises:
        UserError: the resized image would have more than MAX_PIXELS.
    """

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = (self.side * length // min(image.size) for length in image.size)
        if width * height > MAX_PIXELS:
            raise UserError(
                f"{image.width}x{image.height} pixels are too elongated for a shorter side of {self.side}: "
                f"the resized image would have more than {MAX_PIXELS} pixels"
            )
        return image.resize((width, height), Image.Resampling.BICUBIC)


def whole_transform(side: int) -> Callable:
    """Return the transform PIL image -> normalized float [3, side, side] that resizes without cropping."""
    return T.Compose([T.Resize((side, side), T.InterpolationMode.BICUBIC), to_pixels()])


class RawPixels(nn.Module):
    """A baseline without a network, whose only token is the image minus a mean image [3, S, S], flattened."""

    mean: torch.Tensor

    def __init__(self, mean: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.embed_dim, self.blocks = mean.numel(), [None]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images [B, 3, S, S] to tokens [B, 1, 3·S²]."""
        return (images - self.mean).flatten(1)[:, None]

    def get_intermediate_layers(self, images: torch.Tensor, n: int) -> list[torch.Tensor]:
        return [self(images)] * n


def normalized_cls(backbone: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a network: images [B, 3, H, W] -> L2-normalized CLS tokens [B, D], whose dot product is the cosine."""
    return lambda images: F.normalize(backbone(images)[:, 0])


@torch.no_grad()
def extract_features(
    network: Callable[[torch.Tensor], torch.Tensor],
    dataset: Dataset,
    device: torch.device,
    batch_size: int = 64,
    num_workers: int = 2,
    title: str | None = "features",
    dtype: torch.dtype = torch.float32,
    worker_init_fn: Callable[[int], None] | None = None,
) -> torch.Tensor | None:
    """Apply a network to all images of a data set.

    Rank r computes images r, r + world_size, ..., so that each image is computed once. The features are gathered once,
    at the end. Each process holds the features of its own images; rank 0 holds all of them at the end.

    Args:
        network: images [B, 3, H, W] -> features [B, D].
        dataset: data set of (normalized image, label). Images of different sizes need a batch size of 1.
        title: text of the progress bar; None: no progress bar.
        dtype: dtype of the result.
        worker_init_fn: called in each data-loading process, as in DataLoader.

    Returns:
        features [n, D] on the CPU, in the order of the data set; None on other ranks than 0
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    total = len(dataset)  # type: ignore[arg-type] # all of ours have a length
    own = range(rank, total, world_size)
    loader = DataLoader(
        Subset(dataset, own),
        batch_size,
        num_workers=num_workers,
        worker_init_fn=worker_init_fn,
        pin_memory=device.type == "cuda",
    )
    bar = tqdm(loader, title, unit="batch", disable=rank > 0 or title is None or not sys.stderr.isatty())
    features, done = torch.empty(0, 0, dtype=dtype), 0
    for images, _ in bar:
        batch = network(images.to(device, non_blocking=True)).to(dtype).cpu()
        if done == 0:
            features = torch.empty(len(own), batch.shape[1], dtype=dtype)
        features[done : done + len(batch)] = batch
        done += len(batch)
    return features if world_size == 1 else _gather_interleaved(features, total, device)


def _gather_interleaved(features: torch.Tensor, total: int, device: torch.device) -> torch.Tensor | None:
    """Gather the features of `extract_features` on rank 0; rank r holds those of images r, r + world_size, ..."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # A process without images does not know the feature dimension: all take the maximum.
    widest = torch.tensor(features.shape[1], device=device)
    dist.all_reduce(widest, dist.ReduceOp.MAX)
    dim = int(widest)
    everything = torch.empty(total if rank == 0 else 0, dim, dtype=features.dtype)
    samples_per_process = -(-total // world_size)
    at_a_time = max(1, GATHERED_NUMBERS // max(1, dim))
    for start in range(0, samples_per_process, at_a_time):
        rows = slice(start, min(start + at_a_time, samples_per_process))
        padded = torch.zeros(rows.stop - start, dim, dtype=features.dtype, device=device)
        own = features[rows]
        padded[: len(own)] = own.reshape(len(own), dim)
        gathered = [torch.empty_like(padded) for _ in range(world_size)] if rank == 0 else None
        dist.gather(padded, gathered)
        for r, features_of_rank in enumerate(gathered or []):
            place = everything[r::world_size][rows]
            place.copy_(features_of_rank[: len(place)])
    return everything if rank == 0 else None


def network_input(image: np.ndarray, device: torch.device | str) -> torch.Tensor:
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
def patch_features(backbone: VisionTransformer, image: np.ndarray) -> torch.Tensor:
    """Return the patch tokens after the last norm: uint8 [H, W, 3] -> [rows, columns, D]."""
    tokens = backbone.forward(network_input(image, backbone.cls_token.device))
    columns = image.shape[1] // backbone.patch_embed.patch_size[1]
    return tokens[0, 1:].unflatten(0, (-1, columns)).cpu()


def principal_colors(features: list[torch.Tensor], images: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Map patch features to colors: the first three principal components over the patches of all images.

    An image without structure is gray and not part of the components, whose colors would show amplified noise: its
    pixels differ by at most UNIFORM_LEVELS, or the variance of its features is below LEAST_VARIANCE.

    Args:
        features: [rows, columns, D] per image.
        images: uint8 [H, W, 3].

    Returns:
        (colors, explained): per image uint8 [rows, columns, 3], with the middle 98 % of each component's values scaled
        to 0-255; and the share of the variance that each component explains, [3], 0 if no image has structure
    """
    colors = [np.full((*f.shape[:2], 3), 128, np.uint8) for f in features]
    chosen = [i for i, f in enumerate(features) if np.ptp(images[i], (0, 1)).max() > UNIFORM_LEVELS and _differ(f)]
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


def _differ(features: torch.Tensor) -> bool:
    """Return whether the variance of patch features [rows, columns, D] is a noticeable share of their second moment."""
    features = features.flatten(0, 1).double()
    return bool((features - features.mean(0)).square().sum() > LEAST_VARIANCE * features.square().sum())
