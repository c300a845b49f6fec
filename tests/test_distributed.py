"""Torchrun's environment, and what holds with and without a process group."""

import pytest
import torch
from programs import launch, on_ranks

from util.run import distributed

FULL = {
    **{"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
}


def in_a_group(function, *arguments):
    """Within a process group of gloo."""
    world = distributed.read_environment()
    distributed.setup(world, "cpu", "fp32", 1)
    answer = function(world, *arguments)
    distributed.shutdown()
    return answer


def test_environment():
    assert distributed.read_environment({}) == distributed.World(0, 1, 0, 1)
    assert distributed.read_environment(FULL) == distributed.World(3, 8, 1, 2)
    slurm = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "MASTER_ADDR": "node1"}
    assert distributed.read_environment(slurm) == distributed.World(0, 1, 0, 1)


@pytest.mark.parametrize("missing", sorted(FULL))
def test_a_partial_environment_is_an_error(missing):
    with pytest.raises(ValueError, match=f"torchrun sets {missing}, which is missing: start with torchrun, or unset"):
        distributed.read_environment({name: value for name, value in FULL.items() if name != missing})


@pytest.mark.parametrize("change", [{"RANK": "8"}, {"WORLD_SIZE": "two"}, {"LOCAL_RANK": "-1"}])
def test_an_impossible_environment_is_an_error(change):
    with pytest.raises(ValueError, match=r"must be numbers|are inconsistent"):
        distributed.read_environment({**FULL, **change})


def test_devices(monkeypatch):
    one, two = distributed.World(0, 1, 0, 1), distributed.World(1, 2, 1, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.pick_device(None, two) == torch.device("cpu")
    with pytest.raises(ValueError, match="finds no CUDA device"):
        distributed.pick_device("cuda", one)
    with pytest.raises(ValueError, match="--device mps is not supported: give cuda or cpu"):
        distributed.pick_device("mps", one)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert distributed.pick_device(None, one) == torch.device("cuda", 0)
    assert distributed.pick_device("cpu", one) == torch.device("cpu")
    with pytest.raises(ValueError, match="2 processes on a node of 1 GPUs"):
        distributed.pick_device(None, two)
    with pytest.raises(ValueError, match="each process takes its own GPU"):
        distributed.pick_device("cuda:0", two)


def test_one_process_needs_no_group():
    assert torch.equal(distributed.all_reduce_sum(torch.ones(2)), torch.ones(2))
    assert distributed.from_rank_zero(lambda: 5) == 5
    assert distributed.gather(3) == [3]


def exchange(world):
    total = distributed.all_reduce_sum(torch.tensor([1.0 + world.rank])).item()
    answer = distributed.from_rank_zero(lambda: [world.rank, "from rank zero"])
    with pytest.raises(ValueError, match="invalid literal for int"):
        distributed.from_rank_zero(lambda: int("x"))
    return total, answer, distributed.gather(world.rank)


def test_two_processes():
    assert on_ranks(in_a_group, exchange) == [(3.0, [0, "from rank zero"], [0, 1])] * 2


def test_leaving_the_group_never_hangs():
    out = launch("tests/stress/leaving", "--rounds", 8, processes=2).stdout
    assert out.count("left 8 times") == 2
