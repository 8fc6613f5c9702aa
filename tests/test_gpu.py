"""The training and the evaluations on a GPU against the same on the CPU: `make test-gpu`, on one GPU or more.

All trainings are on scikit-learn's digits, and short, because differences in rounding grow from step to step. The
tolerances are several times what such differences change on a CPU.
"""

import json
import os
import signal
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from digits_run import torchrun
from test_main_lgssl import assert_same_state

import eval_knn
import eval_linear
import main_lgssl
from augment import MultiCrop, distort_batch
from benchmarks.bench_gpu import DTYPES, pairs_by_image, plain_batch_loss
from losses import LocalGlobalLoss
from support.loader import ViewBatches
from vision_transformer import TokenOutput, VisionTransformer

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS refuses to be deterministic

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")
pytestmark = [pytest.mark.gpu, needs_gpu]

# 10 steps in one epoch. Compiling takes seconds: only some tests do it.
TRAINING = (
    "--dataset digits --arch vit_micro --patch_size 8 --image_size 40 --global_crops_size 32 --local_crops_size 16 "
    "--local_crops_number 2 --out_dim 24 --head_hidden_dim 32 --drop_path_rate 0 --batch_size_per_gpu 128 --epochs 1 "
    "--lr 0.002 --warmup_epochs 0 --freeze_last_layer 0 --log_every 1 --num_workers 0 --knn_every 0 --image_every 0 "
    "--compile false --distort_on workers"
).split()
EAGER = ("--cuda_graphs", "false")


def steps(folder):
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def train(folder, *more, graphs=True):
    """Train on the GPU, with or without CUDA graphs, and return the steps."""
    accelerate, done = main_lgssl.accelerate, []

    def noted(*arguments, **named):
        done.append(accelerate(*arguments, **named))
        return done[-1]

    with mock.patch.object(main_lgssl, "accelerate", noted):
        main_lgssl.main([*TRAINING, *map(str, more), "--output_dir", str(folder)])
    assert [("CUDA graphs" in text, "compiled blocks" in text) for _, text in done] == [(graphs, "--compile" in more)]
    return steps(folder)


def assert_close(found, expected, rel):
    """Compare the losses of the same steps within a relative tolerance, and gradient norms within ten times as much."""
    assert [step["step"] for step in found] == [step["step"] for step in expected]
    for name, tolerance in (("loss", rel), ("grad_norm", 10 * rel)):
        values, references = ([step[name] for step in run] for run in (found, expected))
        assert values == [x if x is None else pytest.approx(x, rel=tolerance) for x in references], name


@pytest.fixture(scope="module")
def on_cpu(run_script, tmp_path_factory):
    """Train on the CPU in a precision, once, and return the folder."""
    folders = {}

    def run(precision):
        if precision not in folders:
            folders[precision] = tmp_path_factory.mktemp("cpu")
            words = [*TRAINING, "--precision", precision, "--output_dir", folders[precision]]
            run_script("main_lgssl.py", *words, CUDA_VISIBLE_DEVICES="")
        return folders[precision]

    return run


def loss_and_gradients(device, K, precision):
    """Return (loss, gradients) of the criterion on a device, and those of the plain formula in float64 on the CPU."""
    images = np.random.default_rng(0).integers(0, 256, (3, 96, 96, 3), np.uint8)
    crop = MultiCrop(global_size=64, local_size=32, local_number=4, geometry="image")
    matches = ViewBatches([(image, 0) for image in images], crop, 16, "paper", 0)[0, 0, [0, 1, 2]].matches
    generator = torch.Generator().manual_seed(0)

    def unit(*shape):
        return F.normalize(torch.randn(*shape, generator=generator), dim=-1)

    # Each token is near one prototype.
    w_t, w_s = unit(K, 256), unit(K, 256)
    z_t, z_s = (
        F.normalize(w[torch.randint(K, (len(rows),), generator=generator)] + unit(len(rows), 256), dim=-1)
        for w, rows in ((w_t, matches.teacher_row), (w_s, matches.student_row))
    )
    criterion = LocalGlobalLoss(K, 16).eval()
    criterion.center.copy_(0.1 * torch.randn(17, K, generator=generator))

    def evaluate(loss, dtype, on):
        moved = [x.to(on, dtype) for x in (z_s, w_s, torch.ones(K))]
        inputs = [x.requires_grad_() for x in moved]
        teacher_out = TokenOutput(z_t.to(on, dtype), w_t.to(on, dtype), torch.ones(K, device=on, dtype=dtype), None)
        value = loss(TokenOutput(*inputs, None), teacher_out)
        gradients = torch.autograd.grad(1000 * value, inputs)
        return [x.detach().cpu().double() for x in (value, *gradients)]

    pairs, center = pairs_by_image(matches, torch.device("cpu")), criterion.center.double()
    expected = evaluate(lambda *outs: plain_batch_loss(*outs, pairs, center, 0.04), torch.float64, "cpu")
    criterion.to(device)
    with torch.autocast(device.type, DTYPES.get(precision), enabled=precision in DTYPES):
        found = evaluate(lambda *outs: criterion(*outs, matches.to(device), 0.04), torch.float32, device)
    return found, expected


@pytest.mark.parametrize("K", [1000, 65536])
@pytest.mark.parametrize(
    ("precision", "of_loss", "of_gradients"), [("fp32", 1e-5, 1e-4), ("bf16", 1e-3, 2e-2), ("fp16", 1e-4, 3e-3)]
)
def test_loss_and_gradients_are_those_of_the_plain_formula(K, precision, of_loss, of_gradients):
    """Within relative tolerances; a gradient as a whole, in its norm."""
    (loss, *gradients), (expected, *expected_gradients) = loss_and_gradients(torch.device("cuda"), K, precision)
    assert loss.item() == pytest.approx(expected.item(), rel=of_loss)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        assert (gradient - reference).norm() < of_gradients * reference.norm()


@pytest.mark.parametrize(
    ("precision", "reference", "tolerance"),
    [("fp32", "fp32", 2e-3), ("tf32", "fp32", 5e-3), ("bf16", "bf16", 1e-2), ("fp16", "fp16", 5e-3)],
)
def test_a_training_is_that_of_the_cpu(on_cpu, run_script, tmp_path, precision, reference, tolerance):
    """With fp16, both skip the same first steps. A process each, because a precision sets what holds for a process."""
    run_script("main_lgssl.py", *TRAINING, "--precision", precision, "--output_dir", tmp_path)
    assert_close(steps(tmp_path), steps(on_cpu(reference)), tolerance)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def stop_and_resume(folder, monkeypatch, *options):
    """Train without interruption, and with a stop after step 4; return the folders."""
    original = main_lgssl.seed_networks

    def at_the_fifth_step(seed, step, rank, micro_step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        original(seed, step, rank, micro_step)

    folders = folder / "whole", folder / "resumed"
    train(folders[0], *options)
    with monkeypatch.context() as patch:
        patch.setattr(main_lgssl, "seed_networks", at_the_fifth_step)
        assert len(train(folders[1], *options)) == 5
    train(folders[1], *options)
    return folders


def test_a_resumed_run_ends_with_the_same_bits(tmp_path, monkeypatch, deterministic):
    """Without local views: PyTorch has no deterministic gradient of their position embedding, which is interpolated."""
    options = ("--local_crops_number", 0, "--drop_path_rate", 0.2)
    folders = stop_and_resume(tmp_path, monkeypatch, *options)
    assert_same_state(*(torch.load(folder / "checkpoint.pth", weights_only=True) for folder in folders))


def test_a_resumed_run_with_local_views_has_the_same_losses(tmp_path, monkeypatch):
    whole, resumed = map(steps, stop_and_resume(tmp_path, monkeypatch, "--precision", "fp32", "--drop_path_rate", 0.2))
    assert_close(resumed, whole, 1e-3)


@pytest.mark.parametrize("compiles", [[], ["--compile"], ["--compile", "--patch_augmentation"]])
def test_a_training_that_distorts_on_the_device_is_that_of_the_workers(tmp_path, capsys, compiles):
    """20 steps and more, on views that differ by less than 2 levels on average."""
    options = ("--precision", "fp32", "--batch_size_per_gpu", 64, *compiles)
    of_workers, own = (train(tmp_path / place, *options, "--distort_on", place) for place in ("workers", "device"))
    assert "warning: " not in capsys.readouterr().err
    assert len(own) >= 20
    assert [step["loss"] for step in own] == pytest.approx([step["loss"] for step in of_workers], rel=1e-2)
    assert [step["matched_patches"] for step in own] == [step["matched_patches"] for step in of_workers]


def test_distorting_on_the_device_is_deterministic_and_that_of_the_cpu():
    """Up to values that lie at the boundary of two levels."""
    images = [(np.random.default_rng(i).integers(0, 256, (96, 96, 3), np.uint8), 0) for i in range(16)]
    batch = ViewBatches(images, MultiCrop(global_size=64, local_size=32), 16, None, 0, distorts=False)[0, 0, range(16)]
    rows = batch.parameters.split([len(pixels) for pixels in batch.pixels])
    for pixels, own in zip(batch.pixels, rows, strict=True):
        expected, (found, again) = distort_batch(pixels, own), (distort_batch(pixels.cuda(), own.cuda()) for _ in "12")
        assert torch.equal(found, again)
        difference = (found.cpu().int() - expected.int()).abs()
        assert difference.max() <= 6
        assert difference.float().mean() < 0.1


@pytest.mark.parametrize("options", ["--grad_checkpointing", "--compile --cuda_graphs false"])
def test_options_that_save_time_or_memory_change_no_loss(tmp_path, options):
    plain, other = (
        train(tmp_path / name, "--precision", "fp32", *more, graphs=False)
        for name, more in (("a", EAGER), ("b", options.split()))
    )
    assert_close(other, plain, 2e-3)


@pytest.mark.parametrize(("precision", "accum_steps"), [("fp32", 2), ("bf16", 1), ("bf16", 2), ("fp16", 1)])
def test_graphs_change_no_bit(tmp_path, deterministic, precision, accum_steps):
    """Without local views, see test_a_resumed_run_ends_with_the_same_bits."""
    options = f"--local_crops_number 0 --drop_path_rate 0.2 --precision {precision} --accum_steps {accum_steps}".split()
    options += ["--batch_size_per_gpu", 128 // accum_steps]
    for name, more in (("eager", EAGER), ("graphs", ())):
        train(tmp_path / name, *options, *more, graphs=name == "graphs")
    folders = (tmp_path / "graphs", tmp_path / "eager")
    assert_same_state(*(torch.load(folder / "checkpoint.pth", weights_only=True) for folder in folders))


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [("", 1e-4), ("--patch_head separate", 1e-4), ("--accum_steps 2", 1e-4), ("--compile", 2e-3)],
)
def test_graphs_with_local_views_have_the_same_losses(tmp_path, capsys, options, tolerance):
    """Online k-NN and pictures, of other batch sizes, run beside the graphs."""
    common = "--batch_size_per_gpu 64 --drop_path_rate 0.2 --precision fp32 --knn_every 1 --image_every 1".split()
    common += [word for word in options.split() if word != "--compile"]
    eager = train(tmp_path / "eager", *common, *EAGER, graphs=False)
    graphs = train(tmp_path / "graphs", *common, *options.split())
    assert "warning: " not in capsys.readouterr().err
    assert_close(graphs, eager, tolerance)
    epochs = [json.loads((tmp_path / name / "log.txt").read_text()) for name in ("eager", "graphs")]
    assert epochs[0]["knn_top1"] == pytest.approx(epochs[1]["knn_top1"], abs=1)


def test_a_backbone_that_cannot_be_captured_trains_without_graphs(tmp_path, monkeypatch, capsys):
    """It leaves nothing behind that prevents the graphs of the next training."""
    options, forward = ("--precision", "fp32", "--drop_path_rate", 0.2), VisionTransformer.forward

    def waiting(network, images, *more):
        assert images.mean().item() < 100
        return forward(network, images, *more)

    with monkeypatch.context() as patch:
        patch.setattr(VisionTransformer, "forward", waiting)
        found = train(tmp_path / "waiting", *options, graphs=False)
    assert capsys.readouterr().err.count("warning: the backbones run without CUDA graphs") == 1
    assert_close(found, train(tmp_path / "graphs", *options), 1e-4)


@pytest.mark.parametrize(
    "options",
    [
        "--loss mean",
        "--loss cls",
        "--patch_head separate --use_bn_in_head true",
        "--precision bf16",
        "--optimizer sgd",
        "--optimizer lars",
        "--accum_steps 2 --batch_size_per_gpu 64",
        "--cuda_graphs false",
        "--distort_on device",
        "--compile --distort_on device",
    ],
)
def test_nothing_waits_for_the_device_between_reports(tmp_path, monkeypatch, options):
    """From the second step, since the first one sets up much, to the loading of the last one, which reports."""
    original, modes = main_lgssl.seed_networks, []

    def set_mode(seed, step, rank, micro_step):
        original(seed, step, rank, micro_step)
        modes.append("error" if 1 <= step < 9 else "default")
        torch.cuda.set_sync_debug_mode(modes[-1])

    monkeypatch.setattr(main_lgssl, "seed_networks", set_mode)
    try:
        words = [*options.split(), "--log_every", 100, "--drop_path_rate", 0.2]
        train(tmp_path, *words, graphs=options != "--cuda_graphs false")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert modes.count("error") == 8 * (2 if "--accum_steps 2" in options else 1)


def evaluate(run_script, script, weights, folder, *options):
    """Evaluate on the GPU and on the CPU, and return both results."""
    words = ["--dataset", "digits", "--pretrained_weights", weights / "checkpoint.pth", "--num_workers", 0, *options]
    words = [str(word) for word in words]
    script.main([*words, "--output_dir", str(folder / "gpu")])
    run_script(f"{script.__name__}.py", *words, "--output_dir", folder / "cpu", CUDA_VISIBLE_DEVICES="")
    return [json.loads(next((folder / device).glob("*.json")).read_text()) for device in ("gpu", "cpu")]


IMAGES = 397  # of the validation


def test_knn_is_that_of_the_cpu(on_cpu, run_script, tmp_path):
    """Up to two images, whose nearest neighbours change by rounding."""
    found, expected = evaluate(run_script, eval_knn, on_cpu("fp32"), tmp_path)
    assert set(found["knn"]) == {"10", "20"}
    for k, metrics in found["knn"].items():
        assert metrics["top1"] == pytest.approx(expected["knn"][k]["top1"], abs=2.01 * 100 / IMAGES)
        assert metrics["top5"] == pytest.approx(expected["knn"][k]["top5"], abs=2.01 * 100 / IMAGES)


@pytest.mark.parametrize("protocol", [("--epochs", 3), ("--epochs", 10, "--cache_features")])
def test_linear_classification_is_that_of_the_cpu(on_cpu, run_script, tmp_path, protocol):
    found, expected = evaluate(run_script, eval_linear, on_cpu("fp32"), tmp_path, *protocol)
    assert len(found["history"]) == protocol[1]
    for own, reference in zip(found["history"], expected["history"], strict=True):
        assert own["loss"] == pytest.approx(reference["loss"], rel=2e-3)
        assert own["top1"] == pytest.approx(reference["top1"], abs=4.01 * 100 / IMAGES)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_are_one_with_the_whole_batch(run_script, tmp_path):
    """With NCCL and synchronized batch norm."""
    options = "--geometry image --use_bn_in_head true --precision fp32 --batch_size_per_gpu".split()
    one = train(tmp_path / "one", *options, 128)
    _, *launcher = torchrun()
    run_script("main_lgssl.py", *TRAINING, *options, 64, "--output_dir", tmp_path / "two", launcher=launcher)
    assert_close(steps(tmp_path / "two"), one, 2e-3)
