"""The run on the digits that the tests of faults and of SLURM interrupt."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# 87 steps an epoch of 16 images
RUN = (
    "main_lgssl.py --dataset digits --arch vit_micro --patch_size 8 --image_size 40 --global_crops_size 32 "
    "--local_crops_size 16 --local_crops_number 1 --out_dim 24 --head_hidden_dim 32 --num_workers 1 --log_every 5 "
    "--lr 0.05 --warmup_epochs 0 --epochs 2 --batch_size_per_gpu 8 --accum_steps 2 --save_every_steps 10"
).split()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]


def torchrun(*options, endpoint="localhost:0"):
    return [*TORCHRUN, "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}", *options]


def steps(folder):
    path = folder / "steps.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []
