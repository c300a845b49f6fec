"""Class identity: labels are matched by name, or by number where the data set gives numbers (list files, .cls files).

A record of classes is {"names": names of the model's outputs, "numbered": whether the data set gives numbers}; it is
kept in checkpoints.
"""

import copy
import dataclasses
import logging
import re
import unicodedata
from collections.abc import Iterable
from typing import Any, Protocol, TypeVar

import numpy as np
from timm.data import ImageNetInfo

from util.data.files import summarize

log = logging.getLogger("hpm")


class Labelled(Protocol):
    @property
    def labels(self) -> np.ndarray: ...

    @property
    def classes(self) -> list[str]: ...


L = TypeVar("L", bound=Labelled)


def class_record(source: Labelled) -> dict[str, Any]:
    return {"names": list(source.classes), "numbered": getattr(source, "numbered", False)}


def imagenet_record(num_classes: int, source: Labelled) -> dict[str, Any] | None:
    """The record of a model of ImageNet's classes that does not store them as the images name them: by their WordNet
    ids, as ImageNet's folders, or all of them in words. None if it does not have 1,000 outputs, or for other names.

    MAE's, timm's and Hugging Face's classifiers have ImageNet's classes in the order of their WordNet ids.
    """
    names = [name for name in source.classes if name]
    if num_classes != 1000 or not names:
        return None
    if all(re.fullmatch(r"n\d{8}", name) for name in names):
        return {"names": ImageNetInfo("imagenet-1k").label_names(), "numbered": False}
    return class_record(source) if in_words(source.classes) else None


def in_words(names: list[str]) -> bool:
    """Whether these are ImageNet's classes in words ("tench, Tinca tinca") and in the order of their WordNet ids: at
    least most of them, since spellings differ."""
    if len(names) != 1000:
        return False
    info = ImageNetInfo("imagenet-1k")
    words = [info.label_name_to_description(name) for name in info.label_names()]
    return sum(name == word for name, word in zip(names, words, strict=True)) > 500


def as_named(record: dict[str, Any] | None, num_classes: int, source: Labelled) -> dict[str, Any] | None:
    """The record of a model's classes, with ImageNet's as the images name them; None if they must be matched by
    position."""
    if record is None or in_words(record["names"]):
        return imagenet_record(num_classes, source) or (record if any(source.classes) else None)
    return record


def match_classes(record: dict[str, Any], source: L, owner: str = "the model") -> L:
    """The same images, labelled with the outputs of a model. They may be of some of its classes only.

    Args:
        record: of the model's outputs (`class_record` of what it is or was trained on).
        owner: whose classes they are, for error messages.

    Raises:
        ValueError: classes that the model does not have, or names on one side and numbers on the other.
    """
    names, theirs = record["names"], source.classes
    if not (names and theirs):
        if record["numbered"] and getattr(source, "numbered", False):
            return source
        if not names and not theirs:
            return source
        kinds = ("class names", "numbers without names")
        ours, others = kinds if names else kinds[::-1]
        raise ValueError(
            f"{owner} has {ours}, the images have {others}: labels cannot be matched; use class folders, or names as "
            "labels, or the same numbers for both"
        )
    number = {name: label for label, name in enumerate(names) if name}
    unknown = sorted(name for name in theirs if name and name not in number)
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(theirs)} classes are unknown to {owner}: {_spell(unknown, number)}. "
            f"{owner} has {len(number)} classes: {_spell(sorted(number), unknown)}"
        )
    if theirs == names:
        return source
    table = np.array([number.get(name, -1) for name in theirs], dtype=np.int64)
    labels = table[source.labels]
    if dataclasses.is_dataclass(source):
        return dataclasses.replace(source, labels=labels, classes=names)  # type: ignore[return-value, type-var]
    relabelled = copy.copy(source)
    relabelled.labels, relabelled.classes = labels, names  # type: ignore[misc]
    return relabelled


def label_as(record: dict[str, Any] | None, num_classes: int, source: L, owner: str) -> L:
    """`match_classes` for a model that may store no classes: ImageNet's by their WordNet ids, others by position.

    Raises:
        ValueError: classes or labels that the model does not have, or it has one output.
    """
    if num_classes < 2:
        raise ValueError(
            f"{owner} has one output, so any prediction would be right: evaluate one of two classes or more"
        )
    record = as_named(record, num_classes, source)
    named = sum(bool(name) for name in source.classes)
    if record is not None:
        source = match_classes(record, source, owner)
    elif named not in (0, num_classes):
        raise ValueError(
            f"{owner} has {num_classes} outputs but no class names, and the images have {named} classes: which of "
            "the outputs they are is unknown; evaluate on images of all its classes"
        )
    if int(source.labels.max()) >= num_classes:
        raise ValueError(f"{owner} has {num_classes} outputs, the images have labels up to {int(source.labels.max())}")
    if record is None:
        log.info("classes   labels are compared with the outputs of %s by position", owner)
    return source


def _spell(names: list[str], others: Iterable[str]) -> str:
    """Names in quotes; those that look like one of the others with every character escaped that is not ASCII."""
    twins = {_look(other) for other in others}
    return summarize([ascii(name) if _look(name) in twins else repr(name) for name in names])


def _look(name: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if c.isalnum())


def needed_outputs(train: Labelled) -> int:
    """Number of outputs of a classifier of these images, at least."""
    return max(int(train.labels.max()) + 1, len(train.classes))


def reject_single_class(train: Labelled) -> None:
    """Raises ValueError if all training images have the same label: any prediction would be right."""
    if len(np.unique(train.labels)) < 2:
        label = int(train.labels[0])
        name = repr(train.classes[label]) if train.classes else label
        raise ValueError(
            f"all training images have the class {name}, so any prediction would be right: expected two classes or "
            "more, as one folder per class (train/CLASS/*.jpg) or as labels"
        )


def count_classes(train: Labelled, val: Labelled, nb_classes: int | None) -> int:
    """Number of outputs of a classifier: `nb_classes`, or the number of classes of the training images.

    Raises:
        ValueError: one class, more than `nb_classes`, labels that start at 1, or labels of val that train lacks.
    """
    reject_single_class(train)
    needed = needed_outputs(train)
    if getattr(train, "numbered", False) and train.labels.min() == 1 and (nb_classes or 0) < needed:
        raise ValueError(
            f"the training labels are numbers from 1 to {needed - 1}, expected from 0: subtract 1 in both splits, "
            f"or give --nb_classes {needed} for an unused output 0"
        )
    if nb_classes is not None and nb_classes < needed:
        raise ValueError(f"--nb_classes {nb_classes}, but the data have {needed} classes: omit the option")
    outputs = nb_classes or needed
    if val.labels.max() >= outputs:
        raise ValueError(
            f"val has label {val.labels.max()}, but the training labels end at {train.labels.max()}: both splits "
            "must use the same numbers"
        )
    if outputs > needed:
        log.info("--nb_classes %d: %d outputs have no images in the data", outputs, outputs - needed)
    return outputs
