"""Measure training steps on a GPU by phase, against what its rates allow and against DINO's step.

    python -m benchmarks.bench_gpu        one GPU; sized for at most ten minutes on an H100

The steps are those of the loop in main_lgssl.py, on views that are made in advance; only the beginnings of phases are
recorded, without waiting for the device. "DINO" is DINO's step in plain PyTorch, see `dino_steps`. Times are medians.

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
"""

import contextlib
import gc
import itertools
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_image

import main_lgssl
from benchmarks.bench_step import BOTTLENECK, GLOBAL, LOCAL, VIEWS, Done, memory
from benchmarks.machine import machine, print_table
from losses import LOSS_WEIGHTS, LocalGlobalLoss, plain_loss
from patch_matching import Matches
from support.arguments import ArgumentParser, number
from support.loader import LoadedBatch
from utils import Process, UserError, run_main
from vision_transformer import ARCHITECTURES, DINOHead, TokenOutput

PATCH, IMAGE = 16, 256
BATCHES = 8  # different ones, in turn
WARM_UP = BATCHES  # steps or calls that are not timed: for each batch one
PHASES = ("views", "teacher", "student", "loss", "backward", "update")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of products under autocast; fp32 otherwise
GOALS = {"added": 1.5, "loss": 0.6, "vit_base": 0.45}


class Case(NamedTuple):
    arch: str
    batch_size: int
    K: int
    loss: str  # of main_lgssl.py, or "DINO" for DINO's step
    precision: str  # of main_lgssl.py
    compile: bool = False  # of main_lgssl.py

    def network(self) -> str:
        """Return the name of the network, with batch size and --compile."""
        return f"{self.arch}/{PATCH}, batch {self.batch_size}" + ", --compile" * self.compile


LOSS_SIZES = (10_000, 65_536)  # K for the loss alone
# tf32 comes last, because it changes settings of the process. DINO's steps run with those of the case before.
CASES = [
    *(Case(f"vit_{size}", 40, 10_000, "mean", "bf16") for size in ("tiny", "base")),
    *(Case(f"vit_{size}", 128, 10_000, "mean", "bf16") for size in ("tiny", "small", "base")),
    Case("vit_small", 40, 10_000, "mean", "bf16", compile=True),
    Case("vit_base", 128, 10_000, "mean", "bf16", compile=True),
    *(
        Case("vit_small", 40, K, loss, precision)
        for precision in ("bf16", "fp16", "tf32")
        for K in LOSS_SIZES
        for loss in ("mean", "cls", "DINO")
    ),
]


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=number(int, 1), default=16, help="timed steps per case")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("found no GPU that PyTorch can use, expected one: bench_step measures steps on a CPU")
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    start = time.perf_counter()
    print(machine())
    run(CASES, device, args.steps)
    print(f"\nmeasured in {(time.perf_counter() - start) / 60:.1f} minutes")


def run(cases, device, steps=16, loss_sizes=LOSS_SIZES, loss_batch=128, side=8192, copied=2**30, loaded=480) -> None:
    """Measure all cases and print the tables.

    Args:
        cases: list of Case.
        device: a GPU. A CPU serves to test this program.
        steps: timed steps per case.
        loss_sizes: K of the comparison of the loss alone.
        loss_batch: largest batch of this comparison; it is halved until the plain formula fits the memory.
        side: side of the matrices whose product is timed.
        copied: bytes of the copy that is timed.
        loaded: number of images whose loading is timed.
    """
    made, results, product_rates = {}, {}, {}
    copy_rate = measure_copy(device, copied)
    for case in cases:
        try:
            results[case] = measure(case, made, steps, device)
        except torch.OutOfMemoryError:
            results[case] = None
        free_memory(device)
        if case.precision not in product_rates:  # only now are the settings those of the precision
            product_rates[case.precision] = measure_product(device, DTYPES.get(case.precision, torch.float32), side)
        print(*case, results[case], file=sys.stderr, flush=True)
    rates = {precision: (rate, copy_rate) for precision, rate in product_rates.items()}
    for precision, (product, copy) in rates.items():
        print(f"products in {precision}: {product / 1e12:.1f} TFLOP/s of {side}³; copies: {copy / 1e9:.0f} GB/s")
    print()
    print_steps(results, rates)
    print()
    print_loss_alone(loss_sizes, loss_batch, device)
    print()
    print_goals(results, rates)
    print()
    print_loading(measure_loading(loaded, device), results)


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
    words += f"--precision {case.precision} --freeze_last_layer 0 --num_workers 0 --log_every {10**9}"
    words += " --compile" * case.compile
    return words.split()


def make_batches(case, device, count=BATCHES) -> list[LoadedBatch]:
    """Return the batches of a training on random images, with uint8 views, in pinned memory for a GPU."""
    rng = np.random.default_rng(0)
    images = [(rng.integers(0, 256, (IMAGE, IMAGE, 3), np.uint8), 0) for _ in range(case.batch_size)]
    args = main_lgssl.parse_arguments(options(case))
    loader = main_lgssl.build_loader(args, images * count, range(count), Process(0, 1, device))
    batches = [loader.dataset[key] for key in loader.sampler]
    if device.type == "cuda":
        batches = [
            LoadedBatch([x.pin_memory() for x in pixels], Matches(*(index.pin_memory() for index in matches)), bad)
            for pixels, matches, bad in batches
        ]
    return batches


def measure(case, made, steps, device) -> dict:
    """Run the first steps of a training.

    Args:
        made: {(whether only CLS is matched, batch size): batches}, to be completed.
        steps: number of steps to time after those that warm up.

    Returns:
        {"seconds": [steps], "phases": {phase: [steps]}, "tokens": (n_t, n_s) of each step, "peak": memory in bytes}
    """
    key = (case.loss != "mean", case.batch_size)
    if key not in made:
        made[key] = make_batches(case, device)
    marks = []  # (phase that begins, timestamp)

    def mark(phase):
        marks.append((phase, timestamp(device)))

    on_device = main_lgssl.batches_on_device

    def batches_on_device(_, device):
        batches = on_device(itertools.cycle(made[key]), device)
        for _ in range(WARM_UP + steps):
            mark("views")
            yield next(batches)
        mark("end")
        raise Done

    free_memory(device)
    run_steps = dino_steps if case.loss == "DINO" else lgssl_steps
    with contextlib.suppress(Done):
        run_steps(case, batches_on_device, mark, device)
    synchronize(device)
    times = []  # {phase: seconds} of each step
    for (phase, start), (_, end) in itertools.pairwise(marks):
        if phase == "views":
            times.append({})
        times[-1][phase] = times[-1].get(phase, 0) + seconds_between(start, end)
    times = times[WARM_UP:]
    matches = [made[key][i % BATCHES].matches for i in range(WARM_UP, WARM_UP + steps)]
    return {
        "seconds": [sum(step.values()) for step in times],
        "phases": {phase: [step[phase] for step in times] for phase in times[0]},
        "tokens": [(len(of_step.teacher_row), len(of_step.student_row)) for of_step in matches],
        "peak": memory(device)["peak"],
    }


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
    patches = {
        "open_images": lambda args: main_lgssl.Images(images, None, "not timed"),
        "build_networks": build_networks,
    }
    with (
        mock.patch.multiple(main_lgssl, batches_on_device=batches_on_device, **patches),
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


def loss_flop(K, n_t, n_s) -> int:
    return 2 * BOTTLENECK * K * (n_t + 3 * n_s)


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
    teacher_tokens = n_t if case.loss == "cls" else 2 * case.batch_size * (1 + (GLOBAL // PATCH) ** 2)
    student = 2 * views[GLOBAL] + (VIEWS - 2) * views[LOCAL] + n_s * of_token
    parameters = sum(p.numel() for network in (backbone, head) for p in network.parameters())
    operand_bytes = DTYPES.get(case.precision, torch.float32).itemsize
    return {
        "teacher": (2 * views[GLOBAL] + teacher_tokens * of_token, 0),
        "student": (student, 0),
        "loss": (loss_flop(case.K, n_t, n_s), loss_bytes(case.K, n_t, n_s, operand_bytes)),
        "backward": (2 * student, 0),
        "update": (0, 44 * parameters),
    }


def bounds(case, result, rates) -> dict[str, float]:
    """Return {phase: bound in seconds}, medians over the steps."""
    of_steps = [costs(case, *tokens) for tokens in result["tokens"]]
    product_rate, copy_rate = rates[case.precision]
    return {
        phase: statistics.median(max(step[phase][0] / product_rate, step[phase][1] / copy_rate) for step in of_steps)
        for phase in of_steps[0]
    }


def print_steps(results, rates) -> None:
    """Print images per second, memory and the time of each phase with the share of its bound."""
    rows = []
    for case, result in results.items():
        row = [case.network(), case.K, case.loss, case.precision]
        if result is None:
            rows.append([*row, "out of memory", *[""] * (2 + len(PHASES))])
            continue
        seconds = statistics.median(result["seconds"])
        row += [f"{case.batch_size / seconds:.0f}", f"{result['peak'] / 1e9:.1f}", f"{seconds * 1e3:.1f}"]
        of_phases = {} if case.loss == "DINO" else bounds(case, result, rates)
        for phase in PHASES:
            taken = statistics.median(result["phases"].get(phase, [0]))
            share = f" ({of_phases[phase] / taken:.0%})" if phase in of_phases else ""
            row.append("" if case.loss == "DINO" else f"{taken * 1e3:.1f}{share}")
        rows.append(row)
    header = ("network", "K", "loss", "precision", "images/s", "peak GB", "step ms")
    print_table((*header, *(f"{phase} ms" for phase in PHASES)), rows)
    print("\nIn brackets: the share of its bound that a phase reaches.")


def print_goals(results, rates) -> None:
    """Print what is aimed at in bf16, and whether it is reached."""
    rows = []

    def add(goal, case, found, expected, reached):
        of_case = f"{case.network()}, K {case.K}"
        rows.append((goal, of_case, found, expected, "reached" if reached else "not reached"))

    for case, result in results.items():
        cls = results.get(case._replace(loss="cls"))
        if result is None or (case.loss, case.precision) != ("mean", "bf16"):
            continue
        of_phases, seconds = bounds(case, result, rates), statistics.median(result["seconds"])
        share = of_phases["loss"] / statistics.median(result["phases"]["loss"])
        add("loss, share of its bound", case, f"{share:.0%}", f"{GOALS['loss']:.0%}", share >= GOALS["loss"])
        if cls is not None:
            added = seconds - statistics.median(cls["seconds"])
            of_cls = bounds(case._replace(loss="cls"), cls, rates)
            # Only the products of the heads differ in these phases.
            head = sum(of_phases[phase] - of_cls[phase] for phase in ("teacher", "student", "backward"))
            limit = GOALS["added"] * (of_phases["loss"] + head)
            add("mean minus cls", case, f"{added * 1e3:.1f} ms", f"{limit * 1e3:.1f} ms", added <= limit)
        if case.arch == "vit_base":
            flop = statistics.median(sum(flop for flop, _ in costs(case, *n).values()) for n in result["tokens"])
            share = flop / seconds / rates[case.precision][0]
            add("rate of products", case, f"{share:.0%}", f"{GOALS['vit_base']:.0%}", share >= GOALS["vit_base"])
    print_table(("goal", "case", "found", "expected", ""), rows)


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


def measure_loss_alone(K, batch_size, device, precision="bf16") -> dict:
    """Time the loss "mean" with its gradients on random vectors, plainly and as in a training.

    Returns:
        {"plain", "here": (seconds, bytes in addition to the inputs), "tokens": (n_t, n_s)}
    """
    (batch,) = make_batches(Case("vit_small", batch_size, K, "mean", precision), device, count=1)
    tokens = len(batch.matches.teacher_row), len(batch.matches.student_row)
    z_t, z_s = (F.normalize(torch.randn(n, BOTTLENECK, device=device), dim=-1) for n in tokens)
    w_t, w_s = (F.normalize(torch.randn(K, BOTTLENECK, device=device), dim=-1) for _ in range(2))
    inputs = (z_s.requires_grad_(), w_s.requires_grad_(), torch.ones(K, device=device, requires_grad=True))
    student_out, teacher_out = TokenOutput(*inputs, None), TokenOutput(z_t, w_t, torch.ones(K, device=device), None)
    criterion = LocalGlobalLoss(K, (GLOBAL // PATCH) ** 2).to(device).eval()
    matches, images = batch.matches.to(device), pairs_by_image(batch.matches, device)
    losses = {
        "plain": lambda: plain_batch_loss(student_out, teacher_out, images, criterion.center, 0.04),
        "here": lambda: criterion(student_out, teacher_out, matches, 0.04),
    }
    result = {"tokens": tokens}
    for name, loss in losses.items():

        def forward_and_backward():
            with torch.autocast(device.type, DTYPES.get(precision), enabled=precision in DTYPES):
                value = loss()
            torch.autograd.grad(value, inputs)

        free_memory(device)
        before = memory(device)["now"]
        seconds = median_seconds(forward_and_backward, device, repeats=5)
        result[name] = (seconds, memory(device)["peak"] - before)
    return result


def print_loss_alone(sizes, batch_size, device) -> None:
    """Print the comparison of the loss with the plain formula, at the largest batch at which the latter fits."""
    rows = []
    for K in sizes:
        result, images = None, batch_size
        while result is None and images:
            try:
                result = measure_loss_alone(K, images, device)
            except torch.OutOfMemoryError:
                images //= 2
            free_memory(device)
        if result is None:
            rows.append([K, "", "", "out of memory", *[""] * 5])
            continue
        (plain, plain_bytes), (here, here_bytes) = result["plain"], result["here"]
        row = [K, images, "{} and {}".format(*result["tokens"])]
        row += [f"{plain * 1e3:.1f}", f"{plain_bytes / 1e9:.2f}", f"{here * 1e3:.1f}", f"{here_bytes / 1e9:.2f}"]
        rows.append([*row, f"{plain / here:.1f}×", f"{plain_bytes / max(here_bytes, 1):.1f}×"])
    header = ("K", "batch", "matched teacher and student tokens", "plain loss ms", "GB", "here ms", "GB")
    print_table((*header, "faster", "less memory"), rows)


# Loading


def measure_loading(count, device) -> float:
    """Return the images per second of one data-loading worker, from JPEG files of 500×375 pixels to views."""
    with tempfile.TemporaryDirectory() as folder:
        photographs = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
        batch_size = max(count // 12, 1)
        for i in range(batch_size):
            photo = photographs[i % 2].resize((500, 375), Image.Resampling.LANCZOS)
            photo.save(Path(folder) / f"{i}.jpg", quality=90)
        words = ["--data_path", folder, "--batch_size_per_gpu", str(batch_size), "--num_workers", "1"]
        args = main_lgssl.parse_arguments(words)
        dataset, *_ = main_lgssl.open_images(args)
        loader = main_lgssl.build_loader(args, dataset, range(WARM_UP + 12), Process(0, 1, device))
        arrivals = [time.perf_counter() for _ in loader]
    return 12 * batch_size / (arrivals[-1] - arrivals[WARM_UP - 1])


def print_loading(rate, results) -> None:
    """Print the number of workers that each network needs per GPU in bf16."""
    print(f"One data-loading worker makes the views of {rate:.0f} JPEG images of 500×375 pixels per second.")
    for case, result in results.items():
        if result is not None and (case.loss, case.precision) == ("mean", "bf16"):
            images = case.batch_size / statistics.median(result["seconds"])
            print(f"{case.network()}, K {case.K}: {images:.0f} images/s, workers per GPU: {math.ceil(images / rate)}")


if __name__ == "__main__":
    run_main(main)
