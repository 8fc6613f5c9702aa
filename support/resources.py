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


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use: its affinity and its container's quota limit them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, max(int(quota) // int(period), 1))
    except (OSError, ValueError):  # no control groups, or no quota: "max 100000"
        return cores


def set_threads(num_workers: int) -> int:
    """Set the number of PyTorch's threads for the computation on CPUs, and return it.

    OMP_NUM_THREADS wins. Otherwise a process has its share of the cores, and leaves one core to each of its
    data-loading workers, but at most half: threads that wait for a core slow all others down. Results on CPUs depend on
    the number of threads in the last bits.
    """
    if not os.environ.get("OMP_NUM_THREADS"):
        share = max(usable_cores() // local_processes(), 1)
        torch.set_num_threads(max(share - min(num_workers, share // 2), 1))
    return torch.get_num_threads()
