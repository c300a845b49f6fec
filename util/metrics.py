"""Numbers that stay on the device until somebody reads them.

Shapes: B batch, M masked patches, K classes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def rank_accuracy(loss_pred: Tensor, loss_target: Tensor) -> Tensor:
    """Share of the pairs of masked patches of an image that the prediction orders rightly: (B, M), (B, M) -> scalar.

    0.5 is chance. Pairs whose targets tie do not count; a tie of the predictions is half right.
    """
    target = loss_target[:, :, None] - loss_target[:, None, :]  # (B, M, M), each pair in both orders
    pred = loss_pred[:, :, None] - loss_pred[:, None, :]
    unequal = target != 0
    right = (pred.sign() * target.sign() + 1) * 0.5
    return (right * unequal).sum() / unequal.sum().clamp(min=1)


class MeanMeter:
    """Running means of named scalars, summed on the device: nothing waits for the device before they are read.

    Values that are not finite do not count: their steps are skipped, and one would hide all others.
    """

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}  # (2,): sum, count
        self._seen: dict[str, list[float]] = {}  # those over all ranks, at the last window

    def update(self, **values: Tensor) -> None:
        """Add one observation of each of these scalars."""
        for name, value in values.items():
            value = value.detach().double()
            finite = value.isfinite()
            new = torch.stack([torch.where(finite, value, 0.0), finite.double()])
            self._totals[name] = self._totals[name] + new if name in self._totals else new

    def window(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means since the last call. `reduce` sums a tensor over the ranks, in place."""
        totals, before = self._read(reduce), self._seen
        self._seen = totals
        since = {
            name: [now - then for now, then in zip(total, before.get(name, (0.0, 0.0)), strict=True)]
            for name, total in totals.items()
        }
        return {name: value / count for name, (value, count) in since.items() if count > 0}

    def mean(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means since the start; NaN of what was never finite."""
        return {name: value / count if count else math.nan for name, (value, count) in self._read(reduce).items()}

    def _read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, list[float]]:
        if not self._totals:
            return {}
        return dict(zip(self._totals, reduce(torch.stack(list(self._totals.values()))).tolist(), strict=True))

    def state_dict(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, list[float]]:
        """Sums and counts over all ranks."""
        return self._read(reduce)

    def load_state_dict(self, state: dict[str, list[float]], device: torch.device, holder: bool = True) -> None:
        """Go on from a saved state; windows begin anew.

        Args:
            holder: whether this rank holds the saved totals of all; exactly one does.
        """
        totals = {name: torch.tensor(total, dtype=torch.double, device=device) for name, total in state.items()}
        self._totals = totals if holder else {name: torch.zeros_like(total) for name, total in totals.items()}
        self._seen = dict(state)
