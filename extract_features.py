"""Write the features of a folder of images, or of another data set, to a file.

    python extract_features.py --data_path FOLDER --pretrained_weights OUT/checkpoint.pth --output features.npz

The images are resized and cropped as in eval_knn.py, and turned upright as in pretraining: by their EXIF orientation,
which the evaluations ignore, as DINO does. The features are not normalized. Runs on GPUs or CPUs, in one process or
under torchrun. The suffix of --output chooses the format:

| `.npz`, by `numpy.load` | `.safetensors` | contents |
|---|---|---|
| `features` | tensor `features` | [n, D]; with `--features patches` [n, P, D], patches row by row |
| `labels` | tensor `labels` | int64 [n], index into `classes`; -1: no label |
| `paths` | metadata `paths` | paths relative to --data_path; without image files SPLIT/INDEX, for example `val/12` |
| `classes` | metadata `classes` | names of the class folders |
| `made_with` | metadata `made_with` | JSON of the network, the pretraining and all options |

Features are float32, or float16 with `--half`. Metadata are JSON.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from support import evaluation
from support.features import eval_transform, extract_features
from support.files import atomic_write, make_folder, write_safetensors
from support.images import ImageList
from support.sources import build_dataset, data_spec
from utils import UserError, init_distributed, run_main
from vision_transformer import WIDTHS

# Tokens [B, 1+P, D] -> features
FEATURES = {
    "cls": lambda tokens: tokens[:, 0],
    "avgpool": lambda tokens: tokens[:, 1:].mean(1),
    "patches": lambda tokens: tokens[:, 1:].flatten(1),  # [B, P * D], since extract_features takes two dimensions
}


def write_features(
    path: Path, features: torch.Tensor, labels: list[int], paths: list[str], classes: list[str], made_with: str
) -> None:
    """Write a file of features atomically, in the format that the module's docstring describes.

    Args:
        path: ends in .npz or .safetensors.
        features: on the CPU.
        made_with: JSON text.

    Raises:
        UserError: the file cannot be written.
    """
    numbers = torch.tensor(labels, dtype=torch.int64)
    with atomic_write(path) as temporary:
        if path.suffix == ".safetensors":
            metadata = {"paths": json.dumps(paths), "classes": json.dumps(classes), "made_with": made_with}
            write_safetensors({"features": features, "labels": numbers}, temporary, metadata)
        else:
            arrays = {"features": features.numpy(), "labels": numbers.numpy(), "made_with": np.array(made_with)}
            arrays |= {"paths": np.array(paths, dtype=str), "classes": np.array(classes, dtype=str)}
            with temporary.open("wb") as file:  # np.savez adds a suffix to a path
                np.savez(file, allow_pickle=False, **arrays)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = evaluation.model_parser(__doc__)
    add = evaluation.add_data_arguments(parser)
    add("--split", choices=("train", "val"), default="train", help="part to extract if the data set has two")
    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, required=True, help="file to write, FILE.npz or FILE.safetensors")
    add("--features", choices=FEATURES, default="cls", help="CLS token, mean of the patch tokens, or all patch tokens")
    add("--half", action="store_true", help="write float16: half the memory and disk space")
    evaluation.add_computation_arguments(parser, batch_size=128, json_result=False)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Extract the features on all processes and write them on rank 0.

    Memory: rank 0 holds all features; with several processes, each also holds its own share. Patch tokens of ViT-S/16
    at 224 pixels take 0.3 MB per image: 15 GB for 50,000 images, 7.5 GB with --half.
    """
    args = parse_arguments(argv)
    path = args.output
    if path.suffix not in (".npz", ".safetensors"):
        raise UserError(f"--output {path} ends in {path.suffix or 'no suffix'!r}, expected .npz or .safetensors")
    if path.exists():
        raise UserError(f"{path} already exists and is not overwritten: remove it, or give another --output")
    backbone, pretraining, crop_size = evaluation.open_model(evaluation.model_spec(args), args.crop_size)
    dataset = build_dataset(data_spec(args, pretraining), args.split, eval_transform(crop_size))
    paths = [f"{args.split}/{i}" for i in range(len(dataset))]
    if isinstance(dataset, ImageList):
        root = args.data_path if args.data_path and os.path.isdir(args.data_path) else dataset.root
        paths = [os.path.relpath(file, root) for file in dataset.paths]
    settings = {**vars(args), "crop_size": crop_size, "pretraining": pretraining}
    settings |= {"arch": WIDTHS.get(backbone.embed_dim), "patch_size": backbone.patch_embed.patch_size[0]}
    made_with = json.dumps(settings, default=str)
    make_folder(path.parent, "the folder of --output")
    dataset.announce()

    _, _, device = init_distributed(args.dist_url)
    backbone.to(device)

    def network(images: torch.Tensor) -> torch.Tensor:
        return FEATURES[args.features](backbone(images)).to(torch.float16 if args.half else torch.float32)

    features = extract_features(network, dataset, device, args.batch_size_per_gpu, args.num_workers, "image features")
    evaluation.leave_process_group()
    if features is None:
        return
    if args.features == "patches":
        features = features.unflatten(1, (-1, backbone.embed_dim))
    write_features(path, features, dataset.labels, paths, list(dataset.classes), made_with)
    size = "×".join(map(str, features.shape))
    print(f"{args.features} features, {size}, of {len(dataset)} images written to {path}", flush=True)


if __name__ == "__main__":
    run_main(main)
