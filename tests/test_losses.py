import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from losses import LOSSES, LocalGlobalLoss, teacher_temperature


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


def random_case(seed=0, dim=5, out_dim=7, teachers=6, students=9, pairs=20, images=3, center="position"):
    """Random vectors, prototypes, scales and pairs in float64, some weights being 0 and some pairs there twice."""
    generator = torch.Generator().manual_seed(seed)
    double = {"generator": generator, "dtype": torch.float64}
    student_z, teacher_z = torch.randn(students, dim, **double), torch.randn(teachers, dim, **double)
    student_w, teacher_w = torch.randn(out_dim, dim, **double), torch.randn(out_dim, dim, **double)
    teacher_idx = torch.randint(teachers, (pairs,), generator=generator)
    student_idx = torch.randint(students, (pairs,), generator=generator)
    image = torch.randint(images, (pairs,), generator=generator)
    weight = torch.rand(pairs, **double)
    weight[::7] = 0
    position = torch.arange(teachers) % 3
    loss = LocalGlobalLoss(out_dim, 2, center=center).double().eval()
    loss.center.copy_(torch.randn(loss.center.shape, **double))
    return loss, student_z, teacher_z, student_w, teacher_w, (teacher_idx, student_idx, weight, image), position


def naive_loss(loss, student_z, teacher_z, student_w, teacher_w, pairs, position, temperature):
    """Σ w·H as Algorithm 1 writes it, pair by pair."""
    total = 0
    for t, s, w in zip(*pairs[:3], strict=True):
        center = loss.center[position[t]] if len(loss.center) > 1 else loss.center[0]
        target = torch.softmax((teacher_w @ teacher_z[t] - center) / temperature, 0)
        total = total - w * (target * torch.log_softmax(student_w @ student_z[s] / loss.student_temp, 0)).sum()
    return total


@pytest.mark.parametrize("center", ["position", "shared"])
@pytest.mark.parametrize("chunk_memory", [None, 1])  # of 1 byte: 16 rows at a time, each image alone
@pytest.mark.parametrize(("sizes", "dtype", "tolerance"), [
    ({}, torch.float64, 1e-12),
    ({"teachers": 60, "students": 200, "pairs": 500, "images": 4, "out_dim": 300, "dim": 16}, torch.float64, 1e-12),
    ({"teachers": 60, "students": 200, "pairs": 500, "images": 4, "out_dim": 300, "dim": 16}, torch.float32, 1e-6),
])  # fmt: skip
def test_loss_and_gradients_equal_the_naive_formula(sizes, dtype, tolerance, chunk_memory, center):
    loss, student_z, teacher_z, student_w, teacher_w, pairs, position = random_case(**sizes, center=center)
    generator = torch.Generator().manual_seed(1)
    student_scale, teacher_scale = torch.rand(2, len(student_w), generator=generator, dtype=torch.float64)
    exact = [x.requires_grad_() for x in (student_z, student_w, student_scale)]
    scaled = (student_scale[:, None] * student_w, teacher_scale[:, None] * teacher_w)
    expected = naive_loss(loss, student_z, teacher_z, *scaled, pairs, position, 0.5)
    expected_gradients = torch.autograd.grad(3 * expected, exact)

    loss.chunk_memory = chunk_memory
    own = [x.detach().to(dtype).requires_grad_() for x in exact]
    rounded = [x.to(dtype) for x in (teacher_z, teacher_w, teacher_scale)]
    arguments = (own[0], rounded[0], own[1], rounded[1], pairs, position, None, 0.5)
    value = loss.to(dtype)(*arguments, student_scale=own[2], teacher_scale=rounded[2])
    assert value.item() == pytest.approx(expected.item(), rel=tolerance)
    for gradient, reference in zip(torch.autograd.grad(3 * value, own), expected_gradients, strict=True):
        error = (gradient.double() - reference).norm() / reference.norm()
        assert error < 3 * tolerance


def test_gradcheck():
    loss, student_z, teacher_z, student_w, teacher_w, pairs, position = random_case(students=4, pairs=6)
    inputs = (student_z.requires_grad_(), student_w.requires_grad_(), torch.rand(7).double().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda z, w, scale: loss(z, teacher_z, w, teacher_w, pairs, position, None, 0.5, student_scale=scale), inputs
    )


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_gradients_only_where_they_are_wanted(wanted):
    loss, student_z, teacher_z, student_w, teacher_w, pairs, position = random_case()
    expected = naive_loss(loss, student_z, teacher_z, student_w, teacher_w, pairs, position, 0.5)
    student_z.requires_grad_(wanted[0])
    student_w.requires_grad_(wanted[1])
    value = loss(student_z, teacher_z, student_w, teacher_w, pairs, position, None, 0.5)
    torch.testing.assert_close(value, expected)
    if any(wanted):
        value.backward()
    assert (student_z.grad is not None, student_w.grad is not None) == wanted


def test_no_pair_with_a_weight_is_a_loss_of_zero():
    loss, student_z, teacher_z, student_w, teacher_w, pairs, position = random_case()
    pairs = (pairs[0], pairs[1], torch.zeros_like(pairs[2]), pairs[3])
    value = loss(student_z.requires_grad_(), teacher_z, student_w, teacher_w, pairs, position, None, 0.5)
    value.backward()
    assert value == 0
    assert torch.equal(student_z.grad, torch.zeros_like(student_z))


def test_large_logits_stay_finite():
    loss, student_z, teacher_z, student_w, teacher_w, pairs, position = random_case()
    expected = naive_loss(loss, 300 * student_z, 300 * teacher_z, student_w, teacher_w, pairs, position, 0.04)
    student_z = (300 * student_z).float().requires_grad_()
    rounded = [x.float() for x in (300 * teacher_z, student_w, teacher_w)]
    value = loss.float()(student_z, *rounded, pairs, position, None, 0.04)
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert student_z.grad.isfinite().all()


class WideMemory(TorchDispatchMode):
    """Follow the bytes that tensors of K columns hold, all those that operations return and that still live."""

    def __init__(self, K):
        super().__init__()
        self.K, self.tensors, self.peak = K, weakref.WeakValueDictionary(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.ndim > 1 and result.shape[-1] == self.K:
            self.tensors[len(self.tensors), id(result), function] = result
            storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self.tensors.values()}
            self.peak = max(self.peak, sum(storages.values()))
        return result


def batch_case(images, K, D=8, tokens=40):
    """One geometry for all images: each has `tokens` teacher and 2 * `tokens` student tokens, with 2 pairs each."""
    generator = torch.Generator().manual_seed(0)
    z = [torch.randn(images * n, D, generator=generator) for n in (2 * tokens, tokens)]
    w = [torch.randn(K, D, generator=generator) for _ in range(2)]
    b = torch.arange(images).repeat_interleave(4 * tokens)
    p = torch.arange(4 * tokens).repeat(images)
    pairs = (b * tokens + p % tokens, b * 2 * tokens + p % (2 * tokens), torch.ones(len(b)), b)
    arguments = (z[0].requires_grad_(), z[1], w[0].requires_grad_(), w[1], pairs, torch.arange(images * tokens) % 3)
    return LocalGlobalLoss(K, 2, chunk_memory=K * 4 * 25).eval(), arguments


def test_nothing_k_wide_grows_with_the_batch():
    K, tokens, peaks = 3000, 40, []
    for images in (2, 9):
        loss, arguments = batch_case(images, K, tokens=tokens)
        with WideMemory(K) as memory:
            loss(*arguments, None, 0.04).backward()
        peaks.append(memory.peak)
    chunk = 20 + 2 * 3  # of 25 rows in all: logits, and two strips of an eighth
    assert peaks == [4 * K * (tokens + chunk)] * 2  # the targets of one image, and a chunk


def test_no_matrix_product_is_done_twice():
    images, K, D, tokens = 3, 500, 8, 40
    loss, arguments = batch_case(images, K, D, tokens)
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}  # PyTorch does not count it
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        loss(*arguments, None, 0.04).backward()
    teacher, student = images * tokens, images * 2 * tokens
    assert counter.get_total_flops() == 2 * K * D * (teacher + 3 * student)  # student: logits and their two gradients


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_gradients_under_autocast(dtype, tolerance):
    """With weights of 1e-6, as batches have them, which would vanish in fp16."""
    loss, arguments = batch_case(4, K=8000, D=32, tokens=10)
    student_z, teacher_z = (torch.nn.functional.normalize(z.detach()) for z in arguments[:2])
    student_w, teacher_w = (torch.nn.functional.normalize(w.detach()) for w in arguments[2:4])
    pairs = (*arguments[4][:2], arguments[4][2] * 1e-6, arguments[4][3])
    results = []
    for precision in (None, dtype):
        inputs = [student_z.clone().requires_grad_(), student_w.clone().requires_grad_()]
        with torch.autocast("cpu", precision, enabled=precision is not None):
            value = loss(inputs[0], teacher_z, inputs[1], teacher_w, pairs, arguments[5], None, 0.07)
        assert value.dtype == torch.float32
        results.append((value, *torch.autograd.grad(value, inputs)))
    for exact, rounded in zip(*results, strict=True):
        assert (rounded - exact).norm() < tolerance * exact.norm()


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


def test_targets_and_statistics_stay_in_full_precision_under_autocast():
    """Logits that bf16 can hold: the identity as prototypes, and vectors of whole numbers over 8."""
    loss, _, _, _, _, pairs, position = random_case()
    generator = torch.Generator().manual_seed(0)
    student_z, teacher_z = (torch.randint(-15, 16, (n, 7), generator=generator) / 8 for n in (9, 6))
    arguments = (student_z, teacher_z, torch.eye(7), torch.eye(7), pairs, position, None, 0.5)
    loss = loss.float()
    exact = loss(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss(*arguments)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-6)


def test_vectors_more_precise_than_the_center():
    loss, *arguments = random_case()
    expected = loss(*arguments, None, 0.5)
    center = loss.center.float().double()
    assert loss.float()(*arguments, None, 0.5).item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(loss.center.double(), center)


def test_without_gradients_less_is_computed():
    loss, arguments = batch_case(2, K=50)
    counts = []
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), FlopCounterMode(display=False) as counter:
            loss(*arguments, None, 0.04)
        counts.append(counter.get_total_flops())
    assert counts[1] < counts[0]


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
        torch.testing.assert_close(LOSSES[name](is_cls, run_length, 0.8), torch.tensor(weights).float())


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
