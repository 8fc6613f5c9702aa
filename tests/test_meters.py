import math

import pytest
import torch

from augment import MultiCrop, normalize
from losses import LocalGlobalLoss
from patch_matching import match_views
from support.loader import ViewBatches
from support.meters import Meters, measure
from utils import Process, UserError
from vision_transformer import BackboneWithHead, DINOHead, Teacher, vit_micro

PROCESS = Process(0, 1, torch.device("cpu"))


@pytest.mark.parametrize(("rule", "center"), [("paper", "position"), ("paper", "shared"), (None, "position")])
def test_quantities_are_those_of_a_naive_computation(rule, center):
    torch.manual_seed(0)
    images = [(torch.randint(0, 256, (48, 48, 3), dtype=torch.uint8).numpy(), 0) for _ in range(10)]
    student = BackboneWithHead(vit_micro(8, img_size=32), DINOHead(96, 24)).eval()
    teacher = Teacher(vit_micro(8, img_size=32), DINOHead(96, 24), average_patches=rule is not None)
    batches = ViewBatches(images, MultiCrop(global_size=32, local_size=16, local_number=2), 8, rule, 0)
    crops, _, matches, *_ = batches[0, 0, list(range(10))]
    crops = [normalize(crop) for crop in crops]
    criterion = LocalGlobalLoss(24, 16, "mean" if rule else "cls", center=center)
    criterion.center.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        teacher_out, student_out = teacher(crops[:1], matches.teacher_row), student(crops, matches.student_row)
        found = measure(student_out, teacher_out, matches, criterion, 0.05)

        def outputs(network, crop, center, temperature, token=0):
            z, weights, scale, *_ = BackboneWithHead.forward(network, [crop])
            logits = z.unflatten(0, (len(crop), -1))[:, token].double() @ (scale[:, None] * weights).T.double()
            return ((logits - center) / temperature).softmax(-1)

        views = [*crops[0].split(10), *crops[1].split(10)]  # two global, two local
        t = [outputs(teacher, view, criterion.center[0], 0.05)[:8] for view in views[:2]]
        s = [outputs(student, view, 0, 0.1)[:8] for view in views]
        features = teacher.backbone(views[0])[:, 0].double()
        centers = criterion.center.expand(17, -1)
        tokens = [outputs(teacher, view, centers[p], 0.05, p) for view in views[:2] for p in range(17)]
        if not rule:  # no patch is matched
            without = measure(student_out, teacher_out, matches, LocalGlobalLoss(24, 16, "mean"), 0.05)
            assert without["patch_entropy_share"].isnan()
            assert without["patch_information"].isnan()
    every = torch.cat(t)
    entropy = -(every * every.log()).sum(1).mean()
    kl = torch.stack(
        [(t[i] * (t[i].log() - s[j].log())).sum(1).mean() for i in range(2) for j in range(4) if i != j]
    ).mean()
    pairs = [
        torch.nn.functional.cosine_similarity(features[a], features[b], dim=0)
        for a in range(10)
        for b in range(10)
        if a != b
    ]
    mean = every.mean(0)
    expected = {
        "teacher_entropy": entropy,
        "entropy_share": entropy / math.log(24),
        "output_information": -(mean * mean.log()).sum() - entropy,
        "kl": kl,
        "center_norm": criterion.center[0].norm(),
        "cls_cosine": torch.stack(pairs).mean(),
    }
    if rule:
        rows = matches.teacher_row[: matches.teacher_count[:8].sum()]  # of the first view, 10 images of 17 tokens, then
        rows = rows[rows % 17 > 0]
        view, image, position = rows // 170, rows // 17 % 10, rows % 17
        listed = zip(view.tolist(), image.tolist(), position.tolist(), strict=True)
        patches = torch.stack([tokens[17 * v + p][b] for v, b, p in listed])[:: math.ceil(len(rows) / 64)]
        assert 32 < len(patches) <= 64 < len(rows)
        entropy, mean = -(patches * patches.log()).sum(1).mean(), patches.mean(0)
        expected["patch_entropy_share"] = entropy / math.log(24)
        expected["patch_information"] = -(mean * mean.log()).sum() - entropy
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), name


# Two views of an image in which only CLS is matched
CLS_ALONE = match_views([[[0, 0, 8, 8]]] * 2, [[False]] * 2, [(2, 2)] * 2, 1, rule=None)


def test_matched_patches_are_counted_once_in_every_pair_of_views():
    """Views of 4×4 patches: the same, one that shares 2×4 patches, one that shares 1×1, and one apart."""
    boxes = [[[0, 0, 32, 32]], [[0, 0, 32, 32]], [[16, 0, 32, 32]], [[24, 24, 32, 32]], [[50, 50, 32, 32]]]
    matches = match_views(boxes, [[False]] * 5, [(4, 4)] * 5, 3)
    meters = Meters(PROCESS, "fp32", 9)
    for _ in range(2):  # two micro-batches of a step
        meters.add(torch.tensor(1.5), matches, {}, accum_steps=2)
    meters.end_step(0, torch.ones(1))
    matched = [16, 8, 1, 0]
    assert meters.end_interval({}) == pytest.approx({"loss": 3, "matched_patches": sum(matched) / 4})
    _, counts = meters.end_epoch()
    expected = [0] * 10
    for count in matched:  # of each of the two teacher views, in each of three images, in each micro-batch
        expected[min(count, 9)] += 2 * 3 * 2
    assert counts.tolist() == expected


def test_fp16_gives_up_after_many_steps_without_a_finite_gradient():
    meters = Meters(PROCESS, "fp16", 4)
    bad, good = torch.tensor([1.0, math.inf]), torch.tensor([1.0, 2.0])
    for step in range(40):
        meters.add(torch.tensor(1.0), CLS_ALONE, {})
        meters.end_step(step, good if step == 5 else bad)
        if step < 35:
            meters.stop_at_bad_step(["a", "b"])
        if step == 9:
            assert meters.end_interval({})["skipped_share"] == pytest.approx(0.9)
    with pytest.raises(UserError, match="fp16 skipped the last 34 steps: .* a lower --lr or --precision bf16"):
        meters.stop_at_bad_step(["a", "b"])
