"""Learning rate and EMA decay as functions of the epoch. The easy-to-hard schedule is `util.masking.num_hardest`."""

import math

from torch.optim import Optimizer


def adjust_learning_rate(
    optimizer: Optimizer,
    epoch: float,
    *,
    lr: float,
    min_lr: float,
    warmup_epochs: float,
    epochs: float,
    decay: str = "cosine",
) -> float:
    """Set the learning rate of every parameter group, times its `lr_scale` (layer-wise lr decay).

    Linear warm-up from 0 to `lr`, then a half-cycle cosine (MAE, util/lr_sched.py) or a line down to `min_lr`.

    Args:
        epoch: fractional, counted from 0.
        decay: "cosine" or "linear".

    Returns:
        The unscaled learning rate.
    """
    if epoch < warmup_epochs:
        value = lr * epoch / warmup_epochs
    else:
        progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
        share = 0.5 * (1.0 + math.cos(math.pi * progress)) if decay == "cosine" else 1.0 - progress
        value = min_lr + (lr - min_lr) * share
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_scale", 1.0)
    return value


def ema_decay_at(epoch: float, decay: float = 0.999, final: float = 0.9999, ramp_epochs: int = 100) -> float:
    """Linear from `decay` to `final` over the first `ramp_epochs`, then constant (official code)."""
    if epoch >= ramp_epochs:
        return final
    return decay + (final - decay) * epoch / ramp_epochs


def slow_teacher(steps_per_epoch: int, epochs: int, decay: float, final: float, ramp_epochs: int) -> str | None:
    """A warning if the EMA teacher consists of initial weights for so long that its scores are chance, else None.

    The fraction of initial weights is the product of the decays of all steps. More than a tenth halfway through
    training is too much (our own choice).
    """
    decays = [ema_decay_at(epoch, decay, final, ramp_epochs) for epoch in range(epochs)]
    logs = [steps_per_epoch * math.log(max(value, 1e-300)) for value in decays]  # of the fraction, by epoch
    left = []
    for until in (0.1, 0.5, 1.0):
        whole, part = divmod(until * epochs, 1)
        left.append(math.exp(sum(logs[: int(whole)]) + (part * logs[int(whole)] if part else 0.0)))
    if left[1] <= 0.1:
        return None
    steps = steps_per_epoch * epochs
    fitting = max(0.0, 1 - float(f"{30 / steps:.3g}"))  # leaves 5 % after a tenth of the steps
    percent = ", ".join(f"{100 * value:.0f} %" for value in left)
    return (
        f"The EMA teacher follows the student too slowly for {steps} steps: after 10 %, 50 % and 100 % of training it "
        f"is still {percent} initial weights, so the patches that it scores as hard are close to random. Try "
        f"--ema_decay {fitting:.10g} --ema_decay_final {fitting:.10g}"
    )
