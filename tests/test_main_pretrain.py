"""The pre-training script as a whole."""

import json
import re

import pytest
import torch
from images import members, write_tar, write_tree
from programs import (
    PRETRAIN,
    assert_same_training,
    checkpoint,
    launch,
    log_lines,
    on_ranks,
    ranks,
    run,
    start_and_kill,
)

import models_hpm
from util.data.datasets import ImageDataset
from util.data.loader import EpochSampler
from util.data.sources import ShapesSource
from util.data.transforms import RandomCrop, ToModelInput
from util.rng import seed_all
from util.schedules import adjust_learning_rate
from util.weights.load import load_into, load_pretrained, read_meta


def pretrain(folder, *more):
    return run("main_pretrain", *PRETRAIN, "--output_dir", folder, *more)


def test_a_plain_run_leaves_what_it_should(tmp_path):
    log = pretrain(tmp_path / "run", "--save_interval", 1)
    names = {path.name for path in (tmp_path / "run").iterdir() if "tfevents" not in path.name}
    assert names == {
        *{"config.json", "log.jsonl", ".lock", "checkpoint-last.pth", "checkpoint-prev.pth"},
        *{"checkpoint-1.pth", "checkpoint-2.pth"},
    }
    assert list((tmp_path / "run").glob("*tfevents*"))
    first, second = log_lines(tmp_path / "run")
    assert (first["epoch"], second["epoch"]) == (0, 1)
    assert {
        *{"train_loss", "train_loss_rec", "train_loss_learn", "train_rank_acc", "train_grad_norm", "train_lr"},
        *{"ema_decay", "num_hardest", "epoch_seconds", "images_per_s", "data_wait"},
    } <= set(first)
    assert (first["num_hardest"], second["num_hardest"]) == (3, 6)  # of 12 masked patches
    assert (first["hard_ratio"], second["hard_ratio"]) == (0.25, 0.5)
    assert first["train_loss"] == pytest.approx(first["train_loss_rec"] + first["train_loss_learn"])

    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["script"] == "main_pretrain"
    assert config["options"]["lr"] == pytest.approx(1.5e-4 * 8 / 256)
    assert config["environment"]["torch"] == torch.__version__

    assert "Shapes, images drawn by the program (no --data_path was given): 48 images, 6 steps per epoch" in log
    assert "4 x 4 of 4 pixels, 12 masked" in log
    assert "batch     8 = --batch_size 8 x --accum_iter 1 x 1 process" in log
    assert "epoch 1/2  step 4/6  loss" in log
    assert "rank_acc" in log

    state = checkpoint(tmp_path / "run")
    assert (state["epoch"], state["step"], state["model"], state["script"]) == (2, 0, PRETRAIN[1], "main_pretrain")
    assert read_meta(tmp_path / "run/checkpoint-last.pth")["image"]["mean"] == [0.485, 0.456, 0.406]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pixels_masks_precision_and_learning_rate_of_every_step(tmp_path, monkeypatch, precision):
    """What the student gets, computed from the parts; each step has random numbers of its own."""
    seen, forward = [], models_hpm.MaskedAutoencoderViT.forward

    def recorded(self, imgs, mask, *more):
        out = forward(self, imgs, mask, *more)
        seen.append((imgs, mask, out["pred"].dtype))
        return out

    monkeypatch.setattr(models_hpm.MaskedAutoencoderViT, "forward", recorded)
    mean, std = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)
    more = ["--mean", *mean, "--std", *std, "--lr", 1e-3, "--warmup_epochs", 1, "--log_interval", 1]
    log = pretrain(tmp_path, *more, "--precision", precision)
    dataset, sampler = ImageDataset(ShapesSource("train", 48), RandomCrop(16)), EpochSampler(48, 8)
    to_model_input = ToModelInput(mean, std, torch.device("cpu"), flip=True)
    optimizer, rates = torch.optim.SGD([torch.zeros(1)], lr=0.0), []
    for number, (imgs, _, dtype) in enumerate(seen):
        sampler.position = divmod(number, 6)
        images = torch.stack([dataset[key].image for key in next(iter(sampler))])
        seed_all("micro-batch", 0, 0, number)
        assert torch.equal(imgs, to_model_input(images)), number
        assert dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        rate = adjust_learning_rate(optimizer, number / 6, lr=1e-3, min_lr=0.0, warmup_epochs=1, epochs=2)
        rates.append(f"{rate:.2e}")
    assert len({mask.numpy().tobytes() for _, mask, _ in seen}) == len(seen) == 12
    assert re.findall(r"  lr (\S+)", log)[-12:] == rates
    assert checkpoint(tmp_path)["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.95)


def test_it_learns(tmp_path):
    """At an lr at which 36 steps suffice: the error falls by far more than it varies from epoch to epoch."""
    pretrain(tmp_path / "run", "--lr", 3e-3, "--epochs", 6)
    losses = [record["train_loss_rec"] for record in log_lines(tmp_path / "run")]
    assert losses[-1] < 0.75 * losses[0], losses


def test_the_same_options_give_the_same_weights_and_another_seed_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pretrain(tmp_path / name, "--seed", seed, "--epochs", 1)
    assert_same_training(tmp_path / "a", tmp_path / "b")
    a, c = checkpoint(tmp_path / "a")["state_dict"], checkpoint(tmp_path / "c")["state_dict"]
    assert not torch.equal(a["mask_token"], c["mask_token"])


def test_workers_change_nothing(tmp_path):
    for workers in (0, 2):
        pretrain(tmp_path / str(workers), "--num_workers", workers)
    assert_same_training(tmp_path / "0", tmp_path / "2")


def test_a_complete_run_started_again_says_so_and_changes_nothing(tmp_path):
    pretrain(tmp_path / "run")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("[!.]*")}
    log = pretrain(tmp_path / "run")
    assert "Run already complete (epoch 2/2" in log
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("[!.]*")} == before


@pytest.mark.parametrize("stop_at", [3, 6, 9])
def test_stopped_anywhere_it_resumes_as_if_never_stopped(tmp_path, stop_at):
    """Mid-epoch in the first, at its end, mid-epoch in the second; the log is that of one run too."""
    pretrain(tmp_path / "whole")
    assert "saved in" in pretrain(tmp_path / "parts", "--max_steps", stop_at)
    log = pretrain(tmp_path / "parts")
    assert "Resuming from" in log
    assert "Changed since the checkpoint: --max_steps" in log
    assert_same_training(tmp_path / "whole", tmp_path / "parts")
    for a, b in zip(log_lines(tmp_path / "whole"), log_lines(tmp_path / "parts"), strict=True):
        timed = {"epoch_seconds", "images_per_s", "data_wait"}
        assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}


def test_max_steps_at_the_end_of_an_epoch_has_nothing_left(tmp_path):
    pretrain(tmp_path / "run", "--max_steps", 6)
    assert "Run already complete (epoch 1/2, step 0)" in pretrain(tmp_path / "run", "--max_steps", 6)


def test_killed_and_started_again_it_ends_with_the_same_weights(tmp_path):
    """Two ranks, killed with no warning once the first checkpoint is there; the second epoch is then repeated."""
    options = [*PRETRAIN, "--epochs", 3, "--shapes_train", 96]
    ranks("main_pretrain", *options, "--output_dir", tmp_path / "whole")
    killed = tmp_path / "killed"
    when = (killed / "checkpoint-last.pth").exists
    start_and_kill("main_pretrain", *options, "--output_dir", killed, when=when)
    assert checkpoint(killed)["epoch"] < 3
    ranks("main_pretrain", *options, "--output_dir", killed)
    assert_same_training(tmp_path / "whole", killed)


def test_two_processes_hold_equal_weights_and_one_log(tmp_path):
    """The checkpoint is rank 0's; the ranks compare student and teacher themselves as they end."""
    done = launch("tests/ranks_agree", *PRETRAIN, "--output_dir", tmp_path, processes=2)
    for rank in range(2):
        assert (tmp_path / f"rank-{rank}").read_text() == "equal to 2"
    assert len(log_lines(tmp_path)) == 2
    assert done.stdout.count("epoch 1/2  step 3/3") == 1
    assert "batch     16 = --batch_size 8 x --accum_iter 1 x 2 processes" in done.stdout


def test_the_mae_baseline(tmp_path):
    log = pretrain(tmp_path / "run", "--no-learning_loss", "--norm_pix_loss")
    assert "target    norm_pixel, loss predictor none, masks random" in log
    record = log_lines(tmp_path / "run")[-1]
    assert "train_rank_acc" not in record
    assert "train_loss_learn" not in record
    assert "ema_decay" not in record
    state = checkpoint(tmp_path / "run")
    assert "ema_state_dict" not in state
    assert not [name for name in state["state_dict"] if "losspred" in name]


def test_accumulation(tmp_path):
    """Four micro-batches of 2 and one of 8 see the same images in each step; only masks and flips differ."""
    pretrain(tmp_path / "run", "--batch_size", 2, "--global_batch", 8)
    config = json.loads((tmp_path / "run/config.json").read_text())["options"]
    assert (config["accum_iter"], config["steps_per_epoch"], config["lr"]) == (4, 6, pytest.approx(1.5e-4 * 8 / 256))
    assert len(log_lines(tmp_path / "run")) == 2


SMALL_DATA = ["--batch_size", 4]  # the sets of tests/images.py have 12 images


def test_each_source_of_images_trains_alike(tmp_path):
    data = {kind: write_tree(tmp_path / f"data {kind}") for kind in ("folder", "list files")}
    names = [name.removeprefix("train/") for name in members(("train",))]
    (data["list files"] / "train.txt").write_text("".join(f"{name} 0\n" for name in names))
    data |= {
        kind: write_tar(tmp_path / f"data.{kind}", mode=mode) for kind, mode in {"tar": "w", "tar.gz": "w:gz"}.items()
    }
    for kind, path in data.items():
        log = pretrain(tmp_path / kind, *SMALL_DATA, "--data_path", path)
        assert "12 images, 3 steps per epoch" in log
        assert_same_training(tmp_path / kind, tmp_path / "folder")


@pytest.mark.parametrize(
    "options",
    [
        ["--no-relative"],
        ["--vis_mask_ratio", "0.3"],
        ["--mask_block", "--input_size", "32"],
        ["--mask_regular"],
        ["--mask_strategy", "hardest"],
        ["--mask_strategy", "easiest", "--alpha_0", "0.2"],
        ["--mask_strategy", "random"],
        ["--mask_ratio", "0.5", "--grad_checkpointing", "--clip_grad", "0"],
        ["--precision", "bf16"],
    ],
    ids=lambda options: " ".join(options),
)
def test_variants_train(tmp_path, options):
    pretrain(tmp_path / "run", "--epochs", 1, *options)
    record = log_lines(tmp_path / "run")[0]
    assert 0 < record["train_loss"] < 10
    assert 0 <= record["train_rank_acc"] <= 1


def test_initial_weights(tmp_path):
    """From a whole checkpoint, and from MAE's encoder alone, whose decoders are newly initialised."""
    pretrain(tmp_path / "a", "--epochs", 1)
    log = pretrain(tmp_path / "b", "--load_from", tmp_path / "a/checkpoint-last.pth", "--epochs", 1, "--lr", 0)
    assert "newly initialised  none" in log
    a, b = (checkpoint(tmp_path / name)["state_dict"] for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    encoder = {name: value for name, value in a.items() if not name.startswith(("decoder", "mask_token"))}
    torch.save({"model": encoder}, tmp_path / "mae.pth")
    log = pretrain(tmp_path / "c", "--load_from", tmp_path / "mae.pth", "--epochs", 1, "--lr", 0)
    assert "newly initialised  mask_token (1), decoder_pos_embed (1)" in log
    c = checkpoint(tmp_path / "c")["state_dict"]
    assert torch.equal(a["blocks.5.mlp.fc2.weight"], c["blocks.5.mlp.fc2.weight"])


def test_pixels_are_normalised_as_for_the_initial_weights(tmp_path):
    """Unless an option says otherwise; a resumed run keeps what it had, without the options and without that file."""
    own = ["--mean", 0.3, 0.4, 0.5, "--value_range", 0, 4095]
    pretrain(tmp_path / "a", "--max_steps", 1, *own)
    first = tmp_path / "a/checkpoint-last.pth"
    log = pretrain(tmp_path / "b", "--max_steps", 3, "--load_from", first, "--std", 0.2, 0.2, 0.2)
    assert "mean 0.3 0.4 0.5 (checkpoint), std 0.2 0.2 0.2 (option), value_range 0 4095 (checkpoint)" in log
    first.unlink()
    log = pretrain(tmp_path / "b", "--load_from", first)
    assert "mean 0.3 0.4 0.5 (checkpoint), std 0.2 0.2 0.2 (checkpoint), value_range 0 4095 (checkpoint)" in log
    assert checkpoint(tmp_path / "b")["image"]["mean"] == [0.3, 0.4, 0.5]


def test_start_epoch(tmp_path):
    pretrain(tmp_path / "run", "--start_epoch", 1)
    assert [line["epoch"] for line in log_lines(tmp_path / "run")] == [1]


def test_resume_from_a_file_continues_in_a_new_folder(tmp_path):
    pretrain(tmp_path / "a", "--save_interval", 1)
    log = pretrain(tmp_path / "b", "--resume", tmp_path / "a/checkpoint-1.pth")
    assert "(epoch 1, step 0)" in log
    assert_same_training(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--epochs", "3"], "was trained with --epochs 2, now it is 3"),
        (["--batch_size", "4"], "was trained with --global_batch 8, now it is 4"),
        (["--norm_pix_loss"], "was trained with --target pixel, now it is norm_pixel"),
        (["--patch_size", "8"], "was trained with --patch_size 4, now it is 8"),
        (["--no-learning_loss"], "was trained with --learning_loss True, now it is False"),
        (["--no-auto_resume"], "holds a run: omit --no-auto_resume"),
        (["--shapes_train", "40"], "is at step 3 of an epoch of 6 steps, an epoch now has 5"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_changes_that_a_run_cannot_make(tmp_path, change, message, capsys):
    pretrain(tmp_path / "run", "--max_steps", 3)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(SystemExit) as stop:
        pretrain(tmp_path / "run", *change)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_scripts_can_share_a_folder(tmp_path):
    """As the official shell scripts do: the second script uses a subfolder, and finds it again."""
    pretrain(tmp_path / "run", "--max_steps", 3)
    tune = [
        "--model",
        "vit_micro_patch16",
        "--input_size",
        16,
        "--patch_size",
        4,
        "--batch_size",
        8,
        "--num_workers",
        0,
    ]
    tune += ["--shapes_train", 16, "--shapes_val", 8, "--epochs", 1, "--output_dir", tmp_path / "run"]
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("[!.]*")}
    log = run("main_finetune", *tune, "--finetune", tmp_path / "run/checkpoint-last.pth")
    assert f"run       {tmp_path / 'run/finetune'}" in log
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").glob("[!.]*") if p.is_file()} == before
    assert "Run already complete" in run("main_finetune", *tune)
    assert "Resuming from" in pretrain(tmp_path / "run")


def test_a_checkpoint_of_before_the_objectives_had_names_resumes(tmp_path):
    """Its options have `relative`, and neither `predictor_loss` nor those of k-NN."""
    pretrain(tmp_path / "whole", "--predictor_loss", "absolute")
    pretrain(tmp_path / "run", "--no-relative", "--max_steps", 3)
    path = tmp_path / "run/checkpoint-last.pth"
    state = torch.load(path, weights_only=True)
    for name in ("predictor_loss", "knn_interval", "knn_k", "knn_data_path", "knn_global_pool"):
        del state["options"][name]
    assert state["options"]["relative"] is False
    torch.save(state, path)
    log = pretrain(tmp_path / "run", "--no-relative")
    assert "Resuming from" in log
    assert [line for line in log.splitlines() if "Changed since" in line] == [
        "Changed since the checkpoint: --max_steps: 3 -> None"
    ]
    assert_same_training(tmp_path / "whole", tmp_path / "run")


def test_changed_hyperparameters_take_effect_on_resume(tmp_path):
    pretrain(tmp_path / "run", "--max_steps", 3)
    assert "Changed since the checkpoint: --weight_decay: 0.05 -> 0.3" in pretrain(
        tmp_path / "run", "--weight_decay", 0.3
    )
    groups = checkpoint(tmp_path / "run")["optimizer"]["param_groups"]
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.3]
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert [part["options"]["weight_decay"] for part in config["history"]] == [0.05]


def test_a_resumed_run_keeps_its_initial_weights(tmp_path, capsys):
    """Their file is needed by a new run only; other weights are an error."""
    for name in ("a", "b"):
        pretrain(tmp_path / name, "--epochs", 1, "--seed", len(name) + ord(name))
    first, other = (tmp_path / name / "checkpoint-last.pth" for name in ("a", "b"))
    pretrain(tmp_path / "run", "--load_from", first, "--max_steps", 3)
    with pytest.raises(SystemExit):
        pretrain(tmp_path / "run", "--load_from", other)
    assert f"started from other weights than {other}: omit --finetune or --load_from" in capsys.readouterr().err
    first.unlink()
    assert "Resuming from" in pretrain(tmp_path / "run", "--load_from", first)


def test_a_damaged_checkpoint_is_replaced_by_the_previous_one(tmp_path, monkeypatch):
    """Also if the next save fails, which must not put the damaged one in the place of the previous one."""
    pretrain(tmp_path / "whole")
    pretrain(tmp_path / "run")
    (tmp_path / "run/checkpoint-last.pth").write_bytes(b"half a file")

    def disk_full(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("util.run.checkpoint.write_file", disk_full)
        with pytest.raises(OSError, match="disk full"):
            pretrain(tmp_path / "run")
    assert checkpoint(tmp_path / "run")["epoch"] == 1
    (tmp_path / "run/checkpoint-last.pth").unlink()
    (tmp_path / "run/checkpoint-last.pth").write_bytes(b"half a file")
    log = pretrain(tmp_path / "run")
    assert "checkpoint-last.pth is not a checkpoint" in log
    assert "Resuming from" in log
    assert_same_training(tmp_path / "whole", tmp_path / "run")


def test_going_back_is_done_once(tmp_path):
    """The same command, started again, resumes from the newest checkpoint; a milestone is never changed."""
    run = tmp_path / "run"
    pretrain(run, "--epochs", 4, "--save_interval", 1)
    milestone = (run / "checkpoint-1.pth").read_bytes()
    back = ["--epochs", 4, "--no-auto_resume", "--resume", run / "checkpoint-1.pth", "--lr", 1e-3]
    assert "(epoch 1, step 0)" in pretrain(run, *back, "--max_steps", 14)
    assert (checkpoint(run)["epoch"], checkpoint(run)["step"]) == (2, 2)
    assert [line["epoch"] for line in log_lines(run)] == [0, 1]
    log = pretrain(run, *back, "--max_steps", 20)
    assert f"checkpoint-1.pth is not used again: delete {run}/checkpoint-last.pth to restart from it once more" in log
    assert "(epoch 2, step 2)" in log
    assert (run / "checkpoint-1.pth").read_bytes() == milestone
    (run / "checkpoint-last.pth").unlink()
    assert "(epoch 1, step 0)" in pretrain(run, *back, "--max_steps", 14)
    pretrain(run, "--epochs", 4, "--lr", 1e-3)
    assert "(epoch 1, step 0)" in pretrain(run, *back, "--max_steps", 14)  # after other runs, it is meant anew


def test_a_run_that_goes_back_and_ends_before_it_saves_is_there(tmp_path, monkeypatch):
    """The log has lost the later epochs, so the newest checkpoint must not have them."""
    run = tmp_path / "run"
    pretrain(run, "--save_interval", 1)

    def ends(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("util.run.watch.Watch.agree", ends)
        with pytest.raises(KeyboardInterrupt):
            pretrain(run, "--no-auto_resume", "--resume", run / "checkpoint-1.pth")
    assert [line["epoch"] for line in log_lines(run)] == [0]
    assert checkpoint(run)["epoch"] == 1
    assert checkpoint(run, "checkpoint-prev.pth")["epoch"] == 2


def test_changed_options_of_a_complete_run_have_no_effect(tmp_path):
    pretrain(tmp_path / "run")
    assert "are ignored" not in pretrain(tmp_path / "run")
    log = pretrain(tmp_path / "run", "--seed", 1)
    assert "Changed since the checkpoint: --seed: 0 -> 1" in log
    assert "The changed options are ignored: choose another --output_dir to train with them" in log


def test_changed_data_are_reported(tmp_path):
    """As many steps: 48 images, then 51, in batches of 8."""
    pretrain(tmp_path / "run", "--max_steps", 8)
    assert "training data" not in pretrain(tmp_path / "run", "--max_steps", 9)
    log = pretrain(tmp_path / "run", "--shapes_train", 51)
    assert "The training data have changed since the checkpoint: 48 images, now 51" in log


def test_experiment_and_log_dir(tmp_path):
    pretrain(tmp_path / "out", "--experiment", "first", "--log_dir", tmp_path / "tb", "--epochs", 1)
    assert (tmp_path / "out/first/checkpoint-last.pth").exists()
    assert not list((tmp_path / "out/first").glob("*tfevents*"))
    assert list((tmp_path / "tb/mae_vit_micro_patch16_first").glob("*tfevents*"))


def test_events_of_two_runs_never_mix(tmp_path):
    """Same model, experiment and --log_dir, other folders; each finds its own events again."""
    for name in ("a", "b", "a"):
        pretrain(tmp_path / name, "--log_dir", tmp_path / "tb", "--max_steps", 3 if name == "b" else 9)
    folders = sorted(path.name for path in (tmp_path / "tb").iterdir())
    assert folders == ["mae_vit_micro_patch16_main_pretrain", "mae_vit_micro_patch16_main_pretrain-2"]


def test_a_teacher_that_follows_too_slowly_is_reported(tmp_path):
    """Twelve steps with the published decay, and with the one that the warning suggests."""
    assert "follows the student too slowly" in pretrain(tmp_path / "a", "--max_steps", 1)
    fitting = ["--ema_decay", 0.5, "--ema_decay_final", 0.5]
    assert "follows the student too slowly" not in pretrain(tmp_path / "b", "--max_steps", 1, *fitting)
    assert "follows the student too slowly" not in pretrain(tmp_path / "c", "--max_steps", 1, "--no-learning_loss")


def test_ignored_official_options_are_reported(tmp_path):
    log = pretrain(tmp_path / "run", "--epochs", 1, "--local_rank", 0, "--dist_on_itp")
    assert "ignored options: --local_rank, --dist_on_itp" in log


def test_the_weights_load_into_a_fresh_model_by_their_official_names(tmp_path):
    pretrain(tmp_path / "run", "--epochs", 1)
    model = models_hpm.mae_vit_micro_patch16(img_size=16, patch_size=4, decoder_depth=1)
    for which in ("student", "ema"):
        report = load_into(model, load_pretrained(tmp_path / "run/checkpoint-last.pth", which))
        assert report.newly_initialised == report.unused == []


def test_a_missing_data_path_stops_every_rank(tmp_path):
    """Rank 1 names itself; under torchrun it is ended before."""
    options = [*PRETRAIN, "--output_dir", tmp_path / "run", "--data_path", tmp_path / "nowhere"]
    for rank, shown in enumerate(on_ranks(run, "main_pretrain", *options, status=2)):
        assert "nowhere does not exist: give a folder or a .tar archive of images" in shown
        assert ("rank 1" in shown) == (rank == 1)
        assert "Traceback" not in shown
    assert not (tmp_path / "run/config.json").exists()
