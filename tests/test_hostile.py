"""Wrong and hostile input: each command ends soon, with one clear line, and without a number that means nothing."""

import re
import shutil
import signal
import subprocess
import sys

import hostile_figures
import hostile_files
import hostile_images
import hostile_settings
import pytest
import torch
from conftest import ROOT

import main_lgssl
from vision_transformer import vit_micro

CASES = [*hostile_images.CASES, *hostile_figures.CASES, *hostile_files.CASES, *hostile_settings.CASES]
SECONDS = 20
TINY_RUN = (
    "--arch vit_micro --patch_size 8 --image_size 40 --global_crops_size 32 --local_crops_size 16 --out_dim 24 "
    "--local_crops_number 1 --head_hidden_dim 32 --num_workers 0 --epochs 1 --warmup_epochs 0 --batch_size_per_gpu 4 "
    "--knn_every 0 --image_every 0"
)


@pytest.fixture(scope="session")
def places(photo_folder, tmp_path_factory):
    """Return the folders and files that the cases share, {name: path}. No case may change them."""
    root = tmp_path_factory.mktemp("places")
    (root / "flat").mkdir()
    for path in sorted(photo_folder.glob("train/*/*.jpg")):
        shutil.copy(path, root / "flat" / f"{path.parent.name}{path.name}")
    weights = {f"backbone.{name}": value for name, value in vit_micro(8, img_size=32).state_dict().items()}
    args = {"arch": "vit_micro", "patch_size": 8, "global_crops_size": 32}
    torch.save({"teacher": weights, "args": args}, root / "weights.pth")
    main_lgssl.main(f"--data_path {photo_folder} --output_dir {root / 'run'} {TINY_RUN}".split())
    found = {"data": photo_folder, "flat": root / "flat", "weights": root / "weights.pth", "run": root / "run"}
    return {**found, "root": ROOT, "tiny": TINY_RUN}


@pytest.fixture
def check(places, tmp_path, run_main, monkeypatch):
    """Return a function that runs a case and checks how it ends."""

    def check_case(case):
        if case.make:
            case.make(tmp_path, places)
        script, *words = case.words.format(here=tmp_path, **places).split()
        for name, value in (case.env or {}).items():
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        if case.process:
            command = [sys.executable, str(ROOT / script), *words]
            process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3 * SECONDS)
        else:
            previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"{case.name} takes {SECONDS} seconds"))
            signal.alarm(SECONDS)
            try:
                process = run_main(script, *words, check=False)
            finally:
                signal.alarm(0)
                signal.signal(signal.SIGALRM, previous)
        output = f"{case.name}: {script} {' '.join(words)}\n{process.stdout}{process.stderr}"
        assert process.returncode == case.code, output
        assert "Traceback" not in output
        if case.code == 0:
            assert re.search(case.expected, process.stdout + process.stderr), output
        else:
            errors = [line for line in process.stderr.splitlines() if "error: " in line]
            assert len(errors) == 1, output
            assert re.search(case.expected, errors[0]), output

    return check_case


def test_there_are_at_least_300_cases_with_unique_names():
    assert len({case.name for case in CASES}) == len(CASES) >= 300


@pytest.mark.parametrize("case", CASES[::10], ids=lambda case: case.name)
def test_sample(case, check):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_all(case, check):
    check(case)
