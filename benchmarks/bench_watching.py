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
import support.observe
from benchmarks.machine import machine, print_table
from support.arguments import ArgumentParser, number

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
    """Run a training and return the seconds of a step, reports included, the last one of each epoch not."""
    requests = []  # times at which the training asks for a batch

    def timed(function, seconds):
        @functools.wraps(function)
        def call(*arguments, **named):
            start = time.perf_counter()
            result = function(*arguments, **named)
            seconds.append(time.perf_counter() - start)
            return result

        return call

    def batches_on_device(*arguments):
        for batch in original_batches(*arguments):
            yield batch
            requests.append(time.perf_counter())

    original_batches = main_lgssl.batches_on_device
    knn, pictures = support.observe.OnlineKNN.__call__, main_lgssl.Report.pictures
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "output").open("w") as output:
        patches = [
            mock.patch.object(main_lgssl, "batches_on_device", batches_on_device),
            mock.patch.object(support.observe.OnlineKNN, "__call__", timed(knn, parts["online k-NN"])),
        ]
        if board:
            drawing, writing = [], []
            report = timed(main_lgssl.Report.interval, parts["report"])
            patches += [
                mock.patch.object(main_lgssl, "training_pictures", timed(main_lgssl.training_pictures, drawing)),
                mock.patch.object(main_lgssl.Report, "interval", report),
                mock.patch.object(main_lgssl.Report, "pictures", timed(pictures, writing)),
            ]
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
        lines = (Path(folder) / "run/log.txt").read_text().splitlines()
    steps_per_epoch = (1 + len(requests)) // len(lines)
    seconds = np.diff(requests)  # of the steps from the second on
    ends_epoch = np.arange(2, 2 + len(seconds)) % steps_per_epoch == 0
    return np.mean(seconds[~ends_epoch])


if __name__ == "__main__":
    main()
