"""Visualize a network: CLS attention, patch features, matched patches, nearest neighbours, a map of a data set.

    python visualize.py attention  IMAGE ...          --pretrained_weights OUT/checkpoint.pth
    python visualize.py features   IMAGE ...          --pretrained_weights OUT/checkpoint.pth
    python visualize.py matches    IMAGE             [--pretrained_weights OUT/checkpoint.pth]
    python visualize.py neighbours QUERY FOLDER       --pretrained_weights OUT/checkpoint.pth
    python visualize.py map        --data_path FOLDER --pretrained_weights OUT/checkpoint.pth

Reads checkpoints of this repository and of DINO, and timm's `.safetensors`. Writes PNG or PDF, depending on the suffix
of --output, and numbers further pages: NAME-2.png; `attention --animate` writes WebP or GIF. Without weights, `matches`
draws the matches by geometry only.
"""

import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.manifold import TSNE
from torch.utils.data import Dataset

from augment import MultiCrop, resize
from patch_matching import RULES, match_patches
from support import evaluation, features
from support.arguments import ArgumentParser, number
from support.decoding import image_size, read_image
from support.dense import match_features
from support.evaluation import OpenedModel
from support.folders import listed_images
from support.images import ImageList
from support.sources import PHOTOGRAPHS, build_dataset, data_spec, photograph
from utils import UserError, printable, run_main, warn
from vision_transformer import VisionTransformer

MAX_PATCHES = 8000  # per image; the memory of attention grows with the square
MAX_DRAWN = 500  # images in the pages of one command

# Views of `matches` if neither an option nor the pretraining defines them: DINO's
CROPS: dict[str, Any] = {"global_crops_size": 224, "local_crops_size": 96}
CROPS |= {"global_crops_scale": (0.4, 1.0), "local_crops_scale": (0.05, 0.4)}


def whole_patches(image: np.ndarray, side: int, patch_size: int) -> np.ndarray:
    """Resize an image to a shorter side of about `side` pixels, with both sides a whole number of patches.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        uint8 [rows * patch_size, columns * patch_size, 3]

    Raises:
        UserError: the image has more than MAX_PATCHES patches.
    """
    scale = side / min(image.shape[:2]) / patch_size
    rows, columns = (max(round(length * scale), 1) for length in image.shape[:2])
    if rows * columns > MAX_PATCHES:
        raise UserError(f"found {rows}x{columns} patches, more than {MAX_PATCHES}: give a smaller --image_size")
    return resize(image, (rows * patch_size, columns * patch_size), "bicubic")


def most_of(attention: np.ndarray, share: float) -> np.ndarray:
    """Return a mask of the fewest patches that hold a share of the attention, as DINO's visualization does.

    Args:
        attention: [..., rows, columns].
        share: in [0, 1], of the sum over the patches.

    Returns:
        booleans of the same shape
    """
    flat = attention.reshape(*attention.shape[:-2], -1)
    order = np.argsort(flat, -1, kind="stable")
    held = np.cumsum(np.take_along_axis(flat, order, -1), -1, dtype=np.float64)
    mask = np.empty(flat.shape, bool)
    np.put_along_axis(mask, order, held / held[..., -1:] > 1 - share, -1)
    return mask.reshape(attention.shape)


def nearest_tokens(features_a: torch.Tensor, features_b: torch.Tensor, idx_b: torch.Tensor) -> torch.Tensor:
    """Return, for some patches of b, the patch of a with the nearest features by cosine.

    Args:
        features_a, features_b: [rows, columns, D].
        idx_b: LongTensor [n] of tokens; patch 1 is the first.

    Returns:
        LongTensor [n] of tokens of a
    """
    return match_features(features_b.flatten(0, 1)[idx_b - 1], features_a.flatten(0, 1))[0] + 1


def show_attention(args: Namespace, model: OpenedModel) -> list[Any]:
    """Draw the attention of the CLS token."""
    from support import figures  # imports matplotlib, whose backend main has set

    if args.animate:
        return animate_attention(find_images(args.images), args.image_size or 2 * model.img_size, model.backbone)
    images = open_images(args.images, args, model)
    heads = [features.cls_attention(model.backbone, image) for image in images.values()]
    attentions = [np.concatenate([maps, maps.mean(0, keepdims=True)]) for maps in heads]
    masks = [most_of(maps, args.threshold) for maps in attentions]
    print(f"attention of {len(heads[0])} heads on {', '.join(images)}")
    return figures.draw_attention(images, attentions, masks, patch_side(model.backbone), args.threshold)


def animate_attention(paths: Sequence[Path], side: int, backbone: VisionTransformer) -> list[np.ndarray]:
    """Draw frames of a video beside their CLS attention in the last block, averaged over the heads.

    Args:
        paths: images, which are shown in the natural order of their names: 2.jpg before 10.jpg.
        side: see `whole_patches`.

    Returns:
        uint8 [H, 2 W, 3] per frame. The colors of all frames have one scale, from 0 to their highest attention.

    Raises:
        UserError: there are fewer than two frames or more than MAX_DRAWN, their sizes differ, or one cannot be read.
    """
    from support import figures  # imports matplotlib, whose backend main has set

    if not 2 <= len(paths) <= MAX_DRAWN:
        raise UserError(f"--animate: found {len(paths)} frames, expected the 2 to {MAX_DRAWN} frames of a video")
    paths = sorted(paths, key=lambda path: [int(x) if x.isdecimal() else x for x in re.split("([0-9]+)", path.name)])
    sizes = [image_size(path) for path in paths]
    if other := next((i for i, size in enumerate(sizes) if size != sizes[0]), None):
        found = "{}x{} pixels and {} {}x{}".format(*sizes[0], paths[other], *sizes[other])
        raise UserError(f"--animate: {paths[0]} has {found}, expected frames of one size")
    evaluation.check_image_side(side, backbone)
    patch_size = patch_side(backbone)
    images = [whole_patches(np.array(read_image(path)), side, patch_size) for path in paths]
    maps = [features.cls_attention(backbone, image).mean(0) for image in images]
    print(f"attention of {len(images)} frames, {figures.FRAME_TIME} ms each")
    highest = max(values.max() for values in maps)
    colors = [figures.heat_map(values, patch_size, highest) for values in maps]
    return [np.concatenate(pair, 1) for pair in zip(images, colors, strict=True)]


def show_features(args: Namespace, model: OpenedModel) -> list[Any]:
    """Draw the principal components of the patch features as colors."""
    from support import figures  # imports matplotlib, whose backend main has set

    images = open_images(args.images, args, model)
    tokens = [features.patch_features(model.backbone, image) for image in images.values()]
    colors, explained = features.principal_colors(tokens, list(images.values()))
    print(f"patch features of {', '.join(images)}")
    return figures.draw_features(images, colors, patch_side(model.backbone), explained)


def show_matches(args: Namespace, model: OpenedModel | None) -> list[Any]:
    """Draw the matches of two views by geometry and, given a network, by features."""
    from support import figures  # imports matplotlib, whose backend main has set

    patch_size, made_with = (patch_side(model.backbone), model.made_with) if model else (args.patch_size or 16, {})
    crops = {name: getattr(args, name) or made_with.get(name, default) for name, default in CROPS.items()}
    augments = args.patch_augmentation or made_with.get("patch_augmentation", False)
    checked = Namespace(patch_size=patch_size, patch_augmentation=augments, **crops)
    ArgumentParser(prog="visualize.py matches").check_crops(checked)
    sizes = crops["global_crops_size"], crops["local_crops_size"]
    for name in ("global_crops_size", "local_crops_size"):
        if (count := (crops[name] // patch_size) ** 2) > MAX_PATCHES:
            raise UserError(f"--{name} {crops[name]} has {count} patches, more than {MAX_PATCHES}: give a smaller one")
    grid_a, grid_b = ((size // patch_size,) * 2 for size in sizes)
    image = np.array(read_image(find_image(args.image)))
    multi_crop = MultiCrop(
        global_size=sizes[0],
        local_size=sizes[1],
        global_scale=crops["global_crops_scale"],
        local_scale=crops["local_crops_scale"],
        local_number=1,
        flip_prob=made_with.get("flip_prob", 0.5),
        geometry="image",
        seed=args.seed,
        distortion=made_with.get("distortion", 1.0),
        patch_side=patch_size if augments else 0,
    )

    num_matched, distances = 0, []
    for pair in range(args.pairs):
        views = multi_crop([image], [0], epoch=pair, step=0)[::2]  # the first global one and the local one
        boxes, flips = [view.boxes[0].tolist() for view in views], [bool(view.flips[0]) for view in views]
        idx_a, idx_b = match_patches(boxes[0], flips[0], grid_a, boxes[1], flips[1], grid_b, args.matching)
        idx_a, idx_b = idx_a[1:], idx_b[1:]  # without CLS
        num_matched += len(idx_a)
        pictures, nearest_a = [figures.to_picture(view.pixels[0]) for view in views], None
        if model:
            features_a, features_b = (features.patch_features(model.backbone, picture) for picture in pictures)
            nearest_a = nearest_tokens(features_a, features_b, idx_b)
            distances.append(figures.patch_distance(nearest_a, idx_a, grid_a[1]))
        if pair == 0:
            figure = figures.draw_matches(image, pictures, boxes, flips, patch_size, idx_a, idx_b, nearest_a)
    text = f"{num_matched} matched patches in {'one pair' if args.pairs == 1 else f'{args.pairs} pairs'} of views"
    if model and num_matched:
        distance = np.concatenate(distances)
        text += f"; nearest features: {(distance == 0).mean():.1%} on the same patch "
        text += f"(chance {1 / np.prod(grid_a):.1%}), {(distance <= 1).mean():.1%} within one patch"
    print(text)
    return [figure]


def show_neighbours(args: Namespace, model: OpenedModel) -> list[Any]:
    """Draw the images nearest to a query, or with --patch the nearest patches."""
    from support import figures  # imports matplotlib, whose backend main has set

    query = find_image(args.query)
    paths = [path for path in find_images(args.images) if path.resolve() != query.resolve()]
    if args.exclude_self and not args.patch:
        raise UserError("--exclude_self needs --patch: the query is never among its nearest images")
    if not paths and (args.exclude_self or not args.patch):
        raise UserError(f"found no image to compare {query} with: give a folder or more images")
    if args.patch:
        return show_patch_neighbours(args, query, paths, model)
    images = ImageList([query, *paths], features.eval_transform(model.img_size))
    cls = cls_features(model.backbone, images, args.num_workers)
    highest = (cls[1:] @ cls[0]).topk(min(args.k, len(paths)))
    similarity, chosen = highest.values.tolist(), [paths[i] for i in highest.indices.tolist()]
    for value, path in zip(similarity, chosen, strict=True):
        print(f"{value:.3f}  {printable(path)}")
    pictures = [np.array(read_image(path)) for path in (query, *chosen)]
    names = [f"{path.parent.name}/{path.stem}" for path in chosen]
    return figures.draw_image_neighbours(pictures, similarity, names)


def show_patch_neighbours(args: Namespace, query: Path, paths: Sequence[Path], model: OpenedModel) -> list[Any]:
    """Draw the patches nearest to the patch at a point of the query, in other images and the query's image."""
    from support import figures  # imports matplotlib, whose backend main has set

    images = open_images([query, *paths], args, model)
    width, height = read_image(query).size
    x, y = args.patch
    if not (x < width and y < height):
        raise UserError(f"--patch {x} {y} lies outside {query}, which has {width}x{height} pixels")
    tokens = [F.normalize(features.patch_features(model.backbone, image), dim=-1) for image in images.values()]
    rows, columns = tokens[0].shape[:2]
    patch = y * rows // height, x * columns // width
    similarities = [(t @ tokens[0][patch]).numpy() for t in tokens]

    others = [(i, row, column) for i, s in enumerate(similarities) for row, column in np.ndindex(s.shape)]
    others = [place for place in others if place != (0, *patch) and not (args.exclude_self and place[0] == 0)]
    others.sort(key=lambda place: -similarities[place[0]][place[1:]])
    nearest, names = others[: args.k], list(images)
    for i, row, column in nearest:
        print(f"{similarities[i][row, column]:.3f}  row {row}, column {column} of {names[i]}")
    places, of = [(0, *patch), *nearest], " in other images" if args.exclude_self else ""
    return figures.draw_patch_neighbours(images, similarities, places, patch_side(model.backbone), of)


def show_map(args: Namespace, model: OpenedModel) -> list[Any]:
    """Draw a map of a labeled data set, by t-SNE."""
    from support import figures  # imports matplotlib, whose backend main has set

    dataset = build_dataset(data_spec(args, model.made_with), args.split, features.eval_transform(model.img_size))
    if len(dataset) > args.max_images:
        chosen = np.random.default_rng(args.seed).choice(len(dataset), args.max_images, replace=False)
        dataset.keep(sorted(chosen.tolist()))
    labels = np.array(dataset.labels)
    if labels.min() < 0 or len(set(labels.tolist())) < 2:
        where = args.data_path or args.dataset
        raise UserError(f"{where} has no labels or only one: expected at least two class subfolders")
    cls = cls_features(model.backbone, dataset, args.num_workers)
    if cls.std(0).max() < 1e-6:
        raise UserError(f"the CLS features of all {len(labels)} images are the same: expected images that differ")
    perplexity = min(args.perplexity, (len(labels) - 1) / 3)
    points = TSNE(perplexity=perplexity, random_state=args.seed, init="pca").fit_transform(cls.numpy())
    title = f"t-SNE of the CLS features of {len(labels)} images of {len(set(labels.tolist()))} classes"
    title += f", {args.split} split" if dataset.has_splits or args.tuning else " of a data set without splits"
    print(title)
    return [figures.draw_map(points, labels, dataset.classes, title)]


def cls_features(backbone: VisionTransformer, dataset: Dataset, num_workers: int) -> torch.Tensor:
    """Return the L2-normalized CLS features [n, D] of a data set."""
    device = backbone.cls_token.device
    network = features.normalized_cls(backbone)
    return evaluation.features_of_all(network, {"CLS": dataset}, device, batch_size=64, num_workers=num_workers)["CLS"]


def patch_side(backbone: VisionTransformer) -> int:
    """Return the side of a network's patches in pixels."""
    return backbone.patch_embed.patch_size[0]


def open_images(names: Sequence[str | Path], args: Namespace, model: OpenedModel) -> dict[str, np.ndarray]:
    """Read images, resized by `whole_patches` to a shorter side of --image_size or twice the model's.

    Args:
        names: see `find_images`. Images beyond --max_images are skipped with a warning.

    Returns:
        images by name

    Raises:
        UserError: an image cannot be read, or has more than MAX_PATCHES patches.
    """
    side = args.image_size or 2 * model.img_size
    evaluation.check_image_side(side, model.backbone)
    paths = find_images(names)
    if len(paths) > args.max_images:
        warn(f"found {len(paths)} images, drawing the first {args.max_images}: see --max_images")
    images: dict[str, np.ndarray] = {}
    for path in paths[: args.max_images]:
        name = printable(path.stem)
        while name in images:
            name += f" ({len(images) + 1})"
        images[name] = whole_patches(np.array(read_image(path)), side, patch_side(model.backbone))
    return images


def find_image(name: str | Path) -> Path:
    """Return the path of an image, given it or one of PHOTOGRAPHS."""
    return photograph(str(name)) if str(name) in PHOTOGRAPHS and not Path(name).exists() else Path(name)


def find_images(names: Sequence[str | Path]) -> list[Path]:
    """Return the paths of images, given files, folders (all their images), and names of PHOTOGRAPHS."""
    return [path for found in map(find_image, names) for path in (listed_images(found) if found.is_dir() else [found])]


def add_command(commands: Any, name: str, draw: Callable, text: str) -> ArgumentParser:
    """Add a command that draws something, as `text` says, and return its parser."""
    sub = commands.add_parser(name, help=text, description=f"Draw {text}.")
    sub.set_defaults(draw=draw)
    evaluation.add_model_arguments(sub, required=name != "matches")
    sub.add_argument("--output", nargs="+", metavar="FILE", help=f"files to write, PNG or PDF; default: {name}.png")
    sub.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of all random numbers")
    return sub


def add_image_arguments(add: Callable, default: Sequence[str] = ()) -> None:
    """Add the options of `open_images`."""
    text = "files, folders, or names of photographs that come with scikit-learn and scikit-image"
    add("images", nargs="*", default=list(default), metavar="IMAGE", help=text)
    add("--image_size", type=number(int, 1), help="shorter side in pixels; default: twice the pretraining's, or 448")
    add("--max_images", type=number(int, 1, MAX_DRAWN), default=8, help="number of images to draw, the first ones")


def parse_arguments(argv: Sequence[str] | None = None) -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog="COMMAND --help lists its options.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    natural, workers = number(int, 1), number(int, 0, 1000)

    add = add_command(commands, "attention", show_attention, "the attention of the CLS token per head").add_argument
    text = "draw the images as frames of a WebP or GIF; default of --output: attention.webp"
    add("--animate", action="store_true", help=text)
    add("--threshold", type=number(float, 0, 1), default=0.6, help="share of the attention in the bright patches")
    add_image_arguments(add, ["china", "flower"])

    text = "the principal components of the patch features as colors"
    add_image_arguments(add_command(commands, "features", show_features, text).add_argument, ["china", "flower"])

    add = add_command(commands, "matches", show_matches, "matches of two views, by geometry and features").add_argument
    add("image", nargs="?", default="china", metavar="IMAGE", help="file, or name of a photograph, as for attention")
    add("--matching", choices=RULES, default="paper", help="how geometry matches patches, see patch_matching.py")
    for name, whose in (("global", "teacher"), ("local", "student")):
        text = f"side of the {whose}'s crop in pixels; default: the pretraining's"
        add(f"--{name}_crops_size", type=natural, help=text)
        text = f"area of the {whose}'s crop as a fraction of the image; default: the pretraining's"
        add(f"--{name}_crops_scale", type=number(float, 1e-6, 1), nargs=2, metavar=("LOW", "HIGH"), help=text)
    text = "distort each patch of the views on its own; default: as in the pretraining"
    add("--patch_augmentation", action="store_true", help=text)
    add("--pairs", type=natural, default=1, help="number of pairs of views whose matches are counted; draws the first")

    add = add_command(commands, "neighbours", show_neighbours, "the nearest images or patches").add_argument
    add("query", metavar="QUERY", help="query image")
    add_image_arguments(add)
    add("--k", type=number(int, 1, MAX_DRAWN), default=5, help="number of neighbours")
    text = "point of the query in pixels: draw the nearest patches"
    add("--patch", type=number(int, 0), nargs=2, metavar=("X", "Y"), help=text)
    add("--exclude_self", action="store_true", help="with --patch: leave out all patches of the query's image")
    add("--num_workers", type=workers, default=2, help="data-loading processes")

    sub = add_command(commands, "map", show_map, "a map of labeled images, by t-SNE of their CLS features")
    add = evaluation.add_data_arguments(sub)
    add("--split", choices=("train", "val"), default="val", help="part of the data set to draw")
    add("--max_images", type=natural, default=2000, help="number of images to draw, sampled at random")
    add("--perplexity", type=number(float, 1), default=30.0, help="perplexity of t-SNE")
    add("--num_workers", type=workers, default=2, help="data-loading processes")
    args = parser.parse_args(argv)
    args.animate = "animate" in args and args.animate
    args.output = args.output or [f"{args.command}.{'webp' if args.animate else 'png'}"]
    return args


def main(argv: Sequence[str] | None = None) -> None:
    from support import figures  # imports matplotlib, whose backend main has set

    args = parse_arguments(argv)
    for path in args.output:
        figures.check_output(path, animated=args.animate)
    model = None
    if args.pretrained_weights is not None:
        model = evaluation.open_model(evaluation.model_spec(args), getattr(args, "crop_size", None))
        model.backbone.to("cuda" if torch.cuda.is_available() else "cpu")
    pages = args.draw(args, model)
    save = figures.save_animation if args.animate else figures.save
    written = [printable(file) for path in args.output for file in save(pages, path)]
    print(f"drawn in {', '.join(written)}", flush=True)


if __name__ == "__main__":
    run_main(main)
