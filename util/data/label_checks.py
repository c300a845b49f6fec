"""The checks of a segmentation data set before training: every label map, its size, and the classes they make."""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from util.data.decode import UnreadableImage, own_limits, stored_size
from util.data.files import ImageFiles, summarize
from util.data.segmentation import LabelFormat, SegmentationSource, class_names, find_pairs, read_label

log = logging.getLogger("hpm")

ORIENTATION = "an EXIF orientation is not applied: rotate the stored pixels if label maps are of the rotated view"
MOSTLY_IGNORED = 0.5  # share of the pixels; more than that in label 0 looks like a background class


@dataclass(frozen=True)
class LabelCounts:
    """By the value in the file: pixels (256,), the first file that has it ("" for none), and the first file with each
    colour that palettes give it."""

    pixels: np.ndarray
    first: list[str]
    colours: list[dict[tuple[int, ...], str]]

    def share(self, value: int) -> float:
        return float(self.pixels[value] / self.pixels.sum())


def check_files(source: SegmentationSource) -> LabelCounts:
    """Read every label map and the header of every image. Warns of images with an EXIF orientation.

    Raises:
        ValueError: a label map of another kind, or of another size than its image.
    """

    def count(index: int) -> tuple[np.ndarray, np.ndarray, bool]:
        label, palette = read_label(source.files, source.annotations[index])
        try:
            width, height, is_rotated = stored_size(source.read(index), source.files.max_image_pixels)
        except UnreadableImage as error:
            raise ValueError(f"{source.name(index)} cannot be used: {error}") from error
        if label.shape != (height, width):
            hint = f"; {ORIENTATION}" if is_rotated else ""
            raise ValueError(
                f"{source.files.name(source.annotations[index])} has {label.shape[1]} x {label.shape[0]} pixels, its "
                f"image {source.name(index)} {width} x {height}: they must be equal{hint}"
            )
        return np.bincount(label.ravel(), minlength=256), palette, is_rotated

    pixels, first = np.zeros(256, dtype=np.int64), [""] * 256
    colours: list[dict[tuple[int, ...], str]] = [{} for _ in range(256)]
    rotated: list[str] = []
    with own_limits(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for index, (counts, palette, is_rotated) in enumerate(pool.map(count, range(len(source)))):
            name = source.files.name(source.annotations[index])
            for value in np.flatnonzero((counts > 0) & (pixels == 0)):
                first[value] = name
            for value in np.flatnonzero(counts[: len(palette)]):
                colours[value].setdefault(tuple(palette[value].tolist()), name)
            pixels += counts
            if is_rotated:
                rotated.append(source.name(index))
    if rotated:
        log.warning(
            "%d of %d images are stored rotated, such as %s; %s", len(rotated), len(source), rotated[0], ORIENTATION
        )
    return LabelCounts(pixels, first, colours)


def check_palettes(splits: Sequence[LabelCounts]) -> None:
    """Raises ValueError if an index has different colours in two label maps: it may then be another class in each."""
    for label in range(256):
        files: dict[tuple[int, ...], str] = {}
        for counts in splits:
            files = counts.colours[label] | files
        if len(files) > 1:
            (colour, name), (other_colour, other) = list(files.items())[:2]
            raise ValueError(
                f"{name} and {other} have label {label} in different colours, {colour} and {other_colour}: the indices "
                "count, so store all label maps with one palette, or as class indices without one"
            )


def count_classes(
    splits: Sequence[LabelCounts], names: list[str], num_classes: int | None, form: LabelFormat, trust_zero: bool
) -> int:
    """Number of classes: as given, or of objectInfo*.txt, or up to the largest label.

    Args:
        trust_zero: the user says that label 0 is no class; otherwise too many of them are taken for a mistake.

    Raises:
        ValueError: labels that do not fit it, with a file that has one; fewer than two classes in a split.
    """
    present = {int(value): counts for counts in splits for value in np.flatnonzero(counts.pixels)}
    if form.reduce_zero and 255 in present:
        raise ValueError(
            f"{present[255].first[255]} has label 255, but with --reduce_zero_label the ignored label is 0: if 255 "
            "means no class, give --no-reduce_zero_label, which ignores it (--ignore_index), and if 0 is ignored as "
            "well, write 255 for it; if 255 is a class, as in masks of 0 and 255, write 1 for it and give "
            "--no-reduce_zero_label"
        )
    for counts in splits:
        if form.reduce_zero and not trust_zero and counts.share(0) > MOSTLY_IGNORED:
            raise ValueError(
                f"label 0 has {100 * counts.share(0):.0f} % of the pixels ({counts.first[0]} has it) and would be "
                "ignored: if it is a class such as background, give --no-reduce_zero_label; if not, --reduce_zero_label"
            )
        labels = [value for value in np.flatnonzero(counts.pixels).tolist() if value != form.ignored_label]
        if not labels:
            raise ValueError(
                f"every pixel of the label maps is ignored, such as in {counts.first[form.ignored_label]}: there is "
                "nothing to learn; look at --reduce_zero_label and --ignore_index"
            )
        if len(labels) == 1:
            raise ValueError(
                f"{counts.first[labels[0]]} has label {labels[0]}, which is the only class of its split: two or more "
                "are needed. With --reduce_zero_label 0 is ignored and classes count from 1; with "
                f"--no-reduce_zero_label {form.ignore_index} is ignored (--ignore_index) and classes count from 0; "
                "masks of 0 and 255 need 1 for 255"
            )
    classes = {value - form.reduce_zero: value for value in present if value != form.ignored_label}
    total = num_classes or len(names) or max(classes) + 1
    if form.reduce_zero and form.ignore_index < total:
        raise ValueError(
            f"--ignore_index {form.ignore_index} is a class: with --reduce_zero_label the ignored label 0 becomes that "
            f"value, so it must be {total} or more; omit it"
        )
    if max(classes) >= total:
        value = classes[max(classes)]
        origin = "--num_classes" if num_classes else "objectInfo*.txt"
        raise ValueError(
            f"{present[value].first[value]} has label {value}, which is class {max(classes)} counted from 0, but there "
            f"are {total} classes ({origin}); look at --num_classes and --reduce_zero_label"
        )
    return total


def describe_labels(counts: LabelCounts, names: list[str], form: LabelFormat, most: int = 12) -> str:
    """The histogram of labels in one line: the ignored share, the largest classes, and the classes that are absent."""
    shares = [100 * counts.share(index + form.reduce_zero) for index in range(len(names))]
    short = [name.split(",")[0] for name in names]  # ADE20K's names are lists of synonyms
    largest = sorted(range(len(names)), key=lambda index: -shares[index])[:most]
    parts = [f"ignored {100 * counts.share(form.ignored_label):.1f} %"]
    parts += [f"{short[index]} {shares[index]:.1f} %" for index in largest]
    if len(names) > most:
        parts.append(f"{len(names) - most} more")
    absent = [short[index] for index, share in enumerate(shares) if share == 0]
    return ", ".join(parts) + f"; absent: {summarize(absent, most) or 'no class'}"


def checked_sources(
    files: ImageFiles,
    splits: Sequence[str],
    form: LabelFormat,
    num_classes: int | None,
    *,
    trust_zero: bool,
    on_rank_zero: Callable[[Callable[[], Any]], Any] = lambda compute: compute(),
) -> tuple[dict[str, SegmentationSource], list[str]]:
    """The splits of a data set, with every label map checked, and the names of the classes.

    Args:
        on_rank_zero: runs the checks on rank 0 and broadcasts the result (util.run.distributed.from_rank_zero).

    Raises:
        ValueError: as `find_pairs`, `check_files`, `check_palettes`, `class_names` and `count_classes`.
    """
    sources = {split: find_pairs(files, split, form) for split in splits}
    counts = on_rank_zero(lambda: [check_files(source) for source in sources.values()])
    check_palettes(counts)
    names = on_rank_zero(lambda: class_names(files, form))
    total = count_classes(counts, names, num_classes, form, trust_zero)
    names += [f"class {index}" for index in range(len(names), total)]
    for (split, source), count in zip(sources.items(), counts, strict=True):
        log.info("data      %s: %s images; %s", split, f"{len(source):,}", describe_labels(count, names, form))
    return sources, names[:total]
