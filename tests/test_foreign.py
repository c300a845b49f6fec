"""Foreign files are untrusted: no code in them runs, and errors name the fix."""

import argparse
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import models_hpm
import models_vit
from util.weights.hugging_face import from_hugging_face, is_hugging_face, to_hugging_face
from util.weights.load import DECODERS, load_into, load_pretrained, read_meta
from util.weights.read import read_file


class Dangerous:
    """Pickled code, which leaves a file if it runs."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return eval, (f"__import__('pathlib').Path({str(self.trace)!r}).touch()",)


def test_a_namespace_is_the_only_class_allowed(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=0.1)}, tmp_path / "mae.pth")
    assert torch.equal(load_pretrained(tmp_path / "mae.pth")["w"], torch.ones(2))


def test_pickled_code_is_rejected_with_its_conversion(tmp_path):
    path = tmp_path / "bad.pth"
    torch.save({"model": {"w": torch.ones(2)}, "x": Dangerous(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match=r"contains pickled objects other than tensors.*eval.*convert it once"):
        read_file(path)
    with open(path, "wb") as file:
        pickle.dump(Dangerous(tmp_path / "ran"), file)
    with pytest.raises(ValueError, match=r"pickled objects|not written by torch.save"):
        read_file(path)
    assert not (tmp_path / "ran").exists()


def test_a_torchscript_archive_is_rejected_with_its_conversion(tmp_path):
    path = tmp_path / "clip.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), str(path))
    with pytest.raises(ValueError, match=r"TorchScript archive.*\n  import torch\n  model = torch.jit.load"):
        read_file(path)


def test_safetensors(tmp_path):
    save_file({"w": torch.arange(3.0)}, str(tmp_path / "a.safetensors"))
    assert torch.equal(load_pretrained(tmp_path / "a.safetensors")["w"], torch.arange(3.0))
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[:-4])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        read_file(tmp_path / "a.safetensors")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 and then nothing", pickle.dumps([1, 2])])
def test_a_file_that_is_not_a_checkpoint_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pth"):
        read_file(tmp_path / "a.pth")


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ValueError, match="checkpoint .* does not exist"):
        read_file(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="folder without model.safetensors or pytorch_model.bin"):
        read_file(tmp_path)


def test_the_format_before_torch_1_6_is_read(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(load_pretrained(tmp_path / "old.pth")["w"], torch.ones(2))


def test_a_flipped_byte_is_detected(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"w": torch.zeros(1000)}, path)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = next(i for i in archive.infolist() if i.file_size == 4000)
    data[info.header_offset + 2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        read_file(path)


def test_metadata_are_read_without_the_tensors_and_verified(tmp_path):
    path = tmp_path / "a.pth"
    options = {"epochs": 123456789}
    content = {"format": "hpm", "script": "s", "model": "m", "epoch": 3, "step": 0, "options": options, "image": {}}
    torch.save({**content, "w": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        tensor = next(i for i in archive.infolist() if i.file_size == 4000)
    places = {"tensor": tensor.header_offset + 2000, "options": whole.index((123456789).to_bytes(4, "little"))}
    for name, place in places.items():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        if name == "tensor":
            assert read_meta(path)["options"] == options
        else:
            with pytest.raises(ValueError, match="damaged"):
                read_meta(path)
        with pytest.raises(ValueError, match="damaged"):
            read_file(path)
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_meta(tmp_path / "old.pth")["options"] == options


def hugging_face(prefix="vit.", decoder="decoder.decoder_layers.0"):
    """Names of a ViTMAE with one block and one decoder block, each tensor with a value of its own."""
    names = [f"{prefix}embeddings.{n}" for n in ("cls_token", "position_embeddings")]
    names += [f"{prefix}embeddings.patch_embeddings.projection.{k}" for k in ("weight", "bias")]
    for block in (f"{prefix}encoder.layer.0", decoder):
        parts = [f"attention.attention.{n}" for n in ("query", "key", "value")]
        parts += ["attention.output.dense", "intermediate.dense", "output.dense", "layernorm_before", "layernorm_after"]
        names += [f"{block}.{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    names += [f"{prefix}layernorm.{k}" for k in ("weight", "bias")]
    names += ["decoder.mask_token", "decoder.decoder_pos_embed"]
    names += [f"decoder.{n}.{k}" for n in ("decoder_embed", "decoder_norm", "decoder_pred") for k in ("weight", "bias")]
    return {name: torch.full((2,), float(i)) for i, name in enumerate(names)}


@pytest.mark.parametrize("decoder", ["decoder.decoder_layers.0", "decoder.decoder_encoder.layer.0"])
def test_hugging_face_names_become_maes(decoder):
    """Names of released files, and those that newer versions of transformers write."""
    source = hugging_face(decoder=decoder)
    assert is_hugging_face(source)
    ours = from_hugging_face(source)
    assert ours["pos_embed"][0] == source["vit.embeddings.position_embeddings"][0]
    query, key, value = (
        source[f"vit.encoder.layer.0.attention.attention.{n}.weight"] for n in ("query", "key", "value")
    )
    assert torch.equal(ours["blocks.0.attn.qkv.weight"], torch.cat([query, key, value]))
    assert torch.equal(ours["decoder_blocks.0.mlp.fc2.bias"], source[f"{decoder}.output.dense.bias"])
    assert torch.equal(ours["decoder_pred.bias"], source["decoder.decoder_pred.bias"])
    assert len(ours) == len(source) - 8  # query, key and value concatenated, weight and bias, in two blocks
    assert not is_hugging_face(ours)


@pytest.mark.parametrize("prefix", ["vit.", ""])
def test_maes_names_become_hugging_faces_and_back(prefix):
    """The released names, and the same tensors after the round trip."""
    source = {name: torch.randn(3, 2) for name in hugging_face() if prefix or not name.startswith("decoder.")}
    if not prefix:
        source = {name.removeprefix("vit."): tensor for name, tensor in source.items()}
    there = to_hugging_face(from_hugging_face(source), prefix)
    assert there.keys() == source.keys()
    assert all(torch.equal(there[name], source[name]) for name in source)
    head = to_hugging_face({"head.weight": torch.ones(1), "cls_token": torch.ones(1)}, prefix)
    assert set(head) == {"classifier.weight", f"{prefix}embeddings.cls_token"}
    for name in ("fc_norm.weight", "blocks.0.ls1.weight", "decoder_norm_losspred.bias", "vis_mask_token"):
        with pytest.raises(ValueError, match=f"{name} has no counterpart"):
            to_hugging_face({name: torch.ones(1)})


def test_unknown_hugging_face_names_are_an_error():
    with pytest.raises(ValueError, match=r"unknown tensor vit.encoder.layer.0.lora.weight"):
        from_hugging_face({**hugging_face(), "vit.encoder.layer.0.lora.weight": torch.ones(1)})
    incomplete = hugging_face()
    del incomplete["vit.encoder.layer.0.attention.attention.key.bias"]
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv.bias.*query"):
        from_hugging_face(incomplete)


def test_files_written_by_transformers(tmp_path):
    """ViTMAE, ViT and a ViT classifier, saved by the library: every tensor is loaded, and features agree."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    sizes |= {"image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6}
    decoder = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    mae_config = transformers.ViTMAEConfig(**sizes, **{f"decoder_{k}": v for k, v in decoder.items()})
    images = torch.randn(2, 3, 32, 32)
    ours = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    for library, config in [
        (transformers.ViTMAEForPreTraining, mae_config),
        (transformers.ViTModel, transformers.ViTConfig(**sizes)),
        (transformers.ViTForImageClassification, transformers.ViTConfig(**sizes, num_labels=7)),
    ]:
        theirs = library(config).eval()
        theirs.save_pretrained(tmp_path / library.__name__)
        weights = load_pretrained(tmp_path / library.__name__)
        if library is transformers.ViTMAEForPreTraining:
            names = {f"decoder_{k}": v for k, v in {"embed_dim": 16, "depth": 1, "num_heads": 2}.items()}
            model = models_hpm.MaskedAutoencoderViT(**ours, **names, learning_loss=False)
            model.load_state_dict(weights, strict=True)
            continue
        model = models_vit.VisionTransformer(**ours, num_classes=7 if "head.weight" in weights else 0).eval()
        model.load_state_dict(weights, strict=True)
        with torch.no_grad():
            output = theirs(images)
            expected = output.logits if "head.weight" in weights else output.last_hidden_state[:, 0]
            torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


def tiny(**settings):
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 1}
    return models_vit.VisionTransformer(**(sizes | {"num_classes": 3, "global_pool": False} | settings))


PARTS = {
    "model.": {},
    "backbone.": {"decode_head.conv.weight": torch.ones(1)},
    "module.encoder.": {"module.decoder.0.weight": torch.ones(1)},
    "module.base_encoder.": {"module.momentum_encoder.patch_embed.proj.weight": torch.ones(1)},
    "teacher": {"head.last_layer.weight": torch.ones(1)},
}


@pytest.mark.parametrize("prefix", PARTS)
def test_the_encoder_of_a_larger_model_is_found(tmp_path, prefix):
    """Of Lightning, MMSegmentation, SimMIM, MoCo v3, and DINO's full checkpoint."""
    model = tiny(num_classes=0)
    inside = "backbone." if prefix == "teacher" else prefix
    weights = {f"{inside}{name}": value for name, value in model.state_dict().items()} | PARTS[prefix]
    content = {"state_dict": weights, "epoch": 3}
    if prefix == "teacher":
        content = {"student": {f"module.{k}": v * 0 for k, v in weights.items()}, "teacher": weights, "epoch": 3}
    torch.save(content, tmp_path / "a.pth")
    loaded = load_pretrained(tmp_path / "a.pth")
    assert load_into(tiny(num_classes=0), loaded, allow_unexpected=()).unused == []
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


HINTS = {
    "classifier on the class token": ({}, {"global_pool": True}, "so give --cls_token"),
    "classifier on mean tokens": ({"global_pool": True}, {}, "so give --global_pool"),
    "other number of classes": ({"num_classes": 7}, {}, r"head.weight is \(7, 16\).*: give --nb_classes 7"),
    "other patch size": ({"img_size": 4, "patch_size": 2}, {}, "give --patch_size 2"),
    "greyscale": ({"in_chans": 1}, {}, r"\(16, 1, 4, 4\) in the file.*: they take 1-channel images; only RGB is supp"),
    "other bands and patch size": ({"in_chans": 4, "img_size": 4, "patch_size": 2}, {}, "they take 4-channel images"),
    "other width": ({"embed_dim": 32}, {}, "is this the right --model"),
    "other depth": ({"depth": 2}, {}, "unexpected: blocks.1.*is this the right --model"),
    "fewer blocks": ({}, {"depth": 2}, "is this the right --model"),
}


@pytest.mark.parametrize(("of_file", "of_model", "message"), HINTS.values(), ids=HINTS)
def test_weights_that_do_not_fit_name_the_option_that_helps(of_file, of_model, message):
    with pytest.raises(ValueError, match=message) as error:
        load_into(tiny(**of_model), tiny(**of_file).state_dict())
    assert ("--model" in str(error.value)) == ("--model" in message)


def test_pre_training_needs_the_norm_of_the_encoder():
    """It has no option --global_pool."""
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 1}
    decoder = {f"decoder_{name}": 4 for name in ("embed_dim", "depth", "num_heads")}
    model = models_hpm.MaskedAutoencoderViT(**sizes, **decoder)
    with pytest.raises(ValueError, match="without the norm of the encoder: take weights from pre-training") as error:
        load_into(model, tiny(global_pool=True).state_dict(), DECODERS, ("head.", "fc_norm."))
    assert "--global_pool" not in str(error.value)


def test_other_architectures_are_not_blamed_on_the_model_option():
    weights = tiny().state_dict() | {"blocks.0.ls1.gamma": torch.ones(16)}
    with pytest.raises(ValueError, match=r"unexpected: blocks.0.ls1.gamma\): they are of another architecture"):
        load_into(tiny(), weights)
    with pytest.raises(ValueError, match="are the heads of a linear probe: evaluate them with main_linprobe.py --eval"):
        load_into(tiny(), {"heads.0.weight": torch.ones(5, 16), "heads.0.bias": torch.ones(5)})
    with pytest.raises(ValueError, match="distilled DeiT"):
        load_into(tiny(), tiny().state_dict() | {"dist_token": torch.ones(1, 1, 16), "pos_embed": torch.ones(1, 6, 16)})
