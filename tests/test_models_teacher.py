"""Frozen targets: the weights of each format give the tokens of the network they came from."""

import argparse
from functools import partial

import pytest
import timm
import torch
from programs import checkpoint, log_lines, run
from safetensors.torch import save_file

from models_teacher import KINDS, FrozenTeacher, build_teacher, read_teacher

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """Two blocks instead of twelve; the recipes' tests train with a whole one."""
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=2))


@pytest.fixture
def networks(shallow):
    """timm's two networks with random weights that are not the initial ones everywhere."""
    torch.manual_seed(0)
    made = {}
    for kind, settings in KINDS.items():
        network = timm.create_model(settings.timm_name, pretrained=False).eval()
        for parameter in network.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.02)
        if kind == "clip":
            network.head.bias.data.zero_()  # OpenAI's projection has none
        made[kind] = network
    return made


def openai_names(state_dict):
    """A CLIP state dict as OpenAI's model gives it: the visual half renamed back, and something of the text half."""
    out = {
        "text_projection": torch.ones(512, 512),
        "logit_scale": torch.tensor(1.0),
        "positional_embedding": torch.ones(77, 512),
    }
    out |= {"transformer.resblocks.0.ln_1.weight": torch.ones(512), "token_embedding.weight": torch.ones(10, 512)}
    swaps = [
        ("patch_embed.proj", "conv1"),
        ("norm_pre", "ln_pre"),
        ("attn.proj", "attn.out_proj"),
        ("attn.qkv.", "attn.in_proj_"),
    ]
    swaps += [("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("norm1", "ln_1"), ("norm2", "ln_2")]
    for name, value in state_dict.items():
        if name == "head.weight":
            out["visual.proj"] = value.T.contiguous()
        elif name == "cls_token":
            out["visual.class_embedding"] = value[0, 0]
        elif name == "pos_embed":
            out["visual.positional_embedding"] = value[0]
        elif name.startswith("norm."):
            out[f"visual.ln_post.{name[5:]}"] = value
        elif name != "head.bias":
            for ours, theirs in swaps:
                name = name.replace(ours, theirs)
            out["visual." + name.replace("blocks.", "transformer.resblocks.")] = value
    return out


def formats(kind, network, folder):
    weights = network.state_dict()
    if kind == "dino":
        head = {"head.mlp.0.weight": torch.ones(4, 768), "head.last_layer.weight_g": torch.ones(4)}
        full = {f"backbone.{k}": v for k, v in weights.items()} | head
        student = {f"module.backbone.{k}": v + 1 for k, v in weights.items()}
        contents = {
            "backbone": weights,
            "full": {"teacher": full, "student": student, "args": argparse.Namespace(arch="vit_base"), "epoch": 400},
            "classifier": {**weights, "head.weight": torch.ones(1000, 768), "head.bias": torch.ones(1000)},
        }
    else:
        contents = {"openai": openai_names(weights), "wrapped": {"state_dict": weights}}
        contents["half"] = {k: v.half() for k, v in openai_names(weights).items()}
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pth")
        yield folder / f"{name}.pth"
    save_file({k: v.contiguous() for k, v in weights.items()}, str(folder / "timm.safetensors"))
    yield folder / "timm.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_tokens(kind, networks, tmp_path):
    network, settings = networks[kind], KINDS[kind]
    images = torch.randn(1, 3, 224, 224)
    colours = [torch.tensor(c).view(1, 3, 1, 1) for c in (*IMAGENET, settings.mean, settings.std)]
    with torch.no_grad():
        recoloured = (images * colours[1] + colours[0] - colours[2]) / colours[3]
        expected = network.head(network.forward_features(recoloured)[:, 1:])
    assert expected.shape == (1, 196, settings.width)
    for path in formats(kind, network, tmp_path):
        teacher, report = build_teacher(kind, read_teacher(str(path)), *IMAGENET)
        loose = path.name == "half.pth"
        torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=0.02 if loose else 1e-4, msg=path.name)
        assert "newly initialised  none" in report


def test_the_teacher_is_frozen():
    teacher = FrozenTeacher("dino", *IMAGENET)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


def test_wrong_weights_are_rejected(networks, tmp_path):
    torch.save({"model": timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="shape mismatch"):
        build_teacher("dino", read_teacher(str(tmp_path / "a.pth")), *IMAGENET)
    incomplete = {k: v for k, v in networks["clip"].state_dict().items() if k != "head.weight"}
    torch.save(incomplete, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="missing: head.weight"):
        build_teacher("clip", read_teacher(str(tmp_path / "b.pth")), *IMAGENET)
    torch.save({**openai_names(networks["clip"].state_dict()), "adapter": torch.ones(1)}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match="unexpected keys in the CLIP state dict: adapter"):
        build_teacher("clip", read_teacher(str(tmp_path / "c.pth")), *IMAGENET)
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), str(tmp_path / "clip.pt"))
    with pytest.raises(ValueError, match="TorchScript archive.*convert it once"):
        read_teacher(str(tmp_path / "clip.pt"))


def test_without_path_and_connection_the_error_says_what_to_give(monkeypatch):
    def offline(name, pretrained=False, **kwargs):
        if pretrained:
            raise OSError("no route to host")
        return create(name, pretrained=False, **kwargs)

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match="cannot be downloaded .*: set --clip_path"):
        build_teacher("clip", read_teacher(""), *IMAGENET)


FIXED_BATCH = [
    *["--model", "mae_vit_micro_patch16", "--decoder_depth", 1, "--shapes_train", 2, "--batch_size", 2],
    *["--num_workers", 0, "--epochs", 6, "--warmup_epochs", 0, "--lr", "3e-3", "--log_interval", 1],
    *["--vis_interval", 0],
]


@pytest.mark.parametrize("target", ["ema", "dino", "clip"])
def test_each_target_trains_on_a_fixed_batch(target, networks, tmp_path):
    """Six steps on the same two images at 224 pixels: the loss falls."""
    more = []
    if target != "ema":
        torch.save(networks[target].state_dict(), tmp_path / "teacher.pth")
        more = [f"--{target}_path", tmp_path / "teacher.pth"]
    if target == "dino":
        more += ["--score_by", "loss", "--alpha_0", 0.5]  # of the features: as wide as a patch of pixels here
    run("main_pretrain", *FIXED_BATCH, "--target", target, *more, "--output_dir", tmp_path / "run")
    losses = [line["train_loss_rec"] for line in log_lines(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0]
    assert 0 < losses[-1] < losses[0] < 4  # 2 - 2 cos
    width = {"ema": 128, "dino": 768, "clip": 512}[target]
    assert len(checkpoint(tmp_path / "run")["state_dict"]["decoder_pred.weight"]) == width


def test_the_ema_target_needs_no_predictor_and_no_second_pass(tmp_path, monkeypatch):
    import models_hpm

    passes = []
    encode_all = models_hpm.MaskedAutoencoderViT.forward_encoder

    def count(self, imgs, ids_visible=None):
        passes.append("teacher" if ids_visible is None else "student")
        return encode_all(self, imgs, ids_visible)

    monkeypatch.setattr(models_hpm.MaskedAutoencoderViT, "forward_encoder", count)
    small = ["--model", "mae_vit_micro_patch16", "--input_size", 16, "--patch_size", 4, "--shapes_train", 16]
    small += ["--batch_size", 8, "--epochs", 1, "--num_workers", 0, "--target", "ema", "--vis_interval", 0]
    for name, more in (("hpm", []), ("plain", ["--no-learning_loss"])):
        passes.clear()
        run("main_pretrain", *small, *more, "--output_dir", tmp_path / name)
        assert passes == ["teacher", "student"] * 2
    assert "ema_state_dict" in checkpoint(tmp_path / "plain")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--target dino --input_size 32 --patch_size 4",
            "is a network of patch size 16 at 224 pixels: give --input_size 224",
        ),
        ("--target ema --norm_pix_loss", "--target and --norm_pix_loss name different targets (ema, norm_pixel)"),
        ("--learn_feature_loss dino --target clip", "--target and --learn_feature_loss name different targets"),
        ("--dino_path x.pth", "--dino_path is for --target dino, the target is pixel"),
        ("--learn_feature_loss clip --clip_path /nowhere.pt", "checkpoint /nowhere.pt does not exist"),
    ],
)
def test_targets_that_cannot_be(options, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run("main_pretrain", *options.split(), "--output_dir", tmp_path)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
