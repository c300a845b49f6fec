"""Exports of a ViT-B/16: names and shapes of the libraries' own models."""

import ast

import pytest
import timm
import torch
from exports import assert_equal, encoder_of, images, source_of
from programs import run
from safetensors.torch import load_file, save_file

import models_hpm
from export.__main__ import FORMATS

# Names and shapes of the libraries' own backbones, for ViT-B/16 of 224 pixels: (name, shape) of a block, and the rest.
DETECTRON2_BLOCK = {
    "norm1": (768,),
    "attn.qkv": (2304, 768),
    "attn.proj": (768, 768),
    "norm2": (768,),
    "mlp.fc1": (3072, 768),
    "mlp.fc2": (768, 3072),
}


MMSEG_BLOCK = {
    "ln1": (768,),
    "attn.qkv": (2304, 768),
    "attn.proj": (768, 768),
    "ln2": (768,),
    "ffn.layers.0.0": (3072, 768),
    "ffn.layers.1": (768, 3072),
}


def backbone(prefix, block, rest):
    shapes = dict(rest)
    for number in range(12):
        for name, shape in block.items():
            shapes[f"{prefix}{number}.{name}.weight"] = shape
            shapes[f"{prefix}{number}.{name}.bias"] = shape[:1]
    return shapes


BACKBONES = {
    "detectron2": backbone(
        "backbone.net.blocks.",
        DETECTRON2_BLOCK,
        {
            "backbone.net.pos_embed": (1, 197, 768),
            "backbone.net.patch_embed.proj.weight": (768, 3, 16, 16),
            "backbone.net.patch_embed.proj.bias": (768,),
        },
    ),
    "mmseg": backbone(
        "layers.",
        MMSEG_BLOCK,
        {
            "cls_token": (1, 1, 768),
            "pos_embed": (1, 197, 768),
            "patch_embed.projection.weight": (768, 3, 16, 16),
            "patch_embed.projection.bias": (768,),
        },
    ),
}


@pytest.fixture(scope="module")
def vit_b(tmp_path_factory):
    """A file like MAE's released ViT-B with decoder, with random weights that differ from the initial ones."""
    path = tmp_path_factory.mktemp("vit_b") / "mae_visualize_vit_base.safetensors"
    torch.manual_seed(0)
    model = models_hpm.mae_vit_base_patch16(learning_loss=False, decoder_depth=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def vit_b_source(vit_b):
    """The same, opened once: that takes seconds."""
    return source_of(vit_b)


@pytest.mark.xdist_group("ViT-B")
@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_of_vit_b(tmp_path, vit_b, vit_b_source, name):
    path, form = tmp_path / f"{name}.pth", FORMATS[name](vit_b_source)
    form.write(path)
    assert form.verify(path) == 0
    found = torch.load(path, weights_only=True)
    found = found["model"] if name == "detectron2" else found
    assert {key: tuple(tensor.shape) for key, tensor in found.items()} == BACKBONES[name]
    weights = load_file(vit_b)
    last = "backbone.net.blocks.11.mlp.fc2.weight" if name == "detectron2" else "layers.11.ffn.layers.1.weight"
    assert torch.equal(found[last], weights["blocks.11.mlp.fc2.weight"])
    ast.parse(form.usage("b.pth"))


@pytest.mark.xdist_group("ViT-B")
def test_vit_b_in_timm(tmp_path, vit_b):
    """timm needs the name, the file and num_classes, nothing else."""
    run("export", "--checkpoint", vit_b, "--format", "timm", "--output", tmp_path / "b.safetensors")
    theirs = timm.create_model("vit_base_patch16_224", checkpoint_path=str(tmp_path / "b.safetensors"), num_classes=0)
    ours = encoder_of(vit_b, name="vit_base_patch16", img_size=224)
    with torch.no_grad():
        assert_equal(theirs.eval()(images(224, 1)), ours(images(224, 1)))


@pytest.mark.xdist_group("ViT-B")
@pytest.mark.parametrize("name", ["hf_vit", "hf_mae"])
def test_vit_b_in_transformers(tmp_path, vit_b_source, name):
    """By the check of the exports. tests/test_export_checks.py shows that the check can fail."""
    pytest.importorskip("transformers")
    written_and_verified(tmp_path / "b", vit_b_source, name, tolerance=1e-5)


def written_and_verified(path, source, name, tolerance):
    form = FORMATS[name](source)
    form.write(path)
    assert form.verify(path) < tolerance  # 0 in some releases: the same kernels
