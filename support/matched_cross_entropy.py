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
from typing import NamedTuple

import torch

from utils import first_line, warn


def matched_cross_entropy(
    student_out, teacher_out, matches, weight, center, student_temp, teacher_temp, chunk_memory=None
) -> torch.Tensor:
    """Return Σ w·H(teacher, student) over the matched token pairs of a batch.

    Matrix products run in the precision of the surrounding autocast, everything else in fp32. The gradients are
    computed in the forward pass; the backward pass only scales them.

    Args:
        student_out, teacher_out: `bottleneck` [N, D], `prototypes` [K, D] and `scale` [K] of the matched tokens; logits
            are `bottleneck @ (scale * prototypes.T)`. The teacher gets no gradient.
        matches: patch_matching.Matches.
        weight: [M, Ns], weight w of each match; 0 for padding.
        center: [1, K], or [1+P, K] with one center per token position.
        student_temp, teacher_temp: τ_s and τ_t.
        chunk_memory: memory in bytes for the logits of student tokens and their buffers. Default: 80 MiB on a CPU; on a
            GPU 1/48 of its memory, at most 1.5 GiB. Targets may need memory in addition, and so do copies in lower
            precision under autocast.

    Raises:
        ValueError: the number of tokens differs from that of the matches.
    """
    expected = {"student": (student_out, matches.student_row), "teacher": (teacher_out, matches.teacher_row)}
    for name, (out, rows) in expected.items():
        if len(out.bottleneck) != len(rows):
            raise ValueError(f"found {len(out.bottleneck)} {name} tokens, expected the {len(rows)} of the matches")
    z, K = student_out.bottleneck, len(student_out.prototypes)
    compute_dtype = torch.promote_types(z.dtype, torch.float32)
    weight = weight.to(compute_dtype)
    token_weight = weight.sum(0)  # [Ns]
    # Gradients are computed in units of the largest weight, to keep small numbers representable in fp16.
    max_weight = token_weight.max().clamp(min=torch.finfo(compute_dtype).tiny)
    compute = _implementation(z.device, compute_dtype)
    memory = chunk_memory or _default_memory(z.device)
    if compute is _loss_and_gradients:
        # One chunk of logits and two strip-sized buffers share the memory. A chunk is processed in strips: 8 on a CPU,
        # so that a strip fits the cache, 1 on a GPU, to launch fewer kernels.
        num_strips = 8 if z.device.type == "cpu" else 1
        max_rows = max(memory // (4 * K) * num_strips // (num_strips + 2), 16)
        groups = _image_groups(matches, max_rows // 4)  # bounded, because the targets grow with a group
    else:
        num_strips, max_rows = 1, max(memory // (8 * K), 16)  # 4 bytes per logit, 2 per target, 2 per gradient
        groups = _image_groups(matches, max_rows)
    chunk = min(max_rows, max((group.student.stop - group.student.start for group in groups), default=0))
    relative_weight = (token_weight / max_weight)[:, None]
    target_weight = weight / torch.where(token_weight > 0, token_weight, 1)
    layout, temps = (matches, relative_weight, target_weight, groups, chunk, num_strips), (student_temp, teacher_temp)
    work = _Work(compute, teacher_out, center.to(compute_dtype), *layout, *temps)
    inputs = (z, student_out.prototypes, student_out.scale)
    if not torch.is_grad_enabled():
        inputs = tuple(x.detach() for x in inputs)  # otherwise needs_input_grad would be set
    return _CrossEntropy.apply(*inputs, work) * max_weight


def _default_memory(device):
    """Return the default of `chunk_memory`."""
    if device.type == "cpu":
        return 80 << 20
    # A share of the whole memory and not of what is free, which would change chunks and rounding when a run is resumed.
    return min(torch.cuda.get_device_properties(device).total_memory // 48, 3 << 29)


def _implementation(device, dtype):
    """Return the function that computes the loss and its gradients."""
    is_fused = device.type == "cuda" and dtype == torch.float32 and _has_kernels(device)
    return _fused_kernels().loss_and_gradients if is_fused else _loss_and_gradients


def _fused_kernels():
    from support import fused_cross_entropy  # imports Triton, which PyTorch's packages for CUDA bring on Linux

    return fused_cross_entropy


@cache
def _has_kernels(device):
    """Return whether Triton can compile and start the fused kernels on a GPU. Warn if it is there and cannot."""
    if find_spec("triton") is None:
        return False
    try:
        _fused_kernels().try_out(device)
    except Exception as error:  # many kinds: an old GPU, no C compiler
        warn(f"the loss does without its Triton kernels, which is slower: {first_line(error)}")
        return False
    return True


class _ImageGroup(NamedTuple):
    """One image or several consecutive small ones: the ranges of their tokens in the batch."""

    teacher: slice
    student: slice


def _image_groups(matches, max_rows):
    """Split a batch into groups of consecutive images with at most `max_rows` tokens per network, or of one image."""
    counts = (matches.teacher_count, matches.student_count)
    teacher_end, student_end = (count.numpy().cumsum().tolist() for count in counts)
    groups, t0, s0 = [], 0, 0
    # The group ends with an image if the next one, or the end of the batch, does not fit any more.
    for t1, s1, t2, s2 in zip(teacher_end, student_end, teacher_end[1:] + [inf], student_end[1:] + [inf], strict=True):
        if max(t2 - t0, s2 - s0) > max_rows:
            groups.append(_ImageGroup(slice(t0, t1), slice(s0, s1)))
            t0, s0 = t1, s1
    return groups


@dataclass
class _Work:
    """Everything that the loss depends on except the student's tensors. Ns is the number of matched student tokens."""

    compute: Callable  # _loss_and_gradients, or that of fused_cross_entropy
    teacher_out: tuple  # TokenOutput
    center: torch.Tensor  # [1 or 1+P, K]
    matches: tuple  # Matches
    token_weight: torch.Tensor  # [Ns, 1] sum of the weights of a student token, in units of the largest
    target_weight: torch.Tensor  # [M, Ns] weight of each match in the mixture; sums to 1
    groups: list  # of _ImageGroup
    chunk: int  # number of student tokens whose logits are held at a time
    num_strips: int  # strips per chunk
    student_temp: float
    teacher_temp: float

    @property
    def max_teachers(self) -> int:
        """The largest number of teacher tokens in a group."""
        return max((group.teacher.stop - group.teacher.start for group in self.groups), default=0)

    def chunks(self, group) -> list:
        """Return slices of the student tokens of a group, of at most `chunk` tokens."""
        return [slice(*edges) for edges in _pieces(group.student.start, group.student.stop, self.chunk)]


class _CrossEntropy(torch.autograd.Function):
    """Weighted sum of the cross-entropies of student tokens. Forward computes the gradients, backward scales them."""

    @staticmethod
    def forward(ctx, student_z, student_prototypes, student_scale, work):
        compute_dtype = torch.promote_types(student_z.dtype, torch.float32)  # of logits and what is derived from them
        device_type = student_z.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else compute_dtype  # of matrix products
        needs_z, needs_prototypes, needs_scale = ctx.needs_input_grad[:3]
        student = (student_z, student_prototypes, student_scale)
        with torch.autocast(device_type, enabled=False):
            losses, d_z, d_prototypes = work.compute(*student, work, dtype, needs_z, needs_prototypes or needs_scale)
            loss = work.token_weight[:, 0] @ losses
            d_scale = None
            if needs_scale:
                d_scale = torch.einsum("kd,kd->k", d_prototypes, student_prototypes.to(compute_dtype))
            if needs_prototypes:
                d_prototypes.mul_(student_scale[:, None])
        ctx.save_for_backward(d_z, d_prototypes if needs_prototypes else None, d_scale)
        ctx.dtypes = (student_z.dtype, student_prototypes.dtype, student_scale.dtype)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        gradients = (
            None if gradient is None else (gradient * d_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None


def _loss_and_gradients(student_z, student_prototypes, student_scale, work, dtype, needs_z, needs_prototypes):
    """Return (cross-entropies of the student tokens [Ns], gradient of their bottleneck vectors, of scale * prototypes).

    Gradients that are not needed are None. `dtype` is that of the matrix products.
    """
    device, K = student_z.device, len(student_prototypes)
    compute_dtype = torch.promote_types(student_z.dtype, torch.float32)
    losses = torch.empty(len(student_z), dtype=compute_dtype, device=device)
    d_z = torch.empty_like(student_z, dtype=compute_dtype) if needs_z else None
    d_prototypes = torch.zeros_like(student_prototypes, dtype=compute_dtype) if needs_prototypes else None
    grad_scale = -1 / work.student_temp
    teacher, matches = work.teacher_out, work.matches
    student_weights, teacher_weights = (x.to(dtype) for x in (student_prototypes, teacher.prototypes))
    sharpening = student_scale / work.student_temp
    # Matrix products are efficient with many rows (chunks), other operations with few that stay in the cache.
    targets_buffer = torch.empty(work.max_teachers, K, dtype=compute_dtype, device=device)
    logits_buffer = torch.empty(work.chunk, K, dtype=compute_dtype, device=device)
    strips = torch.empty(2, -(-work.chunk // work.num_strips), K, dtype=compute_dtype, device=device)
    for group in work.groups:
        targets = targets_buffer[: group.teacher.stop - group.teacher.start]
        _logits(teacher.bottleneck[group.teacher].to(dtype), teacher_weights, teacher.scale, out=targets)
        _sharpen_(targets, work.center, matches.teacher_position[group.teacher], work.teacher_temp, strips)
        for rows in work.chunks(group):
            z, weight = student_z[rows], work.token_weight[rows]
            logits = logits_buffer[: len(z)]
            _logits(z.to(dtype), student_weights, sharpening, out=logits)
            losses[rows] = _cross_entropy_(logits, targets, work, group, rows.start, strips)
            difference = logits  # overwritten with mixture - softmax
            if needs_prototypes:
                weighted_z = (z * weight).to(dtype)
                if dtype == compute_dtype:
                    d_prototypes.addmm_(difference.T, weighted_z, alpha=grad_scale)
                else:
                    d_prototypes.add_(difference.to(dtype).T @ weighted_z, alpha=grad_scale)
            if needs_z:
                product = difference.mul_(student_scale).to(dtype) @ student_weights
                torch.mul(product, grad_scale * weight, out=d_z[rows])
    return losses, d_z, d_prototypes


def _logits(z, prototypes, scale, out):
    """Write the logits z @ (scale * prototypes.T) to `out`; on a CPU in blocks of columns that fit the cache."""
    step = 2048 if z.device.type == "cpu" else len(prototypes)
    for start in range(0, len(prototypes), step):
        k = slice(start, start + step)
        if z.dtype == out.dtype:
            torch.mm(z, prototypes[k].T, out=out[:, k])
        else:
            out[:, k] = z @ prototypes[k].T
        out[:, k] *= scale[k]


def _sharpen_(logits, center, positions, temp, strips):
    """Replace the teacher's logits [n, K] by its targets, softmax((logits - center) / temp)."""
    for a, b in _pieces(0, len(logits), strips.shape[1]):
        centered, centers = strips[:, : b - a]
        if len(center) > 1:
            torch.index_select(center, 0, positions[a:b], out=centers)
        else:
            centers = center
        torch.sub(logits[a:b], centers, out=centered).div_(temp)
        torch.softmax(centered, -1, out=logits[a:b])


def _cross_entropy_(logits, targets, work, group, first, strips):
    """Return the cross-entropies [n] of student tokens and replace their logits by mixture - softmax.

    Args:
        logits: [n, K], logits of the student tokens from index `first` on, divided by τ_s.
        targets: targets of the teacher tokens of the group.
        strips: buffers [2, rows, K].
    """
    losses = []
    for start, stop in _pieces(first, first + len(logits), strips.shape[1]):
        strip = logits[start - first : stop - first]
        mixture, probabilities = strips[:, : stop - start]
        target_idx = (work.matches.teacher_idx[:, start:stop] - group.teacher.start).clamp_(min=0)  # [M, rows]
        target_weight = work.target_weight[:, start:stop, None]  # 0 for padding
        torch.index_select(targets, 0, target_idx[0], out=mixture).mul_(target_weight[0])
        for idx, weight in zip(target_idx[1:], target_weight[1:], strict=True):
            mixture.addcmul_(torch.index_select(targets, 0, idx, out=probabilities), weight)
        torch.softmax(strip, -1, out=probabilities)
        # The largest probability is exp(largest logit - logsumexp).
        logsumexp = strip.amax(-1) - probabilities.amax(-1).log()
        losses.append(logsumexp - strip.mul_(mixture).sum(-1))
        torch.sub(mixture, probabilities, out=strip)
    return torch.cat(losses)


def _pieces(start, stop, max_length):
    """Split a range into the smallest number of about equal pieces of at most `max_length`."""
    count = max(-(-(stop - start) // max_length), 1)
    edges = [start + i * (stop - start) // count for i in range(count + 1)]
    return itertools.pairwise(edges)
