"""What watching a run costs: TensorBoard, its pictures and the online k-NN, beside the steps of a run.

python -m benchmarks.bench_watching
"""

import functools
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import torch.utils.tensorboard

import main_lgssl
from benchmarks.machine import machine, print_table
from utils import ArgumentParser, number

RECIPE = Path(__file__).parent.parent / "recipes" / "digits.args"


class Silent:
    """A SummaryWriter that takes everything and writes nothing."""

    def __init__(self, *_, **__):
        pass

    def __getattr__(self, name):
        return lambda *_, **__: None


def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default=RECIPE, help="argument file of the run; its k-NN needs labels")
    parser.add_argument("--epochs", type=number(int, 1), default=1, help="of a run")
    parser.add_argument("--rounds", type=number(int, 1), default=5, help="runs with TensorBoard and without, in turn")
    parser.add_argument("--log_every", type=number(int, 1), default=10, help="steps between two reports")
    args = parser.parse_args()
    print(machine())
    options = f"--epochs {args.epochs} --knn_every {args.epochs} --image_every {args.epochs} --saveckp_freq 0"
    options = [f"@{args.recipe}", *options.split(), "--log_every", str(args.log_every)]
    steps, parts = {"on": [], "off": []}, {"report": [], "pictures": [], "online k-NN": []}
    for i in range(args.rounds):
        for board in ("on", "off") if i % 2 else ("off", "on"):
            steps[board].append(seconds_per_step(options, board == "on", parts))
    on, off = (1000 * np.median(steps[board]) for board in ("on", "off"))
    rows = [("step with TensorBoard", f"{on:.1f} ms"), ("step without", f"{off:.1f} ms"), ("ratio", f"{on / off:.3f}")]
    rows += [(name, f"{1000 * np.median(seconds):.1f} ms each time") for name, seconds in parts.items()]
    # The ratio of whole steps is as noisy as the machine; this is what TensorBoard and the log can cost at most.
    share = 1000 * np.median(parts["report"]) / (args.log_every * off)
    rows.append((f"one report in {args.log_every} steps", f"{share:.2%} of their time"))
    print_table(("what", "median"), rows)


def seconds_per_step(options, board, parts):
    """Run a training and return the seconds of a step, reports included, those between epochs not."""
    steps = []

    def timed(function, seconds):
        @functools.wraps(function)
        def call(*arguments, **named):
            start = time.perf_counter()
            result = function(*arguments, **named)
            seconds.append(time.perf_counter() - start)
            return result

        return call

    knn, pictures = main_lgssl.OnlineKNN.__call__, main_lgssl.utils.Report.pictures
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "output").open("w") as output:
        patches = [
            mock.patch.object(main_lgssl, "train_one_epoch", timed(main_lgssl.train_one_epoch, steps)),
            mock.patch.object(main_lgssl.OnlineKNN, "__call__", timed(knn, parts["online k-NN"])),
        ]
        if board:
            drawing = []
            patches.append(
                mock.patch.object(main_lgssl, "training_pictures", timed(main_lgssl.training_pictures, drawing))
            )
            writing = []
            report = timed(main_lgssl.utils.Report.interval, parts["report"])
            patches.append(mock.patch.object(main_lgssl.utils.Report, "interval", report))
            patches.append(mock.patch.object(main_lgssl.utils.Report, "pictures", timed(pictures, writing)))
        else:
            patches.append(mock.patch.object(torch.utils.tensorboard, "SummaryWriter", Silent))
        for patch in patches:
            patch.start()
        try:
            with redirect_stdout(output):
                main_lgssl.main([*options, "--output_dir", f"{folder}/run"])
        finally:
            mock.patch.stopall()
        if board:
            parts["pictures"] += [a + b for a, b in zip(drawing, writing, strict=True)]
        lines = (Path(folder) / "run/steps.jsonl").read_text().splitlines()
    return sum(steps) / (1 + int(main_lgssl.json.loads(lines[-1])["step"]))


if __name__ == "__main__":
    main()
