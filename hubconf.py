"""Entry points of torch.hub: backbones in evaluation mode, images [B, 3, H, W] -> tokens [B, 1+P, D], CLS first.

    torch.hub.load(FOLDER, "lgssl_vit_small16", source="local", weights="OUT/checkpoint.pth")

FOLDER is this repository. Images are normalised with ImageNet's mean and standard deviation; `weights` is what
--pretrained_weights takes, and without them the network is random.
"""

import functools
import os
import sys

dependencies = ["torch", "timm", "numpy", "safetensors", "tqdm"]


def _imported():
    """Return the names of all imported modules that are called as ours are, with those inside them."""
    return [name for name in sys.modules if name.split(".")[0] in ("vision_transformer", "support", "utils")]


@functools.cache
def _vision_transformer():
    """Import the networks from this folder, and leave no trace of it in the caller's modules.

    These may have the same names, as `utils`: those that are imported already are put aside meanwhile, and those that
    will be are found. So a network cannot be pickled as a whole; its state_dict can.
    """
    theirs = {name: sys.modules.pop(name) for name in _imported()}
    folder = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, folder)
    try:
        import vision_transformer
    finally:
        sys.path.remove(folder)
        for name in _imported():
            del sys.modules[name]
        sys.modules.update(theirs)
    return vision_transformer


def lgssl(weights=None, checkpoint_key="teacher", arch=None, patch_size=None):
    """Return the backbone of a file, which says what it is; see vision_transformer.load_backbone.

    Args:
        weights: checkpoint of main_lgssl.py or DINO, or timm's .safetensors; None gives a random ViT-S/16.
        checkpoint_key: network of the checkpoint, "teacher" or "student".
        arch, patch_size: default: the weights'.
    """
    load_backbone = _vision_transformer().load_backbone
    return load_backbone("none" if weights is None else weights, arch, patch_size, checkpoint_key)[0]


def lgssl_vit_tiny16(weights=None, checkpoint_key="teacher"):
    """Return ViT-Ti/16; see `lgssl`."""
    return lgssl(weights, checkpoint_key, "vit_tiny", 16)


def lgssl_vit_tiny32(weights=None, checkpoint_key="teacher"):
    """Return ViT-Ti/32; see `lgssl`."""
    return lgssl(weights, checkpoint_key, "vit_tiny", 32)


def lgssl_vit_small16(weights=None, checkpoint_key="teacher"):
    """Return ViT-S/16; see `lgssl`."""
    return lgssl(weights, checkpoint_key, "vit_small", 16)


def lgssl_vit_base16(weights=None, checkpoint_key="teacher"):
    """Return ViT-B/16; see `lgssl`."""
    return lgssl(weights, checkpoint_key, "vit_base", 16)


def lgssl_vit_base8(weights=None, checkpoint_key="teacher"):
    """Return ViT-B/8; see `lgssl`."""
    return lgssl(weights, checkpoint_key, "vit_base", 8)
