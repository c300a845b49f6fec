"""Image files of a split: names, labels and bytes."""

import os
import resource
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from util.data.decode import MAX_PIXELS, UnreadableImage, ValueRange, decode_rgb

_WAITS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # seconds between attempts to read after an I/O error


@dataclass(frozen=True)
class ImageFiles:
    """Image files of a split, in a folder or in a tar archive. Arrays, so that worker processes share the memory.

    Attributes:
        root: the folder or the archive.
        names: (N,) paths relative to the root, as bytes.
        labels: (N,) int64.
        classes: name of each label; empty if only numbers are known, "" for a label without images.
        extents: (N, 2) int64, offset and size in the archive; None for a folder.
        numbered: labels are numbers that the data set gives, as in a list file.
        value_range, max_image_pixels: as in `decode_rgb`.
    """

    root: str
    names: np.ndarray
    labels: np.ndarray
    classes: list[str]
    extents: np.ndarray | None = None
    numbered: bool = False
    value_range: ValueRange | None = None
    max_image_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def name(self, index: int) -> str:
        return printable(self.path(index))

    def read(self, index: int) -> bytes:
        """Bytes of a file. After an I/O error it is tried again for some seconds, since storage may come back.

        Raises:
            UnreadableImage: with reason "missing" or "I/O error".
        """
        for wait in (*_WAITS, None):
            try:
                return self._read_once(index)
            except OSError as error:
                missing = isinstance(error, FileNotFoundError) and os.path.isdir(os.path.dirname(self.path(index)))
                if missing:
                    raise UnreadableImage("the file does not exist", "missing") from error
                if wait is None or isinstance(error, PermissionError):
                    raise UnreadableImage(f"I/O error ({error.strerror or error})", "I/O error") from error
                time.sleep(wait)
        raise AssertionError

    def _read_once(self, index: int) -> bytes:
        if self.extents is None:
            with open(self.path(index), "rb") as file:
                return file.read()
        offset, size = (int(number) for number in self.extents[index])
        try:
            archive = _open_archive(self.root)
            data = os.pread(archive.descriptor, size, offset)
            if len(data) < size:
                raise OSError(f"{self.root} has become shorter")
        except OSError:
            _descriptors.pop(self.root, None)
            raise
        return data

    def load(self, index: int) -> np.ndarray:
        return decode_rgb(self.read(index), self.value_range, self.max_image_pixels)


class SeveralFiles:
    """Several sources of files one after the other: paths without labels, or the shards of a data set.

    Args:
        labels, classes, numbered: as in `ImageFiles`, of all parts together; by default there are no labels.
    """

    def __init__(
        self,
        parts: Sequence[Any],
        labels: np.ndarray | None = None,
        classes: Sequence[str] = (),
        numbered: bool = False,
    ) -> None:
        self.parts = list(parts)
        self.starts = np.cumsum([0, *(len(part) for part in parts)]).tolist()
        self.labels = np.zeros(self.starts[-1], dtype=np.int64) if labels is None else labels
        self.classes = list(classes)
        self.numbered = numbered

    def __len__(self) -> int:
        return len(self.labels)

    def _find(self, index: int) -> tuple[Any, int]:
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


class _OpenArchive:
    """An open file. It is closed with the last reference, so that no thread loses a file that it is reading."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


_descriptors: dict[str, _OpenArchive] = {}  # the least recently used one first


def _open_archive(path: str) -> _OpenArchive:
    """An archive, opened on first use. Forked workers may share it, since `pread` moves no position.

    A quarter of the files that a process may have open (often 1,024) are archives; a data set can have more shards.
    """
    archive = _descriptors.pop(path, None) or _OpenArchive(path)
    _descriptors[path] = archive
    if len(_descriptors) > max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4):
        _descriptors.pop(next(iter(_descriptors)), None)
    return archive


def printable(name: str) -> str:
    """A file name for logs in any locale: undecodable bytes and control characters are escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def summarize(names: list[str], most: int = 6, count: int | None = None) -> str:
    """The first names, and how many more there are; `count` is their number if not all are given."""
    count = len(names) if count is None else count
    more = f" and {count - most:,} more" if count > most else ""
    return ", ".join(names[:most]) + more


def pack(names: list[str]) -> np.ndarray:
    return np.array([os.fsencode(name) for name in names])
