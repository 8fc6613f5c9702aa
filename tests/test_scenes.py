"""Scenes of several objects, from packages of a few stamps in one color each."""

import numpy as np
import pytest
from PIL import Image

from studies import __main__ as studies
from studies.scenes import CLASSES, STAMPS
from utils import UserError

SIZE = 48


def stamp_color(class_index, stamp):
    return 10 + 20 * class_index, 250 - 20 * stamp, 128


def wallpaper_color(i):
    return 255, 255, 16 * i  # no stamp has this red


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Ten stamps per class and eight wallpapers, each in one color; drawings and mirrored copies are black."""
    root = tmp_path_factory.mktemp("packages")
    for c, folders in enumerate(CLASSES.values()):
        folder = root / STAMPS / folders[-1] / "some"
        folder.mkdir(parents=True)
        for i in range(10):
            stamp = Image.new("RGBA", (40 + 4 * i, 60))  # transparent around a rectangle
            stamp.paste((*stamp_color(c, i), 255), (5, 5, 30, 50))
            stamp.save(folder / f"{i}.png")
        for name in ("7_mirror.png", "cartoon/7.png"):
            (folder / name).parent.mkdir(exist_ok=True)
            Image.new("RGBA", (40, 40), (0, 0, 0, 255)).save(folder / name)
    (root / "usr/share/backgrounds").mkdir(parents=True)
    for i in range(8):
        for side in (200, 300):  # two sizes of one wallpaper
            picture = Image.new("RGB", (2 * side, side), wallpaper_color(i))
            picture.save(root / f"usr/share/backgrounds/{i}_{2 * side}x{side}.jpg", quality=100, subsampling=0)
    return root


def make(packages, output, *options):
    words = ["--packages", str(packages), "--output", str(output), "--size", str(SIZE), *options]
    studies.main(["make-scenes", *words, "--train", "60", "--val", "40"])


def colors_of(pixels, mask):
    """Return {class: colors of most of its pixels}: borders of stamps are mixed."""
    found = {}
    for c in np.unique(mask):
        colors, counts = np.unique(pixels[mask == c], axis=0, return_counts=True)
        found[c] = {tuple(color) for color in colors[counts >= 12]}
    return found


def test_scenes(packages, tmp_path, capsys):
    make(packages, tmp_path / "a", "--jobs", "1")
    make(packages, tmp_path / "b", "--jobs", "2")
    assert "60 training and 2 × 40 validation scenes" in capsys.readouterr().out
    names = ["background", *CLASSES]
    assert (tmp_path / "a/new/classes.txt").read_text().split() == names
    seen = {}
    for part, count in (("seen/{}/train", 60), ("seen/{}/val", 40), ("new/{}/val", 40), ("new/{}/train", 60)):
        images = sorted((tmp_path / "a" / part.format("images")).glob("*/*.png"))
        assert len(images) == count
        assert len({path.name for path in images}) == count
        used = seen.setdefault(part, set())
        for path in images:
            twin = tmp_path / "b" / path.relative_to(tmp_path / "a")
            assert path.read_bytes() == twin.read_bytes()  # whatever the number of processes
            pixels = np.asarray(Image.open(path)).astype(int)
            with Image.open(str(path).replace("/images/", "/masks/")) as picture:
                assert picture.mode == "P"
                mask = np.asarray(picture)
            assert pixels.shape == (SIZE, SIZE, 3)
            assert mask.shape == (SIZE, SIZE)
            found = colors_of(pixels, mask)
            label = names.index(path.parent.name)
            side = np.ptp(np.argwhere(mask == label), axis=0).max() + 1
            assert label in found
            assert side >= 0.4 * SIZE
            for c, colors in found.items():
                for red, green, blue in colors:
                    if c == 0:
                        assert min(red, green) >= 250
                        used.add(round(blue / 16))  # the wallpaper
                    else:
                        assert abs(red - (10 + 20 * (c - 1))) <= 1
                        assert blue == 128
                        used.add((c, green))
    trained = seen["seen/{}/train"] | seen["seen/{}/val"]
    assert len(trained) > 60  # of 7 stamps in each of 12 classes
    assert len(seen["new/{}/val"]) > 24
    assert not seen["new/{}/val"] & trained  # neither a stamp nor a wallpaper


def test_bad_input(packages, tmp_path):
    make(packages, tmp_path / "there", "--jobs", "1")
    with pytest.raises(UserError, match="there exists: give a new folder"):
        make(packages, tmp_path / "there")
    with pytest.raises(UserError, match="found 0 stamps of bird in .*: unpack tuxpaint-stamps-default"):
        make(tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists()
