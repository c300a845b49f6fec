"""--eval says how each class fares: a confusion matrix and accuracies by class, exact over ranks."""

import csv
import re

import pytest
import torch
from images import members, write_tree
from programs import ranks, run

from engine_finetune import evaluate
from util.run import classwise
from util.run.amp import Amp

SIZES = ["--model", "vit_micro_patch16", "--input_size", 16, "--patch_size", 4, "--batch_size", 4, "--num_workers", 0]


def read(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A classifier of cat, cat-2 and dog, whose answers differ, and its data."""
    folder = tmp_path_factory.mktemp("tuned")
    data = write_tree(folder / "data", members(per_class=5))
    options = [*SIZES, "--data_path", data, "--warmup_epochs", 0, "--epochs", 4, "--lr", 3e-3, "--aa", ""]
    run("main_finetune", *options, "--output_dir", folder / "run")
    run("main_linprobe", *SIZES, "--data_path", data, "--epochs", 2, "--blr", 1, 9, "--output_dir", folder / "probe")
    return folder


def test_the_matrix_is_that_of_the_predictions():
    """Labels by hand: 2 of 3 images of class 0 are found, class 2 has none."""
    logits = torch.eye(3)[torch.tensor([0, 1, 0, 1])]
    batches = [(logits[:3], torch.tensor([0, 0, 0])), (logits[3:], torch.tensor([1]))]
    confusion = torch.zeros(1, 3, 3, dtype=torch.long)
    metrics = evaluate(
        torch.nn.Identity(), batches, Amp("fp32", torch.device("cpu")), lambda images: images, confusion=confusion
    )
    assert confusion[0].tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert metrics["acc1"] == 75


def test_files_and_the_worst_classes(tmp_path, caplog):
    (tmp_path / "out").mkdir()
    counts = torch.tensor([[2, 1, 1], [0, 0, 0], [3, 0, 1]])
    with caplog.at_level("INFO", logger="hpm"):
        classwise.log.propagate = True
        classwise.report(tmp_path / "out", counts, ["a,b", "1", "c"], worst=1)
    header, first, absent, last = read(tmp_path / "out/eval_classes.csv")
    assert header == ["class", "name", "images", "correct", "acc1", "most_confused_with", "times"]
    assert first == ["0", "a,b", "4", "2", "50.0000", "1", "1"]
    assert absent == ["1", "1", "0", "0", "", "", ""]
    assert last == ["2", "c", "4", "1", "25.0000", "a,b", "3"]
    matrix = read(tmp_path / "out/eval_confusion.csv")
    assert matrix == [["label \\ prediction", "a,b", "1", "c"], ["a,b", "2", "1", "1"], ["1", *"000"], ["c", *"301"]]
    assert "2 with images, mean accuracy 37.50 %" in caplog.text
    assert "25.00 %  c (4 images, 3 taken for a,b)" in caplog.text
    assert "50.00 %" not in caplog.text


def test_evaluation_of_one_process_and_two(tuned, tmp_path):
    """15 images, which neither the batch nor the ranks divide; the files agree with the accuracy that is printed."""
    weights = tuned / "run/checkpoint-best.pth"
    options = [*SIZES, "--eval", "--finetune", weights, "--data_path", tuned / "data", "--output_dir"]
    log = run("main_finetune", *options, tmp_path / "one")
    ranks("main_finetune", *options, tmp_path / "two")
    for name in ("eval_classes.csv", "eval_confusion.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    header, *rows = read(tmp_path / "one/eval_confusion.csv")
    assert header[1:] == [row[0] for row in rows] == ["cat", "cat-2", "dog"]
    counts = torch.tensor([[int(value) for value in row[1:]] for row in rows])
    assert counts.sum(1).tolist() == [5, 5, 5]
    assert float(re.search(r"acc1 ([\d.]+)", log)[1]) == pytest.approx(100 * int(counts.trace()) / 15, abs=1e-3)


def test_a_probe_reports_its_best_head(tuned, tmp_path):
    options = [*SIZES, "--eval", "--resume", tuned / "probe/checkpoint-last.pth", "--data_path", tuned / "data"]
    log = run("main_linprobe", *options, "--output_dir", tmp_path)
    best = max(float(value) for value in re.findall(r"acc1 ([\d.]+)", log))
    rows = read(tmp_path / "eval_classes.csv")[1:]
    assert 100 * sum(int(row[3]) for row in rows) / 15 == pytest.approx(best, abs=0.01)


def test_a_folder_that_cannot_be_written_to_is_an_error_before_the_evaluation(tuned, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        run("main_finetune", *SIZES, "--eval", "--finetune", tuned / "run/checkpoint-best.pth", "--data_path",
            tuned / "data", "--output_dir", tmp_path / "file" / "out")  # fmt: skip
    assert stop.value.code == 2
    assert "--output_dir" in capsys.readouterr().err
