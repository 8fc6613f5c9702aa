"""Measure time and peak memory of a training step against a naive Algorithm 1 and against `--loss cls`.

    python -m benchmarks.bench_step                                                  the figures of docs/performance.md
    python -m benchmarks.bench_step --arch vit_small --batch_size 40 --patch_size 8 --out_dim 4096 65536

Each side runs in fresh processes on the same views, with the same networks, optimizer and EMA, in fp32. The time is
weighted as if one step in ten reports, as in a training. A reporting step also computes the metrics of
`meters.measure`, except on the naive side. A naive side that would not fit into memory is not run; its memory is
computed instead.
"""

import argparse
import contextlib
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F

import main_lgssl
from augment import normalize
from benchmarks.machine import machine, memory_size, print_table, seconds_of
from losses import LocalGlobalLoss, plain_loss
from patch_matching import Matches, match_patches
from support.arguments import ArgumentParser, number
from support.loader import Batch
from vision_transformer import ARCHITECTURES, TokenOutput

SIDES = {  # options of main_lgssl.py
    "lgssl": "--loss mean --geometry batch",
    "lgssl, --grad_checkpointing": "--loss mean --geometry batch --grad_checkpointing",
    "lgssl, --geometry image": "--loss mean --geometry image",
    "naive": "--loss mean --geometry batch",
    "cls": "--loss cls --geometry batch --image_size 256",
}
DOCUMENTED = [  # (arch, patch size, batch size, K, sides)
    ("vit_tiny", 16, 10, 4096, ("lgssl", "naive", "cls")),
    ("vit_tiny", 16, 10, 10000, ("lgssl", "naive", "cls")),
    ("vit_tiny", 16, 10, 65536, tuple(SIDES)),
    ("vit_base", 16, 4, 10000, ("lgssl", "cls")),
]
BOTTLENECK, VIEWS, GLOBAL, LOCAL = 256, 10, 224, 96
LOG_EVERY = 10  # default of main_lgssl.py


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    natural = number(int, 1)
    add = parser.add_argument_group("cases: all combinations, only with --arch").add_argument
    add("--arch", nargs="+", choices=ARCHITECTURES, help="networks; default: the cases of docs/performance.md")
    add("--patch_size", nargs="+", type=natural, default=[16], help="sides of a patch in pixels")
    add("--batch_size", nargs="+", type=natural, default=[10], help="images per step")
    add("--out_dim", nargs="+", type=natural, default=[4096, 10000, 65536], help="K, numbers of prototypes")
    add("--sides", nargs="+", choices=SIDES, default=["lgssl", "naive", "cls"], help="implementations to compare")
    add = parser.add_argument_group("measurement").add_argument
    add("--steps", type=number(int, 2), default=3, help="timed steps after one warm-up step; the last one reports")
    add("--rounds", type=natural, default=2, help="measurements per side, the fastest counts")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(**json.loads(args.worker))))
        return

    print(machine())
    cases = DOCUMENTED
    if args.arch:
        cases = [
            (arch, patch, batch, K, args.sides)
            for arch in args.arch
            for patch in args.patch_size
            for batch in args.batch_size
            for K in args.out_dim
        ]
    results = {}
    for arch, patch, batch, K, sides in cases:
        case = {"arch": arch, "patch_size": patch, "batch_size": batch, "K": K}
        for _ in range(args.rounds):
            for side in sides:
                result, key = run_side(side, case, args.steps), (arch, patch, batch, K, side)
                if key not in results or result.get("seconds", math.inf) < results[key].get("seconds", math.inf):
                    results[key] = result
                print(*key, result, file=sys.stderr)
    print_results(cases, results)


def run_side(side, case, steps) -> dict:
    """Measure one side in a fresh process, or return the bytes that a naive side too large for the memory needs."""
    options = {**case, "steps": steps, "side": side}
    if side == "naive":
        need = naive_bytes(**case)
        if need > 0.9 * memory_size():
            return {"need": need}
    command = [sys.executable, "-m", "benchmarks.bench_step", "--worker", json.dumps(options)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        return {"failed": process.returncode}
    return json.loads(process.stdout.splitlines()[-1])


class Done(Exception):
    """All steps were timed."""


def measure(arch, patch_size, batch_size, K, steps, side) -> dict:
    """Run the first steps of a training on views that are made in advance.

    Returns:
        {"seconds": per step, "before" and "peak": memory in bytes before the steps and at their peak}
    """
    rng = np.random.default_rng(0)
    images = [(rng.integers(0, 256, (256, 256, 3), np.uint8), 0) for _ in range(batch_size)]
    times, result = [], {}

    def open_images(args):
        return main_lgssl.Images(images * (steps + 2), None, "not timed")  # more images than the steps take

    def build_optimizer(name, network):
        optimizer = original_optimizer(name, network)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # allocates the optimizer's state
        return optimizer

    def batches_on_device(loader, device, *_):
        keys = [(0, step, list(range(batch_size))) for step in range(steps)]
        items = [loader.dataset[key] for key in keys]
        geometries = [correspondences(loader.dataset.make_views(key)[0], patch_size) for key in keys]
        result["before"] = memory(device)["now"]
        for i in (0, *range(steps)):  # the first step is the warm-up
            times.append(synchronized_time(device))
            views = [normalize(pixels.to(device, non_blocking=True)) for pixels in items[i].pixels]
            matches = items[i].matches
            if side == "naive":
                matches, NaiveLoss.pairs = every_token(matches, views, patch_size), geometries[i]
            yield Batch(views, matches.to(device), {})
        times.append(synchronized_time(device))
        result["peak"] = memory(device)["peak"]
        if side == "lgssl":
            result.update(measure_loss(K, patch_size, [item.matches for item in items], device))
        raise Done

    original_optimizer = main_lgssl.build_optimizer
    main_lgssl.open_images, main_lgssl.build_optimizer = open_images, build_optimizer
    main_lgssl.batches_on_device = batches_on_device
    if side == "naive":
        main_lgssl.LocalGlobalLoss, main_lgssl.measure = NaiveLoss, lambda *_: {}
    words = f"{SIDES[side]} --arch {arch} --patch_size {patch_size} --batch_size_per_gpu {batch_size} --out_dim {K} "
    words += f"--global_crops_size {GLOBAL} --local_crops_size {LOCAL} --local_crops_number {VIEWS - 2} "
    words += "--precision fp32 --distort_on workers --freeze_last_layer 0 --num_workers 0 "
    words += f"--log_every {steps + 1} --output_dir"  # the last step reports
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Done):
        main_lgssl.main([*words.split(), folder])
    *others, reporting = np.diff(times[1:])
    seconds = np.average([np.mean(others), reporting], weights=[LOG_EVERY - 1, 1])
    return {"seconds": seconds, **result}


def memory(device) -> dict:
    """Return the bytes in use {"now", "peak"}, of the GPU, or of this process on a CPU (Linux only)."""
    if device.type == "cuda":
        return {"now": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {"now": now, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def synchronized_time(device) -> float:
    """Wait for the device, and return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def correspondences(views, patch_size) -> list:
    """Return (i, j, tokens of teacher view i, tokens of student view j) for all pairs. The batch shares its crops."""
    grids = [(view.pixels.shape[-1] // patch_size,) * 2 for view in views]
    sides = [(view.boxes[0], view.flips[0], grid) for view, grid in zip(views, grids, strict=True)]
    return [(i, j, *match_patches(*sides[i], *sides[j])) for i in range(2) for j in range(len(views)) if i != j]


def every_token(matches, views, patch_size) -> Matches:
    """Return matches whose rows are all tokens of a batch, so that the heads process unmatched tokens too."""
    counts = [len(pixels) * (1 + (pixels.shape[-1] // patch_size) ** 2) for pixels in views]
    return matches._replace(teacher_row=torch.arange(counts[0]), student_row=torch.arange(sum(counts)))


class NaiveLoss(LocalGlobalLoss):
    """Algorithm 1 of the paper without optimizations: all tokens, a log-softmax per pair of views, a center [1+P, K].

    Attributes:
        pairs: result of `correspondences` for the batch.
    """

    pairs = None

    def forward(self, student_out, teacher_out, matches, teacher_temp) -> torch.Tensor:
        images, num_views = len(matches.teacher_count), 1 + max(j for _, j, *_ in self.pairs)
        tokens = len(teacher_out.bottleneck) // 2  # per global view, over all images
        local_tokens = (len(student_out.bottleneck) - 2 * tokens) // max(num_views - 2, 1)

        def logits_of_views(out, sizes):
            logits = F.linear(out.bottleneck, out.scale[:, None] * out.prototypes)
            return [view.unflatten(0, (images, -1)) for view in logits.split(sizes)]  # [B, 1+P, K] each

        t = logits_of_views(teacher_out, [tokens] * 2)
        s = logits_of_views(student_out, [tokens] * 2 + [local_tokens] * (num_views - 2))
        loss = 0
        for i, j, idx_t, idx_s in self.pairs:
            weight = 1 / (len(self.pairs) * images * len(idx_t))
            center = self.center[idx_t]
            loss = loss + plain_loss(s[j][:, idx_s], t[i][:, idx_t], weight, center, teacher_temp, self.student_temp)
        self.mean_logits = torch.cat(t).mean(0).detach()
        return loss

    @torch.no_grad()
    def update_center(self) -> None:
        self.center.lerp_(self.mean_logits, 1 - self.center_momentum)


def naive_bytes(arch, patch_size, batch_size, K) -> float:
    """Return a lower bound of the naive side's memory in bytes, without the backbone's activations.

    Counts the networks with gradients and optimizer, the logits of all tokens, the gradients of the student's logits,
    and the targets and log-probabilities per pair of views. Assumes that 55 % of the tokens of a global view and 80 %
    of a local view are matched.
    """
    tokens = [1 + (size // patch_size) ** 2 for size in (GLOBAL, LOCAL)]
    teacher, student = 2 * tokens[0], 2 * tokens[0] + (VIEWS - 2) * tokens[1]
    matched = 2 * (0.55 * tokens[0] + (VIEWS - 2) * 0.8 * tokens[1])
    backbone = sum(p.numel() for p in ARCHITECTURES[arch](patch_size).parameters())
    networks = 5 * (backbone + K * BOTTLENECK)  # student, teacher, gradient and two moments
    return 4 * (batch_size * K * (teacher + 2 * student + 2 * matched) + networks)


def measure_loss(K, patch_size, tables, device) -> dict:
    """Time the loss with its gradients, and only its matrix products.

    The products are timed as one call per image with preallocated results, which is the best that this machine reaches
    with these shapes.

    Args:
        tables: Matches of batches that share their geometry.

    Returns:
        {"loss_seconds", "product_seconds", "flop": floating-point operations of the products}, means over the tables
    """
    criterion = LocalGlobalLoss(K, (GLOBAL // patch_size) ** 2).to(device).eval()
    weights = F.normalize(torch.randn(K, BOTTLENECK, device=device), dim=-1).requires_grad_()
    scale = torch.ones(K, device=device, requires_grad=True)
    seconds = products = flop = 0
    for matches in tables:
        batch_size = len(matches.teacher_count)
        counts = len(matches.teacher_row) // batch_size, len(matches.student_row) // batch_size  # per image
        z_t, z_s = (F.normalize(torch.randn(n * batch_size, BOTTLENECK, device=device), dim=-1) for n in counts)
        outs = [TokenOutput(z, weights, scale, None) for z in (z_s.requires_grad_(), z_t)]
        on_device = matches.to(device)
        times = seconds_of(lambda outs=outs, matches=on_device: criterion(*outs, matches, 0.04).backward(), 3, device)
        seconds += min(times[1:])
        z_t, z_s = z_t[: counts[0]], z_s.detach()[: counts[1]]
        wide_t, wide_s = (torch.rand(n, K, device=device) for n in counts)
        result, accumulated = torch.empty_like(z_s), torch.zeros_like(weights)
        calls = (
            lambda: torch.mm(z_t, weights.T, out=wide_t),
            lambda: torch.mm(z_s, weights.T, out=wide_s),
            lambda: torch.mm(wide_s, weights, out=result),
            lambda: accumulated.addmm_(wide_s.T, z_s),
        )
        with torch.no_grad():
            products += batch_size * sum(min(seconds_of(call, 3, device)[1:]) for call in calls)
        flop += 2 * batch_size * K * BOTTLENECK * (counts[0] + 3 * counts[1])
    n = len(tables)
    return {"loss_seconds": seconds / n, "product_seconds": products / n, "flop": flop / n}


def above_bare(result) -> int:
    """Return the peak memory in bytes beyond networks, gradients and optimizer."""
    return result["peak"] - result["before"]


def print_results(cases, results) -> None:
    """Print the table of all cases, the efficiency of the loss, and the growth of memory with K."""
    rows = []
    for arch, patch, batch, K, sides in cases:
        of_case = {side: results[arch, patch, batch, K, side] for side in sides}
        naive, cls = of_case.get("naive", {}), of_case.get("cls", {})
        for side, result in of_case.items():
            row = [f"{arch}/{patch}, batch {batch}", K, side]
            if "seconds" in result:
                row += [f"{result['seconds']:.2f}", f"{result['peak'] / 1e9:.2f}", f"{above_bare(result) / 1e9:.2f}"]
                row += [f"{result['loss_seconds']:.2f}" if "flop" in result else ""]
                compared = "seconds" in naive and side != "naive"
                row += [f"{naive['seconds'] / result['seconds']:.2f}×" if compared else ""]
                row += [f"{above_bare(naive) / above_bare(result):.1f}×" if compared else ""]
                row += [f"{result['seconds'] / cls['seconds']:.2f}×" if "seconds" in cls and side != "cls" else ""]
            elif "need" in result:
                row += [f"not run, needs {result['need'] / 1e9:.0f} GB", *[""] * 6]
            else:
                row += [f"failed with exit code {result['failed']}", *[""] * 6]
            rows.append(row)
    header = ("network", "K", "side", "s/step", "peak GB", "above bare GB", "loss s")
    print_table((*header, "naive takes, time", "memory", "time of cls"), rows)
    print(
        "\n'above bare': peak memory beyond networks, gradients and optimizer. 'memory': the ratio of 'above bare'.\n"
    )
    for (arch, patch, batch, K, side), result in results.items():
        if "flop" in result and side == "lgssl":
            rate, best = result["flop"] / result["loss_seconds"] / 1e9, result["flop"] / result["product_seconds"] / 1e9
            print(
                f"{arch}/{patch}, batch {batch}, K {K}: loss with gradients {rate:.0f} GFLOP/s, "
                f"only its matrix products {best:.0f}: {rate / best:.0%}"
            )
    for arch, patch, batch in dict.fromkeys(case[:3] for case in cases):
        peaks = {
            K: r["peak"]
            for (*case, K, side), r in results.items()
            if case == [arch, patch, batch] and side == "lgssl" and "peak" in r
        }
        if len(peaks) > 1:
            low, high = min(peaks), max(peaks)
            # prototypes of student and teacher, their gradient and two moments; center and its update
            accounted = (high - low) * 4 * (5 * BOTTLENECK + 2 * (1 + (GLOBAL // patch) ** 2))
            growth = peaks[high] - peaks[low] - accounted
            print(
                f"{arch}/{patch}, batch {batch}: from K {low} to {high} the peak grows by {growth / 1e6:.0f} MB beyond "
                f"prototypes (weights, gradients, optimizer) and center ({accounted / 1e6:.0f} MB)"
            )


if __name__ == "__main__":
    main()
