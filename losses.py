"""The local-global loss (paper, section 3.4): one weighted cross-entropy between matched tokens.

With H the cross-entropy between the teacher's and the student's distribution over K prototypes, all losses of the paper
are `sum of w * H` over the matched token pairs; `pair_weights` gives w.
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils import all_reduce_mean

LOSSES = ("cls", "mean", "sum", "lambda")


def pair_weights(loss, is_cls, run_length, lambda_cls=0.5):
    """Return the weight of every matched token pair within its pair of views.

    Args:
        loss: "cls" (DINO), "mean", "sum" or "lambda"; the equations of section 3.4.
        is_cls: booleans [n], whether CLS is matched with CLS.
        run_length: [n], tokens matched in this pair of views, CLS included.
        lambda_cls: λ, the share of CLS in "lambda". Where nothing but CLS is matched, λ·H(CLS) is left.

    Returns:
        weights [n], float32; they still have to be divided by batch size × number of pairs of views.
    """
    if loss == "cls":
        return is_cls.float()
    if loss == "mean":
        return 1 / run_length.float()
    if loss == "sum":
        return torch.ones_like(run_length, dtype=torch.float32)
    if loss == "lambda":
        return torch.where(is_cls, lambda_cls, (1 - lambda_cls) / (run_length - 1).clamp(min=1).float())
    raise ValueError(f"unknown loss {loss!r}, expected one of {', '.join(LOSSES)}")


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
        loss: "cls", "mean", "sum" or "lambda".
        lambda_cls: λ of "lambda", in [0, 1].
        center: "position" keeps a center for every token position, [1+P, K], as the authors' code does; "shared" one
            for all tokens, [1, K], as Algorithm 1 says. The loss "cls" always has one.
        student_temp: τ_s.
        center_momentum: share of the old center in the new one.

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
        positions = 1 + grid_tokens if center == "position" and loss != "cls" else 1
        self.register_buffer("center", torch.zeros(positions, out_dim))

    def weights(self, is_cls, run_length, view_pairs):
        """Return the weights [n] of the matched token pairs in the loss of a batch.

        Args:
            is_cls, run_length: see `pair_weights`.
            view_pairs: batch size × number of pairs of views of an image.
        """
        return pair_weights(self.loss, is_cls, run_length, self.lambda_cls) / view_pairs

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
    ):
        """Return the loss of a batch; in training mode also update the center, for the next batch.

        Args:
            student_z: [Ns, D] bottleneck vectors of the student's matched tokens.
            teacher_z: [Nt, D] of the teacher's; no gradient flows into them.
            student_prototypes, teacher_prototypes: [K, D].
            pairs: (teacher_idx [n], student_idx [n], weight [n], image [n]): rows of teacher_z and student_z that are
                matched, the weight of each match, and the image that it belongs to.
            teacher_position: [Nt] token position of each teacher row, 0 is CLS.
            teacher_mean_z: [1+P, D] mean over batch and global views of the teacher's bottleneck vectors at each
                position, matched or not. The loss "cls" uses row 0 alone.
            teacher_temp: τ_t.

        With prototypes = identity (D = K) the vectors are the logits.
        """
        teacher_idx, student_idx, weight, _ = pairs
        teacher_logits = F.linear(teacher_z.detach(), teacher_prototypes.detach())
        student_logits = F.linear(student_z, student_prototypes)
        # Distributions in full precision: the targets of a token have to sum to its weight.
        with torch.autocast(student_z.device.type, enabled=False):
            dtype = torch.promote_types(student_logits.dtype, torch.float32)
            center = self.center[teacher_position] if len(self.center) > 1 else self.center
            targets = ((teacher_logits.to(dtype) - center) / teacher_temp).softmax(-1)  # [Nt, K]
            logits = student_logits.to(dtype) / self.student_temp  # [Ns, K]
            # Σ w·H(t, s) = Σ w·logsumexp(s) - Σ_k (Σ w·t)_k s_k: a student token's targets add up to one mixture.
            weight = weight.to(dtype)
            mix = torch.sparse_coo_tensor(
                torch.stack([student_idx, teacher_idx]), weight, (len(logits), len(targets)), check_invariants=False
            )
            mixture = torch.sparse.mm(mix, targets)  # [Ns, K]
            token_weight = logits.new_zeros(len(logits)).index_add(0, student_idx, weight)
            loss = token_weight @ logits.logsumexp(-1) - (mixture * logits).sum()
            if self.training:
                self.update_center(teacher_mean_z, teacher_prototypes)
        return loss

    @torch.no_grad()
    def update_center(self, teacher_mean_z, teacher_prototypes):
        """Move the center towards the mean of the teacher's logits, over all processes."""
        mean_z = all_reduce_mean(teacher_mean_z.detach().to(self.center.dtype, copy=True))
        if len(self.center) == 1:
            mean_z = mean_z[:1] if self.loss == "cls" else mean_z.mean(0, keepdim=True)
        mean_logits = F.linear(mean_z, teacher_prototypes.to(mean_z.dtype))
        self.center.lerp_(mean_logits, 1 - self.center_momentum)
