"""How every script begins, once its options are known."""

import torch

from util.run import distributed
from util.run.amp import Precision, default_precision
from util.run.logger import setup_logging


def begin(
    world: distributed.World, device: str | None, precision: str | None, timeout_minutes: float
) -> tuple[torch.device, Precision]:
    """Choose device and precision where they are left open, join the other processes, and let rank 0 speak.

    Raises:
        ValueError: there is no such device, or it has no such precision.
    """
    chosen = distributed.pick_device(device, world)
    compute = Precision(precision or default_precision(chosen), chosen)
    distributed.start(world, chosen, timeout_minutes)
    setup_logging(world.rank == 0)
    return chosen, compute
