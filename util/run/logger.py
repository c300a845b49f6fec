"""The only writer of a run's log: console, log.jsonl, TensorBoard, config.json."""

import errno
import io
import json
import logging
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from util.run.folder import CONFIG, LOG, read_config, read_log, write_atomic, write_text

log = logging.getLogger("hpm")

_FORMATS = {"lr": ".2e", "grad_norm": ".2f"}  # in the console; other values have four decimals


class _ThroughBar(logging.Handler):
    """Prints lines to standard output without breaking the progress bar on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - also for what Python flushes at exit
            _output_is_gone()


def _output_is_gone() -> None:
    """Nobody reads standard output any more (`| head`, a closed terminal): the same as a lost terminal. A training run
    saves and stops, under nohup it continues; anything else ends quietly."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        raise SystemExit(128 + signal.SIGPIPE) from None
    signal.raise_signal(signal.SIGHUP)


def setup_logging(enabled: bool) -> None:
    """The "hpm" logger prints to standard output on rank 0; on other ranks only errors, to standard error. Characters
    that the locale cannot print are escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    log.handlers.clear()
    log.propagate = False
    handler = _ThroughBar() if enabled else logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s" if enabled else "%(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO if enabled else logging.ERROR)


def describe_environment() -> dict[str, Any]:
    """Command line, git commit, versions and device, for config.json."""
    import timm
    import torchvision

    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # git is not installed
        commit = ""
    return {
        "command": sys.argv,
        "git_commit": commit or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
    }


class RunLogger:
    """Log of a run; on ranks other than 0 (`folder` None) it does nothing.

    Args:
        folder: the run folder, for log.jsonl and config.json.
        log_dir: folder of the TensorBoard events.
        position: epochs completed, as a fraction. Later lines and events belong to work that will be repeated: lines
            are cut, events hidden.
        config: content of config.json. The content from earlier parts of the run is kept under `history`.
    """

    def __init__(self, folder: Path | None, log_dir: Path, position: float, config: dict[str, Any]) -> None:
        self.folder = folder
        self.writer = None
        if folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and needed on one rank only

        if (folder / LOG).exists():
            kept = [line for line in read_log(folder) if line["epoch"] < int(position)]
            write_text(folder / LOG, "".join(json.dumps(line) + "\n" for line in kept))
        before = read_config(folder) if position else {}
        if before:  # what the run was until here
            config |= {"history": [*before.pop("history", []), before]}
        text = json.dumps(config | {"environment": describe_environment()}, indent=2) + "\n"
        write_atomic(folder / CONFIG, lambda file: file.write(text.encode()))
        purge_step = int(position * 1000) + 1 if position else None
        self.writer = SummaryWriter(log_dir=str(log_dir), purge_step=purge_step)

    def scalars(self, values: dict[str, float], epoch: float) -> None:
        """To TensorBoard. The x-axis is thousandths of an epoch, so that runs of any batch size compare (MAE)."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, int(epoch * 1000))

    def image(self, name: str, picture: torch.Tensor, epoch: float) -> None:
        """(3, H, W) uint8 to TensorBoard."""
        if self.writer is not None:
            self.writer.add_image(name, picture, int(epoch * 1000))

    def epoch(self, record: dict[str, Any]) -> None:
        """One line of log.jsonl, and the same to TensorBoard. JSON has no NaN: what is not finite becomes null."""
        if self.folder is None or self.writer is None:
            return
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with open(self.folder / LOG, "a") as file:
            file.write(json.dumps(record) + "\n")
        self.scalars({f"epoch/{k}": v for k, v in record.items() if isinstance(v, (int, float))}, record["epoch"] + 1)
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Progress:
    """Shows the steps of an epoch: a bar on a terminal, elsewhere a line every `log_interval` steps.

    Args:
        epoch, epochs: number of the epoch from 0, and of how many; for the time remaining in the run.
        step, steps: optimizer steps completed, and of the whole epoch.
        global_batch: images per step over all ranks.

    Attributes:
        step: optimizer steps completed, incremented by the loop.
        waited: seconds spent waiting for data, added up by the loop.
    """

    def __init__(self, logger: RunLogger, epoch: int, epochs: int, step: int, steps: int, global_batch: int) -> None:
        self.logger, self.global_batch = logger, global_batch
        self.epoch, self.epochs = epoch, epochs
        self.step, self.first_step, self.steps = step, step, steps
        self.waited = 0.0
        self.began = time.perf_counter()
        self._window = (self.began, 0.0, step)  # time, seconds waited and step at the last report
        visible = logger.folder is not None and sys.stderr.isatty()
        self.bar = tqdm(
            total=steps,
            initial=step,
            desc=f"epoch {epoch + 1}/{epochs}",
            bar_format="{l_bar}{bar:10}| {n_fmt}/{total_fmt}{postfix}",  # the eta of the run is in the postfix
            disable=not visible,
            dynamic_ncols=True,
            leave=False,
        )

    def report(self, values: dict[str, float]) -> None:
        """Show the means since the last report, with throughput and time remaining."""
        now = time.perf_counter()
        since, waited, step = self._window
        self._window = (now, self.waited, self.step)
        speed = {
            "images_per_s": (self.step - step) * self.global_batch / max(now - since, 1e-9),
            "data_wait": (self.waited - waited) / max(now - since, 1e-9),
        }
        self.logger.scalars({**values, **speed}, self.epoch + self.step / self.steps)
        if self.logger.folder is None:
            return
        left = (self.epochs - self.epoch) * self.steps - self.step
        eta = timedelta(seconds=int(left * (now - self.began) / max(self.step - self.first_step, 1)))
        metrics = "  ".join(f"{name} {value:{_FORMATS.get(name, '.4f')}}" for name, value in values.items())
        metrics += f"  img/s {speed['images_per_s']:.0f}  data_wait {speed['data_wait']:.0%}"
        self.bar.set_postfix_str(f"eta {eta}  {metrics}")  # a narrow terminal cuts off the end
        if self.bar.disable or self.step == self.steps:  # the bar disappears with the epoch, this line stays
            where = f"epoch {self.epoch + 1}/{self.epochs}  step {self.step}/{self.steps}"
            log.info("%s  %s  eta %s", where, metrics, eta)

    def summary(self, until: float) -> dict[str, float]:
        """Seconds of the epoch up to the time `until`, images per second, share of time spent waiting for data; {} if
        the epoch was resumed, since only a part of it was timed."""
        if self.first_step:
            return {}
        seconds = max(until - self.began, 1e-9)
        return {
            "epoch_seconds": seconds,
            "images_per_s": self.step * self.global_batch / seconds,
            "data_wait": self.waited / seconds,
        }


def track(batches: Iterable, images: int, what: str, every_seconds: float = 10.0) -> Iterator:
    """Pass batches through, showing progress over `images` images: a bar on a terminal, elsewhere a line every 10 s."""
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
