"""Per-step checks: signals, timed checkpoints, skipped steps, unreadable images.

A scheduler that preempts a job, or whose time limit is near, sends SIGTERM or SIGUSR1; Ctrl-C sends SIGINT, a lost
terminal SIGHUP (ignored under nohup). The handler only notes the signal (a second Ctrl-C stops at once). After each
step the ranks exchange what they noted by an asynchronous MAX all-reduce of two small integers over gloo, and read the
exchange of the step before: it has arrived by then, so nobody waits for it, or for the device, and all ranks stop after
the same step, one after the signal was noted.
"""

import datetime
import json
import logging
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from util.data.decode import REASONS
from util.data.loader import EpochSampler
from util.data.sources import Source
from util.run.amp import Amp, NonFinite
from util.run.distributed import from_rank_zero, gather
from util.run.folder import BAD_IMAGES, BAD_STEPS, write_text

log = logging.getLogger("hpm")

IO_ERROR = ": I/O error"  # end of a line in bad_images.txt: a fault of the storage, which counts against no image

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

# EX_TEMPFAIL of sysexits.h: "try again later". Not 0, since the run is not complete; not 1, since nothing failed; not
# 143, the status of a process that SIGTERM killed before it could save.
EXIT_STATUS = 75


class TooManyBadImages(RuntimeError):
    """End of a run with too many unreadable images."""


class Watch:
    """Watches a training run between its steps. All ranks call it in step.

    Args:
        folder: the run folder.
        source, sampler: the training images, and which of them a step uses.
        amp: counts the skipped steps.
        save_every_minutes: time between mid-epoch checkpoints, by rank 0's clock; None disables them.
        max_bad_steps, max_bad_images: limits beyond which the run is aborted.
        timeout_minutes: how long a rank waits for the others.

    Attributes:
        stopped_by: name of the signal that all ranks agreed to stop for; "" while there is none.
        unreadable: unreadable images met by this rank since the last check: index -> position in `decode.REASONS`.
    """

    def __init__(
        self,
        folder: Path,
        source: Source,
        sampler: EpochSampler,
        amp: Amp,
        *,
        save_every_minutes: float | None,
        max_bad_steps: int,
        max_bad_images: int,
        timeout_minutes: float,
    ) -> None:
        self.folder, self.source, self.sampler, self.amp = folder, source, sampler, amp
        self.max_bad_steps, self.max_bad_images = max_bad_steps, max_bad_images
        self.stopped_by = ""
        self._noted = 0  # number of the signal
        self._seconds = save_every_minutes * 60 if save_every_minutes and sampler.rank == 0 else None
        self._saved = time.monotonic()
        self._skipped = 0
        self.unreadable: dict[int, int] = {}
        self._met: set[int] = set()
        path = folder / BAD_IMAGES
        text = from_rank_zero(lambda: path.read_text("utf-8", "surrogateescape") if path.exists() else "")
        self._listed = [line for line in text.splitlines() if not line.endswith(IO_ERROR)]  # may be readable now
        self._group = self._work = None
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=timeout_minutes))
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup: no SIGHUP
        self._handlers = {number: signal.signal(number, self._note) for number in heard}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._noted == signal.SIGINT:
            raise KeyboardInterrupt
        self._noted = number

    def after_step(self, epoch: int, step: int, steps: int, due: bool, save: Callable[[str], None]) -> bool:
        """Whether the run stops after this step; the same answer on every rank. `step` is the next of `steps`.

        Args:
            due: `check` now; before a save it is done in any case.
            save: saves a checkpoint mid-epoch; its argument is the signal that stops the run, or "".
        """
        number, save_now = self.agree()
        if due or number or save_now:
            self.check(epoch, step, steps)
        if number:
            self.stopped_by = signal.Signals(number).name
            log.info(
                "Received %s: saving checkpoint and exiting with status %d; rerun the same command to resume",
                self.stopped_by,
                EXIT_STATUS,
            )
        if number or save_now:
            save(self.stopped_by)
        return bool(number)

    def check(self, epoch: int, step: int, steps: int) -> None:
        """Report skipped steps and unreadable images; this waits for the device.

        Raises:
            NonFinite: more than `max_bad_steps` consecutive steps were skipped. Weights and checkpoints are unaffected
                by them.
            TooManyBadImages: more than `max_bad_images` images cannot be read.
        """
        self.check_skipped_steps(epoch * steps + step, steps)
        self.check_images()

    def agree(self) -> tuple[int, int]:
        """The signal to stop for (0 for none), and whether to save, as all ranks noted one call ago."""
        due = self._seconds is not None and time.monotonic() - self._saved >= self._seconds
        if due:
            self._saved = time.monotonic()
        mine = [int(self._noted), int(due)]
        if self._group is None:
            return mine[0], mine[1]
        agreed = [0, 0]
        if self._work is not None:
            self._work.wait()
            agreed = self._exchanged.tolist()
        self._exchanged = torch.tensor(mine)
        self._work = dist.all_reduce(self._exchanged, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed[0], agreed[1]

    def check_skipped_steps(self, taken: int, steps_per_epoch: int) -> None:
        """Log skipped steps and abort after too many; `taken` is the number of optimizer steps of the whole run."""
        total, in_a_row, first, loss = self.amp.read_skipped()
        if total > self._skipped:
            log.warning(
                "Skipped %d steps with a non-finite loss or gradient (%d in total)", total - self._skipped, total
            )
        self._skipped = total
        if in_a_row <= self.max_bad_steps:
            return
        epoch, step = divmod(taken - (self.amp.steps - first), steps_per_epoch)
        losses = gather(loss)
        report = {"epoch": epoch, "step": step, "steps_in_a_row": in_a_row, "losses": losses}
        report["files"] = [self.source.name(i) for i in self.sampler.of_step(epoch, step)]
        path = self.folder / BAD_STEPS
        from_rank_zero(lambda: write_text(path, json.dumps(report, indent=2) + "\n"))
        raise NonFinite(
            f"loss or gradient was not finite in {in_a_row} consecutive steps, more than --max_bad_steps "
            f"{self.max_bad_steps}, from epoch {epoch}, step {step} on (losses {', '.join(f'{x:g}' for x in losses)}); "
            f"{path} lists the files of that batch. All these steps were skipped, so the checkpoint is intact. A lower "
            "--lr or --clip_grad, or --precision fp32 or bf16, may help"
        )

    def check_images(self) -> None:
        """List newly met unreadable images of all ranks in bad_images.txt, and abort after too many."""
        met: dict[int, int] = {}
        for of_rank in gather(self.unreadable):
            met |= {index: reason for index, reason in of_rank.items() if index not in self._met}
        self.unreadable = {}
        self._met |= met.keys()
        lines = {f"{self.source.name(index)}: {REASONS[reason]}" for index, reason in met.items()}
        new = sorted(lines - set(self._listed))
        if not new:
            return
        self._listed = sorted({*self._listed, *new})
        path = self.folder / BAD_IMAGES
        text = "".join(f"{line}\n" for line in self._listed)
        from_rank_zero(lambda: write_text(path, text))
        log.warning(
            "Replaced %d unreadable training images (%d in total, listed in %s), the first of them %s",
            len(new),
            len(self._listed),
            path,
            new[0],
        )
        damaged = sum(not line.endswith(IO_ERROR) for line in self._listed)
        if damaged > self.max_bad_images:
            raise TooManyBadImages(
                f"{damaged} images cannot be read, more than --max_bad_images {self.max_bad_images}: repair "
                f"or remove those listed in {path} and then delete that file, or raise the limit"
            )

    def metrics(self) -> dict[str, int]:
        """Counts for the log: skipped steps of this process and unreadable images of the run, where there are any."""
        counts = {"bad_steps": self._skipped, "bad_images": len(self._listed)}
        return {name: count for name, count in counts.items() if count}

    def close(self) -> None:
        """Finish the exchange, so that no rank leaves early, and restore the signal handlers."""
        if self._work is not None:
            self._work.wait()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
