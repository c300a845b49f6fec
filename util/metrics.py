"""Metrics that stay on the device until they are read.

Shapes: B batch, M masked patches.
"""

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def rank_accuracy(loss_pred: Tensor, loss_target: Tensor) -> Tensor:
    """Fraction of the pairs of masked patches of an image ranked correctly by the prediction: (B, M), (B, M) -> scalar.

    0.5 is chance. Pairs with equal targets do not count; a pair with equal predictions is half correct.
    """
    target = loss_target[:, :, None] - loss_target[:, None, :]  # (B, M, M), each pair in both orders
    pred = loss_pred[:, :, None] - loss_pred[:, None, :]
    unequal = target != 0
    correct = (pred.sign() * target.sign() + 1) * 0.5
    return (correct * unequal).sum() / unequal.sum().clamp(min=1)


class MeanMeter:
    """Running means of named scalars, summed on the device: `update` never synchronises, reading does.

    Non-finite values do not count: their optimizer steps are skipped, and one of them would hide all others. Where a
    method takes `reduce`, it sums a tensor over all ranks, in place.
    """

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}  # (2,): sum, count
        self._last_window: dict[str, list[float]] = {}  # totals over all ranks when `window` was last called

    def update(self, **values: Tensor) -> None:
        """Add one observation of each of these scalars."""
        for name, value in values.items():
            value = value.detach().double()
            finite = value.isfinite()
            new = torch.stack([torch.where(finite, value, 0.0), finite.double()])
            self._totals[name] = self._totals[name] + new if name in self._totals else new

    def window(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means since the last call."""
        before, self._last_window = self._last_window, self.state_dict(reduce)
        means = {}
        for name, (total, count) in self._last_window.items():
            old_total, old_count = before.get(name, (0.0, 0.0))
            if count > old_count:
                means[name] = (total - old_total) / (count - old_count)
        return means

    def mean(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means since the start; NaN for what was never finite."""
        if not self._totals:
            return {}
        sums, counts = reduce(torch.stack(list(self._totals.values()))).unbind(dim=1)
        means = (sums / counts).tolist()  # 0 / 0 = NaN
        return dict(zip(self._totals, means, strict=True))

    def state_dict(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, list[float]]:
        """Sum and count of each scalar, over all ranks."""
        if not self._totals:
            return {}
        totals = reduce(torch.stack(list(self._totals.values()))).tolist()
        return dict(zip(self._totals, totals, strict=True))

    def load_state_dict(self, state: dict[str, list[float]], device: torch.device, holder: bool = True) -> None:
        """Resume from a saved state; a new window starts.

        Args:
            holder: whether this rank holds the saved totals of all ranks; exactly one does.
        """
        totals = {name: torch.tensor(total, dtype=torch.double, device=device) for name, total in state.items()}
        self._totals = totals if holder else {name: torch.zeros_like(total) for name, total in totals.items()}
        self._last_window = dict(state)
