"""Correspondence of two images: pairs with the true places of points, in three layouts, and the measures."""

import glob
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

from support.decoding import image_size
from support.files import read_json, read_text
from utils import UserError, first_line

PCK = (0.1, 0.05)  # tolerances of keypoints, as shares of the box's larger side


class Pair(NamedTuple):
    """Two images and points with their true places, [n, 2], each (x, y) as a share of its image's width and height.

    Attributes:
        size: of the second image in units of its box's larger side, (width, height); None for pairs without keypoints.
    """

    images: tuple[Path, Path]
    points: np.ndarray
    targets: np.ndarray
    size: np.ndarray | None = None


def keypoint_pairs(root: Path) -> list[Pair]:
    """Read the test pairs in SPair-71k's layout. Raises UserError as `read_pairs`."""
    pairs = []
    for path in sorted((root / "PairAnnotation/test").glob("*.json")):
        entry = read_json(path)
        try:
            source, target = (root / "JPEGImages" / entry["category"] / entry[f"{k}_imname"] for k in ("src", "trg"))
            points = [np.array(entry[f"{k}_kps"], float) for k in ("src", "trg")]
            left, top, right, bottom = map(float, entry["trg_bndbox"])
            if any(x.shape != (len(points[0]), 2) for x in points) or max(right - left, bottom - top) <= 0:
                raise ValueError
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"cannot read {path}: expected src_ and trg_imname, src_ and trg_kps, category and "
                            "trg_bndbox of SPair-71k") from error  # fmt: skip
        sizes = [np.array(image_size(image)) for image in (source, target)]
        for image, places, size in zip((source, target), points, sizes, strict=True):
            for x, y in places[~((places >= 0) & (places <= size)).all(1)]:
                inside = "expected all inside of its {}x{} pixels".format(*size)
                raise UserError(f"{path} has the keypoint {x:g}, {y:g} outside {image}: {inside}")
        of_box = sizes[1] / max(right - left, bottom - top)
        pairs.append(Pair((source, target), points[0] / sizes[0], points[1] / sizes[1], of_box))
    return pairs


def homography_pairs(root: Path, points: np.ndarray) -> list[Pair]:
    """Read pairs in HPatches' layout, with `points` of the first images. Raises UserError as `read_pairs`."""
    pairs = []
    for path in sorted(root.glob("*/H_1_[2-6]")):
        images = path.parent / "1.ppm", path.parent / f"{path.name[-1]}.ppm"
        try:
            matrix = np.array(read_text(path).split(), float).reshape(3, 3)
            if not np.isfinite(matrix).all() or np.linalg.det(matrix) == 0:
                raise ValueError
        except ValueError as error:
            raise UserError(f"cannot read {path}: expected an invertible matrix of 3 times 3 numbers") from error
        matrix *= np.sign(matrix[2, 2]) or 1  # so that the third coordinate is positive in front of the camera
        sizes = [np.array(image_size(image)) for image in images]
        # Pixels have their centers at whole numbers.
        warped = np.append(points * sizes[0] - 0.5, np.ones((len(points), 1)), 1) @ matrix.T
        front = warped[:, 2] > 0
        pairs.append(Pair(images, points[front], (warped[front, :2] / warped[front, 2:] + 0.5) / sizes[1]))
    return pairs


def stereo_pairs(root: Path, points: np.ndarray) -> list[Pair]:
    """Read the rectified pairs with a disparity, with `points` of the left images. Raises UserError as `read_pairs`."""
    pairs = []
    for path in sorted(root.glob("*disp.np[yz]")):
        left, right = (
            min(
                root.glob(f"{glob.escape(path.stem.removesuffix('disp'))}{side}.*"),
                default=path.with_name(f"{side}.png"),
            )
            for side in ("left", "right")
        )
        try:
            disparity = np.load(path, allow_pickle=False)
            disparity = disparity[disparity.files[0]] if path.suffix == ".npz" else disparity
            (width, height), _ = (image_size(image) for image in (left, right))
            if disparity.shape != (height, width):
                raise ValueError(f"found the shape {disparity.shape}")
            column, row = (points * [width, height]).astype(int).T
            shift = disparity[row, column].astype(float) / width
        except (OSError, EOFError, ValueError, TypeError, AttributeError, IndexError, BadZipFile) as error:
            raise UserError(f"cannot read {path}: {first_line(error)}; expected numbers [H, W] of {left}") from error
        known = np.isfinite(shift)
        pairs.append(Pair((left, right), points[known], points[known] - np.outer(shift[known], [1, 0])))
    return pairs


def read_pairs(root: Path, grid: int) -> list[Pair]:
    """Read pairs of images in one of three layouts, see docs/dense.md.

    Without keypoints, the points are the centers of grid × grid patches of the first image whose true places lie inside
    the second.

    Raises:
        UserError: the layout is another one, a file cannot be read, a keypoint lies outside its image, or no patch has
            a true place.
    """
    row, column = np.divmod(np.arange(grid**2), grid)
    centers = (np.stack([column, row], 1) + 0.5) / grid
    pairs = keypoint_pairs(root) or homography_pairs(root, centers) or stereo_pairs(root, centers)
    if not pairs:
        layouts = (
            "PairAnnotation/test/*.json and JPEGImages/CATEGORY/*.jpg, or SEQUENCE/1.ppm to 6.ppm and H_1_2 to H_1_6"
        )
        raise UserError(f"no pairs of images in {root}: expected {layouts}, or *_left.png, *_right.png and *_disp.npz")
    kept = []
    for pair in pairs:
        inside = ((pair.targets >= 0) & (pair.targets <= 1)).all(1)
        if inside.any():
            kept.append(pair._replace(points=pair.points[inside], targets=pair.targets[inside]))
    if not kept:
        raise UserError(f"no patch of the first images in {root} has its true place inside the second one")
    return kept


def hits_of(pair: Pair, found: np.ndarray, grid: int) -> dict[str, np.ndarray]:
    """Return which points are right by each measure, {name: bool [n]}.

    A point without keypoints is right if the patch found is the true one or one of the eight around it. A keypoint is
    right if the center of the patch found is as near in pixels of the second image as PCK says.

    Args:
        found: (column, row) of the patch that is found for each point, ints [n, 2], among grid × grid patches.
    """
    if pair.size is None:
        return {"within_one_patch": np.abs(found - patches_of(pair.targets, grid)).max(1) <= 1}
    error = np.linalg.norm(((found + 0.5) / grid - pair.targets) * pair.size, axis=1)
    return {f"pck_{tolerance}": error <= tolerance for tolerance in PCK}


def patches_of(points: np.ndarray, grid: int) -> np.ndarray:
    """Return the (column, row) of the patches that contain points, ints [n, 2]."""
    return (points * grid).astype(int).clip(max=grid - 1)
