"""What the machine gives to a process: cores, threads and shared memory."""

import math
import os
import sys
from pathlib import Path

import torch

MARGIN = 2**20  # bytes of shared memory for the queues of data-loading workers


def local_processes() -> int:
    """Return the number of processes of this command on this machine, as the launcher's environment says."""
    total = os.environ.get("WORLD_SIZE", "1")
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or total
    return max(min(int(number) if number.isdecimal() else 1 for number in (total, local)), 1)


def free_shared_memory() -> float:
    """Return this process's share of the free shared memory in bytes; infinite where it is no file system.

    Raises:
        OSError: there is none.
    """
    if not sys.platform.startswith("linux"):
        return math.inf
    system = os.statvfs("/dev/shm")
    return max(system.f_bavail * system.f_frsize - MARGIN, 0) / local_processes()


def cores_of_process() -> int:
    """Return this process's share of the CPU cores that it may use: affinity and a container's quota limit them.

    The processes of a machine share the cores, unless SLURM has given each task its own.
    """
    has_own = "SLURM_CPUS_PER_TASK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    return max(usable_cores() // (1 if has_own else local_processes()), 1)


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use, see `cores_of_process`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, max(int(quota) // int(period), 1))
    except (OSError, ValueError):  # no control groups, or no quota: "max 100000"
        return cores


def set_threads(num_workers: int) -> int:
    """Set the number of PyTorch's threads for the computation on CPUs, and return it.

    OMP_NUM_THREADS wins. Otherwise a process has its share of the cores, and leaves one to each of its data-loading
    workers, but at most a quarter: one thread that has to wait for a core slows all others down, on two cores tenfold.
    Results on CPUs depend on the number of threads in the last bits.
    """
    if not os.environ.get("OMP_NUM_THREADS"):
        share = cores_of_process()
        torch.set_num_threads(max(share - min(num_workers, max(share // 4, 1)), 1))
    return torch.get_num_threads()
