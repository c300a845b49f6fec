"""From a path to a batch: files, archives, decoding, transforms, loader."""

from util.data.datasets import build_dataset

__all__ = ["build_dataset"]
