"""Where images come from: folders, list files, tar archives read in place, or Shapes.

Errors about a path or layout name what was looked for, what was found, and the fix.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from util.data import shapes
from util.data.archives import ARCHIVE_SUFFIXES, below_split, decompressed, list_archive
from util.data.classes import class_record, match_classes
from util.data.decode import MAX_PIXELS, UnreadableImage, ValueRange, default_range, read_values, to_8_bits
from util.data.files import ImageFiles, pack
from util.data.listing import contents, from_list_file, list_folder, overlaps, to_files, why_skipped

OnRankZero = Callable[[Callable[[], ImageFiles]], ImageFiles]


class Source(Protocol):
    """Images by index. `labels` is (N,) int64, `classes` their names (empty if labels are only numbers)."""

    @property
    def labels(self) -> np.ndarray: ...

    @property
    def classes(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def load(self, index: int) -> Any: ...

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


class SeveralFiles:
    """Several `ImageFiles` one after the other, without labels."""

    classes: list[str] = []  # noqa: RUF012

    def __init__(self, parts: list[ImageFiles]) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *(len(part) for part in parts)]).tolist()
        self.labels = np.zeros(self.starts[-1], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def _find(self, index: int) -> tuple[ImageFiles, int]:
        part = bisect_right(self.starts, index) - 1
        return self.parts[part], index - self.starts[part]

    def read(self, index: int) -> bytes:
        part, index = self._find(index)
        return part.read(index)

    def load(self, index: int) -> np.ndarray:
        part, index = self._find(index)
        return part.load(index)

    def name(self, index: int) -> str:
        part, index = self._find(index)
        return part.name(index)


def locate(path: Path, split: str) -> Path | None:
    """Where a folder has a split: SPLIT.txt (a list file), SPLIT/, SPLIT.tar, SPLIT.tar.gz or SPLIT.tgz.

    Raises:
        ValueError: it has several, of which one may be out of date.
    """
    found = [path / split] if (path / split).is_dir() else []
    found += [path / f"{split}{suffix}" for suffix in ARCHIVE_SUFFIXES if (path / f"{split}{suffix}").is_file()]
    if len(found) > 1:
        names = " and ".join(place.name for place in found)
        raise ValueError(f"{path} contains both {names}, which may differ: move one of them elsewhere")
    list_file = path / f"{split}.txt"
    if list_file.is_file():
        return list_file
    return found[0] if found else None


def compressed_archive(path: Path, split: str | None) -> Path | None:
    """The archive that must be decompressed to read a split, or None."""
    place = path if path.is_file() or split is None else locate(path, split)
    return place if place is not None and place.name.endswith((".tar.gz", ".tgz")) else None


def find_images(
    data_path: str, split: str | None, cache_dir: str | None = None, *, labels_needed: bool = True
) -> ImageFiles:
    """List the images of a split; with `split` None, every image under the path (for pictures and benchmarks).

    Args:
        data_path: a folder with `SPLIT/CLASS/*.jpg`, or with `SPLIT.txt` (official list files), or with `SPLIT.tar`;
            or a .tar archive that holds `SPLIT/CLASS/*.jpg`. `.tar.gz` is decompressed once into the cache.
        cache_dir: default ~/.cache/hpm.
        labels_needed: without it, images need no class folders; where there is no "train" split, every image under
            the path belongs to it.

    Raises:
        ValueError: no such images.
    """
    path = Path(data_path)
    if not path.exists():
        raise ValueError(f"--data_path {data_path} does not exist: give a folder or a .tar archive of images")
    labels_needed = labels_needed and split is not None
    place: Path | None = path
    if path.is_file() and not labels_needed and why_skipped(path.name) is None:
        return ImageFiles(str(path.parent), pack([path.name]), np.zeros(1, dtype=np.int64), [])
    if path.is_dir() and split is not None:
        place = locate(path, split)
        if place is None and split == "train" and not labels_needed:
            place = path
    if place is None:
        raise ValueError(
            f"--data_path {data_path}: looked for {split}/CLASS/*.jpg, {split}.txt or {split}.tar, "
            f"found {contents(path)}; give the folder that holds {split}/"
        )
    if place.is_dir():
        return to_files(list_folder(place), labels_needed, split or "")
    if place != path and place.suffix == ".txt":
        return from_list_file(path / place.stem, place, labels_needed)
    if not place.name.endswith(ARCHIVE_SUFFIXES):
        raise ValueError(f"{place} is neither a folder nor an archive ({', '.join(ARCHIVE_SUFFIXES)})")
    plain = place if place.name.endswith(".tar") else decompressed(place, cache_dir)
    listing = list_archive(plain)
    if split is not None:
        listing = below_split(listing, split, labels_needed)
    return to_files(listing, labels_needed, split or "")


def build_source(
    data_path: str | list[str] | None,
    split: str | None,
    *,
    labels_needed: bool = True,
    value_range: ValueRange | None = None,
    max_image_pixels: int = MAX_PIXELS,
    shapes_count: int | None = None,
    cache_dir: str | None = None,
    on_rank_zero: OnRankZero = lambda find: find(),
) -> Source:
    """The images of a split ("train" or "val"); Shapes if `data_path` is None.

    Args:
        data_path: a path, or without `labels_needed` also several, whose images follow each other.
        labels_needed: as in `find_images`; pre-training needs none.
        value_range, max_image_pixels: as in `decode_rgb`.
        on_rank_zero: lists on rank 0 and broadcasts the result (util.run.distributed.from_rank_zero).

    Raises:
        ValueError: no such images.
    """
    if value_range is not None and not value_range[0] < value_range[1]:
        raise ValueError(f"--value_range {value_range[0]:g} {value_range[1]:g}: LOW must be below HIGH")
    if data_path is None:
        return ShapesSource(split or "train", shapes_count)
    paths = [data_path] if isinstance(data_path, str) else data_path
    if labels_needed and len(paths) > 1:
        raise ValueError(f"--data_path: {len(paths)} paths were given, but labels can only come from one")
    parts: list[ImageFiles] = []
    for path in paths:
        packed = compressed_archive(Path(path), split)
        if packed is not None:  # into the cache of every node, and outside any collective: it can outlast their timeout
            plain = decompressed(packed, cache_dir)
        find = partial(find_images, path, split, cache_dir, labels_needed=labels_needed)
        files = replace(on_rank_zero(find), value_range=value_range, max_image_pixels=max_image_pixels)
        parts.append(files if packed is None else replace(files, root=str(plain)))
    for number, part in enumerate(parts):
        for other in parts[:number]:
            first, second = (files.path(0) if is_one_file(files) else files.root for files in (other, part))
            if overlaps(first, second):
                raise ValueError(f"--data_path: {first} and {second} overlap, so images would be used twice")
    return parts[0] if len(parts) == 1 else SeveralFiles(parts)


def is_one_file(files: ImageFiles) -> bool:
    return len(files) == 1 and files.extents is None


def build_splits(
    data_path: str | list[str] | None,
    shapes_counts: tuple[int, int],
    cache_dir: str | None,
    on_rank_zero: OnRankZero,
    *,
    value_range: ValueRange | None = None,
    max_image_pixels: int = MAX_PIXELS,
) -> tuple[Source, Source]:
    """`build_source` for train and val, where val has train's labels; `shapes_counts` are the sizes of Shapes.

    Raises:
        ValueError: no such images, or classes of val that train lacks.
    """
    train, val = (
        build_source(
            data_path,
            split,
            value_range=value_range,
            max_image_pixels=max_image_pixels,
            shapes_count=count,
            cache_dir=cache_dir,
            on_rank_zero=on_rank_zero,
        )
        for split, count in zip(("train", "val"), shapes_counts, strict=True)
    )
    return train, match_classes(class_record(train), val, "the train split")


def check_value_range(source: Source, value_range: ValueRange | None = None, samples: int = 8) -> str | None:
    """A warning if scaling to 8 bits would lose most of the 256 levels of some images, read as a sample; for default
    ranges also if they differ between the images, or if many values lie below 0."""
    if not isinstance(source, ImageFiles | SeveralFiles):
        return None
    images, levels = [], set()
    for index in np.unique(np.linspace(0, len(source) - 1, samples).astype(int)).tolist():
        try:
            values = read_values(source.read(index))
        except UnreadableImage:
            continue  # reported when it is used
        if values.dtype != np.uint8:
            images.append(values)
            levels |= set(np.unique(to_8_bits(values, value_range)).tolist())
    stored = np.concatenate([np.empty(0), *(values[np.isfinite(values)] for values in images)])
    if not len(stored):
        return None
    different, below = np.unique(stored), (stored < 0).mean()
    ranges = sorted({f"0..{default_range(values)[1]}" for values in images})
    kept = "the default range" if value_range is None else f"--value_range {value_range[0]:g} {value_range[1]:g}"
    enough = 3 if value_range is not None else min(256, len(different)) / 2  # a range may be meant to clip
    if len(levels) < min(enough, len(different)):
        problem = f"{kept} keeps {len(levels)} of 256 levels"
    elif value_range is None and below > 0.01:
        problem = f"{kept} starts at 0, and {below:.0%} of the values are below"
    elif value_range is None and scaled_differently(images):
        problem = f"{kept} differs between images ({', '.join(ranges)}), and so does their contrast"
    else:
        return None
    return (
        f"images of more than 8 bits, with values from {different[0]:g} to {different[-1]:g} in a sample of "
        f"{len(images)}: {problem}; give the range of the data as --value_range LOW HIGH (for 12 bits, 0 4095)"
    )


def scaled_differently(images: list[np.ndarray]) -> bool:
    """Whether the default range of some image is another than the widest, by more than 8 of 256 levels."""
    widest = max(map(default_range, images))
    pairs = ((to_8_bits(values).astype(int), to_8_bits(values, widest)) for values in images)
    return any((own - same).max(initial=0) > 8 for own, same in pairs)
