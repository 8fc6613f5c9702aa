"""Measure training steps on a GPU by phase, against what its rates allow and against DINO's step.

    python -m benchmarks.bench_gpu              what the goals need, in rounds for five minutes
    python -m benchmarks.bench_gpu --all        also fp16, TF32, plain networks, the loss alone
    python -m benchmarks.bench_gpu --profile    instead: the operations that take most time of the GPU
    python -m benchmarks.bench_gpu --loading    instead: from JPEG files to steps, in about five minutes

The steps are those of the loop in main_lgssl.py, on views that are made in advance; only the beginnings of phases are
recorded, without waiting for the device. Views are distorted in advance too. "DINO" is DINO's step in plain PyTorch,
see `dino_steps`. Each round runs all cases in turn, each as a training of its own. Times are medians over the steps of
all rounds, in brackets the range of the medians of the rounds. The start-up ends with the request for the first batch
and includes compilation and capture; that of the first round counts, which finds no compiled code on the disk.

The bound of a phase is max(FLOP / rate of matrix products, bytes / rate of copies), with the rates that this device
reaches in one large product and one large copy. D is the width of the ViT, N its tokens per view, H the weights of the
MLP of the head, K the number of prototypes, n_t and n_s the numbers of matched teacher and student tokens:

- ViT, forward, per view: 2·N·(weights of the blocks) + 4·N²·D per block + 2·(N - 1)·(weights of the patch embedding)
- head, forward: 2·H per token; all tokens of the teacher, or its CLS tokens with `cls`; n_s tokens of the student
- student: ViT + head; backward: twice that; teacher: ViT + head
- loss: 2·256·K·(n_t + 3·n_s) FLOP and K·((8 + 2·p)·n_t + (8 + 3·p)·n_s) bytes. All logits are written and read once, in
  4 bytes per entry. So are the targets, in p bytes: 2 if products run in 16 bits, or else 4. The gradients of the
  student's logits are written once and read by two products, in p bytes.
- update: 44 bytes per parameter of the student: clipping reads the gradient; AdamW reads weight, gradient and two
  moments, and writes weight and moments; EMA reads both networks and writes one. The center is not counted.

With --loading, one training per network takes its batches from each source in turn. Each source has steps that are not
timed, more than its workers prefetch, and those that are, and all have the same numbers of matched tokens. The step
alone has views that are made in advance and not distorted. "DINO's" workers make the views of each image with
torchvision and PIL; the step is the same. The files lie in the memory of the system.
"""

import contextlib
import functools
import gc
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from typing import NamedTuple
from unittest import mock

import cv2
import numpy as np
import torch
import torch.nn.functional as F

import main_lgssl
from augment import distort_batch
from benchmarks.bench_step import BOTTLENECK, GLOBAL, LOCAL, VIEWS, Done, memory
from benchmarks.bench_views import PlainBatches, print_stages, write_photographs
from benchmarks.machine import machine, print_table
from losses import LOSS_WEIGHTS, LocalGlobalLoss, plain_loss
from support.arguments import ArgumentParser, number
from support.cuda_graphs import compiled_distortion
from support.loader import PREFETCHED, LoadedBatch, Workers, fit_workers, open_loader
from utils import Process, UserError, run_main
from vision_transformer import ARCHITECTURES, DINOHead, TokenOutput

PATCH, IMAGE = 16, 256
BATCHES = 8  # different ones, in turn
WARM_UP = BATCHES  # steps or calls that are not timed: for each batch one
PHASES = ("views", "teacher", "student", "loss", "backward", "update")
ROUNDS = 3  # at most
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of products under autocast; fp32 otherwise
# Options of main_lgssl.py. By default, blocks are compiled, and backbones are replayed from CUDA graphs.
SPEEDS = {"default": "", "graphs": "--compile false", "eager": "--compile false --cuda_graphs false"}


class Case(NamedTuple):
    arch: str
    batch_size: int
    K: int = 10_000
    loss: str = "mean"  # of main_lgssl.py, or "DINO" for DINO's step
    precision: str = "bf16"  # of main_lgssl.py
    speed: str = "default"  # one of SPEEDS
    distort_on: str = "workers"  # of main_lgssl.py

    def cells(self) -> list:
        """Return the first cells of a row: network, K, loss and precision."""
        speed = f", {self.speed}" * (self.speed != "default") + ", with distortion" * (self.distort_on == "device")
        return [f"{self.arch}/{PATCH}, batch {self.batch_size}{speed}", self.K, self.loss, self.precision]


SMALL, OF_DINO = Case("vit_small", 40), Case("vit_small", 64, 65_536, "cls", "fp16")  # the defaults here, and DINO's
LOSS_SIZES = (SMALL.K, OF_DINO.K)
STEP, ADDED, FASTER, START_UP = "step ms", "minus cls, ms", "times as fast as DINO's step", "start-up s"
COMPARED = {ADDED: "cls", FASTER: "DINO"}  # the loss that a goal compares with
GOALS = [  # values are at most the last number, and those of FASTER at least
    (START_UP, SMALL._replace(distort_on="device"), 30),  # as by default; the first one, which compiles
    (STEP, SMALL, 28),
    (STEP, Case("vit_small", 10), 13),
    (STEP, Case("vit_small", 128), 70),
    (STEP, Case("vit_tiny", 40), 18),
    (STEP, Case("vit_tiny", 128), 45),
    (STEP, Case("vit_base", 128), 145),
    (ADDED, SMALL, 4),
    (ADDED, SMALL._replace(K=OF_DINO.K), 12),
    (FASTER, OF_DINO, 2.5),
]
CASES = [
    *(case for _, case, _ in GOALS),
    *(case._replace(loss=COMPARED[goal]) for goal, case, _ in GOALS if goal in COMPARED),
    *(SMALL._replace(speed=speed) for speed in SPEEDS),
]
# tf32 comes last, because it changes settings of the process. DINO's steps run with those of the case before.
OTHER_CASES = [
    *(case._replace(speed="eager") for goal, case, _ in GOALS if goal == STEP),
    *(
        SMALL._replace(precision=precision, K=K, loss=loss)
        for precision, K, loss in itertools.product(("bf16", "fp16", "tf32"), LOSS_SIZES, ("mean", "cls", "DINO"))
    ),
]


class Result(NamedTuple):
    steps: list[dict[str, float]]  # {phase: seconds} of each timed step
    tokens: list[tuple[int, int]]  # (n_t, n_s) of each
    peak: int  # memory in bytes
    start_up: float  # seconds until the first batch


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="measure all cases, and the loss alone")
    parser.add_argument("--profile", action="store_true", help="only print the operations with most time of the GPU")
    parser.add_argument("--loading", action="store_true", help="only measure the loading of images")
    parser.add_argument("--minutes", type=number(float, 0), default=5, help="time for the rounds; at least one")
    parser.add_argument("--steps", type=number(int, 1), default=16, help="timed steps per training")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("found no GPU that PyTorch can use, expected one: bench_step measures steps on a CPU")
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    start = time.perf_counter()
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # so that the first start-up compiles
        if args.profile:
            print_profile(SMALL, device)
            return
        if args.loading:
            print_loading([Case(arch, 128, distort_on="device") for arch in ("vit_tiny", "vit_small")], device)
        else:
            run(CASES + OTHER_CASES * args.all, device, args.minutes, args.steps)
            if args.all:
                print()
                print_loss_alone(LOSS_SIZES, 128, device)
    print(f"\nmeasured in {(time.perf_counter() - start) / 60:.1f} minutes")


def run(cases, device, minutes, steps, side=8192, copied=2**30) -> None:
    """Measure all cases and print the tables of steps and goals. A CPU as the device serves to test this program.

    Args:
        minutes: time for all rounds. There is at least one, and there are at most ROUNDS.
        steps: timed steps per training.
        side, copied: side of the matrices whose product is timed, bytes of the copy that is timed.
    """
    results, rates = {case: [] for case in cases}, {}
    copy_rate = measure_copy(device, copied)
    start = time.perf_counter()
    for i in range(ROUNDS):
        begin = time.perf_counter()
        for case in [case for case in results if results[case] is not None]:
            try:
                result = measure(case, steps, device)
                results[case].append(result)
                found = f"step {step_ms([result])[0]:.1f} ms, start-up {result.start_up:.1f} s"
            except torch.OutOfMemoryError:
                results[case], found = None, "out of memory"
            print(f"round {i + 1}:", "{}, K {}, {}, {}:".format(*case.cells()), found, file=sys.stderr, flush=True)
            free_memory(device)
            if case.precision not in rates:  # only now are the settings those of the precision
                product_rate = measure_product(device, DTYPES.get(case.precision, torch.float32), side)
                rates[case.precision] = product_rate, copy_rate
        now = time.perf_counter()
        if now + (now - begin) > start + 60 * minutes:
            break
    for precision, (product, copy) in rates.items():
        print(f"products in {precision}: {product / 1e12:.1f} TFLOP/s of {side}³; copies: {copy / 1e9:.0f} GB/s")
    print()
    print_steps(results, rates)
    print_goals(results)


# Timing


def timestamp(device):
    """Return the time at which the device reaches this point: an event of a GPU, or seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start, end) -> float:
    """Return the seconds between two timestamps. A GPU must have reached both, see `synchronize`."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def synchronize(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def median_seconds(call, device, repeats=10) -> float:
    """Return the median time of a call, without the first ones."""
    times = []
    for _ in range(WARM_UP + repeats):
        start = timestamp(device)
        call()
        times.append((start, timestamp(device)))
    synchronize(device)
    return statistics.median(itertools.starmap(seconds_between, times[WARM_UP:]))


def free_memory(device) -> None:
    """Return unused memory to the device, and start a new peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure_product(device, dtype, side) -> float:
    """Return the FLOP per second of a product of two square matrices."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / median_seconds(lambda: torch.mm(a, b, out=out), device)


def measure_copy(device, size) -> float:
    """Return the bytes that a copy of `size` bytes reads and writes per second."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * len(source) / median_seconds(lambda: target.copy_(source), device)


# Steps


def options(case) -> list[str]:
    """Return the options of main_lgssl.py for a case. All losses have the same views, with crops shared by a batch."""
    words = f"--arch {case.arch} --batch_size_per_gpu {case.batch_size} --out_dim {case.K} --patch_size {PATCH} "
    words += f"--loss {'cls' if case.loss == 'DINO' else case.loss} --geometry batch --image_size {IMAGE} "
    words += f"--global_crops_size {GLOBAL} --local_crops_size {LOCAL} --local_crops_number {VIEWS - 2} "
    words += f"--precision {case.precision} --freeze_last_layer 0 --num_workers 0 --log_every {10**9} "
    words += f"--distort_on {case.distort_on} "
    words += SPEEDS[case.speed]
    return words.split()


@functools.cache
def make_batches(only_cls, batch_size, device, count=BATCHES, distort_on="workers") -> list[LoadedBatch]:
    """Return the batches of a training on random images, with uint8 views, in pinned memory for a GPU."""
    rng = np.random.default_rng(0)
    images = [(rng.integers(0, 256, (IMAGE, IMAGE, 3), np.uint8), 0) for _ in range(batch_size)]
    case = Case("vit_small", batch_size, loss="cls" if only_cls else "mean", distort_on=distort_on)
    args = main_lgssl.parse_arguments(options(case))
    return list(main_lgssl.build_loader(args, images * count, range(count), Process(0, 1, device)))


def measure(case, steps, device) -> Result:
    """Run and time the first steps of a training, after those that warm up."""
    batches = make_batches(case.loss != "mean", case.batch_size, device, distort_on=case.distort_on)
    marks = []  # (phase that begins, timestamp, seconds on the CPU)

    def mark(phase):
        marks.append((phase, timestamp(device), time.perf_counter()))

    free_memory(device)
    start = time.perf_counter()
    run_steps(case, batches, steps, mark, device)
    times = []
    for (phase, begin, _), (_, end, _) in itertools.pairwise(marks):
        if phase == "views":
            times.append({})
        times[-1][phase] = times[-1].get(phase, 0) + seconds_between(begin, end)
    matches = [batches[i % BATCHES].matches for i in range(WARM_UP, WARM_UP + steps)]
    tokens = [(len(of_step.teacher_row), len(of_step.student_row)) for of_step in matches]
    # The pool of a CUDA graph counts as free between its replays.
    peak = torch.cuda.max_memory_reserved() if device.type == "cuda" else memory(device)["peak"]
    return Result(times[WARM_UP:], tokens, peak, marks[0][2] - start)


def run_steps(case, batches, steps, mark, device) -> None:
    """Warm up and run steps of a training. `mark` is called with each phase that begins, and at last with "end"."""
    on_device = main_lgssl.batches_on_device

    def batches_on_device(_, device, *more):
        in_turn = on_device(itertools.cycle(batches), device, *more)
        for _ in range(WARM_UP + steps):
            mark("views")
            yield next(in_turn)
        mark("end")
        raise Done

    with contextlib.suppress(Done):
        (dino_steps if case.loss == "DINO" else lgssl_steps)(case, batches_on_device, mark, device)
    synchronize(device)


def print_profile(case, device, steps=4) -> None:
    """Print the operations of some steps of the loss "mean" that take most time of the GPU."""
    schedule = torch.profiler.schedule(wait=WARM_UP, warmup=1, active=steps, repeat=1)

    def mark(phase):
        if phase in ("views", "end"):
            synchronize(device)
            profiler.step()

    with torch.profiler.profile(schedule=schedule) as profiler:
        run_steps(case, make_batches(False, case.batch_size, device), steps, mark, device)
    print(profiler.key_averages().table(sort_by="self_device_time_total", row_limit=25))


def lgssl_steps(case, batches_on_device, mark, device) -> None:
    """Run the loop of main_lgssl.py on batches that end with Done. A phase begins when a part of the step is called."""
    build, backward = main_lgssl.build_networks, torch.Tensor.backward

    def build_networks(args):
        networks = build(args)
        for phase, module in zip(("student", "teacher", "loss"), networks, strict=True):
            module.register_forward_pre_hook(lambda *_, phase=phase: mark(phase))
        return networks

    def marked_backward(*arguments, **named):
        mark("backward")
        backward(*arguments, **named)
        mark("update")

    images = [(np.zeros((IMAGE, IMAGE, 3), np.uint8), 0)] * (2**10 * case.batch_size)  # an epoch does not end
    opened = main_lgssl.Images(images, None, "not timed")
    patches = {"batches_on_device": batches_on_device, "build_networks": build_networks}
    with (
        mock.patch.multiple(main_lgssl, open_images=lambda _: opened, **patches),
        mock.patch.object(torch.Tensor, "backward", marked_backward),
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(sys.stderr),
    ):
        main_lgssl.main([*options(case), "--output_dir", folder])


def cls_logits(network, views) -> torch.Tensor:
    """Return the logits [n, K] of the CLS tokens of all views, view-major."""
    cls_tokens = torch.cat([network.backbone(pixels)[:, 0] for pixels in views])
    prototypes, scale = network.head.prototypes()
    return F.linear(network.head(cls_tokens), scale[:, None] * prototypes)


def dino_loss(student_logits, teacher_logits, center, batch_size, teacher_temp) -> torch.Tensor:
    """Return the mean of H(teacher view, student view) over the pairs of different views and the images.

    Args:
        student_logits, teacher_logits: [views * batch_size, K] and [2 * batch_size, K], view-major.
        center: [1, K].
    """
    targets = F.softmax((teacher_logits - center) / teacher_temp, -1).split(batch_size)
    views = (student_logits / 0.1).split(batch_size)
    pairs = [(t, s) for t in range(len(targets)) for s in range(len(views)) if t != s]
    return sum(F.cross_entropy(views[s], targets[t]) for t, s in pairs) / len(pairs)


def dino_steps(case, batches_on_device, mark, device) -> None:
    """Run DINO's step in plain PyTorch on batches that end with Done, with the networks of main_lgssl.py.

    Only CLS tokens pass through the head. The logits of all views are computed, with one log-softmax per pair of views.
    Gradients are clipped, and the teacher is updated, parameter by parameter. As in DINO, the loss is read in every
    step, which waits for the device.
    """
    args = main_lgssl.parse_arguments(options(case))
    student, teacher, _ = (module.to(device) for module in main_lgssl.build_networks(args))
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.04)
    scaler = torch.amp.GradScaler(device.type, enabled=case.precision == "fp16")
    center = torch.zeros(1, case.K, device=device)
    for views, _, _ in batches_on_device(None, device):
        mark("step")
        with torch.autocast(device.type, DTYPES.get(case.precision), enabled=case.precision in DTYPES):
            with torch.no_grad():
                teacher_logits = cls_logits(teacher, views[:1])
            loss = dino_loss(cls_logits(student, views), teacher_logits, center, case.batch_size, 0.04)
        if not math.isfinite(loss.item()):
            raise ArithmeticError(f"the loss of DINO is {loss.item()}")
        center = 0.9 * center + 0.1 * teacher_logits.float().mean(0, keepdim=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        for parameter in student.parameters():
            torch.nn.utils.clip_grad_norm_(parameter, 3.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
                average.mul_(0.996).add_(parameter, alpha=0.004)


# Bounds


def vit_flop(backbone, side) -> int:
    """Return the FLOP of the forward pass of one square view."""
    patches, width = (side // PATCH) ** 2, backbone.embed_dim
    weights = sum(layer.weight.numel() for layer in backbone.blocks.modules() if isinstance(layer, torch.nn.Linear))
    attention = 4 * (1 + patches) ** 2 * width * len(backbone.blocks)
    return 2 * (1 + patches) * weights + attention + 2 * patches * backbone.patch_embed.proj.weight.numel()


def loss_bytes(K, n_t, n_s, operand_bytes) -> int:
    """Return the bytes of the K columns; `operand_bytes` is the size of an entry of an operand of a product."""
    return K * ((8 + 2 * operand_bytes) * n_t + (8 + 3 * operand_bytes) * n_s)


def costs(case, n_t, n_s) -> dict[str, tuple[int, int]]:
    """Return {phase: (FLOP, bytes)} of a step with n_t and n_s matched tokens, see the top of this file."""
    with torch.device("meta"):
        backbone = ARCHITECTURES[case.arch](PATCH, img_size=GLOBAL)
        head = DINOHead(backbone.embed_dim, case.K)
    views = {side: case.batch_size * vit_flop(backbone, side) for side in (GLOBAL, LOCAL)}
    of_token = 2 * sum(layer.weight.numel() for layer in head.mlp if isinstance(layer, torch.nn.Linear))
    teacher_tokens = n_t if case.loss != "mean" else 2 * case.batch_size * (1 + (GLOBAL // PATCH) ** 2)
    student = 2 * views[GLOBAL] + (VIEWS - 2) * views[LOCAL] + n_s * of_token
    parameters = sum(p.numel() for network in (backbone, head) for p in network.parameters())
    operand_bytes = DTYPES.get(case.precision, torch.float32).itemsize
    return {
        "teacher": (2 * views[GLOBAL] + teacher_tokens * of_token, 0),
        "student": (student, 0),
        "loss": (2 * BOTTLENECK * case.K * (n_t + 3 * n_s), loss_bytes(case.K, n_t, n_s, operand_bytes)),
        "backward": (2 * student, 0),
        "update": (0, 44 * parameters),
    }


def step_ms(runs) -> list[float]:
    """Return the median over the steps of all Results in ms, followed by the median of each."""
    of_runs = [[1e3 * sum(step.values()) for step in run.steps] for run in runs]
    return [statistics.median(times) for times in (sum(of_runs, []), *of_runs)]


def with_range(value, *of_rounds, digits=1) -> str:
    if not of_rounds:
        return f"{value:.{digits}f}"
    return "{:.{n}f} ({:.{n}f}–{:.{n}f})".format(value, min(of_rounds), max(of_rounds), n=digits)


def print_steps(results, rates) -> None:
    """Print speed, memory and start-up, and the time of each phase with the share of its bound."""
    rows = []
    for case, runs in results.items():
        rows.append(case.cells())
        if runs is None:
            rows[-1] += ["out of memory", *[""] * (4 + len(PHASES))]
            continue
        ms, peak, (product_rate, copy_rate) = step_ms(runs), max(run.peak for run in runs), rates[case.precision]
        start_ups = [run.start_up for run in (runs[0], *runs)]
        of_steps = [costs(case, *of_step) for of_step in runs[0].tokens]
        flop = statistics.median(sum(flop for flop, _ in of_step.values()) for of_step in of_steps)
        rows[-1] += [f"{1e3 * case.batch_size / ms[0]:.0f}", f"{peak / 1e9:.1f}", with_range(*start_ups)]
        rows[-1] += [with_range(*ms), f"{1e3 * flop / ms[0] / product_rate:.0%}"]
        for phase in PHASES:
            times = [step[phase] for run in runs for step in run.steps if phase in step]  # DINO's step has no phases
            of_phase = [of_step[phase] for of_step in of_steps if phase in of_step]
            bounds = [max(flop / product_rate, size / copy_rate) for flop, size in of_phase]
            share = f" ({statistics.median(bounds) / statistics.median(times):.0%})" if times and bounds else ""
            rows[-1].append(f"{1e3 * statistics.median(times):.1f}{share}" if times else "")
    header = ("network", "K", "loss", "precision", "images/s", "peak GB", "start-up s", "step ms", "of product rate")
    print_table((*header, *(f"{phase} ms" for phase in PHASES)), rows)
    print("\nIn brackets: the range of the rounds, or the share of its bound that a phase reaches.\n")


def goal_cells(limit, values, at_least) -> list:
    """Return the last cells of a goal's row: what is expected and found, and whether it is reached.

    Args:
        values: what is found, and that of each round if there are several; empty if it is not measured.
    """
    expected = f"{'at least' if at_least else 'at most'} {limit}"
    if not values:
        return [expected, "not measured", ""]
    reached = values[0] >= limit if at_least else values[0] <= limit
    return [expected, with_range(*values, digits=2), "reached" if reached else "not reached"]


def print_goals(results) -> None:
    """Print what is aimed at, and whether it is reached."""
    rows = []
    for goal, case, limit in GOALS:
        runs, others = results.get(case), results.get(case._replace(loss=COMPARED.get(goal, case.loss)))
        values = []
        if runs and others:
            values = [run.start_up for run in (runs[0], *runs)] if goal == START_UP else step_ms(runs)
            if goal in COMPARED:
                pairs = zip(values, step_ms(others), strict=True)
                values = [own - other if goal == ADDED else other / own for own, other in pairs]
        rows.append([goal, *case.cells(), *goal_cells(limit, values, goal == FASTER)])
    print_table(("goal", "network", "K", "loss", "precision", "expected", "found", ""), rows)


# The loss alone


def pairs_by_image(matches, device) -> list:
    """Return the slices of the teacher and student tokens of each image, and of its matched pairs the indices in them.

    Returns:
        per image (slice, slice, teacher_idx [n], student_idx [n], teacher_position [n], weight [n] of the loss "mean")
    """
    is_cls, is_pair = matches.is_cls(), matches.num_matched > 0
    weight = LOSS_WEIGHTS["mean"](is_cls, matches.num_matched, 0.0) / is_cls.sum()
    images, t, s = [], 0, 0
    for n_t, n_s in zip(matches.teacher_count.tolist(), matches.student_count.tolist(), strict=True):
        m, student_idx = is_pair[:, s : s + n_s].nonzero(as_tuple=True)
        teacher_idx = matches.teacher_idx[m, s + student_idx]
        columns = (teacher_idx - t, student_idx, matches.teacher_position[teacher_idx], weight[m, s + student_idx])
        images.append((slice(t, t + n_t), slice(s, s + n_s), *(column.to(device) for column in columns)))
        t, s = t + n_t, s + n_s
    return images


def plain_batch_loss(student_out, teacher_out, images, center, teacher_temp) -> torch.Tensor:
    """Return the loss as `plain_loss` computes it, image by image; `images` is the result of `pairs_by_image`."""
    student_weights, teacher_weights = (out.scale[:, None] * out.prototypes for out in (student_out, teacher_out))
    total = 0
    for teacher_tokens, student_tokens, teacher_idx, student_idx, position, weight in images:
        teacher_logits = F.linear(teacher_out.bottleneck[teacher_tokens], teacher_weights)[teacher_idx]
        student_logits = F.linear(student_out.bottleneck[student_tokens], student_weights)[student_idx]
        total = total + plain_loss(student_logits, teacher_logits, weight, center[position], teacher_temp)
    return total


def measure_loss_alone(K, batch_size, device) -> list:
    """Time the loss "mean" on random vectors in bf16, plainly and as in a training, and return the row of a table."""
    (batch,) = make_batches(False, batch_size, device, count=1)
    tokens = len(batch.matches.teacher_row), len(batch.matches.student_row)
    z_t, z_s = (F.normalize(torch.randn(n, BOTTLENECK, device=device), dim=-1) for n in tokens)
    w_t, w_s = (F.normalize(torch.randn(K, BOTTLENECK, device=device), dim=-1) for _ in range(2))
    inputs = (z_s.requires_grad_(), w_s.requires_grad_(), torch.ones(K, device=device, requires_grad=True))
    student_out, teacher_out = TokenOutput(*inputs, None), TokenOutput(z_t, w_t, torch.ones(K, device=device), None)
    criterion = LocalGlobalLoss(K, (GLOBAL // PATCH) ** 2).to(device).eval()
    matches, images = batch.matches.to(device), pairs_by_image(batch.matches, device)
    results = []
    for loss in (
        lambda: plain_batch_loss(student_out, teacher_out, images, criterion.center, 0.04),
        lambda: criterion(student_out, teacher_out, matches, 0.04),
    ):

        def forward_and_backward():
            with torch.autocast(device.type, torch.bfloat16):
                value = loss()
            torch.autograd.grad(value, inputs)

        free_memory(device)
        before = memory(device)["now"]
        seconds = median_seconds(forward_and_backward, device, repeats=5)
        results.append((seconds, memory(device)["peak"] - before))
    (plain, plain_bytes), (here, here_bytes) = results
    row = [K, batch_size, "{} and {}".format(*tokens), f"{plain * 1e3:.1f}", f"{plain_bytes / 1e9:.2f}"]
    row += [f"{here * 1e3:.1f}", f"{here_bytes / 1e9:.2f}", f"{plain / here:.1f}×"]
    return [*row, f"{plain_bytes / max(here_bytes, 1):.1f}×"]


def print_loss_alone(sizes, batch_size, device) -> None:
    """Print the comparison of the loss with the plain formula."""
    rows = []
    for K in sizes:
        try:
            rows.append(measure_loss_alone(K, batch_size, device))
        except torch.OutOfMemoryError:
            rows.append([K, batch_size, "out of memory", *[""] * 6])
    header = ("K", "batch", "matched teacher and student tokens", "plain loss ms", "GB", "here ms", "GB")
    print_table((*header, "faster", "less memory"), rows)


# Loading

ALONE, LOADED, PLAIN = "memory (the step alone)", "{} workers", "DINO's {} workers"  # sources of batches


def print_loading(cases, device, counts=(4, 8, 12, 16), steps=48, files=480, rounds=5) -> None:
    """Measure the stages of loading, the distortion on the device and whole trainings; print tables and goals.

    Args:
        cases: the trainings, with one batch size and --distort_on device.
        counts: numbers of workers. Those that do not fit into /dev/shm are left out; DINO's are as many as the last.
        steps: timed steps with each source of batches. Workers may deliver at the same time: a multiple of all counts.
        files, rounds: number of JPEG files, number of measurements of the stages.
    """
    torch.set_num_threads(1)  # as in a worker, until the trainings
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(folder, files)
        worker = print_stages(folder, cases[0].batch_size, rounds)
        distortion = distortion_ms(cases[0].batch_size, device)
        print_table(("distort_batch", "ms per batch"), [(name, f"{ms:.2f}") for name, ms in distortion.items()])
        rates = {}  # {(architecture, source of batches): images/s}
        for case in cases:
            rates |= source_rates(case, folder, counts, steps, device)
            free_memory(device)
    header = f"network, batch {cases[0].batch_size}", "batches from", "images/s", "of the step alone"
    rows = [(*key, f"{rate:.0f}", f"{rate / rates[key[0], ALONE]:.1%}") for key, rate in rates.items()]
    print()
    print_table(header, rows)
    for case in cases:
        needed = math.ceil(rates[case.arch, ALONE] / worker)
        print(f"\n{case.arch}: the step alone takes the images of {needed} workers", end="")
    print("\n")

    def quotient(arch, source, other):
        known = rates.keys() >= {(arch, source), (arch, other)}
        return [rates[arch, source] / rates[arch, other]] if known else []

    small = quotient("vit_small", LOADED.format(12), ALONE)
    tiny = quotient("vit_tiny", LOADED.format(16), PLAIN.format(16))
    goals = [
        ("images/s of a worker, --distort_on device", 270, [worker], True),
        ("vit_small, 12 workers: of the step alone", 0.95, small, True),
        ("vit_tiny, 16 workers: times as fast as DINO's", 3, tiny, True),
        ("ms of distort_batch, compiled", 4, [distortion["compiled"]], False),
    ]
    print_table(("goal", "expected", "found", ""), [[goal, *goal_cells(*cells)] for goal, *cells in goals])


def distortion_ms(batch_size, device) -> dict[str, float]:
    """Return the milliseconds in which the device distorts the views of a batch, plain and compiled."""
    pixels, parameters, *_ = make_batches(False, batch_size, device, distort_on="device")[0]
    views = [of_one_size.to(device) for of_one_size in pixels]
    rows = parameters.to(device).split([len(of_one_size) for of_one_size in views])
    sides = {"plain": distort_batch, "compiled": compiled_distortion([x.shape for x in views], device)}
    return {
        name: 1e3 * median_seconds(lambda: list(map(distort, views, rows)), device) for name, distort in sides.items()
    }


def source_rates(case, folder, counts, steps, device) -> dict:
    """Return {(architecture, source of batches): images/s} of a training on the images in a folder."""
    args = main_lgssl.parse_arguments([*options(case), "--data_path", folder])
    images, on_device = main_lgssl.open_images(args).train, main_lgssl.batches_on_device
    in_advance = make_batches(False, case.batch_size, device, distort_on="device")
    batch_bytes = 1.25 * sum(pixels.nbytes for pixels in in_advance[0].pixels)  # as in main_lgssl.py
    counts = [count for count in counts if fit_workers(count, batch_bytes) == Workers(count)] or [1]
    sources = {
        ALONE: itertools.cycle([batch._replace(parameters=None) for batch in in_advance]),
        "memory, distorted on the device": itertools.cycle(in_advance),
    }
    for count in counts:
        # These steps repeat, and so do their crops and matched tokens. The workers have work until the end.
        keys = [i % BATCHES for i in range(WARM_UP + steps + 2 * PREFETCHED * count)]
        loader = main_lgssl.build_loader(args, images, keys, Process(0, 1, device), Workers(count))
        sources[LOADED.format(count)] = loader
    plain = PlainBatches(images.paths, [batch.matches for batch in in_advance])
    plain_loader = open_loader(plain, Workers(counts[-1]), device, sampler=loader.sampler, batch_size=None)
    sources[PLAIN.format(counts[-1])] = plain_loader
    rates = {}

    def batches_on_device(_, device, *more):
        for source, loader in sources.items():
            batches = on_device(loader, device, *more)
            yield from itertools.islice(batches, WARM_UP + PREFETCHED * getattr(loader, "num_workers", 0))
            start = timestamp(device)
            yield from itertools.islice(batches, steps)
            end = timestamp(device)
            batches.close()  # ends the workers
            synchronize(device)
            rates[case.arch, source] = steps * case.batch_size / seconds_between(start, end)
            print(f"{case.arch}, {source}: {rates[case.arch, source]:.0f} images/s", file=sys.stderr, flush=True)
        raise Done

    with contextlib.suppress(Done):
        lgssl_steps(case, batches_on_device, lambda _: None, device)
    return rates


if __name__ == "__main__":
    run_main(main)
