"""Image files in folders and in official list files."""

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from util.data.decode import decode_rgb

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageFiles:
    """Image files of a split, in a folder or in a tar archive. Arrays, so that worker processes share the memory.

    Attributes:
        root: the folder or the archive.
        names: (N,) paths relative to the root, as bytes.
        labels: (N,) int64.
        classes: name of each label; empty for list files, which give numbers only.
        extents: (N, 2) int64, offset and size in the archive; None for a folder.
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
    """Descriptor of an archive, opened on first use. Forked workers may share it, since `pread` moves no position."""
    if path not in _descriptors:
        _descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return _descriptors[path]


def contents(folder: Path, most: int = 6) -> str:
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir())
    return summarize(names, most) or "an empty folder"


def summarize(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not os.path.basename(name).startswith(".")


def class_folders(root: Path) -> list[Path]:
    return [entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def from_tree(root: Path, folders: list[Path]) -> ImageFiles:
    names, labels, classes = [], [], []
    for label, folder in enumerate(sorted(folders)):
        found = [
            os.path.relpath(os.path.join(parent, file), root)
            for parent, _, files in os.walk(folder, followlinks=True)
            for file in files
            if is_image(file)
        ]
        if not found:
            raise ValueError(
                f"{folder} contains no images ({', '.join(IMAGE_SUFFIXES)}): add some or remove the folder"
            )
        names += sorted(found, key=by_parts)
        labels += [label] * len(found)
        classes.append(folder.name)
    if not names:
        flat = sum(is_image(entry.name) for entry in root.iterdir())
        images = f"{flat:,} images" if flat else "images"
        raise ValueError(
            f"{root} has no class folders; looked for CLASS/*.jpg, found {contents(root)}; move the {images} into one "
            f"folder per class, or list them in {root.name}.txt next to it (RELATIVE/PATH LABEL)"
        )
    return ImageFiles(str(root), pack(names), np.array(labels, dtype=np.int64), classes)


def by_parts(name: str) -> list[str]:
    """Sort key, by class and then by file: as plain strings, cat-2/a sorts before cat/a."""
    return name.split("/")


def pack(names: list[str]) -> np.ndarray:
    return np.array([os.fsencode(name) for name in names])


def from_list_file(root: Path, list_file: Path) -> ImageFiles:
    """Official list files: one image per line, `RELATIVE/PATH LABEL`, relative to the split's folder."""
    names, labels = [], []
    for number, line in enumerate(list_file.read_text(errors="surrogateescape").splitlines(), start=1):
        if not line.strip():
            continue
        name, _, label = line.rstrip().rpartition(" ")
        if not name or not label.isdecimal():
            raise ValueError(f"{list_file}, line {number}: expected 'RELATIVE/PATH LABEL', found {line[:80]!r}")
        if not is_inside(name):
            raise ValueError(f"{list_file}, line {number}: {name!r} points outside {root}")
        names.append(name)
        labels.append(int(label))
    if not names:
        raise ValueError(f"{list_file} lists no images; expected one 'RELATIVE/PATH LABEL' per line")
    if not (root / names[0]).is_file():
        raise ValueError(f"{list_file} lists {names[0]}, but {root / names[0]} does not exist")
    return ImageFiles(str(root), pack(names), np.array(labels, dtype=np.int64), [])


def is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
