import json
import re

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from test_main_lgssl import train
from timm.data import resolve_data_config

import eval_knn
import eval_linear
import export
import extract_features
from support.weights import load_backbone
from utils import UserError
from vision_transformer import ARCHITECTURES, vit_micro


def saved(network, path):
    """Save a network as main_lgssl.py does, and return the options that name it."""
    state = {f"backbone.{name}": value for name, value in network.state_dict().items()}
    student = {name: value + 0.01 for name, value in state.items()}
    torch.save({"teacher": state, "student": student}, path)
    return ["--pretrained_weights", str(path)]


@torch.no_grad()
def difference(theirs, network, images):
    return (theirs.forward_features(images) - network(images)).abs().max().item()


@pytest.mark.parametrize(
    ("arch", "patch_size", "side"),
    [("vit_micro", 8, 32), ("vit_tiny", 32, 96), ("vit_tiny", 16, 224)],
)
def test_timm_reads_the_folder(tmp_path, capsys, arch, patch_size, side):
    torch.manual_seed(1)
    network = ARCHITECTURES[arch](patch_size, img_size=side).eval()
    torch.nn.init.normal_(network.norm.bias)  # of the order of the tokens
    export.main([*saved(network, tmp_path / "c.pth"), "--output_dir", str(tmp_path / "new" / "timm")])
    folder = tmp_path / "new" / "timm"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    images = torch.randn(2, 3, side, side)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert difference(theirs, network, images) < 1e-5
    torch.testing.assert_close(theirs(images), network(images)[:, 0], rtol=0, atol=1e-5)  # its pooling is CLS
    data = resolve_data_config(model=theirs)
    assert (data["input_size"], data["interpolation"], data["crop_pct"]) == ((3, side, side), "bicubic", 0.875)
    np.testing.assert_allclose([data["mean"], data["std"]], [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    name = f"{arch}_patch{patch_size}_224"
    if timm.is_model(name) and side == 224:
        theirs = timm.create_model(name, checkpoint_path=folder / "model.safetensors", num_classes=0).eval()
        assert difference(theirs, network, images) < 1e-5
        assert json.loads((folder / "config.json").read_text())["architecture"] == name
    assert f'timm.create_model("local-dir:{folder}", pretrained=True)' in capsys.readouterr().out
    assert torch.equal(load_backbone(folder / "model.safetensors")[0].pos_embed, network.pos_embed)


def evaluated(weights, folder, photo_folder):
    """Return what the evaluations say about weights, without the paths."""
    words = ["--data_path", str(photo_folder), "--pretrained_weights", str(weights), "--num_workers", "0"]
    eval_knn.main([*words, "--nb_knn", "2", "--output_dir", str(folder)])
    eval_linear.main([*words, "--epochs", "1", "--output_dir", str(folder)])
    extract_features.main([*words, "--output", str(folder / "f.npz")])
    results = [json.loads((folder / f"{name}_folder.json").read_text()) for name in ("knn", "linear")]
    for result in results:
        del result["args"]
    with np.load(folder / "f.npz") as file:
        return results, file["features"]


def test_evaluations_of_an_export_equal_those_of_its_checkpoint(photo_folder, tmp_path):
    train(photo_folder, tmp_path / "run", "--epochs", 1, "--flip_prob", 0, "--intensity_range", 0, 4095)
    export.main(["--pretrained_weights", f"{tmp_path}/run/checkpoint.pth", "--output_dir", str(tmp_path / "export")])
    expected, features = evaluated(tmp_path / "run/checkpoint.pth", tmp_path / "run", photo_folder)
    found, own = evaluated(tmp_path / "export/model.safetensors", tmp_path / "export", photo_folder)
    assert found == expected
    np.testing.assert_array_equal(own, features)
    assert found[1]["protocol"]["flip_prob"] == 0.0
    assert found[1]["pretraining"]["intensity_range"] == [0.0, 4095.0]
    assert timm.create_model(f"local-dir:{tmp_path}/export", pretrained=True).patch_embed.img_size == (32, 32)

    (tmp_path / "bare").mkdir()  # without config.json, only the side of the images is known
    (tmp_path / "export/model.safetensors").rename(tmp_path / "bare/model.safetensors")
    found, own = evaluated(tmp_path / "bare/model.safetensors", tmp_path / "bare", photo_folder)
    assert found[0]["knn"] == expected[0]["knn"]
    np.testing.assert_array_equal(own, features)
    assert found[1]["crop_size"] == 32
    assert found[1]["protocol"]["flip_prob"] == 0.5


def test_other_configurations_are_ignored_or_named(tmp_path):
    export.main([*saved(vit_micro(8, img_size=32), tmp_path / "c.pth"), "--output_dir", str(tmp_path)])
    for config, message in (
        ({"pretraining": {"flip_prob": "often"}}, "config.json records flip_prob 'often', expected a number in"),
        ({"pretraining": {"intensity_range": [1]}}, "config.json records intensity_range [1], expected two numbers"),
        ({"pretraining": 3}, "config.json records arguments of type int"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=re.escape(message)):
            load_backbone(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')  # of another project
    assert load_backbone(tmp_path / "model.safetensors")[1] == {}


def test_all_names_of_timm_are_of_the_same_network():
    for arch, build in ARCHITECTURES.items():
        for patch_size in (8, 16, 32):
            with torch.device("meta"):
                network = build(patch_size)
                config = export.timm_config(network, {})
                theirs = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
            name = f"{arch}_patch{patch_size}_224"
            assert config["architecture"] == (name if timm.is_model(name) else "vit_tiny_patch16_224")
            shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (theirs, network)]
            assert shapes[0] == shapes[1]
            assert theirs.blocks[0].attn.num_heads == network.blocks[0].attn.num_heads


def test_the_student_is_exported(tmp_path):
    words = [*saved(vit_micro(8, img_size=32), tmp_path / "c.pth"), "--checkpoint_key", "student"]
    export.main([*words, "--output_dir", str(tmp_path)])
    student = load_backbone(tmp_path / "c.pth", checkpoint_key="student")[0]
    assert torch.equal(load_file(tmp_path / "model.safetensors")["norm.weight"], student.norm.weight)


@pytest.mark.slow
def test_onnx_has_the_same_tokens(tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    network = vit_micro(8, img_size=32).eval()
    export.main([*saved(network, tmp_path / "c.pth"), "--output_dir", str(tmp_path), "--onnx"])
    assert "largest difference from the source in onnxruntime" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for count in (1, 3, 5):
        images = torch.randn(count, 3, 32, 32)
        (tokens,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(tokens, network(images).detach().numpy(), atol=1e-5)
    names = sorted(path.name for path in tmp_path.glob("model*"))
    assert names == ["model.onnx", "model.safetensors"]  # no file of external data


def test_bad_input_is_named_and_nothing_is_lost(tmp_path, monkeypatch):
    weights = saved(vit_micro(8, img_size=32), tmp_path / "c.pth")

    def message(folder, *words):
        with pytest.raises(UserError) as error:
            export.main([*weights, "--output_dir", str(folder), *words])
        return str(error.value)

    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text("precious")
    assert "old/config.json already exists and is not overwritten" in message(tmp_path / "old")
    assert (tmp_path / "old/config.json").read_text() == "precious"
    assert f"cannot write to --output_dir {tmp_path}/c.pth/new: " in message(tmp_path / "c.pth/new")
    assert "does not fit vit_tiny" in message(tmp_path / "new", "--arch", "vit_tiny")
    assert not (tmp_path / "new").exists()
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else name)
        needed = "--onnx needs more packages: pip install onnx onnxscript onnxruntime"
        assert message(tmp_path / "new", "--onnx") == needed
    monkeypatch.setattr(export, "timm_model", lambda *_: vit_micro(8, img_size=32).eval())
    assert "the exported network differs by" in message(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
