import numpy as np
import pytest
import torch

from losses import LocalGlobalLoss, pair_weights, teacher_temperature


def golden_case(golden, name):
    """Lay a golden file out as the loss wants it: vectors, pairs without their weight, positions."""
    data = golden(name)
    meta = data["meta"]
    teacher, student_global, student_local = (
        torch.tensor(data[k]) for k in ("teacher", "student_global", "student_local")
    )
    batch, views = meta["batch"], 2 + meta["local_crops"]
    tokens = [student_global.shape[1]] * 2 + [student_local.shape[1]] * (views - 2)
    first = np.concatenate([[0], np.cumsum([batch * t for t in tokens])])
    teacher_idx, student_idx, image, is_cls, run_length = [], [], [], [], []
    for b in range(batch):
        for i in range(2):
            for j in range(views):
                for p, (t, s) in enumerate(zip(*(meta["correspondences"][i][j] or [[], []]), strict=True)):
                    teacher_idx.append(first[i] + b * tokens[i] + t)
                    student_idx.append(first[j] + b * tokens[j] + s)
                    image.append(b)
                    is_cls.append(p == 0)
                    run_length.append(len(meta["correspondences"][i][j][0]))
    columns = [torch.tensor(np.array(c)) for c in (teacher_idx, student_idx, image, is_cls, run_length)]
    student = torch.cat([student_global.flatten(0, 1), student_local.flatten(0, 1)])
    return data, teacher, student, columns, 2 * (views - 1) * batch


@pytest.mark.parametrize("center", ["position", "shared"])
@pytest.mark.parametrize("name", ["loss_a.npz", "loss_b.npz"])
def test_golden_losses_and_centers(golden, name, center):
    data, teacher, student, (teacher_idx, student_idx, image, is_cls, run_length), view_pairs = golden_case(
        golden, name
    )
    meta = data["meta"]
    identity = torch.eye(meta["K"])
    for key, expected in meta["loss"].items():
        kind, _, lambda_cls = key.replace("dino", "cls").partition("_")
        loss = LocalGlobalLoss(meta["K"], teacher.shape[1] - 1, kind, float(lambda_cls or 0.5), center)
        loss.center += torch.tensor(data["center"])
        weight = loss.weights(is_cls, run_length, view_pairs)
        position = torch.arange(teacher.shape[1]).repeat(len(teacher))
        pairs = (teacher_idx, student_idx, weight, image)
        z = teacher.flatten(0, 1)
        value = loss(student, z, identity, identity, pairs, position, teacher.mean(0), meta["teacher_temp"])
        assert value.item() == pytest.approx(expected, rel=1e-5), key
        if kind != "cls":
            after = data["center_after_per_position" if center == "position" else "center_after_shared"]
            torch.testing.assert_close(loss.center, torch.tensor(after).view_as(loss.center), rtol=0, atol=1e-6)


def random_case(seed=0, dim=5, out_dim=7, teachers=6, students=9, pairs=20):
    generator = torch.Generator().manual_seed(seed)
    double = {"generator": generator, "dtype": torch.float64}
    student_z, teacher_z = torch.randn(students, dim, **double), torch.randn(teachers, dim, **double)
    student_w, teacher_w = torch.randn(out_dim, dim, **double), torch.randn(out_dim, dim, **double)
    teacher_idx = torch.randint(teachers, (pairs,), generator=generator)
    student_idx = torch.randint(students, (pairs,), generator=generator)
    weight = torch.rand(pairs, **double)
    position = torch.arange(teachers) % 3
    loss = LocalGlobalLoss(out_dim, 2).double().eval()
    loss.center.copy_(torch.randn(3, out_dim, **double))
    return (
        loss,
        student_z,
        teacher_z,
        student_w,
        teacher_w,
        (teacher_idx, student_idx, weight, torch.arange(pairs) % 3),
        position,
    )


def naive_loss(loss, student_z, teacher_z, student_w, teacher_w, pairs, position, temperature):
    """Σ w·H as Algorithm 1 writes it, pair by pair."""
    total = 0
    for t, s, w in zip(*pairs[:3], strict=True):
        target = torch.softmax((teacher_w @ teacher_z[t] - loss.center[position[t]]) / temperature, 0)
        total = total - w * (target * torch.log_softmax(student_w @ student_z[s] / loss.student_temp, 0)).sum()
    return total


def test_loss_and_gradients_equal_the_naive_formula():
    loss, student_z, teacher_z, student_w, teacher_w, pairs, position = random_case()
    inputs = [student_z.requires_grad_(), student_w.requires_grad_()]
    value = loss(student_z, teacher_z, student_w, teacher_w, pairs, position, None, 0.5)
    expected = naive_loss(loss, student_z, teacher_z, student_w, teacher_w, pairs, position, 0.5)
    torch.testing.assert_close(value, expected)
    for own, naive in zip(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(own, naive)


def test_gradcheck():
    loss, student_z, teacher_z, student_w, teacher_w, pairs, position = random_case(students=4, pairs=6)
    inputs = (student_z.requires_grad_(), student_w.requires_grad_())
    assert torch.autograd.gradcheck(lambda z, w: loss(z, teacher_z, w, teacher_w, pairs, position, None, 0.5), inputs)


def test_no_gradient_reaches_the_teacher():
    loss, student_z, teacher_z, student_w, teacher_w, pairs, position = random_case()
    teacher_z.requires_grad_()
    loss(student_z.requires_grad_(), teacher_z, student_w, teacher_w, pairs, position, None, 0.5).backward()
    assert teacher_z.grad is None


def test_evaluation_mode_keeps_the_center():
    loss, *inputs = random_case()
    before = loss.center.clone()
    loss(*inputs, torch.ones(3, 5, dtype=torch.float64), 0.5)
    assert torch.equal(loss.center, before)
    loss.train()(*inputs, torch.ones(3, 5, dtype=torch.float64), 0.5)
    expected = 0.9 * before + 0.1 * inputs[3].sum(1)
    torch.testing.assert_close(loss.center, expected)


def test_targets_stay_in_full_precision_under_autocast():
    loss, student_z, teacher_z, student_w, teacher_w, pairs, position = random_case(dim=32, out_dim=500)
    arguments = [x.float() for x in (student_z, teacher_z, student_w, teacher_w)]
    arguments[:2] = [torch.nn.functional.normalize(z) for z in arguments[:2]]
    loss = loss.float()
    exact = loss(*arguments, pairs, position, None, 0.04)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss(*arguments, pairs, position, None, 0.04)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.05)


def test_weights_are_those_of_section_3_4():
    is_cls = torch.tensor([True, False, False, True])
    run_length = torch.tensor([3, 3, 3, 1])
    expected = {
        "cls": [1, 0, 0, 1],
        "mean": [1 / 3, 1 / 3, 1 / 3, 1],
        "sum": [1, 1, 1, 1],
        "lambda": [0.8, 0.1, 0.1, 0.8],
    }
    for name, weights in expected.items():
        torch.testing.assert_close(pair_weights(name, is_cls, run_length, 0.8), torch.tensor(weights).float())


def test_teacher_temperature_is_dinos_schedule():
    for epochs in (1, 2, 30):
        schedule = np.concatenate([np.linspace(0.04, 0.07, epochs), np.full(5, 0.07)])
        own = [teacher_temperature(e, 0.04, 0.07, epochs) for e in range(len(schedule))]
        np.testing.assert_allclose(own, schedule)
    assert teacher_temperature(0, 0.04, 0.07, 0) == 0.07


@pytest.mark.parametrize(
    ("option", "message"),
    [({"loss": "max"}, "unknown loss"), ({"center": "none"}, "unknown center"), ({"lambda_cls": 1.5}, r"\[0, 1\]")],
)
def test_bad_options_are_named(option, message):
    with pytest.raises(ValueError, match=message):
        LocalGlobalLoss(8, 4, **option)
