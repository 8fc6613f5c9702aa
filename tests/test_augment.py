import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.ndimage
import torch
import torchvision.transforms.v2.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from scipy.stats import ks_2samp
from sklearn.datasets import load_sample_image
from torchvision import transforms

import augment
from augment import MultiCrop, RandomResizedCrop


@pytest.mark.parametrize(("height", "width"), [(256, 256), (375, 500), (40, 400)])
@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_boxes_have_torchvisions_distribution(height, width, scale):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    image = torch.empty(3, height, width)
    theirs = np.array([transforms.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(2000)])
    crop = RandomResizedCrop(96, scale)
    own = np.array([crop.draw_box(rng, height, width) for _ in range(2000)])
    for column in range(4):
        assert ks_2samp(theirs[:, column], own[:, column]).pvalue > 1e-3, column
    assert (own[:, :2] >= 0).all()
    assert (own[:, :2] + own[:, 2:] <= (height, width)).all()


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10)])
def test_fallback_is_torchvisions_central_crop(height, width):
    # With the whole area no ratio in [3/4, 4/3] fits such an image: both sides fall back, always.
    box = RandomResizedCrop(96, (1, 1)).draw_box(np.random.default_rng(0), height, width)
    assert box == transforms.RandomResizedCrop.get_params(torch.empty(3, height, width), (1, 1), (3 / 4, 4 / 3))


def test_crop_is_pillows_crop_resized(photographs):
    image, box = photographs[0], (50, 70, 180, 240)
    top, left, height, width = box
    expected = image.crop((left, top, left + width, top + height)).resize((96, 96), Image.Resampling.BICUBIC)
    pixels = np.array(image)
    planes = np.moveaxis(np.moveaxis(pixels, -1, 0).copy(), 0, -1)  # another layout in memory
    for array in (pixels, planes):
        own = augment.crop_and_resize(array, box, 96)
        assert own.flags.c_contiguous or array is planes  # the fast path for channels last keeps the layout
        assert own.shape == (96, 96, 3)
        assert np.abs(own.astype(int) - np.array(expected)).max() <= 1


def test_color_jitter_is_torchvisions_within_2_levels(photographs):
    image = np.array(photographs[1])
    rng = np.random.default_rng(0)
    for _ in range(12):
        values = [*rng.uniform(0.6, 1.4, 3), rng.uniform(-0.1, 0.1)]
        order = rng.permutation(4)
        reference = torch.from_numpy(image).permute(2, 0, 1)
        for i in order:
            reference = OPERATIONS[i](reference, float(values[i]))
        own = augment.color_jitter(image, *values, order)
        assert np.abs(own.astype(int) - reference.permute(1, 2, 0).numpy()).mean() < 2


def draw_and_distort(rng, image):
    return augment.distort(image, augment.draw_distortion(rng, blur_prob=0.5, solarize_prob=0.2))


class Dice:
    """A generator whose random() enables or disables each operation in turn, with fixed values."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def random(self):
        return 0.0 if self.answers.pop(0) else 1.0

    def uniform(self, low, high):
        return 1.5


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
        own = torch.from_numpy(draw_and_distort(Dice(*answers), image)).permute(2, 0, 1)
        assert (own.int() - reference.int()).abs().max() <= 1, answers


def test_blur_is_an_exact_gaussian_and_pillows_is_stronger_at_small_sigma(photographs):
    image = np.array(photographs[0])

    draws = iter((0.9, 0.9, 0.0, 0.9))  # no jitter, no grayscale, blur, no solarization
    rng = SimpleNamespace(random=lambda: next(draws), uniform=lambda *_: 0.3)
    blurred = draw_and_distort(rng, image)
    exact = scipy.ndimage.gaussian_filter(image.astype(float), 0.3, axes=(0, 1), mode="mirror", radius=1)
    assert np.abs(blurred - exact).max() <= 1

    def sharpness(pixels):
        return scipy.ndimage.laplace(pixels.mean(-1)).var()

    pillows = np.array(photographs[0].filter(ImageFilter.GaussianBlur(0.3)))
    assert sharpness(pillows) < 0.8 * sharpness(blurred) < 0.8 * sharpness(image.astype(float))


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_probabilities_and_amounts_are_dinos(strength):
    """Of the three kinds of views. The strength scales them, but for the probability of jitter."""
    rng, n = np.random.default_rng(0), 4000
    for spec, (blur, solarize) in zip(
        MultiCrop(local_number=1).view_specs(), ((1, 0), (0.1, 0.2), (0.5, 0)), strict=True
    ):
        drawn = [augment.draw_distortion(rng, spec.blur_prob, spec.solarize_prob, strength) for _ in range(n)]
        jitter = np.array([one.jitter[:4] for one in drawn if one.jitter])
        sigmas = np.array([one.sigma for one in drawn if one.sigma])
        assert len(jitter) / n == pytest.approx(0.8, abs=0.03)
        amounts = strength * np.array((0.4, 0.4, 0.2, 0.1))
        np.testing.assert_allclose(jitter.min(0), (1, 1, 1, 0) - amounts, atol=0.01)
        np.testing.assert_allclose(jitter.max(0), (1, 1, 1, 0) + amounts, atol=0.01)
        assert len({tuple(one.jitter[4]) for one in drawn if one.jitter}) == 24
        assert (sigmas.min(), sigmas.max()) == pytest.approx((0.1, 2.0), abs=0.02)
        means = [np.mean([one.grayscale for one in drawn]), len(sigmas) / n, np.mean([one.solarize for one in drawn])]
        np.testing.assert_allclose(means, strength * np.array((0.2, blur, solarize)), atol=0.03)


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
        rng, earlier = np.random.default_rng(seed), np.random.default_rng(seed)
        assert np.array_equal(draw_and_distort(rng, image), dinos_distort(earlier, image, 0.5, 0.2))
        assert rng.random() == earlier.random()


OPERATIONS = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


def torchvisions_distort(pixels, drawn):
    """The operations of torchvision on a tensor [3, S, S], and SciPy's blur, which also mirrors tiny images."""
    if drawn.jitter:
        *values, order = drawn.jitter
        for i in order:
            pixels = OPERATIONS[i](pixels, float(values[i]))
    if drawn.grayscale:
        pixels = TF.rgb_to_grayscale(pixels, 3)
    if drawn.sigma:
        options = {"axes": (1, 2), "mode": "mirror", "radius": int(np.ceil(3 * drawn.sigma))}
        blurred = scipy.ndimage.gaussian_filter(pixels.numpy().astype(float), drawn.sigma, **options)
        pixels = torch.from_numpy(blurred.round().astype(np.uint8))
    return TF.solarize(pixels, 128) if drawn.solarize else pixels


def distort_together(images, drawn):
    """Distort images [n, 3, S, S] by `distort_batch`, in the layout in which they arrive, channels last."""
    rows = torch.tensor([augment.distortion_row(one) for one in drawn], dtype=torch.float32)
    return augment.distort_batch(torch.stack(images).contiguous(memory_format=torch.channels_last), rows)


def photograph_or_noise(kind, side, rng):
    if kind == "noise":
        return torch.from_numpy(rng.integers(0, 256, (3, side, side), np.uint8))
    top, left = rng.integers(427 - side), rng.integers(640 - side)
    image = load_sample_image(("china.jpg", "flower.jpg")[rng.integers(2)])
    return torch.from_numpy(image[top : top + side, left : left + side].copy()).permute(2, 0, 1)


NOTHING = augment.Distortion(None, False, 0.0, False)
KINDS, LEVELS = ("photograph", "noise"), 10  # the largest difference of a chain of operations


@pytest.mark.parametrize("kind", KINDS)
def test_each_operation_on_a_batch_is_torchvisions(kind):
    single = [(i, value) for i, low, high in ((0, 0.6, 1.4), (1, 0.6, 1.4), (2, 0.8, 1.2), (3, -0.1, 0.1))
              for value in (low, high)]  # fmt: skip
    drawn = [NOTHING._replace(jitter=(*np.where(np.arange(4) == i, value, (1, 1, 1, 0)), [i])) for i, value in single]
    drawn += [NOTHING._replace(jitter=(1.4, 1, 1, 0.1, [3, 0]))]  # levels are truncated before they become brighter
    drawn += [NOTHING._replace(sigma=sigma) for sigma in (0.1, 0.3, 1.0, 2.0)]
    drawn += [NOTHING._replace(grayscale=True), NOTHING._replace(solarize=True), NOTHING]
    rng = np.random.default_rng(0)
    images = [photograph_or_noise(kind, 96, rng) for _ in drawn]
    for image, one, found in zip(images, drawn, distort_together(images, drawn), strict=True):
        difference = (found.int() - torchvisions_distort(image, one).int()).abs()
        assert difference.max() <= 1, one
        assert difference.float().mean() < 0.25, one
    assert torch.equal(found, images[-1])  # nothing was drawn


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(KINDS), st.sampled_from([6, 7, 13, 32, 96]), st.integers(0, 10**6))
def test_a_batch_is_distorted_as_by_torchvision_and_by_the_workers(kind, side, seed):
    """In all orders of the jitter, with all amounts and blurs up to the ends of their ranges."""
    rng = np.random.default_rng(seed)

    def between(low, high):
        return rng.choice((low, high, rng.uniform(low, high)))

    drawn = []
    for order in itertools.permutations(range(4)):
        jitter = between(0.6, 1.4), between(0.6, 1.4), between(0.8, 1.2), between(-0.1, 0.1), order
        sigma = between(0.1, 2.0) if rng.random() < 0.6 else 0.0
        drawn.append(augment.Distortion(jitter, rng.random() < 0.2, sigma, rng.random() < 0.3))
    images = [photograph_or_noise(kind, side, rng) for _ in drawn]
    found = distort_together(images, drawn)
    assert found.is_contiguous()
    references = torch.stack([torchvisions_distort(image, one) for image, one in zip(images, drawn, strict=True)])
    difference = (found.int() - references.int()).abs()
    assert difference.max() <= LEVELS
    assert difference.float().mean() <= 1
    arrays = (np.ascontiguousarray(image.permute(1, 2, 0).numpy()) for image in images)
    of_workers = np.stack([augment.distort(array, one) for array, one in zip(arrays, drawn, strict=True)])
    assert (found.int() - torch.from_numpy(of_workers).permute(0, 3, 1, 2).int()).abs().float().mean() <= 1


@pytest.mark.parametrize("geometry", ["batch", "image"])
def test_views_for_the_device_have_the_crops_and_draws_of_distorted_ones(images, geometry):
    distorted, plain, never = (
        small_views(geometry=geometry, **changes)(images, [4, 5, 6], 1, 9, **options)
        for changes, options in (({}, {}), ({}, {"distorts": False}), ({"distortion": 0.0}, {}))
    )
    for view, own, undistorted in zip(distorted, plain, never, strict=True):
        assert np.array_equal(view.boxes, own.boxes)
        assert np.array_equal(view.flips, own.flips)
        assert view.parameters is None
        assert torch.equal(own.pixels, undistorted.pixels)
        found = augment.distort_batch(own.pixels, torch.from_numpy(own.parameters))
        assert (found.int() - view.pixels.int()).abs().float().mean() < 1
        assert not torch.equal(found, own.pixels)


def patches_of(kind, side, count):
    rng = np.random.default_rng(side)
    return np.stack([photograph_or_noise(kind, side, rng).permute(1, 2, 0).numpy() for _ in range(count)])


def torchvisions_patch(patch, drawn, i):
    """The operations of torchvision on a PIL image, as in the authors' code."""
    image = Image.fromarray(patch)
    operations = {
        "p": lambda x: TF.posterize(x, 3),
        "s": lambda x: TF.adjust_sharpness(x, 2),
        "b": lambda x: TF.gaussian_blur(x, [1, 5], [float(drawn.sigma[i])] * 2),
        "m": lambda x: TF.adjust_brightness(x, float(drawn.brightness[i])),
        "h": lambda x: TF.adjust_hue(x, float(drawn.hue[i])),
    }
    for step, place in zip(augment._STEPS, drawn.places[:, i], strict=True):
        image = operations[step](image) if place else image
    return np.array(image)


def augmented_together(patches, drawn):
    """Patches [g * g, side, side, 3], augmented by `distort_batch` as those of one image that nothing else distorts."""
    side, grid = patches.shape[1], int(len(patches) ** 0.5)
    image = patches.reshape(grid, grid, side, side, 3).swapaxes(1, 2).reshape(1, grid * side, grid * side, 3)
    pixels, row = torch.from_numpy(image).permute(0, 3, 1, 2), torch.tensor([augment.distortion_row(NOTHING)])
    found = augment.distort_batch(pixels, row, torch.from_numpy(augment.patch_rows(drawn))[None])
    found = found.permute(0, 2, 3, 1).reshape(grid, side, grid, side, 3)
    return found.numpy().swapaxes(1, 2).reshape(patches.shape)


def augmented_by_workers(patches, drawn):
    augment.distort_patches(patches := patches.copy(), drawn)
    return patches


def difference(a, b):
    return np.abs(a.astype(int) - b)


AUGMENT = (augmented_by_workers, augmented_together)


@pytest.mark.parametrize("side", [3, 8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_patches_are_augmented_as_by_torchvision(kind, side):
    """In all orders. Far differences are those of levels on either side of a step of the posterization."""
    patches, drawn = patches_of(kind, side, 144), augment.draw_patches(np.random.default_rng(0), 144)
    references = np.stack([torchvisions_patch(patch, drawn, i) for i, patch in enumerate(patches)])
    assert difference(patches, references).mean() > 10
    for augmented in AUGMENT:
        assert difference(augmented(patches, drawn), references).mean() <= 1.5, augmented


@pytest.mark.parametrize("kind", KINDS)
def test_each_operation_on_patches_is_torchvisions(kind):
    patches, drawn = patches_of(kind, 16, 100), augment.draw_patches(np.random.default_rng(0), 100)
    for step, operation in enumerate(augment._STEPS):
        alone = drawn._replace(places=np.arange(len(augment._STEPS))[:, None] == np.full(100, step))
        references = np.stack([torchvisions_patch(patch, alone, i) for i, patch in enumerate(patches)])
        for augmented in AUGMENT:
            found = difference(augmented(patches, alone), references)
            assert found.max() <= {"p": 0, "h": 24}.get(operation, 1), (operation, augmented)  # hues have 256 steps
            assert found.mean() < (2 if operation == "h" else 0.6), (operation, augmented)
    nothing = drawn._replace(places=np.zeros_like(drawn.places))
    assert np.array_equal(augmented_by_workers(patches, nothing), patches)


def test_draws_of_patches_are_those_of_the_authors():
    drawn = augment.draw_patches(np.random.default_rng(0), 20000)
    orders = {}
    for i, place in enumerate(drawn.places.T):
        steps = [step for step, taken in zip(augment._STEPS, place, strict=True) if taken]
        assert sorted(steps) in [sorted("mhb" + more) for more in ("", "s", "p", "sp")]
        orders.setdefault("".join(steps), []).append(i)
    whole = {name: len(found) / 20000 for name, found in orders.items() if len(name) == 5}
    assert len(whole) == 48  # 24 orders, brightness before or after hue
    assert max(whole.values()) < 0.25 / 48 * 1.5
    assert sum(whole.values()) == pytest.approx(0.25, abs=0.01)  # both sharpened and posterized
    for letter in "sp":
        assert sum(len(found) for name, found in orders.items() if letter in name) == pytest.approx(10000, abs=250)
    for values, low, high in ((drawn.brightness, 0.9, 1.1), (drawn.hue, -0.1, 0.1), (drawn.sigma, 0.1, 2.0)):
        assert ks_2samp(values, np.linspace(low, high, 20000)).pvalue > 1e-3


@pytest.mark.parametrize("geometry", ["batch", "image"])
def test_views_with_patch_augmentation(images, geometry):
    """They are the usual views, of which each patch is augmented by a function of seed, epoch and image."""
    usual = small_views(geometry=geometry)(images, [4, 5, 6], 1, 9)
    crop = small_views(geometry=geometry, patch_side=8)
    views, plain = crop(images, [4, 5, 6], 1, 9), crop(images, [4, 5, 6], 1, 9, distorts=False)
    rng = np.random.default_rng((augment._PATCHES, 0, 1, 5))
    drawn = augment.draw_patches(rng, 2 * 16 + 2 * 4)
    start = 0
    for view, before, own in zip(views, usual, plain, strict=True):
        grid = view.pixels.shape[-1] // 8
        mine = slice(start, start := start + grid**2)
        expected = before.pixels[1].permute(1, 2, 0).numpy().reshape(grid, 8, grid, 8, 3).swapaxes(1, 2)
        expected = augmented_by_workers(
            expected.reshape(-1, 8, 8, 3), drawn._replace(places=drawn.places[:, mine], **{
                name: getattr(drawn, name)[mine] for name in ("brightness", "hue", "sigma")}))  # fmt: skip
        found = view.pixels[1].permute(1, 2, 0).numpy().reshape(grid, 8, grid, 8, 3).swapaxes(1, 2)
        assert np.array_equal(found.reshape(-1, 8, 8, 3), expected)
        assert view.patches is None
        assert own.patches.shape == (3, grid**2, augment.PATCH_ROW_LENGTH)
        on_device = augment.distort_batch(own.pixels, torch.from_numpy(own.parameters), torch.from_numpy(own.patches))
        assert difference(on_device.numpy(), view.pixels.numpy()).mean() < 1.5
    assert start == 40


def test_normalize_is_torchvisions(photographs):
    pixels = TF.pil_to_tensor(photographs[0])
    expected = TF.normalize(TF.to_dtype(pixels, torch.float32, scale=True), augment.MEAN, augment.STD)
    torch.testing.assert_close(augment.normalize(pixels), expected)


@pytest.fixture
def images(photographs):
    crops = [photographs[0].crop((x, 60, x + 256, 316)) for x in (0, 90, 180)]
    return np.stack([np.array(crop) for crop in crops])


def small_views(**settings):
    return MultiCrop(**{"global_size": 32, "local_size": 16, "local_number": 2, **settings})


@pytest.mark.parametrize(("geometry", "groups"), [("batch", 1), ("image", 3)])
def test_pixels_are_what_box_and_flip_say(images, geometry, groups):
    views = small_views(local_number=4, geometry=geometry, distortion=0.0)(images, [5, 6, 7], 0, 0)
    assert [tuple(view.pixels.shape) for view in views] == [(3, 3, 32, 32)] * 2 + [(3, 3, 16, 16)] * 4
    for view in views:
        assert view.pixels.dtype == torch.uint8
        assert view.boxes.shape == (groups, 4)
        assert view.flips.shape == (groups,)
        for i, image in enumerate(images):
            top, left, height, width = view.boxes[i % groups]
            crop = Image.fromarray(image[top : top + height, left : left + width])
            crop = crop.resize(view.pixels.shape[-2:], Image.Resampling.BICUBIC)
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flips[i % groups] else crop
            assert (TF.pil_to_tensor(crop).int() - view.pixels[i].int()).abs().max() <= 1


def same(a, b):
    return all(np.array_equal(x, y) for u, v in zip(a, b, strict=True) for x, y in zip(u[:3], v[:3], strict=True))


def test_views_are_functions_of_their_keys(images):
    batch = small_views(geometry="batch")
    assert same(batch(images, [4, 5, 6], 0, 9), batch(images, [4, 5, 6], 0, 9))
    assert not same(batch(images, [4, 5, 6], 0, 9), batch(images, [4, 5, 6], 0, 10))
    assert not same(batch(images, [4, 5, 6], 0, 9, rank=0), batch(images, [4, 5, 6], 0, 9, rank=1))
    first, again = batch(images, [4, 5, 6], 0, 9), batch(images, [4, 5, 6], 1, 9)
    assert np.array_equal(first[0].boxes, again[0].boxes)  # the crop depends only on the step
    assert not torch.equal(first[0].pixels, again[0].pixels)  # the colors on the epoch

    image = small_views(geometry="image")
    assert same(image(images, [4, 5, 6], 0, 9), image(images, [4, 5, 6], 0, 10, rank=1))
    whole, alone = image(images, [4, 5, 6], 2, 9), image(images[1:2], [5], 2, 3)
    for view, own in zip(whole, alone, strict=True):  # an image's views do not depend on its batch
        assert same([[x[1:2] for x in view[:3]]], [own])
    assert not same(whole, small_views(geometry="image", seed=1)(images, [4, 5, 6], 2, 9))


def test_photometry_differs_between_images_of_a_batch():
    gray = np.full((2, 64, 64, 3), 100, np.uint8)
    views = [small_views()(gray, [2 * i, 2 * i + 1], 0, i)[0].pixels for i in range(10)]
    assert any(not torch.equal(v[0], v[1]) for v in views)


@pytest.mark.parametrize("flip_prob", [0.0, 1.0])
def test_flip_probability(images, flip_prob):
    views = small_views(flip_prob=flip_prob, geometry="image")(images, [0, 1, 2], 0, 0)
    assert all((view.flips == flip_prob).all() for view in views)


def test_image_geometry_takes_images_of_any_size():
    images = [np.zeros((50, 80, 3), np.uint8), np.zeros((300, 40, 3), np.uint8)]
    for view in small_views(geometry="image")(images, [0, 1], 0, 0):
        for box, image in zip(view.boxes, images, strict=True):
            assert (box[:2] + box[2:] <= image.shape[:2]).all()
