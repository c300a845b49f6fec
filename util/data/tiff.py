"""TIFF images beyond 8-bit greyscale and RGB: which Pillow reads correctly, and the others through tifffile."""

import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

try:
    import tifffile
except ImportError:  # optional: only types that Pillow lacks need it
    tifffile = None  # type: ignore[assignment]

_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# Colour channels of photometric types other than greyscale: RGB, CMYK, YCbCr, Lab.
_COLOUR_CHANNELS = {2: 3, 5: 4, 6: 3, 8: 3}

# Photometric types of more than 8 bits that can be used: grey (WhiteIsZero, BlackIsZero) and RGB.
_WIDE_TYPES = (0, 1, 2)
_NAMES = {5: "CMYK", 6: "YCbCr", 8: "Lab"}

_COMPLEX = (5, 6)  # sample formats: integers, floats

# (sample format, bits) that Pillow reads correctly with one channel; format 1 is unsigned, 2 signed, 3 float.
_PILLOW_TYPES = {(1, 12), (1, 16), (2, 16), (2, 32), (3, 32)}
_WHITE_IS_ZERO_TYPES = {(1, 16), (3, 32)}  # of a negative

_EXPECTED = "greyscale or RGB, with or without alpha"


class Unsupported(ValueError):
    """A TIFF file that is intact but of a kind that cannot be used."""


class Layout(NamedTuple):
    """Attributes: sample_type: (sample format, bits); channels: with alpha; fits_pillow: Pillow reads it correctly;
    is_compressed: libtiff decodes it; white_is_zero: it is stored as a negative; orientation: as in EXIF."""

    width: int
    height: int
    channels: int
    sample_type: tuple[int, int]
    fits_pillow: bool
    is_compressed: bool
    white_is_zero: bool
    orientation: int


def read_layout(data: bytes) -> Layout | None:
    """Layout of the first page of a TIFF file; None for other files.

    Raises:
        Unsupported: it has more bands or pages than one image in grey or colour, so some would be dropped; complex
            values; or more than 8 bits of other colours than RGB.
    """
    if data[:4] not in _SIGNATURES:
        return None
    pages = list(_pages(data))
    tags = pages[0]
    same_size = sum((page.get(256), page.get(257)) == (tags[256], tags[257]) for page in pages)
    if same_size > 1:
        raise Unsupported(f"{same_size} bands are not supported (pages of equal size): expected {_EXPECTED}")
    channels, extra, photometric = tags.get(277, 1), tags.get(338, ()), tags.get(262, 1)
    unused = channels - _COLOUR_CHANNELS.get(photometric, 1)
    is_alpha = unused == 1 and extra in ((), (1,), (2,))
    if unused and not is_alpha:
        raise Unsupported(f"{channels} bands are not supported: expected {_EXPECTED}")
    sample_type = (max(tags.get(339, (1,))), max(tags.get(258, (1,))))
    if sample_type[0] in _COMPLEX:
        raise Unsupported(f"complex values are not supported: expected {_EXPECTED}")
    if sample_type[1] > 8 and photometric not in _WIDE_TYPES:
        name = _NAMES.get(photometric, f"photometric type {photometric}")
        raise Unsupported(f"{name} of more than 8 bits is not supported: expected {_EXPECTED}")
    planar = channels > 1 and tags.get(284, 1) == 2
    white_is_zero, is_little = photometric == 0, data[:2] == b"II"
    fits = sample_type[0] in (1, 4) and sample_type[1] <= 8
    if channels == 1 and white_is_zero:
        fits = fits or (sample_type in _WHITE_IS_ZERO_TYPES and (is_little or sample_type[0] == 3))
    elif channels == 1:
        fits = fits or sample_type in _PILLOW_TYPES or (sample_type == (1, 32) and is_little)
    else:
        fits = fits or (sample_type == (1, 16) and channels > 2 and not planar)
    is_compressed, orientation = tags.get(259, 1) != 1, tags.get(274, 1)
    return Layout(tags[256], tags[257], channels, sample_type, fits, is_compressed, white_is_zero, orientation)


def _pages(data: bytes) -> Iterator[ImageFileDirectory_v2]:
    file = io.BytesIO(data)
    header = file.read(16 if data[2:4] in (b"+\0", b"\0+") else 8)
    offsets: set[int] = set()
    tags = ImageFileDirectory_v2(header)
    while tags.next and tags.next not in offsets:
        offsets.add(tags.next)
        file.seek(tags.next)
        tags = ImageFileDirectory_v2(header)
        tags.load(file)
        yield tags


def read(data: bytes, layout: Layout) -> np.ndarray:
    """(H, W) or (H, W, 3) values of a file that Pillow cannot read.

    Raises:
        Unsupported: tifffile is missing, or cannot read it either.
    """
    kind = {1: "unsigned", 2: "signed", 3: "float"}.get(layout.sample_type[0], "unknown")
    what = f"TIFF with {layout.channels} x {layout.sample_type[1]} bits ({kind})"
    if tifffile is None:
        raise Unsupported(f"{what} is not supported without tifffile: pip install tifffile")
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages[0]
            values = page.asarray()
            axes = page.axes
    except Exception as error:  # damaged files make it raise nearly any exception
        raise Unsupported(f"{what} is not supported ({type(error).__name__}: {error})") from error
    if axes.startswith("S"):
        values = np.moveaxis(values, 0, -1)
    if values.ndim == 3:
        values = values[:, :, :3] if layout.channels > 2 else values[:, :, 0]
    return values
