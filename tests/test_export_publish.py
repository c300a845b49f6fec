"""Exports are put in place whole or not at all, and replace nothing unasked."""

import pytest
import torch
from exports import pretrained, rejected
from programs import run

from export import publish
from util.weights.load import load_pretrained

__all__ = ["pretrained"]  # fixture


def content_of(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_overwrite(tmp_path, pretrained, capsys):
    """An export is replaced only with --overwrite, and a folder with other files never."""
    options = ["--checkpoint", pretrained, "--format"]
    for name, output in (("timm", tmp_path / "a.pth"), ("hf_vit", tmp_path / "folder")):
        if name == "hf_vit":
            pytest.importorskip("transformers")
        assert "wrote" in run("export", *options, name, "--output", output)
        before = content_of(tmp_path)
        error = rejected(capsys, *options, name, "--which", "ema", "--output", output)
        assert "exists: use --overwrite" in error
        assert content_of(tmp_path) == before
        assert "wrote" in run("export", *options, name, "--which", "ema", "--output", output, "--overwrite")
        found = load_pretrained(output)
        assert torch.equal(found["norm.bias"], load_pretrained(pretrained, "ema")["norm.bias"])
        after = content_of(tmp_path)
        assert after.keys() == before.keys()
        assert after != before
    (tmp_path / "folder/notes.txt").write_text("mine")
    for more in ([], ["--overwrite"]):
        error = rejected(capsys, *options, "hf_vit", "--output", tmp_path / "folder", *more)
        assert "contains notes.txt, which is never replaced" in error
    assert (tmp_path / "folder/notes.txt").read_text() == "mine"


def test_a_failed_replacement_restores_the_old_folder(tmp_path, monkeypatch):
    (tmp_path / "it").mkdir()
    (tmp_path / "it/old").write_text("old")

    def build(path):
        path.mkdir()
        (path / "new").write_text("new")

    replace = publish.os.replace

    def failing(source, target):
        if source.name == "it" and target == tmp_path / "it" and source.parent.name.endswith(".partial"):
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(publish.os, "replace", failing)
    with pytest.raises(OSError, match="no space left"):
        publish.publish(tmp_path / "it", build, overwrite=True)
    assert content_of(tmp_path) == {str(tmp_path / "it/old"): b"old"}


def test_a_linked_folder_is_replaced_where_it_is(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "link").symlink_to("old")
    publish.publish(tmp_path / "link", lambda path: (path.mkdir(), (path / "new").write_text("new")), overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert content_of(tmp_path / "old") == {str(tmp_path / "old/new"): b"new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "old"]


def test_file_permissions_are_the_usual_ones(tmp_path, pretrained):
    run("export", "--checkpoint", pretrained, "--format", "timm", "--output", tmp_path / "a.safetensors")
    (tmp_path / "usual").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode
