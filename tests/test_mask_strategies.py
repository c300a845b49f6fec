"""Where each strategy masks, given the options of the pre-training script: which patches and how many, by epoch."""

import pytest
import torch

import main_pretrain
from util.masking import MaskSampler
from util.run.distributed import World

GRID, MASKED, EPOCHS = (8, 8), 48, 10


def masks(options, epoch, images=400):
    """Masks (B, L) of an epoch for images whose patch i has predicted loss i, and the number chosen by it."""
    text = f"--model mae_vit_micro_patch16 --input_size 32 --patch_size 4 --epochs {EPOCHS} {options}"
    args = main_pretrain.resolve_options(main_pretrain.get_args_parser().parse_args(text.split()), World(0, 1, 0, 1))
    sampler = MaskSampler.from_options(vars(args), GRID)
    count = sampler.num_hardest[epoch]
    scores = torch.arange(64.0).expand(images, -1) if count else None  # the engine runs no teacher where it is 0
    mask = sampler.draw(scores, images, epoch)
    assert mask.dtype == torch.bool
    assert (mask.sum(1) == mask.sum(1)[0]).all()
    return mask, count


def always_masked(mask):
    return set(mask.all(0).nonzero().flatten().tolist())


def hardest(count):
    return set(range(64 - count, 64))


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ("", {0: 2, 4: 12, 9: 24}),
        ("--mask_strategy easy_to_hard --alpha_0 0.25 --alpha_T 1", {0: 15, 9: 48}),
        ("--mask_strategy hard_to_easy", {0: 21, 4: 12, 9: 0}),
        ("--mask_strategy constant", {0: 24, 4: 24, 9: 24}),
        ("--mask_strategy constant --alpha_T 0.25", {0: 12, 9: 12}),
        ("--mask_strategy hardest", {0: 48, 9: 48}),
    ],
)
def test_the_hardest_are_always_masked_and_the_rest_at_random(options, counts):
    for epoch, count in counts.items():
        mask, chosen = masks(options, epoch)
        assert mask.sum(1)[0] == MASKED
        assert chosen == count
        assert always_masked(mask) == hardest(count)
        if count < MASKED:
            others = mask[:, : 64 - count].float().mean(0)
            assert (others - (MASKED - count) / (64 - count)).abs().max() < 0.15


def test_the_easiest():
    for epoch, count in {0: 2, 9: 24}.items():
        mask, chosen = masks("--mask_strategy easiest", epoch)
        assert chosen == count
        assert always_masked(mask) == set(range(count))


@pytest.mark.parametrize("options", ["--mask_strategy random", "--no-learning_loss"])
def test_random_needs_no_teacher(options):
    for epoch in (0, 9):
        mask, count = masks(options, epoch)
        assert count == 0
        assert mask.sum(1)[0] == MASKED
        assert (mask.float().mean(0) - 0.75).abs().max() < 0.12


def test_patterns_disable_mining():
    for option in ("--mask_block", "--mask_regular"):
        mask, count = masks(option, 9)
        assert count == 0
        assert mask.sum(1)[0] == MASKED
    visible = ~masks("--mask_block", 9)[0].view(-1, 8, 8)
    assert (visible.any(1).sum(1) == 4).all()
    assert (visible.any(2).sum(1) == 4).all()
    assert ((~masks("--mask_regular", 9)[0]).view(-1, 4, 2, 4, 2).sum((2, 4)) == 1).all()


@pytest.mark.parametrize(("ratio", "masked"), [(0.5, 32), (0.6, 39), (0.9, 58)])
def test_any_ratio(ratio, masked):
    mask, count = masks(f"--mask_ratio {ratio}", 9)
    assert mask.sum(1)[0] == masked
    assert count == masked // 2
