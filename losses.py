"""The local-global loss (paper, section 3.4): a weighted cross-entropy between matched tokens.

Let H be the cross-entropy between the teacher's and the student's distribution over K prototypes. Every loss is the
sum of `w * H` over all matched token pairs, divided by the number of pairs of views. LOSS_WEIGHTS defines w,
`plain_loss` is the formula, and `LocalGlobalLoss` is the training criterion, which computes the same sum with less time
and memory.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from support.matched_cross_entropy import Matches, TokenOutput, matched_cross_entropy
from utils import start_all_reduce_mean

# Weight of a matched token pair, by --loss. Each function takes
#   is_cls: booleans [M, Ns], whether the pair is CLS with CLS,
#   num_matched: LongTensor [M, Ns], number of matched tokens in the same pair of views, including CLS; 0 marks padding,
#       whose weight is ignored and may be infinite,
#   lambda_cls: λ, a float
# and returns weights [M, Ns] in fp32. patch_matching.Matches defines M and Ns.
LOSS_WEIGHTS = {
    "cls": lambda is_cls, num_matched, lambda_cls: is_cls.float(),  # DINO
    "mean": lambda is_cls, num_matched, lambda_cls: 1 / num_matched.float(),
    "sum": lambda is_cls, num_matched, lambda_cls: torch.ones_like(num_matched, dtype=torch.float32),
    # If only CLS is matched, the loss is λ·H(CLS).
    "lambda": lambda is_cls, num_matched, lambda_cls: torch.where(
        is_cls, lambda_cls, (1 - lambda_cls) / (num_matched - 1).clamp(min=1).float()
    ),
    # The authors' branch QCRI_ImageNet_same_batch_augmentation, in no paper: the patches are summed, not averaged.
    "lambda_sum": lambda is_cls, num_matched, lambda_cls: torch.where(is_cls, lambda_cls, 1.0 - lambda_cls),
}


def plain_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    weight: torch.Tensor | float,
    center: torch.Tensor,
    teacher_temp: float,
    student_temp: float = 0.1,
) -> torch.Tensor:
    """Return Σ w·H(teacher, student) over matched tokens, as written in section 3.4 and Algorithm 1.

    Args:
        student_logits, teacher_logits: [..., n, K], logits of the matched tokens in the same order.
        weight: w, [..., n] or a number.
        center: [K], or [..., n, K] for each teacher token.
        teacher_temp, student_temp: τ_t and τ_s.

    Example: the mean loss for 3 teacher and 2 student tokens, of which CLS (0) and one patch are matched.

        >>> teacher, student = torch.eye(3), torch.zeros(2, 3)  # [tokens, K]
        >>> idx_t, idx_s = torch.tensor([0, 2]), torch.tensor([0, 1])  # as match_patches returns them
        >>> plain_loss(student[idx_s], teacher[idx_t], 1 / len(idx_s), torch.zeros(3), teacher_temp=0.04)
        tensor(1.0986)
    """
    targets = F.softmax((teacher_logits - center) / teacher_temp, dim=-1)
    log_probabilities = F.log_softmax(student_logits / student_temp, dim=-1)
    return -(weight * (targets * log_probabilities).sum(-1)).sum()


def teacher_temperature(epoch: int, warmup_temp: float, temp: float, warmup_epochs: int) -> float:
    """Return τ_t: linear from `warmup_temp` to `temp` over the first `warmup_epochs` epochs, then constant."""
    if epoch >= warmup_epochs:
        return temp
    return warmup_temp + (temp - warmup_temp) * epoch / max(warmup_epochs - 1, 1)


class _PendingMean(NamedTuple):
    """The teacher's mean output for a micro-batch, while the processes average it."""

    wait: Callable[[], torch.Tensor]  # returns the mean bottleneck vectors of all processes, [positions, D]
    prototypes: torch.Tensor  # [K, D]
    scale: torch.Tensor  # [K]


class LocalGlobalLoss(nn.Module):
    """Weighted cross-entropy between matched teacher and student tokens, with DINO's centering and sharpening.

    The criterion takes bottleneck vectors and prototypes instead of logits. Because logits are linear in the bottleneck
    vectors, the center, a batch mean of logits, needs only the batch mean of the vectors, and logits are computed only
    for matched tokens. The center is a buffer and part of the state_dict.

    Args:
        out_dim: K, number of prototypes.
        grid_tokens: P, number of patches of a teacher view. Used only with `center="position"`.
        loss: a key of LOSS_WEIGHTS.
        lambda_cls: λ of the losses "lambda" and "lambda_sum", in [0, 1].
        center: "position" keeps one center per token position, [1+P, K], as the authors' code does; "shared" keeps one
            for all tokens, [1, K], as in Algorithm 1. The loss "cls" always has a single center.
        student_temp: τ_s.
        center_momentum: EMA momentum of the center.
        chunk_memory: see `matched_cross_entropy`.

    Raises:
        ValueError: the loss or the center is unknown, or λ is outside [0, 1].
    """

    center: torch.Tensor

    def __init__(
        self,
        out_dim: int,
        grid_tokens: int,
        loss: str = "mean",
        lambda_cls: float = 0.5,
        center: str = "position",
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        chunk_memory: int | None = None,
    ):
        super().__init__()
        if loss not in LOSS_WEIGHTS:
            raise ValueError(f"unknown loss {loss!r}, expected one of {', '.join(LOSS_WEIGHTS)}")
        if center not in ("position", "shared"):
            raise ValueError(f"unknown center {center!r}, expected position or shared")
        if not 0 <= lambda_cls <= 1:
            raise ValueError(f"lambda_cls is {lambda_cls}, expected a number in [0, 1]")
        self.loss, self.lambda_cls, self.chunk_memory = loss, lambda_cls, chunk_memory
        self.student_temp, self.center_momentum = student_temp, center_momentum
        positions = 1 + grid_tokens if center == "position" and loss != "cls" else 1
        self.register_buffer("center", torch.zeros(positions, out_dim))
        self._pending: list[_PendingMean] = []  # of the micro-batches since the last update

    def forward(
        self, student_out: TokenOutput, teacher_out: TokenOutput, matches: Matches, teacher_temp: float
    ) -> torch.Tensor:
        """Return the loss of a batch, averaged over images and pairs of views.

        In training mode, it also starts to average `teacher_out.mean_bottleneck` over all processes, for
        `update_center`. The backward pass hides this exchange.

        Args:
            student_out: output for the tokens `matches.student_row`.
            teacher_out: output for the tokens `matches.teacher_row`, with `mean_bottleneck`. It gets no gradient.
            matches: matched tokens of the batch.
            teacher_temp: τ_t.

        Returns:
            0-d tensor, fp32 even under autocast.
        """
        is_cls = matches.is_cls()
        weight = LOSS_WEIGHTS[self.loss](is_cls, matches.num_matched, self.lambda_cls)
        weight = torch.where(matches.num_matched > 0, weight, 0)
        loss = matched_cross_entropy(
            student_out, teacher_out, matches, weight, self.center, self.student_temp, teacher_temp, self.chunk_memory
        )
        if self.training:
            assert teacher_out.mean_bottleneck is not None
            wait = start_all_reduce_mean(teacher_out.mean_bottleneck.detach().to(self.center.dtype))
            self._pending.append(_PendingMean(wait, teacher_out.prototypes, teacher_out.scale))
        return loss / is_cls.sum()  # batch size × number of pairs of views

    @torch.no_grad()
    def update_center(self) -> None:
        """Move the center towards the mean of the teacher's logits since the last call, averaged over all processes.

        Call it once per step, after the last micro-batch and before the teacher changes. Batches in evaluation mode do
        not count.
        """
        if not self._pending:
            return
        mean_z = functools.reduce(torch.add, [mean.wait() for mean in self._pending]) / len(self._pending)
        prototypes, scale = self._pending[-1].prototypes, self._pending[-1].scale
        self._pending.clear()
        if len(self.center) == 1:
            mean_z = mean_z[:1] if self.loss == "cls" else mean_z.mean(0, keepdim=True)
        with torch.autocast(mean_z.device.type, enabled=False):
            mean_logits = (mean_z @ prototypes.to(mean_z.dtype).T).mul_(scale)
        self.center.lerp_(mean_logits, 1 - self.center_momentum)
