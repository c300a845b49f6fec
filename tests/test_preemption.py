"""Signals, timed checkpoints and resuming: whole programs, stopped mid-epoch."""

import json
import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from programs import (
    PRETRAIN,
    ROOT,
    assert_same_training,
    checkpoint,
    command,
    descendants,
    log_lines,
    ranks,
    run,
)

from util.run.watch import EXIT_STATUS, Watch

FINETUNE = [
    *["--model", "vit_micro_patch16", "--input_size", "16", "--patch_size", "4", "--shapes_train", "96"],
    *["--shapes_val", "21", "--batch_size", "8", "--epochs", "2", "--warmup_epochs", "0", "--log_interval", "1"],
]
MIXED = ["--mixup", "0.8", "--cutmix", "1.0", "--reprob", "0.5", "--drop_path", "0.2"]
TRAINING = {
    "main_pretrain": [*PRETRAIN, "--shapes_train", "96", "--log_interval", "1"],
    "main_finetune": [*FINETUNE, *MIXED],
    "main_linprobe": [*FINETUNE, "--blr", "1", "0.1"],
}


def steps_shown(process, count):
    """Wait until the log shows this many steps; what it showed until then."""
    shown = []
    while sum("step" in line and "img/s" in line for line in shown) < count:
        line = process.stdout.readline()
        assert line, "".join(shown) + process.stderr.read()
        shown.append(line)
    return "".join(shown)


def heed_signals():
    """Tests that run in the background may ignore some, and what they start would, too."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def signalled(script, options, number, after, processes=1, whom=lambda process: -process.pid):
    """Start a script, send a signal once `after` steps are logged; its exit status and output.

    As it is, the signal goes to the whole process group, the processes that load data included.
    """
    words = command(script, options, processes)
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=heed_signals,
    )
    shown = steps_shown(process, after)
    os.kill(whom(process), number)
    out, err = process.communicate(timeout=300)
    return process.returncode, shown + out + err


def assert_resume_is_exact(script, options, tmp_path, number):
    """The run that a signal stopped in tmp_path/parts resumes to the weights and the log of an uninterrupted run."""
    state = checkpoint(tmp_path / "parts")
    assert state["stopped"] == number.name
    assert 0 < state["epoch"] * 12 + state["step"] < 24
    assert run_status(tmp_path / "parts") == 75
    run(script, *options, "--output_dir", tmp_path / "whole")
    log = run(script, *options, "--output_dir", tmp_path / "parts")
    assert f"(epoch {state['epoch']}, step {state['step']})" in log
    assert_same_training(tmp_path / "whole", tmp_path / "parts")
    assert checkpoint(tmp_path / "parts")["stopped"] == ""
    assert run_status(tmp_path / "parts") == 0
    timed = {"epoch_seconds", "images_per_s", "data_wait"}
    for a, b in zip(log_lines(tmp_path / "whole"), log_lines(tmp_path / "parts"), strict=True):
        assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}


def test_a_signal_saves_mid_epoch_and_the_run_resumes_bitwise(tmp_path):
    """The whole program and its data loading workers get the signal, as a scheduler sends it."""
    options = [*TRAINING["main_pretrain"], "--num_workers", 2]
    status, out = signalled("main_pretrain", [*options, "--output_dir", tmp_path / "parts"], signal.SIGTERM, after=2)
    assert status == EXIT_STATUS == 75
    assert "Received SIGTERM: saving checkpoint and exiting with status 75" in out
    assert "Traceback" not in out
    assert_resume_is_exact("main_pretrain", options, tmp_path, signal.SIGTERM)


@pytest.mark.parametrize("script", ["main_finetune", "main_linprobe"])
def test_the_other_training_scripts_resume_bitwise(tmp_path, script, monkeypatch):
    """Mixup, erasing, drop path and batch statistics included. The signal comes in the third step, to this process."""
    agree, calls = Watch.agree, []

    def signalled_once(self):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return agree(self)

    monkeypatch.setattr(Watch, "agree", signalled_once)
    options = [*TRAINING[script], "--num_workers", 0]
    with pytest.raises(SystemExit) as stop:
        run(script, *options, "--output_dir", tmp_path / "parts")
    assert stop.value.code == 75
    assert_resume_is_exact(script, options, tmp_path, signal.SIGUSR1)


def test_ctrl_c_saves_like_sigterm(tmp_path):
    """To the whole process group, as a terminal sends it; a lost terminal (SIGHUP) likewise."""
    for number in (signal.SIGINT, signal.SIGHUP):
        options = [*TRAINING["main_pretrain"], "--num_workers", 1, "--output_dir", tmp_path / number.name]
        status, out = signalled("main_pretrain", options, number, after=2)
        assert status == 75, out
        assert "Traceback" not in out
        assert checkpoint(tmp_path / number.name)["stopped"] == number.name


def test_a_run_whose_output_nobody_reads_is_saved(tmp_path):
    """As if `| tee` is killed: the next line of the log stops it like a lost terminal."""
    options = [*TRAINING["main_pretrain"], "--log_interval", 1, "--epochs", 50, "--output_dir", tmp_path]
    words = command("main_pretrain", options)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen(words, **pipes, preexec_fn=heed_signals) as process:
        steps_shown(process, 2)
        process.stdout.close()
        shown = process.stderr.read()
    assert (process.returncode, shown) == (75, "")
    assert checkpoint(tmp_path)["stopped"] == "SIGHUP"


def test_a_second_ctrl_c_stops_at_once():
    bare = Watch.__new__(Watch)
    bare._noted = 0
    bare._note(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        bare._note(signal.SIGINT, None)


def second_rank(process):
    """The process id of torchrun's second process; those that load its data have its environment, but came later."""
    return min(pid for pid in descendants(process.pid) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())


def test_two_ranks_stop_together_and_resume_bitwise(tmp_path):
    """A signal to one rank stops the other too."""
    options = [*TRAINING["main_pretrain"], "--num_workers", 1]
    run_options = [*options, "--output_dir", tmp_path / "parts"]
    status, out = signalled("main_pretrain", run_options, signal.SIGTERM, 2, processes=2, whom=second_rank)
    assert status == 1  # torchrun's own, whatever its processes answer
    state = checkpoint(tmp_path / "parts")
    assert state["stopped"], out
    assert state["step"] > 0, out
    ranks("main_pretrain", *options, "--output_dir", tmp_path / "parts")
    ranks("main_pretrain", *options, "--output_dir", tmp_path / "whole")
    assert_same_training(tmp_path / "whole", tmp_path / "parts")
    for a, b in zip(log_lines(tmp_path / "whole"), log_lines(tmp_path / "parts"), strict=True):
        assert (a["train_loss"], a["train_rank_acc"]) == pytest.approx((b["train_loss"], b["train_rank_acc"]), rel=1e-9)


def test_an_ignored_signal_stays_ignored(tmp_path, monkeypatch):
    """nohup and background jobs: a lost terminal does not stop the run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    agree = Watch.agree
    monkeypatch.setattr(Watch, "agree", lambda watch: os.kill(os.getpid(), signal.SIGHUP) or agree(watch))
    try:
        run("main_pretrain", *PRETRAIN, "--output_dir", tmp_path, "--epochs", 1)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoint(tmp_path)["epoch"] == 1


def run_status(*folders):
    from util.run import status

    return status.main([str(folder) for folder in folders])


def test_status_of_runs(tmp_path):
    run("main_pretrain", *PRETRAIN, "--output_dir", tmp_path / "a", "--epochs", 1)
    run("main_pretrain", *PRETRAIN, "--output_dir", tmp_path / "b", "--max_steps", 2)
    state = checkpoint(tmp_path / "b")
    assert run_status(tmp_path / "a", tmp_path / "b") == 0  # as far as --max_steps asked
    state["options"]["max_steps"] = None
    from util.run.checkpoint import save_run

    save_run(tmp_path / "b", state)
    assert run_status(tmp_path / "a", tmp_path / "b") == 1
    assert run_status(tmp_path / "a", tmp_path / "nothing") == 1
    for name in ("checkpoint-last.pth", "checkpoint-prev.pth"):
        (tmp_path / "b" / name).write_bytes(b"x")
    with pytest.raises(SystemExit) as stop:
        run_status(tmp_path / "b")
    assert stop.value.code == 2


def test_timed_checkpoints_mid_epoch(tmp_path, monkeypatch):
    """With a clock that advances a minute each time it is read."""
    from util.run import loop

    saved, save_run = [], loop.save_run
    monkeypatch.setattr(loop, "save_run", lambda f, state, also: saved.append(state) or save_run(f, state, also))
    clock = SimpleNamespace(monotonic=iter(range(0, 10**6, 60)).__next__)
    monkeypatch.setattr("util.run.watch.time", clock)
    run("main_pretrain", *PRETRAIN, "--output_dir", tmp_path, "--save_every_minutes", 3, "--epochs", 1)
    steps = [(state["epoch"], state["step"]) for state in saved]
    assert steps[-1] == (1, 0)
    assert len(steps) >= 2
    assert all(0 < step <= 6 and epoch == 0 for epoch, step in steps[:-1])
    assert {state["stopped"] for state in saved} == {""}


def test_a_stop_at_the_last_step_of_an_epoch_postpones_the_evaluation(tmp_path, monkeypatch):
    options = [*FINETUNE, "--num_workers", 0, "--epochs", 1]
    run("main_finetune", *options, "--output_dir", tmp_path / "whole")
    calls = []

    def at_the_end(self):
        calls.append(1)
        return (int(signal.SIGTERM) if len(calls) == 12 else 0), 0

    monkeypatch.setattr(Watch, "agree", at_the_end)
    monkeypatch.setattr("main_finetune.evaluate", lambda *a, **k: pytest.fail("evaluated"))
    with pytest.raises(SystemExit) as stop:
        run("main_finetune", *options, "--output_dir", tmp_path / "parts")
    assert stop.value.code == 75
    assert not (tmp_path / "parts/log.jsonl").exists()
    monkeypatch.undo()
    run("main_finetune", *options, "--output_dir", tmp_path / "parts")
    assert_same_training(tmp_path / "whole", tmp_path / "parts")
    assert log_lines(tmp_path / "whole")[0]["test_acc1"] == log_lines(tmp_path / "parts")[0]["test_acc1"]


def test_signal_handlers_are_restored(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    run("main_pretrain", *PRETRAIN, "--output_dir", tmp_path, "--epochs", 1)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_resuming_with_another_world_size_says_what_differs(tmp_path):
    """The same global batch from two processes, then from one with two micro-batches."""
    options = [*PRETRAIN, "--batch_size", 4, "--global_batch", 8]
    ranks("main_pretrain", *options, "--output_dir", tmp_path, "--max_steps", 4)
    log = run("main_pretrain", *options, "--output_dir", tmp_path)
    assert "(epoch 0, step 4)" in log
    assert "World size changed (2 -> 1)" in log
    assert "--processes" not in log
    assert json.loads((tmp_path / "config.json").read_text())["options"]["accum_iter"] == 2
    assert len(log_lines(tmp_path)) == 2


def test_an_epoch_is_saved_before_its_evaluation(tmp_path, monkeypatch):
    """A damaged validation image, found at the first evaluation, costs no training."""

    def damaged(*_, **__):
        raise ValueError("val/dog/2.jpg: not a readable image")

    monkeypatch.setattr("main_finetune.evaluate", damaged)
    options = [*FINETUNE, "--num_workers", 0, "--output_dir", tmp_path]
    with pytest.raises(ValueError, match="not a readable image"):
        run("main_finetune", *options)
    assert (checkpoint(tmp_path)["epoch"], checkpoint(tmp_path)["step"]) == (0, 12)
    monkeypatch.undo()
    assert "Resuming from" in run("main_finetune", *options)
    assert len(log_lines(tmp_path)) == 2
