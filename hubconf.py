"""Entry points of torch.hub: backbones in evaluation mode, images [B, 3, H, W] -> tokens [B, 1+P, D], CLS first.

    torch.hub.load(FOLDER, "lgssl_vit_small16", source="local", weights="OUT/checkpoint.pth")

FOLDER is this repository. Images are normalized with ImageNet's mean and standard deviation. `weights` takes the same
files as --pretrained_weights; without it the weights are random.
"""

import functools
import os
import sys

from torch import nn

dependencies = ["torch", "timm", "numpy", "safetensors", "tqdm"]


def _imported() -> list[str]:
    """Return the names of imported modules that are named as this repository's are, including submodules."""
    return [name for name in sys.modules if name.split(".")[0] in ("vision_transformer", "support", "utils")]


def lgssl(
    weights: str | None = None, checkpoint_key: str = "teacher", arch: str | None = None, patch_size: int | None = None
) -> nn.Module:
    """Return the backbone of a file, with the architecture that the file holds; see support.weights.load_backbone.

    The caller may have modules named as ours, such as `utils`: they are removed while ours are imported and restored
    afterwards, and later imports still find them. Consequently a network cannot be pickled whole, only its state_dict.

    Args:
        weights: checkpoint of main_lgssl.py or DINO, or timm's .safetensors; None: a random ViT-S/16.
        checkpoint_key: network to load from the checkpoint, "teacher" or "student".
        arch, patch_size: default: read from the weights.
    """
    theirs = {name: sys.modules.pop(name) for name in _imported()}
    folder = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, folder)
    try:
        from support.weights import load_backbone

        return load_backbone(weights or "none", arch, patch_size, checkpoint_key)[0]
    finally:
        sys.path.remove(folder)
        for name in _imported():
            del sys.modules[name]
        sys.modules.update(theirs)


lgssl_vit_tiny16 = functools.partial(lgssl, arch="vit_tiny", patch_size=16)
lgssl_vit_tiny32 = functools.partial(lgssl, arch="vit_tiny", patch_size=32)
lgssl_vit_small16 = functools.partial(lgssl, arch="vit_small", patch_size=16)
lgssl_vit_base16 = functools.partial(lgssl, arch="vit_base", patch_size=16)
lgssl_vit_base8 = functools.partial(lgssl, arch="vit_base", patch_size=8)
