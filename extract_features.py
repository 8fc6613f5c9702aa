"""Write the features of a folder of images, or of another data set, to a file.

    python extract_features.py --data_path FOLDER --pretrained_weights OUT/checkpoint.pth --output features.npz

The images are resized and cut as in eval_knn.py, and as there not turned by their EXIF tag; the features are not
normalised. Runs in one process or under torchrun, on GPUs or CPUs. The suffix of --output chooses the format:

| `.npz`, by `numpy.load` | `.safetensors` | what |
|---|---|---|
| `features` | tensor `features` | [n, D]; with `--features patches` [n, P, D], P row by row |
| `labels` | tensor `labels` | int64 [n], the place in `classes`, -1 where there is none |
| `paths` | metadata `paths` | of the images below --data_path; without files their place, as `val/12` |
| `classes` | metadata `classes` | names of the class folders |
| `made_with` | metadata `made_with` | the network, the pretraining and all options, in JSON |

Features are float32, with `--half` float16; metadata are JSON.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import utils
from support import evaluation
from support.arguments import ArgumentParser
from support.checkpoints import write_safetensors
from support.features import eval_transform, extract_features
from support.images import build_dataset
from utils import UserError, atomic_write
from vision_transformer import WIDTHS

# Tokens [B, 1+P, D] -> features
FEATURES = {
    "cls": lambda tokens: tokens[:, 0],
    "avgpool": lambda tokens: tokens[:, 1:].mean(1),
    "patches": lambda tokens: tokens[:, 1:].flatten(1),  # [B, P * D]: what is gathered has two dimensions
}
MAX_METADATA = 10**8 - 10**4  # bytes; safetensors reads no header of more than 10**8


def image_names(dataset, data_path, split):
    """Return a name for each image: its path relative to `data_path`, or SPLIT/INDEX where it has no file."""
    if hasattr(dataset, "paths"):
        return [os.path.relpath(path, data_path) for path in dataset.paths]
    return [f"{split}/{i}" for i in range(len(dataset))]


def write_features(path, features, labels, paths, classes, made_with):
    """Write features and what belongs to them, whole or not at all; the module's docstring describes the file.

    Args:
        path: ends in .npz or .safetensors.
        features: tensor on the CPU.
        labels: ints.
        paths, classes: names.
        made_with: text.

    Raises:
        UserError: it cannot be written.
    """
    labels = torch.tensor(labels, dtype=torch.int64)
    with atomic_write(path) as temporary:
        if path.suffix == ".safetensors":
            metadata = {"paths": json.dumps(paths), "classes": json.dumps(classes), "made_with": made_with}
            write_safetensors({"features": features, "labels": labels}, temporary, metadata)
        else:
            arrays = {"features": features.numpy(), "labels": labels.numpy(), "made_with": np.array(made_with)}
            arrays.update(paths=np.array(paths, dtype=str), classes=np.array(classes, dtype=str))
            with temporary.open("wb") as file:  # to a name NumPy would add its suffix
                np.savez(file, **arrays)


def parse_arguments(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog="@FILE reads options from a file.")
    evaluation.add_model_arguments(parser)
    layout = "folder of images, or with train and val; classes are its direct subfolders, if any; or of CIFAR-10"
    add = evaluation.add_data_arguments(parser, layout)
    add(
        "--split",
        choices=("train", "val"),
        default="train",
        help="part, where there are two; else all images are taken",
    )
    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, required=True, help="file to write, FILE.npz or FILE.safetensors")
    add("--features", choices=FEATURES, default="cls", help="CLS token, mean of the patch tokens, or all patch tokens")
    add("--half", action="store_true", help="float16, half as large in memory and on disk")
    evaluation.add_computation_arguments(parser, batch_size=128, json_result=False)
    return parser.parse_args(argv)


def main(argv=None):
    """Extract and write.

    Memory: rank 0 holds all features, and of several processes each its own share beside. Patch tokens of ViT-S/16 at
    224 pixels are 0.3 MB an image: 15 GB for 50,000 images, with --half 7.5 GB.
    """
    args = parse_arguments(argv)
    path = args.output
    if path.suffix not in (".npz", ".safetensors"):
        raise UserError(f"--output {path} ends in {path.suffix or 'no suffix'!r}, expected .npz or .safetensors")
    if path.exists():
        raise UserError(f"{path} is there already, and is not overwritten: remove it, or give another --output")
    backbone, pretraining, crop_size = evaluation.open_model(
        args.pretrained_weights,
        arch=args.arch,
        patch_size=args.patch_size,
        checkpoint_key=args.checkpoint_key,
        seed=args.seed,
        img_size=args.crop_size,
    )
    transform = eval_transform(crop_size)
    dataset = build_dataset(args.dataset, args.data_path, args.split, transform, args.classes, args.download)
    dataset.upright = False  # as in the evaluations
    network = {"arch": WIDTHS.get(backbone.embed_dim), "patch_size": backbone.patch_embed.patch_size[0]}
    made_with = {**vars(args), **network, "crop_size": crop_size, "pretraining": pretraining}
    made_with = json.dumps(made_with, default=str)
    paths = image_names(dataset, args.data_path, args.split)
    if path.suffix == ".safetensors" and len(json.dumps(json.dumps(paths))) + len(made_with) > MAX_METADATA:
        raise UserError(f"the paths of {len(paths)} images are too much for the header of {path}: give a name in .npz")
    utils.make_folder(path.parent, "the folder of --output")

    rank, world_size, device = utils.init_distributed(args.dist_url)
    backbone.to(device)
    pool = FEATURES[args.features]
    features = extract_features(
        lambda images: pool(backbone(images)),
        dataset,
        device,
        batch_size=args.batch_size_per_gpu,
        num_workers=args.num_workers,
        dtype=torch.float16 if args.half else torch.float32,
    )
    if rank == 0:
        if args.features == "patches":
            features = features.unflatten(1, (-1, backbone.embed_dim))
        write_features(path, features, dataset.labels, paths, list(dataset.classes), made_with)
        size = "×".join(map(str, features.shape))
        print(f"{args.features} features, {size}, of {len(dataset)} images written to {path}", flush=True)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
