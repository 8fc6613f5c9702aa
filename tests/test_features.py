import numpy as np
import pytest
import torch
from conftest import open_dataset
from PIL import Image
from sklearn.decomposition import PCA

from augment import MEAN, STD
from support.features import (
    cls_attention,
    eval_transform,
    extract_features,
    network_input,
    normalized_patches_mean,
    patch_features,
    principal_colors,
)
from vision_transformer import vit_micro


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return vit_micro(8, img_size=32).eval()


@pytest.fixture
def image(photographs):
    """Return a photograph, uint8 [32, 48, 3]."""
    return np.array(photographs[0].resize((48, 32)))


def normal(image):
    """Normalize pixels as ImageNet's, in float64: uint8 [H, W, 3] -> [1, 3, H, W]."""
    mean, std = (torch.tensor(x, dtype=torch.float64) for x in (MEAN, STD))
    return ((torch.tensor(image).double() / 255 - mean) / std).permute(2, 0, 1)[None]


def test_eval_transform_is_dinos(photographs):
    image = photographs[0]  # 640x427
    pixels = eval_transform(224)(image)
    resized = image.resize((256 * 640 // 427, 256), Image.Resampling.BICUBIC)
    left = round((resized.width - 224) / 2)
    expected = np.asarray(resized.crop((left, 16, left + 224, 240))) / 255
    expected = (expected - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert pixels.shape == (3, 224, 224)
    np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_features_keep_the_order_of_the_data_set(photo_folder):
    dataset = open_dataset("folder", photo_folder, "train", eval_transform(32))
    features = extract_features(lambda x: x.mean((2, 3)), dataset, torch.device("cpu"), batch_size=5, num_workers=0)
    expected = torch.stack([image.mean((1, 2)) for image, _ in dataset])
    torch.testing.assert_close(features, expected)


def test_mean_of_patches_is_normalized_after_the_mean():
    tokens = np.random.default_rng(0).normal(size=(3, 5, 4))
    expected = [np.mean(rows[1:], axis=0) / np.linalg.norm(np.mean(rows[1:], axis=0)) for rows in tokens]
    found = normalized_patches_mean(lambda images: torch.tensor(tokens))(torch.empty(3, 3, 8, 8))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_network_input_is_normalized(image):
    for pixels in (image, image[:, ::-1], np.asfortranarray(image)):
        batch = network_input(pixels, "cpu")
        assert (batch.shape, batch.dtype) == ((1, 3, 32, 48), torch.float32)
        torch.testing.assert_close(batch.double(), normal(pixels.copy()), atol=1e-6, rtol=1e-6)


def test_attention_is_that_of_the_last_block(backbone, image):
    attention = cls_attention(backbone, image)
    assert attention.shape == (3, 4, 6)
    # By hand, in float64: what goes into the last block, its queries and keys.
    network = vit_micro(8, img_size=32).double().eval()
    network.load_state_dict(backbone.state_dict())
    tokens = []
    network.blocks[-1].register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]))
    network(normal(image))
    block = network.blocks[-1]
    q, k, _ = block.attn.qkv(block.norm1(tokens[0]))[0].chunk(3, dim=1)  # [25, 96]
    for head in range(3):
        own = slice(32 * head, 32 * (head + 1))
        expected = (q[0, own] @ k[:, own].T / 32**0.5).softmax(0)[1:]
        np.testing.assert_allclose(attention[head].ravel(), expected.detach(), atol=1e-6)


def test_colors_are_principal_components_that_the_images_share(backbone, image):
    images = [image, image[:16, ::-1]]
    features = [patch_features(backbone, x) for x in images]
    tokens = backbone(normal(images[1].copy()).float())[0, 1:]
    torch.testing.assert_close(features[1], tokens.detach().unflatten(0, (2, 6)), atol=1e-5, rtol=1e-5)
    colors, explained = principal_colors(features, [np.arange(12).reshape(2, 2, 3)] * 2)
    assert [c.shape for c in colors] == [(4, 6, 3), (2, 6, 3)]
    everything = torch.cat([f.flatten(0, 1) for f in features]).double().numpy()
    pca = PCA(3).fit(everything)
    np.testing.assert_allclose(explained, pca.explained_variance_ratio_, rtol=1e-6)
    shown = np.concatenate([c.reshape(-1, 3) for c in colors]).astype(float)
    for component, values in enumerate(pca.transform(everything).T):
        low, high = np.quantile(values, (0.01, 0.99))
        expected = 255 * ((values - low) / (high - low)).clip(0, 1)
        flipped = 255 - expected  # the sign of a component means nothing
        assert min(np.abs(shown[:, component] - e).max() for e in (expected, flipped)) < 1
