"""Dense evaluation: what the patch tokens of a frozen backbone are worth.

    python eval_dense.py knn-segmentation    --data_path SCENES --pretrained_weights OUT/checkpoint.pth
    python eval_dense.py linear-segmentation --data_path SCENES --pretrained_weights OUT/checkpoint.pth
    python eval_dense.py propagation         --data_path DAVIS --pretrained_weights OUT/checkpoint.pth
    python eval_dense.py correspondence      --data_path SPAIR --pretrained_weights OUT/checkpoint.pth

Runs on GPUs or CPUs, in one process or under torchrun. Writes a JSON result to the folder of the checkpoint.
docs/dense.md describes the protocols and the layouts of the data.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from support import dense, evaluation
from support.arguments import ArgumentParser, number
from support.correspondence import hits_of, patches_of, read_pairs
from support.dense import BATCH, AnnotatedImages, match_features, patch_tokens, read_mask
from support.dense import mean_iou as mean_iou  # others call it by the name of this file, as `propagate_labels`
from support.features import Network, whole_transform
from support.images import ImageList
from support.loader import fit_workers, open_loader
from support.propagation import davis_size, frame_pixels, propagated_masks, read_davis, video_scores, write_masks
from support.propagation import propagate_labels as propagate_labels
from support.resources import set_threads
from utils import UserError, init_distributed, printable, run_main
from vision_transformer import MAX_SIDE, VisionTransformer

LINEAR_SIDE = 448  # of the images of linear-segmentation, in pixels
MAP_SIDE = 100  # of its logits and masks
EXAMPLES = 6  # images in a figure
DRAWN_VIDEOS, DRAWN_FRAMES = 3, 8
DRAWN_PAIRS, DRAWN_MATCHES = 4, 24
Backbone = VisionTransformer | dense.PatchColors
Splits = dict[str, AnnotatedImages]
PIXELS = "; pixels: no network, but the colors of a patch and its place"


def open_segmentation(args: argparse.Namespace) -> tuple[Backbone, Splits, int, evaluation.Result]:
    """Open a segmentation from parsed options: its network, images, number of patches per image, and result.

    Raises:
        UserError: see `open_model` and `AnnotatedImages`; the side is no multiple of the patch; or there are fewer
            images or patches than the options name.
    """
    backbone: Backbone
    made_with: dict[str, Any]
    side = args.crop_size
    if args.pretrained_weights == "pixels":
        backbone, made_with, side = dense.PatchColors(args.patch_size or 16), {}, side or 224
        patch_size = backbone.patch_size
    else:
        backbone, made_with, side = evaluation.open_model(evaluation.model_spec(args), side)
        patch_size = backbone.patch_embed.patch_size[0]
    if side % patch_size:
        nearest = max(round(side / patch_size), 1) * patch_size
        raise UserError(f"--crop_size {side} is not a multiple of the patch of {patch_size}; the nearest is {nearest}")
    splits = dense.open_annotated(args.data_path, side)
    total, count = len(splits["train"]), args.train_images or len(splits["train"])
    if count > total:
        raise UserError(f"--train_images {count} is more than the {total} annotated training images")
    splits["train"].keep([i * total // count for i in range(count)])
    for images in splits.values():
        images.use_intensity_range(made_with.get("intensity_range"))
    facts = {"crop_size": side, "classes": splits["train"].classes}
    facts["images"] = {split: len(images) for split, images in splits.items()}
    result = evaluation.Result(result_name(args), args, backbone, made_with, splits, **facts)
    return backbone, splits, (side // patch_size) ** 2, result


def knn_segmentation(args: argparse.Namespace) -> None:
    """Label the patches of new images by the most similar patches of annotated ones (in-context, Hummingbird)."""
    backbone, splits, patches, result = open_segmentation(args)
    memory_size = min(args.memory_size or math.inf, len(splits["train"]) * patches)
    if args.nb_knn > memory_size:
        raise UserError(f"--nb_knn {args.nb_knn} is more than the {memory_size} patches of the memory")
    rank, _, device = init_distributed(args.dist_url)
    set_threads(args.num_workers)
    network = patch_tokens(backbone.to(device))
    how = device, args.batch_size_per_gpu, args.num_workers
    memory, shares = dense.patch_memory(network, splits["train"], *how, args.memory_size, args.seed)
    scorer = partial(dense.knn_segment, memory, shares, k=args.nb_knn, temperature=args.temperature)
    confusion = dense.segmentation_confusion(network, scorer, splits["val"], *how)
    evaluation.leave_process_group()
    if rank == 0:
        publish(result, confusion, per_image=patches, memory=len(memory))
        draw_examples(args.figure, splits["val"], partial(dense.segment, network, scorer), device)


def linear_segmentation(args: argparse.Namespace) -> None:
    """Train a linear layer on frozen patch tokens and segment new images with it (Leopart).

    The tokens of all images are computed once and kept by rank 0, which trains: images × patches × D × 4 bytes, 3.5 GB
    for Pascal VOC with ViT-S/16.
    """
    backbone, splits, patches, result = open_segmentation(args)
    rank, _, device = init_distributed(args.dist_url)
    network = patch_tokens(backbone.to(device), normalized=False)
    tokens = tokens_of_all(network, splits, patches, device, args.batch_size_per_gpu, args.num_workers)
    if rank > 0:
        return
    masks = {split: torch.stack([x.mask(i, MAP_SIDE) for i in range(len(x))]).byte() for split, x in splits.items()}
    num_classes = splits["train"].num_classes
    settings = device, args.lr, args.epochs, args.drop_at, args.seed
    layer = dense.train_layer(tokens["train"], masks["train"], num_classes, *settings).requires_grad_(False)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.long, device=device)
    for part, truth in zip(tokens["val"].split(BATCH), masks["val"].split(BATCH), strict=True):
        found = dense.upsample(layer(part.to(device)), dense.square(part), MAP_SIDE)
        confusion += dense.confusion_matrix(found, truth.to(device).long(), num_classes)
    publish(result, confusion, per_image=patches)
    draw_examples(args.figure, splits["val"], partial(dense.segment, network, layer), device)


def tokens_of_all(
    network: Network,
    datasets: Mapping[str, Dataset],
    patches: int,
    device: torch.device,
    batch_size: int,
    num_workers: int,
) -> dict[str, Tensor]:
    """Extract the patch tokens of data sets with all processes, and leave the process group.

    Args:
        network: images [B, 3, S, S] -> tokens [B, P, D]; on `device`.
        patches: P.

    Returns:
        {name: tokens [n, P, D] on the CPU}; on other ranks than 0 {}
    """

    def flattened(images: Tensor) -> Tensor:
        return network(images).flatten(1)

    features = evaluation.features_of_all(flattened, datasets, device, batch_size, num_workers)
    evaluation.leave_process_group()
    return {name: x.unflatten(1, (patches, -1)) for name, x in features.items()}


def draw_examples(path: str | None, images: AnnotatedImages, segment: Network, device: torch.device) -> None:
    """Draw a few images, their masks and what `segment` finds, on rank 0. A path of None draws nothing."""
    if path is None:
        return
    from support import figures  # imports matplotlib, whose backend main has set

    chosen = [i * len(images) // EXAMPLES for i in range(EXAMPLES)] if len(images) > EXAMPLES else range(len(images))
    pictures, truths, predictions = dict[str, np.ndarray](), [], []
    for i in chosen:
        pixels, mask = images[i]
        pictures[f"{len(pictures) + 1}: {Path(images.paths[i]).stem}"] = np.array(images.image(i).resize(mask.shape))
        truths.append(mask.numpy())
        predictions.append(segment(pixels[None].to(device))[0].cpu().numpy())
    save_figure(figures.draw_segmentation(pictures, truths, predictions, images.classes), path)


def save_figure(pages: list[Any], path: str) -> None:
    """Write the pages of a figure. To be called when the result is written, which a figure must not cost."""
    from support import figures  # imports matplotlib, whose backend main has set

    print(f"drawn in {', '.join(map(printable, figures.save(pages, path)))}", flush=True)


def publish(result: evaluation.Result, confusion: Tensor, **patches: int) -> None:
    """Write and print the metrics of a confusion matrix, and numbers of patches. See `dense.segmentation_metrics`."""
    metrics = dense.segmentation_metrics(confusion, result.contents["classes"])
    names = {"miou": "mIoU", "miou_objects": "of objects", "pixel_accuracy": "pixel accuracy"}
    shown = [f"{name} {metrics[key]:.2f} %" for key, name in names.items() if metrics[key] is not None]
    result.publish([f"{result.contents['args']['protocol']}: {', '.join(shown)}"], **metrics, patches=patches)


def on_all_processes(count: int, compute: Callable[[int], Any]) -> list[Any] | None:
    """Compute items 0 to count - 1, each once, shared by all processes. Rank 0 gets the results, others None."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    items = tqdm(range(rank, count, world_size), "videos", disable=rank > 0 or not sys.stderr.isatty())
    own = [compute(i) for i in items]
    gathered: list[Any] = [own] * world_size
    if world_size > 1:
        dist.gather_object(own, gathered if rank == 0 else None)
    return None if rank else [gathered[i % world_size][i // world_size] for i in range(count)]


def propagation(args: argparse.Namespace) -> None:
    """Propagate the masks of videos, which the processes share."""
    videos = read_davis(Path(args.data_path))
    backbone, made_with, _ = evaluation.open_model(evaluation.model_spec(args), args.short_side)
    facts: dict[str, Any] = {"images": {"frames": sum(len(video.frames) for video in videos)}, "videos": len(videos)}
    result = evaluation.Result(result_name(args), args, backbone, made_with, **facts)
    patch_size = backbone.patch_embed.patch_size[0]
    _, _, device = init_distributed(args.dist_url)
    set_threads(args.num_workers)
    backbone.to(device)

    @torch.no_grad()
    def propagate(i: int) -> tuple[dict, list]:
        """Return the scores of a video, and the frames of its strip as (number, image, mask, truth)."""
        video = videos[i]
        annotations = {t: np.asarray(read_mask(path)) for t, path in video.masks.items()}
        size = davis_size(video.size, args.short_side, patch_size)
        frames = ImageList(video.frames, partial(frame_pixels, size), upright=False)
        loader = open_loader(frames, fit_workers(args.num_workers, 12 * size[0] * size[1]), device, batch_size=1)
        features = torch.cat([backbone(frame.to(device))[:, 1:] for frame, _ in loader])
        options = {"n_last_frames": args.n_last_frames, "radius": args.size_mask_neighborhood, "topk": args.topk}
        grid = size[1] // patch_size, size[0] // patch_size
        masks = propagated_masks(features, annotations[0], grid, patch_size, **options)
        if result.path is not None:
            write_masks(masks, video, result.path.with_suffix(""))
        count = DRAWN_FRAMES if args.figure and i < DRAWN_VIDEOS else 0
        chosen = dict.fromkeys(np.linspace(0, len(masks) - 1, count).round().astype(int).tolist())
        strip = [(t, np.array(frames.image(t)), masks[t], annotations.get(t)) for t in chosen]
        return video_scores(masks, annotations), strip

    outcomes = on_all_processes(len(videos), propagate)
    evaluation.leave_process_group()
    if outcomes is None:
        return
    objects = {video.name: scores for video, (scores, _) in zip(videos, outcomes, strict=True)}
    means = {}
    if every := [scores for of_video in objects.values() for scores in of_video.values()]:
        means = {name: sum(scores[name] for scores in every) / len(every) for name in "jf"}
        means["jf"] = (means["j"] + means["f"]) / 2
        lines = ["propagation: J&F {jf:.1f}, J {j:.1f}, F {f:.1f}".format(**means)]
    else:
        lines = ["propagation: no score, since no frame between the first and the last one is annotated"]
    if result.path is not None:
        lines.append(f"masks in {printable(result.path.with_suffix(''))}")
    result.publish(lines, **means, objects=objects)
    if args.figure:
        from support import figures  # imports matplotlib, whose backend main has set

        strips = {video.name: strip for video, (_, strip) in zip(videos, outcomes, strict=True) if strip}
        save_figure(figures.draw_propagation(strips), args.figure)


def correspondence(args: argparse.Namespace) -> None:
    """Match the patches of pairs of images: features on all processes, matches on rank 0."""
    backbone, made_with, img_size = evaluation.open_model(evaluation.model_spec(args), args.crop_size)
    patch_size = backbone.patch_embed.patch_size[0]
    grid = img_size // patch_size
    side = grid * patch_size
    pairs = read_pairs(Path(args.data_path), grid)
    paths = sorted({path for pair in pairs for path in pair.images})
    facts = {"images": {"val": len(paths)}, "pairs": len(pairs), "crop_size": side}
    result = evaluation.Result(result_name(args), args, backbone, made_with, **facts)
    datasets = {"images": ImageList(paths, whole_transform(side), upright=False)}
    rank, _, device = init_distributed(args.dist_url)
    network = patch_tokens(backbone.to(device), normalized=False)
    features = tokens_of_all(network, datasets, grid**2, device, args.batch_size_per_gpu, args.num_workers)
    if rank > 0:
        return
    tokens = dict(zip(paths, features["images"], strict=True))
    hits, drawn = [], list[Any]()
    for pair in pairs:
        a, b = (tokens[path].to(device) for path in pair.images)
        column, row = patches_of(pair.points, grid).T
        index = match_features(a[row * grid + column], b)[0].cpu().numpy()
        found = np.stack([index % grid, index // grid], 1)
        hits.append(hits_of(pair, found, grid))
        if args.figure and len(drawn) < DRAWN_PAIRS:
            some = np.random.default_rng(args.seed).permutation(len(found))[:DRAWN_MATCHES]
            pictures = [
                np.array(datasets["images"].image(paths.index(path)).resize((side, side))) for path in pair.images
            ]
            right = next(iter(hits[-1].values()))
            drawn.append((pictures, side * pair.points[some], (found[some] + 0.5) * patch_size, right[some]))
    scores, lines = {}, []
    for name in hits[0]:
        of_pairs = [of_pair[name] for of_pair in hits]
        per_image, per_point = np.mean([np.mean(right) for right in of_pairs]), np.concatenate(of_pairs).mean()
        scores[name] = {"per_image": 100 * float(per_image), "per_point": 100 * float(per_point)}
        text = "{per_image:.1f} % (mean of pairs), {per_point:.1f} % (of all points)".format(**scores[name])
        lines.append(f"correspondence, {name.replace('_', ' ')}: {text}")
    result.publish(lines, scores=scores)
    if args.figure:
        from support import figures  # imports matplotlib, whose backend main has set

        save_figure(figures.draw_correspondence(drawn), args.figure)


def result_name(args: argparse.Namespace) -> str:
    """Return the name of the result: that of the protocol and that of the data's folder."""
    return f"{args.protocol.replace('-', '_')}_{Path(args.data_path).resolve().name}"


# {protocol: function of the parsed options}
PROTOCOLS: dict[str, Callable[[argparse.Namespace], None]] = {
    "knn-segmentation": knn_segmentation,
    "linear-segmentation": linear_segmentation,
    "propagation": propagation,
    "correspondence": correspondence,
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog="PROTOCOL --help lists its options.")
    commands = parser.add_subparsers(dest="protocol", required=True, metavar="PROTOCOL")
    natural, side = number(int, 1), number(int, 1, MAX_SIDE)

    def protocol(name: str, text: str, layout: str, batch_size: int = 0, pixels: str = "") -> Callable:
        """Add a protocol with the options that all have. Return the `add_argument` of its own."""
        sub = commands.add_parser(name, help=text, description=PROTOCOLS[name].__doc__)
        evaluation.add_model_arguments(sub, other_weights=pixels)
        own = sub.add_argument_group("protocol").add_argument
        add = sub.add_argument_group("data").add_argument
        add("--data_path", required=True, help=layout)
        add("--figure", metavar="FILE", help="picture of examples to write, PNG or PDF; default: none")
        evaluation.add_computation_arguments(sub, batch_size)
        return own

    annotated = "folder with images/SPLIT and masks/SPLIT for the splits train and val, or with VOCdevkit/VOC2012"
    multiple = "side of the images in pixels, a multiple of the patch"
    few = "number of annotated training images, evenly spread over the sorted list; default: all"

    add = protocol("knn-segmentation", "k-NN segmentation (Hummingbird)", annotated, 16, PIXELS)
    add("--crop_size", type=side, help=f"{multiple}; default: the pretraining's, or 224")
    add("--train_images", type=natural, help=few)
    add("--nb_knn", type=natural, default=30, help="number of neighbours K")
    add("--temperature", type=number(float, 1e-6), default=0.02, help="temperature of the neighbours' weights")
    add("--memory_size", type=natural, help="number of patches in the memory, drawn at random; default: all")

    add = protocol("linear-segmentation", "linear segmentation (Leopart)", annotated, 16, PIXELS)
    add("--crop_size", type=side, default=LINEAR_SIDE, help=multiple)
    add("--train_images", type=natural, help=few)
    add("--lr", type=number(float, 0), default=0.01, help="learning rate")
    add("--epochs", type=natural, default=25, help="number of epochs")
    add("--drop_at", type=number(int, 0), default=20, help="epochs after which the learning rate is divided by 10")

    layout = "DAVIS-2017's folder, with JPEGImages/480p, Annotations/480p and ImageSets/2017/val.txt"
    add = protocol("propagation", "masks through videos (DAVIS-2017)", layout)
    add("--short_side", type=side, default=480, help="shorter side of the frames in pixels")
    add("--n_last_frames", type=number(int, 0), default=7, help="earlier frames of the context, beside the first one")
    add("--size_mask_neighborhood", type=number(int, 0), default=12, help="radius of the window in patches; 0: none")
    add("--topk", type=natural, default=5, help="patches of the context whose labels are averaged")

    layout = "folder in the layout of SPair-71k, HPatches or scikit-image's stereo pair"
    add = protocol("correspondence", "patches of pairs of images", layout, 64)
    add("--crop_size", type=side, help="side of the images in pixels; default: the pretraining's, or 224")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the protocol that the command line names."""
    args = parse_arguments(argv)
    if args.figure:
        from support import figures  # imports matplotlib, whose backend main has set

        figures.check_output(args.figure, "--figure")
    PROTOCOLS[args.protocol](args)


if __name__ == "__main__":
    run_main(main)
