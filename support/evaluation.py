"""Shared parts of the evaluations: options, opening of model and images, k-NN, average precision, JSON results."""

import copy
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from support.arguments import ArgumentParser, number
from support.features import RawPixels, eval_transform, extract_features, whole_transform
from support.files import make_folder, write_text
from support.sources import DataSpec, add_source_arguments, build_dataset, data_spec
from support.weights import load_backbone
from utils import UserError
from vision_transformer import ARCHITECTURES, MAX_SIDE, architecture


def model_parser(doc, other_weights="") -> ArgumentParser:
    """Return a parser with the options of a model. The first line of `doc` describes the command."""
    parser = ArgumentParser(description=doc.splitlines()[0], epilog="@FILE reads options from a file.")
    add_model_arguments(parser, other_weights=other_weights)
    return parser


def add_model_arguments(parser, required=True, other_weights="") -> None:
    """Add the options of `open_model`.

    Args:
        required: make --pretrained_weights mandatory.
        other_weights: further values of --pretrained_weights, for its help.
    """
    add = parser.add_argument_group("model").add_argument
    text = f"checkpoint, or timm's .safetensors; none: random weights{other_weights}"
    add("--pretrained_weights", required=required, help=text)
    add("--checkpoint_key", default="teacher", help="network to load from the checkpoint, teacher or student")
    add("--arch", type=architecture, help=f"{', '.join(ARCHITECTURES)}; default: read from the weights, or vit_small")
    add("--patch_size", type=number(int, 1), help="side of a patch in pixels; default: read from the weights, or 16")


def model_options(args) -> tuple:
    """Return the first four arguments of `open_model` from parsed options."""
    return args.pretrained_weights, args.arch, args.patch_size, args.checkpoint_key


def add_data_arguments(
    parser, layout="folder with train/CLASS and val/CLASS, or of a torchvision data set"
) -> Callable:
    """Add the options of a data set. `layout` is the help of --data_path.

    Returns:
        the argument group's `add_argument`
    """
    add = parser.add_argument_group("data").add_argument
    add_source_arguments(add, layout)
    add(
        "--crop_size",
        type=number(int, 1, MAX_SIDE),
        help="side of the images in pixels; default: the pretraining's, or 224",
    )
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
    add("--num_workers", type=number(int, 0, 1000), default=2, help="data-loading workers per process")
    add("--dist_url", default="env://", help="URL to set up distributed computation")
    add("--local_rank", "--local-rank", type=int, help="ignored; the rank is read from the environment")


def open_model(pretrained_weights, arch, patch_size, checkpoint_key, seed, img_size=None) -> tuple:
    """Load a backbone with `support.weights.load_backbone` and choose the size of its images.

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


PIXELS = "; pixels: no network, but the pixels minus the mean training image"  # see `open_classification`


def open_classification(args, augmented=False) -> tuple:
    """Open the network and the images of a classification from parsed options.

    --pretrained_weights pixels opens RawPixels, which subtract the mean of the training images, on images that are not
    cropped.

    Args:
        augmented: the caller augments the training images, which therefore have no transform.

    Returns:
        (backbone, made_with, img_size, {"train": data set, "val": data set}), see `open_model` and `open_splits`
    """
    pixels = args.pretrained_weights == "pixels"
    if pixels:
        backbone, made_with, img_size = None, {}, args.crop_size or 64
    else:
        backbone, made_with, img_size = open_model(*model_options(args), args.seed, args.crop_size)
    plain = whole_transform(img_size) if pixels else eval_transform(img_size)
    splits = open_splits(data_spec(args, made_with), {"train": None if augmented else plain, "val": plain})
    if pixels:
        train = copy.copy(splits["train"])
        train.transform = plain
        backbone = RawPixels(sum(train[i][0] for i in range(len(train))) / len(train))
    return backbone, made_with, img_size, splits


def open_splits(spec: DataSpec, transforms) -> dict:
    """Open the training and validation images of a data set and check that they belong together.

    Args:
        spec: names the images.
        transforms: {"train": transform, "val": transform}.

    Returns:
        {"train": data set, "val": data set}

    Raises:
        UserError: see `check_splits`.
    """
    splits = {s: build_dataset(spec, s, transforms[s]) for s in ("train", "val")}
    check_splits(splits, spec.data_path or spec.dataset)
    return splits


def check_splits(splits, data_path) -> None:
    """Check the labels and classes of a data set's splits, and make them ignore EXIF orientation as DINO does.

    Args:
        splits: {split: data set}.
        data_path: name of the data set, for messages.

    Raises:
        UserError: the splits are the same images, an image has no label, there are fewer than two classes, or the
            splits have different classes.
    """
    train, val = splits["train"], splits.get("val")
    layout = f"expected {train.layout.format(data_path)}"
    if val is not None and hasattr(train, "paths"):
        twin = str(val.root) + train.paths[0].removeprefix(str(train.root))
        is_file = os.path.exists(twin)  # and not a part of one
        if twin in val.paths and (os.path.samefile(train.paths[0], twin) if is_file else twin == train.paths[0]):
            raise UserError(f"{data_path} has no {train.splits}, or they hold the same files: {layout}")
    for split, images in splits.items():
        images.upright = False  # DINO's evaluations ignore the EXIF orientation
        unlabeled = images.labels.count(-1)
        if unlabeled:
            which = "the" if unlabeled == len(images) else f"{unlabeled} of the {len(images)}"
            raise UserError(f"{which} {split} images of {data_path} have no labels, {layout}")
    if val is not None and train.classes != val.classes:
        only = {"train": sorted({*train.classes} - {*val.classes}), "val": sorted({*val.classes} - {*train.classes})}
        found = [f"{len(x)} only in {s} ({', '.join(x[:5])}{', ...' * (len(x) > 5)})" for s, x in only.items() if x]
        raise UserError(f"the classes of {data_path} differ, {' and '.join(found)}: {layout}")
    found = sorted(set(train.labels))
    if len(found) < 2:
        name = train.classes[found[0]]
        raise UserError(f"the train images of {data_path} have only one class, {name}: expected at least two; {layout}")


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


def knn_votes(train_features, train_labels, test_features, num_classes, k, temperature=0.07) -> torch.Tensor:
    """Classify test features by a weighted vote of their k most similar training features (paper, section 4.2).

    Each neighbour votes for its class with exp(similarity / temperature). The similarity is the dot product:
    L2-normalize the features first to get the cosine.

    Test features are processed in chunks of at most 2^26 similarities (256 MiB). ImageNet-1K with ViT-B needs 3.9 GB
    for the 1.28 M training features of 768 numbers, 0.15 GB for the test features, 0.2 GB for the votes and up to 1 GB
    of scratch memory. With several processes, rank 0 holds its own share twice while the features are gathered.

    Args:
        train_features: [n, D].
        train_labels: LongTensor [n], classes from 0.
        test_features: [m, D].
        num_classes: number of classes.
        k: number of neighbours, at most n.
        temperature: divides the similarities.

    Returns:
        [m, num_classes], the classes' shares of the votes

    Raises:
        ValueError: k is not in [1, n].
    """
    if not 1 <= k <= len(train_features):
        raise ValueError(f"k is {k}, expected 1 to {len(train_features)}, the number of training features")
    votes = test_features.new_zeros(len(test_features), num_classes)
    chunk = max(1, 2**26 // len(train_features))
    for features, votes_of_chunk in zip(test_features.split(chunk), votes.split(chunk), strict=True):
        similarity, neighbours = (features @ train_features.T).topk(k)  # [chunk, k]
        votes_of_chunk.scatter_add_(1, train_labels[neighbours], (similarity / temperature).softmax(1))
    return votes


def classification_metrics(scores, labels) -> dict[str, float]:
    """Return the metrics of a classification in percent.

    A class with score 0 is never a hit. DINO's k-NN sorts 1,000 columns of votes, of which a data set with fewer
    classes leaves some unused: a class without votes ties at 0 with them and is almost never counted as a hit.

    Args:
        scores: [m, C], at least 0: shares of votes or probabilities.
        labels: LongTensor [m].

    Returns:
        top1: share of the images whose class has the highest score; the first class wins a tie.
        top5: share of the images whose class is among the five highest scores. Only for more than five classes.
        balanced_accuracy: mean over the classes of top1 among the images of a class.
        auroc: area under the ROC curve of the score of class 1. Only for two classes that both occur, and finite
            scores.
    """
    own = scores.gather(1, labels[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    rank = ((scores > own) | ((scores == own) & earlier)).sum(1)
    hits = {"top1": (rank < 1) & (own[:, 0] > 0), "top5": (rank < 5) & (own[:, 0] > 0)}
    metrics = {name: 100 * hit.double().mean().item() for name, hit in hits.items()}
    if scores.shape[1] <= 5:
        del metrics["top5"]
    recalls = [hits["top1"][labels == label].double().mean() for label in labels.unique()]
    metrics["balanced_accuracy"] = 100 * (sum(recalls) / len(recalls)).item()
    if scores.shape[1] == 2 and 0 < labels.sum() < len(labels) and scores.isfinite().all():
        from sklearn.metrics import roc_auc_score  # takes a second, and few data sets have two classes

        metrics["auroc"] = 100 * float(roc_auc_score(labels.cpu().numpy(), scores[:, 1].cpu().numpy()))
    return metrics


METRICS = {"top1": "top-1", "top5": "top-5", "balanced_accuracy": "balanced accuracy", "auroc": "AUROC"}


def describe(metrics) -> str:
    """Return the metrics of `classification_metrics` as text."""
    return ", ".join(f"{METRICS[name]} {value:.2f} %" for name, value in metrics.items())


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

    Random weights, raw pixels and timm's names have no folder: without `output_dir` there is no result file, None.

    Raises:
        UserError: the folder cannot be written to.
    """
    if output_dir is None and (pretrained_weights in ("none", "pixels") or pretrained_weights.startswith("timm:")):
        return None
    folder = Path(pretrained_weights).parent if output_dir is None else Path(output_dir)
    make_folder(folder, "--output_dir")
    return folder / f"{re.sub('[:/]', '_', name)}.json"


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
