"""Export a backbone for timm and for ONNX.

    python export.py --pretrained_weights OUT/checkpoint.pth --output_dir EXPORT --onnx

It writes `model.safetensors` and `config.json`, which timm (1.0.16 or newer) reads with

    timm.create_model("local-dir:EXPORT", pretrained=True)

and, with --onnx, `model.onnx`: images [B, 3, S, S], normalized as `config.json` says, -> tokens [B, 1+P, D] for any B.
S is the side for which the position embedding was made. At other sizes timm interpolates the position embedding with
antialiasing and without DINO's offset of the sampling points, so that its tokens differ from those of this repository.
"""

import argparse
import contextlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from augment import MEAN, STD
from support import evaluation
from support.files import atomic_write, make_folder, write_safetensors
from utils import UserError, run_main
from vision_transformer import WIDTHS, VisionTransformer

TOLERANCE = 1e-3  # largest accepted difference of a token's values, which are of the order of 1


def timm_config(backbone: VisionTransformer) -> dict[str, Any]:
    """Return the contents of `config.json`: the timm model that fits the backbone's weights, and its input.

    Architectures and patch sizes without a name in timm are ViT-Ti/16 with other arguments. The input is cropped as in
    support.features.eval_transform.
    """
    side, patch_size = backbone.patch_embed.img_size[0], backbone.patch_embed.patch_size[0]
    name = f"{WIDTHS.get(backbone.embed_dim)}_patch{patch_size}_224"
    # fmt: off
    return {
        "architecture": name if timm.is_model(name) else "vit_tiny_patch16_224",
        "num_classes": 0, "num_features": backbone.embed_dim, "global_pool": "token",
        "model_args": {
            "img_size": side, "patch_size": patch_size, "embed_dim": backbone.embed_dim,
            "depth": len(backbone.blocks), "num_heads": backbone.blocks[0].attn.num_heads,
        },
        "pretrained_cfg": {
            "custom_load": False, "num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head",
            "input_size": [3, side, side], "fixed_input_size": True, "pool_size": None,
            "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center",
            "mean": list(MEAN), "std": list(STD),
        },
    }
    # fmt: on


def timm_model(config: dict[str, Any], state: dict[str, torch.Tensor]) -> timm.models.VisionTransformer:
    """Build the model of a `timm_config` with the weights `state`."""
    model = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    model.load_state_dict(state)
    return model.eval()


def write_onnx(backbone: VisionTransformer, path: Path) -> None:
    """Write a backbone as ONNX for batches of any size."""
    side = backbone.patch_embed.img_size[0]
    images = torch.zeros(2, 3, side, side)  # torch.export would treat a batch of 1 as a constant
    torch.onnx.export(
        backbone,
        (images,),
        path,
        input_names=["images"],
        output_names=["tokens"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


@torch.no_grad()
def largest_difference(network: Callable, backbone: VisionTransformer, batch_sizes: tuple[int, ...]) -> float:
    """Return the largest absolute difference between the tokens of two networks on random images.

    Raises:
        UserError: the difference is more than TOLERANCE.
    """
    side = backbone.patch_embed.img_size[0]
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch_size in batch_sizes:
        images = torch.randn(batch_size, 3, side, side, generator=generator)
        largest = max(largest, (network(images) - backbone(images)).abs().max().item())
    if not largest <= TOLERANCE:
        raise UserError(f"the exported network differs by {largest:.1e} from its source, expected at most {TOLERANCE}")
    return largest


def check_onnx(path: Path, backbone: VisionTransformer) -> str:
    """Compare an ONNX file with its backbone in onnxruntime, with batches of 1 and 3, and return the result as text.

    Raises:
        UserError: as `largest_difference`.
    """
    try:
        from onnxruntime import InferenceSession
    except ImportError:
        return "not checked, onnxruntime is not installed"
    session = InferenceSession(path, providers=["CPUExecutionProvider"])

    def network(images: torch.Tensor) -> torch.Tensor:
        return torch.tensor(session.run(["tokens"], {"images": np.asarray(images)})[0])

    return f"largest difference from the source in onnxruntime {largest_difference(network, backbone, (1, 3)):.1e}"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = evaluation.model_parser(__doc__)
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=Path, required=True, help="folder of model.safetensors and config.json for timm")
    add("--onnx", action="store_true", help="also write model.onnx; needs onnx and onnxscript")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Export all files, or none if one cannot be written or checked."""
    args = parse_arguments(argv)
    folder = args.output_dir
    names = ["model.safetensors", "config.json", *(["model.onnx"] if args.onnx else [])]
    for path in (folder / name for name in names):
        if path.exists():
            raise UserError(f"{path} already exists and is not overwritten: remove it, or give another --output_dir")
    if args.onnx and not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        raise UserError("--onnx needs more packages: pip install onnx onnxscript onnxruntime")
    backbone, *_ = evaluation.open_model(evaluation.model_spec(args))
    make_folder(folder, "--output_dir")

    config, state = timm_config(backbone), backbone.state_dict()
    difference = largest_difference(timm_model(config, state).forward_features, backbone, (1,))
    with contextlib.ExitStack() as stack:  # renames the files only if all are complete
        paths = {name: stack.enter_context(atomic_write(folder / name)) for name in names}
        if args.onnx:
            write_onnx(backbone, paths["model.onnx"])
            checked = check_onnx(paths["model.onnx"], backbone)
        write_safetensors(state, paths["model.safetensors"], {"format": "pt"})
        paths["config.json"].write_text(json.dumps(config, indent=2) + "\n")
    side = backbone.patch_embed.img_size[0]
    print(f'{folder}: read it with timm.create_model("local-dir:{folder}", pretrained=True), timm 1.0.16 or newer')
    print(f"images of {side}x{side} pixels: largest difference of timm's forward_features {difference:.1e}")
    print("images of other sizes: timm interpolates the position embedding differently, its tokens differ")
    if args.onnx:
        print(f"{folder / 'model.onnx'}: {checked}")


if __name__ == "__main__":
    run_main(main)
