"""Checkpoints that can be exported: linear probes, other projects' files, other sizes; and those that are rejected."""

import json

import pytest
import torch
from exports import (
    FILES,
    FINETUNE,
    SIZES,
    assert_equal,
    classifiers,
    encoder_of,
    from_card,
    images,
    photograph,
    pretrained,
    rejected,
)
from programs import PRETRAIN, checkpoint, run
from safetensors.torch import load_file, save_file

import models_hpm
import models_load
import models_vit
from export import __main__ as export
from util.weights.hugging_face import to_hugging_face
from util.weights.load import load_into, load_pretrained, read_meta

__all__ = ["classifiers", "pretrained"]  # fixtures


@pytest.mark.parametrize("pooling", [False, True])
def test_a_linear_probe_becomes_a_classifier(tmp_path, pretrained, classifiers, pooling, capsys):
    """Batch norm and head become one layer: the best of two heads, or that of --head."""
    source = classifiers["probe"]
    if pooling:
        options = ["--global_pool", "--blr", 1, "--warmup_epochs", 0, "--finetune", pretrained]
        run("main_linprobe", *FINETUNE, *options, "--output_dir", tmp_path / "run")
        source = tmp_path / "run/checkpoint-last.pth"
    heads = 1 if pooling else 2
    encoder = models_vit.vit_micro_patch16(**SIZES, num_classes=0, global_pool=pooling)
    unused = ("decoder", "mask_token", "norm.")
    load_into(encoder, load_pretrained(pretrained), ["fc_norm."] if pooling else [], unused)
    probe = models_vit.LinearProbe(encoder, heads, 10).eval()
    load_into(probe, load_pretrained(source), ["encoder."])
    best = models_load.best_head(source, read_meta(source))
    for chosen, more in [(best, []), (heads, ["--head", heads])]:
        path = tmp_path / f"{chosen}{len(more)}.pth"
        run("export", "--checkpoint", source, "--format", "timm", "--output", path, *more)
        with torch.no_grad():
            names = from_card(tmp_path / f"{path.name}.md", tmp_path, image=photograph())
            assert_equal(names["output"], probe(names["images"])[chosen - 1])
    options = ["--checkpoint", source, "--format", "timm", "--output", tmp_path / "x.pth"]
    assert "has " + f"{heads} heads" in rejected(capsys, *options, "--head", 3)
    other = tmp_path / "other.pth"
    torch.save({"model": models_vit.vit_micro_patch16(**SIZES, num_classes=0).state_dict()}, other)
    assert "is not the encoder that" in rejected(capsys, *options, "--encoder", other)
    assert not (tmp_path / "x.pth").exists()


def test_maes_own_probe(tmp_path):
    """MAE stores batch norm and linear layer as head.0 and head.1."""
    encoder = models_vit.vit_micro_patch16(**SIZES, num_classes=0)
    probe = models_vit.LinearProbe(encoder, 1, 7).eval()
    with torch.no_grad():
        probe.norm.running_mean.normal_()
        probe.norm.running_var.uniform_(0.5, 2)
        probe.heads[0].bias.normal_()
    state = {**encoder.state_dict(), "head.0.num_batches_tracked": torch.tensor(5)}
    state |= {f"head.0.{name}": tensor for name, tensor in probe.norm.state_dict().items()}
    state |= {f"head.1.{name}": tensor for name, tensor in probe.heads[0].state_dict().items()}
    torch.save({"model": state}, tmp_path / "linprobe.pth")
    run("export", "--checkpoint", tmp_path / "linprobe.pth", "--format", "timm", "--output", tmp_path / "c.pth")
    with torch.no_grad():
        names = from_card(tmp_path / "c.pth.md", tmp_path, image=photograph())
        assert_equal(names["output"], probe(names["images"])[0])


def test_probe_whose_encoder_is_missing(tmp_path, classifiers, capsys):
    state = checkpoint(classifiers["probe"].parent)
    state["options"]["finetune"] = "/nowhere.pth"
    torch.save(state, tmp_path / "probe.pth")
    assert "contains only heads, and their encoder /nowhere.pth is gone" in rejected(
        capsys, "--checkpoint", tmp_path / "probe.pth", "--format", "timm"
    )


def official_files(folder, pretrained):
    """One model as stored by official HPM, MAE (with and without decoder), timm and transformers."""
    student, teacher = (load_pretrained(pretrained, which) for which in ("student", "ema"))
    encoder = {k: v for k, v in student.items() if not k.startswith(("decoder", "mask_token"))}
    files = {
        "hpm": {
            "model": "mae_vit_base_patch16_dec512d8b",
            "epoch": 2,
            "state_dict": {f"module.{k}": v for k, v in student.items()},
            "ema_state_dict": {f"module.{k}": v for k, v in teacher.items()},
        },
        "mae": {"model": {k: v for k, v in student.items() if "losspred" not in k}, "epoch": 1},
        "mae_encoder": {"model": encoder},
        "timm": encoder,
    }
    for name, content in files.items():
        torch.save(content, folder / f"{name}.pth")
        yield folder / f"{name}.pth"
    (folder / "hf").mkdir()
    weights = {name: tensor.contiguous() for name, tensor in to_hugging_face(encoder, prefix="").items()}
    save_file(weights, folder / "hf/model.safetensors")
    yield folder / "hf"


def test_official_files(tmp_path, pretrained):
    """They record no sizes: model, patch size and grid are read off the weights."""
    pytest.importorskip("transformers")
    expected = encoder_of(pretrained).forward_features(images()).detach()
    for path in official_files(tmp_path, pretrained):
        for name in ("timm", "hf_vit", "detectron2", "mmseg"):
            output = tmp_path / f"{path.stem}-{name}-out{FILES.get(name, '')}"
            run("export", "--checkpoint", path, "--format", name, "--output", output)
            if name in ("timm", "hf_vit"):
                assert_equal(encoder_of(output).forward_features(images()).detach(), expected)
        card = (tmp_path / f"{path.stem}-timm-out.safetensors.md").read_text()
        assert "The checkpoint does not record it" in card
        assert "## Metrics" not in card
    for name in ("hpm", "mae"):
        run("export", "--checkpoint", tmp_path / f"{name}.pth", "--format", "hf_mae")
        assert (tmp_path / f"{name}-hf_mae/config.json").is_file()
    card = (tmp_path / "mae-hf_mae/README.md").read_text()
    assert "no loss predictor" not in card
    assert "- hard-patches-mining" not in card
    run("export", "--checkpoint", tmp_path / "hpm.pth", "--format", "timm", "--which", "ema")
    found = load_file(tmp_path / "hpm-ema-timm.safetensors")
    assert torch.equal(found["norm.bias"], load_pretrained(pretrained, "ema")["norm.bias"])


def test_another_size(tmp_path, pretrained, capsys):
    """Position embeddings are resized as for fine-tuning, but not the decoder's."""
    options = ["--checkpoint", pretrained, "--input_size", 24, "--format"]
    run("export", *options, "timm", "--output", tmp_path / "b.pth")
    names = from_card(tmp_path / "b.pth.md", tmp_path, image=photograph())
    ours = encoder_of(pretrained, img_size=24, patch_size=4)
    with torch.no_grad():
        assert_equal(names["output"], ours.forward_features(names["images"]))
    assert names["images"].shape == (1, 3, 24, 24)
    assert "the decoder's position embeddings are for 16 pixels" in rejected(capsys, *options, "safetensors")


def test_number_of_decoder_heads(tmp_path):
    """It comes from the recorded options; the weights do not show it."""
    pytest.importorskip("transformers")
    run("main_pretrain", *PRETRAIN, "--max_steps", 1, "--decoder_num_heads", 8, "--output_dir", tmp_path)
    run("export", "--checkpoint", tmp_path / "checkpoint-last.pth", "--format", "hf_mae")
    config = json.loads((tmp_path / "checkpoint-last-hf_mae/config.json").read_text())
    assert config["decoder_num_attention_heads"] == 8


def test_decoders_of_features_and_missing_decoders(tmp_path, capsys):
    model = models_hpm.mae_vit_micro_patch16(**SIZES, decoder_depth=1, target_dim=32, vis_mask_ratio=0.1)
    torch.save({"model": model.state_dict()}, tmp_path / "features.pth")
    error = rejected(capsys, "--checkpoint", tmp_path / "features.pth", "--format", "hf_mae")
    assert "the decoder predicts another target than ViTMAE's pixels" in error
    run("export", "--checkpoint", tmp_path / "features.pth", "--format", "timm")
    assert "vis_mask_token (1)" in (tmp_path / "features-timm.safetensors.md").read_text()
    encoder = models_vit.vit_micro_patch16(**SIZES, num_classes=0)
    torch.save(encoder.state_dict(), tmp_path / "encoder.pth")
    error = rejected(capsys, "--checkpoint", tmp_path / "encoder.pth", "--format", "hf_mae")
    assert "the checkpoint has no decoder" in error


def wrong_weights(tmp_path):
    """(content, options, message)."""
    good = models_vit.vit_micro_patch16(**SIZES, num_classes=0).state_dict()
    wide = models_vit.VisionTransformer(16, 4, embed_dim=64, depth=2, num_heads=4, num_classes=0).state_dict()
    return [
        ({"model": {"conv1.weight": torch.ones(1)}}, [], "has no cls_token: it is not a ViT of this family"),
        ({"model": wide}, [], "no model has its depth and width 64"),
        ({"model": good}, ["--model", "vit_tiny_patch16"], "shape mismatch: cls_token"),
        ({"model": {**good, "extra": torch.ones(1)}}, [], "unexpected: extra"),
        ({"model": good}, ["--which", "ema"], "has no EMA teacher"),
        ({"model": good}, ["--input_size", 18], "patch size 4 does not divide an image of 18 x 18"),
        ({"model": good}, ["--head", 1], "--encoder and --head apply only to checkpoints of main_linprobe.py"),
        ({"model": good}, ["--output", tmp_path / "a.bin"], "a timm file ends in .safetensors or .pth"),
        ({"model": good}, ["--output", tmp_path / "0.pth"], "is the checkpoint itself"),
        ({"model": good}, ["--output", tmp_path / "sub.pth"], "is a folder, but this format is a file"),
        ({"model": good}, ["--format", "hf_vitt"], "unknown value 'hf_vitt'; did you mean hf_vit?"),
        ({"epoch": 3}, [], "contains no weights"),
    ]


def test_mistakes_end_in_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "sub.pth").mkdir()
    monkeypatch.setattr(export, "publish", lambda *args: pytest.fail("started to write"))
    for content, options, message in wrong_weights(tmp_path):
        torch.save(content, tmp_path / "0.pth")
        error = rejected(capsys, "--checkpoint", tmp_path / "0.pth", "--format", "timm", *options)
        assert message in error
        assert error.count("\n") == 1
    assert "does not exist" in rejected(capsys, "--checkpoint", tmp_path / "none.pth", "--format", "timm")
    assert {path.name for path in tmp_path.iterdir()} == {"0.pth", "sub.pth"}
