"""The schema of runs, loading of anybody's weights with every tensor accounted for."""

import errno
import json
import os
import re

import pytest
import torch
from golden import build_hpm, load
from torch import nn

from models_hpm import MaskedAutoencoderViT
from util.run import checkpoint, folder
from util.weights.load import load_into, load_pretrained, read_meta

SMALL = {
    **{"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    **{"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
}


def state(epoch=1, **kwargs):
    return {
        **{
            "format": "hpm",
            "version": 1,
            "script": "main_pretrain",
            "model": "m",
            "state_dict": {"w": torch.arange(4.0)},
            "optimizer": {},
            "epoch": epoch,
            "step": 0,
        },
        **{"options": {"epochs": 3, "lr": 0.1}, "image": {"mean": [0.5], "std": [0.2]}, "extra": {}},
        **kwargs,
    }


def test_newest_previous_and_milestones(tmp_path):
    for epoch in (1, 2, 3):
        checkpoint.save_run(tmp_path, state(epoch), ["checkpoint-2.pth"] * (epoch == 2))
    read = {p.name: checkpoint.read_run(p)["epoch"] for p in tmp_path.iterdir()}
    assert read == {"checkpoint-last.pth": 3, "checkpoint-prev.pth": 2, "checkpoint-2.pth": 2}
    path, newest = checkpoint.find_resume(tmp_path)
    assert (path.name, newest["epoch"], newest["version"]) == ("checkpoint-last.pth", 3, 1)
    assert torch.equal(newest["state_dict"]["w"], torch.arange(4.0))


def test_tensors_and_plain_values_alone(tmp_path):
    checkpoint.save_run(tmp_path, state())
    torch.load(tmp_path / "checkpoint-last.pth", weights_only=True)


def test_copies_where_the_file_system_has_no_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    checkpoint.save_run(tmp_path, state(1))
    checkpoint.save_run(tmp_path, state(2), ["checkpoint-2.pth"])
    assert checkpoint.read_run(tmp_path / "checkpoint-prev.pth")["epoch"] == 1
    assert checkpoint.read_run(tmp_path / "checkpoint-2.pth")["epoch"] == 2


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    checkpoint.save_run(tmp_path, state(1))

    def full(content, file):
        file.write(b"x" * 1000)
        raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"could not write .*disk full.*the previous file is intact"):
        checkpoint.save_run(tmp_path, state(2))
    assert checkpoint.find_resume(tmp_path)[1]["epoch"] == 1
    assert not list(tmp_path.glob("*.partial"))


def test_nothing_is_left_of_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(KeyError):
        folder.write_atomic(tmp_path / "a", lambda file: {}["a"])
    assert not list(tmp_path.iterdir())


def test_all_names_of_a_checkpoint_or_none(tmp_path, monkeypatch):
    """Where the best checkpoint cannot be written, the epoch is not complete."""
    checkpoint.save_run(tmp_path, state(1), [folder.BEST])

    original = os.link

    def fails(source, target):
        if "best" in str(target):
            raise OSError(errno.EIO, "I/O error")
        original(source, target)

    monkeypatch.setattr(os, "link", fails)
    monkeypatch.setattr(folder.shutil, "copyfile", fails)
    with pytest.raises(OSError, match=r"could not write .*checkpoint-best.pth"):
        checkpoint.save_run(tmp_path, state(2), [folder.BEST])
    assert checkpoint.find_resume(tmp_path)[1]["epoch"] == 1
    assert not list(tmp_path.glob(".*"))


def test_the_best_accuracy_is_that_of_the_best_checkpoint(tmp_path, log):
    """Unless the run has gone back to an epoch before it."""
    assert checkpoint.best_accuracy(tmp_path, 5) is None
    checkpoint.save_run(tmp_path, state(2, extra={"best": 70.0}), [folder.BEST])
    checkpoint.save_run(tmp_path, state(3, extra={"best": 70.0}))
    assert [checkpoint.best_accuracy(tmp_path, epochs) for epochs in (1, 2, 3)] == [None, 70.0, 70.0]
    (tmp_path / folder.BEST).write_bytes(b"damaged")
    assert checkpoint.best_accuracy(tmp_path, 3) is None
    assert "the best accuracy starts anew" in log.text


def test_a_damaged_file_gives_way_to_the_one_before(tmp_path, caplog):
    for epoch in (1, 2):
        checkpoint.save_run(tmp_path, state(epoch))
    last = tmp_path / "checkpoint-last.pth"
    data = last.read_bytes()
    place = data.index(torch.arange(4.0).numpy().tobytes())
    damages = {"truncated": data[: len(data) // 2], "flipped": data[:place] + b"\1" + data[place + 1 :], "empty": b""}
    checkpoint.log.propagate = True
    for damaged in damages.values():
        last.write_bytes(damaged)
        caplog.clear()
        assert checkpoint.find_resume(tmp_path)[1]["epoch"] == 1
        assert "checkpoint-last.pth" in caplog.text
    (tmp_path / "checkpoint-prev.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint in .* can be read"):
        checkpoint.find_resume(tmp_path)


def test_where_a_run_goes_on(tmp_path, log):
    def find(resume="", auto_resume=True):
        found = checkpoint.find_resume(tmp_path / "run", resume, auto_resume)
        return found and (found[0].name, found[1]["epoch"])

    (tmp_path / "run").mkdir()
    assert find() is None
    folder.write_file(tmp_path / "other.pth", state(7))
    assert find(resume=str(tmp_path / "other.pth")) == ("other.pth", 7)
    checkpoint.save_run(tmp_path / "run", state(1))
    assert find() == ("checkpoint-last.pth", 1)
    assert find(resume=str(tmp_path / "other.pth")) == ("checkpoint-last.pth", 1)  # what the run itself reached
    assert f"--resume {tmp_path}/other.pth is not used: {tmp_path}/run holds a run" in log.text
    for resume in ("", str(tmp_path / "other.pth")):
        with pytest.raises(ValueError, match="holds a run"):
            find(resume, auto_resume=False)
    checkpoint.save_run(tmp_path / "run", state(2), ["checkpoint-2.pth"])
    assert find(f"{tmp_path}/run/../run/checkpoint-2.pth", auto_resume=False) == ("checkpoint-2.pth", 2)
    (tmp_path / "run/config.json").write_text(json.dumps({"script": "main_finetune"}))
    with pytest.raises(ValueError, match="holds a run of main_finetune, not of main_pretrain"):
        folder.RunFolder(tmp_path / "run", "main_pretrain")


@pytest.mark.parametrize(
    ("text", "message"), [("", "is damaged"), ("{", "is damaged"), ("[1]", "holds a list, no opt")]
)
def test_a_damaged_configuration_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json {message}.*: delete it, or choose another folder"):
        folder.run_folder(str(tmp_path), "", "main_pretrain")


@pytest.mark.parametrize("left", ["checkpoint-best.pth", "checkpoint-2.pth", "log.jsonl"])
def test_what_is_left_of_a_run_is_not_overwritten(tmp_path, left):
    """Without its newest checkpoint: only what the command names can be resumed."""
    run, other = tmp_path / "run", tmp_path / "other.pth"
    run.mkdir()
    folder.write_file(other, state(7))
    if left == "log.jsonl":
        (run / left).write_text('{"epoch": 0}\n{"epoch": 1}\n')
    else:
        folder.write_file(run / left, state(2))
        assert checkpoint.find_resume(run, f"{run}/{left}")[1]["epoch"] == 2
        assert checkpoint.find_resume(run, f"{run}/{left}", auto_resume=False)[1]["epoch"] == 2
    for resume in ("", str(other)):
        for auto_resume in (True, False):
            with pytest.raises(ValueError, match=f"run holds {left} of an earlier run, but not its newest checkpoint"):
                checkpoint.find_resume(run, resume, auto_resume)


def test_a_run_killed_before_or_while_it_saves_for_the_first_time_starts_again(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for log in ("", '{"epoch": 0}\n'):
        (tmp_path / "log.jsonl").write_text(log)
        assert checkpoint.find_resume(tmp_path) is None
        assert checkpoint.find_resume(tmp_path, auto_resume=False) is None


def test_what_may_change_when_a_run_goes_on(tmp_path):
    path = tmp_path / "c.pth"
    changes = checkpoint.check_resumable(path, state(), "main_pretrain", {"epochs": 3, "lr": 0.2}, ["epochs"])
    assert changes == ["--lr: 0.1 -> 0.2"]
    with pytest.raises(ValueError, match="was trained with --epochs 3, now it is 4"):
        checkpoint.check_resumable(path, state(), "main_pretrain", {"epochs": 4, "lr": 0.1}, ["epochs"])
    with pytest.raises(ValueError, match="is of a run of main_pretrain, not of main_finetune"):
        checkpoint.check_resumable(path, state(), "main_finetune", {"epochs": 3, "lr": 0.1}, [])


def test_other_peoples_files_are_no_runs(tmp_path):
    torch.save({"model": {"w": torch.ones(1)}}, tmp_path / "mae.pth")
    with pytest.raises(ValueError, match="was not written by this project's scripts"):
        checkpoint.read_run(tmp_path / "mae.pth")
    folder.write_file(tmp_path / "new.pth", state(version=99))
    with pytest.raises(ValueError, match="has version 99, this code reads up to 1"):
        checkpoint.read_run(tmp_path / "new.pth")


def test_meta(tmp_path):
    folder.write_file(tmp_path / "ours.pth", state(5))
    meta = read_meta(tmp_path / "ours.pth")
    assert (meta["epoch"], meta["options"]["lr"], meta["image"]["mean"]) == (5, 0.1, [0.5])
    torch.save({"model": {"w": torch.ones(1)}}, tmp_path / "mae.pth")
    assert read_meta(tmp_path / "mae.pth") == {}


def model(**kwargs):
    return MaskedAutoencoderViT(**{**SMALL, **kwargs})


def test_every_tensor_is_accounted_for():
    source, target = model(), model(learning_loss=False)
    report = load_into(target, source.state_dict())
    assert set(report.loaded) == set(target.state_dict())
    assert all("losspred" in name for name in report.unused)
    assert report.newly_initialised == []
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])
    assert "unused             decoder_blocks_losspred" in str(report)


def test_what_is_missing_unexpected_or_misshaped_is_named():
    weights = model().state_dict()
    with pytest.raises(ValueError, match=r"missing: blocks.2.norm1.weight, .* and \d+ more"):
        load_into(model(depth=3), weights)
    with pytest.raises(ValueError, match="unexpected: blocks.1.norm1.weight"):
        load_into(model(depth=1), weights)
    with pytest.raises(ValueError, match=r"shape mismatch: cls_token is \(1, 1, 32\) in the file, \(1, 1, 64\)"):
        load_into(model(embed_dim=64), weights)
    with pytest.raises(ValueError, match=r"unexpected: surprise"):
        load_into(model(), {**weights, "surprise": torch.ones(1)})
    with pytest.raises(ValueError, match="missing: decoder_pos_embed, decoder_embed.weight"):
        load_into(model(), {k: v for k, v in weights.items() if not k.startswith("decoder_")})


def test_a_failed_load_changes_nothing():
    target = model(depth=3)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError, match="missing"):
        load_into(target, model().state_dict())
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


def test_what_may_be_fresh_keeps_its_initial_values():
    source = {k: v for k, v in model().state_dict().items() if "losspred" not in k}
    target = model()
    before = target.decoder_pred_losspred.weight.clone()
    report = load_into(target, source, allow_missing=("decoder_",))
    assert torch.equal(target.decoder_pred_losspred.weight, before)
    assert all("losspred" in name for name in report.newly_initialised)


def test_the_small_encoder_of_moco_has_other_heads(tmp_path):
    for width in (384, 768):
        weights = {f"module.base_encoder.{name}": torch.ones(1) for name in ("cls_token", "blocks.0.norm1.weight")}
        weights["module.base_encoder.patch_embed.proj.weight"] = torch.ones(width, 3, 16, 16)
        torch.save({"state_dict": weights}, tmp_path / f"{width}.pth")
    assert "cls_token" in load_pretrained(tmp_path / "768.pth")
    with pytest.raises(ValueError, match="is MoCo v3's ViT-S, which has 12 heads; here a ViT-S has 6"):
        load_pretrained(tmp_path / "384.pth")


def test_position_embeddings_are_fitted(log):
    weights = model().state_dict()
    target = nn.Module()
    target.pos_embed = nn.Parameter(torch.zeros(1, 1 + 36, 32))
    target.patch_embed = nn.Module()
    target.patch_embed.grid_size = (6, 6)
    load_into(target, {"pos_embed": weights["pos_embed"]})
    assert target.pos_embed.abs().sum() > 0
    assert re.search(r"pos_embed resized from \d x \d patches to 6 x 6", log.text)


@pytest.mark.parametrize("wrap", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_official_and_mae_files(tmp_path, wrap):
    """Official HPM: state_dict and ema_state_dict, `model` a name. MAE: the weights under `model`."""
    golden, meta = load("hpm_relative")
    weights = {wrap + k: v for k, v in build_hpm(golden, meta).state_dict().items()}
    ema = {k: v + 1 for k, v in weights.items()}
    torch.save({"epoch": 3, "model": "mae_vit", "state_dict": weights, "ema_state_dict": ema}, tmp_path / "hpm.pth")
    torch.save({"model": weights, "epoch": 3, "optimizer": {}}, tmp_path / "mae.pth")
    for name in ("hpm.pth", "mae.pth"):
        loaded = load_pretrained(tmp_path / name)
        build_hpm(golden, meta).load_state_dict(loaded, strict=True)
    ema = load_pretrained(tmp_path / "hpm.pth", which="ema")
    assert torch.equal(ema["cls_token"], loaded["cls_token"] + 1)
    with pytest.raises(ValueError, match="has no EMA teacher"):
        load_pretrained(tmp_path / "mae.pth", which="ema")
