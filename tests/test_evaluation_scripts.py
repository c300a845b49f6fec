"""Fine-tuning, linear probe and k-NN as whole programs, from anybody's checkpoint."""

import argparse
import json
import re
import subprocess
import sys

import pytest
import torch
from images import members, write_tree
from programs import PRETRAIN, assert_same_training, checkpoint, log_lines, ranks, run, start_and_kill
from safetensors.torch import save_file

import main_finetune
import main_knn
import models_vit
from models_load import load_encoder
from util.data.transforms import ToModelInput
from util.run import loop
from util.run.distributed import World

FINETUNE = [
    *["--shapes_train", "48", "--shapes_val", "21", "--batch_size", "8", "--epochs", "2", "--num_workers", "0"],
    *["--warmup_epochs", "0", "--log_interval", "4"],
]
MIXED = ["--mixup", "0.8", "--cutmix", "1.0", "--reprob", "0.5", "--drop_path", "0.2"]
PROBE = [*FINETUNE, "--blr", "1", "0.1"]
KNN = ["--shapes_train", "48", "--shapes_val", "21", "--batch_size", "8", "--num_workers", "0", "--nb_knn", "5", "20"]
TRAINING = {"main_finetune": [*FINETUNE, *MIXED], "main_linprobe": PROBE}


@pytest.fixture(autouse=True)
def _own_output_dir(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the default --output_dir is relative


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    run("main_pretrain", *PRETRAIN, "--output_dir", folder, "--mean", 0.4, 0.5, 0.6)
    return folder / "checkpoint-last.pth"


def start(script, folder, pretrained, *more):
    return run(script, *TRAINING[script], "--finetune", pretrained, "--output_dir", folder, *more)


# --------------------------------------------------------------------------------------------------- training scripts


def test_fine_tuning(tmp_path, pretrained):
    log = start("main_finetune", tmp_path / "run", pretrained)
    assert "model     vit_micro_patch16 (checkpoint), 10 classes, mean of patch tokens" in log
    assert "image     16 pixels (checkpoint) in patches of 4" in log
    assert re.search(
        r"loaded +76 tensors\nunused +mask_token \(1\), .*norm \(2\).*\nnewly initialised +fc_norm \(2\), head \(2\)",
        log,
    )
    assert re.search(r"epoch 2/2  acc1 \d+\.\d\d  acc5 \d+\.\d\d  loss \d\.\d{4}  best \d+\.\d\d", log)
    names = {p.name for p in (tmp_path / "run").iterdir() if "tfevents" not in p.name}
    assert names == {
        *{".lock", "config.json", "log.jsonl", "checkpoint-last.pth", "checkpoint-prev.pth", "checkpoint-2.pth"},
        "checkpoint-best.pth",
    }
    record = log_lines(tmp_path / "run")[-1]
    assert {"train_loss", "test_acc1", "test_acc5", "test_loss", "best_acc1", "train_lr"} <= record.keys()
    config = json.loads((tmp_path / "run/config.json").read_text())["options"]
    assert config["mean"] == [0.4, 0.5, 0.6]  # what the checkpoint was trained with
    assert config["lr"] == pytest.approx(5e-4 * 8 / 256)


def test_evaluating_what_was_fine_tuned(tmp_path, pretrained):
    start("main_finetune", tmp_path / "run", pretrained)
    best = max(line["test_acc1"] for line in log_lines(tmp_path / "run"))
    data = ["--shapes_val", 21, "--num_workers", 0, "--eval"]
    for way in (
        ["--output_dir", tmp_path / "run"],
        ["--resume", tmp_path / "run/checkpoint-best.pth", "--output_dir", tmp_path / "x"],
        ["--finetune", tmp_path / "run/checkpoint-best.pth", "--output_dir", tmp_path / "x", "--batch_size", 5],
    ):
        log = run("main_finetune", *data, *way)
        assert float(re.search(r"acc1 ([\d.]+)", log)[1]) == pytest.approx(best, abs=1e-3)
        assert {p.name for p in (tmp_path / "x").glob("*")} <= {"eval_classes.csv", "eval_confusion.csv"}


def test_a_class_token_and_random_weights(tmp_path):
    sizes = ["--model", "vit_micro_patch16", "--input_size", 16, "--patch_size", 4]
    log = run("main_finetune", *FINETUNE, *sizes, "--cls_token", "--aa", "", "--output_dir", tmp_path, "--epochs", 1)
    assert "class token" in log
    assert "no --finetune: starting from random weights" in log
    assert "norm.weight" in checkpoint(tmp_path)["state_dict"]


def test_the_probe(tmp_path, pretrained):
    log = start("main_linprobe", tmp_path / "run", pretrained)
    assert "features  vit_micro_patch16, class token, 16 pixels in patches of 4" in log
    assert "schedule  lr 0.0312, 0.00313," in log
    assert log.count("<- best") == 2
    record = log_lines(tmp_path / "run")[-1]
    assert {"test_acc1 lr 0.03125", "test_acc1 lr 0.003125", "best_head", "best_acc1"} <= record.keys()
    state = checkpoint(tmp_path / "run")["state_dict"]
    assert set(state) == {
        *{"norm.running_mean", "norm.running_var", "heads.0.weight", "heads.0.bias"},
        *{"heads.1.weight", "heads.1.bias"},
    }
    log = run("main_linprobe", "--eval", "--finetune", pretrained, "--output_dir", tmp_path / "run", "--shapes_val", 21)
    accuracy = [float(x) for x in re.findall(r"acc1 ([\d.]+)", log)]
    assert accuracy == pytest.approx([record["test_acc1 lr 0.03125"], record["test_acc1 lr 0.003125"]], abs=0.006)


def test_ways_to_probe(tmp_path, pretrained):
    """Another optimizer, the mean of the patch tokens, the EMA teacher, an absolute learning rate."""
    states = {}
    for name, more in {
        "plain": [],
        "lars": ["--optimizer", "lars"],
        "mean": ["--global_pool"],
        "ema": ["--which", "ema"],
        "rate": ["--lr", 0.3],
    }.items():
        given = ["--finetune", pretrained, "--output_dir", tmp_path / name, "--epochs", 1]
        assert "acc1" in run("main_linprobe", *FINETUNE, *given, *more)
        states[name] = checkpoint(tmp_path / name)
    assert "mu" in states["lars"]["optimizer"]["state"][0]
    assert "mu" not in states["plain"]["optimizer"]["state"][0]
    means = {name: state["state_dict"]["norm.running_mean"] for name, state in states.items()}
    assert torch.equal(means["lars"], means["plain"])
    assert not torch.allclose(means["mean"], means["plain"])
    assert not torch.equal(means["ema"], means["plain"])
    assert states["rate"]["options"]["lr"] == [0.3]


def test_what_fine_tuning_does_to_a_batch():
    """Flips half of the images, erases a part of each, smooths the labels, and drops paths of the last block."""
    words = "--model vit_micro_patch16 --input_size 32 --patch_size 8 --reprob 1 --smoothing 0.2 --drop_path 0.3"
    args = main_finetune.resolve_options(main_finetune.get_args_parser().parse_args(words.split()), World(0, 1, 0, 1))
    args.nb_classes, cpu = 4, torch.device("cpu")
    augment, loss = main_finetune.build_augmentation(args, cpu)
    images = torch.arange(32, dtype=torch.uint8).expand(64, 3, 32, 32)
    out, labels = augment(images, torch.zeros(64, dtype=torch.long))
    plain = ToModelInput(args.mean, args.std, cpu, flip=False)(images)
    kept = [(out == same).float().mean((1, 2, 3)) for same in (plain, plain.flip(-1))]
    assert (torch.maximum(*kept) < 1).all()
    assert 10 < (kept[0] > kept[1]).sum() < 54
    certain = torch.tensor([[100.0, 0, 0, 0]]).expand(64, -1)
    assert loss(certain, labels).item() == pytest.approx(0.2 * 100 * 3 / 4)
    assert main_finetune.build_model(args, 4).blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)


def test_a_head_alone_is_the_head_among_others(tmp_path, pretrained):
    """Heads trained side by side are independent; their number does not change their initial values."""
    for name, rates in (("one", ["1"]), ("two", ["1", "0.1"])):
        run("main_linprobe", *FINETUNE, "--blr", *rates, "--finetune", pretrained, "--output_dir", tmp_path / name)
    one, two = checkpoint(tmp_path / "one")["state_dict"], checkpoint(tmp_path / "two")["state_dict"]
    torch.testing.assert_close(one["heads.0.weight"], two["heads.0.weight"], rtol=1e-4, atol=1e-6)
    for named, evaluated in ((["--resume", tmp_path / "one/checkpoint-last.pth"], "one"), ([], "two")):
        given = ["--finetune", pretrained, "--output_dir", tmp_path / "two", "--eval", *named]
        assert f"probe     {tmp_path}/{evaluated}/checkpoint-last.pth" in run("main_linprobe", *FINETUNE, *given)


@pytest.mark.parametrize(
    ("script", "given", "option", "trained"),
    [
        ("main_linprobe", [], ["--input_size", 32], 16),
        ("main_linprobe", ["--global_pool"], ["--cls_token"], True),
        ("main_finetune", [], ["--cls_token"], True),
        ("main_finetune", ["--cls_token"], ["--global_pool"], False),
    ],
)
def test_an_evaluation_changes_no_setting_of_the_training(tmp_path, pretrained, capsys, script, given, option, trained):
    """Not even to the default of training."""
    start(script, tmp_path, pretrained, "--max_steps", 1, *given)
    given = ["--resume", tmp_path / "checkpoint-last.pth", "--finetune", pretrained, "--output_dir", tmp_path, *option]
    with pytest.raises(SystemExit):
        run(script, "--eval", "--shapes_val", 21, *given)
    assert f"the checkpoint was trained with {trained}: omit the option" in capsys.readouterr().err


def test_a_probe_keeps_its_pixels(tmp_path, pretrained):
    """Mean, std and value range given in its training, not those of the encoder, for --eval and on resume."""
    given = [*FINETUNE, "--finetune", pretrained, "--output_dir", tmp_path]
    run("main_linprobe", *given, "--mean", 0.1, 0.2, 0.3, "--value_range", 0, 4095, "--max_steps", 3)
    for more in (["--max_steps", 4], ["--eval"]):
        log = run("main_linprobe", *given, *more)
        assert "pixels    mean 0.1 0.2 0.3 (checkpoint), " in log
        assert "value_range 0 4095 (checkpoint)" in log


def test_statistics_of_bytes_in_a_checkpoint_are_an_error(tmp_path, pretrained, capsys):
    """Unless options give others."""
    start("main_linprobe", tmp_path / "probe", pretrained, "--max_steps", 1)
    path, probe = tmp_path / "bytes.pth", tmp_path / "probe/checkpoint-last.pth"
    for file, broken in ((pretrained, path), (probe, probe)):
        state = torch.load(file, weights_only=True)
        torch.save(state | {"image": {"mean": [102.0, 127.5, 153.0], "std": [0.2] * 3, "value_range": None}}, broken)
    scripts = {**SCRIPTS, "main_pretrain": PRETRAIN}
    commands = [(script, *words, "--finetune", path) for script, words in scripts.items()]
    commands += [("main_linprobe", "--finetune", pretrained, "--resume", probe, *more) for more in ([], ["--eval"])]
    for command in commands:
        with pytest.raises(SystemExit):
            run(*command)
        assert "mean 102 127.5 153 lies outside 0..1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="mean 102 127.5 153 lies outside 0..1"):
        load_encoder(path)
    assert accuracies(run("main_knn", *KNN, "--finetune", path, "--mean", 0.4, 0.5, 0.6))


def test_heads_go_on_with_their_own_encoder_alone(tmp_path, pretrained, capsys):
    start("main_linprobe", tmp_path / "run", pretrained, "--max_steps", 3)
    with pytest.raises(SystemExit):
        start("main_linprobe", tmp_path / "run", pretrained, "--which", "ema")
    assert "was trained on another encoder: give --finetune and --which of its training" in capsys.readouterr().err


def test_a_run_resumed_elsewhere_has_a_best_checkpoint_of_its_own(tmp_path, pretrained):
    """That of the other folder stays there."""
    start("main_finetune", tmp_path / "a", pretrained, "--epochs", 3, "--max_steps", 4)
    path = tmp_path / "a/checkpoint-last.pth"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"extra": state["extra"] | {"best": 101.0}}, path)
    log = start("main_finetune", tmp_path / "b", pretrained, "--epochs", 3, "--resume", path, "--start_epoch", 2)
    assert (tmp_path / "b/checkpoint-best.pth").exists()
    assert f"--start_epoch 2 is ignored: the checkpoint says epoch {state['epoch']}" in log


def test_killed_while_the_end_of_an_epoch_is_saved(tmp_path, pretrained, monkeypatch):
    """The epoch is evaluated again; the log has it once, and the best checkpoint is that of the log."""
    save_run, epochs = loop.save_run, []

    def killed(folder, state, also):
        epochs.append(state["epoch"])
        if epochs.count(2) == 1 and state["epoch"] == 2:
            raise OSError("killed")
        save_run(folder, state, also)

    monkeypatch.setattr(loop, "save_run", killed)
    with pytest.raises(OSError, match="killed"):
        start("main_finetune", tmp_path, pretrained, "--epochs", 3)
    start("main_finetune", tmp_path, pretrained, "--epochs", 3)
    lines = log_lines(tmp_path)
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert [("epoch_seconds" in line) for line in lines] == [True, False, True]
    accuracy = [line["test_acc1"] for line in lines]
    best = checkpoint(tmp_path, "checkpoint-best.pth")
    assert best["epoch"] - 1 == accuracy.index(max(accuracy))
    assert lines[-1]["best_acc1"] == best["extra"]["best"] == max(accuracy)


@pytest.mark.parametrize("script", TRAINING)
@pytest.mark.parametrize("stop_at", [3, 9])
def test_stopped_anywhere_they_go_on_as_if_never_stopped(tmp_path, pretrained, script, stop_at):
    """Mixup, erasing, drop path, order and batch statistics included."""
    start(script, tmp_path / "whole", pretrained)
    start(script, tmp_path / "parts", pretrained, "--max_steps", stop_at)
    log = start(script, tmp_path / "parts", pretrained)
    assert "Resuming from" in log
    assert_same_training(tmp_path / "whole", tmp_path / "parts")
    accuracy = [[line["best_acc1"] for line in log_lines(tmp_path / name)] for name in ("whole", "parts")]
    assert accuracy[0] == accuracy[1]
    assert "Run already complete" in start(script, tmp_path / "whole", pretrained)


def test_killed_on_two_ranks_it_ends_with_the_same_weights(tmp_path, pretrained):
    options = [*TRAINING["main_finetune"], "--finetune", pretrained, "--epochs", 3]
    ranks("main_finetune", *options, "--output_dir", tmp_path / "whole")
    killed = tmp_path / "killed"
    when = (killed / "checkpoint-last.pth").exists
    start_and_kill("main_finetune", *options, "--output_dir", killed, when=when)
    assert checkpoint(killed)["epoch"] < 3
    ranks("main_finetune", *options, "--output_dir", killed)
    assert_same_training(tmp_path / "whole", killed)


@pytest.mark.parametrize("script", ["main_finetune", "main_linprobe", "main_knn"])
def test_unfinished_pretraining_is_reported(tmp_path, pretrained, script):
    state = checkpoint(pretrained.parent)
    state["epoch"] -= 1
    torch.save(state, tmp_path / "early.pth")
    options = KNN if script == "main_knn" else [*TRAINING[script], "--max_steps", 1, "--output_dir"]
    logs = []
    for path in (tmp_path / "early.pth", pretrained):
        folder = [] if script == "main_knn" else [tmp_path / path.stem]
        logs.append(run(script, *options, *folder, "--finetune", path))
    shown = f"early.pth: pre-training is not complete, {state['epoch']} of {state['options']['epochs']} epochs are done"
    assert [shown in log for log in logs] == [True, False]
    assert "not complete" not in logs[1]


def test_accuracy_from_two_processes_is_that_from_one(tmp_path, pretrained):
    """Of 21 images, which neither the batch nor the ranks divide."""
    start("main_finetune", tmp_path / "run", pretrained, "--epochs", 1)
    options = ["--eval", "--output_dir", tmp_path / "run", "--shapes_val", 21, "--num_workers", 0, "--batch_size", 4]
    one = run("main_finetune", *options)
    two = ranks("main_finetune", *options)
    metrics = [re.search(r"acc1 ([\d.]+) acc5 ([\d.]+) loss ([\d.]+)", text).groups() for text in (one, two)]
    assert metrics[0][:2] == metrics[1][:2]
    assert float(metrics[0][2]) == pytest.approx(float(metrics[1][2]), abs=1e-4)


# --------------------------------------------------------------------------------------------------------------- k-NN


def accuracies(log):
    return re.findall(r"(\d+)-NN  top-1 ([\d.]+)  top-5 ([\d.]+)", log)


def test_knn(tmp_path, pretrained):
    log = run("main_knn", *KNN, "--finetune", pretrained, "--dump_features", tmp_path / "f")
    assert [k for k, _, _ in accuracies(log)] == ["5", "20"]
    assert {p.name for p in (tmp_path / "f").iterdir()} == {
        *{"trainfeat.pth", "trainlabels.pth", "testfeat.pth", "testlabels.pth"}
    }
    again = run("main_knn", "--load_features", tmp_path / "f", "--nb_knn", 5, 20)
    assert accuracies(again) == accuracies(log)
    features = torch.load(tmp_path / "f/trainfeat.pth")["tensor"]
    torch.testing.assert_close(features.norm(dim=1), torch.ones(48))


def test_knn_from_two_processes_is_that_from_one(pretrained):
    for more in (["--logreg"], ["--global_pool", "--which", "ema", "--batch_size", 5]):
        options = [*KNN, "--finetune", pretrained, *more]
        one, two = run("main_knn", *options), ranks("main_knn", *options)
        assert accuracies(one) == accuracies(two)
        assert len(accuracies(one)) == 2
        results = [re.findall(r"logistic regression  top-1 [\d.]+  top-5 [\d.]+", log) for log in (one, two)]
        assert results[0] == results[1]
        assert len(results[0]) == ("--logreg" in more)


# ------------------------------------------------------------------------------------------------------------ formats

SCRIPTS = {
    "main_finetune": [*FINETUNE, "--max_steps", "1"],
    "main_linprobe": [*FINETUNE, "--max_steps", "1"],
    "main_knn": KNN,
}
SIZES = ["--model", "vit_micro_patch16", "--input_size", "16", "--patch_size", "4"]


def formats(tmp_path, pretrained):
    """The same encoder in every format people have."""
    student = checkpoint(pretrained.parent)["state_dict"]
    encoder = {k: v for k, v in student.items() if not k.startswith(("decoder", "mask_token"))}
    files = {
        "HPM": {
            "model": "mae_vit_micro_patch16",
            "epoch": 2,
            "state_dict": {f"module.{k}": v for k, v in student.items()},
        },
        "MAE": {"model": student, "args": argparse.Namespace(lr=1), "optimizer": {"state": {}}},
        "MAE encoder": {"model": encoder},
        "timm": encoder,
        "compiled": {"model": {f"_orig_mod.{k}": v for k, v in encoder.items()}},
    }
    paths = {}
    for name, content in files.items():
        paths[name] = tmp_path / f"{name}.pth"
        torch.save(content, paths[name])
    paths["safetensors"] = tmp_path / "a.safetensors"
    save_file(encoder, str(paths["safetensors"]))
    paths["Hugging Face"] = tmp_path / "hf"
    paths["Hugging Face"].mkdir()
    save_file(to_hugging_face(encoder), str(paths["Hugging Face"] / "model.safetensors"))
    return paths


def to_hugging_face(encoder):
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
    names |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    out = {"vit.embeddings.cls_token": encoder["cls_token"], "vit.embeddings.position_embeddings": encoder["pos_embed"]}
    for name, value in encoder.items():
        stem, kind = name.rsplit(".", 1) if "." in name else (name, "")
        if stem == "patch_embed.proj":
            out[f"vit.embeddings.patch_embeddings.projection.{kind}"] = value
        elif stem == "norm":
            out[f"vit.layernorm.{kind}"] = value
        elif stem.startswith("blocks."):
            _, number, part = stem.split(".", 2)
            block = f"vit.encoder.layer.{number}"
            if part == "attn.qkv":
                for which, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    out[f"{block}.attention.attention.{which}.{kind}"] = third.clone()
            else:
                out[f"{block}.{names[part]}.{kind}"] = value
    return out


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_format_loads_into_every_script(tmp_path, pretrained, script):
    for name, path in formats(tmp_path, pretrained).items():
        more = [] if script == "main_knn" else ["--output_dir", tmp_path / f"out-{name}"]
        log = run(script, *SCRIPTS[script], *SIZES, "--finetune", path, *more)
        loaded = int(re.search(r"loaded +(\d+) tensors", log)[1])
        assert loaded == (76 if script == "main_finetune" else 78), name


def wrong_files(tmp_path):
    def vit(**kwargs):
        sizes = {"img_size": 16, "patch_size": 4, **kwargs}
        return {"model": models_vit.vit_micro_patch16(**sizes, num_classes=0).state_dict()}

    class Code:
        def __reduce__(self):
            return print, ("code ran",)

    good = vit()
    contents = {
        r"shape mismatch: cls_token is \(1, 1, 192\) in the file, \(1, 1, 128\) in the model": vit(embed_dim=192),
        "missing: blocks.5.norm1.weight": vit(depth=5),
        "unexpected: blocks.6.norm1.weight": vit(depth=7),
        "contains pickled objects other than tensors.*print": {**good, "x": Code()},
        "truncated or damaged": good,
        "is not a checkpoint": "text",
        "checkpoint .* does not exist": None,
        "contains no weights; its keys are epoch": {"epoch": 3},
        "has no EMA teacher": good,
    }
    for number, (message, content) in enumerate(contents.items()):
        path = tmp_path / f"{number}.pth"
        if content == "text":
            path.write_text("hello")
        elif content is not None:
            torch.save(content, path)
        if message.startswith("truncated"):
            path.write_bytes(path.read_bytes()[:-2000])
        yield message, path, ["--teacher"] if "EMA" in message else []


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_wrong_file_is_rejected_by_every_script(tmp_path, script, capsys):
    for message, path, more in wrong_files(tmp_path):
        folder = [] if script == "main_knn" else ["--output_dir", tmp_path / "out"]
        with pytest.raises(SystemExit) as stop:
            run(script, *SCRIPTS[script], *SIZES, *folder, "--finetune", path, *more)
        written = capsys.readouterr()
        assert stop.value.code == 2
        assert re.search(message, written.err), (message, written.err)
        assert "Traceback" not in written.err
        assert "code ran" not in written.out


def test_another_size_interpolates_the_positions(tmp_path, pretrained):
    log = run("main_knn", *KNN, "--finetune", pretrained, "--input_size", 24)
    assert "24 pixels in patches of 4" in log


def test_maes_fine_tuned_weights_evaluate(tmp_path, pretrained, capsys):
    """`model` with a head and fc_norm, as MAE releases them."""
    start("main_finetune", tmp_path / "run", pretrained, "--epochs", 1)
    state = checkpoint(tmp_path / "run")["state_dict"]
    torch.save({"model": state}, tmp_path / "mae_finetuned.pth")
    log = run("main_finetune", "--eval", "--resume", tmp_path / "mae_finetuned.pth", *SIZES, "--shapes_val", 21)
    assert "unused             none\nnewly initialised  none" in log
    for other, message in [
        (["--cls_token"], "missing: norm.weight"),
        (["--nb_classes", "12"], "--nb_classes 12, but"),
    ]:
        with pytest.raises(SystemExit):
            run("main_finetune", "--eval", "--resume", tmp_path / "mae_finetuned.pth", *SIZES, *other)
        assert message in capsys.readouterr().err


def test_labels_are_matched_by_name(tmp_path, capsys):
    """A subset of the classes, without training images: each class keeps its accuracy. An unknown class is an error."""
    tree = write_tree(tmp_path / "all", members())
    options = [*SIZES, "--batch_size", 4, "--num_workers", 0]
    trained = [*options, "--warmup_epochs", 0, "--epochs", 1, "--data_path", tree]
    run("main_finetune", *trained, "--output_dir", tmp_path / "tune")
    assert checkpoint(tmp_path / "tune")["options"]["classes"] == {"names": ["cat", "cat-2", "dog"], "numbered": False}
    dogs = {name: data for name, data in members().items() if name.startswith("val/dog")}
    subset = write_tree(tmp_path / "dogs", dogs)
    weights = checkpoint(tmp_path / "tune")
    for name in ("weight", "bias"):
        weights["state_dict"][f"head.{name}"].zero_()
    weights["state_dict"]["head.bias"][2] = 9.0  # always "dog"
    torch.save(weights, tmp_path / "dog.pth")
    log = run("main_finetune", *options, "--eval", "--resume", tmp_path / "dog.pth", "--data_path", subset)
    assert "acc1 100.0000" in log
    assert "no training images" in log
    foxes = write_tree(tmp_path / "foxes", {name.replace("dog", "fox"): data for name, data in dogs.items()})
    with pytest.raises(SystemExit):
        run("main_finetune", *options, "--eval", "--resume", tmp_path / "dog.pth", "--data_path", foxes)
    assert "'fox'" in capsys.readouterr().err


def test_the_head_of_other_classes_is_not_taken_over(tmp_path):
    """Even if their number is the same."""
    options = [*SIZES, "--batch_size", 4, "--num_workers", 0, "--max_steps", 1]
    for name, classes in (("a", ("cat", "dog")), ("b", ("cat", "dog")), ("c", ("ant", "zebra"))):
        data = write_tree(tmp_path / f"data {name}", members(classes=classes))
        given = ["--data_path", data, "--output_dir", tmp_path / name]
        first = [] if name == "a" else ["--finetune", tmp_path / "a/checkpoint-last.pth"]
        log = run("main_finetune", *options, *given, *first)
        if first:
            assert ("newly initialised  none" in log) == (name == "b")
    assert "has a head of other classes (cat, dog), which is not used" in log
    assert "newly initialised  head (2)" in log


def test_a_probe_is_evaluated_while_it_trains(tmp_path, pretrained):
    """--eval takes no lock, and evaluates an unfinished run."""
    start("main_linprobe", tmp_path, pretrained, "--max_steps", 3)
    # Another process holds the lock: those of one process never conflict.
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); input()"
    )
    program = [sys.executable, "-c", hold, str(tmp_path / ".lock")]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(SystemExit):
            start("main_linprobe", tmp_path, pretrained)
        log = start("main_linprobe", tmp_path, pretrained, "--eval")
        holder.stdin.close()
    assert log.count("acc1") == 2
    assert "already complete" not in log


def test_pixels_as_a_baseline_and_fine_tuned_encoders(tmp_path, pretrained, capsys):
    """--features pixels needs no model; an encoder that was fine-tuned with global pooling needs --global_pool."""
    log = run("main_knn", *KNN, "--features", "pixels", "--input_size", 48)
    assert "features  pixels of the 48-pixel crop, averaged to at most 16 x 16" in log
    assert len(accuracies(log)) == 2
    start("main_finetune", tmp_path, pretrained, "--max_steps", 1)
    tuned = tmp_path / "checkpoint-last.pth"
    assert len(accuracies(run("main_knn", *KNN, "--finetune", tuned, "--global_pool"))) == 2
    for script in ("main_knn", "main_linprobe"):
        with pytest.raises(SystemExit):
            run(script, *SCRIPTS[script], "--finetune", tuned)
        assert "was fine-tuned with global pooling" in capsys.readouterr().err


def test_stored_features_have_their_number_of_classes(tmp_path, pretrained, capsys):
    run("main_knn", *KNN, "--finetune", pretrained, "--dump_features", tmp_path / "f")
    with pytest.raises(SystemExit):
        run("main_knn", "--load_features", tmp_path / "f", "--nb_knn", 5, "--nb_classes", 5)
    assert "--nb_classes 5, but the stored labels have 10" in capsys.readouterr().err
    torch.save({"tensor": torch.zeros(48, dtype=torch.long)}, tmp_path / "f/trainlabels.pth")
    with pytest.raises(SystemExit):
        run("main_knn", "--load_features", tmp_path / "f", "--nb_knn", 5)
    assert "f: all training labels are equal, so any prediction would be right" in capsys.readouterr().err


def test_evaluation_crop(tmp_path, pretrained):
    """0.875 up to 224 pixels and 1.0 above, kept by the checkpoints of a classifier."""
    start("main_finetune", tmp_path, pretrained, "--max_steps", 1, "--crop_pct", 0.6)
    path = tmp_path / "checkpoint-last.pth"
    crops = {}
    for name, more in {"same": [], "other size": ["--input_size", 240], "given": ["--crop_pct", 1]}.items():
        words = ["--eval", "--resume", str(path), *map(str, more)]
        args = main_finetune.get_args_parser().parse_args(words)
        crops[name] = main_finetune.resolve_options(args, World(0, 1, 0, 1)).crop_pct
    assert crops == {"same": 0.6, "other size": 1.0, "given": 1.0}


def test_a_new_classifier_does_not_inherit_the_crop_of_its_encoder(tmp_path):
    """It is evaluated as in MAE and HPM; k-NN evaluates the encoder as its file says."""
    config = {"model_type": "vit", "hidden_size": 128, "image_size": 32, "patch_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    processor = {"do_center_crop": True, "size": {"shortest_edge": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    for script, crop in ((main_knn, 1.0), (main_finetune, 0.875)):
        args = script.get_args_parser().parse_args(["--finetune", str(tmp_path)])
        assert script.resolve_options(args, World(0, 1, 0, 1)).crop_pct == crop


def test_colour_jitter_that_is_ignored_is_reported(tmp_path, pretrained):
    said = "ignored: --color_jitter 0.4, in favour of --aa rand-m9-mstd0.5-inc1"
    for name, more, ignored in (("a", [], True), ("b", ["--aa", ""], False)):
        given = ["--finetune", pretrained, "--output_dir", tmp_path / name, "--max_steps", 1, "--color_jitter", 0.4]
        assert (said in run("main_finetune", *FINETUNE, *given, *more)) == ignored


# ---------------------------------------------------------------------------------------------------------- bad input


def test_classes(tmp_path, pretrained, capsys):
    more = ["--finetune", pretrained, "--output_dir", tmp_path / "out", "--batch_size", 4]
    options = [*FINETUNE, "--max_steps", 1]
    with pytest.raises(SystemExit):
        run("main_finetune", *options, *more, "--nb_classes", 9)
    assert "--nb_classes 9, but the data have 10 classes" in capsys.readouterr().err
    log = run("main_finetune", *options, *more, "--nb_classes", 12)
    assert "--nb_classes 12: 2 outputs have no images in the data" in log
    uneven = write_tree(tmp_path / "d", {**members(), "val/fox/1.jpg": members()["val/cat/0.jpg"]})
    for script in SCRIPTS:
        folder = [] if script == "main_knn" else ["--output_dir", tmp_path / "out2"]
        with pytest.raises(SystemExit):
            run(script, "--data_path", uneven, "--finetune", pretrained, *folder, "--batch_size", 4)
        assert "1 of 4 classes are unknown to the train split: 'fox'" in capsys.readouterr().err


MISTAKES = [
    ("main_finetune", "--aa nonsense", "--aa 'nonsense' is not a policy that timm knows"),
    ("main_finetune", "--mixup 0.8 --batch_size 7", "--batch_size 7 is odd"),
    ("main_finetune", "--teacher --which student", "contradicts --which student"),
    ("main_finetune", "--eval", "name a checkpoint with --resume or --finetune"),
    ("main_finetune", "--layer_decay 0", "expected a number > 0 and <= 1, got '0'"),
    ("main_linprobe", "--lr 1 --blr 1", "both set the learning rate"),
    ("main_linprobe", "--eval", "name the probe's checkpoint with --resume"),
    ("main_linprobe", "--lr 1 0.1 --min_lr 0.01", "--min_lr 0.01 is for one learning rate, 2 were given: omit it"),
    ("main_linprobe", "--blr 0", "expected a number > 0, got '0'"),
    ("main_knn", "--nb_knn 3000", "--nb_knn 3000 of 2,000 training images"),
    ("main_knn", "--logreg --nb_knn 2 --shapes_train 9", "holds out a tenth of the training images, and there are 9"),
    ("main_knn", "--load_features x --finetune y", "omit --dump_features and --finetune"),
    ("main_knn", "--load_features x --global_pool", "--global_pool has no effect on the stored features"),
    ("main_knn", "--load_features x --data_path y", "--data_path has no effect on the stored features"),
    ("main_knn", "--load_features /nowhere", "checkpoint /nowhere/trainfeat.pth does not exist"),
    ("main_knn", "--input_size 100", "patch size 16 does not divide an image of 100 x 100"),
]


@pytest.mark.parametrize(("script", "text", "message"), MISTAKES, ids=[f"{s} {t}" for s, t, _ in MISTAKES])
def test_mistakes_end_in_a_line(script, text, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(script, *text.split())
    assert stop.value.code == 2
    written = capsys.readouterr().err
    assert message in written
    assert written.count("\n") == 1


OFFICIAL = {
    "main_finetune": """--batch_size 48 --accum_iter 1 --model vit_base_patch16 --finetune CKPT --epochs 100
        --warmup_epochs 5 --blr 5e-4 --layer_decay 0.8 --weight_decay 0.05 --drop_path 0.1 --reprob 0.25 --mixup 0.8
        --cutmix 1.0 --dist_eval --data_path DATA --nb_classes 1000 --output_dir OUT --log_dir LOG
        --experiment hpm_in1k_ep100 --dataloader_type nori""",
    "main_linprobe": """--batch_size 512 --model vit_base_patch16 --finetune CKPT --epochs 100 --blr 1e-3
        --weight_decay 0.0 --dist_eval --data_path DATA --nb_classes 1000 --log_dir LOG""",
    "main_knn": "--batch_size 128 --model vit_base_patch16 --finetune CKPT --data_path DATA --nb_classes 1000",
}
RATES = {"main_finetune": (8, 7.5e-4), "main_linprobe": (4, [8e-3]), "main_knn": (1, None)}


@pytest.mark.parametrize("script", OFFICIAL)
def test_the_official_commands_resolve(script, tmp_path):
    import importlib

    from util.run.distributed import World

    torch.save({"model": {"cls_token": torch.zeros(1, 1, 768)}}, tmp_path / "CKPT")
    module = importlib.import_module(script)
    text = OFFICIAL[script].replace("CKPT", str(tmp_path / "CKPT"))
    size, rate = RATES[script]
    args = module.resolve_options(module.get_args_parser().parse_args(text.split()), World(0, size, 0, size))
    assert (args.model, args.input_size, args.patch_size, args.which) == ("vit_base_patch16", 224, 16, "student")
    if rate is not None:
        assert args.lr == pytest.approx(rate)
