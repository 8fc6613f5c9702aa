import numpy as np
import torch
from PIL import Image

from datasets import build_dataset
from features import eval_transform, extract_features


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
    dataset = build_dataset("folder", photo_folder, "train", eval_transform(32))
    features = extract_features(lambda x: x.mean((2, 3)), dataset, torch.device("cpu"), batch_size=5, num_workers=0)
    expected = torch.stack([image.mean((1, 2)) for image, _ in dataset])
    torch.testing.assert_close(features, expected)
