"""Linear classification on frozen features (paper, section 4.2; DINO's protocol).

    python eval_linear.py --data_path FOLDER_WITH_train_AND_val --pretrained_weights OUT/checkpoint.pth

Trains one linear layer with SGD, keeps the weights of the best epoch, and writes a JSON result beside the checkpoint. A
run that was stopped goes on after its last whole epoch. Runs in one process or under torchrun, on GPUs or CPUs.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms.v2 as T
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import utils
from support import checkpoints, evaluation
from support.arguments import ArgumentParser, bool_flag, number
from support.features import eval_transform, extract_features, to_pixels
from support.loader import BatchSampler
from utils import UserError, cosine_schedule

# Arguments that may differ when a run goes on, or when its weights are evaluated.
MAY_CHANGE = "pretrained_weights download output_dir batch_size_per_gpu num_workers val_freq evaluate".split()
MAY_CHANGE += ["dist_url", "local_rank", "arch", "patch_size", "checkpoint_key"]


def linear_features(backbone, images, n_last_blocks, avgpool_patchtokens):
    """Return what DINO's linear classifier sees: images [B, 3, H, W] -> [B, n_last_blocks * D], or D more.

    The CLS tokens of the last blocks, side by side. With `avgpool_patchtokens` also the mean of the last block's patch
    tokens, and then number by number in turn, which is the order of DINO's released linear weights.
    """
    layers = backbone.get_intermediate_layers(images, n_last_blocks)
    features = [tokens[:, 0] for tokens in layers]
    if avgpool_patchtokens:
        return torch.stack([*features, layers[-1][:, 1:].mean(1)], dim=2).flatten(1)
    return torch.cat(features, dim=1)


def new_classifier(dim, num_classes, seed):
    """Return DINO's linear classifier: weights of standard deviation 0.01, no bias."""
    classifier = nn.Linear(dim, num_classes)
    nn.init.normal_(classifier.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(classifier.bias)
    return classifier


def train_one_epoch(classifier, optimizer, batches):
    """Train for one epoch.

    Args:
        batches: gives (features [b, D], labels [b], size): one rank's share of a step's `size` images. It may be empty.

    Returns:
        the mean loss
    """
    distributed = dist.is_initialized()
    loss_sum, images = 0.0, 0
    for features, labels, size in batches:
        loss = F.cross_entropy(classifier(features), labels, reduction="sum") / size
        optimizer.zero_grad()
        loss.backward()
        loss = loss.detach()
        if distributed:  # the gradients of a step are those of one process with all its images
            for tensor in [loss, *(p.grad for p in classifier.parameters())]:
                dist.all_reduce(tensor)
        optimizer.step()
        loss_sum, images = loss_sum + loss * size, images + size
    return float(loss_sum) / images


def train(classifier, optimizer, batches, steps_per_epoch, epochs, lr, start_epoch=0):
    """Train with a learning rate on a cosine from `lr` to 0, and give (epoch, mean loss) after each epoch.

    Args:
        batches: iterator over the batches of `train_one_epoch` of all epochs from `start_epoch` on.
    """
    for epoch in range(start_epoch, epochs):
        for group in optimizer.param_groups:
            group["lr"] = cosine_schedule(epoch, epochs, lr, 0.0)
        yield epoch, train_one_epoch(classifier, optimizer, itertools.islice(batches, steps_per_epoch))


def cached_batches(sampler, features, labels):
    """Give the batches of `train_one_epoch` from all features [n, D] and labels [n], in the order of a BatchSampler."""
    for _, _, indices in sampler:
        yield features[indices], labels[indices], len(indices)


@torch.no_grad()
def accuracy(classifier, features, labels, chunk=4096):
    """Return (top1, top5) in per cent; with fewer than five classes top-5 counts all."""
    correct = torch.zeros(2, dtype=torch.long, device=labels.device)
    for some_features, truth in zip(features.split(chunk), labels.split(chunk), strict=True):
        logits = classifier(some_features)
        hits = logits.topk(min(5, logits.shape[1])).indices == truth[:, None]
        correct += torch.stack([hits[:, 0].sum(), hits.sum()])
    top1, top5 = (100 * correct.double() / len(labels)).tolist()
    return top1, top5


class AugmentedBatches(Dataset):
    """Batches by their key (epoch, step, sample indices): pixels [b, 3, S, S], labels [b].

    The augmentation of an image is a function of (seed, epoch, sample), whatever process takes it.
    """

    def __init__(self, dataset, crop_size, flip_prob, seed):
        self.dataset, self.seed = dataset, seed
        self.empty = torch.empty(0, 3, crop_size, crop_size)
        self.transform = T.Compose([T.RandomResizedCrop(crop_size), T.RandomHorizontalFlip(flip_prob), to_pixels()])

    def __getitem__(self, key):
        epoch, _, indices = key
        images, labels = [], []
        with torch.random.fork_rng(devices=[]):
            for index in indices:
                image, label = self.dataset[index]
                word = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1, np.uint64)[0]
                torch.manual_seed(int(word))
                images.append(self.transform(image))
                labels.append(label)
        return torch.stack(images) if images else self.empty, torch.tensor(labels, dtype=torch.long)


def parse_arguments(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog="@FILE reads options from a file.")
    evaluation.add_model_arguments(parser)
    # fmt: off
    add = parser.add_argument_group("protocol").add_argument
    add("--n_last_blocks", type=number(int, 1), help="blocks whose CLS token is used; default: 4, with vit_base 1")
    add("--avgpool_patchtokens", type=bool_flag, help="the mean patch token too; default: with vit_base alone")
    add("--epochs", type=number(int, 1), default=100, help="passes over the training images")
    add("--lr", type=number(float, 0), default=0.001, help="learning rate at a total batch of 256; scaled with the "
        "batch, on a cosine to 0")
    add("--flip_prob", type=number(float, 0, 1), help="of a horizontal flip; default: the pretraining's, or 0.5")
    add("--cache_features", action="store_true", help="train on the features of un-augmented images, computed once: "
        "fast, but not the paper's protocol")
    add("--num_labels", type=number(int, 1), help="outputs of the classifier; default: the data set's classes")
    add("--val_freq", type=number(int, 1), default=1, help="epochs between two validations")
    add("--evaluate", nargs="?", const=True, help="do not train; validate the weights of FILE, by default those of "
        "the run in --output_dir", metavar="FILE")
    # fmt: on
    evaluation.add_data_arguments(parser)
    evaluation.add_computation_arguments(parser, batch_size=128)
    return parser.parse_args(argv)


def protocol_of(args, backbone, made_with, num_classes):
    """Return the settings whose default depends on the network, its pretraining or the data set.

    Raises:
        UserError: more blocks than the network has, or fewer outputs than classes, are asked for.
    """
    base = backbone.embed_dim == 768
    defaults = {
        "n_last_blocks": 1 if base else 4,
        "avgpool_patchtokens": base,
        "flip_prob": made_with.get("flip_prob", 0.5),
        "num_labels": num_classes,
    }
    given = vars(args)
    protocol = {name: default if given[name] is None else given[name] for name, default in defaults.items()}
    if protocol["n_last_blocks"] > len(backbone.blocks):
        found = f"--n_last_blocks {protocol['n_last_blocks']} is more than the network's {len(backbone.blocks)}"
        raise UserError(found)
    if protocol["num_labels"] < num_classes:
        found = f"--num_labels {protocol['num_labels']} is fewer than the {num_classes} classes of the data set"
        raise UserError(found)
    return protocol


class Validations:
    """The validations of a run, and the weights of the best.

    Attributes:
        history: a dictionary of each.
        best: {"top1", "top5", "epoch"} of the first with the highest top-1.
        best_classifier: its weights.
    """

    def __init__(self):
        self.history, self.best, self.best_classifier = [], {"top1": -1.0}, None

    def add(self, classifier, val, epoch, loss):
        """Validate on val = (features, labels) after so many epochs."""
        top1, top5 = accuracy(classifier, *val)
        self.history.append({"epoch": epoch, "loss": loss, "top1": top1, "top5": top5})
        if top1 > self.best["top1"]:
            self.best = {"top1": top1, "top5": top5, "epoch": epoch}
            self.best_classifier = {name: value.clone() for name, value in classifier.state_dict().items()}


def main(argv=None):
    args = parse_arguments(argv)
    backbone, made_with, crop_size = evaluation.open_model(
        args.pretrained_weights, args.arch, args.patch_size, args.checkpoint_key, args.seed, args.crop_size
    )
    plain = eval_transform(crop_size)
    transforms = {"train": plain if args.cache_features else None, "val": plain}
    splits = evaluation.open_splits(args.dataset, args.data_path, transforms, args.classes, args.download)
    protocol = protocol_of(args, backbone, made_with, len(splits["train"].classes))
    path = evaluation.result_file(args.output_dir, args.pretrained_weights, f"linear_{args.dataset}")
    dim = backbone.embed_dim * (protocol["n_last_blocks"] + protocol["avgpool_patchtokens"])
    run = {"fingerprint": evaluation.weights_hash(backbone, splits), "args": {**vars(args), **protocol}}
    defaults = parse_arguments(["--pretrained_weights", "none"])
    defaults = {**vars(defaults), **protocol_of(defaults, backbone, made_with, len(splits["train"].classes))}
    state = load_state(args.evaluate, path, run, defaults, (protocol["num_labels"], dim))

    rank, world_size, device = utils.init_distributed(args.dist_url)
    batch_size = args.batch_size_per_gpu * world_size
    if state and not args.evaluate and state["batch_size"] != batch_size:
        raise UserError(
            f"{path.with_suffix('.pth')} was trained with {state['batch_size']} images a step, found {batch_size}: "
            "start as many processes with as large batches as before"
        )
    backbone.to(device)

    @torch.no_grad()
    def network(images):
        if len(images) == 0:  # a process may have no image of the last step
            return images.new_empty(0, dim)
        return linear_features(backbone, images, protocol["n_last_blocks"], protocol["avgpool_patchtokens"])

    def extract(split):
        title = f"{split} features"
        features = extract_features(network, splits[split], device, args.batch_size_per_gpu, args.num_workers, title)
        return None if features is None else (features.to(device), torch.tensor(splits[split].labels, device=device))

    # The backbone is frozen and validation images are not augmented: their features are computed once.
    val = extract("val")
    classifier = new_classifier(dim, protocol["num_labels"], args.seed).to(device)
    if args.evaluate:
        if rank == 0:
            classifier.load_state_dict(state["best_classifier"])
            top1, top5 = accuracy(classifier, *val)
            print(f"linear: top-1 {top1:.2f} %, top-5 {top5:.2f} %", flush=True)
        if world_size > 1:
            dist.destroy_process_group()
        return

    num_images = len(splits["train"])
    steps_per_epoch = -(-num_images // batch_size)
    start_epoch = state["epoch"] if state else 0
    steps = range(start_epoch * steps_per_epoch, args.epochs * steps_per_epoch)
    if args.cache_features:
        train_features = extract("train")
        if world_size > 1:
            dist.destroy_process_group()  # what remains is one process's work
        if rank > 0:
            return
        sampler = BatchSampler(num_images, batch_size, steps, seed=args.seed, drop_last=False)
        batches = cached_batches(sampler, *train_features)
    else:
        sampler = BatchSampler(
            num_images, args.batch_size_per_gpu, steps, 1, rank, world_size, seed=args.seed, drop_last=False
        )
        loader = DataLoader(
            AugmentedBatches(splits["train"], crop_size, protocol["flip_prob"], args.seed),
            sampler=sampler,
            batch_size=None,  # a key of the sampler is a whole batch
            num_workers=args.num_workers,
            pin_memory=device.type == "cuda",
        )

        def augmented_batches():
            for step, (pixels, labels) in zip(steps, loader, strict=True):
                features = network(pixels.to(device, non_blocking=True))
                size = min(batch_size, num_images - step % steps_per_epoch * batch_size)
                yield features, labels.to(device, non_blocking=True), size

        batches = augmented_batches()

    lr = args.lr * batch_size / 256
    optimizer = torch.optim.SGD(classifier.parameters(), lr=lr, momentum=0.9)
    validations = Validations()
    if state:
        classifier.load_state_dict(classifier_state(state["state_dict"]))
        optimizer.load_state_dict(state["optimizer"])
        vars(validations).update(state["validations"])
    bar = tqdm(total=args.epochs, initial=start_epoch, unit="epoch", disable=rank > 0 or not sys.stderr.isatty())
    for epoch, loss in train(classifier, optimizer, batches, steps_per_epoch, args.epochs, lr, start_epoch):
        bar.update()
        if rank > 0:
            continue
        if epoch % args.val_freq == 0 or epoch + 1 == args.epochs:
            validations.add(classifier, val, epoch + 1, loss)
            top1, best = validations.history[-1]["top1"], validations.best["top1"]
            if bar.disable:
                print(f"epoch {epoch + 1}/{args.epochs}  loss {loss:.4f}  top-1 {top1:.2f} %", flush=True)
            bar.set_postfix({"loss": f"{loss:.3f}", "top-1": f"{top1:.2f}", "best": f"{best:.2f}"})
        if path is not None:
            contents = {
                **run,
                "epoch": epoch + 1,
                "state_dict": {f"module.linear.{name}": value for name, value in classifier.state_dict().items()},
                "optimizer": optimizer.state_dict(),
                "validations": vars(validations),
                "batch_size": batch_size,
            }
            checkpoints.save(contents, path.with_suffix(".pth"))
    bar.close()
    if rank == 0:
        best = validations.best
        cached = ", features of un-augmented images" if args.cache_features else ""
        print(
            f"linear: top-1 {best['top1']:.2f} %, top-5 {best['top5']:.2f} % "
            f"(best of {args.epochs} epochs: number {best['epoch']}{cached})",
            flush=True,
        )
        result = {
            **best,
            "training_images": "not augmented, features cached" if args.cache_features else "augmented",
            "images": {split: len(images) for split, images in splits.items()},
            "protocol": protocol,
            "crop_size": crop_size,
            "batch_size": batch_size,
            "history": validations.history,
        }
        evaluation.write_result(path, result, made_with, args)
    if dist.is_initialized():
        dist.destroy_process_group()


def classifier_state(state):
    """Take the names of DINO's linear weights off: module.linear.weight -> weight."""
    return {name.removeprefix("module.").removeprefix("linear."): value for name, value in state.items()}


def load_state(evaluate, path, run, defaults, shape):
    """Read the state of an earlier run, or None where there is none.

    Args:
        evaluate: None, True or the file of linear weights.
        path: of the result.
        run: {"fingerprint": of the backbone and the data, "args": all settings}.
        defaults: dictionary of the settings' defaults.
        shape: of the classifier's weights, (classes, dimension).

    Raises:
        UserError: it is of another run, or its classifier does not fit.
    """
    file = Path(evaluate) if isinstance(evaluate, str) else path and path.with_suffix(".pth")
    if evaluate and file is None:
        raise UserError("--evaluate needs --output_dir, or the file of linear weights")
    if file is None or not file.exists():
        if evaluate:
            raise UserError(f"--evaluate found no linear weights at {file}: train them first, or name their file")
        return None
    state = checkpoints.load_file(file)
    if "state_dict" not in state:
        raise UserError(f"{file} was not written by eval_linear.py: expected its linear weights, or DINO's")
    ours = state.get("validations", {}).get("best_classifier")
    state["best_classifier"] = ours or classifier_state(state["state_dict"])  # DINO's are those of the best epoch
    found = {name: tuple(value.shape) for name, value in state["best_classifier"].items()}
    if found != {"weight": shape, "bias": shape[:1]}:
        raise UserError(f"{file} holds {found}, expected a weight of {shape} and a bias: another network or data set")
    if evaluate:
        return state
    if state.get("fingerprint") != run["fingerprint"]:
        raise UserError(f"{file} was trained on other weights or images: move it away, or give another --output_dir")
    checkpoints.refuse_other_run(state["args"], run["args"], defaults, MAY_CHANGE, file)
    return state


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
