"""Weighted k-nearest-neighbour classification on frozen features (paper, section 4.2; DINO's protocol).

    python eval_knn.py --data_path FOLDER_WITH_train_AND_val --pretrained_weights OUT/checkpoint.pth

Runs in one process or under torchrun, on GPUs or CPUs, and writes a JSON result beside the checkpoint.
"""

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import utils
from datasets import DATASETS, build_dataset
from features import eval_transform, extract_features
from utils import UserError, number
from vision_transformer import ARCHITECTURES, architecture, load_backbone


def knn_accuracy(train_features, train_labels, test_features, test_labels, k, temperature=0.07):
    """Classify test features by their k most similar training features, each voting with exp(similarity / temperature).

    Similarity is the dot product: L2-normalise the features first for the cosine. Test features are taken in chunks, so
    that no more than 2^26 similarities (256 MiB) are held at a time.

    Args:
        train_features: [n, D].
        train_labels: LongTensor [n], from 0.
        test_features: [m, D].
        test_labels: LongTensor [m].
        k: number of neighbours, at most n.

    Returns:
        (top1, top5) in per cent. With k below 5 top-5 counts the first k guesses.

    Raises:
        ValueError: k is not in [1, n].
    """
    if not 1 <= k <= len(train_features):
        raise ValueError(f"k is {k}, expected 1 to {len(train_features)}, the number of training features")
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    chunk = max(1, 2**26 // max(len(train_features), k * num_classes))
    correct = torch.zeros(2, dtype=torch.long, device=test_features.device)
    for features, labels in zip(test_features.split(chunk), test_labels.split(chunk), strict=True):
        similarity, neighbours = (features @ train_features.T).topk(k)  # [chunk, k], the most similar first
        votes = similarity.new_zeros(len(features), num_classes)
        votes.scatter_add_(1, train_labels[neighbours], (similarity / temperature).exp())
        hits = votes.argsort(1, descending=True) == labels[:, None]
        correct += torch.stack([hits[:, :1].sum(), hits[:, : min(5, k)].sum()])
    top1, top5 = (100 * correct.double() / len(test_features)).tolist()
    return top1, top5


def parse_arguments(argv=None):
    parser = utils.ArgumentParser(description=__doc__.splitlines()[0], epilog="@FILE reads options from a file.")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--pretrained_weights",
        required=True,
        help="checkpoint of main_lgssl.py or DINO, or timm's .safetensors; none is a random network",
    )
    group.add_argument("--checkpoint_key", default="teacher", help="network of the checkpoint, teacher or student")
    group.add_argument(
        "--arch", type=architecture, help=f"{', '.join(ARCHITECTURES)}; default: the checkpoint's, or vit_small"
    )
    group.add_argument("--patch_size", type=number(int, 1), help="default: the checkpoint's, or 16")

    group = parser.add_argument_group("protocol")
    group.add_argument("--nb_knn", type=number(int, 1), nargs="+", default=[10, 20], help="numbers of neighbours")
    group.add_argument("--temperature", type=number(float, 1e-6), default=0.07, help="of the votes")
    group.add_argument(
        "--crop_size",
        type=number(int, 1),
        help="side of the images that the network sees; default: the pretraining's global crops, or 224",
    )

    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=DATASETS, default="folder", help="see datasets.py")
    group.add_argument("--data_path", help="folder with train and val, each with class subfolders; or of CIFAR-10")
    group.add_argument("--classes", help="file with the class folders to use, one a line")
    group.add_argument("--download", action="store_true", help="fetch CIFAR-10 where it is missing")
    group.add_argument("--output", help="file of the JSON result; default: knn_DATASET.json beside the weights")

    group = parser.add_argument_group("computation")
    group.add_argument("--batch_size_per_gpu", type=number(int, 1), default=128, help="images per process and step")
    group.add_argument("--num_workers", type=number(int, 0), default=2, help="data-loading processes per process")
    group.add_argument("--dist_url", default="env://", help="where the processes meet")
    group.add_argument("--local_rank", "--local-rank", type=int, help="ignored; the environment says it")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    torch.manual_seed(0)  # a random network is the one that main_lgssl.py --seed 0 starts from, in all processes
    model = (args.pretrained_weights, args.arch, args.patch_size, args.checkpoint_key)
    backbone, made_with = load_backbone(*model, img_size=args.crop_size or 224)
    crop_size = args.crop_size or made_with.get("global_crops_size", 224)
    patch_size = backbone.patch_embed.patch_size[0]
    if crop_size < patch_size:
        raise UserError(f"--crop_size {crop_size} is smaller than a patch of {patch_size} pixels")
    parts = {}
    for split in ("train", "val"):
        parts[split] = build_dataset(
            args.dataset, args.data_path, split, eval_transform(crop_size), args.classes, args.download
        )
    check_parts(parts, args.data_path)
    if max(args.nb_knn) > len(parts["train"]):
        raise UserError(f"--nb_knn {max(args.nb_knn)} is more than the {len(parts['train'])} training images")
    output = args.output
    if output is None and args.pretrained_weights != "none":
        output = Path(args.pretrained_weights).parent / f"knn_{args.dataset}.json"
    if output is not None and not os.access(Path(output).parent, os.W_OK):
        raise UserError(f"cannot write the result to {output}: give a file in a folder that can be written as --output")

    rank, world_size, device = utils.init_distributed(args.dist_url)
    backbone.to(device)
    features = {
        split: extract_features(
            lambda images: F.normalize(backbone(images)[:, 0]), part, device, args.batch_size_per_gpu, args.num_workers
        )
        for split, part in parts.items()
    }
    if rank == 0:
        labels = {split: torch.tensor(part.labels, device=device) for split, part in parts.items()}
        features = {split: part.to(device) for split, part in features.items()}
        result = {
            "images": {split: len(part) for split, part in parts.items()},
            "crop_size": crop_size,
            "args": vars(args),
            "knn": {},
        }
        for k in args.nb_knn:
            top1, top5 = knn_accuracy(
                features["train"], labels["train"], features["val"], labels["val"], k, args.temperature
            )
            result["knn"][k] = {"top1": top1, "top5": top5}
            print(f"k-NN (K={k}): top-1 {top1:.2f} %, top-5 {top5:.2f} %", flush=True)
        if output is not None:
            Path(output).write_text(json.dumps(result, indent=2) + "\n")
            print(f"written to {output}", flush=True)
    if world_size > 1:
        dist.destroy_process_group()


def check_parts(parts, data_path):
    """Check that the two parts are two, have labels, and mean the same classes by them."""
    if getattr(parts["train"], "paths", None) == getattr(parts["val"], "paths", ()):
        raise UserError(
            f"{data_path} has no subfolders train and val, expected {data_path}/train/CLASS/IMAGE and .../val/..."
        )
    for split, part in parts.items():
        if min(part.labels) < 0:
            raise UserError(
                f"the {split} images of {data_path} have no labels, expected {data_path}/{split}/CLASS/IMAGE"
            )
    if parts["train"].classes != parts["val"].classes:
        difference = sorted(set(parts["train"].classes) ^ set(parts["val"].classes))[0]
        raise UserError(f"class {difference} is in only one of {data_path}/train and {data_path}/val, expected in both")


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
