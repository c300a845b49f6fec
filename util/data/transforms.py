"""Geometry of images on the CPU, in uint8, and colour on the device.

A decoded image is cropped first and resized as a channels-last view with PyTorch's antialiased bicubic kernel, which
reproduces the Pillow of the published runs (to 2 of 255 levels) in a fraction of the time. Flipping and normalising
wait for the device. Shapes: B batch, H, W source image, S target side.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from torch import Tensor
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Transform = Callable[[np.ndarray], Tensor]


def _as_view(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W) without copying; the channels-last strides halve the time of the resize."""
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def _resize(view: Tensor, height: int, width: int) -> Tensor:
    if view.shape[-2:] == (height, width):
        return view[0].contiguous()
    return F.interpolate(view, size=(height, width), mode="bicubic", antialias=True)[0].contiguous()


class RandomCrop:
    """RandomResizedCrop: (H, W, 3) uint8 -> (3, S, S) uint8. The box is torchvision's, from torch's generator.

    Args:
        size: S, or (height, width).
        scale: bounds of the box's share of the image's area; (0.2, 1) for pre-training, (0.08, 1) for fine-tuning.
    """

    def __init__(self, size: int | tuple[int, int], scale: tuple[float, float] = (0.2, 1.0)) -> None:
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.scale = list(scale)

    def __call__(self, image: np.ndarray) -> Tensor:
        view = _as_view(image)
        top, left, height, width = RandomResizedCrop.get_params(view, self.scale, [3 / 4, 4 / 3])
        return _resize(view[:, :, top : top + height, left : left + width], *self.size)


class CenterCrop:
    """Evaluation: shorter side to S / 0.875, then the middle: (H, W, 3) uint8 -> (3, S, S) uint8."""

    def __init__(self, size: int, crop_pct: float = 0.875) -> None:
        self.size = size
        self.shorter = int(size / crop_pct)

    def __call__(self, image: np.ndarray) -> Tensor:
        height, width = image.shape[:2]
        short, long = sorted((height, width))
        longer = int(self.shorter * long / short)
        height, width = (self.shorter, longer) if height <= width else (longer, self.shorter)
        resized = _resize(_as_view(image), height, width)
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        return resized[:, top : top + self.size, left : left + self.size].contiguous()


class AugmentedCrop:
    """Fine-tuning: the random crop above, then timm's RandAugment (or colour jitter) on the small image.

    Args:
        auto_augment: timm's description, such as rand-m9-mstd0.5-inc1; empty for none.
        color_jitter: strength of brightness, contrast and saturation; used where there is no `auto_augment` (timm).
        mean: mean colour of the data, which fills what RandAugment's geometry uncovers.

    Raises:
        ValueError: timm knows no such policy.
    """

    def __init__(
        self,
        size: int,
        auto_augment: str | None = None,
        color_jitter: float | None = None,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        scale: tuple[float, float] = (0.08, 1.0),
    ) -> None:
        self.crop = RandomCrop(size, scale)
        self.augment = None
        if auto_augment:
            settings = {
                "translate_const": int(size * 0.45),
                "img_mean": tuple(min(255, round(255 * value)) for value in mean),
                "interpolation": Image.Resampling.BICUBIC,
            }
            make = rand_augment_transform if auto_augment.startswith("rand") else auto_augment_transform
            try:
                self.augment = make(auto_augment, settings)
            except (AssertionError, KeyError, ValueError) as error:
                raise ValueError(
                    f"--aa {auto_augment!r} is no policy of timm's: try rand-m9-mstd0.5-inc1, or '' for none"
                ) from error
        elif color_jitter:
            self.augment = ColorJitter(color_jitter, color_jitter, color_jitter)

    def __call__(self, image: np.ndarray) -> Tensor:
        crop = self.crop(image)
        return crop if self.augment is None else pil_to_tensor(self.augment(to_pil_image(crop)))


class ToModelInput:
    """On the device: (B, 3, S, S) uint8 -> float32, each image flipped with probability one half, normalised.

    Args:
        flip: draw a flip for each image (training).
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, flip: bool) -> None:
        self.mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, -1, 1, 1)
        self.device = device
        self.flip = flip

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        if self.flip:
            flipped = torch.rand(len(images), 1, 1, 1, device=self.device) < 0.5
            images = torch.where(flipped, images.flip(-1), images)
        return images.float().div_(255).sub_(self.mean).div_(self.std)
