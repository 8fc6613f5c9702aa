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

# Targets and differences are stored in units of 1 / UNIT: fp16 could hardly tell numbers near 1 / 65,536 apart.
UNIT = tl.constexpr(1024.0)
BLOCK = 8192  # columns that a program loads at a time
HAS_OUT_DTYPE = "dtype_out" in torch.ops.aten.mm.overloads()  # PyTorch 2.8


def loss_and_gradients(student, prototypes, scale, work, dtype, needs_z, needs_prototypes) -> tuple:
    """Return (cross-entropies of the student tokens [Ns], gradient of the tokens, gradient of scale * prototypes).

    Args:
        student: [Ns, D], bottleneck vectors of the student tokens.
        prototypes, scale: [K, D] and [K], of the student.
        work: matched_cross_entropy._Work.
        dtype: of the matrix products.
        needs_z, needs_prototypes: whether the gradients are wanted; None takes the place of others.
    """
    K, matches = len(prototypes), work.matches
    weights, teacher_weights = (
        (own_scale[:, None] * vectors).to(dtype)
        for vectors, own_scale in ((prototypes, scale), (work.teacher_out.prototypes, work.teacher_out.scale))
    )
    z, teacher_z = student.to(dtype), work.teacher_out.bottleneck.to(dtype)
    weighted_z = (student * work.token_weight).to(dtype)
    losses = torch.empty(len(z), device=z.device)
    d_z = torch.empty(z.shape, device=z.device) if needs_z else None
    d_prototypes = torch.zeros(prototypes.shape, device=z.device) if needs_prototypes else None
    product = torch.empty_like(d_prototypes) if needs_prototypes else None

    logits = z.new_empty(max(work.max_teachers, work.chunk), K, dtype=torch.float32)
    is_half = dtype != torch.float32
    targets = z.new_empty(work.max_teachers, K, dtype=torch.float16 if is_half else torch.float32)
    difference = z.new_empty(work.chunk, K, dtype=dtype) if is_half else logits
    unit = -1 / (work.student_temp * UNIT.value)  # of the gradients
    for group in work.groups:
        t = group.teacher
        own_targets, positions = targets[: t.stop - t.start], matches.teacher_position[t]
        own_logits = _product(teacher_z[t], teacher_weights.T, logits[: t.stop - t.start])
        teacher_targets(own_logits, work.center, positions, work.teacher_temp, own_targets)
        for s in work.chunks(group):
            rows = s.stop - s.start
            own_logits, own_difference = _product(z[s], weights.T, logits[:rows]), difference[:rows]
            pairs = (own_targets, matches.teacher_idx, work.target_weight, (s.start, t.start))
            student_cross_entropy(own_logits, *pairs, work.student_temp, own_difference, losses)
            if needs_prototypes:
                d_prototypes.add_(_product(own_difference.T, weighted_z[s], product), alpha=unit)
            if needs_z:
                _product(own_difference, weights, d_z[s])
    if needs_z:
        d_z.mul_(unit * work.token_weight)
    return losses, d_z, d_prototypes


def try_out(device) -> None:
    """Compile the kernels and run them on a few numbers. Errors are those of Triton."""
    logits, targets, losses = (torch.zeros(shape, device=device) for shape in ((1, 16), (1, 16), 1))
    index = torch.zeros(1, 1, dtype=torch.long, device=device)
    teacher_targets(logits, logits, index[0], 1.0, targets)
    student_cross_entropy(logits, targets, index, losses[None], (0, 0), 1.0, logits, losses)


def _product(a, b, out):
    """Write the matrix product of a and b, accumulated in fp32, to `out` in fp32."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda and HAS_OUT_DTYPE:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(a @ b)  # rounded to the precision of a and b


def teacher_targets(logits, center, positions, temp, out) -> None:
    """Write the teacher's targets, softmax((logits - center) / temp) in units of 1 / UNIT, to `out`.

    Args:
        logits: [n, K].
        center: [1, K], or [1+P, K] with one center per position.
        positions: LongTensor [n].
        out: [n, K].
    """
    shape = {"K": logits.shape[1], "SHARED_CENTER": len(center) == 1, "BLOCK": BLOCK}
    _targets_kernel[(len(logits),)](logits, center, positions, out, 1 / temp, **shape, num_warps=8)


def student_cross_entropy(logits, targets, target_idx, target_weight, first, temp, difference, losses) -> None:
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
    shape = {"K": logits.shape[1], "Ns": target_idx.shape[1], "M": len(target_idx), "BLOCK": BLOCK}
    pairs = (logits, targets, target_idx, target_weight, *first)
    _cross_entropy_kernel[(len(logits),)](*pairs, 1 / temp, difference, losses, **shape, num_warps=8)


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
