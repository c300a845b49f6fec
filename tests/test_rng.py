import random
import subprocess
import sys

import numpy as np
import torch

from util import rng


def test_the_hash_is_the_same_everywhere():
    assert rng.stable_hash(0, 1, 2) == 4450782424123420391
    assert len({rng.stable_hash(*key) for key in [(0, 1), (1, 0), (0, 0, 1), (0,), (-1,), (2**62,)]}) == 6
    code = "from util.rng import stable_hash; print(stable_hash(0, 1, 2))"
    assert int(subprocess.check_output([sys.executable, "-c", code])) == rng.stable_hash(0, 1, 2)


def test_seed_all_reaches_every_generator():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    rng.seed_all(3, 4)
    first = draw()
    draw()
    rng.seed_all(3, 4)
    assert draw() == first
    rng.seed_all(3, 5)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_a_generator_of_its_own_leaves_the_global_one_alone():
    state = torch.get_rng_state()
    a = torch.rand(3, generator=rng.generator(1, 2))
    assert torch.equal(a, torch.rand(3, generator=rng.generator(1, 2)))
    assert torch.equal(state, torch.get_rng_state())


def test_torch_is_seeded_as_by_manual_seed():
    rng.seed_all(1, 2, 3)
    ours = torch.rand(3)
    torch.manual_seed(rng.stable_hash(1, 2, 3))
    assert torch.equal(ours, torch.rand(3))
