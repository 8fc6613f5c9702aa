import os

import pytest
import torch

from support import resources


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 8),
        ({"WORLD_SIZE": "16", "SLURM_NTASKS_PER_NODE": "4"}, 4),
        ({"WORLD_SIZE": "2"}, 2),
        ({"SLURM_NTASKS_PER_NODE": "4"}, 1),  # one process in a job with four tasks
    ],
)
def test_processes_of_the_machine_share_it(monkeypatch, environment, processes):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    free = resources.free_shared_memory()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert resources.local_processes() == processes
    assert resources.free_shared_memory() == pytest.approx(free / processes, rel=0.1)


@pytest.mark.parametrize(
    ("cores", "ranks", "workers", "threads"),
    [
        (16, 1, 0, 16),
        (16, 1, 10, 12),
        (16, 1, 2, 14),
        (16, 2, 10, 6),
        (2, 1, 1, 1),
        (2, 1, 0, 2),
        (1, 1, 9, 1),
        (4, 8, 2, 1),
    ],
)
def test_threads_leave_cores_to_the_workers(monkeypatch, cores, ranks, workers, threads):
    found = []
    monkeypatch.setattr(resources, "usable_cores", lambda: cores)
    monkeypatch.setattr(resources, "local_processes", lambda: ranks)
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.delenv("OMP_NUM_THREADS")
    resources.set_threads(workers)
    assert found == [threads]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    resources.set_threads(workers)
    assert found == [threads]


def test_affinity_and_quota_limit_the_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for text, cores in (("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8)):
        (tmp_path / "cpu.max").write_text(text)
        monkeypatch.setattr(resources, "Path", lambda _: tmp_path / "cpu.max")
        assert resources.usable_cores() == cores


@pytest.mark.parametrize(
    ("environment", "cores"),
    [({}, 2), ({"SLURM_CPUS_PER_TASK": "8"}, 8), ({"SLURM_CPUS_PER_TASK": "8", "TORCHELASTIC_RUN_ID": "1"}, 2)],
)
def test_a_task_of_slurm_has_cores_of_its_own(monkeypatch, environment, cores):
    """Unless torchrun has started several processes in it."""
    monkeypatch.setattr(resources, "usable_cores", lambda: 8)
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert resources.cores_of_process() == cores
