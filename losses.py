"""The local-global loss (paper, section 3.4): one weighted cross-entropy between matched tokens.

With H the cross-entropy between the teacher's and the student's distribution over K prototypes, all losses of the paper
are `sum of w * H` over the matched token pairs, divided by the number of pairs of views. LOSSES gives w, `plain_loss`
is the formula, and `LocalGlobalLoss` is the criterion of the training, which computes the same in less memory and time.
"""

import torch
import torch.nn.functional as F
from torch import nn

from support.matched_cross_entropy import matched_cross_entropy
from utils import all_reduce_mean

# The weight of every matched token pair within its pair of views, by --loss. Each function maps three arguments to
# weights: is_cls, booleans, whether the pair is CLS with CLS; num_matched, how many tokens are matched in this pair of
# views, CLS included; λ. num_matched is 0 where a table has no pair: the weight is ignored there, and may be infinite.
LOSSES = {
    "cls": lambda is_cls, num_matched, lambda_cls: is_cls.float(),  # DINO
    "mean": lambda is_cls, num_matched, lambda_cls: 1 / num_matched.float(),
    "sum": lambda is_cls, num_matched, lambda_cls: torch.ones_like(num_matched, dtype=torch.float32),
    # Where nothing but CLS is matched, λ·H(CLS) is left.
    "lambda": lambda is_cls, num_matched, lambda_cls: torch.where(
        is_cls, lambda_cls, (1 - lambda_cls) / (num_matched - 1).clamp(min=1).float()
    ),
}


def plain_loss(student_logits, teacher_logits, weight, center, teacher_temp, student_temp=0.1):
    """Return Σ w·H(teacher, student) over matched tokens, as section 3.4 and Algorithm 1 write it.

    Args:
        student_logits, teacher_logits: [..., n, K] of the matched tokens, in the same order.
        weight: w, [..., n] or one number.
        center: [K], or [..., n, K] for each of the teacher's tokens.
        teacher_temp, student_temp: τ_t and τ_s.

    Example: of 3 tokens of the teacher and 2 of the student, CLS (0) and one patch are matched; the mean loss.

        >>> teacher, student = torch.eye(3), torch.zeros(2, 3)  # [tokens, K]
        >>> idx_t, idx_s = torch.tensor([0, 2]), torch.tensor([0, 1])  # as match_patches returns them
        >>> plain_loss(student[idx_s], teacher[idx_t], 1 / len(idx_s), torch.zeros(3), teacher_temp=0.04)
        tensor(1.0986)
    """
    targets = F.softmax((teacher_logits - center) / teacher_temp, dim=-1)
    log_probabilities = F.log_softmax(student_logits / student_temp, dim=-1)
    return -(weight * (targets * log_probabilities).sum(-1)).sum()


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
        chunk_memory: see `matched_cross_entropy`.

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
        self._pending = None  # for the next update of the center: (sum of means, number, teacher's prototypes, scale)

    def forward(self, student_out, teacher_out, matches, teacher_temp):
        """Return the loss of a batch.

        Args:
            student_out: vision_transformer.TokenOutput of the rows `matches.student_row`.
            teacher_out: the same of `matches.teacher_row`, with `mean_bottleneck`. No gradient flows into it.
            matches: patch_matching.Matches.
            teacher_temp: τ_t.

        Returns:
            0-d tensor, the mean over images and pairs of views; fp32 also under autocast.

        In training mode the sum of `teacher_out.mean_bottleneck` is kept for `update_center`.
        """
        is_cls = matches.is_cls()
        weight = LOSSES[self.loss](is_cls, matches.num_matched, self.lambda_cls)
        weight = torch.where(matches.num_matched > 0, weight, 0)
        loss = matched_cross_entropy(
            student_out,
            teacher_out,
            matches,
            weight,
            self.center,
            self.student_temp,
            teacher_temp,
            self.chunk_memory,
        )
        if self.training:
            mean_z, batches = teacher_out.mean_bottleneck.detach(), 1
            if self._pending is not None:
                mean_z, batches = self._pending[0] + mean_z, self._pending[1] + 1
            self._pending = (mean_z, batches, teacher_out.prototypes, teacher_out.scale)
        return loss / is_cls.sum()  # batch size × number of pairs of views

    @torch.no_grad()
    def update_center(self):
        """Move the center towards the mean of the teacher's logits in all batches since the last call, on all ranks.

        Call it once a step, after the last micro-batch and before the teacher's prototypes change. It does nothing
        after batches in evaluation mode.
        """
        if self._pending is None:
            return
        mean_z, batches, prototypes, scale = self._pending
        self._pending = None
        mean_z = all_reduce_mean(mean_z.to(self.center.dtype) / batches)  # [1+P, D]
        if len(self.center) == 1:
            mean_z = mean_z[:1] if self.loss == "cls" else mean_z.mean(0, keepdim=True)
        with torch.autocast(mean_z.device.type, enabled=False):
            mean_logits = (mean_z @ prototypes.to(mean_z.dtype).T).mul_(scale)
        self.center.lerp_(mean_logits, 1 - self.center_momentum)
