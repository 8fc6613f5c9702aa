"""Time the monitoring of a run, TensorBoard, its pictures and the online k-NN, relative to training steps.

python -m benchmarks.bench_watching
"""

import functools
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np

import main_lgssl
import support.observe
from benchmarks.machine import machine, print_table
from support.arguments import ArgumentParser, number

RECIPE = Path(__file__).parent.parent / "recipes" / "digits.args"


class Silent:
    """A SummaryWriter that ignores everything."""

    def __init__(self, *_, **__):
        pass

    def __getattr__(self, name):
        return lambda *_, **__: None


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--recipe", default=RECIPE, help="argument file of the run; its images need labels for the k-NN"
    )
    parser.add_argument("--epochs", type=number(int, 1), default=1, help="epochs per run")
    parser.add_argument(
        "--rounds", type=number(int, 1), default=5, help="number of runs with TensorBoard and of runs without it"
    )
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
    rows += [(name, f"{1000 * np.median(seconds):.1f} ms per call") for name, seconds in parts.items()]
    # The ratio of whole steps is noisy. This share is an upper bound of the cost of TensorBoard and the log.
    share = 1000 * np.median(parts["report"]) / (args.log_every * off)
    rows.append((f"one report in {args.log_every} steps", f"{share:.2%} of their time"))
    print_table(("what", "median"), rows)


def seconds_per_step(options, board, parts) -> float:
    """Run a training and return the mean seconds per step, with reports, without the last step of each epoch.

    Args:
        board: whether TensorBoard is on.
        parts: {"report", "pictures", "online k-NN": list}, to which the seconds of each call are added.
    """
    requests = []  # times at which the training requests a batch

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
            patches.append(mock.patch("support.report.SummaryWriter", Silent))
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
    seconds = np.diff(requests)  # per step, from the second step on
    ends_epoch = np.arange(2, 2 + len(seconds)) % steps_per_epoch == 0
    return np.mean(seconds[~ends_epoch])


if __name__ == "__main__":
    main()
