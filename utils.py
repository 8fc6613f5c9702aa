"""Small helpers with no home elsewhere: processes, schedules, arguments, logging."""

import argparse
import contextlib
import datetime
import difflib
import errno
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from health import CollapseWatch

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
    if text.startswith("DataLoader worker (pid"):
        return f"{DEAD_WORKER} ({text})"
    if dist.is_initialized() and (isinstance(error, dist.DistError) or re.search("gloo|[Cc]onnection", text)):
        return f"rank {dist.get_rank()} waited for another process, which died or hangs: see its message ({text})"
    return None


# --- processes


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


# --- schedules


def cosine_schedule(step, total_steps, base, final, warmup_steps=0):
    """Return the value at a step: linear from 0 to `base` during the warm-up, then half a cosine down to `final`.

    As DINO's. A warm-up longer than the run is cut at the run's end.
    """
    if step < warmup_steps:
        return base * step / max(warmup_steps - 1, 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


# --- arguments


def bool_flag(text):
    """Parse true/false, on/off, 1/0, as DINO's options do."""
    if text.lower() in ("true", "on", "1"):
        return True
    if text.lower() in ("false", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not a switch, expected true or false")


def number(kind, low=-math.inf, high=math.inf):
    """Return an argparse type: an int or a float in [low, high]."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            article = "a whole number" if kind is int else "a number"
            bounds = f"of at least {low}" if high == math.inf else f"in [{low}, {high}]"
            raise argparse.ArgumentTypeError(f"found {text!r}, expected {article} {bounds}")
        return value

    return parse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says the default of every option that has one, a list as it would be given."""

    def _get_help_string(self, action):
        if isinstance(action.default, list) and action.default:
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return action.help if action.default in (None, []) else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with argument files and one-line errors.

    `@FILE` stands for the words in FILE, where `#` starts a comment. A file may include another one with `@OTHER`,
    which is looked for beside the including file. What comes later on the command line wins.
    """

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        self.origin = {}

    def parse_args(self, args=None, namespace=None):
        words = self._expand(sys.argv[1:] if args is None else args, Path(), ())
        namespace, unknown = self.parse_known_args(words, namespace)
        if unknown:
            word = unknown[0].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            close = difflib.get_close_matches(word, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "--help lists the options"
            where = f" in {self.origin[unknown[0]]}" if unknown[0] in self.origin else ""
            self.error(f"unknown option {word}{where}; {hint}")
        return namespace

    def _expand(self, words, folder, including):
        expanded = []
        for word in words:
            if not word.startswith("@"):
                expanded.append(word)
                continue
            path = folder / word[1:]
            if path.resolve() in including:
                self.error(f"argument file {path} includes itself")
            try:
                inner = shlex.split(path.read_text(encoding="utf-8"), comments=True)
            except (OSError, ValueError) as error:  # ValueError: an open quotation mark, or not text
                self.error(f"cannot read argument file {path}: {getattr(error, 'strerror', None) or error}")
            self.origin.update((w, path) for w in inner)
            expanded += self._expand(inner, path.parent, (*including, path.resolve()))
        return expanded

    def check_crops(self, args):
        """Refuse crop sizes that the patch does not divide, and crop scales that are no range above 0."""
        for name in ("global_crops_size", "local_crops_size"):
            size, patch = getattr(args, name), args.patch_size
            if size % patch:
                nearest = max(round(size / patch), 1) * patch
                self.error(f"--{name} {size} is not a multiple of --patch_size {patch}; the nearest is {nearest}")
        for name in ("global_crops_scale", "local_crops_scale"):
            low, high = getattr(args, name)
            if not 0 < low <= high:
                self.error(f"--{name} {low} {high}: expected two shares above 0, the smaller first")

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


# --- logging


class Report:
    """What a run says: a progress bar or plain lines, `log.txt`, `steps.jsonl` and TensorBoard.

    `log.txt` has one line of JSON per epoch, as DINO's, `steps.jsonl` one per logging interval. The files of an earlier
    run are cut back to where this one goes on. TensorBoard's are written by a thread of its own.

    Args:
        watch_from: step from which on a collapse is looked for; before, all outputs are alike anyway.
    """

    def __init__(self, output_dir, start_step, epochs, steps_per_epoch, watch_from=0):
        from torch.utils.tensorboard import SummaryWriter  # takes a second, and one process needs it

        self.epochs, self.total_steps = epochs, epochs * steps_per_epoch
        self.watch, self.watch_from = CollapseWatch(), watch_from
        self.epoch_log, self.step_log = output_dir / "log.txt", output_dir / "steps.jsonl"
        self.metrics = {}  # the last ones
        for values in _cut_log(self.epoch_log, "epoch", start_step // steps_per_epoch):
            self._remember(values)
        for values in _cut_log(self.step_log, "step", start_step):
            if values["step"] >= watch_from:
                self.watch(values)  # has warned already
        # A slow disk holds up the training only once so many entries wait.
        self.board = SummaryWriter(output_dir / "tb", max_queue=1000, purge_step=start_step)
        self.bar = tqdm(total=self.total_steps, initial=start_step, unit="step", disable=not sys.stderr.isatty())

    def interval(self, epoch, step, seconds_per_step, values):
        """Report the mean values since the last interval, `step` being its last step."""
        append_line({"epoch": epoch, "step": step, **values}, self.step_log)
        for name, value in values.items():
            if value is not None:
                self.board.add_scalar(name, value, step)
        loss, rate = f"{values['loss']:.3f}", f"{values['images_per_s']:.0f}"
        if self.bar.disable:
            left = datetime.timedelta(seconds=round((self.total_steps - step - 1) * seconds_per_step))
            place = f"epoch {epoch + 1}/{self.epochs}  step {step + 1}/{self.total_steps}"
            print(f"{place}  loss {loss}  lr {values['lr']:.2e}  {rate} images/s  left {left}", flush=True)
        else:
            self.bar.set_description(f"epoch {epoch + 1}/{self.epochs}", refresh=False)
            self.bar.set_postfix({"loss": loss, "images/s": rate}, refresh=False)
            self.bar.update(step + 1 - self.bar.n)
        for text in self.watch(values) if step >= self.watch_from else []:
            warn(text)

    def epoch(self, epoch, step, means, knn_top1=None):
        """Report the means of an epoch that ended with `step`, and the online k-NN where it was measured."""
        values = {f"train_{name}": value for name, value in means.items()}
        if knn_top1 is not None:
            values["knn_top1"] = knn_top1
            self.board.add_scalar("knn_top1", knn_top1, step)
            tqdm.write(f"epoch {epoch + 1}/{self.epochs}  online k-NN top-1 {knn_top1:.2f} %")
        self._remember(values)
        append_line({**values, "epoch": epoch}, self.epoch_log)

    def _remember(self, values):
        self.metrics |= {name: value for name, value in values.items() if value is not None and name != "epoch"}

    def pictures(self, pictures, step):
        """Show pictures {name: uint8 [H, W, 3]}."""
        for name, picture in pictures.items():
            self.board.add_image(name, picture, step, dataformats="HWC")

    def histogram(self, name, counts, step):
        """Show how often each of the values 0, 1, ... occurred, counts [n]."""
        used = counts.nonzero()[:, 0]
        if len(used):
            counts = counts[: used[-1] + 1]
            values = torch.arange(len(counts), dtype=counts.dtype)
            numbers = (counts.sum(), (counts * values).sum(), (counts * values**2).sum())
            edges = (values + 0.5).tolist()
            bounds = (float(used[0]), float(used[-1]))
            self.board.add_histogram_raw(name, *bounds, *map(float, numbers), edges, counts.tolist(), step)

    def text(self, name, values):
        """Show a dictionary."""
        self.board.add_text(name, "    " + json.dumps(values, indent=2).replace("\n", "\n    "), 0)

    def hyperparameters(self, args):
        """Store the arguments with the last metrics of the run, for TensorBoard's HPARAMS."""
        plain = {name: v if isinstance(v, (bool, int, float, str)) else str(v) for name, v in args.items()}
        metrics = {f"final/{name}": value for name, value in self.metrics.items()}
        self.board.add_hparams(plain, metrics, run_name=".")

    def sync(self):
        """Make sure that what was reported outlasts a failure of the machine, as a checkpoint does."""
        for path in (self.epoch_log, self.step_log):
            if path.exists():
                with path.open("a") as file:
                    os.fsync(file.fileno())

    def close(self):
        self.bar.close()
        self.board.close()


def warn(text):
    """Print a warning of one line, above the progress bar where there is one."""
    tqdm.write(f"warning: {text}", file=sys.stderr)


def _cut_log(path, key, end):
    """Drop the lines of a log whose `key` is not below `end`, and what a process that was killed left of a line.

    Returns:
        the entries that are left
    """
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [(line, entry) for line in lines if (entry := _entry(line)).get(key, end) < end]
    if len(kept) < len(lines):
        write_text("".join(line for line, _ in kept), path)
    return [entry for _, entry in kept]


def read_log(path):
    """Return the entries of a log, without lines that were cut short."""
    return [entry for line in path.read_text(errors="replace").splitlines(keepends=True) if (entry := _entry(line))]


def _entry(line):
    try:
        return dict(json.loads(line)) if line.endswith("\n") else {}
    except (ValueError, TypeError):
        return {}


def make_writable(folder):
    """Make a folder where it is missing, and raise OSError where no file can be made in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def write_text(text, path):
    """Write a small file so that `path` is at every moment either the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def append_line(entry, path):
    """Add a line of JSON to a file."""
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")
