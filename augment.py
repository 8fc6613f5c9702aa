"""Views of images: crops and flips that know where they come from, and DINO's photometric distortion.

Images and crops are uint8 RGB arrays [height, width, 3] as long as a data-loading process works on them. `MultiCrop`
returns them as tensors [B, 3, S, S]. A crop's box is (top, left, height, width) in pixels of its image.

Random numbers are functions of keys alone: what is drawn per image of (seed, epoch, sample index), what a batch shares
of (seed, global step, rank). Neither the number of workers nor anything drawn before plays a part.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's

# One stream of random numbers per purpose, so that drawing more in one shifts nothing in another.
_BATCH_GEOMETRY, _IMAGE_GEOMETRY, _PHOTOMETRY = range(3)


class View(NamedTuple):
    """One crop of every image of a batch. G is 1 where the batch shares the crop, otherwise B."""

    pixels: torch.Tensor  # uint8 [B, 3, S, S]
    boxes: torch.Tensor  # int64 [G, 4] top, left, height, width
    flips: torch.Tensor  # bool [G]


def random_box(rng, height, width, scale, ratio=(3 / 4, 4 / 3)):
    """Draw the box of torchvision's RandomResizedCrop: ten tries, then the largest central box with a permitted ratio.

    Args:
        rng: numpy Generator.
        height, width: of the image, in pixels.
        scale: (low, high) share of the image's area.
        ratio: (low, high) width over height, drawn log-uniformly.

    Returns:
        (top, left, height, width)
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def resize(images, size, mode):
    """Resize uint8 images [B, H, W, 3] to (height, width) with antialiasing; mode "bilinear" or "bicubic".

    Returns:
        uint8 array [B, height, width, 3]
    """
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)  # the layout that F.interpolate resizes fastest
    return F.interpolate(pixels, size, mode=mode, antialias=True).permute(0, 2, 3, 1).numpy()


def crop_and_resize(images, box, size):
    """Cut a box out of uint8 images [B, H, W, 3] and resize it to [B, size, size, 3] (bicubic, antialiased)."""
    top, left, height, width = box
    return resize(images[:, top : top + height, left : left + width], (size, size), "bicubic")


def distort(rng, image, blur_prob, solarize_prob):
    """Apply DINO's photometric distortion to one image, a uint8 array [height, width, 3].

    Colour jitter (brightness 0.4, contrast 0.4, saturation 0.2, hue 0.1, in random order) with probability 0.8,
    grayscale with 0.2, Gaussian blur of 0.1 to 2 pixels, solarisation of values from 128 on.
    """
    if rng.random() < 0.8:
        brightness, contrast, saturation = rng.uniform((0.6, 0.6, 0.8), (1.4, 1.4, 1.2))
        hue = rng.uniform(-0.1, 0.1)
        image = color_jitter(image, brightness, contrast, saturation, hue, rng.permutation(4))
    if rng.random() < 0.2:
        image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if rng.random() < blur_prob:
        sigma = rng.uniform(0.1, 2.0)
        kernel = cv2.getGaussianKernel(2 * math.ceil(3 * sigma) + 1, sigma, cv2.CV_32F)
        image = cv2.sepFilter2D(image, -1, kernel, kernel)  # twice as fast as GaussianBlur
    if rng.random() < solarize_prob:
        image = cv2.LUT(image, _SOLARIZED)
    return image


def color_jitter(image, brightness, contrast, saturation, hue, order):
    """Change the colours of a uint8 image [height, width, 3] as torchvision's ColorJitter does.

    Args:
        brightness, contrast, saturation: factors, 1 changes nothing.
        hue: shift in turns of the colour circle, in [-0.5, 0.5].
        order: permutation of 0 (brightness), 1 (contrast), 2 (saturation), 3 (hue): what is done first.
    """
    for operation in order:
        if operation == 0:
            image = _mix_channels(image, brightness * np.eye(3))
        elif operation == 1:  # away from or towards the mean gray of the image
            gray = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
            image = _mix_channels(image, contrast * np.eye(3), (1 - contrast) * gray)
        elif operation == 2:  # away from or towards the gray of each pixel
            image = _mix_channels(image, saturation * np.eye(3) + (1 - saturation) * _GRAY)
        else:
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
            shift = np.array([round(hue * 256) % 256, 0, 0], np.uint8)
            rows = hsv.reshape(len(hsv), -1)
            rows += np.tile(shift, hsv.shape[1])  # wraps around, as the circle does
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    return image


_GRAY = np.array([0.299, 0.587, 0.114])  # shares of red, green and blue
_SOLARIZED = np.array([level if level < 128 else 255 - level for level in range(256)], np.uint8)


def _mix_channels(image, matrix, shift=0.0):
    """Return `matrix @ pixel + shift` for all pixels, cut to [0, 255]; torchvision truncates where OpenCV rounds."""
    return cv2.transform(image, np.column_stack([matrix, np.full(3, shift - 0.499)]))


def normalize(pixels):
    """Turn uint8 pixels [..., 3, H, W] into float32 with ImageNet's mean and standard deviation."""
    mean, std = (255 * torch.tensor(x)[:, None, None].to(pixels.device, non_blocking=True) for x in (MEAN, STD))
    return pixels.contiguous().float().sub_(mean).div_(std)


class MultiCrop:
    """Turn a batch of images into two global and several local views (section 3.3; DINO's multi-crop).

    Args:
        global_size, local_size: side of the square views in pixels.
        global_scale, local_scale: (low, high) share of the image's area.
        local_number: number of local views.
        flip_prob: probability of a horizontal flip.
        geometry: "batch" shares each crop and flip among the images of a batch (section 4.1.2), which have to be of one
            size; "image" draws them per image, of any size. Photometric distortion is drawn per image in both.
        seed: of all random numbers.
    """

    def __init__(
        self,
        global_size=224,
        local_size=96,
        global_scale=(0.4, 1.0),
        local_scale=(0.05, 0.4),
        local_number=8,
        flip_prob=0.5,
        geometry="batch",
        seed=0,
    ):
        if geometry not in ("batch", "image"):
            raise ValueError(f"unknown geometry {geometry!r}, expected batch or image")
        # A data-loading process has one core, and OpenCV's pool of threads does not survive the fork into one.
        cv2.setNumThreads(0)
        self.flip_prob, self.geometry, self.seed = flip_prob, geometry, seed
        # (size, scale, blur probability, solarisation probability) of each view
        self.view_specs = [(global_size, global_scale, 1.0, 0.0), (global_size, global_scale, 0.1, 0.2)]
        self.view_specs += [(local_size, local_scale, 0.5, 0.0)] * local_number

    def __call__(self, images, indices, epoch, step, rank=0):
        """Return the views of a batch.

        Args:
            images: uint8 arrays [H, W, 3], or one [B, H, W, 3].
            indices: B sample indices, the keys of what is drawn per image.
            epoch: from 0.
            step, rank: the keys of what the batch shares; step counts through all epochs.

        Returns:
            list of View, the two global ones first.
        """
        photometry = [np.random.default_rng((_PHOTOMETRY, self.seed, epoch, i)) for i in indices]
        if self.geometry == "batch":
            sizes = {tuple(image.shape) for image in images}
            if len(sizes) > 1:
                raise ValueError(
                    f"geometry batch needs images of one size, found {len(sizes)}: resize them or use geometry image"
                )
            geometry = [np.random.default_rng((_BATCH_GEOMETRY, self.seed, step, rank))]
            images = np.stack(images)
        else:
            geometry = [np.random.default_rng((_IMAGE_GEOMETRY, self.seed, epoch, i)) for i in indices]
        return [self._view(images, geometry, photometry, *spec) for spec in self.view_specs]

    def _view(self, images, geometry, photometry, size, scale, blur_prob, solarize_prob):
        boxes, flips = [], []
        for rng, image in zip(geometry, images, strict=False):  # one for all where the batch shares its geometry
            boxes.append(random_box(rng, *image.shape[:2], scale))
            flips.append(rng.random() < self.flip_prob)
        if self.geometry == "batch":
            crops = crop_and_resize(images, boxes[0], size)
            flips_of_images = flips * len(images)
        else:
            crops = [crop_and_resize(image[None], box, size)[0] for image, box in zip(images, boxes, strict=True)]
            flips_of_images = flips
        pixels = np.empty((len(photometry), size, size, 3), np.uint8)
        for i, (rng, crop, flip) in enumerate(zip(photometry, crops, flips_of_images, strict=True)):
            crop = cv2.flip(crop, 1) if flip else np.ascontiguousarray(crop)
            pixels[i] = distort(rng, crop, blur_prob, solarize_prob)
        return View(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor(boxes), torch.tensor(flips))
