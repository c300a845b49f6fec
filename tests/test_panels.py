"""Panels in TensorBoard while the pre-training script runs."""

import io
import logging

import numpy as np
import pytest
import torch
from images import encode, members, picture, write_tar, write_tree
from PIL import Image
from programs import PRETRAIN, assert_same_training, ranks, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_pretrain
from util.run.distributed import World
from visualize import draw as pictures

DATA = ["--batch_size", 4]  # the sets of tests/images.py have 12 images


def pretrain(folder, *more):
    return run("main_pretrain", *PRETRAIN, "--output_dir", folder, *more)


def panels(folder):
    """Panels of a run by step, as pixels."""
    events = EventAccumulator(str(folder), {"images": 0}).Reload()
    found = events.Images("panel") if "panel" in events.Tags()["images"] else []
    return {event.step: np.asarray(Image.open(io.BytesIO(event.encoded_image_string))) for event in found}


@pytest.fixture
def drawn(monkeypatch):
    """(what was drawn, its heading) of each panel."""
    calls, draw = [], pictures.draw_grid
    monkeypatch.setattr(pictures, "draw_grid", lambda *given: (calls.append(given), draw(*given))[1])
    return calls


@pytest.mark.parametrize(
    "options",
    [[], ["--vis_mask_ratio", "0.3", "--target", "ema"], ["--no-learning_loss", "--norm_pix_loss"]],
    ids=lambda options: " ".join(options) or "HPM",
)
def test_panels_change_nothing_in_the_training(tmp_path, drawn, options):
    """Bitwise, also where the run stops within an epoch and goes on."""
    pretrain(tmp_path / "without", *options)
    pretrain(tmp_path / "with", *options, "--vis_interval", 1, "--max_steps", 9)
    pretrain(tmp_path / "with", *options, "--vis_interval", 1)
    assert_same_training(tmp_path / "without", tmp_path / "with")
    assert panels(tmp_path / "without") == {}
    written = panels(tmp_path / "with")
    assert list(written) == [1000, 2000]
    assert [heading for _, heading in drawn] == ["1 of 2 epochs", "2 of 2 epochs"]
    first, second = (panel for panel, _ in drawn)
    assert len(first.rows) == 8
    for before, after in zip(first.rows, second.rows, strict=True):
        assert (before[0] == after[0]).all()  # the same crop of the same images
    titles = [title for title, _ in first.titles]
    assert ("reconstruction" in titles) == ("ema" not in options)
    assert ("predicted hardness" in titles) == ("--no-learning_loss" not in options)
    assert "true error" in titles[-1]
    assert all("loss_rec" in words[-2 if "rank_acc" in " ".join(words) else -1] for _, words in first.captions)


def test_how_often(tmp_path, drawn):
    assert list(panels_at("--vis_interval", 3, "--epochs", 4, folder=tmp_path / "a")) == [3000, 4000]
    assert panels_at("--vis_interval", 0, folder=tmp_path / "b") == {}

    def default(epochs):
        args = main_pretrain.get_args_parser().parse_args(["--epochs", str(epochs)])
        return main_pretrain.resolve_options(args, World(0, 1, 0, 1)).vis_interval

    assert [default(epochs) for epochs in (1, 16, 20, 21, 200, 800)] == [1, 1, 1, 2, 10, 40]


def panels_at(*options, folder):
    pretrain(folder, *options)
    return panels(folder)


def test_the_mask_is_that_of_the_epoch_and_the_teachers(tmp_path, drawn, monkeypatch):
    seen, original = [], main_pretrain.panel
    monkeypatch.setattr(main_pretrain, "panel", lambda *a, **k: (seen.append((a, k)), original(*a, **k))[1])
    teachers, init = [], main_pretrain.EMATeacher.__init__
    monkeypatch.setattr(
        main_pretrain.EMATeacher, "__init__", lambda self, model: (init(self, model), teachers.append(self.module))[0]
    )
    pretrain(tmp_path / "run", "--vis_interval", 1, "--ema_decay", 0.5)
    assert [dict(panel.titles).get("mask at the end") for panel, _ in drawn][-1] == "12 of 16, 6 of them the hardest"
    (student, *_, plan), given = seen[-1]
    assert (given["epochs"], given["epoch"], plan.epochs) == ([1], 1, 2)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(given["look"](images)[0], teachers[0].predict_loss(images))
        assert not torch.equal(teachers[0].predict_loss(images), student.predict_loss(images))


def shown(data_path, **more):
    text = [*PRETRAIN, "--data_path", data_path, "--vis_interval", 1]
    args = main_pretrain.get_args_parser().parse_args([str(word) for word in text])
    args = main_pretrain.resolve_options(args, World(0, 1, 0, 1))
    return main_pretrain.images_to_show(args, main_pretrain.build_source(args.data_path, "train"))


def test_which_images(tmp_path, caplog):
    """Of the val split, all over it; of training where there is none, or none that can be read as it is."""
    logging.getLogger("hpm").propagate = True
    caplog.set_level(logging.INFO, logger="hpm")
    images, names = shown(write_tree(tmp_path / "both"))
    assert names[0] == "cat/0.jpg"
    assert {name.split("/")[0] for name in names} == {"cat", "cat-2", "dog"}
    assert len(names) == len(images) == 8
    assert torch.equal(images, shown(write_tar(tmp_path / "both.tar"))[0])
    assert torch.equal(images, shown(write_tar(tmp_path / "both.tar.gz", mode="w:gz"))[0])
    assert "of training images" not in caplog.text

    train = members(("train",))
    of_train, _ = shown(write_tree(tmp_path / "train", train))
    assert "panels    of training images: --data_path" in caplog.text
    assert not torch.equal(of_train, images)
    packed = write_tree(tmp_path / "packed", train)
    write_tar(packed / "val.tar.gz", members(("val",)), mode="w:gz")
    assert torch.equal(shown(packed)[0], of_train)
    assert "val.tar.gz would have to be decompressed" in caplog.text
    damaged = write_tree(tmp_path / "damaged", train | {"val/cat/0.jpg": encode(picture())[:100]})
    assert torch.equal(shown(damaged)[0], of_train)
    few = write_tree(tmp_path / "few", train | {"val/cat/0.jpg": encode(picture())})
    assert len(shown(few)[1]) == 1


def test_one_rank_draws_and_the_others_do_not_wait_for_it(tmp_path):
    options = [*PRETRAIN, "--epochs", 1, "--output_dir", tmp_path / "run", "--vis_interval", 1]
    ranks("main_pretrain", *options)
    assert list(panels(tmp_path / "run")) == [1000]
    assert len(list((tmp_path / "run").glob("*tfevents*"))) == 1
