"""Look into a network: what it attends to, its patch features, the matches that they find, neighbours, a map.

    python visualize.py attention  IMAGE ...          --pretrained_weights OUT/checkpoint.pth
    python visualize.py features   IMAGE ...          --pretrained_weights OUT/checkpoint.pth
    python visualize.py matches    IMAGE             [--pretrained_weights OUT/checkpoint.pth]
    python visualize.py neighbours QUERY FOLDER       --pretrained_weights OUT/checkpoint.pth
    python visualize.py map        --data_path FOLDER --pretrained_weights OUT/checkpoint.pth

Reads checkpoints of this repository and of DINO, and timm's `.safetensors`. Writes PNG or PDF, by the name of --output.
Without weights, `matches` draws what geometry alone says.
"""

from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Subset

import utils
from augment import MultiCrop, crop_and_resize, resize
from patch_matching import RULES, match_patches
from support import evaluation, figures
from support.arguments import ArgumentParser, number
from support.features import (
    cls_attention,
    eval_transform,
    extract_features,
    normalized_cls,
    patch_features,
    principal_colours,
)
from support.figures import to_picture
from support.images import PHOTOGRAPHS, ImageList, build_dataset, listed_images, photograph, read_image
from utils import UserError

MAX_PATCHES = 8000  # of an image: its attention takes the square of it

# The views of `matches`, where neither an option nor the pretraining says otherwise.
CROPS = {
    "global_crops_size": 224,
    "local_crops_size": 96,
    "global_crops_scale": (0.4, 1.0),
    "local_crops_scale": (0.05, 0.4),
}


# --- features


def whole_patches(image, side, patch_size):
    """Resize an image so that its shorter side has about `side` pixels, and both a whole number of patches.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        uint8 [rows * patch_size, columns * patch_size, 3]
    """
    scale = side / min(image.shape[:2])
    height, width = (max(round(length * scale / patch_size), 1) * patch_size for length in image.shape[:2])
    return resize(image[None], (height, width), "bicubic")[0]


def most_of(attention, share):
    """Return a mask of the fewest patches that hold a share of the attention, as DINO draws it.

    Args:
        attention: [..., rows, columns].
        share: in [0, 1], of the sum over the patches.

    Returns:
        booleans of the same shape
    """
    flat = attention.reshape(*attention.shape[:-2], -1)
    order = np.argsort(flat, -1, kind="stable")
    held = np.cumsum(np.take_along_axis(flat, order, -1), -1, dtype=np.float64)
    kept = held / held[..., -1:] > 1 - share
    mask = np.empty_like(kept)
    np.put_along_axis(mask, order, kept, -1)
    return mask.reshape(attention.shape)


def nearest_tokens(features_a, features_b, idx_b):
    """Return the patches of a whose features are nearest, by cosine, to those of some patches of b.

    Args:
        features_a, features_b: [rows, columns, D].
        idx_b: LongTensor [n] of token numbers, patches counting from 1.

    Returns:
        LongTensor [n] of token numbers of a
    """
    a, b = (F.normalize(f.flatten(0, 1), dim=1) for f in (features_a, features_b))
    return (b[idx_b - 1] @ a.T).argmax(1) + 1


def agreement(idx_a, found_a, columns):
    """Return which of the found patches are those of the table, and which are those or touch them: two booleans [n]."""
    (row, column), (found_row, found_column) = (((i - 1) // columns, (i - 1) % columns) for i in (idx_a, found_a))
    far = torch.maximum((row - found_row).abs(), (column - found_column).abs())
    return far == 0, far <= 1


# --- the sub-commands: each returns (figure, text to print)


def attention(args, backbone, made_with, img_size):
    images = open_images(args.images, args.max_images, args.image_size or 2 * img_size, backbone)
    attentions = []
    for image in images.values():
        heads = cls_attention(backbone, image)
        attentions.append(np.concatenate([heads, heads.mean(0, keepdims=True)]))
    masks = [most_of(maps, args.threshold) for maps in attentions]
    patch_size = backbone.patch_embed.patch_size[0]
    figure = figures.draw_attention(list(images.values()), attentions, masks, list(images), patch_size, args.threshold)
    return figure, f"attention of {len(attentions[0]) - 1} heads on {', '.join(images)}"


def features(args, backbone, made_with, img_size):
    images = open_images(args.images, args.max_images, args.image_size or 2 * img_size, backbone)
    tokens = [patch_features(backbone, image) for image in images.values()]
    count = sum(f.shape[0] * f.shape[1] for f in tokens)
    if count < 4:
        raise UserError(f"found {count} patches, expected at least 4: give a larger --image_size, or more images")
    colours, explained = principal_colours(tokens)
    patch_size = backbone.patch_embed.patch_size[0]
    figure = figures.draw_features(list(images.values()), colours, list(images), patch_size, explained)
    return figure, f"patch features of {', '.join(images)}"


def matches(args, backbone, made_with, img_size):
    patch_size = backbone.patch_embed.patch_size[0] if backbone else args.patch_size or 16
    crop_settings = {
        name: made_with.get(name, default) if getattr(args, name) is None else getattr(args, name)
        for name, default in CROPS.items()
    }
    args.check_crops(Namespace(patch_size=patch_size, **crop_settings))
    sizes = crop_settings["global_crops_size"], crop_settings["local_crops_size"]
    grid_a, grid_b = ((size // patch_size,) * 2 for size in sizes)
    image = open_image(find_image(args.image), patch_size)
    multi_crop = MultiCrop(
        global_size=sizes[0],
        local_size=sizes[1],
        global_scale=crop_settings["global_crops_scale"],
        local_scale=crop_settings["local_crops_scale"],
        local_number=1,
        flip_prob=made_with.get("flip_prob", 0.5),
        geometry="image",
        seed=args.seed,
    )

    num_matched, num_same, num_near = 0, 0, 0
    for pair in range(args.pairs):
        teacher_view, _, student_view = multi_crop([image], [0], epoch=pair, step=0)
        views = (teacher_view, student_view)
        boxes, flips = [view.boxes[0].tolist() for view in views], [bool(view.flips[0]) for view in views]
        idx_a, idx_b = match_patches(boxes[0], flips[0], grid_a, boxes[1], flips[1], grid_b, args.matching)
        idx_a, idx_b = idx_a[1:], idx_b[1:]  # without CLS
        num_matched += len(idx_a)
        if backbone:
            crops = [to_picture(view.pixels[0]) for view in views]
            features_a, features_b = (patch_features(backbone, crop) for crop in crops)
            found_a = nearest_tokens(features_a, features_b, idx_b)
            same, near = agreement(idx_a, found_a, grid_a[1])
            num_same, num_near = num_same + int(same.sum()), num_near + int(near.sum())
        else:
            crops = [plain_crop(image, box, flip, size) for box, flip, size in zip(boxes, flips, sizes, strict=True)]
            found_a = None
        if pair == 0:
            figure = figures.draw_matches(image, crops, boxes, flips, patch_size, idx_a, idx_b, found_a)
    text = f"{num_matched} matched patches in {'one pair' if args.pairs == 1 else f'{args.pairs} pairs'} of views"
    if backbone and num_matched:
        text += (
            f"; of these the features find {num_same / num_matched:.1%}, and {num_near / num_matched:.1%} within a "
            f"patch (by chance {1 / np.prod(grid_a):.1%})"
        )
    return figure, text


def plain_crop(image, box, flip, size):
    """Return a view without distortion: uint8 [H, W, 3] -> [size, size, 3]."""
    crop = crop_and_resize(image[None], box, size)[0]
    return crop[:, ::-1] if flip else crop


def neighbours(args, backbone, made_with, img_size):
    query = find_image(args.query)
    if args.patch:
        return patch_neighbours(args, query, backbone, img_size)
    paths = [path for path in find_images(args.images) if path.resolve() != query.resolve()]
    if not paths:
        raise UserError(f"{query} has no image to be compared with: give a folder, or more images")
    open_image(query, backbone.patch_embed.patch_size[0])
    cls = cls_features(backbone, ImageList([query, *paths], eval_transform(img_size)), args.num_workers)
    similarity, nearest = (cls[1:] @ cls[0]).topk(min(args.k, len(paths)))
    similarity, shown = similarity.tolist(), [paths[i] for i in nearest.tolist()]
    pictures = [np.array(read_image(path)) for path in (query, *shown)]
    names = [f"{path.parent.name}/{path.name}" for path in shown]
    figure = figures.draw_image_neighbours(pictures[0], pictures[1:], similarity, names)
    lines = [f"{s:.3f}  {utils.printable(path)}" for s, path in zip(similarity, shown, strict=True)]
    return figure, "\n".join(lines)


def patch_neighbours(args, query, backbone, img_size):
    """Draw the patches nearest to the one at a point of the query, in it and in the other images."""
    patch_size = backbone.patch_embed.patch_size[0]
    side = args.image_size or 2 * img_size
    images = open_images([query, *args.images], args.max_images, side, backbone)
    width, height = read_image(query).size
    x, y = args.patch
    if not (x < width and y < height):
        raise UserError(f"--patch {x} {y} is outside of {query}, which has {width}x{height} pixels")
    tokens = [F.normalize(patch_features(backbone, image), dim=-1) for image in images.values()]
    rows, columns = tokens[0].shape[:2]
    patch = y * rows // height, x * columns // width
    similarities = [(t @ tokens[0][patch]).numpy() for t in tokens]

    places = [(i, row, column) for i, s in enumerate(similarities) for row, column in np.ndindex(s.shape)]
    places.remove((0, *patch))
    places.sort(key=lambda place: -similarities[place[0]][place[1:]])
    nearest, names = places[: args.k], list(images)
    figure = figures.draw_patch_neighbours(list(images.values()), similarities, patch, nearest, names, patch_size)
    lines = [f"{similarities[i][row, col]:.3f}  row {row}, column {col} of {names[i]}" for i, row, col in nearest]
    return figure, "\n".join(lines)


def map_of_images(args, backbone, made_with, img_size):
    from sklearn.manifold import TSNE  # takes a second

    transform = eval_transform(img_size)
    dataset = build_dataset(args.dataset, args.data_path, args.split, transform, args.classes, args.download)
    labels, classes = np.array(dataset.labels), dataset.classes
    if labels.min() < 0 or len(set(labels.tolist())) < 2:
        problem = "images outside of them" if labels.min() < 0 else "one"
        raise UserError(f"{args.data_path} has no labels: expected at least two class subfolders, found {problem}")
    if len(labels) < 4:
        raise UserError(f"{args.data_path} has {len(labels)} images, expected at least 4")
    if len(labels) > args.max_images:
        chosen = np.sort(np.random.default_rng(args.seed).choice(len(labels), args.max_images, replace=False))
        dataset, labels = Subset(dataset, chosen.tolist()), labels[chosen]
    cls = cls_features(backbone, dataset, args.num_workers)
    perplexity = min(args.perplexity, (len(labels) - 1) / 3)
    points = TSNE(perplexity=perplexity, random_state=args.seed, init="pca").fit_transform(cls.numpy())
    title = f"t-SNE of the CLS features of {len(labels)} images of {len(set(labels.tolist()))} classes"
    return figures.draw_map(points, labels, classes, title), title


# --- what they share


def cls_features(backbone, dataset, num_workers):
    """Return the normalised CLS features [n, D] of all images of a data set."""
    device = backbone.cls_token.device
    return extract_features(normalized_cls(backbone), dataset, device, num_workers=num_workers)


def open_images(names, max_images, side, backbone):
    """Read images, resized by `whole_patches`: {name: uint8 [H, W, 3]}.

    Args:
        names: files, folders, and some of PHOTOGRAPHS.
        max_images: how many, the first ones.
        side: of the shorter side in pixels.
    """
    evaluation.check_image_side(side, backbone)
    patch_size = backbone.patch_embed.patch_size[0]
    paths = find_images(names)
    if len(paths) > max_images:
        utils.warn(f"{len(paths)} images were given, the first {max_images} are drawn: see --max_images")
    images = {}
    for path in paths[:max_images]:
        name = utils.printable(path.stem)
        name = name if name not in images else f"{name} ({len(images) + 1})"
        images[name] = whole_patches(open_image(path, patch_size), side, patch_size)
        rows, columns = (length // patch_size for length in images[name].shape[:2])
        if rows * columns > MAX_PATCHES:
            raise UserError(
                f"{name} has {rows}x{columns} patches, more than {MAX_PATCHES}, at --image_size {side}: "
                "give a smaller one"
            )
    return images


def find_images(names):
    """Return the paths of images: of files, of all that are in folders, and of PHOTOGRAPHS by their names."""
    paths = [photograph(name) if name in PHOTOGRAPHS and not Path(name).exists() else Path(name) for name in names]
    return [image for path in paths for image in (listed_images(path) if path.is_dir() else [path])]


def find_image(name):
    """Return the path of a single image, see `find_images`."""
    if Path(name).is_dir():
        raise UserError(f"{name} is a folder, expected an image")
    return find_images([name])[0]


def open_image(path, patch_size):
    """Read an image as uint8 [H, W, 3].

    Raises:
        UserError: it cannot be read, or is smaller than a patch.
    """
    image = np.array(read_image(path))
    height, width = image.shape[:2]
    if min(height, width) < patch_size:
        raise UserError(f"{path} has {width}x{height} pixels, smaller than a patch of {patch_size}x{patch_size}")
    return image


def parse_arguments(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog="COMMAND --help lists its options.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    natural = number(int, 1)

    def command(name, draw, text, weights_required=True):
        sub = commands.add_parser(name, help=text, description=f"Draw {text}.")
        sub.set_defaults(draw=draw)
        evaluation.add_model_arguments(sub, required=weights_required)
        sub.add_argument_group("output").add_argument(
            "--output", nargs="+", default=[f"{name}.png"], metavar="FILE", help="files to write, PNG or PDF"
        )
        return sub.add_argument_group("method").add_argument, sub

    def images(sub, query=False):
        add = sub.add_argument_group("images").add_argument
        if query:
            add("query", metavar="QUERY", help="image to start from")
        text = "files, folders, or photographs that scikit-learn and scikit-image ship"
        default = [] if query else ["china", "flower"]
        add("images", nargs="*", default=default, metavar="IMAGE", help=text)
        add("--image_size", type=natural, help="shorter side in pixels that they get; default: twice the pretraining's")
        add("--max_images", type=natural, default=8, help="how many to draw, the first ones")

    def seed(add, text):
        add("--seed", type=number(int, 0, 2**32 - 1), default=0, help=text)

    add_method, sub = command("attention", attention, "what the CLS token attends to, head by head")
    images(sub)
    share = "share of a head's attention that the patches shown bright hold"
    add_method("--threshold", type=number(float, 0, 1), default=0.6, help=share)
    seed(add_method, "of the network with --pretrained_weights none")

    add_method, sub = command("features", features, "the principal components of the patch features as colours")
    images(sub)
    seed(add_method, "of the network with --pretrained_weights none")

    text = "the matches of two views, by geometry and, with weights, by learned features"
    add_method, sub = command("matches", matches, text, weights_required=False)
    sub.set_defaults(check_crops=sub.check_crops)
    sub.description += (
        " Without --pretrained_weights no network is built, and the views are plain crops and flips; with them, they"
        " have the training's colour distortion."
    )
    text = "a file, or a photograph that scikit-learn or scikit-image ships"
    sub.add_argument_group("images").add_argument("image", nargs="?", default="china", metavar="IMAGE", help=text)
    add_method("--matching", choices=RULES, default="paper", help="how geometry matches patches, see patch_matching.py")
    for name, whose in (("global", "teacher"), ("local", "student")):
        size, (low, high) = CROPS[f"{name}_crops_size"], CROPS[f"{name}_crops_scale"]
        text = f"side of the {whose}'s crop in pixels; default: the pretraining's, or {size}"
        add_method(f"--{name}_crops_size", type=natural, help=text)
        text = f"share of the image's area that it has; default: the pretraining's, or {low} {high}"
        add_method(f"--{name}_crops_scale", type=number(float, 1e-6, 1), nargs=2, metavar=("LOW", "HIGH"), help=text)
    add_method("--pairs", type=natural, default=1, help="of views, to count matches in; the first is drawn")
    seed(add_method, "of boxes and flips, and of the network with --pretrained_weights none")

    add_method, sub = command("neighbours", neighbours, "the nearest images, or the nearest patches")
    images(sub, query=True)
    add_method("--k", type=natural, default=5, help="number of neighbours")
    place = "a point of the query, in its pixels: draw the patches nearest to the one there"
    add_method("--patch", type=number(int, 0), nargs=2, metavar=("X", "Y"), help=place)
    seed(add_method, "of the network with --pretrained_weights none")
    add_method("--num_workers", type=number(int, 0), default=2, help="data-loading processes")

    add_method, sub = command("map", map_of_images, "a map of labelled images, by t-SNE of their CLS features")
    add = evaluation.add_data_arguments(sub)
    add("--split", choices=("train", "val"), default="val", help="which part of the data set")
    add_method("--max_images", type=natural, default=2000, help="how many to draw, at random")
    add_method("--perplexity", type=number(float, 1), default=30.0, help="t-SNE's, about how many neighbours count")
    seed(add_method, "of t-SNE, of the choice of images, and of the network with --pretrained_weights none")
    add_method("--num_workers", type=number(int, 0), default=2, help="data-loading processes")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    for path in args.output:
        figures.check_output(path)
    backbone, made_with, img_size = None, {}, None
    if args.pretrained_weights is not None:
        backbone, made_with, img_size = evaluation.open_model(
            args.pretrained_weights,
            args.arch,
            args.patch_size,
            args.checkpoint_key,
            args.seed,
            getattr(args, "crop_size", None),
        )
        backbone.to("cuda" if torch.cuda.is_available() else "cpu")
    figure, text = args.draw(args, backbone, made_with, img_size)
    for path in args.output:
        figures.save(figure, path)
    print(f"{text}\ndrawn in {', '.join(map(str, args.output))}", flush=True)


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
