"""Images inside tar archives, read in place by offset."""

import fcntl
import gzip
import hashlib
import json
import logging
import os
import shutil
import socket
import tarfile
import time
import zlib
from pathlib import Path, PurePosixPath

from util.data.files import printable, summarize
from util.data.listing import Listing, is_inside, is_skipped_folder, why_skipped
from util.data.listing_cache import FEWEST, cache_folder, identity_of, read_listing, write_listing
from util.data.split_names import ALL_NAMES, COMPRESSED, NoSuchSplit, is_named, names_of, warn_of_classes

log = logging.getLogger("hpm")

ARCHIVE_SUFFIXES = (".tar", *COMPRESSED)
LABEL_SUFFIXES = (".cls", ".json")  # of WebDataset
_LONGEST_LABEL = 1 << 20  # bytes of such a file
_OUTSIDE = "links, devices and names that point outside"


def list_archive(path: Path, cache_dir: str | None = None, shards: int = 1) -> Listing:
    """The images in a plain tar; of a member that occurs several times, the last version, as when it is unpacked.

    The listing is stored in the cache folder if there are 1,000 members or more, in all `shards` if they are alike.

    Raises:
        ValueError: not a tar archive, or a truncated one.
    """
    stored = read_listing(path, cache_dir)
    if stored is not None:
        return stored
    identity = identity_of(path)
    listing = Listing(str(path))
    hidden: set[str] = set()
    file_size, logged, number = path.stat().st_size, time.monotonic(), 0
    try:
        with tarfile.open(path, "r:") as tar:
            for number, member in enumerate(tar, start=1):
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
                if time.monotonic() - logged > 10:
                    logged = time.monotonic()
                    log.info("listing %s: %s files", printable(str(path)), f"{number:,}")
                _add_member(listing, tar, member, hidden, file_size)
            complete = _is_complete(path, tar, number)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a readable tar archive: {error}") from error
    if hidden:
        listing.skipped["hidden and tool folders"] += len(hidden)
    if number * shards >= FEWEST and complete:
        write_listing(listing, identity, cache_dir)
    return listing


def _is_complete(path: Path, tar: tarfile.TarFile, number: int) -> bool:
    """Whether an archive ends with its end marker, after `number` members. tarfile takes any header that it cannot read
    for the end.

    Raises:
        ValueError: it goes on.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise ValueError(
            f"{path} is damaged or truncated: after {number:,} members, none begins at byte {tar.offset:,}"
        )
    if not block:
        log.warning("%s has no end marker: it may be truncated after %s members", printable(str(path)), f"{number:,}")
    return bool(block)


def _add_member(
    listing: Listing, tar: tarfile.TarFile, member: tarfile.TarInfo, hidden: set[str], file_size: int
) -> None:
    """Add a member to a listing, and to `hidden` the folder of those that are skipped."""
    name = member.name
    if "./" in name or "//" in name:
        name = str(PurePosixPath(name))
    extent = (member.offset_data, member.size) if member.isreg() and not member.issparse() else None
    if member.islnk():  # another name of a file before it
        extent = listing.images.get(str(PurePosixPath(member.linkname)))
    if listing.labels.pop(name, None) is not None or name in listing.images:
        listing.skipped["earlier versions of a file"] += 1
        if extent is None:  # else it keeps its place in the order
            listing.images.pop(name, None)
    if not is_inside(name) or not (extent or member.isdir()):
        listing.skipped[_OUTSIDE] += 1
        return
    if name == ".":  # the folder that was packed
        return
    parts = name.split("/")
    folders = parts if member.isdir() else parts[:-1]
    depth = next((depth for depth, part in enumerate(folders) if is_skipped_folder(part)), None)
    if depth is not None:
        hidden.add("/".join(parts[: depth + 1]))
    elif member.isdir():
        listing.folders.add(name)
    elif (
        name.endswith(LABEL_SUFFIXES)
        and not parts[-1].startswith(".")
        and (label := _read_label(tar, member)) is not None
    ):
        listing.labels[name] = label
    elif reason := why_skipped(parts[-1]):
        listing.skipped[reason] += 1
    elif extent is not None:
        if sum(extent) > file_size:
            raise ValueError(f"{listing.root} is truncated: {name} extends past the end of the archive")
        listing.images[name] = extent


def _read_label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str | None:
    """The label in a .cls file (a number or a name) or in a .json file (`label`, else `cls`); None without one."""
    file = tar.extractfile(member)
    if file is None or member.size > _LONGEST_LABEL:
        return None
    data = file.read()
    if member.name.endswith(".cls"):
        label = os.fsdecode(data).strip()
    else:
        try:
            content = json.loads(data)
        except ValueError:
            return None
        fields = content if isinstance(content, dict) else {}
        value = fields.get("label", fields.get("cls"))
        if isinstance(value, bool) or not isinstance(value, int | str):
            return None
        label = str(value).strip().encode(errors="replace").decode()
    return (str(int(label)) if label.isascii() and label.isdecimal() else label) or None


def below_split(listing: Listing, split: str, whole: bool) -> Listing:
    """The part of an archive that is a split: SPLIT/, TOP/SPLIT/, or all of it if its name says so or, with `whole`, if
    there is no such part.

    Raises:
        NoSuchSplit: no such part.
        ValueError: several, under the names that a split can have.
    """
    tops = sorted({name.split("/")[0] for name in listing.images})
    prefixes = [f"{name}/" for name in names_of(split) if name in tops]
    if is_named(Path(listing.root), split) and not ALL_NAMES.issuperset(tops):
        prefixes = []  # a class of that name among others, such as CIFAR-100's "train"
    if not prefixes and len(tops) == 1:
        below = [f"{tops[0]}/{name}/" for name in names_of(split)]
        prefixes = [prefix for prefix in below if any(name.startswith(prefix) for name in listing.images)]
    if len(prefixes) > 1:
        raise ValueError(f"{listing.root} contains both {' and '.join(prefixes)}, which may differ: keep one of them")
    if prefixes:
        prefix = prefixes[0]
        if whole and split == "train" and "/" not in prefix[:-1]:
            others = [printable(top) for top in tops if top not in ALL_NAMES]
            warn_of_classes(f"{prefix} in {printable(listing.root)}", others)
    elif is_named(Path(listing.root), split) or whole:
        prefix = ""
    else:
        listing.log_skipped()
        found = summarize([printable(top) for top in tops]) or "no images"
        raise NoSuchSplit(f"{listing.root}: looked for {split}/CLASS/*.jpg, found {found} at the top level")

    cut = len(prefix)
    return Listing(
        listing.root,
        {name[cut:]: extent for name, extent in listing.images.items() if name.startswith(prefix)},
        {name[cut:] for name in listing.folders if name.startswith(prefix)},
        {name[cut:]: label for name, label in listing.labels.items() if name.startswith(prefix)},
        listing.skipped,
    )


def decompressed(path: Path, cache_dir: str | None) -> Path:
    """Decompress a .tar.gz into the cache; the first process does it, the others wait for its lock."""
    folder, stat = cache_folder(cache_dir), path.stat()
    identity = os.fsencode(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}")
    key = hashlib.sha256(identity).hexdigest()[:16]
    stem = path.name.removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar")
    target = folder / f"{stem}-{key}" / f"{stem}.tar"
    if target.exists():  # also in a folder that cannot be written to
        return target
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
            partial = target.with_suffix(f".{socket.gethostname()}.partial")  # some mounts lock within a host only
            try:
                with gzip.open(path) as packed, open(partial, "wb") as plain:
                    shutil.copyfileobj(packed, plain, 1 << 22)
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
    return target
