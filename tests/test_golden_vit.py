"""The official fine-tuning ViT and what goes with it, reproduced (tests/golden/vit_*.npz)."""

import json

import numpy as np
import pytest
import torch
from golden import load, params

from models_vit import VisionTransformer
from util.checkpoint import load_into
from util.knn import knn_classifier
from util.lars import LARS
from util.lr_decay import param_groups_lrd
from util.lr_sched import adjust_learning_rate
from util.pos_embed import interpolate_pos_embed

FILES = ["vit_global_pool", "vit_cls_token"]


def build(meta, **kwargs):
    names = ["img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes", "global_pool"]
    return VisionTransformer(**{**{name: meta[name] for name in names}, **kwargs}).eval()


@pytest.mark.parametrize("name", FILES)
def test_logits_and_features(name):
    golden, meta = load(name)
    model = build(meta)
    report = load_into(model, params(golden))
    assert report.left_out == report.fresh == []
    torch.testing.assert_close(model(golden["images"]), golden["logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.pooled_features(golden["images"]), golden["features"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FILES)
def test_interpolated_position_embedding(name):
    golden, meta = load(name)
    weights = params(golden)
    interpolate_pos_embed(build(meta, img_size=meta["big_img_size"]), weights)
    torch.testing.assert_close(weights["pos_embed"], golden["pos_embed_interpolated"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FILES)
def test_layer_decay(name):
    golden, meta = load(name)
    model = build(meta)
    groups = param_groups_lrd(model, meta["weight_decay"], model.no_weight_decay(), meta["layer_decay"])
    ours = {name: [g["lr_scale"], g["weight_decay"]] for g in groups for name in g["names"]}
    expected = json.loads(str(golden["layer_decay"]))
    assert ours.keys() == expected.keys()
    for key, values in expected.items():
        assert ours[key] == pytest.approx(values), key


@pytest.mark.parametrize("name", FILES)
def test_learning_rate_schedule(name):
    golden, _ = load(name)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.0)
    arguments = json.loads(str(golden["lr_args"]))
    ours = [adjust_learning_rate(optimizer, epoch, **arguments) for epoch in golden["lr_epochs"]]
    np.testing.assert_allclose(ours, golden["lr_values"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", FILES)
def test_four_steps_of_lars(name):
    golden, meta = load(name)
    weight, bias = (torch.nn.Parameter(golden[f"lars/{key}0"].clone()) for key in "wb")
    optimizer = LARS([weight, bias], **meta["lars"])
    for weight.grad, bias.grad in zip(golden["lars/w_grads"], golden["lars/b_grads"], strict=True):
        optimizer.step()
    torch.testing.assert_close(weight.data, golden["lars/w4"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias.data, golden["lars/b4"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FILES)
def test_weighted_knn(name):
    golden, meta = load(name)
    features = [golden[f"knn/{key}"] for key in ("train_features", "train_labels", "val_features", "val_labels")]
    for k, top1, top5 in golden["knn/top1_top5"]:
        ours = knn_classifier(*features, k=int(k), T=meta["knn"]["temperature"], num_classes=meta["knn"]["num_classes"])
        assert ours == pytest.approx((top1, top5), abs=1e-5)


def test_lr_scale_multiplies():
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr_scale": 0.25}, {"params": [torch.zeros(1)]}], lr=0.0)
    rate = adjust_learning_rate(optimizer, 5, lr=1.0, min_lr=0.0, warmup_epochs=10, epochs=20)
    assert rate == 0.5
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.5]
