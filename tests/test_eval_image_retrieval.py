import json
import pickle

import numpy as np
import pytest
import torch
from conftest import pretend_a_gpu
from PIL import Image

import eval_image_retrieval
from eval_image_retrieval import retrieval_features, score
from utils import UserError
from vision_transformer import vit_micro


@pytest.mark.parametrize(("protocol", "name"), [("easy", "E"), ("medium", "M"), ("hard", "H")])
def test_golden_scores(golden, protocol, name):
    data = golden("eval.npz")
    expected = data["meta"]["retrieval"][name]
    scored = score(data["sim"], data["meta"]["gnd"], protocol)
    assert scored["map"] == pytest.approx(expected["map"], abs=1e-6)
    assert scored["aps"] == pytest.approx(expected["aps"], abs=1e-6)
    assert scored["mp"] == pytest.approx(expected["mp_at_1_5_10"], abs=1e-6)


def test_nothing_relevant_has_no_score():
    scored = score(np.eye(3), [{"easy": [], "hard": [1], "junk": []}] * 3, "easy")
    assert scored == {"map": None, "mp": None, "aps": [None] * 3}


def test_features_of_several_scales():
    network = vit_micro(8, img_size=32).eval()
    images = torch.randn(1, 3, 50, 37)
    with torch.no_grad():
        total = network(images)[:, 0]
        for scale in (2**-0.5, 0.5):
            total = total + network(torch.nn.functional.interpolate(images, scale_factor=scale, mode="bilinear"))[:, 0]
        torch.testing.assert_close(retrieval_features(network, True, images), total / total.norm())
        small = images[..., :12]  # half of it is less than a patch
        assert retrieval_features(network, True, small).shape == (1, 96)


def evaluate(folder, tmp_path, *words, dataset="roxford5k"):
    options = f"--data_path {folder} --dataset {dataset} --num_workers 0 --pretrained_weights none --arch vit_micro"
    eval_image_retrieval.main([*f"{options} --patch_size 8 --output_dir {tmp_path}".split(), *map(str, words)])
    return json.loads((tmp_path / f"{dataset}.json").read_text())


def test_settings_of_the_two_data_sets():
    def settings(words):
        args = eval_image_retrieval.parse_arguments(f"--data_path x --pretrained_weights none {words}".split())
        return args.imsize, args.multiscale

    assert settings("--dataset roxford5k") == (224, False)
    assert settings("--dataset rparis6k") == (512, True)
    assert settings("--dataset rparis6k --imsize 300 --multiscale 0") == (300, False)


@pytest.mark.parametrize("variant", [False, True])
def test_whole_protocol_against_a_naive_one(retrieval_folder, tmp_path, capsys, variant):
    """Against DINO's protocol, and with queries that are cropped and features of several scales."""
    words = ("--imsize", 96, "--crop_queries", variant, "--multiscale", variant)
    result = evaluate(retrieval_folder, tmp_path, *words)
    torch.manual_seed(0)
    network = vit_micro(8, img_size=96).eval()
    contents = pickle.loads((retrieval_folder / "roxford5k/gnd_roxford5k.pkl").read_bytes())

    def feature(name, box=None):
        image = Image.open(retrieval_folder / f"roxford5k/jpg/{name}.jpg").convert("RGB")
        side = 96
        if box:  # shrunk as much as the whole image would be
            side *= max(box[2] - box[0], box[3] - box[1]) / max(image.size)
            image = image.crop(box)
        if max(image.size) > side:  # thumbnails are not enlarged
            image.thumbnail((side, side), Image.Resampling.LANCZOS)
        pixels = (np.asarray(image) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.no_grad():
            images = torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]
            return retrieval_features(network, variant, images)[0].double().numpy()

    database = np.stack([feature(name) for name in contents["imlist"]])
    precisions = []
    for name, entry in zip(contents["qimlist"], contents["gnd"], strict=True):
        order = np.argsort(-(database @ feature(name, entry["bbx"] if variant else None)))
        order = [i for i in order if i not in entry["junk"]]
        ap, found = 0.0, 0
        for rank, i in enumerate(order):
            if i in entry["easy"] or i in entry["hard"]:
                ap += ((1.0 if rank == 0 else found / rank) + (found + 1) / (rank + 1)) / 8
                found += 1
        precisions.append(ap)
    assert result["aps"]["medium"] == pytest.approx(precisions, abs=1e-6)
    assert result["map"]["medium"] == pytest.approx(np.mean(precisions), abs=1e-6)
    assert result["images"] == {"queries": 6, "database": 30}
    assert f"roxford5k medium: mAP {100 * result['map']['medium']:.2f}, mP@1" in capsys.readouterr().out


def test_features_are_compared_where_use_cuda_says(retrieval_folder, tmp_path, monkeypatch):
    pretend_a_gpu(monkeypatch, eval_image_retrieval)
    with pytest.raises(NotImplementedError, match="meta tensor"):
        evaluate(retrieval_folder, tmp_path)
    assert evaluate(retrieval_folder, tmp_path, "--use_cuda", "false")["args"]["use_cuda"] is False


def test_bad_input_is_named(tmp_path):
    def message(*words):
        with pytest.raises(UserError) as error:
            evaluate(tmp_path, tmp_path, *words)
        return str(error.value)

    folder = tmp_path / "roxford5k"
    layout = f"expected {folder}/gnd_roxford5k.pkl and {folder}/jpg/*.jpg"
    assert message() == f"no ground truth {folder}/gnd_roxford5k.pkl: {layout}"
    (folder / "jpg").mkdir(parents=True)

    def write(contents):
        (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(contents))

    entry = {"bbx": [0, 0, 5, 5], "easy": [0], "hard": [], "junk": []}
    contents = {"imlist": ["a", "b"], "qimlist": ["q"], "gnd": [entry]}
    write(contents)
    assert message() == f"3 images are missing, the first is {folder}/jpg/q.jpg: {layout}"
    nested = []
    for _ in range(60):
        nested = [nested, nested]
    wrong = [{"gnd": []}, {"gnd": nested}, {"imlist": nested}, {"gnd": [{**entry, "easy": nested}]}]
    wrong += [{"gnd": [{**entry, "junk": [2]}]}, {"gnd": [{**entry, "bbx": [float("nan")] * 4}]}]
    for changed in wrong:
        write({**contents, **changed})
        assert message() == f"cannot read {folder}/gnd_roxford5k.pkl: it is not the ground truth of roxford5k"
    for name in "abq":
        Image.new("RGB", (30, 20)).save(folder / f"jpg/{name}.jpg")
    write(contents)
    assert evaluate(tmp_path, tmp_path)["map"]["hard"] is None
    assert "images of side 4 are smaller than a patch of 8 pixels" in message("--imsize", 4)
    (folder / "jpg/b.jpg").write_bytes(b"broken")
    assert f"cannot read image {folder}/jpg/b.jpg" in message()
    Image.new("RGB", (300, 10)).save(folder / "jpg/b.jpg")
    thin = f"{folder}/jpg/b.jpg is 7 pixels thin at --imsize 224, a patch has 8: give a larger --imsize"
    assert message().startswith(thin)
    Image.new("RGB", (300, 20)).save(folder / "jpg/b.jpg")
    assert f"{folder}/jpg/q.jpg is 5 pixels thin" in message("--crop_queries", "true")
