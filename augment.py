"""Views: random crops and flips that return their coordinates, and DINO's photometric distortion.

Images and crops are uint8 RGB arrays [height, width, 3] inside the data-loading process. `MultiCrop` returns tensors
[B, 3, S, S]. The box of a crop is (top, left, height, width) in pixels of the image. The distortion is drawn in the
data-loading process, and applied there by `distort`, or later, to the views of a batch at once, by `distort_batch`.

Every random number is a function of its key: (seed, epoch, sample index) for what is drawn per image, (seed, global
step, rank) for what a batch shares. The number of data-loading workers and earlier draws have no influence.

Differences from DINO's pipeline, which works on PIL images:

- Blur is an exact Gaussian. Pillow's GaussianBlur approximates it with box filters and blurs more at small σ. For one
  photograph at σ = 0.3, the variance of the Laplacian is 5,624 before, 5,449 after ours and 3,795 after Pillow's blur.
- In pretraining, images are rotated according to their EXIF orientation (see support.decoding.read_image), so that the
  network sees photographs upright. DINO ignores the tag, and so do the evaluations, which follow DINO's protocol.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F

Range = tuple[float, float]
Box = tuple[int, int, int, int]  # top, left, height, width in pixels of the image
Images = Sequence[np.ndarray] | np.ndarray
Rng = np.random.Generator
Distort = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]  # `distort_batch`, maybe compiled
MAX_SIGMA = 2.0  # of the blur, in pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for pixel values in [0, 1]

# One random stream per purpose: drawing more numbers from one stream does not shift the others.
_BATCH_GEOMETRY, _IMAGE_GEOMETRY, _PHOTOMETRY, _PATCHES = range(4)


class View(NamedTuple):
    """One crop of every image in a batch. G is 1 if the batch shares its geometry, B otherwise."""

    pixels: torch.Tensor  # uint8 [B, 3, S, S]
    boxes: np.ndarray  # int64 [G, 4]: top, left, height, width
    flips: np.ndarray  # bool [G]
    parameters: np.ndarray | None  # float32 [B, 38], of the distortion that the pixels are to get; None if they have it
    patches: np.ndarray | None  # float32 [B, P, 21], the same for patch augmentation; None without it


@dataclass(frozen=True)
class RandomResizedCrop:
    """torchvision's RandomResizedCrop in two steps: matching needs the box, and a batch may share it (section 4.1.2).

    Args:
        size: side of the square crop after resizing, in pixels.
        scale: (low, high), area of the box as a fraction of the image area, drawn uniformly.
        ratio: (low, high), width of the box divided by its height, drawn log-uniformly.
    """

    size: int
    scale: Range
    ratio: Range = (3 / 4, 4 / 3)

    def draw_box(self, rng: Rng, height: int, width: int) -> Box:
        """Draw a box in an image of height × width pixels.

        After ten boxes that do not fit into the image, return the largest central box with an allowed aspect ratio.
        """
        for _ in range(10):
            area = height * width * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
        h, w = min(height, round(width / self.ratio[0])), min(width, round(height * self.ratio[1]))
        return (height - h) // 2, (width - w) // 2, h, w


def resize(image: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """Resize an image with antialiasing.

    Args:
        image: uint8 [H, W, 3].
        size: (height, width) in pixels.
        mode: "bilinear" or "bicubic".

    Returns:
        uint8 [height, width, 3]
    """
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)  # channels last, for which F.interpolate is fastest
    return F.interpolate(pixels, size, mode=mode, antialias=True).permute(0, 2, 3, 1).numpy()[0]


def crop_and_resize(image: np.ndarray, box: Sequence[int], size: int) -> np.ndarray:
    """Crop a box from a uint8 image [H, W, 3] and resize it to [size, size, 3] (bicubic, antialiased)."""
    top, left, height, width = box
    return resize(image[top : top + height, left : left + width], (size, size), "bicubic")


class Distortion(NamedTuple):
    """The photometric distortion of one view of one image."""

    jitter: tuple[float, float, float, float, np.ndarray] | None  # arguments of `color_jitter`
    grayscale: bool
    sigma: float  # of the blur, in pixels; 0: no blur
    solarize: bool


def draw_distortion(rng: Rng, blur_prob: float, solarize_prob: float, strength: float = 1.0) -> Distortion:
    """Draw DINO's photometric distortion.

    Color jitter (brightness 0.4, contrast 0.4, saturation 0.2, hue 0.1, in random order) with probability 0.8,
    grayscale with probability 0.2, Gaussian blur with σ from 0.1 to 2 pixels, solarization with threshold 128.

    Args:
        rng: random generator.
        blur_prob, solarize_prob: probabilities of blur and solarization, which differ between views.
        strength: in [0, 1], scales the four amounts of jitter and the probabilities of grayscale, blur and
            solarization. Not in the paper or in DINO, which have 1.
    """
    jitter = None
    if rng.random() < 0.8 and strength > 0:  # even a hue rotation by 0 rounds colors
        brightness, contrast, saturation = (
            rng.uniform(1 - strength * amount, 1 + strength * amount) for amount in (0.4, 0.4, 0.2)
        )
        hue = rng.uniform(-0.1 * strength, 0.1 * strength)
        jitter = brightness, contrast, saturation, hue, rng.permutation(4)
    grayscale = rng.random() < 0.2 * strength
    sigma = rng.uniform(0.1, MAX_SIGMA) if rng.random() < blur_prob * strength else 0.0
    return Distortion(jitter, grayscale, sigma, solarize=rng.random() < solarize_prob * strength)


def distort(image: np.ndarray, drawn: Distortion) -> np.ndarray:
    """Apply a photometric distortion to one image, uint8 [height, width, 3]."""
    if drawn.jitter:
        image = color_jitter(image, *drawn.jitter)
    if drawn.grayscale:
        image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if drawn.sigma:
        kernel = _blur_kernel(drawn.sigma)
        image = cv2.sepFilter2D(image, -1, kernel, kernel)  # twice as fast as GaussianBlur
    if drawn.solarize:
        image = cv2.LUT(image, _SOLARIZED)
    return image


def color_jitter(
    image: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float, order: Iterable[int]
) -> np.ndarray:
    """Jitter the colors of a uint8 image [height, width, 3] as torchvision's ColorJitter does.

    Args:
        brightness, contrast, saturation: factors; 1 keeps the image.
        hue: rotation of the color circle in turns, in [-0.5, 0.5].
        order: order of the four operations: 0 brightness, 1 contrast, 2 saturation, 3 hue.
    """
    for operation in order:
        if operation == 0:
            image = _mix_with_gray(image, brightness)
        elif operation == 1:  # mix with the mean gray level of the image
            gray = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
            image = _mix_with_gray(image, contrast, shift=(1 - contrast) * gray)
        elif operation == 2:  # mix each pixel with its gray level
            image = _mix_with_gray(image, saturation, 1 - saturation)
        else:
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
            shift = np.array([round(hue * 256) % 256, 0, 0], np.uint8)
            rows = hsv.reshape(len(hsv), -1)
            rows += np.tile(shift, hsv.shape[1])  # uint8 wraps around, as the color circle does
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    return image


_GRAY = 0.299, 0.587, 0.114  # weights of red, green and blue
_OWN, _TO_GRAY = np.eye(3, 4), np.tile((*_GRAY, 0.0), (3, 1))
_SOLARIZED = np.array([level if level < 128 else 255 - level for level in range(256)], np.uint8)


def _blur_kernel(sigma: float) -> np.ndarray:
    """Return a Gaussian kernel with radius ceil(3σ), float32 [length, 1]."""
    return cv2.getGaussianKernel(2 * math.ceil(3 * sigma) + 1, sigma, cv2.CV_32F)


def _mix_with_gray(image: np.ndarray, own: float, gray: float = 0.0, shift: float = 0.0) -> np.ndarray:
    """Return own * pixel + gray * (gray level) + shift, clipped to [0, 255] and truncated, as in torchvision."""
    matrix = own * _OWN + gray * _TO_GRAY
    matrix[:, 3] = shift - 0.499  # OpenCV rounds: subtract almost 0.5 to truncate
    return cv2.transform(image, matrix)


# `distort_batch` takes the same steps for all images: three mixes of colors, a rotation of the hue, three more mixes,
# that of grayscale, blur, solarization. What was not drawn has parameters that keep the image.
_MIXES, _BEFORE_HUE, _RADIUS = 7, 3, math.ceil(3 * MAX_SIGMA)
_ROW = (3 * _MIXES, 3, 2 * _RADIUS + 1, 1)  # number of parameters of mixes, hue, blur and solarization
ROW_LENGTH = sum(_ROW)


def distortion_row(drawn: Distortion) -> list[float]:
    """Return the parameters of `distort_batch` for one view of one image."""
    # A mix has the weights of a pixel, of its gray level, and of the mean gray level of its image.
    mixes, hue, place = [(1.0, 0.0, 0.0)] * _MIXES, 0.0, 0
    if drawn.jitter:
        brightness, contrast, saturation, hue, order = drawn.jitter
        of_operation = (brightness, 0.0, 0.0), (contrast, 0.0, 1 - contrast), (saturation, 1 - saturation, 0.0)
        for operation in order:
            if operation == 3:
                place = _BEFORE_HUE
            else:
                mixes[place] = of_operation[operation]
                place += 1
    if drawn.grayscale:
        mixes[-1] = (0.0, 1.0, 0.0)
    hues = [6 * hue + channel for channel in (5, 3, 1)]
    kernel = _blur_kernel(drawn.sigma)[:, 0].tolist() if drawn.sigma else [1.0]
    padding = [0.0] * (_RADIUS - len(kernel) // 2)
    return [*itertools.chain(*mixes), *hues, *padding, *kernel, *padding, 255.0 if drawn.solarize else 510.0]


def distort_batch(pixels: torch.Tensor, parameters: torch.Tensor, patches: torch.Tensor | None = None) -> torch.Tensor:
    """Apply `distort` to a view of many images at once, each with its own parameters, on any device.

    Colors are truncated to levels after each operation, as in torchvision. Results differ from those of `distort` by
    less than a level on average over a batch, mostly because OpenCV's hue has 256 steps.

    Args:
        pixels: uint8 [n, 3, S, S], of any layout in memory.
        parameters: float32 [n, 38], a `distortion_row` per image.
        patches: float32 [n, P, 21], the `patch_rows` of each image, for patch augmentation.

    Returns:
        uint8 [n, 3, S, S], contiguous
    """
    mixes, hues, kernels, top = parameters[..., None, None].split(_ROW, 1)
    levels = pixels.contiguous()
    for i in range(_MIXES):
        if i == _BEFORE_HUE:
            levels = _rotate_hue(levels, hues)
        levels = _mix_batch(levels, *mixes[:, 3 * i : 3 * i + 3].split(1, 1))
    blurred = _blur(levels, kernels)
    levels = torch.minimum(blurred, top - blurred).to(torch.uint8)  # 255 - level is the smaller one from 128 on
    return levels if patches is None else _distort_patches_of_batch(levels, patches)


def _mix_batch(levels: torch.Tensor, own: torch.Tensor, gray: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Mix pixels with their gray level and the mean gray level of the image, with weights [n, 1, 1, 1]."""
    red, green, blue = levels.split(1, 1)
    gray_levels = torch.add(torch.add(_GRAY[0] * red, green, alpha=_GRAY[1]), blue, alpha=_GRAY[2])
    shift = torch.addcmul(mean * gray_levels.mean((2, 3), keepdim=True), gray, gray_levels)
    return torch.addcmul(shift, own, levels).clamp_(0, 255).to(torch.uint8)


def _rotate_hue(levels: torch.Tensor, hues: torch.Tensor) -> torch.Tensor:
    """Rotate the hue in HSV by `hues` [n, 3, 1, 1], in sixths of a turn, plus 5, 3 and 1 for red, green and blue."""
    colors = levels * (255.999 / 255)  # as torchvision turns floats into levels
    (red, green, blue), value = colors.split(1, 1), colors.amax(1, keepdim=True)
    chroma = value - colors.amin(1, keepdim=True)
    of_green, of_blue = torch.add(blue - red, chroma, alpha=2), torch.add(red - green, chroma, alpha=4)
    hue = torch.where(value == red, green - blue, torch.where(value == green, of_green, of_blue))
    place = (hue / chroma.clamp(min=1) + hues).remainder_(6)
    share = torch.minimum(place, 4 - place).clamp_(0, 1)
    return torch.addcmul(value, chroma, share, value=-1).to(torch.uint8)


def _blur(levels: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """Blur with a kernel per image, [n, 13, 1, 1], mirroring the edges. Return whole levels as floats."""
    n, channels, side, _ = levels.shape
    index = _mirrored(side, _RADIUS, levels.device)
    weights = kernels[:, None, :, 0, 0].expand(-1, channels, -1).reshape(n * channels, 1, 1, -1)
    blurred = levels.float()
    for axis, kernel in ((3, weights), (2, weights.transpose(2, 3))):
        padded = blurred.index_select(axis, index).flatten(0, 1)[None]
        blurred = F.conv2d(padded, kernel, groups=n * channels).view(levels.shape)
    return blurred.round_()


def _mirrored(side: int, radius: int, device: torch.device) -> torch.Tensor:
    """Return the indices from -radius to side + radius - 1, mirrored at the first and at the last of `side` pixels."""
    period = max(2 * side - 2, 1)
    index = torch.arange(-radius, side + radius, device=device).abs_() % period
    return torch.minimum(index, period - index)


# Patch augmentation takes the same steps for all patches, and changes a patch at some of them: h, hue; m, brightness
# before or after it; p, posterization; s, sharpening; b, blur. The last three come before or after the jitter, in steps
# that contain all their orders.
_AROUND = "pspbpsp"
_STEPS = f"{_AROUND}mhm{_AROUND}"
_ORDERS = [*itertools.permutations("hpsb")]
_NUMBERS = {"p": 1, "s": 1, "b": 2, "m": 1, "h": 3}  # of each step in a row
PATCH_ROW_LENGTH = sum(_NUMBERS[step] for step in _STEPS)
_CHUNK = 128  # patches that are distorted at once, in memory that is small enough to be used again


def _places(order: Sequence[str]) -> list[bool]:
    """Return at which of _STEPS the operations of a patch take place, in their order."""
    last, taken = -1, [False] * len(_STEPS)
    for operation in order:
        last = _STEPS.index(operation, last + 1)
        taken[last] = True
    return taken


_PLACES = np.array([_places(order) for order in _ORDERS]).T  # [steps, orders]


class PatchDistortion(NamedTuple):
    """The photometric distortion of n patches, each with its own."""

    places: np.ndarray  # bool [steps, n], at which of _STEPS a patch is changed
    brightness: np.ndarray  # [n], factors
    hue: np.ndarray  # [n], in turns
    sigma: np.ndarray  # [n], of the blur, in pixels


def draw_patches(rng: Rng, number: int) -> PatchDistortion:
    """Draw the distortion of each of a number of patches, as the authors' later code does (arXiv 2310.18651v5).

    Color jitter (brightness 0.1, hue 0.1), blur with σ from 0.1 to 2 pixels, sharpness 2 with probability 0.5, and
    posterization to 3 bits with probability 0.5, in random order.
    """
    order, brightness_first, brightness, hue, sigma, sharpens, posterizes = rng.random((7, number))
    places = _PLACES[:, (len(_ORDERS) * order).astype(int)]
    first = len(_AROUND)
    places[first], places[first + 2] = brightness_first < 0.5, brightness_first >= 0.5
    for step, operation in enumerate(_STEPS):
        if operation in "sp":
            places[step] &= (sharpens if operation == "s" else posterizes) < 0.5
    return PatchDistortion(places, 0.9 + 0.2 * brightness, 0.2 * hue - 0.1, 0.1 + (MAX_SIGMA - 0.1) * sigma)


def _blur_weights(sigma: np.ndarray) -> np.ndarray:
    """Return the Gaussian weights of a pixel and of those at distance 1 and 2, [n, 3]."""
    weights = np.exp(-0.5 * (np.arange(3) / sigma[:, None]) ** 2)
    weights[weights < 1e-6] = 0  # products with numbers that are nearly 0 are slow
    return weights / (weights @ (1, 2, 2))[:, None]


@functools.cache
def _neighbours(side: int) -> np.ndarray:
    """Return matrices [3, side, side] that sum the rows of an image at distance 0, 1 and 2, mirroring the edges."""
    sums, mirrored = np.zeros((3, side, side), np.float32), np.pad(np.arange(side), 2, mode="reflect")
    for row, shift in itertools.product(range(side), range(-2, 3)):
        sums[abs(shift), row, mirrored[2 + row + shift]] += 1
    return sums


def distort_patches(patches: np.ndarray, drawn: PatchDistortion) -> None:
    """Distort patches in place, each on its own: blur and sharpness do not see beyond its edges.

    Args:
        patches: uint8 [n, side, side, 3], contiguous, of at least 3 pixels.
        drawn: the distortion of the n patches.
    """
    n, side = patches.shape[:2]
    rows = patches.reshape(n, side, 3 * side)
    weights, sums = _blur_weights(drawn.sigma).astype(np.float32), _neighbours(side).reshape(3, -1)
    factors = np.round(230 * drawn.brightness).astype(np.uint8)
    hues = np.zeros((n, 1, side, 3), np.uint8)
    hues[..., 0] = np.round(256 * drawn.hue).astype(np.int16)[:, None, None]
    floats, blurred = np.empty((2, min(n, _CHUNK), side, 3 * side), np.float32)  # allocated once
    for operation, place in zip(_STEPS, drawn.places, strict=True):
        (changed,) = place.nonzero()
        for start in range(0, len(changed), _CHUNK):
            own = changed[start : start + _CHUNK]
            levels = rows[own]
            line = levels.reshape(1, -1, 3)  # OpenCV is slow with short rows
            if operation == "p":
                levels &= 0b11100000
            elif operation == "s":  # 2 * pixel - smoothed, where smoothed = (9 * (mean of 3 by 3) + 4 * pixel) / 13
                wide = levels.swapaxes(0, 1).reshape(side, -1, 3)
                sharp = cv2.addWeighted(wide, 22 / 13, cv2.blur(wide, (3, 3)), -9 / 13, 0).reshape(side, -1, 3 * side)
                levels[:, 1:-1, 3:-3] = sharp[1:-1, :, 3:-3].swapaxes(0, 1)
            elif operation == "b":
                floats[: len(own)] = levels
                matrices = (weights[own] @ sums).reshape(-1, side, side)
                result = np.matmul(matrices, floats[: len(own)], out=blurred[: len(own)])
                levels = cv2.convertScaleAbs(result.reshape(1, -1)).reshape(levels.shape)  # rounds
            elif operation == "m":
                cv2.multiply(line, factors[own].repeat(3 * side**2).reshape(line.shape), line, 1 / 230)
            else:
                hsv = cv2.cvtColor(line, cv2.COLOR_RGB2HSV_FULL)
                hsv += hues[own].repeat(side, 1).reshape(line.shape)
                cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL, line)
            rows[own] = levels


def patch_rows(drawn: PatchDistortion) -> np.ndarray:
    """Return the parameters of `distort_batch` for n patches, float32 [n, 21]."""
    columns = []
    for operation, place in zip(_STEPS, drawn.places, strict=True):
        if operation == "p":
            columns.append(np.where(place, 0b11100000, 0b11111111))
        elif operation == "s":
            columns.append(place)
        elif operation == "b":
            columns += list((_blur_weights(drawn.sigma)[:, 1:] * place[:, None]).T)
        elif operation == "m":
            columns.append(np.where(place, drawn.brightness, 1))
        else:
            columns += [6 * drawn.hue * place + channel for channel in (5, 3, 1)]
    return np.stack(columns, 1).astype(np.float32)


def _distort_patches_of_batch(levels: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """Apply `distort_patches` to the patches of images, uint8 [n, 3, S, S], with their `patch_rows`, [n, P, 21]."""
    n, grid = len(levels), math.isqrt(parameters.shape[1])
    patches = levels.view(n, 3, grid, levels.shape[2] // grid, grid, -1)
    numbers = parameters.view(n, grid, grid, -1).permute(0, 3, 1, 2)[:, :, :, None, :, None]
    for operation, own in zip(_STEPS, numbers.split([_NUMBERS[step] for step in _STEPS], 1), strict=True):
        if operation == "p":
            patches = patches & own.to(torch.uint8)
        elif operation == "s":
            patches = _sharpen(patches, own)
        elif operation == "b":
            patches = _blur_rows(patches, *own.split(1, 1))
        elif operation == "m":
            patches = (patches * own).clamp_(max=255).to(torch.uint8)
        else:
            patches = _rotate_hue(patches, own)
    return patches.view(levels.shape)


def _sharpen(patches: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Double the difference between patches and their smoothed copies if `where` is 1, except at the edges."""
    levels = patches.float()
    columns = levels[..., :-2] + levels[..., 1:-1] + levels[..., 2:]
    sums = columns[:, :, :, :-2] + columns[:, :, :, 1:-1] + columns[:, :, :, 2:]
    inner = levels[:, :, :, 1:-1, :, 1:-1]
    change = where * (inner - torch.add(sums, inner, alpha=4).div_(13).round_())
    return F.pad(change, (1, 1, 0, 0, 1, 1)).add_(levels).clamp_(0, 255).to(torch.uint8)


def _blur_rows(patches: torch.Tensor, near: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
    """Blur the columns of patches with weights of the pixels at distance 1 and 2, mirroring the edges."""
    side = patches.shape[3]
    padded = patches.index_select(3, _mirrored(side, 2, patches.device)).float()
    above2, above, own, below, below2 = (padded.narrow(3, i, side) for i in range(5))
    blurred = torch.addcmul(own * (1 - 2 * near - 2 * far), near, above + below)
    return torch.addcmul(blurred, far, above2 + below2).round_().to(torch.uint8)


@functools.cache
def _mean_and_std(device: torch.device) -> list[torch.Tensor]:
    """Return MEAN and STD as tensors [3, 1, 1] for pixel values in [0, 255], copied to each device only once."""
    return [255 * torch.tensor(x, device=device)[:, None, None] for x in (MEAN, STD)]


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Convert uint8 pixels [..., 3, H, W] to float32, normalized by ImageNet's mean and standard deviation."""
    mean, std = _mean_and_std(pixels.device)
    return pixels.contiguous().float().sub_(mean).div_(std)


class _ViewSpec(NamedTuple):
    """How a view is made of an image. The views of a multi-crop differ in these."""

    crop: RandomResizedCrop
    blur_prob: float
    solarize_prob: float


@dataclass(frozen=True, kw_only=True)
class MultiCrop:
    """Cut a batch of images into two global and several local views (section 3.3; DINO's multi-crop).

    Args:
        global_size, local_size: side of the square views in pixels.
        global_scale, local_scale: (low, high), area of a crop as a fraction of the image area.
        local_number: number of local views.
        flip_prob: probability of a horizontal flip.
        geometry: "batch" draws each crop and flip once per batch, whose images must have one size (section 4.1.2);
            "image" draws them per image, as DINO does. Photometric distortion is always drawn per image.
        seed: seed of all random numbers.
        distortion: strength of the photometric distortion, see `draw_distortion`.
        patch_side: distort each patch of this side, see `draw_patches`; 0: do not.

    Raises:
        ValueError: the geometry is unknown.
    """

    global_size: int = 224
    local_size: int = 96
    global_scale: Range = (0.4, 1.0)
    local_scale: Range = (0.05, 0.4)
    local_number: int = 8
    flip_prob: float = 0.5
    geometry: str = "batch"
    seed: int = 0
    distortion: float = 1.0
    patch_side: int = 0

    def __post_init__(self) -> None:
        if self.geometry not in ("batch", "image"):
            raise ValueError(f"unknown geometry {self.geometry!r}, expected batch or image")

    def view_specs(self) -> list[_ViewSpec]:
        """Return how each view is made, the two global views first."""
        global_crop = RandomResizedCrop(self.global_size, self.global_scale)
        local_crop = RandomResizedCrop(self.local_size, self.local_scale)
        global_views = [_ViewSpec(global_crop, 1.0, 0.0), _ViewSpec(global_crop, 0.1, 0.2)]
        return global_views + [_ViewSpec(local_crop, 0.5, 0.0)] * self.local_number

    def buffers(self, batch_size: int) -> list[torch.Tensor]:
        """Return memory for the views, uint8 [V, B, S, S, 3]: of the two global ones, and of the local ones if any."""
        sizes = (2, self.global_size), (self.local_number, self.local_size)
        return [torch.empty(number, batch_size, side, side, 3, dtype=torch.uint8) for number, side in sizes if number]

    def __call__(
        self,
        images: Images,
        indices: Sequence[int],
        epoch: int,
        step: int,
        rank: int = 0,
        *,
        distorts: bool = True,
        buffers: Sequence[torch.Tensor] | None = None,
    ) -> list[View]:
        """Return the views of a batch, the two global views first.

        Args:
            images: B images, uint8 [H, W, 3] each.
            indices: B sample indices, the key of what is drawn per image.
            epoch: epoch from 0, also part of that key.
            step, rank: key of what the batch shares; `step` counts through all epochs.
            distorts: apply the photometric distortion. Otherwise the views have its parameters.
            buffers: where the pixels are written, see the method `buffers`.

        Raises:
            ValueError: geometry is "batch" and the images have several sizes.
        """
        photometry = [np.random.default_rng((_PHOTOMETRY, self.seed, epoch, i)) for i in indices]
        if self.geometry == "batch":
            sizes = {image.shape for image in images}
            if len(sizes) > 1:
                raise ValueError(
                    f"geometry batch needs images of one size, found {len(sizes)}: resize them or use geometry image"
                )
            geometry = [np.random.default_rng((_BATCH_GEOMETRY, self.seed, step, rank))]
        else:
            geometry = [np.random.default_rng((_IMAGE_GEOMETRY, self.seed, epoch, i)) for i in indices]
        outputs = [pixels for buffer in buffers or self.buffers(len(images)) for pixels in buffer.numpy()]
        views = [
            self._view(images, geometry, photometry, spec, distorts, pixels)
            for spec, pixels in zip(self.view_specs(), outputs, strict=True)
        ]
        if self.patch_side:
            rngs = [np.random.default_rng((_PATCHES, self.seed, epoch, i)) for i in indices]
            images_views = zip(*outputs, strict=True)  # the views of each image
            rows = [self._augment_patches(own, rng, distorts) for own, rng in zip(images_views, rngs, strict=True)]
            if not distorts:
                of_views = map(np.stack, zip(*rows, strict=True))
                views = [view._replace(patches=own) for view, own in zip(views, of_views, strict=True)]
        return views

    def _view(
        self,
        images: Images,
        geometry: list[Rng],
        photometry: list[Rng],
        spec: _ViewSpec,
        distorts: bool,
        pixels: np.ndarray,
    ) -> View:
        """Return one view of each image, with a generator of `geometry` for all or per image. Writes into `pixels`."""
        # With one generator, the first image stands for all.
        boxes = [spec.crop.draw_box(rng, *image.shape[:2]) for rng, image in zip(geometry, images, strict=False)]
        flips = [rng.random() < self.flip_prob for rng in geometry]  # RandomHorizontalFlip
        drawn = [draw_distortion(rng, spec.blur_prob, spec.solarize_prob, self.distortion) for rng in photometry]
        for i, image in enumerate(images):
            group = i % len(geometry)
            crop = crop_and_resize(image, boxes[group], spec.crop.size)
            crop = cv2.flip(crop, 1) if flips[group] else crop
            pixels[i] = distort(crop, drawn[i]) if distorts else crop
        parameters = None if distorts else np.array([distortion_row(one) for one in drawn], np.float32)
        return View(torch.from_numpy(pixels).permute(0, 3, 1, 2), np.array(boxes), np.array(flips), parameters, None)

    def _augment_patches(self, views: Sequence[np.ndarray], rng: Rng, distorts: bool) -> list[np.ndarray]:
        """Distort the patches of the views [S, S, 3] of one image, or return the `patch_rows` of each view."""
        side = self.patch_side
        grids = [len(view) // side for view in views]
        ends = np.cumsum([grid**2 for grid in grids])
        drawn = draw_patches(rng, ends[-1])
        if not distorts:
            return np.split(patch_rows(drawn), ends[:-1])
        cut = [view.reshape(grid, side, grid, side, 3).swapaxes(1, 2) for view, grid in zip(views, grids, strict=True)]
        patches = np.empty((ends[-1], side, side, 3), np.uint8)
        pairs = [(view, own.reshape(view.shape)) for view, own in zip(cut, np.split(patches, ends[:-1]), strict=True)]
        for view, own in pairs:
            own[:] = view
        distort_patches(patches, drawn)
        for view, own in pairs:
            view[:] = own
        return []
