"""The kernels of a GPU, run by Triton's interpreter on the CPU, against naive formulas in float64."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT
from test_losses import Case, check_gradients
from test_losses import test_gradients_only_where_they_are_wanted as test_gradients_only_where_they_are_wanted
from test_losses import test_gradients_under_autocast as test_gradients_under_autocast
from test_losses import test_large_logits_stay_finite as test_large_logits_stay_finite  # these run here on the kernels

from support import matched_cross_entropy
from support.matched_cross_entropy import implementation

if find_spec("triton") is None:
    pytest.skip("Triton is part of PyTorch's packages for CUDA on Linux", allow_module_level=True)
from support import fused_cross_entropy as kernels


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    """Skip if Triton's interpreter fails with the installed NumPy: that of Triton 3.6 (PyTorch 2.11) does with 2.4."""
    try:
        kernels.try_out(torch.device("cpu"))
    except Exception as error:
        if "only 0-dimensional arrays" in str(error):
            pytest.skip("Triton's interpreter needs an older NumPy")
        raise


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """Let the loss use the kernels on the CPU."""
    monkeypatch.setattr(matched_cross_entropy, "implementation", lambda *_: kernels.loss_and_gradients)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shared_center", [False, True])
def test_kernels_equal_the_formula(precision, shared_center, monkeypatch):
    """Each element is right within the rounding of its type, with padding and in part of a batch."""
    monkeypatch.setattr(kernels, "BLOCK", 64)  # does not divide K
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    generator = torch.Generator().manual_seed(0)
    teachers, students, tokens, K, first = 5, 7, 20, 150, (9, 100)
    positions = torch.randint(3, (teachers,), generator=generator)
    center = torch.randn(1 if shared_center else 3, K, generator=generator)
    teacher_logits, logits = (torch.randn(n, K, generator=generator) for n in (teachers, students))
    targets = torch.empty(teachers, K, dtype=torch.float32 if precision == "fp32" else torch.float16)
    kernels.teacher_targets(teacher_logits, center, positions, 0.07, targets)
    exact = torch.softmax((teacher_logits.double() - center.double()[0 if shared_center else positions]) / 0.07, 1)
    tolerance = {"fp32": 2e-5, "bf16": 1e-2, "fp16": 2e-3}[precision]
    kept = exact > 1e-6
    torch.testing.assert_close(targets.double()[kept] / 1024, exact[kept], rtol=tolerance, atol=0)
    assert (targets.double()[~kept] / 1024 - exact[~kept]).abs().max() < 1e-7

    idx = torch.randint(teachers, (2, tokens), generator=generator) + first[1]
    weight = torch.rand(2, tokens, generator=generator)
    weight[1, ::3], weight[:, 10] = 0, 0
    idx[weight == 0] = 0  # padding
    losses, difference = torch.full((tokens,), 5.0), torch.empty(students, K, dtype=stored)
    kernels.student_cross_entropy(logits, targets, idx, weight, first, 0.1, difference, losses)
    rows = slice(first[0], first[0] + students)
    log_p = torch.log_softmax(logits.double() / 0.1, 1)
    mixture = (weight[:, rows, None].double() * exact[(idx[:, rows] - first[1]).clamp(min=0)]).sum(0)
    torch.testing.assert_close(losses[rows].double(), -(mixture * log_p).sum(1), rtol=tolerance, atol=1e-6)
    assert (losses[: first[0]] == 5).all()
    assert (losses[rows.stop :] == 5).all()
    torch.testing.assert_close(difference.double() / 1024, mixture - log_p.exp(), rtol=tolerance, atol=tolerance / 5)


@pytest.mark.parametrize("center", ["position", "shared"])
@pytest.mark.parametrize("chunk_memory", [1 << 30, 1])  # all images at once; 16 rows at a time, one image per group
def test_loss_and_gradients_equal_the_naive_formula(chunk_memory, center):
    case = Case(dim=16, out_dim=300, teachers=12, students=30, pairs=60, images=4, center=center)
    check_gradients(case, chunk_memory, torch.float32, 1e-6)


def test_a_logit_that_is_not_finite_makes_the_loss_not_finite():
    for bad in (float("nan"), float("inf")):
        case = Case()
        case.student_z[case.student_idx[1]] = bad
        assert not case.fast(0.5, dtype=torch.float32).isfinite()


def test_where_the_kernels_do_not_work_a_warning_says_so(capsys):
    for _ in range(2):
        implementation(torch.device("cuda", 99), torch.float32)  # a GPU that is not there
    error = capsys.readouterr().err
    assert error.startswith("warning: the Triton kernels of the loss do not work here")
    assert error.count("\n") == 1


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from support import fused_cross_entropy as kernels

for stored, half in (("fp32", "fp32"), ("fp16", "fp16"), ("fp16", "bf16")):
    blocks = {"BLOCK": kernels.BLOCK}
    types = {"logits": "*fp32", "center": "*fp32", "positions": "*i64", "out": f"*{stored}", "inverse_temp": "fp32"}
    types |= {"K": "i32", "SHARED_CENTER": "constexpr", "BLOCK": "constexpr"}
    constants = [{"SHARED_CENTER": shared, **blocks} for shared in (False, True)]
    sources = [ASTSource(kernels._targets_kernel, types, own) for own in constants]
    types = {"logits": "*fp32", "targets": f"*{stored}", "target_idx": "*i64", "target_weight": "*fp32"}
    types |= {"first_token": "i32", "first_target": "i32", "inverse_temp": "fp32", "difference": f"*{half}"}
    types |= {"losses": "*fp32", "K": "i32", "Ns": "i32", "M": "constexpr", "BLOCK": "constexpr"}
    sources.append(ASTSource(kernels._cross_entropy_kernel, types, {"M": 2, **blocks}))
    for source in sources:
        for capability in (80, 90):
            binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
            print(source.fn.__name__, half, capability, len(binary.asm["cubin"]))
"""


@pytest.mark.slow
def test_kernels_compile_for_gpus(tmp_path):
    """To machine code of an A100 and an H100, for which no GPU is needed. Their speed is not tested."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("\n") == 3 * 3 * 2
