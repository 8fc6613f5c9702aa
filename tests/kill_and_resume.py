"""Kill a run on the digits again and again, and compare how it ends with an undisturbed one.

    python tests/kill_and_resume.py --cycles 50        six minutes on two CPU cores

Each cycle starts the same command and kills it: at a random moment, with SIGKILL or SIGTERM, or with SIGKILL while a
checkpoint is being written. A run that has ended is compared, bit by bit, and the next one begins.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
OPTIONS = "@recipes/digits.args --epochs 3 --warmup_epochs 1 --save_every_steps 7 --log_every 5 --saveckp_freq 1"


def start(folder, workers=1):
    command = [sys.executable, "main_lgssl.py", *OPTIONS.split(), "--output_dir", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (folder.parent / "output.txt").open("a") as output:
        return subprocess.Popen(
            [*command, "--num_workers", str(workers)], cwd=ROOT, env=environment, stdout=output, stderr=output
        )


def fingerprint(folder):
    """Return a hash of weights, optimizer, center and logs, except for times."""
    checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)
    digest = hashlib.sha256()

    def add(value):
        if torch.is_tensor(value):
            digest.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                digest.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    for name in ("student", "teacher", "optimizer", "loss", "scaler", "meters", "step"):
        add(checkpoint[name])
    add(sorted(path.name for path in folder.glob("checkpoint[0-9]*")))
    for name in ("log.txt", "steps.jsonl"):
        for line in (folder / name).read_text().splitlines():
            add({key: value for key, value in json.loads(line).items() if key not in ("images_per_s", "data_share")})
    return digest.hexdigest()


def wait_for(condition, process, seconds):
    """Wait until a condition holds or the process has ended; return whether it holds."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.0005)
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=50, help="how often the run is killed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    (folder / "whole").mkdir()
    began = time.monotonic()
    if start(folder / "whole").wait():
        sys.exit(f"the undisturbed run failed, see {folder}/output.txt")
    length = time.monotonic() - began
    expected = fingerprint(folder / "whole")
    print(f"undisturbed: {length:.0f} s, {expected[:16]}", flush=True)

    cycles, compared, kinds = 0, 0, {}
    killed = folder / "killed"
    while cycles < args.cycles or killed.exists():
        killed.mkdir(exist_ok=True)
        process = start(killed, workers=rng.randrange(3))
        kind = "the end"
        if cycles < args.cycles:
            kind = rng.choice(["SIGKILL", "SIGTERM", "SIGKILL while saving"])
            if kind == "SIGKILL while saving":
                wait_for((killed / "checkpoint.pth.tmp").exists, process, length)
            else:
                wait_for(lambda: False, process, rng.uniform(0, 0.5 * length))
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
                cycles += 1
        code = process.wait()
        kind = kind if code else "the end"
        kinds[kind] = kinds.get(kind, 0) + 1
        if code == 0:
            found = fingerprint(killed)
            if found != expected:
                sys.exit(f"after {cycles} kills the run ended as {found[:16]}, see {killed}")
            compared += 1
            shutil.rmtree(killed)
        elif code not in (75, -signal.SIGKILL, -signal.SIGTERM):
            sys.exit(f"exit code {code} after {kind}, see {folder}/output.txt")
        print(f"{cycles} kills, {compared} runs ended as the undisturbed one; this time: {kind}", flush=True)
    print(f"all {compared} runs ended as the undisturbed one: {kinds}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
