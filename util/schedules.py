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


def initial_weights_left(
    steps_per_epoch: int, epochs: int, decay: float, final: float, ramp_epochs: int, until: float
) -> float:
    """Fraction of initial weights in the EMA teacher after the fraction `until` of training: the product of decays."""
    whole, part = divmod(until * epochs, 1)
    decays = [ema_decay_at(epoch, decay, final, ramp_epochs) for epoch in range(int(whole) + 1)]
    left = math.prod(value**steps_per_epoch for value in decays[:-1])
    return left * decays[-1] ** (part * steps_per_epoch)
