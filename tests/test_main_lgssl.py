import functools
import hashlib
import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import GOLDEN, open_dataset, timms_drop_paths
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import eval_knn
import main_lgssl
from augment import MultiCrop, normalize
from losses import LocalGlobalLoss, plain_loss
from main_lgssl import parse_arguments, set_precision
from patch_matching import match_patches
from support.checkpoints import hash_of_names
from support.images import ResizedArray
from support.loader import BatchSampler, ViewBatches
from support.optimizers import build_optimizer, clip_each_gradient, multiply_each
from support.options import remarks
from support.weights import load_backbone
from utils import Process, UserError, seed_networks
from vision_transformer import ARCHITECTURES, BackboneWithHead, Block, DINOHead, Teacher, VisionTransformer, vit_micro

TINY = (
    "--arch vit_micro --patch_size 8 --image_size 40 --global_crops_size 32 --local_crops_size 16 "
    "--local_crops_number 2 --out_dim 24 --head_hidden_dim 32 --batch_size_per_gpu 4 --num_workers 0 --log_every 2 "
    "--drop_path_rate 0.2 --knn_every 0 --image_every 0"
).split()


def train(data, output, *more):
    main_lgssl.main([*TINY, "--data_path", str(data), "--output_dir", str(output), *map(str, more)])
    return torch.load(output / "checkpoint.pth", weights_only=True)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def naive_loss(student, teacher, views, rule, temperature, loss, center):
    """Algorithm 1 with a center [1+P, K]: all tokens pass through the head, matched ones are selected per pair.

    Returns the loss and the mean of the teacher's logits [1+P, K].
    """
    kind, lambda_cls = loss

    def logits(network, view):
        z, weights, scale, *_ = BackboneWithHead.forward(network, [normalize(view.pixels)])
        return (z @ (scale * weights.T)).unflatten(0, (len(view.pixels), -1)).double()  # [B, 1+P, K]

    teacher_logits, student_logits = [logits(teacher, v) for v in views[:2]], [logits(student, v) for v in views]
    total, batch = 0, len(views[0].pixels)
    for b in range(batch):
        for i in range(2):
            for j in range(len(views)):
                if i == j:
                    continue
                geometry = []
                for view in (views[i], views[j]):
                    g = b if len(view.boxes) > 1 else 0
                    geometry += [view.boxes[g].tolist(), bool(view.flips[g]), (view.pixels.shape[-1] // 8,) * 2]
                idx_t, idx_s = match_patches(*geometry, rule)
                weight = torch.ones(len(idx_t), dtype=torch.float64)
                if kind == "cls":
                    weight[1:] = 0
                elif kind == "mean":
                    weight /= len(idx_t)
                elif kind == "lambda":
                    weight[0] = lambda_cls
                    weight[1:] = (1 - lambda_cls) / max(len(idx_t) - 1, 1)
                elif kind == "lambda_sum":
                    weight[0], weight[1:] = lambda_cls, 1 - lambda_cls
                logits_of_pair = (student_logits[j][b, idx_s], teacher_logits[i][b, idx_t])
                total += plain_loss(*logits_of_pair, weight, center[idx_t], temperature)
    return total / (batch * 2 * (len(views) - 1)), torch.cat(teacher_logits).mean(0)


@pytest.mark.parametrize("geometry", ["batch", "image"])
@pytest.mark.parametrize("loss", [("cls", 0), ("mean", 0), ("sum", 0), ("lambda", 0.2), ("lambda_sum", 0.8)])
@pytest.mark.parametrize("patch_mlp", [False, True])
def test_loss_gradient_and_center_of_a_batch_equal_algorithm_1(photo_folder, loss, geometry, patch_mlp):
    torch.manual_seed(0)
    dataset = open_dataset("folder", photo_folder, "train", ResizedArray(64))
    crop = MultiCrop(global_size=32, local_size=16, local_scale=(0.05, 0.3), local_number=3, geometry=geometry)
    rule = None if loss[0] == "cls" else "paper"
    batches = ViewBatches(dataset, crop, 8, rule, 0)
    (views, _), batch = batches.make_views((0, 5, [3, 1, 8])), batches[0, 5, [3, 1, 8]]
    patch_mlp &= loss[0] != "cls"
    heads = [DINOHead(96, 24, hidden_dim=32, patch_mlp=patch_mlp) for _ in range(2)]
    student = BackboneWithHead(vit_micro(8, img_size=32), heads[0])
    teacher = Teacher(vit_micro(8, img_size=32), heads[1], average_patches=loss[0] != "cls")
    criterion = LocalGlobalLoss(24, 16, *loss)
    criterion.center.normal_(std=0.1)
    center = criterion.center.double()
    center = center if loss[0] != "cls" else center.expand(17, -1)
    crops = [normalize(pixels) for pixels in batch.pixels]
    matches = batch.matches
    teacher_out = teacher(crops[:1], matches.teacher_row)
    student_out = student(crops, matches.student_row, matches.student_kinds())
    value = criterion(student_out, teacher_out, matches, 0.05)
    gradient = torch.autograd.grad(value, student.head.last_layer.weight_v)[0]
    expected, mean_logits = naive_loss(student, teacher, views, rule or "paper", 0.05, loss, center)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    expected_gradient = torch.autograd.grad(expected, student.head.last_layer.weight_v)[0]
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-6)
    criterion.update_center()
    updated = 0.9 * center + 0.1 * mean_logits
    torch.testing.assert_close(criterion.center.double(), updated[: len(criterion.center)], rtol=0, atol=1e-6)


def test_each_gradient_is_clipped_by_itself():
    generator = torch.Generator().manual_seed(0)
    own = [torch.nn.Parameter(torch.zeros(n)) for n in (5, 50, 500)]
    theirs = [torch.nn.Parameter(torch.zeros(n)) for n in (5, 50, 500)]
    for a, b in zip(own, theirs, strict=True):
        a.grad = torch.randn(a.shape, generator=generator)
        b.grad = a.grad.clone()
        torch.nn.utils.clip_grad_norm_([b], 3.0)
    frozen = torch.nn.Parameter(torch.zeros(3))
    clip_each_gradient([*own, frozen], 3.0)
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert own[2].grad.norm().item() == pytest.approx(3.0, rel=1e-4)


def test_each_tensor_is_multiplied_by_its_factor():
    tensors = [torch.ones(shape) for shape in ((2, 3), (), (4,), (3, 1, 2))]
    factors = torch.tensor([2.0, 0.5, math.nan, 1.0])
    expected = [factor * tensor for tensor, factor in zip(tensors, factors, strict=True)]
    multiply_each(tensors, factors)
    torch.testing.assert_close(tensors, expected, rtol=0, atol=0, equal_nan=True)


def test_weight_decay_spares_biases_and_1d_parameters_alone():
    network = BackboneWithHead(vit_micro(8, img_size=32), DINOHead(96, 24, hidden_dim=32))
    decayed, plain = build_optimizer("adamw", network).param_groups
    names = {id(p): name for name, p in network.named_parameters()}
    decayed, plain = ({names[id(p)] for p in group["params"]} for group in (decayed, plain))
    assert {"backbone.cls_token", "backbone.pos_embed", "head.last_layer.weight_v"} <= decayed
    assert all(name.endswith(".bias") or "norm" in name for name in plain)
    assert "head.last_layer.weight_g" not in decayed | plain  # it is not trained


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 0.0])
def test_lars_is_dinos(decay, scale):
    """DINO's update, written out: also with a weight or a gradient of norm 0, and without weight decay."""
    generator = torch.Generator().manual_seed(0)
    network = torch.nn.Linear(5, 4).double()
    network.zero = torch.nn.Parameter(torch.zeros(2, 2).double())
    optimizer = build_optimizer("lars", network)
    own = dict(network.named_parameters())
    naive = {name: p.detach().double().clone() for name, p in own.items()}
    momentum = {name: torch.zeros_like(value) for name, value in naive.items()}
    for step in range(4):
        for group in optimizer.param_groups:
            group.update(lr=0.5, weight_decay=decay if group["decay"] else 0.0)
        for name, parameter in own.items():
            parameter.grad = scale * torch.randn(parameter.shape, generator=generator).double()
            if (step, name) == (1, "weight"):
                parameter.grad = None
                continue
            update = parameter.grad.clone()
            if parameter.ndim > 1:
                update = update + decay * naive[name]
                norm, update_norm = naive[name].norm(), update.norm()
                update = update * (0.001 * norm / update_norm if norm > 0 and update_norm > 0 else 1)
            momentum[name] = 0.9 * momentum[name] + update
            naive[name] = naive[name] - 0.5 * momentum[name]
        optimizer.step()
        assert [group["weight_decay"] for group in optimizer.param_groups] == [decay, 0.0]
        for name, parameter in own.items():
            torch.testing.assert_close(parameter.detach(), naive[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_frozen_last_layer_and_ema(photo_folder, tmp_path, optimizer):
    options = ("--epochs", 2, "--optimizer", optimizer, "--warmup_epochs", 1, "--momentum_teacher", 0.5)
    first = train(photo_folder, tmp_path / "a", *options, "--freeze_last_layer", 2)["student"]
    trained = train(photo_folder, tmp_path / "b", *options, "--freeze_last_layer", 1)
    torch.manual_seed(0)
    initial = BackboneWithHead(vit_micro(8, img_size=32), DINOHead(96, 24, hidden_dim=32)).state_dict()
    assert torch.equal(first["head.last_layer.weight_v"], initial["head.last_layer.weight_v"])
    assert not torch.equal(first["head.mlp.0.weight"], initial["head.mlp.0.weight"])
    student, teacher = trained["student"], trained["teacher"]
    name = "head.last_layer.weight_v"
    assert not torch.equal(student[name], initial[name])
    low, high = torch.minimum(initial[name], student[name]), torch.maximum(initial[name], student[name])
    inside = (teacher[name] >= low - 1e-4) & (teacher[name] <= high + 1e-4)
    assert inside.float().mean() > 0.9  # an average of where the student has been
    assert torch.equal(student["head.last_layer.weight_g"], torch.ones(24, 1))


def test_three_steps_are_dinos(photo_folder, tmp_path):
    """Repeat a run of 3 steps with plain PyTorch and DINO's formulas: AdamW, clipping, schedules, EMA."""
    trained = train(photo_folder, tmp_path, "--epochs", 1, "--drop_path_rate", 0, "--warmup_epochs", 0, "--lr", 0.05,
                    "--freeze_last_layer", 0, "--warmup_teacher_temp_epochs", 5, "--momentum_teacher", 0.9)  # fmt: skip
    torch.manual_seed(0)
    student = BackboneWithHead(vit_micro(8, img_size=32), DINOHead(96, 24, hidden_dim=32))
    teacher = BackboneWithHead(vit_micro(8, img_size=32), DINOHead(96, 24, hidden_dim=32))
    teacher.load_state_dict(student.state_dict())
    named = [(n, p) for n, p in student.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in named if p.ndim > 1]}, {"params": [p for n, p in named if p.ndim == 1]}]
    optimizer = torch.optim.AdamW(groups, foreach=False)
    dataset = open_dataset("folder", photo_folder, "train", ResizedArray(40), min_side=80)
    batches = ViewBatches(dataset, MultiCrop(global_size=32, local_size=16, local_number=2), 8, "paper", 0)
    center = torch.zeros(17, 24, dtype=torch.float64)
    half_cosine = (1 + np.cos(np.pi * np.arange(3) / 3)) / 2
    lr = 1e-6 + (0.05 * 4 / 256 - 1e-6) * half_cosine
    decay, momentum = 0.4 + (0.04 - 0.4) * half_cosine, 1 + (0.9 - 1) * half_cosine
    for i, key in enumerate(BatchSampler(12, 4, range(3))):
        views, _ = batches.make_views(key)
        loss, mean_logits = naive_loss(student, teacher, views, "paper", 0.04, ("mean", 0), center)
        center = 0.9 * center + 0.1 * mean_logits.detach()
        optimizer.zero_grad()
        loss.backward()
        for _, parameter in named:
            torch.nn.utils.clip_grad_norm_([parameter], 3.0)
        optimizer.param_groups[0].update(lr=lr[i], weight_decay=decay[i])
        optimizer.param_groups[1].update(lr=lr[i], weight_decay=0)
        optimizer.step()
        with torch.no_grad():
            for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                t.copy_(momentum[i] * t + (1 - momentum[i]) * s)
    for network, name in ((student, "student"), (teacher, "teacher")):
        for key, value in network.state_dict().items():
            torch.testing.assert_close(trained[name][key], value, rtol=1e-2, atol=2e-4, msg=f"{name} {key}")
    torch.testing.assert_close(trained["loss"]["center"].double(), center, rtol=0, atol=1e-4)
    # What moves the weights too little to be seen in them is compared as it was applied.
    decayed, plain = trained["optimizer"]["param_groups"]
    assert (decayed["lr"], plain["lr"]) == pytest.approx((lr[2], lr[2]))
    assert (decayed["weight_decay"], plain["weight_decay"]) == (pytest.approx(decay[2]), 0)
    (logged,) = read(tmp_path / "log.txt")
    assert (logged["train_lr"], logged["train_wd"]) == pytest.approx((lr.mean(), decay.mean()))


@pytest.mark.parametrize("geometry", ["batch", "image"])
def test_without_distortion_whole_crops_are_the_images(tmp_path, geometry):
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / f"{i}.png")
    words = [*TINY, "--data_path", tmp_path, "--image_size", 32, "--global_crops_scale", 1, 1, "--flip_prob", 0]

    def views(*more):
        args = parse_arguments([*map(str, words), "--geometry", geometry, *more])
        dataset, *_ = main_lgssl.open_images(args)
        loader = main_lgssl.build_loader(args, dataset, range(2), Process(0, 1, torch.device("cpu")))
        for key in loader.sampler:
            batch, _ = loader.dataset.make_views(key)
            yield batch, np.stack([dataset[i][0] for i in key[2]])

    distorted = list(views())
    for (batch, images), (usual, _) in zip(views("--distortion", "0"), distorted, strict=True):
        for view in batch[:2]:
            assert np.array_equal(view.pixels.permute(0, 2, 3, 1).numpy(), images)
        for view, usual_view in zip(batch, usual, strict=True):
            assert np.array_equal(view.boxes, usual_view.boxes)  # the crops are the same at any strength
            assert not torch.equal(view.pixels, usual_view.pixels)
    for (batch, _), (usual, _) in zip(views("--distortion", "1"), distorted, strict=True):
        assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(batch, usual, strict=True))


@pytest.mark.parametrize("value", ["-0.1", "1.1", "nan"])
def test_distortion_is_a_fraction(capsys, value):
    with pytest.raises(SystemExit, match="2"):
        parse_arguments([*TINY, "--distortion", value])
    assert "--distortion: found" in capsys.readouterr().err


def test_a_run_keeps_its_distortion(photo_folder, tmp_path):
    train(photo_folder, tmp_path, "--epochs", 1, "--distortion", 0.5)
    with pytest.raises(UserError, match="--distortion 0.5 there, 1.0 here"):
        train(photo_folder, tmp_path, "--epochs", 1)


@pytest.mark.parametrize("geometry", ["batch", "image"])
def test_accumulated_batches_equal_one_large_batch(photo_folder, tmp_path, monkeypatch, geometry):
    options = ("--epochs", 2, "--geometry", geometry, "--drop_path_rate", 0, "--lr", 0.05, "--warmup_epochs", 0)
    large = train(photo_folder, tmp_path / "large", *options, "--batch_size_per_gpu", 6)
    seeds = []
    monkeypatch.setattr(main_lgssl, "seed_networks", lambda *key: seeds.append(key))
    accumulated = train(photo_folder, tmp_path / "accumulated", *options, "--batch_size_per_gpu", 2, "--accum_steps", 3)
    for a, b in zip(
        read(tmp_path / "large" / "steps.jsonl"), read(tmp_path / "accumulated" / "steps.jsonl"), strict=True
    ):
        for name in ("step", "loss", "lr", "wd", "matched_patches"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name
    assert seeds == [(0, step, 0, micro_step) for step in range(4) for micro_step in range(3)]
    torch.testing.assert_close(large["loss"]["center"], accumulated["loss"]["center"], rtol=0, atol=1e-5)
    for key, value in large["student"].items():
        torch.testing.assert_close(accumulated["student"][key], value, rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize("what", ["the loss", "the gradient of backbone.cls_token"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_a_bad_step_changes_no_weight_and_is_named_at_the_next_report(
    photo_folder, tmp_path, monkeypatch, optimizer, what
):
    original, weights = LocalGlobalLoss.forward, []  # the student's weights after each step

    def poisoned(*arguments):
        loss = original(*arguments)
        if len(weights) == 1:  # the second step
            if what == "the loss":
                return loss + math.inf  # its gradients are finite
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    def after_step(teacher_parameters, student_parameters, weight):
        weights.append([p.detach().clone() for p in student_parameters])

    monkeypatch.setattr(LocalGlobalLoss, "forward", poisoned)
    monkeypatch.setattr(torch, "_foreach_lerp_", after_step)
    options = ("--epochs", 1, "--log_every", 100, "--optimizer", optimizer, "--warmup_epochs", 0, "--lr", 0.05)
    with pytest.raises(UserError, match=f"{what} is not finite at step 1;"):
        train(photo_folder, tmp_path, *options)
    first, second, third = weights
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(value.isfinite().all() for value in third)
    assert not all(torch.equal(a, b) for a, b in zip(second, third, strict=True))
    assert not (tmp_path / "checkpoint.pth").exists()


class Waits(TorchDispatchMode):
    """Count how often the CPU reads a value from the device, through .item(), float() or `if`."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_between_reports(photo_folder, tmp_path, monkeypatch):
    def counted(original):
        def call(self, *arguments, **named):
            waits.count += 1
            return original(self, *arguments, **named)

        return call

    for name in ("tolist", "cpu", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    counts = []
    for batch_size in (6, 2):  # 2 and 6 steps, each with one report
        with Waits() as waits:
            options = ("--epochs", 1, "--log_every", 100, "--batch_size_per_gpu", batch_size)
            train(photo_folder, tmp_path / str(batch_size), *options)
        counts.append(waits.count)
    assert counts[0] == counts[1]


def test_stochastic_depth_differs_between_steps_ranks_and_micro_steps():
    def draw(*key):
        seed_networks(*key)
        return torch.rand(1).item()

    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]  # seed, step, rank, micro-step
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(*keys[1]) == draw(*keys[1])


def test_gradient_checkpointing_changes_nothing(photo_folder, tmp_path, monkeypatch):
    original, calls = Block.forward, []

    def forward(self, *inputs):
        calls.append(1)
        return original(self, *inputs)

    monkeypatch.setattr(Block, "forward", forward)
    plain = train(photo_folder, tmp_path / "plain", "--epochs", 1)
    plain_calls = len(calls)
    checkpointed = train(photo_folder, tmp_path / "checkpointed", "--epochs", 1, "--grad_checkpointing")
    assert_same_state(plain, checkpointed)
    # 3 steps, 4 blocks: the student's blocks run for two sizes of crops, and now once more for each.
    assert len(calls) - 2 * plain_calls == 3 * 4 * 2


def test_compile_without_a_compiler_is_named(photo_folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no C++ compiler\nand so on")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(UserError, match="--compile needs a working compiler, found: no C"):
        train(photo_folder, tmp_path, "--epochs", 1, "--compile")


def test_a_run_writes_what_others_read(photo_folder, tmp_path, capsys):
    checkpoint = train(photo_folder, tmp_path, "--epochs", 2, "--saveckp_freq", 1)
    assert set(checkpoint) == {
        *("student", "teacher", "optimizer", "loss", "scaler"),
        *("meters", "epoch", "step", "batch_size", "images", "args"),
    }
    assert (checkpoint["epoch"], checkpoint["step"]) == (2, 6)
    assert {p.name for p in tmp_path.glob("*.pth")} == {
        *("checkpoint.pth", "checkpoint_previous.pth"),
        *("checkpoint0000.pth", "checkpoint0001.pth"),
    }
    # As DINO's evaluation scripts strip the names.
    teacher = {k.replace("module.", "").replace("backbone.", ""): v for k, v in checkpoint["teacher"].items()}
    assert set(vit_micro(8).state_dict()) <= set(teacher)
    load_backbone(tmp_path / "checkpoint.pth")

    epochs, steps = read(tmp_path / "log.txt"), read(tmp_path / "steps.jsonl")
    assert [entry["epoch"] for entry in epochs] == [0, 1]
    assert {"train_loss", "train_lr", "train_wd", "epoch"} <= set(epochs[0])
    assert [entry["step"] for entry in steps] == [1, 2, 3, 5]  # every 2 steps, and the last of an epoch
    assert np.mean([2 * steps[0]["loss"], steps[1]["loss"]]) * 2 / 3 == pytest.approx(epochs[0]["train_loss"])
    assert {"loss", "lr", "wd", "momentum", "teacher_temp", "matched_patches", "images_per_s", "data_share"} <= set(
        steps[0]
    )
    assert 0 < steps[0]["matched_patches"] <= 16
    assert list((tmp_path / "tb").glob("events*"))
    assert json.loads((tmp_path / "args.json").read_text())["arch"] == "vit_micro"
    output = capsys.readouterr().out
    assert "epoch 2/2  step 6/6  loss" in output
    assert "images/s" in output
    assert f"\n12 images (12 JPEG) in 2 classes from folder names; train split of {photo_folder}\n" in output


def test_tensorboard_holds_the_scalars(photo_folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(photo_folder, tmp_path, "--epochs", 1)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    steps = read(tmp_path / "steps.jsonl")
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("loss")] == [(s["step"], s["loss"]) for s in steps]


def assert_same_state(a, b):
    for name in ("student", "teacher", "loss"):
        assert all(torch.equal(a[name][key], b[name][key]) for key in a[name]), name
    for key, state in a["optimizer"]["state"].items():
        assert all(torch.equal(state[k], b["optimizer"]["state"][key][k]) for k in state)


def assert_same_run(a, b):
    """Compare checkpoints and logs bit by bit, except for times."""
    one, other = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in (a, b))
    assert_same_state(one, other)
    assert read(a / "log.txt") == read(b / "log.txt")
    timeless = [[{**e, "images_per_s": 0, "data_share": 0} for e in read(folder / "steps.jsonl")] for folder in (a, b)]
    assert timeless[0] == timeless[1]


class Killed(BaseException):
    """Simulates SIGKILL: nothing after the step is executed."""


SIX_STEPS = ("--epochs", 2, "--warmup_epochs", 0, "--lr", 0.05)


@pytest.fixture(scope="module")
def undisturbed(photo_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    train(photo_folder, folder, *SIX_STEPS)
    return folder


@pytest.mark.parametrize("save_every", [1, 2])
@pytest.mark.parametrize("step", range(6))
def test_a_killed_run_ends_as_an_undisturbed_one(photo_folder, tmp_path, monkeypatch, undisturbed, step, save_every):
    """Steps 1 and 3 lie between two reports, steps 2 and 5 are the last of an epoch."""
    with monkeypatch.context() as patch:
        calls = []

        def check(self):
            calls.append(1)
            if len(calls) == step + 1:
                raise Killed

        patch.setattr(main_lgssl.StopRequest, "check", check)
        with pytest.raises(Killed):
            train(photo_folder, tmp_path, *SIX_STEPS, "--save_every_steps", save_every)
    for name in ("log.txt", "steps.jsonl"):
        with (tmp_path / name).open("a") as log:
            log.write('{"train_loss": 1.0, "ep')  # half a line
    train(photo_folder, tmp_path, *SIX_STEPS, "--save_every_steps", save_every, "--num_workers", step % 3)
    assert_same_run(tmp_path, undisturbed)


def send_at_step_3(name, patch):
    original = main_lgssl.seed_networks

    def seed_networks(seed, step, rank, micro_step):
        if step == 3:
            os.kill(os.getpid(), getattr(signal, name))
        original(seed, step, rank, micro_step)

    patch.setattr(main_lgssl, "seed_networks", seed_networks)


@pytest.mark.parametrize("patches", [(), ("--patch_augmentation",)])
def test_views_distorted_on_the_device_train_as_those_of_the_workers(photo_folder, tmp_path, monkeypatch, patches):
    """21 steps, also if the run is interrupted and resumes."""
    options = ("--epochs", 7, "--log_every", 1, "--warmup_epochs", 0, "--lr", 0.005, *patches)
    device, workers, resumed = (tmp_path / name for name in ("device", "workers", "resumed"))
    train(photo_folder, device, *options, "--distort_on", "device")
    train(photo_folder, workers, *options)
    own, theirs = read(device / "steps.jsonl"), read(workers / "steps.jsonl")
    losses = [[step["loss"] for step in steps] for steps in (own, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[0] != losses[1]
    assert [step["matched_patches"] for step in own] == [step["matched_patches"] for step in theirs]
    assert [json.loads((f / "args.json").read_text())["distort_on"] for f in (device, workers)] == ["device", "workers"]

    with monkeypatch.context() as patch:
        send_at_step_3("SIGTERM", patch)
        assert train(photo_folder, resumed, *options, "--distort_on", "device")["step"] == 4
    with pytest.raises(UserError, match="--distort_on device there, workers here"):
        train(photo_folder, resumed, *options, "--distort_on", "workers")
    train(photo_folder, resumed, *options, "--num_workers", 2)  # goes on as it began
    assert_same_run(resumed, device)
    if patches:
        with pytest.raises(UserError, match="--patch_augmentation True there, False here"):
            train(photo_folder, resumed, *options[: -len(patches)])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"])
def test_a_signal_ends_the_step_and_saves(photo_folder, tmp_path, monkeypatch, undisturbed, capsys, name):
    with monkeypatch.context() as patch:
        send_at_step_3(name, patch)
        earlier = signal.getsignal(getattr(signal, name))
        assert train(photo_folder, tmp_path, *SIX_STEPS, "--log_every", 1)["step"] == 4
        assert signal.getsignal(getattr(signal, name)) == earlier
    assert "run the same command to resume from" in capsys.readouterr().out
    assert [entry["step"] for entry in read(tmp_path / "steps.jsonl")] == [0, 1, 2, 3]
    assert train(photo_folder, tmp_path, *SIX_STEPS, "--log_every", 1)["step"] == 6
    assert_same_state(*(torch.load(f / "checkpoint.pth", weights_only=True) for f in (tmp_path, undisturbed)))


# Options of the run of version 0.9.0 in tests/golden/checkpoint_0.9.0.pth, which holds the state after epoch 1 of 2
OLD_RUN = (
    "--dataset digits --arch vit_nano --patch_size 8 --image_size 36 --global_crops_size 32 --local_crops_size 16 "
    "--local_crops_number 2 --out_dim 8 --head_hidden_dim 8 --num_workers 0 --log_every 2 --optimizer sgd --lr 0.002 "
    "--warmup_epochs 0 --freeze_last_layer 0 --momentum_teacher 0.9 --epochs 2 --batch_size_per_gpu 280 "
    "--saveckp_freq 1 --knn_every 0 --image_every 0 --warmup_teacher_temp 0.3 --teacher_temp 0.3"
).split()


@pytest.fixture
def old_checkpoint(tmp_path, monkeypatch):
    """Return the folder of a run of version 0.9.0 after its first epoch."""

    def vit_nano(patch_size=16, **kwargs):
        return VisionTransformer(patch_size=patch_size, embed_dim=12, depth=2, num_heads=3, **kwargs)

    monkeypatch.setitem(ARCHITECTURES, "vit_nano", vit_nano)
    shutil.copy(GOLDEN / "checkpoint_0.9.0.pth", tmp_path / "checkpoint.pth")
    return tmp_path


def test_a_run_of_an_older_version_goes_on_as_there(old_checkpoint, golden, monkeypatch):
    """Compare with the same run continued by version 0.9.0, in fp32. There, timm's blocks drew stochastic depth."""

    def draw_drop_paths(network, images):
        return timms_drop_paths(network, images) if network.drop_path_rate else None

    monkeypatch.setattr(VisionTransformer, "draw_drop_paths", draw_drop_paths)
    expected = golden("checkpoint_0.9.0.json")
    main_lgssl.main([*OLD_RUN, "--output_dir", str(old_checkpoint)])
    steps = read(old_checkpoint / "steps.jsonl")
    assert len(steps) == len(expected["steps"]) == 3
    for found, old in zip(steps, expected["steps"], strict=True):
        assert {name: found[name] for name in old} == pytest.approx(old, rel=1e-4)
    checkpoint = torch.load(old_checkpoint / "checkpoint.pth", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["step"]) == (2, 10)
    sums = {name: value.double().sum().item() for name, value in checkpoint["teacher"].items()}
    assert sums == pytest.approx(expected["teacher"], rel=1e-4, abs=1e-4)
    assert checkpoint["loss"]["center"].double().sum().item() == pytest.approx(expected["center"], rel=1e-4, abs=1e-4)


def test_a_checkpoint_of_an_older_version_is_evaluated_as_there(old_checkpoint, golden):
    weights = str(old_checkpoint / "checkpoint.pth")
    eval_knn.main(["--dataset", "digits", "--pretrained_weights", weights, "--nb_knn", "10", "--num_workers", "0"])
    found = json.loads((old_checkpoint / "knn_digits.json").read_text())["knn"]["10"]
    expected = golden("checkpoint_0.9.0.json")["knn10"]
    assert found["top1"] == pytest.approx(expected["top1"], abs=0.3)  # one image of 397
    assert found["top5"] < expected["top5"]  # which also counted classes without votes


def test_an_argument_that_an_older_version_lacked_has_its_default(old_checkpoint):
    path = old_checkpoint / "checkpoint.pth"
    checkpoint = torch.load(path, weights_only=True)
    for name in ("flip_prob", "center", "drop_path_rate", "dist_timeout"):
        del checkpoint["args"][name]
    torch.save(checkpoint, path)
    for option, difference in (("--flip_prob 0.25", "0.5 there, 0.25 here"),
                               ("--distort_on device", "workers there, device here")):  # fmt: skip
        expected = f"belongs to a run with other arguments: {option.split()[0]} {difference}"
        with pytest.raises(UserError, match=expected):
            main_lgssl.main([*OLD_RUN, "--output_dir", str(old_checkpoint), *option.split()])
    main_lgssl.main([*OLD_RUN, "--output_dir", str(old_checkpoint), "--distort_on", "workers"])
    checkpoint = torch.load(path, weights_only=True)
    assert (checkpoint["step"], checkpoint["args"]["distort_on"]) == (10, "workers")


def test_an_unreadable_checkpoint_is_replaced_by_the_one_before(photo_folder, tmp_path, undisturbed, capsys):
    train(photo_folder, tmp_path, *SIX_STEPS)
    newest = tmp_path / "checkpoint.pth"
    newest.write_bytes(newest.read_bytes()[:10000])
    train(photo_folder, tmp_path, *SIX_STEPS)
    warning = f"warning: cannot read {newest}: "
    assert capsys.readouterr().err.startswith(warning)
    assert_same_run(tmp_path, undisturbed)
    assert len((tmp_path / "checkpoint_unreadable.pth").read_bytes()) == 10000  # nothing is lost


def test_bad_images_end_the_run_or_are_replaced_by_the_next(photo_folder, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(8):
        (data / f"{i}.jpg").symlink_to(photo_folder / f"train/china/{i % 6}.jpg")
    (data / "3.jpg").unlink()
    (data / "3.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=f"cannot read image {data}/3.jpg"):
        train(data, tmp_path / "error", "--epochs", 1)

    skip = ("--epochs", 3, "--on_bad_image", "skip", "--max_bad_images", 0.2)
    first = train(data, tmp_path / "skip", *skip)
    assert capsys.readouterr().err.count("3.jpg: cannot identify image file") == 1  # and not in every epoch
    assert list(first["meters"]["bad_images"]) == [3]
    (data / "3.jpg").unlink()
    (data / "3.jpg").symlink_to(photo_folder / "train/china/4.jpg")
    assert_same_state(first, train(data, tmp_path / "next", *skip, "--num_workers", 2))
    for name in ("5.jpg", "6.jpg"):
        (data / name).unlink()
        (data / name).touch()
    message = r"2 images cannot be read, more than the 1 that --max_bad_images allows; the first: .*5.jpg"
    with pytest.raises(UserError, match=message):
        train(data, tmp_path / "many", *skip)


def test_images_of_odd_shapes_train(tmp_path):
    for i, size in enumerate([(1, 1), (20000, 10), (10, 5000), (3, 4)]):
        Image.new("RGB", size, (50 * i, 9, 90)).save(tmp_path / f"{i}.png")
    for loss, size in (("mean", 40), ("cls", 0)):
        train(tmp_path, tmp_path / loss, "--epochs", 1, "--loss", loss, "--image_size", size)
        (logged,) = read(tmp_path / loss / "log.txt")
        # A teacher that is almost uniform over K = 24 prototypes: the loss is close to ln K.
        assert logged["train_loss"] == pytest.approx(math.log(24), rel=0.2)


def test_few_periodic_checkpoints_are_kept(photo_folder, tmp_path):
    (tmp_path / "checkpoint_mine.pth").touch()
    train(photo_folder, tmp_path, "--epochs", 4, "--saveckp_freq", 1, "--keep_last", 2)
    names = {"checkpoint.pth", "checkpoint_previous.pth", "checkpoint_mine.pth"}
    assert {path.name for path in tmp_path.glob("*.pth")} == {*names, "checkpoint0002.pth", "checkpoint0003.pth"}


def test_other_images_are_not_resumed(photo_folder, tmp_path, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(photo_folder / "train", data)
    train(data, tmp_path / "run", "--epochs", 1)
    data.rename(tmp_path / "moved")  # the same images elsewhere are the same
    train(tmp_path / "moved", tmp_path / "run", "--epochs", 1)
    checkpoint = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)
    monkeypatch.chdir(tmp_path / "moved")
    checkpoint["images"][1] = hash_of_names(open_dataset("folder", "."), as_text=True)  # by version 0.9.0
    torch.save(checkpoint, tmp_path / "run/checkpoint.pth")
    train(".", tmp_path / "run", "--epochs", 1)
    (tmp_path / "moved/china/0.jpg").rename(tmp_path / "moved/china/9.jpg")
    with pytest.raises(UserError, match="was trained on 12 images, found 12, or images with other names"):
        train(tmp_path / "moved", tmp_path / "run", "--epochs", 1)
    (tmp_path / "moved/china/9.jpg").unlink()
    with pytest.raises(UserError, match="was trained on 12 images, found 11"):
        train(tmp_path / "moved", tmp_path / "run", "--epochs", 1)


def test_a_run_keeps_its_list_of_imagenet100(photo_folder, small_lists, tmp_path):
    """Also one of an older version, which recorded none and took cmc, with args.json and without."""
    run, words = tmp_path / "checkpoint.pth", ("--dataset", "imagenet100", "--epochs", 1)

    def recorded(*more):
        checkpoint = train(photo_folder, tmp_path, *words, *more)
        names = [f"/{name}/{i}.jpg" for name in ("china", "flower") for i in range(6)]
        orders = {"\n".join(names): "kaggle", "\n".join(names[6:] + names[:6]): "cmc"}
        used = {hashlib.sha256(order.encode()).hexdigest(): name for order, name in orders.items()}
        found = {used[checkpoint["images"][1]], json.loads((tmp_path / "args.json").read_text())["classes"]}
        return " ".join({*found, checkpoint["args"]["classes"] or "cmc"})

    for name, more in (("kaggle", ()), ("cmc", ("--classes", small_lists / "cmc.txt"))):
        shutil.rmtree(tmp_path)
        assert recorded(*more) == name
        (tmp_path / "args.json").write_text("{")
        assert [recorded(), recorded()] == [name, name]  # is finished
    checkpoint, args = torch.load(run, weights_only=True), json.loads((tmp_path / "args.json").read_text())
    torch.save({**checkpoint, "args": {**checkpoint["args"], "classes": None}}, run)
    (tmp_path / "args.json").write_text(json.dumps({**args, "classes": None}))
    assert parse_arguments([f"@{tmp_path}/args.json"]).classes == "cmc"
    assert recorded() == "cmc"
    (tmp_path / "args.json").unlink()
    assert recorded() == "cmc"
    with pytest.raises(UserError, match="other arguments: --classes cmc there, kaggle here"):
        train(photo_folder, tmp_path, *words, "--classes", "kaggle")
    run.unlink()  # stopped in its first epoch
    (tmp_path / "args.json").write_text(json.dumps({**args, "classes": None}))
    assert recorded() == "cmc"


def test_another_total_batch_is_not_resumed(photo_folder, tmp_path):
    train(photo_folder, tmp_path, "--epochs", 1)
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    torch.save({**checkpoint, "batch_size": 8}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="has 8 images per step, found 4 on 1 processes"):
        train(photo_folder, tmp_path, "--epochs", 1)


def test_other_arguments_never_overwrite_a_run(photo_folder, tmp_path):
    train(photo_folder, tmp_path, "--epochs", 1)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.raises(
        UserError,
        match=r"checkpoint.pth belongs to a run with other arguments: --loss mean there, sum here, --lr 0.0005 there",
    ):
        train(photo_folder, tmp_path, "--epochs", 1, "--loss", "sum", "--lr", 0.1)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    (tmp_path / "checkpoint.pth").unlink()  # stopped in its first epoch
    with pytest.raises(UserError, match="args.json belongs to a run with other arguments"):
        train(photo_folder, tmp_path, "--epochs", 1, "--seed", 5)


def test_files_of_others_in_the_output_folder_are_kept(photo_folder, tmp_path):
    (tmp_path / "log.txt").write_text("my notes")
    with pytest.raises(UserError, match="holds logs but no run"):
        train(photo_folder, tmp_path, "--epochs", 1)
    assert (tmp_path / "log.txt").read_text() == "my notes"
    (tmp_path / "args.json").write_text('{"lr": 0.')
    with pytest.raises(UserError, match="cannot read .*args.json"):
        train(photo_folder, tmp_path, "--epochs", 1)


def test_a_checkpoint_of_another_program_is_not_overwritten(photo_folder, tmp_path):
    torch.save({"student": {}, "args": {}}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="is not a checkpoint of main_lgssl.py"):
        train(photo_folder, tmp_path, "--epochs", 1)


def test_a_random_network_in_the_evaluation_is_the_untrained_teacher():
    torch.manual_seed(0)
    untrained = BackboneWithHead(vit_micro(8, img_size=32), DINOHead(96, 24)).backbone
    torch.manual_seed(0)
    evaluated, _ = load_backbone("none", "vit_micro", 8, img_size=32)
    assert all(torch.equal(a, b) for a, b in zip(untrained.parameters(), evaluated.parameters(), strict=True))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_trains(photo_folder, tmp_path, precision):
    exact = train(photo_folder, tmp_path / "fp32", "--epochs", 1)
    rounded = train(photo_folder, tmp_path / precision, "--epochs", 1, "--precision", precision)
    losses = [read(tmp_path / p / "log.txt")[0]["train_loss"] for p in ("fp32", precision)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert rounded["student"]["head.mlp.0.weight"].dtype == exact["student"]["head.mlp.0.weight"].dtype == torch.float32


def test_precision_depends_on_the_device_unless_it_is_given(monkeypatch):
    def chosen(precision, device, capability=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return set_precision(precision, torch.device(device))

    try:
        assert [chosen(None, "cpu"), chosen(None, "cuda", (7, 5)), chosen(None, "cuda", (8, 0))] == [
            "fp32",
            "fp16",
            "bf16",
        ]
        assert [chosen(given, "cuda", (9, 0)) for given in ("fp16", "fp32")] == ["fp16", "fp32"]
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
        assert chosen("tf32", "cuda", (8, 0)) == "tf32"
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
        for device, capability in (("cpu", None), ("cuda", (7, 5))):
            with pytest.raises(UserError, match="--precision tf32 needs a GPU"):
                chosen("tf32", device, capability)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_resumed_run_keeps_its_precision(photo_folder, tmp_path):
    train(photo_folder, tmp_path, "--epochs", 2, "--precision", "bf16")
    train(photo_folder, tmp_path, "--epochs", 2)  # goes on, and has nothing left to do
    with pytest.raises(UserError, match="--precision bf16 there, fp32 here"):
        train(photo_folder, tmp_path, "--epochs", 2, "--precision", "fp32")


def test_non_finite_loss_stops_with_the_step_and_keeps_the_checkpoint(photo_folder, tmp_path, monkeypatch):
    original, calls = LocalGlobalLoss.forward, []

    def poisoned(*arguments):
        calls.append(1)
        return original(*arguments) * (math.nan if len(calls) == 5 else 1)

    monkeypatch.setattr(LocalGlobalLoss, "forward", poisoned)
    with pytest.raises(UserError, match="the loss is not finite at step 4"):
        train(photo_folder, tmp_path, "--epochs", 3)
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["epoch"] == 1


def test_non_finite_gradient_never_reaches_a_checkpoint(photo_folder, tmp_path, monkeypatch):
    original, calls = LocalGlobalLoss.forward, []

    def poisoned(*arguments):
        loss = original(*arguments)
        calls.append(1)
        if len(calls) == 6:  # the last step of epoch 2
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    monkeypatch.setattr(LocalGlobalLoss, "forward", poisoned)
    with pytest.raises(UserError, match="the gradient of backbone.cls_token is not finite at step 5"):
        train(photo_folder, tmp_path, "--epochs", 3)
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert checkpoint["epoch"] == 1
    assert all(value.isfinite().all() for value in checkpoint["student"].values())


def test_images_of_one_size_need_no_resizing(photo_folder, tmp_path):
    """With --image_size 0, images of 40x40 pixels train as with --image_size 40, whatever sizes others have."""
    for path in photo_folder.glob("train/*/*.jpg"):
        Image.open(path).resize((40, 40)).save(tmp_path / f"{path.parent.name}{path.stem}.png")
    options = ("--epochs", 1, "--geometry", "image", "--image_size")
    assert_same_state(train(tmp_path, tmp_path / "a", *options, 0), train(tmp_path, tmp_path / "b", *options, 40))
    Image.new("RGB", (60, 90), "red").save(tmp_path / "odd.png")
    assert train(tmp_path, tmp_path / "c", *options, 0)["step"] == 3


def test_batch_norm_in_the_head_and_learned_norms(photo_folder, tmp_path):
    options = ("--use_bn_in_head", "true", "--norm_last_layer", "false", "--freeze_last_layer", 0, "--warmup_epochs", 0)
    student = train(photo_folder, tmp_path, "--epochs", 1, *options)["student"]
    assert student["head.mlp.1.num_batches_tracked"] == 3
    assert not torch.equal(student["head.last_layer.weight_g"], torch.ones(24, 1))


def test_without_local_views_the_two_global_views_are_matched(photo_folder, tmp_path):
    train(photo_folder, tmp_path, "--epochs", 1, "--local_crops_number", 0, "--global_crops_scale", 1, 1)
    (logged,) = read(tmp_path / "log.txt")
    assert logged["train_matched_patches"] == 16  # both show the whole image


# What each option changes in two steps from the same weights: the loss of the first step, the weights of the student or
# the teacher after the second, the names or shapes of weights, or a logged value
EFFECTS = {
    "--loss sum": "loss", "--matching nearest": "loss", "--geometry image": "loss", "--seed 7": "loss",
    "--image_size 50": "loss", "--global_crops_scale 0.8 0.9": "loss", "--local_crops_scale 0.6 0.7": "loss",
    "--local_crops_number 3": "loss", "--flip_prob 1": "loss", "--distortion 0.4": "loss",
    "--patch_augmentation": "loss",
    "--teacher_temp 0.5 --warmup_teacher_temp_epochs 0": "loss",
    "--warmup_teacher_temp 0.5 --warmup_teacher_temp_epochs 3": "loss", "--drop_path_rate 0.5": "loss",
    "--train_images 11": "loss", "--precision bf16": "loss", "--init_weights {other}": "loss",
    "--loss lambda": "loss", "--loss lambda --lambda_cls 0.9": "loss", "--accum_steps 2": "loss",
    "--center shared": "student", "--lr 0.001": "lr", "--min_lr 0.01": "lr", "--warmup_epochs 1": "lr",
    "--weight_decay 0.3": "wd", "--weight_decay_end 0.9": "wd", "--clip_grad 0.001": "student",
    "--optimizer sgd": "student", "--momentum_teacher 0.1": "teacher", "--freeze_last_layer 1": "student",
    "--freeze_backbone 1": "student", "--global_crops_size 40": "shapes", "--local_crops_size 24": "loss",
    "--patch_size 4": "shapes", "--out_dim 20": "shapes", "--head_hidden_dim 20": "shapes", "--arch vit_tiny": "shapes",
    "--patch_head separate": "shapes",
    "--use_bn_in_head true": "shapes", "--norm_last_layer false": "student", "--batch_size_per_gpu 5": "loss",
}  # fmt: skip


@pytest.fixture(scope="module")
def two_steps(photo_folder, tmp_path_factory):
    """Train for two steps with some options, once, and return the parts of the run that options change."""

    @functools.cache
    def run(options):
        folder = tmp_path_factory.mktemp("two")
        usual = "--epochs 1 --batch_size_per_gpu 6 --log_every 1 --warmup_epochs 0 --freeze_last_layer 0 --lr 0.05"
        checkpoint = train(photo_folder, folder, *usual.split(), *options.split())
        steps = read(folder / "steps.jsonl")
        shapes = {name: list(value.shape) for name, value in checkpoint["student"].items()}
        return {"shapes": shapes, **{name: steps[-1][name] for name in ("lr", "wd")}, "loss": steps[0]["loss"],
                "student": checkpoint["student"], "teacher": checkpoint["teacher"], "folder": folder}  # fmt: skip

    return run


def differ(a, b):
    if isinstance(a, dict) and torch.is_tensor(next(iter(a.values()))):
        return any(not torch.equal(a[name], b[name]) for name in a)
    return a != b


@pytest.mark.parametrize("option", EFFECTS)
def test_every_option_has_its_effect(two_steps, option):
    effect, usual = EFFECTS[option], two_steps("")
    usual = two_steps("--loss lambda") if "--lambda_cls" in option else usual
    changed = two_steps(option.format(other=two_steps("--seed 5")["folder"] / "checkpoint.pth"))
    assert differ(changed[effect], usual[effect])
    if effect not in ("loss", "shapes"):
        assert changed["loss"] == usual["loss"]  # the first step is the same
    if effect == "teacher":
        assert not differ(changed["student"], usual["student"]) or "momentum" in option


def test_arguments_are_not_written_to(photo_folder, tmp_path):
    """What is resolved later, such as the precision, stands in the run's settings and its args.json."""
    args = parse_arguments([*TINY, "--data_path", str(photo_folder), "--output_dir", str(tmp_path)])
    before = dict(vars(args))
    run = main_lgssl.build_run(args, main_lgssl.StopRequest())
    os.close(run.lock)
    assert vars(args) == before
    assert (before["precision"], run.settings["precision"]) == (None, "fp32")
    assert json.loads((tmp_path / "args.json").read_text()) == run.settings


def test_steps_between_two_reports_are_those_of_log_every(photo_folder, tmp_path):
    train(photo_folder, tmp_path, "--epochs", 2, "--log_every", 2)
    assert [entry["step"] for entry in read(tmp_path / "steps.jsonl")] == [1, 2, 3, 5]


def test_defaults_are_the_papers():
    args = vars(parse_arguments(["--data_path", "x"]))
    expected = {
        "loss": "mean", "matching": "paper", "geometry": "batch", "center": "position", "image_size": 256,
        "out_dim": 10000,
        "optimizer": "adamw", "lr": 5e-4, "warmup_epochs": 10, "weight_decay": 0.04, "weight_decay_end": 0.4,
        "momentum_teacher": 0.996, "warmup_teacher_temp": 0.04, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 30,
        "global_crops_size": 224, "local_crops_size": 96, "global_crops_scale": [0.4, 1.0],
        "local_crops_scale": [0.05, 0.4], "local_crops_number": 8, "flip_prob": 0.5, "clip_grad": 3.0,
        "distortion": 1.0, "patch_augmentation": False, "train_images": None, "tuning": False,
    }  # fmt: skip
    assert {name: args[name] for name in expected} == expected


def test_warm_ups_that_last_to_the_end_and_a_finished_run_are_named(photo_folder, tmp_path, capsys):
    words = ("--epochs", 2, "--warmup_epochs", 2)
    train(photo_folder, tmp_path, *words)
    assert (
        "note: --warmup_epochs 2 lasts to the end of the run, --epochs 2: the learning rate only rises"
        in capsys.readouterr().out
    )
    train(photo_folder, tmp_path, *words)
    output = capsys.readouterr().out
    assert "steps per epoch; the run is finished\n" in output
    assert "--warmup_teacher_temp_epochs 30 is more than --epochs 2: the run ends before --teacher_temp 0.07" in output
    assert remarks(parse_arguments(["--epochs", "200"])) == []
    constant = "--epochs 2 --warmup_epochs 1 --teacher_temp 0.04".split()
    assert remarks(parse_arguments(constant)) == []


@pytest.mark.parametrize(("options", "lines"), [("", 1), ("--loss cls", 0), ("--patch_head separate", 0)])
def test_batch_norm_over_cls_and_patches_is_named(options, lines):
    found = remarks(parse_arguments(["--use_bn_in_head", "true", *options.split()]))
    assert len(found) == lines
    assert all("the head normalizes CLS by statistics of all matched tokens, mostly patches" in line for line in found)


def test_pixels_beyond_the_last_whole_patch_are_left_out(photo_folder, tmp_path, capsys, monkeypatch):
    """As by DINO's convolution: a run whose views are cut to whole patches ends with the same weights."""
    options = ("--loss", "cls", "--patch_size", 14, "--epochs", 1, "--warmup_epochs", 0, "--lr", 0.05)
    whole = train(photo_folder, tmp_path / "whole", *options)
    expected = "patches of side 14 leave out the last 4 of 32 and 2 of 16 pixels, right and bottom"
    assert expected in capsys.readouterr().out
    make_views = ViewBatches.make_views

    def cut_views(batches, key, **options):
        views, bad_images = make_views(batches, key, **options)
        sides = [view.pixels.shape[-1] // 14 * 14 for view in views]
        cut = [view.pixels[..., :side, :side] for view, side in zip(views, sides, strict=True)]
        return [view._replace(pixels=pixels) for view, pixels in zip(views, cut, strict=True)], bad_images

    monkeypatch.setattr(ViewBatches, "make_views", cut_views)
    cut = train(photo_folder, tmp_path / "cut", *options)
    assert whole["student"]["backbone.pos_embed"].shape == (1, 1 + 2 * 2, 96)
    for name in ("student", "teacher", "loss"):
        torch.testing.assert_close(whole[name], cut[name], rtol=0, atol=0)


def test_defaults_that_follow_from_others():
    assert [vars(parse_arguments(["--loss", "cls"]))[n] for n in ("geometry", "image_size")] == ["image", 0]
    args = parse_arguments(["--loss", "cls", "--geometry", "batch"])
    assert (args.geometry, args.image_size) == ("batch", 256)
    assert parse_arguments(["--geometry", "image"]).image_size == 256
    assert parse_arguments(["--use_fp16", "true"]).precision == "fp16"
    assert parse_arguments(["--use_fp16", "false"]).precision == "fp32"
    assert parse_arguments(["--use_fp16", "true", "--precision", "bf16"]).precision == "bf16"


def test_recipe_of_dino_has_dinos_defaults():
    """The defaults of main_dino.py. Only the precision depends on the machine here."""
    args = vars(parse_arguments(["@recipes/dino.args"]))
    expected = {
        "arch": "vit_small", "patch_size": 16, "out_dim": 65536, "norm_last_layer": True, "momentum_teacher": 0.996,
        "use_bn_in_head": False, "warmup_teacher_temp": 0.04, "teacher_temp": 0.04, "warmup_teacher_temp_epochs": 0,
        "weight_decay": 0.04, "weight_decay_end": 0.4, "clip_grad": 3.0, "batch_size_per_gpu": 64, "epochs": 100,
        "freeze_last_layer": 1, "lr": 0.0005, "warmup_epochs": 10, "min_lr": 1e-6, "optimizer": "adamw",
        "drop_path_rate": 0.1, "global_crops_scale": [0.4, 1.0], "local_crops_number": 8,
        "local_crops_scale": [0.05, 0.4], "output_dir": ".", "saveckp_freq": 20, "seed": 0, "dist_url": "env://",
    }  # fmt: skip
    assert {name: args[name] for name in expected} == expected
    # What main_dino.py does without an option
    fixed = {"loss": "cls", "geometry": "image", "image_size": 0, "global_crops_size": 224, "local_crops_size": 96,
             "flip_prob": 0.5, "head_hidden_dim": 2048, "accum_steps": 1, "distortion": 1.0,
             "patch_augmentation": False}  # fmt: skip
    assert {name: args[name] for name in fixed} == fixed


def test_a_dino_command_line_works():
    words = "@recipes/dino.args " + (
        "--arch deit_small --patch_size 16 --out_dim 65536 --norm_last_layer false --momentum_teacher 0.996 "
        "--use_bn_in_head false --warmup_teacher_temp 0.04 --teacher_temp 0.04 --warmup_teacher_temp_epochs 0 "
        "--use_fp16 true --weight_decay 0.04 --weight_decay_end 0.4 --clip_grad 0 --batch_size_per_gpu 64 --epochs 100 "
        "--freeze_last_layer 1 --lr 0.0005 --warmup_epochs 10 --min_lr 1e-6 --optimizer adamw --drop_path_rate 0.1 "
        "--global_crops_scale 0.25 1 --local_crops_number 8 --local_crops_scale 0.05 0.25 --data_path /x "
        "--output_dir /y --saveckp_freq 20 --seed 0 --num_workers 10 --dist_url env:// --local_rank 0"
    )
    args = parse_arguments(words.split())
    assert (args.arch, args.out_dim, args.norm_last_layer, args.precision) == ("vit_small", 65536, False, "fp16")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lambda_cls 1.5", "--lambda_cls: found '1.5', expected a number in [0, 1]"),
        ("--global_crops_size 220", "--global_crops_size 220 is not a multiple of --patch_size 16; the nearest is 224"),
        ("--patch_size 14", "--local_crops_size 96 is not a multiple of --patch_size 14; the nearest is 98"),
        ("--loss cls --patch_size 14 --patch_augmentation", "--local_crops_size 96 is not a multiple of"),
        ("--patch_size 2 --patch_augmentation", "--patch_augmentation needs a --patch_size of at least 3, found 2"),
        ("--loss cls --patch_size 97", "--local_crops_size 96 is not a multiple of --patch_size 97; the nearest is 97"),
        ("--image_size 0", "--image_size 0 needs --geometry image"),
        ("--loss cls --patch_head separate", "--patch_head separate needs a loss with patches, found --loss cls"),
        ("--accum_steps 2 --use_bn_in_head true", "--accum_steps needs --use_bn_in_head false"),
        ("--local_crops_scale 0.4 0.1", "--local_crops_scale 0.4 0.1: expected two positive fractions, the smaller"),
        ("--lossy mean", "unknown option --lossy; did you mean --loss?"),
        ("--epochs 0", "found '0', expected a whole number in [1, 1000000]"),
        ("--use_fp16 maybe", "'maybe' is not a boolean, expected true or false"),
    ],
)  # fmt: skip
def test_bad_options_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse_arguments(words.split())
    assert error.value.code == 2
    text = capsys.readouterr().err
    assert message in text
    assert text.count("\n") == 1


def test_bad_input_is_named_before_training(photo_folder, tmp_path):
    def message(*words):
        with pytest.raises(UserError) as error:
            main_lgssl.main([*TINY, "--output_dir", str(tmp_path / "out"), *map(str, words)])
        return str(error.value)

    assert "no folder" in message("--data_path", tmp_path / "nowhere")
    assert "found 12 images, fewer than one step of 13 images x 1 micro-batches x 1 processes" in message(
        "--data_path", photo_folder, "--batch_size_per_gpu", 13
    )
    (tmp_path / "file").write_text("")
    assert "cannot write to --output_dir" in message(
        "--data_path", photo_folder, "--output_dir", tmp_path / "file" / "out"
    )
    (tmp_path / "bad").mkdir()
    for i in range(4):
        Image.new("RGB", (40, 40)).save(tmp_path / "bad" / f"{i}.png")
    (tmp_path / "bad" / "3.png").write_bytes(b"broken")
    assert "cannot read image" in message("--data_path", tmp_path / "bad", "--epochs", 1)
    assert "3.png" in message("--data_path", tmp_path / "bad", "--epochs", 1, "--num_workers", 1)
