"""Samples of a data set. The randomness of a sample is a function of (seed, epoch, index)."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from util.data.decode import REASONS, UnreadableImage
from util.data.sources import Source, build_source
from util.rng import seed_all, stable_hash

log = logging.getLogger("hpm")

_ATTEMPTS = 20  # replacements tried for an unreadable image
_NAMED = 20  # unreadable images named in the log


class Sample(NamedTuple):
    """image (3, S, S) uint8, its label and index.

    If the requested image was unreadable, these three belong to its replacement, `bad` is its index, and `reason` the
    position of the reason in `decode.REASONS`; else both are -1. In `MarkUnreadable`, `index` stays its own.
    """

    image: torch.Tensor
    label: int
    index: int  # type: ignore[assignment]  # hides tuple.index
    bad: int = -1
    reason: int = -1


class ImageDataset(Dataset):
    """A source and a transform. `dataset[epoch, index]` is a `Sample`; `dataset[index]` is `dataset[0, index]`.

    Args:
        replace: replace an unreadable image by another one, the same in every epoch, process and run. For training; an
            evaluation with replaced images would give a wrong metric.

    Raises:
        UnreadableImage: an image is unreadable; with `replace`, so are all replacements tried.
    """

    def __init__(self, source: Source, transform: Callable[[Any], Any], seed: int = 0, replace: bool = False) -> None:
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
        used, bad, reason = index, -1, -1
        try:
            image = self._load(index)
        except UnreadableImage as error:
            if not self.replace:
                raise
            used, image = self._load_replacement(index)
            bad, reason = index, REASONS.index(error.reason)
        seed_all("sample", self.seed, epoch, index)
        return Sample(self.transform(image), int(self.source.labels[used]), used, bad, reason)

    def _load(self, index: int) -> Any:
        try:
            return self.source.load(index)
        except ValueError as error:
            reason = getattr(error, "reason", "damaged")
            raise UnreadableImage(f"{self.source.name(index)}: {error}", reason) from error

    def _load_replacement(self, index: int) -> tuple[int, Any]:
        for attempt in range(_ATTEMPTS):
            other = stable_hash("replacement", self.seed, index, attempt) % len(self)
            try:
                return other, self._load(other)
            except UnreadableImage as error:
                last = error
        raise UnreadableImage(
            f"{self.source.name(index)} is unreadable, and so are {_ATTEMPTS} replacements: {last}", last.reason
        ) from last


class MarkUnreadable(ImageDataset):
    """`ImageDataset` in which an unreadable image is a black one with the reason, instead of an error."""

    def __getitem__(self, key: Any) -> Sample:
        try:
            return super().__getitem__(key)
        except UnreadableImage as error:
            black = self.transform(np.zeros((8, 8, 3), dtype=np.uint8))
            return Sample(black, 0, key, bad=key, reason=REASONS.index(error.reason))


def report_unreadable(source: Source, reasons: torch.Tensor, consequence: str) -> None:
    """Log the unreadable images of (N,) reasons, the first ones by name and all by reason, and what follows."""
    bad = (reasons >= 0).nonzero().flatten().tolist()
    for index in bad[:_NAMED]:
        log.warning("unreadable (%s): %s", REASONS[reasons[index]], source.name(index))
    if bad:
        counts = {reason: int((reasons == k).sum()) for k, reason in enumerate(REASONS)}
        text = ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count)
        log.warning("%s of %s images are unreadable (%s): %s", f"{len(bad):,}", f"{len(source):,}", text, consequence)


def build_dataset(
    data_path: str | None, split: str, transform: Callable[[np.ndarray], torch.Tensor], seed: int = 0, **kwargs: Any
) -> ImageDataset:
    """`ImageDataset` of `build_source(data_path, split, **kwargs)`."""
    return ImageDataset(build_source(data_path, split, **kwargs), transform, seed)
