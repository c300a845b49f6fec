"""From the bytes of an image file to RGB pixels: Pillow's pixels, decoded faster with simplejpeg where it can."""

import io

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:  # optional accelerator: without it Pillow decodes everything
    simplejpeg = None

MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs

# simplejpeg's colours differ from Pillow's for CMYK, so Pillow decodes CMYK.
_SIMPLE_COLORSPACES = ("YCbCr", "Gray", "RGB")


def decode_rgb(data: bytes) -> np.ndarray:
    """Bytes of an image file -> (H, W, 3) uint8. Greyscale, palette, CMYK, RGBA and 16-bit images are converted.

    As in torchvision's ImageFolder, transparency is dropped and EXIF orientation is not applied.

    Raises:
        ValueError: not an image, a damaged one, or one of more than `MAX_PIXELS`.
    """
    if simplejpeg is not None and data[:2] == b"\xff\xd8":
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            if colorspace in _SIMPLE_COLORSPACES and height * width <= MAX_PIXELS:
                return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            pass  # simplejpeg rejects some files that Pillow reads
    return _decode_with_pillow(data)


def _decode_with_pillow(data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels exceed the limit of {MAX_PIXELS}")
            if image.mode.startswith("I"):  # 16 bits per sample: Pillow's own conversion clips at 255
                grey = (np.asarray(image).astype(np.float64) / 257).clip(0, 255).round().astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            return np.array(image.convert("RGB"))
    except Exception as error:  # damaged files make Pillow's plugins raise nearly any exception
        raise ValueError(f"not a readable image ({type(error).__name__}: {error})") from error
