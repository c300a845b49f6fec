import pytest
import torch

from util.metrics import MeanMeter, rank_accuracy


def alone(tensor):
    return tensor


def test_rank_accuracy():
    target = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    assert rank_accuracy(target * 5 - 1, target) == 1
    assert rank_accuracy(-target, target) == 0
    assert rank_accuracy(torch.zeros(1, 4), target) == 0.5
    assert rank_accuracy(torch.tensor([[0.0, 1.0, 3.0, 2.0]]), target) == pytest.approx(5 / 6)
    assert rank_accuracy(target, torch.ones(1, 4)) == 0  # no pair to rank
    assert abs(rank_accuracy(torch.randn(200, 30), torch.randn(200, 30)) - 0.5) < 0.02


def test_means_over_windows_and_epoch():
    meter = MeanMeter()
    assert meter.mean(alone) == {}
    for value in (1.0, 3.0):
        meter.update(loss=torch.tensor(value), norm=torch.tensor(2 * value))
    assert meter.window(alone) == {"loss": 2.0, "norm": 4.0}
    meter.update(loss=torch.tensor(8.0))
    assert meter.window(alone) == {"loss": 8.0}  # norm was not seen again
    assert meter.mean(alone) == {"loss": 4.0, "norm": 4.0}


def test_reduction_weighs_observations():
    meter = MeanMeter()
    meter.update(loss=torch.tensor(1.0))

    def with_another_rank(tensor):
        return tensor + torch.tensor([[5.0 + 6.0, 2.0]])  # sum, count

    assert meter.mean(with_another_rank) == {"loss": 4.0}


def test_a_saved_meter_resumes():
    meter = MeanMeter()
    meter.update(loss=torch.tensor(1.0))
    other = MeanMeter()
    other.load_state_dict(meter.state_dict(alone), torch.device("cpu"))
    other.update(loss=torch.tensor(2.0))
    assert other.mean(alone) == {"loss": 1.5}


def test_non_finite_values_do_not_hide_the_others():
    meter = MeanMeter()
    for value in (1.0, float("nan"), float("inf"), 3.0):
        meter.update(loss=torch.tensor(value))
    assert meter.window(alone) == meter.mean(alone) == {"loss": 2.0}


def test_a_meter_saved_by_several_ranks_is_restored_on_one():
    """Two ranks with different values: one rank resumes with the totals of both."""
    ranks = [MeanMeter(), MeanMeter()]
    for value, meter in enumerate(ranks):
        meter.update(loss=torch.tensor(float(value)))
    total = sum(torch.stack(list(meter._totals.values())) for meter in ranks)
    state = ranks[0].state_dict(lambda tensor: total)
    others = [MeanMeter(), MeanMeter()]
    for rank, meter in enumerate(others):
        meter.load_state_dict(state, torch.device("cpu"), holder=rank == 0)
    both = sum(torch.stack(list(meter._totals.values())) for meter in others)
    assert torch.equal(both, total)
