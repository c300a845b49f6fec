"""Panels in TensorBoard while the pre-training script runs."""

import io
import logging

import numpy as np
import pytest
import torch
from images import encode, members, picture, write_png_16, write_tar, write_tree
from PIL import Image
from programs import PRETRAIN, assert_same_training, checkpoint, ranks, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_pretrain
from util.data.sources import build_source
from util.run.distributed import World
from visualize import panel as visualize_panel
from visualize.panel import pick_images, pick_panel_images

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
    """(panel, heading) of each picture."""
    calls, original = [], visualize_panel.draw_grid
    monkeypatch.setattr(visualize_panel, "draw_grid", lambda *given: (calls.append(given), original(*given))[1])
    return calls


@pytest.mark.parametrize(
    "options",
    [[], ["--vis_mask_ratio", "0.3", "--target", "ema"], ["--no-learning_loss", "--norm_pix_loss"]],
    ids=lambda options: " ".join(options) or "HPM",
)
def test_panels_change_nothing_in_the_training(tmp_path, drawn, options):
    """Bitwise, also if the run stops mid-epoch and is resumed."""
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
    assert all("loss_rec" in metrics for _, metrics in first.captions)


def test_vis_interval(tmp_path, drawn):
    assert list(panels_at("--vis_interval", 3, "--epochs", 4, folder=tmp_path / "a")) == [3000, 4000]
    assert panels_at("--vis_interval", 0, folder=tmp_path / "b") == {}

    def default(epochs):
        args = main_pretrain.get_args_parser().parse_args(["--epochs", str(epochs)])
        return main_pretrain.resolve_options(args, World(0, 1, 0, 1)).vis_interval

    assert [default(epochs) for epochs in (1, 16, 20, 21, 200, 800)] == [1, 1, 1, 2, 10, 40]


def panels_at(*options, folder):
    pretrain(folder, *options)
    return panels(folder)


def test_the_mask_is_the_teachers_in_the_last_epoch(tmp_path, drawn, monkeypatch):
    calls, original = [], main_pretrain.training_panel
    monkeypatch.setattr(main_pretrain, "training_panel", lambda *a, **k: (calls.append((a, k)), original(*a, **k))[1])
    pretrain(tmp_path / "run", "--vis_interval", 1, "--ema_decay", 0.5)
    assert dict(drawn[-1][0].titles)["mask at the end"] == "12 of 16, 6 of them the hardest"
    (student, teacher, *_, masks), given = calls[-1]
    assert (given["epochs_done"], masks.epochs) == (2, 2)
    saved = checkpoint(tmp_path / "run")
    for model, name in ((student, "state_dict"), (teacher, "ema_state_dict")):
        assert all(torch.equal(value, saved[name][key]) for key, value in model.state_dict().items())
    assert not torch.equal(student.mask_token, teacher.mask_token)


def shown(data_path):
    return pick_panel_images(str(data_path), build_source(str(data_path), "train"), 16)


def test_which_images(tmp_path, caplog):
    """Evenly spaced over the val split; of training if there is none that is readable without decompression."""
    logging.getLogger("hpm").propagate = True
    caplog.set_level(logging.INFO, logger="hpm")
    images, names = shown(write_tree(tmp_path / "both"))
    assert names[0] == "cat/0.jpg"
    assert {name.split("/")[0] for name in names} == {"cat", "cat-2", "dog"}
    assert len(names) == len(images) == 8
    assert torch.equal(images, shown(write_tar(tmp_path / "both.tar"))[0])
    assert torch.equal(images, shown(write_tar(tmp_path / "both.tar.gz", mode="w:gz"))[0])
    assert "training images" not in caplog.text

    train = members(("train",))
    of_train, _ = shown(write_tree(tmp_path / "train", train))
    assert "falling back to training images: --data_path" in caplog.text
    assert not torch.equal(of_train, images)
    packed = write_tree(tmp_path / "packed", train)
    write_tar(packed / "val.tar.gz", members(("val",)), mode="w:gz")
    assert torch.equal(shown(packed)[0], of_train)
    assert "val.tar.gz is compressed" in caplog.text
    damaged = write_tree(tmp_path / "damaged", train | {"val/cat/0.jpg": encode(picture())[:100]})
    assert torch.equal(shown(damaged)[0], of_train)
    assert "damaged/val/cat/0.jpg" in caplog.text
    assert shown(write_tree(tmp_path / "all_damaged", {name: data[:100] for name, data in train.items()})) is None
    assert "No panels: none of the images can be read" in caplog.text


def test_a_val_split_is_shown_with_the_value_range_and_the_pixel_limit_of_the_run(tmp_path, drawn):
    values = np.random.default_rng(0).integers(0, 4096, (16, 16)).astype(np.uint16)
    files = {
        f"{split}/a/{i}.png": write_png_16(values) for split, count in (("train", 8), ("val", 2)) for i in range(count)
    }
    options = ["--vis_interval", 1, "--epochs", 1, "--data_path", write_tree(tmp_path / "data", files)]
    pretrain(tmp_path / "run", *options, "--value_range", 0, 4095)
    (panel, _) = drawn[-1]
    assert len(panel.rows) == 2
    assert 120 < np.asarray(panel.rows[0][0]).mean() < 136  # by default it would be 8

    large = {name: encode(picture(size=(32, 32)), "PNG") for name in files if name.startswith("val")}
    log = pretrain(
        tmp_path / "limited", *options[:-1], write_tree(tmp_path / "large", files | large), "--max_image_pixels", 300
    )
    assert "32 x 32 pixels exceed the limit of 300" in log
    assert "falling back to training images" in log


def test_unreadable_images_are_replaced_by_the_next_ones(tmp_path, caplog):
    files = {f"val/cat/{i:02}.jpg": encode(picture(i)) for i in range(16)}
    for i in (2, 6, 7, 14):
        files[f"val/cat/{i:02}.jpg"] = files[f"val/cat/{i:02}.jpg"][:100]
    logging.getLogger("hpm").propagate = True
    names = pick_images(build_source(str(write_tree(tmp_path / "data", files)), "val"), 16)[1]
    assert names == [f"cat/{i:02}.jpg" for i in (0, 3, 4, 8, 9, 10, 12, 15)]
    messages = dict.fromkeys(record.getMessage() for record in caplog.records)  # once each, however many handlers
    warnings = [message for message in messages if "Unreadable image" in message]
    assert [str(i) in warning for i, warning in zip(("02", "06", "07", "14"), warnings, strict=True)] == [True] * 4


def test_unreadable_images_do_not_stop_the_training(tmp_path):
    """Neither one of the panel's images, nor if panels are impossible."""
    train = members(("train",))
    first = next(iter(train))
    data = write_tree(tmp_path / "first", train | {first: train[first][:100]})
    pretrain(tmp_path / "run", "--data_path", data, *DATA, "--vis_interval", 1)
    assert list(panels(tmp_path / "run")) == [1000, 2000]


def test_fewer_than_eight_images_are_shown_once_each(tmp_path):
    files = {f"val/cat/{i}.jpg": encode(picture(i)) for i in range(5)}
    source = build_source(str(write_tree(tmp_path / "few", files)), "val")
    assert pick_images(source, 16)[1] == [f"cat/{i}.jpg" for i in range(5)]
    assert pick_images(source, 16, count=2)[1] == ["cat/0.jpg", "cat/2.jpg"]


def test_only_rank_zero_draws(tmp_path):
    options = [*PRETRAIN, "--epochs", 1, "--output_dir", tmp_path / "run", "--vis_interval", 1]
    ranks("main_pretrain", *options)
    assert list(panels(tmp_path / "run")) == [1000]
    assert len(list((tmp_path / "run").glob("*tfevents*"))) == 1
