"""Learning rate (official values in tests/golden/vit_*.npz) and EMA decay as functions of the epoch."""

import json

import numpy as np
import pytest
import torch
from golden import VIT_FILES, load

from util.schedules import adjust_learning_rate, ema_decay_at, slow_teacher


@pytest.mark.parametrize("name", VIT_FILES)
def test_learning_rate_schedule(name):
    golden, _ = load(name)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.0)
    arguments = json.loads(str(golden["lr_args"]))
    ours = [adjust_learning_rate(optimizer, epoch, **arguments) for epoch in golden["lr_epochs"]]
    np.testing.assert_allclose(ours, golden["lr_values"], rtol=1e-9, atol=1e-12)


def test_a_linear_decay_reaches_the_minimum_at_the_end():
    settings = {"lr": 1.0, "min_lr": 0.0, "warmup_epochs": 1, "epochs": 5, "decay": "linear"}
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.0)
    lrs = [adjust_learning_rate(optimizer, epoch, **settings) for epoch in (0, 0.5, 1, 2, 4, 5)]
    assert lrs == [0, 0.5, 1, 0.75, 0.25, 0]


def test_lr_scale_multiplies():
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr_scale": 0.25}, {"params": [torch.zeros(1)]}], lr=0.0)
    lr = adjust_learning_rate(optimizer, 5, lr=1.0, min_lr=0.0, warmup_epochs=10, epochs=20)
    assert lr == 0.5
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.5]


def test_ema_decay_ramps_over_the_first_hundred_epochs():
    assert ema_decay_at(0) == 0.999
    assert ema_decay_at(50) == pytest.approx(0.99945)
    assert ema_decay_at(100) == ema_decay_at(1500) == 0.9999
    assert ema_decay_at(3, 0.9, 0.99, 0) == 0.99


def test_slow_teachers():
    """496 steps with the published decay leave 63 % of the initial weights; the published 200 epochs leave none."""
    assert "95 %, 79 %, 63 % initial weights" in slow_teacher(31, 16, 0.999, 0.9999, 100)
    assert "--ema_decay 0.9395 --ema_decay_final 0.9395" in slow_teacher(31, 16, 0.999, 0.9999, 100)
    assert slow_teacher(31, 16, 0.9395, 0.9395, 100) is None
    assert slow_teacher(625, 200, 0.999, 0.9999, 100) is None
    assert "--ema_decay 0.9999625 --ema_decay_final 0.9999625" in slow_teacher(1000, 800, 1.0, 1.0, 100)
