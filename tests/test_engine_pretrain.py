"""The engine on any topology: the same masks give the same gradients, on any number of ranks."""

import pytest
import torch
from golden import GivenMasks, StepsOnly, build_hpm, load
from programs import ranks, run

import engine_pretrain
from util.ema import EMATeacher
from util.run.amp import Amp

pytestmark = pytest.mark.xdist_group("topology")  # the runs are made once


def test_masks_are_drawn_from_the_teachers_scores_of_the_students_images():
    """Whatever flips and normalises them."""
    golden, meta = load("hpm_relative")
    model = build_hpm(golden, meta)
    teacher, optimizer = EMATeacher(model), torch.optim.AdamW(model.parameters(), fused=True)
    with torch.no_grad():
        for parameter in teacher.module.parameters():  # so that its scores are not the student's
            parameter.mul_(0.9)
    given, expected, forward = [], [], model.forward

    class Recorded(GivenMasks):
        def draw(self, scores, batch_size, epoch, device):
            given.append(scores)
            return super().draw(scores, batch_size, epoch, device)

    def recorded_forward(images, *more):
        expected.append(teacher.module.predict_loss(images))
        return forward(images, *more)

    model.forward = recorded_forward
    engine_pretrain.train_one_epoch(
        model,
        teacher,
        None,
        [(images,) for images in golden["images"][:2]],
        optimizer,
        Amp("fp32", torch.device("cpu")),
        Recorded(golden["masks"], 12),
        StepsOnly(seed=0),
        to_model_input=lambda x: x + torch.randn_like(x),
        clip_grad=5.0,
        ema_decay=0.9,
    )
    assert len(given) == len(expected) == 2
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(given, expected, strict=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Twenty steps of 8 images: at once, in two micro-batches, on two ranks -> {name: gradients, losses, syncs}."""
    folder = tmp_path_factory.mktemp("topology")
    for name in ("once", "accumulated"):
        run("topology", name, folder / name)
    ranks("topology", "two ranks", folder / "two ranks")
    return {path.name: torch.load(path) for path in folder.iterdir()}


@pytest.mark.parametrize("other", ["accumulated", "two ranks"])
def test_the_same_gradients(runs, other):
    """To 1e-5; the relative loss is a mean over pairs, the same number in each micro-batch."""
    assert runs["once"]["gradients"].keys() == runs[other]["gradients"].keys()
    for name, gradient in runs["once"]["gradients"].items():
        torch.testing.assert_close(runs[other]["gradients"][name], gradient, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("other", ["accumulated", "two ranks"])
def test_the_same_loss_curve_over_twenty_steps(runs, other):
    torch.testing.assert_close(runs[other]["losses"], runs["once"]["losses"], rtol=1e-4, atol=0)


def test_gradients_are_reduced_once_per_step(runs):
    """With accumulation under DDP, all but the last micro-batch run in no_sync."""
    assert runs["two ranks"]["syncs"] == [False, True] * 20
