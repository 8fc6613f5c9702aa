"""The class of the networks, on timm's VisionTransformer. Importing timm takes longer than importing torch."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import nn


def interpolate_positions(pos_embed: torch.Tensor, own: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Interpolate a position embedding [1, 1+P, D], CLS first, from a grid (rows, columns) to another, as DINO does."""
    grid = pos_embed[:, 1:].unflatten(1, own).permute(0, 3, 1, 2)
    # As DINO: no antialiasing. Adding 0.1 guards against rounding and shifts the sampling points slightly.
    scale = ((new[0] + 0.1) / own[0], (new[1] + 0.1) / own[1])
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", recompute_scale_factor=False)
    return torch.cat([pos_embed[:, :1], grid.flatten(2).mT], dim=1)


class VisionTransformer(TimmVisionTransformer):
    """A ViT that returns all tokens, for images of any size.

    timm's VisionTransformer with DINO's interpolation of the position embedding and DINO's initialization, without a
    classifier. The names in its state_dict are those of timm and DINO. If the patch size does not divide the image
    size, the remaining pixels at the right and bottom are ignored.

    Args:
        img_size: side in pixels of the square images that the position embedding is made for.
        patch_size: side of a patch in pixels.
        kwargs: arguments of timm's VisionTransformer. `drop_path_rate` is the stochastic depth rate of the last block;
            it increases linearly from 0 at the first block.
    """

    def __init__(self, img_size: int = 224, patch_size: int = 16, **kwargs: Any):
        super().__init__(img_size=img_size, patch_size=patch_size, num_classes=0, dynamic_img_size=True, **kwargs)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)  # timm: 1e-6

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the tokens after the final norm, CLS first: images [B, 3, H, W] -> [B, 1+P, D]."""
        x = self._embed(images)
        return self.norm(checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x))

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

    def _embed(self, images):
        """Return the input of the first block, with CLS and position embedding: [B, 3, H, W] -> [B, 1+P, D]."""
        height, width = images.shape[-2:]
        patch_height, patch_width = self.patch_embed.patch_size
        if height < patch_height or width < patch_width:
            expected = f"at least one patch of {patch_height}x{patch_width}"
            raise ValueError(f"found an image of {height}x{width} pixels, expected {expected}")
        rows, columns = height // patch_height, width // patch_width
        images = images[..., : rows * patch_height, : columns * patch_width]
        # The convolution of patch_embed as one matrix product, which takes a fraction of the time in bf16 on a GPU.
        patches = images.unflatten(-1, (columns, patch_width)).unflatten(-3, (rows, patch_height))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, P, 3 * pixels]
        projection = self.patch_embed.proj
        x = self.patch_embed.norm(F.linear(patches, projection.weight.flatten(1), projection.bias))
        own_rows, own_columns = self.patch_embed.grid_size
        pos_embed = self.pos_embed
        # As DINO: interpolate for every image that is not square, even if its number of patches is the trained one.
        if rows * columns != own_rows * own_columns or height != width:
            pos_embed = interpolate_positions(pos_embed, (own_rows, own_columns), (rows, columns))
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.pos_drop(x + pos_embed)
