"""Export a backbone for timm, and for ONNX.

    python export.py --pretrained_weights OUT/checkpoint.pth --output_dir EXPORT --onnx

writes `model.safetensors` and `config.json`, which timm (1.0.16 or newer) reads by

    timm.create_model("local-dir:EXPORT", pretrained=True)

and with --onnx `model.onnx`: images [B, 3, S, S], normalised as `config.json` says, -> tokens [B, 1+P, D] for any B.
S is the side that the position embedding was made for. For other sizes timm interpolates the position embedding in its
own way, with antialiasing and without DINO's shift of the sampling points: then its tokens are not those of this
repository.
"""

import contextlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import timm
import torch

import utils
from augment import MEAN, STD
from support import evaluation
from support.arguments import ArgumentParser
from support.checkpoints import write_safetensors
from utils import UserError, atomic_write
from vision_transformer import WIDTHS

TOLERANCE = 1e-3  # of a token's numbers, which are of the order of 1


def timm_config(backbone):
    """Return what `config.json` holds: timm's model that has the backbone's weights, and the images it takes.

    Architectures and patch sizes without a name in timm are ViT-Ti/16 with other arguments.
    """
    side, patch_size = backbone.patch_embed.img_size[0], backbone.patch_embed.patch_size[0]
    name = f"{WIDTHS.get(backbone.embed_dim)}_patch{patch_size}_224"
    return {
        "architecture": name if timm.is_model(name) else "vit_tiny_patch16_224",
        "num_classes": 0,
        "num_features": backbone.embed_dim,
        "global_pool": "token",
        "model_args": {
            "img_size": side,
            "patch_size": patch_size,
            "embed_dim": backbone.embed_dim,
            "depth": len(backbone.blocks),
            "num_heads": backbone.blocks[0].attn.num_heads,
        },
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, side, side],
            "fixed_input_size": True,
            "interpolation": "bicubic",  # these three are support.features.eval_transform
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": list(MEAN),
            "std": list(STD),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def timm_model(config, state):
    """Build the model of a `timm_config` with the weights `state`."""
    model = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    model.load_state_dict(state)
    return model.eval()


def onnx_program(backbone):
    """Turn a backbone into torch.onnx's program for batches of any size."""
    side = backbone.patch_embed.img_size[0]
    images = torch.zeros(2, 3, side, side)  # a batch of 1 would be taken for a constant
    return torch.onnx.export(
        backbone,
        (images,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["tokens"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )


@torch.no_grad()
def largest_difference(network, backbone, batch_sizes):
    """Return the largest difference of two networks' tokens on random images.

    Raises:
        UserError: it is more than TOLERANCE.
    """
    side = backbone.patch_embed.img_size[0]
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch_size in batch_sizes:
        images = torch.randn(batch_size, 3, side, side, generator=generator)
        largest = max(largest, (network(images) - backbone(images)).abs().max().item())
    if not largest <= TOLERANCE:
        raise UserError(f"the exported network differs by {largest:.1e} from its source, expected {TOLERANCE} at most")
    return largest


def check_onnx(path, backbone):
    """Compare an ONNX file with its backbone in onnxruntime, for batches of 1 and 3, and return the result in words.

    Raises:
        UserError: as `largest_difference`.
    """
    try:
        from onnxruntime import InferenceSession
    except ImportError:
        return "not checked, for want of onnxruntime"
    session = InferenceSession(path, providers=["CPUExecutionProvider"])

    def network(images):
        return torch.tensor(session.run(["tokens"], {"images": np.asarray(images)})[0])

    return f"largest difference from the source in onnxruntime {largest_difference(network, backbone, (1, 3)):.1e}"


def parse_arguments(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog="@FILE reads options from a file.")
    evaluation.add_model_arguments(parser)
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=Path, required=True, help="folder of model.safetensors and config.json, which timm reads")
    add("--onnx", action="store_true", help="write model.onnx too; needs onnx and onnxscript")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    folder = args.output_dir
    names = ["model.safetensors", "config.json"] + ["model.onnx"] * args.onnx
    there = [folder / name for name in names if (folder / name).exists()]
    if there:
        raise UserError(f"{there[0]} is there already, and is not overwritten: remove it, or give another --output_dir")
    if args.onnx and not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        raise UserError("--onnx needs more packages: pip install onnx onnxscript onnxruntime")
    backbone, _, _ = evaluation.open_model(
        args.pretrained_weights,
        arch=args.arch,
        patch_size=args.patch_size,
        checkpoint_key=args.checkpoint_key,
        seed=0,
    )
    utils.make_folder(folder, "--output_dir")

    config, state = timm_config(backbone), backbone.state_dict()
    difference = largest_difference(timm_model(config, state).forward_features, backbone, (1,))
    program = onnx_program(backbone) if args.onnx else None
    with contextlib.ExitStack() as stack:  # all files, or none
        weights, text, *graph = [stack.enter_context(atomic_write(folder / name)) for name in names]
        for path in graph:
            program.save(path, external_data=False)
            checked = check_onnx(path, backbone)
        write_safetensors(state, weights, {"format": "pt"})
        text.write_text(json.dumps(config, indent=2) + "\n")
    side = backbone.patch_embed.img_size[0]
    print(f'{folder} can be read by timm.create_model("local-dir:{folder}", pretrained=True), of timm 1.0.16 or newer')
    print(f"images of {side}x{side} pixels: largest difference of timm's forward_features {difference:.1e}")
    print("images of other sizes: timm interpolates the position embedding in another way")
    if args.onnx:
        print(f"{folder / 'model.onnx'}: {checked}")


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
