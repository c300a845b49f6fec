"""Pixels against Pillow and torchvision, and normalisation on the device."""

import numpy as np
import pytest
import torch
from images import picture
from torchvision import transforms as tv

from util.data.transforms import IMAGENET_MEAN, IMAGENET_STD, AugmentedCrop, CenterCrop, RandomCrop, ToModelInput


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
