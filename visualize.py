"""Visualize a network: CLS attention, patch features, matched patches, nearest neighbours, a map of a data set.

    python visualize.py attention  IMAGE ...          --pretrained_weights OUT/checkpoint.pth
    python visualize.py features   IMAGE ...          --pretrained_weights OUT/checkpoint.pth
    python visualize.py matches    IMAGE             [--pretrained_weights OUT/checkpoint.pth]
    python visualize.py neighbours QUERY FOLDER       --pretrained_weights OUT/checkpoint.pth
    python visualize.py map        --data_path FOLDER --pretrained_weights OUT/checkpoint.pth

Reads checkpoints of this repository and of DINO, and timm's `.safetensors`. Writes PNG or PDF, depending on the suffix
of --output, and numbers further pages: NAME-2.png. Without weights, `matches` draws the matches by geometry only.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.manifold import TSNE
from torch.utils.data import Dataset, Subset

from augment import MultiCrop, crop_and_resize, resize
from patch_matching import RULES, match_patches
from support import evaluation, features
from support.arguments import ArgumentParser, number
from support.decoding import read_image
from support.evaluation import OpenedModel
from support.folders import listed_images
from support.images import ImageList
from support.sources import PHOTOGRAPHS, build_dataset, data_spec, photograph
from utils import UserError, printable, run_main, warn
from vision_transformer import VisionTransformer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Images = dict[str, np.ndarray]  # {name: uint8 [H, W, 3]}
MAX_PATCHES = 8000  # per image; the memory of attention grows with the square
MAX_DRAWN = 500  # images in the pages of one command
THUMBNAIL = 512  # longer side of nearest images, in pixels

# Views of `matches` if neither an option nor the pretraining defines them
CROPS: dict[str, Any] = {"global_crops_size": 224, "local_crops_size": 96}
CROPS |= {"global_crops_scale": (0.4, 1.0), "local_crops_scale": (0.05, 0.4)}


def whole_patches(image: np.ndarray, side: int, patch_size: int) -> np.ndarray:
    """Resize an image to a shorter side of about `side` pixels, with both sides a whole number of patches.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        uint8 [rows * patch_size, columns * patch_size, 3]
    """
    rows, columns = patch_grid(image, side, patch_size)
    return resize(image[None], (rows * patch_size, columns * patch_size), "bicubic")[0]


def patch_grid(image: np.ndarray, side: int, patch_size: int) -> tuple[int, int]:
    """Return (rows, columns) of patches of an image [H, W, 3] after `whole_patches`."""
    height, width = image.shape[:2]
    scale = side / min(height, width) / patch_size
    return max(round(height * scale), 1), max(round(width * scale), 1)


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
    a, b = (F.normalize(f.flatten(0, 1), dim=1) for f in (features_a, features_b))
    return (b[idx_b - 1] @ a.T).argmax(1) + 1


class Drawing(NamedTuple):
    """The pages that a command draws, and the text that it prints."""

    pages: "list[Figure]"
    text: str


def show_attention(args: Namespace, model: OpenedModel) -> Drawing:
    """Draw the attention of the CLS token."""
    from support import figures

    images = open_images(args.images, args.image_size, args.max_images, model)
    heads = [features.cls_attention(model.backbone, image) for image in images.values()]
    attentions = [np.concatenate([maps, maps.mean(0, keepdims=True)]) for maps in heads]
    masks = [most_of(maps, args.threshold) for maps in attentions]
    pages = figures.draw_attention(images, attentions, masks, patch_side(model.backbone), args.threshold)
    return Drawing(pages, f"attention of {len(heads[0])} heads on {', '.join(images)}")


def show_features(args: Namespace, model: OpenedModel) -> Drawing:
    """Draw the principal components of the patch features as colors."""
    from support import figures

    images = open_images(args.images, args.image_size, args.max_images, model)
    tokens = [features.patch_features(model.backbone, image) for image in images.values()]
    count = sum(f.shape[0] * f.shape[1] for f in tokens)
    if count < 4:
        raise UserError(f"found {count} patches, expected at least 4: give a larger --image_size or more images")
    colors, explained = features.principal_colors(tokens, list(images.values()))
    pages = figures.draw_features(images, colors, patch_side(model.backbone), explained)
    return Drawing(pages, f"patch features of {', '.join(images)}")


def show_matches(args: Namespace, model: OpenedModel | None) -> Drawing:
    """Draw the matches of two views by geometry and, given a network, by features."""
    from support import figures

    patch_size, made_with = args.patch_size or 16, {}
    if model:
        patch_size, made_with = patch_side(model.backbone), model.made_with
    crops = {name: getattr(args, name) or made_with.get(name, default) for name, default in CROPS.items()}
    ArgumentParser(prog="visualize.py matches").check_crops(Namespace(patch_size=patch_size, **crops))
    sizes = crops["global_crops_size"], crops["local_crops_size"]
    for name, size, most in zip(("global", "local"), sizes, (MAX_PATCHES, figures.MAX_PAIRS), strict=True):
        if (count := (size // patch_size) ** 2) > most:
            raise UserError(f"--{name}_crops_size {size} has {count} patches, expected at most {most}: "
                "give a smaller crop or a larger --patch_size")  # fmt: skip
    grid_a, grid_b = ((size // patch_size,) * 2 for size in sizes)
    image = open_image(find_image(args.image), patch_size)
    multi_crop = MultiCrop(
        global_size=sizes[0],
        local_size=sizes[1],
        global_scale=crops["global_crops_scale"],
        local_scale=crops["local_crops_scale"],
        local_number=1,
        flip_prob=made_with.get("flip_prob", 0.5),
        geometry="image",
        seed=args.seed,
    )

    num_matched, distances = 0, []
    for pair in range(args.pairs):
        views = multi_crop([image], [0], epoch=pair, step=0)[::2]  # the first global one and the local one
        boxes, flips = [view.boxes[0].tolist() for view in views], [bool(view.flips[0]) for view in views]
        idx_a, idx_b = match_patches(boxes[0], flips[0], grid_a, boxes[1], flips[1], grid_b, args.matching)
        idx_a, idx_b = idx_a[1:], idx_b[1:]  # without CLS
        num_matched += len(idx_a)
        if model:
            pictures = [figures.to_picture(view.pixels[0]) for view in views]
            features_a, features_b = (features.patch_features(model.backbone, picture) for picture in pictures)
            nearest_a = nearest_tokens(features_a, features_b, idx_b)
            distances.append(figures.patch_distance(nearest_a, idx_a, grid_a[1]))
        else:
            pictures = [plain_crop(image, box, flip, size) for box, flip, size in zip(boxes, flips, sizes, strict=True)]
            nearest_a = None
        if pair == 0:
            figure = figures.draw_matches(image, pictures, boxes, flips, patch_size, idx_a, idx_b, nearest_a)
    text = f"{num_matched} matched patches in {'one pair' if args.pairs == 1 else f'{args.pairs} pairs'} of views"
    if model and num_matched:
        distance = np.concatenate(distances)
        text += f"; nearest features: {(distance == 0).mean():.1%} on the same patch "
        text += f"(chance {1 / np.prod(grid_a):.1%}), {(distance <= 1).mean():.1%} within one patch"
    return Drawing([figure], text)


def plain_crop(image: np.ndarray, box: Sequence[int], flip: bool, size: int) -> np.ndarray:
    """Return a view without color distortion: uint8 [H, W, 3] -> [size, size, 3]."""
    crop = crop_and_resize(image[None], box, size)[0]
    return crop[:, ::-1] if flip else crop


def show_neighbours(args: Namespace, model: OpenedModel) -> Drawing:
    """Draw the images nearest to a query, or with --patch the nearest patches."""
    from support import figures

    query = find_image(args.query)
    if args.patch:
        return show_patch_neighbours(args, query, model)
    paths = [path for path in find_images(args.images) if path.resolve() != query.resolve()]
    if not paths:
        raise UserError(f"found no image to compare {query} with: give a folder or more images")
    open_image(query, patch_side(model.backbone))
    images = ImageList([query, *paths], features.eval_transform(model.img_size))
    cls = cls_features(model.backbone, images, args.num_workers)
    highest = (cls[1:] @ cls[0]).topk(min(args.k, len(paths)))
    similarity, chosen = highest.values.tolist(), [paths[i] for i in highest.indices.tolist()]
    pictures = [read_image(path) for path in (query, *chosen)]
    for picture in pictures:
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
    names = [f"{path.parent.name}/{path.stem}" for path in chosen]
    lines = [f"{s:.3f}  {printable(path)}" for s, path in zip(similarity, chosen, strict=True)]
    pages = figures.draw_image_neighbours([np.array(picture) for picture in pictures], similarity, names)
    return Drawing(pages, "\n".join(lines))


def show_patch_neighbours(args: Namespace, query: Path, model: OpenedModel) -> Drawing:
    """Draw the patches nearest to the patch at a point of the query, in the query and in the other images."""
    from support import figures

    images = open_images([query, *args.images], args.image_size, args.max_images, model)
    width, height = read_image(query).size
    x, y = args.patch
    if not (x < width and y < height):
        raise UserError(f"--patch {x} {y} lies outside {query}, which has {width}x{height} pixels")
    tokens = [F.normalize(features.patch_features(model.backbone, image), dim=-1) for image in images.values()]
    rows, columns = tokens[0].shape[:2]
    patch = y * rows // height, x * columns // width
    similarities = [(t @ tokens[0][patch]).numpy() for t in tokens]

    places = [(i, row, column) for i, s in enumerate(similarities) for row, column in np.ndindex(s.shape)]
    places.remove((0, patch[0], patch[1]))
    places.sort(key=lambda place: -similarities[place[0]][place[1:]])
    nearest, names = places[: args.k], list(images)
    pages = figures.draw_patch_neighbours(images, similarities, patch, nearest, patch_side(model.backbone))
    lines = [f"{similarities[i][row, col]:.3f}  row {row}, column {col} of {names[i]}" for i, row, col in nearest]
    return Drawing(pages, "\n".join(lines))


def show_map(args: Namespace, model: OpenedModel) -> Drawing:
    """Draw a map of a labeled data set, by t-SNE."""
    from support import figures

    dataset = build_dataset(data_spec(args, model.made_with), args.split, features.eval_transform(model.img_size))
    images: Dataset = dataset
    labels = np.array(dataset.labels)
    if labels.min() < 0 or len(set(labels.tolist())) < 2:
        problem = "images outside of class subfolders" if labels.min() < 0 else "one"
        raise UserError(f"{args.data_path} has no labels: expected at least two class subfolders, found {problem}")
    if len(labels) < 4:
        raise UserError(f"{args.data_path} has {len(labels)} images, expected at least 4")
    if len(labels) > args.max_images:
        chosen = np.sort(np.random.default_rng(args.seed).choice(len(labels), args.max_images, replace=False))
        images, labels = Subset(dataset, chosen.tolist()), labels[chosen]
    cls = cls_features(model.backbone, images, args.num_workers)
    if cls.std(0).max() < 1e-6:
        raise UserError(f"the CLS features of all {len(labels)} images are the same: expected images that differ")
    perplexity = min(args.perplexity, (len(labels) - 1) / 3)
    points = TSNE(perplexity=perplexity, random_state=args.seed, init="pca").fit_transform(cls.numpy())
    title = f"t-SNE of the CLS features of {len(labels)} images of {len(set(labels.tolist()))} classes"
    return Drawing([figures.draw_map(points, labels, dataset.classes, title)], title)


def cls_features(backbone: VisionTransformer, dataset: Dataset, num_workers: int) -> torch.Tensor:
    """Return the L2-normalized CLS features [n, D] of a data set."""
    device = backbone.cls_token.device
    cls = features.extract_features(features.normalized_cls(backbone), dataset, device, num_workers=num_workers)
    assert cls is not None  # None only on other processes of several
    return cls


def patch_side(backbone: VisionTransformer) -> int:
    """Return the side of a network's patches in pixels."""
    return backbone.patch_embed.patch_size[0]


def open_images(names: Sequence[str | Path], image_size: int | None, max_images: int, model: OpenedModel) -> Images:
    """Read images, resized by `whole_patches` to a shorter side of `image_size` or twice the model's.

    Args:
        names: see `find_images`. Images beyond `max_images` are skipped with a warning.

    Returns:
        images by name

    Raises:
        UserError: an image cannot be read, is smaller than a patch, or has more than MAX_PATCHES patches.
    """
    side, patch_size = image_size or 2 * model.img_size, patch_side(model.backbone)
    evaluation.check_image_side(side, model.backbone)
    paths = find_images(names)
    if len(paths) > max_images:
        warn(f"found {len(paths)} images, drawing the first {max_images}: see --max_images")
    images: Images = {}
    for path in paths[:max_images]:
        name, image = printable(path.stem), open_image(path, patch_size)
        rows, columns = patch_grid(image, side, patch_size)
        if rows * columns > MAX_PATCHES:
            raise UserError(f"{name} has {rows}x{columns} patches, more than {MAX_PATCHES}, at --image_size {side}: "
                "give a smaller --image_size")  # fmt: skip
        while name in images:
            name += f" ({len(images) + 1})"
        images[name] = whole_patches(image, side, patch_size)
    return images


def find_images(names: Sequence[str | Path]) -> list[Path]:
    """Return the paths of images, given files, folders (all their images), and names of PHOTOGRAPHS."""
    paths = [Path(name) for name in names]
    paths = [photograph(str(path)) if str(path) in PHOTOGRAPHS and not path.exists() else path for path in paths]
    return [image for path in paths for image in (listed_images(path) if path.is_dir() else [path])]


def find_image(name: str) -> Path:
    """Return the path of one image, see `find_images`. A folder raises UserError."""
    if Path(name).is_dir():
        raise UserError(f"{name} is a folder, expected an image")
    return find_images([name])[0]


def open_image(path: Path, patch_size: int) -> np.ndarray:
    """Read an image as uint8 [H, W, 3].

    Raises:
        UserError: the image cannot be read, or is smaller than a patch.
    """
    image = np.array(read_image(path))
    height, width = image.shape[:2]
    if min(height, width) < patch_size:
        raise UserError(f"{path} has {width}x{height} pixels, smaller than a patch of {patch_size}x{patch_size}")
    return image


def add_command(
    commands: Any, name: str, draw: Callable[..., Drawing], text: str, seeded: str = "", needs_weights: bool = True
) -> tuple[ArgumentParser, Callable]:
    """Add a command that draws something.

    Args:
        text: what the command draws.
        seeded: what --seed seeds beside a random network.

    Returns:
        the command's parser, and `add_argument` of its group "method"
    """
    sub = commands.add_parser(name, help=text, description=f"Draw {text}.")
    sub.set_defaults(draw=draw)
    evaluation.add_model_arguments(sub, required=needs_weights)
    add = sub.add_argument_group("output").add_argument
    text = "files to write, PNG or PDF; page 2 is FILE-2.png"
    add("--output", nargs="+", default=[f"{name}.png"], metavar="FILE", help=text)
    add = sub.add_argument_group("method").add_argument
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help=f"seed of {seeded}a random network")
    return sub, add


def add_image_arguments(add: Callable, default: Sequence[str] = ()) -> None:
    """Add the options of `open_images` to a group of arguments."""
    text = "files, folders, or names of photographs that come with scikit-learn and scikit-image"
    add("images", nargs="*", default=list(default), metavar="IMAGE", help=text)
    add("--image_size", type=number(int, 1), help="shorter side in pixels; default: twice the pretraining's, or 448")
    add("--max_images", type=number(int, 1, MAX_DRAWN), default=8, help="number of images to draw, the first ones")


def parse_arguments(argv: Sequence[str] | None = None) -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog="COMMAND --help lists its options.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    natural, fraction = number(int, 1), number(float, 1e-6, 1)

    sub, add = add_command(commands, "attention", show_attention, "the attention of the CLS token, head by head")
    add("--threshold", type=number(float, 0, 1), default=0.6, help="share of the attention in the bright patches")
    add_image_arguments(sub.add_argument_group("images").add_argument, ["china", "flower"])

    text = "the principal components of the patch features as colors"
    sub, _ = add_command(commands, "features", show_features, text)
    add_image_arguments(sub.add_argument_group("images").add_argument, ["china", "flower"])

    text = "the matches of two views, by geometry and, given weights, by learned features"
    sub, add = add_command(commands, "matches", show_matches, text, "boxes and flips, and of ", needs_weights=False)
    sub.description = (
        f"Draw {text}. Without --pretrained_weights no network is built and the views are plain crops and flips. "
        "With --pretrained_weights the views have the training's color distortion."
    )
    text = "file, or name of a photograph that comes with scikit-learn or scikit-image"
    sub.add_argument_group("images").add_argument("image", nargs="?", default="china", metavar="IMAGE", help=text)
    add("--matching", choices=RULES, default="paper", help="how geometry matches patches, see patch_matching.py")
    for name, whose in (("global", "teacher"), ("local", "student")):
        size, (low, high) = CROPS[f"{name}_crops_size"], CROPS[f"{name}_crops_scale"]
        text = f"side of the {whose}'s crop in pixels; default: the pretraining's, or {size}"
        add(f"--{name}_crops_size", type=natural, help=text)
        text = f"area of the {whose}'s crop as a fraction of the image; default: the pretraining's, or {low} {high}"
        add(f"--{name}_crops_scale", type=fraction, nargs=2, metavar=("LOW", "HIGH"), help=text)
    add("--pairs", type=natural, default=1, help="number of pairs of views whose matches are counted; draws the first")

    text = "the nearest images, or the nearest patches"
    sub, add = add_command(commands, "neighbours", show_neighbours, text)
    add_image = sub.add_argument_group("images").add_argument
    add_image("query", metavar="QUERY", help="query image")
    add_image_arguments(add_image)
    add("--k", type=number(int, 1, MAX_DRAWN), default=5, help="number of neighbours")
    text = "point of the query in pixels: draw the patches nearest to the one there"
    add("--patch", type=number(int, 0), nargs=2, metavar=("X", "Y"), help=text)
    add("--num_workers", type=number(int, 0, 1000), default=2, help="data-loading processes")

    text = "a map of labeled images, by t-SNE of their CLS features"
    sub, add = add_command(commands, "map", show_map, text, "t-SNE, of the sampling of images, and of ")
    evaluation.add_data_arguments(sub)(
        "--split", choices=("train", "val"), default="val", help="part of the data set to draw"
    )
    add("--max_images", type=natural, default=2000, help="number of images to draw, sampled at random")
    add("--perplexity", type=number(float, 1), default=30.0, help="perplexity of t-SNE")
    add("--num_workers", type=number(int, 0, 1000), default=2, help="data-loading processes")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    from support import figures  # not at the top, since it imports matplotlib

    for path in args.output:
        figures.check_output(path)
    model = None
    if args.pretrained_weights is not None:
        model = evaluation.open_model(evaluation.model_spec(args), getattr(args, "crop_size", None))
        model.backbone.to("cuda" if torch.cuda.is_available() else "cpu")
    pages, text = args.draw(args, model)
    written = [printable(file) for path in args.output for file in figures.save(pages, path)]
    print(f"{text}\ndrawn in {', '.join(written)}", flush=True)


if __name__ == "__main__":
    run_main(main)
