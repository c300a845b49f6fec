import math

import pytest
import torch

from util.losses import absolute_loss, feature_loss, relative_loss


def test_relative_loss_of_one_pair():
    loss = relative_loss(torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, 0.1]]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-3.0)))
    loss = relative_loss(torch.tensor([[2.0, -1.0]]), torch.tensor([[0.1, 0.5]]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(3.0)))


def test_relative_loss_is_the_mean_over_unequal_pairs():
    pred, target = torch.randn(3, 7), torch.randint(0, 4, (3, 7)).float()
    terms = [
        math.log1p(math.exp(-(pred[b, i] - pred[b, j]).item()))
        for b in range(3)
        for i in range(7)
        for j in range(7)
        if target[b, i] > target[b, j]
    ]
    assert relative_loss(pred, target).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_relative_loss_keeps_its_gradient_on_badly_ordered_pairs():
    """The official log(sigmoid + 1e-6) has a gradient of -9e-8 here."""
    pred = torch.tensor([[-15.0, 15.0]], requires_grad=True)
    relative_loss(pred, torch.tensor([[1.0, 0.0]])).backward()
    assert torch.allclose(pred.grad, torch.tensor([[-1.0, 1.0]]))


@pytest.mark.parametrize("loss", [relative_loss, absolute_loss])
@pytest.mark.parametrize(
    ("pred", "target"),
    [
        ([[0.0, 0.0, 0.0]], [[1.0, 1.0, 1.0]]),
        ([[3e38, -3e38, 0.0]], [[1.0, 2.0, 3.0]]),
        ([[0.0, 1.0, 2.0]], [[3e38, -3e38, 1e-38]]),
        ([[1.0]], [[2.0]]),
    ],
)
def test_finite_for_any_finite_input(loss, pred, target):
    pred = torch.tensor(pred, requires_grad=True)
    value = loss(pred, torch.tensor(target))
    value.backward()
    assert value.isfinite()
    assert pred.grad.isfinite().all()


def test_relative_loss_is_zero_when_all_targets_tie():
    assert relative_loss(torch.randn(2, 5), torch.ones(2, 5)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_losses_compute_in_float32(dtype):
    pred, target = torch.randn(4, 6).to(dtype), torch.rand(4, 6).to(dtype)
    for loss in (relative_loss, absolute_loss):
        assert loss(pred, target).dtype == torch.float32
        assert torch.equal(loss(pred, target), loss(pred.float(), target.float()))


def test_the_target_gets_no_gradient():
    for loss in (relative_loss, absolute_loss):
        pred, target = torch.randn(2, 5, requires_grad=True), torch.rand(2, 5, requires_grad=True)
        loss(pred, target).backward()
        assert target.grad is None
        assert pred.grad.abs().sum() > 0


def test_absolute_loss_standardises_each_image():
    target = torch.rand(3, 50)
    perfect = (target - target.mean(1, keepdim=True)) / target.std(1, keepdim=True)
    assert absolute_loss(perfect, target) < 1e-3
    assert absolute_loss(perfect, target * 7 + 5) < 1e-3
    assert absolute_loss(-perfect, target) > 1


def test_feature_loss_is_two_minus_two_cosines():
    pred, target = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    cosine = torch.nn.functional.cosine_similarity(pred, target, dim=-1)
    torch.testing.assert_close(feature_loss(pred, target), 2 - 2 * cosine)
    assert feature_loss(pred, 3 * pred).max() < 1e-10
