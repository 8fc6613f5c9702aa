"""What a run survives: kills, signals, full disks, dead processes. The promises of docs/robustness.md."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from digits_run import ROOT, RUN, steps, torchrun
from kill_and_resume import fingerprint

from vision_transformer import vit_micro

pytestmark = pytest.mark.slow


@pytest.fixture
def start(tmp_path):
    """Start a run in the background, and kill its remaining processes at the end."""
    processes = []

    def start(*words, folder, launcher=(sys.executable,), batch_size=None, **environment):
        words = [*launcher, *RUN, "--output_dir", folder, *words]
        if batch_size:
            words += ["--batch_size_per_gpu", batch_size]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
        with (tmp_path / "output.txt").open("a") as output:
            process = subprocess.Popen(
                list(map(str, words)), cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True
            )
        processes.append(process)
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until(condition, process, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run has ended"
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def ranks(process):
    """Return the process ids of the two ranks below torchrun, by rank."""
    found = {}
    for line in subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout.splitlines()[1:]:
        pid, parent = map(int, line.split())
        if parent == process.pid:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(e[5:]): pid for e in environment if e.startswith(b"RANK=")}
    return found


def test_a_run_killed_at_random_moments_ends_as_an_undisturbed_one(run_script):
    output = run_script("tests/kill_and_resume.py", "--cycles", 3, timeout=600).stdout
    assert "runs ended as the undisturbed one: {" in output.splitlines()[-1]


def last_line(tmp_path):
    return (tmp_path / "output.txt").read_text().strip().splitlines()[-1]


def test_a_signal_is_a_code_of_its_own_and_a_checkpoint(tmp_path, start):
    process = start("--save_every_steps", 0, folder=tmp_path / "run")
    wait_until(lambda: len(steps(tmp_path / "run")) >= 2, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(180) == 75
    assert 10 <= torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["step"] < 87


def test_ctrl_c_twice_ends_at_once(tmp_path, start):
    """In a step of 480 images, which takes a second."""
    folder, output = tmp_path / "run", tmp_path / "output.txt"
    process = start("--epochs", 99, "--accum_steps", 60, "--log_every", 1, "--num_workers", 2, folder=folder)
    wait_until(lambda: steps(folder), process)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: "SIGINT: stopping after this step; Ctrl-C ends at once" in output.read_text(), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == -signal.SIGINT


FAIL = """
from losses import LocalGlobalLoss
update, steps = LocalGlobalLoss.update_center, []
def fail(self):
    steps.append(update(self))
    if len(steps) == 3: raise KeyError("unforeseen")
LocalGlobalLoss.update_center = fail
"""
HOLD = """
from torch.utils.data import DataLoader
held, iterate = [], DataLoader.__iter__
DataLoader.__iter__ = lambda self: held.append(iterate(self)) or held[-1]
"""


@pytest.mark.parametrize(
    ("change", "code", "message"), [(FAIL, 1, "KeyError: 'unforeseen'"), (HOLD, 0, "done: ")], ids=["fails", "ends"]
)
def test_a_run_ends_though_a_data_loading_process_lives(tmp_path, start, change, code, message):
    """After an unforeseen error, and at its end while something holds the process."""
    script = tmp_path / "script.py"
    run = "import runpy, sys\nsys.path.insert(0, '.')\nsys.argv = sys.argv[1:]\n"
    script.write_text(f"{run}{change}\nrunpy.run_path('main_lgssl.py', run_name='__main__')\n")
    process = start("--epochs", 1, folder=tmp_path / "run", launcher=[sys.executable, script], batch_size=100)
    assert process.wait(180) == code
    assert message in last_line(tmp_path)


def test_sigterm_to_torchrun_stops_all_ranks_after_the_same_step(tmp_path, start, two_processes):
    folder = tmp_path / "run"
    process = start(folder=folder, launcher=torchrun(), batch_size=4)
    wait_until(lambda: len(steps(folder)) >= 3, process)
    process.send_signal(signal.SIGTERM)
    process.wait(180)
    stopped = torch.load(folder / "checkpoint.pth", weights_only=True)["step"]
    assert "run the same command to resume from" in (tmp_path / "output.txt").read_text()
    assert 15 <= stopped < 87
    assert start(folder=folder, launcher=torchrun(), batch_size=4).wait(300) == 0
    assert fingerprint(folder) == fingerprint(two_processes)


def test_a_signal_to_one_rank_stops_both(tmp_path, start):
    folder = tmp_path / "run"
    process = start(folder=folder, launcher=torchrun("--max-restarts=0"), batch_size=4)
    wait_until(lambda: len(steps(folder)) >= 2, process)
    os.kill(ranks(process)[1], signal.SIGUSR2)
    assert process.wait(180) == 0
    assert torch.load(folder / "checkpoint.pth", weights_only=True)["step"] < 87


def test_max_restarts_brings_a_run_with_a_killed_rank_back(tmp_path, start, two_processes):
    folder = tmp_path / "run"
    process = start(folder=folder, launcher=torchrun("--max-restarts=2"), batch_size=4)
    for rank in (1, 0):
        before = len(steps(folder))
        wait_until(lambda before=before: len(steps(folder)) >= before + 4, process)
        os.kill(ranks(process)[rank], signal.SIGKILL)
        wait_until(lambda: "resuming after step" in (tmp_path / "output.txt").read_text(), process)
    assert process.wait(300) == 0
    assert fingerprint(folder) == fingerprint(two_processes)


def test_no_rank_waits_for_one_that_hangs(tmp_path, start):
    folder = tmp_path / "run"
    process = start("--dist_timeout", 8, folder=folder, launcher=torchrun("--max-restarts=0"), batch_size=4)
    wait_until(lambda: len(steps(folder)) >= 2, process)
    hanging = ranks(process)[1]
    os.kill(hanging, signal.SIGSTOP)
    began = time.monotonic()
    message = "rank 0 waited for another process that died or hangs"
    wait_until(lambda: message in (tmp_path / "output.txt").read_text(), process, 40)
    assert time.monotonic() - began < 30
    with contextlib.suppress(ProcessLookupError):
        os.kill(hanging, signal.SIGKILL)  # torchrun leaves a stopped process behind


def test_two_machines(tmp_path, start, two_processes):
    """Two agents on two loopback addresses, with one process each."""
    folder = tmp_path / "run"
    options = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_id=test"]
    agents = [
        start(
            folder=folder,
            launcher=torchrun(*options, f"--local_addr=127.0.0.{rank + 1}", endpoint="127.0.0.1:29519"),
            batch_size=4,
        )
        for rank in range(2)
    ]
    assert [agent.wait(300) for agent in agents] == [0, 0]
    assert fingerprint(folder) == fingerprint(two_processes)


def test_a_full_disk_leaves_the_last_checkpoint_and_ends_with_a_line(tmp_path, start):
    """A limit on file sizes simulates a full disk."""
    folder = tmp_path / "run"
    process = start(folder=folder)
    checkpoint = folder / "checkpoint.pth"
    wait_until(checkpoint.exists, process)
    half = checkpoint.stat().st_size // 2
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (half, half))
    assert process.wait(180) == 2
    assert last_line(tmp_path).startswith(
        f"main_lgssl.py: error: cannot save {checkpoint}: File too large; the last saved"
    )
    assert torch.load(checkpoint, weights_only=True)["step"] % 10 == 0
    assert not (folder / "checkpoint.pth.tmp").exists()
    assert start(folder=folder).wait(300) == 0
    assert "resuming after step" in (tmp_path / "output.txt").read_text()
    assert torch.load(checkpoint, weights_only=True)["step"] == 174


def test_a_second_run_in_one_folder_is_refused_until_the_first_is_dead(tmp_path, start):
    folder, output = tmp_path / "run", tmp_path / "output.txt"
    first = start("--num_workers", 2, folder=folder)
    wait_until((folder / "checkpoint.pth").exists, first)
    assert start(folder=folder).wait(180) == 2
    assert f"error: {folder} is in use by another run, process {first.pid} on " in output.read_text()
    assert first.poll() is None
    first.kill()
    third = start("--num_workers", 2, folder=folder)  # at once: the workers of the first may still live
    wait_until(lambda: "resuming after step" in output.read_text(), third)


def test_a_dead_data_loading_process_is_reported_as_that(tmp_path, start):
    folder = tmp_path / "run"
    process = start(folder=folder)
    wait_until(lambda: len(steps(folder)) >= 2, process)
    (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    assert process.wait(180) == 2
    assert last_line(tmp_path).startswith(
        "main_lgssl.py: error: a data-loading worker died, probably because memory ran out"
    )


def test_mutated_files_are_read_or_refused(run_script):
    assert "all 300 files were read or refused" in run_script("tests/fuzz_files.py", "--count", 300).stdout


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("load_file", "lambda path: torch.load(path, weights_only=False)"),
        ("read_plain_pickle", "lambda path: pickle.loads(path.read_bytes())"),
    ],
)
def test_readers_that_execute_are_found_out(tmp_path, run_script, name, reader):
    (tmp_path / "fuzz.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import pickle, torch, fuzz_files\n"
        f"fuzz_files.{name} = {reader}\n"
        "fuzz_files.main(['--count', '100'])\n"
    )
    process = run_script(tmp_path / "fuzz.py", check=False)
    assert process.returncode == 1
    assert "Executed" in process.stderr


def in_a_container(mount, script, *words):
    """Run a script where the mounts of a container hold, in a mount namespace, which only root may have."""
    command = ["unshare", "-m", "bash", "-c", f'{mount} && exec "$0" "$@"', sys.executable, ROOT / script, *words]
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("a mount namespace needs root")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=300)


NO_SHM = "warning: no shared memory in /dev/shm ("


SMALL = "--patch_size 8 --image_size 40 --global_crops_size 32 --local_crops_size 16"


@pytest.mark.parametrize(
    ("mount", "line", "views"),
    [
        # The default views and batch have 21 MB.
        ("mount -t tmpfs -o size=64M tmpfs /dev/shm", "using 1 with 1; give a container more with docker run", ""),
        (
            "mount -t tmpfs -o size=64k tmpfs /dev/shm",
            "loading without workers, which is slow; give a container",
            SMALL,
        ),
        ("mount -t tmpfs -o ro tmpfs /dev/shm", NO_SHM, SMALL),
        ("mount --bind /proc/sys /dev/shm", NO_SHM, SMALL),  # no file system for shared memory
    ],
    ids=["docker", "tiny", "read-only", "none"],
)
def test_a_small_shared_memory_slows_a_run_down_but_does_not_stop_it(tmp_path, photo_folder, mount, line, views):
    (tmp_path / "photos").mkdir()
    for i in range(40):
        (tmp_path / f"photos/{i}.jpg").symlink_to(photo_folder / f"train/china/{i % 6}.jpg")
    words = f"--data_path {tmp_path}/photos --arch vit_micro --out_dim 64 --head_hidden_dim 64 --epochs 1 {views}"
    process = in_a_container(mount, "main_lgssl.py", *words.split(), "--num_workers", 2, "--output_dir", tmp_path)
    assert process.returncode == 0, process.stderr
    assert line in process.stderr
    words = f"--data_path {photo_folder} --pretrained_weights {tmp_path}/checkpoint.pth --nb_knn 2"
    process = in_a_container(mount, "eval_knn.py", *words.split())
    assert process.returncode == 0, process.stderr
    assert "--shm-size" in process.stderr


def test_weights_in_a_read_only_folder_are_evaluated(tmp_path, photo_folder):
    torch.save({"teacher": vit_micro(8, img_size=32).state_dict()}, tmp_path / "weights.pth")
    words = f"--data_path {photo_folder} --pretrained_weights {tmp_path}/weights.pth --nb_knn 2 --num_workers 0"
    process = in_a_container(f"mount --bind -o ro {tmp_path} {tmp_path}", "eval_knn.py", *words.split())
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("k-NN (K=2)")
    assert process.stderr.startswith("warning: cannot write to ")
