"""What a run writes, and what it shows."""

import io
import json
import logging
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.run import logger as logs


@pytest.fixture
def lines(caplog):
    logs.log.propagate = True
    caplog.set_level(logging.INFO, logger="hpm")
    return caplog


def progress(logger, **kwargs):
    settings = {"epoch": 0, "epochs": 2, "first_step": 0, "total_steps": 6, "images_per_step": 10, "interval": 3}
    return logs.Progress(logger, **{**settings, **kwargs})


def test_lines_come_every_interval_and_at_the_end(tmp_path, lines):
    logger = logs.RunLogger(tmp_path, tmp_path, keep_epochs=0)
    bar = progress(logger, total_steps=7)
    read = []
    for _ in range(7):
        if bar.advance():
            read.append(bar.step)
            bar.report({"loss": 0.5, "lr": 1e-4})
    assert read == [3, 6, 7]
    assert "epoch 1/2  step 3/7  loss 0.5000  lr 1.00e-04" in lines.text
    assert "img/s  waiting for data 0%  eta" in lines.text


def test_a_terminal_has_a_bar_and_keeps_a_line_an_epoch(tmp_path, lines, monkeypatch):
    """Of the bar, 80 columns are enough for the time that the run will take, and for the loss."""
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    bar = progress(logs.RunLogger(tmp_path, tmp_path, keep_epochs=0))
    for _ in range(6):
        if bar.advance():
            bar.report({"loss": 0.5, "lr": 1e-4})
    bar.finish()
    shown = [line for line in screen.getvalue().split("\r") if "3/6" in line]
    assert "epoch 1/2:  50%|" in shown[-1]
    assert ", eta 0:00:0" in shown[-1]
    assert "loss 0.5000" in shown[-1][:80]
    assert [record.message.split("  loss")[0] for record in lines.records] == ["epoch 1/2  step 6/6"]


def test_waiting_for_data_is_measured(tmp_path):
    def slow():
        for i in range(4):
            time.sleep(0.05)
            yield i

    bar = progress(logs.RunLogger(None, None, 0))
    assert list(bar.waiting(slow())) == [0, 1, 2, 3]
    bar.step = 4
    times = bar.finish()
    assert 0.2 <= times["data_wait"] * times["epoch_seconds"]
    assert times["data_wait"] <= 1
    assert times["images_per_s"] == pytest.approx(40 / times["epoch_seconds"])


def test_log_and_tensorboard(tmp_path):
    logger = logs.RunLogger(tmp_path, tmp_path / "tb", keep_epochs=0)
    logger.config({"script": "s"})
    logger.epoch({"epoch": 0, "train_loss": 1.5})
    logger.epoch({"epoch": 1, "train_loss": 1.25})
    logger.scalars({"loss": 2.0}, 0.5)
    logger.close()
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        {"epoch": 0, "train_loss": 1.5},
        {"epoch": 1, "train_loss": 1.25},
    ]
    assert json.loads((tmp_path / "config.json").read_text()) == {"script": "s"}
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("epoch/train_loss")] == [(1000, 1.5), (2000, 1.25)]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(500, 2.0)]


def test_lines_of_lost_work_are_cut(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"epoch": e}) + "\n" for e in range(4)) + '{"epoch": 4, "tr')
    logs.RunLogger(tmp_path, tmp_path, keep_epochs=2).close()
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [0, 1]


def test_curves_of_a_resumed_run_have_every_epoch_once(tmp_path):
    """The second epoch is done anew; the first stays, with its panel."""
    for keep, epochs in ((0, [0, 1]), (1, [1])):
        logger = logs.RunLogger(tmp_path, tmp_path, keep_epochs=keep)
        for epoch in epochs:
            logger.epoch({"epoch": epoch, "train_loss": float(epoch + 10 * keep)})
            logger.image("panel", torch.zeros(3, 4, 4, dtype=torch.uint8), epoch + 1)
        logger.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("epoch/train_loss")] == [(1000, 0.0), (2000, 11.0)]
    assert [e.step for e in events.Images("panel")] == [1000, 2000]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = logs.RunLogger(None, None, keep_epochs=0)
    logger.config({})
    logger.scalars({"a": 1.0}, 0)
    logger.epoch({"epoch": 0})
    progress(logger).report({"a": 1.0})
    logger.close()
    assert list(tmp_path.iterdir()) == []


def test_the_environment_is_described():
    environment = logs.describe_environment()
    assert {"command", "git_commit", "torch", "timm", "torchvision", "python"} <= set(environment)
    json.dumps(environment)
