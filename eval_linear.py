"""Linear classification on frozen features (paper, section 4.2; DINO's protocol).

    python eval_linear.py --data_path FOLDER_WITH_train_AND_val --pretrained_weights OUT/checkpoint.pth

Trains one linear layer with SGD and reports the best epoch. Writes a JSON result to the folder of the checkpoint. A
stopped run resumes after its last complete epoch. Runs on GPUs or CPUs, in one process or under torchrun.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from support import checkpoints, evaluation
from support.arguments import bool_flag, number
from support.features import extract_features, to_pixels
from support.loader import BatchSampler
from support.weights import load_file
from utils import UserError, cosine_schedule, init_distributed, run_main

# Arguments that may differ when a run resumes, or when its weights are evaluated.
MAY_CHANGE = "pretrained_weights download output_dir batch_size_per_gpu num_workers val_freq evaluate".split()
MAY_CHANGE += ["dist_url", "local_rank", "arch", "patch_size", "checkpoint_key"]


def linear_features(backbone, images, n_last_blocks, avgpool_patchtokens) -> torch.Tensor:
    """Return the features of DINO's linear classifier: images [B, 3, H, W] -> [B, n_last_blocks * D], or D more.

    The features are the concatenated CLS tokens of the last blocks. With `avgpool_patchtokens`, the mean of the last
    block's patch tokens is added and all vectors are interleaved, the order of DINO's released linear weights.
    """
    layers = backbone.get_intermediate_layers(images, n_last_blocks)
    features = [tokens[:, 0] for tokens in layers]
    if avgpool_patchtokens:
        return torch.stack([*features, layers[-1][:, 1:].mean(1)], dim=2).flatten(1)
    return torch.cat(features, dim=1)


def new_classifier(dim, num_classes, seed) -> nn.Linear:
    """Return DINO's linear classifier: weights drawn with standard deviation 0.01, biases 0."""
    classifier = nn.Linear(dim, num_classes)
    nn.init.normal_(classifier.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(classifier.bias)
    return classifier


def train_one_epoch(classifier, optimizer, batches) -> float:
    """Train for one epoch and return the mean loss.

    Args:
        batches: iterable of (features [b, D], labels [b], size), one rank's share of a step with `size` images in
            total. The share may be empty.
    """
    loss_sum, images = 0.0, 0
    for features, labels, size in batches:
        loss = F.cross_entropy(classifier(features), labels, reduction="sum") / size
        optimizer.zero_grad()
        loss.backward()
        loss = loss.detach()
        if dist.is_initialized():  # the sum over the ranks equals one process with all images of the step
            for tensor in [loss, *(p.grad for p in classifier.parameters())]:
                dist.all_reduce(tensor)
        optimizer.step()
        loss_sum, images = loss_sum + loss * size, images + size
    return float(loss_sum) / images


def train(classifier, optimizer, batches, steps_per_epoch, epochs, lr, start_epoch=0) -> Iterator:
    """Train with a cosine schedule from `lr` to 0, set per epoch, and yield (epoch, mean loss) after each epoch.

    Args:
        batches: iterator over the batches of `train_one_epoch` for all epochs from `start_epoch` on.

    Raises:
        UserError: the loss is not finite.
    """
    for epoch in range(start_epoch, epochs):
        for group in optimizer.param_groups:
            group["lr"] = cosine_schedule(epoch, epochs, lr, 0.0)
        loss = train_one_epoch(classifier, optimizer, itertools.islice(batches, steps_per_epoch))
        if not math.isfinite(loss):
            raise UserError(f"the loss of the linear classifier is {loss} in epoch {epoch + 1}: use a smaller --lr")
        yield epoch, loss


def cached_batches(sampler, features, labels) -> Iterator:
    """Yield the batches of `train_one_epoch` from features [n, D] and labels [n], in the order of a BatchSampler."""
    for _, _, indices in sampler:
        yield features[indices], labels[indices], len(indices)


def augmented_batches(sampler, dataset, network, device, num_workers) -> Iterator:
    """Yield the batches of `train_one_epoch` from AugmentedBatches, in the order of a BatchSampler."""
    loading = {"num_workers": num_workers, "pin_memory": device.type == "cuda"}
    loader = DataLoader(dataset, sampler=sampler, batch_size=None, **loading)  # the sampler's keys are whole batches
    step_size = sampler.batch_size * sampler.world_size
    for step, (pixels, labels) in zip(sampler.steps, loader, strict=True):
        size = min(step_size, sampler.num_samples - step % sampler.steps_per_epoch * step_size)
        yield network(pixels.to(device, non_blocking=True)), labels.to(device, non_blocking=True), size


@torch.no_grad()
def validate(classifier, features, labels, chunk=4096) -> dict[str, float]:
    """Return the metrics of `classification_metrics` of a classifier.

    Args:
        features, labels: [n, D] and LongTensor [n].
        chunk: number of features per forward pass.
    """
    # In double precision, confident predictions do not tie at 1 and unlikely classes do not underflow to 0.
    probabilities = [classifier(some_features).double().softmax(1) for some_features in features.split(chunk)]
    return evaluation.classification_metrics(torch.cat(probabilities), labels)


class AugmentedBatches(Dataset):
    """Batches by key (epoch, step, sample indices): pixels [b, 3, S, S], labels [b].

    The augmentation of an image is a function of (seed, epoch, sample), whichever process computes it.
    """

    def __init__(self, dataset, crop_size, flip_prob, seed):
        import torchvision.transforms.v2 as T  # not at the top: importing it takes as long as torch

        self.dataset, self.seed = dataset, seed
        self.empty = torch.empty(0, 3, crop_size, crop_size)
        self.transform = T.Compose([T.RandomResizedCrop(crop_size), T.RandomHorizontalFlip(flip_prob), to_pixels()])

    def __getitem__(self, key):
        epoch, _, indices = key
        images, labels = [], []
        with torch.random.fork_rng(devices=[]):
            for index in indices:
                image, label = self.dataset[index]
                random = np.random.SeedSequence((self.seed, epoch, index))
                torch.manual_seed(int(random.generate_state(1, np.uint64)[0]))
                images.append(self.transform(image))
                labels.append(label)
        return torch.stack(images) if images else self.empty, torch.tensor(labels, dtype=torch.long)


def parse_arguments(argv=None) -> argparse.Namespace:
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
    add("--evaluate", nargs="?", const=True, metavar="FILE", help="validate the weights in FILE or --output_dir")
    evaluation.add_data_arguments(parser)
    evaluation.add_computation_arguments(parser, batch_size=128)
    return parser.parse_args(argv)


def protocol_of(args, backbone, made_with, num_classes) -> dict:
    """Return the settings whose defaults depend on the network, its pretraining or the data set.

    Raises:
        UserError: --n_last_blocks exceeds the network's blocks, --avgpool_patchtokens is given for raw pixels, or
            --num_labels is less than the number of classes.
    """
    blocks = len(backbone.blocks)  # raw pixels: 1
    base = backbone.embed_dim == 768 and blocks > 1
    protocol = {"n_last_blocks": 1 if base else min(4, blocks), "avgpool_patchtokens": base}
    protocol |= {"flip_prob": made_with.get("flip_prob", 0.5), "num_labels": num_classes}
    protocol |= {name: vars(args)[name] for name in protocol if vars(args)[name] is not None}
    if protocol["n_last_blocks"] > blocks:
        raise UserError(f"--n_last_blocks {protocol['n_last_blocks']} is more than the network's {blocks}")
    if args.pretrained_weights == "pixels" and protocol["avgpool_patchtokens"]:
        raise UserError("--avgpool_patchtokens true needs a network: raw pixels have no patch tokens")
    if (outputs := protocol["num_labels"]) < num_classes:
        raise UserError(f"--num_labels {outputs} is fewer than the {num_classes} classes of the data set")
    return protocol


def main(argv=None) -> None:
    """Train and validate the classifier, or only validate it with --evaluate."""
    args = parse_arguments(argv)
    backbone, made_with, crop_size, splits = evaluation.open_classification(args, not args.cache_features)
    num_images, num_classes = len(splits["train"]), len(splits["train"].classes)
    protocol = protocol_of(args, backbone, made_with, num_classes)
    path = evaluation.result_file(args.output_dir, args.pretrained_weights, f"linear_{args.dataset}")
    dim = backbone.embed_dim * (protocol["n_last_blocks"] + protocol["avgpool_patchtokens"])
    run = {"fingerprint": evaluation.weights_hash(backbone, splits), "args": {**vars(args), **protocol}}
    defaults = parse_arguments(["--pretrained_weights", "none"])
    defaults = {**vars(defaults), **protocol_of(defaults, backbone, made_with, num_classes)}
    state = load_state(args.evaluate, path, run, defaults, (protocol["num_labels"], dim))

    rank, world_size, device = init_distributed(args.dist_url)
    batch_size = args.batch_size_per_gpu * world_size
    if state and not args.evaluate and state["batch_size"] != batch_size:
        trained = f"{path.with_suffix('.pth')} was trained with {state['batch_size']} images per step"
        raise UserError(f"{trained}, found {batch_size}: use the batch and number of processes of that run")
    backbone.to(device)

    @torch.no_grad()
    def network(images):
        if len(images) == 0:  # a rank's share of the last step may be empty
            return images.new_empty(0, dim)
        return linear_features(backbone, images, protocol["n_last_blocks"], protocol["avgpool_patchtokens"])

    def extract(split):
        title = f"{split} features"
        features = extract_features(network, splits[split], device, args.batch_size_per_gpu, args.num_workers, title)
        return None if features is None else (features.to(device), torch.tensor(splits[split].labels, device=device))

    # The backbone is frozen: the features of images without augmentation are computed once.
    val = extract("val")
    if args.evaluate or args.cache_features:
        train_data = None if args.evaluate else extract("train")
        if world_size > 1:
            dist.destroy_process_group()
        if rank > 0:
            return
        world_size = 1  # rank 0 continues alone
    classifier = new_classifier(dim, protocol["num_labels"], args.seed).to(device)
    if args.evaluate:
        classifier.load_state_dict(state["best_classifier"])
        print(f"linear: {evaluation.describe(validate(classifier, *val))}", flush=True)
        return

    sampler = BatchSampler(num_images, batch_size // world_size, None, 1, rank, world_size, args.seed, drop_last=False)
    start_epoch = state["epoch"] if state else 0
    sampler.steps = range(start_epoch * sampler.steps_per_epoch, args.epochs * sampler.steps_per_epoch)
    if args.cache_features:
        batches = cached_batches(sampler, *train_data)
    else:
        augmented = AugmentedBatches(splits["train"], crop_size, protocol["flip_prob"], args.seed)
        batches = augmented_batches(sampler, augmented, network, device, args.num_workers)
    lr = args.lr * batch_size / 256
    optimizer = torch.optim.SGD(classifier.parameters(), lr=lr, momentum=0.9)
    validations = {"history": [], "best_classifier": None}
    if state:
        classifier.load_state_dict(classifier_state(state["state_dict"]))
        optimizer.load_state_dict(state["optimizer"])
        validations = {name: state["validations"][name] for name in validations}
    history = validations["history"]
    bar = tqdm(total=args.epochs, initial=start_epoch, unit="epoch", disable=rank > 0 or not sys.stderr.isatty())
    for epoch, loss in train(classifier, optimizer, batches, sampler.steps_per_epoch, args.epochs, lr, start_epoch):
        bar.update()
        if rank > 0:
            continue
        if epoch % args.val_freq == 0 or epoch + 1 == args.epochs:
            history.append({"epoch": epoch + 1, "loss": loss, **validate(classifier, *val)})
            top1 = history[-1]["top1"]
            best = max(history, key=lambda entry: entry["top1"])  # the first of equal ones
            if best is history[-1]:
                validations["best_classifier"] = {k: value.clone() for k, value in classifier.state_dict().items()}
            if bar.disable:
                print(f"epoch {epoch + 1}/{args.epochs}  loss {loss:.4f}  top-1 {top1:.2f} %", flush=True)
            bar.set_postfix({"loss": f"{loss:.3f}", "top-1": f"{top1:.2f}", "best": f"{best['top1']:.2f}"})
        if path is not None:
            linear = {f"module.linear.{name}": value for name, value in classifier.state_dict().items()}
            contents = {**run, "epoch": epoch + 1, "state_dict": linear, "optimizer": optimizer.state_dict()}
            contents |= {"validations": validations, "batch_size": batch_size}
            checkpoints.save(contents, path.with_suffix(".pth"))
    bar.close()
    if rank == 0:
        best = max(history, key=lambda entry: entry["top1"])
        metrics = {name: best[name] for name in evaluation.METRICS if name in best}
        cached = ", features of un-augmented images" if args.cache_features else ""
        of = f"(best of {args.epochs} epochs: number {best['epoch']}{cached})"
        print(f"linear: {evaluation.describe(metrics)} {of}", flush=True)
        result = {**metrics, "epoch": best["epoch"], "protocol": protocol, "crop_size": crop_size}
        result["training_images"] = "not augmented, features cached" if args.cache_features else "augmented"
        result["images"] = {split: len(images) for split, images in splits.items()}
        result |= {"batch_size": batch_size, "history": history}
        evaluation.write_result(path, result, made_with, args)
    if dist.is_initialized():
        dist.destroy_process_group()


def classifier_state(state) -> dict:
    """Strip the prefixes of DINO's linear weights: module.linear.weight -> weight."""
    return {name.removeprefix("module.").removeprefix("linear."): value for name, value in state.items()}


def load_state(evaluate, path, run, defaults, shape) -> dict | None:
    """Read the state of an earlier run, or linear weights to evaluate. Without an earlier run return None.

    Args:
        evaluate: None, True, or the file of linear weights.
        path: path of the result.
        run: {"fingerprint": hash of backbone and data, "args": all settings}.
        defaults: {setting: default}.
        shape: (classes, dimension) of the classifier's weight.

    Raises:
        UserError: there are no linear weights to evaluate, they do not fit, or the earlier run had other settings,
            weights or images.
    """
    file = Path(evaluate) if isinstance(evaluate, str) else path and path.with_suffix(".pth")
    if evaluate and file is None:
        raise UserError("--evaluate needs --output_dir, or the file of linear weights")
    if file is None or not file.exists():
        if evaluate:
            raise UserError(f"--evaluate found no linear weights at {file}: train them first, or give their file")
        return None
    state = load_file(file)
    if "state_dict" not in state:
        raise UserError(f"{file} was not written by eval_linear.py: expected its linear weights, or DINO's")
    ours = state.get("validations", {}).get("best_classifier")
    state["best_classifier"] = ours or classifier_state(state["state_dict"])  # DINO saves those of the best epoch
    found = {name: tuple(value.shape) for name, value in state["best_classifier"].items()}
    if found != {"weight": shape, "bias": shape[:1]}:
        raise UserError(f"{file} holds {found}, expected a weight of {shape} and a bias: another network or data set")
    if evaluate:
        return state
    if state.get("fingerprint") != run["fingerprint"]:
        raise UserError(f"{file} was trained on other weights or images: move it, or give another --output_dir")
    checkpoints.refuse_other_run(state["args"], run["args"], defaults, MAY_CHANGE, file)
    return state


if __name__ == "__main__":
    run_main(main)
