"""Learning-rate schedule (MAE, util/schedules.py)."""

import math

from torch.optim import Optimizer


def adjust_learning_rate(
    optimizer: Optimizer, epoch: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: float
) -> float:
    """Set the rate for fractional `epoch`: linear warm-up to `lr`, then a half-cycle cosine down to `min_lr`.

    A parameter group's `lr_scale` (layer-wise decay) multiplies it. Returns the unscaled rate.
    """
    if epoch < warmup_epochs:
        rate = lr * epoch / warmup_epochs
    else:
        progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
        rate = min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    return rate
