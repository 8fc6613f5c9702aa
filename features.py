"""Features of a whole data set, computed by any number of processes. What the evaluations share."""

import sys

import torch
import torch.distributed as dist
import torchvision.transforms.v2 as T
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import InterpolationMode
from tqdm import tqdm

from augment import MEAN, STD


def eval_transform(crop_size):
    """PIL image -> normalised float [3, crop_size, crop_size]: shorter side resized to 8/7 of it, centre cut out.

    DINO's transform for evaluation, 256 and 224 at its usual size.
    """
    return T.Compose(
        [
            T.Resize(crop_size * 8 // 7, InterpolationMode.BICUBIC),
            T.CenterCrop(crop_size),
            T.PILToTensor(),
            T.ToDtype(torch.float32, scale=True),
            T.Normalize(MEAN, STD),
        ]
    )


@torch.no_grad()
def extract_features(network, dataset, device, batch_size=64, num_workers=2):
    """Apply a network to all images of a data set.

    Each process takes every world_size-th image, so that none is computed twice; the results are gathered once.

    Args:
        network: images [B, 3, S, S] -> features [B, D].
        dataset: gives (normalised image, label).

    Returns:
        features [n, D], float32 on the CPU, in the order of the data set; on rank 0, elsewhere None.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = range(rank, len(dataset), world_size)
    loader = DataLoader(Subset(dataset, own), batch_size, num_workers=num_workers, pin_memory=device.type == "cuda")
    bar = tqdm(loader, "features", unit="batch", disable=rank > 0 or not sys.stderr.isatty())
    features = [network(images.to(device, non_blocking=True)).float().cpu() for images, _ in bar]
    if world_size == 1:
        return torch.cat(features)
    return _gather_interleaved(features, len(dataset), rank, world_size, device)


def _gather_interleaved(features, total, rank, world_size, device):
    """Collect what `extract_features` computed, rank r holding samples r, r + world_size, ..., on rank 0."""
    # A process without an image does not know the feature dimension: all agree on the largest.
    dim = torch.tensor(features[0].shape[1] if features else 0, device=device)
    dist.all_reduce(dim, dist.ReduceOp.MAX)
    padded = torch.zeros(-(-total // world_size), int(dim), device=device)
    if features:
        own = torch.cat(features)
        padded[: len(own)] = own.to(device)
    gathered = [torch.empty_like(padded) for _ in range(world_size)] if rank == 0 else None
    dist.gather(padded, gathered)
    if rank > 0:
        return None
    return torch.stack(gathered, 1).flatten(0, 1)[:total].cpu()
