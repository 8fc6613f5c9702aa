import pytest
import torch
from test_main_lgssl import TINY
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import main_lgssl
from augment import MultiCrop, normalize
from benchmarks import bench_gpu, bench_knn, bench_step
from losses import LocalGlobalLoss
from support.loader import ViewBatches
from vision_transformer import BackboneWithHead, DINOHead, Teacher, vit_micro


def test_the_naive_side_computes_the_same_loss_and_gradients(monkeypatch):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8).numpy()
    batches = ViewBatches([(image, 0) for image in images], MultiCrop(global_size=32, local_size=16), 8, "paper", 0)
    key = (0, 0, [0, 1, 2])
    pixels, _, matches, *_ = batches[key]
    views = [normalize(x) for x in pixels]
    student = BackboneWithHead(vit_micro(8, img_size=32), DINOHead(96, 24))
    teacher = Teacher(vit_micro(8, img_size=32), DINOHead(96, 24))
    monkeypatch.setattr(bench_step.NaiveLoss, "pairs", bench_step.correspondences(batches.make_views(key)[0], 8))
    results = []
    for build, table in (
        (LocalGlobalLoss, matches),
        (bench_step.NaiveLoss, bench_step.every_token(matches, views, 8)),
    ):
        criterion = build(24, 16)
        loss = criterion(student(views, table.student_row), teacher(views[:1], table.teacher_row), table, 0.05)
        criterion.update_center()
        weights = [p for p in student.parameters() if p.requires_grad]
        results.append((loss, criterion.center, *torch.autograd.grad(loss, weights)))
    for own, reference in zip(*results, strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-3, atol=1e-6)


def test_both_sides_of_knn_are_equally_accurate():
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(500, 8, generator=generator), dim=1)
    labels = torch.randint(6, (500,), generator=generator)
    data = (features[:300], labels[:300], features[300:], labels[300:])
    assert bench_knn.one_hot_knn(*data, 10) == pytest.approx(bench_knn.knn_accuracy(*data, 10))


@pytest.fixture(scope="module", params=["mean", "cls"])
def small_step(request):
    """Return (Case, networks and criterion, normalized views, Matches) of the smallest case of bench_gpu."""
    case = bench_gpu.Case("vit_micro", 2, 64, request.param, "fp32")
    (batch,) = bench_gpu.make_batches(case.loss == "cls", case.batch_size, torch.device("cpu"), count=1)
    networks = main_lgssl.build_networks(main_lgssl.parse_arguments(bench_gpu.options(case)))
    return case, networks, [normalize(pixels) for pixels in batch.pixels], batch.matches


def counted_flop(call):
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}  # PyTorch does not count it
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        result = call()
    return counter.get_total_flops(), result


def test_flop_of_the_phases_are_those_that_pytorch_counts(small_step, monkeypatch):
    case, (student, teacher, criterion), views, matches = small_step
    for block in (*student.backbone.blocks, *teacher.backbone.blocks):
        monkeypatch.setattr(block.attn, "fused_attn", False)  # on a CPU, PyTorch does not count it
    found = {}
    found["teacher"], teacher_out = counted_flop(lambda: teacher(views[:1], matches.teacher_row))
    found["student"], student_out = counted_flop(lambda: student(views, matches.student_row))
    student_out = student_out._replace(scale=student_out.scale.detach())  # whose gradient is no product of tokens
    found["loss"], loss = counted_flop(lambda: criterion(student_out, teacher_out, matches, 0.04))
    found["backward"], _ = counted_flop(loss.backward)
    found["backward"] += sum(2 * pixels.numel() * 96 for pixels in views)  # the gradient of pixels, which is not needed
    expected = bench_gpu.costs(case, len(matches.teacher_row), len(matches.student_row))
    assert {phase: flop for phase, (flop, _) in expected.items() if flop} == found
    weights = sum(p.numel() for p in student.parameters())
    assert expected["update"] == (0, 4 * weights * sum((1, 4, 3, 2, 1)))  # read and written: clipping, AdamW, EMA


class WideTraffic(TorchDispatchMode):
    """Count the bytes that operations read or write in matrices of a shape or its transpose."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.bytes = sorted(shape), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is not torch.ops.aten.t.default:  # which moves nothing
            self.bytes += sum(x.nbytes for x in (*args, result) if torch.is_tensor(x) and sorted(x.shape) == self.shape)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_the_loss_are_those_of_its_fewest_passes(dtype):
    """One pass forms the targets, and one the gradients of the student's logits; each token has one match here."""
    n, K, dim = 6, 40, 8
    z_t, z_s, weights = torch.randn(n, dim), torch.randn(n, dim), torch.randn(K, dim)
    with WideTraffic((n, K)) as traffic:
        targets = torch.exp(z_t @ weights.T, out=torch.empty(0, dtype=dtype))
        gradient = torch.sub(targets, z_s @ weights.T, out=torch.empty(0, dtype=dtype))
        _ = gradient @ weights.to(dtype), gradient.t() @ z_s.to(dtype)
    assert bench_gpu.loss_bytes(K, n, n, dtype.itemsize) == traffic.bytes


def test_other_formulations_have_the_same_loss(small_step):
    """DINO's step is that of `cls`, and the plain formula that of `mean`."""
    case, (student, teacher, criterion), views, matches = small_step
    student.eval()  # without stochastic depth
    criterion.center.normal_(std=0.1)
    outs = student(views, matches.student_row), teacher(views[:1], matches.teacher_row)
    expected = criterion(*outs, matches, 0.04)
    if case.loss == "cls":
        logits = bench_gpu.cls_logits(student, views), bench_gpu.cls_logits(teacher, views[:1])
        loss = bench_gpu.dino_loss(*logits, criterion.center, case.batch_size, 0.04)
    else:
        images = bench_gpu.pairs_by_image(matches, torch.device("cpu"))
        loss = bench_gpu.plain_batch_loss(*outs, images, criterion.center, 0.04)
    torch.testing.assert_close(loss, expected)
    weight = student.head.last_layer.weight_v
    gradients = [torch.autograd.grad(value, weight, retain_graph=True)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_without_a_gpu_the_steps_on_it_are_not_measured(run_main, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    process = run_main("benchmarks/bench_gpu.py", check=False)
    assert process.returncode == 2
    assert process.stderr.startswith("bench_gpu.py: error: found no GPU")
    assert process.stderr.count("\n") == 1


def table_rows(text):
    """Return the rows of the tables in a text as lists of cells, with the headers."""
    rows = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("| -")]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


def rounds_of(*ms, start_ups=(1.0, 1.0)):
    """Return the Results of rounds with these times of their steps."""
    return [
        bench_gpu.Result([{"views": x / 2e3, "loss": x / 2e3} for x in of_round], [(1, 1)], 0, start_up)
        for of_round, start_up in zip(ms, start_ups, strict=True)
    ]


def test_goals_compare_medians_over_the_steps_of_all_rounds(capsys, monkeypatch):
    mean = bench_gpu.Case("vit_micro", 2)
    cls, plain, fp16 = mean._replace(loss="cls"), mean._replace(loss="DINO"), mean._replace(precision="fp16")
    results = {
        mean: rounds_of([1, 2, 9], [8, 8, 7], start_ups=(25, 5)),
        cls: rounds_of([3, 4, 4], [4, 4, 5]),
        plain: rounds_of([8, 8, 8], [8, 12, 12]),
        fp16: None,  # out of memory
    }
    goals = [(bench_gpu.STEP, mean, limit) for limit in (7.5, 7.4)] + [(bench_gpu.ADDED, mean, 3)]
    goals += [(bench_gpu.FASTER, cls, limit) for limit in (2, 2.1)] + [(bench_gpu.START_UP, mean, 30)]
    monkeypatch.setattr(bench_gpu, "GOALS", [*goals, (bench_gpu.STEP, fp16, 1), (bench_gpu.ADDED, fp16, 1)])
    bench_gpu.print_goals(results)
    assert [row[5:] for row in table_rows(capsys.readouterr().out)] == [
        ["expected", "found", ""],
        ["at most 7.5", "7.50 (2.00–8.00)", "reached"],
        ["at most 7.4", "7.50 (2.00–8.00)", "not reached"],
        ["at most 3", "3.50 (-2.00–4.00)", "not reached"],
        ["at least 2", "2.00 (2.00–3.00)", "reached"],
        ["at least 2.1", "2.00 (2.00–3.00)", "not reached"],
        ["at most 30", "25.00 (5.00–25.00)", "reached"],
        ["at most 1", "not measured", ""],
        ["at most 1", "not measured", ""],
    ]


def test_all_goals_are_measured():
    """By default, and the start-up that counts is that of the first training."""
    for goal, case, _ in bench_gpu.GOALS:
        assert case._replace(loss=bench_gpu.COMPARED.get(goal, case.loss)) in bench_gpu.CASES
        assert goal != bench_gpu.START_UP or case == bench_gpu.CASES[0]
    assert bench_gpu.OTHER_CASES[-1].precision == "tf32"


@pytest.mark.slow
def test_the_measurement_on_a_gpu_runs_on_a_cpu(capsys, monkeypatch):
    monkeypatch.setattr(bench_gpu, "WARM_UP", 1)
    device, mean = torch.device("cpu"), bench_gpu.Case("vit_micro", 2, 64, "mean", "bf16", "eager")
    cases = [mean, mean._replace(loss="cls"), mean._replace(loss="DINO")]
    monkeypatch.setattr(bench_gpu, "GOALS", [(bench_gpu.ADDED, mean, 9999), (bench_gpu.START_UP, mean, 9999)])
    monkeypatch.setattr(bench_gpu, "ROUNDS", 2)
    bench_gpu.run(cases, device, minutes=9, steps=1, side=64, copied=2**20)
    out, progress = capsys.readouterr()
    names = [["vit_micro/16, batch 2, eager", "64", loss, "bf16"] for loss in ("mean", "cls", "DINO")]
    lines = [line.split(": ") for line in progress.splitlines() if line.startswith("round ")]
    assert [line[:2] for line in lines] == [
        [f"round {i}", "{}, K {}, {}, {}".format(*name)] for i in (1, 2) for name in names
    ]
    found = [[float(text.split()[1]) for text in line[2].split(", ")] for line in lines]  # step, start-up
    header, *rows, _, added, start_up = table_rows(out)
    assert [row[:4] for row in rows] == names
    for row, of_rounds in zip(rows, zip(found[:3], found[3:], strict=True), strict=True):
        cells = dict(zip(header, row, strict=True))
        for name, (first, second) in zip(("step ms", "start-up s"), zip(*of_rounds, strict=True), strict=True):
            assert cells[name].endswith(f" ({min(first, second)}–{max(first, second)})")
        step = float(cells["step ms"].split()[0])
        assert float(cells["images/s"]) == pytest.approx(2e3 / step, abs=1)
        if row[2] != "DINO":
            phases = [float(cells[f"{phase} ms"].split()[0]) for phase in bench_gpu.PHASES]
            assert sum(phases) == pytest.approx(step, rel=0.01, abs=0.4)  # rounded, and medians of two steps
    assert rows[2][-5:] == [""] * 5
    assert added[0] == bench_gpu.ADDED
    assert added[-1] == start_up[-1] == "reached"
    assert float(start_up[6].split()[0]) == pytest.approx(found[0][1], abs=0.1)  # of the first round

    bench_gpu.print_loss_alone((64,), 2, device)
    bench_gpu.print_profile(mean, device, steps=1)
    out = capsys.readouterr().out
    assert table_rows(out)[1][:2] == ["64", "2"]
    assert "aten::addmm" in out


@pytest.mark.slow
def test_the_measurement_of_loading_runs_on_a_cpu(capsys, monkeypatch):
    """And all sources of batches have the same views and matched tokens, but for the pixels."""
    monkeypatch.setattr(bench_gpu, "WARM_UP", 1)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    on_device, loaded = main_lgssl.batches_on_device, []

    def batches_on_device(loader, *arguments):
        loaded.append(of_source := [])
        return on_device((of_source.append(batch) or batch for batch in loader), *arguments)

    monkeypatch.setattr(main_lgssl, "batches_on_device", batches_on_device)
    case = bench_gpu.Case("vit_micro", 2, 64, "mean", "bf16", "eager", "device")
    bench_gpu.print_loading([case], torch.device("cpu"), counts=(1, 2), steps=3, files=5, rounds=2)
    out, progress = capsys.readouterr()
    _, decoding, crops, _, sending, undistorted, distorted, *rows = table_rows(out)
    parts = [float(row[1]) for row in (decoding, crops, sending)]
    assert float(undistorted[1]) == pytest.approx(sum(parts), abs=0.02)
    assert float(distorted[1]) > 0
    _, plain, compiled, _, *sources, _, worker, _, _, of_batch = rows
    assert (plain[0], compiled[0]) == ("plain", "compiled")
    names = ["memory (the step alone)", "memory, distorted on the device", "1 workers", "2 workers", "DINO's 2 workers"]
    assert [row[:2] for row in sources] == [["vit_micro", name] for name in names]
    assert [line.split(": ")[0] for line in progress.splitlines() if "images/s" in line] == [
        f"vit_micro, {name}" for name in names
    ]
    assert all(float(row[3].rstrip("%")) > 0 for row in sources)
    assert sources[0][3] == "100.0%"
    assert float(worker[2]) == pytest.approx(float(undistorted[2]), abs=0.6)
    assert float(of_batch[2]) == float(compiled[1])

    alone, undistorted, _, own, dino = loaded
    assert list(map(len, loaded)) == [4, 4, 6, 8, 8]  # warm-up, two batches per worker, and the steps
    assert [batch.parameters is None for batch, *_ in loaded] == [True, False, False, False, True]
    for batches in zip(own, dino, alone + alone, undistorted + undistorted, strict=True):
        shapes = [[(pixels.shape, pixels.dtype) for pixels in batch.pixels] for batch in batches]
        assert shapes == [[((4, 3, 224, 224), torch.uint8), ((16, 3, 96, 96), torch.uint8)]] * 4
    for batches in zip(own, dino, strict=True):
        torch.testing.assert_close(*(list(batch.matches) for batch in batches), rtol=0, atol=0)
    assert not torch.equal(own[0].matches.student_row, own[1].matches.student_row)


def test_goals_of_loading_compare_rates(capsys, monkeypatch):
    rates = {
        "vit_small": {"memory (the step alone)": 1000, "12 workers": 951, "16 workers": 1100, "DINO's 16 workers": 500},
        "vit_tiny": {"memory (the step alone)": 2000, "12 workers": 1600, "16 workers": 1700, "DINO's 16 workers": 600},
    }

    def source_rates(case, *_):
        return {(case.arch, source): rate for source, rate in rates[case.arch].items()}

    monkeypatch.setattr(bench_gpu, "source_rates", source_rates)
    monkeypatch.setattr(bench_gpu, "write_photographs", lambda *_: None)
    monkeypatch.setattr(bench_gpu, "print_stages", lambda *_: 270.0)
    monkeypatch.setattr(bench_gpu, "distortion_ms", lambda *_: {"plain": 3.0, "compiled": 4.1})
    cases = [bench_gpu.Case(arch, 128, distort_on="device") for arch in rates]
    bench_gpu.print_loading(cases, torch.device("cpu"))
    assert [row[1:] for row in table_rows(capsys.readouterr().out)[-4:]] == [
        ["at least 270", "270.00", "reached"],
        ["at least 0.95", "0.95", "reached"],
        ["at least 3", "2.83", "not reached"],
        ["at most 4", "4.10", "not reached"],
    ]
    bench_gpu.print_loading(cases[1:], torch.device("cpu"))
    assert table_rows(capsys.readouterr().out)[-3][1:] == ["at least 0.95", "not measured", ""]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("bench_step --arch vit_micro --patch_size 16 --batch_size 2 --out_dim 64 4096 --steps 2 --rounds 1", "naive"),
        ("bench_views --batch_size 2 --rounds 1", "torchvision and PIL"),
        ("bench_matching --images 2", "all 18 pairs"),
        ("bench_knn --train 1000 --test 200 --rounds 1", "DINO"),
        ("bench_sources --images 4 --rounds 1 --start_images 4", "start with 4 images"),
        ("bench_watching --rounds 1 --recipe {recipe}", "online k-NN"),
    ],
)
def test_benchmarks_print_their_tables(run_script, tmp_path, words, expected):
    recipe = tmp_path / "tiny.args"
    recipe.write_text(f"--dataset digits {' '.join(TINY)} --batch_size_per_gpu 100 --num_workers 0")
    name, *options = words.format(recipe=recipe).split()
    output = run_script("-m", f"benchmarks.{name}", *options).stdout
    assert expected in output
    assert "PyTorch" in output.splitlines()[0]
    assert "failed" not in output
