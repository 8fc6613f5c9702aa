"""Reads weights: backbones, heads and centers, from checkpoints of this repository and of DINO and from timm."""

import argparse
import contextlib
import math
import os
import re
import reprlib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from safetensors.torch import load_file as load_safetensors

from support.arguments import with_class_list
from support.files import read_json
from utils import NO_MEMORY, UserError, first_line
from vision_transformer import (
    ARCHITECTURES,
    MAX_SIDE,
    WIDTHS,
    BackboneWithHead,
    DINOHead,
    VisionTransformer,
    architecture,
    interpolate_positions,
)

State = dict[str, torch.Tensor]
PROJECTION = "patch_embed.proj.weight"  # its shape [D, 3, p, p] tells width and patch size
# Put in front of names by torch.compile, by DataParallel and its like, by trainers, and by DINO, possibly repeated.
WRAPPERS = re.compile(r"(?:(?:_orig_mod|module|model|backbone)\.)*")
# DINO's full checkpoints hold, besides tensors and plain values, their arguments and NumPy scalars of the optimizer's
# state, under the old and the new name of NumPy's module.
_SCALAR: Any = np.float64(0).__reduce__()[0]
DINO_GLOBALS: list[Any] = [argparse.Namespace, np.dtype, np.dtypes.Float64DType]
DINO_GLOBALS += [(_SCALAR, f"numpy.{module}.multiarray.scalar") for module in ("core", "_core")]


def load_file(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint or a `.safetensors` file to the CPU without executing code from it.

    Raises:
        UserError: the file does not exist or is not a checkpoint.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint at {path}, expected a file written by main_lgssl.py, DINO or timm")
    with _readable(path):
        if path.suffix == ".safetensors":
            return load_safetensors(path)
        # torch.save has written zip files since PyTorch 1.6. torch.load ignores their checksums.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if damaged := file.testzip():
                    raise UserError(f"cannot read {path}: its record {damaged} is damaged")
        with torch.serialization.safe_globals(DINO_GLOBALS):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds a {type(contents).__name__}, expected a dictionary of weights")
    return contents


@contextlib.contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """Turn the errors of a block that reads a file into a UserError, but for a lack of memory or of permission."""
    try:
        yield
    except Exception as error:  # torch raises many kinds of errors for damaged files
        if isinstance(error, UserError | PermissionError) or NO_MEMORY.search(first_line(error)):
            raise
        foreign = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error))
        damaged = "it is damaged, incomplete or of another format"
        reason = f"it holds {foreign[1]}, expected tensors and plain values" if foreign else damaged
        raise UserError(f"cannot read {path}: {reason}") from error


def short_repr(value: Any) -> str:
    """Return a short text of a value from a file, of any size, in one line."""
    return " ".join(reprlib.repr(value).split())[:80]


def plain_arguments(args: Any, path: str | Path) -> dict[str, Any]:
    """Return the arguments that a file records, a dictionary or DINO's Namespace, as a dictionary.

    See `with_class_list` for those of older versions.

    Raises:
        UserError: they are of another kind, or hold anything but numbers, texts, and lists and dictionaries of these. A
            list of lists is refused too: a small file can hold one of 2^60 values.
    """
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(args, dict):
        raise UserError(f"{path} records arguments of type {type(args).__name__}, expected a dictionary")
    for name, value in args.items():
        items = [*value, *value.values()] if isinstance(value, dict) else value
        items = items if isinstance(items, list | tuple) else [items]
        if not isinstance(name, str) or not all(map(_is_plain, items)):
            raise UserError(f"{path} records the argument {short_repr(value)}, expected plain numbers and texts")
    return with_class_list(args)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, float | str) or (isinstance(value, int) and abs(value) < 2**64)


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and 1 <= value <= MAX_SIDE


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(x, int | float) for x in value)


# Recorded arguments that evaluations and pictures use: {name: (check, what is expected)}
RECORDED: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("patch_size", "global_crops_size", "local_crops_size"), (_is_side, f"a whole number in [1, {MAX_SIDE}]")
    ),
    **dict.fromkeys(("global_crops_scale", "local_crops_scale"), (_is_pair, "two numbers")),
    "intensity_range": (lambda value: value is None or _is_pair(value), "two numbers"),
    "flip_prob": (lambda value: isinstance(value, int | float) and 0 <= value <= 1, "a number in [0, 1]"),
}


def recorded_arguments(contents: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Return the arguments and the progress of the pretraining that a file records. `arch` gets our name.

    Those of a `model.safetensors` that export.py wrote are in `config.json` beside it.
    """
    config = Path(path).with_name("config.json")
    if Path(path).name == "model.safetensors" and os.path.isfile(config):
        contents, path = {"args": read_json(config).get("pretraining")}, config
    progress = {name: contents[name] for name in ("epoch", "batch_size") if name in contents}
    progress = {name: value for name, value in progress.items() if _is_plain(value)}
    made_with = plain_arguments(contents.get("args") or {}, path) | progress
    for name, (is_valid, expected) in RECORDED.items():
        if name in made_with and not is_valid(made_with[name]):
            raise UserError(f"{path} records {name} {short_repr(made_with[name])}, expected {expected}")
    if made_with.get("arch"):
        made_with["arch"] = architecture(str(made_with["arch"]))
    return made_with


def _weights(contents: dict[str, Any], checkpoint_key: str, path: str | Path) -> State:
    """Return the weights of a network in the contents of a file, which holds several networks or one backbone.

    The names lose the prefixes of WRAPPERS. Beside names with the prefix `backbone.`, only DINO's head is kept.
    """
    if any(str(name).endswith(PROJECTION) for name in contents):  # one backbone, perhaps beside plain values
        contents = {name: value for name, value in contents.items() if torch.is_tensor(value)}
    elif not all(map(torch.is_tensor, contents.values())):
        parts = [
            key
            for key, value in contents.items()
            if isinstance(value, dict) and any(map(torch.is_tensor, value.values()))
        ]
        if checkpoint_key not in parts:
            found = ", ".join(map(short_repr, parts[:20] or list(contents)[:20]))
            advice = "give one of these as --checkpoint_key" if parts else "none of these is a dictionary of weights"
            raise UserError(f"{path} has no {checkpoint_key!r}, found [{found}]: {advice}")
        contents = contents[checkpoint_key]
    short = {name: WRAPPERS.sub("", name, count=1) for name in contents}
    of_backbone = {name for name in contents if "backbone." in name.removesuffix(short[name])}
    state: State = {}
    for name, value in contents.items():
        if of_backbone and name not in of_backbone and not short[name].startswith("head."):
            continue
        if short[name] in state:
            raise UserError(f"{path} holds several tensors {short_repr(short[name])} with other prefixes, expected one")
        state[short[name]] = value
    return state


def _differences(state: State, expected: State) -> list[str]:
    """Say where weights differ in names and shapes from those that are expected."""
    problems = [f"{name} is missing" for name in expected if name not in state]
    for name, value in state.items():
        if name not in expected:
            problems.append(f"{name} is not part of the network")
        elif value.shape != expected[name].shape:
            problems.append(f"{name} is {list(value.shape)}, expected {list(expected[name].shape)}")
    return problems


def _check_numbers(state: State, path: str | Path) -> None:
    """Check that weights are finite, and that the file holds all of them: others could need any amount of memory."""
    for name, value in state.items():
        if value.nbytes > value.untyped_storage().nbytes():
            raise ValueError(f"{name} has more numbers than the file")
        if not value.float().isfinite().all():
            raise UserError(f"{path} holds weights that are not finite: {name}")


def load_backbone(
    path: str | Path,
    arch: str | None = None,
    patch_size: int | None = None,
    checkpoint_key: str = "teacher",
    img_size: int = 224,
) -> tuple[VisionTransformer, dict[str, Any]]:
    """Build a backbone and load its weights from a file.

    Reads checkpoints of this repository and of DINO (full or backbone only) and timm's `.safetensors`. The grid of the
    position embedding is inferred from the weights. A projection head in the file is ignored.

    Args:
        path: the file; "timm:NAME" for a model that timm finds in its cache or downloads; or "none" for a randomly
            initialized network.
        arch, patch_size: expected architecture and patch size. Default: those of the file, from its arguments or from
            the shapes of its weights; ViT-S/16 for a random network.
        checkpoint_key: network to read from a checkpoint that holds several, "teacher" or "student".
        img_size: side in pixels of the images that the position embedding of a random network is made for.

    Returns:
        (backbone, made_with): the backbone in evaluation mode, and the pretraining arguments together with the `epoch`
        reached and the total `batch_size`, if the file has them.

    Raises:
        UserError: the file is not a checkpoint, lacks the network, holds no ViT, or its weights do not fit.
    """
    arch = architecture(arch) if arch else None
    if str(path) == "none":
        return ARCHITECTURES[arch or "vit_small"](patch_size or 16, img_size=img_size).eval(), {}
    contents = _read(path)
    with _readable(path):
        state, made_with = _weights(contents, checkpoint_key, path), recorded_arguments(contents, path)
        return _build(state, made_with, path, arch, patch_size), made_with


def _read(path: str | Path) -> dict[str, Any]:
    """Return the contents of a file, or of the weights of timm's model NAME for the path "timm:NAME"."""
    if not str(path).startswith("timm:"):
        return load_file(path)
    name = str(path).removeprefix("timm:")
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # of many kinds: an unknown name, no connection, a damaged cache
        raise UserError(f"timm cannot load {short_repr(name)}: {first_line(error)[:300]}") from error


def _build(
    state: State, made_with: dict[str, Any], path: str | Path, arch: str | None, patch_size: int | None
) -> VisionTransformer:
    """Return the backbone with the weights of a network, in evaluation mode.

    Args:
        state: weights of the backbone, and of a head, which is ignored.
        made_with: recorded arguments.
        path: file of the weights, for messages.
        arch, patch_size: expected architecture and patch size; None takes those of the file.
    """
    state = {name: value for name, value in state.items() if not name.startswith(("head.", "fc_norm."))}
    shape = list(state[PROJECTION].shape) if PROJECTION in state else []
    if len(shape) != 4:
        found = short_repr(shape or list(state))
        if not shape and (prefixes := [name.removesuffix(PROJECTION) for name in state if name.endswith(PROJECTION)]):
            found = f"it behind {short_repr(prefixes)}: save one of these networks without its prefix"
        raise UserError(f"{path} holds no ViT: expected {PROJECTION} [D, 3, p, p], found {found}")
    looks = WIDTHS.get(shape[0]), shape[-1]
    arch, patch_size = arch or made_with.get("arch") or looks[0], patch_size or made_with.get("patch_size") or looks[1]
    if not arch:
        raise UserError(f"{path} holds a ViT of width {shape[0]}, expected one of {', '.join(map(str, WIDTHS))}")
    patches = state.get("pos_embed", torch.empty(1, 197, 1)).shape[1] - 1
    img_size = max(math.isqrt(patches), 1) * patch_size
    with torch.device("meta"):  # takes no memory, whatever the file and the options say
        expected = ARCHITECTURES[arch](patch_size, img_size=img_size).state_dict()
    problems = _differences(state, expected)
    if problems:
        message = f"{path} does not fit {arch} with patch size {patch_size}: {'; '.join(problems[:3])}"
        if looks[0] and looks != (arch, patch_size):
            message += f"; expected --arch {looks[0]} --patch_size {looks[1]}"
        raise UserError(message)
    _check_numbers(state, path)
    backbone = ARCHITECTURES[arch](patch_size, img_size=img_size)
    backbone.load_state_dict(state)
    return backbone.eval()


class Start(NamedTuple):
    """Weights that a run starts from instead of random ones, see `load_start`."""

    path: str
    arch: str
    backbone: VisionTransformer
    head: State  # names as in DINOHead; others or none if the file has no such head
    center: torch.Tensor | None  # [1+P or 1, K]


def load_start(path: str, arch: str | None, patch_size: int | None, checkpoint_key: str = "teacher") -> Start:
    """Read the weights that a run starts from; see `load_backbone` for arguments, files and errors."""
    contents = _read(path)
    with _readable(path):
        state = _weights(contents, checkpoint_key, path)
        made_with = recorded_arguments(contents, path)
        backbone = _build(state, made_with, path, arch, patch_size)
        head = {name.removeprefix("head."): value for name, value in state.items() if name.startswith("head.")}
        losses = [part for part in map(contents.get, ("loss", "dino_loss")) if isinstance(part, dict)]
        center = losses[0].get("center") if losses else None
        _check_numbers(head if center is None else {**head, "center": center}, path)
        arch = arch or made_with.get("arch") or WIDTHS[backbone.embed_dim]
        return Start(path, arch, backbone, head, center)


@torch.no_grad()
def start_from(start: Start, network: BackboneWithHead, center: torch.Tensor) -> str:
    """Copy the weights of a backbone into a network, and those of its head and the center where they fit.

    The position embedding is interpolated to the network's grid. A center is copied only together with a head.

    Args:
        start: the weights.
        network: the network, of the same architecture and patch size.
        center: center of the loss, [1+P or 1, K].

    Returns:
        a line that says what was copied
    """
    state, done = start.backbone.state_dict(), []
    grid, new_grid = start.backbone.patch_embed.grid_size, network.backbone.patch_embed.grid_size
    if grid != new_grid:
        state["pos_embed"] = interpolate_positions(state["pos_embed"], grid, new_grid)
        done.append(f"position embedding interpolated from {grid[0]}x{grid[1]} to {new_grid[0]}x{new_grid[1]} patches")
    network.backbone.load_state_dict(state)
    head = {name: value for name, value in start.head.items() if not name.startswith("patch_mlp.")}
    has_two, wants_two = len(head) < len(start.head), network.head.patch_mlp is not None
    if wants_two:
        own = {f"patch_{name}": value for name, value in head.items() if name.startswith("mlp.")}
        head = start.head if has_two else {**head, **own}
    misfit = _misfit(head, network.head)
    if misfit:
        return f"started from {start.path}: " + "; ".join(["backbone only", *done, misfit])
    network.head.load_state_dict(head)
    if has_two != wants_two:
        done.append("the head of CLS for all tokens" if has_two else "one head for both kinds of tokens")
    if start.center is not None and start.center.shape == center.shape:
        center.copy_(start.center)
        done.append("center of the loss")
    return f"started from {start.path}: " + "; ".join(["backbone and head", *done])


def _misfit(state: State, head: DINOHead) -> str:
    """Say why weights do not fit a head. Empty if they do."""
    if not any(name.startswith("mlp.") for name in state):
        return "the file has no head"
    problems = _differences(state, head.state_dict())
    if not problems and not head.last_layer.weight_g.requires_grad and (state["last_layer.weight_g"] != 1).any():
        problems = ["its prototypes have learned norms, see --norm_last_layer"]
    return f"the head does not fit: {problems[0]}" if problems else ""
