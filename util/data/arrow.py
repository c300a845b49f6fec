"""Hugging Face data sets: a folder written by `save_to_disk`, or parquet files, with the columns `image` and `label`.

The `datasets` library reads them; the images' bytes are decoded here, like those of files.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from util.data.decode import MAX_PIXELS, UnreadableImage, ValueRange, decode_rgb
from util.data.files import printable
from util.data.listing import LARGEST_LABEL, class_names
from util.data.listing_cache import cache_folder

log = logging.getLogger("hpm")


def is_saved(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote a folder."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def is_arrow(place: Sequence[Path]) -> bool:
    return place[0].suffix == ".parquet" or is_saved(place[0])


@dataclass(frozen=True)
class ArrowImages:
    """Images of a split in Arrow files, which are mapped into memory.

    Attributes:
        root: the folder, or the first of the parquet files.
        dataset: `datasets.Dataset` with the one column `image`, whose rows are bytes, or a struct of bytes and path.
        labels, classes, numbered, value_range, max_image_pixels: as in `ImageFiles`.
    """

    root: str
    dataset: Any
    labels: np.ndarray
    classes: list[str]
    numbered: bool = False
    value_range: ValueRange | None = None
    max_image_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{printable(self.root)} row {index}"

    def read(self, index: int) -> bytes:
        """Bytes of an image.

        Raises:
            UnreadableImage: the row holds none; the path of a file does not count, since it can point anywhere.
        """
        row = self.dataset[int(index)]["image"]
        data = row["bytes"] if isinstance(row, dict) else row
        if data is None:
            raise UnreadableImage("the row does not hold the bytes of an image", "missing")
        return data

    def load(self, index: int) -> np.ndarray:
        return decode_rgb(self.read(index), self.value_range, self.max_image_pixels)


def open_arrow(place: Sequence[Path], cache_dir: str | None, labels_needed: bool) -> ArrowImages:
    """Open a data set. Parquet files are converted once into the cache folder, by the first process of each node.

    Without `labels_needed`, there are no classes, and labels are numbers of groups.

    Raises:
        ValueError: the library is missing, or the files cannot be read or lack a column.
    """
    root = printable(str(place[0]))
    dataset = _open(place, cache_dir).with_format(None)
    columns = dataset.column_names
    if "image" not in columns:
        raise ValueError(f"{root} has the columns {', '.join(columns)}, expected `image`: rename_column of `datasets`")
    if labels_needed and "label" not in columns:
        raise ValueError(f"{root} has the columns {', '.join(columns)}, expected `image` and `label`")
    images = _undecoded(dataset, root)
    labels, classes, numbered = np.zeros(len(dataset), dtype=np.int64), list[str](), False
    if "label" in columns:
        labels, classes, numbered = _read_labels(dataset, root, labels_needed)
    if not len(dataset):
        raise ValueError(f"{root} contains no images")
    if not labels_needed:
        classes, numbered = [], False
    return ArrowImages(str(place[0]), images, labels, classes, numbered)


def _open(place: Sequence[Path], cache_dir: str | None) -> Any:
    try:
        from datasets import Dataset, disable_progress_bars, load_from_disk
    except ImportError as error:
        raise ValueError(f"{place[0]} is a Hugging Face data set: pip install datasets to read it ({error})") from error
    disable_progress_bars()
    try:
        if place[0].suffix != ".parquet":
            return load_from_disk(str(place[0]))
        cache = cache_folder(cache_dir) / "parquet"
        log.info("parquet   converted once into %s", printable(str(cache)))
        return Dataset.from_parquet([str(file) for file in place], cache_dir=str(cache))
    except Exception as error:  # the library raises errors of pyarrow, fsspec and its own
        text = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{place[0]} cannot be read by `datasets` ({type(error).__name__}: {text})") from error


def _undecoded(dataset: Any, root: str) -> Any:
    """The column `image`, as bytes."""
    from datasets import Image, Value

    images, feature = dataset.select_columns(["image"]), dataset.features["image"]
    if isinstance(feature, Image):
        return images.cast_column("image", Image(decode=False))
    kinds = (Value("binary"), Value("large_binary"))
    if feature in kinds or (isinstance(feature, dict) and feature.get("bytes") in kinds):
        return images
    raise ValueError(f"{root}: column `image` is {feature}, expected an Image, or the bytes of an image file")


def _read_labels(dataset: Any, root: str, labels_needed: bool) -> tuple[np.ndarray, list[str], bool]:
    """The column `label`: (N,) int64, the names of the classes, and whether there are only numbers."""
    from datasets import ClassLabel

    feature, column = dataset.features["label"], dataset["label"][:]
    missing = [row for row, label in enumerate(column) if label is None or label == -1]
    if missing and labels_needed:
        raise ValueError(
            f"{root}: {len(missing):,} of {len(column):,} rows have no label, the first is {missing[0]} "
            f"({column[missing[0]]}); only pre-training needs none"
        )
    if all(isinstance(label, str) or label is None for label in column):
        names = sorted({label for label in column if label is not None})
        number = {name: label for label, name in enumerate(names)}
        return np.array([number.get(label, -1) for label in column], dtype=np.int64), class_names(names), False
    if not all(label is None or (isinstance(label, int) and -1 <= label <= LARGEST_LABEL) for label in column):
        if labels_needed:
            raise ValueError(f"{root}: column `label` is {feature}, expected ClassLabel, integers from 0, or strings")
        return np.zeros(len(column), dtype=np.int64), [], False
    labels = np.array([-1 if label is None else label for label in column], dtype=np.int64)
    if isinstance(feature, ClassLabel):
        return labels, class_names(feature.names), False
    return labels, [], True
