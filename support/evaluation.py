"""What the evaluations share: their options, the loading of model and images, average precision, the JSON result."""

import hashlib
import json
from pathlib import Path

import torch

from support.arguments import number
from support.images import DATASETS, build_dataset
from utils import UserError, make_folder, write_text
from vision_transformer import ARCHITECTURES, architecture, load_backbone


def add_model_arguments(parser, required=True):
    add = parser.add_argument_group("model").add_argument
    add(
        "--pretrained_weights",
        required=required,
        help="checkpoint of main_lgssl.py or DINO, or timm's .safetensors; none is a random network",
    )
    add("--checkpoint_key", default="teacher", help="network of the checkpoint, teacher or student")
    add("--arch", type=architecture, help=f"{', '.join(ARCHITECTURES)}; default: the weights', or vit_small")
    add("--patch_size", type=number(int, 1), help="default: the weights', or 16")


def add_data_arguments(parser, layout="folder with train and val, each with class subfolders; or of CIFAR-10"):
    """Add the options of a data set and return the group's add_argument; `layout` says what --data_path is."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="folder", help="see support/images.py")
    add("--data_path", help=layout)
    add("--classes", help="file with the class folders to use, one a line")
    add("--download", action="store_true", help="fetch CIFAR-10 where it is missing")
    add(
        "--crop_size",
        type=number(int, 1),
        help="side of the images that the network sees; default: the pretraining's global crops, or 224",
    )
    return add


def add_computation_arguments(parser, batch_size=None, json_result=True):
    """Add the other options; `batch_size` is None where images are taken one by one."""
    add = parser.add_argument_group("computation and output" if json_result else "computation").add_argument
    if json_result:
        add("--output_dir", help="folder of the JSON result; default: that of the weights")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of all random numbers")
    if batch_size:
        add("--batch_size_per_gpu", type=number(int, 1), default=batch_size, help="images per process and step")
    add("--num_workers", type=number(int, 0), default=2, help="data-loading processes per process")
    add("--dist_url", default="env://", help="where the processes meet")
    add("--local_rank", "--local-rank", type=int, help="ignored; the environment says it")


def open_model(pretrained_weights, arch, patch_size, checkpoint_key, seed, img_size=None):
    """Load a backbone, see `vision_transformer.load_backbone`, and say at which size it was trained.

    Args:
        seed: of a random network, which is the one that `main_lgssl.py --seed` starts from, in all processes.
        img_size: side in pixels of the images; None takes the pretraining's global crops, or 224.

    Returns:
        (backbone, made_with, img_size): `made_with` holds what the file says of its pretraining.

    Raises:
        UserError: as `load_backbone`, or the images are smaller than a patch.
    """
    torch.manual_seed(seed)
    backbone, made_with = load_backbone(pretrained_weights, arch, patch_size, checkpoint_key, img_size or 224)
    img_size = img_size or made_with.get("global_crops_size", 224)
    check_image_side(img_size, backbone)
    return backbone, made_with, img_size


def check_image_side(side, backbone):
    patch_size = backbone.patch_embed.patch_size[0]
    if side < patch_size:
        raise UserError(f"images of side {side} are smaller than a patch of {patch_size} pixels: give a larger side")


def open_splits(dataset, data_path, transforms, classes=None, download=False):
    """Open the training and the validation images of a data set, and check that they belong together.

    Args:
        transforms: {"train": ..., "val": ...}

    Returns:
        {"train": data set, "val": data set}

    Raises:
        UserError: a split is missing or has no labels, or the two have different classes.
    """
    splits = {
        split: build_dataset(dataset, data_path, split, transforms[split], classes, download)
        for split in ("train", "val")
    }
    if getattr(splits["train"], "paths", None) == getattr(splits["val"], "paths", ()):
        raise UserError(
            f"{data_path} has no subfolders train and val, expected {data_path}/train/CLASS/IMAGE and .../val/..."
        )
    check_splits(splits, data_path)
    return splits


def check_splits(splits, data_path):
    """Check that the splits of a data set have labels and the same classes, and read their images as DINO does.

    Args:
        splits: {split: data set}

    Raises:
        UserError: they have not.
    """
    for split, images in splits.items():
        images.upright = False  # DINO's evaluations do not look at the EXIF tag
        if min(images.labels) < 0:
            raise UserError(
                f"the {split} images of {data_path} have no labels, expected {data_path}/{split}/CLASS/IMAGE"
            )
    train, *others = (images.classes for images in splits.values())
    for other in others:
        if other != train:
            difference = sorted(set(train) ^ set(other))[0]
            raise UserError(
                f"class {difference} is in only one of {data_path}/train and {data_path}/val, expected in both"
            )


def knn_accuracy(train_features, train_labels, test_features, test_labels, k, temperature=0.07):
    """Classify test features by a weighted vote of their k most similar training features (paper, section 4.2).

    Each neighbour votes for its class with exp(similarity / temperature). The similarity is the dot product:
    L2-normalise the features first to get the cosine. Top-1 counts a hit if the true class ranks first by votes, top-5
    if it ranks among the first min(5, k). A class without votes is never a hit, even if fewer than five classes have
    votes. DINO sorts 1,000 columns of votes: classes without votes tie at 0 with all columns that the data set does not
    use, in unspecified order, and practically never count.

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
    top1, top5 = (100 * correct.double() / len(test_features)).tolist()
    return top1, top5


def average_precision(ranks, count):
    """Return the average precision of one query as the Holidays and Copydays package computes it.

    The area under the precision-recall curve by trapezoids.

    Args:
        ranks: ascending places of the relevant images in the result, from 0; those that were found.
        count: number of relevant images, found or not.
    """
    total = 0.0
    for found, rank in enumerate(ranks):
        before = 1.0 if rank == 0 else found / rank
        total += (before + (found + 1) / (rank + 1)) / (2 * count)
    return total


def result_file(output_dir, pretrained_weights, name):
    """Return the path of a result, NAME.json in `output_dir` or beside the weights; None for a random network alone.

    Raises:
        UserError: it cannot be written.
    """
    if output_dir is None and pretrained_weights == "none":
        return None
    folder = Path(pretrained_weights).parent if output_dir is None else Path(output_dir)
    make_folder(folder, "--output_dir")
    return folder / f"{name}.json"


def write_result(path, result, made_with, args):
    """Write a result with all settings, the pretraining's as far as they are known; without a path nothing.

    Args:
        path: as `result_file` gives it.
        result: dictionary.
        made_with: as `open_model` gives it.
        args: namespace of the evaluation's arguments.
    """
    if path is None:
        return
    contents = {**result, "pretraining": made_with, "args": vars(args)}
    write_text(json.dumps(contents, indent=2, default=str) + "\n", path)
    print(f"written to {path}", flush=True)


def weights_hash(network, splits):
    """Return a hash of a network's weights, and of the classes and labels of the data sets in `splits`."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    for split, images in splits.items():
        digest.update(repr((split, images.classes, images.labels)).encode())
    return digest.hexdigest()
