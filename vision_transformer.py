"""The networks: the ViT, its sizes, DINO's projection head, student and teacher."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from utils import UserError

MAX_SIDE = 8192  # largest side of a view or patch in pixels


class Block(TimmBlock):
    """timm's block, with stochastic depth as an input: all blocks are alike, and none draws random numbers."""

    def forward(self, x: torch.Tensor, drop_path: torch.Tensor | None = None) -> torch.Tensor:
        """Return the tokens after attention and MLP: x [B, 1+P, D] -> [B, 1+P, D].

        Args:
            drop_path: [2, B], factors of attention and MLP for each image, see VisionTransformer.draw_drop_paths. None
                stands for 1.
        """
        attention = self.ls1(self.attn(self.norm1(x)))
        x = x + (attention if drop_path is None else attention * drop_path[0, :, None, None])
        mlp = self.ls2(self.mlp(self.norm2(x)))
        return x + (mlp if drop_path is None else mlp * drop_path[1, :, None, None])


class VisionTransformer(TimmVisionTransformer):
    """A ViT that returns all tokens, for images of any size.

    timm's VisionTransformer with DINO's interpolation of the position embedding and DINO's initialization, without a
    classifier. The names in its state_dict are those of timm and DINO. If the patch size does not divide the image
    size, the remaining pixels at the right and bottom are ignored.

    Args:
        img_size: side in pixels of the square images that the position embedding is made for.
        patch_size: side of a patch in pixels.
        drop_path_rate: stochastic depth rate of the last block; it increases linearly from 0 at the first block. It
            acts in `forward`, in training mode.
        kwargs: arguments of timm's VisionTransformer.
    """

    def __init__(self, img_size: int = 224, patch_size: int = 16, drop_path_rate: float = 0.0, **kwargs: Any) -> None:
        super().__init__(
            img_size=img_size, patch_size=patch_size, num_classes=0, dynamic_img_size=True, block_fn=Block, **kwargs
        )
        self.drop_path_rate = drop_path_rate
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)  # timm: 1e-6

    def forward(self, images: torch.Tensor, drop_paths: torch.Tensor | None = None) -> torch.Tensor:
        """Return the tokens after the final norm, CLS first: images [B, 3, H, W] -> [B, 1+P, D].

        Args:
            drop_paths: result of `draw_drop_paths`; None draws it.
        """
        x = self._embed(images)
        if drop_paths is None:
            drop_paths = self.draw_drop_paths(images.shape[0])  # len() would fix the batch size of an ONNX file
        of_blocks = [None] * len(self.blocks) if drop_paths is None else drop_paths
        for block, drop_path in zip(self.blocks, of_blocks, strict=True):
            x = checkpoint(block, x, drop_path, use_reentrant=False) if self.grad_checkpointing else block(x, drop_path)
        return self.norm(x)

    def draw_drop_paths(self, images: int) -> torch.Tensor | None:
        """Draw the stochastic depth of a forward pass, for all blocks at once.

        Returns:
            [blocks, 2, images], factors of attention and MLP for each image: 0 with the block's rate, else
            1 / (1 - rate). Under autocast they have its precision. None in evaluation mode and with rate 0.
        """
        if not self.training or not self.drop_path_rate:
            return None
        device, dtype = self.cls_token.device, self.cls_token.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        keep = torch.linspace(1, 1 - self.drop_path_rate, len(self.blocks), device=device)
        keep = keep[:, None, None].expand(-1, 2, images)
        return torch.bernoulli(keep).div_(keep).to(dtype)

    def get_intermediate_layers(self, images: torch.Tensor, n: int = 1) -> list[torch.Tensor]:
        """Return the tokens after each of the last n blocks and the final norm, as n tensors [B, 1+P, D]."""
        if not 1 <= n <= len(self.blocks):
            raise ValueError(f"n is {n}, expected 1 to {len(self.blocks)}, the number of blocks")
        x, layers = self.blocks[:-n](self._embed(images)), []
        for block in self.blocks[-n:]:
            x = block(x)
            layers.append(self.norm(x))
        return layers

    def get_last_selfattention(self, images: torch.Tensor) -> torch.Tensor:
        """Return the attention of the last block after the softmax, [B, heads, 1+P, 1+P]; row 0 is that of CLS."""
        x = self.blocks[:-1](self._embed(images))
        attention = self.blocks[-1].attn
        qkv = attention.qkv(self.blocks[-1].norm1(x))  # [B, 1+P, 3D]
        q, k, _ = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, 1+P, D/heads]
        return (q @ k.mT * attention.scale).softmax(-1)

    def _embed(self, images: torch.Tensor) -> torch.Tensor:
        """Return the input of the first block, with CLS and position embedding: [B, 3, H, W] -> [B, 1+P, D]."""
        height, width = images.shape[-2:]
        patch_height, patch_width = self.patch_embed.patch_size
        if height < patch_height or width < patch_width:
            raise ValueError(f"an image of {height}x{width} is smaller than a patch of {patch_height}x{patch_width}")
        rows, columns = height // patch_height, width // patch_width
        images = images[..., : rows * patch_height, : columns * patch_width]
        # The convolution of patch_embed as one matrix product, which takes a fraction of the time in bf16 on a GPU.
        patches = images.unflatten(-1, (columns, patch_width)).unflatten(-3, (rows, patch_height))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, P, 3 * pixels]
        projection = self.patch_embed.proj
        x = self.patch_embed.norm(F.linear(patches, projection.weight.flatten(1), projection.bias))
        pos_embed = self.pos_embed
        # As DINO: interpolate for every image that is not square, even if its number of patches is the trained one.
        if rows * columns != pos_embed.shape[1] - 1 or height != width:
            pos_embed = interpolate_positions(pos_embed, self.patch_embed.grid_size, (rows, columns))
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.pos_drop(x + pos_embed)


def interpolate_positions(pos_embed: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Resize a position embedding [1, 1+P, D], CLS first, from one grid (rows, columns) of patches to another.

    Bicubic and without antialiasing, as in DINO. The value of CLS stays.
    """
    values = pos_embed[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)  # [1, D, rows, columns]
    # As DINO: adding 0.1 guards against rounding and shifts the sampling points slightly.
    scale = ((new_grid[0] + 0.1) / grid[0], (new_grid[1] + 0.1) / grid[1])
    values = F.interpolate(values, scale_factor=scale, mode="bicubic", recompute_scale_factor=False)
    return torch.cat([pos_embed[:, :1], values.flatten(2).mT], dim=1)


def vit_micro(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """ViT for quick studies, not in the paper: 4 blocks of width 96, about 0.5 M parameters."""
    return VisionTransformer(patch_size=patch_size, embed_dim=96, depth=4, num_heads=3, **kwargs)


def vit_tiny(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """ViT-Ti: 12 blocks of width 192."""
    return VisionTransformer(patch_size=patch_size, embed_dim=192, depth=12, num_heads=3, **kwargs)


def vit_small(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """ViT-S: 12 blocks of width 384."""
    return VisionTransformer(patch_size=patch_size, embed_dim=384, depth=12, num_heads=6, **kwargs)


def vit_base(patch_size: int = 16, **kwargs: Any) -> VisionTransformer:
    """ViT-B: 12 blocks of width 768."""
    return VisionTransformer(patch_size=patch_size, embed_dim=768, depth=12, num_heads=12, **kwargs)


ARCHITECTURES = {"vit_micro": vit_micro, "vit_tiny": vit_tiny, "vit_small": vit_small, "vit_base": vit_base}
# Architecture by width, for weights saved without arguments. Add new architectures to both dictionaries.
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
        patch_mlp: add a second MLP, for patch tokens. Both share the prototypes.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        patch_mlp: bool = False,
    ) -> None:
        super().__init__()
        self.use_bn = use_bn
        self.mlp = _mlp(in_dim, hidden_dim, bottleneck_dim, use_bn)
        self.last_layer = Prototypes(bottleneck_dim, out_dim, learn_norm=not norm_last_layer)
        self.patch_mlp = _mlp(in_dim, hidden_dim, bottleneck_dim, use_bn) if patch_mlp else None

    def forward(self, tokens: torch.Tensor, kinds: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """Map tokens [N, in_dim] to unit vectors [N, bottleneck_dim].

        Args:
            kinds: (indices of the CLS tokens, indices of the patch tokens). Needed only with an MLP for patch tokens.
        """
        if self.patch_mlp is None:
            return self._bottleneck(self.mlp, tokens)
        if kinds is None:
            raise ValueError("a head with an MLP for patch tokens needs kinds: which tokens are CLS, which patches")
        cls, patch = kinds
        z = torch.cat([self._bottleneck(self.mlp, tokens[cls]), self._bottleneck(self.patch_mlp, tokens[patch])])
        return torch.empty_like(z).index_copy(0, torch.cat(kinds), z)

    def _bottleneck(self, mlp: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        # On a CPU, blocks of more than 32 MiB would be returned to the system and requested again in every step, which
        # costs 4 % of the time. Batch norm needs all tokens at once.
        pieces = tokens.split(2048) if tokens.device.type == "cpu" and not self.use_bn else [tokens]
        return torch.cat([F.normalize(mlp(piece), dim=-1) for piece in pieces])

    def prototypes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights [K, bottleneck_dim] and scale [K] of the last layer, see Prototypes."""
        return self.last_layer()


def _mlp(in_dim: int, hidden_dim: int, out_dim: int, use_bn: bool) -> nn.Sequential:
    """Return the MLP of DINO's head, with three linear layers."""
    layers: list[nn.Module] = []
    for width in (in_dim, hidden_dim):
        layers.append(nn.Linear(width, hidden_dim))
        layers += [BatchNorm(hidden_dim), nn.GELU()] if use_bn else [nn.GELU()]
    layers.append(nn.Linear(hidden_dim, out_dim))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class BatchNorm(nn.BatchNorm1d):
    """Batch norm that takes its running statistics for less than two tokens, which have no variance.

    A batch may hold a single matched patch, or none. With several GPUs, SyncBatchNorm takes its place, and needs two
    tokens among all of them.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 1 or not self.training:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class Prototypes(nn.Module):
    """Weight-normalized linear layer with plain parameters under DINO's names, without hooks.

    `forward` returns weights [K, D] and scale [K]; logits are `z @ (scale * weights.T)`. The product of the two is not
    formed: it would be a copy of the largest layer, in the student and in the teacher.

    Args:
        dim: width of the bottleneck.
        count: K, number of prototypes.
        learn_norm: learn the norm of each prototype instead of fixing it to 1.
    """

    def __init__(self, dim: int, count: int, learn_norm: bool) -> None:
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
    """The student: backbone and head behind one forward, so that DistributedDataParallel sees every parameter."""

    def __init__(self, backbone: VisionTransformer, head: DINOHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(
        self,
        views: Sequence[torch.Tensor],
        rows: torch.Tensor | None = None,
        kinds: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> TokenOutput:
        """Return the output for some tokens of the views.

        Args:
            views: normalized pixels, one tensor [n, 3, S, S] per view size.
            rows: LongTensor [N], indices of tokens in the concatenated outputs of all views; None selects all.
            kinds: see DINOHead.forward. For all tokens, it is known: the first token of an image is CLS.
        """
        outputs = self.encode(views)
        cls_features = outputs[0][:, 0].detach().clone()  # a copy, so that the memory of the other tokens can be freed
        tokens = torch.cat([output.flatten(0, 1) for output in outputs])
        if rows is not None:
            tokens = tokens[rows]
        elif self.head.patch_mlp is not None:
            index = torch.arange(len(tokens), device=tokens.device).split([x.shape[0] * x.shape[1] for x in outputs])
            of_images = [i.view(x.shape[:2]) for i, x in zip(index, outputs, strict=True)]
            kinds = torch.cat([i[:, 0] for i in of_images]), torch.cat([i[:, 1:].flatten() for i in of_images])
        prototypes, scale = self.head.prototypes()
        return TokenOutput(self.head(tokens, kinds), prototypes, scale, cls_features)

    def encode(self, views: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return the tokens [n, 1+P, D] of each tensor of views. support/cuda_graphs.py replaces this method."""
        return [self.backbone(view) for view in views]


class Teacher(BackboneWithHead):
    """The teacher, whose weights are a moving average of the student's (EMA) and have no gradients.

    It also averages bottleneck vectors over the batch; the center of the loss is computed from these means.

    Args:
        average_patches: average every token position over the views, with all tokens passing through the head, matched
            or not. Otherwise average only CLS; `rows` must then select only CLS tokens.
    """

    def __init__(self, backbone: VisionTransformer, head: DINOHead, average_patches: bool = True) -> None:
        super().__init__(backbone, head)
        self.average_patches = average_patches
        self.requires_grad_(False)

    def forward(
        self,
        views: Sequence[torch.Tensor],
        rows: torch.Tensor | None = None,
        kinds: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> TokenOutput:
        """Return the output for some tokens, with `mean_bottleneck` of every position, or only of CLS.

        Args:
            views: a list of one tensor [n, 3, S, S].
            rows: see BackboneWithHead.
            kinds: see BackboneWithHead. With `average_patches`, it is not needed.
        """
        if not self.average_patches:
            out = super().forward(views, rows, kinds)
            return out._replace(mean_bottleneck=out.bottleneck.float().mean(0, keepdim=True))
        out = super().forward(views)
        mean = out.bottleneck.float().unflatten(0, (len(views[0]), -1)).mean(0)
        return out._replace(bottleneck=out.bottleneck if rows is None else out.bottleneck[rows], mean_bottleneck=mean)
