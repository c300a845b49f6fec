"""Fixed 2-D sine-cosine position embeddings, and their interpolation to another grid (MAE, util/pos_embed.py).

Shapes: h, w grid of patches, L = h * w patches, E width, P prefix tokens (class token).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def get_2d_sincos_pos_embed(embed_dim: int, grid_size: int | tuple[int, int], cls_token: bool = False) -> np.ndarray:
    """Table of position embeddings, float64, (L, E) or, with a zero row for the class token first, (1 + L, E).

    Rows run over the grid row by row. The first half of a row encodes the column, the second half the row, as in MAE.

    Raises:
        ValueError: `embed_dim` is not a multiple of four (sine and cosine for two axes).
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim {embed_dim} is not a multiple of 4: sine and cosine of two axes need that")
    h, w = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    rows, columns = np.meshgrid(np.arange(h, dtype=np.float64), np.arange(w, dtype=np.float64), indexing="ij")
    table = np.concatenate([_sincos(embed_dim // 2, columns), _sincos(embed_dim // 2, rows)], axis=1)
    if cls_token:
        table = np.concatenate([np.zeros((1, embed_dim)), table], axis=0)
    return table


def _sincos(width: int, positions: np.ndarray) -> np.ndarray:
    """Positions of any shape -> (positions.size, width): sines, then cosines, of geometrically falling frequencies."""
    frequencies = 10000.0 ** -(np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = positions.reshape(-1, 1) * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def resize_pos_embed(
    table: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], num_prefix: int = 1
) -> torch.Tensor:
    """(1, P + L, E) -> (1, P + L', E): bicubic without antialias, as MAE does; the prefix tokens stay as they are."""
    prefix, patches = table[:, :num_prefix], table[:, num_prefix:]
    width = table.shape[-1]
    patches = patches.reshape(1, *old_grid, width).permute(0, 3, 1, 2).float()  # (1, E, h, w)
    patches = F.interpolate(patches, size=new_grid, mode="bicubic", align_corners=False)
    patches = patches.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)  # (1, L', E)
    return torch.cat([prefix, patches], dim=1)


def interpolate_pos_embed(model: nn.Module, state_dict: dict[str, torch.Tensor], name: str = "pos_embed") -> None:
    """Fit `state_dict[name]` to the grid of `model`, in place. Does nothing where the grids are equal.

    The grid of the file is taken as square unless it has as many patches as the model's own.

    Args:
        name: "pos_embed", or "decoder_pos_embed" for the positions that decoders read.

    Raises:
        ValueError: the file's number of patches is no square, so that its grid cannot be known.
    """
    if name not in state_dict:
        return
    table = state_dict[name]
    new_grid = tuple(model.patch_embed.grid_size)
    num_prefix = model.pos_embed.shape[1] - new_grid[0] * new_grid[1]
    length = table.shape[1] - num_prefix
    if length == new_grid[0] * new_grid[1]:
        return
    side = round(length**0.5) if length > 0 else 0
    if side * side != length or side == 0:
        raise ValueError(
            f"{name} has {length} patches, which is no square grid: cannot fit it to {new_grid[0]} x {new_grid[1]}; "
            "give the --input_size the file was trained with"
        )
    state_dict[name] = resize_pos_embed(table, (side, side), new_grid, num_prefix)
