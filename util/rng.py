"""Randomness as a function of where we are, never of what was drawn before.

Every random decision is seeded from a hash of its coordinates: a sample from (seed, epoch, index), a micro-step from
(seed, rank, micro-step). Workers, ranks and restarts then change nothing (our own choice; the official code draws masks
from NumPy's global state, which no checkpoint holds).
"""

import hashlib
import random
import struct

import numpy as np
import torch


def stable_hash(*key: int) -> int:
    """Mix integers into one of 63 bits, the same on every machine and in every process."""
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(*key: int) -> None:
    """Seed Python, NumPy and torch (the CPU, and CUDA once something runs there) from the hash of `key`.

    Not by torch.manual_seed: without CUDA it notes the call stack for later, which costs a tenth of loading an image.
    """
    value = stable_hash(*key)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)


def generator(*key: int) -> torch.Generator:
    """A CPU generator of its own, seeded from the hash of `key`."""
    return torch.Generator().manual_seed(stable_hash(*key))
