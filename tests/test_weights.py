"""Reading weights: the files of others, what does not fit, and what is refused."""

import argparse
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import GOLDEN
from safetensors.torch import save_file

from support.evaluation import ModelSpec, open_model
from support.weights import load_backbone, load_file, load_start
from utils import UserError
from vision_transformer import ARCHITECTURES, DINOHead, VisionTransformer, vit_micro


def assert_same(backbone, network):
    assert not backbone.training
    state, expected = backbone.state_dict(), network.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.fixture
def refused(tmp_path):
    """Return a function that saves contents as a checkpoint and returns the line with which it is refused."""

    def message(contents, **options):
        torch.save(contents, tmp_path / "c.pth")
        with pytest.raises(UserError) as error:
            load_backbone(tmp_path / "c.pth", **options)
        (line,) = str(error.value).splitlines()
        return line

    return message


@pytest.mark.parametrize("form", ["zip", "before PyTorch 1.6"])
@pytest.mark.parametrize("numpy_module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_dinos_full_checkpoints_are_read(tmp_path, form, numpy_module):
    """Wrapped networks, arguments as a Namespace, and learning rates of a NumPy schedule in the optimizer's state."""
    teacher, student = vit_micro(8, img_size=32), vit_micro(8, img_size=32)
    head = DINOHead(96, 20, hidden_dim=32).state_dict()
    contents = {
        "student": {f"module.backbone.{k}": v for k, v in student.state_dict().items()}
        | {f"module.head.{k}": v for k, v in head.items()},
        "teacher": {f"backbone.{k}": v for k, v in teacher.state_dict().items()}
        | {f"head.{k}": v for k, v in head.items()},
        "optimizer": torch.optim.AdamW(student.parameters(), lr=np.float64(0.0005)).state_dict(),
        "epoch": 800,
        "args": argparse.Namespace(arch="deit_micro", patch_size=8, lr=0.0005, out_dim=65536),
        "dino_loss": {"center": torch.zeros(1, 9)},
    }
    path = tmp_path / "checkpoint.pth"
    torch.save(contents, path, _use_new_zipfile_serialization=form == "zip")
    if form == "zip":
        with zipfile.ZipFile(path) as file:
            parts = {name: file.read(name) for name in file.namelist()}
        with zipfile.ZipFile(path, "w") as file:
            for name, part in parts.items():
                file.writestr(name, part.replace(b"numpy._core.multiarray", numpy_module))
    else:
        path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", numpy_module))
    assert numpy_module in path.read_bytes()
    assert load_file(path)["optimizer"]["param_groups"][0]["lr"] == 0.0005
    backbone, made_with = load_backbone(path)
    assert_same(backbone, teacher)
    assert (made_with["arch"], made_with["epoch"], made_with["out_dim"]) == ("vit_micro", 800, 65536)
    assert_same(load_backbone(path, "deit_micro", checkpoint_key="student")[0], student)


def test_checkpoints_of_version_0_9_0_are_read(monkeypatch):
    """Its architecture, vit_nano, is one of the tests."""
    contents = load_file(GOLDEN / "checkpoint_0.9.0.pth")
    width = contents["teacher"]["backbone.cls_token"].shape[-1]
    depth = 1 + max(int(name.split(".")[2]) for name in contents["teacher"] if name.startswith("backbone.blocks."))

    def vit_nano(patch_size, **options):
        return VisionTransformer(patch_size=patch_size, embed_dim=width, depth=depth, num_heads=1, **options)

    monkeypatch.setitem(ARCHITECTURES, "vit_nano", vit_nano)
    backbone, made_with = load_backbone(GOLDEN / "checkpoint_0.9.0.pth")
    assert torch.equal(backbone.cls_token, contents["teacher"]["backbone.cls_token"])
    assert made_with == {**contents["args"], "epoch": contents["epoch"], "batch_size": 280}


@pytest.mark.parametrize(
    "prefix", ["", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.", "model.", "model.module."]
)
def test_prefixes_of_wrappers_are_stripped(tmp_path, prefix):
    """Those of torch.compile, wrappers for several processes, and trainers, before a backbone and before both parts."""
    network, head = vit_micro(8, img_size=32), DINOHead(96, 20, hidden_dim=32).state_dict()
    state = network.state_dict()
    save_file({f"{prefix}{name}": value for name, value in state.items()}, tmp_path / "c.safetensors")
    assert_same(load_backbone(tmp_path / "c.safetensors")[0], network)
    both = {f"{prefix}backbone._orig_mod.{name}": value for name, value in state.items()}
    torch.save({"teacher": both | {f"{prefix}head.{name}": value for name, value in head.items()}}, tmp_path / "c.pth")
    start = load_start(tmp_path / "c.pth", "vit_micro", 8)
    assert_same(start.backbone, network)
    assert start.head.keys() == head.keys()
    assert all(torch.equal(start.head[name], value) for name, value in head.items())


@pytest.mark.parametrize(
    ("others", "prefix", "found", "key"),
    [
        ({"model_state_dict": {}, "optimizer_state_dict": {"state": {}}, "loss": 0.4}, "", [], "model_state_dict"),
        ({"model": {}, "args": argparse.Namespace(model="mae"), "scaler": {"scale": 1.0}}, "", [], "model"),
        ({"state_dict": {}, "state_dict_ema": {}, "args": argparse.Namespace(opt_kwargs={}, mean=None), "version": 2},
         "module.", ["state_dict", "state_dict_ema"], "state_dict_ema"),
        ({"state_dict": {}, "loops": {"fit": {}}, "loss": torch.ones(2)}, "model.backbone.", [], "state_dict"),
    ],
    ids="PyTorch MAE timm Lightning".split(),
)  # fmt: skip
def test_full_checkpoints_of_others(tmp_path, refused, others, prefix, found, key):
    """The message names the keys that hold tensors, and --checkpoint_key reads one of them."""
    network = vit_micro(8, img_size=32)
    state = {f"{prefix}{name}": value for name, value in network.state_dict().items()}
    contents = {"epoch": torch.tensor(3)} | others
    contents |= {name: state for name, value in others.items() if value == {}}
    line = refused(contents)
    assert line.endswith(f"has no 'teacher', found {found or [key]}: give one of these as --checkpoint_key")
    assert_same(load_backbone(tmp_path / "c.pth", checkpoint_key=key)[0], network)
    assert_same(load_start(tmp_path / "c.pth", "vit_micro", 8, key).backbone, network)


def test_networks_of_others_that_cannot_be_read_are_named(refused):
    state = vit_micro(8, img_size=32).state_dict()
    both = {f"{side}_backbone.{name}": value for side in ("student", "teacher") for name, value in state.items()}
    expected = "found it behind ['student_backbone.', 'teacher_backbone.']: save one of these networks"
    assert expected in refused({"state_dict": both}, checkpoint_key="state_dict")
    dinov2 = {f"backbone.{name}": value for name, value in state.items()} | {"dino_head.mlp.0.weight": torch.ones(1)}
    dinov2["backbone.blocks.0.ls1.gamma"] = torch.ones(96)
    line = refused({"teacher": dinov2})
    assert line.endswith(
        "c.pth does not fit vit_micro with patch size 8: blocks.0.ls1.gamma is not part of the network"
    )
    twice = state | {f"module.{name}": value for name, value in state.items()}
    assert "holds several tensors 'cls_token' with other prefixes" in refused(twice)
    nothing = "has no 'teacher', found ['epoch', 'config']: none of these is a dictionary of weights"
    assert nothing in refused({"epoch": 3, "config": {"lr": 1.0}})


def test_timms_safetensors_are_read_and_agree(tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    backbone, _ = load_backbone(tmp_path / "model.safetensors")
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(backbone(image), theirs.forward_features(image), rtol=0, atol=1e-5)
    assert open_model(ModelSpec(f"{tmp_path}/model.safetensors")).img_size == 224


@pytest.mark.parametrize(("arch", "patch_size"), [("vit_micro", 8), ("vit_tiny", 32)])
def test_architecture_patch_size_and_grid_are_read_from_the_shapes(tmp_path, arch, patch_size):
    """Backbone files of DINO and timm store none of them."""
    network = ARCHITECTURES[arch](patch_size, img_size=96)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    backbone, _ = load_backbone(tmp_path / "model.safetensors")
    assert_same(backbone, network)
    assert backbone.patch_embed.patch_size == (patch_size, patch_size)
    assert backbone.patch_embed.grid_size == (96 // patch_size, 96 // patch_size)
    assert open_model(ModelSpec(f"{tmp_path}/model.safetensors")).img_size == 96


def test_weights_that_do_not_fit_are_named(tmp_path, refused):
    state = vit_micro(16).state_dict()
    line = refused(state, patch_size=8)
    assert "does not fit vit_micro with patch size 8: " in line
    assert "patch_embed.proj.weight is [96, 3, 16, 16], expected [96, 3, 8, 8]" in line
    assert line.endswith("; expected --arch vit_micro --patch_size 16")
    assert "blocks.4.norm1.weight is missing" in refused(state, arch="vit_tiny")
    assert "mask_token is not part of the network" in refused({**state, "mask_token": torch.zeros(1)})
    assert "norm.weight is missing" in refused({k: v for k, v in state.items() if k != "norm.weight"})
    assert "not finite: norm.weight" in refused({**state, "norm.weight": torch.full((96,), torch.inf)})
    assert "no architecture resnet50" in refused({"teacher": state, "args": {"arch": "resnet50"}})
    assert "has no 'teacher', found ['student']" in refused({"student": state})
    resnet = {"conv1.weight": torch.zeros(64, 3, 7, 7), "bn1.weight": torch.zeros(64)}
    expected = "holds no ViT: expected patch_embed.proj.weight [D, 3, p, p], found "
    assert f"{expected}['conv1.weight', 'bn1.weight']" in refused(resnet)
    assert f"{expected}[96, 768]" in refused({**state, "patch_embed.proj.weight": torch.zeros(96, 768)})
    large = {"patch_embed.proj.weight": torch.zeros(1024, 3, 16, 16)}
    assert "of width 1024, expected one of 96, 192" in refused(large)
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(UserError, match="no checkpoint at"):
            load_backbone(path)
    torch.save(state, tmp_path / "c.pth")
    for contents in (b"not a checkpoint", (tmp_path / "c.pth").read_bytes()[:50000]):  # the second: a failed download
        (tmp_path / "d.pth").write_bytes(contents)
        with pytest.raises(UserError, match="cannot read .*d.pth: it is damaged, incomplete or of another format"):
            load_backbone(tmp_path / "d.pth")


class Hostile:
    def __reduce__(self):
        return (pytest.fail, ("a checkpoint was executed",))


@pytest.mark.parametrize("value", [Hostile(), np.arange(3), Path("x"), np.float32(1)])
def test_nothing_but_tensors_and_plain_values_is_read(tmp_path, refused, value):
    assert "c.pth: it " in refused({"teacher": vit_micro(16).state_dict(), "value": value})
    (tmp_path / "d.pth").write_bytes(pickle.dumps(Hostile(), protocol=2))
    with pytest.raises(UserError, match="cannot read .*d.pth"):
        load_file(tmp_path / "d.pth")


def test_a_changed_bit_is_found(tmp_path):
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "c.pth")
    whole = (tmp_path / "c.pth").read_bytes()
    place = whole.index(bytes(64)) + 400
    (tmp_path / "c.pth").write_bytes(whole[:place] + b"\1" + whole[place + 1 :])
    with pytest.raises(UserError, match="its record .*/data/0 is damaged"):
        load_file(tmp_path / "c.pth")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("norm.weight", lambda value: value.to("meta")),
        ("pos_embed", lambda value: torch.zeros(1).expand(1, 1 + 20000**2, 96)),  # 150 GB of one number
    ],
)
def test_tensors_that_are_no_plain_arrays_are_one_line(refused, name, change):
    state = vit_micro(8, img_size=32).state_dict()
    assert "c.pth" in refused({**state, name: change(state[name])})


def nested(levels):
    """Return lists that contain one list twice: 2^levels values in a small file."""
    value = ["x"]
    for _ in range(levels):
        value = [value, value]
    return value


def cyclic():
    value = [1]
    value.append(value)
    return value


@pytest.mark.parametrize("value", [nested(100), cyclic(), {"a": nested(100)}, 10**500, b"bytes", torch.zeros(3)])
def test_arguments_that_are_not_plain_are_refused_at_once(refused, value):
    state = vit_micro(8, img_size=32).state_dict()
    assert "records the argument" in refused({"teacher": state, "args": {"note": value}})
    assert "records the argument" in refused({"teacher": state, "args": argparse.Namespace(note=value)})


@pytest.mark.parametrize(("name", "value"), [("patch_size", "8"), ("global_crops_size", 10**7)])
def test_recorded_sides_that_no_run_has_are_refused(refused, name, value):
    contents = {"teacher": vit_micro(8, img_size=32).state_dict(), "args": {name: value}}
    assert f"records {name} {value!r}, expected a whole number in [1, 8192]" in refused(contents)
