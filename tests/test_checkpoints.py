import pickle

import pytest
import torch

import checkpoints
from utils import UserError
from vision_transformer import load_backbone, vit_micro


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


def test_a_save_that_fails_leaves_the_last_checkpoint(tmp_path):
    checkpoints.save({"epoch": 1}, tmp_path / "checkpoint.pth")
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoints.save({"epoch": lambda: 2}, tmp_path / "checkpoint.pth")
    assert checkpoints.load_file(tmp_path / "checkpoint.pth") == {"epoch": 1}


def test_what_differs_from_an_earlier_run_is_named():
    earlier = {"lr": 1, "loss": "sum", "num_workers": 1}
    checkpoints.refuse_other_run(earlier, {"lr": 1, "loss": "sum", "num_workers": 9}, ["num_workers"], "c.pth")
    with pytest.raises(UserError, match="--loss sum there, mean here, --seed unknown there, 3 here"):
        checkpoints.refuse_other_run(earlier, {"lr": 1, "loss": "mean", "seed": 3}, [], "c.pth")
