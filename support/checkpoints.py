"""Saving, resuming and safe loading of checkpoints."""

import errno
import hashlib
import math
import os
import platform
import re
from pathlib import Path

import torch

from support.files import atomic_write, make_folder, read_json
from support.weights import load_file, plain_arguments, short_repr
from utils import UserError, all_gather, first_line, warn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Arguments that may change when a run resumes. Any other change makes it a different run.
MAY_CHANGE = "data_path download output_dir num_workers log_every saveckp_freq dist_url local_rank".split()
MAY_CHANGE += "grad_checkpointing compile save_every_steps keep_last dist_timeout on_bad_image max_bad_images".split()
MAY_CHANGE += ["knn_every", "image_every", "rebuild_index"]
MAY_CHANGE += ["init_hash"]  # compared by _refuse_other_start
# Names that a run writes in its folder
RUN_FILES = (
    r"(checkpoint(_previous|_unreadable|\d{4,})?\.pth|args\.json|log\.txt|steps\.jsonl|environment\.jsonl)(\.tmp)?"
)


def load_latest(path) -> tuple[dict, Path] | tuple[None, None]:
    """Read a checkpoint. If it is damaged, warn and read the previous one.

    Returns:
        (contents, path that was read), or (None, None) if neither file exists

    Raises:
        UserError: neither file can be read.
    """
    path = Path(path)
    previous = previous_path(path)
    if not path.exists():
        return (load_file(previous), previous) if previous.exists() else (None, None)
    try:
        return load_file(path), path
    except UserError as error:
        if not previous.exists():
            raise
        contents = load_file(previous)
        warn(f"{error}; using the previous one, {previous}")
        return contents, previous


def previous_path(path) -> Path:
    """Return the path of the previous checkpoint: checkpoint.pth -> checkpoint_previous.pth."""
    return path.with_name(f"{path.stem}_previous{path.suffix}")


def save(contents, path, keep_previous=False) -> None:
    """Write a checkpoint of tensors and plain values. `keep_previous` keeps the old file at `previous_path`."""
    with atomic_write(path, previous_path(path) if keep_previous else None) as temporary, temporary.open("wb") as file:
        torch.save(contents, file)


def save_run(contents, output_dir, kept_epoch=None, keep_last=0) -> None:
    """Write `checkpoint.pth`, from which a run resumes.

    Args:
        contents: dictionary of tensors and plain values.
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


def refuse_diverged(networks, step) -> None:
    """Check that all weights are finite before they are saved. A collective call.

    Args:
        networks: {name: module}.
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


def lock(output_dir) -> int | None:
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
            holder = first_line(os.read(descriptor, 100).decode(errors="replace").strip() or "an unknown process")
            os.close(descriptor)
            reason = f"{output_dir} is in use by another run, {holder}"
            raise UserError(f"{reason}: wait until it ends, or use another --output_dir") from error
        warn(f"cannot lock {path} ({error.strerror}): make sure that no other run uses this --output_dir")
    return descriptor


def tidy(output_dir, source_path) -> None:
    """Rename an unreadable checkpoint and remove incomplete files of a killed process.

    Args:
        source_path: checkpoint that the run resumes from, or None.
    """
    path = output_dir / "checkpoint.pth"
    if source_path == previous_path(path) and path.exists():
        path.replace(path.with_name("checkpoint_unreadable.pth"))
    for incomplete in output_dir.glob("checkpoint*.pth.tmp"):
        incomplete.unlink()


def may_change(args) -> set[str]:
    """Return the names of arguments that may differ from those of an earlier run.

    Args:
        args: dictionary of the arguments that are asked for. A precision of None is not asked for.
    """
    return {*MAY_CHANGE, "precision"} if args.get("precision") is None else {*MAY_CHANGE}


def refuse_other_run(earlier, args, defaults, may_change, path) -> None:
    """Check that an earlier run had the same arguments.

    Args:
        earlier, args: dictionaries of arguments. Arguments that `earlier` lacks, because an older version did not have
            them, count as defaults.
        defaults: dictionary of default arguments.
        may_change: names of arguments that may differ.
        path: file that `earlier` was read from, for the message.

    Raises:
        UserError: arguments differ. The message names them.
    """
    earlier = {**defaults, **plain_arguments(earlier, path)}
    names = [name for name in args if name not in may_change and earlier.get(name) != args[name]]
    if names:
        there = {name: str(earlier.get(name, "unknown"))[:80] for name in names}
        differences = ", ".join(f"--{name} {there[name]} there, {args[name]} here" for name in names)
        longer = "; the schedules depend on --epochs, so that a run cannot be extended" if "epochs" in names else ""
        advice = "use those to resume, or another --output_dir"
        raise UserError(f"{path} belongs to a run with other arguments: {differences}{longer}; {advice}")


def hash_of_file(path) -> str | None:
    """Return the SHA-256 hash of a file; None if there is no such file, or it cannot be read."""
    if not os.path.isfile(path):
        return None
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()


def _refuse_other_start(earlier, args, path) -> None:
    """Check that the file of --init_weights is the one that an earlier run started from, or is gone.

    Args:
        earlier, args: dictionaries of arguments. `args` gets the `init_hash` of `earlier`.
        path: file that `earlier` was read from, for the message.

    Raises:
        UserError: the file has changed.
    """
    there, here = earlier.get("init_hash"), args.get("init_hash")
    if here not in (None, there):
        found = f"with SHA-256 {str(there)[:12]}, found {here[:12]}"
        advice = "restore or remove it, resuming does not read it; or use another --output_dir"
        raise UserError(f"{path} belongs to a run that started from another {args['init_weights']}, {found}: {advice}")
    args["init_hash"] = there


def open_output(output_dir, args, defaults) -> tuple[dict, Path] | tuple[None, None]:
    """Create the output folder and return what `load_latest` finds in it.

    Args:
        output_dir: folder of the run.
        args, defaults: dictionaries of the arguments of the run and of their defaults. `args["init_hash"]`, the hash of
            the file of --init_weights, becomes that of the earlier run.

    Raises:
        UserError: the folder cannot be written to, or holds a run with other arguments or other kinds of files.
    """
    make_folder(output_dir, "--output_dir")
    for path in output_dir.iterdir():
        kind = "folder" if path.name == "tb" else "file"
        is_right = path.is_dir() if kind == "folder" else path.is_file() or not re.fullmatch(RUN_FILES, path.name)
        if not is_right and os.path.lexists(path):  # not removed meanwhile
            raise UserError(f"{path} is not a {kind}: move it, or use another --output_dir")
    checkpoint, source_path = load_latest(output_dir / "checkpoint.pth")
    earlier = output_dir / "args.json"
    if checkpoint:
        keys = "student teacher optimizer loss scaler meters epoch step batch_size images args".split()
        if not set(keys) <= set(checkpoint):
            raise UserError(f"{source_path} is not a checkpoint of main_lgssl.py: use another --output_dir")
        checkpoint["args"] = plain_arguments(checkpoint["args"], source_path)
        refuse_other_run(checkpoint["args"], args, defaults, may_change(args), source_path)
        _refuse_other_start(checkpoint["args"], args, source_path)
    elif earlier.exists():
        try:
            earlier_args = read_json(earlier)
        except UserError as error:
            raise UserError(f"cannot read {earlier}: remove it, or use another --output_dir") from error
        refuse_other_run(earlier_args, args, defaults, may_change(args), earlier)
        _refuse_other_start(earlier_args, args, earlier)
    elif (output_dir / "log.txt").exists() or (output_dir / "steps.jsonl").exists():
        raise UserError(f"{output_dir} holds logs but no run: move them, or use another --output_dir")
    return checkpoint, source_path


def _form(value) -> str:
    return f"{value.dtype} {list(value.shape)}".removeprefix("torch.") if torch.is_tensor(value) else short_repr(value)


def _check_form(found, own, name) -> None:
    """Raise ValueError if a value from a file differs in keys, types or shapes from a value of this program."""
    if isinstance(own, list) and isinstance(found, list):
        found, own = dict(enumerate(found)), dict(enumerate(own))
    if isinstance(own, dict) and isinstance(found, dict):
        for key in {**own, **found}:
            if key not in own or key not in found:
                raise ValueError(f"{name}.{short_repr(key)} {'is missing' if key in own else 'is not part of it'}")
            _check_form(found[key], own[key], f"{name}.{key}" if name else key)
    elif torch.is_tensor(own) and torch.is_tensor(found):
        if _form(found) != _form(own):
            raise ValueError(f"{name} is {_form(found)}, expected {_form(own)}")
    elif type(found) is not type(own):
        kinds = {int: "a whole number", float: "a number", str: "a text", list: "a list"}
        expected = _form(own) if torch.is_tensor(own) else kinds.get(type(own), "a dictionary")
        raise ValueError(f"{name} is {_form(found)}, expected {expected}")


def restore(checkpoint, source_path, state, meters, batch_size, images, total_steps, rank, world_size) -> int:
    """Load a checkpoint into the parts of a run and return the step to resume from.

    Args:
        source_path: path of the checkpoint, for messages.
        state: {name: object with a state_dict}.
        meters: Meters.
        batch_size, images: total batch size, and number and hash of the images; must equal those of the checkpoint.
        total_steps: length of the run.
        rank, world_size: rank of this process and number of processes.

    Raises:
        UserError: the checkpoint does not fit the run, or holds weights that are not finite.
    """
    form = {name: part.state_dict() for name, part in state.items()}
    form |= {"batch_size": batch_size, "images": images, "step": 0, "epoch": 0}
    optimizer, groups = state["optimizer"], form.pop("optimizer")["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = ("step", "exp_avg", "exp_avg_sq") if isinstance(optimizer, torch.optim.AdamW) else ("momentum_buffer",)
    try:
        _check_form({name: checkpoint[name] for name in form}, form, "")
        moments = checkpoint["optimizer"]["state"]
        for i, found in moments.items():
            expected = {name: torch.tensor(0.0) if name == "step" else parameters[i] for name in own}
            _check_form(found, expected, f"optimizer.state.{i}")
        if checkpoint["batch_size"] != batch_size:
            expected, found = checkpoint["batch_size"], f"found {batch_size} on {world_size} processes"
            raise UserError(f"{source_path} has {expected} images per step, {found}: use as many processes as before")
        if checkpoint["images"] != images:
            found = f"{checkpoint['images'][0]} images, found {images[0]}, or images with other names"
            raise UserError(f"{source_path} was trained on {found}: use the same images, or another --output_dir")
        step, epoch = checkpoint["step"], checkpoint["epoch"]
        if not (0 <= step <= total_steps and epoch == step // (images[0] // batch_size)):
            expected = f"expected a step in [0, {total_steps}] and its epoch"
            raise UserError(f"{source_path} was saved at step {step} and epoch {epoch}, {expected}")
        saved = [checkpoint[name] for name in ("student", "teacher", "loss", "scaler")] + list(moments.values())
        if not all(torch.as_tensor(value).isfinite().all() for values in saved for value in values.values()):
            raise UserError(f"{source_path} holds weights that are not finite: remove it to use the previous one")
        # Only the optimizer's moments: the loop sets learning rate and weight decay, other settings never change.
        checkpoint = {**checkpoint, "optimizer": {"state": moments, "param_groups": groups}}
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
        meters.load_state_dict(checkpoint["meters"], rank)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{source_path} does not fit: {first_line(error)}; use another --output_dir") from error
    return step


def hash_of_names(dataset) -> str:
    """Return a hash of the image paths of a data set, relative to its folder. Data sets without files have none."""
    root = str(getattr(dataset, "root", ""))
    names = [path.removeprefix(root) for path in getattr(dataset, "paths", [])]
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()


def refuse_different_starts(step, device) -> None:
    """Raise UserError if the processes would resume from different steps."""
    steps = sorted(set(all_gather(torch.tensor(step, device=device)).tolist()))
    if len(steps) > 1:
        found = f"the processes found checkpoints of different steps, {', '.join(map(str, steps))}"
        raise UserError(f"{found}: --output_dir must be one folder that all machines share")
