"""Why the teacher's CLS outputs become uniform on digits if patches share the head with CLS.

With batch norm in the head, DINO does not collapse on digits. If the head also sees the matched patches, its batch norm
normalizes CLS by the statistics of a mixture that is mostly patches. The rows compare a shared head with one that only
keeps the statistics of CLS and patches apart, and with an MLP of its own for patches.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import main_lgssl
import plot_runs
from patch_matching import Matches
from studies.rows import DIGITS, STUDIES
from studies.runs import PRETRAINING, Place, commands, keep_curves
from support.files import make_folder
from utils import UserError
from vision_transformer import TokenOutput

APART = "-apart"
HEADS = {"": "shared head", APART: "statistics apart", "-separate": "two heads"}
LOSSES = ("mean", "lambda0.5")
ROWS = {
    loss + head: DIGITS[loss]._replace(
        label=f"{DIGITS[loss].label}, {text}",
        options=f"{DIGITS[loss].options} --patch_head {'separate' if head else 'shared'}",
    )
    for loss in LOSSES
    for head, text in HEADS.items()
}
CAUSES = replace(
    STUDIES["digits"], name="causes", data="--dataset digits --knn_every 2", rows={"dino": DIGITS["dino"], **ROWS}
)
PROBE_EVERY = 10  # steps between two measurements of gradients
PANELS = {  # logged value: panel of the figure, for CLS and for patches
    "knn_top1": "knn_top1, CLS",
    "patch_knn_top1": "knn_top1, mean of patches",
    "entropy_share": "entropy_share, CLS",
    "patch_entropy_share": "entropy_share, patches",
    "output_information": "output_information, CLS",
    "patch_information": "output_information, patches",
    "cls_gradient": "gradient, from CLS terms",
    "patch_gradient": "gradient, from patch terms",
}
NAMES = list(PANELS)


def show_causes(rows: Sequence[str], seeds: int, place: Place, output: str) -> None:
    """Train the rows that are not in `causes.csv` yet, and draw them.

    Args:
        place: where `causes.csv` and the folders of the runs are.
        output: the figure, PNG or PDF.

    Raises:
        UserError: a run was stopped, or a file cannot be read or written.
    """
    from support import figures  # imports matplotlib, which the other studies do not need

    figures.check_output(output)
    make_folder(place.runs, "--runs")
    path = place.runs / "causes.csv"
    labels = {row: " ".join([row, *place.extra]) for row in rows}
    done = {(run.name, run.seed) for run in plot_runs.read_curves(path, NAMES)} if path.exists() else set()
    for seed, (row, label) in itertools.product(range(seeds), labels.items()):
        if (label, str(seed)) not in done:
            train(commands(CAUSES, row, seed, place)[PRETRAINING][1:], apart=row.endswith(APART))
            keep_curves(path, label, seed, plot_runs.read_run(place.folder(CAUSES, row, seed), NAMES))
    runs = plot_runs.settings(plot_runs.read_curves(path, NAMES))
    blue, orange, *_, black = figures.LINE_COLORS
    of_losses = itertools.product((blue, orange), figures.LINE_STYLES[: len(HEADS)])
    looks = dict(zip(CAUSES.rows, [(black, "-"), *of_losses], strict=True))
    curves = {
        CAUSES.rows[row].label: {
            panel: plot_runs.mean_curve([run.curves[name] for run in runs[label]]) for name, panel in PANELS.items()
        }
        for row, label in labels.items()
    }
    panels = list(PANELS.values())
    pairs = list(zip(panels[::2], panels[1::2], strict=True))
    figures.save([figures.draw_curves(curves, pairs, [looks[row] for row in labels])], output)
    print(f"drawn in {output}; gradients of 0 are not drawn")


def train(words: list[str], apart: bool) -> None:
    """Train as main_lgssl.py does with the options `words`, with further values in the log, see `observe`.

    Args:
        apart: whether batch norm in the head keeps statistics of CLS and patches apart, see `share_mlp`.

    Raises:
        UserError: the run was stopped.
    """

    def prepare(run: main_lgssl.Run) -> None:
        if apart:
            share_mlp(run)
        observe(run)

    if main_lgssl.main(words, prepare):
        raise UserError("the run was stopped: run this command again")


def share_mlp(run: main_lgssl.Run) -> None:
    """Let a head that was built with two MLPs have one, called once for CLS and once for patches.

    In training, batch norm then normalizes each kind by its own statistics. The weights are those of a shared head with
    the same seed, and the checkpoint is that of two MLPs that are equal. The optimizer skips the second MLP, which gets
    no gradient.
    """
    for network in (run.student, run.teacher):
        network.head.patch_mlp = network.head.mlp


def observe(run: main_lgssl.Run) -> None:
    """Add values to the log of a run, which otherwise trains as without them.

    - train_cls_gradient, train_patch_gradient: `cls_gradients` of the student, the mean over the measured steps.
    - train_patch_knn_top1: online k-NN of the mean of the teacher's patch tokens, whenever that of CLS is due.
    """
    student, criterion, meters, report, online_knn = run.student, run.criterion, run.meters, run.report, run.online_knn
    assert report
    encode, compute_loss, report_epoch = student.encode, criterion.forward, report.epoch
    outputs: list[Tensor] = []
    steps = itertools.count(run.start_step)

    def encode_and_keep(views: Sequence[Tensor]) -> list[Tensor]:
        outputs[:] = encode(views)
        return outputs

    def compute_and_measure(
        student_out: TokenOutput, teacher_out: TokenOutput, matches: Matches, teacher_temp: float
    ) -> Tensor:
        loss = compute_loss(student_out, teacher_out, matches, teacher_temp)
        if next(steps) % PROBE_EVERY == 0:
            norms = cls_gradients(loss, student_out.bottleneck, outputs, matches)
            for name, norm in zip(("cls_gradient", "patch_gradient"), norms, strict=True):
                total, count = meters.epoch.get(name, (0.0, 0))
                meters.epoch[name] = total + norm, count + 1
        return loss

    def mean_of_patches(images: Tensor) -> Tensor:
        return run.teacher.backbone(images)[:, 1:].mean(1, keepdim=True)  # instead of CLS

    def report_more(epoch: int, step: int, means: dict[str, float], evaluated: Mapping[str, float]) -> None:
        top1 = online_knn(mean_of_patches, run.process.device) if online_knn and "knn_top1" in evaluated else None
        if top1 is not None:
            means = {**means, "patch_knn_top1": top1}
        report_epoch(epoch, step, means, evaluated)

    student.encode, criterion.forward, report.epoch = encode_and_keep, compute_and_measure, report_more  # type: ignore


def cls_gradients(loss: Tensor, bottleneck: Tensor, outputs: Sequence[Tensor], matches: Matches) -> tuple[float, float]:
    """Return the norms of the gradient of the CLS features: of the CLS terms of the loss, and of its patch terms.

    A term of the loss depends on a single student token. So the gradient of the CLS terms is that of the loss,
    restricted to the CLS tokens at the output of the head, and likewise for patches. Only statistics of batch norm lead
    from a patch to CLS.

    Args:
        loss: 0-d tensor. Its graph is kept.
        bottleneck: [Ns, bottleneck_dim], output of the student's head.
        outputs: tokens [n, 1+P, D] of the student's backbone, one tensor per view size.
        matches: of the batch.
    """
    (gradient,) = torch.autograd.grad(loss, bottleneck, retain_graph=True)
    norms = []
    for index in matches.student_kinds():
        of_kind = torch.zeros_like(gradient).index_copy(0, index, gradient[index])
        of_outputs = torch.autograd.grad(bottleneck, outputs, of_kind, retain_graph=True)
        norms.append(torch.cat([x[:, 0] for x in of_outputs]).norm().item())
    return norms[0], norms[1]
