"""The run folder: names of its files, atomic writes, its lock, and reading its log. Nothing else knows the layout.

config.json              every option resolved, versions, git commit, command line
log.jsonl                one line per epoch
events.out.tfevents.*    TensorBoard, unless --log_dir is given
checkpoint-last.pth      the newest checkpoint, checkpoint-prev.pth the one before
checkpoint-EPOCH.pth     milestones, EPOCH = epochs completed; checkpoint-best.pth the best accuracy
bad_images.txt           training images that could not be read
bad_steps.json           the first of the consecutive skipped steps that aborted the run
"""

import contextlib
import errno
import fcntl
import itertools
import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

log = logging.getLogger("hpm")

LAST, PREVIOUS, BEST = "checkpoint-last.pth", "checkpoint-prev.pth", "checkpoint-best.pth"
CONFIG, LOG, BAD_IMAGES, BAD_STEPS = "config.json", "log.jsonl", "bad_images.txt", "bad_steps.json"
LOCK = ".lock"


def write_atomic(path: Path, write: Callable[[BinaryIO], Any], also: Iterable[Path] = ()) -> None:
    """Write a file so that under its name there is always a complete one, also after a power failure.

    Args:
        also: further names for the same content. They are replaced before `path`, so they are never older than it.

    Raises:
        OSError: the disk is full or read-only; the previous file is intact.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        for name in also:
            link(partial, name)
        _rename(partial, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise _not_written(path, partial, error) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`write_atomic` for text; file names in it may hold any bytes."""
    write_atomic(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def write_file(path: Path, content: dict[str, Any], also: Iterable[Path] = ()) -> None:
    """`torch.save` as `write_atomic`."""
    write_atomic(path, lambda file: torch.save(content, file), also)


def link(source: Path, target: Path) -> None:
    """Give a file a second name; a copy where the file system has no hard links. Files are replaced, never changed.

    Raises:
        OSError: as in `write_atomic`.
    """
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)
        _rename(partial, target)
    except OSError as error:
        raise _not_written(target, partial, error) from error


def _rename(partial: Path, path: Path) -> None:
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot flush folders
            os.fsync(folder)
    finally:
        os.close(folder)


def _not_written(path: Path, partial: Path, error: Exception) -> OSError:
    with contextlib.suppress(OSError):
        partial.unlink(missing_ok=True)
    return OSError(f"could not write {path} (disk full or read-only?): {error}; the previous file is intact")


def run_folder(output_dir: str, experiment: str, script: str) -> Path:
    """OUTPUT_DIR/EXPERIMENT; if another script's run is there, its subfolder for this one (the official shell scripts
    pre-train and fine-tune in one folder)."""
    path = Path(output_dir, experiment)
    if (path / CONFIG).exists() and read_config(path).get("script") != script:
        return path / script.removeprefix("main_")
    return path


def create(folder: Path, option: str) -> None:
    """Create a folder, named by an option, that can be written to.

    Raises:
        ValueError: that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{option} {folder} cannot be written to ({error.strerror}): choose another") from error


def events_folder(log_dir: str, name: str, run: Path) -> Path:
    """Folder of a run's TensorBoard events with --log_dir: LOG_DIR/NAME, as in the official code.

    Where a folder holds another run's events, NAME-2, NAME-3, ... is used instead, so that two runs never mix.
    """
    owner = str(run.resolve())
    for number in itertools.count(1):
        folder = Path(log_dir, name if number == 1 else f"{name}-{number}")
        create(folder, "--log_dir")
        marker = folder / "run.txt"
        if not marker.exists():
            write_text(marker, owner + "\n")
        if marker.read_text("utf-8", "surrogateescape").strip() == owner:
            return folder
    raise AssertionError


def read_log(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl, one per completed epoch; others are skipped, such as one that a crash cut off. [] without
    the file."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for text in (Path(folder) / LOG).read_text("utf-8", "replace").splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and "epoch" in line:
                    lines.append(line)
    return lines


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json: script, options, environment. {} without the file.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, or choose another folder") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, no options: delete it, or choose another folder")
    return config


class RunFolder:
    """Creates a run folder, locks it until `close`, and rejects a folder of another script. On rank 0 only.

    The lock is a POSIX record lock: the kernel releases it with the process, however that ends, and data loading
    workers do not inherit it. It works between machines on NFS (4, or 3 with its lock daemon) and on parallel file
    systems mounted with locks (Lustre: `-o flock`). Where the file system does not support locks, a warning says so.

    Raises:
        OSError: the folder cannot be created or written to.
        ValueError: it holds a run of another script, or another process is writing to it.
    """

    def __init__(self, path: Path, script: str) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
            if (path / CONFIG).exists() and (owner := read_config(path).get("script")) != script:
                raise ValueError(f"{path} holds a run of {owner}, not of {script}: choose another --output_dir")
            self._file = open(path / LOCK, "a+")  # noqa: SIM115 - open as long as the run lasts
        except OSError as error:
            raise OSError(
                f"the run folder {path} cannot be created or written to ({error.strerror}): choose another "
                "--output_dir or --experiment"
            ) from error
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = (path / LOCK).read_text().strip() or "unknown"
                self._file.close()
                raise ValueError(
                    f"another run ({holder}) is writing to {path}: stop it first, or choose another --output_dir or "
                    "--experiment"
                ) from error
            log.warning("%s: this file system does not support locks (%s): start only one run in it", path, error)
            return
        try:
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._file.flush()
        except OSError as error:
            raise OSError(f"{path} cannot be written to ({error.strerror}): free some space there") from error

    def close(self) -> None:
        """Release the lock. The file stays: removing it could let two runs in."""
        self._file.close()
