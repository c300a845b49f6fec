"""Exports: opened in the library each is for, they compute what our model does; and what is wrong is not written."""

import ast
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from programs import PRETRAIN, ROOT, checkpoint, log_lines, run
from safetensors.torch import load_file, save_file

import models_hpm
import models_vit
from export import __main__ as export
from export import formats as engine_export
from export import publish
from export.card import read_log
from util.weights import read as foreign
from util.weights.hugging_face import to_hugging_face
from util.weights.load import load_into, load_pretrained

SIZES = {"img_size": 16, "patch_size": 4}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
FINETUNE = ["--shapes_train", 16, "--shapes_val", 8, "--batch_size", 8, "--epochs", 1, "--num_workers", 0]
FILES = {"timm": ".safetensors", "safetensors": ".safetensors", "detectron2": ".pth", "mmseg": ".pth", "onnx": ".onnx"}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A short run of HPM, whose predictor, positions and means are its own."""
    folder = tmp_path_factory.mktemp("pretrained")
    run("main_pretrain", *PRETRAIN, "--lr", 1e-3, "--output_dir", folder, "--mean", *MEAN, "--std", *STD)
    return folder / "checkpoint-last.pth"


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory, pretrained):
    """Fine-tuned on the mean of the patches and on the class token, and a linear probe with two heads."""
    folders = {}
    for name, script, more in [
        ("mean", "main_finetune", ["--lr", 1e-3]),
        ("token", "main_finetune", ["--cls_token", "--lr", 1e-3]),
        ("probe", "main_linprobe", ["--blr", 1, 0.1]),
    ]:
        folders[name] = tmp_path_factory.mktemp(name)
        options = [*FINETUNE, "--warmup_epochs", 0, *more, "--finetune", pretrained, "--output_dir", folders[name]]
        run(script, *options)
    return {name: folder / "checkpoint-last.pth" for name, folder in folders.items()}


def images(size=16, batch=3):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(5))


def encoder_of(path, which="student", name="vit_micro_patch16", **sizes):
    """Our encoder with the weights of a file."""
    model = models_vit.MODELS[name](**(sizes or SIZES), num_classes=0).eval()
    load_into(model, load_pretrained(path, which))
    return model


def assert_equal(theirs, ours, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(theirs), ours, rtol=tolerance, atol=tolerance)


def refused(capsys, *options, status=2):
    """The script ends with a message, and what it says."""
    with pytest.raises(SystemExit) as stop:
        run("export", *options)
    assert stop.value.code == status if status == 2 else str(stop.value.code).startswith("export: error")
    return capsys.readouterr().err if status == 2 else str(stop.value.code)


def from_card(path, folder, **names):
    """What the card's own lines of code give, run in the export's folder."""
    (code,) = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if not line.startswith("#")]) <= 3
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(code, names)
    return names


# ------------------------------------------------------------------------------------------------ each in its library


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
            names = from_card(tmp_path / f"{path.name}.md", tmp_path, images=images())
            assert_equal(names["output"], ours.forward_features(images()))


def test_safetensors_holds_everything(tmp_path, pretrained):
    for which in ("student", "ema"):
        path = tmp_path / f"{which}.safetensors"
        run("export", "--checkpoint", pretrained, "--format", "safetensors", "--which", which, "--output", path)
        original = load_pretrained(pretrained, which)
        found = load_file(path)
        assert found.keys() == original.keys()
        assert all(torch.equal(found[name], original[name]) for name in original)
        assert from_card(tmp_path / f"{path.name}.md", tmp_path)["weights"].keys() == original.keys()
    assert not torch.equal(load_file(tmp_path / "student.safetensors")["norm.bias"], found["norm.bias"])


def photograph():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8))


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
    assert "The loss predictor, which HPM trains beside it, has no place in ViTMAE." in card
    assert "decoder_blocks_losspred (12), decoder_norm_losspred (2), decoder_pred_losspred (2)" in card
    names = from_card(tmp_path / "mae/README.md", tmp_path, image=photograph())
    assert names["output"].logits.shape == (1, 16, 48)


def test_what_is_exported_can_be_exported_again(tmp_path, pretrained):
    """Our own exports are checkpoints that load_pretrained reads, with the encoder they were made from."""
    expected = encoder_of(pretrained).state_dict()
    for name in ("timm", "safetensors", "hf_mae", "hf_vit"):
        pytest.importorskip("transformers")
        path = tmp_path / f"{name}{FILES.get(name, '')}"
        run("export", "--checkpoint", pretrained, "--format", name, "--output", path)
        found = encoder_of(path).state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_onnx(tmp_path, classifiers, monkeypatch):
    """With its weights in a file beside it, as large models have; ViT-B, below, is one file."""
    monkeypatch.setattr(engine_export, "ONNX_LIMIT", 1000)
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
    names = from_card(tmp_path / "c.onnx.md", tmp_path, images=images().numpy())
    assert names["output"].shape == (3, 10)


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
    """MAE's released ViT-B with decoder, with random weights that are nowhere as initialised."""
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
    """It, opened as the script opens it; once, since that takes seconds."""
    return export.open_source(export.resolve_options(parse("--checkpoint", vit_b, "--format", "timm")))


@pytest.mark.xdist_group("ViT-B")
@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_of_vit_b(tmp_path, vit_b, vit_b_source, name):
    path, form = tmp_path / f"{name}.pth", engine_export.FORMATS[name]
    form.write(vit_b_source, path)
    assert engine_export.verify(form, vit_b_source, path) == 0
    found = torch.load(path, weights_only=True)
    found = found["model"] if name == "detectron2" else found
    assert {key: tuple(tensor.shape) for key, tensor in found.items()} == BACKBONES[name]
    weights = load_file(vit_b)
    last = "backbone.net.blocks.11.mlp.fc2.weight" if name == "detectron2" else "layers.11.ffn.layers.1.weight"
    assert torch.equal(found[last], weights["blocks.11.mlp.fc2.weight"])
    assert "pretrain_img_size = 224" in form.usage(vit_b_source, "b.pth") or "init_values=1.0" in form.note(
        vit_b_source
    )
    ast.parse(form.usage(vit_b_source, "b.pth"))


@pytest.mark.xdist_group("ViT-B")
def test_vit_b_in_timm(tmp_path, vit_b):
    """The command of the issue: its name, the file, nothing else but num_classes."""
    run("export", "--checkpoint", vit_b, "--format", "timm", "--output", tmp_path / "b.safetensors")
    theirs = timm.create_model("vit_base_patch16_224", checkpoint_path=str(tmp_path / "b.safetensors"), num_classes=0)
    ours = encoder_of(vit_b, name="vit_base_patch16", img_size=224)
    with torch.no_grad():
        assert_equal(theirs.eval()(images(224, 1)), ours(images(224, 1)))


@pytest.mark.xdist_group("ViT-B")
@pytest.mark.parametrize("name", ["hf_vit", "hf_mae"])
def test_vit_b_elsewhere(tmp_path, vit_b_source, name):
    """By the check of the exports, which opens them as users do; that the check can fail is tested below."""
    pytest.importorskip("transformers")
    written_and_verified(tmp_path / "b", vit_b_source, name, tolerance=1e-5)


def written_and_verified(path, source, name, tolerance):
    form = engine_export.FORMATS[name]
    form.write(source, path)
    assert engine_export.verify(form, source, path) < tolerance  # 0 in some releases: the same kernels


def test_the_epsilon_is_ours(tmp_path):
    """Tokens so small that an epsilon of 1e-12 in place of 1e-6 would change everything."""
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
        patch.setattr(engine_export, "LAYER_NORM_EPS", 1e-12)
        with pytest.raises(SystemExit, match="tokens differ"):
            run("export", "--checkpoint", tmp_path / "small.pth", "--format", "hf_vit", "--output", tmp_path / "wrong")


# -------------------------------------------------------------------------------------------------------- classifiers


def classifier_of(path, global_pool):
    model = models_vit.vit_micro_patch16(**SIZES, num_classes=10, global_pool=global_pool).eval()
    model.load_state_dict(load_pretrained(path), strict=True)
    return model


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
        assert_equal(from_card(tmp_path / "c.pth.md", tmp_path, images=images())["output"], expected)
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
    error = refused(capsys, "--checkpoint", classifiers["mean"], "--format", "hf_vit", "--output", tmp_path / "d")
    assert "the model takes the mean of the patch tokens, ViT of transformers the class token" in error
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("pooling", [False, True])
def test_a_linear_probe_becomes_a_classifier(tmp_path, pretrained, classifiers, pooling, capsys):
    """Batch norm and head are one layer then; of two heads the better one, or that of --head."""
    source = classifiers["probe"]
    if pooling:
        options = ["--global_pool", "--blr", 1, "--warmup_epochs", 0, "--finetune", pretrained]
        run("main_linprobe", *FINETUNE, *options, "--output_dir", tmp_path / "run")
        source = tmp_path / "run/checkpoint-last.pth"
    heads = 1 if pooling else 2
    encoder = models_vit.vit_micro_patch16(**SIZES, num_classes=0, global_pool=pooling)
    fresh = ["fc_norm."] if pooling else []
    left_out = ("decoder", "mask_token", "norm.")
    load_into(encoder, load_pretrained(pretrained), fresh, left_out)
    probe = models_vit.LinearProbe(encoder, heads, 10).eval()
    load_into(probe, load_pretrained(source), fresh=["encoder."])
    best = export.best_head(export.resolve_options(parse("--checkpoint", source, "--format", "timm")))
    for chosen, more in [(best, []), (heads, ["--head", heads])]:
        path = tmp_path / f"{chosen}{len(more)}.pth"
        run("export", "--checkpoint", source, "--format", "timm", "--output", path, *more)
        with torch.no_grad():
            output = from_card(tmp_path / f"{path.name}.md", tmp_path, images=images())["output"]
            assert_equal(output, probe(images())[chosen - 1])
    options = ["--checkpoint", source, "--format", "timm", "--output", tmp_path / "x.pth"]
    assert "has " + f"{heads} heads" in refused(capsys, *options, "--head", 3)
    other = tmp_path / "other.pth"
    torch.save({"model": models_vit.vit_micro_patch16(**SIZES, num_classes=0).state_dict()}, other)
    assert "is not the encoder that" in refused(capsys, *options, "--encoder", other)
    assert not (tmp_path / "x.pth").exists()


def parse(*options):
    return export.get_args_parser().parse_args([str(option) for option in options])


def test_maes_own_probe(tmp_path):
    """MAE's files have batch norm and linear layer as head.0 and head.1."""
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
        output = from_card(tmp_path / "c.pth.md", tmp_path, images=images())["output"]
        assert_equal(output, probe(images())[0])


# ---------------------------------------------------------------------------------------------------- anybody's files


def official_files(folder, pretrained):
    """The same model as official HPM, MAE (with and without decoder), timm and transformers would store it."""
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
    """They do not say what they are: size, patch and grid are read off the weights."""
    pytest.importorskip("transformers")
    expected = encoder_of(pretrained).forward_features(images()).detach()
    for path in official_files(tmp_path, pretrained):
        for name in ("timm", "hf_vit", "detectron2", "mmseg"):
            output = tmp_path / f"{path.stem}-{name}-out{FILES.get(name, '')}"
            run("export", "--checkpoint", path, "--format", name, "--output", output)
            if name in ("timm", "hf_vit"):
                assert_equal(encoder_of(output).forward_features(images()).detach(), expected)
        card = (tmp_path / f"{path.stem}-timm-out.safetensors.md").read_text()
        assert "The checkpoint does not say" in card
        assert "There is no log beside it." in card
    for name in ("hpm", "mae"):
        run("export", "--checkpoint", tmp_path / f"{name}.pth", "--format", "hf_mae")
        assert (tmp_path / f"{name}-hf_mae/config.json").is_file()
    card = (tmp_path / "mae-hf_mae/README.md").read_text()
    assert "loss predictor" not in card
    assert "- hard-patches-mining" not in card
    run("export", "--checkpoint", tmp_path / "hpm.pth", "--format", "timm", "--which", "ema")
    found = load_file(tmp_path / "hpm-ema-timm.safetensors")
    assert torch.equal(found["norm.bias"], load_pretrained(pretrained, "ema")["norm.bias"])


def test_another_size(tmp_path, pretrained, capsys):
    """Positions are fitted as they are for fine-tuning; a decoder's are not."""
    options = ["--checkpoint", pretrained, "--input_size", 24, "--format"]
    run("export", *options, "timm", "--output", tmp_path / "b.pth")
    names = from_card(tmp_path / "b.pth.md", tmp_path, images=images(24))
    ours = encoder_of(pretrained, img_size=24, patch_size=4)
    with torch.no_grad():
        assert_equal(names["output"], ours.forward_features(images(24)))
    assert "the decoder's positions are those of 16 pixels" in refused(capsys, *options, "safetensors")


def test_heads_of_the_decoder_that_were_chosen(tmp_path):
    """Nothing in the weights tells how many there are: the run's options do."""
    pytest.importorskip("transformers")
    run("main_pretrain", *PRETRAIN, "--max_steps", 1, "--decoder_num_heads", 8, "--output_dir", tmp_path)
    run("export", "--checkpoint", tmp_path / "checkpoint-last.pth", "--format", "hf_mae")
    config = json.loads((tmp_path / "checkpoint-last-hf_mae/config.json").read_text())
    assert config["decoder_num_attention_heads"] == 8


def test_decoders_that_predict_features_or_are_not_there(tmp_path, capsys):
    model = models_hpm.mae_vit_micro_patch16(**SIZES, decoder_depth=1, target_dim=32, vis_mask_ratio=0.1)
    torch.save({"model": model.state_dict()}, tmp_path / "features.pth")
    error = refused(capsys, "--checkpoint", tmp_path / "features.pth", "--format", "hf_mae")
    assert "the decoder predicts a teacher's features" in error
    run("export", "--checkpoint", tmp_path / "features.pth", "--format", "timm")
    assert "vis_mask_token (1)" in (tmp_path / "features-timm.safetensors.md").read_text()
    encoder = models_vit.vit_micro_patch16(**SIZES, num_classes=0)
    torch.save(encoder.state_dict(), tmp_path / "encoder.pth")
    error = refused(capsys, "--checkpoint", tmp_path / "encoder.pth", "--format", "hf_mae")
    assert "there is no decoder in the checkpoint" in error


# --------------------------------------------------------------------------------------------------------------- card


def test_the_card_tells_what_the_checkpoint_and_the_log_say(tmp_path, pretrained):
    run("export", "--checkpoint", pretrained, "--format", "mmseg", "--output", tmp_path / "m.pth")
    card = (tmp_path / "m.pth.md").read_text()
    last = log_lines(pretrained.parent)[-1]
    for expected in [
        "Made from the student weights of `checkpoint-last.pth`",
        "| data | Shapes, 48 images drawn by the program |",
        "| epochs | 2 of 2 |",
        f"| train_loss_rec | {last['train_loss_rec']:.5g} |",
        "`init_values=1.0` matters",
        f"| torch | {torch.__version__.split('+')[0]}",
        '"lr": 0.001',
        "- hard-patches-mining",
    ]:
        assert expected in card, expected
    left_out = re.findall(r"## What was left out\n\n(.*)", card)[0]
    assert "decoder_blocks_losspred (12)" in left_out
    assert re.search(r"(^|, )norm \(2\)", left_out)
    assert "cls_token" not in left_out
    assert str(pretrained.parent) not in card  # where things lay is nobody's business
    options = json.loads(re.findall(r"```json\n(.*?)```", card, re.DOTALL)[0])
    assert options["output_dir"] == pretrained.parent.name


def test_figures_are_those_of_the_checkpoint_not_of_later_epochs(tmp_path):
    lines = [json.dumps({"epoch": epoch, "test_acc1": 10.0 * epoch}) for epoch in range(5)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"epoch": 5, "tes')
    assert read_log(tmp_path / "checkpoint-3.pth", 3) == {"test_acc1": 20.0}
    assert read_log(tmp_path / "elsewhere/checkpoint-3.pth", 3) == {}


# -------------------------------------------------------------------------------------------------- what can go wrong


def flipped(monkeypatch, name):
    """One number of the export changed, after it was written and before it is checked."""
    form = engine_export.FORMATS[name]

    def write(source, path):
        form.write(source, path)
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

    changed = engine_export.Format(**{**vars(form), "write": write})
    monkeypatch.setitem(engine_export.FORMATS, name, changed)


@pytest.mark.parametrize("name", engine_export.FORMATS)
def test_an_export_that_went_wrong_is_not_left_behind(tmp_path, pretrained, name, monkeypatch, capsys):
    for package in engine_export.FORMATS[name].needs:
        pytest.importorskip(package)
    flipped(monkeypatch, name)
    path = tmp_path / f"out/it{FILES.get(name, '')}"
    message = refused(capsys, "--checkpoint", pretrained, "--format", name, "--output", path, status=1)
    assert re.search(r"the check of .* failed, nothing was written: .*(differ|has other values)", message)
    assert list((tmp_path / "out").iterdir()) == []


def sabotages():
    """(format, what is done to the module, what the check says)."""
    swap = {"layernorm_before": "norm2", "layernorm_after": "norm1"}
    yield "hf_vit", lambda m: m.setitem(foreign._BLOCK_PARTS, "layernorm_before", "norm3"), "there is no place for"
    yield "hf_vit", lambda m: [m.setitem(foreign._BLOCK_PARTS, *item) for item in swap.items()], "tokens differ"
    yield "hf_mae", lambda m: m.setattr(engine_export, "mae_keeps", lambda source: ["norm.weight"]), "has missing keys"
    yield (
        "timm",
        lambda m: m.setattr(engine_export, "timm_settings", lambda s: ("vit_small_patch16_224", {})),
        "cannot open",
    )
    yield "mmseg", lambda m: m.setattr(engine_export.layouts.Layout, "convert", lambda *_: {}), "is missing"
    lost = {"write_preprocessor": lambda source, folder: None}
    yield "hf_vit", lambda m: [m.setattr(engine_export, *item) for item in lost.items()], "cannot open"


@pytest.mark.parametrize(("name", "sabotage", "message"), list(sabotages()))
def test_faults_of_a_conversion_are_caught(tmp_path, pretrained, name, sabotage, message, monkeypatch, capsys):
    pytest.importorskip("transformers")
    sabotage(monkeypatch)
    path = tmp_path / f"out/it{FILES.get(name, '')}"
    status = 2 if message == "there is no place for" else 1
    error = refused(capsys, "--checkpoint", pretrained, "--format", name, "--output", path, status=status)
    assert re.search(message, error)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("name", "package"), [("hf_mae", "transformers"), ("onnx", "onnxscript")])
def test_a_missing_library_is_named_with_the_command_that_installs_it(pretrained, name, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    for other in engine_export.FORMATS[name].needs:
        if other != package:
            pytest.importorskip(other)
    error = refused(capsys, "--checkpoint", pretrained, "--format", name)
    needed = " ".join(engine_export.FORMATS[name].needs)
    assert f"--format {name} needs {package}" in error
    assert f"pip install {needed}" in error


def test_libraries_are_imported_only_when_asked_for(tmp_path, pretrained):
    code = f"""
import sys, export
export.main(["--checkpoint", {str(pretrained)!r}, "--format", "timm", "--output", {str(tmp_path / "t.pth")!r}])
assert not {{"transformers", "onnx", "onnxscript", "onnxruntime"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_replaced_unasked(tmp_path, pretrained, capsys):
    """The same again is no fault; another output is replaced when asked for; what is not an export never is."""
    options = ["--checkpoint", pretrained, "--format"]
    for name, output in (("timm", tmp_path / "a.pth"), ("hf_vit", tmp_path / "folder")):
        if name == "hf_vit":
            pytest.importorskip("transformers")
        assert "wrote" in run("export", *options, name, "--output", output)
        assert "unchanged" in run("export", *options, name, "--output", output)
        before = content_of(tmp_path)
        error = refused(capsys, *options, name, "--which", "ema", "--output", output)
        assert "is there already, and differs: give --overwrite" in error
        assert content_of(tmp_path) == before
        assert "wrote" in run("export", *options, name, "--which", "ema", "--output", output, "--overwrite")
        found = load_pretrained(output)
        assert torch.equal(found["norm.bias"], load_pretrained(pretrained, "ema")["norm.bias"])
        after = content_of(tmp_path)
        assert after.keys() == before.keys()
        assert after != before
    (tmp_path / "folder/notes.txt").write_text("mine")
    for more in ([], ["--overwrite"]):
        error = refused(capsys, *options, "hf_vit", "--output", tmp_path / "folder", *more)
        assert "holds notes.txt, which is not replaced" in error
    assert (tmp_path / "folder/notes.txt").read_text() == "mine"


def content_of(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "it").mkdir()
    (tmp_path / "it/old").write_text("old")

    def build(path):
        path.mkdir()
        (path / "new").write_text("new")

    replace = publish.os.replace

    def failing(source, target):
        if source.name == "it" and target == tmp_path / "it" and source.parent.name.endswith(".partial"):
            (waiting,) = source.parent.glob("*.replaced") or [None]
            if (source / "new").exists() and waiting:
                raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(publish.os, "replace", failing)
    with pytest.raises(OSError, match="no space left"):
        publish.publish(tmp_path / "it", build, overwrite=True)
    assert content_of(tmp_path) == {str(tmp_path / "it/old"): b"old"}


def test_files_can_be_read_by_whom_the_users_files_can(tmp_path, pretrained):
    run("export", "--checkpoint", pretrained, "--format", "timm", "--output", tmp_path / "a.safetensors")
    (tmp_path / "usual").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode


def wrong_weights(tmp_path):
    """(content, options, message)."""
    good = models_vit.vit_micro_patch16(**SIZES, num_classes=0).state_dict()
    wide = models_vit.VisionTransformer(16, 4, embed_dim=64, depth=2, num_heads=4, num_classes=0).state_dict()
    return [
        ({"model": {"conv1.weight": torch.ones(1)}}, [], "holds no cls_token: it is no ViT of this family"),
        ({"model": wide}, [], "no size of ours has width 64"),
        ({"model": good}, ["--model", "vit_tiny_patch16"], "of another shape: cls_token"),
        ({"model": {**good, "extra": torch.ones(1)}}, [], "unexpected: extra"),
        ({"model": good}, ["--which", "ema"], "holds no EMA teacher"),
        ({"model": good}, ["--input_size", 18], "patch size 4 does not divide an image of 18 x 18"),
        ({"model": good}, ["--head", 1], "--encoder and --head are for the checkpoints of main_linprobe.py"),
        ({"model": good}, ["--output", tmp_path / "a.bin"], "a file of timm ends in .safetensors or .pth"),
        ({"model": good}, ["--output", tmp_path / "0.pth"], "is the checkpoint itself"),
        ({"model": good}, ["--output", tmp_path / "sub.pth"], "is a folder, and this format is a file"),
        ({"model": good}, ["--format", "hf_vitt"], "there is no format 'hf_vitt'; did you mean hf_vit?"),
        ({"epoch": 3}, [], "holds no weights"),
    ]


def test_mistakes_end_in_a_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "sub.pth").mkdir()
    monkeypatch.setattr(export, "publish", lambda *args: pytest.fail("began to write"))
    for content, options, message in wrong_weights(tmp_path):
        torch.save(content, tmp_path / "0.pth")
        error = refused(capsys, "--checkpoint", tmp_path / "0.pth", "--format", "timm", *options)
        assert message in error
        assert error.count("\n") == 1
    assert "there is no checkpoint" in refused(capsys, "--checkpoint", tmp_path / "none.pth", "--format", "timm")
    assert {path.name for path in tmp_path.iterdir()} == {"0.pth", "sub.pth"}


def test_a_probe_whose_encoder_is_gone(tmp_path, classifiers, capsys):
    state = checkpoint(classifiers["probe"].parent)
    state["options"]["finetune"] = "/nowhere.pth"
    torch.save(state, tmp_path / "probe.pth")
    assert "heads alone, and their encoder /nowhere.pth is gone" in refused(
        capsys, "--checkpoint", tmp_path / "probe.pth", "--format", "timm"
    )
