"""Wrong and hostile input: each command ends soon, with one clear line, and without a number that means nothing."""

import re
import resource
import shutil
import signal
import stat

import hostile_cases
import pytest
import torch
from conftest import ROOT

import main_lgssl
from vision_transformer import vit_micro

SECONDS = 20
TINY_RUN = (
    "--arch vit_micro --patch_size 8 --image_size 40 --global_crops_size 32 --local_crops_size 16 --out_dim 24 "
    "--local_crops_number 1 --head_hidden_dim 32 --num_workers 0 --epochs 1 --warmup_epochs 0 --batch_size_per_gpu 4 "
    "--knn_every 0 --image_every 0"
)
LAUNCHER = "RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_USE_AGENT_STORE".split()


@pytest.fixture(scope="session")
def places(photo_folder, tmp_path_factory):
    """Return the folders and files that the cases share, {name: path}."""
    root = tmp_path_factory.mktemp("places")
    (root / "flat").mkdir()
    for path in sorted(photo_folder.glob("train/*/*.jpg")):
        shutil.copy(path, root / "flat" / f"{path.parent.name}{path.name}")
    weights = {f"backbone.{name}": value for name, value in vit_micro(8, img_size=32).state_dict().items()}
    args = {"arch": "vit_micro", "patch_size": 8, "global_crops_size": 32}
    torch.save({"teacher": weights, "args": args}, root / "weights.pth")
    main_lgssl.main(f"--data_path {photo_folder} --output_dir {root / 'run'} {TINY_RUN}".split())
    shared = {"data": photo_folder, "flat": root / "flat", "weights": root / "weights.pth", "run": root / "run"}
    return {**shared, "root": ROOT, "tiny": TINY_RUN}


def snapshot(*folders):
    """Return what files there are, and when they were last changed."""
    files = {path: path.lstat() for folder in folders for path in folder.rglob("*") if path.name != ".lock"}
    return {(path, s.st_size, s.st_mtime_ns) for path, s in files.items() if not stat.S_ISDIR(s.st_mode)}


@pytest.fixture
def check(places, tmp_path, run_main, monkeypatch):
    """Return a function that runs a command and checks how it ends."""

    def check(words, expected, code=2):
        script, *words = words.format(here=tmp_path, **places).split(" ")
        before = snapshot(tmp_path, places["weights"].parent, places["data"])
        previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"it takes {SECONDS} seconds"))
        signal.alarm(SECONDS)
        try:
            process = run_main(script, *words, check=False)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)
        output = process.stdout + process.stderr
        assert "Traceback" not in output
        assert process.returncode in ((0, 2) if code is None else (code,)), output
        if process.returncode == 0:
            assert re.search(expected, output), output
        else:
            errors = [line for line in process.stderr.splitlines() if "error: " in line]
            assert len(errors) == 1, output
            assert process.stderr.endswith(errors[0] + "\n"), output
            assert re.search(expected, errors[0]), output
            assert before <= snapshot(tmp_path, places["weights"].parent, places["data"])

    return check


@pytest.mark.parametrize("case", hostile_cases.CASES, ids=lambda case: case.name)
def test_wrong_input_ends_with_one_line(case, check, tmp_path, places, monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name, value in (case.env or {}).items():
        monkeypatch.setenv(name, value)
    case.make(tmp_path, places)
    check(case.words, case.expected, case.code)


@pytest.mark.parametrize(
    "words", [hostile_cases.GOOD_TRAIN, f"{hostile_cases.EXPORT} {{weights}}", hostile_cases.MATCHES]
)
def test_full_disk_ends_with_one_line(check, words):
    """A limit on file sizes simulates a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, hard))
    try:
        check(words, "cannot (save|write) .*File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
