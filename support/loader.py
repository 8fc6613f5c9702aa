"""The order of batches, and whole batches of views made in the data-loading processes."""

import signal
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

import utils
from augment import normalize
from patch_matching import Matches, match_views
from utils import UserError


class Batch(NamedTuple):
    """The views of a batch of images and the matches of their tokens.

    Few tensors, since each one that a data-loading process hands over holds a file descriptor.
    """

    views: list  # [2B, 3, S, S] the global views and [LB, 3, s, s] the local ones, view after view; uint8 or normalised
    matches: Matches
    bad_images: dict  # {sample: why it cannot be read}


def check_batch(num_images, batch_size, accum_steps, world_size):
    """Raise UserError where there are fewer images than one step takes: `batch_size` per rank and micro-batch."""
    if num_images < batch_size * accum_steps * world_size:
        accumulated, or_fewer = "", ""
        if accum_steps > 1:
            accumulated, or_fewer = f", {accum_steps} times accumulated", " or --accum_steps"
        raise UserError(
            f"found {num_images} images, fewer than one batch of {batch_size} in each of {world_size} "
            f"processes{accumulated}: give a smaller --batch_size_per_gpu{or_fewer}"
        )


class BatchSampler(Sampler):
    """The keys (epoch, step, sample indices) of one rank's batches, through any number of epochs.

    The samples are shuffled by (seed, epoch). Step i of an epoch takes the i-th contiguous block of them, however many
    ranks and micro-batches share it; a step has `accum_steps` keys. An incomplete last step is left out, or, without
    `drop_last`, shared out as far as it goes: then the last batches may be short or empty.

    Args:
        num_samples: of the data set.
        batch_size: of one key.
        steps: range of the steps to give keys for, counted through all epochs.

    Attributes:
        steps_per_epoch: number of steps.
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
    """Whole batches by their key (epoch, step, sample indices): the work of the data-loading processes.

    Args:
        dataset: gives (image uint8 [H, W, 3], label).
        multi_crop: augment.MultiCrop.
        rule: of `match_views`; None matches CLS alone.
        rank: of this process.
        skip_bad: put the next sample that can be read in the place of one that cannot.
    """

    MAX_BAD_IN_A_ROW = 100

    def __init__(self, dataset, multi_crop, patch_size, rule, rank, skip_bad=False):
        self.dataset, self.multi_crop, self.patch_size, self.rule = dataset, multi_crop, patch_size, rule
        self.rank, self.skip_bad = rank, skip_bad

    def __getitem__(self, key):
        """Return the Batch of a key; its pixels are uint8."""
        views, bad_images = self.make_views(key)
        grids = [(view.pixels.shape[-2] // self.patch_size, view.pixels.shape[-1] // self.patch_size) for view in views]
        boxes, flips = torch.stack([view.boxes for view in views]), torch.stack([view.flips for view in views])
        matches = match_views(boxes, flips, grids, len(views[0].pixels), rule=self.rule)
        pixels = [torch.cat([view.pixels for view in same_size]) for same_size in (views[:2], views[2:]) if same_size]
        return Batch(pixels, matches, bad_images)

    def make_views(self, key):
        """Return (views of MultiCrop of a batch, {sample: why it cannot be read})."""
        epoch, step, indices = key
        images, bad_images = [], {}
        for index in indices:
            image, unreadable = self.read_image(index)
            images.append(image)
            bad_images |= unreadable
        return self.multi_crop(images, indices, epoch, step, self.rank), bad_images

    def read_image(self, index):
        """Return (image, bad_images): the image of a sample, and {sample: why it cannot be read} of those skipped.

        With `skip_bad` the image is the first one at or after `index` that can be read.

        Raises:
            UserError: the image, or with `skip_bad` MAX_BAD_IN_A_ROW of them, cannot be read.
        """
        bad_images = {}
        for i in range(index, index + self.MAX_BAD_IN_A_ROW):
            sample = i % len(self.dataset)
            try:
                return self.dataset[sample][0], bad_images
            except UserError as error:
                if not self.skip_bad:
                    raise
                bad_images[sample] = str(error)
        raise UserError(f"{self.MAX_BAD_IN_A_ROW} images in a row cannot be read; the last: {bad_images[sample]}")


def batches_on_device(loader, device):
    """Give the batches of a loader with their views normalised, and these and the matches on a device.

    Raises:
        UserError: the process that made a batch has died.
    """
    batches = iter(loader)
    while True:
        try:
            views, matches, bad_images = next(batches)
        except StopIteration:
            return
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            if str(error).startswith("Caught ") or getattr(loader, "num_workers", 1) == 0:
                raise  # by the data set
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise the next error in this one
            raise UserError(f"{utils.DEAD_WORKER} ({type(error).__name__})") from error
        views = [normalize(pixels.to(device, non_blocking=True)) for pixels in views]
        yield Batch(views, matches.to(device), bad_images)
