"""Images inside tar archives, read in place by offset."""

import fcntl
import gzip
import hashlib
import logging
import os
import shutil
import tarfile
import time
import zlib
from pathlib import Path, PurePosixPath

from util.data.files import printable, summarize
from util.data.listing import Listing, is_inside, is_skipped_folder, why_skipped

log = logging.getLogger("hpm")

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_OUTSIDE = "links, devices and names that point outside"


def list_archive(path: Path) -> Listing:
    """The images in a plain tar; of a member that occurs several times, the last version, as when it is unpacked.

    Raises:
        ValueError: not a tar archive, or a truncated one.
    """
    listing = Listing(str(path))
    hidden: set[str] = set()
    file_size, logged = path.stat().st_size, time.monotonic()
    try:
        with tarfile.open(path, "r:") as tar:
            for number, member in enumerate(tar):
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
                if time.monotonic() - logged > 10:
                    logged = time.monotonic()
                    log.info("listing %s: %s files", printable(str(path)), f"{number:,}")
                name = str(PurePosixPath(member.name))
                if listing.images.pop(name, None):
                    listing.skipped["earlier versions of a file"] += 1
                extent = (member.offset_data, member.size) if member.isreg() and not member.issparse() else None
                if member.islnk():  # another name of a file before it
                    extent = listing.images.get(str(PurePosixPath(member.linkname)))
                if not is_inside(name) or not (extent or member.isdir()):
                    listing.skipped[_OUTSIDE] += 1
                    continue
                if name == ".":  # the folder that was packed
                    continue
                parts = name.split("/")
                folders = parts if member.isdir() else parts[:-1]
                depth = next((depth for depth, part in enumerate(folders) if is_skipped_folder(part)), None)
                if depth is not None:
                    hidden.add("/".join(parts[: depth + 1]))
                elif member.isdir():
                    listing.folders.add(name)
                elif reason := why_skipped(parts[-1]):
                    listing.skipped[reason] += 1
                elif extent:
                    if sum(extent) > file_size:
                        raise ValueError(f"{path} is truncated: {name} extends past the end of the archive")
                    listing.images[name] = extent
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a readable tar archive: {error}") from error
    if hidden:
        listing.skipped["hidden and tool folders"] += len(hidden)
    return listing


def below_split(listing: Listing, split: str, labels_needed: bool) -> Listing:
    """The part of an archive that is a split: SPLIT/, TOP/SPLIT/, or all of SPLIT.tar; without labels, else all.

    Raises:
        ValueError: no such part.
    """
    tops = sorted({name.split("/")[0] for name in listing.images})
    if split in tops:
        prefix = f"{split}/"
    elif len(tops) == 1 and any(name.startswith(f"{tops[0]}/{split}/") for name in listing.images):
        prefix = f"{tops[0]}/{split}/"
    elif os.path.basename(listing.root) == f"{split}.tar" or (split == "train" and not labels_needed):
        prefix = ""
    else:
        listing.log_skipped()
        found = summarize([printable(top) for top in tops]) or "no images"
        raise ValueError(f"{listing.root}: looked for {split}/CLASS/*.jpg, found {found} at the top level")
    images = {name.removeprefix(prefix): at for name, at in listing.images.items() if name.startswith(prefix)}
    folders = {name.removeprefix(prefix) for name in listing.folders if name.startswith(prefix)}
    return Listing(listing.root, images, folders, listing.skipped)


def decompressed(path: Path, cache_dir: str | None) -> Path:
    """Decompress a .tar.gz into the cache; the first process does it, the others wait for its lock."""
    folder = Path(cache_dir) if cache_dir else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hpm"
    stat = path.stat()
    identity = os.fsencode(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}")
    key = hashlib.sha256(identity).hexdigest()[:16]
    stem = path.name.removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar")
    target = folder / f"{stem}-{key}" / f"{stem}.tar"
    try:
        return _decompress(path, target)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file: {error}") from error
    except OSError as error:
        raise ValueError(
            f"{path} cannot be decompressed into {target.parent} ({error.strerror}): give another --cache_dir"
        ) from error


def _decompress(path: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            log.info("decompressing %s into %s (once)", printable(str(path)), printable(str(target)))
            partial = target.with_suffix(".partial")
            try:
                with gzip.open(path) as packed, open(partial, "wb") as plain:
                    shutil.copyfileobj(packed, plain, 1 << 22)
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
    return target
