"""One process or many: torchrun's environment, the process group, and collectives that also work without a group."""

import datetime
import os
import pickle
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists: its default arguments would keep the group alive
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from util.run.amp import Amp
from util.run.logger import setup_logging

T = TypeVar("T")

_wrapped: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()  # by `wrap_ddp`, until `shutdown`

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process's rank and the number of processes, in the run and on this node."""

    rank: int
    size: int
    local_rank: int
    local_size: int


ALONE = World(0, 1, 0, 1)  # one process


def read_environment(given: Mapping[str, str] | None = None) -> World:
    """torchrun's environment variables; without torchrun, a world of one process. SLURM's variables are ignored.

    Raises:
        ValueError: some of torchrun's variables are missing, or they are not consistent numbers.
    """
    environ = os.environ if given is None else given
    if not any(name in environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return ALONE
    missing = [name for name in _ENVIRONMENT if name not in environ]
    if missing:
        raise ValueError(
            f"torchrun sets {', '.join(missing)}, which is missing: start with torchrun, or unset "
            + ", ".join(name for name in _ENVIRONMENT if name in environ)
        )
    try:
        rank, size, local_rank, local_size = (int(environ[name]) for name in _ENVIRONMENT[:4])
    except ValueError as error:
        raise ValueError(f"torchrun's variables must be numbers: {error}") from error
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise ValueError(f"RANK {rank}, WORLD_SIZE {size} and LOCAL_RANK {local_rank} are inconsistent")
    return World(rank, size, local_rank, local_size)


def pick_device(name: str | None, world: World) -> torch.device:
    """The device of this process: `name`, by default CUDA where available.

    Raises:
        ValueError: another device than CUDA and the CPU, CUDA is not available, or fewer GPUs than processes.
    """
    kind = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", kind):
        raise ValueError(f"--device {name} is not supported: give cuda or cpu")
    if kind == "cpu":
        return torch.device(kind)
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this PyTorch finds no CUDA device; omit the option, or give cpu")
    if kind != "cuda":
        if world.size > 1:
            raise ValueError(f"--device {name} with {world.size} processes: give cuda, each process takes its own GPU")
        if int(kind[5:]) >= torch.cuda.device_count():
            raise ValueError(f"--device {name}: this node has {torch.cuda.device_count()} GPUs, counted from 0")
        return torch.device(kind)
    if world.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"{world.local_size} processes on a node of {torch.cuda.device_count()} GPUs: lower --nproc_per_node"
        )
    return torch.device("cuda", world.local_rank)


def setup(world: World, device: str | None, precision: str | None, timeout_minutes: float) -> tuple[torch.device, Amp]:
    """Start a script: device and precision, process group (NCCL on CUDA, gloo elsewhere), logging on rank 0.

    float32 means float32 from here on: PyTorch's convolutions would use TF32 otherwise.

    Raises:
        ValueError: no such device, or it does not support the precision.
    """
    chosen = pick_device(device, world)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # the default precision depends on this GPU
    amp = Amp(precision, chosen)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if world.size > 1:
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            rank=world.rank,
            world_size=world.size,
            timeout=datetime.timedelta(minutes=timeout_minutes),
        )
    setup_logging(world.rank == 0)
    return chosen, amp


def shutdown() -> None:
    """Leave the process group and end its threads. Nothing that `wrap_ddp` returned can be trained afterwards.

    A thread of the group that frees a tensor needs the GIL for it. So the group must go down here, where PyTorch
    releases the GIL: if DDP's reducer held it last, the two would wait for each other (pytorch/pytorch#56297), and if
    its threads outlived Python, the process would end by SIGABRT. tests/stress/leaving.py shows both.
    """
    for model in _wrapped:
        del model.reducer, model.logger, model.process_group
    _wrapped.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(value: T) -> list[T]:
    """The values of all ranks, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_zero(compute: Callable[[], T]) -> T:
    """Run `compute` on rank 0 only and broadcast its result. An exception is raised on all ranks."""
    if not dist.is_initialized():
        return compute()
    box: list = [None, None]
    if dist.get_rank() == 0:
        try:
            box = [compute(), None]
        except Exception as error:
            box = [None, error if _can_pickle(error) else RuntimeError(str(error))]
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def _can_pickle(error: Exception) -> bool:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


def wrap_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """DistributedDataParallel. All ranks hold rank 0's weights afterwards."""
    wrapped = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )
    _wrapped.add(wrapped)
    return wrapped
