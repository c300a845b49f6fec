"""Running the scripts as users do: in this process, as another one, and under torchrun with two."""

import contextlib
import importlib
import io
import json
import logging
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent

# The smallest run that is still the whole program: 6 steps an epoch, two epochs.
PRETRAIN = [
    *["--model", "mae_vit_micro_patch16", "--input_size", "16", "--patch_size", "4", "--decoder_depth", "1"],
    *["--shapes_train", "48", "--batch_size", "8", "--epochs", "2", "--num_workers", "0", "--log_interval", "4"],
    *["--vis_interval", "0"],
]


def run(script, *options):
    """The script in this process; what it logged."""
    log = logging.getLogger("hpm")
    lines = []

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    original = log.addHandler

    def add_both(handler):
        original(handler)
        original(Keep())

    log.addHandler = add_both  # the script clears the handlers when it starts
    try:
        module_of(script).main([str(option) for option in options])
    finally:
        del log.addHandler
        log.handlers.clear()
    return "\n".join(lines)


def module_of(script):
    """The module of a script, or of a package that runs as one (`python -m export`)."""
    package = (ROOT / script.replace(".", "/")).is_dir()
    return importlib.import_module(f"{script}.__main__" if package else script)


def command(script, options, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    path = ROOT / f"{script}.py"
    program = [str(path)] if path.exists() else ["-m", script]
    return [sys.executable, *launcher, *program, *map(str, options)]


def launch(script, *options, processes=1, check=True, env=None, cwd=ROOT, timeout=400):
    """The script as a process of its own, or as several under torchrun."""
    done = subprocess.run(
        command(script, options, processes),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=cwd,
        env={**os.environ, **(env or {})},
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["main_pretrain", "main_finetune", "main_linprobe", "main_knn", "torch._dynamo"])


def start_ranks(function, *arguments, processes=2):
    """Start a module-level function on several ranks as torchrun would, but forked from a process that has imported
    everything: a third of the time. For what depends on the ranks, not on who started them. The processes, and what
    receives their answers, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    workers, receivers = [], []
    for rank in range(processes):
        environment = {name: str(value) for name, value in {**world, "RANK": rank, "LOCAL_RANK": rank}.items()}
        receiver, sender = _forks.Pipe(duplex=False)
        workers.append(_forks.Process(target=_be_rank, args=(environment, sender, function, arguments)))
        receivers.append(receiver)
        workers[-1].start()
        sender.close()
    return workers, receivers


def _be_rank(environment, sender, function, arguments):
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # of data workers; a forked rank would fork them as itself
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            answer = function(*arguments)
        except BaseException:
            answer = errors.getvalue()
            raise
        finally:
            sender.send(answer)


def on_ranks(function, *arguments, processes=2, timeout=300, status=0):
    """What a function returns on each rank; what it wrote to standard error, where it ends with another status."""
    workers, receivers = start_ranks(function, *arguments, processes=processes)
    try:
        answers = []
        for receiver in receivers:
            assert receiver.poll(timeout), "a rank said nothing"
            answers.append(receiver.recv())
        for worker in workers:
            worker.join(timeout)
        assert [worker.exitcode for worker in workers] == [status] * processes, answers
    finally:
        for worker in workers:
            worker.kill()
    return answers


def ranks(script, *options, processes=2):
    """The script on several ranks; what rank 0 logged."""
    return on_ranks(run, script, *options, processes=processes)[0]


def start_and_kill(script, *options, when):
    """Start the script on two ranks, wait until `when()` holds, and kill them, giving them no chance to react."""
    workers, _ = start_ranks(run, script, *options)
    deadline = time.monotonic() + 300
    try:
        while not when():
            assert all(worker.is_alive() for worker in workers)
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def descendants(pid):
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, queue = [], [pid]
    while queue:
        for child in parents.get(queue.pop(), []):
            found.append(child)
            queue.append(child)
    return found


def checkpoint(folder, name="checkpoint-last.pth"):
    return torch.load(Path(folder) / name, weights_only=True)


def log_lines(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def assert_same_training(a, b):
    """Bitwise the same student, teacher, optimizer and position."""

    def compare(x, y, where):
        assert type(x) is type(y), where
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y), where
        elif isinstance(x, dict):
            assert x.keys() == y.keys(), where
            for key in x:
                compare(x[key], y[key], f"{where}.{key}")
        elif isinstance(x, list):
            assert len(x) == len(y), where
            for i, pair in enumerate(zip(x, y, strict=True)):
                compare(*pair, f"{where}[{i}]")
        else:
            assert x == y, where

    a, b = checkpoint(a), checkpoint(b)
    assert a.keys() == b.keys()
    for key in a.keys() - {"options", "extra"}:
        compare(a[key], b[key], key)
