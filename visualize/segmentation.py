"""What an evaluation of segmentation leaves: scores in the log and in iou.tsv, predictions, pictures with their labels.

Shapes: H, W image, K classes.
"""

import colorsys
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from util.data.segmentation import SegmentationSource
from util.miou import Scores, iou_table
from util.run.distributed import from_rank_zero
from util.run.folder import write_text

log = logging.getLogger("hpm")

SIDE, GAP, LINE = 320, 10, 20  # of a picture, between pictures, of text
INK, IGNORED = (20, 20, 20), (255, 255, 255)


class Report:
    """Reports evaluations of one model on one set of images.

    Args:
        folder: where iou.tsv and preview/ go.
        names: (K,) of the classes.
        protocol: how the scores come about, in one line; stands next to every mIoU.
        predictions: folder for predictions as PNG, in the labels of the data set; None for none.
        previews: number of images to draw.
    """

    def __init__(
        self,
        folder: Path,
        source: SegmentationSource,
        names: Sequence[str],
        protocol: str,
        predictions: str | None,
        previews: int,
    ) -> None:
        self.folder, self.source, self.names, self.protocol = folder, source, names, protocol
        self.predictions = Path(predictions) if predictions else None
        self.previews = previews

    def save(self, index: int, prediction: Tensor) -> None:
        """Save the predicted classes (H, W) of an image as a PNG and as a picture, where requested."""
        classes = prediction.to(torch.uint8).cpu().numpy()
        name = f"{self.source.stems[index]}.png"
        if self.predictions is not None:
            path = self.predictions / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(self.source.format.to_labels(classes)).save(path)
        if index < self.previews:
            image, label = self.source.load(index)
            path = self.folder / "preview" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(image, label, classes, self.names, self.source.format.ignore_index).save(path)

    def scores(self, scores: Scores, title: str = "") -> dict[str, float | str]:
        """Log scores and write iou.tsv. Returns what belongs in log.jsonl."""
        line = f"mIoU {scores.miou:.2f}  pixel_accuracy {scores.pixel_accuracy:.2f}  ({self.protocol})"
        log.info("%s%s", title, line)
        if scores.absent:
            absent = ", ".join(self.names[index].split(",")[0] for index in scores.absent)
            log.warning("%d classes occur in no label and are excluded from the mean: %s", len(scores.absent), absent)
        text = f"# {title}{line}\n{iou_table(scores, self.names)}"

        def write() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "iou.tsv", text)

        from_rank_zero(write)
        return {"test_mIoU": scores.miou, "test_pixel_accuracy": scores.pixel_accuracy, "protocol": self.protocol}


def palette(num_classes: int) -> np.ndarray:
    """(K, 3) uint8: hues a golden section apart, in three lightnesses."""
    colours = []
    for index in range(num_classes):
        hue, lightness = (0.08 + index * 0.618034) % 1, (0.5, 0.32, 0.7)[index % 3]
        colours.append(colorsys.hls_to_rgb(hue, lightness, 0.75))
    return (np.array(colours) * 255).astype(np.uint8)


def draw(
    image: np.ndarray, label: np.ndarray, prediction: np.ndarray, names: Sequence[str], ignore_index: int
) -> Image.Image:
    """Image, label and prediction side by side, with the names of the classes in them; ignored pixels are white."""
    lookup = np.full((256, 3), IGNORED, dtype=np.uint8)
    lookup[: len(names)] = palette(len(names))
    lookup[ignore_index] = IGNORED
    scale = SIDE / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    pictures = [Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)]
    pictures += [
        Image.fromarray(lookup[classes]).resize(size, Image.Resampling.NEAREST) for classes in (label, prediction)
    ]

    valid = label != ignore_index
    shown = []  # index and shares of the classes that are more than specks, in label and prediction
    for index in range(len(names)):
        shares = [100 * float(np.mean(classes[valid] == index)) for classes in (label, prediction)]
        if max(shares) >= 0.5:
            shown.append((index, shares[0], shares[1]))
    columns, width = 3, 3 * size[0] + 4 * GAP
    rows = -(-len(shown) // columns)
    canvas = Image.new("RGB", (width, LINE + size[1] + 3 * GAP + rows * LINE), (255, 255, 255))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for i, (title, picture) in enumerate(zip(("image", "label", "prediction"), pictures, strict=True)):
        left = GAP + i * (size[0] + GAP)
        pen.text((left, GAP // 2), title, INK, font)
        canvas.paste(picture, (left, LINE + GAP // 2))
        pen.rectangle(
            (left, LINE + GAP // 2, left + size[0] - 1, LINE + GAP // 2 + size[1] - 1), outline=(180, 180, 180)
        )
    for i, (index, in_label, predicted) in enumerate(shown):
        left = GAP + i % columns * ((width - GAP) // columns)
        top = LINE + size[1] + 2 * GAP + i // columns * LINE
        pen.rectangle((left, top, left + 14, top + 14), fill=tuple(lookup[index].tolist()), outline=INK)
        text = f"{names[index].split(',')[0]}: label {in_label:.0f} %, predicted {predicted:.0f} %"
        pen.text((left + 20, top), text, INK, font)
    return canvas
