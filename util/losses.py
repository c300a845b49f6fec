"""Losses of the loss predictor and of feature targets (HPM, sections 3.2 and 4), always in float32.

Shapes: B batch, M masked patches, D prediction width.
"""

import torch
import torch.nn.functional as F

# Beyond these, differences or squares would overflow float32; nothing a network computes comes near them.
_RANK_LIMIT = 1e30
_VALUE_LIMIT = 1e15


def relative_loss(loss_pred: torch.Tensor, loss_target: torch.Tensor) -> torch.Tensor:
    """Rank the patches of an image: (B, M), (B, M) -> scalar, ln 2 for a predictor that knows nothing.

    Binary cross-entropy of "patch i is harder than patch j" over the pairs of an image whose targets differ, each pair
    once; the mean is over all such pairs of the batch. 0 where all targets tie. The softplus form has the gradient that
    the official log(sigmoid + 1e-6) loses on badly ordered pairs.
    """
    pred = loss_pred.float().clamp(-_RANK_LIMIT, _RANK_LIMIT)
    target = loss_target.detach().float()
    harder = target[:, :, None] > target[:, None, :]  # (B, M, M), each unequal pair in one of its two orders
    pair_loss = F.softplus(pred[:, None, :] - pred[:, :, None])  # -log sigmoid(pred_i - pred_j)
    return torch.where(harder, pair_loss, 0.0).sum() / harder.sum().clamp(min=1)


def absolute_loss(loss_pred: torch.Tensor, loss_target: torch.Tensor) -> torch.Tensor:
    """Mean squared error to the targets, standardised within each image: (B, M), (B, M) -> scalar.

    Unbiased variance, 1e-6 added to it, as in the official code.
    """
    pred = loss_pred.float().clamp(-_VALUE_LIMIT, _VALUE_LIMIT)
    target = loss_target.detach().float().clamp(-_VALUE_LIMIT, _VALUE_LIMIT)
    correction = min(1, target.shape[1] - 1)  # one patch has no unbiased variance
    variance, mean = torch.var_mean(target, dim=1, correction=correction, keepdim=True)
    return F.mse_loss(pred, (target - mean) / (variance + 1e-6).sqrt())


def feature_loss(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """2 - 2 cos between predicted and target features, per patch: (B, M, D), (B, M, D) -> (B, M).

    In the official form, the squared distance of the normalised vectors, which loses no digits near zero.
    """
    pred = F.normalize(pred.float(), dim=-1, eps=1e-4)  # so that the gradient at a vector of zeros fits fp16, too
    target = F.normalize(target.detach().float(), dim=-1)
    return (pred - target).square().sum(dim=-1)
