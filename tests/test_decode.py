"""Decoded pixels equal Pillow's, with and without simplejpeg."""

import contextlib
import io

import numpy as np
import pytest
from images import encode, picture
from PIL import Image

from util.data import decode
from util.data.decode import decode_rgb


def with_pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


JPEGS = {
    "4:4:4": encode(picture(), quality=90, subsampling=0),
    "4:2:0": encode(picture(), quality=75, subsampling=2),
    "grey": encode(picture(mode="L")),
    "progressive": encode(picture(), progressive=True),
    "cmyk": encode(picture(mode="CMYK")),
    "odd size": encode(picture(size=(37, 41))),
    "one pixel": encode(picture(size=(1, 1))),
}
OTHERS = {
    "png": encode(picture(), "PNG"),
    "rgba": encode(picture(mode="RGBA"), "PNG"),
    "palette": encode(picture(mode="P"), "PNG"),
    "palette with transparency": encode(picture(mode="P"), "PNG", transparency=3),
    "gif": encode(picture(mode="P"), "GIF"),
    "bmp": encode(picture(), "BMP"),
    "black and white": encode(picture(mode="1"), "PNG"),
    "grey with alpha": encode(picture(mode="LA"), "PNG"),
}


@pytest.mark.parametrize("accelerated", [True, False])
@pytest.mark.parametrize("data", [*JPEGS.values(), *OTHERS.values()], ids=[*JPEGS, *OTHERS])
def test_pixels_equal_pillows(data, accelerated, monkeypatch):
    if not accelerated:
        monkeypatch.setattr(decode, "simplejpeg", None)
    image = decode_rgb(data)
    assert image.dtype == np.uint8
    assert image.flags.writeable
    np.testing.assert_array_equal(image, with_pillow(data))


def test_the_accelerator_is_used(monkeypatch):
    assert decode.simplejpeg is not None
    monkeypatch.setattr(decode, "_decode_with_pillow", lambda data: pytest.fail("decoded by Pillow"))
    decode_rgb(JPEGS["4:2:0"])


def test_sixteen_bits_keep_their_range():
    values = (np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16)
    image = decode_rgb(encode(Image.fromarray(values), "PNG"))
    np.testing.assert_allclose(image[..., 0], values / 257, atol=0.5)
    assert image.shape == (64, 64, 3)


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_rgb(encode(picture(size=(40, 48)), exif=exif)).shape == (40, 48, 3)


BROKEN = {
    "empty": b"",
    "text": b"<html>not found</html>",
    "truncated": JPEGS["4:2:0"][: len(JPEGS["4:2:0"]) // 2],
    "header only": JPEGS["4:2:0"][:20],
    "truncated png": OTHERS["png"][:200],
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_damaged_files_raise_value_error(data):
    with pytest.raises(ValueError, match="not a readable image"):
        decode_rgb(data)


def test_a_decompression_bomb_is_rejected_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 1000)
    for data in (JPEGS["4:4:4"], OTHERS["png"]):
        with pytest.raises(ValueError, match="48 x 40 pixels exceed the limit of 1000"):
            decode_rgb(data)


def test_flipped_bytes_raise_no_other_error():
    """A damaged file either loads or raises ValueError."""
    generator = np.random.default_rng(0)
    for data in (JPEGS["4:2:0"], JPEGS["cmyk"], OTHERS["png"], OTHERS["gif"]):
        for _ in range(40):
            damaged = bytearray(data)
            for place in generator.integers(0, len(data), 4):
                damaged[place] = generator.integers(0, 256)
            with contextlib.suppress(ValueError):
                assert decode_rgb(bytes(damaged)).shape[-1] == 3
