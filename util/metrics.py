"""Numbers that stay on the device until somebody reads them.

Shapes: B batch, M masked patches, K classes.
"""

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
    """Running means of named scalars, summed on the device: nothing waits for the device before they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._seen: tuple[dict[str, float], dict[str, int]] = ({}, {})  # sums over ranks and counts at the last window

    def update(self, **values: Tensor) -> None:
        """Add one observation of each of these scalars."""
        for name, value in values.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def window(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means since the last call. `reduce` sums a tensor over the ranks, in place."""
        sums, counts = self._read(reduce)
        before, before_counts = self._seen
        self._seen = sums, counts
        return {
            name: (value - before.get(name, 0.0)) / (counts[name] - before_counts.get(name, 0))
            for name, value in sums.items()
            if counts[name] > before_counts.get(name, 0)
        }

    def mean(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means since the start."""
        sums, counts = self._read(reduce)
        return {name: value / counts[name] for name, value in sums.items()}

    def _read(self, reduce: Callable[[Tensor], Tensor]) -> tuple[dict[str, float], dict[str, int]]:
        if not self._sums:
            return {}, {}
        sums = torch.stack(list(self._sums.values()))
        counts = sums.new_tensor(list(self._counts.values()))
        sums, counts = reduce(torch.stack([sums, counts])).tolist()
        names = list(self._sums)
        return dict(zip(names, sums, strict=True)), dict(zip(names, counts, strict=True))

    def state_dict(self) -> dict[str, dict]:
        return {"sums": {name: value.item() for name, value in self._sums.items()}, "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, dict], device: torch.device) -> None:
        """Go on from a saved state; windows begin anew."""
        self._sums = {name: torch.tensor(v, dtype=torch.double, device=device) for name, v in state["sums"].items()}
        self._counts = dict(state["counts"])
