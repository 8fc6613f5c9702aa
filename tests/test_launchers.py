"""The scripts as a user starts them, by their `__main__` block: in one process and under torchrun."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import digits_run
import pytest
import torch
from conftest import ROOT

from utils import UserError

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


@pytest.mark.parametrize("loss", ["mean", "cls"])
def test_two_processes_equal_one_with_twice_the_batch(photo_folder, tmp_path, run_main, run_script, torchrun, loss):
    options = [*TINY, "--geometry", "image", "--drop_path_rate", 0, "--data_path", photo_folder, "--loss", loss]
    run_main("main_lgssl.py", *options, "--batch_size_per_gpu", 4, "--output_dir", tmp_path / "one")
    parts = [1, "--accum_steps", 2] if loss == "mean" else [2]
    two = ["--batch_size_per_gpu", *parts, "--output_dir", tmp_path / "two"]
    run_script("main_lgssl.py", *options, *two, launcher=torchrun)
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["matched_patches"] == pytest.approx(b["matched_patches"])
        assert a["lr"] == b["lr"]
    assert abs(one[0]["loss"] - one[2]["loss"]) > 1e-3  # it did learn
    a, b = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in ("one", "two"))
    torch.testing.assert_close(a["loss"]["center"], b["loss"]["center"], rtol=0, atol=1e-4)
    assert list(a["student"]) == list(b["student"])


def test_knn_of_two_processes_is_that_of_one(photo_folder, tmp_path, run_main, run_script, torchrun):
    options = ["--data_path", photo_folder, "--nb_knn", 1, 5, "--num_workers", 0, "--pretrained_weights", "none"]
    options += ["--arch", "vit_micro", "--batch_size_per_gpu", 5, "--crop_size", 64]
    run_main("eval_knn.py", *options, "--output_dir", tmp_path / "one")
    run_script("eval_knn.py", *options, "--output_dir", tmp_path / "two", launcher=torchrun)
    one, two = (json.loads((tmp_path / name / "knn_folder.json").read_text()) for name in ("one", "two"))
    assert one["knn"] == two["knn"]


def test_copy_detection_of_two_processes_is_that_of_one(copydays_folder, tmp_path, run_main, run_script, torchrun):
    options = ["--data_path", copydays_folder / "copydays", "--whitening_path", copydays_folder / "whitening"]
    options += ["--distractors_path", copydays_folder / "distractors", "--imsize", 64, "--num_workers", 1]
    options += ["--pretrained_weights", "none", "--arch", "vit_micro", "--batch_size_per_gpu", 5]
    run_main("eval_copy_detection.py", *options, "--output_dir", tmp_path / "one")
    run_script("eval_copy_detection.py", *options, "--output_dir", tmp_path / "two", launcher=torchrun)
    one, two = (json.loads((tmp_path / name / "copydays.json").read_text()) for name in ("one", "two"))
    assert one["map"] == two["map"]


def test_retrieval_of_two_processes_is_that_of_one(retrieval_folder, tmp_path, run_main, run_script, torchrun):
    options = ["--data_path", retrieval_folder, "--dataset", "rparis6k", "--num_workers", 1]
    options += ["--pretrained_weights", "none", "--arch", "vit_micro"]
    run_main("eval_image_retrieval.py", *options, "--output_dir", tmp_path / "one")
    run_script("eval_image_retrieval.py", *options, "--output_dir", tmp_path / "two", launcher=torchrun)
    one, two = (json.loads((tmp_path / name / "rparis6k.json").read_text()) for name in ("one", "two"))
    assert [one[kind] for kind in ("map", "mp", "aps")] == [two[kind] for kind in ("map", "mp", "aps")]


@pytest.fixture(scope="module")
def linear_of_two(photo_folder, tmp_path_factory, run_script, torchrun):
    """Return the options of a linear evaluation, and its result in two processes with a batch of 5 each."""
    options = ["--data_path", photo_folder, "--num_workers", 1, "--pretrained_weights", "none", "--arch", "vit_micro"]
    options += ["--crop_size", 32, "--epochs", 3, "--lr", 2]
    folder = tmp_path_factory.mktemp("linear")
    words = [*options, "--batch_size_per_gpu", 5, "--output_dir", folder]
    run_script("eval_linear.py", *words, launcher=torchrun)
    return options, json.loads((folder / "linear_folder.json").read_text())


def assert_same_linear(one, two):
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["top1"] == pytest.approx(b["top1"], abs=0.1)
    assert one["history"][0]["loss"] != one["history"][2]["loss"]


def test_linear_evaluation_of_two_processes_is_that_of_one(tmp_path, run_main, linear_of_two):
    """12 images in steps of 10: in the last step the second process has none."""
    options, two = linear_of_two
    run_main("eval_linear.py", *options, "--batch_size_per_gpu", 10, "--output_dir", tmp_path)
    assert_same_linear(json.loads((tmp_path / "linear_folder.json").read_text()), two)


def test_linear_evaluation_on_cached_features_of_two_processes_is_that_of_one(
    tmp_path, run_main, run_script, torchrun, linear_of_two
):
    options = [*linear_of_two[0], "--cache_features"]
    run_main("eval_linear.py", *options, "--batch_size_per_gpu", 10, "--output_dir", tmp_path / "one")
    two = ["--batch_size_per_gpu", 5, "--output_dir", tmp_path / "two"]
    run_script("eval_linear.py", *options, *two, launcher=torchrun)
    assert_same_linear(*(json.loads((tmp_path / n / "linear_folder.json").read_text()) for n in ("one", "two")))


def test_a_linear_evaluation_in_two_processes_goes_on(tmp_path, run_script, torchrun, linear_of_two):
    options, undisturbed = linear_of_two
    options = [*options, "--batch_size_per_gpu", 5, "--output_dir", tmp_path]
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
    assert undisturbed["history"] == resumed["history"]


@pytest.mark.parametrize(
    "words",
    [
        "eval_linear.py --epochs 1000 --dataset digits --crop_size 32",
        "visualize.py map --dataset digits --crop_size 224 --output {}/m.png",
    ],
)
def test_ctrl_c_in_a_terminal_is_one_line(tmp_path, words):
    """A terminal sends SIGINT to the data-loading workers too."""
    model = "--pretrained_weights none --arch vit_micro --patch_size 8 --num_workers 2"
    command = [sys.executable, *f"{words} {model}".format(tmp_path).split()]
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
    assert output.splitlines()[-1] == f"{words.split()[0]}: interrupted"
    assert "Traceback" not in output


@pytest.mark.parametrize("script", ["eval_knn.py", "export.py"])
def test_ctrl_c_while_timm_is_imported_is_one_line(tmp_path, run_script, script):
    """The import takes a second. Another module of its name sends the signal."""
    (tmp_path / "timm.py").write_text(
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if a shell has `pytest &`\n"
        "signal.raise_signal(signal.SIGINT)\n"
        "time.sleep(60)\n"
    )
    words = ["--pretrained_weights", "none", "--output_dir", tmp_path]
    words += ["--dataset", "digits"] if script == "eval_knn.py" else []
    process = run_script(script, *words, check=False, PYTHONPATH=str(tmp_path))
    assert (process.returncode, process.stdout, process.stderr) == (130, "", f"{script}: interrupted\n")


def test_features_of_uneven_parts_keep_their_order(photo_folder, tmp_path, run_script, torchrun):
    """7 images on 2 processes in batches of 3, gathered two per process at a time."""
    script = tmp_path / "extract.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(photo_folder.parent)!r}); sys.path.insert(0, '.')\n"
        "import torch, utils\n"
        "from support import features\n"
        "features.GATHERED_NUMBERS = 6\n"
        "rank, world_size, device = utils.init_distributed()\n"
        "images = [(torch.full((3, 4, 4), float(i)), 0) for i in range(7)]\n"
        "found = features.extract_features(lambda x: x.mean((2, 3)), images, device, 3, 0)\n"
        "assert (found is None) == (rank > 0)\n"
        f"found is None or torch.save(found, {str(tmp_path / 'features.pth')!r})\n"
    )
    run_script(script, launcher=torchrun)
    features = torch.load(tmp_path / "features.pth")
    assert torch.equal(features, torch.arange(7.0)[:, None].expand(7, 3))


def test_compiled_backbones_train_alike(photo_folder, tmp_path, run_main, run_script):
    options = [*TINY, "--drop_path_rate", 0, "--data_path", photo_folder, "--batch_size_per_gpu", 4]
    run_main("main_lgssl.py", *options, "--output_dir", tmp_path / "plain")
    run_script("main_lgssl.py", *options, "--compile", "--output_dir", tmp_path / "compiled")
    for a, b in zip(steps(tmp_path / "plain"), steps(tmp_path / "compiled"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    plain, compiled = (torch.load(tmp_path / n / "checkpoint.pth", weights_only=True) for n in ("plain", "compiled"))
    assert list(plain["student"]) == list(compiled["student"])


def test_papers_crops_on_photographs(photo_folder, tmp_path, run_main):
    options = ["--data_path", photo_folder, "--arch", "vit_tiny", "--epochs", 1, "--batch_size_per_gpu", 6]
    run_main("main_lgssl.py", *options, "--num_workers", 1, "--output_dir", tmp_path)
    checkpoint = tmp_path / "checkpoint.pth"
    output = run_main(
        "eval_knn.py", "--data_path", photo_folder, "--pretrained_weights", checkpoint, "--nb_knn", 3
    ).stdout
    assert "k-NN (K=3): top-1" in output
    assert json.loads((tmp_path / "knn_folder.json").read_text())["crop_size"] == 224


@pytest.mark.parametrize(
    "command",
    [
        *"main_lgssl.py eval_linear.py eval_knn.py eval_copy_detection.py eval_image_retrieval.py".split(),
        *"extract_features.py export.py".split(),
        "reproduce.py run",
        "reproduce.py lists",
        "visualize.py matches",
    ],
)
def test_help_is_complete(run_main, command):
    assert "default:" in run_main(*command.split(), "--help").stdout


def test_user_errors_exit_with_2_and_one_line(photo_folder, tmp_path, run_main, run_script, torchrun):
    (tmp_path / "bad").mkdir()
    for i in range(4):
        (tmp_path / "bad" / f"{i}.png").write_bytes(b"broken")
    cases = [
        (["main_lgssl.py", "--data_path", tmp_path / "nowhere", "--output_dir", tmp_path / "o"], "no folder"),
        (["main_lgssl.py", *TINY, "--data_path", tmp_path / "bad", "--batch_size_per_gpu", 2, "--output_dir", tmp_path],
         "cannot read image"),
        (["eval_knn.py", "--dataset", "digits", "--pretrained_weights", tmp_path / "absent.pth"], "no checkpoint at"),
        (["eval_linear.py", "--data_path", photo_folder, "--pretrained_weights", "none", "--n_last_blocks", 13],
         "--n_last_blocks 13 is more"),
        (["eval_copy_detection.py", "--data_path", tmp_path, "--pretrained_weights", "none"], "no images in"),
        (["eval_image_retrieval.py", "--data_path", tmp_path, "--pretrained_weights", "none"], "no ground truth"),
        (["reproduce.py", "run", "table1", "--data_root", tmp_path], "no "),
        (["extract_features.py", "--pretrained_weights", "none", "--output", tmp_path / "f.csv"], "--output "),
        (["extract_features.py", "--data_path", photo_folder, "--pretrained_weights", "pixels", "--output",
          tmp_path / "f.npz"], "no checkpoint at pixels"),
        (["visualize.py", "map", "--data_path", photo_folder, "--pretrained_weights", "pixels"],
         "no checkpoint at pixels"),
        (["eval_knn.py", "--dataset", "torchvision:FashionMNIST", "--data_path", tmp_path, "--pretrained_weights",
          "pixels"], "no train-images-idx3-ubyte in"),
        (["eval_linear.py", "--data_path", photo_folder, "--pretrained_weights", "pixels", "--train_images", 13],
         "--train_images 13 is more than the 12 training images"),
        (["export.py", "--pretrained_weights", tmp_path / "absent.pth", "--output_dir", tmp_path], "no checkpoint at"),
        (["reproduce.py", "lists", photo_folder], ""),
    ]  # fmt: skip
    for words, message in cases:
        run = run_script if words is cases[1][0] else run_main  # a data-loading process must not keep it from ending
        process = run(*words, check=False)
        assert process.returncode == 2
        lines = process.stderr.strip().splitlines()
        assert len(lines) == 1, process.stderr
        assert lines[0].startswith(f"{words[0]}: error: {message}")
        assert UserError.__name__ not in lines[0]
    for words, message in (cases[1], cases[3], cases[5]):
        process = run_script(*words, check=False, launcher=torchrun, timeout=120)
        assert process.returncode != 0
        assert f"{words[0]}: error: {message}" in process.stderr
