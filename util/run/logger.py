"""The only writer of a run's output: console, log.jsonl, TensorBoard, config.json."""

import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

log = logging.getLogger("hpm")

_COMPACT = {"lr": ".2e", "ema_decay": ".5f", "grad_norm": ".2f", "num_hardest": ".0f", "bad_steps": ".0f"}


class _ThroughBar(logging.Handler):
    """Lines on standard output that do not tear the progress bar on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def setup_logging(enabled: bool) -> None:
    """Lines of the "hpm" logger go to standard output on rank 0, elsewhere nothing but errors to standard error."""
    log.handlers.clear()
    log.propagate = False
    handler = _ThroughBar() if enabled else logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s" if enabled else "%(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO if enabled else logging.ERROR)


def describe_environment() -> dict[str, Any]:
    """Versions, device, git commit and command line, for config.json."""
    import timm
    import torchvision

    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "command": sys.argv,
        "git_commit": commit.stdout.strip() or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
    }


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that it is never seen half-written."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


class RunLogger:
    """Log of one run; on ranks other than 0 (`folder` None) it does nothing.

    Args:
        folder: the run's folder, for log.jsonl.
        log_dir: folder of the TensorBoard events.
        keep_epochs: lines of log.jsonl beyond this many epochs are cut: they are of work that was lost and is redone.
    """

    def __init__(self, folder: Path | None, log_dir: Path | None, keep_epochs: int) -> None:
        self.folder = folder
        self.writer = None
        if folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and of use on one rank only

        self._cut(folder / "log.jsonl", keep_epochs)
        self.writer = SummaryWriter(log_dir=str(log_dir), purge_step=keep_epochs * 1000 + 1 if keep_epochs else None)

    @staticmethod
    def _cut(path: Path, keep_epochs: int) -> None:
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["epoch"] < keep_epochs:
                    kept.append(line)
            except ValueError:
                continue  # half a line, of a run that was killed as it wrote
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(line + "\n" for line in kept))
        partial.replace(path)

    def config(self, content: dict[str, Any]) -> None:
        """config.json: what this run is."""
        if self.folder is not None:
            write_json(self.folder / "config.json", content)

    def scalars(self, values: dict[str, float], epoch: float) -> None:
        """To TensorBoard; the x-axis is thousandths of an epoch, so that runs of any batch size compare (MAE)."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, int(epoch * 1000))

    def image(self, name: str, picture: torch.Tensor, epoch: float) -> None:
        """(3, H, W) uint8 to TensorBoard."""
        if self.writer is not None:
            self.writer.add_image(name, picture, int(epoch * 1000))

    def epoch(self, record: dict[str, Any]) -> None:
        """One line of log.jsonl, and the same to TensorBoard."""
        if self.folder is None:
            return
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        self.scalars({f"epoch/{k}": v for k, v in record.items() if isinstance(v, (int, float))}, record["epoch"] + 1)
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Progress:
    """Steps of an epoch, shown on a terminal as a bar and a line at its end, elsewhere as a line each `interval` steps.

    It also keeps the time: how long the epoch took, and what share of that was waiting for data.

    Args:
        total_steps: optimizer steps of the epoch.
        images_per_step: over all ranks.
        epochs: of the whole run, for the time it will still take.
    """

    def __init__(
        self,
        logger: RunLogger,
        epoch: int,
        epochs: int,
        first_step: int,
        total_steps: int,
        images_per_step: int,
        interval: int,
    ) -> None:
        self.logger = logger
        self.epoch, self.epochs = epoch, epochs
        self.step, self.first_step, self.total_steps = first_step, first_step, total_steps
        self.images_per_step, self.interval = images_per_step, interval
        self.waited = 0.0
        self.began = time.perf_counter()
        self._window = (self.began, 0.0, first_step)  # time, waiting and step at the last line
        visible = logger.folder is not None and sys.stderr.isatty()
        self.bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc=f"epoch {epoch + 1}/{epochs}",
            bar_format="{l_bar}{bar:10}| {n_fmt}/{total_fmt}{postfix}",  # the time left is the run's, in the postfix
            disable=not visible,
            dynamic_ncols=True,
            leave=False,
        )

    def waiting(self, batches: Iterable) -> Iterator:
        """The batches, with the time each is waited for counted."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - start
            yield batch

    def advance(self) -> bool:
        """One more optimizer step is done. True when its numbers should be read: waiting for the device costs time."""
        self.step += 1
        self.bar.update()
        return self.step % self.interval == 0 or self.step == self.total_steps

    def report(self, values: dict[str, float]) -> None:
        """Show the means since the last report, with speed and the time left."""
        now = time.perf_counter()
        since, waited, step = self._window
        self._window = (now, self.waited, self.step)
        rate = (self.step - step) * self.images_per_step / max(now - since, 1e-9)
        wait = (self.waited - waited) / max(now - since, 1e-9)
        speed = {"images_per_s": rate, "data_wait": wait}
        self.logger.scalars({**values, **speed}, self.epoch + self.step / self.total_steps)
        if self.logger.folder is None:
            return
        left = (self.epochs - self.epoch) * self.total_steps - self.step
        seconds = left * (now - self.began) / max(self.step - self.first_step, 1)
        figures = "  ".join(f"{name} {value:{_COMPACT.get(name, '.4f')}}" for name, value in values.items())
        speed, eta = f"{rate:.0f} img/s  waiting for data {wait:.0%}", f"eta {timedelta(seconds=int(seconds))}"
        self.bar.set_postfix_str(f"{eta}  {figures}  {speed}")  # a narrow terminal cuts off the end
        if self.bar.disable or self.step == self.total_steps:  # the bar goes at the end of the epoch, its figures stay
            position = (self.epoch + 1, self.epochs, self.step, self.total_steps)
            log.info("epoch %d/%d  step %d/%d  %s  %s  %s", *position, figures, speed, eta)

    def finish(self) -> dict[str, float]:
        """Close the bar; the epoch's time, images per second and share of time spent waiting for data."""
        self.bar.close()
        seconds = time.perf_counter() - self.began
        steps = self.step - self.first_step
        return {
            "epoch_seconds": seconds,
            "images_per_s": steps * self.images_per_step / max(seconds, 1e-9),
            "data_wait": self.waited / max(seconds, 1e-9),
        }


def track(batches: Iterable, images: int, what: str, every_seconds: float = 10.0) -> Iterator:
    """The batches of a pass over `images` images, shown as a bar on a terminal, elsewhere as a line now and then."""
    began = last = time.perf_counter()
    done = 0
    visible = log.isEnabledFor(logging.INFO) and sys.stderr.isatty()
    with tqdm(total=images, desc=what, unit="img", disable=not visible, dynamic_ncols=True, leave=False) as bar:
        for batch in batches:
            yield batch
            done += len(batch[0])
            bar.update(len(batch[0]))
            now = time.perf_counter()
            if not visible and now - last > every_seconds:
                last = now
                log.info("%s: %s of %s images, %.0f img/s", what, f"{done:,}", f"{images:,}", done / (now - began))


def cpu_threads() -> str:
    """How many threads compute here, for the start of the log."""
    return f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
