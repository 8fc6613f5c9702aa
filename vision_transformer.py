"""ViT-Tiny/Small/Base, the DINO head, and loading of backbones. Their class is support.backbone.VisionTransformer."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from support.checkpoints import load_file, plain_arguments, shown
from utils import UserError, first_line

if TYPE_CHECKING:
    from support.backbone import VisionTransformer

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # types of weights in files
MAX_SIDE = 8192  # largest side of a view or patch in pixels


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


def _build(patch_size, **kwargs):
    from support.backbone import VisionTransformer  # not at the top: timm takes longer to import than torch

    return VisionTransformer(patch_size=patch_size, **kwargs)


def vit_micro(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """ViT for quick studies, not in the paper: 4 blocks of width 96, about 0.5 M parameters."""
    return _build(patch_size, embed_dim=96, depth=4, num_heads=3, **kwargs)


def vit_tiny(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """ViT-Ti: 12 blocks of width 192."""
    return _build(patch_size, embed_dim=192, depth=12, num_heads=3, **kwargs)


def vit_small(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """ViT-S: 12 blocks of width 384."""
    return _build(patch_size, embed_dim=384, depth=12, num_heads=6, **kwargs)


def vit_base(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """ViT-B: 12 blocks of width 768."""
    return _build(patch_size, embed_dim=768, depth=12, num_heads=12, **kwargs)


ARCHITECTURES = {"vit_micro": vit_micro, "vit_tiny": vit_tiny, "vit_small": vit_small, "vit_base": vit_base}
# Architecture by embedding width, for weights saved without arguments. Add new architectures to both dictionaries.
PROJECTION = "patch_embed.proj.weight"
WIDTHS = {96: "vit_micro", 192: "vit_tiny", 384: "vit_small", 768: "vit_base"}


def architecture(name: str) -> str:
    """Return the name if it is in ARCHITECTURES. DINO's names deit_* are accepted for vit_*. An argparse type.

    Raises:
        UserError: the architecture is unknown.
    """
    vit = name.replace("deit", "vit")
    if vit not in ARCHITECTURES:
        reason = "" if "vit" in name else " (convolutional and XCiT networks have no patch tokens to match)"
        raise UserError(f"no architecture {name}{reason}; expected one of {', '.join(ARCHITECTURES)}")
    return vit


class DINOHead(nn.Module):
    """DINO's projection head: an MLP to an L2-normalized bottleneck, followed by weight-normalized prototypes.

    The two parts are called separately, because logits are computed only for matched tokens: `forward` returns
    bottleneck vectors, `prototypes` the weights of the last layer.

    Args:
        in_dim: D, width of the tokens.
        out_dim: K, number of prototypes.
        use_bn: use batch norm after the hidden layers.
        norm_last_layer: fix the norm of each prototype to 1 instead of learning it.
        hidden_dim, bottleneck_dim: widths of the MLP.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ):
        super().__init__()
        self.use_bn = use_bn
        layers: list[nn.Module] = []
        for width in (in_dim, hidden_dim):
            layers.append(nn.Linear(width, hidden_dim))
            layers += [nn.BatchNorm1d(hidden_dim), nn.GELU()] if use_bn else [nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = Prototypes(bottleneck_dim, out_dim, learn_norm=not norm_last_layer)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens [n, in_dim] to unit vectors [n, bottleneck_dim]."""
        # On a CPU, blocks of more than 32 MiB would be returned to the system and requested again in every step, which
        # costs 4 % of the time. Batch norm needs all tokens at once.
        pieces = tokens.split(2048) if tokens.device.type == "cpu" and not self.use_bn else [tokens]
        return torch.cat([F.normalize(self.mlp(piece), dim=-1) for piece in pieces])

    def prototypes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights [K, bottleneck_dim] and scale [K] of the last layer, see Prototypes."""
        return self.last_layer()


class Prototypes(nn.Module):
    """Weight-normalized linear layer with plain parameters under DINO's names, without hooks.

    `forward` returns weights [K, D] and scale [K]; logits are `z @ (scale * weights.T)`. The product of the two is not
    formed: it would be a copy of the largest layer, in the student and in the teacher.

    Args:
        dim: width of the bottleneck.
        count: K, number of prototypes.
        learn_norm: learn the norm of each prototype instead of fixing it to 1.
    """

    def __init__(self, dim: int, count: int, learn_norm: bool):
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(count, dim))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # as nn.Linear
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=learn_norm)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weight_v, self.weight_g[:, 0] / self.weight_v.norm(dim=1)


class TokenOutput(NamedTuple):
    """Output of a network for N tokens. Their logits are `bottleneck @ (scale * prototypes.T)`."""

    bottleneck: torch.Tensor  # [N, bottleneck_dim] unit vectors
    prototypes: torch.Tensor  # [K, bottleneck_dim]
    scale: torch.Tensor  # [K]
    cls_features: torch.Tensor  # [n, D] CLS tokens of the first tensor of views, before the head; without gradient
    mean_bottleneck: torch.Tensor | None = None  # [positions, bottleneck_dim] mean over the views; only of the teacher


class BackboneWithHead(nn.Module):
    """Backbone, head and prototypes behind one forward, so that DistributedDataParallel sees every parameter."""

    def __init__(self, backbone: VisionTransformer, head: DINOHead):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views: Sequence[torch.Tensor], rows: torch.Tensor | None = None) -> TokenOutput:
        """Return the output for some tokens of the views.

        Args:
            views: normalized pixels, one tensor [n, 3, S, S] per view size.
            rows: LongTensor [N], indices of tokens in the concatenated outputs of all views; None selects all.
        """
        outputs = [self.backbone(view) for view in views]  # [n, 1+P, D] each
        cls_features = outputs[0][:, 0].detach().clone()  # a copy, so that the memory of the other tokens can be freed
        tokens = torch.cat([output.flatten(0, 1) for output in outputs])
        if rows is not None:
            tokens = tokens[rows]
        return TokenOutput(self.head(tokens), *self.head.prototypes(), cls_features)


class Teacher(BackboneWithHead):
    """The EMA teacher. It also averages bottleneck vectors over the batch, which the center is computed from.

    Args:
        average_patches: average every token position over the views, with all tokens passing through the head, matched
            or not. Otherwise average only CLS; `rows` must then select only CLS tokens.
    """

    def __init__(self, backbone: VisionTransformer, head: DINOHead, average_patches: bool = True):
        super().__init__(backbone, head)
        self.average_patches = average_patches
        self.requires_grad_(False)

    def forward(self, views: Sequence[torch.Tensor], rows: torch.Tensor | None = None) -> TokenOutput:
        """Return the output for some tokens, with `mean_bottleneck` of every position, or only of CLS.

        Args:
            views: a list of one tensor [n, 3, S, S].
            rows: see BackboneWithHead.
        """
        if not self.average_patches:
            out = super().forward(views, rows)
            return out._replace(mean_bottleneck=out.bottleneck.float().mean(0, keepdim=True))
        out = super().forward(views)
        mean = out.bottleneck.float().unflatten(0, (len(views[0]), -1)).mean(0)
        return out._replace(bottleneck=out.bottleneck[rows], mean_bottleneck=mean)


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
    import timm  # takes longer to import than torch

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # no warning for each of its retries
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # of many kinds: an unknown name, no connection, a damaged cache
        raise UserError(f"timm cannot load {shown(name)}: {first_line(error)[:300]}") from error


def _load_backbone(contents, path, arch, patch_size, checkpoint_key):
    """Do what `load_backbone` says, with the contents of the file."""
    state, _ = _weights(contents, checkpoint_key, path)
    args = plain_arguments(contents.get("args", {}), path)
    args |= {name: contents[name] for name in ("epoch", "batch_size") if name in contents}
    for name, (is_valid, expected) in RECORDED.items():
        if name in args and not is_valid(args[name]):
            raise UserError(f"{path} records {name} {shown(args[name])}, expected {expected}")
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
    from support.backbone import interpolate_positions  # not at the top: timm takes longer to import than torch

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
