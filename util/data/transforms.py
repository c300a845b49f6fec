"""Crop and resize on the CPU in uint8; flip and normalise on the device.

A decoded image is cropped first, then resized as a channels-last view with PyTorch's antialiased bicubic kernel, which
matches Pillow to 2 of 255 levels and is several times faster. Shapes: B batch, H, W source image, S output side.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from torch import Tensor
from torchvision.transforms import ColorJitter, RandomResizedCrop, v2
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from util.data.decode import ValueRange, to_8_bits

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def check_statistics(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raises ValueError if mean or standard deviation cannot be those of pixel values in 0..1."""
    for name, values in (("mean", mean), ("std", std)):
        if not all(0 <= value <= 1 for value in values):
            numbers = " ".join(f"{value:g}" for value in values)
            raise ValueError(
                f"{name} {numbers} lies outside 0..1, the range of pixel values here: divide mean and std by 255 "
                "(--mean, --std)"
            )


class RandomCrop:
    """RandomResizedCrop: (H, W, 3) uint8 -> (3, S, S) uint8. torchvision's box, resized 8-20 % faster than by v2.

    Args:
        size: S, or (height, width).
        scale: range of the crop's share of the image area; (0.2, 1) for pre-training, (0.08, 1) for fine-tuning.
        one_draw: take `one_draw_box` (linear probe).
    """

    def __init__(
        self, size: int | tuple[int, int], scale: tuple[float, float] = (0.2, 1.0), one_draw: bool = False
    ) -> None:
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.scale, self.one_draw = list(scale), one_draw

    def __call__(self, image: np.ndarray) -> Tensor:
        view = torch.from_numpy(image).permute(2, 0, 1)[None]  # (1, 3, H, W), channels last, not copied
        if self.one_draw:
            top, left, height, width = one_draw_box(image.shape[0], image.shape[1], self.scale)
        else:
            top, left, height, width = RandomResizedCrop.get_params(view, self.scale, [3 / 4, 4 / 3])
        crop = view[:, :, top : top + height, left : left + width]
        if (height, width) != self.size:
            crop = F.interpolate(crop, size=self.size, mode="bicubic", antialias=True)
        return crop[0].contiguous()


def one_draw_box(height: int, width: int, scale: list[float]) -> tuple[int, int, int, int]:
    """Top, left, height, width of MAE's crop for linear probes (util/crop.py there): one draw of area and aspect ratio,
    clamped to the image. torchvision draws again until the box fits, which makes it smaller on average."""
    area = height * width * torch.empty(1).uniform_(*scale).item()
    ratio = math.exp(torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3)).item())
    h, w = (max(1, round(math.sqrt(side))) for side in (area / ratio, area * ratio))
    h, w = min(h, height), min(w, width)
    top, left = torch.randint(height - h + 1, (1,)).item(), torch.randint(width - w + 1, (1,)).item()
    return int(top), int(left), h, w


def resized_side(size: int, crop_pct: float) -> int:
    """The short side that images are resized to before a crop of `size`; no pixel is lost to a rounding error."""
    return int(size / crop_pct + 1e-6)


class CenterCrop:
    """Evaluation crop: resize the shorter side to S / crop_pct, crop the centre; (H, W, 3) uint8 -> (3, S, S) uint8."""

    def __init__(self, size: int, crop_pct: float = 0.875) -> None:
        self.resize = v2.Resize(resized_side(size, crop_pct), v2.InterpolationMode.BICUBIC, antialias=True)
        self.crop = v2.CenterCrop(size)

    def __call__(self, image: np.ndarray) -> Tensor:
        return self.crop(self.resize(torch.from_numpy(image).permute(2, 0, 1))).contiguous()


class EvaluationTransform:
    """A PIL image, or (H, W, 3) uint8 -> (3, S, S) float32: what evaluation feeds to a model.

    Pillow itself reduces images of several 16-bit channels to 8 bits; `decode_rgb` reads them as evaluation does.

    Attributes:
        crop, to_model_input: its two steps.
        value_range: as in `decode_rgb`.
    """

    def __init__(
        self,
        size: int,
        crop_pct: float = 0.875,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        value_range: ValueRange | None = None,
    ) -> None:
        self.crop, self.mean, self.std, self.value_range = CenterCrop(size, crop_pct), mean, std, value_range
        self.to_model_input = ToModelInput(mean, std, torch.device("cpu"), flip=False)

    def __call__(self, image: Image.Image | np.ndarray) -> Tensor:
        if isinstance(image, Image.Image):
            if image.mode == "F" or image.mode.startswith("I"):
                values = to_8_bits(np.asarray(image), self.value_range)
                image = np.repeat(values[:, :, None], 3, axis=2)
            else:
                image = np.array(image.convert("RGB"))
        return self.to_model_input(self.crop(image)[None])[0]


class AugmentedCrop:
    """Fine-tuning crop: `RandomCrop`, then timm's RandAugment or colour jitter on the small image.

    Args:
        auto_augment: timm's policy string, such as rand-m9-mstd0.5-inc1; empty for none.
        color_jitter: strength of brightness, contrast and saturation jitter; used without `auto_augment`, as in timm.
        mean: mean colour of the data; fills the area that RandAugment's geometric operations leave empty.

    Raises:
        ValueError: timm does not know the policy.
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
            build = rand_augment_transform if auto_augment.startswith("rand") else auto_augment_transform
            try:
                self.augment = build(auto_augment, settings)
            except (AssertionError, KeyError, ValueError) as error:
                raise ValueError(
                    f"--aa {auto_augment!r} is not a policy that timm knows: try rand-m9-mstd0.5-inc1, or '' for none"
                ) from error
        elif color_jitter:
            self.augment = ColorJitter(color_jitter, color_jitter, color_jitter)

    def __call__(self, image: np.ndarray) -> Tensor:
        crop = self.crop(image)
        return crop if self.augment is None else pil_to_tensor(self.augment(to_pil_image(crop)))


class ToModelInput:
    """On the device: (B, 3, S, S) uint8 -> normalised float32; `flip` flips each image with probability 0.5."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device, flip: bool) -> None:
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
