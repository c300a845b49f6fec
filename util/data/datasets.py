"""Where images come from: a folder, a folder with list files, tar archives read in place, or Shapes.

A sample is asked for by (epoch, index); all its randomness is seeded from (seed, epoch, index), so that workers, ranks
and restarts change nothing. What a wrong path or layout raises names what was looked for, what was found, and the fix.
"""

import fcntl
import gzip
import hashlib
import logging
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from util.data import shapes
from util.data.decode import decode_rgb
from util.rng import seed_all, stable_hash

log = logging.getLogger("hpm")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_ATTEMPTS = 20  # images tried in place of an unreadable one
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz")


class Sample(NamedTuple):
    """image (3, S, S) uint8, label, index in the data set, and of what was asked for: its index if it is unreadable.

    Where an image had to be replaced, the first three are of its replacement; `bad` is -1 for all others.
    """

    image: torch.Tensor
    label: int
    index: int
    bad: int = -1


class Source(Protocol):
    """Decoded images by index. `labels` is (N,) int64, `classes` their names (empty where only numbers are known)."""

    labels: np.ndarray
    classes: list[str]

    def __len__(self) -> int: ...

    def load(self, index: int) -> np.ndarray: ...

    def name(self, index: int) -> str: ...


class ImageDataset(Dataset):
    """A source and a transform. `dataset[index]` is `dataset[0, index]`, the sample as epoch 0 draws it.

    Args:
        replace: take another image in place of one that cannot be read, the same one in every epoch, process and run.
            For training; in evaluation an image that is silently another would be a wrong figure.

    Raises:
        ValueError: an image cannot be read; with `replace`, neither can any of those tried in its place.
    """

    def __init__(
        self, source: Source, transform: Callable[[np.ndarray], torch.Tensor], seed: int = 0, replace: bool = False
    ) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.replace = replace

    @property
    def labels(self) -> np.ndarray:
        return self.source.labels

    @property
    def classes(self) -> list[str]:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        used, bad = index, -1
        try:
            image = self._load(index)
        except ValueError:
            if not self.replace:
                raise
            used, image = self._another(index)
            bad = index
        seed_all(self.seed, epoch, index)
        return Sample(self.transform(image), int(self.labels[used]), used, bad)

    def _load(self, index: int) -> np.ndarray:
        try:
            return self.source.load(index)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.source.name(index)}: {error}") from error

    def _another(self, index: int) -> tuple[int, np.ndarray]:
        for attempt in range(_ATTEMPTS):
            other = stable_hash(self.seed, index, attempt) % len(self)
            try:
                return other, self._load(other)
            except ValueError as error:
                last = error
        raise ValueError(
            f"{self.source.name(index)} cannot be read, nor can {_ATTEMPTS} others in its place: {last}"
        ) from last


# ------------------------------------------------------------------------------------------------------------- Shapes


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


@dataclass(frozen=True)
class ImageFiles:
    """Image files of a split, in a folder or inside a tar archive. Arrays only, so that workers share the memory.

    Attributes:
        root: the folder, or the archive.
        names: (N,) paths below the root, as bytes.
        labels: (N,) int64.
        classes: names of the labels; empty where a list file gives numbers only.
        extents: (N, 2) int64 offset and size inside the archive; None for a folder.
    """

    root: str
    names: np.ndarray
    labels: np.ndarray
    classes: list[str]
    extents: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def read(self, index: int) -> bytes:
        if self.extents is None:
            with open(self.name(index), "rb") as file:
                return file.read()
        offset, size = self.extents[index]
        return os.pread(_descriptor(self.root), int(size), int(offset))

    def load(self, index: int) -> np.ndarray:
        return decode_rgb(self.read(index))


_descriptors: dict[str, int] = {}


def _descriptor(path: str) -> int:
    """The descriptor of an archive, opened on first use. `pread` moves no position, so forked workers may share it."""
    if path not in _descriptors:
        _descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return _descriptors[path]


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
    if path.is_file() and split is None and _is_image(path.name):
        return ImageFiles(str(path.parent), _pack([path.name]), np.zeros(1, dtype=np.int64), [])
    if path.is_file():
        return _from_archive(path, split, cache_dir)
    if split is None:
        return _from_tree(path, [path])
    list_file = path / f"{split}.txt"
    if list_file.is_file():
        return _from_list_file(path / split, list_file)
    for suffix in ARCHIVE_SUFFIXES:
        if (path / f"{split}{suffix}").is_file():
            return _from_archive(path / f"{split}{suffix}", split, cache_dir)
    if (path / split).is_dir():
        return _from_tree(path / split, _class_folders(path / split))
    raise ValueError(
        f"--data_path {data_path}: looked for {split}/CLASS/*.jpg, {split}.txt or {split}.tar, "
        f"found {_contents(path)}; give the folder that holds {split}/"
    )


def _contents(folder: Path, most: int = 6) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    if not names:
        return "an empty folder"
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not os.path.basename(name).startswith(".")


def _class_folders(root: Path) -> list[Path]:
    return [entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def _from_tree(root: Path, folders: list[Path]) -> ImageFiles:
    names, labels, classes = [], [], []
    for label, folder in enumerate(sorted(folders)):
        found = [
            os.path.relpath(os.path.join(parent, file), root)
            for parent, _, files in os.walk(folder, followlinks=True)
            for file in files
            if _is_image(file)
        ]
        if not found:
            raise ValueError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)}): fill it, or remove the folder")
        names += sorted(found, key=_by_parts)
        labels += [label] * len(found)
        classes.append(folder.name)
    if not names:
        flat = sum(_is_image(entry.name) for entry in root.iterdir())
        raise ValueError(
            f"{root} has no class folders; looked for CLASS/*.jpg, found {_contents(root)}; move the "
            + (f"{flat:,} images" if flat else "images")
            + f" into one folder a class, or list them in {root.name}.txt beside it (RELATIVE/PATH LABEL)"
        )
    return ImageFiles(str(root), _pack(names), np.array(labels, dtype=np.int64), classes)


def _by_parts(name: str) -> list[str]:
    """Sorts by class, then by file: as plain strings, cat-2/a would stand before cat/a."""
    return name.split("/")


def _pack(names: list[str]) -> np.ndarray:
    return np.array([os.fsencode(name) for name in names])


def _from_list_file(root: Path, list_file: Path) -> ImageFiles:
    """Official list files: one image a line, `RELATIVE/PATH LABEL`, relative to the split's folder."""
    names, labels = [], []
    for number, line in enumerate(list_file.read_text(errors="surrogateescape").splitlines(), start=1):
        if not line.strip():
            continue
        name, _, label = line.rstrip().rpartition(" ")
        if not name or not label.isdecimal():
            raise ValueError(f"{list_file}, line {number}: expected 'RELATIVE/PATH LABEL', found {line[:80]!r}")
        if not _is_inside(name):
            raise ValueError(f"{list_file}, line {number}: {name!r} leads outside {root}")
        names.append(name)
        labels.append(int(label))
    if not names:
        raise ValueError(f"{list_file} lists no image: one 'RELATIVE/PATH LABEL' a line is needed")
    if not (root / names[0]).is_file():
        raise ValueError(f"{list_file} names {names[0]}, but {root / names[0]} does not exist")
    return ImageFiles(str(root), _pack(names), np.array(labels, dtype=np.int64), [])


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


# ----------------------------------------------------------------------------------------------------------- archives


def _from_archive(path: Path, split: str | None, cache_dir: str | None) -> ImageFiles:
    if not path.name.endswith(ARCHIVE_SUFFIXES):
        raise ValueError(f"{path} is neither a folder nor an archive ({', '.join(ARCHIVE_SUFFIXES)})")
    if not path.name.endswith(".tar"):
        path = _decompressed(path, cache_dir)
    members = list(_members(path))
    if split is not None:
        members = _below_split(path, members, split)
    members.sort(key=lambda member: _by_parts(member[0]))
    folders = [name.split("/")[0] if "/" in name else "" for name, _, _ in members]
    classes = sorted(set(folders))
    number = {folder: label for label, folder in enumerate(classes)}
    return ImageFiles(
        root=str(path),
        names=_pack([name for name, _, _ in members]),
        labels=np.array([number[folder] for folder in folders], dtype=np.int64),
        classes=classes,
        extents=np.array([extent for _, *extent in members], dtype=np.int64),
    )


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each image of a plain tar. Links, devices and names that lead outside are left out."""
    file_size, left_out, last_word = path.stat().st_size, 0, time.monotonic()
    try:
        with tarfile.open(path, "r:") as tar:
            for number, member in enumerate(tar):
                tar.members.clear()  # a million headers would fill the memory
                if time.monotonic() - last_word > 10:
                    last_word = time.monotonic()
                    log.info("listing %s: %s files", path, f"{number:,}")
                name = str(PurePosixPath(member.name))
                if not _is_inside(name) or not (member.isreg() or member.isdir()) or member.issparse():
                    left_out += 1
                elif member.isreg() and _is_image(name):
                    if member.offset_data + member.size > file_size:
                        raise ValueError(f"{path} is truncated: {name} ends beyond the end of the archive")
                    yield name, member.offset_data, member.size
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a readable tar archive: {error}") from error
    if left_out:
        log.warning("%s: left out %d links, devices and names that lead outside", path, left_out)


def _below_split(path: Path, members: list[tuple[str, int, int]], split: str) -> list[tuple[str, int, int]]:
    """Members of a split, named from their class on: of SPLIT/CLASS/*, TOP/SPLIT/CLASS/*, or CLASS/* in SPLIT.tar."""
    tops = sorted({name.split("/")[0] for name, _, _ in members})
    if split in tops:
        prefix = f"{split}/"
    elif len(tops) == 1 and any(name.startswith(f"{tops[0]}/{split}/") for name, _, _ in members):
        prefix = f"{tops[0]}/{split}/"
    elif path.name == f"{split}.tar" and members:
        prefix = ""
    else:
        found = ", ".join(tops[:6]) + (f" and {len(tops) - 6:,} more" if len(tops) > 6 else "")
        raise ValueError(f"{path}: looked for {split}/CLASS/*.jpg, found at its top {found or 'no image'}")
    below = [(name.removeprefix(prefix), *extent) for name, *extent in members if name.startswith(prefix)]
    for name, *_ in below:
        if "/" not in name:
            raise ValueError(f"{path}: {prefix}{name} stands outside a class folder; the layout is {split}/CLASS/*.jpg")
    return below


def _decompressed(path: Path, cache_dir: str | None) -> Path:
    """The plain tar of a .tar.gz, in the cache. Whoever comes first makes it, the others wait for a lock."""
    folder = Path(cache_dir) if cache_dir else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hpm"
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    stem = path.name.removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar")
    target = folder / f"{stem}-{key}" / f"{stem}.tar"
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            log.info("decompressing %s once into %s", path, target)
            partial = target.with_suffix(".partial")
            try:
                with gzip.open(path) as packed, open(partial, "wb") as plain:
                    shutil.copyfileobj(packed, plain, 1 << 22)
                partial.replace(target)
            except (gzip.BadGzipFile, EOFError) as error:
                raise ValueError(f"{path} is not a complete gzip file: {error}") from error
            finally:
                partial.unlink(missing_ok=True)
    return target


# -------------------------------------------------------------------------------------------------------------- build


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
        plain = _decompressed(packed, cache_dir)
    files = share(lambda: find_images(data_path, split, cache_dir))
    return files if packed is None else replace(files, root=str(plain))


def compressed_archive(path: Path, split: str) -> Path | None:
    """The archive that must be decompressed before a split can be read; None where there is none."""
    if path.is_file():
        return path if path.name.endswith((".tar.gz", ".tgz")) else None
    if (path / f"{split}.txt").is_file() or (path / f"{split}.tar").is_file():
        return None
    return next((path / f"{split}{s}" for s in (".tar.gz", ".tgz") if (path / f"{split}{s}").is_file()), None)


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


def build_dataset(
    data_path: str | None, split: str, transform: Callable[[np.ndarray], torch.Tensor], seed: int = 0, **kwargs: object
) -> ImageDataset:
    """`build_source` with a transform."""
    return ImageDataset(build_source(data_path, split, **kwargs), transform, seed)
