"""Pixels against Pillow and torchvision, and normalisation on the device."""

import numpy as np
import pytest
import torch
from images import picture
from programs import run
from torchvision import transforms as tv

from util.data.joint_transforms import fit
from util.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    AugmentedCrop,
    CenterCrop,
    RandomCrop,
    ToModelInput,
    one_draw_box,
)
from util.run.resolve import evaluation_crop


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (64, 64), (97, 106)])
def test_random_crop_matches_torchvision_to_two_levels(size):
    """The same box from the same random state; pixels as Pillow 10 to 12 resize them."""
    image = picture(size=size)
    reference = tv.Compose(
        [tv.RandomResizedCrop(64, (0.2, 1.0), interpolation=tv.InterpolationMode.BICUBIC), tv.PILToTensor()]
    )
    for seed in range(10):
        torch.manual_seed(seed)
        expected = reference(image)
        torch.manual_seed(seed)
        ours = RandomCrop(64)(np.asarray(image).copy())
        assert ours.shape == (3, 64, 64)
        assert ours.is_contiguous()
        difference = (ours.int() - expected.int()).abs()
        assert difference.max() <= 2
        assert difference.float().mean() < 0.035  # levels; measured on full-size photographs against Pillow 13


def mean_area(height, width, draws=200):
    """Mean share of the image that MAE's crop for probes covers at scale (0.08, 1), by integration."""
    area, ratio = np.meshgrid(np.linspace(0.08, 1, draws), np.exp(np.linspace(np.log(3 / 4), np.log(4 / 3), draws)))
    sides = np.sqrt(area / ratio * width / height), np.sqrt(area * ratio * height / width)
    return (np.minimum(sides[0], 1) * np.minimum(sides[1], 1)).mean()


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (200, 200), (100, 800)])
def test_the_probes_crop_is_drawn_once_and_clamped(size):
    """Its mean area is larger than that of torchvision's crop, which is drawn again until it fits."""
    boxes = np.array([one_draw_box(*size, [0.08, 1.0]) for _ in range(4000)])
    top, left, height, width = boxes.T
    assert (height * width / np.prod(size)).mean() == pytest.approx(mean_area(*size), abs=0.012)
    for start, side, whole in ((top, height, size[0]), (left, width, size[1])):
        assert (start >= 0).all()
        assert (start + side <= whole).all()
        free = side < whole
        assert (start[free] / (whole - side[free])).mean() == pytest.approx(0.5, abs=0.05)
    if size == (375, 500):
        assert mean_area(*size) == pytest.approx(0.51, abs=0.02)


def test_images_of_a_few_pixels():
    assert {one_draw_box(1, 2, [0.08, 1.0])[2] for _ in range(200)} == {1}
    assert fit(3000, 2, 64) == (256, 1)


def test_the_probe_trains_on_that_crop(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("util.data.transforms.one_draw_box", lambda *given: drawn.append(given) or one_draw_box(*given))
    options = ["--model", "vit_micro_patch16", "--input_size", 16, "--patch_size", 4, "--max_steps", 1]
    options += ["--shapes_train", 4, "--shapes_val", 4, "--batch_size", 4, "--num_workers", 0, "--epochs", 1]
    run("main_linprobe", *options, "--output_dir", tmp_path)
    assert drawn == [(64, 64, [0.08, 1.0])] * 4


@pytest.mark.parametrize(("size", "share"), [(224, 0.875), (256, 1.0), (384, 1.0)])
def test_evaluation_above_224_pixels_sees_the_whole_shorter_side(size, share):
    """Up to there 7/8 of it, as in MAE."""
    side = 1024
    rows = np.repeat(np.arange(side, dtype=np.float32)[:, None] / side * 255, 1500, axis=1).astype(np.uint8)
    seen = CenterCrop(size, evaluation_crop(size, {}))(np.repeat(rows[..., None], 3, axis=2)).float()
    assert (seen.max() - seen.min()).item() / 255 == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (32, 32), (20, 300)])
@pytest.mark.parametrize("target", [224, 32])
def test_center_crop_matches_pillow_to_two_levels(size, target):
    image = picture(size=size)
    reference = tv.Compose(
        [
            tv.Resize(int(target / 0.875), interpolation=tv.InterpolationMode.BICUBIC),
            tv.CenterCrop(target),
            tv.PILToTensor(),
        ]
    )
    ours = CenterCrop(target)(np.asarray(image).copy())
    assert ours.shape == (3, target, target)
    assert (ours.int() - reference(image).int()).abs().max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 2)])
def test_tiny_images_work(size):
    image = np.zeros((*size, 3), np.uint8)
    for transform in (RandomCrop(32), CenterCrop(32), AugmentedCrop(32, "rand-m9-mstd0.5-inc1")):
        assert transform(image).shape == (3, 32, 32)


def test_random_crop_can_be_non_square():
    assert RandomCrop((32, 48))(np.zeros((60, 60, 3), np.uint8)).shape == (3, 32, 48)


def test_randaugment_survives_every_magnitude():
    """Posterize to zero bits, which Pillow 13 rejects, is drawn for 0.16 % of images."""
    transform = AugmentedCrop(16, "rand-m10-n4-mstd3-inc1")
    image = np.asarray(picture()).copy()
    for seed in range(400):
        torch.manual_seed(seed)
        np.random.seed(seed)
        assert transform(image).dtype == torch.uint8


def test_color_jitter_is_used_without_auto_augment():
    image = np.asarray(picture()).copy()
    plain = [RandomCrop(16, (1.0, 1.0))(image) for _ in range(2)]
    jittered = [AugmentedCrop(16, None, 0.4, scale=(1.0, 1.0))(image) for _ in range(2)]
    assert torch.equal(*plain)
    assert not torch.equal(*jittered)


def test_normalisation_on_the_device_equals_to_tensor_and_normalize():
    image = picture(size=(32, 32))
    reference = tv.Compose([tv.ToTensor(), tv.Normalize(IMAGENET_MEAN, IMAGENET_STD)])(image)
    batch = tv.PILToTensor()(image)[None]
    ours = ToModelInput(IMAGENET_MEAN, IMAGENET_STD, torch.device("cpu"), flip=False)(batch)
    assert torch.equal(ours[0], reference)


def test_flips_are_drawn_for_each_image():
    batch = torch.arange(8, dtype=torch.uint8).expand(200, 3, 4, 8).contiguous()
    to_input = ToModelInput((0.0,) * 3, (1.0,) * 3, torch.device("cpu"), flip=True)
    out = (to_input(batch) * 255).round().to(torch.uint8)
    flipped = (out == batch.flip(-1)).flatten(1).all(1)
    assert ((out == batch).flatten(1).all(1) ^ flipped).all()
    assert 60 < flipped.sum() < 140
