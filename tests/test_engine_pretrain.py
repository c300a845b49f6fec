"""The engine on any topology: the same masks give the same gradients, on any number of ranks."""

import pytest
import torch
from programs import ranks, run

pytestmark = pytest.mark.xdist_group("topology")  # the runs are made once


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
