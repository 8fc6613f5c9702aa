"""Cases of test_hostile.py: weights, checkpoints, pickles and output folders."""

import argparse
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile

import numpy as np
import torch
from hostile_case import Case
from safetensors.torch import save

TRAIN = "main_lgssl.py --data_path {data} --output_dir {here}/out {tiny}"
KNN = "eval_knn.py --data_path {data} --nb_knn 2 --num_workers 0 --output_dir {here}/result --pretrained_weights "
EXPORT = "export.py --output_dir {here}/exported --pretrained_weights "
EXTRACT = "extract_features.py --data_path {flat} --output {here}/f.npz --num_workers 0 --pretrained_weights "
ATTENTION = "visualize.py attention china --image_size 32 --output {here}/a.png --pretrained_weights "
MATCHES = "visualize.py matches china --output {here}/m.png --pretrained_weights "
COPY, SAFE = "{here}/c.pth", "{here}/c.safetensors"
REFUSED = "cannot read .*: "
BROKEN = f"{REFUSED}it is damaged, incomplete or of another format"
PROJECTION, CLS = "patch_embed.proj.weight", "cls_token"


def weights(change):
    """Return a `make` that copies {weights} to {here}/c.pth with changed contents."""

    def make(here, places):
        contents = torch.load(places["weights"])
        changed = change(contents)
        torch.save(contents if changed is None else changed, here / "c.pth")

    return make


def arguments(**values):
    """Return a `make` of weights that record other arguments."""
    return weights(lambda contents: contents["args"].update(values))


def tensors(**values):
    """Return a `make` of weights, some of them replaced; a function gets the original."""

    def change(contents):
        for name, value in values.items():
            key = "backbone." + name.replace("__", ".")
            contents["teacher"][key] = value(contents["teacher"][key]) if callable(value) else value

    return weights(change)


def archive(edit):
    """Return a `make` of weights with changed records: edit(name, bytes) -> bytes."""

    def make(here, places):
        with zipfile.ZipFile(places["weights"]) as old, zipfile.ZipFile(here / "c.pth", "w") as new:
            for name in old.namelist():
                new.writestr(name, edit(name, old.read(name)))

    return make


def raw(contents, name="c.pth"):
    """Return a `make` that writes bytes to a file."""
    return lambda here, places: (here / name).write_bytes(contents)


def safetensors(header, body=b""):
    """Return a `make` of a .safetensors file with this header, a dictionary or bytes."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return raw(struct.pack("<Q", len(header)) + header + body, "c.safetensors")


def run(*changes, **values):
    """Return a `make` that copies {run} to {here}/out, with a changed checkpoint, and then calls function(folder)s."""

    def make(here, places):
        folder = here / "out"
        shutil.copytree(places["run"], folder)
        if values:
            checkpoint = torch.load(folder / "checkpoint.pth")
            for name, value in values.items():
                checkpoint[name] = value(checkpoint[name]) if callable(value) else value
            torch.save(checkpoint, folder / "checkpoint.pth")
        for change in changes:
            change(folder)

    return make


def replaced(*keys, value):
    """Return a function that replaces an entry of nested dictionaries and lists."""

    def change(state):
        *path, last = keys
        inner = state
        for key in path:
            inner = inner[key]
        inner[last] = value(inner[last]) if callable(value) else value
        return state

    return change


def folder(name):
    """Return a function that puts a folder in the place of a file."""

    def change(out):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        (out / name).unlink(missing_ok=True)
        (out / name).mkdir(parents=True)

    return change


def write(name, text):
    """Return a function that writes a file, or puts one in the place of a folder."""

    def change(out):
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


def remove(*names):
    return lambda out: [(out / name).unlink() for name in names]


def fresh(*changes):
    """Return a `make` of an output folder without a run."""

    def make(here, places):
        (here / "out").mkdir()
        for change in changes:
            change(here / "out")

    return make


def nested(depth=60):
    """Return lists that contain one list twice: 2^depth values in a few hundred bytes."""
    value = ["x"]
    for _ in range(depth):
        value = [value, value]
    return value


def deep(depth=300):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def holds_lock(out):
    """Start a process that locks the folder for some seconds."""
    code = (
        "import fcntl, os, sys, time; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX);"
        "file.write('process 7 on elsewhere'); file.flush(); print('ready', flush=True); time.sleep(15)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(out / ".lock")], stdout=subprocess.PIPE)
    process.stdout.readline()


class Executes:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def saved(contents, **options):
    buffer = io.BytesIO()
    torch.save(contents, buffer, **options)
    return buffer.getvalue()


def quantized(value):
    return torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)


def expanded(*shape):
    return torch.zeros(1).expand(*shape)


ZEROS = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
FLAT = torch.zeros(1, 17, 96)

# Arguments that a file records: (name, values, expected)
SIDES = ["abc", [8], 8.0, -8, 0, True, None, {}, 10**7, float("nan")]
ARGUMENTS = [("patch_size", value, r"records patch_size .*, expected a whole number in \[1, 8192\]") for value in SIDES]
ARGUMENTS += [
    ("global_crops_size", value, r"records global_crops_size .*, expected a whole number in \[1, 8192\]")
    for value in ("32", 10**7, -1, None)
]
ARGUMENTS += [("arch", value, "records arch .*, expected the name of an architecture") for value in (5, None, ["vit"])]
ARGUMENTS += [
    ("arch", "resnet50", "no architecture resnet50"),
    ("arch", "", None),
    ("arch", "vit_tiny", "does not fit vit_tiny with patch size 8: "),
    ("patch_size", 16, r"patch_embed.proj.weight is \[96, 3, 8, 8\], expected \[96, 3, 16, 16\]"),
    ("patch_size", 8192, r"patch_embed.proj.weight is \[96, 3, 8, 8\], expected \[96, 3, 8192, 8192\]"),
    ("out_dim", 10**12, None),
    ("out_dim", 10**500, "records the argument .*, expected plain numbers and texts"),
    ("lr", float("inf"), None),
    ("note", "x" * 10**6, None),
    ("note", nested(), "records arguments of over 10000 values"),
    ("note", deep(), "records arguments of over 10000 values or 20 levels"),
    ("note", torch.zeros(3), "records the argument tensor.*, expected plain numbers and texts"),
    ("note", {1: 2}, "records the argument {1: 2}, expected plain numbers and texts"),
    ("note", b"bytes", "records the argument .*, expected plain numbers and texts"),
]
VIEWS = [
    ("local_crops_size", "16", "records local_crops_size '16', expected a whole number"),
    ("global_crops_size", 36, "global_crops_size 36 is not a multiple of --patch_size 8"),
    ("global_crops_scale", 0.4, "records global_crops_scale 0.4, expected two fractions"),
    ("global_crops_scale", [0.4], "records global_crops_scale .*, expected two fractions"),
    ("global_crops_scale", [1.0, 0.4], "records global_crops_scale .*, expected two fractions, the smaller first"),
    ("local_crops_scale", ["a", "b"], "records local_crops_scale .*, expected two fractions"),
    ("local_crops_scale", [0.1, 7], "records local_crops_scale .*, expected two fractions"),
    ("local_crops_scale", [0, 0], "local_crops_scale 0 0: expected two positive fractions"),
    ("flip_prob", "often", "records flip_prob 'often', expected a fraction"),
    ("flip_prob", 2, "records flip_prob 2, expected a fraction"),
]
COMMANDS = {"k-NN": KNN, "export": EXPORT, "extract": EXTRACT, "attention": ATTENTION}


def argument_cases(table, commands):
    for i, (name, value, expected) in enumerate(table):
        kind, words = list(commands.items())[i % len(commands)]
        outcome = {"expected": expected} if expected else {"expected": ".", "code": 0}
        title = (
            f"{kind}, weights that record {name} {str(value)[:12] if name != 'note' else type(value).__name__} ({i})"
        )
        yield Case(title, words + COPY, make=arguments(**{name: value}), **outcome)


# Weights: (title, make, expected)
WEIGHTS = [
    ("args a list", weights(lambda c: {**c, "args": [1]}), "records arguments of type list, expected a dictionary"),
    ("args None", weights(lambda c: {**c, "args": None}), "records arguments of type NoneType"),
    ("args a text", weights(lambda c: {**c, "args": "vit_micro"}), "records arguments of type str"),
    (
        "args a Namespace of lists in lists",
        weights(lambda c: {**c, "args": argparse.Namespace(arch="vit_micro", x=nested())}),
        "records arguments of over 10000 values",
    ),
    ("epoch -1", weights(lambda c: {**c, "epoch": -1}), r"records epoch -1, expected a whole number in \[0"),
    (
        "epoch a tensor",
        weights(lambda c: {**c, "epoch": torch.zeros(3)}),
        "expected plain numbers|records epoch tensor",
    ),
    ("batch_size a text", weights(lambda c: {**c, "batch_size": "64"}), "records batch_size '64', expected a whole"),
    (
        "int64 weights",
        tensors(cls_token=torch.zeros(1, 1, 96).long()),
        "cls_token is torch.int64, expected torch.float32",
    ),
    ("complex weights", tensors(cls_token=FLAT[:, :1] + 0j), "cls_token is torch.complex64, expected torch.float32"),
    ("bool weights", tensors(cls_token=FLAT[:, :1] > 0), "cls_token is torch.bool, expected torch.float32"),
    ("float8 weights", tensors(norm__weight=lambda t: t.to(torch.float8_e4m3fn)), "norm.weight is torch.float8_e4m3fn"),
    (
        "meta weights",
        tensors(cls_token=FLAT[:, :1].to("meta")),
        "holds a sparse, quantized or incomplete .*cls_token",
    ),
    (
        "sparse weights",
        tensors(norm__weight=lambda t: t.to_sparse()),
        "holds a sparse, quantized or incomplete float32 tensor of 96 numbers",
    ),
    (
        "compressed sparse weights",
        tensors(norm__weight=lambda t: t[None].to_sparse_csr()),
        "holds a sparse, quantized or incomplete float32 tensor of 96 numbers",
    ),
    (
        "quantized weights",
        tensors(norm__weight=quantized),
        "holds a sparse, quantized or incomplete qint8 tensor of 96 numbers",
    ),
    (
        "10^12 weights from one number",
        tensors(pos_embed=expanded(1, 10**12, 1)),
        "incomplete float32 tensor of 1000000000000 numbers",
    ),
    ("expanded weights", tensors(norm__weight=expanded(96)), "incomplete float32 tensor of 96 numbers.*norm.weight"),
    ("an expanded tensor elsewhere", weights(lambda c: {**c, "more": [expanded(10**9)]}), "incomplete .*more.0"),
    ("NaN weights", tensors(cls_token=FLAT[:, :1] * float("nan")), "holds weights that are not finite: cls_token"),
    ("weights too large for float32", tensors(cls_token=FLAT[:, :1].double() + 1e300), "not finite: cls_token"),
    ("weights without a dimension", tensors(pos_embed=torch.tensor(1.0)), r"pos_embed is \[\], expected"),
    ("a position embedding of 15 patches", tensors(pos_embed=FLAT[:, :16]), r"pos_embed is \[1, 16, 96\], expected"),
    ("an empty position embedding", tensors(pos_embed=FLAT[:, :0]), r"pos_embed is \[1, 0, 96\], expected"),
    ("oblong patches", tensors(**{"patch_embed__proj__weight": lambda t: t[..., :4]}), r"is \[96, 3, 8, 4\], expected"),
    ("grey patches", tensors(**{"patch_embed__proj__weight": lambda t: t[:, :1]}), r"is \[96, 1, 8, 8\], expected"),
    (
        "a number among the weights",
        tensors(cls_token=3),
        "holds no weights under 'teacher', expected names and tensors",
    ),
    ("no teacher", weights(lambda c: {"student": c["teacher"], "args": {}}), "has no 'teacher', found student"),
    ("a list", weights(lambda c: [c]), "holds a list, expected a dictionary of weights"),
    ("a tensor", weights(lambda c: torch.zeros(3)), "holds a Tensor, expected a dictionary of weights"),
    ("nothing", weights(lambda c: argparse.Namespace()), "holds a Namespace, expected a dictionary of weights"),
    ("code", weights(lambda c: {**c, "more": Executes()}), f"{REFUSED}it holds .*system"),
    ("a NumPy array", weights(lambda c: {**c, "more": np.zeros(3)}), f"{REFUSED}it holds numpy"),
    ("a damaged number", archive(lambda n, b: b[:-1] if "data/" in n else b), BROKEN),
    ("no pickle inside", archive(lambda n, b: b"" if n.endswith("data.pkl") else b), BROKEN),
    ("an empty file", raw(b""), BROKEN),
    ("text", raw(b"<!DOCTYPE html><html>404</html>"), BROKEN),
    ("zeros", raw(bytes(10**5)), BROKEN),
    ("an empty archive", raw(b"PK\5\6" + bytes(18)), BROKEN),
    ("a pickle of code", raw(pickle.dumps(Executes())), REFUSED),
    ("half a file", lambda here, p: (here / "c.pth").write_bytes(p["weights"].read_bytes()[:50000]), BROKEN),
    ("a folder", lambda here, p: (here / "c.pth").mkdir(), "c.pth is a folder, expected a file written by"),
    ("a pipe", lambda here, p: os.mkfifo(here / "c.pth"), "no checkpoint at .*c.pth, expected a file written by"),
    ("a link to itself", lambda here, p: (here / "c.pth").symlink_to("c.pth"), "no checkpoint at .*c.pth"),
    ("a damaged old file", raw(saved({"a": FLAT}, _use_new_zipfile_serialization=False)[:-99]), BROKEN),
]
SAFETENSORS = [
    ("an empty file", raw(b"", "c.safetensors"), "header too small"),
    ("a header of 2^63 bytes", raw(struct.pack("<Q", 2**63) + b"{}", "c.safetensors"), "header too large"),
    ("a header beyond the end", raw(struct.pack("<Q", 100) + b"{}", "c.safetensors"), "invalid header length"),
    ("a header that is no JSON", safetensors(b"{hello"), "invalid JSON in header"),
    ("a header that is a list", safetensors(b"[]"), "invalid JSON in header"),
    ("a deep header", safetensors(b'{"a":' + b"[" * 10**5), "recursion limit exceeded"),
    ("a header in Latin-1", safetensors(b'{"\xe9":1}'), "invalid UTF-8 in header"),
    ("numbers missing", safetensors({"a": ZEROS}, bytes(8)), "file not fully covered"),
    ("2^65 numbers", safetensors({"a": {**ZEROS, "shape": [2**62, 8]}}, bytes(16)), "overflow computing buffer size"),
    ("-1 numbers", safetensors({"a": {**ZEROS, "shape": [-1]}}, bytes(16)), "expected usize"),
    ("an unknown type", safetensors({"a": {**ZEROS, "dtype": "F99"}}, bytes(16)), "unknown variant `F99`"),
    ("no weights", safetensors({}), "holds no ViT: expected patch_embed.proj.weight .*, found nothing"),
    ("other weights", safetensors({"a": ZEROS}, bytes(16)), "holds no ViT: .*, found a"),
    ("a checkpoint", lambda here, p: shutil.copy(p["weights"], here / "c.safetensors"), "deserializing header"),
    (
        "int64 patches",
        raw(save({PROJECTION: torch.zeros(96, 3, 8, 8).long()}), "c.safetensors"),
        "does not fit vit_micro",
    ),
    (
        "weights of width 7",
        raw(save({PROJECTION: torch.zeros(7, 3, 8, 8)}), "c.safetensors"),
        "a ViT of width 7, expected",
    ),
]

# Checkpoints to resume from: (title, make, expected); None: the run resumes
STEP = r"was saved at step .* and epoch .*, expected a step in \[0, 3\] and its epoch"
OTHER = "belongs to a run with other arguments: "
RESUMED = [
    ("step 10^9", run(step=10**9), STEP),
    ("step -5", run(step=-5), STEP),
    ("step 2 of epoch 1", run(step=2), STEP),
    ("step 26.5", run(step=26.5), "step is 26.5, expected a whole number"),
    ("step abc", run(step="abc"), "step is 'abc', expected a whole number"),
    ("step a tensor", run(step=torch.tensor(3)), r"step is int64 \[\], expected a whole number"),
    ("step nested lists", run(step=nested()), "step is .*, expected a whole number"),
    ("epoch 7", run(epoch=7), STEP),
    ("epoch a list", run(epoch=[1]), r"epoch is \[1\], expected a whole number"),
    ("batch_size None", run(batch_size=None), "batch_size is None, expected a whole number"),
    ("another batch_size", run(batch_size=5), "has 5 images per step, found 4 on 1 processes"),
    ("images a number", run(images=12), "images is 12, expected a list"),
    ("images an empty list", run(images=[]), "images.0 is missing"),
    ("images of another kind", run(images=[12, 12]), "images.1 is 12, expected a text"),
    ("args a list", run(args=[1]), "records arguments of type list, expected a dictionary"),
    ("args nested lists", run(args=lambda a: {**a, "x": nested()}), "records arguments of over 10000 values"),
    ("args with a tensor", run(args=lambda a: {**a, "lr": torch.ones(2)}), "records the argument tensor"),
    ("args a Namespace", run(args=lambda a: argparse.Namespace(**a)), None),
    ("out_dim 10^12", run(args=replaced("out_dim", value=10**12)), f"{OTHER}--out_dim 1000000000000 there, 24 here"),
    ("arch of a million letters", run(args=replaced("arch", value="x" * 10**6)), f"{OTHER}--arch x{{80}} there"),
    ("student a list", run(student=[1]), r"student is \[1\], expected a dictionary"),
    (
        "int64 weights",
        run(student=replaced(f"backbone.{CLS}", value=FLAT[:, :1].long())),
        "is int64 .*, expected float32",
    ),
    (
        "complex weights",
        run(teacher=replaced(f"backbone.{CLS}", value=FLAT[:, :1] + 0j)),
        "is complex64 .*, expected fl",
    ),
    (
        "weights of another shape",
        run(student=replaced("head.mlp.0.bias", value=torch.zeros(5))),
        r"is float32 \[5\], exp",
    ),
    ("a weight missing", run(student=lambda s: dict(list(s.items())[1:])), "student.'backbone.cls_token' is missing"),
    ("a weight too many", run(teacher=lambda s: {**s, "x": FLAT}), "teacher.'x' is not part of it"),
    ("a weight a text", run(student=replaced(f"backbone.{CLS}", value="0")), "is '0', expected float32"),
    (
        "NaN weights",
        run(teacher=replaced(f"backbone.{CLS}", value=lambda t: t / 0)),
        "holds weights that are not finite",
    ),
    ("an infinite center", run(loss=replaced("center", value=lambda t: t + float("inf"))), "that are not finite"),
    (
        "a center of another size",
        run(loss=replaced("center", value=torch.zeros(1, 9))),
        r"loss.center is float32 \[1, 9\]",
    ),
    (
        "sparse weights",
        run(student=replaced(f"backbone.{CLS}", value=lambda t: t.to_sparse())),
        "holds a sparse, quantized or incomplete",
    ),
    (
        "meta weights",
        run(student=replaced(f"backbone.{CLS}", value=lambda t: t.to("meta"))),
        "incomplete .*: student",
    ),
    ("scale a text", run(scaler=replaced("scale", value="1")), "scaler.scale is '1', expected a number"),
    ("scale NaN", run(scaler=replaced("scale", value=float("nan"))), "that are not finite"),
    ("growth interval 10^30", run(scaler=replaced("growth_interval", value=10**30)), "does not fit: "),
    ("no scaler", run(scaler={}), "scaler.'scale' is missing"),
    ("optimizer None", run(optimizer=None), "does not fit: "),
    ("optimizer without moments", run(optimizer=replaced("state", 0, value={})), "optimizer.state.0.'step' is missing"),
    (
        "moments of another shape",
        run(optimizer=replaced("state", 0, "exp_avg", value=torch.zeros(3))),
        r"optimizer.state.0.exp_avg is float32 \[3\], expected float32 \[1, 1, 96\]",
    ),
    ("NaN moments", run(optimizer=replaced("state", 0, "exp_avg", value=lambda t: t / 0)), "that are not finite"),
    ("moments of no parameter", run(optimizer=replaced("state", value={10**6: {}})), "does not fit: "),
    ("betas a text", run(optimizer=replaced("param_groups", 0, "betas", value="x")), None),
    ("meters None", run(meters=None), "does not fit: "),
    ("meters of no process", run(meters=replaced("interval", value=torch.zeros(0, 9))), "does not fit: "),
    ("meters of another size", run(meters=replaced("interval", value=torch.zeros(1, 7))), "does not fit: "),
    ("infinite meters", run(meters=replaced("interval", value=lambda t: t + float("inf"))), "does not fit: "),
    ("means a text", run(meters=replaced("epoch", value={"loss": ("a", 1)})), "does not fit: could not convert string"),
    ("bad images a list", run(meters=replaced("bad_images", value=[1])), "does not fit: "),
    (
        "nothing but a step",
        run(lambda out: torch.save({"step": 1}, out / "checkpoint.pth")),
        "is not a checkpoint of main",
    ),
    ("a checkpoint that is a tensor", run(lambda out: torch.save(FLAT, out / "checkpoint.pth")), "holds a Tensor, exp"),
    ("an empty checkpoint", run(write("checkpoint.pth", "")), BROKEN),
]

# Output folders: (title, make, expected); None: the run resumes
ODD = [
    *(
        (f"{name} a folder", run(folder(name)), f"{name} is not a file: move it, or use another --output_dir")
        for name in (
            *("checkpoint.pth", "checkpoint_previous.pth", "checkpoint0000.pth", "checkpoint.pth.tmp"),
            *("args.json", "log.txt", "steps.jsonl", "environment.jsonl"),
        )
    ),
    ("tb a file", run(write("tb", "")), "tb is not a folder: move it"),
    ("log.txt a pipe", run(remove("log.txt"), lambda out: os.mkfifo(out / "log.txt")), "log.txt is not a file"),
    (
        "log.txt a broken link",
        run(remove("log.txt"), lambda out: (out / "log.txt").symlink_to("nowhere/x")),
        "log.txt is not a file",
    ),
    ("a folder of a user", run(folder("checkpoint_mine.pth")), None),
    ("the lock file a folder", run(folder(".lock")), None),
    ("the lock file full of noise", run(write(".lock", os.urandom(9999))), None),
    (
        "another process in it",
        run(holds_lock),
        "out is in use by another run, process 7 on elsewhere: wait until it ends",
    ),
    ("a log of noise", run(write("log.txt", os.urandom(999))), None),
    ("a log of texts as steps", run(write("steps.jsonl", '{"step": "x"}\n{"step": null}\n')), None),
    ("a log of steps without values", run(write("steps.jsonl", '{"step": 0}\n')), None),
    ("a deep log", run(write("steps.jsonl", '{"step": ' + "[" * 10**5 + "\n")), None),
    *(
        (f"args.json {title}", fresh(write("args.json", text)), expected)
        for title, text, expected in (
            ("empty", "", "cannot read .*args.json: remove it"),
            ("a number", "3", "cannot read .*args.json: remove it"),
            ("a list", "[1]", "cannot read .*args.json: remove it"),
            ("not UTF-8", b"\xff\xfe", "cannot read .*args.json: remove it"),
            ("too deep", "[" * 10**5, "cannot read .*args.json: remove it"),
            ("of another run", '{"lr": 7}', f"args.json {OTHER}.*--lr 7 there, 0.0005 here"),
            ("of other types", '{"lr": [1, {}]}', f"args.json {OTHER}.*--lr .1, .*there, 0.0005 here"),
            ("with too many values", json.dumps({"lr": [1] * 20_000}), "records arguments of over 10000 values"),
        )
    ),
    ("logs alone", fresh(write("log.txt", "{}\n")), "holds logs but no run: move them"),
]
ENDS = [
    ("the output folder a file", f"{TRAIN}", lambda here, p: (here / "out").touch(), "cannot write to --output_dir"),
    (
        "more --epochs",
        f"{TRAIN} --epochs 2",
        run(),
        "the schedules depend on --epochs, so that a run cannot be extended",
    ),
    ("fewer --epochs after a part of them", f"{TRAIN} --epochs 5", run(), "--epochs 1 there, 5 here; the schedules"),
    ("--lr 1e300", f"{TRAIN} --lr 1e300 --batch_size_per_gpu 12", None, "--lr: found '1e300'"),
    ("--weight_decay 1e300", f"{TRAIN} --weight_decay 1e300", None, "--weight_decay: found '1e300'"),
    *(
        (
            f"--{name} {value}",
            f"{TRAIN} --{name} {value}",
            None,
            rf"--{name}: found '{value}', expected a whole number in",
        )
        for name, value in {
            **dict.fromkeys(("out_dim", "head_hidden_dim", "dist_timeout"), 10**9),
            **dict.fromkeys(("global_crops_size", "local_crops_size", "patch_size", "image_size"), 10**6),
            **dict.fromkeys(("local_crops_number", "num_workers"), 10**6),
            **dict.fromkeys(("epochs", "warmup_epochs", "log_every", "freeze_last_layer"), 10**18),
        }.items()
    ),
    (
        "--batch_size_per_gpu 10^9",
        f"{TRAIN} --batch_size_per_gpu 1000000000",
        None,
        "found 12 images, fewer than one step",
    ),
    ("--accum_steps 10^9", f"{TRAIN} --accum_steps 1000000000", None, "found 12 images, fewer than one step of 4"),
    (
        "a result folder that is a file",
        KNN + "{weights}",
        lambda h, p: (h / "result").touch(),
        "cannot write to --output",
    ),
    (
        "an export that exists",
        EXPORT + "{weights}",
        lambda h, p: (h / "exported/config.json").mkdir(parents=True),
        "already",
    ),
    (
        "an export into a file",
        EXPORT + "{weights}",
        lambda h, p: (h / "exported").touch(),
        "cannot write to --output_dir",
    ),
    ("an export of 'none' of another key", EXPORT + "{weights} --checkpoint_key x", None, "has no 'x', found teacher"),
    ("weights with a long name", KNN + "{here}/" + "x" * 5000, None, "no checkpoint at"),
    ("weights in a file", KNN + "{weights}/c.pth", None, "no checkpoint at"),
    (
        "weights of another patch size",
        KNN + "{weights} --patch_size 16",
        None,
        "made with --patch_size 8, found --patch_",
    ),
    ("a whole run as weights", ATTENTION + "{run}", None, "is a folder, expected a file written by main_lgssl.py"),
    ("the log as weights", ATTENTION + "{run}/log.txt", None, BROKEN),
]


def ground_truth(contents):
    """Return a `make` of a data set of Oxford buildings whose ground truth is this pickle."""

    def make(here, places):
        (here / "roxford5k/jpg").mkdir(parents=True)
        (here / "roxford5k/gnd_roxford5k.pkl").write_bytes(contents)

    return make


LOOP = []
LOOP.append(LOOP)
RETRIEVAL = (
    "eval_image_retrieval.py --data_path {here} --dataset roxford5k --num_workers 0 --pretrained_weights {weights}"
)
PICKLES = [
    ("an empty pickle", b"", "it is damaged"),
    ("a pickle of code", pickle.dumps(Executes()), r"it holds \w+.system; expected only plain"),
    ("a pickle of nested lists", pickle.dumps({"gnd": nested()}), "it expands to more than 1000[0-9]{3} values"),
    ("a pickle of a list in itself", pickle.dumps(LOOP), "it is damaged"),
    ("a pickle with memo index 2^31", b"\x80\x02}r\xff\xff\xff\x7fX\xff\xff\xff\x7f", "it is damaged"),
    ("a pickle of a text of 2^60 letters", b"\x80\x04\x8d" + struct.pack("<Q", 2**60), "it is damaged"),
    ("a pickle of an object", pickle.dumps(argparse.Namespace()), "it holds argparse.Namespace"),
]

CASES = [
    *argument_cases(ARGUMENTS, COMMANDS),
    *argument_cases(VIEWS, {"matches": MATCHES}),
    *(
        Case(f"{kind}, weights: {title}", words + COPY, expected, make)
        for (title, make, expected), (kind, words) in zip(WEIGHTS, 99 * list(COMMANDS.items()), strict=False)
    ),
    *(
        Case(f"{kind}, .safetensors: {title}", words + SAFE, expected, make)
        for (title, make, expected), (kind, words) in zip(SAFETENSORS, 99 * list(COMMANDS.items()), strict=False)
    ),
    *(
        Case(f"resume, {title}", TRAIN, expected or "done: ", make, 2 if expected else 0)
        for title, make, expected in (*RESUMED, *ODD)
    ),
    *(Case(title, words, expected, make) for title, words, make, expected in ENDS),
    *(Case(title, RETRIEVAL, expected, ground_truth(contents)) for title, contents, expected in PICKLES),
]
