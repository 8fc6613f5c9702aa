"""Time and peak memory of a training step, against the naive Algorithm 1 of the paper and against `--loss cls`.

    python -m benchmarks.bench_step                                                  the README's figures
    python -m benchmarks.bench_step --arch vit_small --batch_size 40 --patch_size 8 --out_dim 4096 65536

Each side runs in fresh processes on the same views, with the same networks, optimizer and EMA, in fp32. One step in
ten reports, as in a training, and then measures its health as well; the naive side does not do that. A naive side
that would not fit into memory is not run; what it needs is computed instead.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

import main_lgssl
from augment import MultiCrop, normalize
from benchmarks.machine import machine, memory_size, print_table
from losses import LocalGlobalLoss
from main_lgssl import BatchesOfViews, Meters, build_optimizer, train_one_epoch
from patch_matching import match_patches
from utils import ArgumentParser, number
from vision_transformer import ARCHITECTURES, BackboneWithHead, DINOHead

SIDES = {  # options of each side
    "lgssl": {"loss": "mean"},
    "lgssl, --grad_checkpointing": {"loss": "mean", "checkpointing": True},
    "lgssl, --geometry image": {"loss": "mean", "geometry": "image"},
    "naive": {"loss": "mean", "naive": True},
    "cls": {"loss": "cls"},
}
README = [  # (arch, patch size, batch size, K, sides)
    ("vit_tiny", 16, 10, 4096, ("lgssl", "naive", "cls")),
    ("vit_tiny", 16, 10, 10000, ("lgssl", "naive", "cls")),
    ("vit_tiny", 16, 10, 65536, tuple(SIDES)),
    ("vit_base", 16, 4, 10000, ("lgssl", "cls")),
]
BOTTLENECK, VIEWS, GLOBAL, LOCAL = 256, 10, 224, 96
LOG_EVERY = 10  # as a training


def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    natural = number(int, 1)
    add = parser.add_argument_group("cases, all combinations of these; used with --arch").add_argument
    add("--arch", nargs="+", choices=ARCHITECTURES, help="networks; default: the cases of the README")
    add("--patch_size", nargs="+", type=natural, default=[16], help="sides of a patch in pixels")
    add("--batch_size", nargs="+", type=natural, default=[10], help="images of a step")
    add("--out_dim", nargs="+", type=natural, default=[4096, 10000, 65536], help="K, numbers of prototypes")
    add("--sides", nargs="+", choices=SIDES, default=["lgssl", "naive", "cls"], help="what is compared")
    add = parser.add_argument_group("measurement").add_argument
    add("--steps", type=number(int, 2), default=3, help="timed after one that is not; the last one reports")
    add("--rounds", type=natural, default=2, help="through all sides, the best of which counts")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(**json.loads(args.worker))))
        return

    print(machine())
    cases = README
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


def run_side(side, case, steps):
    """Measure one side in a fresh process, or say what the naive one would need."""
    options = {**SIDES[side], **case, "steps": steps}
    if side == "naive":
        need = naive_bytes(**case)
        if need > 0.9 * memory_size():
            return {"need": need}
    command = [sys.executable, "-m", "benchmarks.bench_step", "--worker", json.dumps(options)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        return {"failed": process.returncode}
    return json.loads(process.stdout.splitlines()[-1])


def measure(arch, patch_size, batch_size, K, steps, loss, geometry="batch", checkpointing=False, naive=False):
    """Return the seconds of a step, and in bytes the memory before the steps and at their peak."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)

    def network(**options):
        backbone = ARCHITECTURES[arch](patch_size, **options)
        return BackboneWithHead(backbone, DINOHead(backbone.embed_dim, K, bottleneck_dim=BOTTLENECK)).to(device)

    student, teacher = network(drop_path_rate=0.1), network()
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    student.backbone.set_grad_checkpointing(checkpointing)
    patches = (GLOBAL // patch_size) ** 2
    loss_function = LocalGlobalLoss(K, patches, loss).to(device)
    optimizer = build_optimizer("adamw", student)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    images = torch.randint(0, 256, (batch_size, 3, 256, 256), dtype=torch.uint8)
    dataset = [(image, 0) for image in images]
    multi_crop = MultiCrop(GLOBAL, LOCAL, local_number=VIEWS - 2, geometry=geometry)
    batches = BatchesOfViews(dataset, multi_crop, patch_size, None if loss == "cls" else "paper", 0)
    keys = [(0, step, list(range(batch_size))) for step in range(steps)]
    items = [batches[key] for key in keys]
    schedules = {"lr": lambda step: 1e-5, "wd": lambda step: 0.04, "momentum": lambda step: 0.996}
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0)
    warm_up_and_steps = [0, *range(steps)]
    if naive:
        views = [batches.views(key) for key in keys]
        functions = [naive_batch_loss(correspondences(part, patch_size), len(part)) for part in views]
        order = (functions[i] for i in warm_up_and_steps)
        main_lgssl.batch_loss = lambda *arguments: next(order)(*arguments)
    times = []
    before = memory(device)["now"]
    train_one_epoch(
        [items[i] for i in warm_up_and_steps],
        0,
        student,
        teacher,
        loss_function,
        optimizer,
        scaler,
        schedules,
        0.04,
        Meters(device, "fp32", patches),
        steps=steps + 1,
        accum_steps=1,
        seed=0,
        clip_grad=3.0,
        freeze_last_layer=False,
        precision="fp32",
        device=device,
        log_every=steps + 1,  # the last one
        report=None,
        after_step=lambda step: times.append(synchronized_time(device)),
    )
    *others, reporting = np.diff(times)
    seconds = np.average([np.mean(others), reporting], weights=[LOG_EVERY - 1, 1])
    result = {"seconds": seconds, "before": before, "peak": memory(device)["peak"]}
    if loss == "mean" and not naive and geometry == "batch":
        tables = [item[2] for item in items]
        result |= measure_loss(loss_function, student.head.prototypes(), tables, batch_size, device)
    return result


def memory(device):
    """Return the bytes in use now and at the peak: of the GPU, or of this process on a CPU (Linux)."""
    if device.type == "cuda":
        return {"now": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {"now": now, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def synchronized_time(device):
    """Return the time in seconds at which the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# --- the naive side


def correspondences(views, patch_size):
    """Return (i, j, tokens of teacher view i, tokens of student view j) for all pairs, of crops that a batch shares."""
    grids = [(view.pixels.shape[-1] // patch_size,) * 2 for view in views]
    sides = [(view.boxes[0].tolist(), bool(view.flips[0]), grid) for view, grid in zip(views, grids, strict=True)]
    return [(i, j, *match_patches(*sides[i], *sides[j])) for i in range(2) for j in range(len(views)) if i != j]


def naive_batch_loss(pairs, views):
    """Return Algorithm 1 as it stands, with the center [1+P, K]: all tokens through the head, log-softmax per pair."""

    def logits(network, crops, images):
        outputs = []
        for crop in crops:
            z, weights, scale = network([crop])
            outputs += F.linear(z, scale[:, None] * weights).unflatten(0, (len(crop), -1)).split(images)  # [B, 1+P, K]
        return outputs

    def batch_loss(student, teacher, loss_function, crops, table, temperature, device, *_):
        images = len(crops[0]) // 2
        crops = [normalize(crop.to(device)) for crop in crops]
        with torch.no_grad():
            t = logits(teacher, crops[:1], images)
        s = logits(student, crops, images)
        loss = 0
        for i, j, idx_t, idx_s in pairs:
            t_softmax = ((t[i][:, idx_t] - loss_function.center[idx_t]) / temperature).softmax(-1)
            s_softmax = (s[j][:, idx_s] / loss_function.student_temp).log_softmax(-1)
            loss = loss + (-t_softmax * s_softmax).sum(-1).mean()
        with torch.no_grad():
            loss_function.center.lerp_(torch.cat(t).mean(0), 1 - loss_function.center_momentum)
        return loss / len(pairs)

    return batch_loss


def naive_bytes(arch, patch_size, batch_size, K):
    """Return what the naive side needs at least, beside the backbone's activations.

    Those are the logits of all tokens, the gradients of the student's, and the targets and log-probabilities of each
    pair of views; of a view's tokens 55 % (global) and 80 % (local) are taken to be matched.
    """
    tokens = [1 + (size // patch_size) ** 2 for size in (GLOBAL, LOCAL)]
    teacher, student = 2 * tokens[0], 2 * tokens[0] + (VIEWS - 2) * tokens[1]
    matched = 2 * (0.55 * tokens[0] + (VIEWS - 2) * 0.8 * tokens[1])
    backbone = sum(p.numel() for p in ARCHITECTURES[arch](patch_size).parameters())
    networks = 5 * (backbone + K * BOTTLENECK)  # student, teacher, gradient and two moments
    return 4 * (batch_size * K * (teacher + 2 * student + 2 * matched) + networks)


# --- the loss alone


def measure_loss(loss_function, prototypes, tables, batch_size, device):
    """Return the seconds of the loss with its gradients, of its matrix products alone, and their number of operations.

    The products alone are timed as one call each per image, with the result's memory at hand: what this machine makes
    of these shapes at its best.
    """
    weights, scale = (x.detach().requires_grad_() for x in prototypes)
    K, D = weights.shape
    seconds = products = flop = 0
    for table in tables:
        counts = len(table.teacher_row) // batch_size, len(table.student_row) // batch_size  # of one image
        z_t, z_s = (F.normalize(torch.randn(n * batch_size, D, device=device), dim=-1) for n in counts)
        weight = loss_function.weights(
            table.teacher_position[table.teacher_idx] == 0, table.run_length, batch_size * 18
        )
        pairs = (table.teacher_idx, table.student_idx, weight, table.image)
        z_s.requires_grad_()

        def run(z_s=z_s, z_t=z_t, pairs=pairs, table=table):
            arguments = (z_s, z_t, weights, weights, pairs, table.teacher_position, None, 0.04)
            loss_function(*arguments, student_scale=scale, teacher_scale=scale).backward()

        seconds += timed(run, device)
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
            products += batch_size * sum(timed(call, device) for call in calls)
        flop += 2 * batch_size * K * D * (counts[0] + 3 * counts[1])
    n = len(tables)
    return {"loss_seconds": seconds / n, "product_seconds": products / n, "flop": flop / n}


def timed(call, device, repeats=2):
    """Return the least seconds of a call."""
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


# --- the tables


def above_bare(result):
    return result["peak"] - result["before"]


def print_results(cases, results):
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
    print("\n'above bare': beyond the process with networks, gradients and optimizer; 'memory' compares these.\n")
    for (arch, patch, batch, K, side), result in results.items():
        if "flop" in result and side == "lgssl":
            rate, best = result["flop"] / result["loss_seconds"] / 1e9, result["flop"] / result["product_seconds"] / 1e9
            print(
                f"{arch}/{patch}, batch {batch}, K {K}: loss with gradients {rate:.0f} GFLOP/s, "
                f"its matrix products alone {best:.0f}: {rate / best:.0%}"
            )
    for arch, patch, batch in dict.fromkeys(case[:3] for case in cases):
        peaks = {
            K: r["peak"]
            for (*case, K, side), r in results.items()
            if case == [arch, patch, batch] and side == "lgssl" and "peak" in r
        }
        if len(peaks) > 1:
            low, high = min(peaks), max(peaks)
            # student, teacher, gradient and two moments of the prototypes; center and its update
            accounted = (high - low) * 4 * (5 * BOTTLENECK + 2 * (1 + (GLOBAL // patch) ** 2))
            growth = peaks[high] - peaks[low] - accounted
            print(
                f"{arch}/{patch}, batch {batch}: from K {low} to {high} the peak grows by {growth / 1e6:.0f} MB beyond "
                f"prototypes (weights, gradients, optimizer) and center ({accounted / 1e6:.0f} MB)"
            )


if __name__ == "__main__":
    main()
