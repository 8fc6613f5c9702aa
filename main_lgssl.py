"""Pretrain a ViT with the local-global loss.

    python main_lgssl.py --data_path FOLDER --output_dir OUT             one process, on a GPU if available
    torchrun --nproc_per_node=8 main_lgssl.py --data_path FOLDER ...     one process per GPU, or per group of CPU cores

`--loss cls` is DINO. If OUT holds a checkpoint, the run resumes from it.
"""

import argparse
import atexit
import datetime
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from augment import MultiCrop
from losses import LOSSES, LocalGlobalLoss, teacher_temperature
from patch_matching import RULES
from support import checkpoints
from support.arguments import ArgumentParser, bool_flag, number
from support.images import ResizedArray
from support.loader import BatchSampler, ViewBatches, batches_on_device, check_batch
from support.meters import Meters, measure
from support.observe import environment, is_due, open_online_knn, training_pictures
from support.preemption import EXIT_CODE, StopRequest, ignore_signals
from support.report import WATCH_FROM, Report
from support.sources import add_source_arguments, build_dataset, data_spec
from support.weights import load_start, start_from
from utils import (
    UserError,
    clip_each_gradient,
    cosine_schedule,
    first_line,
    init_distributed,
    kill_workers,
    one_line_errors,
    seed_networks,
)
from vision_transformer import ARCHITECTURES, MAX_SIDE, BackboneWithHead, DINOHead, Teacher, architecture

AUTOCAST = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_arguments(argv=None) -> argparse.Namespace:
    """Parse the command line and check the options that depend on each other."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog="@FILE reads options from a file.")
    natural, count, side = number(int, 1, 10**9), number(int, 0, 10**9), number(int, 1, MAX_SIDE)
    amount, fraction = number(float, 0), number(float, 0, 1)
    # fmt: off
    add = parser.add_argument_group("method").add_argument
    add("--loss", choices=LOSSES, default="mean", help="loss (section 3.4 of the paper); cls is DINO")
    add("--lambda_cls", type=fraction, default=0.5, help="λ, weight of the CLS token with --loss lambda")
    add("--matching", choices=RULES, default="paper", help="paper: section 3.3; released: the same with the "
        "authors' rounding; nearest: the nearest patch")
    add("--geometry", choices=("batch", "image"), help="draw crops and flips once per batch (section 4.1.2) or per "
        "image, as DINO does. Default: batch; with --loss cls: image")
    add("--center", choices=("position", "shared"), default="position", help="one center per token position, as "
        "in the authors' code, or one for all tokens, as in Algorithm 1")

    add = parser.add_argument_group("model").add_argument
    add("--arch", type=architecture, default="vit_small", help="one of " + ", ".join(ARCHITECTURES))
    add("--patch_size", type=side, default=16, help="side of a patch in pixels")
    add("--out_dim", type=number(int, 2, 10**7), default=10000, help="K, number of prototypes")
    add("--norm_last_layer", type=bool_flag, default=True, help="fix the norm of the prototypes to 1")
    add("--use_bn_in_head", type=bool_flag, default=False, help="use batch norm in the head")
    add("--head_hidden_dim", type=number(int, 1, 10**5), default=2048, help="width of the hidden layers of the head")
    add("--drop_path_rate", type=number(float, 0, 0.99), default=0.1, help="stochastic depth rate of the student")
    add("--init_weights", metavar="FILE", help="start from the weights of a checkpoint of this repository or DINO, "
        "timm's .safetensors, or timm:NAME; see docs/warm_start.md")
    add("--checkpoint_key", default="teacher", help="network to read from FILE, teacher or student")

    add = parser.add_argument_group("teacher").add_argument
    add("--momentum_teacher", type=fraction, default=0.996, help="initial EMA momentum; increases to 1 on a cosine")
    add("--warmup_teacher_temp", type=number(float, 1e-6), default=0.04, help="initial temperature τ_t of the teacher")
    add("--teacher_temp", type=number(float, 1e-6), default=0.07, help="τ_t, temperature of the teacher after warm-up")
    add("--warmup_teacher_temp_epochs", type=count, default=30, help="epochs of linear warm-up of τ_t")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=number(int, 1, 10**6), default=200, help="number of epochs")
    add("--batch_size_per_gpu", type=natural, default=40, help="images per micro-batch in each process")
    add("--accum_steps", type=natural, default=1, help="micro-batches per step; N equal one batch N times as large")
    add("--optimizer", choices=("adamw", "sgd", "lars"), default="adamw", help="optimizer, with DINO's settings")
    add("--lr", type=amount, default=5e-4, help="peak learning rate for a total batch of 256, scaled linearly")
    add("--min_lr", type=amount, default=1e-6, help="final learning rate, not scaled")
    add("--warmup_epochs", type=count, default=10, help="epochs of linear warm-up of the learning rate")
    add("--weight_decay", type=amount, default=0.04, help="initial weight decay")
    add("--weight_decay_end", type=amount, default=0.4, help="final weight decay, on a cosine")
    add("--clip_grad", type=amount, default=3.0, help="maximum gradient norm of each parameter (0: no clipping)")
    add("--freeze_last_layer", type=count, default=1, help="first epochs, in which the prototypes are not updated")
    add("--freeze_backbone", type=count, default=0, help="first epochs, in which only the head is trained")
    add("--precision", choices=AUTOCAST, help="precision of matrix products: autocast in bf16 or fp16, or fp32 "
        "without or with TF32. Default: that of the resumed run, or bf16 (fp16 on GPUs without it), fp32 on a CPU")
    add("--use_fp16", type=bool_flag, help="DINO's option for --precision fp16 (true) or fp32 (false)")
    add("--grad_checkpointing", action="store_true", help="recompute activations in the backward pass to save memory")
    add("--compile", action="store_true", help="compile the backbones with torch.compile")

    add = parser.add_argument_group("views").add_argument
    add("--image_size", type=number(int, 0, MAX_SIDE), help="resize images to squares of this side before cropping "
        "(0: do not; needs --geometry image). Default: 256; with --loss cls --geometry image: 0")
    add("--global_crops_size", type=side, default=224, help="side of the two global views in pixels")
    add("--local_crops_size", type=side, default=96, help="side of the local views in pixels")
    area = {"type": fraction, "nargs": 2, "metavar": ("LOW", "HIGH")}
    add("--global_crops_scale", default=[0.4, 1.0], help="area of a global view as a fraction of the image", **area)
    add("--local_crops_scale", default=[0.05, 0.4], help="area of a local view as a fraction of the image", **area)
    add("--local_crops_number", type=number(int, 0, 1000), default=8, help="number of local views")
    add("--flip_prob", type=fraction, default=0.5, help="flip probability; use 0 if mirroring changes the class")
    add("--distortion", type=fraction, default=1.0, help="strength of the photometric distortion, an option of this "
        "repository: 1 is the paper's and DINO's, 0 none")

    add = parser.add_argument_group("data and output").add_argument
    add_source_arguments(add, "folder of images, or of CIFAR-10 or Fashion-MNIST")
    add("--on_bad_image", choices=("error", "skip"), default="error", help="stop at an unreadable image, or skip it")
    add("--max_bad_images", type=fraction, default=0.01, help="maximum fraction of images that may be skipped")
    add("--output_dir", default=".", help="folder for checkpoints and logs")
    add("--saveckp_freq", type=count, default=20, help="keep a checkpoint every N epochs, from epoch 1 on (0: none)")
    add("--save_every_steps", type=count, default=0, help="also save every N steps (0: only after each epoch)")
    add("--keep_last", type=count, default=0, help="keep the last N checkpoints of --saveckp_freq (0: all)")
    add("--log_every", type=natural, default=10, help="log every N steps")
    add("--knn_every", type=count, help="evaluate k-NN every N epochs (0: never). Default: 10 if the images have "
        "labels. Training never uses labels")
    add("--image_every", type=count, default=10, help="write pictures to TensorBoard every N epochs (0: never)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of all random numbers")
    workers = number(int, 0, 1000)
    add("--num_workers", type=workers, default=min(10, os.cpu_count()), help="data-loading workers per process")
    add("--dist_url", default="env://", help="URL to set up distributed training")
    add("--dist_timeout", type=number(int, 1, 10**7), default=600, help="seconds to wait for another process")
    add("--local_rank", "--local-rank", type=int, help="ignored; taken from the environment")
    # fmt: on
    args = parser.parse_args(argv)
    args.geometry = args.geometry or ("image" if args.loss == "cls" else "batch")
    if args.image_size is None:
        args.image_size = 0 if (args.loss, args.geometry) == ("cls", "image") else 256
    if args.precision is None and args.use_fp16 is not None:
        args.precision = "fp16" if args.use_fp16 else "fp32"
    del args.use_fp16

    parser.check_crops(args)
    if args.use_bn_in_head and args.accum_steps > 1:
        parser.error("--accum_steps needs --use_bn_in_head false: batch norm would see one micro-batch at a time")
    if args.geometry == "batch" and args.image_size == 0:
        parser.error("--image_size 0 needs --geometry image: crops shared by a batch need images of one size")
    return args


def main(argv=None) -> signal.Signals | None:
    """Train and return None. After a signal, save, stop early and return the signal."""
    atexit.register(kill_workers)  # workers ignore SIGTERM, so Python's exit-time join would hang
    with StopRequest() as stop:
        return pretrain(parse_arguments(argv), stop)


def pretrain(args, stop) -> signal.Signals | None:
    """Build everything and train; `stop` is a StopRequest. Returns the signal that stopped the run, or None."""
    # Check all input before building the networks.
    dataset, online_knn, no_knn = open_images(args)
    output_dir = Path(args.output_dir)
    args.init_hash = checkpoints.hash_of_file(args.init_weights) if args.init_weights else None
    checkpoint, source_path = checkpoints.open_output(output_dir, vars(args), vars(parse_arguments([])))
    start = None
    if args.init_weights and not checkpoint:
        start = load_start(args.init_weights, args.arch, args.patch_size, args.checkpoint_key)
    timeout = datetime.timedelta(seconds=args.dist_timeout)
    rank, world_size, device = init_distributed(args.dist_url, timeout)
    set_precision(args, checkpoint, device)
    lock = checkpoints.lock(output_dir) if rank == 0 else None
    stop.join(timeout)
    batch_size = args.batch_size_per_gpu * args.accum_steps * world_size
    check_batch(len(dataset), args.batch_size_per_gpu, args.accum_steps, world_size)
    if args.use_bn_in_head and world_size > 1 and device.type == "cpu":
        raise UserError("--use_bn_in_head true with several processes needs GPUs: batch norm is not synced on CPUs")

    # Networks, criterion and optimizer
    student, teacher, criterion = build_networks(args)
    started = start_from(start, student, criterion.center) if start else ""
    if start:
        teacher.load_state_dict(student.state_dict())
    del start
    student, teacher, criterion = (module.to(device) for module in (student, teacher, criterion))
    optimizer = build_optimizer(args.optimizer, student)
    # The scaler skips steps with non-finite gradients without waiting for the device. It scales only in fp16.
    scaling = {} if args.precision == "fp16" else {"init_scale": 1.0, "growth_interval": 2**31 - 1}
    scaler = torch.amp.GradScaler(device.type, **scaling)
    max_matched = (max(args.global_crops_size, args.local_crops_size) // args.patch_size) ** 2
    meters = Meters(device, args.precision, max_matched, int(args.max_bad_images * len(dataset) + 1e-6))
    state = {"student": student, "teacher": teacher, "optimizer": optimizer, "loss": criterion, "scaler": scaler}
    images = [len(dataset), checkpoints.hash_of_names(dataset)]
    steps_per_epoch = len(dataset) // batch_size
    total_steps, warmup_steps = args.epochs * steps_per_epoch, args.warmup_epochs * steps_per_epoch
    start_step = 0
    if checkpoint:
        expected = batch_size, images, total_steps
        start_step = checkpoints.restore(checkpoint, source_path, state, meters, *expected, rank, world_size)
    del checkpoint  # as large as networks and optimizer
    checkpoints.refuse_different_starts(start_step, device)
    ddp_student = wrap_networks(args, student, teacher, world_size, device)
    student_parameters, teacher_parameters = list(student.parameters()), list(teacher.parameters())

    # Schedules and batches
    loader = build_loader(args, dataset, range(start_step, total_steps), rank, world_size, device)

    def schedule(step):
        temperature = (args.warmup_teacher_temp, args.teacher_temp, args.warmup_teacher_temp_epochs)
        return {
            "lr": cosine_schedule(step, total_steps, args.lr * batch_size / 256, args.min_lr, warmup_steps),
            "wd": cosine_schedule(step, total_steps, args.weight_decay, args.weight_decay_end),
            "momentum": cosine_schedule(step, total_steps, args.momentum_teacher, 1.0),
            "teacher_temp": teacher_temperature(step // steps_per_epoch, *temperature),
        }

    report = None
    if rank == 0:
        checkpoints.tidy(output_dir, source_path)
        report = Report(output_dir, start_step, args.epochs, steps_per_epoch, min(warmup_steps, WATCH_FROM))
        millions = sum(p.numel() for p in student.backbone.parameters()) / 1e6
        network = f"{args.arch}/{args.patch_size} ({millions:.1f} M parameters), loss {args.loss}"
        processes = f"batch {batch_size} on {world_size} x {device.type} in {args.precision}"
        resumed = f"; resuming after step {start_step} of {total_steps}" if start_step else ""
        headline = f"{network}, {len(dataset)} images, {processes}, {steps_per_epoch} steps per epoch{resumed}"
        headline += "" if online_knn else f"\nno online k-NN: {no_knn}"
        headline += f"\n{started}" if started else ""
        report.start(vars(args), {"step": start_step, "processes": world_size, **environment()}, headline)

    batches = batches_on_device(loader, device)
    interval_start, interval_steps, stopped_by = time.perf_counter(), 0, None
    for step in range(start_step, total_steps):
        epoch, ends_epoch = step // steps_per_epoch, (step + 1) % steps_per_epoch == 0
        is_report_step = ends_epoch or (step + 1) % args.log_every == 0
        scheduled = schedule(step)
        teacher_temp = scheduled["teacher_temp"]

        # Loss and gradients, accumulated over micro-batches
        for micro_step in range(args.accum_steps):
            batch = next(batches)  # normalized views and their matches, on the device
            seed_networks(args.seed, step, rank, micro_step)
            is_last = micro_step == args.accum_steps - 1
            with nullcontext() if is_last or world_size == 1 else ddp_student.no_sync():
                with torch.autocast(
                    device.type, AUTOCAST[args.precision], enabled=AUTOCAST[args.precision] is not None
                ):
                    with torch.no_grad():
                        teacher_out = teacher(batch.views[:1], batch.matches.teacher_row)  # both global views
                    student_out = ddp_student(batch.views, batch.matches.student_row)
                    loss = criterion(student_out, teacher_out, batch.matches, teacher_temp) / args.accum_steps
                if is_last:
                    criterion.start_center_update()  # ranks exchange it during the backward pass
                # Multiply by NaN so that DDP's averaging makes every rank skip this step.
                scaler.scale(loss * torch.where(loss.isfinite(), 1.0, math.nan)).backward()
            meters.add(loss.detach(), batch.matches, batch.bad_images, args.accum_steps)
        if is_report_step:
            health = measure(student_out, teacher_out, batch.matches, criterion, teacher_temp)
        criterion.update_center()  # before the teacher is updated

        # Update the student, then the teacher
        for group in optimizer.param_groups:
            group["lr"] = scheduled["lr"]
            group["weight_decay"] = scheduled["wd"] if group["decay"] else 0.0
        scaler.unscale_(optimizer)
        norms = clip_each_gradient(student_parameters, args.clip_grad)
        if epoch < args.freeze_last_layer:
            for parameter in student.head.last_layer.parameters():
                parameter.grad = None
        if epoch < args.freeze_backbone:
            for parameter in student.backbone.parameters():
                parameter.grad = None
        meters.end_step(step, norms)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(teacher_parameters, student_parameters, 1 - scheduled["momentum"])
        interval_steps += 1

        if is_report_step:  # the CPU waits for the device only here and when saving
            meters.stop_at_bad_step(student)
            if args.on_bad_image == "skip":
                meters.share_bad_images()
            values = meters.end_interval({**health, "grad_norm": norms.norm()})
            seconds = (time.perf_counter() - interval_start) / interval_steps
            if rank == 0:
                values = {"loss": values.pop("loss"), **scheduled, **values}
                report.interval(epoch, step, seconds, {**values, "images_per_s": batch_size / seconds})
            interval_start, interval_steps = time.perf_counter(), 0
        if rank == 0:
            report.step()

        stop.check()
        is_saved = ends_epoch or stop.agreed or (args.save_every_steps and (step + 1) % args.save_every_steps == 0)
        if is_saved:
            if not is_report_step:  # a report has done both
                meters.stop_at_bad_step(student)
                if args.on_bad_image == "skip":
                    meters.share_bad_images()
            checkpoints.refuse_diverged({"student": student, "teacher": teacher, "loss": criterion}, step)
        if ends_epoch:
            means, matched_counts = meters.end_epoch()
            top1 = None
            if is_due(epoch, args.knn_every, args.epochs):
                top1 = online_knn(teacher.backbone.forward, device)  # not compiled: batches have any size
            if rank == 0:
                of_epoch = [schedule(s) for s in range(step + 1 - steps_per_epoch, step + 1)]
                means |= {name: sum(s[name] for s in of_epoch) / steps_per_epoch for name in ("lr", "wd")}
                report.epoch(epoch, step, means, top1)
                if is_due(epoch, args.image_every, args.epochs):
                    report.pictures(training_pictures(teacher.backbone, loader.dataset, (epoch, step, [0])), step)
                    report.histogram("matched_patches_per_pair", matched_counts, step)

        if is_saved:
            meters_state = meters.state_dict()
            if rank == 0:
                report.sync()
                contents = {name: stateful.state_dict() for name, stateful in state.items()}
                contents |= {"meters": meters_state, "epoch": (step + 1) // steps_per_epoch, "step": step + 1}
                contents |= {"batch_size": batch_size, "images": images, "args": vars(args)}
                is_kept = ends_epoch and args.saveckp_freq and epoch % args.saveckp_freq == 0
                checkpoints.save_run(contents, output_dir, epoch if is_kept else None, args.keep_last)
        if stop.agreed and step + 1 < total_steps:
            stopped_by = stop.agreed
            break
        if ends_epoch:
            interval_start = time.perf_counter()

    if rank == 0:
        report.end(vars(args), stopped_by)
    if lock is not None:
        os.close(lock)
    if world_size > 1:
        dist.destroy_process_group()
    return stopped_by


def open_images(args) -> tuple:
    """Return (training images, OnlineKNN or None, reason if None), and set the default of --knn_every."""
    min_side = 2 * args.image_size or None  # decode large JPEGs at reduced size; pixels change by less than one level
    transform = ResizedArray(args.image_size)
    dataset = build_dataset(data_spec(args), transform=transform, min_side=min_side)
    loading = (args.global_crops_size, args.batch_size_per_gpu, args.num_workers)
    online_knn, no_knn = open_online_knn(args.knn_every, dataset, data_spec(args), *loading)
    args.knn_every = 10 if args.knn_every is None and online_knn else args.knn_every or 0
    return dataset, online_knn, no_knn


def set_precision(args, checkpoint, device) -> None:
    """Set --precision where it is not given, and switch TF32 on or off.

    Raises:
        UserError: the device has no TF32.
    """
    has_ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)  # bf16 and TF32
    if args.precision is None:
        default = "fp32" if device.type == "cpu" else "bf16" if has_ampere else "fp16"
        args.precision = checkpoint["args"].get("precision", default) if checkpoint else default
    if args.precision == "tf32" and not has_ampere:
        raise UserError("--precision tf32 needs a GPU of compute capability 8.0 or more; use fp32")
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"  # of convolutions in backbones of your own


def build_networks(args) -> tuple[BackboneWithHead, Teacher, LocalGlobalLoss]:
    """Return (student, teacher, criterion). The teacher starts as a copy of the student."""

    def backbone_and_head(drop_path_rate):
        build = ARCHITECTURES[args.arch]
        backbone = build(args.patch_size, img_size=args.global_crops_size, drop_path_rate=drop_path_rate)
        settings = (args.out_dim, args.use_bn_in_head, args.norm_last_layer)
        return backbone, DINOHead(backbone.embed_dim, *settings, hidden_dim=args.head_hidden_dim)

    torch.manual_seed(args.seed)
    student = BackboneWithHead(*backbone_and_head(args.drop_path_rate))
    teacher = Teacher(*backbone_and_head(drop_path_rate=0.0), average_patches=args.loss != "cls")
    teacher.load_state_dict(student.state_dict())
    patches = (args.global_crops_size // args.patch_size) ** 2
    return student, teacher, LocalGlobalLoss(args.out_dim, patches, args.loss, args.lambda_cls, args.center)


def wrap_networks(args, student, teacher, world_size, device) -> torch.nn.Module:
    """Apply --grad_checkpointing and --compile. Return the student, wrapped in DDP if there are several processes."""
    student.backbone.set_grad_checkpointing(args.grad_checkpointing)
    if args.compile:
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
        except Exception as error:  # many kinds: the compiler is missing or fails
            raise UserError(f"--compile needs a working C++ compiler, found: {first_line(error)}") from error
        for network in (student, teacher):
            network.backbone.compile(dynamic=False)  # one program per view size
    if world_size == 1:
        return student
    if args.use_bn_in_head:
        # Each SyncBatchNorm makes all ranks wait for each other, in the forward and in the backward pass.
        student.head, teacher.head = map(torch.nn.SyncBatchNorm.convert_sync_batchnorm, (student.head, teacher.head))
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(student, device_ids=device_ids, gradient_as_bucket_view=True)  # no copy of gradients


def build_loader(args, dataset, steps, rank, world_size, device) -> DataLoader:
    """Return the loader of this rank's batches for a range of steps."""
    sizes, scales = (args.global_crops_size, args.local_crops_size), (args.global_crops_scale, args.local_crops_scale)
    views = (args.local_crops_number, args.flip_prob, args.geometry, args.seed, args.distortion)
    multi_crop = MultiCrop(*sizes, *scales, *views)
    rule = None if args.loss == "cls" else args.matching
    return DataLoader(
        ViewBatches(dataset, multi_crop, args.patch_size, rule, rank, skip_bad=args.on_bad_image == "skip"),
        sampler=BatchSampler(
            len(dataset), args.batch_size_per_gpu, steps, args.accum_steps, rank, world_size, args.seed
        ),
        batch_size=None,  # each key of the sampler is a whole batch
        num_workers=args.num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
    )


def build_optimizer(name, network) -> torch.optim.Optimizer:
    """Return the optimizer. Biases and 1-d parameters have no weight decay. The loop sets learning rate and decay."""
    decayed, plain = [], []
    for parameter_name, parameter in network.named_parameters():
        if parameter.requires_grad:
            (plain if parameter_name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    groups = [{"params": decayed, "decay": True}, {"params": plain, "decay": False, "weight_decay": 0.0}]
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    from support.optimizers import Lars, Sgd  # not at the top: timm takes longer to import than torch

    return {"sgd": Sgd, "lars": Lars}[name](groups, lr=0, momentum=0.9)


if __name__ == "__main__":
    with one_line_errors():
        stopped = main()
    # torchrun restarts a process that exits with a nonzero code.
    sys.exit(EXIT_CODE if stopped and "TORCHELASTIC_RUN_ID" not in os.environ else 0)
