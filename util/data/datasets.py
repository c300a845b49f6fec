"""Samples by (epoch, index), seeded from (seed, epoch, index): workers, ranks and restarts then change nothing."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from util.data.sources import Source, build_source
from util.rng import seed_all, stable_hash

_ATTEMPTS = 20  # images tried in place of an unreadable one


class Sample(NamedTuple):
    """image (3, S, S) uint8, label, index in the data set, and of what was asked for: its index if it is unreadable.

    Where an image had to be replaced, the first three are of its replacement; `bad` is -1 for all others.
    """

    image: torch.Tensor
    label: int
    index: int
    bad: int = -1


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


def build_dataset(
    data_path: str | None, split: str, transform: Callable[[np.ndarray], torch.Tensor], seed: int = 0, **kwargs: object
) -> ImageDataset:
    """`build_source` with a transform."""
    return ImageDataset(build_source(data_path, split, **kwargs), transform, seed)
