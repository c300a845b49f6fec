"""Fixed 2-D sine-cosine position embeddings, and their interpolation to another grid (MAE, util/pos_embed.py).

Shapes: h, w grid of patches, L = h * w patches, E width, P prefix tokens (class token).
"""

import logging
import math

import numpy as np
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

log = logging.getLogger("hpm")


def get_2d_sincos_pos_embed(embed_dim: int, grid_size: int | tuple[int, int], cls_token: bool = False) -> np.ndarray:
    """Table of position embeddings, float64: (L, E), or (1 + L, E) with a row of zeros for the class token first.

    Patches are in row-major order. The first half of the width encodes the column, the second half the row, as in MAE:
    sines, then cosines, of geometrically falling frequencies.

    Raises:
        ValueError: `embed_dim` is not a multiple of 4 (sine and cosine of two axes).
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim {embed_dim} is not a multiple of 4, which sine and cosine of two axes require")
    h, w = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    frequencies = 10000.0 ** -(np.arange(embed_dim // 4, dtype=np.float64) / (embed_dim / 4))
    rows, columns = np.indices((h, w), dtype=np.float64).reshape(2, -1)  # (L,) each
    angles = [axis[:, None] * frequencies for axis in (columns, rows)]  # (L, E / 4) each
    table = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)
    if cls_token:
        table = np.concatenate([np.zeros((1, embed_dim)), table], axis=0)
    return table


def interpolate_pos_embed(model: nn.Module, state_dict: dict[str, torch.Tensor], name: str = "pos_embed") -> None:
    """Resample `state_dict[name]` (1, P + L, E) to the grid of `model`, in place: bicubic without antialias, as MAE.

    Nothing changes where the number of patches is the model's; any other grid of the file is taken as square.

    Args:
        name: "pos_embed", or "decoder_pos_embed" for the positions of the decoders.

    Raises:
        ValueError: the file has no position of the class token, or its number of patches is not a square number, so
            that its grid is unknown.
    """
    if name not in state_dict:
        return
    table = state_dict[name]
    h, w = model.patch_embed.grid_size
    num_prefix = model.pos_embed.shape[1] - h * w
    length = table.shape[1] - num_prefix
    if length == h * w:
        return
    side = round(max(length, 0) ** 0.5)
    if side == 0 or side * side != length:
        if math.isqrt(table.shape[1]) ** 2 == table.shape[1]:
            raise ValueError(
                f"{name} has {table.shape[1]} positions, those of patches alone: the weights are of another "
                "architecture, whose class token has no position embedding"
            )
        raise ValueError(
            f"{name} has {length} patches, which is not a square grid, and cannot be interpolated to {h} x {w}: set "
            "--input_size to the size the file was trained with"
        )
    log.info("%s resized from %d x %d patches to %d x %d", name, side, side, h, w)
    state_dict[name] = resample_abs_pos_embed(table, [h, w], [side, side], num_prefix, antialias=False)
