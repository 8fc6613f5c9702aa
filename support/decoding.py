"""Safe decoding of image files, which may be damaged or hostile."""

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from support.files import refuse_irregular
from utils import UserError, first_line, printable

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "AVIF", "HEIF")
MAX_PIXELS = 2**26  # 8192×8192, 200 MB decoded; larger images are bad, see --on_bad_image


@functools.cache
def image_suffixes() -> dict[str, str]:
    """Return the suffixes of image files that can be read here, with their formats: {".jpg": "JPEG", ...}.

    AVIF comes with Pillow 11.3, HEIF with the package pillow-heif, which is registered here, once per process.
    """
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener(thumbnails=False)  # which `draft` would decode instead of the image
    known = Image.registered_extensions()
    return {suffix: kind for suffix, kind in known.items() if kind in FORMATS and suffix != ".pfm"}  # a map of depths


@contextlib.contextmanager
def opened(path: str | Path, file: BinaryIO | None = None) -> Iterator[Image.Image]:
    """Open an image file, without Pillow's warnings. All errors inside the context become a UserError with the path.

    Args:
        file: binary file to read instead of opening `path`, which then only names it in messages.
    """
    try:
        if file is None:
            refuse_irregular(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file or path, formats=[*dict.fromkeys(image_suffixes().values())]) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} pixels are more than {MAX_PIXELS}")
                yield image
    except Exception as error:  # Pillow's decoders raise many kinds of errors for damaged files
        raise UserError(f"cannot read image {printable(path)}: {first_line(error)}") from error


def read_image(
    path: str | Path,
    min_side: int | None = None,
    upright: bool = True,
    intensity_range: Sequence[float] | None = None,
    file: BinaryIO | None = None,
) -> Image.Image:
    """Decode an image of any PIL mode to RGB, with transparent parts white.

    Args:
        path, file: see `opened`.
        min_side: decode a JPEG at 1/2, 1/4 or 1/8 of its size, as long as both sides keep `min_side` pixels.
        upright: rotate the image according to its EXIF orientation. Of TIFF and HEIF, decoders do it in any case.
        intensity_range: (low, high), values of grayscale images of more than 8 bits that become 0 and 255. Values
            between them are mapped linearly, others are clipped. None: (0, 65535).

    Which files are bad:

    | file | outcome |
    |---|---|
    | grayscale, palette, bilevel, CMYK, with transparency | decoded |
    | 16-bit grayscale | decoded, scaled to 8 bits |
    | signed 16-bit, 32-bit or float grayscale | decoded with an intensity range, bad without one |
    | float, with a value that is NaN or infinite | bad |
    | AVIF, HEIF (.heic) | decoded where `image_suffixes` has them |
    | animated or with several pages | the first frame or page is decoded |
    | 1×1, 20,000×10 | decoded |
    | with a broken EXIF block | decoded, not rotated |
    | with a broken ICC profile | decoded; profiles are not applied |
    | truncated, empty, not an image, damaged | bad |
    | not a regular file: a pipe, device, socket or folder | bad, not opened |
    | more than MAX_PIXELS according to its header | bad, not decoded |
    | a format that is not in FORMATS, whatever the file's name | bad: some of Pillow's decoders start other programs |

    Raises:
        UserError: the file is bad.
    """
    with opened(path, file) as image:
        refuse_unknown_range(image, intensity_range)
        if min_side:
            image.draft(None, (min_side, min_side))
        image.load()
        if upright:
            with contextlib.suppress(Exception):  # a broken EXIF block; the pixels may still be intact
                if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                    image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            return Image.fromarray(gray_levels(np.asarray(image), intensity_range)).convert("RGB")
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")


def image_size(path: str | Path) -> tuple[int, int]:
    """Return (width, height) in pixels from a file's header.

    Raises:
        UserError: the file has no such header.
    """
    with opened(path) as image:
        return image.size


class UnknownRange(ValueError):
    """The values of a signed or float image have no known range."""


def refuse_unknown_range(image: Image.Image, intensity_range: Sequence[float] | None) -> None:
    """Raise UnknownRange if an opened image needs an intensity range and there is none."""
    signed = image.mode == "F" or (image.mode == "I" and image.format == "TIFF")  # unsigned PNG and PPM may also be I
    if signed and not intensity_range:
        kind = "floats" if image.mode == "F" else "signed or 32-bit integers"
        raise UnknownRange(f"its values are {kind}; give --intensity_range LOW HIGH, one range for all images")


def gray_levels(values: np.ndarray, intensity_range: Sequence[float] | None) -> np.ndarray:
    """Map an array of intensities to uint8, see `read_image`.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinite values")
    low, high = intensity_range or (0, 65535)
    return ((values.astype(np.float64).clip(low, high) - low) * 255 // (high - low)).astype(np.uint8)
