"""Weighted k-nearest-neighbour classification on frozen features (paper, section 4.2; DINO's protocol).

    python eval_knn.py --data_path FOLDER_WITH_train_AND_val --pretrained_weights OUT/checkpoint.pth

Runs in one process or under torchrun, on GPUs or CPUs, and writes a JSON result beside the checkpoint.
"""

import torch
import torch.distributed as dist

import evaluation
import utils
from features import eval_transform, extract_features, normalized_cls
from utils import UserError, number


def knn_accuracy(train_features, train_labels, test_features, test_labels, k, temperature=0.07):
    """Classify test features by their k most similar training features, each voting with exp(similarity / temperature).

    Similarity is the dot product: L2-normalise the features first for the cosine. Test features are taken in chunks, so
    that no more than 2^26 similarities (256 MiB) are held at a time. ImageNet-1K with ViT-B needs 3.9 GB for the 1.28 M
    training features of 768 numbers, 0.15 GB for the test features, and up to 1 GB beside them; rank 0 of several
    processes holds its own share twice while they are gathered.

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
    evaluation.add_model_arguments(parser)
    group = parser.add_argument_group("protocol")
    group.add_argument("--nb_knn", type=number(int, 1), nargs="+", default=[10, 20], help="numbers of neighbours")
    group.add_argument("--temperature", type=number(float, 1e-6), default=0.07, help="of the votes")
    evaluation.add_data_arguments(parser)
    evaluation.add_computation_arguments(parser, batch_size=128)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    model = (args.pretrained_weights, args.arch, args.patch_size, args.checkpoint_key)
    backbone, made_with, crop_size = evaluation.open_model(*model, args.seed, args.crop_size)
    transforms = dict.fromkeys(("train", "val"), eval_transform(crop_size))
    parts = evaluation.open_parts(args.dataset, args.data_path, transforms, args.classes, args.download)
    if max(args.nb_knn) > len(parts["train"]):
        raise UserError(f"--nb_knn {max(args.nb_knn)} is more than the {len(parts['train'])} training images")
    path = evaluation.result_file(args.output_dir, args.pretrained_weights, f"knn_{args.dataset}")

    rank, world_size, device = utils.init_distributed(args.dist_url)
    backbone.to(device)

    batches = (device, args.batch_size_per_gpu, args.num_workers)
    features = {
        split: extract_features(normalized_cls(backbone), part, *batches, f"{split} features")
        for split, part in parts.items()
    }
    if rank == 0:
        labels = {split: torch.tensor(part.labels, device=device) for split, part in parts.items()}
        features = {split: part.to(device) for split, part in features.items()}
        result = {"images": {split: len(part) for split, part in parts.items()}, "crop_size": crop_size, "knn": {}}
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
