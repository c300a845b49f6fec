"""Masks: True = masked, the same count in every row, and the right patches."""

import pytest
import torch

from util import masking


@pytest.mark.parametrize(("ratio", "masked"), [(0.6, 118), (0.75, 147), (0.9, 177)])
def test_count_masked(ratio, masked):
    assert masking.count_masked(196, ratio) == masked


def test_num_hardest_never_exceeds_what_is_masked():
    assert masking.num_hardest(147, 0, 200) == 0
    assert masking.num_hardest(147, 199, 200) == 73
    assert masking.num_hardest(147, 199, 200, alpha_0=0.0, alpha_T=1.0) == 147
    assert masking.num_hardest(147, 5, 10, alpha_0=0.3, alpha_T=0.3) == int(147 * 0.3)


@pytest.mark.parametrize("hardest", [0, 1, 5, 12])
def test_hard_mask(hardest):
    scores = torch.randn(64, 16)
    mask = masking.hard_mask(scores, 12, hardest)
    assert mask.dtype == torch.bool
    assert (mask.sum(1) == 12).all()
    top = scores.topk(hardest, dim=1).indices
    assert mask.gather(1, top).all()


def test_hard_mask_draws_the_rest_uniformly():
    """As the official loop does: of 196 patches the 73 hardest are always masked, each other one with p = 74 / 123."""
    scores = torch.randn(196).expand(4000, -1)
    rate = masking.hard_mask(scores, 147, 73).float().mean(0)
    hardest = scores[0].topk(73).indices
    others = torch.ones(196, dtype=torch.bool).index_fill(0, hardest, False)
    assert (rate[hardest] == 1).all()
    assert (rate[others] - 74 / 123).abs().max() < 0.04  # five standard deviations


def test_hard_mask_ranks_nan_as_hardest_and_survives_ties():
    scores = torch.zeros(8, 16)
    scores[:, 3] = torch.nan
    mask = masking.hard_mask(scores, 12, 1)
    assert mask[:, 3].all()
    assert (mask.sum(1) == 12).all()


def test_masks_follow_their_generator():
    def draw(seed):
        return masking.hard_mask(torch.zeros(4, 64), 48, 10, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_random_mask():
    mask = masking.random_mask(2000, 16, 12)
    assert (mask.sum(1) == 12).all()
    assert (mask.float().mean(0) - 0.75).abs().max() < 0.05


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (8, 16)])
def test_block_mask_shows_one_square(grid):
    h, w = grid
    side = int((h * w / 4) ** 0.5)
    visible = ~masking.block_mask(500, grid).view(-1, h, w)
    assert (visible.sum((1, 2)) == side**2).all()
    corners = set()
    for image in visible:
        rows, columns = image.nonzero().T
        assert rows.max() - rows.min() == columns.max() - columns.min() == side - 1
        corners.add((rows.min().item(), columns.min().item()))
    assert {row for row, _ in corners} == set(range(h // 2))
    assert {column for _, column in corners} == set(range(w // 2))


def test_block_mask_rejects_a_grid_that_is_too_small():
    with pytest.raises(ValueError, match=r"4 x 4 patches does not fit into a grid of 2 x 32"):
        masking.block_mask(1, (2, 32))


def test_regular_mask_shows_one_patch_of_each_cell():
    visible = ~masking.regular_mask(2000, (8, 6)).view(-1, 4, 2, 3, 2)
    assert (visible.sum((2, 4)) == 1).all()
    assert (visible.float().mean(0) - 0.25).abs().max() < 0.06
    with pytest.raises(ValueError, match="7 x 7"):
        masking.regular_mask(1, (7, 7))


@pytest.mark.parametrize("pattern", [None, *masking.PATTERNS])
def test_constructing_a_sampler_draws_nothing(pattern):
    state = torch.get_rng_state()
    masking.MaskSampler((4, 4), 0.75, epochs=2, pattern=pattern)
    assert torch.equal(state, torch.get_rng_state())


def test_strategies_at_the_ends_of_training():
    """Shares of the masked patches taken by predicted loss in the first and the last epoch of ten."""
    shares = {}
    for name in masking.STRATEGIES:
        sampler = masking.MaskSampler((10, 20), 0.5, 10, name, (0.0, 0.5))
        shares[name] = [sampler.num_hardest[epoch] for epoch in (0, 9)]
    assert shares == {
        "easy_to_hard": [5, 50],
        "hard_to_easy": [45, 0],
        "constant": [50, 50],
        "hardest": [100, 100],
        "easiest": [5, 50],
        "random": [0, 0],
    }
