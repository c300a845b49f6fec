"""Training and exact evaluation of classifiers, and the extraction of features.

Shapes: B batch of a micro-step, C channels, H, W image, E width, K classes, S heads that are trained side by side
(1 in fine-tuning).
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.metrics import MeanMeter
from util.run.amp import Precision
from util.run.distributed import all_reduce_sum, gradient_exchange
from util.run.logger import Progress


def train_one_epoch(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    *,
    augment: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    accum_iter: int,
    clip_grad: float,
    adjust_lr: Callable[[float], float],
    seed_micro_step: Callable[[int], None],
    epoch: int,
    first_step: int,
    steps: int,
    progress: Progress,
    meter: MeanMeter,
    after_step: Callable[[int], bool],
) -> dict[str, float]:
    """Train from optimizer step `first_step` to the end of the epoch. Arguments as in engine_pretrain, and:

    Args:
        criterion: float32 logits and targets -> scalar.
        augment: uint8 images and labels (B,) -> normalised images on the device, and targets (B,) or (B, K).

    Returns:
        Means over the epoch and all ranks: loss, grad_norm.
    """
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    incoming = progress.waiting(batches)
    for step in range(first_step, steps):
        lr = adjust_lr(epoch + step / steps)
        for micro in range(accum_iter):
            images, labels, *_ = next(incoming)
            seed_micro_step((epoch * steps + step) * accum_iter + micro)
            images, targets = augment(images, labels)  # (B, C, H, W), (B,) or (B, K)
            with gradient_exchange(model, now=micro == accum_iter - 1):
                with precision.autocast():
                    logits = model(images)  # (B, K) or (S, B, K)
                loss = criterion(logits.float(), targets)
                precision.backward(loss / accum_iter)
            meter.update(loss=loss)
        meter.update(grad_norm=precision.step(optimizer, parameters, clip_grad))
        if progress.advance():
            progress.report({**meter.window(all_reduce_sum), "lr": lr})
        if after_step(step + 1):
            break
    return meter.mean(all_reduce_sum)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable,
    precision: Precision,
    to_model_input: Callable[[Tensor], Tensor],
    heads: Sequence[str] = ("",),
) -> dict[str, float]:
    """Accuracy over all images of all ranks, each counted once: acc1 and acc5 in percent, mean loss.

    Args:
        model: gives logits (B, K), or (S, B, K) for several heads.
        heads: a suffix for the names of each head's figures.
    """
    model.eval()
    totals = torch.zeros(len(heads), 3, dtype=torch.double, device=precision.device)  # loss, right first, among five
    count = torch.zeros(1, dtype=torch.double, device=precision.device)
    for images, labels, *_ in batches:
        labels = labels.to(precision.device, non_blocking=True)
        with precision.autocast():
            logits = model(to_model_input(images))
        logits = logits.float().view(len(heads), len(labels), -1)  # (S, B, K)
        ranked = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels[None, :, None]
        for head in range(len(heads)):
            totals[head, 0] += F.cross_entropy(logits[head], labels, reduction="sum")
            totals[head, 1] += ranked[head, :, 0].sum()
            totals[head, 2] += ranked[head].sum()
        count += len(labels)
    *totals, count = all_reduce_sum(torch.cat([totals.flatten(), count])).tolist()
    figures = {}
    for head, (loss, top1, top5) in zip(heads, zip(*[iter(totals)] * 3, strict=True), strict=True):
        figures |= {f"acc1{head}": 100 * top1 / count, f"acc5{head}": 100 * top5 / count, f"loss{head}": loss / count}
    return figures


@torch.no_grad()
def extract_features(
    encode: Callable[[Tensor], Tensor],
    batches: Iterable,
    precision: Precision,
    to_model_input: Callable[[Tensor], Tensor],
    count: int,
    width: int,
) -> Tensor:
    """Features of a whole data set, on every rank: (count, width) float32 on the CPU, row i of image i.

    Each rank fills the rows of its images, whose index comes with them, so that order and ranks do not matter.
    """
    features, filled = torch.zeros(count, width), torch.zeros(count)
    for images, _, index, *_ in batches:
        with precision.autocast():
            features[index] = encode(to_model_input(images)).float().cpu()
        filled[index] += 1
    for part in [*features.split(65536), filled]:  # other ranks' rows are zero here
        part.copy_(all_reduce_sum(part.to(precision.device)))
    assert (filled == 1).all(), "each image must come once, on one rank"
    return features
