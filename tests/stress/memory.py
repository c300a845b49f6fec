"""Resident memory of a run with loading processes, at step 200 and at the end.

    .venv/bin/python tests/stress/memory.py --steps 2000

The run is the real script in this process: 100 steps an epoch, a checkpoint and a log line at the end of each, two
processes that load images. Fails if the sum over all processes grows by more than 2 %.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
from programs import descendants  # noqa: E402

import main_pretrain  # noqa: E402
from util.run.watch import Watch  # noqa: E402

torch.set_num_threads(1)
OPTIONS = [
    *["--model", "mae_vit_micro_patch16", "--input_size", "16", "--patch_size", "8", "--decoder_depth", "1"],
    *["--shapes_train", "200", "--batch_size", "2", "--num_workers", "2", "--log_interval", "100"],
]


def resident() -> list[int]:
    """KiB of this process and of each that it started."""
    sizes = []
    for pid in [os.getpid(), *sorted(descendants(os.getpid()))]:
        status = Path(f"/proc/{pid}/status").read_text()
        sizes.append(int(status.split("VmRSS:")[1].split()[0]))
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--first", type=int, default=200, help="step of the first look")
    args = parser.parse_args()
    looks, calls, agree = {}, [0], Watch.agree

    def look(self: Watch) -> tuple[int, int]:
        calls[0] += 1
        if calls[0] % args.first == 0 or calls[0] == args.steps:
            looks[calls[0]] = resident()
            print(f"step {calls[0]}: {sum(looks[calls[0]]) / 1024:.1f} MiB in all, {looks[calls[0]]} KiB", flush=True)
        return agree(self)

    Watch.agree = look
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        epochs = -(-args.steps // 100)
        main_pretrain.main([*OPTIONS, "--epochs", str(epochs), "--max_steps", str(args.steps), "--output_dir", folder])
    first, last = sum(looks[args.first]), sum(looks[args.steps])
    print(f"{args.first} -> {args.steps} steps: {100 * (last - first) / first:+.2f} %")
    assert last < 1.02 * first


if __name__ == "__main__":
    main()
