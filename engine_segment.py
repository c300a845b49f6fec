"""Exact evaluation of segmentation models. Training is engine_finetune.train_one_epoch.

Shapes: B micro-batch, S crop, H, W original image, h, w image at its inference size, K classes.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from models_segment import LinearSegmenter, UPerNet, resize, slide
from util.data.datasets import Sample
from util.miou import ConfusionMatrix, Scores
from util.run.amp import Amp
from util.run.distributed import all_reduce_sum, from_rank_zero


def blank_padding(images: Tensor, sizes: Tensor) -> Tensor:
    """Zero right of and below the image, after normalisation: (B, C, S, S) with (B, 2) heights and widths."""
    rows = torch.arange(images.shape[2], device=images.device) < sizes[:, :1]  # (B, S)
    columns = torch.arange(images.shape[3], device=images.device) < sizes[:, 1:]
    return images * (rows[:, None, :, None] & columns[:, None, None, :])


@torch.no_grad()
def evaluate(
    model: UPerNet | LinearSegmenter,
    batches: Iterable[Sample],
    amp: Amp,
    to_model_input: Callable[[Tensor], Tensor],
    *,
    stride: int,
    ignore_index: int,
    on_prediction: Callable[[int, Tensor], None] | None = None,
) -> Scores:
    """Scores over the images of all ranks at their original sizes, by sliding windows.

    Args:
        batches: of one image (1, 3, h, w), with its label (1, H, W).
        on_prediction: gets the index of each image of this rank and its predicted classes (H, W).
    """
    model.eval()
    share_statistics(model)
    matrix = ConfusionMatrix(model.num_classes, ignore_index, amp.device)

    def predict(crops: Tensor) -> Tensor:
        with amp.autocast():
            return model(crops)[0]

    for (images, labels), _, index, *_ in batches:
        logits = slide(predict, to_model_input(images)[0], model.crop, stride, model.num_classes)  # (K, h, w)
        prediction = largest_class(logits, labels.shape[1:])  # (H, W)
        matrix.update(prediction, labels[0].to(amp.device))
        if on_prediction is not None:
            on_prediction(int(index), prediction)
    return matrix.scores(all_reduce_sum)


def largest_class(logits: Tensor, size: Sequence[int], most: int = 2**28) -> Tensor:
    """The class of highest score at each pixel of the resized logits: (K, h, w) -> (H, W). Takes as many classes at a
    time as have `most` values."""
    step = max(1, most // (size[0] * size[1]))
    best, classes = resize(logits[None, :step], size)[0].max(dim=0)  # argmax is slow on the CPU
    for first in range(step, len(logits), step):
        values, found = resize(logits[None, first : first + step], size)[0].max(dim=0)
        classes = torch.where(values > best, found + first, classes)
        best = torch.maximum(values, best)
    return classes


def share_statistics(model: nn.Module) -> None:
    """Running means and variances of rank 0 on all ranks. On CUDA they are equal; the CPU has no SyncBatchNorm."""
    statistics = {name: buffer for name, buffer in model.named_buffers() if "running_" in name}
    shared = from_rank_zero(lambda: {name: buffer.cpu() for name, buffer in statistics.items()})
    for name, buffer in statistics.items():
        buffer.copy_(shared[name])
