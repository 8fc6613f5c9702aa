"""Reads weights: backbones, heads and centers, from checkpoints of this repository and of DINO and from timm."""

import argparse
import logging
import math
import os
import re
import reprlib
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors

from utils import UserError, first_line
from vision_transformer import (
    ARCHITECTURES,
    MAX_SIDE,
    PROJECTION,
    WIDTHS,
    BackboneWithHead,
    VisionTransformer,
    architecture,
    interpolate_positions,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # types of weights in files


def _whole(low, high):
    return lambda value: type(value) is int and low <= value <= high, f"a whole number in [{low}, {high}]"


def _is_fraction(value):
    return isinstance(value, int | float) and 0 <= value <= 1


def _is_scale(value):
    return (
        isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_fraction, value)) and value[0] <= value[1]
    )


# What other commands use of a checkpoint's arguments and progress: {name: (check, description)}
RECORDED = {
    "arch": (lambda value: isinstance(value, str), "the name of an architecture"),
    "patch_size": _whole(1, MAX_SIDE),
    **dict.fromkeys(("global_crops_size", "local_crops_size"), _whole(1, MAX_SIDE)),
    **dict.fromkeys(("global_crops_scale", "local_crops_scale"), (_is_scale, "two fractions, the smaller first")),
    "flip_prob": (_is_fraction, "a fraction"),
    **dict.fromkeys(("epoch", "batch_size"), _whole(0, 10**9)),
}
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
MAX_VALUES, MAX_DEPTH = 10_000, 20  # values, and lists in lists, in the arguments of a file


def load_file(path) -> dict:
    """Read a checkpoint or a `.safetensors` file to the CPU without executing code from it.

    Raises:
        UserError: the file does not exist or is not a checkpoint.
    """
    path = Path(path)
    if not os.path.isfile(path):
        found = f"{path} is a folder" if os.path.isdir(path) else f"no checkpoint at {path}"
        raise UserError(f"{found}, expected a file written by main_lgssl.py, DINO or timm")
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(path)
        check_sums(path)
        with torch.serialization.safe_globals(DINO_GLOBALS):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises many kinds of errors for damaged files
        reason = f"{path} cannot be read as a checkpoint of tensors and plain values: {_reason(error)}"
        raise UserError(reason) from error
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds a {type(contents).__name__}, expected a dictionary of weights")
    _check_tensors(contents, path)
    return contents


def _reason(error):
    """Return in words why a file could not be read."""
    foreign = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error))
    if foreign:
        return f"it holds {foreign[1]}"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "it needs more memory than is free"
    if isinstance(error, OSError) and error.filename:  # from opening the file, not from its contents
        return error.strerror
    known = isinstance(error, zipfile.BadZipFile | SafetensorError)
    return first_line(error) if known else "it is damaged, incomplete or of another format"


def short_repr(value) -> str:
    """Return a short text of a value from a file, of any size, in one line."""
    return " ".join(reprlib.repr(value).split())[:80]


def _check_tensors(contents, path):
    """Raise UserError if the contents of a file hold a tensor that is not a dense array with as many stored numbers."""
    left, seen = [("", contents)], set()
    while left:
        name, value = left.pop()
        if torch.is_tensor(value):
            is_dense = value.device.type == "cpu" and value.layout is torch.strided and not value.is_nested
            is_dense = is_dense and not value.is_quantized
            if not is_dense or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                kind = f"{str(value.dtype).removeprefix('torch.')} tensor of {value.numel()} numbers"
                expected = "expected a dense one with all its numbers"
                raise UserError(f"{path} holds a sparse, quantized or incomplete {kind}, {expected}: {name[:80]}")
        elif id(value) not in seen:  # lists can contain one list many times
            seen.add(id(value))
            value = vars(value) if isinstance(value, argparse.Namespace) else value
            items = (
                value.items() if isinstance(value, dict) else enumerate(value if type(value) in (list, tuple) else ())
            )
            left += [(f"{name}.{key}".strip(".") if isinstance(key, str | int) else name, item) for key, item in items]


def plain_arguments(args, path) -> dict:
    """Return the arguments that a file records, a dictionary or DINO's Namespace, as a dictionary.

    Raises:
        UserError: they are of another kind, hold anything but plain values, or expand to too many values.
    """
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(args, dict):
        raise UserError(f"{path} records arguments of type {type(args).__name__}, expected a dictionary")
    left, count = [(args, 0)], 0
    while left:
        value, depth = left.pop()
        count += 1
        if isinstance(value, dict) and all(isinstance(name, str) for name in value):
            left += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list | tuple):
            left += [(item, depth + 1) for item in value]
        elif not (value is None or isinstance(value, float | str) or (isinstance(value, int) and abs(value) < 2**64)):
            raise UserError(f"{path} records the argument {short_repr(value)}, expected plain numbers and texts")
        if count + len(left) > MAX_VALUES or depth > MAX_DEPTH:
            raise UserError(f"{path} records arguments of over {MAX_VALUES} values or {MAX_DEPTH} levels")
    return args


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
    return _load_backbone(_read(path), path, arch, patch_size, checkpoint_key)


def _read(path):
    """Return the contents of a file, or of the weights of timm's model NAME for the path "timm:NAME"."""
    source, _, name = str(path).partition(":")
    if source != "timm":
        return load_file(path)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # no warning for each of its retries
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # of many kinds: an unknown name, no connection, a damaged cache
        raise UserError(f"timm cannot load {short_repr(name)}: {first_line(error)[:300]}") from error


def _load_backbone(contents, path, arch, patch_size, checkpoint_key):
    """Do what `load_backbone` says, with the contents of the file."""
    state, _ = _weights(contents, checkpoint_key, path)
    args = plain_arguments(contents.get("args", {}), path)
    args |= {name: contents[name] for name in ("epoch", "batch_size") if name in contents}
    for name, (is_valid, expected) in RECORDED.items():
        if name in args and not is_valid(args[name]):
            raise UserError(f"{path} records {name} {short_repr(args[name])}, expected {expected}")
    made_with: dict[str, Any] = {
        "arch": str(args.get("arch", "")).replace("deit", "vit") or None,
        "patch_size": args.get("patch_size"),
    }
    for name, wanted in {"arch": arch, "patch_size": patch_size}.items():
        if None not in (wanted, made_with[name]) and wanted != made_with[name]:
            found = f"found --{name} {wanted}; expected --{name} {made_with[name]}"
            raise UserError(f"{path} was made with --{name} {made_with[name]}, {found}")
    arch, patch_size = arch or made_with["arch"], patch_size or made_with["patch_size"]
    arch = architecture(arch) if arch else None
    projection, shape = (tuple(state[name].shape) if name in state else () for name in (PROJECTION, "pos_embed"))
    if len(projection) != 4 or 0 in projection:
        other = f"one of shape {list(projection)}" if projection else ", ".join(list(state)[:3]) or "nothing"
        raise UserError(f"{path} holds no ViT: expected {PROJECTION} [D, 3, p, p], found {other}")
    if not arch and projection[0] not in WIDTHS:
        known = ", ".join(f"{width} ({name})" for width, name in WIDTHS.items())
        raise UserError(f"{path} holds a ViT of width {projection[0]}, expected one of {known}")
    arch, patch_size = arch or WIDTHS[projection[0]], patch_size or projection[-1]

    side = math.isqrt(max(shape[1] - 1, 1)) if len(shape) == 3 else 14  # other shapes are refused below
    with torch.device("meta"):  # takes no memory, whatever the file and the options say
        own = ARCHITECTURES[arch](patch_size, img_size=side * patch_size).state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is not part of the network" for name in state if name not in own]
    for name in (name for name in own if name in state):
        found, expected = list(state[name].shape), list(own[name].shape)
        problems += [f"{name} is {found}, expected {expected}"] if found != expected else []
        problems += [] if state[name].dtype in FLOATS else [f"{name} is {state[name].dtype}, expected torch.float32"]
    if problems:
        first_three = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        looks = WIDTHS.get(projection[0]), projection[-1]
        hint = (
            f"; expected --arch {looks[0]} --patch_size {looks[1]}" if looks[0] and looks != (arch, patch_size) else ""
        )
        raise UserError(f"{path} does not fit {arch} with patch size {patch_size}: {first_three}{hint}")
    backbone = ARCHITECTURES[arch](patch_size, img_size=side * patch_size)
    backbone.load_state_dict(state)
    bad = [name for name, value in backbone.state_dict().items() if not value.isfinite().all()]
    if bad:
        raise UserError(f"{path} holds weights that are not finite: {bad[0]}")
    return backbone.eval(), args


def _weights(contents, checkpoint_key, path):
    """Return the weights of backbone and head in the contents of a file, which may hold several networks with heads."""
    if checkpoint_key in contents or any(isinstance(value, dict) and value for value in contents.values()):
        if checkpoint_key not in contents:
            networks = [key for key in ("teacher", "student", "model", "state_dict") if key in contents]
            found = ", ".join(networks) or "none"
            raise UserError(f"{path} has no {checkpoint_key!r}, found {found}: see --checkpoint_key")
        contents = contents[checkpoint_key]
    if not isinstance(contents, dict) or not all(
        isinstance(k, str) and torch.is_tensor(v) for k, v in contents.items()
    ):
        raise UserError(f"{path} holds no weights under {checkpoint_key!r}, expected names and tensors")
    state = {name.removeprefix("module.").removeprefix("backbone."): value for name, value in contents.items()}
    head = {name.removeprefix("head."): value for name, value in state.items() if name.startswith("head.")}
    return {name: value for name, value in state.items() if not name.startswith(("head.", "fc_norm."))}, head


class Start(NamedTuple):
    """Weights that a run starts from instead of random ones, see `load_start`."""

    path: str
    backbone: VisionTransformer
    head: dict[str, torch.Tensor]  # names as in DINOHead; others or none if the file has no such head
    center: torch.Tensor | None  # [1+P or 1, K]


def load_start(path: str, arch: str, patch_size: int, checkpoint_key: str = "teacher") -> Start:
    """Read the weights that a run starts from; see `load_backbone` for arguments, files and errors."""
    contents = _read(path)
    backbone, _ = _load_backbone(contents, path, arch, patch_size, checkpoint_key)
    criterion = contents.get("loss", contents.get("dino_loss"))
    center = criterion.get("center") if isinstance(criterion, dict) else None
    return Start(path, backbone, _weights(contents, checkpoint_key, path)[1], center)


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

    Raises:
        UserError: weights of the head are not finite.
    """
    state, done = start.backbone.state_dict(), []
    own, new = start.backbone.patch_embed.grid_size, network.backbone.patch_embed.grid_size
    if own != new:
        state["pos_embed"] = interpolate_positions(state["pos_embed"], own, new)
        done.append(f"position embedding interpolated from {own[0]}x{own[1]} to {new[0]}x{new[1]} patches")
    network.backbone.load_state_dict(state)
    misfit = _misfit(start.head, network.head)
    if misfit:
        return f"started from {start.path}: " + "; ".join(["backbone only", *done, misfit])
    if not all(value.isfinite().all() for value in start.head.values()):
        raise UserError(f"{start.path} holds weights of the head that are not finite")
    network.head.load_state_dict(start.head)
    kept = start.center
    if torch.is_tensor(kept) and kept.shape == center.shape and kept.dtype in FLOATS and kept.isfinite().all():
        center.copy_(kept)
        done.append("center of the loss")
    return f"started from {start.path}: " + "; ".join(["backbone and head", *done])


def _misfit(found, head):
    """Return in words why weights do not fit a DINOHead; empty if they do."""
    own = head.state_dict()
    if not any(name.startswith("mlp.") for name in found):
        return "the file has no head"
    if found.keys() != own.keys():
        return f"the head has other layers: {min(found.keys() ^ own.keys())}"
    for name, value in found.items():
        if value.shape != own[name].shape or value.dtype not in (*FLOATS, own[name].dtype):
            return f"the head does not fit: {name} is {list(value.shape)}, expected {list(own[name].shape)}"
    if not head.last_layer.weight_g.requires_grad and (found["last_layer.weight_g"] != 1).any():
        return "the head does not fit: its prototypes have learned norms, see --norm_last_layer"
    return ""
