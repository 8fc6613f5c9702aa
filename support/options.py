"""The options of the pretraining, `main_lgssl.py`."""

import argparse
from typing import Any

import torch

from losses import LOSS_WEIGHTS
from patch_matching import RULES
from support.arguments import ArgumentParser, bool_flag, number
from support.resources import cores_of_process
from support.sources import add_source_arguments
from utils import UserError
from vision_transformer import ARCHITECTURES, MAX_SIDE, architecture

AUTOCAST = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # by --precision
natural, count, side = number(int, 1, 10**9), number(int, 0, 10**9), number(int, 1, MAX_SIDE)
amount, fraction = number(float, 0), number(float, 0, 1)


# fmt: off
def add_method_arguments(parser: ArgumentParser) -> None:
    """Add the options of loss, networks and teacher."""
    add = parser.add_argument_group("method").add_argument
    add("--loss", choices=LOSS_WEIGHTS, default="mean", help="loss (section 3.4 of the paper); cls is DINO; "
        "lambda_sum, of the authors' code and in no paper, sums over patches where lambda averages")
    add("--lambda_cls", type=fraction, default=0.5, help="λ, weight of the CLS token with --loss lambda and lambda_sum")
    add("--matching", choices=RULES, default="paper", help="paper: section 3.3; released: the same with the "
        "authors' rounding; nearest: the nearest patch")
    add("--geometry", choices=("batch", "image"), help="draw crops and flips once per batch (section 4.1.2) or per "
        "image, as DINO does. Default: batch; with --loss cls: image")
    add("--center", choices=("position", "shared"), default="position", help="one center per token position, as "
        "in the authors' code, or one for all tokens, as in Algorithm 1")

    add = parser.add_argument_group("model").add_argument
    add("--arch", type=architecture, help=f"{', '.join(ARCHITECTURES)}. Default: that of --init_weights, or vit_small")
    add("--patch_size", type=side, help="side of a patch in pixels; the sides of the views are multiples of it, except "
        "with --loss cls. Default: that of --init_weights, or 16")
    add("--out_dim", type=number(int, 2, 10**7), default=10000, help="K, number of prototypes")
    add("--norm_last_layer", type=bool_flag, default=True, help="fix the norm of the prototypes to 1")
    add("--use_bn_in_head", type=bool_flag, default=False, help="use batch norm in the head")
    add("--head_hidden_dim", type=number(int, 1, 10**5), default=2048, help="width of the hidden layers of the head")
    add("--patch_head", choices=("shared", "separate"), default="shared", help="MLP of the head for patch tokens: "
        "that of CLS, or one of their own, an option of this repository. The prototypes are shared")
    add("--drop_path_rate", type=number(float, 0, 0.99), default=0.1, help="stochastic depth rate of the student")
    add("--init_weights", metavar="FILE", help="start from the weights of a checkpoint of this repository or DINO, "
        "timm's .safetensors, or timm:NAME; see docs/warm_start.md")
    add("--checkpoint_key", default="teacher", help="network to read from FILE, teacher or student")

    add = parser.add_argument_group("teacher").add_argument
    add("--momentum_teacher", type=fraction, default=0.996, help="initial EMA momentum; increases to 1 on a cosine")
    add("--warmup_teacher_temp", type=number(float, 1e-6), default=0.04, help="initial temperature τ_t of the teacher")
    add("--teacher_temp", type=number(float, 1e-6), default=0.07, help="τ_t, temperature of the teacher after warm-up")
    add("--warmup_teacher_temp_epochs", type=count, default=30, help="epochs of linear warm-up of τ_t")


def add_optimization_arguments(parser: ArgumentParser) -> None:
    """Add the options of the optimization. A resumed run may change those that are `free`."""
    add = parser.add_argument_group("optimization").add_argument
    free = parser.free(add)
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
    free("--grad_checkpointing", action="store_true", help="recompute activations in the backward pass to save memory")
    free("--compile", type=bool_flag, nargs="?", const=True, help="compile the blocks of the ViT with torch.compile. "
        "Default: true on a GPU, false on a CPU")
    free("--cuda_graphs", type=bool_flag, default=True, help="on a GPU, start the kernels of a backbone at once, as a "
        "CUDA graph; not with --grad_checkpointing")


def add_data_arguments(parser: ArgumentParser) -> None:
    """Add the options of views, data and output. A resumed run may change those that are `free`."""
    add = parser.add_argument_group("views").add_argument
    add("--image_size", type=number(int, 0, MAX_SIDE), help="resize images to squares of this side before cropping "
        "(0: do not; needs --geometry image). Default: 256; with --loss cls --geometry image: 0")
    add("--global_crops_size", type=side, default=224, help="side of the two global views in pixels")
    add("--local_crops_size", type=side, default=96, help="side of the local views in pixels")
    area: dict[str, Any] = {"type": fraction, "nargs": 2, "metavar": ("LOW", "HIGH")}
    add("--global_crops_scale", default=[0.4, 1.0], help="area of a global view as a fraction of the image", **area)
    add("--local_crops_scale", default=[0.05, 0.4], help="area of a local view as a fraction of the image", **area)
    add("--local_crops_number", type=number(int, 0, 1000), default=8, help="number of local views")
    add("--flip_prob", type=fraction, default=0.5, help="flip probability; use 0 if mirroring changes the class")
    add("--distortion", type=fraction, default=1.0, help="strength of the photometric distortion, an option of this "
        "repository: 1 is the paper's and DINO's, 0 none")
    add("--patch_augmentation", action="store_true", help="also distort each patch of all views on its own, as in the "
        "later version of the paper (arXiv 2310.18651v5)")
    add("--distort_on", choices=("auto", "workers", "device"), default="auto", help="where views are distorted: by the "
        "data-loading workers, or on the device of the networks. auto: as in the resumed run, or the device if it is a "
        "GPU")

    add = parser.add_argument_group("data and output").add_argument
    free = parser.free(add)
    add_source_arguments(add, "folder of images, list of images (.txt, .csv, .tsv), or torchvision's root", free)
    free("--on_bad_image", choices=("error", "skip"), default="error", help="stop at an unreadable image, or skip it")
    free("--max_bad_images", type=fraction, default=0.01, help="maximum fraction of images that may be skipped")
    free("--output_dir", default=".", help="folder for checkpoints and logs")
    free("--saveckp_freq", type=count, default=20, help="keep a checkpoint every N epochs, from epoch 1 on (0: none)")
    free("--save_every_steps", type=count, default=0, help="also save every N steps (0: only after each epoch)")
    free("--keep_last", type=count, default=0, help="keep the last N checkpoints of --saveckp_freq (0: all)")
    free("--log_every", type=natural, default=10, help="log every N steps")
    free("--knn_every", type=count, help="evaluate k-NN every N epochs (0: never). Default: 10 if the images have "
        "labels. Training never uses labels")
    free("--dense_every", type=count, help="evaluate k-NN segmentation every N epochs (0: never). Default: 10 with "
        "--dense_path")
    free("--dense_path", help="folder of annotated images for it, as eval_dense.py reads it: images/SPLIT and "
        "masks/SPLIT, or VOCdevkit/VOC2012")
    free("--image_every", type=count, default=10, help="write pictures to TensorBoard every N epochs (0: never)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="seed of all random numbers")
    workers = min(16, cores_of_process())
    free("--num_workers", type=number(int, 0, 1000), default=workers, help="data-loading workers per process")
    free("--dist_url", default="env://", help="URL to set up distributed training")
    free("--dist_timeout", type=number(int, 1, 10**7), default=600, help="seconds to wait for another process")
    free("--local_rank", "--local-rank", type=int, help="ignored; taken from the environment")
# fmt: on


def argument_parser() -> ArgumentParser:
    """Return the parser of the command line. Its `may_change` names the options that a resumed run may change."""
    parser = ArgumentParser(
        description="Pretrain a ViT with the local-global loss.", epilog="@FILE reads options from a file."
    )
    add_method_arguments(parser)
    add_optimization_arguments(parser)
    add_data_arguments(parser)
    return parser


def may_change(settings: dict[str, Any]) -> set[str]:
    """Return the names of settings in which runs may differ and still count as the same run.

    These are the options marked `free`, those below if they are not asked for, and `init_hash`, which is compared
    apart.
    """
    resolved = ("precision", "arch", "patch_size", "distort_on")
    unset = {name for name in resolved if settings.get(name) in (None, "auto")}
    return {*argument_parser().may_change, "init_hash", *unset}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and check the options that depend on each other.

    With --init_weights, an architecture and a patch size that are not given stay None: the file tells them.
    """
    parser = argument_parser()
    args = parser.parse_args(argv)
    args.geometry = args.geometry or ("image" if args.loss == "cls" else "batch")
    if args.image_size is None:
        args.image_size = 0 if (args.loss, args.geometry) == ("cls", "image") else 256
    if args.precision is None and args.use_fp16 is not None:
        args.precision = "fp16" if args.use_fp16 else "fp32"
    del args.use_fp16

    if args.dense_every and args.dense_path is None:
        parser.error(f"--dense_every {args.dense_every} needs --dense_path, a folder of annotated images")
    if args.dense_every is None:
        args.dense_every = 10 if args.dense_path is not None else 0

    if args.init_weights is None:
        args.arch, args.patch_size = args.arch or "vit_small", args.patch_size or 16
    parser.check_crops(args)
    if args.use_bn_in_head and args.accum_steps > 1:
        parser.error("--accum_steps needs --use_bn_in_head false: batch norm would see one micro-batch at a time")
    if args.patch_head == "separate" and args.loss == "cls":
        parser.error("--patch_head separate needs a loss with patches, found --loss cls")
    if args.geometry == "batch" and args.image_size == 0:
        parser.error("--image_size 0 needs --geometry image: crops shared by a batch need images of one size")
    return args


def defaults_of_older_runs() -> dict[str, Any]:
    """Return the settings of a run where its record lacks them, because its version did not have the option."""
    return {**vars(parse_arguments([])), "distort_on": "workers"}


def remarks(args: argparse.Namespace) -> list[str]:
    """Return a line for each setting that may surprise: warm-ups that last to the end, and pixels without a patch."""
    lines = []
    if args.warmup_epochs >= args.epochs:
        lines.append(f"note: --warmup_epochs {args.warmup_epochs} lasts to the end of the run, --epochs {args.epochs}: "
            "the learning rate only rises")  # fmt: skip
    if args.warmup_teacher_temp_epochs > args.epochs and args.warmup_teacher_temp != args.teacher_temp:
        lines.append(f"note: --warmup_teacher_temp_epochs {args.warmup_teacher_temp_epochs} is more than --epochs "
            f"{args.epochs}: the run ends before --teacher_temp {args.teacher_temp}")  # fmt: skip
    if args.use_bn_in_head and args.loss != "cls" and args.patch_head == "shared":
        lines.append("note: with --use_bn_in_head true, the head normalizes CLS by statistics of all matched tokens, "
            "mostly patches: CLS outputs may become uniform. See --patch_head separate, docs/study.md")  # fmt: skip
    sides = [side for side in (args.global_crops_size, args.local_crops_size) if side % args.patch_size]
    if sides:
        rest = " and ".join(f"{side % args.patch_size} of {side}" for side in sides)
        lines.append(f"note: patches of side {args.patch_size} leave out the last {rest} pixels, right and bottom")
    return lines


def set_precision(precision: str | None, device: torch.device) -> str:
    """Return the precision of the run, by default that of the device, and switch TF32 on or off.

    Raises:
        UserError: the device has no TF32.
    """
    has_ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)  # bf16 and TF32
    if precision is None:
        precision = "fp32" if device.type == "cpu" else "bf16" if has_ampere else "fp16"
    if precision == "tf32" and not has_ampere:
        raise UserError("--precision tf32 needs a GPU of compute capability 8.0 or more; use fp32")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"  # of convolutions in backbones of your own
    return precision
