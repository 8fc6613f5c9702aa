"""README and docs/ as documentation that is run: their commands and their Python, at a tiny size."""

import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_launchers import TINY

import losses
import patch_matching
import reproduce
import vision_transformer
from studies.report import report
from studies.rows import STUDIES
from support import sources
from support.weights import load_file

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md")}
PAGES["README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
# {page: (marked as runnable, language, text) of each fenced block}
BLOCKS = {
    page: [
        (bool(mark), language, block)
        for mark, language, block in re.findall(r"(<!-- runnable -->\n)?```(\w+)\n(.*?)```", text, re.S)
    ]
    for page, text in PAGES.items()
}
# Options appended to a command so that it takes seconds, by script or by script and subcommand.
SMALLER = {
    "main_lgssl.py": [*TINY, "--batch_size_per_gpu", 4, "--accum_steps", 1],
    "eval_knn.py": ["--nb_knn", 2, "--num_workers", 0],
    "eval_linear.py": ["--epochs", 1, "--n_last_blocks", 1, "--num_workers", 0],
    "eval_copy_detection.py": ["--imsize", 32, "--num_workers", 0],
    "eval_image_retrieval.py": ["--imsize", 32, "--num_workers", 0],
    "reproduce.py lists": ["--whitening", 2, "--distractors", 2],
    "extract_features.py": ["--num_workers", 0],
}
# Commands that are not marked as runnable, and the test file that runs them.
ELSEWHERE = {
    "make demo": "test_docs.py",
    "make test": "../.ci/run",
    "torchrun --nproc_per_node=8 main_lgssl.py": "test_launchers.py",
    "torchrun --nproc_per_node=8 eval_linear.py": "test_launchers.py",
    "python run_with_submitit.py": "test_slurm.py",
    "python reproduce.py run": "test_reproduce.py",
    "python -m studies run": "test_study.py",
    "python -m studies search": "test_study.py",
    "python -m studies report": "test_study.py",
    "python -m studies causes": "test_causes.py",
    "python -m studies make-scenes": "test_scenes.py",
    "python main_lgssl.py @recipes/digits.args": "test_warm_start.py",
    "python main_lgssl.py @studies/solar_mean.args": "test_study.py",
    "python plot_runs.py": "test_plot_runs.py",
    "grep -E": "test_docs.py",  # a filter of lines
    "python visualize.py": "test_visualize.py",
    "python export.py": "test_export.py",
    "python eval_knn.py": "test_eval_knn.py",
    "python eval_dense.py knn-segmentation": "test_eval_dense.py",
    "python eval_dense.py linear-segmentation": "test_eval_dense.py",
    "python eval_dense.py propagation": "test_propagation.py",
    "python eval_dense.py correspondence": "test_correspondence.py",
    "python -m benchmarks.bench_step": "test_benchmarks.py",
    "python -m benchmarks.bench_gpu": "test_benchmarks.py",
    "python -m benchmarks.bench_views": "test_benchmarks.py",
    "python -m benchmarks.bench_matching": "test_benchmarks.py",
    "python -m benchmarks.bench_knn": "test_benchmarks.py",
    "python -m benchmarks.bench_watching": "test_benchmarks.py",
    "python -m benchmarks.bench_folder": "test_sources.py",
    "python -m benchmarks.bench_sources": "test_benchmarks.py",
}
# Files that the commands of a page write
WRITTEN = {
    "README.md": ["features.npz", "LAPTOP/checkpoint.pth", "OUT/knn_folder.json", "runs/sqrt/checkpoint.pth"],
    "docs/changing_the_method.md": ["runs/sparse/checkpoint.pth", "runs/mini/checkpoint.pth"],
    "docs/data.md": [],
    "docs/dense.md": [],
    "docs/export.md": ["features.npz", "EXPORT/config.json", "EXPORT_ONNX/model.onnx"],
    "docs/options.md": ["DINO/checkpoint.pth"],
    "docs/performance.md": [],
    "docs/reproducing.md": ["results.md", "LISTS/whitening.txt", "assets/patch_augmentation.png"],
    "docs/robustness.md": [],
    "docs/study.md": [],
    "docs/warm_start.md": ["OUT/knn_folder.json", "CONTINUED/checkpoint.pth", "CONTINUED/knn_folder.json"],
    "docs/visualizing.md": ["map.pdf", "matches.png", "assets/matches.png", "assets/neighbours.png", "runs.pdf"],
}


def commands(text):
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def test_every_command_is_run_here_or_elsewhere():
    seen = set()
    for runnable, language, text in itertools.chain(*BLOCKS.values()):
        for words in commands(text) if language == "bash" and not runnable else []:
            line = " ".join(words)
            key = next((start for start in ELSEWHERE if line.startswith(start)), None)
            assert key, f"nothing runs {line}"
            seen.add(key)
            name = re.split(r"[ .=]", key.removesuffix(".py"))[-1]
            assert name in (ROOT / "tests" / ELSEWHERE[key]).read_text()
    assert seen == set(ELSEWHERE)
    assert set(WRITTEN) == set(PAGES)
    assert sum(runnable for runnable, _, _ in itertools.chain(*BLOCKS.values())) >= 12


def anchors(text):
    return {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)", text, re.M)}


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_is_there(page):
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.S)
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        path = (ROOT / page).parent / path if path else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target
    for name in set(re.findall(r"`((?:[\w./]+/)?\w+\.(?:py|args|txt|sh|toml))`", prose)):
        places = [ROOT / folder / name for folder in ("", "support", "studies", "recipes", "tests", "benchmarks")]
        assert name in ("main_dino.py", "log.txt") or any(place.exists() for place in places), name


def test_readme_is_short_and_points_to_every_page():
    assert len(PAGES["README.md"].encode()) <= 11_000
    assert all(page == "README.md" or f"({page})" in PAGES["README.md"] for page in PAGES)


def test_the_table_of_recipes_has_each_with_its_tables():
    page = PAGES["docs/reproducing.md"]
    tables = {}
    for cell, numbers in re.findall(r"^\| (`(?:cifar10|imagenet1)\S*`.*?) \|.*\| ([\d, ]+) \|$", page, re.M):
        for pattern in re.findall(r"`(\S+)`", cell):
            parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
            for chosen in itertools.product(*parts):
                tables["".join(chosen)] = {f"table{n}" for n in numbers.split(", ")}
    own = {}
    for name, table in reproduce.paper()["tables"].items():
        for row in table["rows"].values():
            own.setdefault(row["recipe"], set()).add(name)
    assert set(tables) == set(own)
    assert all(own[recipe] <= tables[recipe] for recipe in own)
    assert set.union(*tables.values()) == set.union(*own.values())
    others = {path.stem for path in ROOT.glob("recipes/*.args")} - set(own)
    assert all(f"`{name}`" in page or f"`recipes/{name}.args`" in page for name in others)


@pytest.mark.parametrize(
    ("name", "title"), {"solar": "Solar cells", "fashion": "Fashion-MNIST", "digits": "Digits"}.items()
)
def test_the_tables_of_the_studies_are_those_of_the_report(name, title):
    tables = [line for line in report(STUDIES[name], ROOT / f"studies/{name}.csv") if line.startswith("|")]
    section = PAGES["docs/study.md"].partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\|.*", section, re.M) == tables
    cells = {line.split(" | ")[0]: line.split(" | ")[2:4] for line in reversed(tables) if "±" in line}
    in_readme = "untrained", "raw pixels", "DINO", "Ours, mean", "Ours, λ = 0.5, two heads"
    for label in in_readme if name != "solar" else []:
        linear, knn = cells[f"| {label}"]
        assert re.search(rf"^\| {label} \|.* {linear} \| {knn} \|", PAGES["README.md"], re.M), label
    if name == "digits":
        dino, mean = cells["| DINO"][1], cells["| Ours, mean"][1]
        assert f"DINO, five seeds of docs/study.md: {dino} %; the paper's mean loss: {mean} %" in MAKEFILE


def test_every_script_is_in_the_layout():
    layout = PAGES["README.md"][PAGES["README.md"].index("## Layout") :]
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in layout, path.name


@pytest.fixture
def workplace(tmp_path, monkeypatch, photo_folder, copydays_folder, retrieval_folder):
    """Return {placeholder of the pages: path} in an empty folder, which becomes the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "CROPS", {"train": 2, "val": 1})
    # ImageNet with the classes that are excluded, and two more
    lines = (ROOT / "recipes/imagenet100_kaggle.txt").read_text().split()
    for name in [*lines[:2], "n0", "n1"]:
        (tmp_path / "imagenet" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (20, 20), (80 * i, 0, 0)).save(tmp_path / "imagenet" / name / f"{i}.png")
    (tmp_path / "classes.txt").write_text("\n".join(lines[:2]))
    smaller = [*SMALLER["reproduce.py lists"], "--classes", tmp_path / "classes.txt"]
    monkeypatch.setitem(SMALLER, "reproduce.py lists", smaller)
    image = photo_folder / "val/china/0.jpg"
    places = {
        "FOLDER/val/CLASS/IMAGE": image, "FOLDER": photo_folder, "COPYDAYS": copydays_folder / "copydays",
        "WHITENING": copydays_folder / "whitening", "DISTRACTORS": copydays_folder / "distractors",
        "DATA": retrieval_folder, "IMAGENET": tmp_path / "imagenet", "LISTS": "lists", "IMAGE": image,
        "REPOSITORY": ROOT,
    }  # fmt: skip
    registries = [
        losses.LOSS_WEIGHTS,
        patch_matching.RULES,
        vision_transformer.ARCHITECTURES,
        vision_transformer.WIDTHS,
    ]
    before = [dict(registry) for registry in registries]
    yield places
    for registry, contents in zip(registries, before, strict=True):
        registry.clear()
        registry.update(contents)


def filled(text, places):
    """Replace the placeholders of a command by paths."""
    pattern = "|".join(rf"(?<![\w]){re.escape(name)}(?![\w])" for name in sorted(places, key=len, reverse=True))
    return re.sub(pattern, lambda match: str(places[match[0]]), text)


def run_python(script, *options):
    """Run a script in this process as a reader would start it, but smaller."""
    smaller = SMALLER.get(script) or SMALLER.get(" ".join([script, *options[:1]]), [])
    importlib.import_module(Path(script).stem).main([*map(str, options), *map(str, smaller)])


def run_command(words):
    if words[0] == "pip":
        known = (ROOT / "requirements-dev.txt").read_text()
        assert all(name == "-r" or name in known for name in words[2:])
    elif words[0] == "tensorboard":
        assert shutil.which("tensorboard", path=str(Path(sys.executable).parent))
        assert list(Path(words[2]).glob("**/events.out.tfevents.*"))
    else:
        assert words[0] == "python"
        run_python(*words[1:])


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(runnable for runnable, _, _ in BLOCKS[page])])
def test_what_is_marked_as_runnable_runs(page, workplace, tmp_path, monkeypatch):
    data = ("--data_path", workplace["FOLDER"])
    if page == "docs/export.md":  # which loads the network as a ViT-S/16 of 224 pixels
        large = "--arch vit_small --patch_size 16 --global_crops_size 224 --local_crops_size 32".split()
        monkeypatch.setitem(SMALLER, "main_lgssl.py", [*SMALLER["main_lgssl.py"], *large])
    if page != "README.md" and "OUT/checkpoint.pth" in PAGES[page]:
        run_python("main_lgssl.py", *data, "--output_dir", "OUT")
    if "OUT3" in PAGES[page]:  # three runs of two settings
        for i, loss in enumerate(("mean", "mean", "sum"), start=1):
            run_python("main_lgssl.py", *data, "--loss", loss, "--seed", i, "--output_dir", f"OUT{i}")
    found = {"__name__": "__main__"}
    for runnable, language, text in BLOCKS[page]:
        text = filled(text, workplace) if runnable else ""
        if language == "bash":
            for words in commands(text):
                run_command(words)
        else:
            # After the options of the recipe, those that make the run small
            tiny = "--epochs 1 --global_crops_size 16 --local_crops_size 8 --batch_size_per_gpu 700 --num_workers 0"
            exec(compile(text.replace(" --output_dir runs/", f" {tiny} --output_dir runs/"), page, "exec"), found)
    for name in WRITTEN[page]:
        assert (tmp_path / filled(name, workplace)).stat().st_size > 100, name
    if page == "docs/export.md":
        assert found["features"].shape == (12, 384)
        assert found["labels"].tolist() == 6 * [0] + 6 * [1]
        assert found["tokens"].shape == (2, 197, 384)
    if page == "README.md":
        assert load_file("runs/sqrt/checkpoint.pth")["args"]["loss"] == "sqrt"
        weights = losses.LOSS_WEIGHTS["sqrt"](None, torch.tensor([4, 9]), None)
        torch.testing.assert_close(weights, torch.tensor([1 / 2, 1 / 3]))
    if page == "docs/changing_the_method.md":
        assert load_file("runs/sparse/checkpoint.pth")["args"]["matching"] == "sparse"
        assert load_file("runs/mini/checkpoint.pth")["args"]["arch"] == "vit_mini"
        views = ((0, 0, 64, 64), False, (4, 4)) * 2
        paper, sparse = (patch_matching.match_patches(*views, rule) for rule in ("paper", "sparse"))
        assert [idx.tolist() for idx in sparse] == 2 * [[0, 1, 3, 9, 11]]
        assert set(sparse[0].tolist()) < set(paper[0].tolist())


@pytest.mark.slow
def test_the_demo_runs(tmp_path):
    """`make demo`, as the Makefile has it, with few epochs."""
    command = ["make", "--old-file=.venv/installed", "demo", f"PY={sys.executable}", f"RUN={tmp_path}/run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [*command, "OPTIONS=--epochs 3 --warmup_epochs 1 --knn_every 1"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    before, pixels, after = map(float, re.findall(r"^k-NN \(K=10\): top-1 ([\d.]+)", process.stdout, re.M))
    epochs = [json.loads(line) for line in (tmp_path / "run/log.txt").read_text().splitlines()]
    assert epochs[2]["train_loss"] < epochs[0]["train_loss"] - 0.05
    assert epochs[2]["knn_top1"] == pytest.approx(after, abs=0.01)
    assert 30 < before < 95 < pixels
    for name in ("checkpoint.pth", "log.txt", "matches.png", "map.png", "tb"):
        assert (tmp_path / "run" / name).exists(), name
