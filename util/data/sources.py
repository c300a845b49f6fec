"""Where images come from: a folder, a folder with list files, tar archives read in place, or Shapes.

Errors about a path or layout name what was looked for, what was found, and the fix.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from util.data import shapes
from util.data.archives import ARCHIVE_SUFFIXES, compressed_archive, decompressed, from_archive
from util.data.files import ImageFiles, class_folders, contents, from_list_file, from_tree, is_image, pack, summarize

log = logging.getLogger("hpm")


class Source(Protocol):
    """Images by index. `labels` is (N,) int64, `classes` their names (empty if labels are only numbers)."""

    labels: np.ndarray
    classes: list[str]

    def __len__(self) -> int: ...

    def load(self, index: int) -> np.ndarray: ...

    def name(self, index: int) -> str: ...


class ShapesSource:
    """The built-in data set (util/data/shapes.py), drawn on access."""

    classes = shapes.CLASSES

    def __init__(self, split: str, count: int | None = None, size: int = 64, seed: int = 0) -> None:
        self.split, self.size, self.seed = split, size, seed
        count = shapes.DEFAULT_SIZES[split] if count is None else count
        self.labels = np.arange(count, dtype=np.int64) % len(shapes.CLASSES)

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> np.ndarray:
        return shapes.draw_shape(self.seed, self.split, index, self.size)[0]

    def name(self, index: int) -> str:
        return f"Shapes {self.split} {index}"


# -------------------------------------------------------------------------------------------------------------- files


def find_images(data_path: str, split: str | None, cache_dir: str | None = None) -> ImageFiles:
    """List the images of a split; with `split` None, every image under the path (for pictures and benchmarks).

    Args:
        data_path: a folder with `SPLIT/CLASS/*.jpg`, or with `SPLIT.txt` (official list files), or with `SPLIT.tar`;
            or a .tar archive that holds `SPLIT/CLASS/*.jpg`. `.tar.gz` is decompressed once into the cache.
        cache_dir: default ~/.cache/hpm.

    Raises:
        ValueError: no such images.
    """
    path = Path(data_path)
    if not path.exists():
        raise ValueError(f"--data_path {data_path} does not exist: give a folder or a .tar archive of images")
    if path.is_file() and split is None and is_image(path.name):
        return ImageFiles(str(path.parent), pack([path.name]), np.zeros(1, dtype=np.int64), [])
    if path.is_file():
        return from_archive(path, split, cache_dir)
    if split is None:
        return from_tree(path, [path])
    list_file = path / f"{split}.txt"
    if list_file.is_file():
        return from_list_file(path / split, list_file)
    for suffix in ARCHIVE_SUFFIXES:
        if (path / f"{split}{suffix}").is_file():
            return from_archive(path / f"{split}{suffix}", split, cache_dir)
    if (path / split).is_dir():
        return from_tree(path / split, class_folders(path / split))
    raise ValueError(
        f"--data_path {data_path}: looked for {split}/CLASS/*.jpg, {split}.txt or {split}.tar, "
        f"found {contents(path)}; give the folder that holds {split}/"
    )


def build_source(
    data_path: str | None,
    split: str | None,
    *,
    shapes_count: int | None = None,
    cache_dir: str | None = None,
    on_rank_zero: Callable[[Callable[[], ImageFiles]], ImageFiles] = lambda find: find(),
) -> Source:
    """The images of a split ("train" or "val"), or all that are there; Shapes if `data_path` is None.

    Args:
        on_rank_zero: lists on rank 0 and broadcasts the result (util.run.distributed.from_rank_zero).

    Raises:
        ValueError: no such images.
    """
    if data_path is None:
        return ShapesSource(split, shapes_count)
    packed = compressed_archive(Path(data_path), split)
    if packed is not None:  # into the cache of every node, and outside any collective: it can outlast their timeout
        plain = decompressed(packed, cache_dir)
    files = on_rank_zero(lambda: find_images(data_path, split, cache_dir))
    return files if packed is None else replace(files, root=str(plain))


def count_classes(train: Source, val: Source, nb_classes: int | None) -> int:
    """Number of outputs of a classifier: `nb_classes`, or the number of classes in the data.

    Raises:
        ValueError: train and val have different classes, or more than `nb_classes`.
    """
    if train.classes and val.classes and train.classes != val.classes:
        only = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(
            f"train has {len(train.classes)} classes and val {len(val.classes)}, so their labels disagree; "
            f"classes in only one of them: {summarize(only)}"
        )
    needed = int(max(train.labels.max(), val.labels.max())) + 1
    if nb_classes is not None and nb_classes < needed:
        raise ValueError(f"--nb_classes {nb_classes}, but the data have {needed} classes: omit the option")
    if nb_classes is not None and nb_classes > needed:
        log.info("--nb_classes %d: %d outputs have no images in the data", nb_classes, nb_classes - needed)
    return nb_classes or needed


def build_splits(
    data_path: str | None,
    shapes_counts: tuple[int, int],
    cache_dir: str | None,
    on_rank_zero: Callable[[Callable[[], ImageFiles]], ImageFiles],
) -> tuple[Source, Source]:
    """`build_source` for train and val; `shapes_counts` are their numbers of images if `data_path` is None."""
    train, val = (
        build_source(data_path, split, shapes_count=count, cache_dir=cache_dir, on_rank_zero=on_rank_zero)
        for split, count in zip(("train", "val"), shapes_counts, strict=True)
    )
    return train, val
