"""Where images come from: a folder, a folder with list files, tar archives read in place, or Shapes.

What a wrong path or layout raises names what was looked for, what was found, and the fix.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from util.data import shapes
from util.data.archives import ARCHIVE_SUFFIXES, compressed_archive, decompressed, from_archive
from util.data.files import ImageFiles, class_folders, contents, from_list_file, from_tree, is_image, pack

log = logging.getLogger("hpm")


class Source(Protocol):
    """Decoded images by index. `labels` is (N,) int64, `classes` their names (empty where only numbers are known)."""

    labels: np.ndarray
    classes: list[str]

    def __len__(self) -> int: ...

    def load(self, index: int) -> np.ndarray: ...

    def name(self, index: int) -> str: ...


class ShapesSource:
    """The built-in images (util/data/shapes.py), drawn when asked for."""

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
    """List the images of a split; of `split` None, every image under the path (for pictures and benchmarks).

    Args:
        data_path: a folder with `SPLIT/CLASS/*.jpg`, or with `SPLIT.txt` (official list files), or with `SPLIT.tar`;
            or a .tar archive that holds `SPLIT/CLASS/*.jpg`. `.tar.gz` is decompressed once, into the cache.
        cache_dir: where to; None for the user's cache folder.

    Raises:
        ValueError: there are no such images.
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
    split: str,
    *,
    shapes_count: int | None = None,
    cache_dir: str | None = None,
    share: Callable[[Callable[[], ImageFiles]], ImageFiles] = lambda find: find(),
) -> Source:
    """The images of a split ("train" or "val"); `data_path` None draws Shapes.

    Args:
        share: runs the listing on one process and gives the result to all (util/run/distributed.from_rank_zero).

    Raises:
        ValueError: there are no such images.
    """
    if data_path is None:
        return ShapesSource(split, shapes_count)
    packed = compressed_archive(Path(data_path), split)
    if packed is not None:  # each node has its own cache; and nobody may wait for this in a collective, it takes long
        plain = decompressed(packed, cache_dir)
    files = share(lambda: find_images(data_path, split, cache_dir))
    return files if packed is None else replace(files, root=str(plain))


def count_classes(train: Source, val: Source, nb_classes: int | None) -> int:
    """How many outputs a classifier needs: as many as the data have classes, or `nb_classes`.

    Raises:
        ValueError: training and validation have different classes, or more than `nb_classes`.
    """
    if train.classes and val.classes and train.classes != val.classes:
        only = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(
            f"train has {len(train.classes)} classes, val {len(val.classes)}, and their labels would not agree: "
            f"{', '.join(only[:6])} {'is' if len(only) == 1 else 'are'} in one of them alone"
        )
    needed = int(max(train.labels.max(), val.labels.max())) + 1
    if nb_classes is not None and nb_classes < needed:
        raise ValueError(f"--nb_classes {nb_classes}, but the data have {needed} classes: leave the option out")
    if nb_classes is not None and nb_classes > needed:
        log.info("--nb_classes %d: %d outputs have no images in the data", nb_classes, nb_classes - needed)
    return nb_classes or needed
