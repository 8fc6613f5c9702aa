"""Read mutated checkpoints, pickles, images, logs and other files. Each must be read or refused, none may execute code.

    python tests/fuzz_files.py --count 2000

A file may neither crash the process, nor take longer than ten seconds, nor raise anything but UserError, nor start a
program, nor change the weights of a checkpoint unnoticed.
"""

import argparse
import contextlib
import copy
import faulthandler
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import unittest.mock
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import eval_image_retrieval
import main_lgssl
import plot_runs
from support import steps
from support.checkpoints import open_output, refuse_diverged, restore
from support.decoding import read_image
from support.meters import Meters
from support.plain_pickle import read_plain_pickle
from support.weights import load_backbone, load_file
from utils import UserError, launched_as
from vision_transformer import vit_micro

FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect")
# Files that are text, or that a command reads as a whole
SMALL_FILES = {
    "log.txt": "".join(f'{{"epoch": {i}, "train_loss": {5.0 - i}, "knn_top1": 10.0}}\n' for i in range(4)),
    "args.json": json.dumps({"loss": "lambda", "lambda_cls": 0.5, "seed": 1, "epochs": 4, "crops": [0.4, 1.0]}),
    "environment.jsonl": '{"processes": 2, "torch": "2.14"}\n{"processes": 1}\n',
    "result": json.dumps({"knn": {"10": {"top1": 90.5}}, "args": {"seed": 0}, "images": {"train": 4}}),
    "arguments": "# a comment\n--loss lambda --lambda_cls 0.5\n--data_path 'a folder' --local_crops_scale 0.1 0.4\n",
    "environment": "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 SLURM_STEP_NUM_TASKS=2",
}
TOKENS = [
    b"cos\nsystem\n(S'true'\ntR",
    b"cbuiltins\neval\n(S'1'\ntR",
    b"\x80\x04\x8c\x02os\x8c\x06system\x93",
    b"\x00" * 64,
]


RUN = "--arch vit_micro --patch_size 8 --global_crops_size 32 --local_crops_size 16 --out_dim 8 --head_hidden_dim 8"
IMAGES = [12, "hash of names"]


class Payload:
    """Starts a program or creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


class OtherPayload(Payload):
    def __reduce__(self):
        return (eval, (f"open({self.marker!r}, 'w')",))


class Executed(BaseException):
    """A file made the process do something that reading does not need."""


class Slow(BaseException):
    """Reading took too long."""


def run_parts(optimizer):
    """Return (arguments, parts with a state, meters) of a small run after one step."""
    args = main_lgssl.parse_arguments([*RUN.split(), "--epochs", "1", "--optimizer", optimizer])
    student, teacher, criterion = main_lgssl.build_networks(args)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=2**31 - 1)
    parts = {"student": student, "teacher": teacher, "loss": criterion, "scaler": scaler}
    return args, {**parts, "optimizer": main_lgssl.build_optimizer(optimizer, student)}, Meters("cpu", "fp32", 16)


def train_step(parts):
    """Take a step with made-up gradients, as the loop of main_lgssl.py does."""
    student, optimizer, scaler = (parts[name] for name in ("student", "optimizer", "scaler"))
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    scaler.scale(sum(parameter.sum() for parameter in student.parameters() if parameter.requires_grad)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def run_checkpoint(optimizer):
    """Return the contents of a checkpoint of main_lgssl.py."""
    args, parts, meters = run_parts(optimizer)
    train_step(parts)
    contents = {name: part.state_dict() for name, part in parts.items()} | {"meters": meters.state_dict()}
    return {**contents, "step": 3, "epoch": 1, "batch_size": 4, "images": IMAGES, "args": vars(args)}


def resume(path, optimizer):
    """Resume from a checkpoint as main_lgssl.py does, and take a step."""
    args, parts, meters = run_parts(optimizer)
    checkpoint, source_path = open_output(path.parent, vars(args), vars(args))
    restore(checkpoint, source_path, parts, meters, 4, IMAGES, 3, 0, 1)
    train_step(parts)
    meters.end_epoch()
    meters.state_dict()
    refuse_diverged({"student": parts["student"]}, 0)


def odd_value(rng, value):
    """Return a value of any type and size, or for a tensor often one of another type, layout or shape."""
    nested = ["x"]
    for _ in range(rng.randrange(60)):
        nested = [nested, nested]
    plain = [
        "abc",
        [8],
        8.0,
        26.5,
        -8,
        0,
        True,
        None,
        {},
        10**9,
        10**30,
        float("nan"),
        float("-inf"),
        nested,
        "x" * 10**5,
    ]
    plain += [b"bytes", (), [1, 2], {1: 2}, {"x": None}, argparse.Namespace(x=1), torch.zeros(3), torch.tensor(3)]
    is_dense = torch.is_tensor(value) and value.device.type == "cpu" and value.layout is torch.strided
    if not is_dense or value.is_quantized or value.numel() > 10**6 or rng.random() < 0.2:
        return rng.choice(plain)
    value = value.real.float()
    types = [torch.int64, torch.bool, torch.complex64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.uint8]
    match rng.randrange(6):
        case 0:
            return value.to(rng.choice(types))
        case 1:
            return value.double() * rng.choice([1e300, float("nan"), float("inf"), -1.0, 0.0])
        case 2:
            return value.to("meta") if rng.random() < 0.5 else value.to_sparse()
        case 3:
            return torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)
        case 4:
            return torch.zeros(1).expand(value.shape if value.ndim and rng.random() < 0.5 else (10**6, 10**6))
        case _:
            return rng.choice(
                [value[None], value.flatten()[:1], value.flatten(), value[..., :0] if value.ndim else value]
            )


def odd(rng, contents):
    """Return a checkpoint in which some values are odd, missing or too many."""
    contents = copy.deepcopy(contents)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        inner, key = contents, None
        while isinstance(inner, dict | list) and inner:
            key = rng.choice(list(inner)) if isinstance(inner, dict) else rng.randrange(len(inner))
            if not isinstance(inner[key], dict | list) or not inner[key] or rng.random() < 0.1:
                break
            inner = inner[key]
        match rng.randrange(8):
            case 0:
                del inner[key]
            case 1 if isinstance(inner, dict):
                inner[rng.choice(["x", 7, "module.x"])] = odd_value(rng, inner[key])
            case _:
                inner[key] = odd_value(rng, inner[key])
        if not contents:
            break
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getvalue()


def seeds(folder):
    """Return (kind, contents) of intact files of all formats that are read."""
    state = vit_micro(8, img_size=32).state_dict()
    args = argparse.Namespace(arch="vit_micro", patch_size=8)
    files = []
    for contents in ({"teacher": state, "args": vars(args), "epoch": 3}, {"teacher": state, "args": args}, state):
        buffer = io.BytesIO()
        torch.save(contents, buffer)
        files.append(("checkpoint", buffer.getvalue()))
    buffer = io.BytesIO()
    torch.save({"teacher": state, "lr": np.float64(0.1)}, buffer, _use_new_zipfile_serialization=False)
    files.append(("old checkpoint", buffer.getvalue()))
    gnd = [{"easy": np.arange(5), "hard": [5], "junk": np.array([], np.int64), "bbx": [0.0, 1.0, 2.0, 3.0]}]
    for protocol in (0, 2, 4):
        files.append(("pickle", pickle.dumps({"imlist": ["a", "b"], "gnd": gnd}, protocol)))
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[274] = 6
    for form, options in {
        "JPEG": {"exif": exif},
        "PNG": {},
        "GIF": {"save_all": True, "append_images": [image.rotate(90)]},
        "BMP": {},
        "TIFF": {"compression": "tiff_lzw"},
        "WEBP": {},
        "PPM": {},
    }.items():
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        files.append(("image", buffer.getvalue()))
    files += [(name, text.encode()) for name, text in SMALL_FILES.items()]
    names = [f"image{i}" for i in range(6)]
    for protocol in (0, 2, 4):
        contents = pickle.dumps({"imlist": names, "qimlist": ["query"], "gnd": gnd}, protocol)
        files.append(("ground truth", contents))
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(buffer, "PNG")
    files.append(("image", buffer.getvalue()))
    return files


def mutated(rng, contents):
    """Return a damaged copy: bytes changed, removed, duplicated or inserted, or the file truncated."""
    data = bytearray(contents)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        # Headers and directories, at both ends, are hit as often as the rest.
        reach = rng.choice([64, 1024, len(data)])
        place = min(rng.randrange(reach), len(data) - 1)
        place = rng.choice([place, len(data) - 1 - place])
        match rng.randrange(6):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place] = rng.choice([0, 1, 127, 128, 255])
            case 2:
                data[place : place + 4] = rng.choice([b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x00" * 4])
            case 3:
                del data[place : place + rng.choice([1, 16, 4096])]
            case 4:
                data[place:place] = data[place : place + rng.choice([1, 16, 4096])]
            case 5:
                data[place:place] = rng.choice(TOKENS)
        if not data:
            return b""
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)


def mutated_archive(rng, contents):
    """Return a checkpoint with a damaged inner pickle and correct checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(contents)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            part = old.read(name)
            new.writestr(name, mutated(rng, part) if name.endswith("data.pkl") else part)
    return buffer.getvalue()


def hostile(rng, kind, contents, marker):
    """Return an intact file of this kind that executes code if it is read carelessly."""
    payload = rng.choice([Payload, OtherPayload])(marker)
    if kind == "pickle":
        harmless = pickle.loads(contents)
        harmless[rng.choice(["gnd", "more"])] = rng.choice([payload, [payload], {"easy": payload}])
        return pickle.dumps(rng.choice([payload, harmless]), rng.randrange(6))
    buffer = io.BytesIO()
    whole = rng.choice([payload, {"args": payload}, {"teacher": {"weight": torch.zeros(3)}, "more": [payload]}])
    torch.save(whole, buffer, _use_new_zipfile_serialization=kind == "checkpoint")
    return buffer.getvalue()


def read_small_file(kind, path):
    """Read the ground truth of a retrieval benchmark, or one of SMALL_FILES, as its users do."""
    run = path.parent / "run"
    if kind == "ground truth":
        (run / "roxford5k/jpg").mkdir(parents=True, exist_ok=True)
        for name in ("query", *(f"image{i}" for i in range(6))):
            (run / f"roxford5k/jpg/{name}.jpg").touch()
        shutil.copy(path, run / "roxford5k/gnd_roxford5k.pkl")
        eval_image_retrieval.RevisitedRetrieval(run, "roxford5k")
    elif kind == "arguments":
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            try:
                main_lgssl.parse_arguments([f"@{path}"])
            except SystemExit as error:
                raise UserError(printed.getvalue().strip() or f"exit code {error.code} without a message") from error
    elif kind == "environment":
        words = path.read_bytes().replace(b"\0", b"").split()
        environment = dict(word.split(b"=", 1) for word in words if b"=" in word[1:])
        with unittest.mock.patch.dict(os.environb, environment), contextlib.redirect_stderr(io.StringIO()):
            launched_as()
    elif kind == "result":
        steps.score("knn10", steps.Step("knn", [], path))
    else:
        run.mkdir(exist_ok=True)
        for name in ("log.txt", "args.json", "environment.jsonl"):
            (run / name).write_text(SMALL_FILES[name])
        shutil.copy(path, run / kind)
        (run / "checkpoint.pth").touch()
        steps.progress(run)
        labeled = plot_runs.settings([plot_runs.read_run(run)])
        plot_runs.last_values(labeled)


def read(kind, path, original):
    """Read a file as its users do; return "read" or "refused"."""
    try:
        if kind == "ground truth" or kind in SMALL_FILES:
            read_small_file(kind, path)
        elif kind == "image":
            read_image(path, min_side=32).resize((8, 8))
        elif kind.endswith("pickle"):
            read_plain_pickle(path)
        elif kind.startswith("run of "):
            path.replace(path.parent / "run" / "checkpoint.pth")
            resume(path.parent / "run" / "checkpoint.pth", kind.split()[-1])
        else:
            load_file(path)
            backbone, _ = load_backbone(path, "vit_micro", 8)
            # The sums of an old checkpoint, and of a re-made archive, say nothing about its weights.
            same = all(torch.equal(a, b) for a, b in zip(backbone.state_dict().values(), original, strict=True))
            if kind == "checkpoint" and not same:
                return "changed unnoticed"
    except UserError as error:
        return "refused" if len(str(error).splitlines()) == 1 else f"an error of several lines: {error}"
    return "read"


def batch(numbers, seed, files, folder):
    """Read the files with these numbers in a separate process and return its exit code."""

    def forbid(event, _):
        if event.startswith(FORBIDDEN):
            raise Executed(event)

    def too_slow(*_):
        raise Slow

    original = list(vit_micro(8, img_size=32).state_dict().values())
    signal.signal(signal.SIGALRM, too_slow)
    faulthandler.dump_traceback_later(300, exit=True)  # where Python's handler cannot run
    sys.addaudithook(forbid)
    path = folder / "file"
    (folder / "run").mkdir(exist_ok=True)
    odd_kinds = [("odd checkpoint", torch.load(io.BytesIO(files[0][1])))]
    odd_kinds += [(f"run of {name}", run_checkpoint(name)) for name in ("adamw", "sgd", "lars")]
    for number in numbers:
        rng = random.Random(f"{seed}-{number}")
        kind, contents = rng.choice(files)
        if rng.random() < 0.25:
            kind, damaged = rng.choice(odd_kinds)
            damaged = odd(rng, damaged)
        elif kind in ("checkpoint", "old checkpoint", "pickle") and rng.random() < 0.2:
            kind, damaged = f"hostile {kind}", hostile(rng, kind, contents, folder / "marker")
        elif kind == "checkpoint" and rng.random() < 0.5:
            kind, damaged = "archive", mutated_archive(rng, contents)
        else:
            damaged = mutated(rng, contents)
        path.write_bytes(damaged)
        (folder / "number").write_text(str(number))
        signal.alarm(10)
        try:
            outcome = read(kind, path, original)
            if kind.startswith("hostile") and outcome == "read":
                outcome = "read as if it were harmless"
            if (folder / "marker").exists():
                raise Executed("a file appeared")
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        signal.alarm(0)
        with (folder / "outcomes").open("a") as file:
            file.write(f"{number}\t{kind}\t{outcome}\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="number of files (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: %(default)s)")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = seeds(folder)
        for first in range(0, args.count, 100):
            numbers = range(first, min(first + 100, args.count))
            child = os.fork()
            if child == 0:
                torch.manual_seed(0)
                batch(numbers, args.seed, files, folder)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            if status:
                sys.exit(f"file {(folder / 'number').read_text()} of seed {args.seed} ended the process: {status}")
        counts, bad = {}, []
        for line in (folder / "outcomes").read_text().splitlines():
            number, kind, outcome = line.split("\t", 2)
            if outcome not in ("read", "refused"):
                bad.append(f"file {number} of seed {args.seed}, {kind}: {outcome}")
            counts[kind, outcome] = counts.get((kind, outcome), 0) + 1
        for (kind, outcome), count in sorted(counts.items()):
            print(f"{count:5} {kind}: {outcome}")
        if bad:
            sys.exit("\n".join(bad[:20]))
        print(f"all {args.count} files were read or refused")


if __name__ == "__main__":
    main()
