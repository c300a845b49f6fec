"""The exponential-moving-average teacher (HPM, section 3.3)."""

import copy

import torch
from torch import nn


def ema_decay_at(epoch: float, decay: float = 0.999, final: float = 0.9999, ramp_epochs: int = 100) -> float:
    """Decay in `epoch`: linear from `decay` to `final` over the first `ramp_epochs`, then constant (official)."""
    if epoch >= ramp_epochs:
        return final
    return decay + (final - decay) * epoch / ramp_epochs


class EMATeacher:
    """A copy of the student that follows it slowly: `teacher <- decay * teacher + (1 - decay) * student`.

    Make it after all ranks hold the same weights: the official code copies before DDP broadcasts them, so that its
    ranks rank patches with different teachers. The copy is in eval mode and takes no gradient.
    """

    def __init__(self, student: nn.Module) -> None:
        self.module = copy.deepcopy(student).eval().requires_grad_(False)
        self._mine = list(self.module.parameters())
        self._theirs = list(student.parameters())
        self._buffers = list(zip(self.module.buffers(), student.buffers(), strict=True))

    @torch.no_grad()
    def update(self, decay: float, skip: torch.Tensor | None = None) -> None:
        """One step towards the student; call it after every optimizer step. Buffers are copied.

        Args:
            skip: a scalar on the device, 1 where the optimizer skipped its step: the teacher then stays, too. Nothing
                waits for it.
        """
        # teacher += (1 - decay) * (student - teacher) is a step of SGD up the "gradient" student - 1 * teacher: the
        # fused kernel does it in one pass, with the numbers of torch.lerp, and can be told on the device to do nothing.
        torch._fused_sgd_(
            self._mine, self._theirs, [],
            lr=1.0 - decay, weight_decay=1.0, maximize=True,
            momentum=0.0, dampening=0.0, nesterov=False, is_first_step=False, found_inf=skip,
        )  # fmt: skip
        for mine, theirs in self._buffers:
            mine.copy_(theirs)
