"""The local-global loss (paper, section 3.4): one weighted cross-entropy between matched tokens.

With H the cross-entropy between the teacher's and the student's distribution over K prototypes, all losses of the paper
are `sum of w * H` over the matched token pairs; LOSSES gives w.
"""

import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from utils import all_reduce_mean

# The weight of every matched token pair within its pair of views, by --loss: functions of is_cls, booleans [n], whether
# CLS is matched with CLS; run_length [n], tokens matched in this pair of views, CLS included; and λ.
LOSSES = {
    "cls": lambda is_cls, run_length, lambda_cls: is_cls.float(),  # DINO
    "mean": lambda is_cls, run_length, lambda_cls: 1 / run_length.float(),
    "sum": lambda is_cls, run_length, lambda_cls: torch.ones_like(run_length, dtype=torch.float32),
    # Where nothing but CLS is matched, λ·H(CLS) is left.
    "lambda": lambda is_cls, run_length, lambda_cls: torch.where(
        is_cls, lambda_cls, (1 - lambda_cls) / (run_length - 1).clamp(min=1).float()
    ),
}


def teacher_temperature(epoch, warmup_temp, temp, warmup_epochs):
    """Return τ_t of an epoch: linear from `warmup_temp` to `temp` in the first `warmup_epochs`, then constant."""
    if epoch >= warmup_epochs:
        return temp
    return warmup_temp + (temp - warmup_temp) * epoch / max(warmup_epochs - 1, 1)


class LocalGlobalLoss(nn.Module):
    """Weighted cross-entropy between matched tokens of teacher and student, with DINO's centering and sharpening.

    It takes bottleneck vectors and prototypes instead of logits: logits are linear in the vectors, so that the center,
    a batch mean of logits, needs only the batch mean of the vectors, and logits are computed for matched tokens alone.

    Args:
        out_dim: K, number of prototypes.
        grid_tokens: P, number of patch tokens of a view of the teacher. Only `center="position"` uses it.
        loss: one of LOSSES.
        lambda_cls: λ of "lambda", in [0, 1].
        center: "position" keeps a center for every token position, [1+P, K], as the authors' code does; "shared" one
            for all tokens, [1, K], as Algorithm 1 says. The loss "cls" always has one.
        student_temp: τ_s.
        center_momentum: share of the old center in the new one.
        chunk_memory: bytes for the K-wide rows of the student tokens that are worked on at a time; default 80 MiB on a
            CPU, 512 MiB on a GPU. The targets of one image (or of several small ones) come on top, and under autocast
            copies in its precision.

    Raises:
        ValueError: an unknown loss or center, or λ outside [0, 1].

    The center is a buffer and part of the state_dict.
    """

    def __init__(
        self,
        out_dim,
        grid_tokens,
        loss="mean",
        lambda_cls=0.5,
        center="position",
        student_temp=0.1,
        center_momentum=0.9,
        chunk_memory=None,
    ):
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"unknown loss {loss!r}, expected one of {', '.join(LOSSES)}")
        if center not in ("position", "shared"):
            raise ValueError(f"unknown center {center!r}, expected position or shared")
        if not 0 <= lambda_cls <= 1:
            raise ValueError(f"lambda_cls is {lambda_cls}, expected a number in [0, 1]")
        self.loss, self.lambda_cls = loss, lambda_cls
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.chunk_memory = chunk_memory
        positions = 1 + grid_tokens if center == "position" and loss != "cls" else 1
        self.register_buffer("center", torch.zeros(positions, out_dim))

    def weights(self, is_cls, run_length, view_pairs):
        """Return the weights [n] of the matched token pairs in the loss of a batch.

        Args:
            is_cls, run_length: see LOSSES.
            view_pairs: batch size × number of pairs of views of an image.
        """
        return LOSSES[self.loss](is_cls, run_length, self.lambda_cls) / view_pairs

    def forward(
        self,
        student_z,
        teacher_z,
        student_prototypes,
        teacher_prototypes,
        pairs,
        teacher_position,
        teacher_mean_z,
        teacher_temp,
        student_scale=None,
        teacher_scale=None,
    ):
        """Return the loss of a batch; in training mode also update the center, for the next batch.

        Args:
            student_z: [Ns, D] bottleneck vectors of the student's matched tokens.
            teacher_z: [Nt, D] of the teacher's; no gradient flows into them.
            student_prototypes, teacher_prototypes: [K, D].
            pairs: (teacher_idx [n], student_idx [n], weight [n], image [n]): rows of teacher_z and student_z that are
                matched, the weight of each match, and the image that it belongs to. They shape the work: keep them in
                the CPU's memory, on any device.
            teacher_position: [Nt] token position of each teacher row, 0 is CLS; kept like `pairs`.
            teacher_mean_z: [1+P, D] mean over batch and global views of the teacher's bottleneck vectors at each
                position, matched or not. The loss "cls" uses row 0 alone. None leaves the center as it is.
            teacher_temp: τ_t.
            student_scale, teacher_scale: [K] factors of the prototypes, which need not be multiplied out; None is 1.

        The logits are `z @ (scale * prototypes).T`: with prototypes = identity (D = K) the vectors are the logits. The
        matrix products run in the precision of the surrounding autocast, all else in fp32. The gradients are computed
        together with the loss, so that a backward pass costs next to nothing.
        """
        ones = self.center.new_ones(self.center.shape[1])
        student_scale = ones if student_scale is None else student_scale
        teacher_scale = ones if teacher_scale is None else teacher_scale
        # Rows of logits at a time, and into how many strips they are cut, two of which are held beside them. On a CPU a
        # strip has to stay in its cache, on a GPU many small operations would keep it waiting.
        memory, strips = (80 << 20, 8) if student_z.device.type == "cpu" else (512 << 20, 1)
        rows = (self.chunk_memory or memory) // (4 * self.center.shape[1])
        plan = _plan(*pairs, teacher_position, len(teacher_z), student_z, max(rows * strips // (strips + 2), 16))
        if not torch.is_grad_enabled():
            student_z, student_prototypes, student_scale = (
                x.detach() for x in (student_z, student_prototypes, student_scale)
            )
        loss = _CrossEntropy.apply(
            student_z,
            student_prototypes,
            student_scale,
            teacher_z,
            teacher_prototypes,
            teacher_scale,
            self.center,
            plan,
            strips,
            self.student_temp,
            teacher_temp,
        )
        if self.training and teacher_mean_z is not None:
            self.update_center(teacher_mean_z, teacher_prototypes, teacher_scale)
        return loss

    @torch.no_grad()
    def update_center(self, teacher_mean_z, teacher_prototypes, teacher_scale):
        """Move the center towards the mean of the teacher's logits, over all processes."""
        mean_z = all_reduce_mean(teacher_mean_z.detach().to(self.center.dtype, copy=True))
        if len(self.center) == 1:
            mean_z = mean_z[:1] if self.loss == "cls" else mean_z.mean(0, keepdim=True)
        with torch.autocast(mean_z.device.type, enabled=False):
            mean_logits = torch.empty_like(self.center)
            _logits(mean_z, teacher_prototypes.to(mean_z.dtype), teacher_scale, out=mean_logits)
        self.center.lerp_(mean_logits, 1 - self.center_momentum)


class _Plan(NamedTuple):
    """The matched pairs of a batch, laid out image by image: tensors on the loss's device, bounds in the CPU's memory.

    A part is an image, or several whose K-wide rows are few. T and S count the teacher and student tokens of each part
    that have a pair, one part after the other; within a part the student tokens with most pairs come first. M is the
    largest number of pairs of a student token.
    """

    teacher_rows: torch.Tensor  # [T] rows of teacher_z
    positions: torch.Tensor  # [T] token positions
    student_rows: torch.Tensor  # [S] rows of student_z
    weight: torch.Tensor  # [S, 1] summed weight of a student token's pairs, in units of max_weight
    mixed: torch.Tensor  # [M, S] teacher tokens of a student token's pairs, counted within their part
    share: torch.Tensor  # [M, S, 1] share of each pair in the student token's weight
    parts: list  # of (t0, t1, s0, s1): its teacher tokens are t0 to t1 - 1, its student tokens s0 to s1 - 1
    pair_counts: np.ndarray  # [S] pairs of each student token
    max_weight: float
    chunk: int  # student tokens whose logits are held at a time


def _plan(teacher_idx, student_idx, weight, image, teacher_position, teacher_count, student_z, most_rows):
    """Lay the pairs of `LocalGlobalLoss.forward` out for the device of student_z, at most `most_rows` to a chunk."""
    student_count = len(student_z)
    teacher_idx, student_idx, weight, image, teacher_position = (
        x.numpy(force=True) for x in (teacher_idx, student_idx, weight, image, teacher_position)
    )
    weighty = weight != 0
    teacher_idx, student_idx, weight, image = (x[weighty] for x in (teacher_idx, student_idx, weight, image))
    # A token that two images name counts once in each of them.
    student_key, student, pair_counts = np.unique(
        image * student_count + student_idx, return_inverse=True, return_counts=True
    )
    teacher_key, teacher = np.unique(image * teacher_count + teacher_idx, return_inverse=True)
    images = np.unique(image)
    teacher_bounds = [np.searchsorted(teacher_key, i * teacher_count) for i in (images, images + 1)]
    student_bounds = [np.searchsorted(student_key, i * student_count) for i in (images, images + 1)]
    parts = []
    for t0, t1, s0, s1 in zip(*teacher_bounds, *student_bounds, strict=True):
        if parts and max(t1 - parts[-1][0], s1 - parts[-1][2]) <= most_rows // 4:
            t0, _, s0, _ = parts.pop()
        parts.append((int(t0), int(t1), int(s0), int(s1)))

    # Put the student tokens with most pairs first, and the pairs in the order of their student tokens.
    part_of_student = np.repeat(np.arange(len(parts)), [s1 - s0 for _, _, s0, s1 in parts])
    order = np.lexsort((-pair_counts, part_of_student))
    student_key, pair_counts, place = student_key[order], pair_counts[order], np.argsort(order)
    pairs = np.argsort(place[student], kind="stable")
    teacher, weight, student = teacher[pairs], weight[pairs], place[student][pairs]
    nth = np.arange(len(pairs)) - np.repeat(np.cumsum(pair_counts) - pair_counts, pair_counts)  # pair of its token
    token_weight = np.bincount(student, weight, len(student_key))
    max_weight = token_weight.max(initial=0)
    mixed = np.zeros((pair_counts.max(initial=0), len(student_key)), np.int64)
    share = np.zeros(mixed.shape)
    mixed[nth, student] = teacher - np.array([t0 for t0, *_ in parts])[part_of_student[student]]
    share[nth, student] = weight / token_weight[student]

    teacher_rows = teacher_key % teacher_count
    columns = (teacher_rows, teacher_position[teacher_rows], student_key % student_count)
    columns += ((token_weight / max_weight)[:, None], mixed, share[..., None])
    dtype = {"f": torch.promote_types(student_z.dtype, torch.float32), "i": torch.int64}
    columns = (torch.from_numpy(x).to(dtype[x.dtype.kind]) for x in columns)
    if student_z.is_cuda:  # a copy of unpinned memory would wait for the device
        columns = (x.pin_memory() for x in columns)
    columns = (x.to(student_z.device, non_blocking=True) for x in columns)
    chunk = min(most_rows, max((s1 - s0 for _, _, s0, s1 in parts), default=0))
    return _Plan(*columns, parts, pair_counts, float(max_weight), chunk)


class _CrossEntropy(torch.autograd.Function):
    """Σ w·H(t, s) over matched pairs, with its gradients, image by image.

    Two facts make it cheap. The targets of a student token with several teacher tokens add up to one mixture: with
    w = Σ_t w_t and m = Σ_t (w_t / w)·t its part of the loss is w·(logsumexp(s) - m·s), and the gradient for its logits
    is w·(softmax(s) - m). And all pairs lie inside one image, so that nothing K wide has to outlive it: the targets of
    its teacher tokens, and one chunk of its student tokens after the other on the way from logits to gradients.
    """

    @staticmethod
    def forward(
        ctx,
        student_z,
        student_prototypes,
        student_scale,
        teacher_z,
        teacher_prototypes,
        teacher_scale,
        center,
        plan,
        strip_count,
        student_temp,
        teacher_temp,
    ):
        device, K = student_z.device, len(student_prototypes)
        wide = torch.promote_types(student_z.dtype, torch.float32)  # of all that is computed from logits
        narrow = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else wide
        needs_z, needs_prototypes, needs_scale = ctx.needs_input_grad[:3]
        d_z = torch.zeros_like(student_z, dtype=wide) if needs_z else None
        d_prototypes = torch.zeros_like(student_prototypes, dtype=wide) if needs_prototypes or needs_scale else None
        loss = torch.zeros((), dtype=wide, device=device)
        unit = -plan.max_weight / student_temp  # of the gradients; weights as small as they are would be lost in fp16

        with torch.autocast(device.type, enabled=False):
            student_narrow, teacher_narrow = student_prototypes.to(narrow), teacher_prototypes.to(narrow)
            center, sharpening = center.to(wide), student_scale / student_temp
            # The products want many rows at a time, all else few enough to stay in a cache: strips of a chunk.
            most_t = max((t1 - t0 for t0, t1, _, _ in plan.parts), default=0)
            targets_buffer = torch.empty(most_t, K, dtype=wide, device=device)
            logits_buffer = torch.empty(plan.chunk, K, dtype=wide, device=device)
            strips = torch.empty(2, -(-plan.chunk // strip_count), K, dtype=wide, device=device)
            for t0, t1, s0, s1 in plan.parts:
                targets = targets_buffer[: t1 - t0]
                z = teacher_z[plan.teacher_rows[t0:t1]].to(narrow)
                _logits(z, teacher_narrow, teacher_scale, out=targets)
                _sharpen_(targets, center, plan.positions[t0:t1], teacher_temp, strips)

                for a, b in _pieces(s0, s1, plan.chunk):
                    rows, weight = plan.student_rows[a:b], plan.weight[a:b]
                    z, logits = student_z[rows], logits_buffer[: b - a]
                    _logits(z.to(narrow), student_narrow, sharpening, out=logits)
                    loss += weight[:, 0] @ _cross_entropy_(logits, targets, plan, a, strips)
                    difference = logits  # mixture - softmax, from here on
                    if d_prototypes is not None:
                        weighted_z = (z * weight).to(narrow)
                        if narrow == wide:
                            d_prototypes.addmm_(difference.T, weighted_z, alpha=unit)
                        else:
                            d_prototypes.add_(difference.to(narrow).T @ weighted_z, alpha=unit)
                    if d_z is not None:
                        product = difference.mul_(student_scale).to(narrow) @ student_narrow
                        d_z.index_add_(0, rows, product * (unit * weight))
            d_scale = torch.einsum("kd,kd->k", d_prototypes, student_prototypes.to(wide)) if needs_scale else None
            if needs_prototypes:
                d_prototypes.mul_(student_scale[:, None])
        gradients = (d_z, d_prototypes if needs_prototypes else None, d_scale)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = (student_z.dtype, student_prototypes.dtype, student_scale.dtype)
        return loss * plan.max_weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        gradients = (
            None if gradient is None else (gradient * d_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, *[None] * 8


def _logits(z, prototypes, scale, out):
    """Write the logits z @ (scale * prototypes).T into `out`; on a CPU in blocks of columns that stay in its cache."""
    step = 2048 if z.device.type == "cpu" else len(prototypes)
    for start in range(0, len(prototypes), step):
        k = slice(start, start + step)
        if z.dtype == out.dtype:
            torch.mm(z, prototypes[k].T, out=out[:, k])
        else:
            out[:, k] = z @ prototypes[k].T
        out[:, k] *= scale[k]


def _sharpen_(logits, center, positions, temp, strips):
    """Turn the teacher's logits [n, K] into its targets, softmax((logits - center) / temp), in place."""
    for a, b in _pieces(0, len(logits), strips.shape[1]):
        centered, centers = strips[:, : b - a]
        if len(center) > 1:
            torch.index_select(center, 0, positions[a:b], out=centers)
        else:
            centers = center
        torch.sub(logits[a:b], centers, out=centered).div_(temp)
        torch.softmax(centered, -1, out=logits[a:b])


def _cross_entropy_(logits, targets, plan, start, strips):
    """Return the cross-entropies [n] of student tokens with their mixtures of targets; logits become mixture - softmax.

    Args:
        logits: [n, K], divided by τ_s, of the student tokens that the plan counts from `start`.
        targets: of the teacher tokens of their part.
    """
    losses = []
    for a, b in _pieces(start, start + len(logits), strips.shape[1]):
        strip = logits[a - start : b - start]
        mixture, probabilities = strips[:, : b - a]
        torch.index_select(targets, 0, plan.mixed[0, a:b], out=mixture).mul_(plan.share[0, a:b])
        for i in range(1, plan.pair_counts[a]):
            end = a + np.count_nonzero(plan.pair_counts[a:b] > i)
            more = torch.index_select(targets, 0, plan.mixed[i, a:end], out=probabilities[: end - a])
            mixture[: end - a].addcmul_(more, plan.share[i, a:end])
        torch.softmax(strip, -1, out=probabilities)
        # The largest probability is exp(largest logit - logsumexp).
        logsumexp = strip.amax(-1) - probabilities.amax(-1).log()
        losses.append(logsumexp - strip.mul_(mixture).sum(-1))
        torch.sub(mixture, probabilities, out=strip)
    return torch.cat(losses)


def _pieces(start, stop, most):
    """Cut a range into as few pieces of at most `most` as there can be, about equally long."""
    count = -(-(stop - start) // most)
    edges = [start + i * (stop - start) // count for i in range(count + 1)]
    return itertools.pairwise(edges)
