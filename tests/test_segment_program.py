"""Segmentation as a whole program, on a small data set in ADE20K's layout."""

import io
import re

import numpy as np
import pytest
import torch
from images import encode, write_png_16, write_tar, write_tree
from PIL import Image
from programs import PRETRAIN, assert_same_training, checkpoint, launch, log_lines, ranks, run
from segment_data import NAMES, ade_files

import engine_segment
import main_segment
import models_vit
from util.run.distributed import World
from util.run.options import UserMistake

PROBE = ["--batch_size", 5, "--input_size", 32, "--num_workers", 0]
SIZES = ["--crop", 16, "--num_workers", 0]
STEPS = ["--steps", 4, "--eval_interval", 2, "--batch_size", 4, "--global_batch", 4, "--log_interval", 1]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    run("main_pretrain", *PRETRAIN, "--output_dir", folder, "--mean", 0.4, 0.5, 0.6)
    return folder / "checkpoint-last.pth"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("data") / "ade", ade_files(train=12, val=5))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pretrained, data):
    """A UPerNet run of two evaluations: its folder and its log."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, start(folder, data, pretrained, "--save_predictions", folder / "png", "--save_preview", 2)


def start(folder, data, pretrained, *more, runner=run):
    given = ["--data_path", data, "--finetune", pretrained, "--output_dir", folder, *SIZES, *STEPS, *more]
    return runner("main_segment", *given)


def mious(log):
    return [float(value) for value in re.findall(r"mIoU (\d+\.\d\d)", log)]


def independent_miou(data, predictions):
    """From the files alone, with sets of pixels: labels and predictions in ADE20K's convention."""
    pairs = []
    for path in sorted(predictions.glob("*.png")):
        label = np.array(Image.open(data / "annotations/validation" / path.name))
        prediction = np.array(Image.open(path))
        assert prediction.shape == label.shape
        assert prediction.min() >= 1
        pairs.append((prediction[label > 0], label[label > 0]))
    prediction, label = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    classes = np.unique(label)
    return 100 * np.mean(
        [((prediction == k) & (label == k)).sum() / ((prediction == k) | (label == k)).sum() for k in classes]
    )


# ------------------------------------------------------------------------------------------------------ training


def test_training(trained):
    folder, log = trained
    assert re.search(r"data      train: 12 images; ignored \d\.\d %, grass \d\d\.\d %, .*; absent: no class", log)
    assert re.search(r"loaded +\d+ tensors\nunused .*norm \(2\).*\nnewly initialised +blocks \(18\)", log)
    assert "steps     4, warm-up 0, linear decay" in log
    assert "batch     4 = --batch_size 4 x --accum_iter 1 x 1 process" in log
    protocol = "upernet on vit_micro_patch16, patch 4, short side 16, windows 16, stride 10, scored at original size, "
    assert re.search(rf"step 4/4  mIoU \d+\.\d\d  pixel_accuracy \d+\.\d\d  \({protocol}3 classes, 5 images\)", log)
    names = {p.name for p in folder.iterdir() if "tfevents" not in p.name}
    assert {"config.json", "log.jsonl", "iou.tsv", "checkpoint-last.pth", "checkpoint-2.pth", "preview"} <= names
    first, second = log_lines(folder)
    assert {
        "train_loss",
        "train_grad_norm",
        "test_mIoU",
        "test_pixel_accuracy",
        "protocol",
        "train_lr",
    } <= second.keys()
    assert mious(log) == [round(line["test_mIoU"], 2) for line in (first, second)]
    table = (folder / "iou.tsv").read_text().splitlines()
    assert table[0].startswith("# step 4/4  mIoU ")
    assert [line.split("\t")[1] for line in table[2:]] == NAMES
    values = [float(line.split("\t")[3]) for line in table[2:]]
    assert np.mean(values) == pytest.approx(second["test_mIoU"], abs=1e-3)


def test_saved_predictions_give_the_same_miou(trained, data):
    folder, _ = trained
    assert independent_miou(data, folder / "png") == pytest.approx(log_lines(folder)[-1]["test_mIoU"])


def test_previews(trained):
    folder, _ = trained
    assert sorted(path.name for path in (folder / "preview").iterdir()) == ["p_000.png", "p_001.png"]
    with Image.open(folder / "preview/p_000.png") as picture:
        assert picture.width > 900


def test_resuming_is_bitwise(tmp_path, trained, pretrained, data):
    folder, _ = trained
    start(tmp_path, data, pretrained, "--max_steps", 3)
    assert checkpoint(tmp_path)["step"] == 1
    log = start(tmp_path, data, pretrained, "--save_predictions", tmp_path / "png", "--save_preview", 2)
    assert "Resuming from" in log
    assert_same_training(folder, tmp_path)
    assert log_lines(folder)[-1]["test_mIoU"] == log_lines(tmp_path)[-1]["test_mIoU"]
    assert "Run already complete" in start(tmp_path, data, pretrained)


def test_two_ranks_resume_bitwise(tmp_path, pretrained, data):
    """Batch norm on the CPU is per rank; rank 0's statistics count."""
    more = ("--batch_size", 2, "--eval_interval", 4)
    start(tmp_path / "whole", data, pretrained, *more, runner=ranks)
    start(tmp_path / "parts", data, pretrained, *more, "--max_steps", 2, runner=ranks)
    log = start(tmp_path / "parts", data, pretrained, *more, runner=ranks)
    assert "batch     4 = --batch_size 2 x --accum_iter 1 x 2 processes" in log
    assert_same_training(tmp_path / "whole", tmp_path / "parts")
    assert [line["test_mIoU"] for line in log_lines(tmp_path / "whole")] == [
        line["test_mIoU"] for line in log_lines(tmp_path / "parts")
    ]
    alone = run("main_segment", "--eval", "--data_path", data, "--output_dir", tmp_path / "whole", "--num_workers", 0)
    assert mious(alone)[-1] == pytest.approx(log_lines(tmp_path / "whole")[-1]["test_mIoU"], abs=0.006)


def test_padding_is_zero_after_normalisation():
    """Right of and below an image of 2 x 3 pixels in a crop of 4."""
    padded = engine_segment.blank_padding(torch.ones(1, 3, 4, 4), torch.tensor([[2, 3]]))
    assert padded.sum() == 3 * 2 * 3
    assert (padded[:, :, :2, :3] == 1).all()


def test_under_torchrun(tmp_path, pretrained, data):
    given = ["--data_path", data, "--finetune", pretrained, "--output_dir", tmp_path, *SIZES, *STEPS]
    given += ["--batch_size", 2, "--eval_interval", 4]
    done = launch("main_segment", *given, processes=2)
    assert len(mious(done.stderr + done.stdout)) == 1


def test_the_linear_head_leaves_the_encoder_alone(tmp_path, pretrained, data):
    log = start(tmp_path, data, pretrained, "--head", "linear", "--save_predictions", tmp_path / "png")
    assert "linear on frozen vit_micro_patch16" in log
    assert "steps     4, warm-up 0, cosine decay" in log
    before, after = checkpoint(pretrained.parent)["state_dict"], checkpoint(tmp_path)["state_dict"]
    for name in ("norm.weight", "blocks.5.mlp.fc2.weight", "cls_token"):
        assert torch.equal(before[name], after[f"encoder.{name}"])
    assert after["head.1.running_mean"].abs().sum() > 0
    assert independent_miou(data, tmp_path / "png") == pytest.approx(log_lines(tmp_path)[-1]["test_mIoU"])


# ------------------------------------------------------------------------------------------------------ evaluation


@pytest.mark.parametrize("runner", [run, ranks])
def test_evaluating_what_was_trained(tmp_path, trained, data, runner):
    """On one rank and on two with an uneven split, with every option of the run taken from its checkpoint."""
    folder, log = trained
    given = ["--eval", "--data_path", data, "--num_workers", 0, "--finetune", folder / "checkpoint-last.pth"]
    again = runner("main_segment", *given, "--output_dir", tmp_path, "--save_predictions", tmp_path / "png")
    assert mious(again) == mious(log)[-1:]
    assert len(list((tmp_path / "png").iterdir())) == 5
    table, expected = (path.joinpath("iou.tsv").read_text().splitlines()[1:] for path in (tmp_path, folder))
    assert table == expected
    assert mious(run("main_segment", *given[:-2], "--output_dir", folder)) == mious(log)[-1:]  # of the run folder


def test_evaluation_needs_no_training_images(tmp_path, trained):
    """Three original sizes, and a class that is absent."""
    folder, _ = trained
    files = {name: value for name, value in ade_files(val=3).items() if "training" not in name}
    for name in [name for name in files if name.endswith(".png")]:
        label = np.array(Image.open(io.BytesIO(files[name])))
        files[name] = encode(Image.fromarray(np.where(label == 3, 1, label).astype(np.uint8)), "PNG")
    path = write_tar(tmp_path / "ade.tar", files)
    given = ["--data_path", path, "--num_workers", 0, "--finetune", folder / "checkpoint-last.pth"]
    log = run("main_segment", "--eval", *given, "--output_dir", tmp_path)
    assert "1 classes occur in no label and are excluded from the mean: road" in log
    assert (tmp_path / "iou.tsv").read_text().splitlines()[-1] == "2\troad\t0\tabsent\tabsent"


# ------------------------------------------------------------------------------------------------------ probes


@pytest.mark.parametrize("head", ["knn", "logreg"])
def test_probes(tmp_path, pretrained, data, head):
    given = ["--head", head, "--data_path", data, "--finetune", pretrained, *PROBE]
    more = ["--save_predictions", tmp_path / "png", "--save_preview", 1]
    log = run("main_segment", *given, "--output_dir", tmp_path, *more)
    assert re.search(r"patches   \d{3}, \d+ held out to choose hyper-parameters", log)
    names = ["1-NN", "3-NN", "10-NN", "30-NN"] if head == "knn" else ["logreg"]
    protocol = rf"\({head} on frozen vit_micro_patch16, patch 4, 32 x 32 pixels, one class per patch, "
    for name in names:
        assert re.search(rf"{name}  mIoU \d+\.\d\d  pixel_accuracy \d+\.\d\d  {protocol}", log)
    assert "lr" not in re.findall(r"^(\w+) ", log, re.MULTILINE)
    assert independent_miou(data, tmp_path / "png") == pytest.approx(mious(log)[-1], abs=0.005)
    assert mious(log)[-1] > 30  # colours tell the classes apart
    assert (tmp_path / "preview/p_000.png").exists()
    two = ranks("main_segment", *given, "--output_dir", tmp_path / "two")
    assert mious(two) == mious(log)


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eval_interval", 3], r"--eval_interval 3 does not divide --steps 4"),
        (["--warmup_steps", 4], r"--warmup_steps 4 must be less than --steps 4"),
        (["--stride", 40], r"--stride 40 leaves gaps between windows of --crop 16"),
        (["--crop", 30], r"patch size 4 does not divide an image of 30 x 30"),
        (["--head", "knn", "--eval"], r"--head knn is fitted at every start: omit --eval"),
        (
            ["--num_classes", 2],
            r"has label 3, which is class 2 counted from 0, but there are 2 classes \(--num_classes",
        ),
        (["--head", "conv"], r"unknown value 'conv'"),
        (
            ["--global_batch", 16, "--batch_size", 16],
            r"12 images do not fill one optimizer step of 16 .* --global_batch",
        ),
        (["--batch_size", 1], r"--batch_size 1: UPerNet's batch norm needs at least two images"),
        (["--crop", 24, "--patch_size", 16], r"--crop 24: patch size 16 does not divide an image of 24 x 24"),
        (["--input_size", 16], r"--input_size has no effect with --head upernet: omit it"),
        (["--head", "linear", "--drop_path", 0.1], r"--drop_path has no effect with --head linear: omit it"),
        (["--head", "knn"], r"--crop has no effect with --head knn: omit it"),
        (["--ignore_index", 0], r"--ignore_index 0 is a class"),
        (["--save_predictions", "/proc/x"], r"--save_predictions /proc/x cannot be written to"),
    ],
)
def test_mistakes(tmp_path, data, pretrained, options, message):
    with pytest.raises(UserMistake) as mistake:
        start(tmp_path / "run", data, pretrained, *options)
    assert re.search(message, mistake.value.message)


def test_data_are_required(tmp_path):
    with pytest.raises(UserMistake) as mistake:
        main_segment.main(["--output_dir", str(tmp_path)])
    assert mistake.value.message.startswith("--data_path is missing: give data with images/training/NAME.jpg")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--crop", 32], "was trained with --crop 16, now it is 32"),
        (["--ignore_index", 7], "was trained with --ignore_index 255, now it is 7"),
        (["--global_batch", 8], "was trained with --global_batch 4, now it is 8"),
    ],
)
def test_what_cannot_change_on_resume(trained, pretrained, data, options, message):
    folder, _ = trained
    with pytest.raises(UserMistake) as mistake:
        start(folder, data, pretrained, *options)
    assert message in mistake.value.message


@pytest.mark.parametrize(
    ("processes", "options", "expected"),
    [
        (1, [], (16, 16, 1)),
        (2, [], (16, 8, 1)),
        (8, [], (16, 2, 1)),
        (1, ["--batch_size", "4"], (16, 4, 4)),
        (6, [], (12, 2, 1)),
        (32, ["--head", "linear"], (32, 1, 1)),
        (6, ["--global_batch", "18"], (18, 3, 1)),
    ],
)
def test_the_global_batch_size_is_16_where_the_processes_allow_it(processes, options, expected, log):
    given = ["--data_path", "x", "--model", "vit_micro_patch16", *options]
    args = main_segment.get_args_parser().parse_args(given)
    args = main_segment.resolve_options(args, World(0, processes, 0, processes))
    assert (args.global_batch, args.batch_size, args.accum_iter) == expected
    warned = "not the protocol's 16: look at --lr" in log.text
    assert warned == (expected[0] != 16 and "--global_batch" not in options)


@pytest.mark.parametrize(("processes", "batch"), [(1, 1), (3, 2), (6, 5)])
def test_evaluation_has_no_global_batch_size(trained, processes, batch):
    path = trained[0] / "checkpoint-last.pth"
    given = ["--data_path", "x", "--eval", "--finetune", str(path), "--batch_size", str(batch)]
    args = main_segment.get_args_parser().parse_args(given)
    assert main_segment.resolve_options(args, World(0, processes, 0, processes)).crop == 16


def test_classifiers_without_a_norm_for_patches(tmp_path, data):
    model = models_vit.vit_micro_patch16(img_size=32, patch_size=4, num_classes=3, global_pool=True)
    torch.save({"model": model.state_dict()}, tmp_path / "mean.pth")
    given = [
        "--data_path",
        data,
        "--finetune",
        tmp_path / "mean.pth",
        "--model",
        "vit_micro_patch16",
        "--patch_size",
        4,
    ]
    with pytest.raises(UserMistake) as mistake:
        run("main_segment", *given, "--head", "knn", *PROBE, "--output_dir", tmp_path)
    assert "have none for patch tokens: give the pre-trained checkpoint, or --head upernet" in mistake.value.message


def test_too_few_images_to_choose_hyper_parameters(tmp_path, pretrained):
    path = write_tree(tmp_path / "data", ade_files(train=1, val=1))
    with pytest.raises(UserMistake) as mistake:
        run(
            "main_segment",
            "--data_path",
            path,
            "--finetune",
            pretrained,
            "--head",
            "logreg",
            *PROBE,
            "--output_dir",
            tmp_path,
        )
    assert "--head logreg holds out a tenth of the training images, and there is one" in mistake.value.message


# ------------------------------------------------------------------------------------------------------ data


def test_16_bit_images_are_scaled_by_the_value_range(tmp_path, pretrained):
    """12-bit values in 16-bit files: without the range they would be almost black."""
    files = ade_files(train=10, val=1)
    for name in [name for name in files if name.endswith(".jpg")]:
        values = np.array(Image.open(io.BytesIO(files.pop(name))).convert("L")).astype(np.uint16) * 16
        files[name.replace(".jpg", ".png")] = write_png_16(values)
    path = write_tree(tmp_path / "data", files)
    given = ["--data_path", path, "--finetune", pretrained, "--head", "knn", *PROBE, "--save_preview", 1]
    brightness = []
    for more in ([], ["--value_range", 0, 4095]):
        log = run("main_segment", *given, *more, "--output_dir", tmp_path / str(len(more)))
        assert ("the default range keeps" in log) == (not more)
        with Image.open(tmp_path / str(len(more)) / "preview/p_000.png") as picture:
            brightness.append(np.array(picture)[40:200, 20:300].mean())
    assert brightness[0] < 20
    assert brightness[1] > 80


def test_images_in_subfolders_keep_their_predictions_apart(tmp_path, pretrained):
    files = {}
    for name, value in ade_files(train=10, val=4).items():
        for number in range(4):
            name = name.replace(f"validation/p_{number:03}", f"validation/{'ab'[number % 2]}/{number // 2}")
        files[name] = value
    path = write_tree(tmp_path / "data", files)
    given = ["--data_path", path, "--finetune", pretrained, "--head", "knn", *PROBE, "--output_dir", tmp_path]
    run("main_segment", *given, "--save_predictions", tmp_path / "png", "--save_preview", 4)
    for folder in ("png", "preview"):
        found = sorted(str(file.relative_to(tmp_path / folder)) for file in (tmp_path / folder).rglob("*.png"))
        assert found == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]


def test_weights_of_another_size_are_rejected(tmp_path, data, pretrained):
    with pytest.raises(UserMistake) as mistake:
        start(tmp_path, data, pretrained, "--model", "vit_tiny_patch16")
    assert "the weights do not fit the model" in mistake.value.message
