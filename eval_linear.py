"""Linear classification on frozen features (paper, section 4.2; DINO's protocol).

    python eval_linear.py --data_path FOLDER_WITH_train_AND_val --pretrained_weights OUT/checkpoint.pth

Trains one linear layer with SGD and reports the best epoch. Writes a JSON result to the folder of the checkpoint. A
stopped run resumes after its last complete epoch. Runs on GPUs or CPUs, in one process or under torchrun.
"""

import argparse
import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms.v2 as T
from torch import nn
from torch.utils.data import Dataset

from support import checkpoints, evaluation
from support.arguments import bool_flag, number
from support.evaluation import features_of_all
from support.features import RawPixels, to_pixels
from support.images import LabeledImages
from support.loader import BatchSampler, fit_workers, open_loader
from support.weights import load_file
from utils import UserError, all_gather, cosine_schedule, init_distributed, run_main
from vision_transformer import VisionTransformer

Batch = tuple[torch.Tensor, torch.Tensor]  # one rank's share of a step, possibly empty: features [b, D], labels [b]


class Protocol(NamedTuple):
    """The settings whose defaults depend on the network, its pretraining or the data set; see the options."""

    n_last_blocks: int
    avgpool_patchtokens: bool
    flip_prob: float
    num_labels: int


@torch.no_grad()
def linear_features(
    backbone: VisionTransformer | RawPixels, n_last_blocks: int, avgpool_patchtokens: bool, images: torch.Tensor
) -> torch.Tensor:
    """Return the features of DINO's linear classifier: images [B, 3, H, W] -> [B, n_last_blocks * D], or D more.

    The features are the concatenated CLS tokens of the last blocks. With `avgpool_patchtokens`, the mean of the last
    block's patch tokens is added and all vectors are interleaved, the order of DINO's released linear weights.
    """
    if len(images) == 0:  # a rank's share of the last step may be empty
        return images.new_empty(0, backbone.embed_dim * (n_last_blocks + avgpool_patchtokens))
    layers = backbone.get_intermediate_layers(images, n_last_blocks)
    features = [tokens[:, 0] for tokens in layers]
    if avgpool_patchtokens:
        return torch.stack([*features, layers[-1][:, 1:].mean(1)], dim=2).flatten(1)
    return torch.cat(features, dim=1)


def new_classifier(dim: int, num_classes: int, seed: int) -> nn.Linear:
    """Return DINO's linear classifier: weights drawn with standard deviation 0.01, biases 0."""
    classifier = nn.Linear(dim, num_classes)
    nn.init.normal_(classifier.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(classifier.bias)
    return classifier


def train_one_epoch(classifier: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Batch]) -> float:
    """Train for one epoch and return the mean loss."""
    loss_sum, images = torch.zeros(()), 0
    for features, labels in batches:
        size = len(labels)
        if dist.is_initialized():
            size = int(all_gather(torch.tensor(size, device=labels.device)).sum())
        loss = F.cross_entropy(classifier(features), labels, reduction="sum") / size
        optimizer.zero_grad()
        loss.backward()
        loss = loss.detach()
        if dist.is_initialized():  # the sum over the ranks equals one process with all images of the step
            for tensor in [loss, *(p.grad for p in classifier.parameters() if p.grad is not None)]:
                dist.all_reduce(tensor)
        optimizer.step()
        loss_sum, images = loss_sum + loss * size, images + size
    return float(loss_sum) / images


@torch.no_grad()
def validate(classifier: nn.Module, features: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Return the metrics of `classification_metrics` of a classifier: features [n, D], LongTensor [n]."""
    # In double precision, confident predictions do not tie at 1 and unlikely classes do not underflow to 0.
    return evaluation.classification_metrics(classifier(features).double().softmax(1), labels)


class AugmentedBatches(Dataset):
    """Batches by key (epoch, step, sample indices): pixels [b, 3, S, S], or [0] if there are no samples, labels [b].

    The augmentation of an image is a function of (seed, epoch, sample), whichever process computes it.
    """

    def __init__(self, dataset: LabeledImages, crop_size: int, flip_prob: float, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.transform = T.Compose([T.RandomResizedCrop(crop_size), T.RandomHorizontalFlip(flip_prob), to_pixels()])

    def __getitem__(self, key: tuple[int, int, list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, _, indices = key
        images, labels = [], []
        with torch.random.fork_rng(devices=[]):
            for index in indices:
                image, label = self.dataset[index]
                random = np.random.SeedSequence((self.seed, epoch, index))
                torch.manual_seed(int(random.generate_state(1, np.uint64)[0]))
                images.append(self.transform(image))
                labels.append(label)
        return torch.stack(images) if images else torch.empty(0), torch.tensor(labels, dtype=torch.long)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = evaluation.model_parser(__doc__, evaluation.PIXELS)
    add = parser.add_argument_group("protocol").add_argument
    add("--n_last_blocks", type=number(int, 1), help="number of last blocks to use; default: 4, vit_base: 1")
    add("--avgpool_patchtokens", type=bool_flag, help="also use the mean patch token; default: false, vit_base: true")
    add("--epochs", type=number(int, 1), default=100, help="epochs of training")
    add("--lr", type=number(float, 0), default=0.001, help="initial learning rate at a total batch of 256, on a cosine")
    add("--flip_prob", type=number(float, 0, 1), help="flip probability; default: that of the pretraining, or 0.5")
    add("--cache_features", action="store_true", help="do not augment training images: not the paper's protocol")
    add("--num_labels", type=number(int, 1), help="outputs of the classifier; default: number of classes")
    add("--val_freq", type=number(int, 1), default=1, help="validate every N epochs and after the last one")
    text = "do not train: validate the linear weights in FILE, by default those beside the result of an earlier run"
    add("--evaluate", nargs="?", const=True, metavar="FILE", help=text)
    evaluation.add_data_arguments(parser)
    evaluation.add_computation_arguments(parser, batch_size=128)
    return parser.parse_args(argv)


def protocol_of(
    args: argparse.Namespace, backbone: VisionTransformer | RawPixels, made_with: dict[str, Any], num_classes: int
) -> Protocol:
    """Return the protocol that parsed options ask for, with its defaults.

    Raises:
        UserError: --n_last_blocks exceeds the network's blocks, --avgpool_patchtokens is given for raw pixels, or
            --num_labels is less than the number of classes.
    """
    blocks = len(backbone.blocks)  # raw pixels: 1
    base = backbone.embed_dim == 768 and blocks > 1
    defaults = Protocol(1 if base else min(4, blocks), base, made_with.get("flip_prob", 0.5), num_classes)
    given = {name: getattr(args, name) for name in Protocol._fields if getattr(args, name) is not None}
    protocol = defaults._replace(**given)
    if protocol.n_last_blocks > blocks:
        raise UserError(f"--n_last_blocks {protocol.n_last_blocks} is more than the network's {blocks}")
    if args.pretrained_weights == "pixels" and protocol.avgpool_patchtokens:
        raise UserError("--avgpool_patchtokens true needs a network: raw pixels have no patch tokens")
    if protocol.num_labels < num_classes:
        raise UserError(f"--num_labels {protocol.num_labels} is fewer than the {num_classes} classes of the data set")
    return protocol


def main(argv: Sequence[str] | None = None) -> None:
    """Train and validate the classifier, or only validate it with --evaluate."""
    args = parse_arguments(argv)
    backbone, made_with, crop_size, splits = evaluation.open_classification(args, augmented=not args.cache_features)
    protocol = protocol_of(args, backbone, made_with, len(splits["train"].classes))
    rank, world_size, device = init_distributed(args.dist_url)
    batch_size = args.batch_size_per_gpu * world_size
    facts = {"images": {split: len(images) for split, images in splits.items()}, "crop_size": crop_size}
    facts |= {"batch_size": batch_size, "protocol": protocol._asdict()}
    facts["training_images"] = "not augmented, features cached" if args.cache_features else "augmented"
    result = evaluation.Result(f"linear_{args.dataset}", args, backbone, made_with, splits, **facts)
    file = result.path and result.path.with_suffix(".pth")
    if args.evaluate and result.first and not (file and file.exists()):  # of the same network, trained otherwise
        earlier = evaluation.earlier_result(result.first)
        same = earlier.get("fingerprint") == result.contents["fingerprint"]
        file = result.first.with_suffix(".pth") if same else file
    if isinstance(args.evaluate, str):
        file = Path(args.evaluate)
    dim = backbone.embed_dim * (protocol.n_last_blocks + protocol.avgpool_patchtokens)
    state = None
    if file and file.exists():
        state = load_state(file, (protocol.num_labels, dim))
    elif args.evaluate:
        where = f" at {file}" if file else ""
        raise UserError(f"--evaluate found no linear weights{where}: train them first, or give their file")

    for images in splits.values():
        images.announce()
    # The backbone is frozen: the features of images without augmentation are computed once.
    network = partial(linear_features, backbone.to(device), protocol.n_last_blocks, protocol.avgpool_patchtokens)
    fixed = ("val", "train") if args.cache_features and not args.evaluate else ("val",)
    of_split = {split: splits[split] for split in fixed}
    features = features_of_all(network, of_split, device, args.batch_size_per_gpu, args.num_workers)
    data = {s: (x.to(device), torch.tensor(splits[s].labels, device=device)) for s, x in features.items()}
    if args.evaluate or args.cache_features:
        evaluation.leave_process_group()
        if rank > 0:
            return
        world_size = 1  # rank 0 continues alone
    classifier = new_classifier(dim, protocol.num_labels, args.seed).to(device)
    if args.evaluate and state:
        classifier.load_state_dict(best_classifier(state))
        print(f"linear: {evaluation.describe(validate(classifier, *data['val']))}", flush=True)
        return

    lr = args.lr * batch_size / 256
    optimizer = torch.optim.SGD(classifier.parameters(), lr=lr, momentum=0.9)
    start, validations = 0, dict[str, Any](history=[], best_classifier=None)
    if state:
        classifier.load_state_dict(classifier_state(state["state_dict"]))
        optimizer.load_state_dict(state["optimizer"])
        start, validations = state["epoch"], state["validations"]
    history = validations["history"]
    num_images = len(splits["train"])
    steps_per_epoch = -(-num_images // batch_size)
    steps = range(start * steps_per_epoch, args.epochs * steps_per_epoch)
    share = {"rank": rank, "world_size": world_size, "seed": args.seed}
    sampler = BatchSampler(num_images, batch_size // world_size, steps, **share, drop_last=False)
    batches: Iterator[Batch]
    if args.cache_features:
        train, labels = data["train"]
        batches = ((train[indices], labels[indices]) for _, _, indices in sampler)
    else:
        augmented = AugmentedBatches(splits["train"], crop_size, protocol.flip_prob, args.seed)
        workers = fit_workers(args.num_workers, args.batch_size_per_gpu * 12 * crop_size**2)
        loader = open_loader(augmented, workers, device, sampler=sampler, batch_size=None)
        batches = ((network(x.to(device, non_blocking=True)), y.to(device, non_blocking=True)) for x, y in loader)
    for epoch in range(start + 1, args.epochs + 1):
        optimizer.param_groups[0]["lr"] = cosine_schedule(epoch - 1, args.epochs, lr, 0.0)
        loss = train_one_epoch(classifier, optimizer, itertools.islice(batches, steps_per_epoch))
        if not math.isfinite(loss):
            raise UserError(f"the loss of the linear classifier is {loss} in epoch {epoch}: use a smaller --lr")
        if rank > 0:
            continue
        if (epoch - 1) % args.val_freq == 0 or epoch == args.epochs:
            metrics = validate(classifier, *data["val"])
            history.append({"epoch": epoch, "loss": loss, **metrics})
            if max(history, key=itemgetter("top1")) is history[-1]:
                validations["best_classifier"] = copy.deepcopy(classifier.state_dict())
            print(f"epoch {epoch}/{args.epochs}  loss {loss:.4f}  top-1 {metrics['top1']:.2f} %", flush=True)
        if file is not None:
            weights = {f"module.linear.{name}": x for name, x in classifier.state_dict().items()}  # DINO's names
            progress = {"epoch": epoch, "state_dict": weights, "optimizer": optimizer.state_dict()}
            checkpoints.save({**result.contents, **progress, "validations": validations}, file)
    evaluation.leave_process_group()
    if rank > 0:
        return
    best = max(history, key=itemgetter("top1"))  # the first of equal ones
    metrics = {name: best[name] for name in evaluation.METRICS if name in best}
    cached = ", features of un-augmented images" if args.cache_features else ""
    of = f"(best of {args.epochs} epochs: number {best['epoch']}{cached})"
    numbers = {**metrics, "epoch": best["epoch"], "history": history}
    result.publish([f"linear: {evaluation.describe(metrics)} {of}"], **numbers)


def load_state(file: Path, shape: tuple[int, int]) -> dict[str, Any]:
    """Read a file of linear weights.

    Args:
        shape: (classes, dimension) of the classifier's weight.

    Raises:
        UserError: the weights do not fit.
    """
    state = load_file(file)
    shapes = {name: tuple(value.shape) for name, value in best_classifier(state).items()}
    if shapes != {"weight": shape, "bias": shape[:1]}:
        found = f"found {shapes.get('weight')}: weights of another network or data set, or of another command"
        raise UserError(f"{file} holds no linear classifier with a bias and a weight of {shape}, {found}")
    return state


def best_classifier(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the classifier's weights of the best epoch. DINO's files hold no others."""
    return state.get("validations", {}).get("best_classifier") or classifier_state(state.get("state_dict", {}))


def classifier_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Strip the prefixes of DINO's linear weights: module.linear.weight -> weight."""
    return {name.removeprefix("module.").removeprefix("linear."): value for name, value in state.items()}


if __name__ == "__main__":
    run_main(main)
