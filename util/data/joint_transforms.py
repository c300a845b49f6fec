"""Geometry of images with their label maps, and the photometric distortion of MMSegmentation, in uint8 on the CPU.

Images are resized by bilinear interpolation without antialias (as OpenCV does), labels by the nearest pixel. Shapes:
H, W source image, S crop side, s input side of the probe.
"""

import random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from util.data.segmentation import LabelledImage

_LONGEST = 4  # an image fits in (4 x short side, short side): (2048, 512) for ADE20K
_TRIES = 10


def fit(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Size with the aspect ratio of an image, as large as fits in (4 x short_side, short_side) either way round."""
    scale = min(_LONGEST * short_side / max(height, width), short_side / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_image(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """(H, W, 3) -> (3, *size)."""
    view = torch.from_numpy(image).permute(2, 0, 1)[None]
    return F.interpolate(view, size=size, mode="bilinear", antialias=False)[0]


def resize_label(label: np.ndarray, size: tuple[int, int]) -> Tensor:
    """(H, W) -> size."""
    return F.interpolate(torch.from_numpy(label)[None, None], size=size, mode="nearest")[0, 0]


class TrainingCrop:
    """Random scale, crop, flip and photometric distortion; a crop that sticks out is padded right and below.

    -> image (3, S, S) uint8, label (S, S) uint8, size (2,) of the part that is not padding.

    Args:
        short_side: what `fit` gets, times U(0.5, 2).
        max_share: a crop with more of one class than this, of its valid pixels, is drawn again, up to ten times.
    """

    def __init__(self, crop: int, short_side: int, ignore_index: int, max_share: float = 0.75) -> None:
        self.crop, self.short_side, self.ignore_index, self.max_share = crop, short_side, ignore_index, max_share

    def __call__(self, sample: LabelledImage) -> tuple[Tensor, Tensor, Tensor]:
        height, width = sample.label.shape
        size = fit(height, width, int(self.short_side * random.uniform(0.5, 2.0)))
        image, label = resize_image(sample.image, size), resize_label(sample.label, size)
        top, left = self._choose(label)
        image = image[:, top : top + self.crop, left : left + self.crop]
        label = label[top : top + self.crop, left : left + self.crop]
        if random.random() < 0.5:
            image, label = image.flip(-1), label.flip(-1)
        image = torch.from_numpy(distort(image.permute(1, 2, 0).numpy())).permute(2, 0, 1)
        height, width = label.shape
        padding = (0, self.crop - width, 0, self.crop - height)
        label = F.pad(label, padding, value=self.ignore_index)
        return F.pad(image, padding), label, torch.tensor([height, width])

    def _choose(self, label: Tensor) -> tuple[int, int]:
        """Corner of the crop."""
        for _ in range(_TRIES + 1):
            top, left = (random.randint(0, max(length - self.crop, 0)) for length in label.shape)
            counts = torch.bincount(label[top : top + self.crop, left : left + self.crop].flatten(), minlength=256)
            counts[self.ignore_index] = 0
            if (counts > 0).sum() > 1 and counts.max() < self.max_share * counts.sum():
                break
        return top, left


def distort(image: np.ndarray) -> np.ndarray:
    """Brightness, contrast, saturation and hue, each with probability one half: (H, W, 3) -> (H, W, 3) uint8."""
    if random.random() < 0.5:
        image = _linear(image, 1.0, random.uniform(-32, 32))
    contrast_first = random.random() < 0.5
    contrast = random.uniform(0.5, 1.5) if random.random() < 0.5 else 1.0
    if contrast_first:
        image = _linear(image, contrast, 0.0)
    saturation = random.uniform(0.5, 1.5) if random.random() < 0.5 else 1.0
    hue = random.randint(-18, 18) if random.random() < 0.5 else 0  # of 180
    if saturation != 1.0 or hue != 0:
        hsv = np.array(Image.fromarray(np.ascontiguousarray(image)).convert("HSV"))
        hsv[:, :, 0] += np.uint8(round(hue * 256 / 180) % 256)  # wraps around, as hues do
        hsv[:, :, 1] = _linear(hsv[:, :, 1], saturation, 0.0)
        image = np.array(Image.fromarray(hsv, "HSV").convert("RGB"))
    return image if contrast_first else _linear(image, contrast, 0.0)


def _linear(values: np.ndarray, factor: float, offset: float) -> np.ndarray:
    """uint8 -> uint8: values * factor + offset, clipped and cut to whole numbers."""
    return (np.arange(256) * factor + offset).clip(0, 255).astype(np.uint8)[values]


class EvaluationResize:
    """Test image at its inference size, label at the original one: image (3, h, w) uint8, label (H, W) uint8."""

    def __init__(self, short_side: int) -> None:
        self.short_side = short_side

    def __call__(self, sample: LabelledImage) -> tuple[Tensor, Tensor]:
        height, width = sample.label.shape
        size = fit(height, width, self.short_side)
        return resize_image(sample.image, size).contiguous(), torch.from_numpy(sample.label)


class ProbeResize:
    """The whole image squeezed to s x s by antialiased bicubic interpolation (CAPI): image (3, s, s), label uint8.

    Args:
        resize_labels: labels of this size, too, by the nearest pixel; otherwise of the original one.
    """

    def __init__(self, side: int, resize_labels: bool) -> None:
        self.side, self.resize_labels = side, resize_labels

    def __call__(self, sample: LabelledImage) -> tuple[Tensor, Tensor]:
        view = torch.from_numpy(sample.image).permute(2, 0, 1)[None]
        size = (self.side, self.side)
        image = F.interpolate(view, size=size, mode="bicubic", antialias=True)[0].contiguous()
        label = resize_label(sample.label, size) if self.resize_labels else torch.from_numpy(sample.label)
        return image, label
