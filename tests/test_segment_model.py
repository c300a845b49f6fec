"""UPerNet as MMSegmentation computes it (tests/golden/upernet_tiny.npz), the linear head, and sliding inference."""

import json

import numpy as np
import pytest
import torch
from golden import FOLDER

import models_segment as segment
from engine_segment import largest_class


def assert_close(ours, theirs):
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-5)


# MMSegmentation's names -> ours, in this order.
NAMES = [
    *[
        ("backbone.layers.", "encoder.blocks."),
        ("backbone.", "encoder."),
        ("patch_embed.projection", "patch_embed.proj"),
    ],
    *[(".ln1.", ".norm1."), (".ln2.", ".norm2."), ("ffn.layers.0.0", "mlp.fc1"), ("ffn.layers.1", "mlp.fc2")],
    *[("neck.upsample_4x", "up_4x"), ("neck.upsample_2x.0", "up_2x"), ("auxiliary_head.convs.0", "auxiliary.0")],
    *[("auxiliary_head.conv_seg", "auxiliary.2"), ("decode_head.conv_seg", "head.classify")],
    *[("decode_head.psp_modules", "head.pools"), ("decode_head.lateral_convs", "head.laterals")],
    *[("decode_head.fpn_convs", "head.outputs"), ("decode_head.fpn_bottleneck", "head.fuse")],
    *[("decode_head.bottleneck", "head.bottleneck"), (".conv.", ".0."), (".bn.", ".1.")],
]


def our_name(name):
    for theirs, ours in NAMES:
        name = name.replace(theirs, ours)
    return name


@pytest.fixture(scope="module")
def golden():
    with np.load(FOLDER / "upernet_tiny.npz") as file:
        arrays = {key: file[key] for key in file}
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items() if array.dtype.kind in "fu"}
    return tensors | {key: str(arrays[key]) for key in ("groups", "config")}


@pytest.fixture
def model(golden):
    """The golden model, every weight loaded; in float64, so that the reference's rounding is all that differs."""
    config = json.loads(golden["config"])
    built = segment.UPerNet(
        *(config[name] for name in ("img", "patch", "dim", "depth", "heads", "classes")),
        taps=config["out_indices"],
        channels=config["channels"],
        aux_channels=config["aux_channels"],
    )
    weights = {}
    for name, value in golden.items():
        if not name.startswith("w/"):
            continue
        name = our_name(name.removeprefix("w/"))
        if name.endswith("qkv.bias"):
            query, _, value = value.chunk(3)
            weights[name.replace("qkv.bias", "q_bias")] = query
            name = name.replace("qkv.bias", "v_bias")
        weights[name] = value
    missing, unexpected = built.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return built.eval().double()


def test_logits_losses_and_gradients(golden, model):
    logits, aux = outputs = model(golden["x"].double())
    assert_close(logits, golden["logits"])
    assert_close(aux, golden["aux"])
    decode = segment.loss([logits], golden["y"], [1.0], 255)
    auxiliary = segment.loss([aux], golden["y"], [0.4], 255)
    total = segment.loss(outputs, golden["y"], model.loss_weights, 255)
    assert total.item() == pytest.approx(13.870189, rel=1e-6)
    assert decode.item() == pytest.approx(float(golden["loss_decode"]), rel=1e-5)
    assert auxiliary.item() == pytest.approx(float(golden["loss_aux"]), rel=1e-5)
    total.backward()
    table = model.encoder.blocks[0].attn.relative_position_bias_table
    assert_close(table.grad, golden["grad_rel_pos_0"])
    assert_close(model.encoder.pos_embed.grad, golden["grad_pos_embed"])
    assert all(p.grad is not None for p in model.parameters())  # DDP needs that


def test_sliding_windows(golden, model):
    predicted = segment.slide(lambda crops: model(crops)[0], golden["x_wide"][0].double(), 64, 43, 11, batch=2)
    assert_close(predicted, golden["slide"][0])
    whole = segment.resize(predicted[None], (90, 70))[0].argmax(dim=0)
    for most in (1, 4 * 90 * 70, 2**28):  # classes are resized one, four or all at a time
        assert torch.equal(largest_class(predicted, (90, 70), most), whole)


def test_float32_gives_the_same_loss(golden, model):
    total = segment.loss(model.float()(golden["x"]), golden["y"], model.loss_weights, 255)
    assert total.item() == pytest.approx(13.870189, rel=1e-5)


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(16, 16, 1), (10, 7, 1), (16, 23, 2), (41, 16, 4), (5, 40, 4)]
)
def test_images_of_any_size(height, width, expected):
    """Smaller than the window, equal to it, and between windows: each pixel is the mean of the windows over it."""
    seen = []

    def predict(crops):
        seen.extend(crops)
        return crops[:, :1] * 2

    image = torch.randn(3, height, width)
    predicted = segment.slide(predict, image, side=16, stride=10, num_classes=1, batch=3)
    torch.testing.assert_close(predicted, image[:1] * 2)
    assert len(seen) == expected
    assert all(crop.shape == (3, 16, 16) for crop in seen)


def test_an_image_smaller_than_the_window_is_padded_with_the_mean_colour():
    total = segment.slide(lambda crops: crops.sum((2, 3), keepdim=True), torch.ones(3, 4, 5), 8, 5, 3)
    assert total.shape == (3, 4, 5)
    assert (total == 20).all()


def test_ignored_pixels_cost_nothing():
    """The sum over valid pixels is divided by all pixels; where all are ignored, loss and gradient are zero."""
    logits = torch.randn(2, 5, 4, 4, requires_grad=True)
    labels = torch.randint(0, 5, (2, 8, 8), dtype=torch.uint8)
    full = segment.loss([logits], labels, [1.0], 255)
    labels[1] = 255
    half = segment.loss([logits], labels, [1.0], 255)
    alone = segment.loss([logits[:1]], labels[:1], [1.0], 255)
    assert half.item() == pytest.approx(alone.item() / 2)
    assert half < full
    nothing = segment.loss([logits], torch.full_like(labels, 255), [1.0], 255)
    nothing.backward()
    assert nothing == 0
    assert (logits.grad == 0).all()


def test_the_linear_head_reads_the_normed_patch_tokens_of_a_frozen_encoder():
    model = segment.build("linear", "vit_micro_patch16", 32, 8, 7, 0.0).train()
    imgs = torch.randn(2, 3, 32, 32)
    (logits,) = model(imgs)
    assert logits.shape == (2, 7, 4, 4)
    logits.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        *("head.1.weight", "head.1.bias", "head.2.weight", "head.2.bias")
    }
    tokens = model.encoder.forward_features(imgs)[:, 1:]  # (B, L, E), row by row
    maps = segment.FrozenEncoder(model.encoder)(imgs)
    torch.testing.assert_close(maps[1, :, 2, 3], tokens[1, 2 * 4 + 3])
    assert not model.encoder.training


@pytest.mark.parametrize(("depth", "taps"), [(12, [3, 5, 7, 11]), (24, [7, 11, 15, 23]), (6, [1, 2, 3, 5])])
def test_taps(depth, taps):
    with torch.device("meta"):
        assert segment.UPerNet(32, 16, 16, depth, 2, 3).taps == taps


def test_sizes_of_the_table():
    with torch.device("meta"):
        for name, width in (("vit_base_patch16", 768), ("vit_large_patch16", 1024)):
            model = segment.build("upernet", name, 512, None, 150, 0.1)
            assert model.encoder.pos_embed.shape == (1, 1025, width)
            assert model.encoder.blocks[0].attn.relative_position_bias_table.shape == (63**2 + 3, width // 64)
            assert model.head.fuse[0].in_channels == 4 * width
            assert model.auxiliary[0][0].out_channels == 256


def test_an_encoder_loads_with_every_tensor_accounted_for(golden, model):
    weights = {name.removeprefix("mae/"): value for name, value in golden.items() if name.startswith("mae/")}
    config = json.loads(golden["config"])
    new = segment.UPerNet(*(config[name] for name in ("img", "patch", "dim", "depth", "heads", "classes")))
    report = new.load_encoder(weights)
    assert_close(new.encoder.pos_embed.data, golden["pos_embed_resized"])
    ours, theirs = new.encoder.state_dict(), model.float().encoder.state_dict()
    for name in report.loaded:
        assert_close(ours[name], theirs[name])
    assert sorted(report.unused) == [
        "blocks.0.attn.k_bias",
        "blocks.1.attn.k_bias",
        "blocks.2.attn.k_bias",
        *["blocks.3.attn.k_bias", "norm.bias", "norm.weight"],
    ]
    assert {name.split(".", 2)[2] for name in report.newly_initialised} == {
        "gamma_1",
        "gamma_2",
        "attn.relative_position_bias_table",
    }
    assert all((ours[name] == (0.0 if "table" in name else 1.0)).all() for name in report.newly_initialised)
    with pytest.raises(ValueError, match=r"missing: blocks.0.norm1.weight"):
        new.load_encoder({name: value for name, value in weights.items() if name != "blocks.0.norm1.weight"})


def test_parameter_groups(golden, model):
    groups = segment.parameter_groups(model, 0.05, 0.65)
    ours = {name: (g["lr_scale"], g["weight_decay"]) for g in groups for name in g["names"]}
    expected = {}
    for name, settings in json.loads(golden["groups"]).items():
        name = our_name(name)
        names = [name.replace("qkv.bias", bias) for bias in ("q_bias", "v_bias")] if "qkv.bias" in name else [name]
        expected |= dict.fromkeys(names, pytest.approx(tuple(settings)))
    assert ours == expected
    spared = segment.parameter_groups(model, 0.05, 0.65, decay_positions=False)
    decayed = {name for g in spared for name in g["names"] if g["weight_decay"] > 0}
    assert {name.split(".")[-1] for name in {name for name in ours if ours[name][1] > 0} - decayed} == {
        *("pos_embed", "cls_token", "relative_position_bias_table")
    }
