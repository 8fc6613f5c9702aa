"""Fast version of the loss in losses.py: Σ w·H(t, s) over matched token pairs, together with its gradients.

Two facts make it cheap:

- The targets of a student token with several matches add up to a single mixture. Let s be the logits of the token
  divided by τ_s, and t the teacher's distributions that it is matched with, with weights w_t. With w = Σ_t w_t and the
  mixture m = Σ_t (w_t / w)·t, the token adds w·(logsumexp(s) - m·s) to the loss, and the gradient with respect to s is
  w·(softmax(s) - m).
- All pairs lie inside one image. Tensors of K columns are needed for only one image at a time, or a few: the targets of
  the teacher tokens, and one chunk of student tokens, whose logits are turned into gradients.

On a CPU and on a GPU without Triton, `_loss_and_gradients` does this with PyTorch's operations; on a GPU,
`fused_cross_entropy.loss_and_gradients` does it with two fused kernels.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patch_matching import Matches
from utils import first_line, warn
from vision_transformer import TokenOutput

# Cross-entropies of the student tokens [Ns], gradient of their bottleneck vectors [Ns, D], gradient of
# scale * prototypes [K, D]. Gradients that are not needed are None.
LossAndGradients = tuple[Tensor, Tensor | None, Tensor | None]


def matched_cross_entropy(
    student_out: TokenOutput,
    teacher_out: TokenOutput,
    matches: Matches,
    weight: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    chunk_memory: int | None = None,
) -> Tensor:
    """Return Σ w·H(teacher, student) over the matched token pairs of a batch.

    Matrix products run in the precision of the surrounding autocast, everything else in fp32. The gradients are
    computed in the forward pass; the backward pass only scales them.

    Args:
        student_out, teacher_out: `bottleneck` [N, D], `prototypes` [K, D] and `scale` [K] of the matched tokens; logits
            are `bottleneck @ (scale * prototypes.T)`. The teacher gets no gradient.
        matches: matched tokens of the batch.
        weight: [M, Ns], weight w of each match; 0 for padding.
        center: [1, K], or [1+P, K] with one center per token position.
        student_temp, teacher_temp: τ_s and τ_t.
        chunk_memory: memory in bytes for the logits of student tokens and their buffers. Default: 80 MiB on a CPU; on a
            GPU 1/48 of its memory, at most 1.5 GiB. Targets may need memory in addition, and so do copies in lower
            precision under autocast.

    Raises:
        ValueError: the number of tokens differs from that of the matches.
    """
    z, prototypes, scale = student_out.bottleneck, student_out.prototypes, student_out.scale
    tokens, expected = (len(z), len(teacher_out.bottleneck)), (len(matches.student_row), len(matches.teacher_row))
    if tokens != expected:
        raise ValueError(f"found {tokens} student and teacher tokens, expected the {expected} of the matches")
    compute_dtype = torch.promote_types(z.dtype, torch.float32)  # of logits and what is derived from them
    device_type = z.device.type
    weight = weight.to(compute_dtype)
    token_weight = weight.sum(0)  # [Ns]
    # Gradients are computed in units of the largest weight, to keep small numbers representable in fp16.
    max_weight = token_weight.max().clamp(min=torch.finfo(compute_dtype).tiny)
    compute = implementation(z.device, compute_dtype)
    if chunk_memory is None and device_type == "cpu":
        chunk_memory = 80 << 20
    elif chunk_memory is None:
        # A share of the whole memory: one of what is free would change chunks and rounding when a run is resumed.
        chunk_memory = min(torch.cuda.get_device_properties(z.device).total_memory // 48, 3 << 29)
    bytes_per_column = chunk_memory // len(prototypes)
    if compute is _loss_and_gradients:
        # One chunk of logits and two strip-sized buffers share the memory. A chunk is processed in strips: 8 on a CPU,
        # so that a strip fits the cache, 1 on a GPU, to launch fewer kernels.
        num_strips = 8 if device_type == "cpu" else 1
        max_rows = max(bytes_per_column // 4 * num_strips // (num_strips + 2), 16)
        groups = _image_groups(matches, max_rows // 4)  # bounded, because the targets grow with a group
    else:
        num_strips, max_rows = 1, max(bytes_per_column // 8, 16)  # 4 bytes per logit, 2 per target, 2 per gradient
        groups = _image_groups(matches, max_rows)
    chunk = min(max_rows, max(length(group.student) for group in groups))
    work = Work(
        dtype=torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else compute_dtype,
        teacher_out=teacher_out,
        center=center.to(compute_dtype),
        matches=matches,
        token_weight=(token_weight / max_weight)[:, None],
        target_weight=weight / torch.where(token_weight > 0, token_weight, 1),
        groups=groups,
        max_teachers=max(length(group.teacher) for group in groups),
        chunk=chunk,
        strip=-(-chunk // num_strips),
        student_temp=student_temp,
        teacher_temp=teacher_temp,
        needs_z=torch.is_grad_enabled() and z.requires_grad,
        needs_prototypes=torch.is_grad_enabled() and (prototypes.requires_grad or scale.requires_grad),
    )
    return _CrossEntropy.apply(z, prototypes, scale, compute, work) * max_weight


@cache
def implementation(device: torch.device, dtype: torch.dtype) -> Callable[..., LossAndGradients]:
    """Return the function that computes the loss and its gradients on a device, for logits of a type.

    These are the Triton kernels if they work there. Warn if Triton is installed and they do not.
    """
    if device.type != "cuda" or dtype != torch.float32 or find_spec("triton") is None:
        return _loss_and_gradients
    try:
        from support import fused_cross_entropy  # imports Triton, which PyTorch's packages for CUDA bring on Linux

        fused_cross_entropy.try_out(device)
        return fused_cross_entropy.loss_and_gradients
    except Exception as error:  # many kinds: an old GPU, no C compiler
        warn(f"the Triton kernels of the loss do not work here, PyTorch's operations are slower: {first_line(error)}")
        return _loss_and_gradients


class ImageGroup(NamedTuple):
    """One image or several consecutive small ones: the ranges of their tokens in the batch."""

    teacher: slice
    student: slice


def _image_groups(matches: Matches, max_rows: int) -> list[ImageGroup]:
    """Split a batch into groups of consecutive images with at most `max_rows` tokens per network, or of one image."""
    teacher_end, student_end = (x.numpy().cumsum().tolist() for x in (matches.teacher_count, matches.student_count))
    groups, t0, s0 = [], 0, 0
    # The group ends with an image if the next one, or the end of the batch, does not fit any more.
    for t1, s1, t2, s2 in zip(teacher_end, student_end, teacher_end[1:] + [inf], student_end[1:] + [inf], strict=True):
        if max(t2 - t0, s2 - s0) > max_rows:
            groups.append(ImageGroup(slice(t0, t1), slice(s0, s1)))
            t0, s0 = t1, s1
    return groups


@dataclass
class Work:
    """Everything that the loss depends on except the student's tensors. Ns is the number of matched student tokens."""

    dtype: torch.dtype  # of matrix products
    teacher_out: TokenOutput
    center: Tensor  # [1 or 1+P, K]
    matches: Matches
    token_weight: Tensor  # [Ns, 1] sum of the weights of a student token, in units of the largest
    target_weight: Tensor  # [M, Ns] weight of each match in the mixture; sums to 1
    groups: list[ImageGroup]
    max_teachers: int  # the largest number of teacher tokens in a group
    chunk: int  # number of student tokens whose logits are held at a time
    strip: int  # number of student tokens that are processed at a time
    student_temp: float
    teacher_temp: float
    needs_z: bool  # whether the gradients of the bottleneck vectors are wanted
    needs_prototypes: bool  # and those of scale * prototypes


class _CrossEntropy(torch.autograd.Function):
    """Weighted sum of the cross-entropies of student tokens. Forward computes the gradients, backward scales them."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, prototypes: Tensor, scale: Tensor, compute: Callable, work: Work) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            losses, d_z, d_prototypes = compute(z, prototypes, scale, work)
            loss = work.token_weight[:, 0] @ losses
            d_scale = None
            if d_prototypes is not None:
                if ctx.needs_input_grad[2]:
                    d_scale = torch.einsum("kd,kd->k", d_prototypes, prototypes.to(d_prototypes.dtype))
                d_prototypes.mul_(scale[:, None])
        ctx.save_for_backward(d_z, d_prototypes, d_scale)
        ctx.dtypes = (z.dtype, prototypes.dtype, scale.dtype)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if x is None else (x * d_loss).to(dtype) for x, dtype in gradients), None, None


def _loss_and_gradients(z: Tensor, prototypes: Tensor, scale: Tensor, work: Work) -> LossAndGradients:
    """Compute the loss and its gradients with PyTorch's operations, from the student's tensors."""
    device, K, teacher = z.device, len(prototypes), work.teacher_out
    compute_dtype = torch.promote_types(z.dtype, torch.float32)
    losses = torch.empty(len(z), dtype=compute_dtype, device=device)
    d_z = torch.empty_like(z, dtype=compute_dtype) if work.needs_z else None
    d_prototypes = torch.zeros_like(prototypes, dtype=compute_dtype) if work.needs_prototypes else None
    grad_scale = -1 / work.student_temp
    student_weights, teacher_weights = prototypes.to(work.dtype), teacher.prototypes.to(work.dtype)
    sharpening = scale / work.student_temp
    # Matrix products are efficient with many rows (chunks), other operations with few that stay in the cache.
    targets_buffer = torch.empty(work.max_teachers, K, dtype=compute_dtype, device=device)
    logits_buffer = torch.empty(work.chunk, K, dtype=compute_dtype, device=device)
    strips = torch.empty(2, work.strip, K, dtype=compute_dtype, device=device)
    for group in work.groups:
        targets = targets_buffer[: length(group.teacher)]
        _logits(teacher.bottleneck[group.teacher].to(work.dtype), teacher_weights, teacher.scale, out=targets)
        _sharpen_(targets, work.center, work.matches.teacher_position[group.teacher], work.teacher_temp, strips)
        for rows in pieces(group.student, work.chunk):
            weight, logits = work.token_weight[rows], logits_buffer[: length(rows)]
            _logits(z[rows].to(work.dtype), student_weights, sharpening, out=logits)
            _cross_entropy_(logits, targets, losses, work, group, rows, strips)
            difference = logits  # now mixture - softmax
            if d_prototypes is not None:
                weighted_z = (z[rows] * weight).to(work.dtype)
                if work.dtype == compute_dtype:
                    d_prototypes.addmm_(difference.T, weighted_z, alpha=grad_scale)
                else:
                    d_prototypes.add_(difference.to(work.dtype).T @ weighted_z, alpha=grad_scale)
            if d_z is not None:
                product = difference.mul_(scale).to(work.dtype) @ student_weights
                torch.mul(product, grad_scale * weight, out=d_z[rows])
    return losses, d_z, d_prototypes


def _logits(z: Tensor, prototypes: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write the logits z @ (scale * prototypes.T) to `out`; on a CPU in blocks of columns that fit the cache."""
    step = 2048 if z.device.type == "cpu" else len(prototypes)
    for start in range(0, len(prototypes), step):
        k = slice(start, start + step)
        if z.dtype == out.dtype:
            torch.mm(z, prototypes[k].T, out=out[:, k])
        else:
            out[:, k] = z @ prototypes[k].T
        out[:, k] *= scale[k]


def _sharpen_(logits: Tensor, center: Tensor, positions: Tensor, temp: float, strips: Tensor) -> None:
    """Replace the teacher's logits [n, K] by its targets, softmax((logits - center) / temp)."""
    for rows in pieces(slice(0, len(logits)), strips.shape[1]):
        centered, buffer = strips[:, : length(rows)]
        centers = center if len(center) == 1 else torch.index_select(center, 0, positions[rows], out=buffer)
        torch.sub(logits[rows], centers, out=centered).div_(temp)
        torch.softmax(centered, -1, out=logits[rows])


def _cross_entropy_(
    logits: Tensor, targets: Tensor, losses: Tensor, work: Work, group: ImageGroup, chunk: slice, strips: Tensor
) -> None:
    """Compute the cross-entropies of student tokens, and replace their logits by mixture - softmax.

    Args:
        logits: [n, K], logits of the student tokens `chunk`, divided by τ_s.
        targets: targets of the teacher tokens of the group.
        losses: [Ns], cross-entropies, is written to at the n tokens.
        strips: buffers [2, rows, K].
    """
    for rows in pieces(chunk, strips.shape[1]):
        strip = logits[rows.start - chunk.start : rows.stop - chunk.start]
        mixture, probabilities = strips[:, : length(rows)]
        target_idx = (work.matches.teacher_idx[:, rows] - group.teacher.start).clamp_(min=0)  # [M, rows]
        target_weight = work.target_weight[:, rows, None]  # 0 for padding
        torch.index_select(targets, 0, target_idx[0], out=mixture).mul_(target_weight[0])
        for idx, weight in zip(target_idx[1:], target_weight[1:], strict=True):
            mixture.addcmul_(torch.index_select(targets, 0, idx, out=probabilities), weight)
        torch.softmax(strip, -1, out=probabilities)
        # The largest probability is exp(largest logit - logsumexp).
        logsumexp = strip.amax(-1) - probabilities.amax(-1).log()
        losses[rows] = logsumexp - strip.mul_(mixture).sum(-1)
        torch.sub(mixture, probabilities, out=strip)


def length(rows: slice) -> int:
    """Return the number of rows of a slice with a start and a stop."""
    return rows.stop - rows.start


def pieces(rows: slice, max_length: int) -> list[slice]:
    """Split a slice into the smallest number of about equal pieces of at most `max_length`."""
    count = max(-(-length(rows) // max_length), 1)
    edges = [rows.start + i * length(rows) // count for i in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]
