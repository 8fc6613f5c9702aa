"""Cases of test_hostile.py: images."""

import gzip
import io
import os
import pickle
import socket
import struct
import zlib

import numpy as np
from hostile_case import Case
from PIL import Image

WEIGHTS = "--pretrained_weights {weights} --num_workers 0"
DATA = "--data_path {here}/data"
KNN = f"eval_knn.py {WEIGHTS} --nb_knn 1 --output_dir {{here}}/out"
LINEAR = f"eval_linear.py {WEIGHTS} --epochs 1 --n_last_blocks 1 --output_dir {{here}}/out"
EXTRACT = f"extract_features.py {WEIGHTS} --output {{here}}/f.npz"
MAP = f"visualize.py map {WEIGHTS} --output {{here}}/map.png"
TRAIN = "main_lgssl.py --output_dir {here}/out {tiny}"
WATCHED = TRAIN + " --knn_every 1"
UNASKED = (
    "main_lgssl.py --output_dir {here}/out --arch vit_micro --patch_size 8 --image_size 40 --global_crops_size 32 "
)
UNASKED += "--local_crops_size 16 --out_dim 24 --local_crops_number 1 --head_hidden_dim 32 --num_workers 0 --epochs 1 "
UNASKED += "--warmup_epochs 0 --batch_size_per_gpu 4 --image_every 0"  # like {tiny}, without --knn_every
COPIES = f"eval_copy_detection.py {WEIGHTS} --imsize 32 --output_dir {{here}}/out"
RETRIEVAL = f"eval_image_retrieval.py {WEIGHTS} --imsize 32 --output_dir {{here}}/out {DATA}"
BAD = "cannot read image .*x.png"
RNG = np.random.default_rng(0)


def encoded(form, mode="RGB", side=40, **options):
    """Return the contents of an image file of noise."""
    pixels = RNG.integers(0, 256, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def of_array(array, form):
    """Return the contents of an image file with these intensities."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form)
    return buffer.getvalue()


def png_header(width, height):
    """Return a PNG whose header claims many pixels, with hardly any data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def signed_tiff(values):
    """Return a TIFF of signed 16-bit integers, which Pillow reads but does not write."""
    values = np.asarray(values, "<i2")
    height, width = values.shape
    tags = [(256, 3, width), (257, 3, height), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    tags += [(278, 3, height), (279, 4, values.nbytes), (339, 3, 2)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    start = struct.pack("<2sHI", b"II", 42, 8 + values.nbytes)
    return start + values.tobytes() + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)


def write(root, files):
    """Write {name: contents} below a folder. Contents are bytes, or a function of the path."""
    for name, contents in files.items():
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if callable(contents):
            contents(path)
        else:
            with open(path, "wb") as file:
                file.write(contents)


PNG = encoded("PNG")
JPEG = encoded("JPEG")
TIFF = encoded("TIFF")
FLAT = {f"{i}.png": encoded("PNG") for i in range(4)}
BOTH = {f"{split}/{name}/{i}.png": encoded("PNG") for split in ("train", "val") for name in "ab" for i in range(4)}
CLASSES = {name.removeprefix("train/"): contents for name, contents in BOTH.items() if name.startswith("train")}
COPYDAYS = {f"{block}/2{i:03}0{block == 'strong':d}.jpg": JPEG for block in ("original", "strong") for i in range(3)}


def data(*parts, **renamed):
    """Return a function that makes {here}/data from dictionaries of files; train="Train" renames train."""

    def make(here, places):
        for part in parts:
            files = {}
            for name, contents in part.items():
                top, _, rest = name.partition("/")
                if renamed.get(top, "") is not None:
                    files[f"{renamed.get(top, top)}/{rest}" if rest else name] = contents
            write(here / "data", files)

    return make


def link(target):
    """Return a function that makes a symbolic link to a target, which may be relative."""
    return lambda path: os.symlink(target, path)


def bind(path):
    """Make a socket. Its path may be longer than a socket's name."""
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    socket.socket(socket.AF_UNIX).bind(f"/proc/self/fd/{folder}/{os.path.basename(path).decode()}")
    os.close(folder)


def halved(contents):
    """Return the first half of a file."""
    return contents[: len(contents) // 2]


# Files that cannot be read: {name of the case: (contents, what the message says)}
UNREADABLE = {
    "empty file": (b"", "cannot identify"),
    "text": (b"not an image\n", "cannot identify"),
    "web page": (b"<!DOCTYPE html><html><body>404</body></html>", "cannot identify"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "cannot identify"),
    "pdf": (b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n", "cannot identify"),
    "archive": (b"PK\x03\x04" + bytes(60), "cannot identify"),
    "gzipped png": (gzip.compress(PNG), "cannot identify"),
    "numpy array": (b"\x93NUMPY\x01\x00", "cannot identify"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "cannot identify"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "cannot identify"),
    "postscript": (encoded("EPS"), "cannot identify"),
    "icon, a format that is not read": (encoded("ICO"), "cannot identify"),
    "jpeg 2000, a format that is not read": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "cannot identify"),
    "truncated jpeg": (halved(JPEG), "truncated"),
    "truncated png": (halved(PNG), "truncated"),
    "truncated tiff": (halved(TIFF), "."),
    "truncated gif": (halved(encoded("GIF")), "truncated"),
    "truncated webp": (halved(encoded("WEBP")), "."),
    "truncated bmp": (halved(encoded("BMP")), "truncated"),
    "truncated ppm": (halved(encoded("PPM")), "."),
    "png with a damaged checksum": (PNG[:50] + b"\xff" + PNG[51:], "."),
    "png without width": (png_header(0, 10), "."),
    "png with 13000x13000 pixels": (png_header(13000, 13000), "13000x13000 pixels are more than 67108864"),
    "png with 60000x60000 pixels": (png_header(60000, 60000), "exceeds limit"),
    "ppm with a wrong header": (b"P6 40 -1 255\n" + bytes(99), "."),
    "ppm without pixels": (b"P6\n40 40\n255\n", "."),
    "tiff with a directory outside": (struct.pack("<2sHI", b"II", 42, 10**9), "."),
    "tiff whose directory is a loop": (TIFF[:4] + struct.pack("<I", 4) + TIFF[8:], "."),
    "tiff of 64-bit floats with a missing strip": (halved(of_array(np.ones((40, 40), np.float32), "TIFF")), "."),
    "pipe": (os.mkfifo, "not a regular file"),
    "socket": (bind, "not a regular file"),
    "link to a device without end": (link("/dev/zero"), "not a regular file"),
    "link to the terminal": (link("/dev/null"), "not a regular file"),
    "link to nothing": (link("absent"), "No such file"),
    "link to itself": (link("x.png"), "Too many levels"),
    "file in the way of a link": (link("0.png/y.png"), "Not a directory"),
}
SCRIPTS = [f"{EXTRACT} {DATA}", f"{TRAIN} {DATA}", f"{KNN} {DATA}", f"{LINEAR} {DATA} --cache_features"]


def unreadable():
    """Return a case per file of UNREADABLE, with the scripts in turn."""
    cases = []
    for i, (name, (contents, reason)) in enumerate(UNREADABLE.items()):
        script = SCRIPTS[i % len(SCRIPTS)]
        folder = "" if "extract" in script or "main" in script else "val/b/"
        files = BOTH if folder else FLAT
        hint = ".*--on_bad_image skip" if "main" in script else ""
        expected = f"{BAD}: .*{reason}.*{hint}"
        cases.append(Case(f"{name} is no image", script, expected, data(files, {f"{folder}x.png": contents})))
    return cases


RAMP = np.arange(1600).reshape(40, 40)
FLOATS = of_array((RAMP / 1599).astype(np.float32), "TIFF")
SIGNED = signed_tiff(RAMP * 4000 // 1599 - 1000)
WIDE_RANGE = np.array(RAMP * 40, np.uint16)
HOLES = np.array(RAMP / 1599, np.float32)
HOLES[3, 3] = np.nan
FULL = np.array(RAMP / 1599, np.float32)
FULL[0, 0] = np.inf

DECODED = {  # valid but odd files, which are read
    "bilevel": encoded("PNG", "1"),
    "palette with transparency": encoded("PNG", "P", transparency=0),
    "gray with transparency": encoded("PNG", "LA"),
    "cmyk jpeg": encoded("JPEG", "CMYK"),
    "16-bit png": of_array(WIDE_RANGE, "PNG"),
    "16-bit tiff, big-endian": of_array(WIDE_RANGE.astype(">u2"), "TIFF"),
    "animation": encoded("GIF", save_all=True, append_images=[Image.new("RGB", (40, 40))]),
    "several pages": encoded("TIFF", save_all=True, append_images=[Image.new("RGB", (40, 40))]),
    "one pixel": encoded("PNG", side=1),
    "broken exif": encoded("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x07garbage"),
    "broken color profile": encoded("JPEG", icc_profile=b"no profile" * 99),
    "compressed tiff": encoded("TIFF", compression="tiff_lzw"),
    "jpeg with garbage after its end": JPEG + b"garbage" * 99,
}


def elongated(width, height):
    """Return a PNG of this size."""
    return of_array(np.zeros((height, width), np.uint8), "PNG")


INTENSITIES = [
    Case(
        "float image",
        f"{EXTRACT} {DATA}",
        "x.tif: its values are floats; give --intensity_range LOW HIGH",
        data({"x.tif": FLOATS}),
    ),
    Case(
        "signed image",
        f"{TRAIN} {DATA}",
        "x.tif: its values are signed .* give --intensity_range LOW HIGH",
        data({**FLAT, "x.tif": SIGNED}),
    ),
    Case(
        "signed image in one class",
        f"{KNN} {DATA}",
        "x.tif: .* give --intensity_range",
        data(BOTH, {"val/a/x.tif": SIGNED}),
    ),
    Case(
        "float image in copy detection",
        f"{COPIES} {DATA}",
        "give --intensity_range",
        data(COPYDAYS, {"strong/200001.jpg": FLOATS}),
    ),
    Case("float image with a range", f"{EXTRACT} {DATA} --intensity_range 0 1", "written", data({"x.tif": FLOATS}), 0),
    Case(
        "signed image with a range",
        f"{EXTRACT} {DATA} --intensity_range -1000 3000",
        "written",
        data({"x.tif": SIGNED}),
        0,
    ),
    Case(
        "training on signed images with a range",
        f"{TRAIN} {DATA} --intensity_range -1000 3000",
        "epoch 1/1",
        data({f"{i}.tif": SIGNED for i in range(4)}),
        0,
    ),
    Case(
        "NaN",
        f"{EXTRACT} {DATA} --intensity_range 0 1",
        "cannot read image .*x.tif: it holds NaN or infinite values",
        data({**FLAT, "x.tif": of_array(HOLES, "TIFF")}),
    ),
    Case(
        "infinity",
        f"{TRAIN} {DATA} --intensity_range 0 1",
        "x.tif: it holds NaN or infinite .*--on_bad_image skip",
        data({**FLAT, "x.tif": of_array(FULL, "TIFF")}),
    ),
    Case(
        "12 bits in 16",
        f"{EXTRACT} {DATA}",
        "warning: .*x.png keeps 7 of its 1600 gray levels .*--intensity_range; its values are 0 to 1599",
        data({"x.png": of_array(RAMP.astype(np.uint16), "PNG")}),
        0,
    ),
    Case(
        "float image with a much too wide range",
        f"{EXTRACT} {DATA} --intensity_range 0 1000",
        "warning: .*keeps 1 of its 1600",
        data({"x.tif": FLOATS}),
        0,
    ),
    Case(
        "range that ends before it starts",
        f"{KNN} {DATA} --intensity_range 1 0",
        "--intensity_range 1.0 0.0: expected two numbers, the smaller first",
        data(BOTH),
    ),
    Case("empty range", f"{TRAIN} {DATA} --intensity_range 5 5", "--intensity_range 5.0 5.0: expected", data(FLAT)),
    Case("range of one number", f"{TRAIN} {DATA} --intensity_range 5", "--intensity_range: expected 2 arguments"),
    Case(
        "range of words",
        f"{EXTRACT} {DATA} --intensity_range low high",
        "--intensity_range: found 'low', expected a number",
    ),
    Case(
        "infinite range",
        f"{EXTRACT} {DATA} --intensity_range 0 inf",
        "--intensity_range: found 'inf', expected a number",
    ),
    Case(
        "range without 16-bit images",
        f"{EXTRACT} --dataset digits --intensity_range 0 9",
        "--intensity_range has no effect with --dataset digits",
    ),
]

ELONGATED = [
    Case(
        "1x100,000 pixels in k-NN",
        f"{KNN} {DATA}",
        r"x.png: 1x100000 pixels are too elongated for a shorter side of 36",
        data(BOTH, {"train/a/x.png": elongated(1, 100000)}),
    ),
    Case(
        "100,000x1 pixels in a linear evaluation",
        f"{LINEAR} {DATA}",
        "cannot use image .*x.png: 100000x1 pixels",
        data(BOTH, {"val/a/x.png": elongated(100000, 1)}),
    ),
    Case(
        "60,000x1 pixels in features",
        f"{EXTRACT} {DATA}",
        "cannot use image .*x.png: 60000x1 pixels are too elongated",
        data(FLAT, {"x.png": elongated(60000, 1)}),
    ),
    Case(
        "1x100,000 pixels in copy detection",
        f"{COPIES} {DATA}",
        "mAP",
        data(COPYDAYS, {"strong/200001.jpg": elongated(1, 100000)}),
        0,
    ),
    Case(
        "20,000x10 pixels in training", f"{TRAIN} {DATA}", "epoch 1/1", data(FLAT, {"3.png": elongated(20000, 10)}), 0
    ),
]

NAMES = [
    Case(
        "file name with a line break",
        f"{EXTRACT} {DATA}",
        r"cannot read image '.*a\\nb.png': cannot identify",
        data(FLAT, {"a\nb.png": b"bad"}),
    ),
    Case(
        "file name that is not UTF-8",
        f"{TRAIN} {DATA}",
        r"cannot read image '.*a\\udcff.png': cannot identify",
        data(FLAT, {"a\udcff.png": b"bad"}),
    ),
    Case(
        "image whose name is not UTF-8",
        f"{EXTRACT} {DATA}",
        "features, 5×96, of 5 images",
        data(FLAT, {"a\udcff.png": PNG}),
        0,
    ),
    Case(
        "class whose name is not UTF-8",
        f"{KNN} {DATA}",
        "top-1",
        data(BOTH, {"train/\udcff/1.png": PNG, "val/\udcff/1.png": PNG}),
        0,
    ),
    Case(
        "class names with spaces and other scripts",
        f"{KNN} {DATA}",
        "top-1",
        data({name.replace("/a/", "/golden retriever/").replace("/b/", "/猫/"): c for name, c in BOTH.items()}),
        0,
    ),
    Case(
        "hidden files and files of other programs",
        f"{EXTRACT} {DATA}",
        "features, 4×96, of 4 images",
        data(FLAT, {".x.png": b"", "._0.png": b"", "Thumbs.db": b"", "labels.csv": b"", ".git/x.png": b""}),
        0,
    ),
    Case(
        "folders of other programs",
        f"{KNN} {DATA}",
        "top-1",
        data(BOTH, {"train/__MACOSX/._0.png": b"", "val/.ipynb_checkpoints/0.png": b"", "train/notes/a.txt": b""}),
        0,
    ),
    Case("folder that is called like an image", f"{EXTRACT} {DATA}", "of 4 images", data(FLAT, {"x.png": os.mkdir}), 0),
    Case("uppercase suffixes", f"{EXTRACT} {DATA}", "of 2 images", data({"A.PNG": PNG, "B.JPG": JPEG}), 0),
    Case("misleading suffix", f"{EXTRACT} {DATA}", "of 1 images", data({"a.jpg": PNG}), 0),
    Case(
        "suffixes that are not read",
        f"{EXTRACT} {DATA}",
        "no images below .*expected files that end in .jpg",
        data({"a.heic": b"", "b.npy": b"", "c.png.part": PNG}),
    ),
]

LOOPS = [
    Case("link to the folder itself", f"{EXTRACT} {DATA}", "of 8 images", data(CLASSES, {"a/loop": link("..")}), 0),
    Case(
        "two links to the folder itself",
        f"{EXTRACT} {DATA}",
        "of 8 images",
        data(CLASSES, {"a/loop": link(".."), "a/more": link("../.."), "b/loop": link("..")}),
        0,
    ),
    Case(
        "links between classes",
        f"{KNN} {DATA}",
        r"top-1",
        data(BOTH, {"train/a/x": link("../b"), "train/b/x": link("../a")}),
        0,
    ),
    Case(
        "link to the root of the file system",
        f"{EXTRACT} {DATA}",
        "of 8 images",
        data(CLASSES, {"a/loop": link("/")}),
        0,
    ),
    Case(
        "linked class folders",
        f"{EXTRACT} {DATA}",
        "of 16 images",
        data(
            {f"store/{name}": contents for name, contents in CLASSES.items()},
            {f"link/{name}": contents for name, contents in CLASSES.items()},
            {"more": link("store/a")},
        ),
        0,
    ),
    Case("linked images", f"{EXTRACT} {DATA}", "of 5 images", data(FLAT, {"x.png": link("0.png")}), 0),
    Case(
        "the same folder twice",
        f"{EXTRACT} {DATA}",
        "of 4 images",
        data(FLAT, {}, {"c/x": link("../d"), "c/y": link("../d")}),
        0,
    ),
]

NO_SPLIT = "expected train and val with the same class folders, or the class folders themselves"
LAYOUTS = [
    Case(
        "one folder of images in k-NN",
        f"{KNN} {DATA}",
        "no subfolders train and val",
        data({"images/1.png": PNG, "images/2.png": PNG}),
    ),
    Case(
        "one folder of images, held out",
        f"{KNN} {DATA} --tuning",
        "the train images of .* have only one class, images: expected at least two",
        data({f"images/{name}": c for name, c in FLAT.items()} | {"images/4.png": PNG}),
    ),
    Case(
        "one folder of images in a linear evaluation",
        f"{LINEAR} {DATA} --tuning",
        "have only one class, images",
        data({f"images/{i}.png": PNG for i in range(9)}),
    ),
    Case(
        "one folder of images in online k-NN",
        f"{WATCHED} {DATA}",
        "--knn_every 1: the train images of .* have only one class, images",
        data({f"images/{name}": c for name, c in FLAT.items()}),
    ),
    Case(
        "one folder of images in training",
        f"{UNASKED} {DATA}",
        "no online k-NN: the train images of .* have only one class, images",
        data({f"images/{name}": c for name, c in FLAT.items()}),
        0,
    ),
    Case(
        "one class in train and val",
        f"{KNN} {DATA}",
        "have only one class, a",
        data({n: c for n, c in BOTH.items() if "/a/" in n}),
    ),
    Case(
        "one class and an empty one",
        f"{KNN} {DATA}",
        "have only one class, a",
        data({n: c for n, c in BOTH.items() if "/a/" in n}, {"train/b": os.mkdir, "val/b": os.mkdir}),
    ),
    Case("one class is drawn", f"{KNN} {DATA} --train_images 1", "have only one class, ", data(BOTH)),
    Case("train alone in k-NN", f"{KNN} {DATA}", f"data has train, {NO_SPLIT}: rename them", data(BOTH, val=None)),
    Case("train alone in training", f"{TRAIN} {DATA}", f"data has train, {NO_SPLIT}", data(BOTH, val=None)),
    Case("val alone", f"{LINEAR} {DATA}", f"data has val, {NO_SPLIT}", data(BOTH, train=None)),
    Case(
        "test alone in features",
        f"{EXTRACT} {DATA}",
        "data has test, .* or give one of them as --data_path",
        data(BOTH, val=None, train="test"),
    ),
    Case(
        "Train and Val", f"{WATCHED} {DATA}", f"data has Train, Val, {NO_SPLIT}", data(BOTH, train="Train", val="Val")
    ),
    Case(
        "TRAIN and VAL in a linear evaluation",
        f"{LINEAR} {DATA}",
        "data has TRAIN, VAL",
        data(BOTH, train="TRAIN", val="VAL"),
    ),
    Case("train and valid", f"{KNN} {DATA}", "data has train, valid", data(BOTH, val="valid")),
    Case(
        "train and validation in training",
        f"{WATCHED} {DATA}",
        "data has train, validation",
        data(BOTH, val="validation"),
    ),
    Case("train and test", f"{LINEAR} {DATA}", "data has test, train", data(BOTH, val="test")),
    Case(
        "train and valid with others",
        f"{TRAIN} {DATA}",
        "data has train, valid,",
        data(BOTH, {"docs/a.txt": b""}, val="valid"),
    ),
    Case(
        "train2017 and val2017",
        f"{MAP} {DATA}",
        "data has train2017, val2017",
        data(BOTH, train="train2017", val="val2017"),
    ),
    Case(
        "training_set and test_set",
        f"{TRAIN} {DATA}",
        "data has test_set, training_set",
        data(BOTH, train="training_set", val="test_set"),
    ),
    Case(
        "a class called train",
        f"{EXTRACT} {DATA}",
        "of 12 images",
        data(CLASSES, {f"train/{n}": c for n, c in FLAT.items()}),
        0,
    ),
    Case(
        "classes called valid and invalid",
        f"{KNN} {DATA}",
        "top-1",
        data({n.replace("/a/", "/valid/").replace("/b/", "/invalid/"): c for n, c in BOTH.items()}),
        0,
    ),
    Case(
        "data in another folder",
        f"{KNN} {DATA}",
        "no subfolders train and val",
        data({f"archive/{n}": c for n, c in BOTH.items()}),
    ),
    Case(
        "val is a link to train",
        f"{KNN} {DATA}",
        "or they hold the same files",
        data({n: c for n, c in BOTH.items() if "train" in n}, {"val": link("train")}),
    ),
    Case(
        "no classes in train and val",
        f"{KNN} {DATA}",
        "the train images of .* have no labels, expected .*/train/CLASS/IMAGE",
        data({f"{s}/{i}{s}.png": PNG for s in ("train", "val") for i in range(3)}),
    ),
    Case(
        "images beside the classes",
        f"{KNN} {DATA}",
        "1 of the 9 train images of .* have no labels",
        data(BOTH, {"train/x.png": PNG}),
    ),
    Case(
        "images beside the classes of val",
        f"{LINEAR} {DATA}",
        "1 of the 9 val images of .* have no labels",
        data(BOTH, {"val/x.png": PNG}),
    ),
    Case(
        "a class only in val",
        f"{LINEAR} {DATA}",
        r"classes of .* differ, 1 only in val \(c\)",
        data(BOTH, {"val/c/x.png": PNG}),
    ),
    Case(
        "classes with other names",
        f"{KNN} {DATA}",
        r"differ, 1 only in train \(b\) and 1 only in val \(B\)",
        data({n.replace("val/b", "val/B"): c for n, c in BOTH.items()}),
    ),
    Case(
        "many classes only in train",
        f"{WATCHED} {DATA}",
        r"differ, 7 only in train \(c0, c1, c2, c3, c4, ...\)",
        data(BOTH, {f"train/c{i}/x.png": PNG for i in range(7)}),
    ),
    Case(
        "a class without images in val",
        f"{KNN} {DATA}",
        r"differ, 1 only in train \(b\)",
        data({n: c for n, c in BOTH.items() if "val/b" not in n}, {"val/b": os.mkdir}),
    ),
    Case("empty train", f"{TRAIN} {DATA}", "no images below .*/train", data({"train": os.mkdir, "val/a/1.png": PNG})),
    Case(
        "empty val",
        f"{KNN} {DATA}",
        "no images below .*/val",
        data({n: c for n, c in BOTH.items() if "train" in n}, {"val": os.mkdir}),
    ),
    Case(
        "file instead of a folder",
        f"{TRAIN} --data_path {{weights}}",
        r"cannot read .*weights.pth \(not text\): expected a folder of images, or a text file",
    ),
    Case("absent folder", f"{KNN} --data_path {{here}}/absent", "no folder .*absent"),
    Case("empty name of a folder", f"{EXTRACT} --data_path=", "--dataset folder needs --data_path"),
    Case("very long name of a folder", f"{EXTRACT} --data_path {'x' * 5000}", "no folder xxx"),
    Case("device instead of a folder", f"{KNN} --data_path /dev/null", "no folder /dev/null"),
    Case("empty folder", f"{TRAIN} {DATA}", "no images below", data({".keep": b""})),
    Case("fewer images than a batch", f"{TRAIN} {DATA}", "found 1 images, fewer than one step", data({"1.png": PNG})),
]


def listing(contents, *parts):
    """Return a function that writes {here}/list.txt and data."""

    def make(here, places):
        data(*parts)(here, places)
        write(here, {"list.txt": contents})

    return make


LISTED = f"{KNN} {DATA} --classes {{here}}/list.txt"
LISTS = [
    Case(
        "absent list of classes",
        LISTED,
        r"cannot read .*list.txt \(No such file .*expected the name of one class folder per line",
        data(BOTH),
    ),
    Case("empty list of classes", LISTED, r"cannot read .*list.txt \(it is empty\)", listing(b"", BOTH)),
    Case("blank list of classes", LISTED, r"cannot read .*list.txt \(it is empty\)", listing(b"\n \n\t\n", BOTH)),
    Case("image as a list of classes", LISTED, r"cannot read .*list.txt \(not text\)", listing(PNG, BOTH)),
    Case(
        "folder as a list of classes", LISTED, r"cannot read .*list.txt \(not a regular file\)", listing(os.mkdir, BOTH)
    ),
    Case(
        "pipe as a list of classes", LISTED, r"cannot read .*list.txt \(not a regular file\)", listing(os.mkfifo, BOTH)
    ),
    Case(
        "device as a list of classes",
        f"{KNN} {DATA} --classes /dev/zero",
        r"cannot read /dev/zero \(not a regular file\)",
        data(BOTH),
    ),
    Case("class that is listed twice", LISTED, "lists the class a twice", listing(b"a\nb\na\n", BOTH)),
    Case(
        "class that is missing",
        LISTED,
        "lacks 1 of the 3 class folders in .*list.txt, the first is c",
        listing(b"a\nb\nc\n", BOTH),
    ),
    Case(
        "classes separated by commas",
        LISTED,
        "lacks 1 of the 1 class folders .* the first is a,b",
        listing(b"a,b\n", BOTH),
    ),
    Case(
        "parent folder as a class",
        LISTED,
        r"lacks 1 of the 2 class folders .* the first is \.\.",
        listing(b"a\n..\n", BOTH),
    ),
    Case(
        "path as a class",
        LISTED,
        "lacks 2 of the 2 class folders .* the first is train/a",
        listing(b"train/a\ntrain/b\n", BOTH),
    ),
    Case("class with a null byte", LISTED, "lacks 1 of the 2 class folders", listing(b"a\nb\0\n", BOTH)),
    Case("one long line as a list of classes", LISTED, "lacks 1 of the 1 class folders", listing(b"a" * 9999, BOTH)),
    Case(
        "listed class without images",
        LISTED,
        "the class folder .*/c, which .*list.txt lists, has no images",
        listing(b"a\nb\nc\n", BOTH, {"train/c": os.mkdir}),
    ),
    Case("one listed class", LISTED, "have only one class, a", listing(b"a\n", BOTH)),
    Case("list of classes of Windows", LISTED, "top-1", listing("\ufeffa\r\nb\r\n".encode(), BOTH), 0),
    Case("list of classes with slashes", LISTED, "top-1", listing(b"a/\n b/ \n", BOTH), 0),
    Case(
        "listed class with a space",
        LISTED,
        "top-1",
        listing(b"a\nb c\n", BOTH, {"train/b c/1.png": PNG, "val/b c/1.png": PNG}),
        0,
    ),
    Case(
        "ImageNet-100 without its classes",
        f"{KNN} {DATA} --dataset imagenet100",
        "lacks 100 of the 100 class folders",
        data(BOTH),
    ),
]

IGNORED = [
    Case("digits with a folder", f"{KNN} --dataset digits {DATA}", "--data_path has no effect with --dataset digits"),
    Case(
        "digits with classes", f"{TRAIN} --dataset digits --classes x", "--classes has no effect with --dataset digits"
    ),
    Case(
        "digits with a download",
        f"{EXTRACT} --dataset digits --download",
        "--download has no effect with --dataset digits",
    ),
    Case(
        "photographs with a folder",
        f"{TRAIN} --dataset photographs {DATA}",
        "--data_path has no effect with --dataset photographs",
    ),
    Case(
        "solar cells with classes", f"{KNN} --dataset elpv --classes x", "--classes has no effect with --dataset elpv"
    ),
    Case(
        "solar cells with a range", f"{LINEAR} --dataset elpv --intensity_range 0 1", "--intensity_range has no effect"
    ),
    Case(
        "folder with a download",
        f"{TRAIN} {DATA} --download",
        "--download has no effect with --dataset folder",
        data(FLAT),
    ),
    Case(
        "ImageNet-100 with a download",
        f"{KNN} --dataset imagenet100 {DATA} --download",
        "--download has no effect with --dataset imagenet100",
    ),
    Case(
        "CIFAR-10 with classes",
        f"{LINEAR} --dataset cifar10 {DATA} --classes x",
        "--classes has no effect with --dataset cifar10",
    ),
    Case(
        "Fashion-MNIST with classes",
        f"{MAP} --dataset torchvision:FashionMNIST {DATA} --classes x",
        "--classes has no effect with",
    ),
    Case(
        "limited training images of val",
        f"{EXTRACT} {DATA} --split val --train_images 3",
        "--train_images has no effect with --split val",
        data(BOTH),
    ),
    Case(
        "more training images than there are",
        f"{TRAIN} {DATA} --train_images 5",
        "--train_images 5 is more than the 4 training images",
        data(FLAT),
    ),
    Case(
        "no training images",
        f"{TRAIN} {DATA} --train_images 0",
        "--train_images: found '0', expected a whole number of at least 1",
    ),
    Case(
        "too few images to hold some out",
        f"{TRAIN} {DATA} --tuning",
        "--tuning holds out a fifth .* found 4, expected at least 5",
        data(FLAT),
    ),
    Case("folder without a path", TRAIN, "--dataset folder needs --data_path"),
    Case("CIFAR-10 without a path", f"{KNN} --dataset cifar10", "--dataset cifar10 needs --data_path"),
    Case(
        "more neighbours than held-in images",
        f"{KNN} {DATA} --tuning --nb_knn 8",
        "--nb_knn 8 is more than the 7 training images",
        data(BOTH),
    ),
]


def idx(array):
    """Return the contents of an idx file of bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def fashion(**changed):
    """Return a function that writes Fashion-MNIST with changed files, e.g. train_images=b""."""
    files = {}
    for split in ("train", "t10k"):
        files[f"{split}-images-idx3-ubyte"] = idx(RNG.integers(0, 256, (20, 28, 28), np.uint8))
        files[f"{split}-labels-idx1-ubyte"] = idx(np.arange(20, dtype=np.uint8) % 10)
    ends = {"images": "-images-idx3-ubyte", "labels": "-labels-idx1-ubyte", "gz": "-images-idx3-ubyte.gz"}
    for name, contents in changed.items():
        split, kind = name.split("_")
        if kind == "gz":
            del files[split + ends["images"]]
        files[split + ends[kind]] = contents
    return data({name: contents for name, contents in files.items() if contents is not None})


FASHION = f"{KNN} {DATA} --dataset torchvision:FashionMNIST"
FILES = [
    Case("Fashion-MNIST", FASHION, "top-1", fashion(), 0),
    Case(
        "Fashion-MNIST without validation labels",
        FASHION,
        "no t10k-labels-idx1-ubyte in .*--download",
        fashion(t10k_labels=None),
    ),
    Case(
        "Fashion-MNIST, truncated",
        FASHION,
        "cannot read .*train-images-idx3-ubyte: ",
        fashion(train_images=idx(np.zeros((20, 28, 28), np.uint8))[:-1]),
    ),
    Case(
        "Fashion-MNIST, zipped and truncated",
        FASHION,
        "cannot read .*ubyte.gz: ",
        fashion(train_gz=gzip.compress(idx(RNG.integers(0, 256, (20, 28, 28), np.uint8)))[:-99]),
    ),
    Case("Fashion-MNIST that is a web page", FASHION, "cannot read .*ubyte: ", fashion(train_labels=b"<html></html>")),
    Case(
        "Fashion-MNIST of other sides",
        FASHION,
        r"holds .*\(20, 1, 9999\).*expected the shapes",
        fashion(train_images=idx(np.zeros((20, 1, 9999), np.uint8))),
    ),
    Case(
        "Fashion-MNIST with fewer labels",
        FASHION,
        r"\(20, 28, 28\) and .*\(19,\)",
        fashion(train_labels=idx(np.zeros(19, np.uint8))),
    ),
    Case(
        "Fashion-MNIST with other labels",
        FASHION,
        "labels up to 47",
        fashion(train_labels=idx(np.full(20, 47, np.uint8))),
    ),
    Case(
        "Fashion-MNIST without images",
        FASHION,
        r"\(0, 28, 28\)",
        fashion(train_images=idx(np.zeros((0, 28, 28), np.uint8)), train_labels=idx(np.zeros(0, np.uint8))),
    ),
    Case(
        "Fashion-MNIST with a single label",
        FASHION,
        "have only one class, T-shirt/top",
        fashion(train_labels=idx(np.zeros(20, np.uint8))),
    ),
    Case("Fashion-MNIST that is a pipe", FASHION, "no train-images-idx3-ubyte in", fashion(train_images=os.mkfifo)),
    Case(
        "Fashion-MNIST in a file",
        f"{TRAIN} --dataset torchvision:FashionMNIST --data_path {{weights}}",
        "no train-images-idx3-ubyte in",
    ),
    Case("source without its name", f"{KNN} --dataset torchvision: {DATA}", "found 'torchvision:', expected one of"),
    Case(
        "unknown data set of torchvision",
        f"{EXTRACT} --dataset torchvision:os {DATA}",
        "torchvision:os: os is unknown; expected one of CIFAR10",
    ),
    Case(
        "data set of torchvision without splits",
        f"{TRAIN} --dataset torchvision:EuroSAT {DATA}",
        "EuroSAT has no classes, or no split into training and test images",
    ),
    Case(
        "absent data set of torchvision",
        f"{LINEAR} --dataset torchvision:DTD {DATA}",
        "no DTD in .*expected intact files .*--download",
    ),
    Case(
        "damaged data set of torchvision",
        f"{KNN} --dataset torchvision:DTD {DATA}",
        "no DTD in .*expected intact files .*--download",
        data({"dtd/dtd/labels/train1.txt": b"\xff\xfe"}),
    ),
    Case(
        "list with classes in some lines",
        f"{TRAIN} {DATA}/list.txt",
        "list.txt has a class after a tab for 1 of its 2 images, but not for b.png",
        data({"list.txt": b"a.png\tx\nb.png", "a.png": PNG, "b.png": PNG}),
    ),
    Case(
        "list of missing images",
        f"{KNN} {DATA}",
        "train.txt lists 2 images, 1 are missing; the first: .*c.png",
        data({"train.txt": b"a.png\nc.png", "val.txt": b"b.png", "a.png": PNG, "b.png": PNG}),
    ),
    Case(
        "one list for both splits",
        f"{KNN} {DATA}/list.txt",
        "or they hold the same files",
        data({"list.txt": b"a.png\tx\nb.png\ty", "a.png": PNG, "b.png": PNG}),
    ),
    Case(
        "list with an index",
        f"{TRAIN} {DATA}/list.txt --rebuild_index",
        "--rebuild_index has no effect with a list of images",
        data({"list.txt": b"a.png", "a.png": PNG}),
    ),
    Case("absent CIFAR-10", f"{TRAIN} --dataset cifar10 {DATA}", "no CIFAR10 in .*expected intact files .*--download"),
    Case(
        "damaged CIFAR-10",
        f"{LINEAR} --dataset cifar10 {DATA}",
        "no CIFAR10 in .*expected intact files",
        data({f"cifar-10-batches-py/{name}": b"\x80" for name in ("data_batch_1", "test_batch", "batches.meta")}),
    ),
    Case(
        "CIFAR-10 that is a pipe",
        f"{KNN} --dataset cifar10 {DATA}",
        "no CIFAR10 in",
        data({"cifar-10-batches-py/data_batch_1": os.mkfifo}),
    ),
]


def retrieval(files=None, gnd=None, **changed):
    """Return a function that makes roxford5k with three images; changed parts of its single query and its lists."""

    def make(here, places):
        entry = {"bbx": [2.0, 3.0, 30.0, 35.0], "easy": [0], "hard": [1], "junk": []}
        contents = {"imlist": ["a", "b", "c"], "qimlist": ["q"], "gnd": [entry]}
        for name, value in changed.items():
            (entry if name in entry else contents)[name] = value
        pictures = {f"jpg/{name}.jpg": encoded("JPEG") for name in "abcq"} | (files or {})
        pictures["gnd_roxford5k.pkl"] = pickle.dumps(contents) if gnd is None else gnd
        write(here / "data/roxford5k", {name: c for name, c in pictures.items() if c is not None})

    return make


BOX = r"the box .* of .*q.jpg does not fit the image of 40x40 pixels: expected left, top, right, bottom"
TRUTH = "is no ground truth of roxford5k: expected imlist, qimlist, and gnd"
RETRIEVALS = [
    Case("retrieval", RETRIEVAL, "roxford5k medium: mAP", retrieval(), 0),
    Case("relevant image that is named twice", RETRIEVAL, "roxford5k medium: mAP", retrieval(easy=[0, 0]), 0),
    Case("box outside of its image", RETRIEVAL, BOX, retrieval(bbx=[100, 100, 200, 200])),
    Case(
        "box that reaches outside of its image", f"{RETRIEVAL} --crop_queries true", BOX, retrieval(bbx=[2, 3, 90, 35])
    ),
    Case("box left of its image", RETRIEVAL, BOX, retrieval(bbx=[-20, 3, 30, 35])),
    Case("box of 0.2 pixels", f"{RETRIEVAL} --crop_queries true", BOX, retrieval(bbx=[2.0, 3.0, 2.2, 35.0])),
    Case("box in fractions of the image", RETRIEVAL, BOX, retrieval(bbx=[0.1, 0.1, 0.9, 0.8])),
    Case("infinite box", RETRIEVAL, BOX, retrieval(bbx=[0.0, 0.0, float("inf"), 20.0])),
    Case(
        "box of left, top, width, height",
        RETRIEVAL,
        "query q has the box .*, expected left, top, right, bottom",
        retrieval(bbx=[30, 3, 10, 30]),
    ),
    Case("box of NaN", RETRIEVAL, "query q has the box", retrieval(bbx=[float("nan")] * 4)),
    Case("box of three numbers", RETRIEVAL, "query q has the box", retrieval(bbx=[0, 0, 9])),
    Case("box of words", RETRIEVAL, TRUTH, retrieval(bbx=["left", "top", "right", "bottom"])),
    Case("half an index", RETRIEVAL, TRUTH, retrieval(easy=[0.5])),
    Case("names instead of indices", RETRIEVAL, TRUTH, retrieval(easy=["a"])),
    Case("mask instead of indices", RETRIEVAL, TRUTH, retrieval(easy=[True, False, False])),
    Case("nothing instead of indices", RETRIEVAL, TRUTH, retrieval(hard=None)),
    Case("lists of different lengths as indices", RETRIEVAL, TRUTH, retrieval(junk=[[0], [1, 2]])),
    Case("huge index", RETRIEVAL, TRUTH, retrieval(easy=[10**30])),
    Case("negative index", RETRIEVAL, "query q names image -1 of 3", retrieval(easy=[-1])),
    Case("index that is too large", RETRIEVAL, "query q names image 3 of 3", retrieval(junk=[3])),
    Case("image that is easy and junk", RETRIEVAL, "more than one of easy, hard and junk", retrieval(junk=[0])),
    Case(
        "very long name of a folder of retrieval",
        f"{RETRIEVAL}{'x' * 5000}",
        "no ground truth .*gnd_roxford5k.pkl",
    ),
    Case("very long name of an image", RETRIEVAL, "1 images are missing", retrieval(imlist=["a", "b", "x" * 5000])),
    Case("nothing relevant", RETRIEVAL, "query q has no relevant image", retrieval(easy=[], hard=[])),
    Case("ground truth of other keys", RETRIEVAL, TRUTH, retrieval(gnd=pickle.dumps({"images": []}))),
    Case("ground truth that is a list", RETRIEVAL, TRUTH, retrieval(gnd=pickle.dumps([1, 2]))),
    Case("query that is missing", RETRIEVAL, "1 images are missing, the first is .*/r.jpg", retrieval(qimlist=["r"])),
    Case("queries without relevance", RETRIEVAL, "has 2 queries, but relevance for 1", retrieval(qimlist=["q", "q"])),
    Case("ground truth that is a pipe", RETRIEVAL, "no ground truth .*gnd_roxford5k.pkl", retrieval(gnd=os.mkfifo)),
    Case(
        "database image that is a pipe",
        RETRIEVAL,
        "1 images are missing, the first is .*/d.jpg",
        retrieval({"jpg/d.jpg": os.mkfifo}, imlist=["a", "b", "c", "d"]),
    ),
    Case(
        "database image that is damaged", RETRIEVAL, "cannot read image .*/b.jpg", retrieval({"jpg/b.jpg": b"damaged"})
    ),
    Case(
        "database image that is truncated",
        RETRIEVAL,
        "cannot read image .*/b.jpg: .*truncated",
        retrieval({"jpg/b.jpg": halved(JPEG)}),
    ),
    Case(
        "database image that is thin",
        RETRIEVAL,
        "/b.jpg is 2.0 pixels thin at --imsize 32",
        retrieval({"jpg/b.jpg": elongated(160, 10)}),
    ),
    Case(
        "database image with too many pixels",
        RETRIEVAL,
        "/b.jpg: 13000x13000 pixels are more",
        retrieval({"jpg/b.jpg": png_header(13000, 13000)}),
    ),
]

LIST = f"{COPIES} {DATA} --distractors_path {{here}}/list.txt"
COPY_DETECTION = [
    Case(
        "copy detection without originals",
        f"{COPIES} {DATA}",
        "no images in .*/original: Copydays is",
        data({"strong/200001.jpg": JPEG}),
    ),
    Case(
        "copy detection without strong copies",
        f"{COPIES} {DATA}",
        "no images in .*/strong: Copydays is",
        data({"original/200000.jpg": JPEG}),
    ),
    Case(
        "copy without an original",
        f"{COPIES} {DATA}",
        "299901.jpg has no original",
        data(COPYDAYS, {"strong/299901.jpg": JPEG}),
    ),
    Case("very long name of a folder of copies", f"{COPIES} {DATA}{'x' * 5000}", "no images in .*/original"),
    Case("copy detection in a file", f"{COPIES} --data_path {{weights}}", "no images in .*/original"),
    Case(
        "original that is a pipe",
        f"{COPIES} {DATA}",
        "cannot read image .*200100.jpg: not a regular file",
        data({**COPYDAYS, "original/200100.jpg": os.mkfifo}),
    ),
    Case(
        "original that is a folder",
        f"{COPIES} {DATA}",
        "cannot read image .*200300.jpg: not a regular file",
        data(COPYDAYS, {"original/200300.jpg": os.mkdir}),
    ),
    Case(
        "copy that is damaged",
        f"{COPIES} {DATA}",
        "cannot read image .*200101.jpg",
        data({**COPYDAYS, "strong/200101.jpg": halved(JPEG)}),
    ),
    Case(
        "absent list of distractors",
        LIST,
        r"cannot read .*list.txt \(No such file or directory\): expected a folder of images",
        data(COPYDAYS),
    ),
    Case("list of distractors that is a pipe", LIST, r"list.txt \(not a regular file\)", listing(os.mkfifo, COPYDAYS)),
    Case("list of distractors that is an image", LIST, r"list.txt \(not text\)", listing(PNG, COPYDAYS)),
    Case(
        "list of distractors without end",
        f"{COPIES} {DATA} --whitening_path /dev/zero",
        r"/dev/zero \(not a regular file\)",
        data(COPYDAYS),
    ),
    Case(
        "list of absent distractors",
        LIST,
        "lists 2 images, 1 are missing; the first: .*absent.png",
        listing(b"data/original/200000.jpg\nabsent.png\n", COPYDAYS),
    ),
    Case(
        "list of distractors with a folder",
        LIST,
        "lists 1 images, 1 are missing; the first: .*data/original",
        listing(b"data/original\n", COPYDAYS),
    ),
    Case(
        "list of distractors with a pipe",
        LIST,
        "lists 1 images, 1 are missing; the first: .*pipe.png",
        listing(b"data/pipe.png\n", COPYDAYS, {"pipe.png": os.mkfifo}),
    ),
    Case(
        "list of distractors in one long line",
        LIST,
        "lists 1 images, 1 are missing",
        listing(b"x.jpg, " * 999, COPYDAYS),
    ),
    Case(
        "list of distractors with a damaged image",
        LIST,
        "cannot read image .*bad.png",
        listing(b"data/bad.png\n", COPYDAYS, {"bad.png": b"bad"}),
    ),
    Case(
        "list of distractors of Windows",
        LIST,
        "mAP",
        listing("\ufeffdata/original/200000.jpg\r\n".encode(), COPYDAYS),
        0,
    ),
    Case(
        "folder of distractors without images",
        f"{COPIES} {DATA} --distractors_path {{here}}/empty",
        "no images below .*empty",
        data(COPYDAYS, {"../empty/a.txt": b""}),
    ),
]

CASES = [
    *unreadable(),
    *(
        Case(f"{name} is an image", f"{EXTRACT} {DATA}", "features, 1×96, of 1 images", data({"x.png": c}), 0)
        for name, c in DECODED.items()
    ),
    *INTENSITIES,
    *ELONGATED,
    *NAMES,
    *LOOPS,
    *LAYOUTS,
    *LISTS,
    *IGNORED,
    *FILES,
    *RETRIEVALS,
    *COPY_DETECTION,
]
