"""Shared parts of the evaluations: options, opening of model and images, k-NN, average precision, JSON results."""

import argparse
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import Dataset

from support.arguments import ArgumentParser, bool_flag, number, with_class_list
from support.features import Network, RawPixels, eval_transform, extract_features, whole_transform
from support.files import make_folder, read_json, write_text
from support.images import ImageList, LabeledImages
from support.resources import set_threads
from support.sources import DataSpec, add_source_arguments, build_dataset, data_spec
from support.weights import load_backbone, load_file
from utils import UserError, is_first_process, printable, warn
from vision_transformer import ARCHITECTURES, MAX_SIDE, VisionTransformer, architecture

PIXELS = "; pixels: no network, but the pixels minus the mean training image"  # see `open_classification`
# Arguments that do not change a result, or that `hashes_of` covers; and crop_size, whose resolved value is compared
NO_SETTINGS = "pretrained_weights checkpoint_key arch patch_size download output_dir batch_size_per_gpu".split()
NO_SETTINGS += "num_workers use_cuda val_freq evaluate dist_url local_rank crop_size figure".split()
NETWORK = ("checkpoint_key", "pretrained_weights")  # arguments that name it
METRICS = {"top1": "top-1", "top5": "top-5", "balanced_accuracy": "balanced accuracy", "auroc": "AUROC"}


@dataclass(frozen=True)
class ModelSpec:
    """Names a network: the options of `add_model_arguments`, and the seed of random weights."""

    pretrained_weights: str
    arch: str | None = None
    patch_size: int | None = None
    checkpoint_key: str = "teacher"
    seed: int = 0


class OpenedModel(NamedTuple):
    """A network, its pretraining as recorded in the file, and the side of its images in pixels."""

    backbone: VisionTransformer
    made_with: dict[str, Any]
    img_size: int


def model_parser(doc: str, other_weights: str = "") -> ArgumentParser:
    """Return a parser with the options of a model. The first line of `doc` describes the command."""
    parser = ArgumentParser(description=doc.splitlines()[0], epilog="@FILE reads options from a file.")
    add_model_arguments(parser, other_weights=other_weights)
    return parser


def add_model_arguments(parser: argparse.ArgumentParser, required: bool = True, other_weights: str = "") -> None:
    """Add the options of `ModelSpec`.

    Args:
        required: make --pretrained_weights mandatory.
        other_weights: further values of --pretrained_weights, for its help.
    """
    add = parser.add_argument_group("model").add_argument
    weights = f"checkpoint, or timm's .safetensors; none: random weights{other_weights}"
    add("--pretrained_weights", required=required, help=weights)
    add("--checkpoint_key", default="teacher", help="network to load from the checkpoint, teacher or student")
    add("--arch", type=architecture, help=f"{', '.join(ARCHITECTURES)}; default: read from the weights, or vit_small")
    add("--patch_size", type=number(int, 1), help="side of a patch in pixels; default: read from the weights, or 16")


def model_spec(args: argparse.Namespace) -> ModelSpec:
    """Return the network that parsed options name."""
    return ModelSpec(**{field.name: getattr(args, field.name) for field in fields(ModelSpec) if field.name in args})


def add_data_arguments(parser: argparse.ArgumentParser) -> Callable:
    """Add the options of a data set. Return the group's `add_argument`."""
    add = parser.add_argument_group("data").add_argument
    layout = "folder with train/CLASS and val/CLASS or with lists, train.txt and val.txt; or torchvision's root"
    add_source_arguments(add, layout)
    text = "side of the images in pixels; default: the pretraining's, or 224"
    add("--crop_size", type=number(int, 1, MAX_SIDE), help=text)
    return add


def add_use_cuda(add: Callable) -> None:
    """Add DINO's option --use_cuda to an argument group, given the group's `add_argument`."""
    # The default is None, not True: reproduce.py compares it with earlier results, which lack the option.
    add("--use_cuda", type=bool_flag, help="compare features on the GPU if available; default: true")


def add_computation_arguments(parser: ArgumentParser, batch_size: int = 0, json_result: bool = True) -> None:
    """Add the options of computation and output.

    Args:
        batch_size: default of --batch_size_per_gpu; 0 omits the option.
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


def open_model(spec: ModelSpec, img_size: int | None = None) -> OpenedModel:
    """Load a backbone with `support.weights.load_backbone` and choose the size of its images.

    Random weights equal the initial weights of `main_lgssl.py --seed` on all processes.

    Args:
        img_size: side of the images in pixels. None: the size of the pretraining's global crops, or that for which the
            position embedding was made; 224 for random weights.

    Raises:
        UserError: as `load_backbone`, or the images are smaller than a patch.
    """
    torch.manual_seed(spec.seed)
    path, arch, patch_size = spec.pretrained_weights, spec.arch, spec.patch_size
    backbone, made_with = load_backbone(path, arch, patch_size, spec.checkpoint_key, img_size or 224)
    img_size = img_size or made_with.get("global_crops_size", backbone.patch_embed.img_size[0])
    check_image_side(img_size, backbone)
    return OpenedModel(backbone, made_with, img_size)


def check_image_side(side: int, backbone: VisionTransformer) -> None:
    """Raise UserError if images of this side in pixels are smaller than a patch."""
    patch_size = backbone.patch_embed.patch_size[0]
    if side < patch_size:
        raise UserError(f"images of side {side} are smaller than a patch of {patch_size} pixels: give a larger side")


def open_classification(
    args: argparse.Namespace, augmented: bool = False
) -> tuple[VisionTransformer | RawPixels, dict[str, Any], int, dict[str, LabeledImages]]:
    """Open the network and the images of a classification from parsed options.

    --pretrained_weights pixels opens RawPixels, which subtract the mean of the training images, on images that are not
    cropped.

    Args:
        augmented: the caller augments the training images, which therefore have no transform.

    Returns:
        (backbone, made_with, img_size, {"train": images, "val": images}); the first three as in `OpenedModel`

    Raises:
        UserError: see `open_model` and `open_splits`.
    """
    network: VisionTransformer | RawPixels
    if args.pretrained_weights == "pixels":
        img_size, made_with = args.crop_size or 64, dict[str, Any]()
        transform = whole_transform(img_size)
    else:
        network, made_with, img_size = open_model(model_spec(args), args.crop_size)
        transform = eval_transform(img_size)
    splits = open_splits(data_spec(args, made_with), {"train": transform, "val": transform})
    train = splits["train"]
    if args.pretrained_weights == "pixels":
        network = RawPixels(sum(train[i][0] for i in range(len(train))) / len(train))
    if augmented:
        train.transform = None
    return network, made_with, img_size, splits


def open_splits(spec: DataSpec, transforms: dict[str, Callable | None]) -> dict[str, LabeledImages]:
    """Open the training and validation images of a data set and check that they belong together.

    Args:
        transforms: {"train": transform, "val": transform}.

    Raises:
        UserError: see `build_dataset` and `check_splits`.
    """
    splits = {split: build_dataset(spec, split, transform) for split, transform in transforms.items()}
    check_splits(splits, spec.data_path or spec.dataset)
    return splits


def check_splits(splits: dict[str, LabeledImages], data_path: str | Path) -> None:
    """Check the labels and classes of a data set's splits, and make them ignore EXIF orientation as DINO does.

    Args:
        splits: {split: data set}, with "train" and possibly "val".
        data_path: name of the data set, for messages.

    Raises:
        UserError: the splits are the same images, an image has no label, there are fewer than two classes, or the
            splits have different classes.
    """
    train, val = splits["train"], splits.get("val")
    layout = f"expected {train.layout.replace('{0}', str(data_path))}"
    if isinstance(train, ImageList) and isinstance(val, ImageList):
        first, twin = train.paths[0], str(val.root) + train.paths[0].removeprefix(str(train.root))
        if twin in val.paths and os.path.realpath(first) == os.path.realpath(twin):
            found = f"{data_path} has no {train.splits}, or they hold the same files"
            raise UserError(f"{found}: {layout}; or give --tuning, which holds a fifth of the training images out")
    for split, images in splits.items():
        if unlabeled := images.labels.count(-1):
            raise UserError(f"{unlabeled} of the {len(images)} {split} images of {data_path} have no labels, {layout}")
    if val is not None and train.classes != val.classes:
        only = {"train": sorted({*train.classes} - {*val.classes}), "val": sorted({*val.classes} - {*train.classes})}
        parts = [f"{len(names)} only in {split} ({', '.join(names[:5])})" for split, names in only.items() if names]
        similar = {"".join(name.split()).casefold(): name for name in only["train"]}
        for name in only["val"]:
            if twin := similar.get("".join(name.split()).casefold()):
                parts.append(f"{name!r} in val differs from {twin!r} in train only in spaces or case")
                break
        raise UserError(f"the classes of {data_path} differ, {' and '.join(parts)}: {layout}")
    if len(set(train.labels)) < 2:
        one = train.classes[train.labels[0]]
        raise UserError(f"the train images of {data_path} have only one class, {one}: expected at least two; {layout}")
    for images in splits.values():
        if isinstance(images, ImageList):
            images.ignore_orientation()


def features_of_all(
    network: Network, datasets: Mapping[str, Dataset], device: torch.device, batch_size: int, num_workers: int
) -> dict[str, Tensor]:
    """Extract the features of several data sets with all processes, see `extract_features` and `set_threads`.

    Args:
        datasets: {name: data set of (normalized image, label)}.

    Returns:
        {name: features [n, D] on the CPU}; on other ranks than 0 {}
    """
    set_threads(num_workers)
    features = {
        name: extract_features(network, images, device, batch_size, num_workers, f"{name} features")
        for name, images in datasets.items()
    }
    return {name: x for name, x in features.items() if x is not None}


def leave_process_group() -> None:
    """Leave the process group: rank 0 goes on alone, for longer than the others would wait for it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def knn_votes(
    train: Tensor, train_labels: Tensor, test: Tensor, num_classes: int, k: int, temperature: float = 0.07
) -> Tensor:
    """Classify test features by a weighted vote of their k most similar training features (paper, section 4.2).

    Each neighbour votes for its class with exp(similarity / temperature). The similarity is the dot product:
    L2-normalize the features first to get the cosine.

    Test features are processed in chunks of at most 2^26 similarities (256 MiB). ImageNet-1K with ViT-B needs 3.9 GB
    for the 1.28 M training features of 768 numbers, 0.15 GB for the test features, 0.2 GB for the votes and up to 1 GB
    of scratch memory. With several processes, rank 0 holds its own share twice while the features are gathered.

    Args:
        train: features [n, D].
        train_labels: LongTensor [n], classes from 0.
        test: features [m, D].
        num_classes: number of classes.
        k: number of neighbours, at most n.
        temperature: divides the similarities.

    Returns:
        [m, num_classes], the classes' shares of the votes
    """
    votes = test.new_zeros(len(test), num_classes)
    chunk = max(1, 2**26 // len(train))
    for features, votes_of_chunk in zip(test.split(chunk), votes.split(chunk), strict=True):
        similarity, neighbours = (features @ train.T).topk(k)  # [chunk, k]
        votes_of_chunk.scatter_add_(1, train_labels[neighbours], (similarity / temperature).softmax(1))
    return votes


def top_hits(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether the class of an image has the highest score, and whether it has one of the five highest.

    The first class wins a tie. A class with score 0 is never a hit: DINO's k-NN sorts 1,000 columns of votes, of which
    a data set with fewer classes leaves some unused; a class without votes ties at 0 with them and is almost never
    counted as a hit.

    Args:
        scores: [m, C], at least 0: shares of votes or probabilities.
        labels: LongTensor [m].

    Returns:
        (top1, top5), bool [m] each
    """
    own = scores.gather(1, labels[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    rank = ((scores > own) | ((scores == own) & earlier)).sum(1)
    return (rank < 1) & (own[:, 0] > 0), (rank < 5) & (own[:, 0] > 0)


def classification_metrics(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the metrics of a classification in percent; for the arguments see `top_hits`.

    Returns:
        top1, top5: share of the images that are hits; top5 only for more than five classes.
        balanced_accuracy: mean over the classes of top1 among the images of a class.
        auroc: area under the ROC curve of the score of class 1. Only for two classes that both occur, and finite
            scores.
    """
    top1, top5 = (hits.double() for hits in top_hits(scores, labels))
    metrics = {"top1": 100 * top1.mean().item()}
    if scores.shape[1] > 5:
        metrics["top5"] = 100 * top5.mean().item()
    recalls = torch.stack([top1[labels == label].mean() for label in labels.unique()]).tolist()
    metrics["balanced_accuracy"] = 100 * (sum(recalls) / len(recalls))
    if scores.shape[1] == 2 and 0 < labels.sum() < len(labels) and scores.isfinite().all():
        metrics["auroc"] = 100 * float(roc_auc_score(labels.cpu().numpy(), scores[:, 1].cpu().numpy()))
    return metrics


def describe(metrics: dict[str, float]) -> str:
    """Return the metrics of `classification_metrics` as text."""
    return ", ".join(f"{METRICS[name]} {value:.2f} %" for name, value in metrics.items())


def average_precision(ranks: Sequence[int], count: int) -> float:
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


class Result:
    """The JSON result of an evaluation, in a file of its own.

    The file is NAME.json in --output_dir, by default in the folder of the weights. If NAME.json holds a result of other
    weights, images or settings, a suffix says what differs, as in `knn_folder_epoch20.json`. There is no file for
    random weights, raw pixels and timm's names without --output_dir, nor in a folder that cannot be written to.

    Args:
        name: of the file, such as knn_folder.
        args: arguments of the evaluation.
        network: on the CPU.
        made_with: see `OpenedModel`.
        splits: {split: labeled images}, empty for other images.
        facts: what the file holds besides, such as the numbers of images.

    Attributes:
        first: NAME.json, or None without a file.
        path: the file.
        contents: of the file, without the numbers that `publish` adds.

    Raises:
        UserError: --output_dir cannot be written to.
    """

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        network: nn.Module,
        made_with: dict[str, Any],
        splits: Mapping[str, LabeledImages] | None = None,
        **facts: Any,
    ) -> None:
        self.contents = {**facts, **hashes_of(network, splits or {}), "pretraining": made_with, "args": vars(args)}
        self.path = self.first = None
        folder = Path(args.pretrained_weights).parent
        if args.output_dir is not None:
            folder = Path(args.output_dir)
            make_folder(folder, "--output_dir")
        elif args.pretrained_weights in ("none", "pixels") or args.pretrained_weights.startswith("timm:"):
            return
        elif not os.access(folder, os.W_OK):
            if is_first_process():
                warn(f"cannot write to {printable(folder)}: the result is only printed; --output_dir keeps it")
            return
        self.first = folder / f"{re.sub('[:/]', '_', name)}.json"
        self.path = self.choose_path(self.first)

    def choose_path(self, first: Path) -> Path:
        """Return the first file that holds no other result: NAME.json, NAME_SUFFIX.json, NAME_SUFFIX_2.json, ..."""
        path, number = first, 1
        suffix = "".join(f"_{word}" for word in differences(earlier_result(first), self.contents))[:100]
        while differences(earlier_result(path), self.contents):
            path = first.with_stem(first.stem + suffix + (f"_{number}" if number > 1 else ""))
            number += 1
        return path

    def publish(self, lines: Sequence[str], **numbers: Any) -> None:
        """Write the file, then print lines.

        Raises:
            UserError: the file cannot be written. The lines are printed before.
        """
        try:
            if self.first is not None:
                self.path = self.choose_path(self.first)  # another evaluation may have ended since
                write_text(json.dumps({**numbers, **self.contents}, indent=2, default=str) + "\n", self.path)
                lines = [*lines, f"written to {printable(self.path)}"]
        finally:
            print("\n".join(lines), flush=True)


def hashes_of(network: nn.Module, splits: Mapping[str, LabeledImages]) -> dict[str, str]:
    """Return SHA-256 hashes of a network and of an evaluation.

    Args:
        splits: {split: labeled images}.

    Returns:
        "network": hash of the weights; "fingerprint": hash of the weights and of the classes and labels
    """
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    of_network = digest.hexdigest()
    for split, images in splits.items():
        digest.update(repr((split, images.classes, images.labels)).encode())
    return {"network": of_network, "fingerprint": digest.hexdigest()}


def earlier_result(path: Path) -> dict[str, Any]:
    """Return the contents of a result's file, or of a linear classifier that is still being trained; {} for no file."""
    contents: dict[str, Any] = {}
    if path.exists():
        try:
            contents = read_json(path)
        except UserError:  # a damaged file, which is not overwritten
            if not path.is_file():
                raise
            contents = {"network": "unknown"}
    elif path.with_suffix(".pth").exists():
        contents = load_file(path.with_suffix(".pth"))
    parts = [contents.get(name, {}) for name in ("args", "pretraining", "protocol", "images")]
    if not all(isinstance(part, dict) for part in parts):
        return {"network": "unknown"}
    return contents | {name: with_class_list(contents[name]) for name in {"args", "pretraining"} & set(contents)}


def differences(earlier: dict[str, Any], contents: dict[str, Any]) -> list[str]:
    """Return how an evaluation differs from an earlier one, as words for the name of its file.

    Args:
        earlier: contents of the earlier file, {} without one. What it lacks, from an older version, does not differ.
        contents: contents of the file to write.
    """
    if not earlier:
        return []

    def differs(name: str) -> bool:
        return earlier.get(name, contents[name]) != contents[name]

    words, there, here = [], comparable(earlier), comparable(contents)
    keys, stems = ([x.get("args", {}).get(name) for x in (earlier, contents)] for name in NETWORK)
    epochs = [x.get("pretraining", {}).get("epoch") for x in (earlier, contents)]
    named = [(keys, "{}"), (epochs, "epoch{}"), ([Path(str(stem)).stem for stem in stems], "{}")]
    other = [form.format(new) for (old, new), form in named if old != new]
    if differs("network") or (other and not {"network", "fingerprint"} & set(earlier)):
        words = other[:1] or [contents["network"][:8]]
    for name, value in here.items():
        if name in there and there[name] != value:
            text = {"True": name, "False": f"no_{name}"}.get(value, f"{name}-{os.path.basename(value).strip('[]')}")
            words.append(re.sub(r"[^\w.-]+", "-", text))
    if not words and (differs("fingerprint") or differs("images")):
        words = [f"{sum(contents['images'].values())}_images_{contents['fingerprint'][:8]}"]
    return words


def comparable(contents: dict[str, Any]) -> dict[str, str]:
    """Return the settings of a result as texts. Paths are absolute."""
    settings = {**contents.get("args", {}), **contents.get("protocol", {})}
    settings = {name: value for name, value in settings.items() if name not in NO_SETTINGS}
    settings |= {name: contents[name] for name in ("crop_size", "batch_size") if name in contents}
    return {
        name: os.path.realpath(value) if value and (name.endswith("_path") or name == "classes") else str(value)
        for name, value in settings.items()
    }
