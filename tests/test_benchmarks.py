import pytest
import torch
from test_main_lgssl import TINY

from augment import MultiCrop, normalize
from benchmarks import bench_knn, bench_step
from losses import LocalGlobalLoss
from support.loader import ViewBatches
from vision_transformer import BackboneWithHead, DINOHead, Teacher, vit_micro


def test_the_naive_side_computes_the_same_loss_and_gradients(monkeypatch):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8).numpy()
    batches = ViewBatches([(image, 0) for image in images], MultiCrop(32, 16), 8, "paper", 0)
    key = (0, 0, [0, 1, 2])
    pixels, matches, _ = batches[key]
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
    assert bench_knn.one_hot_knn(*data, 10) == pytest.approx(bench_knn.knn(*data, 10))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("bench_step --arch vit_micro --patch_size 16 --batch_size 2 --out_dim 64 4096 --steps 2 --rounds 1", "naive"),
        ("bench_views --batch_size 2 --rounds 1", "torchvision and PIL"),
        ("bench_matching --images 2", "all 18 pairs"),
        ("bench_knn --train 1000 --test 200 --rounds 1", "DINO"),
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
