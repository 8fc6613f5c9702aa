"""ViT-Tiny/Small/Base on timm's VisionTransformer, the DINO head, and loading of backbones."""

import argparse
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import nn

from support.checkpoints import load_file
from utils import UserError


class VisionTransformer(TimmVisionTransformer):
    """A ViT that returns all its tokens, for images of any size.

    timm's, with DINO's position-embedding interpolation, DINO's initialisation and no classifier. The names in its
    state_dict are timm's and DINO's. What remains below a whole patch at the right and the bottom is dropped.

    Args:
        img_size: side in pixels of the square that the position embedding was made for.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first.
    """

    def __init__(self, img_size=224, patch_size=16, **kwargs):
        super().__init__(img_size=img_size, patch_size=patch_size, num_classes=0, dynamic_img_size=True, **kwargs)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)  # timm: 1e-6

    def forward(self, images):
        """Return the tokens after the last norm, CLS first: images [B, 3, H, W] -> [B, 1+P, D]."""
        return self.forward_features(self._whole_patches(images))

    def get_intermediate_layers(self, images, n=1):
        """Return the tokens of the last n blocks, each after the final norm: n tensors [B, 1+P, D], in order."""
        if not 1 <= n <= len(self.blocks):
            raise ValueError(f"the last {n} blocks of {len(self.blocks)} were asked for")
        x = self._pos_embed(self.patch_embed(self._whole_patches(images)))
        layers = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= len(self.blocks) - n:
                layers.append(self.norm(x))
        return layers

    def get_last_selfattention(self, images):
        """Return the last block's attention, after the softmax: [B, heads, 1+P, 1+P]; row 0 is that of CLS."""
        x = self._pos_embed(self.patch_embed(self._whole_patches(images)))
        for block in self.blocks[:-1]:
            x = block(x)
        attention = self.blocks[-1].attn
        qkv = attention.qkv(self.blocks[-1].norm1(x))  # [B, 1+P, 3D]
        q, k, _ = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, 1+P, D/heads]
        return (q @ k.mT * attention.scale).softmax(-1)

    def _whole_patches(self, images):
        height, width = images.shape[-2:]
        patch_height, patch_width = self.patch_embed.patch_size
        if height < patch_height or width < patch_width:
            raise ValueError(
                f"an image of {height}x{width} pixels is smaller than a patch of {patch_height}x{patch_width}"
            )
        return images[..., : height - height % patch_height, : width - width % patch_width]

    def _pos_embed(self, x):
        """Add CLS and the position embedding: [B, rows, columns, D] -> [B, 1+P, D]. timm's hook."""
        batch, rows, columns, dim = x.shape
        own_rows, own_columns = self.patch_embed.grid_size
        pos_embed = self.pos_embed
        if (rows, columns) != (own_rows, own_columns):
            grid = pos_embed[:, 1:].unflatten(1, (own_rows, own_columns)).permute(0, 3, 1, 2)
            # As DINO: no antialiasing, and 0.1 added against rounding, which shifts the sampling points a little.
            scale = ((rows + 0.1) / own_rows, (columns + 0.1) / own_columns)
            grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", recompute_scale_factor=False)
            pos_embed = torch.cat([pos_embed[:, :1], grid.flatten(2).mT], dim=1)
        x = torch.cat([self.cls_token.expand(batch, -1, -1), x.view(batch, -1, dim)], dim=1)
        return self.pos_drop(x + pos_embed)


def vit_micro(patch_size=16, **kwargs):
    """A ViT for quick studies, not in the paper: 4 blocks of width 96, about half a million parameters."""
    return VisionTransformer(patch_size=patch_size, embed_dim=96, depth=4, num_heads=3, **kwargs)


def vit_tiny(patch_size=16, **kwargs):
    """ViT-Ti: 12 blocks of width 192."""
    return VisionTransformer(patch_size=patch_size, embed_dim=192, depth=12, num_heads=3, **kwargs)


def vit_small(patch_size=16, **kwargs):
    """ViT-S: 12 blocks of width 384."""
    return VisionTransformer(patch_size=patch_size, embed_dim=384, depth=12, num_heads=6, **kwargs)


def vit_base(patch_size=16, **kwargs):
    """ViT-B: 12 blocks of width 768."""
    return VisionTransformer(patch_size=patch_size, embed_dim=768, depth=12, num_heads=12, **kwargs)


ARCHITECTURES = {"vit_micro": vit_micro, "vit_tiny": vit_tiny, "vit_small": vit_small, "vit_base": vit_base}
# The architecture of weights that come without arguments, by their width. New ones go into both dictionaries.
WIDTHS = {96: "vit_micro", 192: "vit_tiny", 384: "vit_small", 768: "vit_base"}


def architecture(name):
    """Return the name of one of ARCHITECTURES; DINO's deit_* names stand for the same networks. For argparse."""
    vit = name.replace("deit", "vit")
    if vit not in ARCHITECTURES:
        reason = (
            "" if "vit" in name else ": convolutional and XCiT networks have no patch tokens that stand for a place"
        )
        raise UserError(f"no architecture {name}{reason}; expected one of {', '.join(ARCHITECTURES)}")
    return vit


class DINOHead(nn.Module):
    """DINO's projection head: an MLP to an L2-normalised bottleneck, and weight-normalised prototypes.

    The two parts are called one by one, since logits are needed for few of the tokens: `forward` returns the bottleneck
    vectors and `prototypes` the last layer's weights.

    Args:
        norm_last_layer: keep the prototypes' length at 1 instead of learning it.
        use_bn: batch norm after the hidden layers.
    """

    def __init__(
        self, in_dim, out_dim, use_bn=False, norm_last_layer=True, nlayers=3, hidden_dim=2048, bottleneck_dim=256
    ):
        super().__init__()
        self.use_bn = use_bn
        dims = [in_dim] + [hidden_dim] * (nlayers - 1) + [bottleneck_dim]
        layers = []
        for i in range(nlayers):
            layers.append(nn.Linear(dims[i], dims[i + 1]))
            if i < nlayers - 1:
                layers += [nn.BatchNorm1d(dims[i + 1])] if use_bn else []
                layers.append(nn.GELU())
        self.mlp = nn.Sequential(*layers)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = Prototypes(bottleneck_dim, out_dim, learn_norm=not norm_last_layer)

    def forward(self, tokens):
        """Map tokens [n, in_dim] to unit vectors [n, bottleneck_dim]."""
        # In pieces: on a CPU, blocks of more than 32 MiB would be given back to the system and asked for anew in every
        # step, which takes 4 % of its time. Batch norm needs all tokens at once.
        pieces = [tokens] if self.use_bn else tokens.split(2048)
        return torch.cat([F.normalize(self.mlp(piece), dim=-1) for piece in pieces])

    def prototypes(self):
        """Return the last layer's weights [K, bottleneck_dim] and scale [K], see Prototypes."""
        return self.last_layer()


class Prototypes(nn.Module):
    """Weight-normalised weights as plain parameters under DINO's names, without hooks.

    `forward` returns weights [K, D] and their scale [K]; logits are `z @ (scale * weights.T)`. Multiplied out they
    would be a copy of the largest layer, for student and teacher each.
    """

    def __init__(self, dim, count, learn_norm):
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(count, dim))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # as nn.Linear
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=learn_norm)

    def forward(self):
        return self.weight_v, self.weight_g[:, 0] / self.weight_v.norm(dim=1)


class TokenOutput(NamedTuple):
    """What a network returns for N tokens. Their logits are `bottleneck @ (scale * prototypes.T)`."""

    bottleneck: torch.Tensor  # [N, bottleneck_dim] unit vectors
    prototypes: torch.Tensor  # [K, bottleneck_dim]
    scale: torch.Tensor  # [K]
    cls_features: torch.Tensor  # [n, D] CLS tokens of the first tensor of views, before the head; without gradient
    mean_bottleneck: torch.Tensor | None = None  # [positions, bottleneck_dim] mean over the views; the teacher's alone


class BackboneWithHead(nn.Module):
    """Backbone, head and prototypes behind one forward, so that DistributedDataParallel sees every parameter."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views, rows=None):
        """Send tokens of views through the head.

        Args:
            views: one tensor [n, 3, S, S] of normalised pixels per size of views.
            rows: LongTensor [N] of tokens, numbered through the outputs of all views laid out one after the other; None
                takes all of them.

        Returns:
            TokenOutput
        """
        tokens = [self.backbone(view) for view in views]  # [n, 1+P, D] each
        cls_features = tokens[0][:, 0].detach().clone()  # a copy, so that the other tokens can be freed
        tokens = torch.cat([t.flatten(0, 1) for t in tokens])
        if rows is not None:
            tokens = tokens[rows]
        return TokenOutput(self.head(tokens), *self.head.prototypes(), cls_features)


class Teacher(BackboneWithHead):
    """The EMA teacher: it also averages bottleneck vectors, which is what the center is made of.

    Args:
        average_patches: average every token position over the views, for which all tokens go through the head,
            matched or not; otherwise CLS alone, and no other token may be asked for.
    """

    def __init__(self, backbone, head, average_patches=True):
        super().__init__(backbone, head)
        self.average_patches = average_patches
        self.requires_grad_(False)

    def forward(self, views, rows):
        """Return the TokenOutput of some tokens, with `mean_bottleneck` of every position, or of CLS alone.

        Args:
            views: a list of one tensor [n, 3, S, S].
            rows: as in BackboneWithHead.
        """
        if not self.average_patches:
            out = super().forward(views, rows)
            return out._replace(mean_bottleneck=out.bottleneck.float().mean(0, keepdim=True))
        out = super().forward(views)
        mean = out.bottleneck.float().unflatten(0, (len(views[0]), -1)).mean(0)
        return out._replace(bottleneck=out.bottleneck[rows], mean_bottleneck=mean)


def load_backbone(path, arch=None, patch_size=None, checkpoint_key="teacher", img_size=224):
    """Build a backbone with the weights of a file.

    Reads checkpoints of this repository and of DINO (whole or backbone alone), and timm's `.safetensors`. The grid of
    the position embedding is read from the weights; a head is left out.

    Args:
        path: the file, or "none" for a randomly initialised network.
        arch, patch_size: what the file holds; None takes them from its arguments, or else from the weights' shapes. Of
            a random network None is ViT-S/16.
        checkpoint_key: which network of a checkpoint that has several, "teacher" or "student".
        img_size: side in pixels that a random network's position embedding is made for.

    Returns:
        (backbone, made_with): in evaluation mode, with the arguments of the pretraining, the `epoch` it had reached and
        its total `batch_size`, as far as the file has them.

    Raises:
        UserError: the file is no checkpoint, has no such network, holds no ViT, or its keys or shapes do not fit.
    """
    arch = architecture(arch) if arch else None
    if str(path) == "none":
        return ARCHITECTURES[arch or "vit_small"](patch_size or 16, img_size=img_size).eval(), {}
    contents = load_file(path)
    args = contents.get("args", {})
    args = args if isinstance(args, dict) else vars(args) if isinstance(args, argparse.Namespace) else {}
    state = contents
    if any(isinstance(value, dict) and value for value in contents.values()) or checkpoint_key in contents:
        if checkpoint_key not in contents:
            networks = [key for key in ("teacher", "student", "model", "state_dict") if key in contents]
            raise UserError(
                f"{path} has no {checkpoint_key!r}, found {', '.join(networks) or 'none'}: see --checkpoint_key"
            )
        state = contents[checkpoint_key]
    if not isinstance(state, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        raise UserError(f"{path} holds no weights under {checkpoint_key!r}, expected names and tensors")
    state = {name.removeprefix("module.").removeprefix("backbone."): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if not name.startswith(("head.", "fc_norm."))}
    made_with = {"arch": str(args.get("arch", "")).replace("deit", "vit") or None, "patch_size": args.get("patch_size")}
    for name, wanted in {"arch": arch, "patch_size": patch_size}.items():
        if None not in (wanted, made_with[name]) and wanted != made_with[name]:
            raise UserError(f"{path} was made with --{name} {made_with[name]}, found --{name} {wanted}")
    arch, patch_size = arch or made_with["arch"], patch_size or made_with["patch_size"]
    if arch:
        arch = architecture(arch)
    projection = state["patch_embed.proj.weight"].shape if "patch_embed.proj.weight" in state else ()
    if len(projection) != 4 or 0 in projection:
        found = f"one of shape {list(projection)}" if projection else ", ".join(list(state)[:3]) or "nothing"
        raise UserError(f"{path} holds no ViT: expected patch_embed.proj.weight [D, 3, p, p], found {found}")
    if not arch and projection[0] not in WIDTHS:
        known = ", ".join(f"{width} ({name})" for width, name in WIDTHS.items())
        raise UserError(f"{path} holds a ViT of width {projection[0]}, expected one of {known}")
    arch, patch_size = arch or WIDTHS[projection[0]], patch_size or projection[-1]

    shape = state["pos_embed"].shape if "pos_embed" in state else ()
    side = math.isqrt(max(shape[1] - 1, 1)) if len(shape) == 3 else 14  # else: refused below
    backbone = ARCHITECTURES[arch](patch_size, img_size=side * patch_size)
    own = backbone.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is not part of the network" for name in state if name not in own]
    problems += [
        f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise UserError(f"{path} does not fit {arch} with patch size {patch_size}: {shown}")
    bad = [name for name in own if not state[name].isfinite().all()]
    if bad:
        raise UserError(f"{path} holds weights that are not finite: {bad[0]}")
    backbone.load_state_dict(state)
    reached = {name: contents[name] for name in ("epoch", "batch_size") if name in contents}
    return backbone.eval(), {**args, **reached}
