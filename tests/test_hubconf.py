import re
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT

import hubconf
from support.weights import load_backbone
from vision_transformer import ARCHITECTURES, vit_micro

OWN = ("vision_transformer", "support", "utils")


def load(name, **options):
    return torch.hub.load(str(ROOT), name, source="local", **options)


@pytest.fixture
def weights(tmp_path):
    """Return a checkpoint's path."""
    networks = {key: vit_micro(8, img_size=32).state_dict() for key in ("teacher", "student")}
    torch.save({**networks, "args": {"arch": "vit_micro", "patch_size": 8}}, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"


@pytest.mark.parametrize("key", ["teacher", "student"])
def test_tokens_are_those_of_the_checkpoint(weights, key):
    network = load("lgssl", weights=weights, checkpoint_key=key)
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(network(images), load_backbone(weights, checkpoint_key=key)[0](images))
    assert not network.training


def test_names_stand_for_the_papers_networks():
    """The networks are on the meta device, since drawing their weights takes time."""
    for arch, patch_size in [("tiny", 16), ("tiny", 32), ("small", 16), ("base", 16), ("base", 8)]:
        with torch.device("meta"):
            network = load(f"lgssl_vit_{arch}{patch_size}")
            expected = ARCHITECTURES[f"vit_{arch}"](patch_size)
        shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (network, expected)]
        assert shapes[0] == shapes[1]
        assert network.blocks[0].attn.num_heads == expected.blocks[0].attn.num_heads


def imported():
    """Return {name: module} of the imported modules in OWN and their submodules."""
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] in OWN}


def test_modules_of_the_caller_stay_what_they_are(weights, monkeypatch):
    """One project has already imported modules with the same names, another imports them later."""
    for name in imported():
        monkeypatch.delitem(sys.modules, name)
    theirs = {name: types.ModuleType(name) for name in ("utils", "support", "support.others", "vision_transformer")}
    for name, module in theirs.items():
        monkeypatch.setitem(sys.modules, name, module)
    path = list(sys.path)
    network = load("lgssl", weights=weights)
    assert network(torch.randn(1, 3, 32, 32)).shape == (1, 17, 96)
    assert imported() == theirs
    assert sys.path == path
    for name in theirs:
        monkeypatch.delitem(sys.modules, name)
    load("lgssl", weights=weights)
    assert not imported()


def test_the_listed_dependencies_are_enough(weights):
    """Other packages of requirements.txt are hidden, except those that timm itself needs."""
    names = {"opencv-python-headless": "cv2", "scikit-learn": "sklearn", "pillow": "PIL"}
    words = re.findall("^[a-z-]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    others = {names.get(word, word) for word in words} - {*hubconf.dependencies, "torchvision", "PIL"}
    assert "matplotlib" in others
    code = f"import sys, torch; sys.modules.update(dict.fromkeys({others}))\n"
    code += f"print(torch.hub.load({str(ROOT)!r}, 'lgssl', source='local', weights={str(weights)!r}).embed_dim)"
    process = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert process.stdout == "96\n", process.stderr


def test_weights_of_another_network_are_refused(weights, tmp_path):
    with pytest.raises(Exception, match="does not fit vit_small .* --arch vit_micro") as error:
        load("lgssl_vit_small16", weights=weights)
    assert error.type.__name__ == "UserError"
    with pytest.raises(Exception, match="no checkpoint at .*absent.pth"):
        load("lgssl", weights=tmp_path / "absent.pth")
