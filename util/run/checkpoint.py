"""The schema of a run's checkpoints, and the decision which of them a run resumes from.

A checkpoint is a dictionary of tensors and plain values (`weights_only=True` reads it), under the official HPM names
where it has them:

    format, version     "hpm", 1
    script              the script that wrote it
    model               name of the model
    state_dict          the student; names without wrappers
    ema_state_dict      the EMA teacher, if there is one
    optimizer           state of the optimizer
    loss_scaler         state of the fp16 scaler, empty otherwise
    epoch, step         the next epoch, and the next optimizer step in it
    stopped             name of the signal that stopped the run here, empty otherwise
    options             every option, resolved
    image               mean, std and value range of the images
    extra               number of training images, running means of an unfinished epoch, best accuracy
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from util.data.files import summarize
from util.run.distributed import from_rank_zero
from util.run.folder import BEST, LAST, LOG, PREVIOUS, RunFolder, link, read_log, write_file
from util.weights.load import FORMAT, read_meta
from util.weights.read import read_file

log = logging.getLogger("hpm")

VERSION = 1


def save_run(folder: Path, state: dict[str, Any], also: Iterable[str] = ()) -> None:
    """Write the newest checkpoint of a run, keep the previous one, and hard-link the new one under the names in `also`.

    Raises:
        OSError: the disk is full or read-only; the previous checkpoint is intact.
    """
    last = folder / LAST
    if last.exists():
        link(last, folder / PREVIOUS)
    write_file(last, {"format": FORMAT, "version": VERSION, **state}, [folder / name for name in also])


def read_run(path: str | Path) -> dict[str, Any]:
    """A checkpoint of a run of this project.

    Raises:
        ValueError: the file is damaged, or of another kind.
    """
    state = read_file(path)
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{path} was not written by this project's scripts, so no run can resume from it; give it to --load_from "
            "or --finetune"
        )
    if state["version"] > VERSION:
        raise ValueError(f"{path} has version {state['version']}, this code reads up to {VERSION}: update the code")
    return state


def best_accuracy(folder: Path, epochs: int) -> float | None:
    """Accuracy of a folder's best checkpoint; None without one, or if it was saved after more than `epochs` epochs,
    since the run has restarted from an earlier checkpoint."""
    if not (folder / BEST).exists():
        return None
    try:
        state = read_file(folder / BEST, tensors=False)
    except ValueError as error:
        log.warning("%s: the best accuracy starts anew", error)
        return None
    return state["extra"].get("best") if state["epoch"] <= epochs else None


def find_resume(folder: Path, resume: str = "", auto_resume: bool = True) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that a run resumes from and its content, in this order:

    1. with `auto_resume` the newest complete one of its own folder, so that the same command can be started again;
    2. the file `resume`; without `auto_resume` it may be an earlier one of the same folder, from which the run then
       restarts, once: if it has done so before, the first rule holds, for the same reason;
    3. none: a new run.

    Raises:
        ValueError: the folder holds a run, or what is left of one, that a new one would overwrite, or checkpoints of
            which none is complete.
    """
    own = resume and Path(resume).resolve().parent == folder.resolve()
    if own and not auto_resume and _has_restarted(folder, resume):
        log.info(
            "--resume %s is not used again: delete %s to restart from it once more",
            resume,
            folder / LAST,
        )
        auto_resume, resume = True, ""
    problems = []
    for name in (LAST, PREVIOUS) if auto_resume else ():
        if (folder / name).exists():
            try:
                state = read_run(folder / name)
                if resume and Path(resume).resolve() != (folder / name).resolve():
                    log.info("--resume %s is not used: %s holds a run (see --no-auto_resume)", resume, folder)
                return folder / name, state
            except ValueError as error:
                problems.append(str(error))
                log.warning("%s", error)
    if problems:
        raise ValueError(f"no checkpoint in {folder} can be read: {'; '.join(problems)}")
    if (folder / LAST).exists() and not own:
        raise ValueError(
            f"{folder} holds a run: omit --no-auto_resume to resume it, choose another folder, or go back in it with "
            "--resume and one of its own checkpoints"
        )
    left = sorted(path.name for path in folder.glob("checkpoint-*.pth"))
    if (folder / LOG).exists() and len(read_log(folder)) > 1:  # killed at its first checkpoint, a run has one line
        left.append(LOG)
    if left and not own:
        raise ValueError(
            f"{folder} holds {summarize(left)} of an earlier run, but not its newest checkpoint: resume from one of "
            "its checkpoints with --resume, or for a new run delete these files or choose another folder"
        )
    return (Path(resume), read_run(resume)) if resume else None


def _has_restarted(folder: Path, resume: str) -> bool:
    """Whether the run has restarted from its earlier file `resume`, and saved since."""
    if not (folder / LAST).exists():
        return False
    before = read_resumed(folder, "", auto_resume=True).get("options", {})
    same = before.get("resume") and Path(before["resume"]).resolve() == Path(resume).resolve()
    return bool(same) and not before.get("auto_resume", True)


def read_resumed(folder: Path, resume: str, auto_resume: bool) -> dict[str, Any]:
    """Metadata (`read_meta`) of the checkpoint that a run will resume from; {} for a new run."""
    own = auto_resume or (resume and _has_restarted(folder, resume))
    for path in (folder / LAST, folder / PREVIOUS) if own else ():
        if path.exists():
            with contextlib.suppress(ValueError):  # damaged: reported by `Run`
                return read_meta(path)
    return read_meta(resume) if resume else {}


def make_newest(folder: Path, path: Path) -> None:
    """Make a checkpoint of a folder its newest one, before the run that resumes from it saves: in place of a damaged
    one, or of a later one, which becomes the previous one.

    Raises:
        OSError: as in `save_run`.
    """
    last = folder / LAST
    if path.name == LAST or path.resolve().parent != folder.resolve():
        return
    if path.name != PREVIOUS and last.exists():
        link(last, folder / PREVIOUS)
    link(path, last)


def is_finished(epoch: int, step: int, options: dict[str, Any]) -> bool:
    """Whether a run at this position (the next epoch and step) has done what its options request."""
    taken, most = epoch * options["steps_per_epoch"] + step, options["max_steps"]
    return epoch >= options["epochs"] or (most is not None and taken >= most)


class Run:
    """The folder of a run and the checkpoint it resumes from. All ranks use it together; rank 0 reads and writes.

    Args:
        folder: created if it does not exist, and locked until `close`.
        script: name of the script.
        resume, auto_resume: the options; rank 0 decides which checkpoint they mean (`find_resume`).

    Attributes:
        path, state: the checkpoint to resume from and its content; None for a new run.
        changes: the options that changed since, as "--lr: 0.1 -> 0.2".

    Raises:
        OSError: the folder cannot be created or written to.
        ValueError: it holds a run of another script, or another process is writing to it; or no checkpoint can be read.
    """

    def __init__(self, folder: Path, script: str, resume: str, auto_resume: bool) -> None:
        self.folder, self.script = folder, script
        self.path: Path | None = None
        self.state: dict[str, Any] | None = None
        self.changes: list[str] = []
        self._lock: RunFolder | None = None

        def find() -> Path | None:
            self._lock = RunFolder(folder, script)
            found = find_resume(folder, resume, auto_resume)
            if found is not None:
                self.path, self.state = found
            return self.path

        self.path = from_rank_zero(find)
        log.info("run       %s", folder)
        if self.path is not None and self.state is None:
            self.state = read_run(self.path)

    def check(
        self,
        options: dict[str, Any],
        fixed: Iterable[str],
        path: str = "",
        compute: Callable[[], str] = lambda: "",
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Compare options and initial weights with those of the checkpoint; `changes` are then the changed options.

        Args:
            fixed: names of the options that must not change, since weights and schedule depend on them.
            path: of the initial weights given now, "" for random ones. Their file is not needed to resume: the
                checkpoint holds everything.
            compute: their fingerprint.
            defaults: values that None stands for; giving a default explicitly is not a change.

        Returns:
            Fingerprint of the weights that the run started from, "" for random ones.

        Raises:
            ValueError: the checkpoint is of another script, a fixed option changed, it is mid-epoch of other data, or
                the run started from other weights.
        """
        if self.state is None:
            return from_rank_zero(compute) if path else ""
        self.changes = check_resumable(self.path, self.state, self.script, options, fixed, defaults)
        recorded = self.state["options"].get("initial")
        given = recorded is not None and path
        if given and from_rank_zero(lambda: Path(path).exists() and compute() != recorded):
            raise ValueError(
                f"{self.path} started from other weights than {path}: omit --finetune or --load_from to resume it, "
                "or choose another --output_dir for a new run"
            )
        return recorded or ""

    def begin(self, path: Path) -> None:
        """Before the first write of a run that resumes from `path`; see `make_newest`."""
        from_rank_zero(lambda: make_newest(self.folder, path))

    def close(self) -> None:
        """Release the folder; the end of the process does it as well."""
        if self._lock is not None:
            self._lock.close()


# Entries of the stored options that are not options, or do not affect the rest of the run.
DERIVED = (
    *("steps_per_epoch", "processes", "encoder", "initial", "classes", "origins", "val_split", "weights"),
    *("teacher_path", "start_epoch", "resume", "auto_resume"),
)

# Values for checkpoints written before these options existed.
EARLIER = {"teacher_keep": 1.0, "score_by": "predictor"}


def check_resumable(
    path: Path | None,
    state: dict[str, Any],
    script: str,
    options: dict[str, Any],
    fixed: Iterable[str],
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> list[str]:
    """The options that changed since the checkpoint; for the arguments and errors see `Run.check`."""
    if state["script"] != script:
        raise ValueError(f"{path} is of a run of {state['script']}, not of {script}: choose another --output_dir")
    if "optimizer" not in state:
        raise ValueError(f"{path} holds weights only and cannot be resumed from: give it to --load_from or --finetune")
    before = state["options"]
    for name in fixed:
        old, new = (defaults.get(name) if given.get(name) is None else given[name] for given in (before, options))
        if old != new:
            raise ValueError(
                f"{path} was trained with --{name} {old}, now it is {new}: a run cannot "
                "change that; give the old value, or another --output_dir for a new run"
            )
    if before.get("val_split") != options.get("val_split"):
        raise ValueError(
            f"{path} was trained with other images held out (--val_fraction {options.get('val_fraction'):g}): the data "
            "have changed; give those it was trained on, or another --output_dir for a new run"
        )
    steps, steps_before = options.get("steps_per_epoch"), before.get("steps_per_epoch")
    if state["step"] and steps != steps_before:
        raise ValueError(
            f"{path} is at step {state['step']} of an epoch of {steps_before} steps, an epoch now has {steps}: give "
            "the data it was trained on, or go back to a completed epoch (--no-auto_resume --resume checkpoint-N.pth)"
        )
    before = {**EARLIER, **before}
    shared = sorted(before.keys() & options.keys() - {*DERIVED, *fixed})
    return [f"--{name}: {before[name]} -> {options[name]}" for name in shared if before[name] != options[name]]
