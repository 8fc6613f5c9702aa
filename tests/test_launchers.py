"""The scripts as a user starts them, by their `__main__` block: in one process and under torchrun."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import digits_run
import pytest
import torch
from conftest import ROOT

pytestmark = pytest.mark.slow

TINY = (
    "--arch vit_micro --patch_size 8 --image_size 40 --global_crops_size 32 --local_crops_size 16 "
    "--local_crops_number 2 --out_dim 24 --head_hidden_dim 32 --num_workers 1 --log_every 1 --lr 0.05 "
    "--warmup_epochs 0 --epochs 1"
).split()


@pytest.fixture(scope="module")
def torchrun():
    return digits_run.torchrun()[1:]


def children(pid):
    """Return the processes that a process has started."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def steps(output):
    return [json.loads(line) for line in (output / "steps.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def commands(photo_folder, copydays_folder, retrieval_folder, annotated_folders):
    """Return {name: (script, options, more of them in one process, more of them in two)}."""
    apart = "--image_size 64 --global_crops_scale 0.02 0.05 --local_crops_scale 0.01 0.02".split()  # few patches match
    train = [*TINY, "--geometry", "image", "--drop_path_rate", 0, "--data_path", photo_folder]
    copies = ["--data_path", copydays_folder / "copydays", "--whitening_path", copydays_folder / "whitening"]
    copies += ["--distractors_path", copydays_folder / "distractors", "--imsize", 64, "--batch_size_per_gpu", 5]
    knn = ["--data_path", photo_folder, "--nb_knn", 1, 5, "--crop_size", 64, "--batch_size_per_gpu", 5]
    places = ["--data_path", retrieval_folder, "--dataset", "rparis6k"]
    # Batches of one image, since the numbers of an image depend on the size of its batch in the last bits
    patches = ["--data_path", annotated_folders["plain"], "--crop_size", 64, "--batch_size_per_gpu", 1]
    linear = ["--data_path", photo_folder, "--crop_size", 32, "--epochs", 3, "--lr", 2]
    model = ["--num_workers", 1, "--pretrained_weights", "none", "--arch", "vit_micro"]
    four, two = ["--batch_size_per_gpu", 4], ["--batch_size_per_gpu", 2]
    ten, five = ["--batch_size_per_gpu", 10], ["--batch_size_per_gpu", 5]  # of 12 images: the last step has two
    return {
        "mean": ("main_lgssl", train, four, ["--batch_size_per_gpu", 1, "--accum_steps", 2]),
        "separate": ("main_lgssl", [*train, "--patch_head", "separate", *apart], four, two),
        "cls": ("main_lgssl", [*train, "--loss", "cls"], four, two),
        "knn": ("eval_knn", [*knn, *model], [], []),
        "copies": ("eval_copy_detection", [*copies, *model], [], []),
        "retrieval": ("eval_image_retrieval", [*places, *model], [], []),
        "patches": ("eval_dense", ["knn-segmentation", *patches, *model, "--memory_size", 90], [], []),
        "layer": ("eval_dense", ["linear-segmentation", *patches, *model, "--lr", 1], [], []),
        "linear": ("eval_linear", [*linear, *model], ten, five),
        "cached": ("eval_linear", [*linear, *model, "--cache_features"], ten, five),
    }


@pytest.fixture(scope="module")
def in_two(tmp_path_factory, run_script, torchrun, commands):
    """Return the folder with the outputs of all commands in two processes, which import everything only once."""
    folder = tmp_path_factory.mktemp("two")
    words = [
        [script, *map(str, (*a, *b)), "--output_dir", f"{folder}/{n}"] for n, (script, a, _, b) in commands.items()
    ]
    program = folder / "program.py"
    program.write_text(
        "import importlib, os, sys; sys.path.insert(0, '.')\n"
        "import torch.distributed as dist\n"
        f"for i, (script, *words) in enumerate({words}):\n"
        "    os.environ['TORCHELASTIC_RESTART_COUNT'] = str(i)  # the processes meet anew\n"
        "    importlib.import_module(script).main(words)\n"
        "    if dist.is_initialized(): dist.destroy_process_group()\n"
    )
    run_script(program, launcher=torchrun)
    return folder


@pytest.fixture
def both(request, tmp_path, run_main, commands, in_two):
    """Return the outputs of a command in one process and in two."""
    script, options, more, _ = commands[request.param]
    run_main(f"{script}.py", *options, *more, "--output_dir", tmp_path / "one")
    return tmp_path / "one", in_two / request.param


@pytest.mark.parametrize("both", ["mean", "separate", "cls"], indirect=True)
def test_two_processes_equal_one_with_twice_the_batch(both):
    one, two = map(steps, both)
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["matched_patches"] == pytest.approx(b["matched_patches"])
        assert a["lr"] == b["lr"]
    assert abs(one[0]["loss"] - one[2]["loss"]) > 1e-3  # it did learn
    a, b = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in both)
    torch.testing.assert_close(a["loss"]["center"], b["loss"]["center"], rtol=0, atol=1e-4)
    assert list(a["student"]) == list(b["student"])


@pytest.mark.parametrize(
    ("both", "name", "keys"),
    [
        ("knn", "knn_folder.json", ["knn"]),
        ("copies", "copydays.json", ["map"]),
        ("retrieval", "rparis6k.json", ["map", "mp", "aps"]),
        ("patches", "knn_segmentation_plain.json", ["iou", "pixel_accuracy", "patches"]),
        ("layer", "linear_segmentation_plain.json", ["iou", "pixel_accuracy", "patches"]),
    ],
    indirect=["both"],
)
def test_evaluation_in_two_processes_is_that_in_one(both, name, keys):
    one, two = (json.loads((folder / name).read_text()) for folder in both)
    assert [one[key] for key in keys] == [two[key] for key in keys]


@pytest.mark.parametrize("both", ["linear", "cached"], indirect=True)
def test_linear_evaluation_in_two_processes_is_that_in_one(both):
    one, two = (json.loads((folder / "linear_folder.json").read_text())["history"] for folder in both)
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["top1"] == pytest.approx(b["top1"], abs=0.1)
    assert one[0]["loss"] != one[2]["loss"]


def test_a_linear_evaluation_in_two_processes_goes_on(tmp_path, run_script, torchrun, commands, in_two):
    options = [*commands["linear"][1], "--batch_size_per_gpu", 5, "--output_dir", tmp_path]
    script = tmp_path / "stopped.py"  # after two epochs
    script.write_text(
        "import sys; sys.path.insert(0, '.')\n"
        "import eval_linear\n"
        "from support import checkpoints\n"
        "save = checkpoints.save\n"
        "def save_and_stop(contents, path):\n"
        "    save(contents, path)\n"
        "    if contents['epoch'] == 2: sys.exit(3)\n"
        "checkpoints.save = save_and_stop\n"
        "eval_linear.main(sys.argv[1:])\n"
    )
    assert run_script(script, *options, launcher=torchrun, check=False).returncode != 0
    run_script("eval_linear.py", *options, launcher=torchrun)
    resumed = json.loads((tmp_path / "linear_folder.json").read_text())
    undisturbed = json.loads((in_two / "linear/linear_folder.json").read_text())
    assert undisturbed["history"] == resumed["history"]


def test_ctrl_c_in_a_terminal_is_one_line():
    """A terminal sends SIGINT to the data-loading workers too."""
    words = "eval_linear.py --epochs 1000 --dataset digits --crop_size 32 --pretrained_weights none --arch vit_micro"
    command = [sys.executable, *words.split(), "--patch_size", "8", "--num_workers", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored if a shell has `pytest &`
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)
    deadline = time.monotonic() + 200
    try:
        while len(children(process.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, output
    assert output.splitlines()[-1] == "eval_linear.py: interrupted"
    assert "Traceback" not in output


def test_features_of_uneven_parts_keep_their_order(photo_folder, tmp_path, run_script, torchrun):
    """7 images on 2 processes in batches of 3, gathered two per process at a time."""
    script = tmp_path / "extract.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(photo_folder.parent)!r}); sys.path.insert(0, '.')\n"
        "import torch, utils\n"
        "from support import features\n"
        "features.GATHERED_ROWS = 2\n"
        "rank, world_size, device = utils.init_distributed()\n"
        "images = [(torch.full((3, 4, 4), float(i)), 0) for i in range(7)]\n"
        "found = features.extract_features(lambda x: x.mean((2, 3)), images, device, 3, 0)\n"
        "assert (found is None) == (rank > 0)\n"
        f"found is None or torch.save(found, {str(tmp_path / 'features.pth')!r})\n"
        "torch.distributed.destroy_process_group()\n"  # a thread of Gloo may abort a process that ends without it
    )
    run_script(script, launcher=torchrun)
    features = torch.load(tmp_path / "features.pth")
    assert torch.equal(features, torch.arange(7.0)[:, None].expand(7, 3))


def test_compiled_blocks_train_alike(photo_folder, tmp_path, run_main, run_script):
    """There is one program for the teacher and one for each size of the student's views, but none for the k-NN."""
    options = [*TINY, "--drop_path_rate", 0.2, "--data_path", photo_folder, "--batch_size_per_gpu", 4, "--knn_every", 1]
    run_main("main_lgssl.py", *options, "--output_dir", tmp_path / "plain")
    words = [*map(str, options), "--compile", "--output_dir", str(tmp_path / "compiled")]
    script = f"import torch, main_lgssl; main_lgssl.main({words}); print(torch._dynamo.utils.counters['stats'])"
    output = run_script("-c", script).stdout
    assert "in fp32, compiled blocks, 3 steps" in output.splitlines()[0]
    assert "'unique_graphs': 4" in output.splitlines()[-1]  # with that of the check for a compiler
    for a, b in zip(steps(tmp_path / "plain"), steps(tmp_path / "compiled"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    plain, compiled = (torch.load(tmp_path / n / "checkpoint.pth", weights_only=True) for n in ("plain", "compiled"))
    assert list(plain["student"]) == list(compiled["student"])


def test_online_segmentation_in_two_processes_is_that_in_one(annotated_folders, tmp_path, run_script, torchrun):
    """With three queries, the processes have different numbers of them."""
    script = tmp_path / "program.py"
    script.write_text(
        "import sys; sys.path.insert(0, '.')\n"
        "import torch\n"
        "from support.observe import OnlineSegmentation\n"
        "from utils import init_distributed\n"
        "from vision_transformer import vit_micro\n"
        "init_distributed()\n"
        "torch.manual_seed(0)\n"
        f"segmentation = OnlineSegmentation({str(annotated_folders['voc'])!r}, 32, 3, 0)\n"
        "segmentation.splits['val'].keep(range(3))\n"
        "miou = segmentation(vit_micro(8, img_size=32).eval(), torch.device('cpu'))\n"
        "sys.stdout.write(f'mIoU {miou}\\n')\n"  # in one piece, as print is not
        "if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()\n"
    )
    one, two = (run_script(script, launcher=launcher).stdout.splitlines() for launcher in ((), torchrun))
    (value,) = one
    assert two == [value, value]
    assert 0 < float(value.split()[1]) < 100


def test_papers_crops_on_photographs(photo_folder, tmp_path, run_main):
    options = ["--data_path", photo_folder, "--arch", "vit_tiny", "--epochs", 1, "--batch_size_per_gpu", 6]
    run_main("main_lgssl.py", *options, "--num_workers", 1, "--output_dir", tmp_path)
    checkpoint = tmp_path / "checkpoint.pth"
    output = run_main(
        "eval_knn.py", "--data_path", photo_folder, "--pretrained_weights", checkpoint, "--nb_knn", 3
    ).stdout
    assert "k-NN (K=3): top-1" in output
    assert json.loads((tmp_path / "knn_folder.json").read_text())["crop_size"] == 224


def test_user_errors_are_one_line(photo_folder, tmp_path, run_script, torchrun):
    """Also those of a data-loading process, which must not keep the command from ending, and under torchrun."""
    (tmp_path / "bad").mkdir()
    for i in range(4):
        (tmp_path / "bad" / f"{i}.png").write_bytes(b"broken")
    train = [
        "main_lgssl.py",
        *TINY,
        "--data_path",
        tmp_path / "bad",
        "--batch_size_per_gpu",
        2,
        "--output_dir",
        tmp_path,
    ]
    linear = ["eval_linear.py", "--data_path", photo_folder, "--pretrained_weights", "none", "--n_last_blocks", 13]
    for words, message in ((train, "cannot read image"), (linear, "--n_last_blocks 13 is more")):
        process = run_script(*words, check=False)
        assert process.returncode == 2
        assert re.fullmatch(rf"{words[0]}: error: {message}[^\n]*\n", process.stderr), process.stderr
        process = run_script(*words, check=False, launcher=torchrun, timeout=120)
        assert process.returncode != 0
        assert f"{words[0]}: error: {message}" in process.stderr
