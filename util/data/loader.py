"""Samplers (which samples a rank sees, in which order) and the loader with its worker processes."""

import os
import signal
import threading
from collections.abc import Iterator

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from util.rng import stable_hash


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for training, a function of (seed, epoch) alone.

    Each epoch is a permutation of the data set, cut into global micro-batches of `world_size * batch_size`; rank r
    takes the r-th part of each. One rank with batch size 2b, two ranks with b, and one rank with b and two accumulation
    steps see the same samples in each optimizer step. The last incomplete optimizer step is dropped.

    Raises:
        ValueError: the data set is smaller than one optimizer step.
    """

    def __init__(
        self, num_samples: int, batch_size: int, accum_iter: int = 1, rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> None:
        self.num_samples, self.batch_size, self.accum_iter = num_samples, batch_size, accum_iter
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.global_batch = batch_size * accum_iter * world_size
        if num_samples < self.global_batch:
            raise ValueError(
                f"{num_samples:,} images do not fill one optimizer step of {self.global_batch:,} (--batch_size "
                f"{batch_size} x --accum_iter {accum_iter} x {world_size} ranks): lower --batch_size or --accum_iter"
            )
        self.num_batches = num_samples // self.global_batch * accum_iter  # per rank
        self.epoch, self.first_batch = 0, 0

    def set_position(self, epoch: int, first_batch: int = 0) -> None:
        """Where the next iteration starts: an epoch, and a batch within it (for a mid-epoch resume)."""
        self.epoch, self.first_batch = epoch, first_batch

    def of_step(self, epoch: int, step: int) -> list[int]:
        """Indices of all images of an optimizer step, over all ranks and micro-batches."""
        return self._order(epoch)[step * self.global_batch : (step + 1) * self.global_batch].tolist()

    def _order(self, epoch: int) -> torch.Tensor:
        return torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(stable_hash(self.seed, epoch)))

    def __len__(self) -> int:
        return self.num_batches - self.first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self._order(self.epoch)
        for batch in range(self.first_batch, self.num_batches):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, index) for index in order[start : start + self.batch_size].tolist()]


class StepSampler(EpochSampler):
    """`EpochSampler` for schedules that count steps: each of its epochs has `steps` optimizer steps.

    The samples come from one permutation of the data set after another, and the epoch of a sample is the number of its
    permutation.
    """

    def __init__(
        self,
        steps: int,
        num_samples: int,
        batch_size: int,
        accum_iter: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(num_samples, batch_size, accum_iter, rank, world_size, seed)
        self._pass_steps = self.num_batches // accum_iter
        self.num_batches = steps * accum_iter

    def of_step(self, epoch: int, step: int) -> list[int]:
        number, step = divmod(epoch * self.num_batches // self.accum_iter + step, self._pass_steps)
        return super().of_step(number, step)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        current = order = None
        for batch in range(self.first_batch, self.num_batches):
            total = self.epoch * self.num_batches + batch
            number, batch = divmod(total, self._pass_steps * self.accum_iter)
            if number != current:
                current, order = number, self._order(number)
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield [(number, index) for index in order[start : start + self.batch_size].tolist()]


class ShardSampler(BatchSampler):
    """Batches of indices for evaluation: every sample once over all ranks, none repeated, none dropped."""

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(range(rank, num_samples, world_size), batch_size, drop_last=False)


def _ignore_foreign_sigterm(worker: int) -> None:
    """Worker init: ignore SIGTERM unless the training process sent it.

    A scheduler sends SIGTERM to all processes of a job, and training needs its workers until the next step boundary.
    Only `sigwaitinfo` tells who the sender is, so a thread waits for the signal.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_parents_sigterm, daemon=True).start()


def _exit_on_parents_sigterm() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)  # as PyTorch's own handler does


def build_loader(dataset: Dataset, sampler: Sampler, num_workers: int, pin_memory: bool) -> DataLoader:
    """Batches of the sampler, from worker processes that live as long as the loader."""
    return DataLoader(
        dataset,
        worker_init_fn=_ignore_foreign_sigterm if num_workers else None,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )
