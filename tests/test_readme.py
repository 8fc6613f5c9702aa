"""The README as documentation that is run: its commands and its Python, at a tiny size."""

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
from support import images
from support.checkpoints import load_file

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# (marked as runnable, language, text) of each fenced block
BLOCKS = [
    (bool(mark), language, text)
    for mark, language, text in re.findall(r"(<!-- runnable -->\n)?```(\w+)\n(.*?)```", README, re.S)
]
# What comes behind the README's own options, so that a command takes seconds, by script or script and sub-command.
SMALLER = {
    "main_lgssl.py": [*TINY, "--batch_size_per_gpu", 4],
    "eval_knn.py": ["--nb_knn", 2, "--num_workers", 0],
    "eval_linear.py": ["--epochs", 1, "--n_last_blocks", 1, "--num_workers", 0],
    "eval_copy_detection.py": ["--imsize", 32, "--num_workers", 0],
    "eval_image_retrieval.py": ["--imsize", 32, "--num_workers", 0],
    "reproduce.py lists": ["--whitening", 2, "--distractors", 2],
    "extract_features.py": ["--num_workers", 0],
}
# Commands that are not marked as runnable, and what runs them instead.
ELSEWHERE = {
    "make demo": "test_readme.py",
    "make test": "../.ci/run",
    "pip install -r requirements.txt": "../Makefile",
    "torchrun --nproc_per_node=8 main_lgssl.py": "test_launchers.py",
    "torchrun --nproc_per_node=8 eval_linear.py": "test_launchers.py",
    "python run_with_submitit.py": "test_slurm.py",
    "python reproduce.py run": "test_reproduce.py",
    "python -m benchmarks.bench_step": "test_benchmarks.py",
    "python -m benchmarks.bench_views": "test_benchmarks.py",
    "python -m benchmarks.bench_matching": "test_benchmarks.py",
    "python -m benchmarks.bench_knn": "test_benchmarks.py",
    "python -m benchmarks.bench_watching": "test_benchmarks.py",
}


def commands(text):
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def test_every_command_is_run_here_or_elsewhere():
    seen = set()
    for runnable, language, text in BLOCKS:
        for words in commands(text) if language == "bash" and not runnable else []:
            line = " ".join(words)
            key = next((start for start in ELSEWHERE if line.startswith(start)), None)
            assert key, f"nothing runs {line}"
            seen.add(key)
            name = re.split(r"[ .=]", key.removesuffix(".py"))[-1]
            assert name in (ROOT / "tests" / ELSEWHERE[key]).read_text()
    assert seen == set(ELSEWHERE)
    assert sum(runnable for runnable, _, _ in BLOCKS) >= 12


def test_every_file_that_is_named_is_there():
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        assert (ROOT / target).exists(), target
    for name in set(re.findall(r"`((?:[\w./]+/)?\w+\.(?:py|args|txt|sh|toml))`", prose)):
        places = [ROOT / folder / name for folder in ("", "support", "recipes", "tests", "benchmarks")]
        assert name in ("main_dino.py", "log.txt") or any(place.exists() for place in places), name
    headings = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)", README, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", prose)) <= headings


def test_the_table_of_recipes_has_each_with_its_tables():
    tables = {}
    for cell, numbers in re.findall(r"^\| (`(?:cifar10|imagenet1)\S*`.*?) \|.*\| ([\d, ]+) \|$", README, re.M):
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


def test_every_script_is_in_the_layout():
    layout = README[README.index("## How the code is laid out") :]
    for path in (*ROOT.glob("*.py"), *ROOT.glob("support/*.py")):
        assert path.name == "__init__.py" or f"`{path.name}`" in layout, path.name


@pytest.fixture
def workplace(tmp_path, monkeypatch, photo_folder, copydays_folder, retrieval_folder):
    """Return {placeholder of the README: path} in an empty folder, which becomes the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(images.Photographs, "CROPS", {"train": 2, "val": 1})
    # ImageNet with the classes that are left out, and two more
    lines = (ROOT / "recipes/imagenet100_cmc.txt").read_text().split()
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
        "@recipes": f"@{ROOT}/recipes", "REPOSITORY": ROOT,
    }  # fmt: skip
    registries = [losses.LOSSES, patch_matching.RULES, vision_transformer.ARCHITECTURES]
    before = [dict(registry) for registry in registries]
    yield places
    for registry, contents in zip(registries, before, strict=True):
        registry.clear()
        registry.update(contents)


def filled(text, places):
    """Put paths into the places of a command's placeholders."""
    pattern = "|".join(rf"(?<![\w]){re.escape(name)}(?![\w])" for name in sorted(places, key=len, reverse=True))
    return re.sub(pattern, lambda match: str(places[match[0]]), text)


def run_python(script, *options):
    """Run a script in this process, as a user of the README would start it, but smaller."""
    smaller = SMALLER.get(script) or SMALLER.get(" ".join([script, *options[:1]]), [])
    importlib.import_module(Path(script).stem).main([*map(str, options), *map(str, smaller)])


@pytest.mark.slow
def test_commands_marked_as_runnable_run(workplace, tmp_path):
    ran = []
    for runnable, language, text in BLOCKS:
        if not runnable or language != "bash":
            continue
        for words in commands(filled(text, workplace)):
            if words[0] == "pip":
                known = (ROOT / "requirements-dev.txt").read_text()
                assert all(name in known for name in words[2:])
            elif words[0] == "tensorboard":
                assert shutil.which("tensorboard", path=str(Path(sys.executable).parent))
                assert list((tmp_path / words[2]).glob("**/events.out.tfevents.*"))
            else:
                assert words[0] == "python"
                if words[1] == "plot_runs.py":  # three runs of two settings
                    for i, loss in enumerate(("mean", "mean", "sum"), start=1):
                        setting = ("--data_path", workplace["FOLDER"], "--loss", loss, "--seed", i)
                        run_python("main_lgssl.py", *setting, "--output_dir", f"OUT{i}")
                run_python(*words[1:])
                ran.append(words[1])
    for name in (
        "runs.pdf",
        "map.pdf",
        "matches.png",
        "assets/matches.png",
        "assets/features.png",
        "OUT/knn_folder.json",
    ):
        assert (tmp_path / name).stat().st_size > 100, name
    assert {"main_lgssl.py", "visualize.py", "export.py", "reproduce.py", "plot_runs.py"} <= set(ran)


@pytest.mark.slow
def test_python_marked_as_runnable_runs(workplace, tmp_path, photo_folder, monkeypatch):
    data = ("--data_path", photo_folder)
    small = "--arch vit_small --patch_size 16 --global_crops_size 224 --local_crops_size 32".split()
    monkeypatch.setitem(SMALLER, "main_lgssl.py", [*SMALLER["main_lgssl.py"], *small])
    run_python("main_lgssl.py", *data, "--output_dir", "OUT")
    run_python("export.py", "--pretrained_weights", "OUT/checkpoint.pth", "--output_dir", "EXPORT")
    run_python("extract_features.py", *data, "--pretrained_weights", "OUT/checkpoint.pth", "--output", "features.npz")
    found = {}
    for runnable, language, text in BLOCKS:
        if runnable and language == "python":
            text = filled(text, workplace)
            # Behind the recipe's options, those that make the run small
            tiny = "--epochs 1 --global_crops_size 16 --local_crops_size 8 --batch_size_per_gpu 700 --num_workers 0"
            text = text.replace(" --output_dir runs/", f" {tiny} --output_dir runs/")
            exec(compile(text, "README.md", "exec"), found)
    assert found["features"].shape == (12, 384)
    assert found["labels"].tolist() == 6 * [0] + 6 * [1]
    assert found["tokens"].shape == (2, 197, 384)
    for run, argument, value in (
        ("sqrt", "loss", "sqrt"),
        ("sparse", "matching", "sparse"),
        ("mini", "arch", "vit_mini"),
    ):
        assert load_file(tmp_path / "runs" / run / "checkpoint.pth")["args"][argument] == value
    # What the README says of them
    torch.testing.assert_close(losses.LOSSES["sqrt"](None, torch.tensor([4, 9]), None), torch.tensor([1 / 2, 1 / 3]))
    box = (0, 0, 64, 64)
    paper, sparse = (
        patch_matching.match_patches(box, False, (4, 4), box, False, (4, 4), r) for r in ("paper", "sparse")
    )
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
    before, after = map(float, re.findall(r"^k-NN \(K=10\): top-1 ([\d.]+)", process.stdout, re.M))
    epochs = [json.loads(line) for line in (tmp_path / "run/log.txt").read_text().splitlines()]
    assert epochs[2]["train_loss"] < epochs[0]["train_loss"] - 0.05
    assert epochs[2]["knn_top1"] == pytest.approx(after, abs=0.01)
    assert before > 30
    for name in ("checkpoint.pth", "log.txt", "matches.png", "map.png", "tb"):
        assert (tmp_path / "run" / name).exists(), name
