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
from types import ModuleType
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
    for name, out, rows in (
        ("student", student_out, matches.student_row),
        ("teacher", teacher_out, matches.teacher_row),
    ):
        if len(out.bottleneck) != len(rows):
            raise ValueError(f"found {len(out.bottleneck)} {name} tokens, expected the {len(rows)} of the matches")
    z, prototypes, scale = student_out.bottleneck, student_out.prototypes, student_out.scale
    compute_dtype = torch.promote_types(z.dtype, torch.float32)  # of logits and what is derived from them
    autocast = torch.is_autocast_enabled(z.device.type)
    weight = weight.to(compute_dtype)
    token_weight = weight.sum(0)  # [Ns]
    # Gradients are computed in units of the largest weight, to keep small numbers representable in fp16.
    max_weight = token_weight.max().clamp(min=torch.finfo(compute_dtype).tiny)
    compute = implementation(z.device, compute_dtype)
    bytes_per_column = (chunk_memory or _default_memory(z.device)) // len(prototypes)
    if compute is _loss_and_gradients:
        # One chunk of logits and two strip-sized buffers share the memory. A chunk is processed in strips: 8 on a CPU,
        # so that a strip fits the cache, 1 on a GPU, to launch fewer kernels.
        num_strips = 8 if z.device.type == "cpu" else 1
        max_rows = max(bytes_per_column // 4 * num_strips // (num_strips + 2), 16)
        groups = _image_groups(matches, max_rows // 4)  # bounded, because the targets grow with a group
    else:
        num_strips, max_rows = 1, max(bytes_per_column // 8, 16)  # 4 bytes per logit, 2 per target, 2 per gradient
        groups = _image_groups(matches, max_rows)
    chunk = min(max_rows, max(length(group.student) for group in groups))
    work = Work(
        compute=compute,
        dtype=torch.get_autocast_dtype(z.device.type) if autocast else compute_dtype,
        teacher_out=teacher_out,
        center=center.to(compute_dtype),
        matches=matches,
        token_weight=(token_weight / max_weight)[:, None],
        target_weight=weight / torch.where(token_weight > 0, token_weight, 1),
        groups=groups,
        chunk=chunk,
        strip=-(-chunk // num_strips),
        student_temp=student_temp,
        teacher_temp=teacher_temp,
    )
    if not torch.is_grad_enabled():  # needs_input_grad does not say so
        z, prototypes, scale = z.detach(), prototypes.detach(), scale.detach()
    return _CrossEntropy.apply(z, prototypes, scale, work) * max_weight


def _default_memory(device: torch.device) -> int:
    """Return the default of `chunk_memory`."""
    if device.type == "cpu":
        return 80 << 20
    # A share of the whole memory and not of what is free, which would change chunks and rounding when a run is resumed.
    return min(torch.cuda.get_device_properties(device).total_memory // 48, 3 << 29)


def implementation(device: torch.device, dtype: torch.dtype) -> Callable[..., LossAndGradients]:
    """Return the function that computes the loss and its gradients on a device, for logits of a type."""
    kernels = fused_kernels(device) if device.type == "cuda" and dtype == torch.float32 else None
    return kernels.loss_and_gradients if kernels else _loss_and_gradients


@cache
def fused_kernels(device: torch.device) -> ModuleType | None:
    """Return the module with the Triton kernels if they work on a device. Warn if Triton is there and they do not."""
    if find_spec("triton") is None:
        return None
    try:
        from support import fused_cross_entropy  # imports Triton, which PyTorch's packages for CUDA bring on Linux

        fused_cross_entropy.try_out(device)
    except Exception as error:  # many kinds: an old GPU, no C compiler
        warn(f"the Triton kernels of the loss do not work here, PyTorch's operations are slower: {first_line(error)}")
        return None
    return fused_cross_entropy


class ImageGroup(NamedTuple):
    """One image or several consecutive small ones: the ranges of their tokens in the batch."""

    teacher: slice
    student: slice


def _image_groups(matches: Matches, max_rows: int) -> list[ImageGroup]:
    """Split a batch into groups of consecutive images with at most `max_rows` tokens per network, or of one image."""
    teacher_end, student_end = (x.cumsum(0).tolist() for x in (matches.teacher_count, matches.student_count))
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

    compute: Callable[..., LossAndGradients]  # _loss_and_gradients, or that of fused_cross_entropy
    dtype: torch.dtype  # of matrix products
    teacher_out: TokenOutput
    center: Tensor  # [1 or 1+P, K]
    matches: Matches
    token_weight: Tensor  # [Ns, 1] sum of the weights of a student token, in units of the largest
    target_weight: Tensor  # [M, Ns] weight of each match in the mixture; sums to 1
    groups: list[ImageGroup]
    chunk: int  # number of student tokens whose logits are held at a time
    strip: int  # number of student tokens that are processed at a time
    student_temp: float
    teacher_temp: float

    @property
    def max_teachers(self) -> int:
        """The largest number of teacher tokens in a group."""
        return max(length(group.teacher) for group in self.groups)

    def chunks(self, group: ImageGroup) -> list[slice]:
        """Return slices of the student tokens of a group, of at most `chunk` tokens."""
        return _pieces(group.student.start, group.student.stop, self.chunk)


class _CrossEntropy(torch.autograd.Function):
    """Weighted sum of the cross-entropies of student tokens. Forward computes the gradients, backward scales them."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, prototypes: Tensor, scale: Tensor, work: Work) -> Tensor:
        needs_z, needs_prototypes = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        with torch.autocast(z.device.type, enabled=False):
            losses, d_z, d_prototypes = work.compute(z, prototypes, scale, work, needs_z, needs_prototypes)
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
        gradients = (
            None if gradient is None else (gradient * d_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None


def _loss_and_gradients(
    z: Tensor, prototypes: Tensor, scale: Tensor, work: Work, needs_z: bool, needs_prototypes: bool
) -> LossAndGradients:
    """Compute the loss and its gradients with PyTorch's operations, from the student's tensors."""
    device, K, teacher = z.device, len(prototypes), work.teacher_out
    compute_dtype = torch.promote_types(z.dtype, torch.float32)
    losses = torch.empty(len(z), dtype=compute_dtype, device=device)
    d_z = torch.empty_like(z, dtype=compute_dtype) if needs_z else None
    d_prototypes = torch.zeros_like(prototypes, dtype=compute_dtype) if needs_prototypes else None
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
        for rows in work.chunks(group):
            weight, logits = work.token_weight[rows], logits_buffer[: length(rows)]
            _logits(z[rows].to(work.dtype), student_weights, sharpening, out=logits)
            losses[rows], difference = _cross_entropy_(logits, targets, work, group, rows.start, strips)
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
    for rows in _pieces(0, len(logits), strips.shape[1]):
        centered, centers = strips[:, : length(rows)]
        if len(center) > 1:
            torch.index_select(center, 0, positions[rows], out=centers)
        else:
            centers = center
        torch.sub(logits[rows], centers, out=centered).div_(temp)
        torch.softmax(centered, -1, out=logits[rows])


def _cross_entropy_(
    logits: Tensor, targets: Tensor, work: Work, group: ImageGroup, first: int, strips: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropies of student tokens, and the gradient mixture - softmax in the memory of their logits.

    Args:
        logits: [n, K], logits of the student tokens from index `first` on, divided by τ_s.
        targets: targets of the teacher tokens of the group.
        strips: buffers [2, rows, K].

    Returns:
        (cross-entropies [n], mixture - softmax [n, K])
    """
    losses = []
    for rows in _pieces(first, first + len(logits), strips.shape[1]):
        strip = logits[rows.start - first : rows.stop - first]
        mixture, probabilities = strips[:, : length(rows)]
        target_idx = (work.matches.teacher_idx[:, rows] - group.teacher.start).clamp_(min=0)  # [M, rows]
        target_weight = work.target_weight[:, rows, None]  # 0 for padding
        torch.index_select(targets, 0, target_idx[0], out=mixture).mul_(target_weight[0])
        for idx, weight in zip(target_idx[1:], target_weight[1:], strict=True):
            mixture.addcmul_(torch.index_select(targets, 0, idx, out=probabilities), weight)
        torch.softmax(strip, -1, out=probabilities)
        # The largest probability is exp(largest logit - logsumexp).
        logsumexp = strip.amax(-1) - probabilities.amax(-1).log()
        losses.append(logsumexp - strip.mul_(mixture).sum(-1))
        torch.sub(mixture, probabilities, out=strip)
    return torch.cat(losses), logits


def length(rows: slice) -> int:
    """Return the number of rows of a slice with a start and a stop."""
    return rows.stop - rows.start


def _pieces(start: int, stop: int, max_length: int) -> list[slice]:
    """Split a range into the smallest number of about equal pieces of at most `max_length`."""
    count = max(-(-(stop - start) // max_length), 1)
    edges = [start + i * (stop - start) // count for i in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]
