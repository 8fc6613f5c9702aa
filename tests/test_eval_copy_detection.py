import json

import numpy as np
import pytest
import torch
from conftest import pretend_a_gpu
from PIL import Image

import eval_copy_detection
from eval_copy_detection import Whitening, copy_features, mean_average_precision
from support.evaluation import average_precision
from utils import UserError
from vision_transformer import vit_micro


def test_golden_average_precision(golden):
    for case in golden("eval.npz")["meta"]["ap_from_ranks"]:
        assert average_precision(case["ranks"], case["nres"]) == pytest.approx(case["ap"], abs=1e-6)


def test_golden_whitening(golden):
    data = golden("eval.npz")
    whitened = Whitening(torch.tensor(data["whiten_fit"]))(torch.tensor(data["whiten_apply"])).numpy()
    expected = data["whiten_result"]
    np.testing.assert_allclose(whitened @ whitened.T, expected @ expected.T, rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(np.sort(whitened**2, 1), np.sort(expected**2, 1), rtol=1e-6, atol=1e-4)


def test_whitening_of_fewer_images_than_dimensions_is_bounded():
    features = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    largest = np.linalg.eigvalsh((features.T @ features).numpy() / 5).max()
    bound = (features - features.mean(0)).norm(dim=1) / (1e-5 * largest) ** 0.5
    assert (Whitening(features)(features).norm(dim=1) <= 1.001 * bound).all()


def test_features_are_cls_and_gem():
    network = vit_micro(8, img_size=32).eval()
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        tokens = network(images).double().numpy()
        features = copy_features(network, images).numpy()
    gem = (np.maximum(tokens[:, 1:], 1e-6) ** 4).mean(1) ** 0.25
    np.testing.assert_allclose(features, np.concatenate([tokens[:, 0], gem], 1), rtol=1e-4, atol=1e-6)


def test_only_the_first_results_count():
    similarity = torch.tensor([[0.1, 0.9, 0.5, 0.3], [0.8, 0.1, 0.2, 0.7]])
    # query 0 ranks 1, 2, 3, 0; query 1 ranks 0, 3, 2, 1
    positives = [[3], [0, 1]]
    ap_first, ap_second = (1 / 3 + 0) / 2, ((1 + 1) / 2 + (2 / 4 + 1 / 3) / 2) / 2
    assert mean_average_precision(similarity, positives) == pytest.approx((ap_first + ap_second) / 2)
    assert mean_average_precision(similarity, positives, topk=2) == pytest.approx((0 + 0.5) / 2)
    assert mean_average_precision(similarity, positives, topk=20) == mean_average_precision(similarity, positives)


def evaluate(folder, tmp_path, *words):
    options = f"--data_path {folder}/copydays --imsize 64 --num_workers 0 --pretrained_weights none --arch vit_micro"
    eval_copy_detection.main([*f"{options} --patch_size 8 --output_dir {tmp_path}".split(), *map(str, words)])
    return json.loads((tmp_path / "copydays.json").read_text())


def test_whole_protocol_against_a_naive_one(copydays_folder, tmp_path, capsys):
    whitening = ("--whitening_path", copydays_folder / "whitening")
    result = evaluate(
        copydays_folder, tmp_path, *whitening, "--distractors_path", copydays_folder / "distractors", "--topk", 5
    )
    torch.manual_seed(0)
    network = vit_micro(8, img_size=64).eval()

    def features(folder):
        rows = []
        for path in sorted((copydays_folder / folder).glob("*.jpg")):
            pixels = np.asarray(Image.open(path).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)) / 255
            pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
            with torch.no_grad():
                tokens = network(torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None])[0].double().numpy()
            rows.append(np.concatenate([tokens[0], (np.maximum(tokens[1:], 1e-6) ** 4).mean(0) ** 0.25]))
        return np.array(rows)

    fit = features("whitening")
    values, vectors = np.linalg.eigh(fit.T @ fit / len(fit))
    values = np.maximum(values, 1e-5 * values.max())

    def whiten(x):
        x = (x - fit.mean(0)) @ vectors / np.sqrt(values)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    database = whiten(np.concatenate([features("copydays/original"), features("distractors")]))
    output = capsys.readouterr().out
    for block, copies in (("strong", 3), ("jpegqual/15", 1)):
        precisions = []
        for i, query in enumerate(whiten(features(f"copydays/{block}"))):
            rank = list(np.argsort(-(database @ query))).index(i // copies)
            before = 1.0 if rank == 0 else 0.0
            precisions.append((before + 1 / (rank + 1)) / 2 if rank < 5 else 0.0)
        assert result["map"][block] == pytest.approx(np.mean(precisions), abs=1e-6)
        assert f"copy detection, {block}: mAP {result['map'][block]:.3f}" in output
    assert result["images"] == {"original": 12, "strong": 36, "jpegqual/15": 12, "distractors": 10, "whitening": 60}


def test_features_are_compared_where_use_cuda_says(copydays_folder, tmp_path, monkeypatch):
    pretend_a_gpu(monkeypatch, eval_copy_detection)
    with pytest.raises(NotImplementedError, match="meta tensor"):
        evaluate(copydays_folder, tmp_path)
    assert evaluate(copydays_folder, tmp_path, "--use_cuda", "false")["args"]["use_cuda"] is False


def test_bad_input_is_named(copydays_folder, tmp_path, capsys):
    def message(folder, *words):
        with pytest.raises(UserError) as error:
            evaluate(folder, tmp_path, *words)
        return str(error.value)

    (tmp_path / "copydays/original").mkdir(parents=True)
    (tmp_path / "copydays/strong").mkdir()
    assert f"no images in {tmp_path}/copydays/original: Copydays is" in message(tmp_path)
    for path in ("copydays/original/200000.jpg", "copydays/strong/200101.jpg", "one.jpg"):
        Image.new("RGB", (9, 9)).save(tmp_path / path)
    assert "200101.jpg has no original: expected" in message(tmp_path)
    assert "cannot read" in message(copydays_folder, "--whitening_path", tmp_path / "absent")
    (tmp_path / "list.txt").write_text("one.jpg\n")
    evaluate(copydays_folder, tmp_path, "--whitening_path", tmp_path / "list.txt")
    assert "warning: 1 whitening images do not span the 192 features" in capsys.readouterr().err
    (tmp_path / "one.jpg").write_bytes(b"broken")
    words = ("--whitening_path", tmp_path / "list.txt")
    assert f"cannot read image {tmp_path}/one.jpg" in message(copydays_folder, *words)
