"""Learning rate and EMA decay as functions of the epoch. The easy-to-hard schedule is `util.masking.num_hardest`."""

import math

from torch.optim import Optimizer


def lr_at(
    epoch: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: float, decay: str = "cosine"
) -> float:
    """Linear warm-up from 0 to `lr`, then a half-cycle cosine (MAE, util/lr_sched.py) or a line down to `min_lr`."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    share = 0.5 * (1.0 + math.cos(math.pi * progress)) if decay == "cosine" else 1.0 - progress
    return min_lr + (lr - min_lr) * share


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
    """Set the lr of every parameter group to `lr_at`, times the group's `lr_scale` (layer-wise lr decay).

    Args:
        epoch: fractional, counted from 0.
        decay: "cosine" or "linear".

    Returns:
        The unscaled lr.
    """
    value = lr_at(epoch, lr=lr, min_lr=min_lr, warmup_epochs=warmup_epochs, epochs=epochs, decay=decay)
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_scale", 1.0)
    return value


def ema_decay_at(epoch: float, decay: float = 0.999, final: float = 0.9999, ramp_epochs: int = 100) -> float:
    """Linear from `decay` to `final` over the first `ramp_epochs`, then constant (official code)."""
    if epoch >= ramp_epochs:
        return final
    return decay + (final - decay) * epoch / ramp_epochs
