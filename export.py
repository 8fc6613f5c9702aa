"""Export a backbone for timm and for ONNX.

    python export.py --pretrained_weights OUT/checkpoint.pth --output_dir EXPORT --onnx

It writes `model.safetensors` and `config.json`, which timm (1.0.16 or newer) reads with

    timm.create_model("local-dir:EXPORT", pretrained=True)

and, with --onnx, `model.onnx`: images [B, 3, S, S], normalized as `config.json` says, -> tokens [B, 1+P, D] for any B.
S is the side for which the position embedding was made. At other sizes timm interpolates the position embedding with
antialiasing and without DINO's offset of the sampling points, so that its tokens differ from those of this repository.
"""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import timm
import torch

from augment import MEAN, STD
from support import evaluation
from support.files import atomic_write, make_folder, write_safetensors, write_text
from utils import UserError, run_main
from vision_transformer import WIDTHS, VisionTransformer

TOLERANCE = 1e-3  # largest accepted difference of a token's values, which are of the order of 1


def timm_config(backbone: VisionTransformer, made_with: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of `config.json`: the timm model that fits the backbone's weights, and its input.

    Architectures and patch sizes without a name in timm are ViT-Ti/16 with other arguments. The input is cropped as in
    support.features.eval_transform. timm ignores `pretraining`, which support.weights.load_backbone reads.

    Args:
        made_with: see `load_backbone`.
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
        "pretraining": made_with,
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


def largest_difference(tokens: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest absolute difference between the tokens of an exported network and those of its source.

    Raises:
        UserError: the difference is more than TOLERANCE.
    """
    largest = (tokens - expected).abs().max().item()
    if not largest <= TOLERANCE:
        raise UserError(f"the exported network differs by {largest:.1e} from its source, expected at most {TOLERANCE}")
    return largest


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = evaluation.model_parser(__doc__)
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=Path, required=True, help="folder of model.safetensors and config.json for timm")
    add("--onnx", action="store_true", help="also write model.onnx; needs onnx, onnxscript and onnxruntime")
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Write the files, after comparing their networks with the original."""
    args = parse_arguments(argv)
    folder = args.output_dir
    for name in ("config.json", "model.safetensors", *(["model.onnx"] if args.onnx else [])):
        if (folder / name).exists():
            raise UserError(f"{folder / name} already exists and is not overwritten: give another --output_dir")
    if args.onnx and not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        raise UserError("--onnx needs more packages: pip install onnx onnxscript onnxruntime")
    backbone, made_with, _ = evaluation.open_model(evaluation.model_spec(args))
    make_folder(folder, "--output_dir")

    config, state, side = timm_config(backbone, made_with), backbone.state_dict(), backbone.patch_embed.img_size[0]
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    tokens = backbone(images)
    difference = largest_difference(timm_model(config, state).forward_features(images), tokens)
    if args.onnx:
        from onnxruntime import InferenceSession

        with atomic_write(folder / "model.onnx") as path:
            write_onnx(backbone, path)
            (found,) = InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"images": images.numpy()})
            difference = largest_difference(torch.tensor(found), tokens)
        print(f"{folder / 'model.onnx'}: largest difference from the source in onnxruntime {difference:.1e}")
    with atomic_write(folder / "model.safetensors") as path:
        write_safetensors(state, path, {"format": "pt"})
    write_text(json.dumps(config, indent=2) + "\n", folder / "config.json")
    print(f'{folder}: read it with timm.create_model("local-dir:{folder}", pretrained=True), timm 1.0.16 or newer')
    print(f"images of {side}x{side} pixels: largest difference of timm's forward_features {difference:.1e}")
    print("images of other sizes: timm interpolates the position embedding differently, its tokens differ")


if __name__ == "__main__":
    run_main(main)
