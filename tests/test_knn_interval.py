"""--knn_interval: k-NN accuracy during pre-training is main_knn.py's, and training does not notice."""

import json
import re

import pytest
from images import members, write_tree
from programs import PRETRAIN, assert_same_training, log_lines, ranks, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

OPTIONS = [*PRETRAIN, "--lr", 3e-3, "--batch_size", 4]
KNN = ["--knn_interval", 1, "--knn_k", 5]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("data"), members(per_class=6))


def knn(checkpoint, data, *more):
    """main_knn.py's accuracies of a checkpoint."""
    log = run("main_knn", "--finetune", checkpoint, "--data_path", data, "--nb_knn", 5, "--num_workers", 0, *more)
    return [float(value) for value in re.search(r"5-NN  top-1 ([\d.]+)  top-5 ([\d.]+)", log).groups()]


def scores(line):
    return [line["knn_acc1"], line["knn_acc5"]]


@pytest.mark.parametrize("start", [run, ranks], ids=["one process", "two processes"])
def test_the_numbers_are_those_of_main_knn_and_the_weights_those_without(tmp_path, data, start):
    for name, more in (("with", [*KNN, "--save_interval", 1]), ("without", [])):
        start("main_pretrain", *OPTIONS, "--data_path", data, *more, "--output_dir", tmp_path / name)
    assert_same_training(tmp_path / "with", tmp_path / "without")
    lines = log_lines(tmp_path / "with")
    for epoch, line in enumerate(lines, start=1):
        found = knn(tmp_path / f"with/checkpoint-{epoch}.pth", data)
        assert found == pytest.approx(scores(line), abs=0.005)
    assert not any("knn_acc1" in line for line in log_lines(tmp_path / "without"))
    events = EventAccumulator(str(tmp_path / "with"))
    events.Reload()
    logged = [event.value for event in events.Scalars("epoch/knn_acc1")]
    assert logged == pytest.approx([line["knn_acc1"] for line in lines])


def test_interval_other_data_pooling_and_resume(tmp_path, data):
    """Every second epoch and the last one; a run that resumes just before an evaluation makes up for it."""
    knn_options = ["--knn_interval", 2, "--knn_data_path", data, "--knn_k", 5, "--knn_global_pool"]
    more = ["--epochs", 3, "--shapes_train", 8, "--vis_mask_ratio", 0.2]
    options = [*OPTIONS, *more, *knn_options, "--output_dir"]
    log = run("main_pretrain", *options, tmp_path / "whole")
    assert "k-NN      every 2 epochs: 18 training images, 18 queries" in log
    whole = log_lines(tmp_path / "whole")
    assert [("knn_acc1" in line) for line in whole] == [False, True, True]
    found = knn(tmp_path / "whole/checkpoint-3.pth", data, "--global_pool")
    assert found == pytest.approx(scores(whole[2]), abs=0.005)
    run("main_pretrain", *options, tmp_path / "parts", "--max_steps", 3)
    run("main_pretrain", *options, tmp_path / "parts")
    assert_same_training(tmp_path / "whole", tmp_path / "parts")
    assert [line.get("knn_acc1") for line in log_lines(tmp_path / "parts")] == [line.get("knn_acc1") for line in whole]


def test_unreadable_training_images_are_ignored(tmp_path):
    """From two processes; main_knn.py, in one, does the same."""
    damaged, missing = "train/cat/0.jpg", members(per_class=6)
    del missing[damaged]
    without = write_tree(tmp_path / "without", missing)
    tree = write_tree(tmp_path / "tree", {**missing, damaged: b"x"})
    log = ranks("main_pretrain", *OPTIONS, "--data_path", tree, *KNN, "--output_dir", tmp_path / "run")
    assert f"unreadable (damaged): {tree / damaged}" in log
    assert "1 of 18 images are unreadable (1 damaged): ignored by k-NN" in log
    found = knn(tmp_path / "run/checkpoint-last.pth", without)
    assert found == pytest.approx(scores(log_lines(tmp_path / "run")[-1]), abs=0.005)
    assert found == knn(tmp_path / "run/checkpoint-last.pth", tree)


def test_labels_from_one(tmp_path):
    images = {f"{i}.jpg": image for i, image in enumerate(members().values())}
    tree = write_tree(
        tmp_path / "d", {f"{split}/{name}": images[name] for split in ("train", "val") for name in images}
    )
    for split in ("train", "val"):
        (tree / f"{split}.txt").write_text("".join(f"{name} {1 + i % 3}\n" for i, name in enumerate(images)))
    options = ["--data_path", tree, *KNN, "--epochs", 1]
    run("main_pretrain", *OPTIONS, *options, "--output_dir", tmp_path / "run")
    found = knn(tmp_path / "run/checkpoint-last.pth", tree, "--nb_classes", 4)
    assert found == pytest.approx(scores(log_lines(tmp_path / "run")[-1]), abs=0.005)


def test_comparison_of_runs_shows_percent(tmp_path):
    pytest.importorskip("matplotlib")
    from visualize import curves

    lines = [{"epoch": epoch, "train_loss_rec": 1.0, "knn_acc1": value} for epoch, value in enumerate((12.5, 40.0))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = curves.plot({"run": str(tmp_path)})
    (axis,) = [axis for axis in figure.axes if axis.get_title().startswith("top-1 accuracy in %")]
    assert axis.lines[0].get_ydata().tolist() == [12.5, 40.0]
    (tmp_path / "other").mkdir()
    table = curves.compare_accuracy({"run": str(tmp_path), "other": str(tmp_path / "other")})
    assert table.splitlines() == [
        "run    last   epochs  best   epochs",
        "run    40.00  2       40.00  2",
        "other  -      -       -      -",
    ]
    assert curves.compare_accuracy({"other": str(tmp_path / "other")}) == ""


MISTAKES = {
    "--knn_k 5": "--knn_k is for k-NN during training: give --knn_interval N",
    "--no-knn_global_pool": "--knn_global_pool is for k-NN during training",
    "--knn_interval 1 --knn_k 49 --shapes_train 48": "--knn_k 49 of 48 training images",
    "--knn_interval 1 --data_path FLAT": "--knn_interval needs labelled images, give them as --knn_data_path: ",
    "--knn_interval 1 --data_path FLAT OTHER": "labels can only come from one",
    "--knn_interval 1 --knn_data_path FLAT": "--knn_data_path FLAT: looked for train/CLASS/*.jpg, ",
    "--knn_interval 1 --knn_data_path IMAGES": "all training images have the class 'images', so any prediction",
    "--knn_interval 1 --knn_data_path TRAIN": "found train/; give the folder that holds val/\n",
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes(tmp_path, capsys, text, message):
    for name in ("flat", "other"):
        write_tree(tmp_path / name, {f"{i}.jpg": data for i, data in enumerate(members().values())})
        text, message = (part.replace(name.upper(), str(tmp_path / name)) for part in (text, message))
    text = text.replace("TRAIN", str(write_tree(tmp_path / "t", {f"train/{k}/a.jpg": b"" for k in range(2)})))
    one = members(classes=["images"])
    text = text.replace("IMAGES", str(write_tree(tmp_path / "one", one)))
    with pytest.raises(SystemExit) as stop:
        run("main_pretrain", *OPTIONS, "--output_dir", tmp_path / "run", *text.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
