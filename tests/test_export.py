"""Exports opened in their libraries compute what the checkpoint's model computes."""

import pytest
import timm
import torch
from exports import (
    FILES,
    MEAN,
    SIZES,
    STD,
    assert_equal,
    classifier_of,
    classifiers,
    encoder_of,
    evaluation_pixels,
    failed_check,
    from_card,
    images,
    photograph,
    pretrained,
    rejected,
)
from programs import log_lines, run
from safetensors.torch import load_file

import models_hpm
from export import hugging_face, onnx_graph
from util.weights.load import load_into, load_pretrained

__all__ = ["classifiers", "pretrained"]  # fixtures


def test_timm(tmp_path, pretrained):
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"encoder{suffix}"
        log = run("export", "--checkpoint", pretrained, "--format", "timm", "--output", path)
        assert "encoder, vit_micro_patch16, 16 pixels in patches of 4" in log
        settings = {"embed_dim": 128, "depth": 6, "num_heads": 4, "num_classes": 0, **SIZES}
        theirs = timm.create_model("vit_base_patch16_224", checkpoint_path=str(path), **settings).eval()
        ours = encoder_of(pretrained)
        with torch.no_grad():
            assert_equal(theirs.forward_features(images()), ours.forward_features(images()))
            names = from_card(tmp_path / f"{path.name}.md", tmp_path, image=photograph())
            assert_equal(names["output"], ours.forward_features(names["images"]))
            one_level = 1.01 / 255 / min(STD)
            assert_equal(names["images"], evaluation_pixels(photograph()), one_level)


def test_safetensors_contains_every_tensor(tmp_path, pretrained):
    for which in ("student", "ema"):
        path = tmp_path / f"{which}.safetensors"
        run("export", "--checkpoint", pretrained, "--format", "safetensors", "--which", which, "--output", path)
        original = load_pretrained(pretrained, which)
        found = load_file(path)
        assert found.keys() == original.keys()
        assert all(torch.equal(found[name], original[name]) for name in original)
        assert from_card(tmp_path / f"{path.name}.md", tmp_path)["weights"].keys() == original.keys()
    assert not torch.equal(load_file(tmp_path / "student.safetensors")["norm.bias"], found["norm.bias"])


def test_hf_vit(tmp_path, pretrained):
    transformers = pytest.importorskip("transformers")
    run("export", "--checkpoint", pretrained, "--format", "hf_vit", "--output", tmp_path / "vit")
    theirs = transformers.ViTModel.from_pretrained(tmp_path / "vit").eval()
    assert theirs.config.layer_norm_eps == 1e-6
    with torch.no_grad():
        assert_equal(theirs(images()).last_hidden_state, encoder_of(pretrained).forward_features(images()))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "vit")
    assert (list(processor.image_mean), list(processor.image_std)) == (MEAN, STD)
    assert processor(photograph(), return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 16)
    names = from_card(tmp_path / "vit/README.md", tmp_path, image=photograph())
    assert names["output"].last_hidden_state.shape == (1, 17, 128)


def test_a_target_that_contradicts_the_checkpoint(tmp_path, pretrained, capsys):
    message = rejected(
        capsys, "--checkpoint", pretrained, "--format", "hf_mae", "--norm_pix_loss", "--output", tmp_path / "m"
    )
    assert "--norm_pix_loss contradicts" in message
    assert "(target pixel): omit it" in message


def test_statistics_of_bytes(tmp_path, pretrained, capsys):
    given = ["--checkpoint", pretrained, "--format", "timm", "--output", tmp_path / "m.pth"]
    assert "std 58.395 57.12 57.375 lies outside 0..1" in rejected(capsys, *given, "--std", 58.395, 57.12, 57.375)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_hf_mae(tmp_path, pretrained, norm_pix):
    """Encoder and decoder with every patch visible, in the order of a given noise; and the loss of a masked image."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "official.pth"
    torch.save({"model": load_pretrained(pretrained)}, path)
    source = [path, "--norm_pix_loss", "--mask_ratio", 0.5] if norm_pix else [pretrained]
    run("export", "--checkpoint", *source, "--format", "hf_mae", "--output", tmp_path / "mae")
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "mae", mask_ratio=0.0).eval()
    assert theirs.config.layer_norm_eps == 1e-6
    weights = load_pretrained(pretrained)
    ours = models_hpm.build_for("mae_vit_micro_patch16", weights, img_size=16, norm_pix_loss=norm_pix).eval()
    load_into(ours, weights)
    noise = torch.rand(3, 16)
    with torch.no_grad():
        latent = ours.forward_encoder(images())
        ids = noise.argsort(dim=1)
        shuffled = ours.forward_encoder(images(), ids)
        assert_equal(theirs.vit(images(), noise=noise).last_hidden_state, shuffled)
        tokens = ours.decoder_embed(latent) + ours.decoder_pos_embed
        expected = ours.decoder_pred(ours.decoder_norm(ours.run_blocks(ours.decoder_blocks, tokens)))[:, 1:]
        assert_equal(theirs(images(), noise=noise).logits, expected)
        theirs = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "mae").eval()
        assert theirs.config.mask_ratio == (0.5 if norm_pix else 0.75)
        output = theirs(images(), noise=noise)
        assert_equal(output.loss, ours(images(), output.mask.bool())["loss_rec"])
    card = (tmp_path / "mae/README.md").read_text()
    assert "ViTMAE has no loss predictor, so HPM's is not exported." in card
    assert "decoder_blocks_losspred (12), decoder_norm_losspred (2), decoder_pred_losspred (2)" in card
    names = from_card(tmp_path / "mae/README.md", tmp_path, image=photograph())
    assert names["output"].logits.shape == (1, 16, 48)


def test_exports_load_as_checkpoints(tmp_path, pretrained):
    """load_pretrained reads our own exports and finds the encoder they were made from."""
    expected = encoder_of(pretrained).state_dict()
    for name in ("timm", "safetensors", "hf_mae", "hf_vit"):
        pytest.importorskip("transformers")
        path = tmp_path / f"{name}{FILES.get(name, '')}"
        run("export", "--checkpoint", pretrained, "--format", name, "--output", path)
        found = encoder_of(path).state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_onnx(tmp_path, classifiers, monkeypatch):
    """With its weights in a second file, as for large models."""
    monkeypatch.setattr(onnx_graph, "SIZE_LIMIT", 1000)
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "c.onnx"
    run("export", "--checkpoint", classifiers["mean"], "--format", "onnx", "--output", path)
    assert {file.name for file in tmp_path.glob("*.*")} == {"c.onnx", "c.onnx.data", "c.onnx.md"}
    session = onnxruntime.InferenceSession(str(path))
    ours = classifier_of(classifiers["mean"], global_pool=True)
    for batch in (1, 4):
        with torch.no_grad():
            theirs = session.run(["logits"], {"images": images(batch=batch).numpy()})[0]
            assert_equal(theirs, ours(images(batch=batch)), 1e-4)
    names = from_card(tmp_path / "c.onnx.md", tmp_path, images=images())
    assert names["output"].shape == (3, 10)


def test_layer_norm_epsilon(tmp_path):
    """Tokens are so small that an epsilon of 1e-12 instead of 1e-6 changes the outputs."""
    pytest.importorskip("transformers")
    model = models_hpm.mae_vit_micro_patch16(**SIZES, decoder_depth=1, learning_loss=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("patch_embed", "cls_token", "pos_embed", "decoder_embed", "decoder_pos_embed")):
                parameter.mul_(1e-3)
    torch.save({"model": model.state_dict()}, tmp_path / "small.pth")
    for name in ("hf_mae", "hf_vit", "timm"):
        output = tmp_path / f"{name}{FILES.get(name, '')}"
        assert "wrote" in run("export", "--checkpoint", tmp_path / "small.pth", "--format", name, "--output", output)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hugging_face, "LAYER_NORM_EPS", 1e-12)
        options = ["--checkpoint", tmp_path / "small.pth", "--format", "hf_vit", "--output", tmp_path / "wrong"]
        assert "tokens differ" in failed_check(*options)


@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_fine_tuned_models_in_timm(tmp_path, classifiers, pooling):
    source, path = classifiers[pooling], tmp_path / "c.pth"
    log = run("export", "--checkpoint", source, "--format", "timm", "--output", path)
    assert (
        f"classifier of 10 classes on the {'mean of the patch tokens' if pooling == 'mean' else 'class token'}" in log
    )
    settings = {"embed_dim": 128, "depth": 6, "num_heads": 4, "num_classes": 10, **SIZES}
    settings |= {"global_pool": "avg"} if pooling == "mean" else {}
    theirs = timm.create_model("vit_base_patch16_224", checkpoint_path=str(path), **settings).eval()
    with torch.no_grad():
        expected = classifier_of(source, pooling == "mean")(images())
        assert_equal(theirs(images()), expected)
        names = from_card(tmp_path / "c.pth.md", tmp_path, image=photograph())
        assert_equal(names["output"], classifier_of(source, pooling == "mean")(names["images"]))
    card = (tmp_path / "c.pth.md").read_text()
    assert f"| test_acc1 | {log_lines(source.parent)[-1]['test_acc1']:.5g} |" in card
    assert "library_name: timm" in card


def test_fine_tuned_models_in_transformers(tmp_path, classifiers, capsys):
    transformers = pytest.importorskip("transformers")
    run("export", "--checkpoint", classifiers["token"], "--format", "hf_vit", "--output", tmp_path / "c")
    theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path / "c").eval()
    with torch.no_grad():
        assert_equal(theirs(images()).logits, classifier_of(classifiers["token"], False)(images()))
    assert from_card(tmp_path / "c/README.md", tmp_path, image=photograph())["output"].logits.shape == (1, 10)
    error = rejected(capsys, "--checkpoint", classifiers["mean"], "--format", "hf_vit", "--output", tmp_path / "d")
    assert "the model pools the mean of the patch tokens, ViT of transformers the class token" in error
    assert not (tmp_path / "d").exists()
