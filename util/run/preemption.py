"""Ending a run between two steps: a signal sets a flag, all ranks agree, the run is saved where it stands.

A scheduler that wants the machine back, or whose time limit is near, sends SIGTERM or SIGUSR1; here that is only noted.
At each step boundary the ranks tell each other what they have noted and read what was told at the boundary before
(`tell`, distributed.Hearsay): the answer is there by then, so no device and hardly a host is waited for, and all
ranks stop at the same step, one after the signal was noted.
"""

import logging
import signal
import time
from collections.abc import Callable
from types import FrameType

log = logging.getLogger("hpm")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# EX_TEMPFAIL of sysexits.h: "try again later". Not 0, for the run is not done; not 1, nothing failed; and not 143, with
# which a process ends that SIGTERM killed before it could save.
EXIT_STATUS = 75


class Preempted(SystemExit):
    """End of a script that was told to stop, saved what it had, and can be started again."""

    def __init__(self) -> None:
        super().__init__(EXIT_STATUS)


class Preemption:
    """Whether to stop, or to save inside the epoch, as all ranks agree. Signals are caught from `start` to `close`.

    Args:
        save_every_minutes: time between two saves inside an epoch, by the clock of `keeps_time`; None for never.
        keeps_time: whether this rank's clock decides (rank 0's does).
        tell: gives this rank's numbers to the others; returns the largest of all ranks, of this or an earlier call.
    """

    def __init__(
        self, save_every_minutes: float | None, keeps_time: bool, tell: Callable[[list[int]], list[int]]
    ) -> None:
        self.seconds = save_every_minutes * 60 if save_every_minutes and keeps_time else None
        self.tell = tell
        self.noted = 0
        self.stopped_by = ""  # name of the signal that all ranks agreed to stop for
        self._saved = time.monotonic()
        self._before: dict[int, signal.Handlers] = {}

    def start(self) -> None:
        """Take the signals, which until here end the process as they always do."""
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def close(self) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = number

    def agree(self) -> tuple[bool, bool]:
        """Whether to stop here, and whether to save here. The same answer on every rank at the same step."""
        due = self.seconds is not None and time.monotonic() - self._saved >= self.seconds
        if due:
            self._saved = time.monotonic()
        number, save = self.tell([int(self.noted), int(due)])
        if number:
            self.stopped_by = signal.Signals(number).name
            log.info("%s: saving, then ending with status %d; start again to go on", self.stopped_by, EXIT_STATUS)
        return bool(number), bool(save)
