"""Writing a file or a folder that is seen whole or not at all, and that never silently replaces another."""

import filecmp
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path


def check_target(target: Path, contents: Iterable[str] | None, overwrite: bool) -> None:
    """Refuse a place that could not be written in the end, before there is any work to lose.

    Args:
        contents: names that a folder may hold; None for a file.

    Raises:
        ValueError: a folder stands where a file should be or the reverse, or the folder holds something else.
    """
    if contents is None:
        if target.is_dir():
            raise ValueError(f"--output {target} is a folder, and this format is a file: name a file in it")
        return
    if target.exists() and not target.is_dir():
        raise ValueError(f"--output {target} is a file, and this format is a folder: choose another name")
    others = sorted({path.name for path in target.iterdir()} - set(contents)) if target.exists() else []
    if others:
        however = ", even with --overwrite" * overwrite
        raise ValueError(f"--output {target} holds {others[0]}, which is not replaced{however}: choose a new folder")


def publish(target: Path, build: Callable[[Path], None], overwrite: bool) -> bool:
    """Let `build` make `target`, and whatever goes beside it, in a hidden folder beside `target`; then move it there.

    If `build` fails, nothing is left behind.

    Returns:
        False where the same was there already.

    Raises:
        ValueError: something else is there, and `overwrite` is not set.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        build(staging / target.name)
        # What goes beside comes first: when the target is seen, all of it is there.
        made = sorted(staging.iterdir(), key=lambda path: path.name == target.name)
        moves = [(path, target.parent / path.name) for path in made]
        if all(_same(new, old) for new, old in moves):
            return False
        for new, old in moves:
            if old.exists() and not overwrite and not _same(new, old):
                raise ValueError(f"{old} is there already, and differs: give --overwrite, or another --output")
        _let_others_read(made, staging)
        for new, old in moves:
            _replace(new, old, staging / f"{old.name}.replaced")
        return True
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _let_others_read(made: list[Path], staging: Path) -> None:
    """Files as readable as the user's files are: some libraries write them for the user alone."""
    usual = staging / "usual"
    usual.touch()
    for path in made:
        for file in path.iterdir() if path.is_dir() else [path]:
            file.chmod(usual.stat().st_mode)


def _replace(new: Path, old: Path, aside: Path) -> None:
    """Put `new` in the place of `old`. A folder cannot be replaced in one step: it waits `aside` meanwhile."""
    for file in new.iterdir() if new.is_dir() else [new]:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    if not old.is_dir():
        os.replace(new, old)
        return
    os.replace(old, aside)
    try:
        os.replace(new, old)
    except BaseException:
        os.replace(aside, old)
        raise


def _same(new: Path, old: Path) -> bool:
    """Whether two files, or two folders of files, are equal byte for byte."""
    if new.is_dir() and old.is_dir():
        names = [sorted(path.name for path in folder.iterdir()) for folder in (new, old)]
        return names[0] == names[1] and all(_same(new / name, old / name) for name in names[0])
    return new.is_file() and old.is_file() and filecmp.cmp(new, old, shallow=False)
