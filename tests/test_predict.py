"""predict.py: a row for every image, the numbers of the evaluation, from every kind of checkpoint."""

import csv
import os

import numpy as np
import pytest
import torch
from images import encode, members, picture, write_tar, write_tree
from programs import PRETRAIN, launch, run

import models_load
from util.weights.load import load_pretrained

SIZES = ["--model", "vit_micro_patch16", "--input_size", 16, "--patch_size", 4, "--batch_size", 4, "--num_workers", 0]
CLASSES = ["cat", "cat-2", "dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An encoder, a classifier and a linear probe on it, and their data."""
    folder = tmp_path_factory.mktemp("predict")
    data = write_tree(folder / "data", members(per_class=4))
    write_tree(folder / "only_val", members(("val",)))
    run("main_pretrain", *PRETRAIN, "--epochs", 1, "--output_dir", folder / "pretrain", "--mean", 0.4, 0.5, 0.6)
    encoder = ["--finetune", folder / "pretrain/checkpoint-last.pth", "--data_path", data, "--warmup_epochs", 0]
    sizes = ["--batch_size", 4, "--num_workers", 0]
    run("main_finetune", *sizes, *encoder, "--epochs", 2, "--lr", 1e-2, "--output_dir", folder / "tune")
    run("main_linprobe", *sizes, *encoder, "--epochs", 2, "--blr", 1, 30, "--output_dir", folder / "probe")
    return folder


def predict(folder, checkpoint, *options, output="out.csv", images=None):
    """The rows of the CSV by file name, and the log."""
    words = ["--checkpoint", folder / checkpoint, "--num_workers", 0, "--output", output, *options]
    log = run("predict", *words, "--data_path", *([images] if not isinstance(images, list) else images))
    return read(output), log


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


CHECKPOINTS = {"tune/checkpoint-best.pth": "main_finetune", "probe/checkpoint-last.pth": "main_linprobe"}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_predictions_are_those_of_the_evaluation(folder, tmp_path, checkpoint):
    rows, _ = predict(folder, checkpoint, "--split", "val", output=tmp_path / "a.csv", images=folder / "data")
    assert [row["file"] for row in rows] == [f"{folder}/data/val/{c}/{i}.jpg" for c in CLASSES for i in range(4)]
    script = CHECKPOINTS[checkpoint]
    more = ["--finetune", folder / "pretrain/checkpoint-last.pth"] if script == "main_linprobe" else []
    options = [*more, "--eval", "--resume", folder / checkpoint, "--data_path", folder / "data", "--num_workers", 0]
    run(script, *options, "--output_dir", tmp_path / "eval")
    with open(tmp_path / "eval/eval_confusion.csv", newline="") as file:
        _, *matrix = csv.reader(file)
    counted = [[0] * 3 for _ in CLASSES]
    for row in rows:
        counted[CLASSES.index(row["file"].split("/")[-2])][CLASSES.index(row["class1"])] += 1
    assert counted == [[int(value) for value in line[1:]] for line in matrix]
    for row in rows:
        shares = [float(row[f"prob{k}"]) for k in (1, 2, 3)]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert shares == sorted(shares, reverse=True)
        assert row["unreadable"] == ""


def formats(folder, tmp_path):
    """The classifier as MAE's file, as timm's, and exported."""
    weights = load_pretrained(folder / "tune/checkpoint-best.pth")
    torch.save({"model": weights}, tmp_path / "mae.pth")
    torch.save(weights, tmp_path / "timm.pth")
    for name in ("timm", "safetensors"):
        output = tmp_path / f"{name}.safetensors"
        run("export", "--checkpoint", folder / "tune/checkpoint-best.pth", "--format", name, "--output", output)
    return ["mae.pth", "timm.pth", "timm.safetensors", "safetensors.safetensors"]


def test_every_format_gives_the_same_row(folder, tmp_path):
    image = folder / "data/val/dog/0.jpg"
    (own,), _ = predict(folder, "tune/checkpoint-best.pth", output=tmp_path / "a.csv", images=image)
    for name in formats(folder, tmp_path):
        bare = name.endswith(".pth")
        more = ["--mean", 0.4, 0.5, 0.6] if bare else []
        (row,), log = predict(tmp_path, name, *more, output=tmp_path / "b.csv", images=image)
        assert ("stores no names" in log) == bare
        names = [str(CLASSES.index(own[f"class{k}"])) if bare else own[f"class{k}"] for k in (1, 2, 3)]
        assert [row[f"class{k}"] for k in (1, 2, 3)] == names, name
        assert float(row["prob1"]) == pytest.approx(float(own["prob1"]), abs=2e-6)
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    more = ["--class_names", tmp_path / "names.txt", "--mean", 0.4, 0.5, 0.6]
    (row,), _ = predict(tmp_path, "mae.pth", *more, output=tmp_path / "b.csv", images=image)
    assert row["class1"] == own["class1"]


def test_any_images(folder, tmp_path):
    """A flat folder with names that are not UTF-8 and a damaged file, an archive, and files: rows in listing order."""
    flat = tmp_path / "flat"
    flat.mkdir()
    names = [b"a.jpg", b'b,"quoted".png', b"caf\xe9.jpg", b"damaged.jpg", b"large.png"]
    for number, name in enumerate(names):
        data = encode(picture(number, (300, 300) if name == b"large.png" else (20, 30)), "PNG")
        with open(os.path.join(os.fsencode(flat), name), "wb") as file:
            file.write(data[:100] if name == b"damaged.jpg" else data)
    tar = write_tar(tmp_path / "more.tar", {"x/1.jpg": encode(picture(9)), "0.jpg": encode(picture(8))})
    images = [flat, tar, folder / "data/val/dog/0.jpg", folder / "data/val/dog/1.jpg"]
    more = ["--features", tmp_path / "f.npz", "--max_image_pixels", 50_000, "--batch_size", 3]
    rows, log = predict(folder, "tune/checkpoint-best.pth", *more, output=tmp_path / "a.csv", images=images)
    shown = ["a.jpg", 'b,"quoted".png', "caf\\xe9.jpg", "damaged.jpg", "large.png", "0.jpg", "1.jpg", "0.jpg", "1.jpg"]
    assert [row["file"].split("/")[-1] for row in rows] == shown
    reasons = {row["file"].split("/")[-1]: row["unreadable"] for row in rows if row["unreadable"]}
    assert reasons == {"damaged.jpg": "damaged", "large.png": "over the pixel limit"}
    assert all((row["class1"] == "") == (row["prob1"] == "") == bool(row["unreadable"]) for row in rows)
    assert "2 of 9 images are unreadable (1 damaged, 1 over the pixel limit)" in log
    assert all(name in log for name in ("damaged.jpg", "large.png"))
    stored = np.load(tmp_path / "f.npz")
    assert [str(name) for name in stored["files"]] == [row["file"] for row in rows]
    assert np.isnan(stored["features"]).all(axis=1).tolist() == [bool(row["unreadable"]) for row in rows]


def test_features_are_the_input_of_the_classifier(folder, tmp_path, monkeypatch):
    """Of a classifier together with its predictions; of an encoder alone."""
    monkeypatch.chdir(tmp_path)
    tuned, images = folder / "tune/checkpoint-best.pth", folder / "data/val"
    predict(
        folder, "tune/checkpoint-best.pth", "--features", tmp_path / "a.npy", output=tmp_path / "a.csv", images=images
    )
    model, _ = models_load.load_encoder(tuned)
    classifier, transform, names = models_load.load_classifier(tuned)
    features = torch.from_numpy(np.load(tmp_path / "a.npy"))
    best = classifier.head(features).softmax(dim=1).max(dim=1)
    rows = read(tmp_path / "a.csv")
    assert [names[k] for k in best.indices] == [row["class1"] for row in rows]
    image = torch.stack([transform(picture(seed=1))])
    torch.testing.assert_close(classifier.head(model(image)), classifier(image))
    run("predict", "--checkpoint", folder / "pretrain/checkpoint-last.pth", "--which", "ema", "--num_workers", 0,
        "--features", tmp_path / "b.npy", "--data_path", images)  # fmt: skip
    assert np.load(tmp_path / "b.npy").shape == (12, 128)
    assert not (tmp_path / "predictions.csv").exists()
    assert not (tmp_path / "b.csv").exists()


def test_workers_and_progress(folder, tmp_path):
    """As a process of its own, with a worker, from another folder."""
    options = ["--checkpoint", folder / "tune/checkpoint-best.pth", "--data_path", folder / "data/val"]
    done = launch("predict", *options, "--num_workers", 1, cwd=tmp_path)
    assert "wrote     predictions.csv" in done.stdout
    rows, _ = predict(folder, "tune/checkpoint-best.pth", output=tmp_path / "a.csv", images=folder / "data/val")
    assert read(tmp_path / "predictions.csv") == rows


MISTAKES = {
    "--checkpoint ENCODER": "is an encoder without a classifier: fine-tune it",
    "--checkpoint ENCODER --features a.npy --output a.csv": "is an encoder without a classifier",
    "--checkpoint TUNED --output a.txt": "--output a.txt: expected the name of a file, .csv",
    "--checkpoint TUNED --features a.csv": "--features a.csv: expected the name of a file, .npz or .npy",
    "--checkpoint TUNED --output /proc/a.csv": "/proc",
    "--checkpoint TUNED --mean 127 127 127": "mean 127 127 127 lies outside 0..1",
    "--checkpoint TUNED --cls_token": "a classifier has its own pooling",
    "--checkpoint TUNED --class_names imagenet": "has 1,000 names, the checkpoint 3 classes",
    "--checkpoint TUNED --head 2": "--encoder and --head apply only to checkpoints of main_linprobe.py",
    "--checkpoint PROBE --head 3": "--head 3",
    "--checkpoint TUNED --data_path /nowhere": "--data_path /nowhere does not exist",
    "--checkpoint TUNED --data_path UNSPLIT --split val": "looked for val/CLASS/*.jpg",
    "--checkpoint TUNED --data_path ONLY_VAL --split train": "looked for train/CLASS/*.jpg",
    "--checkpoint TUNED --data_path UNSPLIT --split train": "looked for train/CLASS/*.jpg",
    "--checkpoint TUNED --split test": "--split test: Shapes have train and val",
    "--checkpoint /nowhere.pth": "checkpoint /nowhere.pth does not exist",
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes_end_in_a_line(folder, tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    places = {"ENCODER": "pretrain/checkpoint-last.pth", "TUNED": "tune/checkpoint-best.pth"}
    places |= {"PROBE": "probe/checkpoint-last.pth", "UNSPLIT": "data/train", "ONLY_VAL": "only_val"}
    for name, path in places.items():
        text = text.replace(name, str(folder / path))
    with pytest.raises(SystemExit) as stop:
        run("predict", *text.split())
    assert stop.value.code == 2
    written = capsys.readouterr().err
    assert message in written
    assert "--val_fraction" not in written  # which predict.py does not have
    assert written.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_classifier_of_one_class_is_rejected(folder, tmp_path, capsys):
    """Its probability is always 1, and its accuracy 100 %."""
    weights = load_pretrained(folder / "tune/checkpoint-best.pth")
    weights = {name: tensor[:1] if name.startswith("head.") else tensor for name, tensor in weights.items()}
    torch.save({"model": weights}, tmp_path / "one.pth")
    for script, options in (("predict", ["--checkpoint"]), ("main_finetune", [*SIZES, "--eval", "--finetune"])):
        with pytest.raises(SystemExit):
            run(script, *options, tmp_path / "one.pth", "--data_path", folder / "data")
        assert "one.pth has one output, " in capsys.readouterr().err


def test_two_processes_are_rejected(folder, monkeypatch, capsys):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(SystemExit):
        run("predict", "--checkpoint", folder / "tune/checkpoint-best.pth")
    assert "predict.py runs in one process, not 2" in capsys.readouterr().err
