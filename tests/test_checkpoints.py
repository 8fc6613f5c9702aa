import argparse
import math
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from support import checkpoints
from support.weights import load_backbone, load_file
from utils import UserError
from vision_transformer import vit_micro


class Hostile:
    def __reduce__(self):
        return (pytest.fail, ("a checkpoint was executed",))


def test_a_checkpoint_that_would_execute_code_is_refused(tmp_path):
    torch.save({"teacher": vit_micro(16).state_dict(), "args": Hostile()}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="cannot be read as a checkpoint of tensors and plain values"):
        load_backbone(tmp_path / "c.pth")
    (tmp_path / "d.pth").write_bytes(pickle.dumps(Hostile(), protocol=2))
    with pytest.raises(UserError, match="cannot be read"):
        load_backbone(tmp_path / "d.pth")


@pytest.mark.parametrize("form", ["zip", "before PyTorch 1.6"])
@pytest.mark.parametrize("numpy_module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_dinos_full_checkpoints_are_read(tmp_path, form, numpy_module):
    """DINO's structure: arguments as a Namespace, and learning rates of a NumPy schedule in the optimizer state."""
    network = vit_micro(8, img_size=32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=np.float64(0.0005))
    contents = {
        "student": {f"module.backbone.{k}": v for k, v in network.state_dict().items()},
        "teacher": {f"backbone.{k}": v for k, v in network.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "epoch": 800,
        "args": argparse.Namespace(arch="vit_micro", patch_size=8, lr=0.0005, out_dim=65536),
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
    read = load_file(path)
    assert read["optimizer"]["param_groups"][0]["lr"] == 0.0005
    backbone, made_with = load_backbone(path)
    assert (made_with["epoch"], made_with["out_dim"]) == (800, 65536)
    assert torch.equal(backbone.cls_token, network.cls_token)


@pytest.mark.parametrize("value", [np.arange(3), Path("x"), slice(3), np.float32(1)])
def test_nothing_else_is_admitted(tmp_path, value):
    torch.save({"teacher": {}, "value": value}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="cannot be read as a checkpoint of tensors and plain values"):
        load_file(tmp_path / "c.pth")


def test_a_changed_bit_is_found(tmp_path):
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "c.pth")
    whole = (tmp_path / "c.pth").read_bytes()
    place = whole.index(bytes(64)) + 400
    (tmp_path / "c.pth").write_bytes(whole[:place] + b"\1" + whole[place + 1 :])
    with pytest.raises(UserError, match="its record .*/data/0 is damaged"):
        load_file(tmp_path / "c.pth")


def test_a_save_that_fails_leaves_the_last_checkpoint(tmp_path):
    checkpoints.save({"epoch": 1}, tmp_path / "checkpoint.pth")
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoints.save({"epoch": lambda: 2}, tmp_path / "checkpoint.pth")
    assert load_file(tmp_path / "checkpoint.pth") == {"epoch": 1}


def test_what_differs_from_an_earlier_run_is_named():
    earlier = {"lr": 1, "loss": "sum", "num_workers": 1}
    checkpoints.refuse_other_run(earlier, {"lr": 1, "loss": "sum", "num_workers": 9}, {}, ["num_workers"], "c.pth")
    with pytest.raises(UserError, match="--loss sum there, mean here, --seed unknown there, 3 here"):
        checkpoints.refuse_other_run(earlier, {"lr": 1, "loss": "mean", "seed": 3}, {}, [], "c.pth")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_not_saved(value):
    modules = {"student": torch.nn.Linear(2, 3), "teacher": torch.nn.Linear(2, 3)}
    checkpoints.refuse_diverged(modules, 3)
    with torch.no_grad():
        modules["teacher"].bias[1] = value
    with pytest.raises(UserError, match="bias is not finite after step 3"):
        checkpoints.refuse_diverged(modules, 3)
