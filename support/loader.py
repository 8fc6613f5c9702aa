"""The order of batches, and the workers that turn images into batches of views."""

import atexit
import contextlib
import functools
import itertools
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from augment import Distort, MultiCrop, View, distort_batch, normalize
from patch_matching import Matches, match_views
from support.images import LabeledImages
from support.preemption import ignore_signals
from support.resources import free_shared_memory
from utils import DEAD_WORKER, SHM_ADVICE, UserError, first_line, is_first_process, kill_workers, warn

MAX_BAD_IN_A_ROW = 100
PREFETCHED = 2  # batches per worker, PyTorch's default
Key = tuple[int, int, list[int]]  # of a batch: epoch, step, sample indices
BadImages = dict[int, str]  # {sample index: error message}


class LoadedBatch(NamedTuple):
    """The views of a batch of images and the matches of their tokens, as a data-loading worker returns them.

    It has few tensors, because each tensor that a worker sends holds a file descriptor.
    """

    pixels: list[torch.Tensor]  # global views [2B, 3, S, S] and local views [L*B, 3, s, s], view-major, uint8
    parameters: torch.Tensor | None  # [(2+L)*B, 38] of `distort_batch`, view-major; None if the views are distorted
    matches: Matches
    bad_images: BadImages
    patches: Sequence[torch.Tensor] = ()  # like the pixels, [2B, P, 21] and [L*B, p, 21], if these are to be distorted


class Batch(NamedTuple):
    """The same on the device, ready for the networks."""

    views: list[torch.Tensor]  # the pixels, distorted and normalized
    matches: Matches
    bad_images: BadImages


def check_batch(num_images: int, batch_size: int, accum_steps: int, world_size: int) -> None:
    """Raise UserError if a step needs more images than there are; `batch_size` is per rank and micro-batch."""
    if num_images < batch_size * accum_steps * world_size:
        step = f"{batch_size} images x {accum_steps} micro-batches x {world_size} processes"
        raise UserError(f"found {num_images} images, fewer than one step of {step}: use a smaller --batch_size_per_gpu")


@dataclass(eq=False)
class BatchSampler(Sampler[Key]):
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
    """

    num_samples: int
    batch_size: int
    steps: range
    accum_steps: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    drop_last: bool = True

    def __len__(self) -> int:
        return len(self.steps) * self.accum_steps

    def __iter__(self) -> Iterator[Key]:
        step_size = self.batch_size * self.accum_steps * self.world_size
        steps_per_epoch = self.num_samples // step_size if self.drop_last else -(-self.num_samples // step_size)
        for step in self.steps:
            epoch, i = divmod(step, steps_per_epoch)
            if i == 0 or step == self.steps[0]:
                samples = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
            for micro_step in range(self.accum_steps):
                start = ((i * self.world_size + self.rank) * self.accum_steps + micro_step) * self.batch_size
                yield epoch, step, samples[start : start + self.batch_size].tolist()


@dataclass(eq=False)
class ViewBatches(Dataset[LoadedBatch]):
    """Maps the key of a batch to its views and matches. This is the work of the data-loading workers.

    Args:
        dataset: returns (uint8 image [H, W, 3], label).
        multi_crop: cuts the views.
        patch_size: side of a patch in pixels.
        rule: matching rule of `match_views`; None matches only CLS.
        rank: rank of this process.
        skip_bad: replace a sample that cannot be read by the next one that can.
        distorts: distort the views; otherwise the batches have the parameters for it.
    """

    dataset: LabeledImages
    multi_crop: MultiCrop
    patch_size: int
    rule: str | None
    rank: int
    skip_bad: bool = False
    distorts: bool = True

    def __getitem__(self, key: Key) -> LoadedBatch:
        buffers = self.multi_crop.buffers(len(key[2]))
        if get_worker_info():  # so that sending the views does not copy them
            with contextlib.suppress(RuntimeError):  # no memory: the attempt to send the batch will end this worker
                buffers = [buffer.share_memory_() for buffer in buffers]
        views, bad_images = self.make_views(key, distorts=self.distorts, buffers=buffers)
        grids = [(view.pixels.shape[-1] // self.patch_size,) * 2 for view in views]
        boxes, flips = np.stack([view.boxes for view in views]), np.stack([view.flips for view in views])
        matches = match_views(boxes, flips, grids, len(views[0].pixels), rule=self.rule)
        pixels = [buffer.flatten(0, 1).permute(0, 3, 1, 2) for buffer in buffers]
        rows = [view.parameters for view in views if view.parameters is not None]
        parameters = torch.from_numpy(np.concatenate(rows)) if rows else None
        patches = [
            torch.from_numpy(np.concatenate([view.patches for view in of_size]))
            for of_size in (views[:2], views[2:])
            if of_size and of_size[0].patches is not None
        ]
        return LoadedBatch(pixels, parameters, matches, bad_images, patches)

    def make_views(self, key: Key, **options: Any) -> tuple[list[View], BadImages]:
        """Return the views of a batch, and the samples that were skipped. Options are those of `MultiCrop.__call__`."""
        epoch, step, indices = key
        bad_images: BadImages = {}
        images = [self.readable_image(index, bad_images) for index in indices]
        return self.multi_crop(images, indices, epoch, step, self.rank, **options), bad_images

    def readable_image(self, index: int, bad_images: BadImages) -> np.ndarray:
        """Return the image of a sample. With `skip_bad`, return the first readable one from `index` on.

        Args:
            index: index of the sample.
            bad_images: the samples that are skipped are added here.

        Raises:
            UserError: the image cannot be read, or, with `skip_bad`, neither can the following MAX_BAD_IN_A_ROW.
        """
        for i in range(index, index + MAX_BAD_IN_A_ROW):
            sample = i % len(self.dataset)
            try:
                return self.dataset[sample][0]
            except UserError as error:
                if not self.skip_bad:
                    raise UserError(f"{error}; --on_bad_image skip replaces bad images") from error
                bad_images[sample] = str(error)
        raise UserError(f"{MAX_BAD_IN_A_ROW} consecutive images cannot be read; the last: {bad_images[sample]}")


def place_of_distortion(distort_on: str, device: torch.device) -> str:
    """Return where views are distorted, "workers" or "device". With "auto", it is the device if that is a GPU."""
    return distort_on if distort_on != "auto" else "device" if device.type == "cuda" else "workers"


class Workers(NamedTuple):
    """The data-loading workers of a DataLoader."""

    number: int
    prefetched: int = PREFETCHED  # batches of each worker


NO_WORKERS = Workers(0)
warn_once = functools.cache(warn)


def fit_workers(num_workers: int, batch_bytes: float, quiet: bool = False) -> Workers:
    """Return the workers whose batches fit into this process's share of the shared memory, /dev/shm.

    Workers send batches through shared memory: those that they prefetch, and one that is in use. Where the memory is
    too small, as the 64 MB of a Docker container may be, workers prefetch one batch each, then there are fewer of them,
    and without any the process loads the images itself. A line says so, once.

    Args:
        num_workers: number of workers that the user wants.
        batch_bytes: size of a batch; of several data loaders that are open at the same time, the sum.
        quiet: omit the line.
    """
    if num_workers == 0:
        return NO_WORKERS
    try:
        multiprocessing.Lock()  # as the queues of the workers have them
        free = free_shared_memory()
        found = f"/dev/shm has {free / 1e6:.0f} MB free for this process"
    except (OSError, ImportError) as error:
        free, found = 0, f"no shared memory in /dev/shm ({first_line(error)})"
    fitting = free // max(batch_bytes, 1) - 1
    workers = Workers(num_workers)
    if fitting < PREFETCHED * num_workers:
        workers = Workers(min(num_workers, int(fitting)), 1) if fitting > 0 else NO_WORKERS
    if workers != Workers(num_workers) and is_first_process() and not quiet:
        needed = f"{num_workers} workers with {PREFETCHED} batches of {batch_bytes / 1e6:.0f} MB each do not fit"
        instead = f"using {workers.number} with 1" if workers.number else "loading without workers, which is slow"
        warn_once(f"{found}, {needed}: {instead}; {SHM_ADVICE}")
    return workers


def open_loader(dataset: Dataset, workers: Workers, device: torch.device, **options: Any) -> DataLoader:
    """Return a DataLoader for batches that go to a device. Further options are those of DataLoader.

    The process kills its workers when it ends: they ignore SIGTERM, so that Python's exit-time join would hang.
    """
    atexit.register(kill_workers)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores, as the user wants
        return DataLoader(
            dataset,
            num_workers=workers.number,
            prefetch_factor=workers.prefetched if workers.number else None,
            worker_init_fn=init_worker,
            pin_memory=device.type == "cuda",
            **options,
        )


def init_worker(worker_id: int) -> None:
    """Prepare a data-loading worker, as the `worker_init_fn` of a DataLoader.

    Signals are left to the main process. OpenCV gets no threads, because the workers share the cores already. If a
    batch cannot be sent, the worker ends, so that the main process learns of it: Python would only print a traceback,
    and the main process would wait for ever.
    """
    ignore_signals()
    cv2.setNumThreads(0)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]


def _end_worker(error: BaseException, _: object) -> NoReturn:
    line = f"a data-loading worker cannot send its batch, {first_line(error)}: if /dev/shm is full, {SHM_ADVICE}"
    print(line, file=sys.stderr, flush=True)
    os._exit(1)


def batches_on_device(
    loader: Iterable[LoadedBatch],
    device: torch.device,
    distort: Distort = distort_batch,
    waiting: Callable[[], AbstractContextManager] = contextlib.nullcontext,
) -> Iterator[Batch]:
    """Yield the batches of a loader on a device, with distorted and normalized views.

    Args:
        distort: distorts the views if the workers have not done it.
        waiting: makes the context in which the loader is waited for.

    Raises:
        UserError: a worker died.
    """
    try:
        with waiting():
            loaded_batches = iter(loader)
        while True:
            with waiting():
                loaded = next(loaded_batches, None)
            if loaded is None:
                return
            batch = _to_device(loaded, device, distort)
            del loaded  # frees its shared memory before the next batch arrives
            yield batch
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        if str(error).startswith("Caught ") or getattr(loader, "num_workers", 1) == 0:
            raise  # an error of the data set
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise another error during this one
        raise UserError(f"{DEAD_WORKER} ({type(error).__name__})") from error


def _to_device(loaded: LoadedBatch, device: torch.device, distort: Distort) -> Batch:
    views = [pixels.to(device, non_blocking=True) for pixels in loaded.pixels]
    if loaded.parameters is not None:
        rows = loaded.parameters.to(device, non_blocking=True).split([len(pixels) for pixels in views])
        patches = [own.to(device, non_blocking=True) for own in loaded.patches]
        views = [distort(*parts) for parts in itertools.zip_longest(views, rows, patches)]
    return Batch([normalize(pixels) for pixels in views], loaded.matches.to(device), loaded.bad_images)
