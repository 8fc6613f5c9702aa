"""The health of a training: what shows a collapse, and the warning once it has lasted.

DINO-like methods fail in two ways: the teacher gives every image the uniform distribution, and the loss stays at ln K,
or it gives every image the same other one. Sharpening works against the first and centering against the second.
"""

import math

import torch
import torch.nn.functional as F

SAMPLE = 8  # images whose outputs over all K prototypes are looked at
PATIENCE = 50  # reports in a row
WATCH_FROM = 2000  # step; before, and in the warm-up, outputs are alike anyway

# name: (sign of it in the values of `measure`, what to say)
COLLAPSES = {
    "uniform outputs": (
        lambda v: v["entropy_share"] > 0.99,
        "the teacher's outputs for CLS have {entropy_share:.1%} of the largest entropy, ln K. DINO's loss stays at it; "
        "the other losses may go on learning by patches. Usual cures: a lower --warmup_teacher_temp and "
        "--teacher_temp, a lower --momentum_teacher for small data, another --lr, --use_bn_in_head true",
    ),
    "one output for all images": (
        lambda v: v["entropy_share"] <= 0.99 and v["output_information"] < 0.05,
        "the teacher's outputs for CLS tell images apart by {output_information:.3f} nats. Usual cures: a higher "
        "--warmup_teacher_temp and --teacher_temp, a lower --lr, a longer --freeze_last_layer, --norm_last_layer true",
    ),
    "features all alike": (
        lambda v: v["cls_cosine"] > 0.999,
        "the mean cosine between CLS features of different images is {cls_cosine:.4f}. Usual cures: a lower --lr, a "
        "longer --warmup_epochs, a smaller --clip_grad, a larger batch",
    ),
}


@torch.no_grad()
def measure(
    teacher, crops, student_z, teacher_z, student_prototypes, teacher_prototypes, table, loss_function, temperature
):
    """Return what tells a healthy training from a collapsed one, of one batch, as a dictionary of 0-d tensors.

    Args:
        teacher: BackboneWithHead.
        crops: normalised pixels [2B, 3, S, S] of the global views, the first B being one of each image. All of them go
            through the backbone, as in the training: another size would be compiled anew.
        student_z, teacher_z, student_prototypes, teacher_prototypes: as `batch_loss` has them; prototypes are pairs
            (weights [K, D], scale [K]).
        table: MatchTable.
        loss_function: LocalGlobalLoss, before it moves the center.
        temperature: τ_t.

    Returns, in nats, over the CLS tokens of up to SAMPLE images:
        teacher_entropy: mean entropy of the teacher's outputs.
        entropy_share: the same as a share of ln K.
        output_information: by how much the entropy of their mean is larger; 0 where all images have one output.
        kl: KL divergence of the student's output from the teacher's, mean over pairs of views.
        center_norm: length of the center of CLS.
        cls_cosine: mean cosine between the teacher's CLS features of different images of the batch.
    """
    is_sample = (table.teacher_position[table.teacher_idx] == 0) & (table.image < SAMPLE)
    pairs = torch.stack([table.teacher_idx[is_sample], table.student_idx[is_sample]]).to(teacher_z.device)
    (teacher_rows, teacher_of), (student_rows, student_of) = (row.unique(return_inverse=True) for row in pairs)

    def logits(z, weights, scale):
        return z.float() @ weights.float().T * scale

    features = F.normalize(teacher.backbone(crops)[: len(crops) // 2, 0].float())
    with torch.autocast(teacher_z.device.type, enabled=False):
        teacher_logits = logits(teacher_z[teacher_rows], *teacher_prototypes)
        log_t = F.log_softmax((teacher_logits - loss_function.center[0]) / temperature, dim=1)  # [≤ 2 SAMPLE, K]
        log_s = F.log_softmax(logits(student_z[student_rows], *student_prototypes) / loss_function.student_temp, dim=1)
        t = log_t.exp()
        entropies = -(t * log_t).sum(1)
        entropy = entropies.mean()
        mean_t = t.mean(0)
        information = -(mean_t * mean_t.clamp(min=1e-30).log()).sum() - entropy
        cross = -(t @ log_s.T)[teacher_of, student_of]
        kl = (cross - entropies[teacher_of]).mean()
    n = len(features)
    cosine = (features.sum(0).square().sum() - n) / (n * (n - 1)) if n > 1 else features.new_tensor(math.nan)
    return {
        "teacher_entropy": entropy,
        "entropy_share": entropy / math.log(t.shape[1]),
        "output_information": information,
        "kl": kl,
        "center_norm": loss_function.center[0].norm(),
        "cls_cosine": cosine,
    }


class CollapseWatch:
    """Counts the reports in a row that show a kind of collapse, and warns once it has lasted."""

    def __init__(self, patience=PATIENCE):
        self.patience, self.counts = patience, dict.fromkeys(COLLAPSES, 0)

    def __call__(self, values):
        """Return the warnings after a report with these values, one line each."""
        warnings = []
        known = {key: math.nan if value is None else value for key, value in values.items()}
        for name, (is_sign, text) in COLLAPSES.items():
            self.counts[name] = self.counts[name] + 1 if is_sign(known) else 0
            if self.counts[name] == self.patience:
                lasted = f"collapse: {name} in {self.patience} reports in a row"
                warnings.append(f"{lasted}: {text.format(**values)}")
        return warnings
