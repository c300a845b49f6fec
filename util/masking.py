"""Masks: random (MAE), the hardest patches first (HPM), block and regular (UM-MAE).

Shapes: B batch, L patches in a grid of h x w, V visible, M masked, E width. A mask is bool (B, L), True = masked, M of
them in every row.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch


def count_masked(num_patches: int, mask_ratio: float) -> int:
    """M = L - int(L * (1 - ratio)): 147 of 196 at 0.75, 118 at 0.6, 177 at 0.9."""
    return num_patches - int(num_patches * (1 - mask_ratio))


def num_hardest(num_masked: int, epoch: int, total_epochs: int, alpha_0: float = 0.0, alpha_T: float = 0.5) -> int:
    """Number of masked patches that are chosen by score in `epoch` (counted from 0).

    The easy-to-hard schedule, alpha_t = alpha_0 + t / T (alpha_T - alpha_0) (HPM), constant within an epoch.
    As in the official code t counts from 1, so the last epoch reaches `alpha_T`.
    """
    progress = (epoch + 1) / total_epochs
    return int(num_masked * (alpha_0 + progress * (alpha_T - alpha_0)))


class Strategy(NamedTuple):
    """How scores choose masked patches; the rest of the mask is random.

    Attributes:
        start, end: share of the masked patches chosen by score before the first epoch and in the last one, or the name
            of the option that holds it.
        priority: scores (B, L), generator -> (B, L): the patches of highest priority are chosen. None for the scores.
        chosen: which patches these are, for captions.
    """

    start: Any
    end: Any
    priority: Callable[[torch.Tensor, torch.Generator | None], torch.Tensor] | None = None
    chosen: str = "hardest"


def lowest_first(scores: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Priority of `easiest`: (B, L) -> (B, L)."""
    return -scores


# By their name in --mask_strategy.
STRATEGIES = {
    "easy_to_hard": Strategy("alpha_0", "alpha_T"),
    "hard_to_easy": Strategy("alpha_T", "alpha_0"),
    "constant": Strategy("alpha_T", "alpha_T"),
    "hardest": Strategy(1.0, 1.0),
    "easiest": Strategy("alpha_0", "alpha_T", priority=lowest_first, chosen="easiest"),
    "random": Strategy(0.0, 0.0),
}


def hard_mask(
    loss_pred: torch.Tensor, num_masked: int, num_hardest: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Predicted loss (B, L) -> mask (B, L): the `num_hardest` patches of highest loss, the others uniformly at random.

    One batched computation without host synchronisation. NaN counts as hardest, as in the official code; -inf marks
    patches without a score, which only the random choice takes.
    """
    assert 0 <= num_hardest <= num_masked <= loss_pred.shape[1], (num_hardest, num_masked, loss_pred.shape)
    priority = torch.rand(loss_pred.shape, generator=generator, device=loss_pred.device)  # in [0, 1)
    hardest = loss_pred.topk(num_hardest, dim=1).indices
    masked = priority.scatter_(1, hardest, 2.0).topk(num_masked, dim=1).indices
    return torch.zeros_like(priority, dtype=torch.bool).scatter_(1, masked, True)


def random_mask(
    batch_size: int,
    num_patches: int,
    num_masked: int,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Mask (B, L) of `num_masked` patches of each image, uniformly at random (MAE)."""
    priority = torch.rand(batch_size, num_patches, generator=generator, device=device)
    masked = priority.topk(num_masked, dim=1).indices
    return torch.zeros_like(priority, dtype=torch.bool).scatter_(1, masked, True)


def block_mask(
    batch_size: int,
    grid_size: tuple[int, int],
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Mask (B, L) that shows one square of side int(sqrt(L / 4)), its corner uniform in the first half of each axis.

    Raises:
        ValueError: the square does not fit into the grid at every corner.
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
    """Mask (B, L) that shows exactly one patch of each 2 x 2 cell, drawn uniformly.

    Raises:
        ValueError: the grid has an odd side.
    """
    h, w = grid_size
    if h % 2 or w % 2:
        raise ValueError(f"regular masks require an even grid of patches, got {h} x {w}")
    shown = torch.randint(4, (batch_size, h // 2, 1, w // 2, 1), generator=generator, device=device)
    place = torch.arange(4, device=device).view(1, 1, 2, 1, 2)  # place[..., i, ..., j] = 2 * i + j
    return (place != shown).flatten(1)  # (B, h/2, 2, w/2, 2) -> (B, L)


def gather_tokens(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Select K of N tokens by index: (B, N, E), (B, K) -> (B, K, E). Static shapes, unlike boolean indexing."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[-1]))


def split_mask(mask: torch.Tensor, num_masked: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask (B, L) -> indices of the visible patches (B, V) and of the masked patches (B, M), in ascending order."""
    ids = mask.int().argsort(dim=1, stable=True)
    num_visible = mask.shape[1] - num_masked
    return ids[:, :num_visible], ids[:, num_visible:]


# Masks that do not depend on scores (UM-MAE, ratio 0.75).
PATTERNS = {"block": block_mask, "regular": regular_mask}


class MaskSampler:
    """Draws the masks of a run, for training and for pictures: strategy, ratio and schedule in one place.

    Args:
        grid_size: (h, w), in patches.
        epochs: of the whole run.
        strategy: a name in `STRATEGIES`.
        alphas: (alpha_0, alpha_T).
        pattern: a name in `PATTERNS`, which replaces the strategy; None for none.
        teacher_keep: fraction of the patches that the teacher sees; it scores the others. 1 is HPM's, which sees and
            scores all of them.

    Attributes:
        num_hardest: number of masked patches chosen by score, by epoch.
        num_masked, num_hidden: number of patches that are masked, and that the teacher does not see.

    Raises:
        ValueError: a ratio leaves all patches or none, the pattern does not fit the ratio or the grid, or the teacher
            scores fewer patches than are chosen by score.
    """

    def __init__(
        self,
        grid_size: tuple[int, int],
        mask_ratio: float,
        epochs: int,
        strategy: str = "easy_to_hard",
        alphas: tuple[float, float] = (0.0, 0.5),
        pattern: str | None = None,
        teacher_keep: float = 1.0,
    ) -> None:
        self.grid_size, self.epochs, self.strategy, self.pattern = grid_size, epochs, strategy, pattern
        self.num_patches = grid_size[0] * grid_size[1]
        self.num_masked = count_masked(self.num_patches, mask_ratio)
        value: dict[Any, float] = {"alpha_0": alphas[0], "alpha_T": alphas[1]}
        start, end, *_ = STRATEGIES[strategy if pattern is None else "random"]
        start, end = value.get(start, start), value.get(end, end)
        self.num_hardest = [num_hardest(self.num_masked, epoch, epochs, start, end) for epoch in range(epochs)]
        if not 0 < self.num_masked < self.num_patches:
            raise ValueError(
                f"--mask_ratio {mask_ratio} masks {self.num_masked} of {self.num_patches} patches: leave some of each"
            )
        self.num_hidden = self.num_patches - int(self.num_patches * teacher_keep)  # from the teacher
        if self.num_hidden == self.num_patches:
            raise ValueError(
                f"--teacher_keep {teacher_keep} leaves the teacher none of {self.num_patches} patches to see: give a "
                "larger value"
            )
        if teacher_keep < 1 and max(1, *self.num_hardest) > self.num_hidden:
            raise ValueError(
                f"--teacher_keep {teacher_keep}: the teacher scores {self.num_hidden} of {self.num_patches} patches, "
                f"and up to {max(self.num_hardest)} are masked by score: give another value, or another "
                "--mask_strategy or --alpha_T"
            )
        if pattern is not None:
            if mask_ratio != 0.75:
                raise ValueError(f"--mask_{pattern} requires --mask_ratio 0.75, got {mask_ratio}")
            PATTERNS[pattern](1, grid_size, torch.Generator())  # raises if the grid does not fit

    @classmethod
    def from_options(cls, options: Mapping[str, Any], grid_size: tuple[int, int]) -> "MaskSampler":
        """The sampler described by the options of main_pretrain.py, as they are stored in its checkpoints."""
        pattern = next((name for name in PATTERNS if options.get(f"mask_{name}")), None)
        alphas = (options.get("alpha_0", 0.0), options.get("alpha_T", 0.5))
        strategy = options.get("mask_strategy") or "easy_to_hard"
        keep = options.get("teacher_keep", 1.0)
        return cls(grid_size, options["mask_ratio"], options["epochs"], strategy, alphas, pattern, keep)

    def draw_hidden(
        self, batch_size: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Mask (B, L) of the patches hidden from the teacher, `num_hidden` in every row."""
        return random_mask(batch_size, self.num_patches, self.num_hidden, generator, device)

    def draw(
        self,
        scores: torch.Tensor | None,
        batch_size: int,
        epoch: int,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """Scores (B, L), -inf for none -> mask (B, L). `scores` may be None if `num_hardest[epoch]` is 0."""
        if self.pattern is not None:
            return PATTERNS[self.pattern](batch_size, self.grid_size, generator, device)
        count = self.num_hardest[epoch]
        if count == 0:
            return random_mask(batch_size, self.num_patches, self.num_masked, generator, device)
        assert scores is not None, "no scores to choose the hardest patches by"
        priority = STRATEGIES[self.strategy].priority
        if priority is not None:
            scores = torch.where(scores.isneginf(), scores, priority(scores, generator))
        return hard_mask(scores, self.num_masked, count, generator)
