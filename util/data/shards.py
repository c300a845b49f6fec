"""WebDataset archives: samples of files with a common key, KEY.jpg with its label in KEY.cls or KEY.json.

The order is that of the shards, and of the images in them (of an image that was replaced, the first version's). As in
WebDataset, the key of a file is its path up to the first dot of its name. A name with more dots belongs to the sample
of that key if this has an image of its own (KEY.mask.png next to KEY.jpg), else it is a sample itself (a.1.jpg with
a.1.cls).
"""

import logging
import time
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from util.data.archives import list_archive
from util.data.files import ImageFiles, SeveralFiles, pack, printable, summarize
from util.data.listing import IMAGE_SUFFIXES, LARGEST_LABEL, Listing, class_names, names_of_numbers

log = logging.getLogger("hpm")

_THREADS = 16  # archives listed at a time: on a network file system, reading a header is mostly waiting


def is_webdataset(listing: Listing, numbered: bool) -> bool:
    """Whether an archive holds labels of its own; .json files next to images in folders may be something else, unless
    the archive is numbered, as shards are, and most images have one."""
    in_folders = any("/" in name for name in listing.images)
    labels = {name: label for name, label in listing.labels.items() if name.endswith(".cls") or not in_folders}
    if labels and any(_label_of(name, labels) is not None for name in listing.images):
        return True
    return numbered and bool(_labels_of_most(listing))


def reject_contradictions(listing: Listing) -> None:
    """Raises ValueError if most images in class folders have labels of their own that make other classes."""
    labels = _labels_of_most(listing)
    folders = {name: name.split("/")[0] for name in labels}
    pairs = {(folders[name], label) for name, label in labels.items()}
    if len(pairs) > min(len(set(folders.values())), len(set(labels.values()))):
        name, label = next(iter(labels.items()))
        tops = summarize([printable(folder) for folder in sorted(set(folders.values()))])
        raise ValueError(
            f"{printable(listing.root)}: the images are in class folders ({tops}), and have other labels in .json "
            f"files, such as {label!r} of {printable(name)}: to use those, name the archive as a shard "
            "(train-000000.tar); to use the folders, remove them (tar --delete --wildcards '*.json' -f ARCHIVE)"
        )


def _labels_of_most(listing: Listing) -> dict[str, str]:
    """The label of each image that has one in a file of its key; {} if most have none."""
    found = {name: _label_of(name, listing.labels) for name in listing.images} if listing.labels else {}
    labels = {name: label for name, label in found.items() if label is not None}
    return labels if 2 * len(labels) > len(listing.images) else {}


def _split_name(name: str) -> tuple[str, str]:
    """A path -> (key, rest of the file's name, from the first dot on)."""
    folder, slash, file = name.rpartition("/")
    key, dot, rest = file.partition(".")
    return folder + slash + key, dot + rest


def _label_of(name: str, labels: dict[str, str]) -> str | None:
    for stem in dict.fromkeys([name.rpartition(".")[0], _split_name(name)[0]]):
        for suffix in (".cls", ".json"):
            if stem + suffix in labels:
                return labels[stem + suffix]
    return None


def _choose_images(listing: Listing) -> list[str]:
    """One image per sample; of KEY.jpg and KEY.png the one whose extension comes first in `IMAGE_SUFFIXES`."""
    best: dict[str, tuple[int, str]] = {}
    for name in listing.images:
        key, rest = _split_name(name)
        if rest.lower() in IMAGE_SUFFIXES:
            candidate = (IMAGE_SUFFIXES.index(rest.lower()), name)
            best[key] = min(best.get(key, candidate), candidate)
    chosen = []
    for name in listing.images:
        key, _ = _split_name(name)
        stem = name.rpartition(".")[0]
        own = stem != key and (key not in best or any(stem + suffix in listing.labels for suffix in (".cls", ".json")))
        if own or best.get(key, (0, ""))[1] == name:
            chosen.append(name)
    return chosen


def read_samples(listings: Sequence[Listing], labels_needed: bool) -> ImageFiles | SeveralFiles:
    """The samples of WebDataset archives. Labels are numbers, or all names of classes.

    Without `labels_needed`, samples may lack labels, and there are no classes; labels are then numbers of groups.

    Raises:
        ValueError: no images, or with `labels_needed` one without a label, or numbers among names.
    """
    parts, names, texts = [], [], []
    for listing in listings:
        chosen = _choose_images(listing)
        if more := len(listing.images) - len(chosen):
            listing.skipped["further images of a sample"] += more
        listing.log_skipped()
        names += chosen
        texts += [_label_of(name, listing.labels) for name in chosen]
        extents = np.array([listing.images[name] for name in chosen], dtype=np.int64).reshape(-1, 2)
        parts.append(ImageFiles(listing.root, pack(chosen), np.zeros(len(chosen), dtype=np.int64), [], extents))
    roots = summarize([printable(listing.root) for listing in listings], most=1)
    if not names:
        raise ValueError(f"{roots}: no images ({', '.join(IMAGE_SUFFIXES)})")
    owner = SeveralFiles(parts)
    classes: list[str] = []
    numbered = False
    if not labels_needed:
        groups = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        labels = [groups[text] for text in texts]
    else:
        labels, classes, numbered = _to_classes(owner, names, texts)
    array = np.array(labels, dtype=np.int64)
    if len(parts) == 1:
        only = parts[0]
        return ImageFiles(only.root, only.names, array, classes, only.extents, numbered)
    return SeveralFiles(parts, array, classes, numbered)


def _to_classes(owner: SeveralFiles, names: list[str], texts: list[str | None]) -> tuple[list[int], list[str], bool]:
    """Labels, names of the classes, and whether the labels are numbers that the data set gives."""
    missing = [index for index, text in enumerate(texts) if text is None or text.startswith("-")]
    if missing:
        index = missing[0]
        stem = printable(_split_name(names[index])[0])
        raise ValueError(
            f"{owner.name(index)} has no label: expected {stem}.cls (a number from 0 or a name), or {stem}.json with "
            f"`label` or `cls`. {len(missing):,} of {len(names):,} images have none; only pre-training needs none"
        )
    given = [text or "" for text in texts]
    numbers = [text.isascii() and text.isdecimal() for text in given]
    if all(numbers):
        labels = [int(text) for text in given]
        if max(labels) > LARGEST_LABEL:
            index = int(np.argmax(labels))
            raise ValueError(f"{owner.name(index)} has the label {labels[index]}: expected numbers of classes, from 0")
        return labels, names_of_numbers(names, labels), True
    if any(numbers):
        number, name = numbers.index(True), numbers.index(False)
        raise ValueError(
            f"{owner.name(number)} has the label {given[number]!r} and {owner.name(name)} {given[name]!r}: expected "
            "numbers only, or names only"
        )
    normal = [unicodedata.normalize("NFC", text) for text in given]
    classes = sorted(set(normal))
    position = {text: label for label, text in enumerate(classes)}
    return [position[text] for text in normal], class_names(classes), False


def list_shards(files: Sequence[Path], cache_dir: str | None) -> list[Listing]:
    """The listings of many archives, in their order."""
    listings, logged = [], time.monotonic()
    with ThreadPoolExecutor(min(_THREADS, len(files))) as pool:
        for listing in pool.map(partial(list_archive, cache_dir=cache_dir, shards=len(files)), files):
            listings.append(listing)
            if time.monotonic() - logged > 10:
                logged = time.monotonic()
                log.info("listed %d of %d archives", len(listings), len(files))
    return listings
