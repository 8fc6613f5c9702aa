"""What a training step asks of a GPU: launches, copies, synchronizations and memory, counted without one."""

import itertools
import json

import pytest
from nullgpu import build

# The default network and views. Options: launches of the loss, launches of a step, peak and reserved memory in GB
# If the device distorts the views, a step has at most 200 more launches, and reserves memory for it.
BUDGETS = {
    "--precision fp16 --loss mean --out_dim 10000": (150, 500, 7.4, 9.0),
    "--precision fp16 --loss mean --out_dim 10000 --distort_on workers": (150, 300, 7.4, 8.7),
    "--precision fp16 --loss mean --out_dim 65536 --distort_on workers": (250, 420, 8.2, 9.6),
    "--precision fp16 --loss cls --out_dim 65536 --distort_on workers": (150, 300, 8.2, 7.4),
    "--precision fp16 --loss mean --out_dim 10000 --cuda_graphs false --distort_on workers": (150, 2150, 7.4, 8.2),
}
OPTIMIZERS = [f"--precision fp16 --optimizer {name}" for name in ("adamw", "sgd", "lars")]
COMMON = "--dataset digits --num_workers 0 --knn_every 0 --image_every 0 --log_every 4 --freeze_last_layer 0 "
COMMON += "--compile false"  # there is no compiler for what stands in for a GPU
TRAINING = f"main_lgssl {COMMON} --epochs 1"
TINY = f"{TRAINING} --arch vit_micro --patch_size 8 --image_size 40 --global_crops_size 32 --local_crops_size 16 "
TINY += "--local_crops_number 2 --out_dim 24 --head_hidden_dim 32 --batch_size_per_gpu 4"
PLAIN, REPORT = 2, 3  # steps

CHECK = """
import json, torch
from nullgpu import runs

runs.patch()
torch.cuda.init()
square, pinned = torch.empty(4, 4, device="cuda"), torch.ones(3).pin_memory()
square @ square  # creates the handle of cuBLAS
operations = {
    "memset": square.zero_,
    "kernel": lambda: square + 1,
    "product": lambda: square @ square,
    "copy": square.clone,
    "pinned": lambda: pinned.to("cuda", non_blocking=True),
    "pageable": lambda: torch.ones(3).to("cuda", non_blocking=True),
    "waiting": lambda: torch.ones(3).to("cuda"),
    "item": lambda: square[0, 0].item(),
    "synchronize": torch.cuda.synchronize,
}
counts = {}
for name, operation in operations.items():
    before = runs.read()
    operation()
    counts[name] = [count - before[key] for key, count in runs.read().items()]
print(json.dumps(counts))
"""


@pytest.fixture(scope="module")
def on_nullgpu(tmp_path_factory, run_script):
    """Run Python on the library that stands in for CUDA, and return the JSON that it prints."""
    if obstacle := build.obstacle():
        pytest.skip(obstacle)
    environment = {"LD_PRELOAD": str(build.build(tmp_path_factory.mktemp("nullgpu"))), "PYTHONPATH": "tests"}
    environment |= {"CUDA_VISIBLE_DEVICES": "0", "TRITON_INTERPRET": "0"}
    return lambda *words: json.loads(run_script(*words, **environment).stdout)


@pytest.fixture(scope="module")
def run_all(on_nullgpu, tmp_path_factory):
    """Run commands in one process and return {command: what it counted}, each with an output folder of its own."""

    def run(commands):
        folders = (tmp_path_factory.mktemp("run") for _ in commands)
        lines = [f"{c} --output_dir {f}" for c, f in zip(commands, folders, strict=True)]
        return dict(zip(commands, on_nullgpu("-m", "nullgpu.runs", *lines), strict=True))

    return run


@pytest.fixture(scope="module")
def measured(run_all):
    """Train with BUDGETS and OPTIMIZERS, and return {options: what was counted}."""
    results = run_all(
        [f"{TRAINING} {options}" for options in BUDGETS] + [f"{TINY} {options}" for options in OPTIMIZERS]
    )
    for result in results.values():
        assert len(result["steps"]) > REPORT, result["error"]
    return dict(zip([*BUDGETS, *OPTIMIZERS], results.values(), strict=True))


def test_counts_of_known_operations(on_nullgpu):
    counts = on_nullgpu("-c", CHECK)
    # launches, pageable copies, synchronizations
    assert counts == {
        "memset": [1, 0, 0],
        "kernel": [1, 0, 0],
        "product": [1, 0, 0],
        "copy": [1, 0, 0],
        "pinned": [0, 0, 0],
        "pageable": [0, 1, 0],
        "waiting": [0, 1, 1],
        "item": [0, 0, 1],
        "synchronize": [0, 0, 1],
    }


@pytest.mark.slow
@pytest.mark.parametrize("options", BUDGETS)
def test_launches_of_the_loss(measured, options):
    assert 0 < measured[options]["steps"][PLAIN]["loss_launches"] <= BUDGETS[options][0], most(measured[options])


@pytest.mark.slow
@pytest.mark.parametrize("options", BUDGETS)
def test_launches_of_a_step(measured, options):
    assert 0 < measured[options]["steps"][PLAIN]["launches"] <= BUDGETS[options][1], most(measured[options])


@pytest.mark.slow
def test_launches_of_the_distortion_on_the_device(measured):
    device, workers = (measured[options]["steps"][PLAIN]["launches"] for options in list(BUDGETS)[:2])
    assert workers < device <= workers + 200


def most(result) -> str:
    """Return the places that launch most."""
    return "\n".join(f"{launches:5} {place}" for place, launches in result["lines"][:30])


@pytest.mark.slow
@pytest.mark.parametrize("options", BUDGETS)
def test_peak_memory(measured, options):
    assert 1 < measured[options]["peak_bytes"] / 1e9 <= BUDGETS[options][2]
    assert 1 < measured[options]["reserved_bytes"] / 1e9 <= BUDGETS[options][3]


@pytest.mark.slow
@pytest.mark.parametrize("options", BUDGETS)
def test_steps_copy_only_from_pinned_memory(measured, options):
    assert measured[options]["steps"][PLAIN]["pageable_copies"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("options", BUDGETS)
def test_steps_with_reports_wait_only_after_the_backward_pass(measured, options):
    counts = measured[options]["steps"][REPORT]
    assert counts["synchronizations"] > 0  # for the values of the report
    assert counts["synchronizations_before_backward"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [*BUDGETS, *OPTIMIZERS])
def test_steps_without_reports_do_not_wait(measured, options):
    assert not measured[options]["error"], measured[options]["error"]  # PyTorch's own detection raises in the last step
    assert measured[options]["steps"][PLAIN]["synchronizations"] == 0


@pytest.mark.slow
def test_all_settings_train(run_all):
    choices = ("cls", "mean", "sum", "lambda", "lambda_sum"), ("batch", "image"), ("fp32", "bf16", "fp16")
    commands = [f"{TINY} --loss {x} --geometry {y} --precision {z}" for x, y, z in itertools.product(*choices)]
    others = ["grad_checkpointing", "accum_steps 2", "center shared", "use_bn_in_head true", "norm_last_layer false"]
    others += ["freeze_last_layer 1", "clip_grad 0", "matching nearest", "local_crops_number 0", "cuda_graphs false"]
    others += ["patch_augmentation", "patch_head separate", "patch_head separate --use_bn_in_head true"]
    others += ["accum_steps 2 --local_crops_number 0", "drop_path_rate 0"]
    results = run_all([*commands, *(f"{TINY} --{other}" for other in others)])
    assert {command: result["error"] for command, result in results.items() if result["error"]} == {}


WAITING = """
import contextlib, json, sys
from nullgpu import runs
from support import cuda_graphs
from vision_transformer import VisionTransformer

runs.patch()
forward, warnings = VisionTransformer.forward, []
VisionTransformer.forward = lambda network, images, *more: forward(network, images + images.mean().item(), *more)
cuda_graphs.warn, runs.STRICT = warnings.append, None
with contextlib.redirect_stdout(sys.stderr):
    result = runs.run(sys.argv[1])
print(json.dumps({**result, "warnings": warnings}))
"""


@pytest.mark.slow
def test_a_backbone_that_waits_for_the_device_is_not_captured(on_nullgpu, tmp_path):
    result = on_nullgpu("-c", WAITING, f"{TINY} --output_dir {tmp_path}")
    assert not result["error"]
    assert result["warnings"] == [
        "the backbones run without CUDA graphs and compilation: called a synchronizing CUDA operation"
    ]
    assert result["steps"][PLAIN]["synchronizations"] == 3  # one for each call of a backbone


@pytest.mark.slow
def test_runs_end_resume_and_are_evaluated(on_nullgpu, tmp_path):
    """Epochs end with a checkpoint, online k-NN and pictures; interrupted runs resume."""
    whole_epoch = "--batch_size_per_gpu 700 --knn_every 1 --image_every 1"
    interrupted = f"{TINY} --save_every_steps 4 --output_dir {tmp_path}/resumed"
    evaluation = f"--dataset digits --num_workers 0 --pretrained_weights {tmp_path}/whole/checkpoint.pth"
    commands = [
        f"{TINY} {whole_epoch} --output_dir {tmp_path}/whole",
        interrupted,
        interrupted,
        f"eval_knn {evaluation}",
        f"eval_linear {evaluation} --epochs 1",
        f"eval_linear {evaluation} --epochs 1 --cache_features --output_dir {tmp_path}/cached",
    ]
    results = on_nullgpu("-m", "nullgpu.runs", *commands)
    assert {command: r["error"] for command, r in zip(commands, results, strict=True) if r["error"]} == {}
    written = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {"checkpoint.pth", "knn_digits.json", "linear_digits.json"} <= written
