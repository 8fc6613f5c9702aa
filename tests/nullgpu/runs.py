"""Run commands of this repository on the library of build.py, and print what was counted as a JSON list.

    python -m nullgpu.runs 'main_lgssl --dataset digits --log_every 4 ...' 'eval_knn ...' ...

A training takes its usual way, but repeats its first batch and ends after END steps. Each command gives
    "error": the traceback, or "";
and a training also
    "steps": for each step {"launches", "pageable_copies", "synchronizations", "loss_launches",
        "synchronizations_before_backward"}, except for step STRICT, in which a synchronization is an error;
    "peak_bytes", "reserved_bytes": of PyTorch's allocator: what tensors take, and with what CUDA graphs keep;
    "lines": [[place and operator, launches in step LISTED], ...], the most launches first.
"""

import collections
import contextlib
import ctypes
import functools
import gc
import importlib
import importlib.util
import json
import sys
import traceback
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import main_lgssl
from support import checkpoints, cuda_graphs, meters
from utils import UserError

ROOT = Path(__file__).parents[2]
LISTED, STRICT, END = 4, 5, 6  # steps 0 and 1 warm up, step 3 reports with --log_every 4
COUNTERS = {
    name: ctypes.c_long.in_dll(ctypes.CDLL(None), f"nullgpu_{name}")
    for name in ("launches", "pageable_copies", "synchronizations")
}


def read() -> dict:
    """Return the counts since the start."""
    return {name: counter.value for name, counter in COUNTERS.items()}


class End(Exception):
    """A training has taken END steps."""


class Record:
    """What one training counts."""

    def __init__(self):
        self.steps, self.lines = [], collections.Counter()
        self.start_step()

    def start_step(self) -> None:
        self.start, self.loss_launches, self.synchronizations_before_backward = read(), 0, 0

    def end_step(self) -> None:
        counts = {name: count - self.start[name] for name, count in read().items()}
        counts |= {name: getattr(self, name) for name in ("loss_launches", "synchronizations_before_backward")}
        self.steps.append(counts)
        self.start_step()


record = Record()  # of the command that runs


class RepeatedBatch:
    """The loader of a training, reduced to its first batch. Tells the record where steps begin and end."""

    def __init__(self, build_loader, args, *rest):
        original = build_loader(args, *rest)
        self.dataset, self.accum_steps = original.dataset, args.accum_steps
        batch = original.dataset[next(iter(original.sampler))]
        batches = [batch] * (END * args.accum_steps)
        self.loader = DataLoader(batches, batch_size=None, pin_memory=original.pin_memory)

    def __iter__(self):
        with contextlib.ExitStack() as listing:
            for i, batch in enumerate(self.loader):
                step, micro_step = divmod(i, self.accum_steps)
                if micro_step == 0:
                    listing.close()
                    if step == 0:
                        record.start_step()
                    else:
                        record.end_step()
                    if step == LISTED:
                        listing.enter_context(Lines())
                    torch.cuda.set_sync_debug_mode("error" if step == STRICT else "default")
                yield batch
        raise End


class Lines(TorchDispatchMode):
    """Counts launches by line of this repository, or in the backward pass by node, and by operator."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        before = COUNTERS["launches"].value
        result = operator(*args, **(kwargs or {}))
        if launches := COUNTERS["launches"].value - before:
            node, frame = torch._C._current_autograd_node(), sys._getframe(1)
            while frame and Path(frame.f_code.co_filename).parent not in (ROOT, ROOT / "support"):
                frame = frame.f_back
            line = f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}" if frame else "unknown"
            record.lines[f"{node.name() if node else line} {operator}"] += launches
        return result


class OneLaunch:
    """Takes the place of a Triton kernel, which needs a true device. It launches a memset."""

    def __getitem__(self, grid):
        return lambda tensor, *args, **kwargs: tensor.zero_()


def without_verdict(check):
    """Let a check for finite values do all that it does, but ignore its result: values read from the device are 0."""

    @functools.wraps(check)
    def call(*args):
        with contextlib.suppress(UserError):
            check(*args)

    return call


def patch() -> None:
    """Make this process fit for a device that does not compute, and count."""
    # cuDNN, which batch norm would use, needs a true device.
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    if importlib.util.find_spec("support.fused_cross_entropy"):
        fused = importlib.import_module("support.fused_cross_entropy")
        for name, value in list(vars(fused).items()):
            if type(value).__name__ == "JITFunction":
                setattr(fused, name, OneLaunch())
    main_lgssl.build_loader = functools.partial(RepeatedBatch, main_lgssl.build_loader)
    meters.Meters.stop_at_bad_step = without_verdict(meters.Meters.stop_at_bad_step)
    checkpoints.refuse_diverged = without_verdict(checkpoints.refuse_diverged)
    loss, backward, unique = main_lgssl.LocalGlobalLoss.forward, torch.Tensor.backward, torch.Tensor.unique

    def counted_loss(*args):
        before = COUNTERS["launches"].value
        result = loss(*args)
        record.loss_launches += COUNTERS["launches"].value - before
        return result

    def watched_backward(*args):
        backward(*args)
        waited = COUNTERS["synchronizations"].value - record.start["synchronizations"]
        record.synchronizations_before_backward = waited

    def unique_labels(labels, **kwargs):  # would find none
        found = unique(labels, **kwargs)
        return found if kwargs or not labels.is_cuda else labels[:1]

    def fail(warning):
        raise AssertionError(warning)

    main_lgssl.LocalGlobalLoss.forward, cuda_graphs.warn = counted_loss, fail
    torch.Tensor.backward, torch.Tensor.unique = watched_backward, unique_labels


def run(command) -> dict:
    """Run a command, a module with its options, in this process."""
    global record
    record, error = Record(), ""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    module, *words = command.split()
    try:
        importlib.import_module(module).main(words)
    except End:
        pass
    except Exception:
        error = traceback.format_exc()
    torch.cuda.set_sync_debug_mode("default")
    memory = {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
    return {"error": error, "steps": record.steps, **memory, "lines": record.lines.most_common()}


if __name__ == "__main__":
    patch()
    with contextlib.redirect_stdout(sys.stderr):
        results = [run(command) for command in sys.argv[1:]]
    print(json.dumps(results))
