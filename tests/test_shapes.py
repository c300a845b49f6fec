import hashlib

import numpy as np
import pytest

from util.data import shapes


def test_images_are_the_same_on_every_machine():
    """Drawn with IEEE arithmetic only; if this fails, the images changed, and with them every result on Shapes."""
    pixels = b"".join(shapes.draw_shape(0, split, i)[0].tobytes() for split in ("train", "val") for i in range(20))
    assert hashlib.sha256(pixels).hexdigest()[:16] == "2ed003e2f9011128"


def test_an_image_is_a_function_of_seed_split_and_index():
    image, label = shapes.draw_shape(0, "train", 3)
    again, _ = shapes.draw_shape(0, "train", 3)
    assert np.array_equal(image, again)
    assert label == 3
    for other in [(1, "train", 3), (0, "val", 3), (0, "train", 13)]:
        assert not np.array_equal(image, shapes.draw_shape(*other)[0])


@pytest.mark.parametrize("size", [32, 64, 97])
def test_any_size(size):
    image, _ = shapes.draw_shape(0, "val", 0, size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8


def test_every_class_is_drawn_and_differs():
    assert sorted({shapes.draw_shape(0, "train", i)[1] for i in range(10)}) == list(range(10))
    axis = np.linspace(-1.2, 1.2, 64)
    x, y = np.meshgrid(axis, axis)
    covers = [(shapes._SHAPES[name][0](x, y) < 0) for name in shapes.CLASSES]
    for i, cover in enumerate(covers):
        assert 0.05 < cover.mean() < 0.7, shapes.CLASSES[i]
        for other in covers[i + 1 :]:
            assert (cover != other).mean() > 0.02


def test_all_classes_cover_the_same_area():
    """Otherwise the mean colour would say something about the class."""
    axis = np.linspace(-1.6, 1.6, 400)
    for name in shapes.CLASSES:
        distance, area = shapes._SHAPES[name]
        scale = np.sqrt(1.6 / area)
        x, y = np.meshgrid(axis / scale, axis / scale)
        assert (distance(x, y) < 0).mean() * 3.2**2 == pytest.approx(1.6, rel=0.02), name


def test_pixels_say_little_about_the_class():
    """Nearest neighbours of raw pixels are not far above chance (10 %)."""
    train, queries = (
        np.stack([shapes.draw_shape(0, split, i, 16)[0].reshape(-1) for i in range(count)]).astype(np.float32) / 255
        for split, count in (("train", 1000), ("val", 400))
    )
    train, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, queries))
    nearest = (queries @ train.T).argmax(axis=1)
    assert (nearest % 10 == np.arange(400) % 10).mean() < 0.2


def test_there_are_plain_and_busy_patches():
    image = shapes.draw_shape(0, "train", 0)[0].reshape(8, 8, 8, 8, 3)  # rows of patches of 8 pixels
    spread = image.std(axis=(1, 3)).mean(axis=-1)
    assert (spread == 0).mean() > 0.1
    assert (spread > 20).mean() > 0.1


def test_shapes_contrast_with_the_background():
    spread = [shapes.draw_shape(0, "train", i)[0].std() for i in range(50)]
    assert min(spread) > 8
