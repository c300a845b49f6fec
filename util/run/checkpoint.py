"""The one schema of checkpoints, and its one owner.

A checkpoint of a run is a dictionary of tensors and plain values (`weights_only=True` reads it), under the official HPM
names where it has them:

    format, version     "hpm", 1
    script              which script wrote it
    model               name of the model
    state_dict          the student; names without wrappers
    ema_state_dict      the EMA teacher (pre-training with a loss predictor)
    optimizer           state of the optimizer
    loss_scaler         state of the fp16 scaler, empty otherwise
    epoch, step         the next epoch to run, and the next optimizer step in it
    stopped             name of the signal that ended the run here, empty otherwise
    options             every option, resolved
    image               mean and std of the images
    extra               what a script adds (running means of a started epoch, best accuracy)
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from util.weights.load import FORMAT
from util.weights.read import read_file

log = logging.getLogger("hpm")

VERSION = 1
LAST, PREVIOUS, BEST = "checkpoint-last.pth", "checkpoint-prev.pth", "checkpoint-best.pth"
LOCK = ".lock"


def write_file(path: Path, content: dict[str, Any]) -> None:
    """`torch.save` so that a file of this name is whole at any instant.

    Raises:
        OSError: the disk is full or cannot be written; what was there before is intact.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        _replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise _not_written(path, partial, error) from error


def _replace(partial: Path, path: Path) -> None:
    """Give a complete file its name, and see to it that the name, too, survives a loss of power."""
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError:  # some network file systems know no such thing
        pass
    finally:
        os.close(folder)


def _not_written(path: Path, partial: Path, error: Exception) -> OSError:
    with contextlib.suppress(OSError):
        partial.unlink(missing_ok=True)
    return OSError(f"could not write {path} (disk full or read-only?): {error}; the one before is intact")


def save_run(folder: Path, state: dict[str, Any], also: Iterable[str] = ()) -> None:
    """Write the newest checkpoint of a run, keep the one before, and let the new one be known by other names `also`.

    Raises:
        OSError: the disk is full or cannot be written; the newest checkpoint that was there before is intact.
    """
    last = folder / LAST
    if last.exists():
        _second_name(last, folder / PREVIOUS)
    write_file(last, {"format": FORMAT, "version": VERSION, **state})
    for name in also:
        _second_name(last, folder / name)


def _second_name(source: Path, target: Path) -> None:
    """Let `target` be the same file; a copy where the file system has no links. Files are replaced, never changed."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)
        _replace(partial, target)
    except OSError as error:
        raise _not_written(target, partial, error) from error


def read_run(path: str | Path) -> dict[str, Any]:
    """A checkpoint of a run of this project.

    Raises:
        ValueError: the file is damaged, or of another kind.
    """
    state = read_file(path)
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{path} was not written by this project's scripts, so no run can go on from it; give it to --load_from"
        )
    if state["version"] > VERSION:
        raise ValueError(f"{path} has version {state['version']}, this code reads up to {VERSION}: update the code")
    return state


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a run's folder and its content; None where there is no checkpoint.

    Raises:
        ValueError: there are checkpoints, but none is whole.
    """
    problems = []
    for name in (LAST, PREVIOUS):
        if (folder / name).exists():
            try:
                return folder / name, read_run(folder / name)
            except ValueError as error:
                problems.append(str(error))
                log.warning("%s", error)
    if problems:
        raise ValueError(f"no checkpoint in {folder} can be read: {'; '.join(problems)}")
    return None


def check_owner(folder: Path, script: str) -> None:
    """Raises:
    ValueError: the folder holds another script's run.
    """
    config = folder / "config.json"
    if config.is_file() and (owner := json.loads(config.read_text()).get("script")) != script:
        raise ValueError(f"{folder} holds a run of {owner}, not of {script}: choose another --output_dir")


def find_resume(folder: Path, resume: str, auto_resume: bool, script: str) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that a run goes on from, in this order:

    1. the newest one of its own folder, with `auto_resume`: the same command started again goes on where it stopped;
    2. the file `resume`;
    3. none: a new run.

    Raises:
        ValueError: the folder holds another script's run; or it holds a run, and a new one would overwrite it.
    """
    check_owner(folder, script)
    if auto_resume and (found := newest(folder)):
        return found
    if resume:
        return Path(resume), read_run(resume)
    if (folder / LAST).exists():
        raise ValueError(f"{folder} holds a run: leave --no-auto_resume out to go on with it, or choose another folder")
    return None


def check_resumable(
    path: Path, state: dict[str, Any], script: str, options: dict[str, Any], fixed: Iterable[str]
) -> list[str]:
    """Whether a run with `options` may go on from a checkpoint; the options that changed, to be reported.

    Args:
        fixed: names of the options that must not change: what the weights and the schedule depend on.

    Raises:
        ValueError: another script wrote it, a fixed option changed, or it stands inside an epoch of other data.
    """
    if state["script"] != script:
        raise ValueError(f"{path} is of a run of {state['script']}, not of {script}: choose another --output_dir")
    before = state["options"]
    for name in fixed:
        if before.get(name) != options.get(name):
            raise ValueError(
                f"{path} was trained with --{name} {before.get(name)}, now it is {options.get(name)}: a run cannot "
                "change that; give the old value, or another --output_dir for a new run"
            )
    steps, steps_before = options.get("steps_per_epoch"), before.get("steps_per_epoch")
    if state["step"] and steps != steps_before:
        raise ValueError(
            f"{path} is at step {state['step']} of an epoch of {steps_before} steps, an epoch now has {steps}: give "
            "the data it was trained on, or go on from a whole epoch (a milestone, checkpoint-EPOCH.pth)"
        )
    shared = sorted(before.keys() & options.keys())
    return [f"--{name}: {before[name]} -> {options[name]}" for name in shared if before[name] != options[name]]


def is_finished(epoch: int, step: int, options: dict[str, Any]) -> bool:
    """Whether a run at this position (the next epoch and step) has done what its options ask for."""
    taken, most = epoch * options["steps_per_epoch"] + step, options["max_steps"]
    return epoch >= options["epochs"] or (most is not None and taken >= most)


class FolderLock:
    """Keeps a second run out of a folder.

    A POSIX record lock: the kernel drops it with the process, however that ends; processes that load data do not
    inherit it. It holds between machines on NFS (4, or 3 with its lock daemon) and on parallel file systems mounted
    with locks (Lustre: `-o flock`). Where a file system has none, a warning says that nothing guards the folder.

    Raises:
        ValueError: another process holds the lock.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self.file = open(self.path, "a+")  # noqa: SIM115 - held for as long as the run lives
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = self.path.read_text().strip() if error.errno in (errno.EACCES, errno.EAGAIN) else ""
            self.file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"another run ({holder or 'unknown'}) is writing to {folder}: stop it first, or choose another "
                    "--output_dir or --experiment"
                ) from error
            log.warning("%s: no locks on this file system (%s); see to it that only one run writes here", folder, error)
            return
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def release(self) -> None:
        """The file stays, empty of meaning: to remove it would open a gap for two."""
        self.file.close()


class Run:
    """A run's folder: where the run goes on, and what it saves.

    Args:
        folder: made if it is missing, and locked by rank 0 until `close`.
        script: name of the script; a folder of another one is refused.
        share: runs a function on rank 0 and gives its result, or its error, to all (from_rank_zero).

    Raises:
        OSError: the folder cannot be made or written to.
        ValueError: it holds a run of another script, or another process writes to it.
    """

    def __init__(self, folder: Path, script: str, share: Callable[[Callable[[], Any]], Any]) -> None:
        self.folder, self.script, self.share = folder, script, share
        self.found: tuple[Path, dict[str, Any]] | None = None
        self.lock: FolderLock | None = None
        share(self._open)

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            check_owner(self.folder, self.script)
            self.lock = FolderLock(self.folder)
        except OSError as error:
            raise OSError(
                f"the run's folder {self.folder} cannot be made or written to ({error.strerror}): choose another "
                "--output_dir or --experiment"
            ) from error

    def close(self) -> None:
        """Let others write to the folder; the end of the process does it as well."""
        if self.lock is not None:
            self.lock.release()

    def find(self, resume: str, auto_resume: bool) -> None:
        """Look for the checkpoint to go on from (`find_resume`)."""
        self.found = find_resume(self.folder, resume, auto_resume, self.script)

    def check(self, options: dict[str, Any], fixed: Iterable[str], report: bool = True) -> None:
        """Refuse to go on with options that do not fit (`check_resumable`); `restore` reports the other changes."""
        self.options = options
        changes = check_resumable(*self.found, self.script, options, fixed) if self.found else []
        self.changes = changes if report else []

    def restore(self, parts: dict[str, Any], model: str, image: dict[str, list[float]]) -> tuple[int, int, dict]:
        """Name what the run consists of, and load it if there is a checkpoint to go on from.

        Args:
            parts: what has a state, by its key in the checkpoint: model, optimizer, scaler.
            model: name of the model.
            image: mean and std of the images.

        Returns:
            The epoch and step to go on at, and `extra`; (0, 0, {}) for a new run.
        """
        self.parts, self.header = parts, {"script": self.script, "model": model, "image": image}
        if self.found is None:
            return 0, 0, {}
        path, state = self.found
        for name, part in parts.items():
            part.load_state_dict(state[name])
        log.info("going on from %s, epoch %d, step %d", path, state["epoch"], state["step"])
        for change in self.changes:
            log.info("changed since: %s", change)
        before, now = state["options"].get("processes"), self.options.get("processes")
        if before != now:
            log.info(
                "the order differs from that of %s processes: each step sees the same images, dealt out to %s in other "
                "parts, so that masks and augmentation differ; only the old number goes on exactly",
                *(before, now),
            )
        self.found = None  # its tensors need not stay in memory
        return state["epoch"], state["step"], state["extra"]

    def save(
        self,
        epoch: int,
        step: int,
        extra: dict[str, Any],
        keep: bool = False,
        best: bool = False,
        stopped: str = "",
    ) -> None:
        """Write the newest checkpoint, on rank 0, while the others wait.

        Args:
            epoch, step: the next to run.
            keep: as checkpoint-EPOCH.pth too, which no later one replaces.
            best: as checkpoint-best.pth too.
            stopped: name of the signal that ends the run here.
        """
        state = {**self.header, "options": self.options, "epoch": epoch, "step": step, "extra": extra}
        state["stopped"] = stopped
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        also = [f"checkpoint-{epoch}.pth"] * keep + [BEST] * best
        self.share(lambda: save_run(self.folder, state, also))
