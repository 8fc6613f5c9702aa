import contextlib
import errno
import math
import multiprocessing
import os

import cv2
import numpy as np
import pytest
import torch
from conftest import open_dataset
from torch.utils.data import DataLoader

from augment import MultiCrop, distort_batch, normalize
from support import loader
from support.images import ResizedArray
from support.loader import BatchSampler, ViewBatches, batches_on_device, init_worker
from utils import UserError


@pytest.mark.parametrize(("world_size", "accum_steps"), [(1, 1), (2, 1), (3, 1), (1, 2), (3, 2)])
def test_a_step_takes_the_same_samples_however_many_ranks_and_micro_batches_share_it(world_size, accum_steps):
    step_size, steps = 6, range(6)  # 3 steps per epoch: the incomplete batch is dropped
    shares = step_size // world_size // accum_steps
    ranks = [BatchSampler(20, shares, steps, accum_steps, rank, world_size, seed=3) for rank in range(world_size)]
    reference = list(BatchSampler(20, step_size, steps, seed=3))
    assert all(len(rank) == len(list(rank)) for rank in ranks)
    keys = [list(rank) for rank in ranks]
    for epoch, step, samples in reference:
        own = [key for rank in keys for key in rank[step * accum_steps : (step + 1) * accum_steps]]
        assert {key[:2] for key in own} == {(epoch, step)}
        assert sum((key[2] for key in own), []) == samples
    assert [key[:2] for key in reference] == [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4), (1, 5)]
    epochs = [sum((samples for e, _, samples in reference if e == epoch), []) for epoch in (0, 1)]
    assert len(set(epochs[0])) == 18
    assert epochs[0] != epochs[1]


def test_a_run_that_goes_on_takes_the_steps_that_are_left():
    every = list(BatchSampler(20, 3, range(18), accum_steps=2, seed=5))
    for start in (0, 1, 3, 7, 18):
        assert list(BatchSampler(20, 3, range(start, 18), accum_steps=2, seed=5)) == every[2 * start :]


def test_an_incomplete_step_can_be_shared_out():
    keys = [list(BatchSampler(11, 3, range(4), 1, rank, 2, drop_last=False)) for rank in (0, 1)]
    for epoch in (0, 1):
        own = [[key for key in rank if key[0] == epoch] for rank in keys]
        assert [[len(samples) for _, _, samples in rank] for rank in own] == [[3, 3], [3, 2]]
        assert sorted(sum((samples for rank in own for _, _, samples in rank), [])) == list(range(11))


@pytest.mark.parametrize("distorts", [True, False])
@pytest.mark.parametrize(("geometry", "patch_side"), [("batch", 0), ("image", 8)])
def test_views_do_not_depend_on_the_workers(photo_folder, geometry, patch_side, distorts):
    """Also if the main process has used OpenCV's threads, which do not survive a fork."""
    cv2.setNumThreads(2)
    cv2.GaussianBlur(cv2.cvtColor(np.zeros((2000, 2000, 3), np.uint8), cv2.COLOR_RGB2GRAY), (9, 9), 2.0)
    dataset = open_dataset("folder", photo_folder, "train", ResizedArray(64))
    crop = MultiCrop(global_size=32, local_size=16, local_number=2, geometry=geometry, patch_side=patch_side)
    batches = ViewBatches(dataset, crop, 8, "paper", 0, distorts=distorts)
    keys = [(0, step, [step, 3, 7]) for step in range(4)]
    opened = DataLoader(batches, batch_size=None, sampler=keys, num_workers=2, worker_init_fn=init_worker, timeout=60)
    for key, batch in zip(keys, batches_on_device(opened, torch.device("cpu")), strict=True):
        pixels, parameters, matches, bad_images, patches = batches[key]
        assert [x.dtype for x in pixels] == [torch.uint8] * 2
        assert (parameters is None) == distorts
        assert len(patches) == (2 if patch_side and not distorts else 0)
        if not distorts:
            rows = parameters.split([6, 6])  # 2 views of each size of 3 images
            pixels = [distort_batch(*parts) for parts in zip(pixels, rows, patches or (None, None), strict=True)]
        assert all(torch.equal(normalize(x), y) for x, y in zip(pixels, batch.views, strict=True))
        assert all(torch.equal(x, y) for x, y in zip(matches, batch.matches, strict=True))
        assert bad_images == batch.bad_images == {}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_a_data_set_is_not_taken_for_a_dead_process(num_workers):
    class Lost(torch.utils.data.Dataset):
        def __getitem__(self, key):
            raise FileNotFoundError("shard 7 is gone")

    opened = DataLoader(Lost(), batch_size=None, sampler=[0], num_workers=num_workers)
    with pytest.raises(FileNotFoundError, match="shard 7 is gone"):
        next(batches_on_device(opened, torch.device("cpu")))


@pytest.mark.parametrize(
    ("free", "workers"),
    [(210, (10, 2)), (209, (10, 1)), (110, (10, 1)), (40, (3, 1)), (20, (1, 1)), (19, (0, 2)), (0, (0, 2))],
)
def test_workers_fit_into_the_shared_memory(monkeypatch, capsys, free, workers):
    """Batches of 10 bytes: those that workers prefetch, and one in use."""
    loader.warn_once.cache_clear()
    monkeypatch.setattr(loader, "free_shared_memory", lambda: free)
    for _ in range(2):
        assert loader.fit_workers(10, 10) == workers
    warning = capsys.readouterr().err
    assert warning.count("docker run --shm-size=8g or --ipc=host") == (workers != (10, 2))
    assert loader.fit_workers(0, 10) == (0, 2)


def test_without_semaphores_the_process_loads_itself(monkeypatch, capsys):
    def lock():
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(multiprocessing, "Lock", lock)
    assert loader.fit_workers(2, 10).number == 0
    assert "no shared memory in /dev/shm ([Errno 30] Read-only file system)" in capsys.readouterr().err


class Unsendable(torch.utils.data.Dataset):
    """Its items cannot be sent to another process, as those that do not fit into the shared memory."""

    def __getitem__(self, key):
        return lambda: key


def test_a_batch_that_cannot_be_sent_ends_the_worker(capfd):
    opened = loader.open_loader(Unsendable(), loader.Workers(1), torch.device("cpu"), batch_size=None, sampler=[0, 1])
    with pytest.raises(RuntimeError, match="DataLoader worker .* exited unexpectedly"):
        next(iter(opened))
    assert "a data-loading worker cannot send its batch, " in capfd.readouterr().err


def test_a_dead_data_loading_process_is_named():
    def batches():
        yield from ()
        raise ConnectionResetError("gone")

    with pytest.raises(UserError, match=r"a data-loading worker died, .* fewer --num_workers \(ConnectionResetError\)"):
        next(batches_on_device(batches(), torch.device("cpu")))


def test_shared_memory_without_a_limit_takes_all_workers(monkeypatch):
    """As on systems other than Linux."""
    monkeypatch.setattr(loader, "free_shared_memory", lambda: math.inf)
    assert loader.fit_workers(10, 10) == loader.fit_workers(10, 2.5) == (10, 2)


def test_only_the_loader_is_waited_for(photo_folder):
    """What the device does with a batch is not counted as waiting for data."""
    events, crop = [], MultiCrop(global_size=32, local_size=16, local_number=1)
    dataset = open_dataset("folder", photo_folder, "train", ResizedArray(64))
    batches = ViewBatches(dataset, crop, 8, None, 0, distorts=False)

    @contextlib.contextmanager
    def waiting():
        events.append("begin")
        yield
        events.append("end")

    def load():
        events.append("load")
        yield batches[0, 0, [0, 1]]

    def distort(pixels, *_):
        events.append("distort")
        return pixels

    assert len(list(batches_on_device(load(), torch.device("cpu"), distort, waiting))) == 1
    assert events == ["begin", "end", "begin", "load", "end", "distort", "distort", "begin", "end"]
