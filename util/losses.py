"""Losses of the loss predictor and of feature targets (HPM), always in float32.

Shapes: B batch, M masked patches, D prediction width.
"""

import torch
import torch.nn.functional as F

# Beyond these values, differences or squares overflow float32. Predictions of a network stay far below.
_RANK_LIMIT = 1e30
_VALUE_LIMIT = 1e15


def relative_loss(loss_pred: torch.Tensor, loss_target: torch.Tensor) -> torch.Tensor:
    """HPM's relative loss: predicted and true loss of the masked patches, (B, M), (B, M) -> scalar.

    Binary cross-entropy of "patch i is harder than patch j": the mean of -log sigmoid(p_i - p_j) over the pairs of
    masked patches of an image with t_i > t_j, where p is predicted and t true. ln 2 for a constant prediction, 0 if all
    targets tie. The softplus form keeps the gradient that the official log(sigmoid + 1e-6) loses on badly ranked pairs.
    """
    pred = loss_pred.float().clamp(-_RANK_LIMIT, _RANK_LIMIT)
    target = loss_target.detach().float()
    harder = target[:, :, None] > target[:, None, :]  # (B, M, M), each unequal pair in one of its two orders
    pair_loss = F.softplus(pred[:, None, :] - pred[:, :, None])  # -log sigmoid(pred_i - pred_j)
    return torch.where(harder, pair_loss, 0.0).sum() / harder.sum().clamp(min=1)


def absolute_loss(loss_pred: torch.Tensor, loss_target: torch.Tensor) -> torch.Tensor:
    """HPM's absolute loss: predicted and true loss of the masked patches, (B, M), (B, M) -> scalar.

    Mean squared error to targets standardised within each image. As in the official code, the variance is unbiased and
    1e-6 is added to it.
    """
    pred = loss_pred.float().clamp(-_VALUE_LIMIT, _VALUE_LIMIT)
    target = loss_target.detach().float().clamp(-_VALUE_LIMIT, _VALUE_LIMIT)
    correction = min(1, target.shape[1] - 1)  # one patch has no unbiased variance
    variance, mean = torch.var_mean(target, dim=1, correction=correction, keepdim=True)
    return F.mse_loss(pred, (target - mean) / (variance + 1e-6).sqrt())


# Objectives of the loss predictor, by their name in --predictor_loss: float32 predicted and true loss (B, M) -> scalar.
PREDICTOR_LOSSES = {
    "relative": relative_loss,
    "absolute": absolute_loss,
}


def feature_loss(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """2 - 2 cos between predicted and target features, per patch: (B, M, D), (B, M, D) -> (B, M).

    Computed as the squared distance of the normalised vectors (official code), which is exact near zero.
    """
    pred = F.normalize(pred.float(), dim=-1, eps=1e-4)  # keeps the gradient at zero within fp16
    target = F.normalize(target.detach().float(), dim=-1)
    return (pred - target).square().sum(dim=-1)
