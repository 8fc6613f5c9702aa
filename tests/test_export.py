import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_data_config

import export
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


def test_all_names_of_timm_are_of_the_same_network():
    for arch, build in ARCHITECTURES.items():
        for patch_size in (8, 16, 32):
            with torch.device("meta"):
                network = build(patch_size)
                config = export.timm_config(network)
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
