"""Small helpers used everywhere: errors, processes, schedules, gradients, files."""

import contextlib
import errno
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

VERSION = "0.9.0"
DEAD_WORKER = "a data-loading worker died, probably because memory ran out: use fewer --num_workers"


class UserError(Exception):
    """An error that the user can fix. Its message is one line: what is wrong, what was found, what is expected."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a UserError as one line on stderr and exit with code 2.

    The same happens if the disk is full, a GPU runs out of memory, or a data-loading worker or another rank dies.
    """
    try:
        yield
    except Exception as error:
        kill_workers()
        # The error of a data-loading worker contains a traceback; the message is its last line.
        message = _explain(error)
        if isinstance(error, UserError):
            message = str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")
        if message is None:
            raise
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            # A regular exit would wait for ranks that are inside a collective.
            os._exit(2)
        sys.exit(2)


def run(main) -> NoReturn:
    """Run the main function of a script, see `one_line_errors`, and exit with the code that it returns."""
    with one_line_errors():
        sys.exit(main())


def kill_workers() -> None:
    """Kill the data-loading workers of this process.

    Training workers ignore SIGTERM, so Python's exit-time join would hang.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report dead workers
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def first_line(error) -> str:
    """Return the first line of an error message, or the name of the error's class if the message is empty."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def printable(name) -> str:
    """Return a file name with replacement characters for bytes that are not UTF-8 and for control characters."""
    return "".join(character if character.isprintable() else "\ufffd" for character in str(name))


def _explain(error):
    """Return a one-line explanation of an error for the user, or None for an unexpected error."""
    text = first_line(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return f"cannot write {error.filename or 'a file'}: {error.strerror}; free some space and run the command again"
    if isinstance(error, torch.OutOfMemoryError):
        return "GPU out of memory: use a smaller --batch_size_per_gpu and more --accum_steps, or --grad_checkpointing"
    # PyTorch raises the death of a worker in a signal handler; the interrupted code may raise another error after it.
    earlier = error
    while earlier is not None:
        if first_line(earlier).startswith("DataLoader worker (pid"):
            return f"{DEAD_WORKER} ({first_line(earlier)})"
        earlier = earlier.__context__
    if dist.is_initialized() and (isinstance(error, dist.DistError) or re.search("gloo|[Cc]onnection", text)):
        return f"rank {dist.get_rank()} waited for another process that died or hangs: see its message ({text})"
    return None


def init_distributed(dist_url="env://", timeout=None) -> tuple[int, int, torch.device]:
    """Join the process group that torchrun describes in the environment. Without one, run as a single process.

    Args:
        dist_url: URL to set up the process group.
        timeout: timedelta to wait for another process; None uses PyTorch's default.

    Returns:
        (rank, world_size, device): the device is the GPU of this process, or the CPU if there is no GPU.

    Raises:
        UserError: there are more processes than GPUs, or the processes did not meet.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            found = f"found {torch.cuda.device_count()} GPUs on this machine and at least {local_rank + 1} processes"
            raise UserError(f"{found}: start one process per GPU")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size > 1:
        rendezvous = {"init_method": dist_url}
        try:
            if dist_url == "env://" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                # Processes restarted by torchrun use the store of its agent again and must not find old keys there.
                # With torch 2.14, "env://" mostly fails after a restart.
                address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                store = dist.TCPStore(*address, is_master=False, **({"timeout": timeout} if timeout else {}))
                rendezvous = {"store": dist.PrefixStore(f"try{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)}
            group = {"backend": "nccl" if device.type == "cuda" else "gloo", "rank": rank, "world_size": world_size}
            dist.init_process_group(**group, **rendezvous, timeout=timeout)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"rank {rank} could not join {world_size} processes: {first_line(error)}") from error
    return rank, world_size, device


def all_reduce_mean(tensor) -> torch.Tensor:
    """Replace a tensor by its mean over all processes and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def all_gather(tensor) -> torch.Tensor:
    """Return the tensors of all processes, which have the same shape, as [world_size, ...]."""
    if not dist.is_initialized():
        return tensor[None]
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return torch.stack(gathered)


def cosine_schedule(step, total_steps, base, final, warmup_steps=0) -> float:
    """Return the value of DINO's schedule: linear from 0 to `base` during warm-up, then a half cosine to `final`.

    A warm-up that is longer than the run ends with the run.
    """
    if step < warmup_steps:
        return base * step / max(warmup_steps - 1, 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


def seed_networks(seed, step, rank, micro_step) -> None:
    """Seed stochastic depth, the only random part of the networks, by (seed, step, rank, micro-step)."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank, micro_step)).generate_state(1, np.uint64)[0]))


def clip_each_gradient(parameters, max_norm) -> torch.Tensor:
    """Clip the gradient norm of each parameter separately, as DINO does. 0 does not clip.

    Returns:
        [number of gradients], the norms before clipping
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if max_norm:
        torch._foreach_mul_(gradients, list((max_norm / (norms + 1e-6)).clamp(max=1.0)))
    return norms


def warn(text) -> None:
    """Print a one-line warning, above the progress bar if there is one."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


def make_folder(folder, option) -> None:
    """Create a folder if it is missing, and check that files can be created in it.

    Args:
        option: the option that names the folder, for the message.

    Raises:
        UserError: the folder cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {option} {folder}: {error.strerror}; give a writable folder") from error


@contextlib.contextmanager
def atomic_write(path, backup=None) -> Iterator[Path]:
    """Write a file atomically: `path` is always the complete old file or the complete new one.

    Yields the path of a temporary file, which is renamed to `path` on success and removed on failure.

    Args:
        backup: where to keep the old file. The disk then needs room for three files.

    Raises:
        UserError: the file cannot be written. The old one is kept.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if backup is not None and path.exists():
            backup.unlink(missing_ok=True)
            try:
                os.link(path, backup)
            except OSError:  # a file system without hard links: for a moment only `backup` exists
                path.replace(backup)
        temporary.replace(path)
        with contextlib.suppress(OSError):  # make the new name durable, where folders can be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save reports a failed write as a RuntimeError of its zip writer, safetensors as a SafetensorError.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, (OSError, SafetensorError)):
            raise
        reason = cause.strerror if isinstance(cause, OSError) else first_line(cause)
        kept = f"the last saved {path} is kept" if path.exists() else "no earlier one exists"
        raise UserError(f"cannot save {path}: {reason}; {kept}: free some space and run the command again") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(text, path) -> None:
    """Write a small UTF-8 text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(entry, path) -> None:
    """Append a JSON line to a file."""
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")
