"""Faulty exports are detected before they are put in place; libraries are imported only when needed."""

import dataclasses
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from exports import FILES, failed_check, pretrained, rejected
from programs import ROOT
from safetensors.torch import load_file, save_file

from export import encoders
from export import hugging_face as hf_export
from export.__main__ import FORMATS
from util.weights import hugging_face

__all__ = ["pretrained"]  # fixture


def flipped(monkeypatch, name):
    """Change one number of the export after it is written and before it is checked."""
    original = FORMATS[name].write

    def write(form, path):
        original(form, path)
        if name == "onnx":
            import onnx

            model = onnx.load(path)
            largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
            values = np.frombuffer(largest.raw_data, np.float32).copy()
            values[7] += 1
            largest.raw_data = values.tobytes()
            onnx.save(model, path)
            return
        file = path / "model.safetensors" if path.is_dir() else path
        content = load_file(file) if file.suffix == ".safetensors" else torch.load(file)
        tensors = content.get("model", content)
        key = next(key for key in tensors if re.search(r"3\.(attn\.|attention\.output\.dense|attn.proj).*weight", key))
        tensors[key].view(-1)[7] += 0.5
        save_file(content, file) if file.suffix == ".safetensors" else torch.save(content, file)

    monkeypatch.setattr(FORMATS[name], "write", write)


@pytest.mark.parametrize("name", FORMATS)
def test_a_faulty_export_is_not_left_behind(tmp_path, pretrained, name, monkeypatch, capsys):
    for package in FORMATS[name].needs:
        pytest.importorskip(package)
    flipped(monkeypatch, name)
    path = tmp_path / f"out/it{FILES.get(name, '')}"
    message = failed_check("--checkpoint", pretrained, "--format", name, "--output", path)
    assert re.search(r"the check of .* failed, nothing was written: .*(differ|other values)", message)
    assert list((tmp_path / "out").iterdir()) == []


def with_another_mean(source, original=hf_export.image_processor):
    return original(dataclasses.replace(source, mean=[0.5, 0.5, 0.5]))


def sabotages():
    """(format, change to the code, message of the check)."""
    swap = {"layernorm_before": "norm2", "layernorm_after": "norm1"}
    yield "hf_vit", lambda m: m.setitem(hugging_face._BLOCK_PARTS, "layernorm_before", "norm3"), "has no counterpart"
    yield "hf_vit", lambda m: [m.setitem(hugging_face._BLOCK_PARTS, *item) for item in swap.items()], "tokens differ"
    yield "hf_mae", lambda m: m.setattr(hf_export.HfMae, "keeps", lambda form: ["norm.weight"]), "has missing keys"
    yield (
        "timm",
        lambda m: m.setattr(encoders.Timm, "arguments", lambda form: ("vit_small_patch16_224", {})),
        "cannot open",
    )
    yield "hf_vit", lambda m: m.setattr(hf_export, "image_processor", with_another_mean), "preprocessed images differ"


@pytest.mark.parametrize(("name", "sabotage", "message"), list(sabotages()))
def test_conversion_faults_are_detected(tmp_path, pretrained, name, sabotage, message, monkeypatch, capsys):
    pytest.importorskip("transformers")
    sabotage(monkeypatch)
    path = tmp_path / f"out/it{FILES.get(name, '')}"
    options = ["--checkpoint", pretrained, "--format", name, "--output", path]
    error = rejected(capsys, *options) if message == "has no counterpart" else failed_check(*options)
    assert re.search(message, error)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("name", "package"), [("hf_mae", "transformers"), ("onnx", "onnxscript")])
def test_missing_library(pretrained, name, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    for other in FORMATS[name].needs:
        if other != package:
            pytest.importorskip(other)
    error = rejected(capsys, "--checkpoint", pretrained, "--format", name)
    needed = " ".join(FORMATS[name].needs)
    assert f"--format {name} needs {package}" in error
    assert f"pip install {needed}" in error


def test_libraries_are_imported_only_when_needed(tmp_path, pretrained):
    code = f"""
import sys
from export import __main__ as export
export.main(["--checkpoint", {str(pretrained)!r}, "--format", "timm", "--output", {str(tmp_path / "t.pth")!r}])
assert not {{"transformers", "onnx", "onnxscript", "onnxruntime"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
