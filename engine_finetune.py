"""Training of classifiers and segmentation models, exact evaluation of classifiers, and the extraction of features.

Shapes: B micro-batch, C channels, H, W image, E width, K classes, S heads trained side by side (1 in fine-tuning), N
images of a split.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.data.datasets import report_unreadable
from util.data.sources import Source
from util.knn import knn_correct
from util.run.amp import Amp
from util.run.distributed import all_reduce_sum
from util.run.logger import track
from util.run.loop import Loop


def train_one_epoch(
    model: nn.Module,
    criterion: Callable[[Any, Tensor], Tensor],
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    amp: Amp,
    loop: Loop,
    *,
    augment: Callable[[Any, Tensor], tuple[Tensor, Tensor]],
    clip_grad: float = 0.0,
) -> dict[str, float]:
    """Train to the end of the epoch, or to where the run stops. Arguments as in engine_pretrain, and:

    Args:
        criterion: what the model returns, such as logits (B, K) or (S, B, K), and targets -> scalar.
        augment: what a sample holds, such as uint8 images, and labels (B,) -> normalised images on the device, and
            targets: (B,) or (B, K); for segmentation (B, H, W).

    Returns:
        Means over the epoch and all ranks: loss, grad_norm.
    """
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for batches in loop.steps(loader):
        for images, labels, *_ in batches:
            images, targets = augment(images, labels)  # (B, C, H, W), (B, ...)
            with loop.no_sync(model):
                with amp.autocast():
                    outputs = model(images)
                loss = criterion(outputs, targets)
                amp.backward(loss / loop.accum_iter)
            loop.meter.update(loss=loss)
        loop.meter.update(grad_norm=amp.step(optimizer, parameters, clip_grad))
    return loop.meter.mean(all_reduce_sum)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable,
    amp: Amp,
    to_model_input: Callable[[Tensor], Tensor],
    heads: Sequence[str] = ("",),
    confusion: Tensor | None = None,
) -> dict[str, float]:
    """Accuracy over the images of all ranks, each counted once: acc1 and acc5 in percent, mean loss.

    Args:
        model: returns logits (B, K), or (S, B, K) for several heads.
        heads: a suffix for the names of each head's metrics.
        confusion: (S, K, K) int64 zeros, which become the number of images of all ranks by label and prediction.
    """
    model.eval()
    totals = torch.zeros(len(heads), 3, dtype=torch.double, device=amp.device)  # loss, top-1, top-5
    count = torch.zeros(1, dtype=torch.double, device=amp.device)
    for images, labels, *_ in batches:
        labels = labels.to(amp.device, non_blocking=True)
        with amp.autocast():
            logits = model(to_model_input(images))
        logits = logits.float().view(len(heads), len(labels), -1)  # (S, B, K)
        top = logits.topk(min(5, logits.shape[-1]), dim=-1).indices  # (S, B, 5)
        ranked = top == labels[None, :, None]
        for head in range(len(heads)):
            totals[head, 0] += F.cross_entropy(logits[head], labels, reduction="sum")
            totals[head, 1] += ranked[head, :, 0].sum()
            totals[head, 2] += ranked[head].sum()
            if confusion is not None:
                ones = torch.ones_like(labels)
                confusion[head].index_put_((labels, top[head, :, 0]), ones, accumulate=True)
        count += len(labels)
    totals, count = all_reduce_sum(totals), all_reduce_sum(count).item()
    if confusion is not None:
        all_reduce_sum(confusion)
    metrics: dict[str, float] = {}
    for name, (loss, top1, top5) in zip(heads, totals.tolist(), strict=True):
        metrics |= {f"acc1{name}": 100 * top1 / count, f"acc5{name}": 100 * top5 / count, f"loss{name}": loss / count}
    return metrics


@torch.no_grad()
def extract_features(
    encode: Callable[[Tensor], Tensor],
    batches: Iterable,
    amp: Amp,
    to_model_input: Callable[[Tensor], Tensor],
    count: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Features of a whole data set, on every rank: (count, width) float32 on the CPU, row i from image i.

    Args:
        encode: (B, C, H, W) -> (B, width).
        batches: of `util.data.datasets.Sample`, with images that are unreadable marked as such.
        count: number of images. Each rank fills the rows of its own, whose indices come with them, so that neither the
            order nor the number of ranks matters.

    Returns:
        The features, and why an image is unreadable (count,), as in `Sample`: -1 if it is not.
    """
    features, filled, reasons = torch.zeros(count, width), torch.zeros(count), torch.zeros(count)
    for images, _, index, _, reason in batches:
        with amp.autocast():
            features[index] = encode(to_model_input(images)).float().cpu()
        filled[index] += 1
        reasons[index] = reason.float() + 1
    for part in [*features.split(65536), filled, reasons]:  # other ranks' rows are zero here
        part.copy_(all_reduce_sum(part.to(amp.device)))
    assert (filled == 1).all(), "each image must occur once, on one rank"
    return features, reasons.long() - 1


def extract_splits(
    encode: Callable[[Tensor], Tensor],
    loaders: Mapping[str, Iterable],
    sources: Mapping[str, Source],
    amp: Amp,
    to_model_input: Callable[[Tensor], Tensor],
    width: int,
    world_size: int,
) -> dict[str, tuple[Tensor, Tensor]]:
    """`extract_features` and labels of several splits, by their names, without the images marked as unreadable."""
    splits = {}
    for split, source in sources.items():
        batches = track(loaders[split], -(-len(source) // world_size), f"{split} features")
        features, reasons = extract_features(encode, batches, amp, to_model_input, len(source), width)
        labels, readable = torch.from_numpy(source.labels), reasons < 0
        if not readable.all():
            report_unreadable(source, reasons, "ignored by k-NN")
            features, labels = features[readable], labels[readable]
        splits[split] = features, labels
    return splits


def knn_accuracy(
    features: dict[str, tuple[Tensor, Tensor]],
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
    device: torch.device,
    queries: slice,
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 accuracy in percent of the weighted k-NN vote, for each number of neighbours.

    Args:
        features: "train" and "test" -> L2-normalised features (N, E) and labels (N,), the same on every rank.
        queries: the test images of this rank.
    """
    (train, train_labels), (test, labels) = ([part.to(device) for part in features[key]] for key in ("train", "test"))
    correct = knn_correct(train, train_labels, test[queries], labels[queries], ks, temperature, num_classes)
    counts = torch.tensor([correct[k] for k in ks], dtype=torch.double, device=device)
    shares = (100 * all_reduce_sum(counts) / len(labels)).tolist()
    return {k: (top1, top5) for k, (top1, top5) in zip(ks, shares, strict=True)}
