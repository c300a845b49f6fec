"""Names of splits, and the numbered files of one: train-000000.tar, val-00000-of-00004.parquet."""

import logging
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from util.data.files import summarize

log = logging.getLogger("hpm")

SHARD_SUFFIXES = (".tar", ".parquet")
COMPRESSED = (".tar.gz", ".tgz")

_ALIASES = {"val": ("val", "validation", "valid")}
_SPELLINGS = re.compile(r"(train|val|valid|validation|test)(ing)?([ _-]?(set|data|images))?", re.IGNORECASE)
_NUMBERED = re.compile(r"(.*?)(\d+)(?:-of-(\d+))?(?:-[0-9a-f]{16})?")  # the Hugging Face Hub appends hashes
_MOST = 1_000_000  # names from a pattern


class NoSuchSplit(ValueError):
    """The data set has no such split."""


def names_of(split: str) -> tuple[str, ...]:
    """The names that the folders and files of a split can have."""
    return _ALIASES.get(split, (split,))


ALL_NAMES = {name for split in ("train", "val", "test") for name in names_of(split)}


def has_word(name: str, split: str) -> bool:
    """Whether a name has that of a split as a word."""
    return any(word in names_of(split) for word in re.split(r"[^a-z]+", name.lower()))


def is_like_split(folder: str) -> bool:
    """Whether the name of a folder is that of a split in another spelling, such as Training or test_set."""
    return _SPELLINGS.fullmatch(folder) is not None


def is_named(path: Path, split: str) -> bool:
    """Whether a file's name has that of a split as a word; if it names none, whether its folder is named so."""
    if any(has_word(path.stem, other) for other in ("train", "val", "test", split)):
        return has_word(path.stem, split)
    return path.parent.name in names_of(split)


def of_split(files: list[Path], split: str, whole: bool) -> list[Path]:
    """The shards of a split, by their names, or if those say nothing by words in the names of several folders; with
    `whole`, shards whose names say nothing are the "train" split.

    Raises:
        NoSuchSplit: none.
        ValueError: names that say nothing or two splits, or a file that is there twice.
    """
    known = {"train", "val", "test", split}
    splits = {file: [name for name in known if is_named(file, name)] for file in files}
    if len({file.parent for file in files}) > 1:  # imagenet_train/, imagenet_val/
        splits |= {f: [n for n in known if has_word(f.parent.name, n)] for f, found in splits.items() if not found}
    if len(splits) < len(files):
        twice = next(file for number, file in enumerate(files) if file in files[:number])
        raise ValueError(f"--data_path names {twice} twice, so its images would be used twice")
    named = [file for file in files if splits[file]]
    if not named and whole and split == "train":
        return files
    wrong = [str(file) for file in files if len(splits[file]) != 1]
    if wrong and named:
        raise ValueError(f"which split is {summarize(wrong)}? A name must contain either train or val")
    chosen = [file for file in files if split in splits[file]]
    if not chosen:
        names = summarize(["/".join(file.parts[-2:]) for file in files])
        raise NoSuchSplit(f"--data_path: none of {names} has {split} in its name, as in {split}-000000.tar")
    return chosen


def is_numbered(file: Path) -> bool:
    return file.suffix in SHARD_SUFFIXES and _NUMBERED.fullmatch(file.stem) is not None


def numbered_sets(files: Iterable[Path]) -> list[list[Path]]:
    """Numbered files, grouped by what surrounds the number, in the order of the numbers.

    Raises:
        ValueError: two files with the same number.
    """
    sets: dict[tuple[str, str, str], dict[int, Path]] = {}
    for file in sorted(files):
        if (match := _NUMBERED.fullmatch(file.stem)) and file.suffix in SHARD_SUFFIXES:
            prefix, number, total = match.groups()
            group = sets.setdefault((prefix, total or "", file.suffix), {})
            if int(number) in group:
                other = group[int(number)].name
                raise ValueError(f"{file.parent} contains both {other} and {file.name}: move one of them elsewhere")
            group[int(number)] = file
    return [[group[number] for number in sorted(group)] for group in sets.values()]


def warn_of_classes(train: str, others: list[str]) -> None:
    """What is named "train" may be a class, as in CIFAR-100, and the images next to it the others."""
    if others:
        log.warning("images come from %s alone; folders next to it hold some, too: %s", train, summarize(others))


def warn_of_gaps(files: list[Path]) -> None:
    """Warn of missing numbers among numbered files."""
    found = [(int(match[2]), match[3]) for file in files if (match := _NUMBERED.fullmatch(file.stem))]
    if len(found) < 2:
        return
    numbers, total = [number for number, _ in found], found[0][1]
    first, end = (0, int(total)) if total else (min(1, *numbers), max(numbers))
    present = {number for number in numbers if first <= number < end}
    count = end - first - len(present)
    if count:  # dates have gaps of millions
        shown = [str(number) for number in islice((n for n in range(first, end) if n not in present), 6)]
        missing = summarize(shown, count=count)
        log.warning("%s and %d others: numbers %s are missing", files[0], len(files) - 1, missing)


def warn_of_packed(folder: Path) -> None:
    """Warn of compressed archives next to shards."""
    packed = sorted(path.name for path in folder.iterdir() if path.name.endswith((*COMPRESSED, ".zip")))
    if packed:
        log.warning("%s: shards must be .tar files; these are not used: %s", folder, summarize(packed))


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern stands for, as in a shell: a{b,c} and a{000..123}, also nested.

    Raises:
        ValueError: a brace that is not closed, or too many names.
    """
    start = pattern.find("{")
    if start < 0:
        return [pattern]
    depth, cuts, end = 0, [start], None
    for place, character in enumerate(pattern[start:], start):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            end = place
            break
        if character == "," and depth == 1:
            cuts.append(place)
    if end is None:
        raise ValueError(f"--data_path {pattern}: a brace is not closed")
    parts = [pattern[a + 1 : b] for a, b in zip(cuts, [*cuts[1:], end], strict=True)]
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", parts[0]) if len(parts) == 1 else None:
        first, last = (int(number) for number in match.groups())
        width = max(map(len, match.groups())) if any(re.match("0.", number) for number in match.groups()) else 0
        if abs(last - first) >= _MOST:
            raise ValueError(f"--data_path {pattern} stands for more than {_MOST:,} names")
        step = 1 if last >= first else -1
        choices = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    elif len(parts) == 1:
        raise ValueError(f"--data_path {pattern}: expected {{000..123}} or {{a,b}}, found {{{parts[0]}}}")
    else:
        choices = [choice for part in parts for choice in expand_braces(part)]
    ends = expand_braces(pattern[end + 1 :])
    if len(choices) * len(ends) > _MOST:
        raise ValueError(f"--data_path {pattern} stands for more than {_MOST:,} names")
    return [pattern[:start] + choice + rest for choice in choices for rest in ends]
