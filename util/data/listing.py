"""Which files below a folder are images, with the same rules for folders, archives and list files."""

import codecs
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from util.data.files import ImageFiles, pack, printable, summarize
from util.data.split_names import is_like_split

log = logging.getLogger("hpm")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

LARGEST_LABEL = 10_000_000  # larger numbers are rejected as labels

# Folders of archivers, network drives and desktops.
TOOL_FOLDERS = (
    *("__macosx", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin"),
    *("lost+found", "system volume information", "__pycache__"),
)


@dataclass
class Listing:
    """The images below a folder or in an archive.

    Attributes:
        root: the folder or the archive.
        images: path relative to the root -> offset and size in the archive; None in a folder.
        folders: paths of folders, as far as they are known.
        labels: in an archive, path of a .cls or .json file -> the label that it holds (shards.py).
        skipped: number of skipped files and folders, by reason.
    """

    root: str
    images: dict[str, tuple[int, int] | None] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    labels: dict[str, str] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)

    def log_skipped(self) -> None:
        if self.skipped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.skipped.items()))
            log.info("%s: skipped %s", printable(self.root), reasons)


def is_skipped_folder(name: str) -> bool:
    return name.startswith(".") or name.lower() in TOOL_FOLDERS


def why_skipped(name: str) -> str | None:
    """Why a file is not one of the images; None if it is."""
    if name.startswith("."):
        return "hidden files"
    return None if name.lower().endswith(IMAGE_SUFFIXES) else "files without an image extension"


def is_inside(name: str) -> bool:
    return not name.startswith("/") and ".." not in name.split("/")


def contents(folder: Path) -> str:
    names = sorted(printable(f"{entry.name}/" if entry.is_dir() else entry.name) for entry in folder.iterdir())
    return summarize(names) or "an empty folder"


def list_folder(root: Path) -> Listing:
    """The images below a folder at any depth. Links are followed, but each real folder is listed once.

    Raises:
        ValueError: a folder that cannot be read.
    """
    listing = Listing(str(root))
    real_root = os.path.realpath(root)
    seen = {_identity(real_root)}
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            entries = sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name)
        except OSError as error:
            raise ValueError(f"{printable(os.path.join(root, folder))} cannot be read: {error.strerror}") from error
        for entry in entries:
            name = folder + entry.name
            if _is_folder(entry):
                if is_skipped_folder(entry.name):
                    listing.skipped["hidden and tool folders"] += 1
                    continue
                identity = _identity(entry.path)
                if identity in seen or (entry.is_symlink() and _is_listed(os.path.realpath(entry.path), real_root)):
                    listing.skipped["links to folders that are listed elsewhere"] += 1
                    continue
                seen.add(identity)
                listing.folders.add(name)
                waiting.append(f"{name}/")
            elif reason := why_skipped(entry.name):
                listing.skipped["broken links" if not os.path.exists(entry.path) else reason] += 1
            else:
                listing.images[name] = None
    return listing


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except PermissionError as error:  # a link into a folder of somebody else
        raise ValueError(f"{printable(entry.path)} cannot be read: {error.strerror}") from error
    except OSError:  # a link to itself
        return False


def _is_listed(target: str, root: str) -> bool:
    """Whether a link leads to what is listed anyway, or upwards; what lies in a skipped folder is not."""
    parts = target.removeprefix(root).split("/")
    return overlaps(target, root) and not (target.startswith(f"{root}/") and any(map(is_skipped_folder, parts)))


def _identity(path: str) -> tuple[int, int | str]:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino or path  # some network file systems have no inode numbers


def overlaps(path: str, root: str) -> bool:
    """Whether one of two real paths is the other or lies below it."""
    return f"{path}/".startswith(f"{root}/") or f"{root}/".startswith(f"{path}/")


def by_parts(name: str) -> list[str]:
    """Sort key, by class and then by file: as plain strings, cat-2/a sorts before cat/a."""
    return name.split("/")


def to_files(listing: Listing, labels_needed: bool = True, name: str = "") -> ImageFiles:
    """The images of a listing. The first folder of each path is its class; without `labels_needed`, all labels are 0.

    Args:
        name: the split, for error messages.

    Raises:
        ValueError: no images, or without a class; a class without images; folders that are no classes.
    """
    images, classes = dict(listing.images), [""]
    if labels_needed:
        images = {path: extent for path, extent in images.items() if "/" in path}
        classes = sorted({path.split("/")[0] for path in images})
        outside = len(listing.images) - len(images)
        if outside and images:
            listing.skipped["images outside class folders"] += outside
    if listing.labels:  # label files of an archive that is not read as WebDataset
        listing.skipped["label files (.cls, .json)"] += len(listing.labels)
    listing.log_skipped()
    if labels_needed:
        empty = sorted({path.split("/")[0] for path in listing.folders} - set(classes))
        if empty and (classes or not outside):
            raise ValueError(
                f"{printable(os.path.join(listing.root, empty[0]))} contains no images ({', '.join(IMAGE_SUFFIXES)}): "
                "add some or remove the folder"
            )
        if not images:
            found = f"{outside:,} images" if outside else "no images"
            raise ValueError(
                f"{printable(listing.root)} has no class folders: looked for {name}/CLASS/*.jpg, found {found}; move "
                f"the images into one folder per class, or list them in {name}.txt next to it (RELATIVE/PATH LABEL)"
            )
    elif not images:
        raise ValueError(f"{printable(listing.root)} contains no images ({', '.join(IMAGE_SUFFIXES)})")
    if labels_needed:
        _check_classes(printable(listing.root), images, classes)
    elif name == "train":
        tops = {path.split("/")[0] for path in images if "/" in path}
        if like := sorted(printable(top) for top in tops if is_like_split(top)):
            log.warning(
                "all folders of %s are used, also those that are spelled like splits (%s): rename one to train/ to "
                "train on it alone",
                printable(listing.root),
                summarize(like),
            )
    names = sorted(images, key=by_parts)
    number = {folder: label for label, folder in enumerate(classes)}
    labels = [number[path.split("/")[0]] if labels_needed else 0 for path in names]
    extents = [images[path] for path in names]
    return ImageFiles(
        root=listing.root,
        names=pack(names),
        labels=np.array(labels, dtype=np.int64),
        classes=class_names(classes) if labels_needed else [],
        extents=None if None in extents else np.array(extents, dtype=np.int64),
    )


def _check_classes(root: str, images: Iterable[str], classes: list[str]) -> None:
    """Warn if class folders may be something else, with the classes below them.

    Raises:
        ValueError: they are.
    """
    if len(like := [printable(folder) for folder in classes if is_like_split(folder)]) > 1:
        raise ValueError(
            f"{root} has class folders that are spelled like splits ({summarize(like)}): rename them to train/ and val/"
        )
    folders: dict[str, set[str]] = {name: set() for name in classes}
    for path in images:
        top, *below = path.split("/")
        if len(below) < 2:
            return
        folders[top].add(below[0])
    same = sorted(printable(folder) for folder in folders[classes[0]])
    if len(same) < 2 or any(found != folders[classes[0]] for found in folders.values()):
        return
    if len(classes) == 1:
        top = printable(classes[0])
        raise ValueError(
            f"{root} has one class folder, {top}, and no images in it but in its folders "
            f"({summarize([f'{top}/{folder}' for folder in same])}): give the folder, or pack the archive, so that the "
            "classes come first"
        )
    tops = summarize([printable(name) for name in classes])
    log.warning("%s: the classes are %s, and all have the same folders (%s)", root, tops, summarize(same))


def from_list_file(root: Path, list_file: Path, labels_needed: bool = True) -> ImageFiles:
    """Official list files: one image per line, `RELATIVE/PATH LABEL`, relative to the split's folder.

    If each label belongs to one folder and each folder to one label, the folders name the labels.

    Raises:
        ValueError: a line that is not of this form, a path that points outside, an image with two labels, or no images.
    """
    names, labels = [], []
    label_of: dict[str, int] = {}
    for number, line in enumerate(_read_text(list_file).split("\n"), start=1):
        if not line.strip():
            continue
        name, _, label = line.rstrip().rpartition(" ")
        if not labels_needed and not (name and label.isdecimal()):
            name, label = line.rstrip(), "0"
        if not name or not label.isdecimal():
            raise ValueError(f"{list_file}, line {number}: expected 'RELATIVE/PATH LABEL', found {line[:80]!r}")
        if not is_inside(name):
            raise ValueError(f"{list_file}, line {number}: {name!r} points outside {root}")
        if int(label) > LARGEST_LABEL:
            raise ValueError(f"{list_file}, line {number}: label {label} is too large to be the number of a class")
        earlier = label_of.setdefault(name, int(label))
        if labels_needed and earlier != int(label):
            raise ValueError(
                f"{list_file}, line {number}: {name!r} has the label {label}, and {earlier} in an earlier line: "
                "expected one label for each image"
            )
        names.append(name)
        labels.append(int(label))
    if more := len(names) - len(label_of):
        repeated = next(name for name, count in Counter(names).items() if count > 1)
        message = "%s lists %d of %d images again, the first is %s: they count more often"
        log.warning(message, list_file, more, len(names), printable(repeated))
    if not names:
        raise ValueError(f"{list_file} lists no images; expected one 'RELATIVE/PATH LABEL' per line")
    if not (root / names[0]).is_file():
        raise ValueError(f"{list_file} lists {names[0]!r}, but {printable(str(root / names[0]))} does not exist")
    numbers = np.array(labels, dtype=np.int64)
    return ImageFiles(str(root), pack(names), numbers, names_of_numbers(names, labels), numbered=True)


def names_of_numbers(paths: list[str], labels: list[int]) -> list[str]:
    """Names of the classes 0, 1, ...: the first folder of the images of each; [] unless they correspond one to one."""
    pairs = {(path.split("/")[0] if "/" in path else "", label) for path, label in zip(paths, labels, strict=True)}
    folders = {label: folder for folder, label in pairs}
    if not len(pairs) == len(folders) == len({folder for folder, _ in pairs}) or "" in folders.values():
        return []
    return class_names([folders.get(label, "") for label in range(max(labels) + 1)])


def _read_text(path: Path) -> str:
    """Text of a list file without byte order mark; bytes that are not UTF-8 survive, as in file names.

    Raises:
        ValueError: damaged UTF-16.
    """
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return data.decode("utf-16")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} cannot be read as UTF-16 ({error.reason}): save it as UTF-8") from error
    return os.fsdecode(data.removeprefix(codecs.BOM_UTF8)).replace("\r\n", "\n")


def class_names(folders: list[str]) -> list[str]:
    """Names of classes: Unicode-normalised (NFC), so that they agree between systems, and printable.

    Raises:
        ValueError: two folders have the same name once normalised.
    """
    names = [printable(unicodedata.normalize("NFC", folder)) for folder in folders]
    first: dict[str, str] = {}
    for name, folder in zip(names, folders, strict=True):
        if name and first.setdefault(name, folder) != folder:
            raise ValueError(f"two classes have the same name in different Unicode forms: {first[name]!a}, {folder!a}")
    return names
