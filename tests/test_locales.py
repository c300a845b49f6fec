"""File names and class names of any bytes, printed under locales that cannot show them all."""

import io
import os
import sys

import pytest
from images import encode, picture
from programs import PRETRAIN, checkpoint, run

IMAGE = encode(picture())
NAMES = [b"caf\xe9", "日本".encode(), b"new\nline", "e\u0301".encode()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """SPLIT/CLASS/N.jpg, whose first training image of each class is damaged; in a folder that is no UTF-8 either."""
    folder = os.fsencode(tmp_path_factory.mktemp("names")) + b"/\xff"
    for split in (b"train", b"val"):
        for name in NAMES:
            parent = os.path.join(folder, split, name)
            os.makedirs(parent)
            for i in range(3):
                damaged = split == b"train" and i == 0
                with open(os.path.join(parent, name + b"%d.jpg" % i), "wb") as file:
                    file.write(IMAGE[:100] if damaged else IMAGE)
    return os.fsdecode(folder)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_names_of_any_bytes(data, tmp_path, monkeypatch, encoding):
    """LANG=en_US.UTF-8 is strict, where C.UTF-8 lets all bytes through."""
    printed = io.BytesIO()
    monkeypatch.setattr(
        sys, "stdout", io.TextIOWrapper(printed, encoding=encoding, errors="strict", write_through=True)
    )
    options = [*PRETRAIN, "--batch_size", 4, "--data_path", data]
    run("main_pretrain", *options, "--output_dir", tmp_path / "pretrain", "--vis_interval", 1)
    listed = (tmp_path / "pretrain/bad_images.txt").read_text("utf-8").splitlines()
    assert len(listed) == 4
    assert any(r"caf\xe9" in line for line in listed)
    assert any(r"new\nline" in line for line in listed)
    run("main_pretrain", *options, "--output_dir", tmp_path / "pretrain")
    assert (tmp_path / "pretrain/bad_images.txt").read_text("utf-8").splitlines() == listed
    assert b"Done: epoch 2/2" in printed.getvalue()
    if encoding != "utf-8":
        return
    options = ["--finetune", tmp_path / "pretrain/checkpoint-last.pth", "--data_path", data, "--num_workers", 0]
    training = ["--epochs", 1, "--batch_size", 4, "--warmup_epochs", 0, "--output_dir", tmp_path / "tune"]
    run("main_finetune", *options, *training)
    names = checkpoint(tmp_path / "tune")["options"]["classes"]["names"]
    assert sorted(names) == sorted([r"caf\xe9", "日本", r"new\nline", "é"])
    file = tmp_path / "tune/checkpoint-last.pth"
    evaluation = ["--eval", "--data_path", data, "--num_workers", 0, "--output_dir", tmp_path / "eval"]
    assert "acc1" in run("main_finetune", *evaluation, "--resume", file)
    run("export", "--checkpoint", file, "--format", "timm", "--output", tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors.md").read_text("utf-8")
