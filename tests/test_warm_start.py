"""--init_weights: every source of weights, what is refused, and resuming."""

import argparse
import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from test_main_lgssl import TINY, train
from test_vision_transformer import dinos_position_embedding

import eval_knn
import main_lgssl
import reproduce
from support.weights import load_file
from vision_transformer import BackboneWithHead, DINOHead, vit_micro

FROZEN = ("--epochs", 1, "--freeze_backbone", 1)  # a run that leaves the backbone as it was at its start


def network(img_size=32, patch_size=8, out_dim=24, hidden_dim=32):
    backbone = vit_micro(patch_size, img_size=img_size)
    return BackboneWithHead(backbone, DINOHead(96, out_dim, hidden_dim=hidden_dim))


def of_dino(path, teacher, student=None, **more):
    """Write a full checkpoint as DINO does: wrapped networks, its loss, Namespace, and NumPy scalars."""
    contents = {
        "student": {f"module.{name}": value for name, value in (student or network()).state_dict().items()},
        "teacher": teacher.state_dict(),
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(0.1)}]},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_micro", patch_size=8),
        **more,
    }
    torch.save(contents, path)


def part(state, prefix):
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def assert_backbones(checkpoint, expected):
    """Student and teacher have the expected backbone."""
    for name in ("student", "teacher"):
        assert_same(part(checkpoint[name], "backbone."), expected)


def fresh_head():
    """Return the head of a run of the options TINY with random weights."""
    student, *_ = main_lgssl.build_networks(main_lgssl.parse_arguments([*TINY, "--data_path", "unused"]))
    return student.head.state_dict()


def test_dinos_full_checkpoint_gives_backbone_head_and_center(photo_folder, tmp_path, capsys):
    teacher, center = network(), torch.randn(1, 24)
    of_dino(tmp_path / "dino.pth", teacher, dino_loss={"center": center})
    options = ("--loss", "cls", "--image_size", 40, "--init_weights", tmp_path / "dino.pth", *FROZEN)
    found = train(photo_folder, tmp_path / "out", *options, "--lr", 0, "--min_lr", 0, "--warmup_epochs", 0)
    for name in ("student", "teacher"):
        assert_same(found[name], teacher.state_dict())
    line = f"started from {tmp_path}/dino.pth: backbone and head; center of the loss"
    assert line in capsys.readouterr().out.splitlines()
    # Three steps of an EMA with momentum 0.9 leave 0.729 of the center; the logits of unit vectors are within [-1, 1].
    assert (found["loss"]["center"] - 0.729 * center).abs().max() <= 0.271 + 1e-6


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"out_dim": 30}, "the head does not fit: last_layer.weight_v is [30, 256], expected [24, 256]"),
        ({"hidden_dim": 40}, "the head does not fit: mlp.0.weight is [40, 96], expected [32, 96]"),
    ],
)
def test_a_head_that_does_not_fit_is_fresh(photo_folder, tmp_path, capsys, options, reason):
    teacher = network(**options)
    of_dino(tmp_path / "dino.pth", teacher)
    frozen = (*FROZEN, "--lr", 0, "--min_lr", 0, "--warmup_epochs", 0)
    found = train(photo_folder, tmp_path / "out", "--init_weights", tmp_path / "dino.pth", *frozen)
    assert_backbones(found, teacher.backbone.state_dict())
    for name in ("student", "teacher"):
        assert_same(part(found[name], "head."), fresh_head())
    assert f"started from {tmp_path}/dino.pth: backbone only; {reason}" in capsys.readouterr().out.splitlines()


def test_a_head_with_learned_norms_does_not_fit_fixed_ones(photo_folder, tmp_path, capsys):
    teacher = network()
    teacher.head.last_layer.weight_g.data *= 2
    of_dino(tmp_path / "dino.pth", teacher)
    options = ("--init_weights", tmp_path / "dino.pth", *FROZEN)
    found = train(photo_folder, tmp_path / "fixed", *options)
    assert (found["teacher"]["head.last_layer.weight_g"] == 1).all()
    assert "backbone only; the head does not fit: its prototypes have learned norms" in capsys.readouterr().out
    train(photo_folder, tmp_path / "learned", *options, "--norm_last_layer", "false")
    assert "backbone and head" in capsys.readouterr().out


def test_one_head_starts_both_and_the_head_of_cls_starts_a_shared_one(photo_folder, tmp_path, capsys):
    still = (*FROZEN, "--lr", 0, "--min_lr", 0, "--warmup_epochs", 0, "--seed", 5)
    one = train(photo_folder, tmp_path / "one", "--epochs", 1)["teacher"]
    separate = ("--patch_head", "separate")
    two = train(photo_folder, tmp_path / "two", *separate, "--init_weights", tmp_path / "one/checkpoint.pth", *still)
    assert "backbone and head; one head for both kinds of tokens; center of the loss" in capsys.readouterr().out
    for name in ("mlp.", "patch_mlp."):
        assert_same(part(two["teacher"], f"head.{name}"), part(one, "head.mlp."))
    two = train(photo_folder, tmp_path / "fresh", *separate, "--epochs", 1)["teacher"]
    path = tmp_path / "fresh/checkpoint.pth"
    again = train(photo_folder, tmp_path / "again", *separate, "--init_weights", path, *still)["student"]
    assert_same(again, two)
    shared = train(photo_folder, tmp_path / "shared", "--init_weights", path, *still)["student"]
    assert "backbone and head; the head of CLS for all tokens; center of the loss" in capsys.readouterr().out
    assert_same(shared, {name: value for name, value in two.items() if "patch_mlp" not in name})


def test_own_checkpoints_give_the_teacher_or_the_student(photo_folder, tmp_path):
    first = train(photo_folder, tmp_path / "first", "--epochs", 1, "--lr", 0.05, "--warmup_epochs", 0)
    path = tmp_path / "first/checkpoint.pth"
    still = (*FROZEN, "--lr", 0, "--min_lr", 0, "--warmup_epochs", 0, "--seed", 5)
    for key in ("teacher", "student"):
        options = () if key == "teacher" else ("--checkpoint_key", key)
        found = train(photo_folder, tmp_path / key, "--init_weights", path, *options, *still)
        assert_same(found["student"], first[key])
        assert_same(found["teacher"], first[key])
    assert not torch.equal(first["teacher"]["backbone.norm.weight"], first["student"]["backbone.norm.weight"])
    assert found["args"]["init_weights"] == str(path)
    assert found["args"]["init_hash"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert json.loads((tmp_path / "student/args.json").read_text()) == found["args"]


def timms(**options):
    return timm.models.VisionTransformer(patch_size=8, embed_dim=96, depth=4, num_heads=3, **options).eval()


def test_timms_names_are_read_by_timms_loader(photo_folder, tmp_path, capsys):
    """From a folder in timm's format, which needs no network."""
    theirs = timms(img_size=32, num_classes=0)
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file(theirs.state_dict(), folder / "model.safetensors")
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": shape}
    config["pretrained_cfg"] = {"input_size": [3, 32, 32], "num_classes": 0, "custom_load": False}
    config["pretrained_cfg"] |= {"first_conv": "patch_embed.proj", "classifier": "head"}
    (folder / "config.json").write_text(json.dumps(config))
    name = f"timm:local-dir:{folder}"
    found = train(photo_folder, tmp_path / "out", "--init_weights", name, *FROZEN)
    assert_backbones(found, theirs.state_dict())
    assert found["args"]["init_hash"] is None
    assert f"started from {name}: backbone only" in capsys.readouterr().out
    images = torch.randn(2, 3, 32, 32)
    words = f"--data_path {photo_folder} --pretrained_weights {name} --crop_size 32 --num_workers 0 --nb_knn 2"
    eval_knn.main(words.split())
    printed = capsys.readouterr().out
    assert "k-NN (K=2): top-1" in printed
    assert "written to" not in printed  # a name has no folder
    shutil.rmtree(folder)  # resuming does not need it
    train(photo_folder, tmp_path / "out", "--init_weights", name, *FROZEN)
    with torch.no_grad():
        own = vit_micro(8, img_size=32).eval()
        own.load_state_dict(part(found["teacher"], "backbone."))
        torch.testing.assert_close(own(images), theirs.forward_features(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pretrained", [24, 64])
def test_the_position_embedding_is_interpolated_as_dino_does(photo_folder, tmp_path, capsys, pretrained):
    """The oracle is written by hand in float64."""
    backbone = vit_micro(8, img_size=pretrained).eval()
    torch.nn.init.normal_(backbone.pos_embed)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    found = train(photo_folder, tmp_path / "out", "--init_weights", tmp_path / "backbone.pth", *FROZEN)
    positions = found["student"]["backbone.pos_embed"]
    expected = dinos_position_embedding(backbone.pos_embed.detach(), 8, 32, 32)
    np.testing.assert_allclose(positions[0].numpy(), expected, rtol=0, atol=1e-5)
    assert torch.equal(positions[:, 0], backbone.pos_embed[:, 0])
    assert torch.equal(found["teacher"]["backbone.pos_embed"], positions)
    own = pretrained // 8
    assert f"position embedding interpolated from {own}x{own} to 4x4 patches" in capsys.readouterr().out
    rest = {name: value for name, value in backbone.state_dict().items() if name != "pos_embed"}
    assert_same({n: v for n, v in part(found["student"], "backbone.").items() if n != "pos_embed"}, rest)
    images = torch.randn(2, 3, 32, 32)  # the tokens of the file's network at the new size are those of the new one
    new = vit_micro(8, img_size=32).eval()
    new.load_state_dict(part(found["student"], "backbone."))
    with torch.no_grad():
        torch.testing.assert_close(new(images), backbone(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_freeze_backbone_trains_only_the_head_of_the_first_epochs(photo_folder, tmp_path, optimizer):
    options = ("--epochs", 2, "--lr", 0.05, "--warmup_epochs", 0, "--saveckp_freq", 1, "--freeze_backbone", 1)
    end = train(photo_folder, tmp_path, "--optimizer", optimizer, *options)
    frozen = torch.load(tmp_path / "checkpoint0000.pth", weights_only=True)
    student, *_ = main_lgssl.build_networks(main_lgssl.parse_arguments([*TINY, "--data_path", "unused"]))
    assert_backbones(frozen, student.backbone.state_dict())
    for name in ("student", "teacher"):
        assert not torch.equal(frozen[name]["head.mlp.0.weight"], student.head.mlp[0].weight)
        assert not torch.equal(end[name]["backbone.patch_embed.proj.weight"], student.backbone.patch_embed.proj.weight)


@pytest.fixture
def refused(photo_folder, tmp_path, run_main):
    def message(*options, output="out"):
        words = (*TINY, "--data_path", photo_folder, "--output_dir", tmp_path / output, "--epochs", 2, *options)
        process = run_main("main_lgssl.py", *words, check=False)
        assert process.returncode == 2
        assert len(process.stderr.splitlines()) == 1
        return process.stderr

    return message


def test_other_networks_are_refused_in_one_line(refused, tmp_path, monkeypatch):
    torch.save(vit_micro(16, img_size=32).state_dict(), tmp_path / "b.pth")
    expected = "does not fit vit_micro with patch size 8: .*; expected --arch vit_micro --patch_size 16"
    assert re.search(expected, refused("--init_weights", tmp_path / "b.pth"))
    of_dino(tmp_path / "dino.pth", network())
    assert "has no 'model', found ['student', 'teacher'" in refused(
        "--init_weights", tmp_path / "dino.pth", "--checkpoint_key", "model"
    )
    bad = network()
    bad.head.mlp[0].bias.data[0] = float("nan")
    of_dino(tmp_path / "nan.pth", bad)
    assert "holds weights that are not finite: mlp.0.bias" in refused("--init_weights", tmp_path / "nan.pth")
    assert "no checkpoint at" in refused("--init_weights", tmp_path / "absent.pth")
    assert "timm cannot load 'no_such_vit'" in refused("--init_weights", "timm:no_such_vit")
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: timms(img_size=32, reg_tokens=4))
    assert "reg_token is not part of the network" in refused("--init_weights", "timm:vit_with_registers")
    assert not list((tmp_path / "out").glob("checkpoint*"))


def test_a_run_resumes_without_the_file_but_not_with_another(photo_folder, tmp_path, refused, capfd):
    """A run that is stopped after its first epoch ends as an undisturbed one."""
    path, options = tmp_path / "b.pth", ("--epochs", 2, "--saveckp_freq", 1, "--lr", 0.05)
    torch.save(vit_micro(8, img_size=32).state_dict(), path)
    whole = train(photo_folder, tmp_path / "whole", "--init_weights", path, *options)
    (tmp_path / "out").mkdir()
    shutil.copy(tmp_path / "whole/checkpoint0000.pth", tmp_path / "out/checkpoint.pth")

    options_of_run = ("--saveckp_freq", 1, "--lr", 0.05)
    original = path.read_bytes()
    torch.save(vit_micro(8, img_size=32).state_dict(), path)
    message = refused("--init_weights", path, *options_of_run)
    assert f"belongs to a run that started from another {path}, with SHA-256 " in message
    assert hashlib.sha256(original).hexdigest()[:12] in message
    assert f"--init_weights {path} there, other.pth here" in refused("--init_weights", "other.pth", *options_of_run)
    assert f"--init_weights {path} there, None here" in refused(*options_of_run)
    assert load_file(tmp_path / "out/checkpoint.pth")["step"] == 3

    path.unlink()
    capfd.readouterr()
    resumed = train(photo_folder, tmp_path / "out", "--init_weights", path, *options)
    out = capfd.readouterr().out
    assert "resuming after step 3 of 6" in out
    assert "started from" not in out
    for name in ("student", "teacher", "loss"):
        assert_same(resumed[name], whole[name])
    assert resumed["args"] == {**whole["args"], "output_dir": str(tmp_path / "out")}


def test_the_file_tells_the_network_that_is_not_given(photo_folder, tmp_path, refused, monkeypatch):
    """Recorded as if it had been given, so that a run resumes without the file."""
    path, options = tmp_path / "b.pth", ("--epochs", 2, "--saveckp_freq", 1, "--init_weights", tmp_path / "b.pth")
    torch.save(vit_micro(8, img_size=32).state_dict(), path)
    given = train(photo_folder, tmp_path / "given", *options)
    for module in ("test_main_lgssl", __name__):
        monkeypatch.setattr(f"{module}.TINY", TINY[4:])  # without --arch and --patch_size
    whole = train(photo_folder, tmp_path / "whole", *options)
    assert whole["args"] == {**given["args"], "output_dir": str(tmp_path / "whole")}
    assert json.loads((tmp_path / "whole/args.json").read_text()) == whole["args"]
    assert reproduce.differences(vars(main_lgssl.parse_arguments(["--init_weights", "x"])), {"patch_size": 8}) == []
    expected = "--local_crops_size 20 is not a multiple of --patch_size 8; the nearest is 16"
    assert f"main_lgssl.py: error: {expected}\n" == refused("--init_weights", path, "--local_crops_size", 20)
    path.unlink()
    (tmp_path / "out").mkdir(exist_ok=True)
    shutil.copy(tmp_path / "whole/checkpoint0000.pth", tmp_path / "out/checkpoint.pth")
    assert "--arch vit_micro there, vit_tiny here" in refused(*options[2:], "--arch", "vit_tiny")
    resumed = train(photo_folder, tmp_path / "out", *options)
    for name in ("student", "teacher", "loss"):
        assert_same(resumed[name], given[name])
    assert resumed["args"] == {**given["args"], "output_dir": str(tmp_path / "out")}


def test_checkpoints_of_older_versions_count_as_started_from_nothing(photo_folder, tmp_path, refused):
    train(photo_folder, tmp_path / "out", "--epochs", 2, "--saveckp_freq", 1)
    older = load_file(tmp_path / "out/checkpoint0000.pth")
    for name in ("init_weights", "init_hash", "checkpoint_key", "freeze_backbone"):
        del older["args"][name]
    torch.save(older, tmp_path / "out/checkpoint.pth")
    torch.save(vit_micro(8, img_size=32).state_dict(), tmp_path / "b.pth")
    path = tmp_path / "b.pth"
    assert f"--init_weights None there, {path} here" in refused("--init_weights", path, "--saveckp_freq", 1)
    assert train(photo_folder, tmp_path / "out", "--epochs", 2, "--saveckp_freq", 1)["step"] == 6
