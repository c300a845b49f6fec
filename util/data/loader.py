"""Samplers (which samples a rank sees, in which order) and the loader with its worker processes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing import resource_tracker

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from util.rng import stable_hash


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for training, a function of (seed, epoch) alone.

    Each epoch is a permutation of the data set, cut into global micro-batches of `world_size * batch_size`; rank r
    takes the r-th part of each. One rank with batch size 2b, two ranks with b, and one rank with b and two accumulation
    steps see the same samples in each optimizer step. The last incomplete optimizer step is dropped.

    With `steps`, for schedules that count steps, an epoch has that many optimizer steps: it takes samples from one
    permutation after another, and the epoch of a sample is the number of its permutation.

    `position` is where the next iteration starts: an epoch, and a batch within it (for a mid-epoch resume).

    Raises:
        ValueError: the data set is smaller than one optimizer step.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        accum_iter: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        steps: int | None = None,
    ) -> None:
        self.num_samples, self.batch_size, self.accum_iter = num_samples, batch_size, accum_iter
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.global_batch = batch_size * accum_iter * world_size
        self._pass_steps = num_samples // self.global_batch  # optimizer steps of a permutation
        if self._pass_steps == 0:
            fix = "--global_batch" if steps else "--batch_size or --accum_iter, or --global_batch"
            raise ValueError(
                f"{num_samples:,} images do not fill one optimizer step of {self.global_batch:,} (--batch_size "
                f"{batch_size} x --accum_iter {accum_iter} x {world_size} ranks): lower {fix}"
            )
        self.num_batches = (steps or self._pass_steps) * accum_iter  # per rank
        self.position = (0, 0)

    def of_step(self, epoch: int, step: int) -> list[int]:
        """Indices of all images of an optimizer step, over all ranks and micro-batches."""
        number, step = divmod(epoch * self.num_batches // self.accum_iter + step, self._pass_steps)
        return self._order(number)[step * self.global_batch : (step + 1) * self.global_batch].tolist()

    def _order(self, epoch: int) -> torch.Tensor:
        return torch.randperm(
            self.num_samples, generator=torch.Generator().manual_seed(stable_hash("order", self.seed, epoch))
        )

    def __len__(self) -> int:
        return self.num_batches - self.position[1]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, first_batch = self.position
        current, order = -1, torch.empty(0, dtype=torch.long)
        for batch in range(first_batch, self.num_batches):
            number, batch = divmod(epoch * self.num_batches + batch, self._pass_steps * self.accum_iter)
            if number != current:
                current, order = number, self._order(number)
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield [(number, index) for index in order[start : start + self.batch_size].tolist()]


class ShardSampler(BatchSampler):
    """Batches of indices for evaluation: every sample once over all ranks, none repeated, none dropped."""

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(range(rank, num_samples, world_size), batch_size, drop_last=False)


# A scheduler sends SIGTERM or SIGUSR1 to all processes of a job, and training needs its workers until the next step
# boundary: they ignore the latter, and the former unless the training process sent it. Only `sigwaitinfo` tells the
# sender, and only if all threads block the signal. A spawned worker has threads before any code of ours runs in it, so
# it inherits the mask; so does a fork server.
_FOREIGN = {signal.SIGTERM, signal.SIGUSR1}
_CAN_WAIT = hasattr(signal, "sigwaitinfo")  # not on macOS


@contextmanager
def _signals_blocked(start_method: str) -> Iterator[None]:
    if not _CAN_WAIT:
        yield
        return
    if start_method != "fork":
        resource_tracker.ensure_running()  # it would unblock the signal if it started below
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOREIGN)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_foreign_signals(worker: int) -> None:
    """Worker init. Ctrl-C and a lost terminal reach all processes of a terminal, too."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if _CAN_WAIT:
        signal.pthread_sigmask(signal.SIG_BLOCK, _FOREIGN)  # a fork server may be older than the loader
        threading.Thread(target=_exit_on_parents_sigterm, daemon=True).start()


def _exit_on_parents_sigterm() -> None:
    training = multiprocessing.parent_process()  # with a fork server, os.getppid() is the server
    assert training is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != training.pid:
        pass
    os._exit(0)  # as PyTorch's own handler does


_NO_SHARED_MEMORY = ("Bus error", "shared memory", "No space left on device", "unable to mmap")


class _Loader(DataLoader):
    """A DataLoader whose workers ignore foreign signals, and that says what helps if /dev/shm is too small."""

    def __iter__(self) -> Iterator:
        method = (self.multiprocessing_context or multiprocessing).get_start_method()
        with _signals_blocked(method) if self.num_workers else nullcontext():
            batches = super().__iter__()
        try:
            yield from batches
        except (RuntimeError, OSError) as error:
            if self.num_workers == 0 or not any(sign in str(error) for sign in _NO_SHARED_MEMORY):
                raise
            raise RuntimeError(
                "a data loading worker ran out of shared memory (/dev/shm): start the container with more (docker run "
                f"--shm-size=8g, or --ipc=host), or lower --num_workers (now {self.num_workers}; 0 needs none)"
            ) from error


def build_loader(dataset: Dataset, sampler: Sampler, num_workers: int, pin_memory: bool) -> DataLoader:
    """Batches of the sampler, from worker processes that live as long as the loader."""
    return _Loader(
        dataset,
        worker_init_fn=_ignore_foreign_signals if num_workers else None,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )
