"""Where images come from: folders, list files, tar archives read in place, shards, Hugging Face data sets, or Shapes.

Errors about a path or layout name what was looked for, what was found, and the fix.
"""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from util.data import shapes
from util.data.archives import ARCHIVE_SUFFIXES, below_split, decompressed, list_archive
from util.data.arrow import ArrowImages, is_arrow, open_arrow
from util.data.classes import Labelled, class_record, match_classes
from util.data.decode import MAX_PIXELS, UnreadableImage, ValueRange, default_range, read_values, to_8_bits
from util.data.files import ImageFiles, SeveralFiles, pack
from util.data.held_out import Subset, split_off
from util.data.listing import from_list_file, list_folder, overlaps, to_files, why_skipped
from util.data.places import expanded, find_place, has_split
from util.data.shards import is_webdataset, list_shards, read_samples, reject_contradictions
from util.data.split_names import COMPRESSED, SHARD_SUFFIXES, NoSuchSplit, is_numbered, warn_of_gaps, warn_of_packed

Files = ImageFiles | SeveralFiles | ArrowImages
OnRankZero = Callable[[Callable[[], Any]], Any]
NO_VAL = "; without a val split, --val_fraction holds out a part of the training images"


class Source(Labelled, Protocol):
    """Images by index. `labels` is (N,) int64, `classes` their names (empty if labels are only numbers)."""

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


def _read_place(
    place: list[Path],
    data_path: str | list[str],
    split: str | None,
    cache_dir: str | None,
    labels_needed: bool,
    whole: bool,
) -> Files:
    """`place` is `data_path` itself, or what `find_place` chose as the split."""
    first = place[0]
    if is_arrow(place):
        warn_of_gaps(place)
        return open_arrow(place, cache_dir, labels_needed)
    if len(place) > 1:
        warn_of_gaps(place)
        warn_of_packed(first.parent)
        listings = list_shards(place, cache_dir)
        if split is not None:
            listings = [below_split(listing, split, whole=True) for listing in listings]
        return read_samples(listings, labels_needed)
    if first.is_dir():
        return to_files(list_folder(first), labels_needed, split or "")
    given = first == Path(data_path) if isinstance(data_path, str) else False
    if given and not labels_needed and why_skipped(first.name) is None:
        return ImageFiles(str(first.parent), pack([first.name]), np.zeros(1, dtype=np.int64), [])
    if not given and first.suffix == ".txt":
        return from_list_file(first.with_suffix(""), first, labels_needed)
    if not first.name.endswith(ARCHIVE_SUFFIXES):
        raise ValueError(f"{first} is neither a folder nor an archive ({', '.join(ARCHIVE_SUFFIXES)})")
    plain = first if first.suffix == ".tar" else decompressed(first, cache_dir)
    listing = list_archive(plain, cache_dir)
    if split is not None:
        listing = below_split(listing, split, whole=not given or (whole and split == "train"))
    numbered = is_numbered(first)
    unlabelled = labels_needed and numbered and not any("/" in name for name in listing.images)
    if unlabelled or is_webdataset(listing, numbered):
        return read_samples([listing], labels_needed)
    if labels_needed:
        reject_contradictions(listing)
    return to_files(listing, labels_needed, split or "")


def _data_sets(data_path: str | list[str], labels_needed: bool) -> Sequence[str | list[str]]:
    """The paths, each a data set; or one list of shards, which a shell may have made of a pattern.

    Raises:
        ValueError: several, and labels are needed.
    """
    if isinstance(data_path, str):
        return [data_path]
    shards = all(Path(path).suffix in SHARD_SUFFIXES for path in data_path)
    if shards and (labels_needed or all(is_numbered(Path(name)) for name in expanded(data_path))):
        return [data_path]
    if labels_needed:
        raise ValueError(f"--data_path: {len(data_path)} paths were given, but labels can only come from one")
    return data_path


def limited(files: Files, **limits: Any) -> Files:
    """The same images with another `value_range` and `max_image_pixels`."""
    if not isinstance(files, SeveralFiles):
        return replace(files, **limits)
    changed = copy.copy(files)
    changed.parts = [limited(part, **limits) for part in files.parts]
    return changed


def _roots(files: Files) -> list[str]:
    if isinstance(files, SeveralFiles):
        return [root for part in files.parts for root in _roots(part)]
    if isinstance(files, ImageFiles) and files.extents is None and len(files) == 1:
        return [os.path.realpath(files.path(0))]
    return [os.path.realpath(files.root)]


def build_source(
    data_path: str | list[str] | None,
    split: str | None,
    *,
    labels_needed: bool = True,
    whole: bool | None = None,
    value_range: ValueRange | None = None,
    max_image_pixels: int = MAX_PIXELS,
    shapes_count: int | None = None,
    cache_dir: str | None = None,
    on_rank_zero: OnRankZero = lambda find: find(),
) -> Source:
    """The images of a split; with `split` None, every image under the path. Shapes if `data_path` is None.

    Args:
        data_path: a folder with `SPLIT/CLASS/*.jpg`, or with `SPLIT.txt` (official list files), or with `SPLIT.tar`;
            or a .tar archive that holds `SPLIT/CLASS/*.jpg`. `.tar.gz` is decompressed once into the cache. Or
            WebDataset shards or a Hugging Face data set (docs/data.md). A list of paths if they are shards, or without
            `labels_needed` of any kind, whose images follow each other.
        labels_needed: without it, as for pre-training, images need no class folders.
        whole: where there is no "train" split, every image under the path belongs to it. The default is not
            `labels_needed`; it is for pre-training and for data of which a part is held out.
        value_range, max_image_pixels: as in `decode_rgb`.
        cache_dir: default $XDG_CACHE_HOME/hpm, or ~/.cache/hpm.
        on_rank_zero: lists on rank 0 and broadcasts the result (util.run.distributed.from_rank_zero).

    Raises:
        ValueError: no such images.
    """
    if value_range is not None and not value_range[0] < value_range[1]:
        raise ValueError(f"--value_range {value_range[0]:g} {value_range[1]:g}: LOW must be below HIGH")
    if data_path is None:
        return ShapesSource(split or "train", shapes_count)
    labels_needed = labels_needed and split is not None
    whole = not labels_needed if whole is None else whole
    parts: list[Files] = []
    for path in _data_sets(data_path, labels_needed):
        is_file = isinstance(path, str) and Path(path).is_file()
        place = find_place(path, split, whole) if is_file else on_rank_zero(partial(find_place, path, split, whole))
        read = partial(_read_place, place, path, split, cache_dir, labels_needed, whole)
        # Caches are those of each node, and filled outside any collective: it can outlast their timeout.
        if is_arrow(place):
            parts.append(limited(read(), value_range=value_range, max_image_pixels=max_image_pixels))
            continue
        plain = decompressed(place[0], cache_dir) if place[0].name.endswith(COMPRESSED) else None
        files = limited(on_rank_zero(read), value_range=value_range, max_image_pixels=max_image_pixels)
        parts.append(files if plain is None else replace(cast(ImageFiles, files), root=str(plain)))
    roots = [_roots(part) for part in parts] if len(parts) > 1 else []
    for number, of_part in enumerate(roots):
        for root in of_part:
            for other in (other for earlier in roots[:number] for other in earlier):
                if overlaps(root, other):
                    raise ValueError(f"--data_path: {other} and {root} overlap, so images would be used twice")
    return parts[0] if len(parts) == 1 else SeveralFiles(parts)


def build_splits(
    data_path: str | list[str] | None,
    shapes_counts: tuple[int, int],
    cache_dir: str | None,
    on_rank_zero: OnRankZero,
    *,
    val_fraction: float | None = None,
    value_range: ValueRange | None = None,
    max_image_pixels: int = MAX_PIXELS,
) -> tuple[Source, Source]:
    """`build_source` for train and val, where val has train's labels; `shapes_counts` are the sizes of Shapes.

    Raises:
        ValueError: no such images, or classes of val that train lacks.
    """
    settings: dict[str, Any] = {"value_range": value_range, "max_image_pixels": max_image_pixels}
    settings |= {"cache_dir": cache_dir, "on_rank_zero": on_rank_zero}
    if val_fraction is not None:
        return hold_out(data_path, val_fraction, **settings)
    train = build_source(data_path, "train", shapes_count=shapes_counts[0], **settings)
    val = build_val(data_path, shapes_counts[1], **settings)
    return train, match_classes(class_record(train), val, "the train split")


def build_val(data_path: str | list[str] | None, shapes_count: int | None, **settings: Any) -> Source:
    """`build_source` for val, where a part of the training images could be held out instead."""
    try:
        return build_source(data_path, "val", shapes_count=shapes_count, **settings)
    except NoSuchSplit as error:
        raise NoSuchSplit(f"{error}{NO_VAL}") from error


def hold_out(
    data_path: str | list[str] | None,
    val_fraction: float,
    *,
    labels_needed: bool = True,
    cache_dir: str | None = None,
    on_rank_zero: OnRankZero = lambda find: find(),
    **settings: Any,
) -> tuple[Subset, Subset]:
    """The training images without a fraction of each class, and that fraction (`split_off`).

    Raises:
        ValueError: the data set has a val split, or no such images.
    """
    named = f"--val_fraction {val_fraction:g}"
    if data_path is None:
        raise ValueError(f"{named}, but Shapes has a val split: omit the option, or give --data_path")
    settings |= {"cache_dir": cache_dir, "on_rank_zero": on_rank_zero}
    source = build_source(data_path, "train", labels_needed=labels_needed, whole=True, **settings)
    for path in _data_sets(data_path, labels_needed):
        if on_rank_zero(partial(has_split, path, "val", cache_dir)):
            raise ValueError(
                f"{named}, but --data_path {path} has a val split (something in it is named val, validation or valid): "
                "omit the option, move that elsewhere, or if it is a class, put the classes into a folder train/"
            )
    return split_off(source, val_fraction)


def check_value_range(source: Source, value_range: ValueRange | None = None, samples: int = 8) -> str | None:
    """A warning if scaling to 8 bits would lose most of the 256 levels of some images, read as a sample; for default
    ranges also if they differ between the images, or if many values lie below 0."""
    if not hasattr(source, "read"):  # Shapes
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
