"""Kill a run of two ranks at random moments, again and again, and compare what it ends with.

    .venv/bin/python tests/stress/kills.py --kills 50

A run saves after every step. It is started, killed with SIGKILL (both ranks, or one of them with the other left to find
out; at a random time, or as soon as a checkpoint is half-written), and started again, until it ends by itself; its
weights, teacher and optimizer must then be bitwise those of an undisturbed run. Then the next run starts.

The ranks are forked from this process, which has imported everything: a start costs a second. No process group or
thread exists before the fork.
"""

import argparse
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
import torch.utils.tensorboard  # noqa: E402 - so that no rank has to
from programs import PRETRAIN, assert_same_training, checkpoint  # noqa: E402

import main_pretrain  # noqa: E402

torch.set_num_threads(1)
OPTIONS = [*PRETRAIN, "--shapes_train", "64", "--save_every_minutes", "1e-6", "--log_interval", "2"]
STEPS = 8  # 64 images, 8 from each of two ranks, two epochs
NEVER = 10**9
LAST, PARTIAL = "checkpoint-last.pth", ".checkpoint-last.pth.partial"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(folder: Path, log: Path) -> list[int]:
    """Both ranks of the run in `folder`; their process ids."""
    port, children = free_port(), []
    for rank in (0, 1):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(output, 1)
                os.dup2(output, 2)
                os.environ |= {
                    **{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
                    **{"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
                }
                main_pretrain.main([*OPTIONS, "--output_dir", str(folder)])
                status = 0
            except BaseException as error:
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(pid)
    return children


def end_all(children: list[int], victims: list[int]) -> bool:
    """Kill the victims, and do with the others as torchrun does: SIGTERM, and half a minute later SIGKILL.

    Returns:
        Whether the others ended before that: a lost connection tells them, unless they are still waiting to begin.
    """
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    for pid in set(children) - set(victims):
        os.kill(pid, signal.SIGTERM)
    deadline, waiting, in_time = time.monotonic() + 30, set(children), True
    while waiting:
        for pid in list(waiting):
            done, _ = os.waitpid(pid, os.WNOHANG)
            if done:
                waiting.discard(pid)
        if waiting and time.monotonic() > deadline:
            in_time = False
            for pid in waiting:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return in_time


def version(path: Path) -> int:
    return path.stat().st_ino if path.exists() else 0


def run_until(children: list[int], run: Path, saves: int, delay: float, in_save: bool) -> bool:
    """Wait until the moment to kill; False if the run ended by itself before. It must end well.

    Args:
        saves: checkpoints to wait for, counted from now; then
        delay: seconds more; then, with
        in_save: until a checkpoint is half-written.
    """
    known, deadline = version(run / LAST), time.monotonic() + delay
    while saves > 0 or time.monotonic() < deadline or (in_save and not (run / PARTIAL).exists()):
        if saves > 0 and (now := version(run / LAST)) != known:
            known, saves, deadline = now, saves - 1, time.monotonic() + delay
        done, status = os.waitpid(children[0], os.WNOHANG)
        if done:
            _, other = os.waitpid(children[1], 0)
            assert status == other == 0, "a run that was not killed failed: see the log"
            return False
        time.sleep(0.0005)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    dice, log = random.Random(args.seed), folder / "log.txt"
    began = time.monotonic()
    assert not run_until(start(folder / "whole", log), folder / "whole", NEVER, 0, False)
    lasts = time.monotonic() - began
    print(f"untouched run: {lasts:.1f} s for {STEPS} steps", flush=True)

    counts = {
        "kills": 0,
        "in a save": 0,
        "one rank alone": 0,
        "before a checkpoint": 0,
        "runs compared": 0,
        "others killed later": 0,
    }
    while counts["kills"] < args.kills:
        run = folder / f"run-{counts['runs compared']}"
        ended = False
        while not ended:
            children = start(run, log)
            if counts["kills"] >= args.kills:
                ended = not run_until(children, run, NEVER, 0, False)
                continue
            saves, delay = dice.choice([0, 1, 1, 2, 3]), dice.uniform(0, 0.5)
            if not run_until(children, run, saves, delay, dice.random() < 0.3):
                ended = True
                continue
            counts["in a save"] += (run / PARTIAL).exists()
            one = dice.random() < 0.3
            counts["one rank alone"] += one
            counts["others killed later"] += not end_all(children, [dice.choice(children)] if one else children)
            counts["kills"] += 1
            counts["before a checkpoint"] += not (run / LAST).exists()
        state = checkpoint(run)
        assert (state["epoch"], state["step"]) == (2, 0)
        assert_same_training(folder / "whole", run)
        counts["runs compared"] += 1
        print(f"{time.monotonic() - began:6.0f} s  {counts}", flush=True)
    print(f"all equal: {counts}")


if __name__ == "__main__":
    main()
