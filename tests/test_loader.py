import os
import subprocess

import pytest
import torch

from util.data.datasets import ImageDataset
from util.data.loader import EpochSampler, ShardSampler, build_loader
from util.data.sources import ShapesSource
from util.data.transforms import RandomCrop


def epoch(sampler, number, first_batch=0):
    sampler.position = (number, first_batch)
    return list(sampler)


def test_every_global_batch_is_the_same_on_any_topology():
    """One rank with 2b, two ranks with b, one rank with b and two accumulation steps: the same global batches."""
    one = epoch(EpochSampler(100, 16, seed=3), 1)
    two = [epoch(EpochSampler(100, 8, rank=r, world_size=2, seed=3), 1) for r in (0, 1)]
    accumulated = epoch(EpochSampler(100, 8, accum_iter=2, seed=3), 1)
    assert one == [a + b for a, b in zip(*two, strict=True)]
    assert one == [a + b for a, b in zip(accumulated[::2], accumulated[1::2], strict=True)]


def test_an_epoch_repeats_no_sample_and_has_whole_steps_only():
    sampler = EpochSampler(103, 8, accum_iter=3, seed=0)
    batches = epoch(sampler, 0)
    assert len(batches) == len(sampler) == 12
    keys = [key for batch in batches for key in batch]
    assert len(set(keys)) == len(keys) == 96
    assert {number for number, _ in keys} == {0}


def test_the_order_depends_on_seed_and_epoch():
    assert epoch(EpochSampler(64, 8, seed=1), 0) == epoch(EpochSampler(64, 8, seed=1), 0)
    orders = {
        tuple(index for batch in epoch(EpochSampler(64, 8, seed=seed), number) for _, index in batch)
        for seed in (0, 1)
        for number in (0, 1)
    }
    assert len(orders) == 4


def test_iteration_can_start_mid_epoch():
    sampler = EpochSampler(64, 8, seed=1)
    whole = epoch(sampler, 4)
    assert epoch(sampler, 4, first_batch=3) == whole[3:]
    assert len(sampler) == 5


def test_too_few_images_are_rejected():
    with pytest.raises(ValueError, match=r"31 images do not fill one optimizer step of 32 .*lower --batch_size"):
        EpochSampler(31, 8, accum_iter=2, world_size=2)


def test_steps_run_through_one_permutation_after_another():
    """Whatever the length of an epoch in steps; the samples of a step are those of the same step of `EpochSampler`."""
    by_epoch = EpochSampler(23, 2, accum_iter=2, seed=5)  # 5 steps, 3 images left over
    expected = []
    for epoch in range(4):
        by_epoch.position = (epoch, 0)
        expected += list(by_epoch)
    sampler = EpochSampler(23, 2, accum_iter=2, seed=5, steps=7)
    assert len(sampler) == 14
    found = []
    for epoch in range(2):
        sampler.position = (epoch, 0)
        found += list(sampler)
    assert found == expected[: len(found)]
    sampler.position = (1, 6)
    assert list(sampler) == found[20:]
    assert sampler.of_step(1, 3) == [index for batch in found[20:22] for _, index in batch]


def test_steps_are_the_same_on_any_topology():
    whole = EpochSampler(23, 4, seed=5, steps=7)
    halves = [EpochSampler(23, 2, rank=rank, world_size=2, seed=5, steps=7) for rank in range(2)]
    for sampler in (whole, *halves):
        sampler.position = (1, 0)
    assert list(whole) == [a + b for a, b in zip(*halves, strict=True)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_evaluation_uses_each_image_once(world_size, batch_size):
    shards = [ShardSampler(23, batch_size, rank, world_size) for rank in range(world_size)]
    seen = [index for shard in shards for batch in shard for index in batch]
    assert sorted(seen) == list(range(23))
    assert all(len(list(shard)) == len(shard) for shard in shards)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_do_not_depend_on_the_workers(num_workers):
    dataset = ImageDataset(ShapesSource("train", 24), RandomCrop(16), seed=1)
    sampler = EpochSampler(24, 8, seed=1)
    loader = build_loader(dataset, sampler, num_workers, pin_memory=False)
    for number in (0, 1):  # workers persist between epochs
        sampler.position = (number, 0)
        images = torch.cat([batch.image for batch in loader])
        expected = torch.stack([dataset[key].image for batch in sampler for key in batch])
        assert torch.equal(images, expected)


class Pids:
    def __len__(self):
        return 100

    def __getitem__(self, key):
        return os.getpid()


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_a_worker_ignores_signals_unless_the_training_process_sends_sigterm(start_method):
    """A scheduler's SIGTERM and SIGUSR1 do not end it; its own process does, at once. Python 3.14 has a fork server."""
    loader = build_loader(Pids(), ShardSampler(100, 1), 1, False)
    loader.multiprocessing_context = start_method
    batches = iter(loader)
    pid = next(batches).item()
    for name in ("-TERM", "-USR1"):
        subprocess.run(["kill", name, str(pid)], check=True)
    assert [next(batches).item() for _ in range(20)] == [pid] * 20
    (worker,) = loader._iterator._workers
    assert worker.is_alive()
    worker.terminate()
    worker.join(timeout=20)
    assert worker.exitcode == 0


class Fails(Pids):
    def __init__(self, message):
        self.message = message

    def __getitem__(self, key):
        raise RuntimeError(self.message)


def test_too_little_shared_memory_names_the_options_that_help():
    def load(message, num_workers=1):
        list(build_loader(Fails(message), ShardSampler(100, 1), num_workers, False))

    for message in ("unable to write to file </torch_1>: No space left on device (28)", "killed by signal: Bus error."):
        with pytest.raises(RuntimeError, match=r"out of shared memory .*--shm-size=8g.*--num_workers \(now 1;"):
            load(message)
        with pytest.raises(RuntimeError, match=message[:9]):
            load(message, num_workers=0)
    with pytest.raises(RuntimeError, match="something else"):
        load("something else")
