"""Saving, resuming and safe loading of checkpoints."""

import argparse
import hashlib
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file as load_safetensors
from safetensors.torch import save_file as save_safetensors

from utils import UserError, all_gather, atomic_write, first_line, make_folder, warn

# DINO's full checkpoints hold, besides tensors and plain values, their arguments and NumPy scalars of the optimizer's
# state, under the old and the new name of NumPy's module.
_SCALAR = np._core.multiarray.scalar
DINO_GLOBALS = [
    argparse.Namespace,
    np.dtype,
    np.dtypes.Float64DType,
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
]

# Arguments that may change when a run resumes. Any other change makes it a different run.
MAY_CHANGE = "data_path download output_dir num_workers log_every saveckp_freq dist_url local_rank".split()
MAY_CHANGE += "grad_checkpointing compile save_every_steps keep_last dist_timeout on_bad_image max_bad_images".split()
MAY_CHANGE += ["knn_every", "image_every"]


def load_file(path) -> dict:
    """Read a checkpoint or a `.safetensors` file to the CPU without executing code from it.

    Raises:
        UserError: the file does not exist or is not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}, expected a file written by main_lgssl.py, DINO or timm")
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(path)
        check_sums(path)
        with torch.serialization.safe_globals(DINO_GLOBALS):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises many kinds of errors for damaged files
        reason = str(error) if isinstance(error, zipfile.BadZipFile) else type(error).__name__
        raise UserError(f"{path} cannot be read as a checkpoint of tensors and plain values: {reason}") from error
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds a {type(contents).__name__}, expected a dictionary of weights")
    return contents


def check_sums(path) -> None:
    """Raise BadZipFile if a checksum is wrong. torch.save writes checksums, torch.load ignores them."""
    if not zipfile.is_zipfile(path):  # written before PyTorch 1.6, without checksums
        return
    with zipfile.ZipFile(path) as file:
        if any(part.compress_type != zipfile.ZIP_STORED for part in file.infolist()):
            raise zipfile.BadZipFile("it is compressed")
        damaged = file.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"its record {damaged} is damaged")


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


def write_safetensors(tensors, path, metadata) -> None:
    """Write tensors and metadata, a dictionary of strings, to a `.safetensors` file with default permissions."""
    path.touch()
    permissions = path.stat().st_mode
    save_safetensors(tensors, path, metadata)  # creates a file that only its owner can read
    path.chmod(permissions)


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
    earlier = {**defaults, **earlier}
    names = [name for name in args if name not in may_change and earlier.get(name) != args[name]]
    if names:
        differences = ", ".join(f"--{name} {earlier.get(name, 'unknown')} there, {args[name]} here" for name in names)
        raise UserError(
            f"{path} belongs to a run with other arguments: {differences}; use those to resume, or another --output_dir"
        )


def open_output(output_dir, args, defaults) -> tuple[dict, Path] | tuple[None, None]:
    """Create the output folder and return what `load_latest` finds in it.

    Args:
        output_dir: folder of the run.
        args, defaults: dictionaries of the arguments of the run and of their defaults.

    Raises:
        UserError: the folder cannot be written to, or holds a run with other arguments.
    """
    make_folder(output_dir, "--output_dir")
    checkpoint, source_path = load_latest(output_dir / "checkpoint.pth")
    earlier = output_dir / "args.json"
    if checkpoint:
        keys = "student teacher optimizer loss scaler meters epoch step batch_size images args".split()
        if not set(keys) <= set(checkpoint):
            raise UserError(f"{source_path} is not a checkpoint of main_lgssl.py: use another --output_dir")
        refuse_other_run(checkpoint["args"], args, defaults, MAY_CHANGE, source_path)
    elif earlier.exists():
        try:
            earlier_args = dict(json.loads(earlier.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"cannot read {earlier}: remove it, or use another --output_dir") from error
        refuse_other_run(earlier_args, args, defaults, MAY_CHANGE, earlier)
    elif (output_dir / "log.txt").exists() or (output_dir / "steps.jsonl").exists():
        raise UserError(f"{output_dir} holds logs but no run: move them, or use another --output_dir")
    return checkpoint, source_path


def restore(checkpoint, source_path, state, meters, batch_size, images, rank, world_size) -> int:
    """Load a checkpoint into the parts of a run and return the step to resume from.

    Args:
        source_path: path of the checkpoint, for messages.
        state: {name: object with a state_dict}.
        meters: Meters.
        batch_size, images: total batch size, and number and hash of the images; must equal those of the checkpoint.
        rank, world_size: rank of this process and number of processes.

    Raises:
        UserError: the checkpoint does not fit the run, or holds weights that are not finite.
    """
    if checkpoint["batch_size"] != batch_size:
        expected, found = checkpoint["batch_size"], f"{batch_size} on {world_size} processes"
        raise UserError(f"{source_path} has {expected} images per step, found {found}: use as many processes as before")
    if checkpoint["images"] != images:
        found = f"{checkpoint['images'][0]} images, found {images[0]}, or images with other names"
        raise UserError(f"{source_path} was trained on {found}: use the same images, or another --output_dir")
    try:
        for name, stateful in state.items():
            stateful.load_state_dict(checkpoint[name])
        start_step = int(checkpoint["step"])
        meters.load_state_dict(checkpoint["meters"], rank)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{source_path} does not fit: {first_line(error)}; use another --output_dir") from error
    weights = [value for name in ("student", "teacher", "loss") for value in state[name].state_dict().values()]
    if not all(value.isfinite().all() for value in weights):
        raise UserError(f"{source_path} holds weights that are not finite: remove it to use the previous one")
    return start_step


def hash_of_names(dataset) -> str:
    """Return a hash of the image paths of a data set, relative to its folder. Data sets without files have none."""
    names = [path.removeprefix(str(dataset.root)) for path in getattr(dataset, "paths", [])]
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()


def refuse_different_starts(step, device) -> None:
    """Raise UserError if the processes would resume from different steps."""
    steps = sorted(set(all_gather(torch.tensor(step, device=device)).tolist()))
    if len(steps) > 1:
        found = f"the processes found checkpoints of different steps, {', '.join(map(str, steps))}"
        raise UserError(f"{found}: --output_dir must be one folder that all machines share")
