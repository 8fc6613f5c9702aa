"""Small helpers used everywhere: errors, processes, schedules."""

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
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from support.output import Output

VERSION = "0.9.0"
RANKS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # set by torchrun; their values for a single process
NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
NO_MEMORY = re.compile("MemoryError|out of memory|not enough memory|[Cc](an't|annot) allocate memory|ALLOC_FAILED")
TIMEOUT = datetime.timedelta(minutes=30)  # default of how long a process waits for another
SHM_ADVICE = "give a container more with docker run --shm-size=8g or --ipc=host"
DEAD_WORKER = "a data-loading worker died, probably because memory ran out: use fewer --num_workers"


class UserError(Exception):
    """An error that the user can fix. Its message is one line: what is wrong, what was found, what is expected."""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a UserError as one line on stderr and exit with code 2. Ctrl-C exits with code 130.

    The line also explains a full disk, a refused path, a lack of memory, and the death of a data-loading worker or of
    another rank. Standard output and error are an `Output`.
    """
    os.environ["MPLBACKEND"] = "agg"  # needs no display; matplotlib cannot be imported with an unknown one
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Output, streams)  # type: ignore[assignment]
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        kill_workers()
        _exit(130, "interrupted")
    except Exception as error:
        kill_workers()
        message = _explain(error)
        if isinstance(error, UserError):
            message = str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")
        if message is None:
            raise
        _exit(2, f"error: {message}")
    finally:
        sys.stdout, sys.stderr = streams


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run the main function of a script, see `one_line_errors`, and exit with the code that it returns."""
    with one_line_errors():
        code = main()
    sys.exit(code)


def print_error(line: str) -> None:
    """Print the line that a command ends with, and give it to torchrun for its summary."""
    print(line, file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": details}), encoding="utf-8")


def _exit(code: int, message: str) -> NoReturn:
    print_error(f"{Path(sys.argv[0]).name}: {message}")
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    if dist.is_initialized():
        os._exit(code)  # a regular exit would wait for ranks that are inside a collective
    sys.exit(code)


def _explain(error: Exception) -> str | None:
    """Explain an error to the user in one line. Return None for an unexpected error."""
    text = first_line(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "GPU out of memory: use a smaller --batch_size_per_gpu and more --accum_steps, or --grad_checkpointing"
    if "unable to allocate shared memory" in str(error):  # in a worker, whose traceback is the text
        return f"/dev/shm is full: {SHM_ADVICE}; or use fewer --num_workers"
    if isinstance(error, MemoryError | RuntimeError | OSError) and NO_MEMORY.search(f"{type(error).__name__}: {text}"):
        return f"out of memory: use smaller images, batches or networks, or fewer --num_workers ({text})"
    # PyTorch raises the death of a worker in a signal handler; the interrupted code may raise another error after it.
    earlier: BaseException | None = error
    while earlier is not None:
        if first_line(earlier).startswith("DataLoader worker (pid"):
            return f"{DEAD_WORKER} ({first_line(earlier)})"
        earlier = earlier.__context__
    is_of_group = isinstance(error, dist.DistError) or re.search("gloo|[Cc]onnection|pair closure", text)
    if dist.is_initialized() and is_of_group:
        return f"rank {dist.get_rank()} waited for another process that died or hangs: see its message ({text})"
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return f"cannot write {error.filename or 'a file'}: {error.strerror}; free some space and run the command again"
    if isinstance(error, OSError) and isinstance(error.filename, str | bytes):
        return f"cannot open {printable(error.filename)}: {error.strerror}"
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of an error message, or the name of the error's class if the message is empty."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def printable(name: Any) -> str:
    """Return a name or path in which control characters and bytes that are not UTF-8 are replaced."""
    return "".join(character if character.isprintable() else "\ufffd" for character in str(name))


def warn(text: str) -> None:
    """Print a one-line warning, above the progress bar if there is one."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


def kill_workers() -> None:
    """Kill the data-loading workers of this process: they ignore SIGTERM, so Python's exit-time join would hang."""
    if hasattr(signal, "SIGCHLD"):  # Windows has none
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report dead workers
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class Process(NamedTuple):
    """The place of this process among the processes of a command."""

    rank: int
    world_size: int
    device: torch.device  # its GPU, or the CPU if there is none


def launched_as() -> tuple[int, int, int]:
    """Return (rank, world_size, local_rank) as torchrun sets them in the environment: (0, 1, 0) without a launcher."""
    expected = f"start several processes with torchrun, or one process without {', '.join(RANKS)}"
    texts = {name: os.environ.get(name, default) for name, default in RANKS.items()}
    for name, text in texts.items():
        if not re.fullmatch("[0-9]{1,9}", text):
            raise UserError(f"the environment has {name}={text!r}, which is not a whole number: {expected}")
    rank, world_size, local_rank = map(int, texts.values())
    if rank >= world_size:
        raise UserError(f"the environment has RANK={rank} and WORLD_SIZE={world_size}, RANK must be less: {expected}")
    if world_size > 1 and "RANK" not in os.environ:
        raise UserError(f"the environment has WORLD_SIZE={world_size}, but no RANK: {expected}")
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")  # only srun sets it
    if "WORLD_SIZE" not in os.environ and tasks != "1":
        warn(f"srun starts {tasks} tasks, each a run of its own: use torchrun or run_with_submitit.py for a common one")
    return rank, world_size, local_rank


def is_first_process() -> bool:
    """Return whether this is the process that prints, also before the process group is set up."""
    return os.environ.get("RANK", "0") == "0"


def init_distributed(dist_url: str = "env://", timeout: datetime.timedelta = TIMEOUT) -> Process:
    """Join the process group that torchrun describes in the environment. Without one, run as a single process.

    Args:
        dist_url: URL to set up the process group.
        timeout: how long to wait for another process.

    Raises:
        UserError: the environment is inconsistent, there are more processes than GPUs, or the processes did not meet.
    """
    rank, world_size, local_rank = launched_as()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if torch.cuda.device_count() == 1 and "SLURM_LOCALID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
            local_rank = 0  # each task of `srun --gpus-per-task=1` sees only its own GPU
        if local_rank >= torch.cuda.device_count():
            count = f"found {torch.cuda.device_count()} GPUs on this machine and at least {local_rank + 1} processes"
            raise UserError(f"{count}: start one process per GPU")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size > 1:
        group: dict[str, Any] = {"backend": "gloo"}
        if device.type == "cuda":
            group = {"backend": "nccl", "device_id": device}
        try:
            group |= _rendezvous(timeout) if dist_url == "env://" else {"init_method": dist_url}
            dist.init_process_group(rank=rank, world_size=world_size, timeout=timeout, **group)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"rank {rank} could not join {world_size} processes: {first_line(error)}") from error
    return Process(rank, world_size, device)


def _rendezvous(timeout: datetime.timedelta) -> dict[str, Any]:
    """Return how the processes of torchrun meet, as arguments of `init_process_group`."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not (address and re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 2**16):
        environment = f"MASTER_ADDR={address} and MASTER_PORT={port or None}"
        raise UserError(f"the environment has {environment}, expected a host and a port: start with torchrun")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {"init_method": "env://"}
    # Processes restarted by torchrun use the store of its agent again and must not find old keys there.
    store = dist.TCPStore(address, int(port), is_master=False, timeout=timeout)
    return {"store": dist.PrefixStore(f"try{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)}


def start_all_reduce_mean(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start to average a tensor over all processes. Return a function that waits for the mean and returns it."""
    if not dist.is_initialized():
        return lambda: tensor
    total = tensor.clone()
    exchange = dist.all_reduce(total, async_op=True)

    def finish() -> torch.Tensor:
        exchange.wait()
        return total.div_(dist.get_world_size())

    return finish


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensors of all processes, which have the same shape, as [world_size, ...]."""
    if not dist.is_initialized():
        return tensor[None]
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return torch.stack(gathered)


def cosine_schedule(step: int, total_steps: int, base: float, final: float, warmup_steps: int = 0) -> float:
    """Return the value of DINO's schedule: linear from 0 to `base` during warm-up, then a half cosine to `final`."""
    if step < warmup_steps:
        return base * step / max(warmup_steps - 1, 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


def seed_networks(seed: int, step: int, rank: int, micro_step: int) -> None:
    """Seed stochastic depth, the only random part of the networks, by (seed, step, rank, micro-step)."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank, micro_step)).generate_state(1, np.uint64)[0]))
