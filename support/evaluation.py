"""Shared parts of the evaluations: options, opening of model and images, k-NN, average precision, JSON results."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from support.arguments import ArgumentParser, number
from support.features import extract_features
from support.images import DATASETS, build_dataset
from utils import UserError, make_folder, write_text
from vision_transformer import ARCHITECTURES, architecture, load_backbone


def model_parser(doc) -> ArgumentParser:
    """Return a parser with the options of a model. The first line of `doc` describes the command."""
    parser = ArgumentParser(description=doc.splitlines()[0], epilog="@FILE reads options from a file.")
    add_model_arguments(parser)
    return parser


def add_model_arguments(parser, required=True) -> None:
    """Add the options of `open_model`. `required` makes --pretrained_weights mandatory."""
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_weights", required=required, help="checkpoint, or timm's .safetensors; none: random weights")
    add("--checkpoint_key", default="teacher", help="network to load from the checkpoint, teacher or student")
    add("--arch", type=architecture, help=f"{', '.join(ARCHITECTURES)}; default: read from the weights, or vit_small")
    add("--patch_size", type=number(int, 1), help="side of a patch in pixels; default: read from the weights, or 16")


def model_options(args) -> tuple:
    """Return the first four arguments of `open_model` from parsed options."""
    return args.pretrained_weights, args.arch, args.patch_size, args.checkpoint_key


def add_data_arguments(parser, layout="folder with train/CLASS and val/CLASS, or folder of CIFAR-10") -> Callable:
    """Add the options of a data set. `layout` is the help of --data_path.

    Returns:
        the argument group's `add_argument`
    """
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="folder", help="source of images; digits and photographs need no path")
    add("--data_path", help=layout)
    add("--classes", help="file with the class folders to use, one per line; imagenet100 has its own list")
    add("--download", action="store_true", help="download CIFAR-10 if it is missing")
    add("--crop_size", type=number(int, 1), help="side of the images in pixels; default: the pretraining's, or 224")
    return add


def add_computation_arguments(parser, batch_size=None, json_result=True) -> None:
    """Add the options of computation and output.

    Args:
        batch_size: default of --batch_size_per_gpu; None omits the option.
        json_result: add --output_dir.
    """
    add = parser.add_argument_group("computation and output" if json_result else "computation").add_argument
    if json_result:
        add("--output_dir", help="folder of the JSON result; default: the folder of the weights")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of all random numbers")
    if batch_size:
        add("--batch_size_per_gpu", type=number(int, 1), default=batch_size, help="images per process and step")
    add("--num_workers", type=number(int, 0), default=2, help="data-loading workers per process")
    add("--dist_url", default="env://", help="URL to set up distributed computation")
    add("--local_rank", "--local-rank", type=int, help="ignored; the rank is read from the environment")


def open_model(pretrained_weights, arch, patch_size, checkpoint_key, seed, img_size=None) -> tuple:
    """Load a backbone with `vision_transformer.load_backbone` and choose the size of its images.

    Args:
        seed: seed of random weights, which equal the initial weights of `main_lgssl.py --seed` on all processes.
        img_size: side of the images in pixels. None: the size of the pretraining's global crops, or 224.

    Returns:
        (backbone, made_with, img_size), where `made_with` describes the pretraining as recorded in the file

    Raises:
        UserError: as `load_backbone`, or the images are smaller than a patch.
    """
    torch.manual_seed(seed)
    backbone, made_with = load_backbone(pretrained_weights, arch, patch_size, checkpoint_key, img_size or 224)
    img_size = img_size or made_with.get("global_crops_size", 224)
    check_image_side(img_size, backbone)
    return backbone, made_with, img_size


def check_image_side(side, backbone) -> None:
    """Raise UserError if images of this side in pixels are smaller than a patch."""
    patch_size = backbone.patch_embed.patch_size[0]
    if side < patch_size:
        raise UserError(f"images of side {side} are smaller than a patch of {patch_size} pixels: give a larger side")


def open_splits(dataset, data_path, transforms, classes=None, download=False) -> dict:
    """Open the training and validation images of a data set and check that they belong together.

    Args:
        transforms: {"train": transform, "val": transform}.

    Returns:
        {"train": data set, "val": data set}

    Raises:
        UserError: a split is missing, a split has no labels, or the splits have different classes.
    """
    splits = {s: build_dataset(dataset, data_path, s, transforms[s], classes, download) for s in ("train", "val")}
    if getattr(splits["train"], "paths", None) == getattr(splits["val"], "paths", ()):
        expected = f"expected {data_path}/train/CLASS/IMAGE and .../val/..."
        raise UserError(f"{data_path} has no subfolders train and val, {expected}")
    check_splits(splits, data_path)
    return splits


def check_splits(splits, data_path) -> None:
    """Check the labels and classes of a data set's splits, and make them ignore EXIF orientation as DINO does.

    Args:
        splits: {split: data set}.

    Raises:
        UserError: a split has no labels, or the splits have different classes.
    """
    for split, images in splits.items():
        images.upright = False  # DINO's evaluations ignore the EXIF orientation
        if min(images.labels) < 0:
            expected = f"expected {data_path}/{split}/CLASS/IMAGE"
            raise UserError(f"the {split} images of {data_path} have no labels, {expected}")
    train, *others = (images.classes for images in splits.values())
    for other in others:
        if other != train:
            name = min(set(train) ^ set(other))
            raise UserError(f"class {name} is in only one of {data_path}/train and {data_path}/val, expected in both")


def features_of_all(network, datasets, device, batch_size, num_workers, dtype=torch.float32) -> dict:
    """Extract the features of several data sets with all processes, then leave the process group.

    Only rank 0 has the features and continues alone.

    Args:
        network: images [B, 3, H, W] -> features [B, D].
        datasets: {name: data set of (normalized image, label)}.
        batch_size, num_workers, dtype: as in `extract_features`.

    Returns:
        {name: features [n, D] on the CPU}; on other ranks than 0 {name: None}
    """
    features = {}
    for name, images in datasets.items():
        features[name] = extract_features(network, images, device, batch_size, num_workers, f"{name} features", dtype)
    if dist.is_initialized():
        dist.destroy_process_group()
    return features


def knn_accuracy(train_features, train_labels, test_features, test_labels, k, temperature=0.07) -> tuple[float, float]:
    """Classify test features by a weighted vote of their k most similar training features (paper, section 4.2).

    Each neighbour votes for its class with exp(similarity / temperature). The similarity is the dot product:
    L2-normalize the features first to get the cosine. Top-1 counts a hit if the true class ranks first by votes, top-5
    if it ranks among the first min(5, k). A class without votes is never a hit, even if fewer than five classes have
    votes. DINO sorts 1,000 columns of votes, of which a data set with fewer classes leaves some unused: a class without
    votes ties at 0 with the unused columns and is almost never counted as a hit.

    Test features are processed in chunks of at most 2^26 similarities (256 MiB). ImageNet-1K with ViT-B needs 3.9 GB
    for the 1.28 M training features of 768 numbers, 0.15 GB for the test features, and up to 1 GB of scratch memory.
    With several processes, rank 0 holds its own share twice while the features are gathered.

    Args:
        train_features: [n, D].
        train_labels: LongTensor [n], classes from 0.
        test_features: [m, D].
        test_labels: LongTensor [m].
        k: number of neighbours, at most n.
        temperature: divides the similarities.

    Returns:
        (top1, top5) in percent. With k below 5, top-5 counts the first k classes.

    Raises:
        ValueError: k is not in [1, n].
    """
    if not 1 <= k <= len(train_features):
        raise ValueError(f"k is {k}, expected 1 to {len(train_features)}, the number of training features")
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    chunk = max(1, 2**26 // max(len(train_features), k * num_classes))
    correct = torch.zeros(2, dtype=torch.long, device=test_features.device)
    for features, labels in zip(test_features.split(chunk), test_labels.split(chunk), strict=True):
        similarity, neighbours = (features @ train_features.T).topk(k)  # [chunk, k], most similar first
        votes = similarity.new_zeros(len(features), num_classes)
        votes.scatter_add_(1, train_labels[neighbours], (similarity / temperature).exp())
        votes, ranking = votes.sort(dim=1, descending=True, stable=True)
        hits = (ranking == labels[:, None]) & (votes > 0)
        correct += torch.stack([hits[:, :1].sum(), hits[:, : min(5, k)].sum()])
    return tuple((100 * correct.double() / len(test_features)).tolist())


def average_precision(ranks, count) -> float:
    """Return the average precision of one query as in the Holidays and Copydays package.

    This is the area under the precision-recall curve, computed with trapezoids.

    Args:
        ranks: ascending ranks, from 0, of the relevant images that were found.
        count: number of relevant images, found or not.
    """
    total = 0.0
    for found, rank in enumerate(ranks):
        before = 1.0 if rank == 0 else found / rank
        total += (before + (found + 1) / (rank + 1)) / (2 * count)
    return total


def result_file(output_dir, pretrained_weights, name) -> Path | None:
    """Return the path of a result: NAME.json in `output_dir`, by default in the folder of the weights.

    Random weights without `output_dir` have no result file: None.

    Raises:
        UserError: the folder cannot be written to.
    """
    if output_dir is None and pretrained_weights == "none":
        return None
    folder = Path(pretrained_weights).parent if output_dir is None else Path(output_dir)
    make_folder(folder, "--output_dir")
    return folder / f"{name}.json"


def write_result(path, result, made_with, args) -> None:
    """Write a result as JSON, with the settings of evaluation and pretraining.

    Args:
        path: return value of `result_file`; None writes nothing.
        result: dictionary.
        made_with: return value of `open_model`.
        args: namespace of the evaluation's arguments.
    """
    if path is None:
        return
    contents = {**result, "pretraining": made_with, "args": vars(args)}
    write_text(json.dumps(contents, indent=2, default=str) + "\n", path)
    print(f"written to {path}", flush=True)


def weights_hash(network, splits) -> str:
    """Return a SHA-256 hash of a network's weights and of the classes and labels of {split: data set}."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    for split, images in splits.items():
        digest.update(repr((split, images.classes, images.labels)).encode())
    return digest.hexdigest()
