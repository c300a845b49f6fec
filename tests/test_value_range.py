"""Images of more than 8 bits in whole programs: the warning at the start, and the range that a checkpoint keeps."""

import numpy as np
import pytest
from images import write_png_16, write_tiff, write_tree
from programs import checkpoint, log_lines, run

from util.data.decode import decode_rgb
from util.data.sources import build_source, check_value_range

MICRO = ["--model", "vit_micro_patch16", "--input_size", 32, "--patch_size", 8, "--num_workers", 0]


def uniform(kind, low, high, shape=(32, 32), count=8):
    generator = np.random.default_rng(0)
    return [generator.uniform(low, high, shape).astype(kind) for _ in range(count)]


def alternating(kind, *ends):
    return [image for images in zip(*(uniform(kind, 0, end) for end in ends), strict=True) for image in images]


def constant(kind, *values):
    return [np.full((32, 32), value, kind) for value in values]


WARNS = {
    "10 bits": (
        uniform("uint16", 0, 1023),
        None,
        "values from 0 to 1022 in a sample of 8: the default range keeps 5 of",
    ),
    "10 bits, RGB": (uniform("uint16", 0, 1023, (32, 32, 3)), None, "the default range keeps 5 of 256 levels"),
    "12 bits": (uniform("uint16", 0, 4095), None, "give the range of the data as --value_range LOW HIGH"),
    "32 bits, thousands": (uniform("uint32", 0, 5000), None, "keeps 20 of 256 levels"),
    "signed 32 bits": (uniform("int32", 0, 1e6), None, "keeps 1 of 256 levels"),
    "small floats": (uniform("float32", 0, 0.01), None, "keeps 4 of 256 levels"),
    "signed": (uniform("int16", -32768, 32767), None, "starts at 0, and 50% of the values are below"),
    "floats from -1 to 1": (uniform("float32", -1, 1), None, "starts at 0, and 50% of the values are below"),
    "some floats above 1": (alternating("float32", 0.9, 1.05), None, "differs between images (0..1, 0..255)"),
    "some dark 12-bit images": (alternating("uint16", 4095, 200), None, "differs between images (0..255, 0..65535)"),
    "another range": (uniform("uint16", 0, 65535), (0, 0.5), "--value_range 0 0.5 keeps 1 of 256 levels"),
}
DOES_NOT = {
    "16 bits": (uniform("uint16", 0, 65535), None),
    "16 bits, some dark": (alternating("uint16", 65535, 2000), None),
    "16 bits and a black image": (uniform("uint16", 0, 65535) + constant("uint16", 0), None),
    "8 bits in 16": (uniform("uint16", 0, 256), None),
    "dark, 8 bits": (uniform("uint8", 0, 10), None),
    "constant": (constant("uint16", 0, 500, 1000, 4000), None),
    "floats from 0 to 1": (uniform("float32", 0, 1), None),
    "floats with a little undershoot": (uniform("float32", -0.005, 1), None),
    "not a number": (constant("float32", np.nan, np.nan), None),
    "12 bits, with their range": (uniform("uint16", 0, 4095), (0, 4095)),
    "12 bits, clipped": (uniform("uint16", 0, 4095), (1000, 1100)),
    "signed, with their range": (uniform("int16", -1000, 3000), (-1024, 3071)),
}


def warning(folder, images, value_range):
    files = {f"{i:02}.tif": write_tiff(image) for i, image in enumerate(images)}
    source = build_source(str(write_tree(folder, files)), "train", labels_needed=False, value_range=value_range)
    return check_value_range(source, value_range)


@pytest.mark.parametrize(("images", "value_range", "message"), WARNS.values(), ids=WARNS)
def test_a_range_that_loses_levels_is_reported(tmp_path, images, value_range, message):
    if images[0].ndim == 3 or images[0].dtype.kind in "iuf":
        pytest.importorskip("tifffile")
    assert message in warning(tmp_path / "d", images, value_range)


@pytest.mark.parametrize(("images", "value_range"), DOES_NOT.values(), ids=DOES_NOT)
def test_other_images_are_not_reported(tmp_path, images, value_range):
    assert warning(tmp_path / "d", images, value_range) is None


def textures():
    """{path: values in 0..1}: stripes along x or y around a fifth of the range, which few levels cannot show."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 48), ("val", 16)):
        for label, axis in (("columns", 0), ("rows", 1)):
            for i in range(count):
                wave = np.sin(1.5 * np.arange(32) + generator.uniform(0, 6)) * 0.01
                noise = generator.normal(0, 0.002, (32, 32))
                yield f"{split}/{label}/{i:02}.png", 0.2 + np.expand_dims(wave, axis) + noise


def test_with_their_range_they_train_like_8_bits(tmp_path):
    """The pixels are those of 8-bit images. Evaluation and other scripts take the range from the checkpoint."""
    files = {}
    for name, values in textures():
        files[name] = write_png_16((values * 4095).round().astype(np.uint16))
        pixels = (values * 255).round().astype(np.uint8)
        np.testing.assert_array_equal(decode_rgb(write_tiff(values.astype(np.float32)), (0, 1))[..., 0], pixels)
        np.testing.assert_allclose(decode_rgb(files[name], (0, 4095))[..., 0].astype(int), pixels, atol=1)
    data = write_tree(tmp_path / "d", files)
    options = [*MICRO, "--epochs", 3, "--batch_size", 8, "--lr", 1e-3, "--layer_decay", 1, "--reprob", 0, "--aa", ""]
    options += ["--mean", 0.2, 0.2, 0.2, "--std", 0.01, 0.01, 0.01, "--crop_pct", 1, "--data_path", data]
    log = run("main_finetune", *options, "--output_dir", tmp_path / "run", "--value_range", 0, 4095)
    best = log_lines(tmp_path / "run")[-1]["best_acc1"]
    assert best > 90
    assert "of 256 levels" not in log
    assert "keeps 1 of 256 levels" in run("main_finetune", *options, "--output_dir", tmp_path / "x", "--max_steps", 1)

    file = tmp_path / "run/checkpoint-best.pth"
    assert checkpoint(tmp_path / "run")["image"]["value_range"] == [0, 4095]
    log = run("main_finetune", "--eval", "--resume", file, "--data_path", data, "--num_workers", 0)
    assert f"acc1 {best:.4f}" in log
    assert "value_range 0 4095 (checkpoint)" in log
    log = run("main_knn", "--finetune", file, "--global_pool", "--nb_knn", 3, "--data_path", data, "--num_workers", 0)
    assert "value_range 0 4095 (checkpoint)" in log
    assert "of 256 levels" not in log
