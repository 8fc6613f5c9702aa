"""Look into a network: what it attends to, its patch features, the matches that they find, neighbours, a map.

    python visualize.py attention  IMAGE ...          --pretrained_weights OUT/checkpoint.pth
    python visualize.py features   IMAGE ...          --pretrained_weights OUT/checkpoint.pth
    python visualize.py matches    IMAGE              --pretrained_weights OUT/checkpoint.pth
    python visualize.py neighbours QUERY FOLDER       --pretrained_weights OUT/checkpoint.pth
    python visualize.py map        --data_path FOLDER --pretrained_weights OUT/checkpoint.pth

Reads checkpoints of this repository and of DINO, and timm's `.safetensors`. Writes PNG or PDF, by the name of --output.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch.utils.data import Subset

import evaluation
import figures
import utils
from augment import MultiCrop, View, normalize
from datasets import PHOTOGRAPHS, ImageList, build_dataset, listed_images, photograph, read_image, to_uint8
from features import eval_transform, extract_features, normalized_cls
from figures import to_picture
from patch_matching import RULES, match_patches
from utils import UserError, number

MOST_PATCHES = 8000  # of an image: its attention takes the square of it


# --- features


def whole_patches(image, side, patch_size):
    """Resize an image so that its shorter side has about `side` pixels, and both a whole number of patches.

    Args:
        image: uint8 [3, H, W].

    Returns:
        uint8 [3, rows * patch_size, columns * patch_size]
    """
    scale = side / min(image.shape[-2:])
    size = [max(round(length * scale / patch_size), 1) * patch_size for length in image.shape[-2:]]
    return TF.resize(image, size, TF.InterpolationMode.BICUBIC, antialias=True)


@torch.no_grad()
def cls_attention(backbone, image):
    """Return what CLS attends to in the last block: uint8 [3, H, W] -> [heads, rows, columns], summing to at most 1."""
    attention = backbone.get_last_selfattention(_batch(backbone, image))[0, :, 0, 1:]  # [heads, P]
    return attention.unflatten(1, (-1, image.shape[-1] // backbone.patch_embed.patch_size[1])).cpu().numpy()


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


@torch.no_grad()
def patch_features(backbone, image):
    """Return the patch tokens after the last norm: uint8 [3, H, W] -> [rows, columns, D]."""
    tokens = backbone.forward(_batch(backbone, image))[0, 1:]
    return tokens.unflatten(0, (-1, image.shape[-1] // backbone.patch_embed.patch_size[1])).cpu()


def _batch(backbone, image):
    return normalize(image[None].to(backbone.cls_token.device))


def principal_colours(features):
    """Turn patch features into colours: the first three principal components that all images have in common.

    Args:
        features: list of [rows, columns, D].

    Returns:
        (colours, explained): uint8 [rows, columns, 3] for each, the middle 98 % of a component's values spread over 0
        to 255; and the components' share of the variance, [3].
    """
    everything = torch.cat([f.flatten(0, 1) for f in features]).double()
    mean = everything.mean(0)
    covariance = (everything - mean).T @ (everything - mean) / len(everything)
    variance, axes = torch.linalg.eigh(covariance)
    axes, explained = axes[:, -3:].flip(1), variance[-3:].flip(0) / variance.sum().clamp(min=1e-12)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # an axis has no sign of its own
    projected = [(f.double() - mean) @ axes for f in features]
    low, high = np.quantile(torch.cat([p.flatten(0, 1) for p in projected]), (0.01, 0.99), axis=0)
    scaled = [((p.numpy() - low) / np.maximum(high - low, 1e-12)).clip(0, 1) for p in projected]
    return [(255 * s).round().astype(np.uint8) for s in scaled], explained.numpy()


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
    pictures = [to_picture(image) for image in images.values()]
    patch_size = backbone.patch_embed.patch_size[0]
    figure = figures.draw_attention(pictures, attentions, masks, list(images), patch_size, args.threshold)
    return figure, f"attention of {len(attentions[0]) - 1} heads on {', '.join(images)}"


def features(args, backbone, made_with, img_size):
    images = open_images(args.images, args.max_images, args.image_size or 2 * img_size, backbone)
    tokens = [patch_features(backbone, image) for image in images.values()]
    count = sum(f.shape[0] * f.shape[1] for f in tokens)
    if count < 4:
        raise UserError(f"found {count} patches, expected at least 4: give a larger --image_size, or more images")
    colours, explained = principal_colours(tokens)
    pictures = [to_picture(image) for image in images.values()]
    patch_size = backbone.patch_embed.patch_size[0]
    figure = figures.draw_features(pictures, colours, list(images), patch_size, explained)
    return figure, f"patch features of {', '.join(images)}"


def matches(args, backbone, made_with, img_size):
    patch_size = backbone.patch_embed.patch_size[0]
    sizes = [args.global_crops_size or img_size, args.local_crops_size or made_with.get("local_crops_size", 96)]
    for name, size in zip(("global", "local"), sizes, strict=True):
        if size % patch_size:
            raise UserError(f"--{name}_crops_size {size} is not a multiple of the patches of {patch_size} pixels")
    scales = [made_with.get("global_crops_scale", (0.4, 1.0)), made_with.get("local_crops_scale", (0.05, 0.4))]
    grid_a, grid_b = ((size // patch_size,) * 2 for size in sizes)
    image = open_image(find_image(args.image), patch_size)
    flip_prob = made_with.get("flip_prob", 0.5)
    multi_crop = MultiCrop(*sizes, *scales, 1, flip_prob, geometry="image", seed=args.seed)

    same, near, matched, drawn = 0, 0, 0, None
    for pair in range(args.pairs):
        teacher, _, student = multi_crop([image], [0], epoch=pair, step=0)
        crops, boxes, flips = ([getattr(view, name)[0] for view in (teacher, student)] for name in View._fields)
        idx_a, idx_b = match_patches(boxes[0], flips[0], grid_a, boxes[1], flips[1], grid_b, args.matching)
        idx_a, idx_b = idx_a[1:], idx_b[1:]  # without CLS
        found_a = nearest_tokens(*(patch_features(backbone, crop) for crop in crops), idx_b)
        agrees, touches = agreement(idx_a, found_a, grid_a[1])
        if drawn is None:
            drawn = (crops, boxes, flips, idx_a, idx_b, found_a, agrees, touches)
        same, near, matched = same + int(agrees.sum()), near + int(touches.sum()), matched + len(idx_a)
    crops, boxes, flips, *tokens = drawn
    crops, boxes = [to_picture(crop) for crop in crops], [box.tolist() for box in boxes]
    figure = figures.draw_correspondences(to_picture(image), crops, boxes, flips, patch_size, *tokens)
    pairs = "one pair" if args.pairs == 1 else f"{args.pairs} pairs"
    text = f"{matched} matched patches in {pairs} of views"
    if matched:
        text += (
            f"; of these the features find {same / matched:.1%}, and {near / matched:.1%} within a patch "
            f"(by chance {1 / np.prod(grid_a):.1%})"
        )
    return figure, text


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
    pictures = [to_picture(to_uint8(read_image(path))) for path in (query, *shown)]
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
    pictures = [to_picture(image) for image in images.values()]
    figure = figures.draw_patch_neighbours(pictures, similarities, patch, nearest, names, patch_size)
    lines = [f"{similarities[i][row, col]:.3f}  row {row}, column {col} of {names[i]}" for i, row, col in nearest]
    return figure, "\n".join(lines)


def map_of_images(args, backbone, made_with, img_size):
    from sklearn.manifold import TSNE  # takes a second

    data = (args.dataset, args.data_path, args.split, eval_transform(img_size), args.classes, args.download)
    dataset = build_dataset(*data)
    labels, classes = np.array(dataset.labels), dataset.classes
    if labels.min() < 0 or len(set(labels.tolist())) < 2:
        found = "images outside of them" if labels.min() < 0 else "one"
        raise UserError(f"{args.data_path} has no labels: expected at least two class subfolders, found {found}")
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


def open_images(names, most, side, backbone):
    """Read images, resized by `whole_patches`: {name: uint8 [3, H, W]}.

    Args:
        names: files, folders, and some of PHOTOGRAPHS.
        most: how many, the first ones.
        side: of the shorter side in pixels.
    """
    evaluation.check_image_side(side, backbone)
    patch_size = backbone.patch_embed.patch_size[0]
    paths = find_images(names)
    if len(paths) > most:
        utils.warn(f"{len(paths)} images were given, the first {most} are drawn: see --max_images")
    images = {}
    for path in paths[:most]:
        name = utils.printable(path.stem)
        name = name if name not in images else f"{name} ({len(images) + 1})"
        images[name] = whole_patches(open_image(path, patch_size), side, patch_size)
        rows, columns = (length // patch_size for length in images[name].shape[-2:])
        if rows * columns > MOST_PATCHES:
            found = f"{name} has {rows}x{columns} patches, more than {MOST_PATCHES}"
            raise UserError(f"{found}, at --image_size {side}: give a smaller one")
    return images


def find_images(names):
    """Return the paths of images: of files, of all that are in folders, and of PHOTOGRAPHS by their names."""
    paths = [photograph(name) if name in PHOTOGRAPHS and not Path(name).exists() else Path(name) for name in names]
    return [path for found in paths for path in (listed_images(found) if found.is_dir() else [found])]


def find_image(name):
    """Return the path of a single image, see `find_images`."""
    if Path(name).is_dir():
        raise UserError(f"{name} is a folder, expected an image")
    return find_images([name])[0]


def open_image(path, patch_size):
    """Read an image as uint8 [3, H, W].

    Raises:
        UserError: it cannot be read, or is smaller than a patch.
    """
    image = to_uint8(read_image(path))
    if min(image.shape[-2:]) < patch_size:
        height, width = image.shape[-2:]
        raise UserError(f"{path} has {width}x{height} pixels, smaller than a patch of {patch_size}x{patch_size}")
    return image


def parse_arguments(argv=None):
    parser = utils.ArgumentParser(description=__doc__.splitlines()[0], epilog="COMMAND --help lists its options.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    natural = number(int, 1)

    def command(name, draw, text):
        sub = commands.add_parser(name, help=text, description=f"Draw {text}.")
        sub.set_defaults(draw=draw)
        evaluation.add_model_arguments(sub)
        group = sub.add_argument_group("output")
        output = {"nargs": "+", "default": [f"{name}.png"], "metavar": "FILE"}
        group.add_argument("--output", **output, help="files to write, PNG or PDF")
        return sub.add_argument_group("method").add_argument, sub

    def images(sub, query=False):
        add = sub.add_argument_group("images").add_argument
        if query:
            add("query", metavar="QUERY", help="image to start from")
        text = "files, folders, or photographs that scikit-learn and scikit-image ship"
        both = [] if query else ["china", "flower"]
        add("images", nargs="*", default=both, metavar="IMAGE", help=text)
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

    add_method, sub = command("matches", matches, "the matches of two views, by geometry and by learned features")
    text = "a file, or a photograph that scikit-learn or scikit-image ships"
    sub.add_argument_group("images").add_argument("image", nargs="?", default="china", metavar="IMAGE", help=text)
    add_method("--matching", choices=RULES, default="paper", help="how geometry matches patches, see patch_matching.py")
    for name, whose in (("global", "teacher"), ("local", "student")):
        text = f"side of the {whose}'s crop in pixels; default: the pretraining's"
        add_method(f"--{name}_crops_size", type=natural, help=text)
    add_method("--pairs", type=natural, default=1, help="of views, to measure the agreement on; the first is drawn")
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
    model = (args.pretrained_weights, args.arch, args.patch_size, args.checkpoint_key)
    backbone, made_with, img_size = evaluation.open_model(*model, args.seed, getattr(args, "crop_size", None))
    backbone.to("cuda" if torch.cuda.is_available() else "cpu")
    figure, text = args.draw(args, backbone, made_with, img_size)
    for path in args.output:
        figures.save(figure, path)
    print(f"{text}\ndrawn in {', '.join(map(str, args.output))}", flush=True)


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
