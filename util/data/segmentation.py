"""Images with a class for each pixel, in ADE20K's layout (ADEChallengeData2016).

    images/{training,validation}/NAME.jpg   annotations/{training,validation}/NAME.png   objectInfo150.txt

A label map is an 8-bit PNG of one channel, or one with a palette, whose indices count. With `reduce_zero_label`
(ADE20K's convention) label 0 means no class and class k, counted from 0, is label k + 1. Shapes: N images, H, W image.
"""

import csv
import io
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from util.data.decode import UnreadableImage, own_limits, unreadable_images
from util.data.files import ImageFiles

SPLITS = {"train": "training", "val": "validation"}
LAYOUT = "images/{0}/NAME.jpg and annotations/{0}/NAME.png"
FULL_ADE20K = "RGB masks are those of the full ADE20K; the benchmark is ADEChallengeData2016"
_PNG_DEPTH = 24  # where the header has the bits of a channel


class LabelledImage(NamedTuple):
    """image (H, W, 3) uint8, label (H, W) uint8: classes from 0, or the ignored index."""

    image: np.ndarray
    label: np.ndarray


@dataclass(frozen=True)
class LabelFormat:
    """How to interpret the values of a label map.

    Attributes:
        reduce_zero: label 0 is ignored and the others are 1 above their class.
        ignore_index: the ignored value, after the shift.
    """

    reduce_zero: bool = True
    ignore_index: int = 255

    @property
    def ignored_label(self) -> int:
        """The ignored value in the files."""
        return 0 if self.reduce_zero else self.ignore_index

    def to_classes(self, label: np.ndarray) -> np.ndarray:
        if not self.reduce_zero:
            return label
        return np.where(label == 0, self.ignore_index, label - 1).astype(np.uint8)

    def to_labels(self, classes: np.ndarray) -> np.ndarray:
        """Predicted classes in the convention of the data set."""
        return (classes + self.reduce_zero).astype(np.uint8)


@dataclass(frozen=True)
class SegmentationSource:
    """The images of a split with their label maps: a source of `LabelledImage`.

    Attributes:
        files: every file of the data set.
        stems: (N,) names of the images below the folder of the split, without suffix.
        images, annotations: (N,) positions in `files`.
    """

    files: ImageFiles
    stems: list[str]
    images: np.ndarray
    annotations: np.ndarray
    format: LabelFormat

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> np.ndarray:
        """Images have no class labels."""
        return np.zeros(len(self), dtype=np.int64)

    @property
    def classes(self) -> list[str]:
        return []

    def name(self, index: int) -> str:
        return self.files.name(self.images[index])

    def read(self, index: int) -> bytes:
        return self.files.read(self.images[index])

    def load(self, index: int) -> LabelledImage:
        label, _ = read_label(self.files, self.annotations[index])
        return LabelledImage(self.files.load(self.images[index]), self.format.to_classes(label))


def find_pairs(files: ImageFiles, split: str, label_format: LabelFormat) -> SegmentationSource:
    """The pairs of a split ("train" or "val") among the files of a data set.

    Raises:
        ValueError: no such files, or images and label maps that do not pair.
    """
    found: dict[str, dict[str, int]] = {"images": {}, "annotations": {}}
    pattern = re.compile(rf"(?:.*/)?(images|annotations)/{SPLITS[split]}/(.+)\.\w+")
    for position, name in enumerate(files.names):
        if match := pattern.fullmatch(os.fsdecode(name)):
            kind, stem = match.groups()
            if ".." in Path(stem).parts:  # predictions are written under this name
                raise ValueError(f"{files.name(position)} leads out of its folder: rename it")
            if stem in found[kind]:
                raise ValueError(f"{files.name(position)} and {files.name(found[kind][stem])} have the same name")
            found[kind][stem] = position
    images, annotations = found.values()
    layout = LAYOUT.format(SPLITS[split])
    if not images and not annotations:
        raise ValueError(f"{files.root}: looked for {layout}, found {len(files):,} other images")
    for what, kind, of in (("images", "label map", images), ("label maps", "image", annotations)):
        if alone := of.keys() - (annotations if of is images else images):
            raise ValueError(
                f"{len(alone):,} of {len(of):,} {what} have no {kind}, the first is {files.name(of[min(alone)])} "
                f"({layout} must pair)"
            )
    stems = sorted(images)
    return SegmentationSource(
        files,
        stems,
        np.array([images[stem] for stem in stems], dtype=np.int64),
        np.array([annotations[stem] for stem in stems], dtype=np.int64),
        label_format,
    )


def read_label(files: ImageFiles, position: int) -> tuple[np.ndarray, np.ndarray]:
    """The values of a label map (H, W) uint8, indices if it has a palette; and the palette (K, 3) uint8, else (0, 3).

    Raises:
        ValueError: not an 8-bit PNG of one channel.
    """
    data = files.read(position)
    try:
        with own_limits(), unreadable_images(), Image.open(io.BytesIO(data)) as image:
            is_png, mode = image.format == "PNG", image.mode
            fewer_bits = is_png and mode == "L" and data[_PNG_DEPTH] != 8  # Pillow scales those to 0..255
            if is_png and mode in ("L", "P") and not fewer_bits:
                palette = np.array(image.getpalette() or [], dtype=np.uint8).reshape(-1, 3)
                return np.array(image), palette
            mode += f" with {data[_PNG_DEPTH]} bits" if fewer_bits else ""
            mode += "" if is_png else f" in a {image.format}, where values can change"
    except UnreadableImage as error:
        raise ValueError(f"{files.name(position)} cannot be used: {error}") from error
    raise ValueError(
        f"{files.name(position)} is of mode {mode}, expected L or P in a PNG: 8-bit class indices in one channel "
        f"({FULL_ADE20K})"
    )


def class_names(files: ImageFiles, form: LabelFormat) -> list[str]:
    """Names from objectInfo*.txt of the data set, by class; empty without such a file.

    The file is tab-separated with a header that has a column "name"; the first column is the label. A label that is
    not in it is a class without a name.

    Raises:
        ValueError: the file is not UTF-8 or has no such column, or a row without label or name.
    """
    data, path = _object_info(files)
    if data is None:
        return []
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {data[error.start]:#x} at {error.start}"
        raise ValueError(f"{path} is not UTF-8 ({where}): save it as UTF-8") from error
    rows = list(csv.reader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    if "name" not in header:
        raise ValueError(f"{path}: expected a tab-separated table with a column 'name', found {header[:6]}")
    column = header.index("name")
    rows = [row for row in rows[1:] if any(row)]
    for row in rows:
        if len(row) <= column or not row[0].strip().isdecimal():
            raise ValueError(f"{path}: expected a label in the first column and a name, found {row[:6]}")
    names = {int(row[0]): row[column].strip() for row in rows}
    if not form.reduce_zero:
        names.pop(form.ignore_index, None)
    return [names.get(label, f"label {label}") for label in range(int(form.reduce_zero), max(names, default=-1) + 1)]


def _object_info(files: ImageFiles) -> tuple[bytes | None, str]:
    if files.extents is None:
        for path in sorted([*Path(files.root).glob("objectInfo*.txt"), *Path(files.root).glob("*/objectInfo*.txt")]):
            return path.read_bytes(), str(path)
        return None, ""
    with tarfile.open(files.root, "r:") as tar:
        for member in tar:
            if re.fullmatch(r"objectInfo.*\.txt", os.path.basename(member.name)) and member.isreg():
                with open(files.root, "rb") as file:
                    file.seek(member.offset_data)
                    return file.read(member.size), f"{files.root}: {member.name}"
    return None, ""
