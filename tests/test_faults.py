"""Folders, disks and processes that fail, injected into whole programs."""

import os
import re
import resource
import signal
import subprocess
import sys

import pytest
from programs import PRETRAIN, ROOT, checkpoint, command, descendants, run

from util.run import checkpoint as module
from util.run import folder


def test_a_second_run_in_a_folder_is_rejected_and_a_killed_one_leaves_no_lock(tmp_path, capsys):
    """Killed with a process that loads data still there."""
    options = [*PRETRAIN, "--output_dir", tmp_path, "--epochs", 50, "--num_workers", 1, "--log_interval", 1]
    first = subprocess.Popen(
        command("main_pretrain", options), cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        while "img/s" not in first.stdout.readline():
            assert first.poll() is None
        with pytest.raises(SystemExit) as stop:
            run("main_pretrain", *options)
        assert stop.value.code == 2
        assert re.search(
            rf"another run \(process {first.pid} on .*\) is writing to {tmp_path}: stop it first",
            capsys.readouterr().err,
        )
        loading = descendants(first.pid)
        assert loading
        for pid in loading:
            os.kill(pid, signal.SIGSTOP)
        first.kill()
        first.wait()
        folder.RunFolder(tmp_path, "main_pretrain").close()
    finally:
        os.killpg(first.pid, signal.SIGKILL)


def test_without_locks_on_the_file_system_a_warning_says_so(tmp_path, monkeypatch, caplog):
    import errno

    def unsupported(*_):
        raise OSError(errno.ENOSYS, "not implemented")

    monkeypatch.setattr(folder.fcntl, "lockf", unsupported)
    folder.log.propagate = True
    folder.RunFolder(tmp_path, "main_pretrain")
    assert "this file system does not support locks" in caplog.text


def test_a_disk_that_fills_up_ends_the_run_and_says_so_with_the_old_checkpoint_intact(tmp_path):
    """A limit on the size of files is as good as a full disk; on both ranks."""
    run("main_pretrain", *PRETRAIN, "--output_dir", tmp_path, "--max_steps", 2)
    before = (tmp_path / "checkpoint-last.pth").read_bytes()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = subprocess.run(
        command("main_pretrain", [*PRETRAIN, "--output_dir", tmp_path]),
        **{"cwd": ROOT, "capture_output": True, "text": True, "check": False, "timeout": 300, "preexec_fn": limit},
    )
    assert done.returncode == 1
    assert re.search(r"OSError: could not write .*checkpoint-last.pth \(disk full or read-only\?\)", done.stderr)
    assert (tmp_path / "checkpoint-last.pth").read_bytes() == before
    assert not list(tmp_path.glob(".*.partial"))
    run("main_pretrain", *PRETRAIN, "--output_dir", tmp_path)
    assert checkpoint(tmp_path)["epoch"] == 2


@pytest.mark.parametrize("fails", ["open", "link", "replace"])
def test_a_read_only_disk_is_an_error_that_says_so(tmp_path, monkeypatch, fails):
    """Every system call that writes fails as on a read-only disk: root, who runs tests, may write anywhere else."""
    import builtins
    import errno

    state = {"epoch": 1, "options": {}}
    module.save_run(tmp_path, state)
    before = (tmp_path / "checkpoint-last.pth").read_bytes()
    original = builtins.open

    def read_only(*arguments, **_):
        raise OSError(errno.EROFS, "Read-only file system")

    def open_to_read(path, mode="r", *more, **kwargs):
        return read_only() if set(mode) & set("wa") else original(path, mode, *more, **kwargs)

    if fails == "open":
        monkeypatch.setattr(builtins, "open", open_to_read)
    elif fails == "link":
        monkeypatch.setattr(os, "link", read_only)
        monkeypatch.setattr(folder.shutil, "copyfile", read_only)
    else:
        monkeypatch.setattr(os, "replace", read_only)
    with pytest.raises(
        OSError, match=r"could not write .*checkpoint-\w+.pth .*Read-only file system; the previous file is"
    ):
        module.save_run(tmp_path, state)
    monkeypatch.undo()
    assert (tmp_path / "checkpoint-last.pth").read_bytes() == before
    assert not list(tmp_path.glob(".*.partial"))


FAILING = """
import os, signal, sys
sys.path.insert(0, {root!r})
import main_pretrain
from util.run.watch import Watch
agree, calls = Watch.agree, []
def fail(self):
    calls.append(1)
    if len(calls) == 3 and os.environ.get("RANK", "1") == "1":
        {fault}
    return agree(self)
Watch.agree = fail
main_pretrain.main(sys.argv[1:])
"""


def failing(tmp_path, fault, processes):
    """The script with a fault in its third step, on rank 1."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(root=str(ROOT), fault=fault))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    options = [*PRETRAIN, "--output_dir", str(tmp_path / "run"), "--num_workers", "1"]
    return subprocess.run(
        [sys.executable, *launcher, str(script), *options],
        **{"cwd": ROOT, "capture_output": True, "text": True, "check": False, "timeout": 300},
    )


@pytest.mark.parametrize(
    ("fault", "shown"),
    [
        ("raise KeyError('the fault of rank 1')", r"KeyError: 'the fault of rank 1'"),
        ("os.kill(os.getpid(), signal.SIGKILL)", r"(?s)rank *: 1 .*exitcode *: -9 .*Signal 9 \(SIGKILL\)"),
    ],
    ids=["raises", "is killed"],
)
def test_a_rank_that_fails_ends_all_with_its_traceback(tmp_path, fault, shown):
    done = failing(tmp_path, fault, processes=2)
    assert done.returncode == 1
    assert re.search(shown, done.stderr), done.stderr
    if "KeyError" in fault:  # in torchrun's summary, too: this is the root cause, not the other rank's lost connection
        summary = done.stderr.split("Root Cause")[1]
        assert "the fault of rank 1" in summary, done.stderr


def test_a_dead_data_worker_ends_the_run(tmp_path):
    kill = "import multiprocessing; os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)"
    done = failing(tmp_path, kill, processes=1)
    assert done.returncode == 1
    assert re.search(r"RuntimeError: DataLoader worker \(pid\D+\d+\) ", done.stderr), done.stderr
