"""Configuration lines for Detectron2 and MMSegmentation, for every size, patch size, mean and std."""

import re

import pytest
import torch
from torch.nn.functional import conv2d, interpolate

import models_vit
from export.base import Source
from export.detection import Detectron2, MMSeg


def source(name="vit_base_patch16", patch_size=None, input_size=224, depth=None):
    """A model on the meta device unless it has to compute."""
    settings = {} if depth is None else {"depth": depth}
    with torch.device("meta" if depth is None else "cpu"):
        model = models_vit.build(name, input_size, patch_size, num_classes=0, **settings).eval()
    sizes = {"input_size": input_size, "patch_size": model.patch_embed.patch_size[0], "channels": 3}
    image = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "crop_pct": 0.875, "mask_ratio": 0.75}
    fixed = {"path": None, "which": "student", "meta": {}, "weights": {}, "autoencoder": None}
    return Source(name=name, model=model, **sizes, **image, **fixed)


@pytest.mark.parametrize(
    ("name", "input_size", "patch_size", "expected"),
    [
        ("vit_micro_patch16", 32, 4, ("b_100ep", 128, 6, 4, [1, 4], 128, 0.7)),
        ("vit_small_patch16", 96, 8, ("b_100ep", 384, 12, 6, [0, 1, 3, 4, 6, 7, 9, 10], 192, 0.7)),
        ("vit_base_patch16", 224, 16, ("b_100ep", 768, 12, 12, [0, 1, 3, 4, 6, 7, 9, 10], 224, 0.7)),
        ("vit_large_patch16", 224, 16, ("l_100ep", 1024, 24, 16, None, 224, 0.8)),
        ("vit_huge_patch14", 224, 14, ("h_75ep", 1280, 32, 16, None, 256, 0.9)),
    ],
)
def test_vitdet_configuration(name, input_size, patch_size, expected):
    base, width, depth, heads, windowed, pretrain_size, lr_decay = expected
    lines = Detectron2(source(name, patch_size, input_size)).usage("vitdet.pth")
    assert f"from .mask_rcnn_vitdet_{base} import" in lines
    found = run_lines(lines)
    net = found["model"].backbone.net
    assert (net.embed_dim, net.depth, net.num_heads, net.pretrain_img_size) == (width, depth, heads, pretrain_size)
    assert windowed is None or net.window_block_indexes == windowed
    whole = sorted(set(range(depth)) - set(net.window_block_indexes))
    assert len(whole) == 4
    assert whole[-1] == depth - 1
    assert (found["model"].pixel_mean, found["model"].pixel_std) == ([102.0, 127.5, 153.0], [51.0, 63.75, 76.5])
    assert found["optimizer"].params.lr_factor_func.keywords == {"lr_decay_rate": lr_decay, "num_layers": depth}
    assert found["train"].init_checkpoint == "vitdet.pth"


class Node:
    """Stands for any part of a lazy configuration."""

    def __getattr__(self, name):
        setattr(self, name, Node())
        return getattr(self, name)


def run_lines(lines):
    names = {name: Node() for name in ("model", "optimizer", "train", "dataloader", "lr_multiplier")}
    names["get_vit_lr_decay_rate"] = lambda name: 1.0
    exec(re.sub(r"(?m)^from \..*$", "", lines), names)
    return names


@pytest.mark.parametrize(
    ("name", "input_size", "patch_size", "width", "depth", "taps"),
    [
        ("vit_micro_patch16", 32, 4, 128, 6, [1, 2, 3, 5]),
        ("vit_base_patch16", 224, 16, 768, 12, [3, 5, 7, 11]),
        ("vit_large_patch16", 224, 16, 1024, 24, [7, 11, 15, 23]),
        ("vit_huge_patch14", 224, 14, 1280, 32, [9, 15, 20, 31]),
    ],
)
def test_mmsegmentation_configuration(name, input_size, patch_size, width, depth, taps):
    form = MMSeg(source(name, patch_size, input_size))
    found = {}
    exec(form.usage("mmseg.pth"), found)
    model = found["model"]
    backbone = model["backbone"]
    assert (backbone["patch_size"], backbone["embed_dims"], backbone["num_layers"]) == (16, width, depth)
    assert (backbone["out_indices"], backbone["init_values"]) == (taps, 1.0)
    assert model["neck"]["embed_dim"] == model["decode_head"]["channels"] == model["auxiliary_head"]["in_channels"]
    assert model["decode_head"]["in_channels"] == [width] * 4
    assert model["data_preprocessor"] == {"mean": [102.0, 127.5, 153.0], "std": [51.0, 63.75, 76.5]}
    assert found["optim_wrapper"]["paramwise_cfg"]["num_layers"] == depth
    check = re.findall(r"```python\n(.*?)```", form.note(), re.DOTALL)[0]
    compile(check, "check", "exec")
    assert f"layers.{depth - 1}.ffn.layers.1.weight" in check


@pytest.mark.parametrize("patch_size", [14, 8])
def test_patch_embeddings_of_other_sizes_are_resampled(tmp_path, patch_size):
    """Tokens of an image that is resized by the same factor stay nearly the same."""
    opened = source("vit_micro_patch16", patch_size, 8 * patch_size, depth=2)
    form = Detectron2(opened)
    form.write(tmp_path / "d.pth")
    assert form.verify(tmp_path / "d.pth") == 0
    weight = torch.load(tmp_path / "d.pth", weights_only=True)["model"]["backbone.net.patch_embed.proj.weight"]
    assert weight.shape == (128, 3, 16, 16)
    coarse = torch.randn(2, 3, 12, 12)
    images = interpolate(coarse, size=(8 * patch_size,) * 2, mode="bicubic")
    with torch.no_grad():
        ours = conv2d(images, opened.model.patch_embed.proj.weight, stride=patch_size)
        theirs = conv2d(interpolate(images, size=(128, 128), mode="bicubic"), weight, stride=16)
    assert float((theirs - ours).norm() / ours.norm()) < 0.05
    assert f"resampled from {patch_size} to 16 pixels" in form.note()


def test_vitdet_has_no_class_token():
    opened = source("vit_micro_patch16", 16, 64, depth=2)
    form = Detectron2(opened)
    assert 1e-5 < form.without_class_token() < 0.2
    assert f"by {form.without_class_token():.1e} of the largest value" in form.note()
    with torch.no_grad():  # attention ignores the class token if its key is far from every query
        for block in opened.model.blocks:
            block.attn.proj.weight.zero_()
    assert form.without_class_token() < 1e-6
