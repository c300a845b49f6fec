"""The course of a training run, shared by the scripts: where it goes on, when it ends, what it saves and logs.

What is trained, on what, and by which loss is up to the scripts and their engines.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from util import rng
from util.data.datasets import Source
from util.data.loader import EpochSampler
from util.metrics import MeanMeter
from util.run import checkpoint, distributed
from util.run.amp import Precision
from util.run.logger import Progress, RunLogger, describe_environment
from util.run.watch import Supervisor
from util.schedules import adjust_learning_rate

log = logging.getLogger("hpm")


@dataclass(frozen=True)
class LoopSettings:
    """The options that a loop heeds, by their names in the scripts."""

    model: str
    mean: list[float]
    std: list[float]
    epochs: int
    start_epoch: int
    steps_per_epoch: int
    max_steps: int | None
    accum_iter: int
    global_batch: int
    warmup_epochs: float
    min_lr: float
    seed: int
    log_interval: int
    log_dir: str | None
    save_interval: int
    save_every_minutes: float | None
    max_bad_steps: int
    max_bad_images: int
    dist_timeout: float

    @classmethod
    def among(cls, options: dict[str, Any]) -> "LoopSettings":
        return cls(**{field.name: options[field.name] for field in fields(cls)})


class TrainingLoop:
    """Takes a run from epoch to epoch, as its options say.

        loop = TrainingLoop(run, parts, sampler, world, device)
        if loop.finished:
            return loop.leave()
        loop.begin(student, optimizer, precision, source, args.lr)
        for epoch in loop.epochs():
            stats = train_one_epoch(student, loop.batches(loader), optimizer, precision, ..., **loop.for_engine())
            if not loop.complete():
                break
            loop.end_epoch(stats, {})
        loop.close()

    Args:
        run: the run's folder, whose options are checked; its checkpoint, if there is one, is loaded into `parts`.
        parts: what has a state, by its key in the checkpoint.
        sampler: the order of the training images.

    Attributes:
        epoch, step: the next to run.
        best: best accuracy so far; None if there is none.
        meter: running means of the epoch.
    """

    def __init__(
        self,
        run: checkpoint.Run,
        parts: dict[str, Any],
        sampler: EpochSampler,
        world: distributed.World,
        device: torch.device,
    ) -> None:
        self.run, self.sampler, self.world = run, sampler, world
        self.settings = settings = LoopSettings.among(run.options)
        going_on = run.found is not None
        image = {"mean": settings.mean, "std": settings.std}
        self.epoch, self.step, extra = run.restore(parts, settings.model, image)
        if not going_on:
            self.epoch = self.settings.start_epoch
        self.best: float | None = extra.get("best")
        self.meter = MeanMeter()
        if self.step:
            self.meter.load_state_dict(extra["meter"], device, holder=world.rank == 0)

    @property
    def finished(self) -> bool:
        """Whether all that the options ask for is done."""
        return self._is_finished(self.step)

    def _is_finished(self, step: int) -> bool:
        settings = self.settings
        asked = {"epochs": settings.epochs, "steps_per_epoch": settings.steps_per_epoch}
        return checkpoint.is_finished(self.epoch, step, {**asked, "max_steps": settings.max_steps})

    def leave(self) -> None:
        """The end of a run that had nothing left to do."""
        done = (self.epoch, self.settings.epochs, self.step)
        log.info("nothing is left to do: %d of %d epochs and %d steps are done", *done)
        self.run.close()
        distributed.stop()

    def begin(
        self, student: nn.Module, optimizer: torch.optim.Optimizer, precision: Precision, source: Source, lr: float
    ) -> None:
        """Watch over signals, steps and images from here on, and open the log.

        Args:
            student: what is trained, or what DDP made of it.
            source: the training images.
            lr: the peak of the schedule, of parameter groups whose `lr_scale` is 1.
        """
        settings, folder = self.settings, self.run.folder
        self.supervisor = Supervisor(
            *(folder, student, precision.bad_steps, source, self.sampler),
            interval=settings.log_interval,
            save_every_minutes=settings.save_every_minutes,
            max_bad_steps=settings.max_bad_steps,
            max_bad_images=settings.max_bad_images,
            timeout_minutes=settings.dist_timeout,
        )
        events = Path(settings.log_dir or folder)
        self.logger = RunLogger(folder if self.world.rank == 0 else None, events, keep_epochs=self.epoch)
        environment = describe_environment()
        self.logger.config({"script": self.run.script, "options": self.run.options, "environment": environment})
        self._adjust_lr = partial(
            adjust_learning_rate,
            optimizer,
            lr=lr,
            min_lr=settings.min_lr,
            warmup_epochs=settings.warmup_epochs,
            epochs=settings.epochs,
        )

    def epochs(self) -> Iterator[int]:
        """The epochs that are left; the first one may be in its middle."""
        settings = self.settings
        while not self.finished:
            self.sampler.set_position(self.epoch, self.step * settings.accum_iter)
            position = (self.epoch, settings.epochs, self.step, settings.steps_per_epoch)
            self.progress = Progress(self.logger, *position, settings.global_batch, settings.log_interval)
            yield self.epoch

    def batches(self, loader: Iterable) -> Iterable:
        """The loader's batches, with an eye on images that cannot be read."""
        return self.supervisor.bad_images.watch(loader)

    def for_engine(self) -> dict[str, Any]:
        """What train_one_epoch needs to know of the run."""
        return {
            "accum_iter": self.settings.accum_iter,
            "adjust_lr": self._adjust_lr,
            "seed_micro_step": lambda number: rng.seed_all(self.settings.seed, self.world.rank, number),
            "epoch": self.epoch,
            "first_step": self.step,
            "steps": self.settings.steps_per_epoch,
            "progress": self.progress,
            "meter": self.meter,
            "after_step": self._after_step,
        }

    def _after_step(self, step: int) -> bool:
        steps = self.settings.steps_per_epoch
        stop = self.supervisor.between_steps(self.epoch, step, steps, partial(self._save_inside, step))
        return stop or self._is_finished(step)

    def _save_inside(self, step: int, stopped: str = "") -> None:
        meter = {"meter": self.meter.state_dict(distributed.all_reduce_sum)}
        self.run.save(self.epoch, step, self._extra() | meter, stopped=stopped)

    def _extra(self) -> dict[str, Any]:
        return {} if self.best is None else {"best": self.best}

    def complete(self) -> bool:
        """After training in an epoch: whether it came to its end. If not, the run is saved where it stands."""
        self._times = self.progress.finish()
        if self.progress.step == self.settings.steps_per_epoch and not self.supervisor.stopped:
            return True
        self.step = self.progress.step
        if not self.supervisor.stopped:
            self._save_inside(self.step)
        return False

    def end_epoch(self, stats: dict[str, float], figures: dict[str, Any], accuracy: float | None = None) -> None:
        """Log and save a complete epoch; the next one is then the one to run.

        Args:
            stats: means of the training, logged as train_NAME.
            figures: what else to log.
            accuracy: what tells the best epoch, if there is such a thing.
        """
        line = {"epoch": self.epoch, **{f"train_{name}": value for name, value in stats.items()}, **figures}
        is_best = accuracy is not None and accuracy > (self.best or 0.0)
        if accuracy is not None:
            self.best = line["best_acc1"] = max(self.best or 0.0, accuracy)
        self.logger.epoch(line | self.supervisor.figures() | self._times)
        self.epoch, self.step, self.meter = self.epoch + 1, 0, MeanMeter()
        keep = self.epoch % self.settings.save_interval == 0 or self.epoch == self.settings.epochs
        self.run.save(self.epoch, self.step, self._extra(), keep=keep, best=is_best)

    def close(self) -> None:
        """The end of the script.

        Raises:
            Preempted: a signal ended the run.
        """
        done = (self.epoch, self.settings.epochs, self.step, self.run.folder / checkpoint.LAST)
        log.info("done: %d of %d epochs and %d steps, saved in %s", *done)
        self.logger.close()
        self.run.close()
        self.supervisor.close()
        distributed.stop()
        self.supervisor.raise_if_stopped()
