"""Cases of test_hostile.py: figures."""

import json
import os

import numpy as np
from hostile_case import Case
from PIL import Image

MODEL = "--pretrained_weights {weights}"
OUT = "--output {here}/out.png"
SIZED = f"{MODEL} --image_size 32 {OUT}"
ATTENTION = f"visualize.py attention china {MODEL} --image_size 32"
ATTEND, FEATURES = (f"visualize.py {command} {{here}}/images {SIZED}" for command in ("attention", "features"))
LOADED = f"{MODEL} --num_workers 0 {OUT}"
MAP = f"visualize.py map --data_path {{here}} --crop_size 16 {LOADED}"
NEIGHBOURS = f"visualize.py neighbours {{flat}}/china0.jpg {{here}}/images {LOADED}"
PLAIN = f"visualize.py matches china {OUT}"
PLOT = f"plot_runs.py {{here}}/runs/0 {{here}}/runs/1 {OUT}"


def images(*names, size=(24, 16), color=None):
    """Return a function that makes images of noise, or of a color, below the folder `images`."""

    def make(here, places):
        rng = np.random.default_rng(0)
        (here / "images").mkdir()
        for name in names:
            noise = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            picture = Image.fromarray(noise) if color is None else Image.new("RGB", size, color)
            picture.save(here / "images" / name, format="PNG")

    return make


def classes(*names, count=2, color=None):
    """Return a function that makes images of classes, the same for training and validation."""

    def make(here, places):
        rng = np.random.default_rng(0)
        for name in names:
            for i in range(count):
                noise = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                picture = Image.fromarray(noise) if color is None else Image.new("RGB", (16, 16), color)
                for split in ("train", "val"):
                    (here / split / name).mkdir(parents=True, exist_ok=True)
                    picture.save(here / split / name / f"{i}.png")

    return make


def runs(*logs, names=None, **options):
    """Return a function that makes the folders of runs from the losses of their epochs.

    Args:
        logs: losses per run.
        names: of the folders; default: 0, 1, ...
        options: values of an option, one per run.
    """

    def make(here, places):
        for i, losses in enumerate(logs):
            folder = here / "runs" / (names[i] if names else str(i))
            folder.mkdir(parents=True)
            lines = [json.dumps({"epoch": epoch, "train_loss": loss}) for epoch, loss in enumerate(losses)]
            (folder / "log.txt").write_text("\n".join(lines) + "\n")
            if options:
                (folder / "args.json").write_text(json.dumps({name: values[i] for name, values in options.items()}))

    return make


def text(name, words):
    """Return a function that writes a text file."""
    return lambda here, places: (here / name).write_text(words)


def folder(name):
    return lambda here, places: (here / name).mkdir()


def photo(here, places):
    Image.new("RGB", (40, 32), "red").save(here / "photo.png")


def ten_thousand(here, places):
    images("00000.png")(here, places)
    for i in range(1, 10_000):
        (here / "images" / f"{i:05}.png").touch()  # cannot be read


def broken_neighbour(here, places):
    images("good.png")(here, places)
    (here / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")


CASES = [
    # What is written where
    Case("figure into a folder", f"{ATTENTION} --output {{here}}/a.png", "found a folder, expected a file",
        folder("a.png")),
    Case("figure as JPEG", f"{ATTENTION} --output {{here}}/a.jpg",
        r"found the suffix '\.jpg', expected \.png or \.pdf"),
    Case("figure without a suffix", f"{ATTENTION} --output {{here}}/a", "found the suffix '', expected"),
    Case("figure named like a suffix", f"{ATTENTION} --output {{here}}/.png", "found the suffix '', expected"),
    Case("figure with a path of 5000 characters", f"{ATTENTION} --output {{here}}/{'ab/' * 1666}a.png",
        "name too long"),
    Case("figure with a name of 5000 characters", f"{ATTENTION} --output {{here}}/{'a' * 5000}.png", "name too long"),
    Case("figure with the longest name", f"{ATTENTION} --output {{here}}/{'a' * 251}.png",
        "name too long; give another"),
    Case("figure below a file", f"{ATTENTION} --output {{weights}}/a.png", "cannot write to the folder of --output"),
    Case("image given after --output", f"{ATTENTION} {OUT} {{here}}/photo.png",
        r"cannot write .*photo\.png: found a file that is not a figure", photo),
    Case("figure in upper case", f"{ATTENTION} --output {{here}}/A.PNG", r"drawn in .*A\.PNG", code=0),
    Case("figures of the same name", f"{ATTENTION} {OUT} {{here}}/out.png", r"drawn in", code=0),
    # What is drawn
    Case("no command", "visualize.py", "required: COMMAND"),
    Case("unknown command", "visualize.py paint", "invalid choice: 'paint'"),
    Case("unknown photograph", f"visualize.py attention lena {SIZED}", "cannot read image lena"),
    Case("image is a text", f"visualize.py features {{here}}/a.png {SIZED}", "cannot read image", text("a.png", "hi")),
    Case("folder without images", ATTEND, "no images below", folder("images")),
    Case("image of 100000x1 pixels", ATTEND, "100000x1 pixels, smaller than a patch of 8x8",
        images("a.png", size=(100_000, 1))),
    Case("image of 8x100000 pixels", FEATURES, "a has 50000x4 patches, more than 8000, at --image_size 32",
        images("a.png", size=(8, 100_000))),
    Case("narrow image", ATTEND, "attention of 3 heads on a", images("a.png", size=(8, 1000)), code=0),
    Case("enormous --image_size", f"visualize.py attention china {MODEL} --image_size 100000000 {OUT}",
        "china has .* patches, more than 8000"),
    Case("--image_size 0", f"visualize.py attention china {MODEL} --image_size 0", "--image_size: found '0', expected"),
    Case("uniform image, attention", ATTEND, "heads on a", images("a.png", color="red"), code=0),
    Case("uniform images, features", FEATURES, "patch features of a, b",
        images("a.png", "b.png", color="white"), code=0),
    Case("three patches", FEATURES.replace("32", "8"), "found 3 patches, expected at least 4",
        images("a.png", size=(24, 8))),
    Case("--max_images 0", f"{FEATURES} --max_images 0", r"--max_images: found '0', expected .* \[1, 500\]"),
    Case("--max_images 501", f"{FEATURES} --max_images 501", r"'501', expected .* \[1, 500\]"),
    Case("images on pages", f"{ATTEND} --max_images 8", r"out\.png, .*out-2\.png",
        images(*(f"{i}.png" for i in range(8))), code=0),
    Case("10000 images", f"{ATTEND} --max_images 1", "found 10000 images, drawing the first 1",
        ten_thousand, code=0),
    Case("--threshold 60", f"{ATTENTION} --threshold 60", r"--threshold: found '60', expected a number in \[0, 1\]"),
    Case("--threshold nan", f"{ATTENTION} --threshold nan", "--threshold: found 'nan'"),
    Case("--seed of 33 bits", f"{ATTENTION} --seed 4294967296", "--seed: found '4294967296'"),
    # Names
    Case("names of 200 characters", FEATURES, "a{200}", images("a" * 200 + ".png", "b" * 200 + ".png"), code=0),
    Case("names of TeX", FEATURES, "drawn in", images("$x$.png", r"$\frac{$.png", r"\$$_^.png"), code=0),
    Case("names with control characters", ATTEND, "on a\ufffdb\ufffdc\\.",
        images("a\nb\x1bc..png"), code=0),
    Case("names that the font lacks", ATTEND, "the font lacks characters of some names",
        images("名前.png", "名.png"), code=0),
    Case("names that are not UTF-8", FEATURES, "features of \ufffd\ufffd",
        images(os.fsdecode(b"\xff\xfe.png")), code=0),
    # Matches
    Case("matches of a folder", f"visualize.py matches {{flat}} {OUT}", "is a folder, expected an image"),
    Case("enormous teacher's crop", f"{PLAIN} --global_crops_size 160000",
        "--global_crops_size 160000 has 100000000 patches, expected at most 8000: give a smaller"),
    Case("too many patches to draw", f"{PLAIN} --patch_size 1",
        "--global_crops_size 224 has 50176 patches, .* most 8000"),
    Case("too many pairs to draw", f"{PLAIN} --patch_size 2 --global_crops_size 96",
        "--local_crops_size 96 has 2304 patches, expected at most 1024"),
    Case("patch larger than a crop", f"{PLAIN} --patch_size 1000", "not a multiple of --patch_size 1000"),
    Case("--patch_size 0", f"{PLAIN} --patch_size 0", "--patch_size: found '0'"),
    Case("crops without a scale", f"{PLAIN} --global_crops_scale 0 1", "--global_crops_scale: found '0', expected"),
    Case("--pairs 0", f"{PLAIN} --pairs 0", "--pairs: found '0', expected a whole number of at least 1"),
    Case("views that do not meet", f"{PLAIN} --global_crops_scale 0.001 0.001 --local_crops_scale 0.001 0.001",
        "^0 matched patches in one pair", code=0),
    Case("views that do not meet, with weights", f"{PLAIN} --global_crops_scale 0.001 0.001 --local_crops_scale 0.001 "
        f"0.001 {MODEL}", "^0 matched patches in one pair", code=0),
    # Neighbours
    Case("--k 0", f"{NEIGHBOURS} --k 0", r"--k: found '0', expected a whole number in \[1, 500\]"),
    Case("point with one number", f"{NEIGHBOURS} --patch 10", "--patch: expected 2 arguments"),
    Case("point outside of the query", f"{NEIGHBOURS} --patch 10 240", "--patch 10 240 lies outside .* 300x240 pixels",
        images("a.png")),
    Case("no image but the query", NEIGHBOURS.replace("{here}/images", "{flat}/china0.jpg"),
        "found no image to compare"),
    Case("neighbour that cannot be read", NEIGHBOURS, r"cannot read image .*broken\.png", broken_neighbour),
    Case("equal neighbours", NEIGHBOURS, "drawn in", images("a.png", "b.png", color="white"), code=0),
    Case("narrow neighbours", NEIGHBOURS, "drawn in", images("a.png", "b.png", size=(8, 3000)), code=0),
    Case("neighbours on pages", f"{NEIGHBOURS} --k 500", r"out\.png, .*out-2\.png",
        images(*(f"{i}.png" for i in range(80)), size=(16, 32)), code=0),
    # Maps
    Case("map of one class", MAP, "expected at least two class subfolders, found one", classes("a", count=5)),
    Case("map of two images", MAP, "has 2 images, expected at least 4", classes("a", "b", count=1)),
    Case("map of equal images", MAP, "the CLS features of all 6 images are the same",
        classes("a", "b", count=3, color="red")),
    Case("map of four images", MAP, "4 images of 2 classes", classes("a", "b"), code=0),
    Case("map of 60 classes", MAP, "60 images of 60 classes",
        classes(*(f"${i}_\n{'n' * 3 * i}" for i in range(60)), count=1), code=0),
    Case("--perplexity 0", f"{MAP} --perplexity 0", "--perplexity: found '0'"),
    # Curves
    Case("29 settings", f"plot_runs.py {' '.join(f'{{here}}/runs/{i}' for i in range(29))} {OUT}",
        "found 29 settings, a figure tells at most 28 apart", runs(*[[4.0]] * 29, lr=list(range(29)))),
    Case("curves instead of a photograph", "plot_runs.py {run} --output {here}/photo.png", "is not a figure", photo),
    Case("run given twice", f"plot_runs.py {{run}} {{run}}/../run {OUT}", r"loss mean +1 ", code=0),
    Case("log without values", PLOT, "log.txt has no finite number of loss", runs([None], [1e308])),
    Case("losses near overflow", PLOT, "drawn in", runs([1e37, 2e38, 1e308], [1e38, -1e38, 1e-38]), code=0),
    Case("losses near overflow, averaged", PLOT, "drawn in",
        runs([2e38, 2e38, 1e300], [-2e38, 1e-38], seed=[0, 1], loss=["mean", "mean"]), code=0),
    Case("losses of zero", PLOT, "0.000", runs([0.0], [0.0, 0.0]), code=0),
    Case("options of 5000 characters", PLOT, "a{4999}b",
        runs([3.0], [4.0], data_path=["a" * 5000, "a" * 4999 + "b"]), code=0),
    Case("options of TeX and control characters", PLOT, "lr \ufffd\\$x",
        runs([3.0], [4.0], lr=["\n$x$_^{", "\ud800\\"]), code=0),
    Case("legend of hidden names", f"plot_runs.py {{here}}/runs/_a {{here}}/runs/_b {OUT}", r"\n_a +1 .*\n_b",
        runs([3.0], [4.0], names=["_a", "_b"]), code=0),
    # The surroundings
    Case("unknown backend of matplotlib", PLAIN, "drawn in", code=0, env={"MPLBACKEND": "bogus"}, process=True),
]  # fmt: skip
