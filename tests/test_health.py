import math

import pytest
import torch

from augment import MultiCrop, normalize
from health import CollapseWatch, measure
from losses import LocalGlobalLoss
from main_lgssl import BatchesOfViews, Meters
from vision_transformer import BackboneWithHead, DINOHead, vit_micro


@pytest.mark.parametrize("rule", ["paper", None])
def test_quantities_are_those_of_a_naive_computation(rule):
    torch.manual_seed(0)
    images = [(torch.randint(0, 256, (3, 48, 48), dtype=torch.uint8), 0) for _ in range(10)]
    student, teacher = (BackboneWithHead(vit_micro(8, img_size=32), DINOHead(96, 24)) for _ in range(2))
    student.eval()
    batches = BatchesOfViews(images, MultiCrop(32, 16, local_number=2), 8, rule, 0)
    _, crops, table, _ = batches[0, 0, list(range(10))]
    crops = [normalize(crop) for crop in crops]
    loss_function = LocalGlobalLoss(24, 16, "mean" if rule else "cls")
    loss_function.center.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        teacher_z, *teacher_prototypes = teacher(crops[:1], table.teacher_row)
        student_z, *student_prototypes = student(crops, table.student_row)
        tokens = (student_z, teacher_z, student_prototypes, teacher_prototypes)
        found = measure(teacher, crops[0], *tokens, table, loss_function, 0.05)

        def outputs(network, crop, center, temperature):
            z, weights, scale = network([crop])
            logits = z.unflatten(0, (len(crop), -1))[:, 0].double() @ (scale[:, None] * weights).T.double()
            return ((logits - center) / temperature).softmax(-1)

        views = [*crops[0].split(10), *crops[1].split(10)]  # two global, two local
        t = [outputs(teacher, view, loss_function.center[0], 0.05)[:8] for view in views[:2]]
        s = [outputs(student, view, 0, 0.1)[:8] for view in views]
        features = teacher.backbone(views[0])[:, 0].double()
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
        "center_norm": loss_function.center[0].norm(),
        "cls_cosine": torch.stack(pairs).mean(),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), name


HEALTHY = {"entropy_share": 0.6, "output_information": 1.2, "cls_cosine": 0.5}


@pytest.mark.parametrize(
    ("values", "name", "option"),
    [
        ({"entropy_share": 0.999, "output_information": 0.0}, "uniform outputs", "--teacher_temp"),
        ({"entropy_share": 0.3, "output_information": 0.01}, "one output for all images", "--freeze_last_layer"),
        ({"cls_cosine": 0.9999}, "features all alike", "--lr"),
    ],
)
def test_a_collapse_that_lasts_is_named_once(values, name, option):
    watch = CollapseWatch(patience=3)
    collapsed = {**HEALTHY, **values}
    assert [len(watch(v)) for v in (collapsed, collapsed, HEALTHY, collapsed, collapsed)] == [0] * 5
    (warning,) = watch(collapsed)
    assert f"collapse: {name} in 3 reports in a row" in warning
    assert option in warning
    assert watch(collapsed) == []
    assert watch(HEALTHY) == []


def test_fp16_gives_up_after_many_steps_without_a_finite_gradient():
    meters = Meters(torch.device("cpu"), "fp16", 4)
    bad, good = torch.tensor([1.0, math.inf]), torch.tensor([1.0, 2.0])
    for step in range(40):
        meters.add(torch.tensor(1.0), 0.0, torch.tensor([1]))
        meters.end_step(step, good if step == 5 else bad)
        if step < 35:
            meters.stop_at_bad_step(["a", "b"])
        if step == 9:
            assert meters.end_interval({})["skipped_share"] == pytest.approx(0.9)
    with pytest.raises(SystemExit, match="fp16 left out the last 34 steps, .* a lower --lr, or --precision bf16"):
        meters.stop_at_bad_step(["a", "b"])
