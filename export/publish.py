"""Put a finished file or folder in place in one step, and never replace an existing one unasked."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path


def check_target(target: Path, contents: Iterable[str], overwrite: bool) -> None:
    """Reject an output path that cannot be written.

    Args:
        contents: names that a folder to be replaced may contain; empty for a file.

    Raises:
        ValueError: the path exists and `overwrite` is not set, or is of the wrong kind, or contains other files.
    """
    if target.is_dir() and not contents:
        raise ValueError(f"--output {target} is a folder, but this format is a file: name a file in it")
    if target.is_file() and contents:
        raise ValueError(f"--output {target} is a file, but this format is a folder: choose another name")
    others = sorted({path.name for path in target.iterdir()} - set(contents)) if target.is_dir() else []
    if others:
        raise ValueError(f"--output {target} contains {others[0]}, which is never replaced: choose a new folder")
    if target.exists() and not overwrite:
        raise ValueError(f"--output {target} exists: use --overwrite, or choose another name")


def publish(target: Path, build: Callable[[Path], None], overwrite: bool) -> None:
    """Let `build` write `target` and the files next to it in a hidden folder, then move them into place.

    If `build` fails, nothing is left behind.

    Raises:
        ValueError: one of the files exists and `overwrite` is not set.
    """
    target = target.resolve()  # what a symbolic link points to is replaced, not the link
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        build(staging / target.name)
        made = sorted(staging.iterdir(), key=lambda path: path.name == target.name)  # the target appears last
        for path in made:
            if (target.parent / path.name).exists() and not overwrite:
                raise ValueError(f"{target.parent / path.name} exists: use --overwrite, or choose another --output")
        for path in made:
            _replace(path, target.parent / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(new: Path, old: Path) -> None:
    """Replace `old`. A folder cannot be replaced in one step: it is renamed, and restored if the move fails."""
    for path in [new, *new.rglob("*")]:
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    if not old.is_dir():
        os.replace(new, old)
        return
    backup = new.parent.with_suffix(".replaced")  # outside the staging folder, which is always deleted
    os.replace(old, backup)
    try:
        os.replace(new, old)
    except BaseException:
        os.replace(backup, old)
        raise
    shutil.rmtree(backup)
