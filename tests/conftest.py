import fcntl
import gc
import json
import multiprocessing
import os
import pickle
import runpy
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the workers of pytest -n share the cores

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported: its interpreter runs the kernels of the loss on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from digits_run import RUN, torchrun
from PIL import Image, ImageEnhance, ImageFilter
from sklearn.datasets import load_sample_image

from support.arguments import CLASS_LISTS
from support.sources import DataSpec, build_dataset

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"


def open_dataset(dataset, data_path=None, split="train", transform=None, min_side=None, **options):
    """Open a data set by the names of its options, see DataSpec and build_dataset."""
    return build_dataset(DataSpec(dataset, data_path, **options), split, transform, min_side)


def timms_drop_paths(network, images):
    """Draw the stochastic depth of a network as timm's blocks do, one after the other, without the first one."""
    rates = torch.linspace(0, network.drop_path_rate, len(network.blocks)).tolist()
    factors = torch.ones(len(rates), 2, images)
    for of_block, rate in zip(factors[1:], rates[1:], strict=True):
        for of_branch in of_block:
            of_branch.bernoulli_(1 - rate).div_(1 - rate)
    return factors


@pytest.fixture(autouse=True)
def no_leaked_workers():
    """Free the iterators of data loaders in tracebacks: if their workers died later, later tests would fail."""
    yield
    if multiprocessing.active_children():
        gc.collect()


def pretend_a_gpu(monkeypatch, evaluation):
    """Give random features to an evaluation, and the meta device, which computes nothing, in place of a GPU."""

    def features_of_all(network, datasets, *_, **__):
        return {name: torch.rand(len(dataset), 8) for name, dataset in datasets.items()}

    monkeypatch.setattr(evaluation, "features_of_all", features_of_all)
    monkeypatch.setattr(evaluation, "init_distributed", lambda _: (0, 1, torch.device("meta")))


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
    """Return a folder with train and val, each with the classes china and flower: crops of the two photographs."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name, photo in zip(("china", "flower"), photographs, strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                left, top = int(rng.integers(300)), int(rng.integers(150))
                photo.crop((left, top, left + 300, top + 240)).save(root / split / name / f"{i}.jpg")
    return root


@pytest.fixture
def small_lists(tmp_path_factory, monkeypatch):
    """Let the lists of ImageNet-100 hold the classes of `photo_folder`, in another order each."""
    folder = tmp_path_factory.mktemp("lists")
    for name, text in (("kaggle", "china\nflower\n"), ("cmc", "flower\nchina\n")):
        (folder / f"{name}.txt").write_text(text)
        monkeypatch.setitem(CLASS_LISTS, name, folder / f"{name}.txt")
    return folder


def cuttings(photos, count, seed, side=150):
    """Cut squares that hardly overlap out of photographs, in turn."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        photo = photos[i % len(photos)]
        left, top = (int(rng.integers(length - side)) for length in photo.size)
        yield photo.crop((left, top, left + side, top + side))


def distort(image, kind):
    """Copy an image as Copydays' strong ones do: cut and recompressed, blurred and darkened, or turned."""
    if kind == 0:
        width, height = image.size
        return image.crop((width // 8, height // 8, width, height)).resize((90, 90))
    if kind == 1:
        return ImageEnhance.Brightness(image.filter(ImageFilter.GaussianBlur(2))).enhance(0.7)
    return image.rotate(8, fillcolor="gray")


@pytest.fixture(scope="session")
def copydays_folder(tmp_path_factory, photographs):
    """Return a folder with copydays in its true layout, and the folders distractors and whitening."""
    root = tmp_path_factory.mktemp("copies")
    for name in ("copydays/original", "copydays/strong", "copydays/jpegqual/15", "distractors", "whitening"):
        (root / name).mkdir(parents=True)
    for i, image in enumerate(cuttings(photographs, 12, seed=0)):
        image.save(root / f"copydays/original/2{i:03}00.jpg")
        image.save(root / f"copydays/jpegqual/15/2{i:03}00.jpg", quality=15)
        for kind in range(3):
            distort(image, kind).save(root / f"copydays/strong/2{i:03}{kind + 1:02}.jpg", quality=30)
    for name, count, seed in (("distractors", 10, 1), ("whitening", 60, 2)):
        for i, image in enumerate(cuttings(photographs, count, seed)):
            image.save(root / name / f"{i}.jpg")
    return root


@pytest.fixture(scope="session")
def retrieval_folder(tmp_path_factory, photographs):
    """Return a folder with roxford5k and rparis6k in their true layout: places, two easy and two hard views of each."""
    root = tmp_path_factory.mktemp("places")
    for name in ("roxford5k", "rparis6k"):
        (root / name / "jpg").mkdir(parents=True)
        gnd, images = [], {}
        for i, place in enumerate(cuttings(photographs, 6, seed=3, side=170)):
            images[f"query_{i}"] = place.crop((0, 0, 170, 130 + 5 * i))
            views = [distort(place, 1), place.crop((10, 5, 170, 165)), distort(place, 0), distort(place, 2)]
            first = 5 * i
            for j, view in enumerate([*views, place.resize((20, 20))]):
                images[f"place_{i}_{j}"] = view
            gnd.append(
                {
                    "bbx": [12.0, 10.0, 160.5, 120.0],
                    "easy": np.array([first, first + 1]),
                    "hard": [first + 2, first + 3],
                    "junk": np.array([first + 4]),
                }
            )
        for image_name, image in images.items():
            image.save(root / name / "jpg" / f"{image_name}.jpg")
        names = sorted(images)
        contents = {"imlist": names[:30], "qimlist": names[30:], "gnd": gnd}
        (root / name / f"gnd_{name}.pkl").write_bytes(pickle.dumps(contents, protocol=2))
    return root


@pytest.fixture(scope="session")
def annotated_folders(tmp_path_factory):
    """Return {"plain": folder, "voc": folder} of annotated images: rectangles of four colors, their edges ignored."""
    root, rng = tmp_path_factory.mktemp("annotated"), np.random.default_rng(0)
    colors, voc = rng.integers(0, 256, (5, 3)), root / "voc/VOCdevkit/VOC2012"
    for split, count in (("train", 6), ("val", 4)):
        for i in range(count):
            mask = np.zeros((40, 48), np.uint8)
            for label in range(1, 5):
                top, left = rng.integers(30), rng.integers(38)
                mask[top : top + 12, left : left + 12] = 255
                mask[top + 1 : top + 11, left + 1 : left + 11] = label
            pixels = (colors[mask % 251] + rng.normal(0, 20, (*mask.shape, 3))).clip(0, 255).astype(np.uint8)
            of_mask = Image.fromarray(mask)
            of_mask.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
            places = [root / f"plain/{kind}/{split}/{'ab'[i % 2]}/{i}.png" for kind in ("images", "masks")]
            places += [voc / f"JPEGImages/{split}{i}.jpg", voc / f"SegmentationClass/{split}{i}.png"]
            for path, picture in zip(places, 2 * [Image.fromarray(pixels), of_mask], strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
        (voc / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (voc / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{split}{i}\n" for i in range(count)))
    return {"plain": root / "plain", "voc": root / "voc"}


@pytest.fixture
def cifar10_folder(tmp_path, monkeypatch):
    """Return a folder with CIFAR-10 in its true format, 12 images a batch: noise around a color of the class.

    Only torchvision's check of the files' checksums is disabled.
    """
    folder = tmp_path / "cifar10/cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (3, 3))  # of the classes that occur
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        labels = np.arange(12) % 3
        pixels = rng.normal(colors[labels].repeat(1024, 1), 40).clip(0, 255).astype(np.uint8)  # [12, 3 * 32 * 32]
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels.tolist()}))
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    return folder.parent


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory, run_script):
    """Return the folder of an undisturbed run of two processes, which all workers of pytest -n share."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "two"
    done = folder.with_suffix(".done")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            _, *launcher = torchrun()
            words = [*RUN, "--batch_size_per_gpu", 4, "--output_dir", folder]
            run_script(*words, launcher=launcher, CUDA_VISIBLE_DEVICES="")
            done.touch()
    return folder


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


@pytest.fixture
def run_main(capfd, monkeypatch):
    """Run a script as run_script does, but in this process, which takes no seconds for the imports."""

    def run(script, *words, check=True):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        handler = signal.getsignal(signal.SIGCHLD)
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
        finally:
            signal.signal(signal.SIGCHLD, handler)  # one_line_errors resets it
        process = subprocess.CompletedProcess([script, *words], code, *capfd.readouterr())
        if check:
            assert code == 0, process.stdout + process.stderr
        return process

    return run
