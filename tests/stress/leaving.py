"""Ranks that join, train a step and leave, repeatedly: none may hang on leaving.

    .venv/bin/torchrun --nproc_per_node=2 tests/stress/leaving.py --rounds 1000

Threads of a gloo group let go of tensors, for which they need the GIL, while the main thread takes the group down.
Without what `distributed.shutdown` does about it, threads outlive the group, and torch 2.9 hangs within a few rounds.
"""

import argparse
import os
import socket
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from util.run import distributed

CPU = torch.device("cpu")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=1000)
    args = parser.parse_args()
    world = distributed.read_environment()
    for number in range(args.rounds):
        before = threads()
        distributed.setup(world, "cpu", "fp32", 1)
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # rank 0 opens a store of its own from the second round on
        model = distributed.wrap_ddp(torch.nn.Linear(4, 4), CPU)
        model(torch.ones(2, 4)).sum().backward()
        group = torch.distributed.new_group(backend="gloo")  # as util/run/watch.py
        told = torch.tensor([world.rank])
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX, group=group, async_op=True).wait()
        assert told.item() == world.size - 1
        os.environ["MASTER_PORT"] = str(distributed.from_rank_zero(free_port))
        assert distributed.all_reduce_sum(torch.ones(1000)).sum() == 1000 * world.size
        del group
        of_the_group = threads() - before
        distributed.shutdown()
        if number:  # the first round may start others, that stay
            assert of_the_group
            deadline = time.monotonic() + 5  # the kernel lists a thread for a moment longer than it can be joined
            while left := of_the_group & threads():
                assert time.monotonic() < deadline, f"{len(left)} threads outlive the group, and perhaps Python"
        del model
    print(f"rank {world.rank} left {args.rounds} times, torch {torch.__version__}", flush=True)


if __name__ == "__main__":
    main()
