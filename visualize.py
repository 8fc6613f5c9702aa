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
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Subset

from augment import MultiCrop, crop_and_resize, resize
from patch_matching import RULES, match_patches
from support import evaluation, features
from support.arguments import ArgumentParser, number
from support.decoding import read_image
from support.folders import listed_images
from support.images import ImageList
from support.sources import PHOTOGRAPHS, build_dataset, data_spec, photograph
from utils import UserError, printable, run_main, warn

MAX_PATCHES = 8000  # per image; the memory of attention grows with the square
MAX_DRAWN = 500  # images in the pages of one command
THUMBNAIL = 512  # longer side of nearest images, in pixels

# Views of `matches` if neither an option nor the pretraining defines them.
CROPS = {"global_crops_size": 224, "local_crops_size": 96}
CROPS |= {"global_crops_scale": (0.4, 1.0), "local_crops_scale": (0.05, 0.4)}


def whole_patches(image, side, patch_size) -> np.ndarray:
    """Resize an image to a shorter side of about `side` pixels, with both sides a whole number of patches.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        uint8 [rows * patch_size, columns * patch_size, 3]
    """
    rows, columns = patch_grid(image, side, patch_size)
    return resize(image[None], (rows * patch_size, columns * patch_size), "bicubic")[0]


def patch_grid(image, side, patch_size) -> tuple[int, int]:
    """Return (rows, columns) of patches of an image [H, W, 3] after `whole_patches`."""
    return tuple(max(round(length * side / min(image.shape[:2]) / patch_size), 1) for length in image.shape[:2])


def most_of(attention, share) -> np.ndarray:
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


def nearest_tokens(features_a, features_b, idx_b) -> torch.Tensor:
    """Return, for some patches of b, the patch of a with the nearest features by cosine.

    Args:
        features_a, features_b: [rows, columns, D].
        idx_b: LongTensor [n] of tokens; patch 1 is the first.

    Returns:
        LongTensor [n] of tokens of a
    """
    a, b = (F.normalize(f.flatten(0, 1), dim=1) for f in (features_a, features_b))
    return (b[idx_b - 1] @ a.T).argmax(1) + 1


def show_attention(args, backbone, made_with, img_size) -> tuple:
    """Draw the attention of the CLS token. Like each command, return (figures, text to print)."""
    from support import figures  # imports matplotlib, which --help does not need

    images = open_images(args.images, args, backbone, img_size)
    heads = [features.cls_attention(backbone, image) for image in images.values()]
    attentions = [np.concatenate([maps, maps.mean(0, keepdims=True)]) for maps in heads]
    masks = [most_of(maps, args.threshold) for maps in attentions]
    pages = figures.draw_attention(images, attentions, masks, patch_side(backbone), args.threshold)
    return pages, f"attention of {len(heads[0])} heads on {', '.join(images)}"


def show_features(args, backbone, made_with, img_size) -> tuple:
    """Draw the principal components of the patch features as colors."""
    from support import figures  # imports matplotlib, which --help does not need

    images = open_images(args.images, args, backbone, img_size)
    tokens = [features.patch_features(backbone, image) for image in images.values()]
    count = sum(f.shape[0] * f.shape[1] for f in tokens)
    if count < 4:
        raise UserError(f"found {count} patches, expected at least 4: give a larger --image_size or more images")
    colors, explained = features.principal_colors(tokens, list(images.values()))
    pages = figures.draw_features(images, colors, patch_side(backbone), explained)
    return pages, f"patch features of {', '.join(images)}"


def show_matches(args, backbone, made_with, img_size) -> tuple:
    """Draw the matches of two views by geometry and, given a network, by features."""
    from support import figures  # imports matplotlib, which --help does not need

    patch_size = patch_side(backbone) if backbone else args.patch_size or 16
    given = {name: value for name in CROPS if (value := getattr(args, name)) is not None}
    settings = {name: given.get(name, made_with.get(name, default)) for name, default in CROPS.items()}
    args.check_crops(Namespace(patch_size=patch_size, **settings))
    for name, most in (("global", MAX_PATCHES), ("local", figures.MAX_PAIRS)):
        count = (settings[f"{name}_crops_size"] // patch_size) ** 2
        if count > most:
            raise UserError(f"--{name}_crops_size {settings[f'{name}_crops_size']} has {count} patches, expected at "
                f"most {most}: give a smaller crop or a larger --patch_size")  # fmt: skip
    sizes = settings["global_crops_size"], settings["local_crops_size"]
    grid_a, grid_b = ((size // patch_size,) * 2 for size in sizes)
    image = open_image(find_image(args.image), patch_size)
    multi_crop = MultiCrop(
        global_size=settings["global_crops_size"],
        local_size=settings["local_crops_size"],
        global_scale=settings["global_crops_scale"],
        local_scale=settings["local_crops_scale"],
        local_number=1,
        flip_prob=made_with.get("flip_prob", 0.5),
        geometry="image",
        seed=args.seed,
    )

    num_matched, distances = 0, []
    for pair in range(args.pairs):
        teacher_view, _, student_view = multi_crop([image], [0], epoch=pair, step=0)
        views = (teacher_view, student_view)
        boxes, flips = [view.boxes[0].tolist() for view in views], [bool(view.flips[0]) for view in views]
        idx_a, idx_b = match_patches(boxes[0], flips[0], grid_a, boxes[1], flips[1], grid_b, args.matching)
        idx_a, idx_b = idx_a[1:], idx_b[1:]  # without CLS
        num_matched += len(idx_a)
        if backbone:
            crops = [figures.to_picture(view.pixels[0]) for view in views]
            found_a = nearest_tokens(*(features.patch_features(backbone, crop) for crop in crops), idx_b)
            distances.append(figures.patch_distance(found_a, idx_a, grid_a[1]))
        else:
            crops = [plain_crop(image, box, flip, size) for box, flip, size in zip(boxes, flips, sizes, strict=True)]
            found_a = None
        if pair == 0:
            figure = figures.draw_matches(image, crops, boxes, flips, patch_size, idx_a, idx_b, found_a)
    text = f"{num_matched} matched patches in {'one pair' if args.pairs == 1 else f'{args.pairs} pairs'} of views"
    if backbone and num_matched:
        distance = np.concatenate(distances)
        text += f"; nearest features: {(distance == 0).mean():.1%} on the same patch "
        text += f"(chance {1 / np.prod(grid_a):.1%}), {(distance <= 1).mean():.1%} within one patch"
    return [figure], text


def plain_crop(image, box, flip, size) -> np.ndarray:
    """Return a view without color distortion: uint8 [H, W, 3] -> [size, size, 3]."""
    crop = crop_and_resize(image[None], box, size)[0]
    return crop[:, ::-1] if flip else crop


def show_neighbours(args, backbone, made_with, img_size) -> tuple:
    """Draw the images nearest to a query, or with --patch the nearest patches."""
    from support import figures  # imports matplotlib, which --help does not need

    query = find_image(args.query)
    if args.patch:
        return show_patch_neighbours(args, query, backbone, img_size)
    paths = [path for path in find_images(args.images) if path.resolve() != query.resolve()]
    if not paths:
        raise UserError(f"found no image to compare {query} with: give a folder or more images")
    open_image(query, patch_side(backbone))
    cls = cls_features(backbone, ImageList([query, *paths], features.eval_transform(img_size)), args.num_workers)
    similarity, nearest = (cls[1:] @ cls[0]).topk(min(args.k, len(paths)))
    similarity, chosen = similarity.tolist(), [paths[i] for i in nearest.tolist()]
    pictures = [read_image(path) for path in (query, *chosen)]
    for picture in pictures:
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
    names = [f"{path.parent.name}/{path.stem}" for path in chosen]
    lines = [f"{s:.3f}  {printable(path)}" for s, path in zip(similarity, chosen, strict=True)]
    return figures.draw_image_neighbours(list(map(np.array, pictures)), similarity, names), "\n".join(lines)


def show_patch_neighbours(args, query, backbone, img_size) -> tuple:
    """Draw the patches nearest to the patch at a point of the query, in the query and in the other images."""
    from support import figures  # imports matplotlib, which --help does not need

    images = open_images([query, *args.images], args, backbone, img_size)
    width, height = read_image(query).size
    x, y = args.patch
    if not (x < width and y < height):
        raise UserError(f"--patch {x} {y} lies outside {query}, which has {width}x{height} pixels")
    tokens = [F.normalize(features.patch_features(backbone, image), dim=-1) for image in images.values()]
    rows, columns = tokens[0].shape[:2]
    patch = y * rows // height, x * columns // width
    similarities = [(t @ tokens[0][patch]).numpy() for t in tokens]

    places = [(i, row, column) for i, s in enumerate(similarities) for row, column in np.ndindex(s.shape)]
    places.remove((0, *patch))
    places.sort(key=lambda place: -similarities[place[0]][place[1:]])
    nearest, names = places[: args.k], list(images)
    pages = figures.draw_patch_neighbours(images, similarities, patch, nearest, patch_side(backbone))
    lines = [f"{similarities[i][row, col]:.3f}  row {row}, column {col} of {names[i]}" for i, row, col in nearest]
    return pages, "\n".join(lines)


def show_map(args, backbone, made_with, img_size) -> tuple:
    """Draw a map of a labeled data set, by t-SNE."""
    from sklearn.manifold import TSNE  # takes a second

    from support import figures  # imports matplotlib, which --help does not need

    transform = features.eval_transform(img_size)
    dataset = build_dataset(data_spec(args, made_with), args.split, transform)
    labels, classes = np.array(dataset.labels), dataset.classes
    if labels.min() < 0 or len(set(labels.tolist())) < 2:
        problem = "images outside of class subfolders" if labels.min() < 0 else "one"
        raise UserError(f"{args.data_path} has no labels: expected at least two class subfolders, found {problem}")
    if len(labels) < 4:
        raise UserError(f"{args.data_path} has {len(labels)} images, expected at least 4")
    if len(labels) > args.max_images:
        chosen = np.sort(np.random.default_rng(args.seed).choice(len(labels), args.max_images, replace=False))
        dataset, labels = Subset(dataset, chosen.tolist()), labels[chosen]
    cls = cls_features(backbone, dataset, args.num_workers)
    if cls.std(0).max() < 1e-6:
        raise UserError(f"the CLS features of all {len(labels)} images are the same: expected images that differ")
    perplexity = min(args.perplexity, (len(labels) - 1) / 3)
    points = TSNE(perplexity=perplexity, random_state=args.seed, init="pca").fit_transform(cls.numpy())
    title = f"t-SNE of the CLS features of {len(labels)} images of {len(set(labels.tolist()))} classes"
    return [figures.draw_map(points, labels, classes, title)], title


def cls_features(backbone, dataset, num_workers) -> torch.Tensor:
    """Return the L2-normalized CLS features [n, D] of a data set."""
    device = backbone.cls_token.device
    return features.extract_features(features.normalized_cls(backbone), dataset, device, num_workers=num_workers)


def patch_side(backbone) -> int:
    """Return the side of a network's patches in pixels."""
    return backbone.patch_embed.patch_size[0]


def open_images(names, args, backbone, img_size) -> dict:
    """Read images, resized by `whole_patches` to --image_size or twice `img_size`.

    Args:
        names: see `find_images`. Images beyond --max_images are skipped with a warning.

    Returns:
        {name: uint8 [H, W, 3]}

    Raises:
        UserError: an image cannot be read, is smaller than a patch, or has more than MAX_PATCHES patches.
    """
    side, patch_size = args.image_size or 2 * img_size, patch_side(backbone)
    evaluation.check_image_side(side, backbone)
    paths = find_images(names)
    if len(paths) > args.max_images:
        warn(f"found {len(paths)} images, drawing the first {args.max_images}: see --max_images")
    images = {}
    for path in paths[: args.max_images]:
        name, image = printable(path.stem), open_image(path, patch_size)
        rows, columns = patch_grid(image, side, patch_size)
        if rows * columns > MAX_PATCHES:
            found = f"{name} has {rows}x{columns} patches, more than {MAX_PATCHES}, at --image_size {side}"
            raise UserError(f"{found}: give a smaller --image_size")
        while name in images:
            name += f" ({len(images) + 1})"
        images[name] = whole_patches(image, side, patch_size)
    return images


def find_images(names) -> list:
    """Return the paths of images, given files, folders (all their images), and names of PHOTOGRAPHS."""
    paths = [photograph(name) if name in PHOTOGRAPHS and not Path(name).exists() else Path(name) for name in names]
    return [image for path in paths for image in (listed_images(path) if path.is_dir() else [path])]


def find_image(name) -> Path:
    """Return the path of one image, see `find_images`. A folder raises UserError."""
    if Path(name).is_dir():
        raise UserError(f"{name} is a folder, expected an image")
    return find_images([name])[0]


def open_image(path, patch_size) -> np.ndarray:
    """Read an image as uint8 [H, W, 3].

    Raises:
        UserError: the image cannot be read, or is smaller than a patch.
    """
    image = np.array(read_image(path))
    height, width = image.shape[:2]
    if min(height, width) < patch_size:
        raise UserError(f"{path} has {width}x{height} pixels, smaller than a patch of {patch_size}x{patch_size}")
    return image


def parse_arguments(argv=None) -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog="COMMAND --help lists its options.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    natural = number(int, 1)

    def command(draw, name, text, seeded="", weights_required=True):
        """Add a command and return it and its group "method"."""
        sub = commands.add_parser(name, help=text, description=f"Draw {text}.")
        sub.set_defaults(draw=draw, check_crops=sub.check_crops)
        evaluation.add_model_arguments(sub, required=weights_required)
        add = sub.add_argument_group("output").add_argument
        add(
            "--output",
            nargs="+",
            default=[f"{name}.png"],
            metavar="FILE",
            help="files to write, PNG or PDF; page 2 is FILE-2.png",
        )
        add = sub.add_argument_group("method").add_argument
        add("--seed", type=number(int, 0, 2**32 - 1), default=0, help=f"seed of {seeded}a random network")
        return sub, add

    def images(sub, query=False):
        add = sub.add_argument_group("images").add_argument
        if query:
            add("query", metavar="QUERY", help="query image")
        default, text = [] if query else ["china", "flower"], "files, folders, or photographs of scikit-learn or -image"
        add("images", nargs="*", default=default, metavar="IMAGE", help=text)
        add("--image_size", type=natural, help="shorter side in pixels; default: twice the pretraining's, or 448")
        add("--max_images", type=number(int, 1, MAX_DRAWN), default=8, help="number of images to draw, the first ones")

    sub, add = command(show_attention, "attention", "the attention of the CLS token, head by head")
    add("--threshold", type=number(float, 0, 1), default=0.6, help="share of the attention in the bright patches")
    images(sub)

    sub, _ = command(show_features, "features", "the principal components of the patch features as colors")
    images(sub)

    text = "the matches of two views, by geometry and, given weights, by learned features"
    sub, add = command(show_matches, "matches", text, "boxes and flips, and of ", weights_required=False)
    sub.description += " Without --pretrained_weights no network is built and the views are plain crops and flips."
    sub.description += " With --pretrained_weights the views have the training's color distortion."
    text = "file, or name of a photograph of scikit-learn or scikit-image"
    sub.add_argument_group("images").add_argument("image", nargs="?", default="china", metavar="IMAGE", help=text)
    add("--matching", choices=RULES, default="paper", help="how geometry matches patches, see patch_matching.py")
    for name, whose in (("global", "teacher"), ("local", "student")):
        size, (low, high) = CROPS[f"{name}_crops_size"], CROPS[f"{name}_crops_scale"]
        default, scale = "default: the pretraining's, or", {"type": number(float, 1e-6, 1), "nargs": 2}
        add(f"--{name}_crops_size", type=natural, help=f"side of the {whose}'s crop in pixels; {default} {size}")
        text = f"area of the {whose}'s crop as a fraction of the image; {default} {low} {high}"
        add(f"--{name}_crops_scale", metavar=("LOW", "HIGH"), help=text, **scale)
    add("--pairs", type=natural, default=1, help="number of pairs of views whose matches are counted; draws the first")

    sub, add_nearest = command(show_neighbours, "neighbours", "the nearest images, or the nearest patches")
    images(sub, query=True)
    add_nearest("--k", type=number(int, 1, MAX_DRAWN), default=5, help="number of neighbours")
    point = {"type": number(int, 0), "nargs": 2, "metavar": ("X", "Y")}
    add_nearest("--patch", help="point of the query in pixels: draw the patches nearest to the one there", **point)

    text = "a map of labeled images, by t-SNE of their CLS features"
    sub, add_map = command(show_map, "map", text, "t-SNE, of the sampling of images, and of ")
    add = evaluation.add_data_arguments(sub)
    add("--split", choices=("train", "val"), default="val", help="part of the data set to draw")
    add_map("--max_images", type=natural, default=2000, help="number of images to draw, sampled at random")
    add_map("--perplexity", type=number(float, 1), default=30.0, help="perplexity of t-SNE")
    for add in (add_nearest, add_map):
        add("--num_workers", type=number(int, 0, 1000), default=2, help="data-loading processes")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_arguments(argv)
    from support import figures  # as above

    for path in args.output:
        figures.check_output(path)
    backbone, made_with, img_size = None, {}, None
    if args.pretrained_weights is not None:
        crop_size = getattr(args, "crop_size", None)
        backbone, made_with, img_size = evaluation.open_model(evaluation.model_spec(args), crop_size)
        backbone.to("cuda" if torch.cuda.is_available() else "cpu")
    pages, text = args.draw(args, backbone, made_with, img_size)
    written = [printable(file) for path in args.output for file in figures.save(pages, path)]
    print(f"{text}\ndrawn in {', '.join(written)}", flush=True)


if __name__ == "__main__":
    run_main(main)
