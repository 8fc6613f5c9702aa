"""The order of batches, and the workers that turn images into batches of views."""

import signal
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from augment import View, normalize
from patch_matching import Matches, match_views
from utils import DEAD_WORKER, UserError


class Batch(NamedTuple):
    """The views of a batch of images and the matches of their tokens.

    It has few tensors, because each tensor that a worker sends holds a file descriptor.
    """

    views: list  # global views [2B, 3, S, S] and local views [L*B, 3, s, s], view-major; uint8 or normalized
    matches: Matches
    bad_images: dict  # {sample index: error message}


def check_batch(num_images, batch_size, accum_steps, world_size) -> None:
    """Raise UserError if a step needs more images than there are; `batch_size` is per rank and micro-batch."""
    if num_images < batch_size * accum_steps * world_size:
        step = f"{batch_size} images x {accum_steps} micro-batches x {world_size} processes"
        raise UserError(f"found {num_images} images, fewer than one step of {step}: use a smaller --batch_size_per_gpu")


class BatchSampler(Sampler):
    """Yields the keys (epoch, step, sample indices) of the batches of one rank, over any number of epochs.

    The samples are shuffled by (seed, epoch). Step i of an epoch takes the i-th contiguous block of the shuffled
    samples, however many ranks and micro-batches share it. Each step yields `accum_steps` keys. An incomplete last step
    is dropped. Without `drop_last` its samples are distributed, and the last batches may be short or empty.

    Args:
        num_samples: size of the data set.
        batch_size: number of samples per key.
        steps: range of the steps to yield, counted through all epochs.
        accum_steps: micro-batches per step.
        rank, world_size: rank of this process and number of processes.
        seed: seed of the shuffling.
        drop_last: drop the incomplete last step of an epoch.

    Attributes:
        steps_per_epoch: number of steps per epoch.
    """

    def __init__(self, num_samples, batch_size, steps, accum_steps=1, rank=0, world_size=1, seed=0, drop_last=True):
        self.num_samples, self.batch_size, self.steps, self.accum_steps = num_samples, batch_size, steps, accum_steps
        self.rank, self.world_size, self.seed = rank, world_size, seed
        step_size = batch_size * accum_steps * world_size
        self.steps_per_epoch = num_samples // step_size if drop_last else -(-num_samples // step_size)

    def __len__(self):
        return len(self.steps) * self.accum_steps

    def __iter__(self):
        shuffled_epoch = None
        for step in self.steps:
            epoch, i = divmod(step, self.steps_per_epoch)
            if epoch != shuffled_epoch:
                shuffled_epoch = epoch
                samples = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
            for micro_step in range(self.accum_steps):
                start = ((i * self.world_size + self.rank) * self.accum_steps + micro_step) * self.batch_size
                yield epoch, step, samples[start : start + self.batch_size].tolist()


class ViewBatches(Dataset):
    """Maps a key (epoch, step, sample indices) to a Batch. This is the work of the data-loading workers.

    Args:
        dataset: returns (uint8 image [H, W, 3], label).
        multi_crop: augment.MultiCrop.
        patch_size: side of a patch in pixels.
        rule: matching rule of `match_views`; None matches only CLS.
        rank: rank of this process.
        skip_bad: replace a sample that cannot be read by the next one that can.
    """

    MAX_BAD_IN_A_ROW = 100

    def __init__(self, dataset, multi_crop, patch_size, rule, rank, skip_bad=False):
        self.dataset, self.multi_crop, self.patch_size, self.rule = dataset, multi_crop, patch_size, rule
        self.rank, self.skip_bad = rank, skip_bad

    def __getitem__(self, key):
        """Return the Batch of a key, with uint8 pixels."""
        views, bad_images = self.make_views(key)
        grids = [(view.pixels.shape[-2] // self.patch_size, view.pixels.shape[-1] // self.patch_size) for view in views]
        boxes, flips = torch.stack([view.boxes for view in views]), torch.stack([view.flips for view in views])
        matches = match_views(boxes, flips, grids, len(views[0].pixels), rule=self.rule)
        pixels = [torch.cat([view.pixels for view in same_size]) for same_size in (views[:2], views[2:]) if same_size]
        return Batch(pixels, matches, bad_images)

    def make_views(self, key) -> tuple[list[View], dict]:
        """Return (views of a batch, {index of an unreadable sample: error message})."""
        epoch, step, indices = key
        images, bad_images = [], {}
        for index in indices:
            image, unreadable = self.read_image(index)
            images.append(image)
            bad_images |= unreadable
        return self.multi_crop(images, indices, epoch, step, self.rank), bad_images

    def read_image(self, index) -> tuple[np.ndarray, dict]:
        """Return (image, {index of a skipped sample: error message}).

        With `skip_bad`, return the first readable image at or after `index`.

        Raises:
            UserError: the image cannot be read, or, with `skip_bad`, neither can the following MAX_BAD_IN_A_ROW.
        """
        bad_images = {}
        for i in range(index, index + self.MAX_BAD_IN_A_ROW):
            sample = i % len(self.dataset)
            try:
                return self.dataset[sample][0], bad_images
            except UserError as error:
                if not self.skip_bad:
                    raise UserError(f"{error}; --on_bad_image skip replaces bad images") from error
                bad_images[sample] = str(error)
        raise UserError(f"{self.MAX_BAD_IN_A_ROW} consecutive images cannot be read; the last: {bad_images[sample]}")


def batches_on_device(loader, device) -> Iterator[Batch]:
    """Yield the batches of a loader on a device, with normalized views.

    Raises:
        UserError: a worker died.
    """
    batches = iter(loader)
    while True:
        try:
            views, matches, bad_images = next(batches)
        except StopIteration:
            return
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            if str(error).startswith("Caught ") or getattr(loader, "num_workers", 1) == 0:
                raise  # an error of the data set
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise another error during this one
            raise UserError(f"{DEAD_WORKER} ({type(error).__name__})") from error
        views = [normalize(pixels.to(device, non_blocking=True)) for pixels in views]
        yield Batch(views, matches.to(device), bad_images)
