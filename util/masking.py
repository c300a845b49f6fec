"""Which patches to hide (HPM, section 3.3; UM-MAE for the block and regular masks).

Shapes: B batch, L patches, V visible, M masked. A mask is bool (B, L), True = masked, M of them in every row.
"""

from collections.abc import Mapping
from typing import Any

import torch


def count_masked(num_patches: int, mask_ratio: float) -> int:
    """M = L - int(L * (1 - ratio)): 147 of 196 at 0.75, 118 at 0.6, 177 at 0.9."""
    return num_patches - int(num_patches * (1 - mask_ratio))


def num_hardest(num_masked: int, epoch: int, total_epochs: int, alpha_0: float = 0.0, alpha_T: float = 0.5) -> int:
    """How many of the M masked patches are the hardest-predicted ones in `epoch` (counted from 0).

    The easy-to-hard schedule: the share grows linearly from `alpha_0` to `alpha_T`, constant within an epoch. The
    official code's form, which reaches `alpha_T` in the last epoch.
    """
    share = (epoch + 1) / total_epochs
    return int(num_masked * (alpha_0 + share * (alpha_T - alpha_0)))


# Where a strategy starts and ends: shares of the masked patches taken by predicted loss, from (alpha_0, alpha_T).
STRATEGIES = {
    "easy_to_hard": lambda alpha_0, alpha_T: (alpha_0, alpha_T),
    "hard_to_easy": lambda alpha_0, alpha_T: (alpha_T, alpha_0),
    "constant": lambda alpha_0, alpha_T: (alpha_T, alpha_T),
    "hardest": lambda alpha_0, alpha_T: (1.0, 1.0),
    "easiest": lambda alpha_0, alpha_T: (alpha_0, alpha_T),  # of the patches of lowest predicted loss
    "random": lambda alpha_0, alpha_T: (0.0, 0.0),
}


def hard_mask(
    loss_pred: torch.Tensor, num_masked: int, num_hardest: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Mask the `num_hardest` patches of highest `loss_pred` (B, L) and, of the rest, as many at random as are missing.

    One batched computation that never waits for the device. NaN counts as hardest, as in the official code.
    """
    assert 0 <= num_hardest <= num_masked <= loss_pred.shape[1], (num_hardest, num_masked, loss_pred.shape)
    priority = torch.rand(loss_pred.shape, generator=generator, device=loss_pred.device)  # in [0, 1)
    hardest = loss_pred.topk(num_hardest, dim=1).indices
    return _mask_first(priority.scatter_(1, hardest, 2.0), num_masked)


def random_mask(
    batch_size: int,
    num_patches: int,
    num_masked: int,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Mask `num_masked` patches of each image, every choice equally likely (MAE)."""
    return _mask_first(torch.rand(batch_size, num_patches, generator=generator, device=device), num_masked)


def _mask_first(priority: torch.Tensor, num_masked: int) -> torch.Tensor:
    """The `num_masked` patches of highest priority (B, L) -> mask (B, L)."""
    masked = priority.topk(num_masked, dim=1).indices
    return torch.zeros_like(priority, dtype=torch.bool).scatter_(1, masked, True)


def block_mask(
    batch_size: int,
    grid_size: tuple[int, int],
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Show one square of side int(sqrt(L / 4)), its corner uniform in the first half of each axis (UM-MAE, ratio 0.75).

    Raises:
        ValueError: the square does not fit into the grid from every corner.
    """
    h, w = grid_size
    side = int((h * w - count_masked(h * w, 0.75)) ** 0.5)
    if h // 2 - 1 + side > h or w // 2 - 1 + side > w or side == 0:
        raise ValueError(f"a visible square of {side} x {side} patches does not fit into a grid of {h} x {w}")
    top = torch.randint(h // 2, (batch_size, 1), generator=generator, device=device)
    left = torch.randint(w // 2, (batch_size, 1), generator=generator, device=device)
    rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
    row_visible = (rows >= top) & (rows < top + side)  # (B, h)
    column_visible = (columns >= left) & (columns < left + side)  # (B, w)
    return ~(row_visible[:, :, None] & column_visible[:, None, :]).flatten(1)


def regular_mask(
    batch_size: int,
    grid_size: tuple[int, int],
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Show exactly one patch of each 2 x 2 cell, drawn uniformly (UM-MAE, ratio 0.75).

    Raises:
        ValueError: the grid has an odd side.
    """
    h, w = grid_size
    if h % 2 or w % 2:
        raise ValueError(f"regular masks need an even grid of patches, not {h} x {w}")
    shown = torch.randint(4, (batch_size, h // 2, 1, w // 2, 1), generator=generator, device=device)
    place = torch.arange(4, device=device).view(1, 1, 2, 1, 2)  # place[..., i, ..., j] = 2 * i + j
    return (place != shown).flatten(1)  # (B, h/2, 2, w/2, 2) -> (B, L)


# Masks that do not depend on predicted loss, by name.
PATTERNS = {"block": block_mask, "regular": regular_mask}


class MaskSampler:
    """Draws the masks of a run: strategy, ratio and easy-to-hard schedule in one place, for training and for pictures.

    Args:
        grid_size: (h, w), in patches.
        epochs: of the whole run.
        strategy: a name in `STRATEGIES`.
        alphas: (alpha_0, alpha_T).
        pattern: a name in `PATTERNS`, which replaces the strategy's masks; None for none.

    Attributes:
        num_patches, num_masked: L and M.

    Raises:
        ValueError: the ratio masks all patches or none, or the pattern does not fit the ratio or the grid.
    """

    def __init__(
        self,
        grid_size: tuple[int, int],
        mask_ratio: float,
        epochs: int,
        strategy: str = "easy_to_hard",
        alphas: tuple[float, float] = (0.0, 0.5),
        pattern: str | None = None,
    ) -> None:
        self.grid_size, self.epochs, self.strategy, self.pattern = grid_size, epochs, strategy, pattern
        self.num_patches = grid_size[0] * grid_size[1]
        self.num_masked = count_masked(self.num_patches, mask_ratio)
        if not 0 < self.num_masked < self.num_patches:
            raise ValueError(
                f"--mask_ratio {mask_ratio} masks {self.num_masked} of {self.num_patches} patches: leave some of each"
            )
        if pattern is not None:
            if mask_ratio != 0.75:
                raise ValueError(f"--mask_{pattern} requires --mask_ratio 0.75, got {mask_ratio}")
            PATTERNS[pattern](1, grid_size)  # raises where the grid does not fit
        self._start, self._end = STRATEGIES[strategy](*alphas)

    @classmethod
    def from_options(cls, options: Mapping[str, Any], grid_size: tuple[int, int]) -> "MaskSampler":
        """The sampler that a run's options describe (those of main_pretrain.py, as in its checkpoints)."""
        pattern = next((name for name in PATTERNS if options.get(f"mask_{name}")), None)
        alphas = (options.get("alpha_0", 0.0), options.get("alpha_T", 0.5))
        strategy = options.get("mask_strategy") or "easy_to_hard"
        return cls(tuple(grid_size), options["mask_ratio"], options["epochs"], strategy, alphas, pattern)

    def num_hardest(self, epoch: int) -> int:
        """How many of the masked patches are chosen by predicted loss in `epoch` (counted from 0)."""
        if self.pattern is not None:
            return 0
        return num_hardest(self.num_masked, epoch, self.epochs, self._start, self._end)

    def draw(
        self,
        scores: torch.Tensor | None,
        batch_size: int,
        epoch: int,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """Masks (B, L) of a batch. `scores`, the predicted loss (B, L), may be None where `num_hardest` is 0."""
        if self.pattern is not None:
            return PATTERNS[self.pattern](batch_size, self.grid_size, generator, device)
        count = self.num_hardest(epoch)
        if count == 0:
            return random_mask(batch_size, self.num_patches, self.num_masked, generator, device)
        sign = -1 if self.strategy == "easiest" else 1
        return hard_mask(sign * scores, self.num_masked, count, generator)
