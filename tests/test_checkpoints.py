import math
import pickle

import pytest
import torch

from support import checkpoints
from support.weights import load_file
from utils import UserError


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


def test_a_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(UserError, match=f"the folder {tmp_path}/gone is gone, create it again or give another one"):
        checkpoints.save({}, tmp_path / "gone/checkpoint.pth")
