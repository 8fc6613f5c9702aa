import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """Load a golden file by name: arrays of an .npz with its meta parsed, or a .json."""

    def load(name):
        if name.endswith(".json"):
            return json.loads((GOLDEN / name).read_text())
        with np.load(GOLDEN / name) as file:
            arrays = dict(file)
        arrays["meta"] = json.loads(str(arrays["meta"]))
        return arrays

    return load


@pytest.fixture(scope="session")
def photographs():
    """Return two photographs as PIL images."""
    return [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory, photographs):
    """Return a folder with train and val, each with the classes china and flower: cuttings of the two photographs."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name, photo in zip(("china", "flower"), photographs, strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                left, top = int(rng.integers(300)), int(rng.integers(150))
                photo.crop((left, top, left + 300, top + 240)).save(root / split / name / f"{i}.jpg")
    return root


@pytest.fixture(scope="session")
def run_script():
    """Run a script of the repository as a user would, and return the finished process."""

    def run(*words, launcher=(), check=True, timeout=300, **environment):
        command = [sys.executable, *launcher, *map(str, words)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
        if check:
            assert process.returncode == 0, process.stdout + process.stderr
        return process

    return run
