"""What happens between two optimizer steps: may the run go on, and should it be saved here?"""

import json
import logging
from collections.abc import Callable
from pathlib import Path

from torch import nn

from util.data.datasets import Source
from util.data.loader import EpochSampler
from util.run.bad_images import BadImages
from util.run.bad_steps import BadSteps, NonFinite
from util.run.distributed import Hearsay, from_rank_zero, gather
from util.run.preemption import Preempted, Preemption

log = logging.getLogger("hpm")

REPORT = "bad_steps.json"


class Supervisor:
    """Looks after a run for an engine, which asks `between_steps` and need not know what is looked at.

    Args:
        folder: the run's, for reports.
        model: what is trained, for the names of its parts.
        bad_steps: counters of skipped steps (`Precision.bad_steps`).
        source, sampler: the training images, and which of them a step sees.
        interval: steps between two looks at what costs a wait for the device: those of the log.
        save_every_minutes: time between two saves inside an epoch; None for never.
        max_bad_steps, max_bad_images: beyond these the run ends.
        timeout_minutes: how long a rank waits for the others' signals.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        bad_steps: BadSteps,
        source: Source,
        sampler: EpochSampler,
        *,
        interval: int,
        save_every_minutes: float | None,
        max_bad_steps: int,
        max_bad_images: int,
        timeout_minutes: float,
    ) -> None:
        self.folder, self.bad_steps, self.source, self.sampler = folder, bad_steps, source, sampler
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.interval, self.max_bad_steps = interval, max_bad_steps
        self.bad_images = BadImages(folder, max_bad_images, source.name, from_rank_zero, gather)
        self.hearsay = Hearsay(timeout_minutes)
        self.preemption = Preemption(save_every_minutes, keeps_time=sampler.rank == 0, tell=self.hearsay)
        self.preemption.start()

    @property
    def stopped(self) -> bool:
        """Whether a signal ended the run, which is saved."""
        return bool(self.preemption.stopped_by)

    def between_steps(self, epoch: int, step: int, steps: int, save: Callable[[str], None]) -> bool:
        """Whether the run stops here, with `step` the next of `steps`. All ranks get the same answer.

        Args:
            save: saves the run where it stands; it is told the signal that stops the run, or "".

        Raises:
            NonFinite: more than `max_bad_steps` were skipped in a row; weights and checkpoint are as before them.
            TooManyBadImages: more than allowed cannot be read.
        """
        if step % self.interval == 0 or step == steps:
            self._check_steps(epoch, step, steps)
            self.bad_images.check()
        stop, due = self.preemption.agree()
        if stop or due:
            self.bad_images.check()
            save(self.preemption.stopped_by)
        return stop

    def figures(self) -> dict[str, int]:
        """For the log: what this process skipped and what of the data is unreadable; empty if all is well."""
        counts = {"bad_steps": self.bad_steps.read()[1], "bad_images": len(self.bad_images.known)}
        return {name: count for name, count in counts.items() if count}

    def close(self) -> None:
        """Leave signals to whoever had them before."""
        self.hearsay.listen()
        self.preemption.close()

    def raise_if_stopped(self) -> None:
        """The end of a script.

        Raises:
            Preempted: a signal ended the run.
        """
        if self.stopped:
            raise Preempted()

    def _check_steps(self, epoch: int, step: int, steps: int) -> None:
        worst, total, new = self.bad_steps.read()
        if new:
            log.warning("%d steps skipped: loss or gradient not finite (%d in all since the start)", new, total)
        if worst <= self.max_bad_steps:
            return
        report = self.bad_steps.report(self.names, gather)
        number = epoch * steps + step - 1 - report.pop("steps_ago")
        report = {"epoch": number // steps, "step": number % steps, "steps_in_a_row": worst, **report}
        report["files"] = [self.source.name(i) for i in self.sampler.of_step(report["epoch"], report["step"])]
        from_rank_zero(lambda: (self.folder / REPORT).write_text(json.dumps(report, indent=2) + "\n"))
        raise NonFinite(
            f"loss or gradient was not finite in {worst} steps in a row, more than --max_bad_steps "
            f"{self.max_bad_steps}, from epoch {report['epoch']}, step {report['step']} on (losses "
            f"{', '.join(f'{loss:g}' for loss in report['losses'])}); {self.folder / REPORT} has the gradient norms of "
            "the parts and the files of the batch. All these steps were skipped: the checkpoint is good, a lower --lr "
            "or --clip_grad, or --precision fp32 or bf16, may get past"
        )
