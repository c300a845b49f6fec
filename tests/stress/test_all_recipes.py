"""Every recipe: two steps, and its compute: bash scripts/test.sh tests/stress (about ten minutes)."""

import pytest
import timm
import torch
from test_recipes import RECIPES, check_compute, run_tiny

from models_teacher import KINDS


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    for kind, settings in KINDS.items():
        torch.save(timm.create_model(settings.timm_name, pretrained=False).state_dict(), folder / f"{kind}.pth")
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_two_steps(path, tmp_path, teachers):
    done = run_tiny(path, tmp_path, DINO_PATH=str(teachers / "dino.pth"), CLIP_PATH=str(teachers / "clip.pth"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2, saved in" in done.stdout or "-NN  top-1" in done.stdout


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_multiply_accumulates(path):
    check_compute(path)
