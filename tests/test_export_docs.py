"""Commands and code of docs/export.md and docs/detection.md, run as printed on a small model."""

import dataclasses
import re
import shlex
import shutil

import pytest
import torch
from exports import classifiers, photograph, pretrained
from programs import ROOT, run
from test_export_detection import source

from export.detection import Detectron2, MMSeg
from util.weights.load import load_pretrained

__all__ = ["classifiers", "pretrained"]  # fixtures

# ViT-B and ImageNet of the documents -> the model of the tests.
MICRO = {
    'vit_base_patch16_224",': 'vit_base_patch16_224", img_size=16, patch_size=4, embed_dim=128, depth=6, num_heads=4,',
    "num_classes=1000": "num_classes=10",
    "(1, 3, 224, 224)": "(1, 3, 16, 16)",
    "pretrained_cfg_overlay=dict(": "pretrained_cfg_overlay=dict(input_size=(3, 16, 16), ",
}


def blocks(document, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / document).read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pretrained, classifiers):
    """The files that the commands of the documents read."""
    folder = tmp_path_factory.mktemp("docs")
    copies = {"output_dir": pretrained, "finetuned": classifiers["mean"], "probe": classifiers["probe"]}
    for name, path in copies.items():
        shutil.copytree(path.parent, folder / name)
    shutil.copy(classifiers["mean"], folder / "finetuned/checkpoint-best.pth")
    weights = {name: tensor for name, tensor in load_pretrained(pretrained).items() if "losspred" not in name}
    torch.save({"model": weights}, folder / "mae_pretrain_full.pth")
    photograph().save(folder / "photo.jpg")
    return folder


@pytest.fixture(scope="module")
def exported(folder):
    """The folder after all commands."""
    for package in ("transformers", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks("export.md", "bash"):
            for command in block.splitlines():
                if command.startswith("python"):
                    words = shlex.split(command)
                    assert words[:3] == ["python", "-m", "export"]
                    assert "wrote" in run("export", *words[3:])
    return folder


def test_commands(exported):
    for name in (
        "output_dir/checkpoint-last-timm.safetensors",
        "output_dir/checkpoint-last-timm.safetensors.md",
        "hpm_vit_base.safetensors",
        "hpm-vit-base/README.md",
        "vit-mae-base/README.md",
        "classifier.pth",
        "classifier.onnx",
        "probe/checkpoint-last-timm.safetensors",
        "vitdet.pth",
        "mmseg.pth",
    ):
        assert (exported / name).is_file(), name


@pytest.mark.parametrize("number", range(4))
def test_code(exported, monkeypatch, number):
    code = [block for block in blocks("export.md", "python") if not block.startswith("# configs/")][number]
    for ours, theirs in MICRO.items():
        code = code.replace(ours, theirs)
    monkeypatch.chdir(exported)
    names = {}
    exec(code, names)
    if "tokens" in names:
        assert names["tokens"].shape == (1, 17, 128)
    if "logits" in names:
        assert names["logits"].shape == (1, 10)


def test_all_code_is_run():
    assert len(blocks("export.md", "python")) == 5  # four that are run, and the configuration of MMSegmentation
    assert len(blocks("detection.md", "python")) == 2


def test_configurations():
    """Those in the documents are those of the cards."""
    vit_b = dataclasses.replace(source(), mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    assert MMSeg(vit_b).usage("/path/to/mmseg.pth") + "\n" == blocks("export.md", "python")[-1]
    lines, check = blocks("detection.md", "python")
    assert Detectron2(vit_b).usage("/path/to/vitdet.pth") + "\n" == lines
    compile(check, "docs/detection.md", "exec")  # needs Detectron2


def test_command_for_detection(folder, monkeypatch):
    (command,) = [block for block in blocks("detection.md", "bash") if "export" in block]
    monkeypatch.chdir(folder)
    assert "wrote" in run("export", *shlex.split(command)[3:], "--overwrite")
