import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import main_lgssl
import plot_runs
from losses import LocalGlobalLoss, plain_loss
from patch_matching import match_views
from studies import causes
from studies.runs import Place
from vision_transformer import BackboneWithHead, DINOHead, TokenOutput

TINY = """--arch vit_micro --patch_size 8 --image_size 40 --global_crops_size 32 --local_crops_size 16 --epochs 1
    --local_crops_number 1 --out_dim 24 --head_hidden_dim 32 --batch_size_per_gpu 6 --num_workers 0 --geometry batch
    --use_bn_in_head true --lr 0.05 --warmup_epochs 0""".split()
OBSERVED = {"train_cls_gradient", "train_patch_gradient", "train_patch_knn_top1"}


@pytest.mark.parametrize("loss", ["cls", "mean"])
def test_observing_changes_no_bit_of_the_training(photo_folder, tmp_path, monkeypatch, loss):
    monkeypatch.setattr(causes, "PROBE_EVERY", 2)
    logs, checkpoints = [], []
    for name, train in (("plain", main_lgssl.main), ("observed", lambda words: causes.train(words, apart=False))):
        folder = tmp_path / name
        train([*TINY, "--loss", loss, "--data_path", str(photo_folder), "--output_dir", str(folder)])
        logs.append(json.loads((folder / "log.txt").read_text()))
        checkpoints.append(torch.load(folder / "checkpoint.pth", weights_only=True))
    assert logs[1].keys() - logs[0].keys() == OBSERVED
    assert {name: value for name, value in logs[1].items() if name not in OBSERVED} == logs[0]
    assert (logs[1]["train_patch_gradient"] > 0) == (loss == "mean")
    for part in ("student", "teacher", "loss", "optimizer"):
        torch.testing.assert_close(*(checkpoint[part] for checkpoint in checkpoints), rtol=0, atol=0)


@pytest.mark.parametrize("loss", ["mean", "lambda"])
@pytest.mark.parametrize("head", ["shared", "apart", "separate"])
def test_gradients_of_cls_features_are_those_of_the_plain_formula(loss, head):
    """Two global views of 2×2 patches, a local one of 1×2, three images."""
    torch.manual_seed(0)
    boxes = [[[0, 0, 32, 32]], [[8, 0, 32, 32]], [[0, 0, 16, 32]]]
    grids = [(2, 2), (2, 2), (1, 2)]
    matches = match_views(boxes, [[False], [True], [False]], grids, 3)
    student = BackboneWithHead(nn.Identity(), DINOHead(6, 7, True, True, 16, 5, patch_mlp=head == "separate")).double()
    if head == "apart":
        causes.share_mlp(SimpleNamespace(student=student, teacher=student))
    outputs = [torch.randn(n, tokens, 6, dtype=torch.float64, requires_grad=True) for n, tokens in ((6, 5), (3, 3))]
    student.encode = lambda views: outputs
    student_out = student([], matches.student_row, matches.student_kinds())
    criterion = LocalGlobalLoss(7, 4, loss, lambda_cls=0.3).double()
    criterion.center += torch.randn(5, 7)
    z = F.normalize(torch.randn(len(matches.teacher_row), 5, dtype=torch.float64), dim=1)
    prototypes, scale = torch.randn(7, 5, dtype=torch.float64), torch.ones(7, dtype=torch.float64)
    teacher_out = TokenOutput(z, prototypes, scale, None, z.new_zeros(5, 5))
    value = criterion(student_out, teacher_out, matches, 0.2)

    student_logits = student_out.bottleneck @ (student_out.scale[:, None] * student_out.prototypes).T
    terms, pairs = {True: torch.zeros(()), False: torch.zeros(())}, 3 * 4  # images × pairs of views
    for m, j in (matches.num_matched > 0).nonzero():
        t, n = matches.teacher_idx[m, j], int(matches.num_matched[m, j])
        position = int(matches.teacher_position[t])
        weight = 1 / n if loss == "mean" else 0.3 if position == 0 else 0.7 / (n - 1)
        term = plain_loss(student_logits[j], (z @ prototypes.T)[t], weight, criterion.center[position], 0.2)
        terms[position == 0] = terms[position == 0] + term / pairs
    assert value.item() == pytest.approx(sum(terms.values()).item(), rel=1e-6)  # weights are fp32
    expected = []
    for term in terms.values():
        gradients = torch.autograd.grad(term, outputs, retain_graph=True)
        expected.append(math.sqrt(sum(float(x[:, 0].square().sum()) for x in gradients)))
    found = causes.cls_gradients(value, student_out.bottleneck, outputs, matches)
    assert found == pytest.approx(expected, rel=1e-6)
    assert found[0] > 0
    assert (found[1] > 1e-6) if head == "shared" else (found[1] == 0)


def test_statistics_apart_have_the_weights_of_a_shared_head():
    def networks(*words):
        args = main_lgssl.parse_arguments([*TINY, *words, "--dataset", "digits"])
        return main_lgssl.build_networks(args)[:2]

    shared, apart = networks(), networks("--patch_head", "separate")
    causes.share_mlp(SimpleNamespace(student=apart[0], teacher=apart[1]))
    for ours, theirs in zip(apart, shared, strict=True):
        torch.testing.assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()), rtol=0, atol=0)
    tokens, kinds = torch.randn(20, 96) + 1, (torch.arange(0, 20, 5), torch.arange(20)[torch.arange(20) % 5 > 0])
    hidden = F.linear(tokens, shared[0].head.mlp[0].weight)
    z = {head: student.head(tokens, kinds) for head, (student, _) in (("shared", shared), ("apart", apart))}
    torch.testing.assert_close(z["apart"][kinds[0]], F.normalize(networks()[0].head.mlp(tokens[kinds[0]]), dim=1))
    assert (z["apart"] - z["shared"]).abs().max() > 0.01
    # momentum 0.1, once for all tokens or once for each kind
    mean, (of_cls, of_patches) = hidden.mean(0), (hidden[index].mean(0) for index in kinds)
    torch.testing.assert_close(shared[0].head.mlp[1].running_mean, 0.1 * mean)
    torch.testing.assert_close(apart[0].head.mlp[1].running_mean, 0.09 * of_cls + 0.1 * of_patches)


def test_finished_runs_are_drawn_and_not_trained_again(tmp_path, monkeypatch):
    """Older logs lack the values of patches."""
    trained = []

    def train(words, apart):
        args = main_lgssl.parse_arguments(words)
        trained.append((args.loss, args.patch_head, apart, args.use_bn_in_head, args.geometry, args.seed, args.epochs))
        folder = tmp_path / "causes" / f"{row}-{args.seed}"
        folder.mkdir(parents=True)
        lines = [{"epoch": epoch, "train_entropy_share": 0.5, "knn_top1": 70.0 + args.seed} for epoch in range(2)]
        lines[1]["train_cls_gradient"] = 0.1
        (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(causes, "train", train)
    place = Place(tmp_path, extra=["--epochs", "2"])
    for row in ("dino", "lambda0.5-apart", "dino"):
        causes.show_causes([row], 2, place, str(tmp_path / "causes.png"))
    of_rows = [("cls", "shared", False), ("lambda", "separate", True)]
    assert trained == [(*of_row, True, "batch", seed, 2) for of_row in of_rows for seed in range(2)]
    runs = plot_runs.read_curves(tmp_path / "causes.csv", causes.NAMES)
    assert [run.name for run in runs] == ["dino --epochs 2"] * 2 + ["lambda0.5-apart --epochs 2"] * 2
    assert [run.seed for run in runs] == ["0", "1"] * 2
    assert runs[1].curves["knn_top1"] == {1: 71.0, 2: 71.0}
    assert runs[1].curves["patch_gradient"] == {}
    assert (tmp_path / "causes.png").read_bytes().startswith(b"\x89PNG")
