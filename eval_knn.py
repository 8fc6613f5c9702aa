"""Weighted k-nearest-neighbour classification on frozen features (paper, section 4.2; DINO's protocol).

    python eval_knn.py --data_path FOLDER_WITH_train_AND_val --pretrained_weights OUT/checkpoint.pth

Runs in one process or under torchrun, on GPUs or CPUs, and writes a JSON result beside the checkpoint.
"""

import argparse

import torch
import torch.distributed as dist

import utils
from support import evaluation
from support.arguments import ArgumentParser, bool_flag, number
from support.evaluation import knn_accuracy
from support.features import eval_transform, extract_features, normalized_cls
from utils import UserError


def refuse_features(_) -> None:
    """Refuse DINO's options for files of features."""
    raise argparse.ArgumentTypeError("not supported; extract_features.py writes features to a file")


def parse_arguments(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog="@FILE reads options from a file.")
    evaluation.add_model_arguments(parser)
    group = parser.add_argument_group("protocol")
    group.add_argument("--nb_knn", type=number(int, 1), nargs="+", default=[10, 20], help="numbers of neighbours")
    group.add_argument("--temperature", type=number(float, 1e-6), default=0.07, help="of the votes")
    # No True as the default: reproduce.py compares it with results of earlier versions, which lack the option.
    text = "search the neighbours on the GPU, if there is one, or in the CPU's memory; default: true"
    group.add_argument("--use_cuda", type=bool_flag, help=text)
    hidden = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    group.add_argument("--dump_features", "--load_features", type=refuse_features, **hidden)
    evaluation.add_data_arguments(parser)
    evaluation.add_computation_arguments(parser, batch_size=128)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    backbone, made_with, crop_size = evaluation.open_model(
        args.pretrained_weights,
        arch=args.arch,
        patch_size=args.patch_size,
        checkpoint_key=args.checkpoint_key,
        seed=args.seed,
        img_size=args.crop_size,
    )
    transforms = dict.fromkeys(("train", "val"), eval_transform(crop_size))
    datasets = evaluation.open_splits(args.dataset, args.data_path, transforms, args.classes, args.download)
    if max(args.nb_knn) > len(datasets["train"]):
        raise UserError(f"--nb_knn {max(args.nb_knn)} is more than the {len(datasets['train'])} training images")
    path = evaluation.result_file(args.output_dir, args.pretrained_weights, f"knn_{args.dataset}")

    rank, world_size, device = utils.init_distributed(args.dist_url)
    backbone.to(device)
    features = {
        split: extract_features(
            normalized_cls(backbone),
            dataset,
            device,
            batch_size=args.batch_size_per_gpu,
            num_workers=args.num_workers,
            title=f"{split} features",
        )
        for split, dataset in datasets.items()
    }
    if rank == 0:
        if args.use_cuda is False:
            device = torch.device("cpu")
        labels = {split: torch.tensor(dataset.labels, device=device) for split, dataset in datasets.items()}
        features = {split: values.to(device) for split, values in features.items()}
        images = {split: len(dataset) for split, dataset in datasets.items()}
        result = {"images": images, "crop_size": crop_size, "knn": {}}
        for k in args.nb_knn:
            top1, top5 = knn_accuracy(
                features["train"], labels["train"], features["val"], labels["val"], k, args.temperature
            )
            result["knn"][k] = {"top1": top1, "top5": top5}
            print(f"k-NN (K={k}): top-1 {top1:.2f} %, top-5 {top5:.2f} %", flush=True)
        evaluation.write_result(path, result, made_with, args)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
