"""Ranks that join, train a step and leave, again and again: none may hang as it leaves.

    .venv/bin/torchrun --nproc_per_node=2 tests/stress/leaving.py --rounds 1000

Threads of a gloo group let go of tensors, for which they need the GIL, while the main thread takes the group down.
Without what `distributed.stop` does about it, torch 2.9 hangs within the first rounds, and on torch 2.15 threads
outlive the group.
"""

import argparse
import os
import socket
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from util import distributed

CPU = torch.device("cpu")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def threads_of_gloo() -> list[str]:
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=1000)
    args = parser.parse_args()
    world = distributed.read_environment()
    distributed.start(world, CPU, 1)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # rank 0 opens a store of its own from the second round on
    for _ in range(args.rounds):
        assert threads_of_gloo(), "they have another name in this release"
        model = distributed.wrap(torch.nn.Linear(4, 4), CPU)
        model(torch.ones(2, 4)).sum().backward()
        hearsay = distributed.Hearsay(1)
        hearsay([1])
        assert hearsay.listen() == [1]
        os.environ["MASTER_PORT"] = str(distributed.from_rank_zero(free_port))
        assert distributed.all_reduce_sum(torch.ones(1000)).sum() == 1000 * world.size
        del hearsay
        distributed.stop()
        assert threads_of_gloo() == [], "they would outlive the group, and perhaps Python"
        del model
        distributed.start(world, CPU, 1)
    distributed.stop()
    print(f"rank {world.rank} left {args.rounds} times, torch {torch.__version__}", flush=True)


if __name__ == "__main__":
    main()
