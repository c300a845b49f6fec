import pytest
import torch
from programs import on_ranks
from test_distributed import in_a_group

import models_hpm
import models_vit
from models_vit import FeatureNorm, LinearProbe, VisionTransformer
from util.run.distributed import World
from util.weights.load import load_into
from util.weights.meta import classifier_name

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def test_names_of_maes_fine_tuning_vit():
    pooled = set(VisionTransformer(**SMALL, global_pool=True).state_dict())
    token = set(VisionTransformer(**SMALL, global_pool=False).state_dict())
    assert pooled - token == {"fc_norm.weight", "fc_norm.bias"}
    assert token - pooled == {"norm.weight", "norm.bias"}


def test_every_pretraining_size_has_its_classifier():
    with torch.device("meta"):
        for name, build in models_hpm.MODELS.items():
            classifier = models_vit.MODELS[classifier_name(name)]
            encoder = {k: v.shape for k, v in build().state_dict().items() if k.startswith("blocks")}
            assert encoder == {k: v.shape for k, v in classifier().state_dict().items() if k.startswith("blocks")}


def test_the_encoder_is_that_of_pretraining():
    """The same weights give the same tokens, whichever model they are in."""
    mae = models_hpm.mae_vit_micro_patch16(img_size=32, patch_size=8).eval()
    vit = models_vit.vit_micro_patch16(img_size=32, patch_size=8, num_classes=0).eval()
    load_into(vit, mae.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(vit.forward_features(images), mae.forward_encoder(images), rtol=1e-5, atol=1e-5)


def test_pooling():
    model = VisionTransformer(**SMALL, num_classes=0, global_pool=True).eval()
    images = torch.randn(2, 3, 32, 32)
    tokens = model.forward_features(images)[:, 1:]
    torch.testing.assert_close(model(images), torch.nn.functional.layer_norm(tokens.mean(1), (32,), eps=1e-6))
    model = VisionTransformer(**SMALL, num_classes=0, global_pool=False).eval()
    torch.testing.assert_close(model(images), model.forward_features(images)[:, 0])


def test_drop_path_grows_from_the_first_block_to_the_last():
    rates = [
        getattr(block.drop_path1, "drop_prob", 0.0)
        for block in VisionTransformer(**{**SMALL, "depth": 5}, drop_path_rate=0.2).blocks
    ]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def test_a_size_that_the_patch_does_not_divide():
    with pytest.raises(ValueError, match="patch size 8 does not divide an image of 30 x 32"):
        VisionTransformer(**{**SMALL, "img_size": (30, 32)})


def test_non_square_images_and_other_channels():
    model = VisionTransformer(**{**SMALL, "img_size": (16, 40)}, in_chans=1, num_classes=4)
    assert model(torch.randn(2, 1, 16, 40)).shape == (2, 4)


def test_feature_norm_is_batch_norm_without_parameters():
    ours, reference = FeatureNorm(8), torch.nn.BatchNorm1d(8, affine=False, eps=1e-6)
    for _ in range(3):
        x = torch.randn(16, 8) * 3 + 1
        torch.testing.assert_close(ours(x), reference(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.running_mean, reference.running_mean)
    torch.testing.assert_close(ours.running_var, reference.running_var)
    ours.eval(), reference.eval()
    torch.testing.assert_close(ours(x), reference(x), rtol=1e-4, atol=1e-5)


def test_feature_norm_of_a_single_image_stays_finite():
    norm = FeatureNorm(8)
    assert norm(torch.randn(1, 8)).isfinite().all()
    assert norm.running_mean.isfinite().all()
    assert norm.running_var.isfinite().all()


def test_the_probe_leaves_its_encoder_alone():
    encoder = VisionTransformer(**SMALL, num_classes=0, drop_path_rate=0.5)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    probe = LinearProbe(encoder, num_heads=3, num_classes=5).train()
    assert not encoder.training
    optimizer = torch.optim.SGD([p for p in probe.parameters() if p.requires_grad], lr=0.1)
    logits = probe(torch.randn(4, 3, 32, 32))
    assert logits.shape == (3, 4, 5)
    logits.square().sum().backward()
    optimizer.step()
    assert all(p.grad is None for p in encoder.parameters())
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())


def normalise_a_part(world):
    norm = FeatureNorm(8)
    features = 3 * torch.randn(16, 8, generator=torch.Generator().manual_seed(0)) + 1
    return [
        tensor.tolist() for tensor in (norm(features[world.rank :: world.size]), norm.running_mean, norm.running_var)
    ]


def test_the_norm_of_a_probe_has_the_statistics_of_all_ranks():
    whole, *statistics = normalise_a_part(World(0, 1, 0, 1))
    for rank, (part, *of_rank) in enumerate(on_ranks(in_a_group, normalise_a_part)):
        torch.testing.assert_close(torch.tensor(part), torch.tensor(whole[rank::2]))
        torch.testing.assert_close(torch.tensor(of_rank), torch.tensor(statistics))
