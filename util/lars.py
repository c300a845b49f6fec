"""LARS, the optimizer of MAE's linear probe (You et al. 2017, in MoCo v3's form)."""

from collections.abc import Callable, Iterable

import torch
from torch import nn


class LARS(torch.optim.Optimizer):
    """SGD with momentum. The update of a matrix is scaled by `trust_coefficient` * |weight| / |gradient|.

    Vectors get neither weight decay nor scaling.
    """

    _step_supports_amp_scaling = True  # takes `found_inf`, as PyTorch's fused optimizers do

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, {**defaults, "trust_coefficient": trust_coefficient})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        skip = torch.as_tensor(getattr(self, "found_inf", 0.0)) > 0  # decided on the device, by util/run/amp.py
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.ndim > 1:
                    update = update.add(parameter, alpha=group["weight_decay"])
                    weight_norm, update_norm = parameter.norm(), update.norm()
                    known = (weight_norm > 0) & (update_norm > 0)
                    ratio = group["trust_coefficient"] * weight_norm / update_norm
                    update = update * torch.where(known, ratio, torch.ones_like(ratio))
                state = self.state[parameter]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(parameter)
                momentum = state["mu"].mul(group["momentum"]).add_(update)
                state["mu"].copy_(torch.where(skip, state["mu"], momentum))
                parameter.add_(torch.where(skip, 0.0, state["mu"]), alpha=-group["lr"])
        return loss
