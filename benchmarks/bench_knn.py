"""Time weighted k-NN classification against DINO's implementation: 100 chunks, votes as one-hot vectors.

python -m benchmarks.bench_knn

Features are random, by default as many as ImageNet-100 has images. Both implementations give the same accuracy.
"""

import time

import torch
import torch.nn.functional as F

from benchmarks.machine import machine, print_table
from eval_knn import knn_accuracy
from support.arguments import ArgumentParser, number


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    natural = number(int, 1)
    parser.add_argument("--train", type=natural, default=126_689, help="number of training features")
    parser.add_argument("--test", type=natural, default=5000, help="number of test features")
    parser.add_argument("--dim", type=natural, default=384, help="dimension of a feature")
    parser.add_argument("--classes", type=natural, default=100, help="number of classes")
    parser.add_argument("--k", type=natural, default=20, help="number of neighbours")
    parser.add_argument("--rounds", type=natural, default=3, help="number of measurements, the fastest counts")
    args = parser.parse_args()
    if args.k > args.train:
        parser.error(f"--k {args.k} is more than the {args.train} training features")
    print(f"{machine()}; {args.train} training and {args.test} test features of {args.dim}, k = {args.k}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(args.classes, args.dim, generator=generator)
    data = []
    for n in (args.train, args.test):
        labels = torch.randint(args.classes, (n,), generator=generator)
        features = F.normalize(centers[labels] + 5 * torch.randn(n, args.dim, generator=generator), dim=1)
        data += [features.to(device), labels.to(device)]
    sides, seconds, accuracy = {"lgssl": knn_accuracy, "DINO": one_hot_knn}, {}, {}
    for _ in range(args.rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            accuracy[name] = side(*data, args.k)
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    best = {name: min(times) for name, times in seconds.items()}
    print_table(
        ("side", "s", "faster", "top-1, %", "top-5, %"),
        [(n, f"{t:.2f}", f"{best['DINO'] / t:.1f}×", *(f"{a:.2f}" for a in accuracy[n])) for n, t in best.items()],
    )


def one_hot_knn(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    k: int,
    temperature: float = 0.07,
) -> tuple[float, float]:
    """Return (top1, top5) in percent as DINO's eval_knn.py does."""
    classes, correct1, correct5 = 1000, 0.0, 0.0  # DINO's number of columns, whatever the data set has
    size = max(len(test_features) // 100, 1)
    for features, labels in zip(test_features.split(size), test_labels.split(size), strict=True):
        similarity, neighbours = (features @ train_features.t()).topk(k, largest=True, sorted=True)
        one_hot = torch.zeros(len(features) * k, classes, device=features.device)
        one_hot.scatter_(1, train_labels[neighbours].view(-1, 1), 1)
        votes = (one_hot.view(len(features), k, classes) * (similarity / temperature).exp()[..., None]).sum(1)
        hits = votes.sort(1, descending=True).indices == labels[:, None]
        correct1 += hits[:, :1].sum().item()
        correct5 += hits[:, :5].sum().item()
    return 100 * correct1 / len(test_features), 100 * correct5 / len(test_features)


if __name__ == "__main__":
    main()
