"""The diffs in docs/change.md apply as printed; the changed method trains and passes the tests of what it changes."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from programs import ROOT

DIFFS = re.findall(r"```diff\n(.*?)```", (ROOT / "docs/change.md").read_text(), re.DOTALL)
CHOICES = [
    ("mask_strategy", "sampled", "util/masking.py"),
    ("predictor_loss", "listwise", "util/losses.py"),
    ("target", "centred_pixel", "util/targets.py"),
]
TESTS = ["test_masking.py", "test_losses.py", "test_new_choices.py"]

TRAINING = """
import pytest
import torch
from programs import PRETRAIN, checkpoint, log_lines, run


@pytest.mark.parametrize(("option", "value"), CHOICES)
def test_it_trains_and_is_drawn(tmp_path, option, value):
    more = ["--epochs", 1, "--shapes_train", 8, f"--{option}", value, "--output_dir", tmp_path / "run"]
    log = run("main_pretrain", *PRETRAIN, *more)
    assert value in next(line for line in log.splitlines() if line.startswith("target"))
    assert 0 < log_lines(tmp_path / "run")[0]["train_loss"] < 20
    assert checkpoint(tmp_path / "run")["options"][option] == value
    picture = tmp_path / "a.png"
    run("visualize", "--checkpoint", tmp_path / "run/checkpoint-last.pth", "--num_images", 1, "--output", picture)
    assert picture.exists()
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Where git keeps the tree out of the way, the copy is a folder without a repository."""
    folder = tmp_path_factory.mktemp("change") / "tree"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "output_dir", "demo", "study", "shared", "*.png")
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


def git_apply(folder, diff, *options):
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", *options, "-"]
    return subprocess.run(command, input=diff, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_each_change_is_small_and_in_one_place(copy):
    assert len(DIFFS) == len(CHOICES)
    for diff, (_, value, path) in zip(DIFFS, CHOICES, strict=True):
        done = git_apply(copy, diff, "--check")
        assert done.returncode == 0, done.stderr
        changed = re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE)
        assert [name for name in changed if not name.startswith("tests/")] == [path]
        lines = [line for line in diff.splitlines() if re.match(r"[+-](?![+-])", line)]
        assert len(lines) <= 12
        assert f'+    "{value}": ' in diff


def test_the_changed_method_trains(copy):
    """All three in one copy, which saves two starts of Python; they touch different files."""
    for diff in DIFFS:
        assert git_apply(copy, diff).returncode == 0
    choices = [choice[:2] for choice in CHOICES]
    (copy / "tests/test_new_choices.py").write_text(f"CHOICES = {choices!r}\n{TRAINING}")
    tests = [f"tests/{name}" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert "failed" not in done.stdout
