"""The table of test_hostile.py: one case for each kind of mistake and each place that checks it.

In the words of a case, {here} is an empty folder, {data} a folder with train and val of two classes, {flat} a folder of
images without classes, {weights} a checkpoint of a backbone, {run} the folder of a finished run, and {tiny} the options
of a run that takes a second. If an option occurs several times, the last one wins.
"""

import io
import itertools
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save


class Case(NamedTuple):
    """A command with wrong or hostile input, and how it ends.

    Attributes:
        name: a unique name.
        words: script and options.
        expected: regular expression, found in the error line; with code 0, in the output.
        make: function of {here} and of the other places as a dictionary, which makes the input.
        code: exit code; None if a result and an error line are both right.
        env: environment variables.
    """

    name: str
    words: str
    expected: str
    make: Callable = lambda here, places: None
    code: int | None = 2
    env: dict | None = None


DATA = "--data_path {here}/data"
MODEL = "--pretrained_weights {weights} --num_workers 0"
TRAIN = f"main_lgssl.py {DATA} --output_dir {{here}}/out {{tiny}}"
KNN = f"eval_knn.py {DATA} --nb_knn 1 --output_dir {{here}}/out {MODEL}"
LINEAR = f"eval_linear.py {DATA} --epochs 1 --n_last_blocks 1 --output_dir {{here}}/out {MODEL}"
COPIES = f"eval_copy_detection.py {DATA} --imsize 32 --output_dir {{here}}/out {MODEL}"
RETRIEVAL = f"eval_image_retrieval.py {DATA} --dataset roxford5k --imsize 32 --output_dir {{here}}/out {MODEL}"
DENSE = f"eval_dense.py knn-segmentation {DATA} --crop_size 32 --output_dir {{here}}/out {MODEL}"
EXTRACT = f"extract_features.py {DATA} --output {{here}}/f.npz {MODEL}"
EXPORT = "export.py --output_dir {here}/exported --pretrained_weights"
GOOD_TRAIN, GOOD_KNN, GOOD_LINEAR = (f"{words} --data_path {{data}}" for words in (TRAIN, KNN, LINEAR))
FIGURE = "--output {here}/out.png --pretrained_weights {weights}"
MATCHES = "visualize.py matches china --output {here}/out.png"
ATTENTION = f"visualize.py attention china --image_size 32 {FIGURE}"
FEATURES = f"visualize.py features {{here}}/data --image_size 32 {FIGURE}"
MAP = f"visualize.py map {DATA} --crop_size 16 --num_workers 0 {FIGURE}"
NEIGHBOURS = f"visualize.py neighbours {{flat}}/china0.jpg {{here}}/data --num_workers 0 {FIGURE}"
PLOT = "plot_runs.py {here}/out --output {here}/out.png"
JOB = "run_with_submitit.py --gpus_per_node 0 --output_dir {here}/out"
LONG = "n" * 5000


def image(form="PNG", size=(40, 40), pixels=None):
    """Return the contents of an image file, by default of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise if pixels is None else pixels).save(buffer, form)
    return buffer.getvalue()


def png_header(side):
    """Return a PNG whose header claims side × side pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return image()[:12] + header + struct.pack(">I", zlib.crc32(header)) + image()[33:]


def saved(contents):
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getvalue()


def link(target):
    return lambda path: os.symlink(target, path)


def renamed(images, old, new):
    """Return {name: contents} with another name of a folder; without the folder if it is None."""
    kept = {name: contents for name, contents in images.items() if new or old not in name.split("/")}
    return {"/".join(new if part == old else part for part in name.split("/")): kept[name] for name in kept}


def data(*parts, **images):
    """Return a `make` that writes {name: contents} below {here}/data.

    Contents are text, bytes, or a function of the path. The names among `images` lack their suffix .png.
    """
    contents = {name: value for part in parts for name, value in part.items()}
    contents |= {f"{name}.png": value for name, value in images.items()}

    def make(here, places):
        for name, value in contents.items():
            path = os.path.join(os.fsencode(here), b"data", os.fsencode(name))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if callable(value):
                value(path)
            else:
                with open(path, "wb") as file:
                    file.write(value.encode() if isinstance(value, str) else value)

    return make


def written(name, contents):
    """Return a `make` that writes a file, a folder or a pipe below {here}."""
    return data({f"../{name}": contents})


PNG, JPEG = image(), image("JPEG")
FLAT = {f"{i}.png": PNG for i in range(4)}
CLASSES = {f"{name}/{i}.png": PNG for name in "ab" for i in range(4)}
BOTH = {f"{split}/{name}": contents for split in ("train", "val") for name, contents in CLASSES.items()}
COPYDAYS = {f"{kind}/2{i:03}0{kind == 'strong':d}.jpg": JPEG for kind in ("original", "strong") for i in range(3)}
RAMP = np.linspace(0, 1, 1600, dtype=np.float32).reshape(40, 40)
HOLES = np.where(RAMP == 0, np.float32("nan"), RAMP)
LOOPS = {"a/x": link(".."), "b/x": link("../a"), "b/y": link("/")}
BAD = "cannot read image .*x.png"

IMAGES = [
    ("text is no image", EXTRACT, BAD, data(FLAT, x="not an image")),
    ("an empty file is no image", TRAIN, f"{BAD}.*--on_bad_image skip", data(FLAT, x="")),
    (
        "more bad images than allowed",
        f"{TRAIN} --on_bad_image skip",
        "1 images cannot be read.*x.png",
        data(FLAT, x=""),
    ),
    ("half a file is no image", KNN, BAD, data(BOTH, {"val/a/x.png": JPEG[:500]})),
    ("PostScript is no image", EXTRACT, BAD, data(FLAT, x=image("EPS"))),
    ("a pipe is no image", TRAIN, f"{BAD}.*not a regular file", data(FLAT, x=os.mkfifo)),
    ("a link to itself is no image", f"{LINEAR} --cache_features", BAD, data(BOTH, {"val/a/x.png": link("x.png")})),
    ("13,000×13,000 pixels", EXTRACT, f"{BAD}.*13000x13000 pixels", data(FLAT, x=png_header(13_000))),
    ("70,000×1 pixels", EXTRACT, "x.png.*70000x1 pixels", data(FLAT, x=image(size=(70_000, 1)))),
    ("70,000×1 pixels in training", TRAIN, "epoch 1/1", data(FLAT, x=image(size=(70_000, 1))), 0),
    ("70,000×1 pixels to draw", FEATURES, "patches, .*--image_size", data(x=image(size=(70_000, 1)))),
    ("8×100,000 pixels to draw", FEATURES, "patches, .*--image_size", data(x=image(size=(8, 100_000)))),
    ("floats", EXTRACT, "x.png.*--intensity_range", data(FLAT, x=image("TIFF", pixels=RAMP))),
    ("NaN", f"{EXTRACT} --intensity_range 0 1", f"{BAD}.*NaN", data(FLAT, x=image("TIFF", pixels=HOLES))),
    ("a name with a line break", EXTRACT, "cannot read image .*a.*b.png", data(FLAT, {"a\nb.png": ""})),
    ("a name that is not UTF-8", TRAIN, "cannot read image .*a.*png", data(FLAT, {"a\udcff.png": ""})),
    ("no suffix of images", EXTRACT, "no images below .*found .jp2 1, .npy 1: .*jpg", data({"a.jp2": "", "b.npy": ""})),
    ("files of other programs", EXTRACT, "of 4 images", data(FLAT, {"._0.png": "", "a/.git/x.png": ""}), 0),
    ("links that loop", EXTRACT, "of 8 images", data(CLASSES, LOOPS), 0),
]

ONE_CLASS = renamed(BOTH, "b", None)
EMPTY_VAL = {**renamed(BOTH, "val", None), "val": os.mkdir}
ALL_IN_ONE = {f"images/{i}.png": PNG for i in range(9)}
LAYOUTS = [
    ("train alone", TRAIN, "data has train, .*rename", data(renamed(BOTH, "val", None))),
    ("Train and Val", f"{TRAIN} --knn_every 1", "data has Train, .*rename", data(renamed(BOTH, "train", "Train"))),
    ("train and valid", KNN, "data has train, valid", data(renamed(BOTH, "val", "valid"))),
    ("val is a link to train", KNN, "same files", data(renamed(BOTH, "val", None), {"val": link("train")})),
    ("empty val", KNN, "no images below .*val", data(EMPTY_VAL)),
    ("images beside the classes", LINEAR, "1 of the 9 val images .* no labels", data(BOTH, {"val/x.png": PNG})),
    ("a class only in val", LINEAR, r"classes .* differ.*only in val \(c\)", data(BOTH, {"val/c/x.png": PNG})),
    ("one class", KNN, "only one class, a", data(ONE_CLASS)),
    ("online k-NN of one class", f"{TRAIN} --knn_every 1", "--knn_every 1: .*only one class", data(ALL_IN_ONE)),
    ("absent folder", KNN, "no folder .*data"),
    ("long name of a folder", f"{EXTRACT} --data_path {LONG}", "no folder n|File name too long"),
    ("weights as images", f"{TRAIN} --data_path {{weights}}", "cannot read .*weights.pth"),
    ("fewer images than a batch", TRAIN, "found 1 images.*--batch_size_per_gpu", data(x=PNG)),
    ("ImageNet-100 without its classes", f"{KNN} --dataset imagenet100", "lacks 100 of the 100 class", data(BOTH)),
    ("tars", f"{TRAIN} --dataset tar", "--dataset hf:"),
    ("no Fashion-MNIST", f"{KNN} --dataset torchvision:FashionMNIST", "data.*--download", data(FLAT)),
    (
        "a class of two spellings",
        TRAIN,
        "class \u00e9 in composed and in decomposed",
        data({"\u00e9/0.png": PNG, "e\u0301/0.png": PNG, "f/0.png": PNG}),
    ),
    ("no CIFAR-10", f"{TRAIN} --dataset cifar10", "CIFAR10", data(FLAT)),
    ("no set of torchvision", f"{KNN} --dataset torchvision:os", "torchvision:os"),
]


def listing(contents, *parts):
    """Return a `make` of {here}/list.txt, and of images of two classes by default."""
    return data(*(parts or (BOTH,)), {"../list.txt": contents})


def table(contents):
    """Return a `make` of images and of {here}/data/t.csv."""
    return data({"a.png": PNG, "b.png": PNG, "t.csv": contents})


LISTED = f"{KNN} --classes {{here}}/list.txt"
TABLE = f"{KNN} --data_path {{here}}/data/t.csv"
DISTRACTORS = f"{COPIES} --distractors_path {{here}}/list.txt"
SPLITS = {"a.png": PNG, "b.png": PNG, "train.txt": "a.png\tx\nc.png\ty", "val.txt": "b.png\tx"}
LISTS = [
    ("image as a list of classes", LISTED, "cannot read .*list.txt", listing(PNG)),
    ("empty list of classes", LISTED, "list.txt.*empty", listing(" \n")),
    ("classes beside lists of images", LISTED, "--classes has no effect", listing("a\n", SPLITS)),
    ("class that is listed twice", LISTED, "list.txt lists the class a twice", listing("a\nb\na\n")),
    ("listed class that is missing", LISTED, "lacks 1 of the 3 class.* c", listing("a\nb\nc\n")),
    ("listed class without images", LISTED, "c, .*no images", listing("a\nb\nc\n", BOTH, {"train/c": os.mkdir})),
    (
        "classes in some lines",
        KNN,
        "train.txt .* class .* for 1 of its 2",
        data(SPLITS, {"train.txt": "a.png\tx\nb.png"}),
    ),
    ("list of missing images", KNN, "train.txt lists 2 images, 1 .*missing.*c.png", data(SPLITS)),
    ("table of missing images", TABLE, "lists 2 images, 1 are missing.*a.jpg", table("image\na.jpg\nb.png")),
    ("table without images", TABLE, "no column of images: .*id.*label.*--image_column", table("id,label\n0,x\n1,y")),
    ("two columns of images", TABLE, "2 columns of images: .*--image_column", table("path,file\na.png,a.png")),
    ("column that is missing", f"{TABLE} --label_column y", "no column y: .*--label_column", table("path,x\na.png,1")),
    ("table with an open quotation mark", TABLE, "cannot read .*t.csv as a table", table('path\n"a.png')),
    ("header alone", TABLE, "t.csv: .*empty", table("path,label\n")),
    ("class in some rows", TABLE, "class .* for 1 of its 2 .*not for b.png", table("path,label\na.png,x\nb.png")),
    ("columns of a folder", f"{TRAIN} --image_column x", "--image_column has no effect .*csv", data(FLAT)),
    ("pipe as a list of images", DISTRACTORS, "list.txt.*regular file", listing(os.mkfifo, COPYDAYS)),
    ("no originals", COPIES, "no images in .*original", data(renamed(COPYDAYS, "original", None))),
    ("copy without original", COPIES, "299901.jpg has no original", data(COPYDAYS, {"strong/299901.jpg": JPEG})),
]


def nested(depth=100):
    """Return lists that contain one list twice: 2^depth values in a few hundred bytes."""
    value = ["x"]
    for _ in range(depth):
        value = [value, value]
    return value


def deep(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


class Executes:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def retrieval(images=None, gnd=None, **changed):
    """Return a `make` of roxford5k with three images; changed parts of its single query and its lists."""
    entry = {"bbx": [2.0, 3.0, 30.0, 35.0], "easy": [0], "hard": [1], "junk": []}
    contents = {"imlist": ["a", "b", "c"], "qimlist": ["q"], "gnd": [entry]}
    for name, value in changed.items():
        (entry if name in entry else contents)[name] = value
    written = {f"jpg/{name}.jpg": JPEG for name in "abcq"} | (images or {})
    written["gnd_roxford5k.pkl"] = pickle.dumps(contents) if gnd is None else gnd
    return data({f"roxford5k/{name}": value for name, value in written.items()})


LOOP = []
LOOP.append(LOOP)
TRUTH = "gnd_roxford5k.pkl"
RETRIEVALS = [
    ("no ground truth", RETRIEVAL, f"no ground truth .*{TRUTH}", data(FLAT)),
    ("ground truth of other keys", RETRIEVAL, TRUTH, retrieval(gnd=pickle.dumps({"images": []}))),
    ("ground truth that is a pipe", RETRIEVAL, TRUTH, retrieval(gnd=os.mkfifo)),
    ("ground truth that is code", RETRIEVAL, f"{TRUTH}.*system", retrieval(gnd=pickle.dumps(Executes()))),
    ("ground truth of nested lists", RETRIEVAL, TRUTH, retrieval(gnd=pickle.dumps({"gnd": nested()}))),
    ("ground truth that contains itself", RETRIEVAL, TRUTH, retrieval(gnd=pickle.dumps(LOOP))),
    ("box of NaN", RETRIEVAL, TRUTH, retrieval(bbx=[float("nan")] * 4)),
    ("huge index", RETRIEVAL, TRUTH, retrieval(easy=[10**30])),
    ("nothing relevant", RETRIEVAL, TRUTH, retrieval(easy=[], hard=[])),
    ("no queries", RETRIEVAL, TRUTH, retrieval(gnd=pickle.dumps({"imlist": ["a"], "qimlist": [], "gnd": []}))),
    ("queries without relevance", RETRIEVAL, TRUTH, retrieval(qimlist=["q", "q"])),
    ("database image that is a pipe", RETRIEVAL, "missing.*b.jpg", retrieval({"jpg/b.jpg": os.mkfifo})),
    ("database image that is thin", RETRIEVAL, "b.jpg.*--imsize", retrieval({"jpg/b.jpg": image(size=(70_000, 1))})),
]


def annotated(mask=None, size=(40, 40), val=1, **more):
    """Return a `make` of two annotated images; `mask` replaces the one for validation, `val` is a label in it."""
    masks = {split: np.zeros(size, np.uint8) for split in ("train", "val")}
    masks["train"][:5], masks["val"][:5] = 1, val
    files = {f"images/{split}/a/x.png": PNG for split in masks}
    files |= {f"masks/{split}/a/x.png": image(pixels=pixels) for split, pixels in masks.items()}
    return data(files, {"masks/val/a/x.png": mask} if mask else {}, more)


VOC = {f"VOCdevkit/VOC2012/ImageSets/Segmentation/{split}.txt": "2007_1\n" for split in ("train", "val")}
DENSES = [
    ("no annotated images", DENSE, "data lacks images/train or masks/train", data(FLAT)),
    ("mask of another size", DENSE, "masks/train/a/x.png has 30x40 pixels, its image 40x40", annotated(size=(40, 30))),
    (
        "image without a mask",
        DENSE,
        "1 of 2 files.*missing.*masks/train/y.png",
        annotated(**{"images/train/y.png": PNG}),
    ),
    ("mask in colors", DENSE, "masks/val/a/x.png: found a mask in mode RGB, expected a palette", annotated(PNG)),
    ("mask that is half a file", DENSE, "cannot read image .*masks/val/a/x.png", annotated(PNG[:500])),
    ("mask that is a pipe", DENSE, "missing.*masks/val/a/x.png", annotated(os.mkfifo)),
    ("label only in val", DENSE, "masks/val/a/x.png has the label 7: expected 0 to 1.*training", annotated(val=7)),
    (
        "label beyond the names",
        DENSE,
        "x.png has the label 1: expected 0 to 0.*classes.txt",
        annotated(**{"classes.txt": "a"}),
    ),
    (
        "masks of one class",
        DENSE,
        "train masks .* have only one class, 0: expected two",
        annotated(**{"masks/train/a/x.png": image(pixels=np.zeros((40, 40), "u1"))}),
    ),
    (
        "masks that ignore all",
        DENSE,
        "no val image .*annotated.* 255",
        annotated(image(pixels=np.full((40, 40), 255, "u1"))),
    ),
    ("VOC without images", DENSE, "1 of 1 files.*missing.*2007_1.jpg", data(VOC)),
    ("parts of patches", f"{DENSE} --crop_size 35", "--crop_size 35 .*patch of 8; the nearest is 32", annotated()),
    ("more neighbours than patches", DENSE, "--nb_knn 30 is more than the 16 patches", annotated()),
    ("more annotated images than there are", f"{DENSE} --train_images 2", "--train_images 2 .* 1 annot", annotated()),
    ("no protocol of this name", "eval_dense.py knn", "invalid choice: 'knn'"),
    ("examples as JPEG", f"{DENSE} --figure {{here}}/a.jpg", "a.jpg.*png", annotated()),
    (
        "layer that diverges",
        f"{DENSE} --lr 1e9 --epochs 9".replace("knn-", "linear-"),
        "loss of the linear layer is .*--lr",
        annotated(),
    ),
]


# Options of the pretraining
OPTIONS = [
    ("unknown option", "--lrr 1", "unknown option --lrr.*--lr"),
    ("no epochs", "--epochs 0", "--epochs: found '0', expected a whole number"),
    ("5,000 digits", f"--epochs {'9' * 5000}", "--epochs: .*expected a whole number"),
    ("lr nan", "--lr nan", "--lr: found 'nan', expected a number"),
    ("more prototypes than memory", "--out_dim 2000000000", "--out_dim: found"),
    ("unknown loss with a control character", "--loss a\vb", "--loss: .*mean"),
    ("convolutional network", "--arch resnet50", "no architecture resnet50.*vit_small"),
    ("unknown data set", "--dataset imagenet", "--dataset: found 'imagenet', expected .*folder"),
    ("boolean perhaps", "--norm_last_layer perhaps", "--norm_last_layer: 'perhaps'"),
    ("crops that are no multiple of a patch", "--local_crops_size 18", "--local_crops_size 18 .*16"),
    ("crop scale downwards", "--global_crops_scale 1 0.5", "--global_crops_scale 1.0 0.5"),
    ("crops of images of all sizes", "--geometry batch --image_size 0", "--image_size 0 needs --geometry image"),
    ("batch norm in micro-batches", "--use_bn_in_head true --accum_steps 2", "--accum_steps needs --use_bn_in_head"),
    ("TF32 without a GPU", "--precision tf32", "--precision tf32 needs a GPU"),
    ("step larger than the data set", "--accum_steps 1000000", "found 12 images"),
    ("digits with a folder", "--dataset digits", "--data_path has no effect with --dataset digits"),
    ("range that ends before it starts", "--intensity_range 1 0", "--intensity_range 1.0 0.0"),
    ("more images than there are", "--train_images 13", "--train_images 13 .* 12 training images"),
    ("too few images to hold some out", "--tuning --train_images 4", "--tuning .*found 4"),
]
COMMANDS = [
    ("folder without a path", "main_lgssl.py --output_dir {here}/out {tiny}", "needs --data_path"),
    ("training images of val", f"{EXTRACT} --data_path {{data}} --split val --train_images 3", "--train_images .*val"),
    ("more neighbours than images", f"{GOOD_KNN} --nb_knn 13", "--nb_knn 13 is more than"),
    ("images smaller than a patch", f"{GOOD_KNN} --crop_size 1", "side 1 .*patch of 8"),
    ("no such network", f"{GOOD_KNN} --checkpoint_key momentum", "no 'momentum'.*teacher"),
    ("another architecture", f"{GOOD_KNN} --arch vit_base", "does not fit vit_base.*--arch vit_micro"),
    ("unknown model of timm", f"{GOOD_KNN} --pretrained_weights timm:vit_gigantic", "vit_gigantic"),
    ("more blocks than there are", f"{GOOD_LINEAR} --n_last_blocks 99", "--n_last_blocks 99"),
    ("fewer outputs than classes", f"{GOOD_LINEAR} --num_labels 1", "--num_labels 1"),
    ("patch tokens of pixels", f"{GOOD_LINEAR} --pretrained_weights pixels --avgpool_patchtokens true", "--avgpool"),
    ("linear weights to come", f"{GOOD_LINEAR} --evaluate", "--evaluate .*linear"),
    ("linear weights of something else", f"{GOOD_LINEAR} --evaluate {{weights}}", "weights.pth"),
    ("features in a text file", f"{EXTRACT} --data_path {{data}} --output f.txt", "f.txt.*npz"),
    ("features over a file", f"{EXTRACT} --data_path {{data}}", "f.npz already exists", written("f.npz", "precious")),
    ("export over a file", f"{EXPORT} {{weights}}", "config.json already exists", written("exported/config.json", "")),
    ("result over a folder", GOOD_KNN, "knn_folder.json", written("out/knn_folder.json", os.mkdir)),
    ("no table", "reproduce.py run", "TABLE|table"),
    ("no data for a table", "reproduce.py run table6", "--data_root"),
    ("data that are missing", "reproduce.py run table6 --data_root {here}/data --runs {here}/runs", "data.*expected"),
    ("batch in uneven parts", "reproduce.py show table6 --nproc_per_node 7", "--nproc_per_node 7"),
    ("job of uneven tasks", f"{JOB} --gpus_per_node 2 --tasks_per_node 3", "--tasks_per_node 3.* 2 GPUs"),
    ("job with a wrong option of the training", f"{JOB} --lr nan", "--lr: found 'nan'"),
]
# Argument files {here}/a.args
ARGUMENTS = [
    ("that links to nothing", "a.args: No such file", link("absent.args")),
    ("that is a pipe", "a.args: .*regular file", os.mkfifo),
    ("that includes itself", "includes itself|at most|more than", "--epochs 1 @a.args"),
    ("that includes an endless device", "/dev/zero: .*regular file", "@/dev/zero"),
    ("with an open quotation mark", "a.args: .*quotation", "--dataset 'digits"),
    ("in UTF-16", "a.args", "--epochs 1".encode("utf-16")),
    ("with a NUL", "NUL", "--output_dir a\0b"),
    ("of 2 MB", "a.args", "#" * 2_000_000),
    ("with an unknown option", "unknown option --lrr.*--lr", "--lrr 1"),
]
HTTP = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "http"}
ENVIRONMENTS = [
    ("rank without world size", "RANK=1", {"RANK": "1"}),
    ("rank above world size", "RANK=4 and WORLD_SIZE=2", {"RANK": "4", "WORLD_SIZE": "2"}),
    ("world size without rank", "WORLD_SIZE=2.*RANK", {"WORLD_SIZE": "2"}),
    ("rank of 5,000 digits", "RANK='9", {"WORLD_SIZE": "2", "RANK": "9" * 5000}),
    ("local rank in words", "LOCAL_RANK='x'", {"LOCAL_RANK": "x"}),
    ("no address", "MASTER_ADDR", {"RANK": "0", "WORLD_SIZE": "2"}),
    ("port of 70,000", "MASTER_PORT=70000", HTTP | {"MASTER_PORT": "70000"}),
]


def changed(change):
    """Return a `make` that copies {weights} to {here}/c.pth with changed contents."""

    def make(here, places):
        contents = torch.load(places["weights"])
        torch.save(change(contents) or contents, here / "c.pth")

    return make


def recorded(**values):
    """Return a `make` of weights that record other arguments."""
    return changed(lambda contents: contents["args"].update(values))


def tensor(name, value):
    """Return a `make` of weights with another tensor, the result of a function of the original."""
    name = f"backbone.{name}"
    return changed(lambda contents: contents["teacher"].update({name: value(contents["teacher"][name])}))


def halved(here, places):
    (here / "c.pth").write_bytes(places["weights"].read_bytes()[:50_000])


READERS = EXPORT, f"{GOOD_KNN} --pretrained_weights", f"{ATTENTION} --pretrained_weights"
# Weights {here}/c.pth of each of these commands in turn
WEIGHTS = [
    ("no file", "no checkpoint at .*c.pth"),
    ("a folder", "no checkpoint at .*c.pth", written("c.pth", os.mkdir)),
    ("a pipe", "c.pth", written("c.pth", os.mkfifo)),
    ("half a file", "c.pth cannot be read|cannot read .*c.pth", halved),
    ("code", "c.pth.*system", changed(lambda c: {**c, "more": Executes()})),
    ("a list", "c.pth holds a list", changed(lambda c: [c])),
    ("no teacher", "no 'teacher'.*student", changed(lambda c: {"student": c["teacher"]})),
    ("a number as weight", "c.pth", changed(lambda c: c["teacher"].update({"backbone.cls_token": 3}))),
    ("no ViT", "c.pth holds no ViT", changed(lambda c: {"teacher": {"backbone.x": torch.zeros(3)}})),
    ("NaN", "c.pth .*not finite.*cls_token", tensor("cls_token", lambda t: t / 0)),
    ("arguments in a list", "c.pth records arguments", changed(lambda c: {**c, "args": [1]})),
    ("nested arguments", "c.pth", recorded(note=nested()), None),
    ("deep arguments", "c.pth", recorded(note=deep(100)), None),
    ("a huge number", "c.pth", recorded(out_dim=10**500)),
    ("arch resnet50", "no architecture resnet50", recorded(arch="resnet50")),
    ("arch vit_tiny", "c.pth does not fit vit_tiny", recorded(arch="vit_tiny")),
    ("patch_size in words", "c.pth records patch_size 'abc'", recorded(patch_size="abc")),
    ("crops of 10^7 pixels", "c.pth records global_crops_size", recorded(global_crops_size=10**7)),
]
# Weights {here}/c.safetensors
SAFETENSORS = [
    ("a header beyond the end", "c.safetensors", struct.pack("<Q", 2**63) + b"{}"),
    ("a deep header", "c.safetensors", struct.pack("<Q", 10**5 + 5) + b'{"a":' + b"[" * 10**5),
    ("width 7", "c.safetensors .*width 7", save({"patch_embed.proj.weight": torch.zeros(7, 3, 8, 8)})),
]


def run(*changes, **values):
    """Return a `make` that copies {run} to {here}/out.

    Args:
        changes: functions of {here}/out.
        values: of the checkpoint, or functions of the former value.
    """

    def make(here, places):
        shutil.copytree(places["run"], here / "out")
        if values:
            checkpoint = torch.load(here / "out/checkpoint.pth")
            for name, value in values.items():
                checkpoint[name] = value(checkpoint[name]) if callable(value) else value
            torch.save(checkpoint, here / "out/checkpoint.pth")
        for change in changes:
            change(here / "out")

    return make


def with_file(name, contents):
    """Return a function that writes a file, a folder or a pipe in a folder, in the place of what is there."""

    def change(out):
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).unlink(missing_ok=True)
        data({f"../{name}": contents})(out, None)

    return change


def instead(name, contents):
    return run(with_file(name, contents))


def in_use(out):
    """Start a process that locks the folder for some seconds."""
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, 2); print(flush=True); time.sleep(9)"
    process = subprocess.Popen([sys.executable, "-c", code, str(out / ".lock")], stdout=subprocess.PIPE)
    process.stdout.readline()


def part(**values):
    """Return a function that replaces entries of a dictionary; `backbone_x` stands for backbone.x."""
    return lambda old: {**old, **{name.replace("backbone_", "backbone."): value for name, value in values.items()}}


CLS = torch.zeros(1, 1, 96)
# Runs in {here}/out that are started again: name, what is expected, make, more options
RESUMED = [
    ("other arguments", "checkpoint.pth .*--lr", run(), "--lr 0.1"),
    ("more epochs", "--epochs 1 there, 2 here", run(), "--epochs 2"),
    ("other images", "other .*images|trained on", run(images=lambda old: [13, *old[1:]])),
    ("another batch", "5 images per step", run(batch_size=5)),
    ("step 10^9", "checkpoint.pth .*step", run(step=10**9)),
    ("nested arguments", "", run(args=part(note=nested())), "", None),
    ("student a list", "checkpoint.pth", run(student=[1])),
    ("a weight missing", "checkpoint.pth", run(student=lambda s: {k: s[k] for k in s if "head" not in k})),
    ("NaN", "checkpoint.pth .*not finite", run(teacher=part(backbone_cls_token=CLS / 0))),
    ("optimizer None", "checkpoint.pth", run(optimizer=None)),
    ("not a run", "checkpoint.pth is not a checkpoint", instead("checkpoint.pth", saved({"step": 1}))),
    ("empty checkpoint", "checkpoint.pth", instead("checkpoint.pth", "")),
    ("folder as checkpoint", "checkpoint.pth", instead("checkpoint.pth", os.mkdir)),
    ("pipe as log", "log.txt.*file", instead("log.txt", os.mkfifo)),
    ("TensorBoard in a file", "warning: no TensorBoard", instead("tb", ""), "", 0),
    ("another process", "out is in use", run(in_use)),
    ("a deep log", "done:", instead("steps.jsonl", '{"step": ' + "[" * 10**5), "", 0),
    ("logs without a run", "holds logs but no run", written("out/log.txt", "my notes")),
    ("deep arguments", "args.json", written("out/args.json", "[" * 10**5)),
    ("arguments of another run", "args.json .*--lr 7 there", written("out/args.json", '{"lr": 7}')),
    ("a file as folder", "--output_dir .*out", written("out", "")),
    ("a folder with a long name", "File name too long", None, f"--output_dir {{here}}/{LONG}"),
]

FIGURES = [
    ("figure as JPEG", f"{ATTENTION} --output {{here}}/a.jpg", "a.jpg.*png"),
    ("figure into a folder", ATTENTION, "out.png: .*folder", written("out.png", os.mkdir)),
    ("figure with a long name", f"{ATTENTION} --output {{here}}/{LONG}.png", "File name too long"),
    ("figure over a photograph", ATTENTION, "out.png: .*not a figure", written("out.png", PNG)),
    ("figure below a file", f"{ATTENTION} --output {{weights}}/a.png", "weights.pth"),
    ("matches of a folder", "visualize.py matches {flat} --output {here}/out.png", "flat: not a regular file"),
    ("too many patches", f"{MATCHES} --patch_size 1", "--global_crops_size 224 has 50176 patches"),
    ("point outside of the query", f"{NEIGHBOURS} --patch 10 240", "--patch 10 240 .*300x240", data(x=PNG)),
    ("no image but the query", NEIGHBOURS.replace("{here}/data", "{flat}/china0.jpg"), "no image to compare"),
    ("neighbour that cannot be read", NEIGHBOURS, BAD, data(FLAT, x="bad")),
    ("map of one class", MAP, "at least two class", data(ONE_CLASS)),
    ("map of equal images", MAP, "images are the same", data(BOTH)),
    ("names with control characters", FEATURES, "drawn in", data({"a\n\x1b.png": PNG, r"$\frac{$.png": PNG}), 0),
]


def log(*epochs):
    """Return a `make` of a run whose log has these (epoch, loss)."""
    lines = [json.dumps({"epoch": epoch, "train_loss": loss}) + "\n" for epoch, loss in epochs]
    return instead("log.txt", "".join(lines))


NAN = float("nan")
RESULT = {"args": {}, "images": {}, "pretraining": {}, "knn": {"10": {"top1": NAN}}}
PLOTS = [
    ("no run", "no .*log.txt"),
    ("empty log", "no finished epoch", log()),
    ("a deep log", "no finished epoch", instead("log.txt", "[" * 10**5)),
    ("a log of NaN", "no finite number", log((0, NAN))),
    ("a log of huge numbers", "no finished epoch|no finite", log((10**400, 10**400))),
    ("NaN in one of two epochs", "drawn in", log((0, NAN), (1, 2.0)), 0),
    ("arguments in a list", "args.json", instead("args.json", "[1]")),
]


def settings(count):
    """Return a `make` of runs of one epoch with different learning rates, in {here}/data/0, 1, ..."""
    epoch = '{"epoch": 0, "train_loss": 1}\n'
    runs = {f"{i}/log.txt": epoch for i in range(count)} | {f"{i}/args.json": f'{{"lr": {i}}}' for i in range(count)}
    return data(runs)


MORE = [
    (
        "plot of another CSV",
        "plot_runs.py {here}/a.csv --output {here}/out.png",
        "a.csv",
        written("a.csv", "a,b\n1,2\n"),
    ),
    (
        "29 settings",
        PLOT.replace("{here}/out ", "".join(f"{{here}}/data/{i} " for i in range(29))),
        "29 settings",
        settings(29),
    ),
    (
        "nobody at the address",
        f"{GOOD_TRAIN} --dist_timeout 1",
        "rank 1 could not join 2 processes",
        data(),
        2,
        HTTP | {"MASTER_PORT": "9"},
    ),
    ("run and its copy", PLOT.replace("{here}/out ", "{here}/out {run} "), "one setting and seed", run()),
    (
        "result of NaN in a report",
        "reproduce.py report --runs {here}",
        r"(?s)\A(?!.*\| [\d.]+ / (?!not run))",
        written("cifar10_vit_tiny16_mean/knn_cifar10.json", json.dumps(RESULT)),
        0,
    ),
    ("tasks of srun without a launcher", GOOD_TRAIN, "srun starts 4 tasks", data(), 0, {"SLURM_STEP_NUM_TASKS": "4"}),
    ("argument file without a name", f"{GOOD_TRAIN} @", "argument file"),
    (
        "argument files that include each other 2^25 times",
        f"{GOOD_TRAIN} @{{here}}/data/0.args",
        "at most|more than",
        data({f"{i}.args": f"@{i + 1}.args @{i + 1}.args" for i in range(25)}, {"25.args": ""}),
    ),
    (
        "argument file that includes itself through a link",
        f"{GOOD_TRAIN} @{{here}}/data/a.args",
        "includes itself|at most|more than",
        data({"a.args": "@b.args", "b.args": link("a.args")}),
    ),
    (
        "argument file of an evaluation",
        f"{GOOD_KNN} @{{here}}/a.args",
        r"K=2",
        written("a.args", "--nb_knn 2 # comment"),
        0,
    ),
]

CASES = [
    *(Case(*row) for row in (*IMAGES, *LAYOUTS, *LISTS, *RETRIEVALS, *DENSES, *COMMANDS, *FIGURES, *MORE)),
    *(Case(name, f"{GOOD_TRAIN} {words}", *rest) for name, words, *rest in OPTIONS),
    *(
        Case(f"argument file {name}", f"{GOOD_TRAIN} @{{here}}/a.args", expected, written("a.args", contents))
        for name, expected, contents in ARGUMENTS
    ),
    *(Case(name, GOOD_TRAIN, expected, env=env) for name, expected, env in ENVIRONMENTS),
    *(
        Case(f"weights, {name}", f"{words} {{here}}/c.pth", *rest)
        for (name, *rest), words in zip(WEIGHTS, itertools.cycle(READERS))
    ),
    *(
        Case(f"safetensors, {name}", f"{EXPORT} {{here}}/c.safetensors", expected, written("c.safetensors", contents))
        for name, expected, contents in SAFETENSORS
    ),
    *(
        Case(f"resume, {name}", f"{GOOD_TRAIN} {' '.join(more[:1])}".strip(), expected, make or data(), *more[1:])
        for name, expected, make, *more in RESUMED
    ),
    *(Case(f"plot of {name}", PLOT, *rest) for name, *rest in PLOTS),
]
