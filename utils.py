"""Small helpers used everywhere: errors, processes, schedules, gradients."""

import contextlib
import datetime
import errno
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

VERSION = "0.9.0"
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
NO_MEMORY = re.compile("MemoryError|out of memory|not enough memory|[Cc](an't|annot) allocate memory|ALLOC_FAILED")
# How long a process waits for another by default. In evaluations, the first one computes alone for minutes.
TIMEOUT = datetime.timedelta(minutes=30)
DEAD_WORKER = "a data-loading worker died, probably because memory ran out: use fewer --num_workers"


class UserError(Exception):
    """An error that the user can fix. Its message is one line: what is wrong, what was found, what is expected."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a UserError as one line on stderr and exit with code 2. Ctrl-C exits with code 130.

    The line also explains a full disk, a path that the system refuses, a lack of memory, and the death of a
    data-loading worker or of another rank. Characters that the terminal cannot show are replaced.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        with contextlib.suppress(AttributeError):  # a notebook's stream
            getattr(sys, name).reconfigure(errors="replace")
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        kill_workers()
        _exit(130, "interrupted")
    except Exception as error:
        kill_workers()
        # The error of a data-loading worker contains a traceback; the message is its last line.
        message = _explain(error)
        if isinstance(error, UserError):
            message = str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")
        if message is None:
            raise
        _exit(2, f"error: {message}")


def print_error(line) -> None:
    """Print the line that a command ends with, and give it to torchrun for its summary."""
    print(line, file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": details}), encoding="utf-8")


def _exit(code, message) -> NoReturn:
    print_error(f"{Path(sys.argv[0]).name}: {message}")
    try:
        sys.stdout.flush()
    except OSError:  # the reader of a pipe has ended, or the disk is full: Python must not try again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if dist.is_initialized():
        # A regular exit would wait for ranks that are inside a collective.
        os._exit(code)
    sys.exit(code)


def run_main(main) -> NoReturn:
    """Run the main function of a script, see `one_line_errors`, and exit with the code that it returns."""
    with one_line_errors():
        code = main()
    sys.exit(code)


def kill_workers() -> None:
    """Kill the data-loading workers of this process.

    Training workers ignore SIGTERM, so Python's exit-time join would hang.
    """
    if hasattr(signal, "SIGCHLD"):  # Windows has none
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
    if isinstance(error, torch.OutOfMemoryError):
        return "GPU out of memory: use a smaller --batch_size_per_gpu and more --accum_steps, or --grad_checkpointing"
    if isinstance(error, (MemoryError, RuntimeError, OSError)) and NO_MEMORY.search(f"{type(error).__name__}: {text}"):
        return f"out of memory: use smaller images, batches or networks, or fewer --num_workers ({text})"
    # PyTorch raises the death of a worker in a signal handler; the interrupted code may raise another error after it.
    earlier = error
    while earlier is not None:
        if first_line(earlier).startswith("DataLoader worker (pid"):
            return f"{DEAD_WORKER} ({first_line(earlier)})"
        earlier = earlier.__context__
    if dist.is_initialized() and (
        isinstance(error, dist.DistError) or re.search("gloo|[Cc]onnection|pair closure", text)
    ):
        return f"rank {dist.get_rank()} waited for another process that died or hangs: see its message ({text})"
    if isinstance(error, BrokenPipeError):
        return "the reader of the output has ended"
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return f"cannot write {error.filename or 'a file'}: {error.strerror}; free some space and run the command again"
    if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)):
        return f"cannot open {printable(error.filename)}: {error.strerror}"
    return None


def launched_as() -> tuple[int, int, int]:
    """Return (rank, world_size, local_rank) as torchrun sets them in the environment: (0, 1, 0) without a launcher.

    Raises:
        UserError: they are incomplete, no numbers or contradict each other.
    """
    found = {name: os.environ[name] for name in (*RANKS, "MASTER_ADDR", "MASTER_PORT") if name in os.environ}
    expected = "start several processes with torchrun, or one process without " + ", ".join(RANKS)
    numbers = {name: found.get(name, default) for name, default in zip(RANKS, "010", strict=True)}
    for name, text in numbers.items():
        if not re.fullmatch("[0-9]{1,9}", text):
            raise UserError(f"the environment has {name}={text!r}, no number of at least 0: {expected}")
    rank, world_size, local_rank = map(int, numbers.values())
    if rank >= world_size:
        raise UserError(f"the environment has RANK={rank} and WORLD_SIZE={world_size}, RANK must be less: {expected}")
    if world_size > 1 and "RANK" not in found:
        raise UserError(f"the environment has WORLD_SIZE={world_size}, but no RANK: {expected}")
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")  # only srun sets it
    if "WORLD_SIZE" not in found and tasks != "1":
        warn(f"srun starts {tasks} tasks, each a run of its own: use torchrun or run_with_submitit.py for a common one")
    return rank, world_size, local_rank


def is_first_process() -> bool:
    """Return whether this is the process that prints, also before the process group is set up."""
    return os.environ.get("RANK", "0") == "0"


def init_distributed(dist_url="env://", timeout=TIMEOUT) -> tuple[int, int, torch.device]:
    """Join the process group that torchrun describes in the environment. Without one, run as a single process.

    Args:
        dist_url: URL to set up the process group.
        timeout: timedelta to wait for another process.

    Returns:
        (rank, world_size, device): the device is the GPU of this process, or the CPU if there is no GPU.

    Raises:
        UserError: the environment is inconsistent, there are more processes than GPUs, or the processes did not meet.
    """
    rank, world_size, local_rank = launched_as()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if torch.cuda.device_count() == 1 and _each_task_sees_its_gpu():
            local_rank = 0
        if local_rank >= torch.cuda.device_count():
            found = f"found {torch.cuda.device_count()} GPUs on this machine and at least {local_rank + 1} processes"
            raise UserError(f"{found}: start one process per GPU")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size > 1:
        rendezvous = {"init_method": dist_url}
        try:
            if dist_url == "env://":
                address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
                if not (address and re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 2**16):
                    named = f"the environment has MASTER_ADDR={address} and MASTER_PORT={port or None}"
                    raise UserError(f"{named}, expected a host and a port below 65536: start them with torchrun")
                if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                    # Processes restarted by torchrun use the store of its agent again and must not find old keys there.
                    # With torch 2.14, "env://" mostly fails after a restart.
                    store = dist.TCPStore(address, int(port), is_master=False, timeout=timeout)
                    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
                    rendezvous = {"store": dist.PrefixStore(f"try{attempt}", store)}
            group = {"backend": "gloo", "rank": rank, "world_size": world_size}
            if device.type == "cuda":
                group |= {"backend": "nccl", "device_id": device}
            dist.init_process_group(**group, **rendezvous, timeout=timeout)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"rank {rank} could not join {world_size} processes: {first_line(error)}") from error
    return rank, world_size, device


def _each_task_sees_its_gpu():
    """Return whether SLURM started this process itself, as with `srun --gpus-per-task=1`, and not torchrun."""
    return "SLURM_LOCALID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ


def start_all_reduce_mean(tensor) -> Callable[[], torch.Tensor]:
    """Start to replace a tensor by its mean over all processes. Return a function that waits for it and returns it."""
    exchange = dist.all_reduce(tensor, async_op=True) if dist.is_initialized() else None

    def finish():
        if exchange is not None:
            exchange.wait()
            tensor.div_(dist.get_world_size())
        return tensor

    return finish


def all_reduce_mean(tensor) -> torch.Tensor:
    """Replace a tensor by its mean over all processes and return it."""
    return start_all_reduce_mean(tensor)()


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
        factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        if norms.is_cuda:
            multiply_each(gradients, factors)
        else:
            torch._foreach_mul_(gradients, list(factors))
    return norms


def multiply_each(tensors, factors) -> None:
    """Multiply each of n tensors in place by its factor in `factors`, [n].

    For a GPU: `_foreach_mul_` with n factors takes n launches, this takes a few, and memory of the size of the tensors.
    """
    sizes = [tensor.numel() for tensor in tensors]
    of_each_number = torch.cat([factor.expand(size) for factor, size in zip(factors, sizes, strict=True)])
    parts = zip(of_each_number.split(sizes), tensors, strict=True)
    torch._foreach_mul_(tensors, [part.view_as(tensor) for part, tensor in parts])


def warn(text) -> None:
    """Print a one-line warning, above the progress bar if there is one."""
    tqdm.write(f"warning: {text}", file=sys.stderr)
