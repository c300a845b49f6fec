"""From the bytes of an image file to 8-bit RGB pixels: Pillow's pixels, decoded faster with simplejpeg where it can.

Images of more than 8 bits (unsigned and signed integers, floats; one or three channels) are scaled by a value range,
whose lower end becomes 0 and whose upper end becomes 255. By default it starts at 0 and ends at the first of 255, 65535
and 4294967295 (for floats also 1) that no value of the image exceeds: 8-bit values in a wider type stay unchanged, as
in Pillow's convert("RGB"), and 16-bit values are divided by 257. PGM and PPM files that state another maximum
than 65535 are scaled by that.
"""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, PngImagePlugin

from util.data import tiff

try:
    import simplejpeg
except ImportError:  # optional accelerator: without it Pillow decodes everything
    simplejpeg = None

ValueRange = tuple[float, float]

MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
REASONS = ("damaged", "unsupported", "over the pixel limit", "missing", "I/O error")

# simplejpeg's colours differ from Pillow's for CMYK, so Pillow decodes CMYK.
_SIMPLE_COLORSPACES = ("YCbCr", "Gray", "RGB")

_ORIENTATION = 0x0112  # tag of EXIF
_UNDO = {  # of an orientation that Pillow has applied
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}

_TEXT_LIMIT = 1 << 28  # bytes of text in a PNG file; Pillow's limit is 1 << 20


class UnreadableImage(ValueError):
    """An image that cannot be used; `reason` is one of `REASONS`."""

    def __init__(self, message: str, reason: str = "damaged") -> None:
        super().__init__(message)
        self.reason = reason


def decode_rgb(data: bytes, value_range: ValueRange | None = None, max_image_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Bytes of an image file -> (H, W, 3) uint8. Greyscale, palette, CMYK and RGBA images are converted.

    As in torchvision's ImageFolder, transparency is dropped and EXIF orientation is not applied. Nor is that of TIFF,
    which Pillow applies.

    Args:
        value_range: the stored values that become 0 and 255, for images of more than 8 bits; None for the default.

    Raises:
        UnreadableImage: not an image, a damaged or unsupported one, or one of more than `max_image_pixels`.
    """
    values = read_values(data, max_image_pixels)
    if values.dtype != np.uint8:
        values = to_8_bits(values, value_range)
        layout = tiff.read_layout(data)
        if layout is not None and layout.white_is_zero:
            values = 255 - values
    return values if values.ndim == 3 else np.repeat(values[:, :, None], 3, axis=2)


def default_range(values: np.ndarray) -> ValueRange:
    ends = [255, 2**16 - 1, 2**32 - 1]
    if values.dtype.kind == "f":
        ends.insert(0, 1)
    largest = values.max(initial=0, where=np.isfinite(values))
    return 0, next((end for end in ends if largest <= end), ends[-1])


def to_8_bits(values: np.ndarray, value_range: ValueRange | None = None) -> np.ndarray:
    low, high = value_range or default_range(values)
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.nan_to_num(scaled).clip(0, 255).round().astype(np.uint8)


def read_values(data: bytes, max_image_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Bytes of an image file -> (H, W, 3) uint8, or if they have more bits, the stored values (H, W) or (H, W, 3).

    Raises:
        UnreadableImage: as `decode_rgb`.
    """
    if simplejpeg is not None and data[:2] == b"\xff\xd8":
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            if colorspace in _SIMPLE_COLORSPACES and height * width <= max_image_pixels:
                return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            pass  # simplejpeg rejects some files that Pillow reads
    with own_limits(), unreadable_images():
        return _read_with_pillow(data, max_image_pixels)


@contextmanager
def own_limits() -> Iterator[None]:
    """Pillow's limits are lifted, for the whole process; sizes are checked here, before pixels are decoded."""
    text_limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    pixel_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = _TEXT_LIMIT
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = pixel_limit
        PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = text_limits


@contextmanager
def unreadable_images() -> Iterator[None]:
    """Whatever is raised within becomes an `UnreadableImage`."""
    try:
        yield
    except UnreadableImage:
        raise
    except tiff.Unsupported as error:
        raise UnreadableImage(str(error), "unsupported") from error
    except Exception as error:  # damaged files make Pillow's plugins raise nearly any exception
        raise UnreadableImage(f"not a readable image ({type(error).__name__}: {error})") from error


def stored_size(data: bytes, max_image_pixels: int = MAX_PIXELS) -> tuple[int, int, bool]:
    """(W, H) of an image as it is decoded, and whether it has an EXIF orientation, which is not applied.

    Raises:
        UnreadableImage: as `decode_rgb`.
    """
    with own_limits(), unreadable_images():
        layout = tiff.read_layout(data)
        if layout is None or layout.fits_pillow:
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                # Tags of a PNG may follow its pixels: without any, Pillow would decode all pixels to find none.
                may_have_tags = image.format != "PNG" or b"eXIf" in data
                rotated = may_have_tags and image.getexif().get(_ORIENTATION) in _UNDO
        if layout is not None:
            width, height, rotated = layout.width, layout.height, layout.orientation in _UNDO
        _check_size(width, height, max_image_pixels)
    return width, height, rotated


def _read_with_pillow(data: bytes, max_image_pixels: int) -> np.ndarray:
    layout = tiff.read_layout(data)
    if layout is not None and not layout.fits_pillow:
        _check_size(layout.width, layout.height, max_image_pixels)
        return tiff.read(data, layout)
    with Image.open(io.BytesIO(data)) as image:
        _check_size(image.width, image.height, max_image_pixels)
        maximum = _stated_maximum(image)
        if image.mode == "RGB" and maximum > 255:
            return _read_16_bit_ppm(data, image, maximum)
        if image.mode == "F" or image.mode.startswith("I"):
            *_, parameters = image.tile[0]
            if layout is not None and layout.is_compressed and "B" in parameters[0]:  # libtiff swaps the bytes itself
                values = _decode_as(data, parameters[0].replace("B", "N"))
            else:
                values = np.asarray(_as_stored(image))
            if 255 < maximum < 65535:  # Pillow has scaled it to 65535
                values = to_8_bits(values, (0, 65535))
            return values.view(np.uint32) if layout is not None and layout.sample_type == (1, 32) else values
        is_wide = data[24] == 16 if image.format == "PNG" else layout is not None and layout.sample_type == (1, 16)
        if is_wide and image.mode in ("RGB", "RGBA"):
            *_, parameters = image.tile[0]
            return _read_16_bits(data, parameters if isinstance(parameters, str) else parameters[0])
        return np.array(_as_stored(image).convert("RGB"))


def _as_stored(image: Image.Image) -> Image.Image:
    """The image without the orientation that Pillow applies to TIFF, and only to that, as it loads the pixels."""
    undo = _UNDO.get(image.getexif().get(_ORIENTATION)) if image.format == "TIFF" else None
    image.load()
    return image if undo is None else image.transpose(undo)


def _stated_maximum(image: Image.Image) -> int:
    """The largest value of a PGM or PPM file according to its header; 255 for other files."""
    if image.format != "PPM" or image.mode == "F":
        return 255
    *_, parameters = image.tile[0]
    if isinstance(parameters, str):
        return 65535 if parameters == "I;16B" else 255
    return parameters[-1]


def _read_16_bit_ppm(data: bytes, image: Image.Image, maximum: int) -> np.ndarray:
    """As `read_values`, of a PPM file: Pillow drops the low bytes of its colours, but not those of a PGM file."""
    _, _, start, _ = image.tile[0]
    magic = {b"P6": b"P5", b"P3": b"P2"}[data[:2]]
    width, height = 3 * image.width, image.height
    grey = b"%s %d %d %d\n" % (magic, width, height, maximum) + data[start:]
    return _read_with_pillow(grey, width * height).reshape(height, -1, 3)


def _read_16_bits(data: bytes, raw_mode: str) -> np.ndarray:
    """(H, W, 3) or (H, W) uint16 of a file with several 16-bit channels, of which Pillow takes the high bytes.

    Pillow decodes the low bytes if the raw mode names the other byte order.
    """
    if raw_mode.startswith("LA"):  # grey and alpha: read as four channels of 8 bits
        high, low, *_ = np.moveaxis(_decode_as(data, "RGBA").astype(np.uint16), -1, 0)
        return high << 8 | low
    channels, order = raw_mode.split(";16")
    order = sys.byteorder[0].upper() if order == "N" else order
    other = {"B": "L", "L": "B"}[order]
    high, low = (_decode_as(data, f"{channels.upper()};16{which}").astype(np.uint16) for which in (order, other))
    return (high << 8 | low)[:, :, :3]


def _decode_as(data: bytes, raw_mode: str) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        tiles = []
        for tile in image.tile:
            parameters = raw_mode if isinstance(tile[3], str) else (raw_mode, *tile[3][1:])
            tiles.append(tile._replace(args=parameters) if hasattr(tile, "_replace") else (*tile[:3], parameters))
        image.tile = tiles  # plain tuples before Pillow 11
        return np.asarray(_as_stored(image))


def _check_size(width: int, height: int, max_image_pixels: int) -> None:
    if width * height > max_image_pixels:
        raise UnreadableImage(
            f"{width} x {height} pixels exceed the limit of {max_image_pixels} (--max_image_pixels)",
            "over the pixel limit",
        )
