"""The listing of an archive, stored in the cache folder, so that the next start reads no headers.

One .npz file per archive, whose name is a hash of the archive's absolute path. It is valid for one size and time of
modification, and written to a temporary file that is then renamed.
"""

import hashlib
import json
import logging
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from util.data.files import printable
from util.data.listing import Listing

log = logging.getLogger("hpm")

VERSION = 2  # of the format and of the rules for what is listed
FEWEST = 1000  # members; fewer are listed again, in about 0.1 s


def cache_folder(cache_dir: str | None) -> Path:
    return Path(cache_dir) if cache_dir else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hpm"


def identity_of(archive: Path) -> bytes:
    """What a stored listing must have in common with its archive."""
    stat = archive.stat()
    return os.fsencode(f"{VERSION}|{archive.resolve()}|{stat.st_size}|{stat.st_mtime_ns}")


def _file_of(archive: Path, cache_dir: str | None) -> Path:
    key = hashlib.sha256(os.fsencode(archive.resolve())).hexdigest()[:16]
    return cache_folder(cache_dir) / "listings" / f"{key}.npz"


def read_listing(archive: Path, cache_dir: str | None) -> Listing | None:
    """The stored listing of an archive; None without one, or if the archive has changed since."""
    path = _file_of(archive, cache_dir)
    try:
        with np.load(path, allow_pickle=False) as stored:
            if stored["identity"].tobytes() != identity_of(archive):
                return None
            extents = zip(*stored["extents"].T.tolist(), strict=True)
            return Listing(
                str(archive),
                dict(zip(_unpack(stored, "images"), extents, strict=True)),
                set(_unpack(stored, "folders")),
                dict(zip(_unpack(stored, "labels"), _unpack(stored, "texts"), strict=True)),
                Counter(json.loads(stored["skipped"].tobytes())),
            )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        log.info("%s cannot be read (%s): listing %s again", path, error, printable(str(archive)))
        return None


def write_listing(listing: Listing, identity: bytes, cache_dir: str | None) -> None:
    """Store a listing, unless the archive has changed while it was listed. A full or read-only disk is logged."""
    archive = Path(listing.root)
    if identity_of(archive) != identity:
        return
    path = _file_of(archive, cache_dir)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    arrays: dict[str, Any] = {
        "identity": _to_bytes(identity),
        "skipped": _to_bytes(json.dumps(listing.skipped).encode()),
    }
    arrays["extents"] = np.array(list(listing.images.values()), dtype=np.int64).reshape(-1, 2)
    texts = (("images", listing.images), ("folders", listing.folders), ("labels", listing.labels))
    for name, strings in (*texts, ("texts", listing.labels.values())):
        arrays |= _pack(name, strings)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                np.savez(file, **arrays)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        log.info("the listing of %s was not stored in %s: %s", printable(str(archive)), path, error)


def _to_bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype=np.uint8)


def _pack(name: str, strings: Iterable[str]) -> dict[str, np.ndarray]:
    """Strings as their bytes in a row, and the length of each: names may hold any byte."""
    encoded = [os.fsencode(string) for string in strings]
    lengths = np.array([len(string) for string in encoded], dtype=np.int64)
    return {name: _to_bytes(b"".join(encoded)), f"{name}_lengths": lengths}


def _unpack(stored: np.lib.npyio.NpzFile, name: str) -> list[str]:
    data, ends = stored[name].tobytes(), np.cumsum(stored[f"{name}_lengths"]).tolist()
    return [os.fsdecode(data[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
