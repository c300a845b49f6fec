"""Random streams as a function of coordinates, never of what was drawn before.

Every random decision is seeded from a hash of its coordinates: a sample from (seed, epoch, index), a micro-batch from
(seed, rank, micro-batch), each with a tag of its kind. The number of workers and restarts then change nothing. (The
official code draws masks from NumPy's global state, which its checkpoints do not hold.)
"""

import hashlib
import random
import struct

import numpy as np
import torch


def stable_hash(*key: int | str) -> int:
    """Hash integers to one of 63 bits that is the same on every machine and in every process.

    Args:
        key: integers; the first may be a domain tag of up to 16 bytes ("sample"), so that equal integers that mean
            different things give different hashes.
    """
    tag, integers = (key[0], key[1:]) if key and isinstance(key[0], str) else ("", key)
    digest = hashlib.blake2b(struct.pack(f"<{len(integers)}q", *integers), digest_size=8, person=tag.encode()).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(*key: int | str) -> None:
    """Seed Python, NumPy and torch (CPU, and CUDA once it is initialised) from the hash of `key`.

    Not with torch.manual_seed: without CUDA it records a stack trace, a tenth of the time it takes to load an image.
    """
    value = stable_hash(*key)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)


def generator(*key: int | str) -> torch.Generator:
    """A new CPU generator, seeded from the hash of `key`."""
    return torch.Generator().manual_seed(stable_hash(*key))
