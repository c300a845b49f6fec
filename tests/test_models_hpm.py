"""Properties of the model beyond the golden values."""

import pytest
import torch

import models_hpm
from models_hpm import MaskedAutoencoderViT, gather_tokens, split_mask
from util.masking import random_mask

SMALL = {
    **{"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    **{"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2},
}


def make(**kwargs):
    torch.manual_seed(0)
    return MaskedAutoencoderViT(**{**SMALL, **kwargs})


def test_split_mask_keeps_row_order():
    mask = torch.tensor([[True, False, True, False], [False, False, True, True]])
    visible, masked = split_mask(mask, 2)
    assert visible.tolist() == [[1, 3], [0, 1]]
    assert masked.tolist() == [[0, 2], [2, 3]]


def test_shapes_of_the_output():
    model = make()
    out = model(torch.randn(3, 3, 32, 32), random_mask(3, 16, 12), num_masked=12)
    shapes = {name: tuple(value.shape) for name, value in out.items()}
    assert shapes == {
        **{"loss": (), "loss_rec": (), "loss_learn": (), "pred": (3, 12, 192)},
        **{"patch_loss": (3, 12), "loss_pred": (3, 12), "latent": (3, 5, 32)},
    }
    torch.testing.assert_close(out["loss"], out["loss_rec"] + out["loss_learn"])
    assert model.predict_loss(torch.randn(3, 3, 32, 32)).shape == (3, 16)


def test_the_mask_count_is_read_off_the_mask_when_left_out():
    model, images, mask = make(), torch.randn(2, 3, 32, 32), random_mask(2, 16, 9)
    torch.testing.assert_close(model(images, mask)["loss"], model(images, mask, num_masked=9)["loss"])


def test_what_is_masked_does_not_reach_the_encoder():
    model, images, mask = make(), torch.randn(2, 3, 32, 32), random_mask(2, 16, 12)
    other = images.clone()
    patches = model.patchify(other)
    patches[mask] = 9.0
    other = model.unpatchify(patches)
    torch.testing.assert_close(model(images, mask)["latent"], model(other, mask)["latent"], rtol=0, atol=0)


@pytest.mark.parametrize("img_size", [32, (16, 40)])
@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_any_size_and_channels(img_size, in_chans):
    model = make(img_size=img_size, in_chans=in_chans)
    h, w = model.img_size
    images = torch.randn(2, in_chans, h, w)
    torch.testing.assert_close(model.unpatchify(model.patchify(images)), images, rtol=0, atol=0)
    length = model.patch_embed.num_patches
    out = model(images, random_mask(2, length, length // 2), num_masked=length // 2)
    out["loss"].backward()
    assert out["pred"].shape == (2, length // 2, 64 * in_chans)


def test_patchify_order_is_row_by_row_with_channels_last():
    model = make(img_size=(16, 24))
    images = torch.arange(16 * 24.0).view(1, 1, 16, 24) + 1000 * torch.arange(3.0).view(1, 3, 1, 1)
    patches = model.patchify(images)
    assert patches[0, 1, :3].tolist() == [8, 1008, 2008]  # second patch of the first row, pixel (0, 0), channels
    assert patches[0, 3, 0] == 8 * 24  # first patch of the second row


@pytest.mark.parametrize("size", [30, (32, 31), 4])
def test_a_size_that_the_patch_does_not_divide_is_an_error(size):
    with pytest.raises(ValueError, match="patch size 8 does not divide an image of"):
        make(img_size=size)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="decoder width 16 is not a multiple of its 3 heads"):
        make(decoder_num_heads=3)


def test_without_predictor_there_are_no_predictor_parameters():
    names = [name for name, _ in make(learning_loss=False).named_parameters()]
    assert not [name for name in names if "losspred" in name]
    assert [name for name, _ in make().named_parameters() if "losspred" in name]


def test_official_parameter_counts():
    """Trainable parameters in millions: FACTS of the official models, HPM and MAE, base and large."""
    with torch.device("meta"):
        for name, learning_loss, millions in [
            ("mae_vit_base_patch16", True, 137.3),
            ("mae_vit_base_patch16", False, 111.7),
            ("mae_vit_large_patch16", True, 354.9),
            ("mae_vit_large_patch16", False, 329.2),
        ]:
            model = models_hpm.MODELS[name](learning_loss=learning_loss)
            count = sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert round(count / 1e6, 1) == millions, name


def test_every_factory_builds():
    with torch.device("meta"):
        for build in models_hpm.MODELS.values():
            build()
        assert models_hpm.mae_vit_huge_patch14().patch_embed.grid_size == (16, 16)


def test_every_parameter_gets_a_gradient():
    """DDP runs without find_unused_parameters."""
    for kwargs in ({}, {"learning_loss": False}, {"vis_mask_ratio": 0.25}, {"target_dim": 24}):
        model = make(**kwargs)
        target = torch.randn(2, 16, 24) if "target_dim" in kwargs else None
        model(torch.randn(2, 3, 32, 32), random_mask(2, 16, 12), target, 12)["loss"].backward()
        unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not unused


def test_the_predictor_trains_the_encoder_but_not_the_error_it_predicts():
    model = make()
    out = model(torch.randn(2, 3, 32, 32), random_mask(2, 16, 12), num_masked=12)
    out["loss_learn"].backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert model.decoder_pred.weight.grad is None
    assert model.decoder_blocks[0].attn.qkv.weight.grad is None


def test_the_predictors_head_is_the_mean_of_its_outputs():
    """The mean is taken on the weights; the official code takes it on the outputs."""
    model = make()
    tokens = torch.randn(2, 17, 16)
    x = tokens
    for block in model.decoder_blocks_losspred:
        x = block(x)
    official = model.decoder_pred_losspred(model.decoder_norm_losspred(x)).mean(-1)[:, -12:]
    torch.testing.assert_close(model.forward_loss_predictor(tokens, 12), official, rtol=1e-5, atol=1e-6)


def test_the_teachers_pass_runs_no_reconstructor_and_can_return_tokens():
    model = make()
    for block in model.decoder_blocks:
        block.forward = None  # calling it would raise
    images = torch.randn(2, 3, 32, 32)
    scores, tokens = model.predict_loss(images, return_tokens=True)
    torch.testing.assert_close(tokens, model.forward_encoder(images)[:, 1:])
    torch.testing.assert_close(scores, model.predict_loss(images))


def test_second_masking_replaces_some_visible_tokens():
    model = make(vis_mask_ratio=0.5)
    x = torch.zeros(6, 4, 32)
    model.vis_mask_token.data.fill_(7.0)
    ids = torch.arange(4).expand(6, -1)
    replaced = model.mask_visible_tokens(x, ids)
    token = gather_tokens((model.vis_mask_token + model.pos_embed[:, 1:]).expand(6, -1, -1), ids)
    is_token = (replaced == token).all(-1)
    assert (is_token.sum(1) == 2).all()
    assert (replaced[~is_token] == 0).all()
    assert is_token.float().mean(0).max() < 1  # not the same ones in every image


def test_normalised_pixels():
    model = make(norm_pix_loss=True)
    target = model.make_pixel_target(torch.rand(2, 3, 32, 32))
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.std(-1), torch.ones(2, 16), atol=1e-3, rtol=0)
    grey = model.make_pixel_target(torch.full((1, 3, 32, 32), 0.5))
    assert grey.isfinite().all()


def test_gradient_checkpointing_recomputes_every_block_and_changes_nothing(monkeypatch):
    images, mask = torch.randn(2, 3, 32, 32), random_mask(2, 16, 12)
    gradients, recomputed, original = [], [], models_hpm.checkpoint_activations
    monkeypatch.setattr(
        models_hpm,
        "checkpoint_activations",
        lambda block, *a, **k: recomputed.append(block) or original(block, *a, **k),
    )
    for on in (False, True):
        model = make()
        model.grad_checkpointing = on
        model(images, mask, num_masked=12)["loss"].backward()
        blocks = [*model.blocks, *model.decoder_blocks, *model.decoder_blocks_losspred] if on else []
        assert set(recomputed) == set(blocks)
        gradients.append(model.blocks[0].attn.qkv.weight.grad)
    assert torch.equal(*gradients)


def test_losses_stay_in_float32_under_autocast():
    model, images, mask = make(), torch.randn(2, 3, 32, 32), random_mask(2, 16, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images, mask, num_masked=12)
        scores = model.predict_loss(images)
    for value in (out["loss"], out["patch_loss"], out["loss_pred"], scores):
        assert value.dtype == torch.float32
    assert len(scores.unique()) == scores.numel()  # in bf16, predictions of an image tie
    torch.testing.assert_close(out["loss"], model(images, mask, num_masked=12)["loss"], rtol=0.02, atol=0.02)


def test_decoder_tokens_are_not_rounded_under_autocast():
    """The projection of the visible patches is, positions and mask tokens are not."""
    model, mask = make(), random_mask(2, 16, 12)
    ids, latent = split_mask(mask, 12), torch.randn(2, 5, model.pos_embed.shape[-1])
    expected = model.embed_decoder_tokens(latent, *ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = model.embed_decoder_tokens(latent, *ids)
    assert tokens.dtype == torch.float32
    assert torch.equal(tokens[:, 5:], expected[:, 5:])
    assert not torch.equal(tokens[:, :5], expected[:, :5])


def test_feature_targets_and_their_width_go_together():
    model = make(target_dim=24)
    images, mask = torch.randn(2, 3, 32, 32), random_mask(2, 16, 12)
    target = torch.randn(2, 16, 24)
    out = model(images, mask, target, 12)
    assert out["pred"].shape == (2, 12, 24)
    assert out["patch_loss"].min() >= 0
    assert out["patch_loss"].max() <= 4
    with pytest.raises(AssertionError):
        model(images, mask, None, 12)


@pytest.mark.compile
def test_both_regions_compile_to_one_graph_each():
    torch.compiler.reset()
    model, images, mask = make(), torch.randn(2, 3, 32, 32), random_mask(2, 16, 12)
    eager, scores = model(images, mask, None, 12), model.predict_loss(images)
    student = torch.compile(model, fullgraph=True, backend="aot_eager")
    teacher = torch.compile(model.predict_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(student(images, mask, None, 12)["loss"], eager["loss"])
    torch.testing.assert_close(teacher(images), scores)
