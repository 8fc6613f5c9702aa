"""Shared by the benchmarks: name of the machine, timing, tables."""

import os
import platform
import time
from pathlib import Path

import torch


def machine() -> str:
    """Return one line on the hardware and software that the measurements depend on."""
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{processor}, {torch.backends.cpu.get_cpu_capability()}, {cores} CPU cores, {memory_size() / 2**30:.0f} GiB, "
        f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}"
    )


def memory_size() -> int:
    """Return the size in bytes of the GPU's memory, or of the machine's memory without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def seconds_of(call, repeats, device=None) -> list:
    """Call a function several times, and return the seconds of each call, until `device` is done if it is a GPU."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def print_table(header, rows) -> None:
    """Print a Markdown table."""
    rows = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |", flush=True)
