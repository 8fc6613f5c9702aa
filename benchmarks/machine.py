"""What the benchmarks share: the name of the machine and tables."""

import os
import platform
from pathlib import Path

import torch


def machine():
    """Return one line that says where figures come from."""
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        names = (
            [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line[:10] == "model name"]
            if cpuinfo.exists()
            else []
        )
        processor = names[0] if names else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{processor}, {torch.backends.cpu.get_cpu_capability()}, {cores} CPU cores, {memory_size() / 2**30:.0f} GiB, "
        f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}"
    )


def memory_size():
    """Return the bytes of the GPU's memory, or of the machine's where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def print_table(header, rows):
    """Print a Markdown table."""
    rows = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |", flush=True)
