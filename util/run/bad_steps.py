"""Steps whose loss or gradient is not finite: skipped and counted on the device, reported, and not for ever."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class NonFinite(FloatingPointError):
    """End of a run whose steps are skipped one after the other."""


@torch.no_grad()
def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """`optimizer.step()`, or where the scalar `skip` is 1 nothing at all; decided on the device.

    Fused kernels take the decision as a tensor (PyTorch made that for its loss scaler). For other optimizers, of which
    the linear probe has small ones, weights and state are put back afterwards.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, skip
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    before = {(p, ""): p.clone() for p in parameters}
    before |= {(p, k): v.clone() for p in parameters for k, v in optimizer.state[p].items() if torch.is_tensor(v)}
    optimizer.step()
    after = {(p, ""): p for p in parameters}
    after |= {(p, k): v for p in parameters for k, v in optimizer.state[p].items() if torch.is_tensor(v)}
    for key, value in after.items():  # state that a first step makes begins at zero
        value.copy_(torch.where(skip > 0, before.get(key, 0.0), value))


class BadSteps:
    """Counters on the device, read where the log waits for it anyway.

    The norm of the reduced gradient is the same on all ranks, and so are these counters: no exchange is needed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.calls = 0
        self._in_row = self._worst = self._total = torch.zeros((), device=device)
        self._record: Tensor | None = None  # of the first step of the last row: number of the call, loss, norms
        self._with_gradient: list[int] = []
        self._told = 0.0

    def update(self, bad: Tensor, loss: Tensor, norms: Tensor, with_gradient: list[int]) -> None:
        """Note a step.

        Args:
            bad: 1 if it was skipped, else 0.
            loss: of this rank.
            norms: of the gradients, one a parameter.
            with_gradient: which parameters, in their order in the model, these are.
        """
        self._in_row = (self._in_row + 1) * bad
        self._worst = torch.maximum(self._worst, self._in_row)
        self._total = self._total + bad
        call = torch.full((1,), float(self.calls), device=self.device)  # a fill, not a copy that waits for the device
        record = torch.cat([call, loss.float().view(1), norms])
        known = record if self._record is None else self._record
        self._record = torch.where(self._in_row == 1, record, known)
        self._with_gradient = with_gradient
        self.calls += 1

    def read(self) -> tuple[int, int, int]:
        """Skipped steps: of the longest row since the last call, in all, and in all since the last call.

        Waits for the device.
        """
        worst, total = torch.stack([self._worst, self._total]).tolist()
        new, self._told = total - self._told, total
        self._worst = self._in_row
        return int(worst), int(total), int(new)

    def report(self, names: Sequence[str], gather: Callable[[float], list[float]]) -> dict[str, Any]:
        """What is known of the first step of the last row.

        Args:
            names: of the parameters, in the model's order.
            gather: this rank's number -> those of all ranks.

        Returns:
            `steps_ago` (0 is the last step taken), `losses` (one a rank), `gradient_norms` (by part of the model).
        """
        call, loss, *norms = self._record.tolist()
        parts: dict[str, list[float]] = {}
        for index, norm in zip(self._with_gradient, norms, strict=True):
            words = names[index].removeprefix("module.").split(".")
            parts.setdefault(".".join(words[: 1 + words[0].startswith(("blocks", "decoder_blocks"))]), []).append(norm)
        return {
            "steps_ago": self.calls - 1 - int(call),
            "losses": gather(loss),
            "gradient_norms": {part: sum(norm**2 for norm in norms) ** 0.5 for part, norms in parts.items()},
        }
