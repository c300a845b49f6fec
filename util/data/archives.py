"""Images inside tar archives, read in place by offset."""

import fcntl
import gzip
import hashlib
import logging
import os
import shutil
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from util.data.files import ImageFiles, by_parts, is_image, is_inside, pack, summarize

log = logging.getLogger("hpm")

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz")


def from_archive(path: Path, split: str | None, cache_dir: str | None) -> ImageFiles:
    if not path.name.endswith(ARCHIVE_SUFFIXES):
        raise ValueError(f"{path} is neither a folder nor an archive ({', '.join(ARCHIVE_SUFFIXES)})")
    if not path.name.endswith(".tar"):
        path = decompressed(path, cache_dir)
    members = list(_members(path))
    if split is not None:
        members = _below_split(path, members, split)
    members.sort(key=lambda member: by_parts(member[0]))
    folders = [name.split("/")[0] if "/" in name else "" for name, _, _ in members]
    classes = sorted(set(folders))
    number = {folder: label for label, folder in enumerate(classes)}
    return ImageFiles(
        root=str(path),
        names=pack([name for name, _, _ in members]),
        labels=np.array([number[folder] for folder in folders], dtype=np.int64),
        classes=classes,
        extents=np.array([extent for _, *extent in members], dtype=np.int64),
    )


def _members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each image of a plain tar. Links, devices and names that point outside are skipped."""
    file_size, skipped, logged = path.stat().st_size, 0, time.monotonic()
    try:
        with tarfile.open(path, "r:") as tar:
            for number, member in enumerate(tar):
                tar.members.clear()  # tarfile keeps every header otherwise
                if time.monotonic() - logged > 10:
                    logged = time.monotonic()
                    log.info("listing %s: %s files", path, f"{number:,}")
                name = str(PurePosixPath(member.name))
                if not is_inside(name) or not (member.isreg() or member.isdir()) or member.issparse():
                    skipped += 1
                elif member.isreg() and is_image(name):
                    if member.offset_data + member.size > file_size:
                        raise ValueError(f"{path} is truncated: {name} extends past the end of the archive")
                    yield name, member.offset_data, member.size
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a readable tar archive: {error}") from error
    if skipped:
        log.warning("%s: skipped %d links, devices and names that point outside", path, skipped)


def _below_split(path: Path, members: list[tuple[str, int, int]], split: str) -> list[tuple[str, int, int]]:
    """Members of a split as CLASS/*: from SPLIT/CLASS/*, TOP/SPLIT/CLASS/*, or CLASS/* in SPLIT.tar."""
    tops = sorted({name.split("/")[0] for name, _, _ in members})
    if split in tops:
        prefix = f"{split}/"
    elif len(tops) == 1 and any(name.startswith(f"{tops[0]}/{split}/") for name, _, _ in members):
        prefix = f"{tops[0]}/{split}/"
    elif path.name == f"{split}.tar" and members:
        prefix = ""
    else:
        found = summarize(tops) or "no images"
        raise ValueError(f"{path}: looked for {split}/CLASS/*.jpg, found {found} at the top level")
    below = [(name.removeprefix(prefix), *extent) for name, *extent in members if name.startswith(prefix)]
    for name, *_ in below:
        if "/" not in name:
            raise ValueError(f"{path}: {prefix}{name} is not in a class folder; expected {split}/CLASS/*.jpg")
    return below


def decompressed(path: Path, cache_dir: str | None) -> Path:
    """Decompress a .tar.gz into the cache; the first process does it, the others wait for its lock."""
    folder = Path(cache_dir) if cache_dir else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hpm"
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    stem = path.name.removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar")
    target = folder / f"{stem}-{key}" / f"{stem}.tar"
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            log.info("decompressing %s into %s (once)", path, target)
            partial = target.with_suffix(".partial")
            try:
                with gzip.open(path) as packed, open(partial, "wb") as plain:
                    shutil.copyfileobj(packed, plain, 1 << 22)
                partial.replace(target)
            except (gzip.BadGzipFile, EOFError) as error:
                raise ValueError(f"{path} is not a complete gzip file: {error}") from error
            finally:
                partial.unlink(missing_ok=True)
    return target


def compressed_archive(path: Path, split: str) -> Path | None:
    """The archive that must be decompressed to read a split, or None."""
    if path.is_file():
        return path if path.name.endswith((".tar.gz", ".tgz")) else None
    if (path / f"{split}.txt").is_file() or (path / f"{split}.tar").is_file():
        return None
    return next((path / f"{split}{s}" for s in (".tar.gz", ".tgz") if (path / f"{split}{s}").is_file()), None)
