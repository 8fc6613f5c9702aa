"""Pretrain as a SLURM job that requeues itself at its time limit and after preemption. Needs submitit.

    python run_with_submitit.py --nodes 2 --gpus_per_node 8 --partition gpu --output_dir runs/%j --data_path FOLDER ...
    python run_with_submitit.py --gpus_per_node 0 --tasks_per_node 2 ...       on CPU nodes
    python run_with_submitit.py --cluster local --tasks_per_node 2 ...         without SLURM, on this machine

Also takes all options of main_lgssl.py. `%j` in --output_dir stands for the job's number.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import main_lgssl
from support.arguments import ArgumentParser, number
from support.files import make_folder
from utils import UserError, one_line_errors, run_main

SBATCH_OPTIONS = ("partition", "account", "qos", "constraint", "comment")


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Return (the options of the job, the words for main_lgssl.py)."""
    epilog = "All other options go to main_lgssl.py, see its --help."
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog=epilog)
    natural = number(int, 1)
    add = parser.add_argument_group("machines").add_argument
    add("--cluster", choices=("slurm", "local"), default="slurm", help="local: run on this machine, without SLURM")
    add("--nodes", type=natural, default=1, help="number of machines")
    add("--gpus_per_node", "--ngpus", type=number(int, 0), help="GPUs per machine, 0: CPUs; default: 8, locally all")
    add("--tasks_per_node", type=natural, help="processes per machine; default: one per GPU, or one")
    add("--cpus_per_task", type=natural, default=10, help="CPU cores per process")
    add("--mem_gb", type=natural, help="memory per machine in GB; default: that of the partition")
    add = parser.add_argument_group("time").add_argument
    add("--timeout", "--time", type=natural, default=2800, help="minutes until the job is stopped and requeued")
    add("--signal_delay", type=natural, default=120, help="seconds before the time limit at which the job saves")
    add = parser.add_argument_group("queue").add_argument
    for name in SBATCH_OPTIONS:
        add(f"--{name}", help=f"--{name} of sbatch; default: that of the cluster")
    add("--use_volta32", dest="constraint", action="store_const", const="volta32gb", help="--constraint volta32gb")
    add("--job_name", default="lgssl", help="name in the queue")
    args, words = parser.parse_known_args(argv)  # the words of argument files replace their names
    if args.gpus_per_node is None:
        args.gpus_per_node = torch.cuda.device_count() if args.cluster == "local" else 8
    args.tasks_per_node = args.tasks_per_node or max(args.gpus_per_node, 1)
    if args.gpus_per_node not in (0, args.tasks_per_node):
        parser.error(f"--tasks_per_node {args.tasks_per_node}: expected one for each of the {args.gpus_per_node} GPUs")
    return args, words


def train(words: list[str], gpus: int) -> None:
    """Do the work of each process of the job. submitit pickles it, and a requeued job loads the same pickle."""
    import submitit

    job = submitit.JobEnvironment()
    local = job.cluster == "local"
    ranks = {"RANK": job.global_rank, "WORLD_SIZE": job.num_tasks, "LOCAL_RANK": job.local_rank}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1" if local else job.hostnames[0]
    os.environ["MASTER_PORT"] = str(10000 + int(job.raw_job_id) % 50000)
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with one_line_errors():
        stopped_by = main_lgssl.main([word.replace("%j", job.job_id) for word in words])  # replaces submitit's handlers
    # SLURM announces the time limit and preemption with the signal that submitit requested. It sends SIGTERM if the
    # job was cancelled, or if SLURM requeues it.
    if stopped_by in (signal.SIGUSR1, signal.SIGUSR2) and job.global_rank == 0 and not local:
        subprocess.run(["scontrol", "requeue", job.job_id], check=True, timeout=60)


def main(argv: Sequence[str] | None = None) -> int:
    """Submit the job and return the exit code."""
    args, words = parse_arguments(argv)
    output_dir = main_lgssl.parse_arguments(words).output_dir  # refuses bad options before anything is submitted
    try:
        import submitit
    except ImportError as error:
        raise UserError("run_with_submitit.py needs submitit, found none: pip install submitit") from error
    folder = Path(output_dir)
    while "%j" in str(folder):
        folder = folder.parent
    make_folder(folder / "submitit", "--output_dir")
    try:
        executor = submitit.AutoExecutor(folder / "submitit", cluster=args.cluster)
    except RuntimeError as error:
        raise UserError("found no SLURM on this machine: run this where srun is, or give --cluster local") from error
    parameters = {f"slurm_{name}": getattr(args, name) for name in SBATCH_OPTIONS}
    parameters |= {name: getattr(args, name) for name in ("nodes", "tasks_per_node", "cpus_per_task", "mem_gb")}
    parameters |= {"name": args.job_name, "timeout_min": args.timeout, "slurm_signal_delay_s": args.signal_delay}
    parameters["gpus_per_node"] = args.gpus_per_node or None
    executor.update_parameters(**{name: value for name, value in parameters.items() if value is not None})
    # The job imports this repository regardless of the folder from which it is submitted.
    paths = [str(Path(__file__).parent.absolute()), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    try:
        job = executor.submit(train, words, args.gpus_per_node)
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"the cluster refuses the job: {' '.join(str(error).split())}") from error
    print(f"job {job.job_id}, output in {output_dir.replace('%j', job.job_id)}, messages in {job.paths.stdout}")
    if args.cluster == "local":
        job.wait()
        if job.exception() is not None:
            print(job.stderr(), file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    run_main(main)
