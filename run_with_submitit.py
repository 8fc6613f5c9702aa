"""Pretrain as a SLURM job that goes on by itself after its time limit and after preemption. Needs submitit.

    python run_with_submitit.py --nodes 2 --gpus_per_node 8 --partition gpu --output_dir runs/%j --data_path FOLDER ...
    python run_with_submitit.py --gpus_per_node 0 --tasks_per_node 2 ...       on CPU nodes
    python run_with_submitit.py --cluster local --tasks_per_node 2 ...         without SLURM, on this machine

All options of main_lgssl.py are taken as well. `%j` in --output_dir is the number of the job.
"""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

import main_lgssl
import utils
from support.arguments import HelpFormatter, number
from utils import UserError


def parse_arguments(argv=None):
    """Return (the options of the job, the words for main_lgssl.py)."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="All other options go to main_lgssl.py, see its --help.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    natural = number(int, 1)
    # fmt: off
    add = parser.add_argument_group("machines").add_argument
    add("--cluster", choices=("slurm", "local"), default="slurm", help="local runs without SLURM, on this machine")
    add("--nodes", type=natural, default=1, help="number of machines")
    add("--gpus_per_node", "--ngpus", type=number(int, 0), help="GPUs of a machine; 0 runs on its CPUs; default: 8, "
        "with --cluster local what there is")
    add("--tasks_per_node", type=natural, help="processes of a machine; default: one per GPU, or one")
    add("--cpus_per_task", type=natural, default=10, help="CPU cores of a process")
    add("--mem_gb", type=natural, help="memory of a machine in GB; default: the partition's")
    add = parser.add_argument_group("time").add_argument
    add("--timeout", "--time", type=natural, default=2800, help="minutes until the job is stopped, and requeued")
    add("--signal_delay", type=natural, default=120, help="seconds before that in which it saves")
    add = parser.add_argument_group("queue").add_argument
    for name in ("partition", "account", "qos", "constraint", "comment"):
        add(f"--{name}", help="as sbatch's; default: the cluster's")
    add("--use_volta32", dest="constraint", action="store_const", const="volta32gb", help="--constraint volta32gb")
    add("--job_name", default="lgssl", help="name in the queue")
    # fmt: on
    args, words = parser.parse_known_args(argv)
    if args.gpus_per_node is None:
        args.gpus_per_node = torch.cuda.device_count() if args.cluster == "local" else 8
    if args.tasks_per_node is None:
        args.tasks_per_node = max(args.gpus_per_node, 1)
    if args.gpus_per_node not in (0, args.tasks_per_node):
        parser.error(f"--tasks_per_node {args.tasks_per_node}: expected one for each of the {args.gpus_per_node} GPUs")
    return args, words


class Training:
    """What each process of the job does. submitit pickles it, and a requeued job takes the same one."""

    def __init__(self, words, gpus):
        self.words, self.gpus = words, gpus

    def __call__(self):
        import submitit

        job = submitit.JobEnvironment()
        local = job.cluster == "local"
        places = {
            "RANK": job.global_rank,
            "WORLD_SIZE": job.num_tasks,
            "LOCAL_RANK": job.local_rank,
            "MASTER_ADDR": "127.0.0.1" if local else job.hostnames[0],
            "MASTER_PORT": 10000 + int(job.raw_job_id) % 50000,
        }
        if not self.gpus:
            places["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.update({name: str(value) for name, value in places.items()})
        words = [word.replace("%j", job.job_id) for word in self.words]
        with utils.one_line_errors():
            stopped_by = main_lgssl.main(words)  # installs its handlers after submitit's
        # SLURM announces the time limit, and preemption, by the signal that submitit has asked for. It sends SIGTERM
        # where the job was cancelled, or where it requeues by itself.
        if stopped_by in (signal.SIGUSR1, signal.SIGUSR2) and job.global_rank == 0 and not local:
            subprocess.run(["scontrol", "requeue", job.job_id], check=True, timeout=60)


def main(argv=None):
    args, words = parse_arguments(argv)
    output_dir = main_lgssl.parse_arguments(words).output_dir  # bad options are named before anything is submitted
    try:
        import submitit
    except ImportError as error:
        raise UserError("run_with_submitit.py needs submitit, found none: pip install submitit") from error
    folder = Path(output_dir)
    while "%j" in str(folder):
        folder = folder.parent
    try:
        executor = submitit.AutoExecutor(folder / "submitit", cluster=args.cluster)
    except RuntimeError as error:
        raise UserError(
            "found no SLURM (srun) on this machine: log in to one that has it, or --cluster local"
        ) from error
    options = {name: getattr(args, name) for name in ("partition", "account", "qos", "constraint", "comment")}
    options = {f"slurm_{name}": value for name, value in options.items() if value is not None}
    if args.mem_gb is not None:
        options["mem_gb"] = args.mem_gb
    if args.gpus_per_node:
        options["gpus_per_node"] = args.gpus_per_node
    executor.update_parameters(
        name=args.job_name,
        nodes=args.nodes,
        tasks_per_node=args.tasks_per_node,
        cpus_per_task=args.cpus_per_task,
        timeout_min=args.timeout,
        slurm_signal_delay_s=args.signal_delay,
        **options,
    )
    # The job imports this repository from wherever it is submitted.
    paths = [str(Path(__file__).parent.absolute()), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    job = executor.submit(Training(words, args.gpus_per_node))
    print(f"job {job.job_id}, output in {output_dir.replace('%j', job.job_id)}, its messages in {job.paths.stdout}")
    if args.cluster == "local":
        job.wait()
        if job.exception() is not None:
            print(job.stderr(), file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    with utils.one_line_errors():
        sys.exit(main())
