"""The images of a classifier, with labels that mean its outputs, and their batches in evaluation."""

import argparse
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from util.data.classes import class_record, count_classes, label_as, match_classes
from util.data.datasets import ImageDataset
from util.data.loader import ShardSampler, build_loader
from util.data.shapes import DEFAULT_SIZES
from util.data.sources import Source, build_source, build_splits, check_value_range
from util.run.distributed import World, from_rank_zero

log = logging.getLogger("hpm")


def read_splits(given: argparse.Namespace, num_outputs: int | None, owner: str) -> tuple[Source | None, Source]:
    """Training and validation images; with `--eval` there are only the latter. All ranks call it together.

    Resolves `nb_classes` and `classes` in place. `classes` (`class_record`) are those of the classifier that is resumed
    or evaluated, to which labels are matched by name, or None for a new one.

    Args:
        num_outputs: of the classifier that is evaluated; None if it does not say.
        owner: whose outputs they are, for error messages.

    Raises:
        ValueError: no such images, or classes that the classifier does not have.
    """
    settings = {
        "cache_dir": given.cache_dir,
        "value_range": given.value_range,
        "max_image_pixels": given.max_image_pixels,
        "on_rank_zero": from_rank_zero,
    }
    if given.eval:
        val = build_source(given.data_path, "val", shapes_count=given.shapes_val, **settings)
        given.nb_classes = given.nb_classes or num_outputs or int(val.labels.max()) + 1
        train, val = None, label_as(given.classes, given.nb_classes, val, owner)
    else:
        train, val = build_splits(given.data_path, (given.shapes_train, given.shapes_val), **settings)
        if given.classes is not None:
            train, val = (match_classes(given.classes, source, "the run") for source in (train, val))
        given.classes = given.classes or class_record(train)
        given.nb_classes = count_classes(train, val, given.nb_classes)
    if warning := from_rank_zero(lambda: check_value_range(train or val, given.value_range)):
        log.warning("%s", warning)
    return train, val


def read_knn_splits(given: argparse.Namespace) -> dict[str, Source]:
    """The labelled images of --knn_interval, "train" and "test" (the val split). All ranks call it together.

    Raises:
        ValueError: there are none, or fewer than --knn_k.
    """
    path = given.knn_data_path or given.data_path
    try:
        if isinstance(path, list):
            raise ValueError("labels can only come from one path")
        train, val = build_splits(
            path,
            (given.shapes_train, DEFAULT_SIZES["val"]),
            given.cache_dir,
            from_rank_zero,
            value_range=given.value_range,
            max_image_pixels=given.max_image_pixels,
        )
        count_classes(train, val, None)
    except ValueError as error:
        raise ValueError(f"--knn_interval needs labelled images, give them as --knn_data_path: {error}") from error
    if given.knn_k > len(train):
        raise ValueError(f"--knn_k {given.knn_k} of {len(train):,} training images: choose fewer neighbours")
    log.info(
        "k-NN      every %d epochs: %s training images, %s queries",
        given.knn_interval,
        f"{len(train):,}",
        f"{len(val):,}",
    )
    return {"train": train, "test": val}


def evaluation_loader(
    source: Source,
    crop: Callable[[Any], Tensor],
    world: World,
    *,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    dataset: type[ImageDataset] = ImageDataset,
) -> DataLoader:
    """Batches of this rank's part of the images, each image once over all ranks."""
    sampler = ShardSampler(len(source), batch_size, world.rank, world.size)
    return build_loader(dataset(source, crop), sampler, num_workers, pin_memory)
