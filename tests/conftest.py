"""Shared fixtures. Tests run on the CPU with one thread, so that two test processes do not get in each other's way."""

import logging
import os
import threading

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; subprocesses inherit it
os.environ.pop("RANK", None)
# Subprocesses print as under a UTF-8 locale, where bytes that are no UTF-8 are an error; C.UTF-8 lets them through.
os.environ["PYTHONIOENCODING"] = "utf-8:strict"

import pytest
import torch


def pytest_configure(config):
    """Without `-m gpu`, a GPU is not seen: the scripts would take it, and one GPU is too few for two ranks."""
    if "gpu" not in config.getoption("markexpr"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _no_writers_left(tmp_path):
    """TensorBoard's threads would write into the folder of a test after it is deleted."""
    yield
    for thread in threading.enumerate():
        if type(thread).__name__ == "_AsyncWriterThread":
            thread.stop()


@pytest.fixture
def log(caplog):
    """What the scripts log, as caplog."""
    logging.getLogger("hpm").propagate = True
    caplog.set_level(logging.INFO, "hpm")
    return caplog
