"""Small helpers with no home elsewhere: processes, schedules, arguments, logging."""

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
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

VERSION = "0.9.0"
DEAD_WORKER = "a data-loading process died, most likely for want of memory: give fewer --num_workers"


class UserError(Exception):
    """Something that the user can put right. Its text is one line: what is wrong, what was found, what is expected."""


@contextlib.contextmanager
def one_line_errors():
    """Turn a UserError, also one that a data-loading worker raised, into one line on stderr and exit code 2.

    So does it with a full disk, the death of a data-loading process or of another rank, and a GPU without memory.
    """
    try:
        yield
    except Exception as error:
        kill_workers()
        # A worker's error arrives with the worker's traceback in its text; the message is the last line.
        message = _explain(error)
        if isinstance(error, UserError):
            message = str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")
        if message is None:
            raise
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            # Another rank may be inside a collective, and a tidy shutdown would wait for it.
            os._exit(2)
        sys.exit(2)


def kill_workers():
    """Kill this process's data-loading processes.

    Those of a training do not listen to SIGTERM, by which Python would end them when it exits, and wait for their end.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise that they have died
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def first_line(error):
    """Return the first line of an error's message, or its kind where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def printable(name):
    """Return a file's name with replacement characters for bytes that are no text."""
    return os.fsencode(name).decode(errors="replace")


def _explain(error):
    """Return what an error means for the user, in one line; None where it has to be looked into."""
    text = first_line(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return (
            f"cannot write {error.filename or 'a file'}: {error.strerror}; make room, and start the same command again"
        )
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the GPU's memory ran out: a smaller --batch_size_per_gpu with more --accum_steps, or --grad_checkpointing"
        )
    # PyTorch raises this in a signal handler, whatever the process does: what it interrupts may raise its own error.
    earlier = error
    while earlier is not None:
        if first_line(earlier).startswith("DataLoader worker (pid"):
            return f"{DEAD_WORKER} ({first_line(earlier)})"
        earlier = earlier.__context__
    if dist.is_initialized() and (isinstance(error, dist.DistError) or re.search("gloo|[Cc]onnection", text)):
        return f"rank {dist.get_rank()} waited for another process, which died or hangs: see its message ({text})"
    return None


def init_distributed(dist_url="env://", timeout=None):
    """Join the process group that torchrun describes in the environment, or run alone.

    Args:
        timeout: how long a process waits for another, a timedelta; None is PyTorch's.

    Returns:
        (rank, world_size, device): the device is this process's GPU, or the CPU where there is none.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} on this machine has no GPU, found {torch.cuda.device_count()}: start no more"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        meeting = {"init_method": dist_url}
        try:
            if dist_url == "env://" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                # Restarted processes meet at the store of torchrun's agent again, and must not find what the earlier
                # ones left there: with torch 2.14 the meeting with "env://" mostly fails.
                place, waiting = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), {}
                if timeout is not None:
                    waiting = {"timeout": timeout}
                store = dist.TCPStore(*place, is_master=False, **waiting)
                meeting = {"store": dist.PrefixStore(f"try{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)}
            dist.init_process_group(backend, **meeting, timeout=timeout, rank=rank, world_size=world_size)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"rank {rank} did not meet the {world_size - 1} others: {first_line(error)}") from error
    return rank, world_size, device


def all_reduce_mean(tensor):
    """Replace the tensor by its mean over all processes, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def all_gather(tensor):
    """Return the tensors [world_size, ...] of all processes, which are of one shape."""
    if not dist.is_initialized():
        return tensor[None]
    everyones = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, tensor)
    return torch.stack(everyones)


def cosine_schedule(step, total_steps, base, final, warmup_steps=0):
    """Return the value at a step: linear from 0 to `base` during the warm-up, then half a cosine down to `final`.

    As DINO's. A warm-up longer than the run is cut at the run's end.
    """
    if step < warmup_steps:
        return base * step / max(warmup_steps - 1, 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


def seed_networks(seed, step, rank, micro_step):
    """Make stochastic depth, the one random part of the networks, a function of (seed, step, rank, micro-step)."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank, micro_step)).generate_state(1, np.uint64)[0]))


def clip_each_gradient(parameters, max_norm):
    """Scale the gradient of each parameter by itself down to `max_norm`, as DINO does; 0 leaves them.

    Returns:
        the norms before, [number of gradients]
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if max_norm:
        torch._foreach_mul_(gradients, list((max_norm / (norms + 1e-6)).clamp(max=1.0)))
    return norms


def warn(text):
    """Print a warning of one line, above the progress bar where there is one."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


def make_folder(folder, option):
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
def atomic_write(path, backup=None):
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


def write_text(text, path):
    """Write a small UTF-8 text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(entry, path):
    """Add a line of JSON to a file."""
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")
