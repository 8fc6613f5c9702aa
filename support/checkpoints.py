"""Checkpoints of a run: saving, resuming, and refusing to resume another run."""

import contextlib
import errno
import hashlib
import math
import os
import platform
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from support.files import atomic_write, make_folder, read_json
from support.weights import load_file, plain_arguments, recorded_arguments
from utils import UserError, all_gather, first_line, warn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

KEYS = "student teacher optimizer loss scaler meters epoch step batch_size images args".split()  # of a checkpoint
Contents = dict[str, Any]  # of a checkpoint
Settings = dict[str, Any]


class Earlier(NamedTuple):
    """What an earlier run has left in its folder."""

    checkpoint: Contents | None
    path: Path | None  # that the checkpoint was read from
    init_hash: str | None  # of the file of --init_weights that the run started from


class RunSize(NamedTuple):
    """The size of a run. Batch size and images of a resumed run must be those of its checkpoint."""

    batch_size: int  # images per step, of all processes and micro-batches
    images: list[int | str]  # their number, and the hash of their names
    epochs: int
    earlier_hash: str = ""  # the hash by the rule of version 0.9.0, if its checkpoints may be met

    @property
    def steps_per_epoch(self) -> int:
        return int(self.images[0]) // self.batch_size

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch


def load_latest(path: Path) -> tuple[dict[str, Any], Path]:
    """Read a checkpoint. If it is missing or damaged, read the previous one. Return (contents, path that was read).

    Raises:
        UserError: neither file can be read.
    """
    previous = previous_path(path)
    try:
        return load_file(path), path
    except UserError as error:
        if not previous.exists():
            raise
        contents = load_file(previous)
        if path.exists():
            warn(f"{error}; using the previous one, {previous}")
        return contents, previous


def previous_path(path: Path) -> Path:
    """Return the path of the previous checkpoint: checkpoint.pth -> checkpoint_previous.pth."""
    return path.with_name(f"{path.stem}_previous{path.suffix}")


def save(contents: dict[str, Any], path: Path, keep_previous: bool = False) -> None:
    """Write a checkpoint of tensors and plain values. `keep_previous` keeps the old file at `previous_path`."""
    with atomic_write(path, previous_path(path) if keep_previous else None) as temporary, temporary.open("wb") as file:
        torch.save(contents, file)


def save_run(contents: dict[str, Any], output_dir: Path, kept_epoch: int | None = None, keep_last: int = 0) -> None:
    """Write `checkpoint.pth`, from which a run resumes.

    Args:
        contents: tensors and plain values.
        output_dir: folder of the run.
        kept_epoch: if not None, also write the periodic checkpoint `checkpointNNNN.pth` with this number.
        keep_last: number of periodic checkpoints to keep; 0 keeps all.
    """
    if kept_epoch is not None:
        save(contents, output_dir / f"checkpoint{kept_epoch:04}.pth")
    save(contents, output_dir / "checkpoint.pth", keep_previous=True)
    if keep_last:
        periodic = [path for path in output_dir.iterdir() if re.fullmatch(r"checkpoint\d{4,}\.pth", path.name)]
        for path in sorted(periodic, key=lambda path: int(path.stem.removeprefix("checkpoint")))[:-keep_last]:
            path.unlink()


def refuse_diverged(networks: Mapping[str, torch.nn.Module], step: int) -> None:
    """Check that all weights are finite before they are saved. A collective call.

    Args:
        networks: modules by name.
        step: number of the step that ends, for the message.

    Raises:
        UserError: on all processes, if a weight of one of them is not finite.
    """
    states = {f"{name}.{key}": value for name, m in networks.items() for key, value in m.state_dict().items()}
    states = {name: value for name, value in states.items() if value.is_floating_point()}
    finite = all_gather(torch.stack(torch._foreach_norm(list(states.values()), math.inf)).isfinite().float()).amin(0)
    if not finite.all():
        bad = list(states)[int(finite.argmin())]
        raise UserError(f"{bad} is not finite after step {step}; the weights were not saved: use a lower --lr")


def lock(output_dir: Path) -> int | None:
    """Lock the folder of a run against other runs until the process ends or the returned file descriptor is closed.

    The lock is a POSIX record lock, which forked workers do not inherit: it is gone as soon as the process is, however
    it ends. The file `.lock` stays and holds process id and host of the last run. Without support for locks, warn and
    return None.

    Raises:
        UserError: another process has the lock.
    """
    if fcntl is None:
        return None
    descriptor, path = None, output_dir / ".lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
    except OSError as error:
        if descriptor is not None and error.errno in (errno.EACCES, errno.EAGAIN):
            holder = os.read(descriptor, 100).decode(errors="replace").strip() or "an unknown process"
            os.close(descriptor)
            advice = "wait until it ends, or use another --output_dir"
            raise UserError(f"{output_dir} is in use by another run, {holder}: {advice}") from error
        warn(f"cannot lock {path} ({error.strerror}): make sure that no other run uses this --output_dir")
    return descriptor


def tidy(output_dir: Path, source_path: Path | None) -> None:
    """Rename an unreadable checkpoint and remove incomplete files of a killed process.

    Args:
        source_path: checkpoint that the run resumes from, or None.
    """
    path = output_dir / "checkpoint.pth"
    if source_path == previous_path(path) and path.exists():
        path.replace(path.with_name("checkpoint_unreadable.pth"))
    for incomplete in output_dir.glob("checkpoint*.pth.tmp"):
        incomplete.unlink()


def refuse_other_run(
    earlier: Settings, settings: Settings, defaults: Settings, may_change: Collection[str], path: Path
) -> None:
    """Check that an earlier run had the same settings.

    Args:
        earlier, settings: settings by name. Those that `earlier` lacks, because an older version did not have them,
            count as defaults.
        defaults: default settings.
        may_change: names of settings that may differ.
        path: file that `earlier` was read from, for the message.

    Raises:
        UserError: settings differ. The message names them.
    """
    earlier = {**defaults, **plain_arguments(earlier, path)}
    names = [name for name in settings if name not in may_change and earlier.get(name) != settings[name]]
    if names:
        there = {name: str(earlier.get(name, "unknown"))[:80] for name in names}
        differences = ", ".join(f"--{name} {there[name]} there, {settings[name]} here" for name in names)
        longer = "; the schedules depend on --epochs, so that a run cannot be extended" if "epochs" in names else ""
        advice = "use those to resume, or another --output_dir"
        raise UserError(f"{path} belongs to a run with other arguments: {differences}{longer}; {advice}")


def hash_of_file(path: str) -> str | None:
    """Return the SHA-256 hash of a file; None if there is no such file, or it cannot be read."""
    if not os.path.isfile(path):
        return None
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
            return digest.hexdigest()
    except OSError:
        return None


def recorded_settings(output_dir: Path) -> Settings:
    """Return the settings that an earlier run has recorded in its folder; {} without a file that can be read."""
    path = output_dir / "args.json"
    with contextlib.suppress(UserError):
        return recorded_arguments({"args": read_json(path)}, path)
    with contextlib.suppress(UserError):  # in `open_output`
        return recorded_arguments(*load_latest(output_dir / "checkpoint.pth"))
    return {}


def open_output(output_dir: Path, settings: Settings, defaults: Settings, may_change: Collection[str]) -> Earlier:
    """Create the output folder and return what an earlier run has left there.

    Args:
        output_dir: folder of the run.
        settings: settings of the run.
        defaults: default settings.
        may_change: names of settings that may differ from those of the earlier run.

    Raises:
        UserError: the folder cannot be written to, or holds a run with other settings or from other weights.
    """
    make_folder(output_dir, "--output_dir")
    path, source, checkpoint = output_dir / "checkpoint.pth", output_dir / "args.json", None
    if os.path.lexists(path) or previous_path(path).exists():
        checkpoint, source = load_latest(path)
        if not set(KEYS) <= set(checkpoint):
            raise UserError(f"{source} is not a checkpoint of main_lgssl.py: use another --output_dir")
        earlier = checkpoint["args"] = plain_arguments(checkpoint["args"], source)
    elif source.exists():
        earlier = plain_arguments(read_json(source), source)
    elif (output_dir / "log.txt").exists() or (output_dir / "steps.jsonl").exists():
        raise UserError(f"{output_dir} holds logs but no run: move them, or use another --output_dir")
    else:
        return Earlier(None, None, settings["init_hash"])
    refuse_other_run(earlier, settings, defaults, may_change, source)
    there, here = earlier.get("init_hash"), settings["init_hash"]
    if here not in (None, there):
        raise UserError(
            f"{source} belongs to a run that started from another {settings['init_weights']}, with SHA-256 "
            f"{str(there)[:12]}, found {here[:12]}: restore or remove it, resuming does not read it; or use another "
            "--output_dir"
        )
    return Earlier(checkpoint, source if checkpoint else None, there)


def restore(checkpoint: Contents, path: Path | None, state: Mapping[str, Any], size: RunSize, world_size: int) -> int:
    """Load a checkpoint into the parts of a run and return the step to resume from.

    Args:
        checkpoint: contents of `path`, which is for messages.
        state: the parts by name, among them the optimizer.
        size: size of the run.
        world_size: number of processes, for messages.

    Raises:
        UserError: the checkpoint does not fit the run, or holds weights that are not finite.
    """
    optimizer: torch.optim.Optimizer = state["optimizer"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        if checkpoint["batch_size"] != size.batch_size:
            here = f"{size.batch_size} on {world_size} processes: use as many processes as before"
            raise UserError(f"{path} has {checkpoint['batch_size']} images per step, found {here}")
        if checkpoint["images"] not in (size.images, [size.images[0], size.earlier_hash]):
            here = f"{size.images[0]}, or images with other names; names are compared, contents are not"
            here += ": use the same images, or another --output_dir"
            raise UserError(f"{path} was trained on {checkpoint['images'][0]} images, found {here}")
        step, moments = checkpoint["step"], checkpoint["optimizer"]["state"]
        if not 0 <= step <= size.total_steps or checkpoint["epoch"] != step // size.steps_per_epoch:
            raise UserError(f"{path} was saved at step {step}, expected a step in [0, {size.total_steps}]")
        for i, values in moments.items():
            if any(value.shape not in ((), parameters[i].shape) for value in values.values()):
                raise ValueError(f"the optimizer's state of parameter {i} has another shape")
        saved = [checkpoint[name] for name in ("student", "teacher", "loss", "scaler")] + list(moments.values())
        if not all(torch.as_tensor(value).isfinite().all() for values in saved for value in values.values()):
            raise UserError(f"{path} holds weights that are not finite: remove it to use the previous one")
        # Only the optimizer's moments: the loop sets learning rate and weight decay, other settings never change.
        groups = optimizer.state_dict()["param_groups"]
        checkpoint = {**checkpoint, "optimizer": {"state": moments, "param_groups": groups}}
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}; use another --output_dir") from error
    return step


def hash_of_names(dataset: Dataset, as_text: bool = False) -> str:
    """Return a hash of the image paths of a data set, relative to its folder, however the command names that.

    Paths outside of the folder stay as they are. Data sets without files have the hash of no names.

    Args:
        as_text: cut the folder off as text, as version 0.9.0 did: the hash of --data_path . is another.
    """
    root, paths = str(getattr(dataset, "root", "")), getattr(dataset, "paths", [])
    if as_text:
        names = [path.removeprefix(root) for path in paths]
    else:
        folders = os.path.join(root, ""), os.path.join(os.path.abspath(root), "")
        names = [path.removeprefix(folders[0]).removeprefix(folders[1]) for path in paths]
        names = ["/" + (os.path.normpath(name) if "./" in name else name).removeprefix("/") for name in names]
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()


def refuse_different_starts(step: int, device: torch.device) -> None:
    """Raise UserError if the processes would resume from different steps."""
    steps = sorted(set(all_gather(torch.tensor(step, device=device)).tolist()))
    if len(steps) > 1:
        found = f"the processes found checkpoints of different steps, {', '.join(map(str, steps))}"
        raise UserError(f"{found}: --output_dir must be one folder that all machines share")
