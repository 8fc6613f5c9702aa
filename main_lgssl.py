"""Pretrain a ViT by local-global matching.

    python main_lgssl.py --data_path FOLDER --output_dir OUT             one process, on a GPU where there is one
    torchrun --nproc_per_node=8 main_lgssl.py --data_path FOLDER ...     one process per GPU, or on CPU cores

`--loss cls` is DINO. A run whose output folder holds a checkpoint goes on from it.
"""

import atexit
import datetime
import hashlib
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from timm.optim import Lars
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import checkpoints
import utils
from augment import MultiCrop, normalize
from datasets import DATASETS, BatchOrder, ResizeToTensor, build_dataset
from health import WATCH_FROM, measure
from losses import LOSSES, LocalGlobalLoss, teacher_temperature
from observe import OnlineKNN, environment, is_due, training_pictures
from patch_matching import RULES, batch_table, match_views
from preemption import EXIT_CODE, StopRequest, ignore_signals
from utils import UserError, bool_flag, cosine_schedule, number
from vision_transformer import ARCHITECTURES, BackboneWithHead, DINOHead, architecture

# Arguments that may differ when a run goes on; any other would make it another run.
MAY_CHANGE = "data_path download output_dir num_workers log_every saveckp_freq dist_url local_rank".split()
MAY_CHANGE += "grad_checkpointing compile save_every_steps keep_last dist_timeout on_bad_image max_bad_images".split()
MAY_CHANGE += ["knn_every", "image_every"]


def parse_arguments(argv=None):
    parser = utils.ArgumentParser(description=__doc__.splitlines()[0], epilog="@FILE reads options from a file.")
    natural, whole, amount, share = number(int, 1), number(int, 0), number(float, 0), number(float, 0, 1)
    # fmt: off
    add = parser.add_argument_group("method").add_argument
    add("--loss", choices=LOSSES, default="mean", help="section 3.4; cls is DINO")
    add("--lambda_cls", type=share, default=0.5, help="λ, the weight of CLS with --loss lambda")
    add("--matching", choices=RULES, default="paper", help="how patches are matched, see patch_matching.py")
    add("--geometry", choices=("batch", "image"), help="crop and flip shared by the batch (section 4.1.2), or drawn "
        "per image as in DINO; default: batch, with --loss cls image")
    add("--center", choices=("position", "shared"), default="position", help="one per token position, or one for all")

    add = parser.add_argument_group("model").add_argument
    add("--arch", type=architecture, default="vit_small", help=", ".join(ARCHITECTURES))
    add("--patch_size", type=natural, default=16, help="side of a patch in pixels")
    add("--out_dim", type=number(int, 2), default=10000, help="K, number of prototypes")
    add("--norm_last_layer", type=bool_flag, default=True, help="keep the prototypes' length at 1")
    add("--use_bn_in_head", type=bool_flag, default=False, help="batch norm in the head")
    add("--head_hidden_dim", type=natural, default=2048, help="width of the head's hidden layers")
    add("--drop_path_rate", type=number(float, 0, 0.99), default=0.1, help="stochastic depth of the student")

    add = parser.add_argument_group("teacher").add_argument
    add("--momentum_teacher", type=share, default=0.996, help="EMA momentum at the start; it rises to 1 on a cosine")
    add("--warmup_teacher_temp", type=number(float, 1e-6), default=0.04, help="τ_t at the start")
    add("--teacher_temp", type=number(float, 1e-6), default=0.07, help="τ_t after its warm-up")
    add("--warmup_teacher_temp_epochs", type=whole, default=30, help="epochs of the warm-up of τ_t")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=natural, default=200, help="passes over the data")
    add("--batch_size_per_gpu", type=natural, default=40, help="images that a process works on at a time")
    add("--accum_steps", type=natural, default=1, help="such batches per process in a step; N of them equal one batch "
        "N times as large")
    add("--optimizer", choices=("adamw", "sgd", "lars"), default="adamw", help="lars is timm's")
    add("--lr", type=amount, default=5e-4, help="highest learning rate at a total batch of 256; scaled with the batch")
    add("--min_lr", type=amount, default=1e-6, help="learning rate at the end, not scaled")
    add("--warmup_epochs", type=whole, default=10, help="epochs of linear warm-up of the learning rate")
    add("--weight_decay", type=amount, default=0.04, help="at the start")
    add("--weight_decay_end", type=amount, default=0.4, help="at the end, on a cosine")
    add("--clip_grad", type=amount, default=3.0, help="largest gradient norm of each parameter; 0 does not clip")
    add("--freeze_last_layer", type=whole, default=1, help="epochs during which the prototypes stay as they are")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="default: what --use_fp16 says")
    add("--use_fp16", type=bool_flag, help="true is fp16, false is fp32; default: true on a GPU")
    add("--grad_checkpointing", action="store_true", help="keep few activations and compute the others twice")
    add("--compile", action="store_true", help="compile the backbone")

    add = parser.add_argument_group("views").add_argument
    add("--image_size", type=whole, help="resize images to this side first; 0 crops them as they are "
        "(--geometry image alone); default: 256, with --loss cls and --geometry image 0")
    add("--global_crops_size", type=natural, default=224, help="side of the two global views in pixels")
    add("--local_crops_size", type=natural, default=96, help="side of the local views in pixels")
    add("--global_crops_scale", type=share, nargs=2, default=[0.4, 1.0], help="smallest and largest share of the image")
    add("--local_crops_scale", type=share, nargs=2, default=[0.05, 0.4], help="smallest and largest share of the image")
    add("--local_crops_number", type=whole, default=8, help="number of local views")
    add("--flip_prob", type=share, default=0.5, help="of a horizontal flip; 0 where mirrored images are another class")

    add = parser.add_argument_group("data and output").add_argument
    add("--dataset", choices=DATASETS, default="folder", help="see datasets.py")
    add("--data_path", help="folder of images, or of CIFAR-10")
    add("--classes", help="file with the class folders to use, one a line")
    add("--download", action="store_true", help="fetch CIFAR-10 where it is missing")
    add("--on_bad_image", choices=("error", "skip"), default="error", help="an image that cannot be read ends the run, "
        "or the next one takes its place")
    add("--max_bad_images", type=share, default=0.01, help="largest share of such images with --on_bad_image skip")
    add("--output_dir", default=".", help="folder of checkpoints and logs")
    add("--saveckp_freq", type=whole, default=20, help="epochs between two checkpoints that are kept; 0 keeps the last")
    add("--save_every_steps", type=whole, default=0, help="steps between two saves within an epoch; 0 saves at its end")
    add("--keep_last", type=whole, default=0, help="how many of the checkpoints of --saveckp_freq to keep; 0 is all")
    add("--log_every", type=natural, default=10, help="steps between two lines of the log")
    add("--knn_every", type=whole, help="epochs between two measurements of the k-NN accuracy on a held-out part; 0 is "
        "never; default: 10 where images have labels, which nothing else uses")
    add("--image_every", type=whole, default=10, help="epochs between two sets of pictures in TensorBoard; 0 is never")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of all random numbers")
    add("--num_workers", type=whole, default=min(10, os.cpu_count()), help="data-loading processes per process")
    add("--dist_url", default="env://", help="where the processes meet")
    add("--dist_timeout", type=natural, default=600, help="seconds that a process waits for another")
    add("--local_rank", "--local-rank", type=int, help="ignored, as the environment says it")
    # fmt: on
    args = parser.parse_args(argv)
    if args.geometry is None:
        args.geometry = "image" if args.loss == "cls" else "batch"
    if args.image_size is None:
        args.image_size = 0 if (args.loss, args.geometry) == ("cls", "image") else 256
    if args.precision is None:
        args.precision = "fp16" if args.use_fp16 or (args.use_fp16 is None and torch.cuda.is_available()) else "fp32"
    del args.use_fp16

    parser.check_crops(args)
    if args.use_bn_in_head and args.accum_steps > 1:
        parser.error("--accum_steps needs --use_bn_in_head false: batch norm would see the parts of a batch one by one")
    if args.geometry == "batch" and args.image_size == 0:
        parser.error("--image_size 0 needs --geometry image: crops shared by a batch need images of one size")
    return args


def main(argv=None):
    """Run to the end and return None, or until a signal stops the run early, which is saved, and return the signal."""
    atexit.register(utils.kill_workers)  # where a reference to their loader is left, it does not end them
    with StopRequest() as stop:
        return pretrain(parse_arguments(argv), stop)


def pretrain(args, stop):
    transform = ResizeToTensor(args.image_size)
    least_side = 2 * args.image_size or None  # twice what is needed, so that pixels change by less than a level
    dataset = build_dataset(args.dataset, args.data_path, "train", transform, args.classes, args.download, least_side)
    output_dir = Path(args.output_dir)
    path = output_dir / "checkpoint.pth"
    online_knn, no_knn = None, "--knn_every 0"
    if args.knn_every != 0:
        source = (args.dataset, args.data_path, args.classes, args.global_crops_size)
        try:
            online_knn = OnlineKNN(dataset, *source, args.batch_size_per_gpu, args.num_workers)
        except UserError as error:
            if args.knn_every:
                raise UserError(f"--knn_every {args.knn_every}: {error}") from error
            no_knn = str(error)
    args.knn_every = 10 if args.knn_every is None and online_knn else args.knn_every or 0
    checkpoint, found = open_output(output_dir, vars(args))
    timeout = datetime.timedelta(seconds=args.dist_timeout)
    rank, world_size, device = utils.init_distributed(args.dist_url, timeout)
    stop.join(timeout)
    batch_size = args.batch_size_per_gpu * args.accum_steps * world_size
    if len(dataset) < batch_size:
        accumulated, or_fewer = "", ""
        if args.accum_steps > 1:
            accumulated, or_fewer = f", {args.accum_steps} times accumulated", " or --accum_steps"
        raise UserError(
            f"found {len(dataset)} images, fewer than one batch of {args.batch_size_per_gpu} in each of {world_size} "
            f"processes{accumulated}: give a smaller --batch_size_per_gpu{or_fewer}"
        )
    if args.use_bn_in_head and world_size > 1 and device.type == "cpu":
        raise UserError("--use_bn_in_head true needs a GPU for each of several processes: CPUs do not share batch norm")

    # Data
    multi_crop = MultiCrop(
        args.global_crops_size,
        args.local_crops_size,
        args.global_crops_scale,
        args.local_crops_scale,
        args.local_crops_number,
        args.flip_prob,
        args.geometry,
        args.seed,
    )
    rule = None if args.loss == "cls" else args.matching
    order = BatchOrder(len(dataset), args.batch_size_per_gpu, args.accum_steps, rank, world_size, args.seed)
    skip_bad = args.on_bad_image == "skip"
    batches = BatchesOfViews(dataset, multi_crop, args.patch_size, rule, rank, skip_bad)
    loader = DataLoader(
        batches,
        sampler=order,
        batch_size=None,  # a key of the order is a whole batch
        num_workers=args.num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=args.num_workers > 0,
        worker_init_fn=ignore_signals,
    )

    # Networks and optimizer. The teacher starts as a copy of the student.
    def build_network(drop_path_rate):
        build = ARCHITECTURES[args.arch]
        backbone = build(args.patch_size, img_size=args.global_crops_size, drop_path_rate=drop_path_rate)
        hidden = {"hidden_dim": args.head_hidden_dim}
        head = DINOHead(backbone.embed_dim, args.out_dim, args.use_bn_in_head, args.norm_last_layer, **hidden)
        return BackboneWithHead(backbone, head).to(device)

    torch.manual_seed(args.seed)
    student, teacher = build_network(args.drop_path_rate), build_network(0.0)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    patches = (args.global_crops_size // args.patch_size) ** 2
    loss_function = LocalGlobalLoss(args.out_dim, patches, args.loss, args.lambda_cls, args.center).to(device)
    optimizer = build_optimizer(args.optimizer, student)
    # A step with a gradient that is not finite is left out on the device. But for fp16 nothing is scaled.
    scaling = {} if args.precision == "fp16" else {"init_scale": 1.0, "growth_interval": 2**31 - 1}
    scaler = torch.amp.GradScaler(device.type, **scaling)

    images = [len(dataset), fingerprint(dataset)]
    saved = {"student": student, "teacher": teacher, "optimizer": optimizer, "loss": loss_function, "scaler": scaler}
    most_matched = (max(args.global_crops_size, args.local_crops_size) // args.patch_size) ** 2
    meters = Meters(device, args.precision, most_matched, int(args.max_bad_images * len(dataset) + 1e-6))
    start_step = 0
    if checkpoint:
        start_step = restore(checkpoint, found, saved, meters, batch_size, images, rank, world_size)
    refuse_different_starts(start_step, device)
    if rank == 0:
        if found == checkpoints.previous_path(path) and path.exists():
            path.replace(path.with_name("checkpoint_unreadable.pth"))
        for unfinished in output_dir.glob("checkpoint*.pth.tmp"):
            unfinished.unlink()
    del checkpoint  # as large as networks and optimizer together
    student.backbone.set_grad_checkpointing(args.grad_checkpointing)
    if args.compile:
        compile_backbones(student, teacher, device)
    ddp_student = student
    if world_size > 1:
        if args.use_bn_in_head:
            student.head, teacher.head = map(
                torch.nn.SyncBatchNorm.convert_sync_batchnorm, (student.head, teacher.head)
            )
        ddp_student = DistributedDataParallel(student, device_ids=[device.index] if device.type == "cuda" else None)

    # Schedules, as functions of the step
    total_steps, warmup_steps = args.epochs * order.steps, args.warmup_epochs * order.steps
    lr = args.lr * batch_size / 256
    schedules = {
        "lr": lambda step: cosine_schedule(step, total_steps, lr, args.min_lr, warmup_steps),
        "wd": lambda step: cosine_schedule(step, total_steps, args.weight_decay, args.weight_decay_end),
        "momentum": lambda step: cosine_schedule(step, total_steps, args.momentum_teacher, 1.0),
    }
    temperature_schedule = (args.warmup_teacher_temp, args.teacher_temp, args.warmup_teacher_temp_epochs)

    report = None
    if rank == 0:
        utils.write_text(json.dumps(vars(args), indent=2) + "\n", output_dir / "args.json")
        report = utils.Report(output_dir, start_step, args.epochs, order.steps, min(warmup_steps, WATCH_FROM))
        start = {"step": start_step, "processes": world_size, **environment()}
        utils.append_line(start, output_dir / "environment.jsonl")
        report.text("arguments", vars(args))
        report.text("environment", start)
        millions = sum(p.numel() for p in student.backbone.parameters()) / 1e6
        print(
            f"{args.arch}/{args.patch_size} ({millions:.1f} M parameters), loss {args.loss}, {len(dataset)} images, "
            f"batch {batch_size} on {world_size} x {device.type} in {args.precision}, {order.steps} steps an epoch"
            + (f"; going on after step {start_step} of {total_steps}" if start_step else ""),
            flush=True,
        )
        if not online_knn:
            print(f"no online k-NN: {no_knn}", flush=True)

    def save(step, *more_names):
        """Save the state after `step` steps; for all processes to call."""
        meters.stop_at_bad_step(student)
        if skip_bad:
            meters.share_bad_images()
        state = meters.state_dict()
        if rank == 0:
            report.sync()
            contents = {name: part.state_dict() for name, part in saved.items()}
            contents |= {"meters": state, "epoch": step // order.steps, "step": step}
            contents |= {"batch_size": batch_size, "images": images, "args": vars(args)}
            for name in more_names:  # before the one that a run goes on from
                checkpoints.save(contents, output_dir / name)
            checkpoints.save(contents, path, keep_previous=True)
            if args.keep_last:
                checkpoints.remove_old(output_dir, args.keep_last)

    def after_step(step):
        """Save where it is time, and return whether to leave the epoch. At its end it is left, and saved, anyway."""
        stop.check()
        if (step + 1) % order.steps == 0:
            return False
        if stop.agreed or (args.save_every_steps and (step + 1) % args.save_every_steps == 0):
            save(step + 1)
        return stop.agreed is not None

    for epoch in range(start_step // order.steps, args.epochs):
        order.epoch, order.first_step = epoch, max(start_step - epoch * order.steps, 0)
        whole = train_one_epoch(
            loader,
            epoch,
            ddp_student,
            teacher,
            loss_function,
            optimizer,
            scaler,
            schedules,
            teacher_temperature(epoch, *temperature_schedule),
            meters,
            steps=order.steps - order.first_step,
            accum_steps=args.accum_steps,
            seed=args.seed,
            clip_grad=args.clip_grad,
            freeze_last_layer=epoch < args.freeze_last_layer,
            precision=args.precision,
            device=device,
            log_every=args.log_every,
            report=report,
            after_step=after_step,
        )
        if not whole:
            break  # saved
        end = (epoch + 1) * order.steps
        means, matched_counts = meters.end_epoch()
        top1 = None
        if is_due(epoch, args.knn_every, args.epochs):
            top1 = online_knn(teacher.backbone.forward, device)  # of the uncompiled backbone, for batches of any size
        if rank == 0:
            for name in ("lr", "wd"):
                means[name] = sum(map(schedules[name], range(end - order.steps, end))) / order.steps
            report.epoch(epoch, end - 1, means, top1)
            if is_due(epoch, args.image_every, args.epochs):
                image, views = batches.image(0, {}), batches.views((epoch, end - 1, [0]))
                pictures = training_pictures(teacher.backbone, image, views, args.patch_size, rule)
                report.pictures(pictures, end - 1)
                report.histogram("matched_patches_per_pair", matched_counts, end - 1)
        save(end, *([f"checkpoint{epoch:04}.pth"] if args.saveckp_freq and epoch % args.saveckp_freq == 0 else []))
        if end == total_steps:
            stop.agreed = None  # too late: nothing is left to do
        if stop.agreed:
            break
    if rank == 0:
        if report.metrics and not stop.agreed:
            report.hyperparameters(vars(args))
        report.close()
        if stop.agreed:
            print(f"stopped early, as asked: the same command goes on from {path}", flush=True)
        else:
            print(f"done: {path}, {output_dir / 'log.txt'}", flush=True)
    if world_size > 1:
        dist.destroy_process_group()
    return stop.agreed


def train_one_epoch(
    loader,
    epoch,
    student,
    teacher,
    loss_function,
    optimizer,
    scaler,
    schedules,
    temperature,
    meters,
    *,
    steps,
    accum_steps,
    seed,
    clip_grad,
    freeze_last_layer,
    precision,
    device,
    log_every,
    report,
    after_step,
):
    """Train for one epoch, or for what is left of it.

    Args:
        loader: gives (step, crops, table, bad) from BatchesOfViews, `accum_steps` of them with the same step.
        student: BackboneWithHead, bare or wrapped for several processes.
        schedules: functions of the step: "lr", "wd" and the EMA's "momentum".
        temperature: τ_t.
        meters: Meters.
        steps: how many to train.
        seed: the key of stochastic depth beside step, rank and the part of the step.
        freeze_last_layer: leave the prototypes as they are.
        log_every: steps between two reports; the last step of an epoch always reports. Between them the CPU does not
            wait for the device (with AdamW).
        report: utils.Report on rank 0, otherwise None.
        after_step: called with the step when it is done; returns whether to leave the epoch.

    Returns:
        whether the epoch was trained to its end

    A step whose loss or gradient is not finite changes no weight of the student. The next report ends the run and names
    the first such step, before anything is saved; with fp16, whose scaler lowers its scale, only for the loss.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    teacher_parameters, student_parameters = list(teacher.parameters()), list(student.parameters())
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    interval_start, interval_steps = time.perf_counter(), 0
    batches = iter(loader)
    for remaining in reversed(range(steps)):
        earlier_mean_z = []
        for part in range(accum_steps):
            step, crops, table, bad = next_batch(batches)
            meters.new_bad_images |= bad
            reports = (step + 1) % log_every == 0 or remaining == 0
            seed_networks(seed, step, rank, part)
            last = part == accum_steps - 1
            health = {} if reports and last else None
            with nullcontext() if last or world_size == 1 else student.no_sync():
                with torch.autocast(device.type, dtype) if dtype else nullcontext():
                    loss = batch_loss(
                        student,
                        teacher,
                        loss_function,
                        crops,
                        table,
                        temperature,
                        device,
                        accum_steps,
                        earlier_mean_z,
                        health,
                    )
                # A loss that is not finite makes all gradients so, on all processes.
                scaler.scale(loss * torch.where(loss.isfinite(), 1.0, math.nan)).backward()
            images, view_pairs = count_pairs(crops)
            meters.add(loss.detach(), (len(table.image) / (images * view_pairs) - 1) / accum_steps, table.run_length)

        scheduled = {name: schedule(step) for name, schedule in schedules.items()}
        for group in optimizer.param_groups:
            group["lr"] = scheduled["lr"]
            group["weight_decay"] = scheduled["wd"] if group["decay"] else 0.0
        scaler.unscale_(optimizer)
        norms = clip_each_gradient(student_parameters, clip_grad)
        if freeze_last_layer:
            for parameter in getattr(student, "module", student).head.last_layer.parameters():
                parameter.grad = None
        meters.end_step(step, norms)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(teacher_parameters, student_parameters, 1 - scheduled["momentum"])
        interval_steps += 1

        if reports:
            meters.stop_at_bad_step(student)
            values = meters.end_interval({**health, "grad_norm": norms.norm()})
            seconds = (time.perf_counter() - interval_start) / interval_steps
            if report:
                rate = images * accum_steps * world_size / seconds
                values = {"loss": values.pop("loss"), **scheduled, "teacher_temp": temperature, **values}
                report.interval(epoch, step, seconds, {**values, "images_per_s": rate})
            interval_start, interval_steps = time.perf_counter(), 0
        if after_step(step):
            return False
    return True


def next_batch(batches):
    """Return the next item of a loader's iterator; UserError where the process that made it has died."""
    try:
        return next(batches)
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise the next error in this one
        raise UserError(f"{utils.DEAD_WORKER} ({type(error).__name__})") from error


class Meters:
    """What a process adds up between two reports, and from the reports of an epoch.

    It is saved with a checkpoint, so that a run that goes on reports what an undisturbed one would.

    Args:
        device: where the losses are. Adding up does not wait for it.
        precision: "fp16" may leave out steps.
        most_matched: patches of two views that can be matched; where a rule matches more, these count as so many.
        most_bad_images: how many images that cannot be read are borne.
    """

    # fp16: the scaler halves its scale in each step that it leaves out; 2^16 is where it starts.
    MOST_SKIPPED = 30

    def __init__(self, device, precision, most_matched, most_bad_images=0):
        self.fp16, self.most_bad_images = precision == "fp16", most_bad_images
        self.loss = torch.zeros((), device=device)  # sum since the last report
        self.matched, self.steps = 0.0, 0
        self.skipped = torch.zeros(2, device=device)  # steps since the last report; in a row
        # The first step with a loss that is not finite, with such a gradient, and of which parameter
        self.bad = torch.full((3,), math.inf, device=device)
        self.epoch = {}  # name: (sum over steps of the epoch, their number)
        # [n]: pairs of views with n matched patches in this epoch
        self.matched_counts = torch.zeros(1 + most_matched, dtype=torch.float64)
        self.bad_images = {}  # {sample: why it cannot be read}, of all processes
        self.new_bad_images = {}  # of this one, since the last report

    def add(self, loss, matched, run_length):
        """Add the loss of a batch, or of a part of it, its matched patches of a pair of views, and its run lengths."""
        self.loss += loss
        self.matched += matched
        pairs = torch.bincount(run_length)[1:]  # [n]: entries of pairs with n patches, 1 + n of each
        pairs //= torch.arange(1, len(pairs) + 1)
        most = len(self.matched_counts) - 1
        self.matched_counts[: len(pairs)] += pairs[: most + 1]
        self.matched_counts[most] += pairs[most + 1 :].sum()

    def end_step(self, step, norms):
        """Look for what is not finite: the loss, or one of the gradients with these norms."""
        is_bad = ~norms.isfinite()
        any_bad = is_bad.any()
        self.skipped = torch.stack([self.skipped[0] + any_bad, (self.skipped[1] + 1) * any_bad])
        here = torch.stack([~self.loss.isfinite(), any_bad & (not self.fp16)])
        found = torch.where(here, float(step), math.inf)
        parameter = torch.where(self.bad[1].isinf() & here[1], is_bad.float().argmax(), self.bad[2])
        self.bad = torch.cat([torch.minimum(self.bad[:2], found), parameter[None]])
        self.steps += 1

    def stop_at_bad_step(self, network):
        """Exit on all processes where one of them has seen a loss or a gradient that is not finite.

        Args:
            network: whose gradients have the norms.
        """
        everyones = utils.all_gather(torch.cat([self.bad, self.skipped[1:]])).tolist()
        step, kind, rank = min((bad[kind], kind, rank) for rank, bad in enumerate(everyones) for kind in (0, 1))
        if step < math.inf:
            what = "the loss"
            if kind == 1:
                trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
                what = f"the gradient of {trained[int(everyones[rank][2])].removeprefix('module.')}"
            ranks = [rank for rank, bad in enumerate(everyones) if bad[kind] == step]
            where = f" on rank {', '.join(map(str, ranks))}" if dist.is_initialized() else ""
            sys.exit(f"error: {what} is not finite at step {step:.0f}{where}; the weights were not saved")
        in_a_row = max(row[3] for row in everyones)
        if self.fp16 and in_a_row >= self.MOST_SKIPPED:
            sys.exit(
                f"error: fp16 left out the last {in_a_row:.0f} steps, whose gradients were not finite at any scale; "
                "the weights were not saved: take a lower --lr, or --precision bf16"
            )

    def end_interval(self, values):
        """Return the means since the last report, over all processes; None for what is not finite.

        Args:
            values: further 0-d tensors, of the last step alone.
        """
        count = self.loss.new_tensor(self.steps)
        values = {"loss": self.loss / count, "matched_patches": self.loss.new_tensor(self.matched) / count, **values}
        if self.fp16:
            values["skipped_share"] = self.skipped[0] / count
        new = self.new_bad_images.keys() - self.bad_images.keys()
        values["new_bad_images"] = self.loss.new_tensor(len(new))
        means = utils.all_reduce_mean(torch.stack([value.float() for value in values.values()])).tolist()
        means = {name: mean if math.isfinite(mean) else None for name, mean in zip(values, means, strict=True)}
        if means.pop("new_bad_images"):
            self.share_bad_images()
        for name, mean in means.items():
            if mean is not None:
                total, steps = self.epoch.get(name, (0.0, 0))
                self.epoch[name] = (total + mean * self.steps, steps + self.steps)
        self.loss, self.skipped = torch.zeros_like(self.loss), self.skipped * self.skipped.new_tensor([0.0, 1.0])
        self.matched, self.steps = 0.0, 0
        return means

    def share_bad_images(self):
        """Tell all processes of the images that cannot be read.

        Raises:
            UserError: they are too many.
        """
        everyones = [self.new_bad_images]
        if dist.is_initialized():
            everyones = [None] * dist.get_world_size()
            dist.all_gather_object(everyones, self.new_bad_images)
        for i, why in sorted(item for bad in everyones for item in bad.items()):
            if i not in self.bad_images and (not dist.is_initialized() or dist.get_rank() == 0):
                utils.warn(f"{why}; the next image takes its place")
            self.bad_images[i] = why
        self.new_bad_images = {}
        if len(self.bad_images) > self.most_bad_images:
            raise UserError(
                f"{len(self.bad_images)} images cannot be read, more than the {self.most_bad_images} that "
                f"--max_bad_images allows; the first: {next(iter(self.bad_images.values()))}"
            )

    def end_epoch(self):
        """Return (means, matched_counts) of an epoch, and begin the next one.

        The means are over its reports, each counted by its steps; the counts are this process's.
        """
        means = {name: total / steps for name, (total, steps) in self.epoch.items()}
        counts, self.matched_counts = self.matched_counts, torch.zeros_like(self.matched_counts)
        self.epoch = {}
        return means, counts

    def state_dict(self):
        """Return the state of all processes; for all of them to call."""
        own = [self.loss, *self.skipped, self.loss.new_tensor(self.matched, dtype=torch.float64)]
        own = torch.stack([x.double() for x in [*own, self.loss.new_tensor(self.steps)]])
        own = torch.cat([own, self.matched_counts.to(own.device)])
        interval = utils.all_gather(own).cpu()
        return {"interval": interval, "epoch": dict(self.epoch), "bad_images": dict(self.bad_images)}

    def load_state_dict(self, state, rank):
        """Take on the state that a process had."""
        own = state["interval"][rank].to(self.loss.device)
        self.loss, self.skipped = own[0].to(self.loss.dtype), own[1:3].to(self.skipped.dtype)
        self.matched, self.steps = own[3].item(), int(own[4])
        self.matched_counts.copy_(own[5:])
        self.epoch, self.bad_images = dict(state["epoch"]), dict(state["bad_images"])


def count_pairs(crops):
    """Return the number of images and, for each, of pairs (teacher view, student view) in a batch of BatchesOfViews."""
    images = len(crops[0]) // 2
    views = sum(map(len, crops)) // images
    return images, 2 * (views - 1)


def batch_loss(
    student,
    teacher,
    loss_function,
    crops,
    table,
    temperature,
    device,
    accum_steps=1,
    earlier_mean_z=None,
    health=None,
):
    """Return the loss of a batch, or of one of the `accum_steps` parts of a larger one, whose losses add up to its.

    Args:
        crops, table: from BatchesOfViews.
        earlier_mean_z: list with the teacher's mean bottleneck vectors of the parts before, to which this part's are
            added. The last part moves the center.
        health: dictionary to fill with what `health.measure` finds.
    """
    images, view_pairs = count_pairs(crops)
    crops = [normalize(crop.to(device, non_blocking=True)) for crop in crops]
    teacher_row, student_row = (rows.to(device, non_blocking=True) for rows in (table.teacher_row, table.student_row))

    with torch.no_grad():
        if loss_function.loss == "cls":
            teacher_z, *teacher_prototypes = teacher(crops[:1], teacher_row)
            mean_z = teacher_z.float().mean(0, keepdim=True)  # [1, D]
        else:
            all_z, *teacher_prototypes = teacher(crops[:1])  # [2B(1+P), D]
            mean_z = all_z.float().unflatten(0, (2 * images, -1)).mean(0)  # [1+P, D]
            teacher_z = all_z[teacher_row]
    mean_zs = [] if earlier_mean_z is None else earlier_mean_z
    mean_zs.append(mean_z)
    student_z, *student_prototypes = student(crops, student_row)

    if health is not None:
        tokens = (student_z, teacher_z, student_prototypes, teacher_prototypes)
        health.update(measure(teacher, crops[0], *tokens, table, loss_function, temperature))
    is_cls = table.teacher_position[table.teacher_idx] == 0
    weight = loss_function.weights(is_cls, table.run_length, images * accum_steps * view_pairs)
    return loss_function(
        student_z,
        teacher_z,
        student_prototypes[0],
        teacher_prototypes[0],
        (table.teacher_idx, table.student_idx, weight, table.image),
        table.teacher_position,
        torch.stack(mean_zs).mean(0) if len(mean_zs) == accum_steps else None,
        temperature,
        student_scale=student_prototypes[1],
        teacher_scale=teacher_prototypes[1],
    )


class BatchesOfViews(Dataset):
    """Whole batches by their key (epoch, step, sample indices): the work of the data-loading processes.

    An item is (step, crops, table, bad): the pixels of the views, uint8, as one tensor [2B, 3, S, S] of the global and
    one [LB, 3, s, s] of the local ones, view after view; the MatchTable of their tokens; and {sample: why it cannot be
    read}. Few tensors, since each one that a process hands over holds a file descriptor.

    Args:
        dataset: gives (image uint8 [3, H, W], label).
        rule: of `match_views`; None matches CLS alone.
        skip_bad: put the next sample that can be read in the place of one that cannot.
    """

    MOST_IN_A_ROW = 100  # bad samples

    def __init__(self, dataset, multi_crop, patch_size, rule, rank, skip_bad=False):
        self.dataset, self.multi_crop, self.patch_size, self.rule = dataset, multi_crop, patch_size, rule
        self.rank, self.skip_bad = rank, skip_bad

    def __getitem__(self, key):
        bad = {}
        views = self.views(key, bad)
        grids = [(view.pixels.shape[-2] // self.patch_size, view.pixels.shape[-1] // self.patch_size) for view in views]
        boxes, flips = torch.stack([view.boxes for view in views]), torch.stack([view.flips for view in views])
        matches = match_views(boxes, flips, grids, rule=self.rule)
        _, step, indices = key
        table = batch_table(matches, len(indices), [1 + rows * columns for rows, columns in grids])
        crops = [torch.cat([view.pixels for view in part]) for part in (views[:2], views[2:]) if part]
        return step, crops, table, bad

    def views(self, key, bad=None):
        """Return the views of MultiCrop of a batch; `bad` gets the samples that cannot be read."""
        epoch, step, indices = key
        images = [self.image(i, {} if bad is None else bad) for i in indices]
        return self.multi_crop(images, indices, epoch, step, self.rank)

    def image(self, index, bad):
        """Return the image of a sample; with `skip_bad` of the first one from there on that can be read."""
        for i in range(index, index + self.MOST_IN_A_ROW):
            try:
                return self.dataset[i % len(self.dataset)][0]
            except UserError as error:
                if not self.skip_bad:
                    raise
                bad[i % len(self.dataset)] = str(error)
        raise UserError(f"{self.MOST_IN_A_ROW} images in a row cannot be read; the last: {bad[i % len(self.dataset)]}")


def compile_backbones(student, teacher, device):
    """Compile both backbones; each size of crops becomes a program of its own."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # of many kinds: a missing compiler, or one that fails
        reason = utils.first_line(error)
        raise UserError(f"--compile needs a compiler that works with torch.compile, found: {reason}") from error
    for network in (student, teacher):
        network.backbone.compile(dynamic=False)


def seed_networks(seed, step, rank, part):
    """Make stochastic depth, the one random part of the networks, a function of (seed, step, rank, part)."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank, part)).generate_state(1, np.uint64)[0]))


def build_optimizer(name, network):
    """Return the optimizer, with weight decay on all but biases and 1-d parameters. Each step sets lr and decay."""
    decayed, plain = [], []
    for parameter_name, parameter in network.named_parameters():
        if parameter.requires_grad:
            (plain if parameter_name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    groups = [{"params": decayed, "decay": True}, {"params": plain, "decay": False, "weight_decay": 0.0}]
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    # With these GradScaler waits for the device in every step, to know whether to leave it out: LARS has no fused form,
    # and SGD's does not bear prototypes that get their first gradient after the other parameters.
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0, momentum=0.9)
    return Lars(groups, momentum=0.9)


def clip_each_gradient(parameters, max_norm):
    """Scale the gradient of each parameter by itself down to `max_norm`, as DINO does; 0 leaves them.

    Returns:
        the norms before, [number of gradients]
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if max_norm:
        torch._foreach_mul_(gradients, list((max_norm / (norms + 1e-6)).clamp(max=1.0)))
    return norms


def open_output(output_dir, args):
    """Make the output folder and return what `checkpoints.load_latest` finds in it.

    Raises:
        UserError: the folder cannot be written, or holds a run with other arguments.
    """
    try:
        utils.make_writable(output_dir)
    except OSError as error:
        raise UserError(f"cannot write to --output_dir {output_dir}: {error.strerror}") from error
    checkpoint, found = checkpoints.load_latest(output_dir / "checkpoint.pth")
    earlier = output_dir / "args.json"
    if checkpoint:
        parts = "student teacher optimizer loss scaler meters epoch step batch_size images args".split()
        if not set(parts) <= set(checkpoint):
            raise UserError(f"{found} was not written by this version of main_lgssl.py: give another --output_dir")
        checkpoints.refuse_other_run(checkpoint["args"], args, MAY_CHANGE, found)
    elif earlier.exists():
        try:
            earlier_args = dict(json.loads(earlier.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"cannot read {earlier}: remove it, or give another --output_dir") from error
        checkpoints.refuse_other_run(earlier_args, args, MAY_CHANGE, earlier)
    elif (output_dir / "log.txt").exists() or (output_dir / "steps.jsonl").exists():
        raise UserError(f"{output_dir} holds logs but no run: move them, or give another --output_dir")
    return checkpoint, found


def restore(checkpoint, found, saved, meters, batch_size, images, rank, world_size):
    """Give the parts of a run the state of a checkpoint, and return the step from which it goes on.

    Args:
        found: the checkpoint's file, for messages.
        saved: {name: part with a state}.
        meters: Meters.
        batch_size, images: total batch, and number and fingerprint of the images, which have to be the checkpoint's.

    Raises:
        UserError: it was trained otherwise, does not fit, or holds weights that are not finite.
    """
    if checkpoint["batch_size"] != batch_size:
        raise UserError(
            f"{found} was trained with {checkpoint['batch_size']} images a step, found {batch_size} on {world_size} "
            "processes: start as many processes as before"
        )
    if checkpoint["images"] != images:
        raise UserError(
            f"{found} was trained on {checkpoint['images'][0]} images, found {images[0]}, or of other names: give the "
            "same images, or another --output_dir"
        )
    try:
        for name, part in saved.items():
            part.load_state_dict(checkpoint[name])
        start_step = int(checkpoint["step"])
        meters.load_state_dict(checkpoint["meters"], rank)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = utils.first_line(error)
        raise UserError(f"{found} does not fit this run: {reason}; give another --output_dir") from error
    weights = [value for name in ("student", "teacher", "loss") for value in saved[name].state_dict().values()]
    if not all(value.isfinite().all() for value in weights):
        raise UserError(f"{found} holds weights that are not finite: remove it, the one before is used")
    return start_step


def fingerprint(dataset):
    """Return a hash of the names below its folder of a data set's images; of a data set without files, of nothing."""
    names = [path.removeprefix(str(dataset.root)) for path in getattr(dataset, "paths", [])]
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()


def refuse_different_starts(step, device):
    """Raise UserError where the processes go on from different steps."""
    steps = sorted(set(utils.all_gather(torch.tensor(step, device=device)).tolist()))
    if len(steps) > 1:
        found = f"the processes found checkpoints of different steps, {', '.join(map(str, steps))}"
        raise UserError(f"{found}: --output_dir has to be one folder that all machines see")


if __name__ == "__main__":
    with utils.one_line_errors():
        stopped = main()
    # torchrun would start a process again that ends with another code than 0.
    sys.exit(EXIT_CODE if stopped and "TORCHELASTIC_RUN_ID" not in os.environ else 0)
