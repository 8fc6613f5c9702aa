"""Pretrain a ViT with the local-global loss.

    python main_lgssl.py --data_path FOLDER --output_dir OUT             one process, on a GPU if available
    torchrun --nproc_per_node=8 main_lgssl.py --data_path FOLDER ...     one process per GPU, or per group of CPU cores

`--loss cls` is DINO. If OUT holds a checkpoint, the run resumes from it.
"""

import argparse
import datetime
import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from augment import PATCH_ROW_LENGTH, Distort, MultiCrop, distort_batch
from losses import LocalGlobalLoss, teacher_temperature
from support import checkpoints, loader
from support.checkpoints import RunSize, hash_of_names, restore
from support.cuda_graphs import accelerate
from support.images import LabeledImages, ResizedArray
from support.loader import ViewBatches, Workers, batches_on_device
from support.meters import Meters, measure
from support.observe import OnlineKNN, OnlineSegmentation, environment, fit_all_workers, is_due, training_pictures
from support.optimizers import build_optimizer, clip_each_gradient
from support.options import (
    AUTOCAST,
    argument_parser,
    defaults_of_older_runs,
    may_change,
    parse_arguments,
    remarks,
    set_precision,
)
from support.preemption import EXIT_CODE, PATIENCE, NoData, StopRequest
from support.report import WATCH_FROM, Report, hide_tensorboard_errors
from support.resources import set_threads
from support.sources import build_dataset, data_spec
from support.weights import load_start, recorded_arguments, start_from
from utils import Process, UserError, cosine_schedule, init_distributed, run_main, seed_networks, warn
from vision_transformer import ARCHITECTURES, BackboneWithHead, DINOHead, Teacher, VisionTransformer


def main(argv: list[str] | None = None, prepare: Callable[["Run"], None] | None = None) -> signal.Signals | None:
    """Train and return None. After a signal, save, stop early and return the signal.

    Args:
        argv: options; by default those of the command line.
        prepare: called with the run before its first step, for studies that look into a training.
    """
    args = parse_arguments(argv)
    cv2.setNumThreads(0)  # views may be made in this process; with several, each has its share of the cores
    set_threads(args.num_workers)
    with StopRequest() as stop, hide_tensorboard_errors():
        run = None
        try:
            with stop.waiting_for_data():
                run = build_run(args, stop)
            if prepare:
                prepare(run)
            stopped_by = train(args, run, stop)
        except NoData:
            warn(f"still waiting for data {PATIENCE} s after the signal: the run stops without saving this step")
            stopped_by = stop.signal
        if run is None:
            return stopped_by
        if run.report:
            run.report.end(run.settings, stopped_by)
        if run.lock is not None:
            os.close(run.lock)
        if dist.is_initialized():
            dist.destroy_process_group()
        return stopped_by


@dataclass
class Run:
    """The parts of a run that the loop over steps needs."""

    student: BackboneWithHead
    teacher: Teacher
    ddp_student: BackboneWithHead | DistributedDataParallel  # wraps the student if there are several processes
    criterion: LocalGlobalLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meters: Meters
    state: dict[str, Any]  # the parts above whose state is saved, by name
    loader: DataLoader
    distort: Distort  # distorts views on the device, if the workers do not
    online_knn: OnlineKNN | None
    online_dense: OnlineSegmentation | None
    report: Report | None  # of rank 0
    lock: int | None  # file descriptor, of rank 0
    process: Process
    size: RunSize
    start_step: int
    settings: dict[str, Any]  # the options with resolved defaults, as checkpoints record them


def train(args: argparse.Namespace, run: Run, stop: StopRequest) -> signal.Signals | None:
    """Train from `run.start_step` to the end. Return the signal that stopped the run before it, or None."""
    student, teacher, criterion, optimizer, meters = run.student, run.teacher, run.criterion, run.optimizer, run.meters
    ddp_student, (rank, _, device) = run.ddp_student, run.process
    no_sync = ddp_student.no_sync if isinstance(ddp_student, DistributedDataParallel) else nullcontext
    dtype = AUTOCAST[run.settings["precision"]]
    student_parameters: list[torch.Tensor] = list(student.parameters())
    teacher_parameters: list[torch.Tensor] = list(teacher.parameters())
    batches = batches_on_device(run.loader, device, run.distort, stop.waiting_for_data)
    interval_start, interval_steps, stop.waited = time.perf_counter(), 0, 0.0
    for step in range(run.start_step, run.size.total_steps):
        epoch, step_of_epoch = divmod(step, run.size.steps_per_epoch)
        ends_epoch = step_of_epoch + 1 == run.size.steps_per_epoch
        is_report_step = ends_epoch or (step + 1) % args.log_every == 0
        scheduled = schedule(args, run.size, step)

        # Loss and gradients, accumulated over micro-batches
        for micro_step in range(args.accum_steps):
            batch = next(batches)  # normalized views and their matches, on the device
            seed_networks(args.seed, step, rank, micro_step)
            with nullcontext() if micro_step == args.accum_steps - 1 else no_sync():
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    with torch.no_grad():
                        teacher_out = teacher(batch.views[:1], batch.matches.teacher_row)  # both global views
                    student_out = ddp_student(batch.views, batch.matches.student_row, batch.matches.student_kinds())
                    loss = criterion(student_out, teacher_out, batch.matches, scheduled["teacher_temp"])
                    loss = loss / args.accum_steps
                # Multiply by NaN so that DDP's averaging makes every rank skip this step.
                run.scaler.scale(loss * torch.where(loss.isfinite(), 1.0, math.nan)).backward()
            meters.add(loss.detach(), batch.matches, batch.bad_images, args.accum_steps)
        if is_report_step:
            health = measure(student_out, teacher_out, batch.matches, criterion, scheduled["teacher_temp"])
        criterion.update_center()  # before the teacher is updated

        # Update the student, then the teacher
        for group in optimizer.param_groups:
            group["lr"] = scheduled["lr"]
            group["weight_decay"] = scheduled["wd"] if group["decay"] else 0.0
        run.scaler.unscale_(optimizer)
        norms = clip_each_gradient(student_parameters, args.clip_grad)
        if epoch < args.freeze_last_layer:
            drop_gradients(student.head.last_layer)
        if epoch < args.freeze_backbone:
            drop_gradients(student.backbone)
        meters.end_step(step, norms)
        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(teacher_parameters, student_parameters, 1 - scheduled["momentum"])
        interval_steps += 1
        if run.report:
            run.report.step(float(meters.loss) / meters.steps if step == run.start_step else None)

        # Check, report and save. After the first step, the CPU waits for the device only here.
        stop.check()
        is_saved = ends_epoch or stop.agreed or (args.save_every_steps and (step + 1) % args.save_every_steps == 0)
        if is_report_step or is_saved:
            meters.stop_at_bad_step(student)
            if args.on_bad_image == "skip":
                meters.share_bad_images()
        if is_report_step:
            values = meters.end_interval({**health, "grad_norm": norms.norm()})
            interval_seconds = time.perf_counter() - interval_start
            seconds = interval_seconds / interval_steps
            if run.report:
                values = {"loss": values.pop("loss"), **scheduled, **values}
                values |= {"images_per_s": run.size.batch_size / seconds, "data_share": stop.waited / interval_seconds}
                run.report.interval(epoch, step, seconds, values)
            interval_start, interval_steps, stop.waited = time.perf_counter(), 0, 0.0
        if is_saved:
            checkpoints.refuse_diverged({"student": student, "teacher": teacher, "loss": criterion}, step)
        if ends_epoch:
            with torch.compiler.set_stance("force_eager"):  # blocks are compiled for the training's views
                end_epoch(args, run, stop, epoch, step)
        if is_saved:
            save(args, run, step, ends_epoch)
        if ends_epoch:
            interval_start, stop.waited = time.perf_counter(), 0.0
        if stop.agreed and step + 1 < run.size.total_steps:
            return stop.agreed
    return None


def schedule(args: argparse.Namespace, size: RunSize, step: int) -> dict[str, float]:
    """Return learning rate, weight decay, momentum and temperature of the teacher at a step."""
    total, warmup_steps = size.total_steps, args.warmup_epochs * size.steps_per_epoch
    start_temp, warmup_temp_epochs = args.warmup_teacher_temp, args.warmup_teacher_temp_epochs
    return {
        "lr": cosine_schedule(step, total, args.lr * size.batch_size / 256, args.min_lr, warmup_steps),
        "wd": cosine_schedule(step, total, args.weight_decay, args.weight_decay_end),
        "momentum": cosine_schedule(step, total, args.momentum_teacher, 1.0),
        "teacher_temp": teacher_temperature(
            step // size.steps_per_epoch, start_temp, args.teacher_temp, warmup_temp_epochs
        ),
    }


def drop_gradients(module: torch.nn.Module) -> None:
    """Drop the gradients of a module, so that the optimizer does not change its parameters."""
    for parameter in module.parameters():
        parameter.grad = None


def end_epoch(args: argparse.Namespace, run: Run, stop: StopRequest, epoch: int, step: int) -> None:
    """Evaluate the teacher online and report the epoch that ends with `step`."""
    means, matched_counts = run.meters.end_epoch()
    evaluated = {}
    for name, evaluation, every in (
        ("knn_top1", run.online_knn, run.settings["knn_every"]),
        ("dense_miou", run.online_dense, args.dense_every),
    ):
        if evaluation and is_due(epoch, every, args.epochs):
            with stop.waiting_for_data():
                value = evaluation(run.teacher.backbone, run.process.device)
            if value is not None:
                evaluated[name] = value
    if run.report:
        steps = range(step + 1 - run.size.steps_per_epoch, step + 1)
        for name in ("lr", "wd"):
            means[name] = sum(schedule(args, run.size, s)[name] for s in steps) / len(steps)
        run.report.epoch(epoch, step, means, evaluated)
        if is_due(epoch, args.image_every, args.epochs):
            assert isinstance(run.loader.dataset, ViewBatches)
            run.report.pictures(training_pictures(run.teacher.backbone, run.loader.dataset, (epoch, step, [0])), step)
            run.report.histogram("matched_patches_per_pair", matched_counts, step)


def save(args: argparse.Namespace, run: Run, step: int, ends_epoch: bool) -> None:
    """Save the run after a step. A collective call; rank 0 writes."""
    contents: dict[str, Any] = {name: part.state_dict() for name, part in run.state.items()}
    if run.report:
        run.report.sync()
        epochs = (step + 1) // run.size.steps_per_epoch
        contents |= {"epoch": epochs, "step": step + 1, "batch_size": run.size.batch_size}
        contents |= {"images": run.size.images, "args": run.settings}
        is_kept = ends_epoch and args.saveckp_freq and (epochs - 1) % args.saveckp_freq == 0
        checkpoints.save_run(contents, Path(args.output_dir), epochs - 1 if is_kept else None, args.keep_last)


def build_run(args: argparse.Namespace, stop: StopRequest) -> Run:
    """Check all input, then build everything. If --output_dir holds a checkpoint, resume from it."""
    images, output_dir = open_images(args), Path(args.output_dir)
    sizes = [(2, args.global_crops_size), (args.local_crops_number, args.local_crops_size)]
    shapes = [(number * args.batch_size_per_gpu, 3, side, side) for number, side in sizes if number]  # of the views
    # A quarter for the matches: patches of 8 pixels need it. Patch augmentation has parameters for each patch.
    of_patch = 4 * PATCH_ROW_LENGTH / (3 * (args.patch_size or 16) ** 2) if args.patch_augmentation else 0
    batch_bytes = (1.25 + of_patch) * sum(map(math.prod, shapes))
    init_hash = checkpoints.hash_of_file(args.init_weights) if args.init_weights else None
    every = 10 if args.knn_every is None and images.online_knn else args.knn_every or 0
    settings = {**vars(args), "knn_every": every, "init_hash": init_hash}
    of_older_runs = defaults_of_older_runs()
    earlier = checkpoints.open_output(output_dir, settings, of_older_runs, may_change(settings))
    checkpoint, settings["init_hash"] = earlier.checkpoint, earlier.init_hash
    start, made_with = None, recorded_arguments(checkpoint, str(earlier.path)) if checkpoint else {}
    if args.init_weights and not checkpoint:
        start = load_start(args.init_weights, args.arch, args.patch_size, args.checkpoint_key)
        made_with = {"arch": start.arch, "patch_size": start.backbone.patch_embed.patch_size[0]}
    args.arch = args.arch or made_with.get("arch", "vit_small")
    args.patch_size = args.patch_size or made_with.get("patch_size", 16)
    argument_parser().check_crops(args)
    settings |= {"arch": args.arch, "patch_size": args.patch_size}
    online_dense = open_segmentation(args)
    evaluations = [evaluation for evaluation in (images.online_knn, online_dense) if evaluation]
    workers = fit_all_workers(args.num_workers, batch_bytes, evaluations)
    timeout = datetime.timedelta(seconds=args.dist_timeout)
    rank, world_size, device = process = init_distributed(args.dist_url, timeout)
    settings["precision"] = set_precision(args.precision or made_with.get("precision"), device)
    distort_on = made_with.get("distort_on", of_older_runs["distort_on"]) if checkpoint else args.distort_on
    settings["distort_on"] = loader.place_of_distortion(distort_on, device)
    lock = checkpoints.lock(output_dir) if rank == 0 else None
    stop.join(timeout)
    loader.check_batch(len(images.train), args.batch_size_per_gpu, args.accum_steps, world_size)
    if args.use_bn_in_head and world_size > 1 and device.type == "cpu":
        raise UserError("--use_bn_in_head true with several processes needs GPUs: batch norm is not synced on CPUs")

    student, teacher, criterion = build_networks(args)
    started = ""
    if start:
        started = start_from(start, student, criterion.center)
        teacher.load_state_dict(student.state_dict())
    for module in (student, teacher, criterion):
        module.to(device)
    optimizer = build_optimizer(args.optimizer, student)
    # The scaler skips steps with non-finite gradients without waiting for the device. It scales only in fp16.
    init_scale, growth_interval = (2.0**16, 2000) if settings["precision"] == "fp16" else (1.0, 2**31 - 1)
    scaler = torch.amp.GradScaler(device.type, init_scale=init_scale, growth_interval=growth_interval)
    max_matched = (max(args.global_crops_size, args.local_crops_size) // args.patch_size) ** 2
    max_bad_images = int(args.max_bad_images * len(images.train) + 1e-6)
    meters = Meters(process, settings["precision"], max_matched, max_bad_images)
    state: dict[str, Any] = {"student": student, "teacher": teacher, "loss": criterion, "optimizer": optimizer}
    state |= {"scaler": scaler, "meters": meters}

    batch_size, image_hash = args.batch_size_per_gpu * args.accum_steps * world_size, hash_of_names(images.train)
    size = RunSize(batch_size, [len(images.train), image_hash], args.epochs)
    if checkpoint:
        size = size._replace(earlier_hash=hash_of_names(images.train, as_text=True))
    start_step = restore(checkpoint, earlier.path, state, size, world_size) if checkpoint else 0
    distort: Distort = distort_batch
    accelerated = ""
    if start_step < size.total_steps:  # compiled blocks and CUDA graphs: support/cuda_graphs.py
        distort, accelerated = accelerate(
            teacher,
            student,
            shapes,
            AUTOCAST[settings["precision"]],
            compiles=args.compile,
            graphs=args.cuda_graphs,
            accumulates=args.accum_steps > 1,
            distorts=settings["distort_on"] == "device",
            patch_side=args.patch_size if args.patch_augmentation else 0,
        )
    checkpoints.refuse_different_starts(start_step, device)
    steps = range(start_step, size.total_steps)
    run = Run(
        student=student,
        teacher=teacher,
        ddp_student=wrap_networks(args, student, teacher, process),
        criterion=criterion,
        optimizer=optimizer,
        scaler=scaler,
        meters=meters,
        state=state,
        loader=build_loader(args, images.train, steps, process, workers, settings["distort_on"]),
        distort=distort,
        online_knn=images.online_knn,
        online_dense=online_dense,
        report=None,
        lock=lock,
        process=process,
        size=size,
        start_step=start_step,
        settings=settings,
    )
    if rank == 0:
        checkpoints.tidy(output_dir, earlier.path)
        run.report = open_report(args, run, images, accelerated=accelerated, started=started)
    return run


class Images(NamedTuple):
    """The training images, and the online k-NN on them and the validation images."""

    train: LabeledImages
    online_knn: OnlineKNN | None
    no_knn: str  # why there is no online k-NN
    found: str = ""  # what the training images are


def open_images(args: argparse.Namespace) -> Images:
    """Open the training images and, if they have labels, the online k-NN."""
    min_side = 2 * args.image_size or None  # decode large JPEGs at reduced size; pixels change by less than one level
    resumes_list = args.dataset == "imagenet100" and not args.classes
    spec = data_spec(args, checkpoints.recorded_settings(Path(args.output_dir)) if resumes_list else None)
    train = build_dataset(spec, transform=ResizedArray(args.image_size), min_side=min_side)
    knn, no_knn = None, "--knn_every 0"
    if args.knn_every != 0:
        try:
            knn = OnlineKNN(train, spec, args.global_crops_size, args.batch_size_per_gpu, args.num_workers)
        except UserError as error:
            if args.knn_every:
                raise UserError(f"--knn_every {args.knn_every}: {error}") from error
            no_knn = str(error)
    return Images(train, knn, no_knn, train.describe())


def open_segmentation(args: argparse.Namespace) -> OnlineSegmentation | None:
    """Open the online segmentation, if it is asked for. Its images have the size of a global view."""
    if not args.dense_every:
        return None
    side = args.global_crops_size // args.patch_size * args.patch_size
    try:
        return OnlineSegmentation(
            args.dense_path, side, args.batch_size_per_gpu, args.num_workers, args.intensity_range
        )
    except UserError as error:
        raise UserError(f"--dense_path {args.dense_path}: {error}") from error


def open_report(args: argparse.Namespace, run: Run, images: Images, *, accelerated: str, started: str) -> Report:
    """Open the report of a run, and print the headline.

    Args:
        accelerated: what `accelerate` has done, for the headline; "" if nothing.
        started: the pretrained weights that the run starts from, for the headline; "" if none.
    """
    size, (_, world_size, device) = run.size, run.process
    watch_from = min(args.warmup_epochs * size.steps_per_epoch, WATCH_FROM)
    report = Report(Path(args.output_dir), run.start_step, args.epochs, size.steps_per_epoch, watch_from)
    millions = sum(p.numel() for p in run.student.backbone.parameters()) / 1e6
    network = f"{run.settings['arch']}/{run.settings['patch_size']} ({millions:.1f} M parameters), loss {args.loss}"
    threads = f"(threads: {torch.get_num_threads()})"
    batch = f"batch {size.batch_size} on {world_size} x {device.type} {threads} in {run.settings['precision']}"
    resumed = f"; resuming after step {run.start_step} of {size.total_steps}" if run.start_step else ""
    resumed = "; the run is finished" if run.start_step == size.total_steps else resumed
    steps = f"{size.steps_per_epoch} steps per epoch{resumed}"
    headline = ", ".join(filter(None, [network, f"{len(images.train)} images", batch, accelerated, steps]))
    no_knn = "" if images.online_knn else f"no online k-NN: {images.no_knn}"
    headline = "\n".join(filter(None, [headline, images.found, no_knn, started, *remarks(args)]))
    report.start(run.settings, {"step": run.start_step, "processes": world_size, **environment()}, headline)
    return report


def build_networks(args: argparse.Namespace) -> tuple[BackboneWithHead, Teacher, LocalGlobalLoss]:
    """Return (student, teacher, criterion). The teacher starts as a copy of the student."""

    def backbone_and_head(drop_path_rate: float) -> tuple[VisionTransformer, DINOHead]:
        build = ARCHITECTURES[args.arch]
        backbone = build(args.patch_size, img_size=args.global_crops_size, drop_path_rate=drop_path_rate)
        return backbone, DINOHead(
            backbone.embed_dim,
            args.out_dim,
            use_bn=args.use_bn_in_head,
            norm_last_layer=args.norm_last_layer,
            hidden_dim=args.head_hidden_dim,
            patch_mlp=args.patch_head == "separate",
        )

    torch.manual_seed(args.seed)
    student = BackboneWithHead(*backbone_and_head(args.drop_path_rate))
    student.backbone.set_grad_checkpointing(args.grad_checkpointing)
    teacher = Teacher(*backbone_and_head(drop_path_rate=0.0), average_patches=args.loss != "cls")
    teacher.load_state_dict(student.state_dict())
    patches = (args.global_crops_size // args.patch_size) ** 2
    return student, teacher, LocalGlobalLoss(args.out_dim, patches, args.loss, args.lambda_cls, args.center)


def wrap_networks(
    args: argparse.Namespace, student: BackboneWithHead, teacher: Teacher, process: Process
) -> BackboneWithHead | DistributedDataParallel:
    """Return the student, wrapped in DDP if there are several processes."""
    if process.world_size == 1:
        return student
    if args.use_bn_in_head:
        # Each SyncBatchNorm makes all ranks wait for each other, in the forward and in the backward pass.
        student.head, teacher.head = map(torch.nn.SyncBatchNorm.convert_sync_batchnorm, (student.head, teacher.head))
    device_ids = [process.device.index] if process.device.type == "cuda" else None
    return DistributedDataParallel(student, device_ids=device_ids, gradient_as_bucket_view=True)  # no copy of gradients


def build_loader(
    args: argparse.Namespace,
    dataset: LabeledImages,
    steps: range,
    process: Process,
    workers: Workers | None = None,
    distort_on: str | None = None,
) -> DataLoader:
    """Return the loader of this rank's batches for a range of steps.

    By default, it has --num_workers workers, and views are distorted where --distort_on says.
    """
    multi_crop = MultiCrop(
        global_size=args.global_crops_size,
        local_size=args.local_crops_size,
        global_scale=args.global_crops_scale,
        local_scale=args.local_crops_scale,
        local_number=args.local_crops_number,
        flip_prob=args.flip_prob,
        geometry=args.geometry,
        seed=args.seed,
        distortion=args.distortion,
        patch_side=args.patch_size if args.patch_augmentation else 0,
    )
    rule = None if args.loss == "cls" else args.matching
    skip_bad, (rank, world_size, device) = args.on_bad_image == "skip", process
    steps_of_rank = args.batch_size_per_gpu, steps, args.accum_steps, rank, world_size, args.seed
    sampler = loader.BatchSampler(len(dataset), *steps_of_rank)
    distorts = loader.place_of_distortion(distort_on or args.distort_on, device) == "workers"
    batches = ViewBatches(dataset, multi_crop, args.patch_size, rule, rank, skip_bad, distorts)
    workers = workers or Workers(args.num_workers)
    return loader.open_loader(batches, workers, device, sampler=sampler, batch_size=None)  # a key is a whole batch


if __name__ == "__main__":
    # torchrun restarts a process that exits with a nonzero code.
    run_main(lambda: EXIT_CODE if main() and "TORCHELASTIC_RUN_ID" not in os.environ else 0)
