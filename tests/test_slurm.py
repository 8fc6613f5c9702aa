"""run_with_submitit.py on a real SLURM on this machine, if it can be started, and without SLURM."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
from digits_run import ROOT, RUN, steps
from kill_and_resume import fingerprint

pytestmark = pytest.mark.slow

OPTIONS = [*RUN[1:], "--batch_size_per_gpu", "4"]
JOB = "--gpus_per_node 0 --tasks_per_node 2 --cpus_per_task 1 --timeout 60".split()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Start SLURM and return a function that runs one of its commands."""
    missing = [name for name in ("sbatch", "srun", "slurmctld", "slurmd", "munged") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {missing[0]}: install slurm-wlm and munge")
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons need root")
    folder = tmp_path_factory.mktemp("slurm")
    script = ROOT / "tests/one_machine_slurm.sh"
    with pytest.MonkeyPatch.context() as patch:
        try:
            started = subprocess.run([script, "start", folder], capture_output=True, text=True, timeout=90)
            if started.returncode:
                pytest.skip(f"SLURM does not start here: {started.stderr.strip()}")
            patch.setenv("SLURM_CONF", started.stdout.strip())
            yield lambda *words: subprocess.run(words, check=True, capture_output=True, text=True).stdout
        finally:
            subprocess.run([script, "stop", folder], timeout=60)


def submit(folder, *more):
    """Submit a run from a folder outside the repository; return the job number and the output folder."""
    words = [sys.executable, ROOT / "run_with_submitit.py", *JOB, *OPTIONS, *more, "--output_dir", folder / "%j"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(list(map(str, words)), cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    job = re.search(r"^job (\d+), output in", process.stdout, re.MULTILINE)[1]
    return job, folder / job


def messages(folder):
    return "\n".join(path.read_text() for path in sorted((folder.parent / "submitit").glob("*.err")))


def wait_until(condition, folder, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it takes too long: {messages(folder)}"
        time.sleep(0.2)


def state(slurm, job):
    """Return the state of a job in the queue, such as PENDING or RUNNING, or "" after it has left the queue."""
    return slurm("squeue", "--noheader", "--format=%T", f"--jobs={job}", "--states=all").strip()


def test_a_preempted_job_is_requeued_and_ends_as_an_undisturbed_one(slurm, tmp_path, two_processes):
    job, folder = submit(tmp_path)
    wait_until(lambda: len(steps(folder)) >= 4, folder)
    slurm("scancel", "--signal=USR2", job)
    wait_until(lambda: state(slurm, job) == "PENDING", folder)
    stopped = torch.load(folder / "checkpoint.pth", weights_only=True)["step"]
    assert 20 <= stopped < 174
    slurm("scontrol", "update", f"jobid={job}", "StartTime=now")  # a requeued job is held for two minutes
    wait_until(lambda: state(slurm, job) not in ("PENDING", "RUNNING", "COMPLETING"), folder)
    assert state(slurm, job) == "COMPLETED", messages(folder)
    assert f"resuming after step {stopped} of 174" in (tmp_path / f"submitit/{job}_0_log.out").read_text()
    assert fingerprint(folder) == fingerprint(two_processes)


def test_a_cancelled_job_saves_and_is_not_requeued(slurm, tmp_path):
    job, folder = submit(tmp_path)
    wait_until(lambda: len(steps(folder)) >= 2, folder)
    slurm("scancel", job)
    wait_until(lambda: state(slurm, job) not in ("RUNNING", "COMPLETING"), folder)
    assert state(slurm, job) == "CANCELLED"
    assert "stopped by SIGTERM" in (tmp_path / f"submitit/{job}_0_log.out").read_text()
    assert torch.load(folder / "checkpoint.pth", weights_only=True)["step"] < 174


def test_it_runs_without_slurm(tmp_path, two_processes):
    _, folder = submit(tmp_path, "--cluster", "local")
    assert fingerprint(folder) == fingerprint(two_processes)
    assert json.loads((folder / "args.json").read_text())["output_dir"] == str(folder)


def test_parameters_of_the_job(tmp_path, monkeypatch):
    """Including DINO's --use_volta32, --ngpus and --comment."""
    submitit = pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", "before")
    executor = mock.MagicMock()
    executor.return_value.submit.return_value.job_id = "7"
    monkeypatch.setattr(submitit, "AutoExecutor", executor)
    main = importlib.import_module("run_with_submitit").main
    words = "--nodes 2 --ngpus 4 --use_volta32 --comment urgent --timeout 9 --output_dir".split()
    assert main([*words, str(tmp_path / "%j"), "--data_path", "images"]) == 0
    executor.assert_called_once_with(tmp_path / "submitit", cluster="slurm")
    expected = {"name": "lgssl", "nodes": 2, "tasks_per_node": 4, "gpus_per_node": 4, "cpus_per_task": 10}
    expected |= {"slurm_constraint": "volta32gb", "slurm_comment": "urgent", "slurm_signal_delay_s": 120}
    executor.return_value.update_parameters.assert_called_once_with(**expected, timeout_min=9)
    assert os.environ["PYTHONPATH"] == f"{ROOT}{os.pathsep}before"
    executor.return_value.reset_mock()
    main(["--use_volta32", "--constraint", "a100", "--mem_gb", "50", "--output_dir", str(tmp_path)])
    parameters = executor.return_value.update_parameters.call_args.kwargs
    assert (parameters["slurm_constraint"], parameters["mem_gb"]) == ("a100", 50)
    assert "slurm_comment" not in parameters
