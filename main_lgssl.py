"""Pretrain a ViT by local-global matching.

    python main_lgssl.py --data_path FOLDER --output_dir OUT             one process, on a GPU where there is one
    torchrun --nproc_per_node=8 main_lgssl.py --data_path FOLDER ...     one process per GPU, or on CPU cores

`--loss cls` is DINO. A run whose output folder holds a checkpoint goes on from it.
"""

import atexit
import datetime
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from timm.optim import Lars
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import utils
from augment import MultiCrop
from losses import LOSSES, LocalGlobalLoss, teacher_temperature
from patch_matching import RULES
from support import checkpoints
from support.arguments import ArgumentParser, bool_flag, number
from support.images import DATASETS, ResizedArray, build_dataset
from support.loader import BatchSampler, ViewBatches, batches_on_device, check_batch
from support.meters import Meters, measure
from support.observe import environment, is_due, open_online_knn, training_pictures
from support.preemption import EXIT_CODE, StopRequest, ignore_signals
from support.report import WATCH_FROM, Report
from utils import UserError, clip_each_gradient, cosine_schedule, seed_networks
from vision_transformer import ARCHITECTURES, BackboneWithHead, DINOHead, Teacher, architecture

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_arguments(argv=None):
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog="@FILE reads options from a file.")
    natural, count, amount, fraction = number(int, 1), number(int, 0), number(float, 0), number(float, 0, 1)
    # fmt: off
    add = parser.add_argument_group("method").add_argument
    add("--loss", choices=LOSSES, default="mean", help="section 3.4; cls is DINO")
    add("--lambda_cls", type=fraction, default=0.5, help="λ, the weight of CLS with --loss lambda")
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
    add("--momentum_teacher", type=fraction, default=0.996, help="EMA momentum at the start; it rises to 1 on a cosine")
    add("--warmup_teacher_temp", type=number(float, 1e-6), default=0.04, help="τ_t at the start")
    add("--teacher_temp", type=number(float, 1e-6), default=0.07, help="τ_t after its warm-up")
    add("--warmup_teacher_temp_epochs", type=count, default=30, help="epochs of the warm-up of τ_t")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=natural, default=200, help="passes over the data")
    add("--batch_size_per_gpu", type=natural, default=40, help="images that a process works on at a time")
    add("--accum_steps", type=natural, default=1, help="such batches per process in a step; N of them equal one batch "
        "N times as large")
    add("--optimizer", choices=("adamw", "sgd", "lars"), default="adamw", help="lars is timm's")
    add("--lr", type=amount, default=5e-4, help="highest learning rate at a total batch of 256; scaled with the batch")
    add("--min_lr", type=amount, default=1e-6, help="learning rate at the end, not scaled")
    add("--warmup_epochs", type=count, default=10, help="epochs of linear warm-up of the learning rate")
    add("--weight_decay", type=amount, default=0.04, help="at the start")
    add("--weight_decay_end", type=amount, default=0.4, help="at the end, on a cosine")
    add("--clip_grad", type=amount, default=3.0, help="largest gradient norm of each parameter; 0 does not clip")
    add("--freeze_last_layer", type=count, default=1, help="epochs during which the prototypes stay as they are")
    add("--precision", choices=AUTOCAST, help="default: what --use_fp16 says")
    add("--use_fp16", type=bool_flag, help="true is fp16, false is fp32; default: true on a GPU")
    add("--grad_checkpointing", action="store_true", help="keep few activations and compute the others twice")
    add("--compile", action="store_true", help="compile the backbone")

    add = parser.add_argument_group("views").add_argument
    add("--image_size", type=count, help="resize images to this side first; 0 crops them as they are "
        "(--geometry image alone); default: 256, with --loss cls and --geometry image 0")
    add("--global_crops_size", type=natural, default=224, help="side of the two global views in pixels")
    add("--local_crops_size", type=natural, default=96, help="side of the local views in pixels")
    area = {"type": fraction, "nargs": 2, "help": "smallest and largest share of the image"}
    add("--global_crops_scale", default=[0.4, 1.0], **area)
    add("--local_crops_scale", default=[0.05, 0.4], **area)
    add("--local_crops_number", type=count, default=8, help="number of local views")
    add("--flip_prob", type=fraction, default=0.5, help="of a horizontal flip; 0 where mirroring changes the class")

    add = parser.add_argument_group("data and output").add_argument
    add("--dataset", choices=DATASETS, default="folder", help="where the images come from")
    add("--data_path", help="folder of images, or of CIFAR-10")
    add("--classes", help="file with the class folders to use, one a line")
    add("--download", action="store_true", help="fetch CIFAR-10 where it is missing")
    add("--on_bad_image", choices=("error", "skip"), default="error", help="an image that cannot be read ends the run, "
        "or the next one takes its place")
    add("--max_bad_images", type=fraction, default=0.01, help="largest share of such images with --on_bad_image skip")
    add("--output_dir", default=".", help="folder of checkpoints and logs")
    add("--saveckp_freq", type=count, default=20, help="epochs between two checkpoints that are kept; 0 keeps the last")
    add("--save_every_steps", type=count, default=0, help="steps between two saves within an epoch; 0 saves at its end")
    add("--keep_last", type=count, default=0, help="how many of the checkpoints of --saveckp_freq to keep; 0 is all")
    add("--log_every", type=natural, default=10, help="steps between two lines of the log")
    add("--knn_every", type=count, help="epochs between two measurements of the k-NN accuracy on a held-out part; 0 is "
        "never; default: 10 where images have labels, which nothing else uses")
    add("--image_every", type=count, default=10, help="epochs between two sets of pictures in TensorBoard; 0 is never")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of all random numbers")
    add("--num_workers", type=count, default=min(10, os.cpu_count()), help="data-loading processes per process")
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
        parser.error("--accum_steps needs --use_bn_in_head false: batch norm would see the micro-batches one by one")
    if args.geometry == "batch" and args.image_size == 0:
        parser.error("--image_size 0 needs --geometry image: crops shared by a batch need images of one size")
    return args


def main(argv=None):
    """Run to the end and return None, or until a signal stops the run early, which is saved, and return the signal."""
    atexit.register(utils.kill_workers)  # they ignore SIGTERM, so that Python would wait for them at exit
    with StopRequest() as stop:
        return pretrain(parse_arguments(argv), stop)


def pretrain(args, stop):
    """Build everything, and train step by step; `stop` is a StopRequest."""
    # What can be refused is refused before the networks are built.
    dataset, online_knn, no_knn = open_images(args)
    output_dir = Path(args.output_dir)
    checkpoint, source_path = checkpoints.open_output(output_dir, vars(args), vars(parse_arguments([])))
    timeout = datetime.timedelta(seconds=args.dist_timeout)
    rank, world_size, device = utils.init_distributed(args.dist_url, timeout)
    stop.join(timeout)
    batch_size = args.batch_size_per_gpu * args.accum_steps * world_size
    check_batch(len(dataset), args.batch_size_per_gpu, args.accum_steps, world_size)
    if args.use_bn_in_head and world_size > 1 and device.type == "cpu":
        raise UserError("--use_bn_in_head true needs a GPU for each of several processes: CPUs do not share batch norm")

    # Networks, criterion and optimizer
    student, teacher, criterion = (module.to(device) for module in build_networks(args))
    optimizer = build_optimizer(args.optimizer, student)
    # Steps with a gradient that is not finite are skipped on the device. Only fp16 is scaled.
    scaling = {} if args.precision == "fp16" else {"init_scale": 1.0, "growth_interval": 2**31 - 1}
    scaler = torch.amp.GradScaler(device.type, **scaling)
    max_matched = (max(args.global_crops_size, args.local_crops_size) // args.patch_size) ** 2
    meters = Meters(device, args.precision, max_matched, int(args.max_bad_images * len(dataset) + 1e-6))
    state = {"student": student, "teacher": teacher, "optimizer": optimizer, "loss": criterion, "scaler": scaler}
    images = [len(dataset), checkpoints.hash_of_names(dataset)]
    start_step = 0
    if checkpoint:
        start_step = checkpoints.restore(checkpoint, source_path, state, meters, batch_size, images, rank, world_size)
    del checkpoint  # as large as networks and optimizer together
    checkpoints.refuse_different_starts(start_step, device)
    ddp_student = wrap_networks(args, student, teacher, world_size, device)
    student_parameters, teacher_parameters = list(student.parameters()), list(teacher.parameters())

    # Schedules and batches
    steps_per_epoch = len(dataset) // batch_size
    total_steps, warmup_steps = args.epochs * steps_per_epoch, args.warmup_epochs * steps_per_epoch
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
        report.start(vars(args), {"step": start_step, "processes": world_size, **environment()})
        millions = sum(p.numel() for p in student.backbone.parameters()) / 1e6
        network = f"{args.arch}/{args.patch_size} ({millions:.1f} M parameters), loss {args.loss}"
        processes = f"batch {batch_size} on {world_size} x {device.type} in {args.precision}"
        resumed = f"; going on after step {start_step} of {total_steps}" if start_step else ""
        print(f"{network}, {len(dataset)} images, {processes}, {steps_per_epoch} steps an epoch{resumed}", flush=True)
        if not online_knn:
            print(f"no online k-NN: {no_knn}", flush=True)

    batches = batches_on_device(loader, device)
    interval_start, interval_steps, stopped_by = time.perf_counter(), 0, None
    for step in range(start_step, total_steps):
        epoch, ends_epoch = step // steps_per_epoch, (step + 1) % steps_per_epoch == 0
        is_report_step = ends_epoch or (step + 1) % args.log_every == 0
        scheduled = schedule(step)
        teacher_temp = scheduled["teacher_temp"]

        # Loss and gradients, summed over micro-batches
        for micro_step in range(args.accum_steps):
            batch = next(batches)  # normalised views and their matches, on the device
            seed_networks(args.seed, step, rank, micro_step)
            is_last = micro_step == args.accum_steps - 1
            with nullcontext() if is_last or world_size == 1 else ddp_student.no_sync():
                with torch.autocast(device.type, AUTOCAST[args.precision], enabled=args.precision != "fp32"):
                    with torch.no_grad():
                        teacher_out = teacher(batch.views[:1], batch.matches.teacher_row)  # both global views
                    student_out = ddp_student(batch.views, batch.matches.student_row)
                    loss = criterion(student_out, teacher_out, batch.matches, teacher_temp) / args.accum_steps
                # Multiply by NaN so that DDP's averaging makes every rank skip this step.
                scaler.scale(loss * torch.where(loss.isfinite(), 1.0, math.nan)).backward()
            meters.add(loss.detach(), batch.matches, batch.bad_images, args.accum_steps)
        if is_report_step:
            health = measure(student_out, teacher_out, batch.matches, criterion, teacher_temp)
        criterion.update_center()  # before the teacher changes

        # The student's update, and the teacher's
        for group in optimizer.param_groups:
            group["lr"] = scheduled["lr"]
            group["weight_decay"] = scheduled["wd"] if group["decay"] else 0.0
        scaler.unscale_(optimizer)
        norms = clip_each_gradient(student_parameters, args.clip_grad)
        if epoch < args.freeze_last_layer:
            for parameter in student.head.last_layer.parameters():
                parameter.grad = None
        meters.end_step(step, norms)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(teacher_parameters, student_parameters, 1 - scheduled["momentum"])
        interval_steps += 1

        if is_report_step:  # here, and where it saves, the CPU waits for the device (with AdamW)
            meters.stop_at_bad_step(student)
            values = meters.end_interval({**health, "grad_norm": norms.norm()})
            seconds = (time.perf_counter() - interval_start) / interval_steps
            if rank == 0:
                values = {"loss": values.pop("loss"), **scheduled, **values}
                report.interval(epoch, step, seconds, {**values, "images_per_s": batch_size / seconds})
            interval_start, interval_steps = time.perf_counter(), 0

        stop.check()
        if ends_epoch:
            means, matched_counts = meters.end_epoch()
            top1 = None
            if is_due(epoch, args.knn_every, args.epochs):
                top1 = online_knn(teacher.backbone.forward, device)  # uncompiled, for batches of any size
            if rank == 0:
                of_epoch = [schedule(s) for s in range(step + 1 - steps_per_epoch, step + 1)]
                means |= {name: sum(s[name] for s in of_epoch) / steps_per_epoch for name in ("lr", "wd")}
                report.epoch(epoch, step, means, top1)
                if is_due(epoch, args.image_every, args.epochs):
                    report.pictures(training_pictures(teacher.backbone, loader.dataset, (epoch, step, [0])), step)
                    report.histogram("matched_patches_per_pair", matched_counts, step)

        if ends_epoch or stop.agreed or (args.save_every_steps and (step + 1) % args.save_every_steps == 0):
            meters.stop_at_bad_step(student)
            if args.on_bad_image == "skip":
                meters.share_bad_images()
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
    if world_size > 1:
        dist.destroy_process_group()
    return stopped_by


def open_images(args):
    """Return (training images, their OnlineKNN or None, why it is None). Settles the default of --knn_every."""
    min_side = 2 * args.image_size or None  # large JPEGs are decoded smaller; pixels change by less than a level
    transform = ResizedArray(args.image_size)
    dataset = build_dataset(args.dataset, args.data_path, "train", transform, args.classes, args.download, min_side)
    online_knn, no_knn = open_online_knn(
        args.knn_every,
        dataset,
        args.dataset,
        args.data_path,
        args.classes,
        args.global_crops_size,
        args.batch_size_per_gpu,
        args.num_workers,
    )
    args.knn_every = 10 if args.knn_every is None and online_knn else args.knn_every or 0
    return dataset, online_knn, no_knn


def build_networks(args):
    """Return (student, teacher, criterion). The teacher starts as a copy of the student."""

    def backbone_and_head(drop_path_rate):
        build = ARCHITECTURES[args.arch]
        backbone = build(args.patch_size, img_size=args.global_crops_size, drop_path_rate=drop_path_rate)
        hidden = {"hidden_dim": args.head_hidden_dim}
        return backbone, DINOHead(backbone.embed_dim, args.out_dim, args.use_bn_in_head, args.norm_last_layer, **hidden)

    torch.manual_seed(args.seed)
    student = BackboneWithHead(*backbone_and_head(args.drop_path_rate))
    teacher = Teacher(*backbone_and_head(drop_path_rate=0.0), average_patches=args.loss != "cls")
    teacher.load_state_dict(student.state_dict())
    patches = (args.global_crops_size // args.patch_size) ** 2
    return student, teacher, LocalGlobalLoss(args.out_dim, patches, args.loss, args.lambda_cls, args.center)


def wrap_networks(args, student, teacher, world_size, device):
    """Apply --grad_checkpointing and --compile, and return the student as several processes train it."""
    student.backbone.set_grad_checkpointing(args.grad_checkpointing)
    if args.compile:
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
        except Exception as error:  # of many kinds: a missing compiler, or one that fails
            reason = utils.first_line(error)
            raise UserError(f"--compile needs a compiler that works with torch.compile, found: {reason}") from error
        for network in (student, teacher):
            network.backbone.compile(dynamic=False)  # each size of views becomes a program of its own
    if world_size == 1:
        return student
    if args.use_bn_in_head:
        student.head, teacher.head = map(torch.nn.SyncBatchNorm.convert_sync_batchnorm, (student.head, teacher.head))
    return DistributedDataParallel(student, device_ids=[device.index] if device.type == "cuda" else None)


def build_loader(args, dataset, steps, rank, world_size, device):
    """Return the loader of this rank's batches, for a range of steps."""
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
    batch_size, accum_steps = args.batch_size_per_gpu, args.accum_steps
    return DataLoader(
        ViewBatches(dataset, multi_crop, args.patch_size, rule, rank, skip_bad=args.on_bad_image == "skip"),
        sampler=BatchSampler(len(dataset), batch_size, steps, accum_steps, rank, world_size, args.seed),
        batch_size=None,  # a key of the sampler is a whole batch
        num_workers=args.num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
    )


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


if __name__ == "__main__":
    with utils.one_line_errors():
        stopped = main()
    # torchrun would start a process again that ends with another code than 0.
    sys.exit(EXIT_CODE if stopped and "TORCHELASTIC_RUN_ID" not in os.environ else 0)
