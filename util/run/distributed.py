"""One process or many: torchrun's environment, and collectives that need no process group when there is one process."""

import datetime
import os
import pickle
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported once there is a group, its functions would hold it for ever, as their default
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

_wrapped: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()  # by `wrap`, until `stop`

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process's place among those of the run."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def read_environment(environ: dict[str, str] | None = None) -> World:
    """What torchrun says about this process; without torchrun, the only one. SLURM's variables are not looked at.

    Raises:
        ValueError: only a part of torchrun's variables is set, or they are not numbers that fit each other.
    """
    environ = os.environ if environ is None else environ
    if not any(name in environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return World(rank=0, size=1, local_rank=0, local_size=1)
    missing = [name for name in _ENVIRONMENT if name not in environ]
    if missing:
        raise ValueError(
            f"of torchrun's variables, {', '.join(missing)} is not set: start with torchrun, or unset "
            + ", ".join(name for name in _ENVIRONMENT if name in environ)
        )
    try:
        rank, size, local_rank, local_size = (int(environ[name]) for name in _ENVIRONMENT[:4])
    except ValueError as error:
        raise ValueError(f"torchrun's variables must be numbers: {error}") from error
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise ValueError(f"RANK {rank}, WORLD_SIZE {size}, LOCAL_RANK {local_rank} do not fit each other")
    return World(rank, size, local_rank, local_size)


def pick_device(name: str | None, world: World) -> torch.device:
    """The device of this process: CUDA where there is one unless `name` says otherwise.

    Raises:
        ValueError: `name` asks for CUDA and there is none, or the node has fewer GPUs than processes.
    """
    kind = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not kind.startswith("cuda"):
        try:
            return torch.device(kind)
        except RuntimeError as error:
            raise ValueError(f"--device {name}: there is no such device; give cuda or cpu") from error
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this PyTorch sees no CUDA device; leave the option out, or give cpu")
    if kind != "cuda":
        if world.size > 1:
            raise ValueError(f"--device {name} with {world.size} processes: give cuda, each process takes its own GPU")
        return torch.device(kind)
    if world.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"{world.local_size} processes on a node of {torch.cuda.device_count()} GPUs: lower --nproc_per_node"
        )
    return torch.device("cuda", world.local_rank)


def start(world: World, device: torch.device, timeout_minutes: float) -> None:
    """Join the process group (NCCL on CUDA, gloo elsewhere). One process needs none."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world.size > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=world.rank,
            world_size=world.size,
            timeout=datetime.timedelta(minutes=timeout_minutes),
        )


def stop() -> None:
    """Leave the process group, and end its threads; nothing that `wrap` returned can be trained afterwards.

    A thread of the group that lets go of a tensor needs the GIL for it. So the group must go down here, where PyTorch
    gives up the GIL: if DDP's reducer held it last, the two would wait for each other (pytorch/pytorch#56297), and if
    its threads outlived Python, the process would end by SIGABRT. tests/stress/leaving.py shows both.
    """
    for model in _wrapped:
        del model.reducer, model.logger, model.process_group
    _wrapped.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up on any rank; the same answer on all."""
    if not dist.is_initialized():
        return flag
    return all_reduce_sum(torch.tensor(float(flag), device=device)).item() > 0


def gather(value: T) -> list[T]:
    """The values of all ranks, in their order, on all ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class Hearsay:
    """Small whole numbers that ranks tell each other at every step, without waiting for any device.

    What is told at one call is read at the next, a step later: the exchange runs between hosts (gloo, also beside
    NCCL) while the step is computed, so that it has arrived when it is asked for. All ranks must call in step; each
    call gives the same answer on all of them.
    """

    def __init__(self, timeout_minutes: float) -> None:
        self._group = self._work = None
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=timeout_minutes))

    def __call__(self, numbers: list[int]) -> list[int]:
        """The largest of each number over the ranks, as told at the last call (at first, zeros); at once if alone."""
        if self._group is None:
            return numbers
        heard = self.listen() or [0] * len(numbers)
        self._told = torch.tensor(numbers)
        self._work = dist.all_reduce(self._told, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return heard

    def listen(self) -> list[int] | None:
        """What the last call told, waited for; None if there is nothing to hear. No rank leaves before the others."""
        if self._work is None:
            return None
        self._work.wait()
        self._work = None
        return self._told.tolist()


def from_rank_zero(compute: Callable[[], T]) -> T:
    """Run `compute` on rank 0 alone and give its result to all. What it raises is raised everywhere."""
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


def gradient_exchange(model: nn.Module, now: bool) -> AbstractContextManager:
    """Around a micro-step: whether DDP exchanges gradients in its backward pass. Only a step's last one needs to."""
    return nullcontext() if now or not isinstance(model, DistributedDataParallel) else model.no_sync()


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """DistributedDataParallel where there are several processes. Ranks hold rank 0's weights afterwards."""
    if not dist.is_initialized():
        return model
    wrapped = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )
    _wrapped.add(wrapped)
    return wrapped
