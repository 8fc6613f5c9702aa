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

# What DINO's released full checkpoints hold besides tensors and plain values: their arguments, and NumPy scalars in the
# optimizer's state, under the old and the new name of NumPy's module.
_SCALAR = np._core.multiarray.scalar
DINO_GLOBALS = [
    argparse.Namespace,
    np.dtype,
    np.dtypes.Float64DType,
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
]


# Arguments that may differ when a run goes on; any other would make it another run.
MAY_CHANGE = "data_path download output_dir num_workers log_every saveckp_freq dist_url local_rank".split()
MAY_CHANGE += "grad_checkpointing compile save_every_steps keep_last dist_timeout on_bad_image max_bad_images".split()
MAY_CHANGE += ["knn_every", "image_every"]


def load_file(path):
    """Read a checkpoint or a `.safetensors` file to the CPU, without executing anything that it holds.

    Raises:
        UserError: there is no such file, or it cannot be read as a checkpoint.
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
    # A damaged file can make torch's unpickler raise nearly anything.
    except Exception as error:
        reason = str(error) if isinstance(error, zipfile.BadZipFile) else type(error).__name__
        raise UserError(f"{path} cannot be read as a checkpoint of tensors and plain values: {reason}") from error
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds a {type(contents).__name__}, expected a dictionary of weights")
    return contents


def check_sums(path):
    """Raise BadZipFile where a checkpoint's check sums, which torch.save writes and torch.load ignores, are wrong."""
    if not zipfile.is_zipfile(path):  # of before PyTorch 1.6, without sums
        return
    with zipfile.ZipFile(path) as file:
        if any(part.compress_type != zipfile.ZIP_STORED for part in file.infolist()):
            raise zipfile.BadZipFile("a part of it is compressed")
        damaged = file.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"its part {damaged} is damaged")


def load_latest(path):
    """Read a checkpoint, or where that cannot be read the one before it, with a warning.

    Returns:
        (contents, file that was read); (None, None) where there is neither

    Raises:
        UserError: as `load_file`, of both.
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
        warn(f"{error}; the one before it is used, {previous}")
        return contents, previous


def previous_path(path):
    """Return where the checkpoint before `path` is kept: checkpoint.pth -> checkpoint_previous.pth."""
    return path.with_name(f"{path.stem}_previous{path.suffix}")


def save(contents, path, keep_previous=False):
    """Write a checkpoint of tensors and plain values. `keep_previous` keeps the old file at `previous_path`."""
    with atomic_write(path, previous_path(path) if keep_previous else None) as temporary, temporary.open("wb") as file:
        torch.save(contents, file)


def write_safetensors(tensors, path, metadata):
    """Write tensors and a dictionary of texts to a `.safetensors` file, which gets the rights of any new file."""
    path.touch()
    rights = path.stat().st_mode
    save_safetensors(tensors, path, metadata)  # its file is for its owner alone
    path.chmod(rights)


def remove_old(folder, keep_last):
    """Remove all but the newest `keep_last` of the periodic checkpoints, checkpoint0000.pth and so on."""
    numbered = [path for path in folder.glob("checkpoint*.pth") if re.fullmatch(r"checkpoint\d{4,}\.pth", path.name)]
    for path in sorted(numbered, key=lambda path: int(path.stem.removeprefix("checkpoint")))[:-keep_last]:
        path.unlink()


def save_run(contents, output_dir, kept_epoch=None, keep_last=0):
    """Write the checkpoint from which a run goes on, `checkpoint.pth`.

    Args:
        kept_epoch: where it is not None, write `checkpoint0000.pth`, numbered by it, first.
        keep_last: how many of these to keep, the newest; 0 keeps all.
    """
    if kept_epoch is not None:
        save(contents, output_dir / f"checkpoint{kept_epoch:04}.pth")
    save(contents, output_dir / "checkpoint.pth", keep_previous=True)
    if keep_last:
        remove_old(output_dir, keep_last)


def tidy(output_dir, source_path):
    """Put a checkpoint aside that could not be read, and remove what a killed process left of one.

    Args:
        source_path: the checkpoint from which the run goes on, or None.
    """
    path = output_dir / "checkpoint.pth"
    if source_path == previous_path(path) and path.exists():
        path.replace(path.with_name("checkpoint_unreadable.pth"))
    for unfinished in output_dir.glob("checkpoint*.pth.tmp"):
        unfinished.unlink()


def refuse_other_run(earlier, args, defaults, may_change, path):
    """Check that the arguments of an earlier run are those of this one.

    Args:
        earlier, args: dictionaries of arguments. What `earlier` lacks, as an older version did, has its default.
        defaults: dictionary of the arguments' defaults.
        may_change: names of those that may differ.
        path: where `earlier` was read, for the message.

    Raises:
        UserError: with the arguments that differ.
    """
    earlier = {**defaults, **earlier}
    names = [name for name in args if name not in may_change and earlier.get(name) != args[name]]
    if names:
        differences = ", ".join(f"--{name} {earlier.get(name, 'unknown')} there, {args[name]} here" for name in names)
        raise UserError(
            f"{path} is of another run: {differences}; give its arguments to go on, or another --output_dir"
        )


def open_output(output_dir, args, defaults):
    """Make the output folder and return what `load_latest` finds in it.

    Args:
        args, defaults: dictionaries of the run's arguments, and of their defaults.

    Raises:
        UserError: the folder cannot be written, or holds a run with other arguments.
    """
    make_folder(output_dir, "--output_dir")
    checkpoint, source_path = load_latest(output_dir / "checkpoint.pth")
    earlier = output_dir / "args.json"
    if checkpoint:
        keys = "student teacher optimizer loss scaler meters epoch step batch_size images args".split()
        if not set(keys) <= set(checkpoint):
            raise UserError(
                f"{source_path} was not written by this version of main_lgssl.py: give another --output_dir"
            )
        refuse_other_run(checkpoint["args"], args, defaults, MAY_CHANGE, source_path)
    elif earlier.exists():
        try:
            earlier_args = dict(json.loads(earlier.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"cannot read {earlier}: remove it, or give another --output_dir") from error
        refuse_other_run(earlier_args, args, defaults, MAY_CHANGE, earlier)
    elif (output_dir / "log.txt").exists() or (output_dir / "steps.jsonl").exists():
        raise UserError(f"{output_dir} holds logs but no run: move them, or give another --output_dir")
    return checkpoint, source_path


def restore(checkpoint, source_path, state, meters, batch_size, images, rank, world_size):
    """Give the parts of a run the state of a checkpoint, and return the step from which it goes on.

    Args:
        source_path: the checkpoint's file, for messages.
        state: {name: object with a state_dict}.
        meters: Meters.
        batch_size, images: total batch, and number and hash of the images, which have to be the checkpoint's.

    Raises:
        UserError: it was trained otherwise, does not fit, or holds weights that are not finite.
    """
    if checkpoint["batch_size"] != batch_size:
        raise UserError(
            f"{source_path} was trained with {checkpoint['batch_size']} images a step, found {batch_size} on "
            f"{world_size} processes: start as many processes as before"
        )
    if checkpoint["images"] != images:
        raise UserError(
            f"{source_path} was trained on {checkpoint['images'][0]} images, found {images[0]}, or of other names: "
            "give the same images, or another --output_dir"
        )
    try:
        for name, stateful in state.items():
            stateful.load_state_dict(checkpoint[name])
        start_step = int(checkpoint["step"])
        meters.load_state_dict(checkpoint["meters"], rank)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = first_line(error)
        raise UserError(f"{source_path} does not fit this run: {reason}; give another --output_dir") from error
    weights = [value for name in ("student", "teacher", "loss") for value in state[name].state_dict().values()]
    if not all(value.isfinite().all() for value in weights):
        raise UserError(f"{source_path} holds weights that are not finite: remove it, the one before is used")
    return start_step


def hash_of_names(dataset):
    """Return a hash of the names below its folder of a data set's images; of a data set without files, of nothing."""
    names = [path.removeprefix(str(dataset.root)) for path in getattr(dataset, "paths", [])]
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()


def refuse_different_starts(step, device):
    """Raise UserError where the processes go on from different steps."""
    steps = sorted(set(all_gather(torch.tensor(step, device=device)).tolist()))
    if len(steps) > 1:
        found = f"the processes found checkpoints of different steps, {', '.join(map(str, steps))}"
        raise UserError(f"{found}: --output_dir has to be one folder that all machines see")
