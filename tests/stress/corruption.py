"""Damage images and checkpoints in every way at random; each must be rejected or load correctly.

    .venv/bin/python tests/stress/corruption.py --images 2000 --checkpoints 500

An image must raise a ValueError or decode to the pixels that Pillow gives for the same bytes: what decodes without an
error is just another image. A checkpoint must be rejected, and the previous one used, or hold exactly
what was saved (a flipped byte of padding changes nothing). Each runs in a child process, so that a crash or a hang (ten
seconds for one file) is seen and counted.
"""

import argparse
import io
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from images import encode, picture  # noqa: E402
from PIL import Image  # noqa: E402

from util.data.datasets import ImageDataset  # noqa: E402
from util.data.decode import decode_rgb  # noqa: E402
from util.data.loader import ShardSampler, build_loader  # noqa: E402
from util.data.sources import build_source  # noqa: E402
from util.data.transforms import CenterCrop  # noqa: E402
from util.run import checkpoint  # noqa: E402

torch.set_num_threads(1)
GROUP = 25  # files a child process
SECONDS = 10


def damage(data: bytes, dice: random.Random) -> bytes:
    """One of: bytes flipped, cut off, zeroed, repeated, cut out, replaced by noise, put together wrongly."""
    damaged, size = bytearray(data), len(data)
    start, length = dice.randrange(size), dice.randrange(1, max(2, size // 4))
    kind = dice.choice(["flip", "flip", "flip", "header", "truncate", "truncate", "zero", "noise", "remove", "repeat"])
    if kind == "flip":
        for _ in range(dice.choice([1, 1, 2, 8, 64])):
            damaged[dice.randrange(size)] ^= 1 << dice.randrange(8)
    elif kind == "header":
        for _ in range(dice.choice([1, 2, 4])):
            damaged[dice.randrange(min(size, 40))] = dice.randrange(256)
    elif kind == "truncate":
        del damaged[dice.randrange(size) :]
    elif kind == "zero":
        damaged[start : start + length] = bytes(len(damaged[start : start + length]))
    elif kind == "noise":
        damaged[start : start + length] = dice.randbytes(len(damaged[start : start + length]))
    elif kind == "remove":
        del damaged[start : start + length]
    else:
        damaged[start:start] = damaged[start : start + length]
    return bytes(damaged)


def in_children(items: list, check) -> Counter:
    """`check(item) -> str` of each, in child processes; what they answered, with crashes and hangs among it."""
    answers = Counter()
    todo = [items[i : i + GROUP] for i in range(0, len(items), GROUP)]
    while todo:
        group = todo.pop()
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            try:
                for item in group:
                    signal.alarm(SECONDS)
                    os.write(write, f"{check(item)}\n".encode())
            except BaseException as error:
                os.write(write, f"CRASH {type(error).__name__}: {error}\n"[:200].encode())
            os._exit(0)
        os.close(write)
        with open(read) as pipe:
            lines = pipe.read().splitlines()
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            kind = "HANG" if os.WTERMSIG(status) == signal.SIGALRM else f"CRASH by signal {os.WTERMSIG(status)}"
            lines.append(kind)
        answers.update(lines)
        if len(lines) < len(group):  # a crash ended its group: continue after it
            todo.append(group[len(lines) :])
    return answers


def check_image(data: bytes) -> str:
    try:
        ours = decode_rgb(data)
    except ValueError:
        return "rejected"
    try:
        with Image.open(io.BytesIO(data)) as image:
            pillows = None if image.mode.startswith("I") else np.asarray(image.convert("RGB"))
    except Exception:
        return "loads here alone"
    if ours.dtype != np.uint8 or ours.ndim != 3 or ours.shape[2] != 3:
        return "WRONG shape"
    return "loads" if pillows is None or np.array_equal(ours, pillows) else "WRONG pixels"


def images(count: int, dice: random.Random, folder: Path) -> None:
    kinds = [
        *[encode(picture(i, size=(40 + i, 48)), quality=90, subsampling=s) for i, s in enumerate((0, 1, 2))],
        *[encode(picture(3, mode=mode)) for mode in ("L", "CMYK")],
        *[encode(picture(4), progressive=True), encode(picture(5), "WEBP"), encode(picture(6), "BMP")],
        *[encode(picture(7, mode=mode), "PNG") for mode in ("RGB", "RGBA", "P", "LA", "1")],
        *[encode(picture(8, mode="P"), "GIF"), encode(picture(9), "PPM"), encode(picture(10), "TIFF")],
        encode(Image.fromarray((np.arange(4096).reshape(64, 64) * 16).astype(np.uint16)), "PNG"),
    ]
    damaged = [damage(dice.choice(kinds), dice) for _ in range(count)]
    answers = in_children(damaged, check_image)
    print(f"{sum(answers.values())} images: {dict(answers)}", flush=True)
    assert sum(answers.values()) == count
    assert not [answer for answer in answers if answer.isupper() or answer.split()[0].isupper()]

    # The same files as a data set: rejected files are replaced and named by the data loading workers.
    for split, place in (("train", folder / "train/a"), ("good", folder / "train/b")):
        place.mkdir(parents=True)
        whole = kinds * (1 + count // len(kinds))  # half of the data set: 20 in a row that fail would end it
        for number, data in enumerate(damaged if split == "train" else whole):
            (place / f"{number:05d}.jpg").write_bytes(data)
    source = build_source(str(folder), "train")
    dataset = ImageDataset(source, CenterCrop(16), replace=True)
    bad = 0
    for batch in build_loader(dataset, ShardSampler(len(source), 50), 2, False):
        bad += int((batch.bad >= 0).sum())
    print(f"through two loading processes: {bad} replaced of {len(source)}", flush=True)
    assert bad == answers["rejected"]


def checkpoints(count: int, dice: random.Random, folder: Path) -> None:
    torch.manual_seed(0)
    weights = {f"blocks.{i}.weight": torch.randn(16, 16) for i in range(12)}
    state = {"script": "main_pretrain", "state_dict": weights, "step": 3, "options": {"lr": 0.1}, "stopped": ""}
    for epoch in (1, 2):
        checkpoint.save_run(folder, {**state, "epoch": epoch})
    last = folder / checkpoint.LAST
    data = last.read_bytes()

    def check(damaged: bytes) -> str:
        place = Path(tempfile.mkdtemp(dir=folder))
        (place / checkpoint.LAST).write_bytes(damaged)
        os.link(folder / checkpoint.PREVIOUS, place / checkpoint.PREVIOUS)
        checkpoint.log.disabled = True
        path, found = checkpoint.find_resume(place)
        same = all(torch.equal(weights[name], value) for name, value in found["state_dict"].items())
        same &= found["state_dict"].keys() == weights.keys()
        same &= all(found[name] == state[name] for name in ("script", "step", "options", "stopped"))
        if not same or found["epoch"] != (2 if path.name == checkpoint.LAST else 1):
            return "WRONG content"
        return "rejected, the previous one used" if path.name == checkpoint.PREVIOUS else "loads, equal"

    answers = in_children([damage(data, dice) for _ in range(count)], check)
    print(f"{sum(answers.values())} checkpoints of {len(data):,} bytes: {dict(answers)}", flush=True)
    assert sum(answers.values()) == count
    assert not [answer for answer in answers if answer.split()[0].isupper()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--checkpoints", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    dice, began = random.Random(args.seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="corruption-") as folder:
        for name in ("images", "checkpoints"):
            (Path(folder) / name).mkdir()
        images(args.images, dice, Path(folder) / "images")
        checkpoints(args.checkpoints, dice, Path(folder) / "checkpoints")
    print(f"none crashed, hung or loaded wrongly; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
