"""Decoded pixels equal Pillow's, with and without simplejpeg."""

import contextlib
import io
import warnings

import numpy as np
import pytest
from images import encode, picture, write_png_16, write_tiff
from PIL import Image, PngImagePlugin

from util.data import decode, tiff
from util.data.decode import UnreadableImage, decode_rgb, stored_size


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
    monkeypatch.setattr(decode, "_read_with_pillow", lambda *_: pytest.fail("decoded by Pillow"))
    decode_rgb(JPEGS["4:2:0"])


GREY_16 = Image.fromarray(np.arange(40 * 48, dtype=np.uint16).reshape(40, 48))
ROTATED = {  # of each way to decode: image, format, options
    "jpeg": (picture(), "JPEG", {}),
    "webp": (picture(), "WEBP", {"lossless": True}),
    "png": (picture(), "PNG", {}),
    "tiff": (picture(), "TIFF", {}),
    "compressed tiff": (picture(), "TIFF", {"compression": "tiff_lzw"}),
    "grey tiff of 16 bits": (GREY_16, "TIFF", {}),
    "compressed float tiff": (picture(mode="F"), "TIFF", {"compression": "tiff_lzw"}),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("image", "kind", "options"), ROTATED.values(), ids=ROTATED)
def test_exif_orientation_is_not_applied_but_found(image, kind, options, orientation):
    """Pillow itself applies those of TIFF."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, kind, exif=exif, **options)
    np.testing.assert_array_equal(decode_rgb(data), decode_rgb(encode(image, kind, **options)))
    assert stored_size(data) == (48, 40, orientation != 1)
    assert stored_size(encode(image, kind, **options)) == (48, 40, False)


@pytest.mark.parametrize("kind", ["uint16", "float64"])
def test_the_orientation_of_other_tiff_types_is_found_too(kind):
    """Colours of 16 bits, which Pillow reads, and what tifffile reads."""
    tifffile = pytest.importorskip("tifffile")
    files = {}
    for orientation in (1, 6):
        file = io.BytesIO()
        tag = (274, "H", 1, orientation, True)
        tifffile.imwrite(file, stored(kind, 0, 4095, 3), photometric="rgb", extratags=[tag])
        files[orientation] = file.getvalue()
    np.testing.assert_array_equal(decode_rgb(files[6]), decode_rgb(files[1]))
    assert [stored_size(data) for data in files.values()] == [(48, 40, False), (48, 40, True)]


def test_the_orientation_of_a_png_may_follow_the_pixels():
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encode(picture(), "PNG", exif=exif)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    chunk, rest = data[start:end], data[:start] + data[end:]
    assert stored_size(rest[:-12] + chunk + rest[-12:]) == (48, 40, True)


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


def test_an_image_over_the_pixel_limit_is_rejected_before_it_is_decoded():
    for data in (JPEGS["4:4:4"], OTHERS["png"], write_tiff(np.zeros((40, 48), np.float32))):
        with pytest.raises(UnreadableImage, match="48 x 40 pixels exceed the limit of 1000") as error:
            decode_rgb(data, max_image_pixels=1000)
        assert error.value.reason == "over the pixel limit"


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


def test_long_texts_and_large_images_are_no_damage():
    """Pillow stops at 1 MB of text, and warns from 89 megapixels on."""
    texts = PngImagePlugin.PngInfo()
    texts.add_text("zTXt", "x" * (1 << 21), zip=True)
    texts.add_itxt("iTXt", "x" * (1 << 21))
    assert decode_rgb(encode(picture(), "PNG", pnginfo=texts)).shape == (40, 48, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_rgb(encode(Image.new("1", (9500, 9500)), "PNG"))[0, 0, 0] == 0
    assert Image.MAX_IMAGE_PIXELS < 9500**2  # for other users of Pillow


# ------------------------------------------------------------------------------------- more than 8 bits

RANGES = {  # type: (range of the data, default range)
    "uint16": [((0, 4095), (0, 65535)), ((0, 65535), (0, 65535)), ((0, 1023), (0, 65535)), ((0, 255), (0, 255))],
    "int16": [((-1024, 3071), (0, 65535)), ((0, 255), (0, 255))],
    "int32": [((0, 65535), (0, 65535)), ((0, 100_000), (0, 2**32 - 1)), ((0, 255), (0, 255))],
    "uint32": [((0, 4095), (0, 65535)), ((0, 2**32 - 1), (0, 2**32 - 1))],
    "float32": [((0, 1), (0, 1)), ((0, 255), (0, 255)), ((-1000, 3000), (0, 65535))],
}
CASES = [(kind, *ranges) for kind, several in RANGES.items() for ranges in several]


def stored(kind, low, high, channels):
    ramp = np.linspace(low, high, 40 * 48 * channels).reshape(40, 48, channels).astype(kind)
    return ramp if channels == 3 else ramp[:, :, 0]


def scaled(values, low, high):
    return ((values.astype(float) - low) / (high - low) * 255).clip(0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("kind", "of_data", "by_default"), CASES)
def test_tiff_values_are_scaled_by_their_range(kind, of_data, by_default, channels, byte_order):
    values = stored(kind, *of_data, channels)
    data = write_tiff(values, byte_order)
    if tiff.read_layout(data).fits_pillow is False:
        pytest.importorskip("tifffile")
    for given, used in ((of_data, of_data), (None, by_default)):
        image = decode_rgb(data, given)
        expected = scaled(values, *used)
        np.testing.assert_array_equal(image, expected if channels == 3 else np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("kind", ["uint16", "int16", "int32", "uint32", "float32"])
def test_compressed_tiff_values_have_their_byte_order(kind, byte_order):
    """libtiff, which decompresses them for Pillow, returns the bytes in the order of the machine."""
    tifffile = pytest.importorskip("tifffile")
    values = stored(kind, 0 if kind[0] == "u" else -1000, 3000, 1)
    file = io.BytesIO()
    tifffile.imwrite(file, values, byteorder=byte_order, compression="zlib")
    low = int(values.min())
    image = decode_rgb(file.getvalue(), (low, 3000))[..., 0].astype(int)
    np.testing.assert_allclose(image, scaled(values, low, 3000), atol=1)


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "int32", "float32"])
def test_a_negative_is_inverted_as_with_8_bits(kind, byte_order):
    """TIFF's WhiteIsZero, common for X-rays."""
    if kind in ("int16", "int32") or (kind, byte_order) == ("uint16", ">"):
        pytest.importorskip("tifffile")
    values = np.asarray(picture(mode="L")).astype(kind)
    image = decode_rgb(write_tiff(values, byte_order, photometric=0))
    np.testing.assert_array_equal(image[..., 0], 255 - np.asarray(picture(mode="L")))


def test_alpha_next_to_16_bit_grey_is_dropped():
    pytest.importorskip("tifffile")
    values = stored("uint16", 0, 65535, 3)[..., :2]
    image = decode_rgb(write_tiff(values, extra=(2,)))
    np.testing.assert_array_equal(image, np.broadcast_to(scaled(values[..., :1], 0, 65535), (40, 48, 3)))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_values_are_scaled_by_their_range(channels):
    """Grey and RGB, with and without alpha; Pillow itself drops the low bytes of all but grey."""
    values = stored("uint16", 0, 4095, 3)[..., :2] if channels == 2 else stored("uint16", 0, 4095, 3)
    if channels == 4:
        values = np.concatenate([values, values[..., :1]], axis=-1)
    data = write_png_16(values[..., 0] if channels == 1 else values)
    colours = values[..., :1] if channels < 3 else values[..., :3]
    expected = np.broadcast_to(scaled(colours, 0, 4095), (40, 48, 3))
    np.testing.assert_array_equal(decode_rgb(data, (0, 4095)), expected)
    np.testing.assert_array_equal(decode_rgb(data), np.broadcast_to(scaled(colours, 0, 65535), (40, 48, 3)))


@pytest.mark.parametrize("kind", ["uint16", "int16", "int32", "float32"])
def test_8_bit_values_in_a_wider_type_are_unchanged_as_in_pillow(kind):
    values = np.asarray(picture(mode="L"))
    data = write_tiff(values.astype(kind))
    np.testing.assert_array_equal(decode_rgb(data)[..., 0], values)
    np.testing.assert_array_equal(decode_rgb(data), with_pillow(data))


def test_8_bit_images_are_not_rescaled():
    for data in (JPEGS["4:2:0"], OTHERS["png"], write_tiff(np.asarray(picture()))):
        np.testing.assert_array_equal(decode_rgb(data, (0, 4095)), decode_rgb(data))


def test_values_that_are_not_finite_become_black_or_white():
    values = np.array([[np.nan, np.inf, -np.inf, 0.0, 0.5, 1.0]], np.float32)
    assert decode_rgb(write_tiff(values), (0, 1))[0, :, 0].tolist() == [0, 255, 0, 0, 128, 255]
    assert decode_rgb(write_tiff(values))[0, :, 0].tolist() == [0, 255, 0, 0, 128, 255]


def test_pgm_files_state_their_own_maximum():
    data = b"P5 3 1 4095\n" + np.array([0, 819, 4095], ">u2").tobytes()
    assert decode_rgb(data)[0, :, 0].tolist() == [0, 51, 255]
    assert decode_rgb(data, (0, 100))[0, :, 0].tolist() == [0, 51, 255]
    assert decode_rgb(data.replace(b"4095", b"65535"), (0, 4095))[0, :, 0].tolist() == [0, 51, 255]


@pytest.mark.parametrize("magic", ["P6", "P3"])
def test_16_bit_ppm_values_are_scaled_by_their_range(magic):
    """Pillow itself drops the low bytes. A maximum other than 65535 is the range, as in PGM; 8 bits are unchanged."""
    values = stored("uint16", 0, 4095, 3)
    body = values.astype(">u2").tobytes() if magic == "P6" else " ".join(map(str, values.ravel())).encode() + b"\n# end"
    head = f"{magic} 48 40 65535\n".encode()
    np.testing.assert_array_equal(decode_rgb(head + body, (0, 4095)), scaled(values, 0, 4095))
    np.testing.assert_array_equal(decode_rgb(head + body), scaled(values, 0, 65535))
    by_maximum = head.replace(b"65535", b"4095") + body
    for value_range in (None, (0, 100)):
        np.testing.assert_allclose(decode_rgb(by_maximum, value_range).astype(int), scaled(values, 0, 4095), atol=1)
    with pytest.raises(UnreadableImage, match="not a readable image"):
        decode_rgb(head + body[:500])
    small = np.asarray(picture())
    body = small.tobytes() if magic == "P6" else " ".join(map(str, small.ravel())).encode()
    np.testing.assert_array_equal(decode_rgb(head.replace(b"65535", b"255") + body, (0, 100)), small)


def test_floats_of_a_portable_float_map_are_scaled_by_their_range():
    data = b"Pf 3 1 -1.0\n" + np.array([0, 0.5, 1], "<f4").tobytes()
    assert decode_rgb(data)[0, :, 0].tolist() == [0, 128, 255]
    assert decode_rgb(data, (0, 2))[0, :, 0].tolist() == [0, 64, 128]


@pytest.mark.parametrize("kind", ["uint16", "float32"])
@pytest.mark.parametrize(
    ("photometric", "name"), [(5, "CMYK"), (6, "YCbCr"), (8, "Lab"), (32803, "photometric type 32")]
)
def test_other_colours_of_more_than_8_bits_are_unsupported(kind, photometric, name):
    """Their values are no shares of red, green and blue; in CMYK 0 is white."""
    channels = {5: 4, 32803: 1}.get(photometric, 3)
    values = np.zeros((8, 8, channels) if channels > 1 else (8, 8), kind)
    with pytest.raises(
        UnreadableImage, match=f"^{name}.* of more than 8 bits is not supported: expected grey"
    ) as error:
        decode_rgb(write_tiff(values, photometric=photometric))
    assert error.value.reason == "unsupported"
    inks = decode_rgb(write_tiff(np.zeros((8, 8, 4), np.uint8), photometric=5))
    assert (inks == 255).all()


BANDS = {
    "2 grey": (np.zeros((8, 8, 2), np.uint8), 1, (0,), r"^2 bands are not supported"),
    "4 grey": (np.zeros((8, 8, 4), np.uint8), 1, (0, 0, 0), r"^4 bands are not supported"),
    "4, the last not alpha": (np.zeros((8, 8, 4), np.uint8), 2, (0,), r"^4 bands are not supported"),
    "5 grey": (np.zeros((8, 8, 5), np.uint8), 1, (0, 0, 0, 0), r"^5 bands are not supported"),
    "5 with RGB": (np.zeros((8, 8, 5), np.uint8), 2, (0, 0), r"^5 bands are not supported"),
    "13": (np.zeros((8, 8, 13), np.uint16), 1, (0,) * 12, r"^13 bands are not supported"),
    "5 floats": (np.zeros((8, 8, 5), np.float32), 1, (0,) * 4, r"^5 bands are not supported"),
}


@pytest.mark.parametrize(("values", "photometric", "extra", "message"), BANDS.values(), ids=BANDS)
def test_bands_beyond_rgb_are_unsupported_and_not_dropped(values, photometric, extra, message):
    with pytest.raises(UnreadableImage, match=message) as error:
        decode_rgb(write_tiff(values, photometric=photometric, extra=extra))
    assert error.value.reason == "unsupported"


def test_bands_stored_as_pages_are_unsupported():
    pages = [Image.fromarray(np.full((8, 8), i, np.uint8)) for i in range(13)]
    data = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    with pytest.raises(UnreadableImage, match="^13 bands are not supported"):
        decode_rgb(data)
    thumbnail = encode(pages[0], "TIFF", save_all=True, append_images=[pages[1].resize((4, 4))])
    assert decode_rgb(thumbnail).shape == (8, 8, 3)


def test_alpha_is_dropped_from_tiff_as_from_png():
    rgba = np.asarray(picture(mode="RGBA"))
    for extra in ((2,), ()):
        np.testing.assert_array_equal(decode_rgb(write_tiff(rgba, photometric=2, extra=extra)), rgba[..., :3])


@pytest.mark.parametrize("kind", ["complex64", "complex128"])
def test_complex_values_are_unsupported(kind):
    """As of radar images: the real part alone is not the image."""
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, np.ones((8, 8), kind))
    with pytest.raises(UnreadableImage, match="^complex values are not supported: expected") as error:
        decode_rgb(file.getvalue())
    assert error.value.reason == "unsupported"


def test_types_that_pillow_lacks_name_tifffile(monkeypatch):
    monkeypatch.setattr(tiff, "tifffile", None)
    with pytest.raises(UnreadableImage, match=r"3 x 32 bits \(float\) is not supported.*pip install tifffile") as error:
        decode_rgb(write_tiff(np.zeros((8, 8, 3), np.float32)))
    assert error.value.reason == "unsupported"
