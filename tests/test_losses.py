import doctest
import weakref

import numpy as np
import pytest
import torch
from match_tables import lay_out
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import losses
from losses import LOSS_WEIGHTS, LocalGlobalLoss, plain_loss, teacher_temperature
from support.matched_cross_entropy import matched_cross_entropy
from vision_transformer import TokenOutput


def token_output(bottleneck, prototypes, scale=None, mean=None):
    scale = prototypes.new_ones(len(prototypes)) if scale is None else scale
    return TokenOutput(bottleneck, prototypes, scale, None, mean)


def golden_case(golden, name):
    """Arrange a golden file for the criterion: (data, teacher's logits, student's logits, Matches)."""
    data = golden(name)
    meta = data["meta"]
    teacher, student_global, student_local = (
        torch.tensor(data[k]) for k in ("teacher", "student_global", "student_local")
    )
    batch, views = meta["batch"], 2 + meta["local_crops"]
    tokens = [student_global.shape[1]] * 2 + [student_local.shape[1]] * (views - 2)
    first = np.concatenate([[0], np.cumsum([batch * t for t in tokens])]).tolist()
    pairs = [
        (b, first[i] + b * tokens[i] + t, first[j] + b * tokens[j] + s, len(meta["correspondences"][i][j][0]))
        for b in range(batch)
        for i in range(2)
        for j in range(views)
        for t, s in zip(*(meta["correspondences"][i][j] or [[], []]), strict=True)
    ]
    matches, _ = lay_out(pairs, list(range(teacher.shape[1])) * len(teacher))
    student = torch.cat([student_global.flatten(0, 1), student_local.flatten(0, 1)])
    return data, teacher, student, matches


@pytest.mark.parametrize("center", ["position", "shared"])
@pytest.mark.parametrize("name", ["loss_a.npz", "loss_b.npz"])
def test_golden_losses_and_centers(golden, name, center):
    data, teacher, student, matches = golden_case(golden, name)
    meta = data["meta"]
    identity, is_pair = torch.eye(meta["K"]), matches.num_matched > 0
    teacher_logits = teacher.flatten(0, 1)[matches.teacher_row][matches.teacher_idx][is_pair]  # [n, K]
    student_logits = student[matches.student_row].expand(len(is_pair), -1, -1)[is_pair]
    for key, expected in meta["loss"].items():
        kind, _, lambda_cls = key.replace("dino", "cls").partition("_")
        criterion = LocalGlobalLoss(meta["K"], teacher.shape[1] - 1, kind, float(lambda_cls or 0.5), center)
        criterion.center += torch.tensor(data["center"])
        student_out = token_output(student[matches.student_row], identity)
        teacher_out = token_output(teacher.flatten(0, 1)[matches.teacher_row], identity, mean=teacher.mean(0))
        value = criterion(student_out, teacher_out, matches, meta["teacher_temp"])
        assert value.item() == pytest.approx(expected, rel=1e-5), key
        weight = LOSS_WEIGHTS[kind](matches.is_cls(), matches.num_matched, criterion.lambda_cls)[is_pair]
        plain = plain_loss(student_logits, teacher_logits, weight, torch.tensor(data["center"]), meta["teacher_temp"])
        assert plain.item() / matches.is_cls().sum() == pytest.approx(expected, rel=1e-5), key
        criterion.update_center()
        if kind != "cls":
            after = data["center_after_per_position" if center == "position" else "center_after_shared"]
            torch.testing.assert_close(
                criterion.center, torch.tensor(after).view_as(criterion.center), rtol=0, atol=1e-6
            )


def test_the_example_in_the_docstring_runs():
    result = doctest.testmod(losses)
    assert result.attempted > 0
    assert result.failed == 0


class Case:
    """Random vectors, prototypes, scales and pairs in float64, with some weights of 0 and some pairs twice."""

    def __init__(self, seed=0, dim=5, out_dim=7, teachers=6, students=9, pairs=20, images=3, center="position"):
        generator = torch.Generator().manual_seed(seed)
        double = {"generator": generator, "dtype": torch.float64}
        self.student_z, self.teacher_z = torch.randn(students, dim, **double), torch.randn(teachers, dim, **double)
        self.student_w, self.teacher_w = torch.randn(out_dim, dim, **double), torch.randn(out_dim, dim, **double)
        self.student_scale = self.teacher_scale = torch.ones(out_dim, dtype=torch.float64)
        self.teacher_idx = torch.randint(teachers, (pairs,), generator=generator)
        self.student_idx = torch.randint(students, (pairs,), generator=generator)
        image = torch.randint(images, (pairs,), generator=generator)
        self.weight = torch.rand(pairs, **double)
        self.weight[::7] = 0
        self.position = torch.arange(teachers) % 3
        self.center = torch.randn(3 if center == "position" else 1, out_dim, **double)
        columns = (image.tolist(), self.teacher_idx.tolist(), self.student_idx.tolist(), [1] * pairs)
        self.matches, places = lay_out(list(zip(*columns, strict=True)), self.position.tolist())
        self.m, self.place = torch.tensor(places).T

    def naive(self, temperature):
        """Σ w·H as Algorithm 1 writes it, pair by pair."""
        student_w = self.student_scale[:, None] * self.student_w
        teacher_w = self.teacher_scale[:, None] * self.teacher_w
        total = 0
        for t, s, w in zip(self.teacher_idx, self.student_idx, self.weight, strict=True):
            center = self.center[self.position[t]] if len(self.center) > 1 else self.center[0]
            target = torch.softmax((teacher_w @ self.teacher_z[t] - center) / temperature, 0)
            total = total - w * (target * torch.log_softmax(student_w @ self.student_z[s] / 0.1, 0)).sum()
        return total

    def fast(self, temperature, chunk_memory=None, dtype=torch.float64):
        weight = torch.zeros(self.matches.num_matched.shape, dtype=torch.float64)
        weight[self.m, self.place] = self.weight
        student_z, teacher_z = self.student_z[self.matches.student_row], self.teacher_z[self.matches.teacher_row]
        outs = [
            token_output(*(x.to(dtype) for x in tensors))
            for tensors in (
                (student_z, self.student_w, self.student_scale),
                (teacher_z, self.teacher_w, self.teacher_scale),
            )
        ]
        center = self.center.to(dtype)
        return matched_cross_entropy(*outs, self.matches, weight.to(dtype), center, 0.1, temperature, chunk_memory)


LARGE = {"teachers": 60, "students": 200, "pairs": 500, "images": 4, "out_dim": 300, "dim": 16}


@pytest.mark.parametrize("center", ["position", "shared"])
@pytest.mark.parametrize("chunk_memory", [None, 1])  # 1 byte: 16 rows at a time, one image per group
@pytest.mark.parametrize(
    ("sizes", "dtype", "tolerance"),
    [({}, torch.float64, 1e-12), (LARGE, torch.float64, 1e-12), (LARGE, torch.float32, 1e-6)],
)
def test_loss_and_gradients_equal_the_naive_formula(sizes, dtype, tolerance, chunk_memory, center):
    check_gradients(Case(**sizes, center=center), chunk_memory, dtype, tolerance)


def check_gradients(case, chunk_memory, dtype, tolerance):
    generator = torch.Generator().manual_seed(1)
    case.student_scale, case.teacher_scale = torch.rand(2, len(case.student_w), generator=generator).double()
    inputs = [x.requires_grad_() for x in (case.student_z, case.student_w, case.student_scale)]
    expected = case.naive(0.5)
    expected_gradients = torch.autograd.grad(3 * expected, inputs)
    value = case.fast(0.5, chunk_memory, dtype)
    assert value.item() == pytest.approx(expected.item(), rel=tolerance)
    for gradient, reference in zip(torch.autograd.grad(3 * value, inputs), expected_gradients, strict=True):
        error = (gradient.double() - reference).norm() / reference.norm()
        assert error < 3 * tolerance


def test_gradcheck():
    case = Case(students=4, pairs=6)

    def loss(z, w, scale):
        case.student_z, case.student_w, case.student_scale = z, w, scale
        return case.fast(0.5)

    inputs = (case.student_z.requires_grad_(), case.student_w.requires_grad_(), torch.rand(7).double().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_gradients_only_where_they_are_wanted(wanted):
    """And none for the teacher."""
    case = Case()
    expected = case.naive(0.5)
    case.teacher_z.requires_grad_()
    case.student_z.requires_grad_(wanted[0])
    case.student_w.requires_grad_(wanted[1])
    value = case.fast(0.5, dtype=torch.float32)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    if any(wanted):
        value.backward()
    grads = (case.student_z.grad, case.student_w.grad, case.teacher_z.grad)
    assert [grad is not None for grad in grads] == [*wanted, False]


def test_no_pair_with_a_weight_is_a_loss_of_zero():
    case = Case()
    case.weight = torch.zeros_like(case.weight)
    case.student_z.requires_grad_()
    value = case.fast(0.5)
    value.backward()
    assert value == 0
    assert torch.equal(case.student_z.grad, torch.zeros_like(case.student_z))


def test_large_logits_stay_finite():
    case = Case()
    case.student_z, case.teacher_z = (300 * case.student_z).requires_grad_(), 300 * case.teacher_z
    value = case.fast(0.04, dtype=torch.float32)
    value.backward()
    assert value.item() == pytest.approx(case.naive(0.04).item(), rel=1e-5)
    assert case.student_z.grad.isfinite().all()


class WideMemory(TorchDispatchMode):
    """Track the memory of all live tensors with K columns that operations returned, in bytes."""

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
    w = [torch.randn(K, D, generator=generator).requires_grad_(own) for own in (True, False)]
    pairs = [
        (b, b * tokens + p % tokens, b * 2 * tokens + p % (2 * tokens), 1)
        for b in range(images)
        for p in range(4 * tokens)
    ]
    matches, _ = lay_out(pairs, [row % 3 for row in range(images * tokens)])
    outs = (token_output(z[0].requires_grad_(), w[0]), token_output(z[1], w[1], mean=torch.zeros(3, D)))
    return LocalGlobalLoss(K, 2, chunk_memory=K * 4 * 25).eval(), (*outs, matches)


def test_memory_does_not_grow_with_the_batch():
    K, peaks = 3000, []
    for images in (2, 9):
        criterion, arguments = batch_case(images, K)
        with WideMemory(K) as memory:
            criterion(*arguments, 0.04).backward()
        peaks.append(memory.peak)
    assert peaks[1] < 1.01 * peaks[0]
    assert peaks[0] < 4 * K * (40 + 2 * 80)  # less than the logits of one image


@pytest.mark.parametrize("with_gradients", [True, False])
def test_no_matrix_product_is_done_twice_or_in_vain(with_gradients):
    images, K, D, tokens = 3, 500, 8, 40
    criterion, arguments = batch_case(images, K, D, tokens)
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}  # PyTorch does not count it
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with torch.set_grad_enabled(with_gradients), counter:
        value = criterion(*arguments, 0.04)
        if with_gradients:
            value.backward()
    products = 3 if with_gradients else 1  # of the student: logits and their two gradients
    assert counter.get_total_flops() == 2 * K * D * images * (tokens + products * 2 * tokens)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_gradients_under_autocast(dtype, tolerance):
    """With weights of 1e-6, which would vanish in fp16, and with targets near 1 / K."""
    criterion, (student_out, teacher_out, matches) = batch_case(2, K=4000, D=32, tokens=4)
    student_z, student_w, teacher_z, teacher_w = (
        torch.nn.functional.normalize(x.detach()) for out in (student_out, teacher_out) for x in out[:2]
    )
    matches = matches._replace(num_matched=matches.num_matched * 10**6)
    inputs = [student_z.requires_grad_(), student_w.requires_grad_()]
    weight = torch.where(matches.num_matched > 0, 1 / matches.num_matched, 0).double()
    student_logits = student_z.double() @ student_w.double().T
    teacher_logits = (teacher_z.double() @ teacher_w.double().T)[matches.teacher_idx]
    exact = plain_loss(student_logits, teacher_logits, weight, criterion.center[0], 0.07) / matches.is_cls().sum()
    with torch.autocast("cpu", dtype):
        value = criterion(token_output(*inputs), token_output(teacher_z, teacher_w), matches, 0.07)
    assert value.dtype == torch.float32
    results = [(x, *torch.autograd.grad(x, inputs)) for x in (exact, value)]
    for reference, rounded in zip(*results, strict=True):
        assert (rounded - reference).norm() < tolerance * reference.norm()


def test_tokens_that_are_not_those_of_the_matches_are_named():
    criterion, (student_out, teacher_out, matches) = batch_case(2, K=7, D=5, tokens=4)
    with pytest.raises(ValueError, match=r"found \(15, 8\) student and teacher tokens, expected the \(16, 8\)"):
        criterion(student_out._replace(bottleneck=student_out.bottleneck[1:]), teacher_out, matches, 0.04)


def test_the_center_is_moved_once_a_step_and_by_update_center_alone():
    criterion, (student_out, teacher_out, matches) = batch_case(2, K=7, D=5, tokens=4)
    generator = torch.Generator().manual_seed(0)
    criterion.center.normal_(generator=generator)
    before = criterion.center.clone()
    means = torch.randn(3, 3, 5, generator=generator)  # three micro-batches, [1+P, D] each
    outs = [teacher_out._replace(mean_bottleneck=mean) for mean in means]
    values = [criterion(student_out, out, matches, 0.5) for out in outs]  # in evaluation mode
    criterion.update_center()
    assert torch.equal(criterion.center, before)
    criterion.train()
    for out, value in zip(outs, values, strict=True):
        assert torch.equal(criterion(student_out, out, matches, 0.5), value)
    assert torch.equal(criterion.center, before)
    assert list(criterion.state_dict()) == ["center"]
    criterion.update_center()
    expected = 0.9 * before + 0.1 * means.mean(0) @ teacher_out.prototypes.T
    torch.testing.assert_close(criterion.center, expected)
    criterion.update_center()  # nothing new
    torch.testing.assert_close(criterion.center, expected)


def center_of_share(rank, world_size, folder):
    """Take a step with the share of one process of four micro-batches, and save the center."""
    if world_size > 1:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    criterion, (student_out, teacher_out, matches) = batch_case(2, K=7, D=5, tokens=4)
    criterion.train()
    means = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    for mean in means[rank::world_size]:
        given = mean.clone()
        criterion(student_out, teacher_out._replace(mean_bottleneck=given), matches, 0.5)
        assert torch.equal(given, mean)
    criterion.update_center()
    torch.save(criterion.center, f"{folder}/{rank}.pt")
    if world_size > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_move_the_center_as_one_does(tmp_path):
    torch.multiprocessing.start_processes(center_of_share, (2, tmp_path), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    center_of_share(0, 1, tmp_path)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, torch.load(tmp_path / "0.pt"))


def test_targets_and_statistics_stay_in_full_precision_under_autocast():
    """Logits that bf16 represents exactly: identity prototypes, and vectors of multiples of 1/8."""
    case = Case()
    generator = torch.Generator().manual_seed(0)
    case.student_z, case.teacher_z = (torch.randint(-15, 16, (n, 7), generator=generator) / 8 for n in (9, 6))
    case.student_w = case.teacher_w = torch.eye(7)
    exact = case.fast(0.5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = case.fast(0.5, dtype=torch.float32)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-6)


def test_weights_are_those_of_section_3_4():
    is_cls = torch.tensor([True, False, False, True])
    num_matched = torch.tensor([3, 3, 3, 1])
    expected = {
        "cls": [1, 0, 0, 1],
        "mean": [1 / 3, 1 / 3, 1 / 3, 1],
        "sum": [1, 1, 1, 1],
        "lambda": [0.8, 0.1, 0.1, 0.8],
        "lambda_sum": [0.8, 0.2, 0.2, 0.8],
    }
    for name, weights in expected.items():
        torch.testing.assert_close(LOSS_WEIGHTS[name](is_cls, num_matched, 0.8), torch.tensor(weights).float())


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
