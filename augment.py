"""Views: random crops and flips that return their coordinates, and DINO's photometric distortion.

Images and crops are uint8 RGB arrays [height, width, 3] inside the data-loading process. `MultiCrop` returns tensors
[B, 3, S, S]. The box of a crop is (top, left, height, width) in pixels of the image.

Every random number is a function of its key: (seed, epoch, sample index) for what is drawn per image, (seed, global
step, rank) for what a batch shares. The number of data-loading workers and earlier draws have no influence.

Differences from DINO's pipeline, which works on PIL images:

- Blur is an exact Gaussian. Pillow's GaussianBlur approximates it with box filters and blurs more at small σ. For one
  photograph at σ = 0.3, the variance of the Laplacian is 5,624 before, 5,449 after ours and 3,795 after Pillow's blur.
- In pretraining, images are rotated according to their EXIF orientation (see support.decoding.read_image), so that the
  network sees photographs upright. DINO ignores the tag, and so do the evaluations, which follow DINO's protocol.
"""

import functools
import math
from collections.abc import Iterable, Sequence
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
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for pixel values in [0, 1]

# One random stream per purpose: drawing more numbers from one stream does not shift the others.
_BATCH_GEOMETRY, _IMAGE_GEOMETRY, _PHOTOMETRY = range(3)


class View(NamedTuple):
    """One crop of every image in a batch. G is 1 if the batch shares its geometry, B otherwise."""

    pixels: torch.Tensor  # uint8 [B, 3, S, S]
    boxes: np.ndarray  # int64 [G, 4]: top, left, height, width
    flips: np.ndarray  # bool [G]


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

    def cut(self, images: np.ndarray, box: Box) -> np.ndarray:
        """Cut a box out of uint8 images [B, H, W, 3] and resize it to [B, size, size, 3]."""
        return crop_and_resize(images, box, self.size)


def resize(images: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """Resize images with antialiasing.

    Args:
        images: uint8 [B, H, W, 3].
        size: (height, width) in pixels.
        mode: "bilinear" or "bicubic".

    Returns:
        uint8 [B, height, width, 3]
    """
    # F.interpolate is fastest with channels last, which it does not recognize in NumPy's image[None], whose first
    # stride is 0.
    pixels = torch.from_numpy(images[0])[None] if len(images) == 1 else torch.from_numpy(images)
    return F.interpolate(pixels.permute(0, 3, 1, 2), size, mode=mode, antialias=True).permute(0, 2, 3, 1).numpy()


def crop_and_resize(images: np.ndarray, box: Sequence[int], size: int) -> np.ndarray:
    """Crop a box from uint8 images [B, H, W, 3] and resize it to [B, size, size, 3] (bicubic, antialiased)."""
    top, left, height, width = box
    return resize(images[:, top : top + height, left : left + width], (size, size), "bicubic")


def distort(rng: Rng, image: np.ndarray, blur_prob: float, solarize_prob: float, strength: float = 1.0) -> np.ndarray:
    """Apply DINO's photometric distortion to one image, uint8 [height, width, 3].

    Color jitter (brightness 0.4, contrast 0.4, saturation 0.2, hue 0.1, in random order) with probability 0.8,
    grayscale with probability 0.2, Gaussian blur with σ from 0.1 to 2 pixels, solarization with threshold 128.

    Args:
        rng: random generator.
        blur_prob, solarize_prob: probabilities of blur and solarization, which differ between views.
        strength: in [0, 1], scales the four amounts of jitter and the probabilities of grayscale, blur and
            solarization. Not in the paper or in DINO, which have 1.
    """
    if rng.random() < 0.8 and strength > 0:  # even a hue rotation by 0 rounds colors
        amounts = strength * np.array((0.4, 0.4, 0.2))
        brightness, contrast, saturation = rng.uniform(1 - amounts, 1 + amounts)
        hue = rng.uniform(-0.1 * strength, 0.1 * strength)
        image = color_jitter(image, brightness, contrast, saturation, hue, rng.permutation(4))
    if rng.random() < 0.2 * strength:
        image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if rng.random() < blur_prob * strength:
        sigma = rng.uniform(0.1, 2.0)
        kernel = cv2.getGaussianKernel(2 * math.ceil(3 * sigma) + 1, sigma, cv2.CV_32F)
        image = cv2.sepFilter2D(image, -1, kernel, kernel)  # twice as fast as GaussianBlur
    if rng.random() < solarize_prob * strength:
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
            image = _mix_channels(image, brightness * np.eye(3))
        elif operation == 1:  # mix with the mean gray level of the image
            gray = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
            image = _mix_channels(image, contrast * np.eye(3), (1 - contrast) * gray)
        elif operation == 2:  # mix each pixel with its gray level
            image = _mix_channels(image, saturation * np.eye(3) + (1 - saturation) * _GRAY)
        else:
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
            shift = np.array([round(hue * 256) % 256, 0, 0], np.uint8)
            rows = hsv.reshape(len(hsv), -1)
            rows += np.tile(shift, hsv.shape[1])  # uint8 wraps around, as the color circle does
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    return image


_GRAY = np.array([0.299, 0.587, 0.114])  # weights of red, green and blue
_SOLARIZED = np.array([level if level < 128 else 255 - level for level in range(256)], np.uint8)


def _mix_channels(image: np.ndarray, matrix: np.ndarray, shift: float = 0.0) -> np.ndarray:
    """Return `matrix @ pixel + shift` for all pixels, clipped to [0, 255] and truncated, as in torchvision."""
    # OpenCV rounds: subtract almost 0.5 to truncate.
    return cv2.transform(image, np.column_stack([matrix, np.full(3, shift - 0.499)]))


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
        distortion: strength of the photometric distortion, see `distort`.

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

    def __post_init__(self) -> None:
        if self.geometry not in ("batch", "image"):
            raise ValueError(f"unknown geometry {self.geometry!r}, expected batch or image")

    def view_specs(self) -> list[_ViewSpec]:
        """Return how each view is made, the two global views first."""
        global_crop = RandomResizedCrop(self.global_size, self.global_scale)
        local_crop = RandomResizedCrop(self.local_size, self.local_scale)
        global_views = [_ViewSpec(global_crop, 1.0, 0.0), _ViewSpec(global_crop, 0.1, 0.2)]
        return global_views + [_ViewSpec(local_crop, 0.5, 0.0)] * self.local_number

    def __call__(self, images: Images, indices: Sequence[int], epoch: int, step: int, rank: int = 0) -> list[View]:
        """Return the views of a batch, the two global views first.

        Args:
            images: B images, uint8 [H, W, 3] each.
            indices: B sample indices, the key of what is drawn per image.
            epoch: epoch from 0, also part of that key.
            step, rank: key of what the batch shares; `step` counts through all epochs.

        Raises:
            ValueError: geometry is "batch" and the images have several sizes.
        """
        photometry = [np.random.default_rng((_PHOTOMETRY, self.seed, epoch, i)) for i in indices]
        # Images of a group share their crops and flips.
        if self.geometry == "batch":
            sizes = {image.shape for image in images}
            if len(sizes) > 1:
                raise ValueError(
                    f"geometry batch needs images of one size, found {len(sizes)}: resize them or use geometry image"
                )
            groups = [np.asarray(images)]  # [B, H, W, 3]
            geometry = [np.random.default_rng((_BATCH_GEOMETRY, self.seed, step, rank))]
        else:
            groups = [image[None] for image in images]
            geometry = [np.random.default_rng((_IMAGE_GEOMETRY, self.seed, epoch, i)) for i in indices]
        return [self._view(groups, geometry, photometry, spec) for spec in self.view_specs()]

    def _view(self, groups: list[np.ndarray], geometry: list[Rng], photometry: list[Rng], spec: _ViewSpec) -> View:
        """Return one view of each image, with a generator of `geometry` per group and of `photometry` per image."""
        sizes = [images.shape[1:3] for images in groups]
        boxes = [spec.crop.draw_box(rng, height, width) for rng, (height, width) in zip(geometry, sizes, strict=True)]
        flips = [rng.random() < self.flip_prob for rng in geometry]  # RandomHorizontalFlip
        crops = [
            (crop, flip)
            for images, box, flip in zip(groups, boxes, flips, strict=True)
            for crop in spec.crop.cut(images, box)
        ]
        pixels = np.empty((len(photometry), spec.crop.size, spec.crop.size, 3), np.uint8)
        for i, ((crop, flip), rng) in enumerate(zip(crops, photometry, strict=True)):
            crop = cv2.flip(crop, 1) if flip else np.ascontiguousarray(crop)
            pixels[i] = distort(rng, crop, spec.blur_prob, spec.solarize_prob, self.distortion)
        return View(torch.from_numpy(pixels).permute(0, 3, 1, 2), np.array(boxes), np.array(flips))
