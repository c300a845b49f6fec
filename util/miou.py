"""Mean intersection over union, exact over any number of ranks and images of any size.

Shapes: H, W image, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Scores of a whole set, each in percent.

    Attributes:
        iou, accuracy: (K,) per class, over all pixels of the set: intersection / union, and the share of the class's
            pixels that is found; NaN for a class that no label has.
        pixels: (K,) labelled pixels.
        miou: mean over the classes that occur; NaN without any.
        pixel_accuracy: share of all labelled pixels.
    """

    iou: Tensor
    accuracy: Tensor
    pixels: Tensor
    miou: float
    pixel_accuracy: float

    @property
    def absent(self) -> list[int]:
        """Classes that occur in no label, and so not in the mean."""
        return (self.pixels == 0).nonzero().flatten().tolist()


class ConfusionMatrix:
    """Counts of pixels by (label, prediction), as int64.

    Args:
        ignore_index: label of the pixels that do not count.
    """

    def __init__(self, num_classes: int, ignore_index: int, device: torch.device) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.long, device=device)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add the pixels of one or several images: (..., H, W) and (..., H, W)."""
        valid = label != self.ignore_index
        index = label[valid].long() * self.num_classes + prediction[valid].long()
        self.counts += torch.bincount(index, minlength=self.num_classes**2).view_as(self.counts)

    def scores(self, reduce: Callable[[Tensor], Tensor]) -> Scores:
        """Scores of all that was added, over all ranks. `reduce` sums a tensor over the ranks, in place."""
        counts = reduce(self.counts.clone()).double().cpu()
        pixels, predicted, hits = counts.sum(1), counts.sum(0), counts.diag()
        occurs = pixels > 0
        iou = torch.where(occurs, 100 * hits / (pixels + predicted - hits), torch.nan)
        return Scores(
            iou=iou,
            accuracy=100 * hits / pixels,
            pixels=pixels.long(),
            miou=iou[occurs].mean().item(),
            pixel_accuracy=(100 * hits.sum() / pixels.sum()).item(),
        )


def iou_table(scores: Scores, names: Sequence[str]) -> str:
    """Tab-separated lines, one per class: index, name, labelled pixels, IoU and accuracy in percent, or "absent"."""
    lines = ["index\tname\tpixels\tiou\taccuracy"]
    for index, name in enumerate(names):
        pixels = int(scores.pixels[index])
        values = f"{scores.iou[index]:.4f}\t{scores.accuracy[index]:.4f}" if pixels else "absent\tabsent"
        lines.append(f"{index}\t{name}\t{pixels}\t{values}")
    return "\n".join(lines) + "\n"
