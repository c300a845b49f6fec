"""The data of the scripts: labelled splits, whose labels are outputs of the classifier; images of pre-training; loaders
of an evaluation."""

import argparse
import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import DataLoader

from util.data.classes import class_record, count_classes, label_as, match_classes, needed_outputs
from util.data.datasets import ImageDataset, MarkUnreadable
from util.data.held_out import Subset, fingerprint
from util.data.loader import ShardSampler, build_loader
from util.data.places import has_split
from util.data.shapes import DEFAULT_SIZES
from util.data.sources import NO_VAL, Source, build_source, build_splits, build_val, check_value_range, hold_out
from util.run.distributed import World, from_rank_zero

log = logging.getLogger("hpm")


def read_splits(given: argparse.Namespace, num_outputs: int | None, owner: str) -> tuple[Source | None, Source]:
    """Training and validation images; with `--eval` there are only the latter. All ranks call it together.

    Resolves `nb_classes`, `classes` and `val_split` in place. `classes` (`class_record`) are those of the classifier
    that is resumed or evaluated, to which labels are matched by name, or None for a new one; `val_split` is the
    fingerprint of the images that its training held out.

    Args:
        num_outputs: of the classifier that is evaluated; None if it does not say.
        owner: whose outputs they are, for error messages.

    Raises:
        ValueError: no such images, or classes that the classifier does not have.
    """
    settings, trained = data_settings(given), given.val_split
    train: Source | None
    if given.eval:
        if num_outputs is not None and given.nb_classes not in (None, num_outputs):
            raise ValueError(f"--nb_classes {given.nb_classes}, but {owner} has {num_outputs} outputs: omit the option")
        val = _read_val(given, settings)
        given.nb_classes = given.nb_classes or num_outputs or int(val.labels.max()) + 1
        train, val = None, label_as(given.classes, given.nb_classes, val, owner)
    else:
        counts = (given.shapes_train, given.shapes_val)
        train, val = build_splits(given.data_path, counts, val_fraction=given.val_fraction, **settings)
        if given.classes is not None:
            train, val = (match_classes(given.classes, source, "the run") for source in (train, val))
        given.classes = given.classes or class_record(train)
        given.nb_classes = count_classes(train, val, given.nb_classes)
    record_val_split(given, val)
    if given.eval and trained is not None and given.val_split not in (None, trained):
        log.warning("--val_fraction holds out other images than in training: some of them may have been trained on")
    warn_of_range(given, train or val)
    return train, val


def read_pretraining(given: argparse.Namespace) -> tuple[Source, Source | None]:
    """Training images, and with --val_fraction those that are held out. All ranks call it together.

    Resolves `val_split` in place.

    Raises:
        ValueError: no such images.
    """
    settings: dict[str, Any] = {"labels_needed": False, **data_settings(given)}
    train: Source
    val: Source | None = None
    if given.val_fraction is not None:
        train, val = hold_out(given.data_path, given.val_fraction, **settings)
        record_val_split(given, val)
    else:
        given.val_split = None
        train = build_source(given.data_path, "train", shapes_count=given.shapes_train, **settings)
    if given.data_path is not None:  # Shapes have 8 bits
        warn_of_range(given, train)
    return train, val


def record_val_split(given: argparse.Namespace, val: Source | None) -> None:
    """Resolve `val_split`, in place: what --val_fraction holds out."""
    given.val_split = None
    if isinstance(val, Subset):
        given.val_split = fingerprint(val)
        log.info("held out  %s images (--val_fraction %g)", f"{len(val):,}", given.val_fraction)


def data_settings(given: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `build_source` and `build_splits` that follow from the options."""
    return {
        "cache_dir": given.cache_dir,
        "value_range": given.value_range,
        "max_image_pixels": given.max_image_pixels,
        "on_rank_zero": from_rank_zero,
    }


def _read_val(given: argparse.Namespace, settings: dict[str, Any]) -> Source:
    """The val split; a --val_fraction that comes from the checkpoint is for data that have none."""
    if given.val_fraction is not None and given.origins["val_fraction"] == "checkpoint":
        path, cache_dir = given.data_path, given.cache_dir
        if path is None or from_rank_zero(lambda: has_split(path, "val", cache_dir)):
            given.val_fraction = None
    if given.val_fraction is not None:
        return hold_out(given.data_path, given.val_fraction, **settings)[1]
    return build_val(given.data_path, given.shapes_val, **settings)


def warn_of_range(given: argparse.Namespace, source: Source) -> None:
    """Log `check_value_range`. All ranks call it together."""
    if warning := from_rank_zero(lambda: check_value_range(source, given.value_range)):
        log.warning("%s", warning)


def read_knn_splits(given: argparse.Namespace) -> dict[str, Source]:
    """The labelled images of --knn_interval, "train" and "test" (the val split). All ranks call it together.

    Raises:
        ValueError: there are none, or fewer than --knn_k.
    """
    counts = (given.shapes_train, DEFAULT_SIZES["val"])
    path, val_fraction = given.knn_data_path, None
    if path is None:  # the images of the run
        path, val_fraction = given.data_path, given.val_fraction
    try:
        train, val = build_splits(path, counts, val_fraction=val_fraction, **data_settings(given))
        # Labels may start at 1: without votes, class 0 changes nothing.
        count_classes(train, val, needed_outputs(train))
    except ValueError as error:
        if given.knn_data_path is not None:
            raise ValueError(str(error).replace(NO_VAL, "").replace("--data_path", "--knn_data_path")) from error
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


def knn_loaders(
    given: argparse.Namespace, sources: Mapping[str, Source], crop: Callable[[Any], Any], world: World
) -> dict[str, DataLoader]:
    """Batches of "train" and "test". Training images are only neighbours, so unreadable ones are marked."""
    datasets = {"train": MarkUnreadable, "test": ImageDataset}
    return {
        split: evaluation_loader(given, source, crop, world, dataset=datasets[split])
        for split, source in sources.items()
    }


def evaluation_loader(
    given: argparse.Namespace,
    source: Source,
    crop: Callable[[Any], Any],
    world: World,
    batch_size: int | None = None,
    dataset: type[ImageDataset] = ImageDataset,
) -> DataLoader:
    """Batches of this rank's part of the images, each image once over all ranks; of --batch_size by default."""
    sampler = ShardSampler(len(source), batch_size or given.batch_size, world.rank, world.size)
    pin_memory = given.pin_mem and given.device == "cuda"
    return build_loader(dataset(source, crop), sampler, given.num_workers, pin_memory)
