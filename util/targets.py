"""Reconstruction targets that are computed from the pixels of a patch.

Shapes: B batch, L patches, P patch size, C channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def normalise(patches: Tensor) -> Tensor:
    """Each patch minus its mean, divided by its standard deviation (MAE): (B, L, P * P * C) -> (B, L, P * P * C)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


# By their name in --target: float32 patches (B, L, P * P * C) -> targets of the same shape. None for the pixels as is.
PIXEL_TARGETS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "pixel": None,
    "norm_pixel": normalise,
}
