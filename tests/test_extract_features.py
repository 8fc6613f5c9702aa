import json
import resource
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open

import eval_knn
import extract_features
from support.features import eval_transform
from utils import UserError
from vision_transformer import vit_micro


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Return a file that holds only a network's weights, and the network."""
    torch.manual_seed(3)
    network = vit_micro(8, img_size=32).eval()
    path = tmp_path_factory.mktemp("weights") / "backbone.pth"
    torch.save(network.state_dict(), path)
    return path, network


def read(path):
    """Read a written file to a dictionary, whatever its format."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            found = dict(file)
        names = {name: found[name].tolist() for name in ("paths", "classes")}
        return {**found, **names, "made_with": json.loads(str(found["made_with"]))}
    with safe_open(path, "np") as file:
        metadata = {name: json.loads(value) for name, value in file.metadata().items()}
        return {name: file.get_tensor(name) for name in file.keys()} | metadata  # noqa: SIM118


def extract(path, *words):
    extract_features.main([*map(str, words), "--output", str(path), "--num_workers", "0", "--crop_size", "32"])
    return read(path)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("kind", ["cls", "avgpool", "patches"])
def test_contents_are_those_of_a_direct_forward(photo_folder, weights, tmp_path, kind, suffix):
    options = ["--data_path", photo_folder, "--pretrained_weights", weights[0], "--features", kind, "--split", "val"]
    found = extract(tmp_path / "new" / f"f.{suffix}", *options, "--batch_size_per_gpu", 4)
    names = [f"val/{name}/{i}.jpg" for name in ("china", "flower") for i in range(3)]
    assert found["paths"] == names
    for row, name in zip(found["features"], names, strict=True):
        with torch.no_grad():
            tokens = weights[1](eval_transform(32)(Image.open(photo_folder / name))[None])[0]
        expected = {"cls": tokens[0], "avgpool": sum(tokens[1:]) / 16, "patches": tokens[1:]}[kind]
        np.testing.assert_allclose(row, expected.numpy(), atol=1e-5)
    assert (found["features"].dtype, found["labels"].dtype) == (np.float32, np.int64)
    assert (found["labels"].tolist(), found["classes"]) == ([0, 0, 0, 1, 1, 1], ["china", "flower"])
    made_with = {"pretrained_weights": str(weights[0]), "arch": "vit_micro", "patch_size": 8, "crop_size": 32}
    assert {**found["made_with"], **made_with, "features": kind} == found["made_with"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"f.{suffix}"]
    (tmp_path / "any").touch()
    assert (tmp_path / f"new/f.{suffix}").stat().st_mode == (tmp_path / "any").stat().st_mode


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_half_precision_and_a_flat_folder(photographs, weights, tmp_path, suffix):
    """One photograph is turned by its EXIF orientation."""
    (tmp_path / "flat").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90° clockwise
    photographs[0].transpose(Image.Transpose.ROTATE_270).save(tmp_path / "flat/ü0.png")
    photographs[0].save(tmp_path / "flat/ü1.png", exif=turned)
    options = ["--data_path", tmp_path / "flat", "--pretrained_weights", weights[0]]
    found = extract(tmp_path / f"half.{suffix}", *options, "--half")
    assert (found["paths"], found["classes"], found["labels"].tolist()) == (["ü0.png", "ü1.png"], [], [-1, -1])
    assert found["features"].dtype == np.float16
    np.testing.assert_array_equal(found["features"][0], found["features"][1])
    single = extract(tmp_path / f"single.{suffix}", *options)
    np.testing.assert_array_equal(found["features"], single["features"].astype(np.float16))


def test_images_without_files_are_named_by_their_place(weights, tmp_path):
    found = extract(tmp_path / "f.npz", "--dataset", "digits", "--split", "val", "--pretrained_weights", weights[0])
    assert (len(found["features"]), found["paths"][:2], found["paths"][-1]) == (397, ["val/0", "val/1"], "val/396")
    assert found["classes"] == [str(i) for i in range(10)]
    assert len(np.unique(found["labels"])) == 10


def test_knn_of_the_features_is_that_of_the_evaluation(photo_folder, weights, tmp_path):
    options = ["--data_path", photo_folder, "--pretrained_weights", weights[0]]
    arrays = []
    for split in ("train", "val"):
        found = extract(tmp_path / f"{split}.npz", *options, "--split", split)
        arrays += [F.normalize(torch.tensor(found["features"])), torch.tensor(found["labels"])]
    words = [*options, "--crop_size", 32, "--nb_knn", 1, 5, "--num_workers", 0, "--output_dir", tmp_path]
    eval_knn.main(list(map(str, words)))
    result = json.loads((tmp_path / "knn_folder.json").read_text())["knn"]
    for k in (1, 5):
        assert eval_knn.knn_accuracy(*arrays, k)[0] == result[str(k)]["top1"]


def test_bad_input_is_named_before_any_work(photo_folder, weights, tmp_path, monkeypatch):
    def message(output, *words, data_path=photo_folder):
        words = ["--output", output, "--data_path", data_path, "--pretrained_weights", weights[0], *words]
        with pytest.raises(UserError) as error:
            extract_features.main([*map(str, words)])
        return str(error.value)

    monkeypatch.setattr(extract_features, "extract_features", None)
    assert "f.csv ends in '.csv', expected .npz or .safetensors" in message(tmp_path / "f.csv")
    assert "ends in 'no suffix', expected" in message(tmp_path / "f")
    (tmp_path / "f.npz").write_text("precious")
    assert "already exists and is not overwritten" in message(tmp_path / "f.npz")
    assert (tmp_path / "f.npz").read_text() == "precious"
    assert f"cannot write to the folder of --output {tmp_path}/f.npz: " in message(tmp_path / "f.npz" / "g.npz")
    assert "no folder" in message(tmp_path / "g.npz", data_path=tmp_path / "absent")
    assert message(tmp_path / "g.npz", "--pretrained_weights", "pixels").startswith("no checkpoint at pixels")
    assert "smaller than a patch of 8" in message(tmp_path / "g.npz", "--crop_size", 7)
    assert [path.name for path in tmp_path.iterdir()] == ["f.npz"]


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_full_disk_is_one_line(tmp_path, suffix):
    """A limit on the size of files simulates a full disk."""
    path, (soft, hard) = tmp_path / f"f.{suffix}", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(UserError, match=f"cannot save .*f.{suffix}: .*File too large.*no earlier one"):
            extract_features.write_features(path, torch.zeros(99, 999), [0] * 99, ["a"] * 99, [], "{}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_write_what_one_does(photo_folder, tmp_path, run_script):
    """9 images on 2 processes: uneven shares."""
    for i in range(3):
        for name in ("china", "flower"):
            (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(photo_folder / f"train/{name}/{i}.jpg", tmp_path / f"images/{name}/{i}.jpg")
            shutil.copy(photo_folder / f"train/flower/{3 + i}.jpg", tmp_path / f"images/{i}.jpg")
    words = ["extract_features.py", "--data_path", tmp_path / "images", "--pretrained_weights", "none"]
    words += ["--arch", "vit_micro", "--crop_size", 32, "--num_workers", 0, "--batch_size_per_gpu", 1]
    words += ["--features", "patches", "--half"]
    run_script(*words, "--output", tmp_path / "one.npz")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run_script(*words, "--output", tmp_path / "two.npz", launcher=launcher)
    one, two = read(tmp_path / "one.npz"), read(tmp_path / "two.npz")
    assert one["paths"] == two["paths"]
    assert (one["features"].shape, one["features"].dtype) == ((9, 4, 96), np.float16)
    for name in ("features", "labels"):
        np.testing.assert_array_equal(one[name], two[name])
