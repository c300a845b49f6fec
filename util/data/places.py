"""Where a split is below --data_path: a folder, a list file, an archive, several shards, or parquet files."""

import os
from itertools import islice
from pathlib import Path

from util.data.archives import ARCHIVE_SUFFIXES, below_split, decompressed, list_archive
from util.data.arrow import is_saved
from util.data.files import printable
from util.data.listing import contents, is_skipped_folder, list_folder, why_skipped
from util.data.split_names import (
    ALL_NAMES,
    COMPRESSED,
    SHARD_SUFFIXES,
    NoSuchSplit,
    expand_braces,
    is_named,
    names_of,
    numbered_sets,
    of_split,
    warn_of_classes,
)


def find_place(data_path: str | list[str], split: str | None, whole: bool) -> list[Path]:
    """Where a split is: one folder, list file or archive, or several shards (.tar) or parquet files in their order.

    Args:
        data_path: a path; or a pattern of shards (`train-{000..123}.tar`), or several shards.
        split: None for all.
        whole: if there is no "train" split, everything under the path is its.

    Raises:
        NoSuchSplit: the data set does not have the split.
        ValueError: no such path, or several places of which one may be out of date.
    """
    if isinstance(data_path, list):
        return _shards(data_path, split, whole)
    path = Path(data_path)
    if not path.exists():
        if "{" in data_path:
            return _shards([data_path], split, whole)
        raise ValueError(f"--data_path {data_path} does not exist: give a folder or a .tar archive of images")
    if path.suffix == ".parquet":
        return _shards([data_path], split, whole)
    if path.is_file():
        return [path]
    if split is None:
        return _shards_inside(path) or [path]
    place = locate(path, split)
    if place and whole and split == "train":
        warn_of_classes(str(place[0]), _image_folders(path))
    if not place and whole and split == "train":
        inside = _shards_inside(path)
        place = of_split(inside, split, whole) if inside else [path]
    elif len(place) == 1 and place[0].is_dir():
        place = _shards_inside(place[0]) or place
    if not place:
        raise NoSuchSplit(
            f"--data_path {data_path}: looked for {split}/CLASS/*.jpg, {split}.txt, {split}.tar or {split}-000000.tar, "
            f"found {contents(path)}; give the folder that holds {split}/"
        )
    return place


def _image_folders(path: Path) -> list[str]:
    """The folders in a folder that are named like no split and hold images."""
    found = []
    for folder in (entry for entry in os.scandir(path) if entry.is_dir()):
        if folder.name not in ALL_NAMES and not is_skipped_folder(folder.name):
            some = islice(os.scandir(folder.path), 100)
            if any(why_skipped(file.name) is None and file.is_file() for file in some):
                found.append(printable(folder.name))
    return sorted(found)


def expanded(patterns: list[str]) -> list[str]:
    """The names that patterns stand for; what exists under such a name is no pattern."""
    return [name for text in patterns for name in ([text] if Path(text).exists() else expand_braces(text))]


def _shards(patterns: list[str], split: str | None, whole: bool) -> list[Path]:
    """The shards of a split among those that are named one by one or by patterns."""
    files = [Path(name) for name in expanded(patterns)]
    for file in files:
        if not file.is_file():
            raise ValueError(f"--data_path: {file} does not exist or is no file")
        if file.suffix not in SHARD_SUFFIXES:
            raise ValueError(f"--data_path: {file} is no shard: expected .tar (decompressed) or .parquet")
    return files if split is None else of_split(files, split, whole)


def locate(path: Path, split: str) -> list[Path]:
    """Where a folder has a split: SPLIT.txt (a list file), SPLIT/, SPLIT.tar, SPLIT.tar.gz, SPLIT.tgz, or numbered
    shards or parquet files with SPLIT in their names; [] if it has none.

    Raises:
        ValueError: it has several, of which one may be out of date.
    """
    found: list[list[Path]] = []
    for name in names_of(split):
        found += [[path / name]] if (path / name).is_dir() else []
        archives = (path / f"{name}{suffix}" for suffix in ARCHIVE_SUFFIXES)
        found += [[archive] for archive in archives if archive.is_file()]
    found += [files for files in numbered_sets(_shards_in(path)) if is_named(Path(files[0].name), split)]
    if len(found) > 1:
        names = " and ".join(files[0].name + (", ..." if len(files) > 1 else "") for files in found)
        raise ValueError(f"{path} contains both {names}, which may differ: move one of them elsewhere")
    for name in names_of(split):
        if (path / f"{name}.txt").is_file():
            return [path / f"{name}.txt"]
    return found[0] if found else []


def _shards_in(folder: Path) -> list[Path]:
    """The .tar and .parquet files in a folder, the latter also in its data/ (as the Hugging Face Hub has them)."""

    def files(place: Path) -> list[Path]:
        with os.scandir(place) as entries:
            names = [e.name for e in entries if e.name.endswith(SHARD_SUFFIXES) and not e.name.startswith(".")]
        return [place / name for name in names if (place / name).is_file()]

    found = files(folder)
    if (folder / "data").is_dir():
        found += [file for file in files(folder / "data") if file.suffix == ".parquet"]
    stems = {file.stem for file in found if file.suffix == ".tar"}
    return [file for file in found if file.suffix == ".tar" or file.stem not in stems]  # img2dataset's metadata


def _shards_inside(folder: Path) -> list[Path]:
    """The shards or parquet files in a folder without images, in the order of their numbers; [] if it has none."""
    files = _shards_in(folder)
    if not files or is_saved(folder) or list_folder(folder).images:
        return []
    numbered = [file for group in numbered_sets(files) for file in group]
    files = numbered + sorted(set(files) - set(numbered))
    suffixes = {file.suffix for file in files}
    if len(suffixes) > 1:
        raise ValueError(f"{folder} contains .tar and .parquet files: move those of one kind elsewhere")
    return files


def has_split(data_path: str | list[str], split: str, cache_dir: str | None) -> bool:
    """Whether a data set has a split.

    Raises:
        ValueError: it cannot be read, or has several places for it.
    """
    try:
        place = find_place(data_path, split, whole=False)
        if not isinstance(data_path, list) and place == [Path(data_path)] and place[0].name.endswith(ARCHIVE_SUFFIXES):
            plain = place[0] if place[0].suffix == ".tar" else decompressed(place[0], cache_dir)
            below_split(list_archive(plain, cache_dir), split, whole=False)
    except NoSuchSplit:
        return False
    return True


def compressed_archive(path: Path, split: str | None) -> Path | None:
    """The archive that must be decompressed to read a split, or None."""
    place = [path] if not path.is_dir() or split is None else locate(path, split)
    return place[0] if len(place) == 1 and place[0].name.endswith(COMPRESSED) else None
