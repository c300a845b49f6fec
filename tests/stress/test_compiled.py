"""What --compile makes of the golden trajectory, and of a run under DDP with accumulation: minutes of compiling.

python -m pytest tests/stress/test_compiled.py
"""

import pytest
from programs import PRETRAIN, checkpoint, launch, log_lines
from test_golden import TRAJECTORIES, five_steps_are_golden


def test_five_compiled_steps_are_golden():
    five_steps_are_golden(TRAJECTORIES[0], "inductor")


def test_compiled_on_two_ranks_with_accumulation(tmp_path):
    """DDP cuts the backward graph at its buckets, and does so only in the last micro-batch of a step."""
    options = [*PRETRAIN, "--batch_size", 4, "--accum_iter", 2, "--output_dir"]
    launch("tests/stress/compile_once", *options, tmp_path / "compiled", "--compile", processes=2, timeout=600)
    launch("main_pretrain", *options, tmp_path / "eager", processes=2, timeout=600)
    for compiled, eager in zip(log_lines(tmp_path / "compiled"), log_lines(tmp_path / "eager"), strict=True):
        assert compiled["train_loss"] == pytest.approx(eager["train_loss"], abs=1e-4)
    names = [checkpoint(tmp_path / folder)["state_dict"].keys() for folder in ("compiled", "eager")]
    assert names[0] == names[1]
