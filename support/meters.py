"""Metrics of a training step, and their accumulation between reports."""

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from losses import LocalGlobalLoss
from patch_matching import Matches
from utils import Process, UserError, all_gather, start_all_reduce_mean, warn
from vision_transformer import TokenOutput

SAMPLE = 8  # number of images per batch whose outputs over all K prototypes are measured
MAX_PATCHES = 64  # number of their patches


class Meters:
    """Accumulates the metrics of one process: over the steps since the last report, and over the reports of an epoch.

    Checkpoints hold the meters, so that a resumed run reports what an uninterrupted one would. Adding does not wait for
    the device.

    Args:
        process: rank and device of this process.
        precision: "fp16" may skip steps.
        max_matched: last bin of the histogram of matched patches; larger numbers are counted in it.
        max_bad_images: number of unreadable images to tolerate.
    """

    # The fp16 scaler starts at 2^16 and halves its scale at each skipped step: after 30 the scale is 2^-14.
    MAX_SKIPPED = 30

    def __init__(self, process: Process, precision: str, max_matched: int, max_bad_images: int = 0):
        self.rank, _, device = process
        self.fp16, self.max_bad_images = precision == "fp16", max_bad_images
        self.loss = torch.zeros((), device=device)  # sum since the last report
        self.matched = torch.zeros((), device=device)  # matched patches per pair of views, sum since the last report
        self.steps = 0
        self.skipped = torch.zeros(2, device=device)  # skipped steps: since the last report, consecutive
        # First step with a non-finite loss, first step with a non-finite gradient, index of its parameter
        self.bad = torch.full((3,), math.inf, device=device)
        self.epoch: dict[str, tuple[float, int]] = {}  # sum over the steps of the epoch, number of steps
        # matched_counts[n]: number of pairs of views with n matched patches in this epoch
        self.matched_counts = torch.zeros(1 + max_matched, dtype=torch.float64, device=device)
        self.bad_images: dict[int, str] = {}  # error message by sample index, of all processes
        self.new_bad_images: dict[int, str] = {}  # of this process, since the last report

    def add(self, loss: torch.Tensor, matches: Matches, bad_images: dict[int, str], accum_steps: int = 1) -> None:
        """Add a micro-batch.

        Args:
            loss: 0-d tensor, the loss of the micro-batch divided by `accum_steps`.
            matches: matches of the micro-batch.
            bad_images: error message by sample index.
            accum_steps: number of micro-batches per step.
        """
        self.loss += loss
        self.new_bad_images |= bad_images
        is_cls = matches.is_cls()
        matched = (matches.num_matched - 1) * is_cls  # [M, Ns] matched patches, at one entry per pair of views
        self.matched += matched.sum() / is_cls.sum() / accum_steps
        counts = is_cls.flatten().to(self.matched_counts.dtype)
        self.matched_counts.scatter_add_(0, matched.flatten().clamp(max=len(self.matched_counts) - 1), counts)

    def end_step(self, step: int, norms: torch.Tensor) -> None:
        """Record whether the loss or a gradient is not finite; `norms` are the gradient norms of the parameters."""
        is_bad = ~norms.isfinite()
        any_bad = is_bad.any()
        self.skipped = torch.stack([self.skipped[0] + any_bad, (self.skipped[1] + 1) * any_bad])
        here = torch.stack([~self.loss.isfinite(), any_bad & (not self.fp16)])
        first = torch.where(here, float(step), math.inf)
        parameter = torch.where(self.bad[1].isinf() & here[1], is_bad.float().argmax(), self.bad[2])
        self.bad = torch.cat([torch.minimum(self.bad[:2], first), parameter[None]])
        self.steps += 1

    def stop_at_bad_step(self, network: torch.nn.Module) -> None:
        """Raise UserError on all processes if one had a loss or gradient that is not finite. A collective call.

        Args:
            network: network of the parameters whose gradient norms were recorded.
        """
        records = all_gather(torch.cat([self.bad, self.skipped[1:]])).tolist()
        step, kind, rank = min((bad[kind], kind, rank) for rank, bad in enumerate(records) for kind in (0, 1))
        if step < math.inf:
            what = "the loss"
            if kind == 1:
                trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
                what = f"the gradient of {trained[int(records[rank][2])]}"
            ranks = [rank for rank, bad in enumerate(records) if bad[kind] == step]
            where = f" on rank {', '.join(map(str, ranks))}" if dist.is_initialized() else ""
            raise UserError(f"{what} is not finite at step {step:.0f}{where}; the weights were not saved")
        consecutive = max(record[3] for record in records)
        if self.fp16 and consecutive >= self.MAX_SKIPPED:
            raise UserError(
                f"fp16 skipped the last {consecutive:.0f} steps: gradients were not finite at any scale; "
                "the weights were not saved: use a lower --lr or --precision bf16"
            )

    def end_interval(self, values: dict[str, torch.Tensor]) -> dict[str, float | None]:
        """Return the means since the last report over all processes, with None for a mean that is not finite.

        Args:
            values: 0-d tensors of the last step, to be averaged over the processes.
        """
        count = torch.full_like(self.loss, self.steps)  # new_tensor would wait for the device
        values = {"loss": self.loss / count, "matched_patches": self.matched / count, **values}
        if self.fp16:
            values["skipped_share"] = self.skipped[0] / count
        means = start_all_reduce_mean(torch.stack([value.float() for value in values.values()]))().tolist()
        finite = {name: mean if math.isfinite(mean) else None for name, mean in zip(values, means, strict=True)}
        for name, mean in finite.items():
            if mean is not None:
                total, steps = self.epoch.get(name, (0.0, 0))
                self.epoch[name] = (total + mean * self.steps, steps + self.steps)
        self.loss, self.matched = torch.zeros_like(self.loss), torch.zeros_like(self.matched)
        self.skipped = torch.stack([torch.zeros_like(self.skipped[0]), self.skipped[1]])
        self.steps = 0
        return finite

    def share_bad_images(self) -> None:
        """Exchange the unreadable images of all processes. A collective call.

        Raises:
            UserError: there are too many.
        """
        gathered: list[Any] = [self.new_bad_images]
        if dist.is_initialized():
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, self.new_bad_images)
        for i, message in sorted(item for bad in gathered for item in bad.items()):
            if i not in self.bad_images and self.rank == 0:
                warn(f"{message}; the next image is used instead")
            self.bad_images[i] = message
        self.new_bad_images = {}
        if len(self.bad_images) > self.max_bad_images:
            allowed = f"more than the {self.max_bad_images} that --max_bad_images allows"
            first = next(iter(self.bad_images.values()))
            raise UserError(f"{len(self.bad_images)} images cannot be read, {allowed}; the first: {first}")

    def end_epoch(self) -> tuple[dict[str, float], torch.Tensor]:
        """Return (means, matched_counts) of an epoch and start the next one.

        The means are over the steps of the epoch's reports. The counts are those of this process, on the CPU.
        """
        means = {name: total / steps for name, (total, steps) in self.epoch.items()}
        counts, self.matched_counts = self.matched_counts.cpu(), torch.zeros_like(self.matched_counts)
        self.epoch = {}
        return means, counts

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all processes. A collective call."""
        numbers = [self.loss, *self.skipped, self.matched, self.loss.new_tensor(self.steps)]
        interval = all_gather(torch.cat([torch.stack([x.double() for x in numbers]), self.matched_counts])).cpu()
        return {"interval": interval, "epoch": dict(self.epoch), "bad_images": dict(self.bad_images)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of this process."""
        own = state_dict["interval"][self.rank].to(self.loss.device)
        self.loss, self.skipped = own[0].to(self.loss.dtype), own[1:3].to(self.skipped.dtype)
        self.matched, self.steps = own[3].to(self.matched.dtype), int(own[4])
        self.matched_counts.copy_(own[5:])
        self.epoch = {str(name): (float(total), int(steps)) for name, (total, steps) in state_dict["epoch"].items()}
        self.bad_images = {int(i): str(message) for i, message in state_dict["bad_images"].items()}


@torch.no_grad()
def measure(
    student_out: TokenOutput,
    teacher_out: TokenOutput,
    matches: Matches,
    criterion: LocalGlobalLoss,
    teacher_temp: float,
) -> dict[str, torch.Tensor]:
    """Return metrics that distinguish healthy training from collapse, of one batch.

    Args:
        student_out, teacher_out, matches: as for `criterion`.
        criterion: the loss, before its center is updated.
        teacher_temp: τ_t.

    Returns:
        0-d tensors. Of the CLS tokens of the first SAMPLE images:
            teacher_entropy: mean entropy of the teacher's outputs, in nats.
            entropy_share: teacher_entropy / ln K.
            output_information: mutual information between image and teacher output, in nats; 0 if all outputs are
                equal.
            kl: KL divergence of the student's output from the teacher's, averaged over pairs of views, in nats.
        Of at most MAX_PATCHES matched patches of these images, unless the loss is that of CLS; NaN if none is matched:
            patch_entropy_share: as entropy_share.
            patch_information: mutual information between patch and teacher output, in nats.
        Of the whole batch:
            center_norm: L2 norm of the center of CLS.
            cls_cosine: mean cosine between the teacher's CLS features of different images.
    """
    # Tokens are sorted by image: those of the first images come first.
    sample = slice(int(matches.student_count[:SAMPLE].sum()))
    is_cls = matches.is_cls()[:, sample]
    pairs = torch.stack([matches.teacher_idx[:, sample][is_cls], is_cls.nonzero()[:, 1]])
    (teacher_rows, teacher_of), (student_rows, student_of) = (row.unique(return_inverse=True) for row in pairs)

    def logits(out: TokenOutput, rows: torch.Tensor) -> torch.Tensor:
        return out.bottleneck[rows].float() @ out.prototypes.float().T * out.scale

    def entropies_and_information(log_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the entropy of each distribution and the mutual information: log-probabilities [n, K] -> [n], []."""
        entropies, mean = -(log_t.exp() * log_t).sum(1), log_t.exp().mean(0)
        return entropies, -(mean * mean.clamp(min=1e-30).log()).sum() - entropies.mean()

    images = len(matches.teacher_count)
    features = F.normalize(teacher_out.cls_features[:images].float())  # first global view
    with torch.autocast(features.device.type, enabled=False):
        log_t = F.log_softmax((logits(teacher_out, teacher_rows) - criterion.center[0]) / teacher_temp, dim=1)
        log_s = F.log_softmax(logits(student_out, student_rows) / criterion.student_temp, dim=1)
        entropies, information = entropies_and_information(log_t)
        cross = -(log_t.exp() @ log_s.T)[teacher_of, student_of]  # log_t: [≤ 2 SAMPLE, K]
        kl = (cross - entropies[teacher_of]).mean()
        of_patches = {}
        if criterion.loss != "cls":
            position = matches.teacher_position[: int(matches.teacher_count[:SAMPLE].sum())]
            rows = position.nonzero()[:, 0]
            rows = rows[:: math.ceil(len(rows) / MAX_PATCHES) or 1]
            center = criterion.center[position[rows] if len(criterion.center) > 1 else 0]
            log_p = F.log_softmax((logits(teacher_out, rows) - center) / teacher_temp, dim=1)
            patch_entropies, patch_information = entropies_and_information(log_p)
            of_patches = {
                "patch_entropy_share": patch_entropies.mean() / math.log(log_p.shape[1]),
                "patch_information": patch_information,
            }
    n = len(features)
    cosine = (features.sum(0).square().sum() - n) / (n * (n - 1)) if n > 1 else features.new_tensor(math.nan)
    return {
        "teacher_entropy": entropies.mean(),
        "entropy_share": entropies.mean() / math.log(log_t.shape[1]),
        "output_information": information,
        "kl": kl,
        **of_patches,
        "center_norm": criterion.center[0].norm(),
        "cls_cosine": cosine,
    }
