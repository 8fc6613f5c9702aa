"""Weighted k-nearest-neighbour classification on frozen features (paper, section 4.2; DINO's protocol).

    python eval_knn.py --data_path FOLDER_WITH_train_AND_val --pretrained_weights OUT/checkpoint.pth

Runs on GPUs or CPUs, in one process or under torchrun. Writes a JSON result to the folder of the checkpoint.
"""

import argparse

import torch

from support import evaluation
from support.arguments import bool_flag, number
from support.evaluation import classification_metrics, describe, knn_votes
from support.features import normalized_cls
from utils import UserError, init_distributed, run_main


def refuse_features(_) -> None:
    """Refuse DINO's options for files of features."""
    raise argparse.ArgumentTypeError("not supported; extract_features.py writes features to a file")


def parse_arguments(argv=None) -> argparse.Namespace:
    """Parse the command line."""
    parser = evaluation.model_parser(__doc__, evaluation.PIXELS)
    add = parser.add_argument_group("protocol").add_argument
    add("--nb_knn", type=number(int, 1), nargs="+", default=[10, 20], help="numbers of neighbours K")
    add("--temperature", type=number(float, 1e-6), default=0.07, help="temperature of the votes")
    # The default is None, not True: reproduce.py compares it with earlier results, which lack the option.
    add("--use_cuda", type=bool_flag, help="search neighbours on the GPU if available; default: true")
    hidden = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    add("--dump_features", "--load_features", type=refuse_features, **hidden)
    evaluation.add_data_arguments(parser)
    evaluation.add_computation_arguments(parser, batch_size=128)
    return parser.parse_args(argv)


def main(argv=None) -> None:
    """Extract the features on all processes, then classify on rank 0."""
    args = parse_arguments(argv)
    backbone, made_with, crop_size, datasets = evaluation.open_classification(args)
    if max(args.nb_knn) > len(datasets["train"]):
        raise UserError(f"--nb_knn {max(args.nb_knn)} is more than the {len(datasets['train'])} training images")
    path = evaluation.result_file(args.output_dir, args.pretrained_weights, f"knn_{args.dataset}")

    rank, _, device = init_distributed(args.dist_url)
    network = normalized_cls(backbone.to(device))
    features = evaluation.features_of_all(network, datasets, device, args.batch_size_per_gpu, args.num_workers)
    if rank > 0:
        return
    search_device = torch.device("cpu") if args.use_cuda is False else device
    labels = {split: torch.tensor(dataset.labels, device=search_device) for split, dataset in datasets.items()}
    train, val = (features.pop(split).to(search_device) for split in ("train", "val"))
    result = {"images": {split: len(d) for split, d in datasets.items()}, "crop_size": crop_size, "knn": {}}
    for k in args.nb_knn:
        votes = knn_votes(train, labels["train"], val, len(datasets["train"].classes), k, args.temperature)
        result["knn"][k] = classification_metrics(votes, labels["val"])
        print(f"k-NN (K={k}): {describe(result['knn'][k])}", flush=True)
    evaluation.write_result(path, result, made_with, args)


if __name__ == "__main__":
    run_main(main)
