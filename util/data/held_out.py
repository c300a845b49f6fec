"""A validation part of the training images (--val_fraction), for data sets without a val split."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from util.data.files import ImageFiles, SeveralFiles


@dataclass(frozen=True)
class Subset:
    """Some images of a source.

    Attributes:
        source: all images.
        indices: (N,) int64, positions of the subset's in it, ascending.
        labels, classes, numbered: as in `ImageFiles`, of the subset.
    """

    source: Any
    indices: np.ndarray
    labels: np.ndarray
    classes: list[str]
    numbered: bool = False

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def read(self, index: int) -> bytes:
        return self.source.read(int(self.indices[index]))

    def load(self, index: int) -> Any:
        return self.source.load(int(self.indices[index]))


def split_off(source: Any, fraction: float) -> tuple[Subset, Subset]:
    """The training and the validation part of a source.

    Of each class of n images, `fraction * n` (rounded, at most n - 1) are held out: those with the smallest hashes of
    their names. So the parts depend on names and classes alone, not on the seed, the order, or other classes. Without
    labels, the first folder counts as the class: pre-training and fine-tuning hold out the same images.

    Raises:
        ValueError: no class is large enough.
    """
    names = _names(source)
    order_of = [hashlib.blake2b(name, digest_size=8, person=b"val_fraction").digest() for name in names]
    hashes = np.frombuffer(b"".join(order_of), dtype=">u8")
    groups = source.labels
    if len(np.unique(groups)) == 1:
        folders = [name.split(b"/")[0] if b"/" in name else b"" for name in names]
        groups = np.unique(np.array(folders), return_inverse=True)[1]
    order = np.lexsort((hashes, groups))  # by class, then by hash; equal hashes in the order of the source
    _, starts, counts = np.unique(groups[order], return_index=True, return_counts=True)
    quotas = np.minimum(np.floor(counts * fraction + 0.5).astype(int), counts - 1)
    held_out = np.zeros(len(names), dtype=bool)
    for start, quota in zip(starts.tolist(), quotas.tolist(), strict=True):
        held_out[order[start : start + quota]] = True
    if not held_out.any():
        raise ValueError(
            f"--val_fraction {fraction:g} holds out no image: the largest of {len(counts)} classes has {counts.max()} "
            "images; raise it"
        )
    train, val = (_take(source, np.flatnonzero(chosen)) for chosen in (~held_out, held_out))
    return train, val


def fingerprint(val: Subset) -> str:
    """Tells validation parts apart: a hash of the names in one."""
    names = _names(val.source)
    digest = hashlib.blake2b(digest_size=8)
    for index in val.indices.tolist():
        digest.update(names[index] + b"\0")
    return digest.hexdigest()


def _take(source: Any, indices: np.ndarray) -> Subset:
    return Subset(source, indices, source.labels[indices], list(source.classes), getattr(source, "numbered", False))


def _names(source: Any) -> list[bytes]:
    """A name for each image: the path below the folder or in the archive, or the number of a row."""
    if isinstance(source, ImageFiles):
        return source.names.tolist()
    if isinstance(source, SeveralFiles):
        return [name for part in source.parts for name in _names(part)]
    return [b"%d" % row for row in range(len(source))]
