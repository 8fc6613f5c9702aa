"""Read damaged and hostile checkpoints, pickles and images. Each must be read or refused, none may execute code.

    python tests/fuzz_files.py --count 2000

A file may neither end the process, nor take longer than ten seconds, nor raise anything but UserError, nor start a
program, nor change the weights of a checkpoint unnoticed.
"""

import argparse
import io
import os
import pickle
import random
import signal
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.decoding import read_image
from support.plain_pickle import read_plain_pickle
from support.weights import load_backbone, load_file
from utils import UserError
from vision_transformer import vit_micro

FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect")
TOKENS = [
    b"cos\nsystem\n(S'true'\ntR",
    b"cbuiltins\neval\n(S'1'\ntR",
    b"\x80\x04\x8c\x02os\x8c\x06system\x93",
    bytes(64),
]
STATE = vit_micro(8, img_size=32).state_dict()


class Payload:
    """Starts a program when it is unpickled."""

    def __reduce__(self):
        return (os.system, ("true",))


class Executed(BaseException):
    """A file made the process do something that reading does not need."""


class Slow(BaseException):
    """Reading took too long."""


def saved(contents, **options):
    buffer = io.BytesIO()
    torch.save(contents, buffer, **options)
    return buffer.getvalue()


def image(form, **options):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def intact_files():
    """Return (kind, contents) of intact files of all formats that are read."""
    args = argparse.Namespace(arch="vit_micro", patch_size=8)
    files = [("checkpoint", saved({"teacher": STATE, "args": args, "epoch": 3})), ("checkpoint", saved(STATE))]
    old = {"teacher": STATE, "lr": np.float64(0.1)}
    files.append(("old checkpoint", saved(old, _use_new_zipfile_serialization=False)))
    gnd = [{"easy": np.arange(5), "hard": [5], "junk": np.array([], np.int64), "bbx": [0.0, 1.0, 2.0, 3.0]}]
    files += [("pickle", pickle.dumps({"imlist": ["a", "b"], "gnd": gnd}, protocol)) for protocol in (0, 2, 4)]
    forms = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "PPM")
    return [*files, *(("image", image(form)) for form in forms), ("image", image("TIFF", compression="tiff_lzw"))]


def hostile_files():
    """Return files that execute code if they are read carelessly."""
    zipped, old = saved({"args": Payload()}), saved(Payload(), _use_new_zipfile_serialization=False)
    pickled = pickle.dumps({"gnd": [Payload()]})
    return [("hostile checkpoint", zipped), ("hostile checkpoint", old), ("hostile pickle", pickled)]


def mutated(rng, contents):
    """Return a damaged copy: bytes changed, removed, duplicated or inserted, or the file truncated."""
    data = bytearray(contents)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        place = min(rng.randrange(rng.choice([64, 1024, len(data)])), len(data) - 1)
        place = rng.choice(
            [place, len(data) - 1 - place]
        )  # headers and directories, at both ends, as often as the rest
        match rng.randrange(5):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place : place + 4] = rng.choice([b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4)])
            case 2:
                del data[place : place + rng.choice([1, 16, 4096])]
            case 3:
                data[place:place] = data[place : place + rng.choice([1, 16, 4096])]
            case 4:
                data[place:place] = rng.choice(TOKENS)
        if not data:
            return b""
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)


def read(kind, path):
    """Read a file as its users do. Return how that ended."""
    try:
        if kind == "image":
            read_image(path, min_side=32).resize((8, 8))
        elif kind.endswith("pickle"):
            read_plain_pickle(path)
        else:
            load_file(path)
            backbone, _ = load_backbone(path, "vit_micro", 8)
            # The other ones have no check sums.
            if kind == "checkpoint" and not all(map(torch.equal, backbone.state_dict().values(), STATE.values())):
                return "changed unnoticed"
    except UserError as error:
        return "refused" if len(str(error).splitlines()) == 1 else f"an error of several lines: {error}"
    return "read" if not kind.startswith("hostile") else "read as if it were harmless"


def forbid(event, _):
    if event.startswith(FORBIDDEN):
        raise Executed(event)


def too_slow(*_):
    raise Slow


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="number of files (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: %(default)s)")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    intact, hostile, outcomes, bad = intact_files(), hostile_files(), Counter(), []
    signal.signal(signal.SIGALRM, too_slow)
    sys.addaudithook(forbid)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.count):
            rng = random.Random(f"{args.seed}-{number}")
            kind, contents = rng.choice(intact)
            contents = mutated(rng, contents)
            if number % 10 == 0:
                kind, contents = rng.choice(hostile)
            path = Path(folder, "file")
            path.write_bytes(contents)
            signal.alarm(10)
            try:
                outcome = read(kind, path)
            except BaseException as error:
                outcome = f"{type(error).__name__}: {error}"
            signal.alarm(0)
            if outcome not in ("read", "refused"):
                bad.append(f"file {number} of seed {args.seed}, {kind}: {outcome}")
            outcomes[kind, outcome] += 1
    for (kind, outcome), count in sorted(outcomes.items()):
        print(f"{count:5} {kind}: {outcome}")
    if bad:
        sys.exit("\n".join(bad))
    print(f"all {args.count} files were read or refused")


if __name__ == "__main__":
    main()
