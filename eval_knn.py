"""Weighted k-nearest-neighbour classification on frozen features (paper, section 4.2; DINO's protocol).

    python eval_knn.py --data_path FOLDER_WITH_train_AND_val --pretrained_weights OUT/checkpoint.pth

Runs on GPUs or CPUs, in one process or under torchrun. Writes a JSON result to the folder of the checkpoint.
"""

import argparse
from collections.abc import Sequence

import torch

from support import evaluation
from support.arguments import number
from support.evaluation import classification_metrics, describe, features_of_all, knn_votes, top_hits
from support.features import normalized_cls, normalized_patches_mean
from utils import UserError, init_distributed, is_first_process, run_main, warn

DEFAULT_K = [10, 20]
FEATURES = {"cls": normalized_cls, "patches_mean": normalized_patches_mean}


def knn_accuracy(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    k: int,
    temperature: float = 0.07,
) -> tuple[float, float]:
    """Return (top1, top5) of the weighted k-NN in percent. Top-5 as in DINO, for any number of classes.

    Args:
        train_features, test_features: [n, D] and [m, D], L2-normalized.
        train_labels, test_labels: LongTensors [n] and [m], classes from 0.
        k, temperature: see `support.evaluation.knn_votes`.
    """
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    votes = knn_votes(train_features, train_labels, test_features, num_classes, k, temperature)
    top1, top5 = (100 * hits.double().mean().item() for hits in top_hits(votes, test_labels))
    return top1, top5


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = evaluation.model_parser(__doc__, evaluation.PIXELS)
    add = parser.add_argument_group("protocol").add_argument
    add("--nb_knn", type=number(int, 1), nargs="+", default=DEFAULT_K, help="numbers of neighbours K")
    add("--features", choices=FEATURES, default="cls", help="CLS token, or mean of the patch tokens")
    add("--temperature", type=number(float, 1e-6), default=0.07, help="temperature of the votes")
    evaluation.add_use_cuda(add)
    evaluation.add_data_arguments(parser)
    evaluation.add_computation_arguments(parser, batch_size=128)
    args = parser.parse_args(argv)
    if args.pretrained_weights == "pixels" and args.features != "cls":
        parser.error(f"--features {args.features} needs patch tokens, which --pretrained_weights pixels has none of")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Extract the features on all processes, then classify on rank 0."""
    args = parse_arguments(argv)
    backbone, made_with, crop_size, datasets = evaluation.open_classification(args)
    neighbours, total = args.nb_knn, len(datasets["train"])
    if max(neighbours) > total:
        if neighbours is not DEFAULT_K:  # but given
            raise UserError(f"--nb_knn {max(neighbours)} is more than the {total} training images")
        neighbours = [k for k in DEFAULT_K if k <= total] or [total]
        if is_first_process():
            few = " and ".join(str(k) for k in DEFAULT_K if k > total)
            warn(f"{total} training images are too few for K = {few}: using K = {neighbours[0]}, see --nb_knn")
    images = {split: len(dataset) for split, dataset in datasets.items()}
    facts = {"images": images, "crop_size": crop_size}
    name = f"knn_{args.dataset}" if args.features == "cls" else f"knn_{args.features}_{args.dataset}"
    result = evaluation.Result(name, args, backbone, made_with, datasets, **facts)

    for dataset in datasets.values():
        dataset.announce()
    rank, _, device = init_distributed(args.dist_url)
    network = FEATURES[args.features](backbone.to(device))
    features = features_of_all(network, datasets, device, args.batch_size_per_gpu, args.num_workers)
    evaluation.leave_process_group()
    if rank > 0:
        return
    search_device = torch.device("cpu") if args.use_cuda is False else device
    labels = {split: torch.tensor(dataset.labels, device=search_device) for split, dataset in datasets.items()}
    train, val = (features.pop(split).to(search_device) for split in ("train", "val"))
    knn, lines = {}, []
    for k in neighbours:
        votes = knn_votes(train, labels["train"], val, len(datasets["train"].classes), k, args.temperature)
        knn[k] = classification_metrics(votes, labels["val"])
        lines.append(f"k-NN (K={k}): {describe(knn[k])}")
    result.publish(lines, knn=knn)


if __name__ == "__main__":
    run_main(main)
