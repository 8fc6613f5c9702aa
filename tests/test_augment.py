from types import SimpleNamespace

import numpy as np
import pytest
import scipy.ndimage
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageFilter
from scipy.stats import ks_2samp
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import RandomResizedCrop

import augment
from augment import MultiCrop


@pytest.mark.parametrize(("height", "width"), [(256, 256), (375, 500), (40, 400)])
@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_boxes_have_torchvisions_distribution(height, width, scale):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(4000)])
    own = np.array([augment.random_box(rng, height, width, scale) for _ in range(4000)])
    for column in range(4):
        assert ks_2samp(theirs[:, column], own[:, column]).pvalue > 1e-3, column
    assert (own[:, :2] >= 0).all()
    assert (own[:, :2] + own[:, 2:] <= (height, width)).all()


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10)])
def test_fallback_is_torchvisions_central_crop(height, width):
    # With the whole area no ratio in [3/4, 4/3] fits such an image: both sides fall back, always.
    box = augment.random_box(np.random.default_rng(0), height, width, (1, 1))
    assert box == RandomResizedCrop.get_params(torch.empty(3, height, width), (1, 1), (3 / 4, 4 / 3))


def test_crop_is_pillows_crop_resized(photographs):
    image, box = photographs[0], (50, 70, 180, 240)
    top, left, height, width = box
    expected = image.crop((left, top, left + width, top + height)).resize((96, 96), Image.Resampling.BICUBIC)
    pixels = np.array(image)
    planes = np.moveaxis(np.moveaxis(pixels, -1, 0).copy(), 0, -1)  # another layout in memory
    for array in (pixels, planes):
        own = augment.crop_and_resize(array[None], box, 96)[0]
        assert own.flags.c_contiguous or array is planes  # the fast path for channels last keeps the layout
        assert own.shape == (96, 96, 3)
        assert np.abs(own.astype(int) - np.array(expected)).max() <= 1


def test_color_jitter_is_torchvisions_within_2_levels(photographs):
    image = np.array(photographs[1])
    rng = np.random.default_rng(0)
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for _ in range(12):
        values = [*rng.uniform(0.6, 1.4, 3), rng.uniform(-0.1, 0.1)]
        order = rng.permutation(4)
        reference = torch.from_numpy(image).permute(2, 0, 1)
        for i in order:
            reference = operations[i](reference, float(values[i]))
        own = augment.color_jitter(image, *values, order)
        assert np.abs(own.astype(int) - reference.permute(1, 2, 0).numpy()).mean() < 2


class Dice:
    """A generator whose random() enables or disables each operation in turn, with fixed values."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def random(self):
        return 0.0 if self.answers.pop(0) else 1.0

    def uniform(self, low, high):
        return 1.5 if np.isscalar(low) else np.ones(len(low))

    def permutation(self, n):
        return np.arange(n)


def test_each_distortion_is_torchvisions(photographs):
    image = np.array(photographs[0].crop((100, 100, 196, 196)))
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    expected = {
        (False, True, False, False): TF.rgb_to_grayscale(pixels, 3),
        (False, False, True, False): TF.gaussian_blur(pixels, [11, 11], [1.5, 1.5]),
        (False, False, False, True): TF.solarize(pixels, 128),
        (False, False, False, False): pixels,
    }
    for answers, reference in expected.items():
        own = torch.from_numpy(augment.distort(Dice(*answers), image, 0.5, 0.2)).permute(2, 0, 1)
        assert (own.int() - reference.int()).abs().max() <= 1, answers


def test_blur_is_an_exact_gaussian_and_pillows_is_stronger_at_small_sigma(photographs):
    image = np.array(photographs[0])

    draws = iter((0.9, 0.9, 0.0, 0.9))  # no jitter, no grayscale, blur, no solarization
    rng = SimpleNamespace(random=lambda: next(draws), uniform=lambda *_: 0.3)
    blurred = augment.distort(rng, image, 0.5, 0.2)
    exact = scipy.ndimage.gaussian_filter(image.astype(float), 0.3, axes=(0, 1), mode="mirror", radius=1)
    assert np.abs(blurred - exact).max() <= 1

    def sharpness(pixels):
        return scipy.ndimage.laplace(pixels.mean(-1)).var()

    pillows = np.array(photographs[0].filter(ImageFilter.GaussianBlur(0.3)))
    assert sharpness(pillows) < 0.8 * sharpness(blurred) < 0.8 * sharpness(image.astype(float))


def test_probabilities_are_dinos(monkeypatch):
    """Count how often each operation runs in the three kinds of views."""
    counts = {}

    def count(module, function, key):
        def call(image, *_):
            counts[key] = counts.get(key, 0) + 1
            return image

        monkeypatch.setattr(module, function, call)

    count(augment, "color_jitter", "jitter")
    count(augment.cv2, "cvtColor", "gray")  # called twice each time
    count(augment.cv2, "sepFilter2D", "blur")
    count(augment.cv2, "LUT", "solarize")
    crop = MultiCrop(local_number=1)
    image = np.zeros((8, 8, 3), np.uint8)
    n = 2000
    for (_, _, blur_prob, solarize_prob), p_blur, p_solarize in zip(
        crop.view_specs, (1, 0.1, 0.5), (0, 0.2, 0), strict=True
    ):
        counts.clear()
        rng = np.random.default_rng(0)
        for _ in range(n):
            augment.distort(rng, image, blur_prob, solarize_prob)
        for key, p in (("jitter", 0.8), ("gray", 0.4), ("blur", p_blur), ("solarize", p_solarize)):
            assert counts.get(key, 0) / n == pytest.approx(p, abs=0.05), key


def test_jitter_has_dinos_strength(monkeypatch):
    drawn = []
    monkeypatch.setattr(augment, "color_jitter", lambda image, *values: drawn.append(values[:4]) or image)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        augment.distort(rng, np.zeros((1, 1, 3), np.uint8), 0, 0)
    np.testing.assert_allclose(np.min(drawn, 0), (0.6, 0.6, 0.8, -0.1), atol=0.01)
    np.testing.assert_allclose(np.max(drawn, 0), (1.4, 1.4, 1.2, 0.1), atol=0.01)


def dinos_distort(rng, image, blur_prob, solarize_prob):
    """The distortion of DINO with the order of random numbers that published runs had."""
    if rng.random() < 0.8:
        factors = rng.uniform((0.6, 0.6, 0.8), (1.4, 1.4, 1.2))
        image = augment.color_jitter(image, *factors, rng.uniform(-0.1, 0.1), rng.permutation(4))
    if rng.random() < 0.2:
        image = augment.cv2.cvtColor(augment.cv2.cvtColor(image, 7), 8)  # RGB to gray and back
    if rng.random() < blur_prob:
        sigma = rng.uniform(0.1, 2.0)
        kernel = augment.cv2.getGaussianKernel(2 * int(np.ceil(3 * sigma)) + 1, sigma, augment.cv2.CV_32F)
        image = augment.cv2.sepFilter2D(image, -1, kernel, kernel)
    if rng.random() < solarize_prob:
        image = np.where(image < 128, image, 255 - image)
    return image


def test_full_strength_changes_no_bit_of_earlier_views(photographs):
    image = np.array(photographs[1].crop((100, 100, 164, 164)))
    for seed in range(60):
        rngs = [np.random.default_rng(seed) for _ in range(3)]
        expected = dinos_distort(rngs[0], image, 0.5, 0.2)
        assert np.array_equal(augment.distort(rngs[1], image, 0.5, 0.2), expected)
        assert np.array_equal(augment.distort(rngs[2], image, 0.5, 0.2, 1.0), expected)
        assert rngs[0].random() == rngs[1].random() == rngs[2].random()


def test_strength_0_keeps_every_image(photographs):
    image = np.array(photographs[1].crop((100, 100, 164, 164)))
    for seed in range(100):
        assert np.array_equal(augment.distort(np.random.default_rng(seed), image, 1.0, 1.0, 0.0), image)


def test_half_strength_halves_ranges_and_probabilities(monkeypatch):
    """Except for the probability of jitter, whose ranges are halved already."""
    jitter, counts = [], {"cvtColor": 0, "sepFilter2D": 0, "LUT": 0}
    monkeypatch.setattr(augment, "color_jitter", lambda image, *values: jitter.append(values[:4]) or image)

    def count(name, image):
        counts[name] += 1
        return image

    for name in counts:
        monkeypatch.setattr(augment.cv2, name, lambda image, *_, name=name: count(name, image))
    rng, n = np.random.default_rng(0), 4000
    for _ in range(n):
        augment.distort(rng, np.zeros((1, 1, 3), np.uint8), 0.8, 0.2, 0.5)
    np.testing.assert_allclose(np.min(jitter, 0), (0.8, 0.8, 0.9, -0.05), atol=0.001)
    np.testing.assert_allclose(np.max(jitter, 0), (1.2, 1.2, 1.1, 0.05), atol=0.001)
    frequencies = [len(jitter) / n, *(counts[name] / n for name in counts)]  # cvtColor is called twice each time
    assert frequencies == pytest.approx([0.8, 0.2, 0.4, 0.1], abs=0.03)


def test_normalize_is_torchvisions(photographs):
    pixels = TF.pil_to_tensor(photographs[0])
    expected = TF.normalize(TF.to_dtype(pixels, torch.float32, scale=True), augment.MEAN, augment.STD)
    torch.testing.assert_close(augment.normalize(pixels), expected)


def test_normalize_copies_its_constants_to_a_device_once():
    """A copy from pageable memory in every step would stall a GPU."""
    pixels = torch.zeros(1, 3, 4, 4, dtype=torch.uint8, device="meta")
    augment.normalize(pixels)
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            calls.append(str(operation))
            return operation(*args, **(kwargs or {}))

    with Record():
        augment.normalize(pixels)
    assert calls == ["aten._to_copy.default", "aten.sub_.Tensor", "aten.div_.Tensor"]


@pytest.fixture
def images(photographs):
    crops = [photographs[0].crop((x, 60, x + 256, 316)) for x in (0, 90, 180)]
    return np.stack([np.array(crop) for crop in crops])


def test_sizes_and_numbers_of_views(images):
    views = MultiCrop(64, 32, local_number=3)(images, [0, 1, 2], epoch=0, step=0)
    assert [tuple(v.pixels.shape) for v in views] == [(3, 3, 64, 64)] * 2 + [(3, 3, 32, 32)] * 3
    assert all(v.pixels.dtype == torch.uint8 for v in views)
    assert {tuple(v.boxes.shape) for v in views} == {(1, 4)}
    views = MultiCrop(64, 32, local_number=3, geometry="image")(images, [0, 1, 2], epoch=0, step=0)
    assert {tuple(v.boxes.shape) for v in views} == {(3, 4)}
    assert {tuple(v.flips.shape) for v in views} == {(3,)}


@pytest.mark.parametrize("geometry", ["batch", "image"])
def test_pixels_are_what_box_and_flip_say(images, geometry, monkeypatch):
    monkeypatch.setattr(augment, "distort", lambda rng, image, *_: image)
    for view in MultiCrop(64, 32, local_number=4, geometry=geometry)(images, [5, 6, 7], 0, 0):
        for i, image in enumerate(images):
            g = i if geometry == "image" else 0
            top, left, height, width = view.boxes[g].tolist()
            crop = Image.fromarray(image[top : top + height, left : left + width])
            crop = crop.resize(view.pixels.shape[-2:], Image.Resampling.BICUBIC)
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flips[g] else crop
            assert (TF.pil_to_tensor(crop).int() - view.pixels[i].int()).abs().max() <= 1


@pytest.mark.parametrize("geometry", ["batch", "image"])
def test_views_are_distorted_as_strongly_as_asked(images, geometry, monkeypatch):
    plain = MultiCrop(32, 16, geometry=geometry, distortion=0.0)(images, [0, 1, 2], 0, 0)
    strengths = []
    monkeypatch.setattr(augment, "distort", lambda rng, image, *values: strengths.append(values[2]) or image)
    crops = MultiCrop(32, 16, geometry=geometry, distortion=0.3)(images, [0, 1, 2], 0, 0)
    assert strengths == [0.3] * 30
    assert same(plain, crops)  # of which nothing is distorted
    MultiCrop(32, 16, geometry=geometry)(images, [0, 1, 2], 0, 0)
    assert strengths[30:] == [1.0] * 30


def same(a, b):
    return all(torch.equal(x, y) for u, v in zip(a, b, strict=True) for x, y in zip(u, v, strict=True))


def test_views_are_functions_of_their_keys(images):
    batch = MultiCrop(32, 16, local_number=1, geometry="batch")
    assert same(batch(images, [4, 5, 6], 0, 9), batch(images, [4, 5, 6], 0, 9))
    assert not same(batch(images, [4, 5, 6], 0, 9), batch(images, [4, 5, 6], 0, 10))
    assert not same(batch(images, [4, 5, 6], 0, 9, rank=0), batch(images, [4, 5, 6], 0, 9, rank=1))
    first, again = batch(images, [4, 5, 6], 0, 9), batch(images, [4, 5, 6], 1, 9)
    assert torch.equal(first[0].boxes, again[0].boxes)  # the crop depends only on the step
    assert not torch.equal(first[0].pixels, again[0].pixels)  # the colors on the epoch

    image = MultiCrop(32, 16, local_number=1, geometry="image")
    assert same(image(images, [4, 5, 6], 0, 9), image(images, [4, 5, 6], 0, 10, rank=1))
    whole, alone = image(images, [4, 5, 6], 2, 9), image(images[1:2], [5], 2, 3)
    for view, own in zip(whole, alone, strict=True):  # an image's views do not depend on its batch
        assert torch.equal(view.pixels[1:2], own.pixels)
        assert torch.equal(view.boxes[1:2], own.boxes)
    other_seed = MultiCrop(32, 16, local_number=1, geometry="image", seed=1)
    assert not same(whole, other_seed(images, [4, 5, 6], 2, 9))


def test_photometry_differs_between_images_of_a_batch():
    gray = np.full((2, 64, 64, 3), 100, np.uint8)
    views = [MultiCrop(32, 16)(gray, [2 * i, 2 * i + 1], 0, i)[0].pixels for i in range(10)]
    assert any(not torch.equal(v[0], v[1]) for v in views)


def test_flip_probability(images):
    for flip_prob, expected in ((0.0, {False}), (1.0, {True})):
        views = MultiCrop(32, 16, flip_prob=flip_prob, geometry="image")(images, [0, 1, 2], 0, 0)
        assert {flip for view in views for flip in view.flips.tolist()} == expected


def test_image_geometry_takes_images_of_any_size():
    images = [np.zeros((50, 80, 3), np.uint8), np.zeros((300, 40, 3), np.uint8)]
    for view in MultiCrop(32, 16, geometry="image")(images, [0, 1], 0, 0):
        for (top, left, height, width), image in zip(view.boxes.tolist(), images, strict=True):
            assert top + height <= image.shape[0]
            assert left + width <= image.shape[1]
    with pytest.raises(ValueError, match="one size, found 2"):
        MultiCrop(32, 16)(images, [0, 1], 0, 0)
