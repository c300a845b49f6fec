"""Which samples a rank sees, in which order, and the processes that load them."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from util.rng import generator


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for training, a function of (seed, epoch) alone.

    The order is a permutation of the data, cut into global batches of `world_size * batch_size`; rank r takes the r-th
    part of each. So one rank with batch 2 b, two ranks with b, and one rank with b and two accumulation steps see the
    same samples in each optimizer step. An epoch is cut to whole optimizer steps.

    Raises:
        ValueError: the data do not fill one optimizer step.
    """

    def __init__(
        self, num_samples: int, batch_size: int, accum_iter: int = 1, rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> None:
        self.num_samples, self.batch_size, self.accum_iter = num_samples, batch_size, accum_iter
        self.rank, self.world_size, self.seed = rank, world_size, seed
        global_batch = batch_size * accum_iter * world_size
        if num_samples < global_batch:
            raise ValueError(
                f"{num_samples:,} images do not fill one optimizer step of {global_batch:,} (--batch_size {batch_size} "
                f"x --accum_iter {accum_iter} x {world_size} processes): lower --batch_size or --accum_iter"
            )
        self.num_batches = num_samples // global_batch * accum_iter  # per rank
        self.epoch, self.first_batch = 0, 0

    def set_position(self, epoch: int, first_batch: int = 0) -> None:
        """Where the next pass begins: an epoch, and a batch within it (a run that stopped there goes on)."""
        self.epoch, self.first_batch = epoch, first_batch

    def of_step(self, epoch: int, step: int) -> list[int]:
        """Indices of all images of an optimizer step, over all ranks and micro-steps."""
        count = self.batch_size * self.world_size * self.accum_iter
        return self._order(epoch)[step * count : (step + 1) * count].tolist()

    def _order(self, epoch: int) -> torch.Tensor:
        return torch.randperm(self.num_samples, generator=generator(self.seed, epoch))

    def __len__(self) -> int:
        return self.num_batches - self.first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = self._order(self.epoch)
        for batch in range(self.first_batch, self.num_batches):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, index) for index in order[start : start + self.batch_size].tolist()]


class ShardSampler(Sampler[list[int]]):
    """Batches of indices for evaluation: every sample once over all ranks, none repeated, none dropped."""

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, num_samples, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield list(self.indices[start : start + self.batch_size])


def _heed_parent_alone(worker: int) -> None:
    """Keep a loading process alive when a scheduler sends SIGTERM to all processes.

    Whoever trains needs data up to its next step boundary. The process it works for still ends it with SIGTERM: a
    thread waits for the signal, for only there one learns who sent it.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_at_parents_word, daemon=True).start()


def _end_at_parents_word() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)  # as PyTorch's own handler does, which this one stands in for


class _Loader(DataLoader):
    """One that says which loading process died, also if a batch was just being fetched from it."""

    def __iter__(self) -> Iterator:
        batches = super().__iter__()
        try:
            yield from batches
        except (ConnectionError, EOFError, FileNotFoundError):  # the connection broke
            time.sleep(1)  # the signal of the death arrives; PyTorch answers it with an error that names the process
            raise


def build_loader(dataset: Dataset, sampler: Sampler, num_workers: int, pin_memory: bool) -> DataLoader:
    """Batches of the sampler, loaded by processes that live as long as the loader."""
    return _Loader(
        dataset,
        worker_init_fn=_heed_parent_alone if num_workers else None,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )
