"""The training loop, shared by the scripts: epochs, steps, micro-batches, learning rate, log, checkpoints.

What is trained, on what, and with which loss is up to the scripts and their engines.
"""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from util.data.loader import EpochSampler
from util.data.sources import Source
from util.metrics import MeanMeter
from util.rng import seed_all
from util.run.amp import Amp
from util.run.checkpoint import Run, best_accuracy, is_finished, save_run
from util.run.distributed import all_reduce_sum, from_rank_zero, shutdown
from util.run.folder import BEST, LAST, events_folder
from util.run.logger import Progress, RunLogger
from util.run.options import user_mistakes
from util.run.watch import EXIT_STATUS, Watch
from util.schedules import adjust_learning_rate

log = logging.getLogger("hpm")


class Loop:
    """Runs the epochs of a training run, from the checkpoint it resumes from to the end or to a signal.

        loop = Loop(run, vars(args), {"state_dict": model, "optimizer": optimizer}, sampler, source, amp)
        for epoch in loop.epochs():
            stats = train_one_epoch(model, ..., loader, optimizer, amp, loop)
            if loop.stopped:
                break
            loop.save_mid_epoch()               # where an evaluation comes next
            loop.end_epoch(stats, {...})
        loop.close()

    and in the engine:

        for batches in loop.steps(loader):          # one optimizer step
            for images, *_ in batches:              # its micro-batches
                with loop.no_sync(model):
                    ...
            loop.meter.update(loss=...)
        return loop.meter.mean(all_reduce_sum)

    Args:
        run: the run's folder, and the checkpoint to resume from.
        options: every option, resolved; saved in checkpoints and config.json.
        stateful: objects with a `state_dict`, by their key in the checkpoint. `optimizer` is required; its default lr
            is the peak of the schedule.
        sampler: the order of the training images.
        source: the training images.

    Attributes:
        epoch, step: the next to run.
        stopped: whether the run stops mid-epoch, saved, because of a signal or --max_steps.
        best: best accuracy so far; None without one.
        meter: running means of the epoch.
    """

    def __init__(
        self,
        run: Run,
        options: dict[str, Any],
        stateful: dict[str, Any],
        sampler: EpochSampler,
        source: Source,
        amp: Amp,
    ) -> None:
        self.run, self.options, self.stateful = run, options, stateful
        self.sampler, self.source, self.amp = sampler, source, amp
        self.steps_per_epoch, self.accum_iter = options["steps_per_epoch"], options["accum_iter"]
        self.epoch, self.step, self.stopped = options["start_epoch"], 0, False
        self.best: float | None = None
        self.meter = MeanMeter()
        self.opened = False  # True once `epochs` has created the log and the watch
        if run.state is not None:
            self._restore(run.state)

    def _restore(self, state: dict[str, Any]) -> None:
        for name, part in self.stateful.items():
            if name == "optimizer":
                self._restore_optimizer(state[name])
            else:
                part.load_state_dict(state[name])
        self.epoch, self.step, extra = state["epoch"], state["step"], state["extra"]
        self.best = from_rank_zero(lambda: best_accuracy(self.run.folder, self.epoch))
        if self.step:
            self.meter.load_state_dict(extra["meter"], self.amp.device, holder=self.sampler.rank == 0)
        log.info("Resuming from %s (epoch %d, step %d)", self.run.path, self.epoch, self.step)
        for change in self.run.changes:
            log.info("Changed since the checkpoint: %s", change)
        if self.options["start_epoch"] not in (0, self.epoch):
            log.warning(
                "--start_epoch %d is ignored: the checkpoint says epoch %d", self.options["start_epoch"], self.epoch
            )
        before, now = state["options"].get("processes"), self.options["processes"]
        if before != now:
            log.warning(
                "World size changed (%s -> %s): global batches are the same but sharded differently, so masks and "
                "augmentation differ. Bit-exact resume needs the original world size",
                before,
                now,
            )
        before, now = extra.get("images"), len(self.source)
        if before not in (None, now):
            log.warning("The training data have changed since the checkpoint: %d images, now %d", before, now)
        self.run.state = None  # frees the memory

    def _restore_optimizer(self, state: dict[str, Any]) -> None:
        """The moments of the checkpoint, but the hyper-parameters of the options: a changed option takes effect."""
        optimizer = self.stateful["optimizer"]
        settings = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, setting in zip(optimizer.param_groups, settings, strict=True):
            group.update(setting)

    @property
    def finished(self) -> bool:
        """Whether everything that the options request is done."""
        return is_finished(self.epoch, self.step, self.options)

    def epochs(self) -> Iterator[int]:
        """The remaining epochs. The first one may start mid-epoch."""
        options = self.options
        if is_finished(self.epoch, self.step, options):
            log.info("Run already complete (epoch %d/%d, step %d)", self.epoch, self.options["epochs"], self.step)
            if self.run.changes:
                log.warning("The changed options are ignored: choose another --output_dir to train with them")
            return
        folder = self.run.folder
        if self.run.path is not None:
            self.run.begin(self.run.path)
        self.opened = True
        self.watch = Watch(
            folder,
            self.source,
            self.sampler,
            self.amp,
            save_every_minutes=options["save_every_minutes"],
            max_bad_steps=options["max_bad_steps"],
            max_bad_images=options["max_bad_images"],
            timeout_minutes=options["dist_timeout"],
        )
        name = f"{options['model']}_{options['experiment'] or self.run.script}"
        events = folder
        if options["log_dir"] is not None:
            with user_mistakes():
                events = from_rank_zero(lambda: events_folder(options["log_dir"], name, folder))
        self.logger = RunLogger(
            folder if self.sampler.rank == 0 else None,
            events,
            # An epoch that lacks only its evaluation is not complete: its line will be written again.
            self.epoch + min(self.step / self.steps_per_epoch, 0.999),
            {"script": self.run.script, "options": options},
        )
        while not (self.stopped or is_finished(self.epoch, self.step, options)):
            self.sampler.position = (self.epoch, self.step * self.accum_iter)
            self.progress = Progress(
                self.logger,
                self.epoch,
                options["epochs"],
                self.step,
                self.steps_per_epoch,
                options["global_batch"],
            )
            yield self.epoch

    def steps(self, loader: Iterable) -> Iterator[Iterator]:
        """The remaining optimizer steps of the epoch, each an iterator over its micro-batches.

        Sets the learning rate before a step. After it, logs every `log_interval` steps, saves a checkpoint when one is
        due, and ends early where the run must stop.
        """
        options, steps, optimizer = self.options, self.steps_per_epoch, self.stateful["optimizer"]
        end = steps
        if options["max_steps"] is not None:
            end = min(steps, options["max_steps"] - self.epoch * steps)
        batches = iter(loader)
        while self.step < end and not self.stopped:
            self._lr = adjust_learning_rate(
                optimizer,
                self.epoch + self.step / steps,
                lr=optimizer.defaults["lr"],
                min_lr=options["min_lr"],
                warmup_epochs=options["warmup_epochs"],
                epochs=options["epochs"],
                decay=options.get("lr_schedule", "cosine"),
            )
            yield self._micro_batches(batches)
            self.step += 1
            self.progress.step += 1
            self.progress.bar.update()
            due = self.step % options["log_interval"] == 0 or self.step == steps
            if due:
                self._report()
            self.stopped = self.watch.after_step(self.epoch, self.step, steps, due, self.save_mid_epoch)
        self.stopped = self.stopped or self.step < steps
        self.progress.bar.close()
        self._trained_until = time.perf_counter()

    def _report(self) -> None:
        self.progress.report({**self.meter.window(all_reduce_sum), "lr": self._lr})

    def _micro_batches(self, batches: Iterator) -> Iterator:
        """The micro-batches of a step. What is drawn after each depends on (seed, rank, its number in the run) only."""
        first = (self.epoch * self.steps_per_epoch + self.step) * self.accum_iter
        for micro in range(self.accum_iter):
            start = time.perf_counter()
            try:
                batch = next(batches)
            except (ConnectionError, EOFError, FileNotFoundError):  # a worker died while its batch was fetched
                time.sleep(1)  # its signal arrives, and PyTorch raises an error that names the worker
                raise
            self.progress.waited += time.perf_counter() - start
            found = batch.bad >= 0  # in CPU memory
            self.watch.unreadable.update(zip(batch.bad[found].tolist(), batch.reason[found].tolist(), strict=True))
            seed_all("micro-batch", self.options["seed"], self.sampler.rank, first + micro)
            self._last_micro_batch = micro == self.accum_iter - 1
            yield batch

    def no_sync(self, model: nn.Module) -> AbstractContextManager:
        """Around a micro-batch: DDP reduces gradients in the last one of a step only."""
        if self._last_micro_batch or not isinstance(model, DistributedDataParallel):
            return nullcontext()
        return model.no_sync()

    def save_mid_epoch(self, stopped: str = "") -> None:
        """Save a checkpoint now, so that a failing evaluation loses no training.

        Args:
            stopped: name of the signal that stops the run here.
        """
        self._save({"meter": self.meter.state_dict(all_reduce_sum)}, stopped=stopped)

    def end_epoch(self, stats: dict[str, float], metrics: dict[str, Any], accuracy: float | None = None) -> None:
        """Log and save a completed epoch.

        Args:
            stats: means of the training, logged as train_NAME.
            metrics: what else to log.
            accuracy: decides which epoch is the best, if there is such a metric.
        """
        line = {"epoch": self.epoch, **{f"train_{name}": value for name, value in stats.items()}, **metrics}
        also = []
        if accuracy is not None:
            if self.best is None or accuracy > self.best:
                also.append(BEST)
                self.best = accuracy
            line["best_acc1"] = self.best
        self.logger.epoch(line | self.watch.metrics() | self.progress.summary(self._trained_until))
        self.epoch, self.step, self.meter = self.epoch + 1, 0, MeanMeter()
        if self.epoch % self.options["save_interval"] == 0 or self.epoch == self.options["epochs"]:
            also.append(f"checkpoint-{self.epoch}.pth")
        self._save({}, also=also)

    def _save(self, extra: dict[str, Any], also: Iterable[str] = (), stopped: str = "") -> None:
        """Write the newest checkpoint, on rank 0, while the others wait."""
        extra["images"] = len(self.source)
        if self.best is not None:
            extra["best"] = self.best
        options = self.options
        state = {"script": self.run.script, "model": options["model"], "options": options}
        state |= {"image": {name: options[name] for name in ("mean", "std", "value_range")}}
        state |= {"epoch": self.epoch, "step": self.step, "stopped": stopped, "extra": extra}
        state |= {name: part.state_dict() for name, part in self.stateful.items()}
        from_rank_zero(lambda: save_run(self.run.folder, state, also))

    def close(self) -> None:
        """The end of the script.

        Raises:
            SystemExit: with status 75, a signal stopped the run, which is saved and can be started again.
            NonFinite, TooManyBadImages: as `Watch.check`, for a run that --max_steps ends between two lines of the log.
        """
        if not self.opened:  # no epoch was left
            self.run.close()
            shutdown()
            return
        if self.stopped and not self.watch.stopped_by:  # by --max_steps
            if self.step % self.options["log_interval"]:
                self._report()
                self.watch.check(self.epoch, self.step, self.steps_per_epoch)
            self.save_mid_epoch()
        path = self.run.folder / LAST
        log.info("Done: epoch %d/%d, step %d, saved in %s", self.epoch, self.options["epochs"], self.step, path)
        self.logger.close()
        self.watch.close()
        self.run.close()
        shutdown()
        if self.watch.stopped_by:
            raise SystemExit(EXIT_STATUS)
