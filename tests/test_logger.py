"""The log of a run: files and console."""

import errno
import io
import itertools
import json
import logging
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from util.run import logger as logs


@pytest.fixture
def lines(caplog):
    logs.log.propagate = True
    caplog.set_level(logging.INFO, logger="hpm")
    return caplog


def progress(logger, **kwargs):
    settings = {"epoch": 0, "epochs": 2, "step": 0, "steps": 6, "global_batch": 10}
    return logs.Progress(logger, **{**settings, **kwargs})


def take_steps(bar, count, report_at=()):
    for _ in range(count):
        bar.step += 1
        bar.bar.update()
        if bar.step in report_at:
            bar.report({"loss": 0.5, "lr": 1e-4})


def run_logger(folder, log_dir=None, position=0.0):
    return logs.RunLogger(folder, log_dir or folder, position, {"script": "s"})


@pytest.fixture
def seconds_apart(monkeypatch):
    """Event files are read in the order of their names: seconds, process, then a counter as text, where 10 precedes 9.
    The parts of a resumed run are different processes, seconds apart; those of a test are not."""
    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=itertools.count(1).__next__))


def test_a_line_has_metrics_throughput_and_time_remaining(tmp_path, lines):
    bar = progress(run_logger(tmp_path))
    take_steps(bar, 3, report_at=[3])
    assert "epoch 1/2  step 3/6  loss 0.5000  lr 1.00e-04  img/s " in lines.text
    assert "data_wait 0%  eta 0:00:0" in lines.text


def test_a_terminal_has_a_bar_and_keeps_one_line_per_epoch(tmp_path, lines, monkeypatch):
    """80 columns of the bar are enough for the time remaining and the loss."""
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    bar = progress(run_logger(tmp_path))
    take_steps(bar, 6, report_at=[3, 6])
    bar.bar.close()
    shown = [line for line in screen.getvalue().split("\r") if "3/6" in line]
    assert "epoch 1/2:  50%|" in shown[-1]
    assert ", eta 0:00:0" in shown[-1]
    assert "loss 0.5000" in shown[-1][:80]
    assert [record.message.split("  loss")[0] for record in lines.records] == ["epoch 1/2  step 6/6"]


def test_summary_of_an_epoch():
    """Of a whole one: where it was resumed, the time before is unknown."""
    bar = progress(run_logger(None, "unused"))
    take_steps(bar, 4)
    bar.waited = 2.0
    times = bar.summary(until=bar.began + 8)
    assert times == {"epoch_seconds": 8, "images_per_s": 5, "data_wait": 0.25}
    bar.first_step = 1
    assert bar.summary(until=bar.began + 8) == {}


@pytest.mark.parametrize("fault", [errno.EPIPE, errno.EIO])
def test_where_nobody_reads_the_output(fault, monkeypatch):
    """Outside a training run the program ends quietly; in one it is a lost terminal; under nohup nothing changes."""

    def gone(*_, **__):
        raise OSError(fault, "gone")

    def write():
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=gone, flush=gone))
        logs.setup_logging(True)
        logs.log.info("a line")
        logs.log.info("another line")

    noted = []
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit, match="141"):
            write()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        write()
        signal.signal(signal.SIGHUP, lambda *_: noted.append(1))
        write()
    finally:
        signal.signal(signal.SIGHUP, before)
        logs.log.handlers.clear()
    assert noted == [1]


def test_log_and_tensorboard(tmp_path):
    logger = run_logger(tmp_path, tmp_path / "tb")
    logger.epoch({"epoch": 0, "train_loss": 1.5})
    logger.epoch({"epoch": 1, "train_loss": 1.25})
    logger.scalars({"loss": 2.0}, 0.5)
    logger.close()
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        {"epoch": 0, "train_loss": 1.5},
        {"epoch": 1, "train_loss": 1.25},
    ]
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["script"], config["environment"]["torch"]) == ("s", torch.__version__)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("epoch/train_loss")] == [(1000, 1.5), (2000, 1.25)]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(500, 2.0)]


def test_lines_are_valid_json_whatever_the_values(tmp_path):
    logger = run_logger(tmp_path)
    logger.epoch({"epoch": 0, "train_loss": float("nan"), "test_loss": float("inf"), "test_acc1": 10.0})
    logger.close()

    def reject(constant):
        raise AssertionError(constant)

    (line,) = (json.loads(text, parse_constant=reject) for text in (tmp_path / "log.jsonl").read_text().splitlines())
    assert line == {"epoch": 0, "train_loss": None, "test_loss": None, "test_acc1": 10.0}


def test_lines_of_epochs_to_be_repeated_are_cut(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = "".join(json.dumps({"epoch": e}) + "\n" for e in range(4))
    path.write_bytes(lines.encode() + b'12\n[0]\n{"loss": 1}\n\xff\n' + b'{"epoch": 4, "tr')
    run_logger(tmp_path, position=2.0).close()
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [0, 1]


def test_curves_of_a_resumed_run_have_every_epoch_once(tmp_path, seconds_apart):
    """The second epoch is repeated; the first stays, with its panel."""
    for keep, epochs in ((0, [0, 1]), (1, [1])):
        logger = run_logger(tmp_path, position=float(keep))
        for epoch in epochs:
            logger.epoch({"epoch": epoch, "train_loss": float(epoch + 10 * keep)})
            logger.image("panel", torch.zeros(3, 4, 4, dtype=torch.uint8), epoch + 1)
        logger.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("epoch/train_loss")] == [(1000, 0.0), (2000, 11.0)]
    assert [e.step for e in events.Images("panel")] == [1000, 2000]


def test_resuming_mid_epoch_keeps_the_points_before(tmp_path, seconds_apart):
    """Stopped at 1.4 epochs: what was logged before stays visible, what is repeated is hidden."""
    logger = run_logger(tmp_path)
    for epoch in (0.5, 1.2, 1.4, 1.6):
        logger.scalars({"loss": epoch}, epoch)
    logger.close()
    logger = run_logger(tmp_path, position=1.4)
    logger.scalars({"loss": 9.0}, 1.6)
    logger.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, round(e.value, 1)) for e in events.Scalars("loss")] == [
        (500, 0.5),
        (1200, 1.2),
        (1400, 1.4),
        (1600, 9.0),
    ]


def test_without_git_the_commit_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert logs.describe_environment()["git_commit"] is None


def test_the_commit_is_what_git_says(tmp_path, monkeypatch):
    (tmp_path / "git").write_text("#!/bin/sh\necho 1d587fe\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert logs.describe_environment()["git_commit"] == "1d587fe"


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = run_logger(None, "unused")
    logger.scalars({"a": 1.0}, 0)
    logger.epoch({"epoch": 0})
    progress(logger).report({"a": 1.0})
    logger.close()
    assert list(tmp_path.iterdir()) == []


def test_the_environment_is_described():
    environment = logs.describe_environment()
    assert {"command", "git_commit", "torch", "timm", "torchvision", "python"} <= set(environment)
    json.dumps(environment)
