"""The loss of matched_cross_entropy.py on a GPU: two Triton kernels between matrix products.

On a GPU the loss is bound by memory. A chain of PyTorch's operations reads and writes each tensor of K columns a dozen
times; each kernel here takes one row and goes through its columns twice, the second time from the cache if the row fits
it. torch.compile would fuse the operations too, but the number of tokens differs from step to step, for which it
compiles anew or generates slower code.

For each group of images there are six launches: the teacher's logits, `_targets_kernel`, the student's logits,
`_cross_entropy_kernel`, and the products for the two gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from support.matched_cross_entropy import LossAndGradients, Work, length, pieces

# Targets and differences are stored in units of 1 / UNIT: fp16 could hardly tell numbers near 1 / 65,536 apart.
UNIT = tl.constexpr(1024.0)
BLOCK = 8192  # columns that a program loads at a time
HAS_OUT_DTYPE = "dtype_out" in torch.ops.aten.mm.overloads()  # PyTorch 2.8


def loss_and_gradients(z: Tensor, prototypes: Tensor, scale: Tensor, work: Work) -> LossAndGradients:
    """Compute the loss and its gradients with the kernels, from the student's tensors."""
    K, teacher, dtype = len(prototypes), work.teacher_out, work.dtype
    target_idx, target_weight, temp = work.matches.teacher_idx, work.target_weight, work.student_temp
    weights = (scale[:, None] * prototypes).to(dtype)
    teacher_weights = (teacher.scale[:, None] * teacher.prototypes).to(dtype)
    student_z, teacher_z = z.to(dtype), teacher.bottleneck.to(dtype)
    weighted_z = (z * work.token_weight).to(dtype)
    losses = torch.empty(len(z), device=z.device)
    d_z = torch.empty(z.shape, device=z.device) if work.needs_z else None
    d_prototypes = torch.zeros(prototypes.shape, device=z.device) if work.needs_prototypes else None
    product = torch.empty(prototypes.shape, device=z.device)
    logits_buffer = z.new_empty(max(work.max_teachers, work.chunk), K, dtype=torch.float32)
    is_half = dtype != torch.float32
    targets_buffer = z.new_empty(work.max_teachers, K, dtype=torch.float16 if is_half else torch.float32)
    difference_buffer = z.new_empty(work.chunk, K, dtype=dtype) if is_half else logits_buffer
    unit = -1 / (temp * UNIT.value)  # of the gradients
    for group in work.groups:
        tokens, targets = group.teacher, targets_buffer[: length(group.teacher)]
        logits = _product(teacher_z[tokens], teacher_weights.T, logits_buffer[: length(tokens)])
        teacher_targets(logits, work.center, work.matches.teacher_position[tokens], work.teacher_temp, targets)
        for rows in pieces(group.student, work.chunk):
            logits = _product(student_z[rows], weights.T, logits_buffer[: length(rows)])
            difference, first = difference_buffer[: length(rows)], (rows.start, tokens.start)
            student_cross_entropy(logits, targets, target_idx, target_weight, first, temp, difference, losses)
            if d_prototypes is not None:
                d_prototypes.add_(_product(difference.T, weighted_z[rows], product), alpha=unit)
            if d_z is not None:
                _product(difference, weights, d_z[rows])
    if d_z is not None:
        d_z.mul_(unit * work.token_weight)
    return losses, d_z, d_prototypes


def try_out(device: torch.device) -> None:
    """Compile the kernels and run them on a few numbers. Errors are those of Triton."""
    logits, targets = torch.zeros(2, 1, 16, device=device)
    losses, index = torch.zeros(1, device=device), torch.zeros(1, 1, dtype=torch.long, device=device)
    teacher_targets(logits, logits, index[0], 1.0, targets)
    student_cross_entropy(logits, targets, index, losses[None], (0, 0), 1.0, logits, losses)


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write the matrix product of a and b, accumulated in fp32, to `out` in fp32."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda and HAS_OUT_DTYPE:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(a @ b)  # rounded to the precision of a and b


def teacher_targets(logits: Tensor, center: Tensor, positions: Tensor, temp: float, out: Tensor) -> None:
    """Write the teacher's targets, softmax((logits - center) / temp) in units of 1 / UNIT, to `out`.

    Args:
        logits: [n, K].
        center: [1, K], or [1+P, K] with one center per position.
        positions: LongTensor [n].
        out: [n, K].
    """
    grid, K, is_shared = (len(logits),), logits.shape[1], len(center) == 1
    _targets_kernel[grid](logits, center, positions, out, 1 / temp, K, is_shared, BLOCK, num_warps=8)


def student_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    target_idx: Tensor,
    target_weight: Tensor,
    first: tuple[int, int],
    temp: float,
    difference: Tensor,
    losses: Tensor,
) -> None:
    """Compute the cross-entropies of n student tokens, and mixture - softmax in units of 1 / UNIT.

    Args:
        logits: [n, K], not yet divided by `temp`.
        targets: [t, K], as `teacher_targets` writes them.
        target_idx: LongTensor [M, Ns], teacher tokens of all student tokens. Contiguous, as is `target_weight`.
        target_weight: [M, Ns], their weights; those of padding are 0.
        first: (index of the first of the n student tokens, index of the first of the t teacher tokens).
        temp: temperature of the student.
        difference: [n, K], is written to. It may be `logits`.
        losses: [Ns], is written to at the n tokens.
    """
    _cross_entropy_kernel[(len(logits),)](
        logits, targets, target_idx, target_weight, first[0], first[1], 1 / temp, difference, losses,
        K=logits.shape[1], Ns=target_idx.shape[1], M=len(target_idx), BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


@triton.jit
def _logsumexp(logits, center, inverse_temp, K, HAS_CENTER: tl.constexpr, BLOCK: tl.constexpr):
    """Return the logsumexp of (logits - center) * inverse_temp over a row of K columns."""
    top = -3.0e38
    total = 0.0
    for start in range(0, K, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < K, other=-float("inf"))
        if HAS_CENTER:
            x -= tl.load(center + columns, mask=columns < K, other=0.0)
        x *= inverse_temp
        new_top = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top), 0)
        top = new_top
    return top + tl.log(total)


@triton.jit
def _targets_kernel(logits, center, positions, out, inverse_temp, K, SHARED_CENTER: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * K
    out += row * K
    if not SHARED_CENTER:
        center += tl.load(positions + row) * K
    logsumexp = _logsumexp(logits, center, inverse_temp, K, True, BLOCK)
    for start in range(0, K, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < K, other=0.0)
        x = (x - tl.load(center + columns, mask=columns < K, other=0.0)) * inverse_temp
        target = UNIT * tl.exp(x - logsumexp)
        tl.store(out + columns, target.to(out.dtype.element_ty), mask=columns < K)


@triton.jit(do_not_specialize=["first_token", "first_target", "Ns"])  # or compile anew for multiples of 16
def _cross_entropy_kernel(
    logits, targets, target_idx, target_weight, first_token, first_target, inverse_temp, difference, losses, K, Ns,
    M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = first_token + row
    logits += row * K
    difference += row * K
    logsumexp = _logsumexp(logits, logits, inverse_temp, K, False, BLOCK)
    loss = 0.0
    for start in range(0, K, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        log_probability = tl.load(logits + columns, mask=columns < K, other=0.0) * inverse_temp - logsumexp
        mixture = tl.zeros([BLOCK], tl.float32)  # in units of 1 / UNIT
        for m in tl.static_range(M):
            weight = tl.load(target_weight + m * Ns + token)
            width = tl.where(weight != 0, K, 0)  # the index of padding means nothing
            target = targets + (tl.load(target_idx + m * Ns + token) - first_target) * K
            mixture += weight * tl.load(target + columns, mask=columns < width, other=0.0).to(tl.float32)
        loss -= tl.sum(tl.where(columns < K, mixture * log_probability, 0.0), 0)
        gradient = mixture - UNIT * tl.exp(log_probability)
        tl.store(difference + columns, gradient.to(difference.dtype.element_ty), mask=columns < K)
    tl.store(losses + token, loss / UNIT)
