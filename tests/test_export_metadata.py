"""Exports carry what is needed to use them: model, sizes, mean, std and crop, which this project reads back."""

import json

import numpy as np
import pytest
import torch
from exports import FILES, MEAN, STD, classifiers, evaluation_pixels, photograph, pretrained
from images import members, write_tree
from PIL import Image
from programs import PRETRAIN, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import models_vit
from models_load import load_classifier
from util.data.transforms import CenterCrop, resized_side
from util.weights.load import read_meta
from util.weights.meta import DEFAULTS, MODEL_OF_WIDTH, settings_of
from visualize import __main__ as visualize

__all__ = ["classifiers", "pretrained"]  # fixtures

READ_BACK = ("timm", "safetensors", "hf_vit", "hf_mae")


def export(name, checkpoint, folder):
    path = folder / f"{name}{FILES.get(name, '')}"
    run("export", "--checkpoint", checkpoint, "--format", name, "--output", path)
    return path


@pytest.mark.parametrize("name", READ_BACK)
def test_metadata_of_an_export(tmp_path, pretrained, name):
    if name.startswith("hf"):
        pytest.importorskip("transformers")
    path = export(name, pretrained, tmp_path)
    found = DEFAULTS | settings_of(read_meta(path))
    expected = {"model": "vit_micro_patch16", "input_size": 16, "patch_size": 4, "mean": MEAN, "std": STD}
    assert expected.items() <= found.items()
    assert int(16 / read_meta(path)["options"]["crop_pct"]) == CenterCrop(16).resize.size[0]
    if name.startswith("hf"):
        assert read_meta(path / "model.safetensors") == read_meta(path)


@pytest.mark.parametrize("name", READ_BACK)
def test_features_of_an_export_without_options(tmp_path, pretrained, name):
    """k-NN on the export and on its checkpoint stores the same features."""
    if name.startswith("hf"):
        pytest.importorskip("transformers")
    features = {}
    for which, path in (("checkpoint", pretrained), ("export", export(name, pretrained, tmp_path))):
        data = ["--shapes_train", 8, "--shapes_val", 8, "--nb_knn", 1, "--batch_size", 8, "--num_workers", 0]
        run("main_knn", "--finetune", path, *data, "--dump_features", tmp_path / which)
        files = sorted((tmp_path / which).glob("*"))
        features[which] = [torch.load(file, weights_only=True) for file in files]
    for ours, theirs in zip(features["checkpoint"], features["export"], strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_class_names_of_an_export(tmp_path, classifiers):
    transformers = pytest.importorskip("transformers")
    record = {"names": [f"class {number}" for number in range(9)] + [""], "numbered": False}
    state = torch.load(classifiers["token"], weights_only=True)
    state["options"]["classes"] = record
    torch.save(state, tmp_path / "named.pth")
    for name in ("timm", "safetensors", "hf_vit"):
        assert read_meta(export(name, tmp_path / "named.pth", tmp_path))["options"]["classes"] == record
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf_vit")
    assert (config.id2label[3], config.label2id["class 3"], config.id2label[9]) == ("class 3", 3, "LABEL_9")


def test_outputs_without_a_name(tmp_path, classifiers):
    """A subset of ImageNet with --nb_classes 1000: the labels of an export must not become ImageNet's."""
    transformers = pytest.importorskip("transformers")
    record = {"names": ["n01440764", "n02102040"], "numbered": False}
    state = torch.load(classifiers["token"], weights_only=True)
    state["options"]["classes"] = record
    torch.save(state, tmp_path / "few.pth")
    expected = [*record["names"], *map(str, range(2, 10))]
    for path in (tmp_path / "few.pth", *(export(n, tmp_path / "few.pth", tmp_path) for n in ("safetensors", "hf_vit"))):
        assert read_meta(path)["options"]["classes"] == record
        assert load_classifier(path)[2] == expected
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf_vit")
    assert [config.id2label[number] for number in (0, 2)] == ["n01440764", "LABEL_2"]


def test_a_folder_is_not_exported_over_its_own_file(tmp_path, pretrained, capsys):
    pytest.importorskip("transformers")
    folder = export("hf_mae", pretrained, tmp_path)
    for source in (folder, folder / "model.safetensors"):
        with pytest.raises(SystemExit):
            run("export", "--checkpoint", source, "--format", "hf_vit", "--output", folder, "--overwrite")
        assert "is the checkpoint itself" in capsys.readouterr().err


def test_an_export_of_the_teacher_says_so(tmp_path, pretrained):
    for which in ("ema", "student"):
        path = tmp_path / f"{which}.safetensors"
        run("export", "--checkpoint", pretrained, "--format", "safetensors", "--which", which, "--output", path)
        assert read_meta(path)["options"].get("which", "student") == which
        args = visualize.resolve_options(visualize.get_args_parser().parse_args(["--checkpoint", str(path)]))
        name = {"ema": "EMA teacher"}.get(which, which)
        assert visualize.load_models(args)[2] == (name, name)


def test_crop_of_an_export(tmp_path, pretrained):
    """The default is that of the evaluation; --crop_pct replaces it."""
    run("export", "--checkpoint", pretrained, "--format", "timm", "--output", tmp_path / "a.safetensors")
    assert read_meta(tmp_path / "a.safetensors")["options"]["crop_pct"] == 0.875
    options = ["--crop_pct", 0.5, "--output", tmp_path / "b.safetensors"]
    run("export", "--checkpoint", pretrained, "--format", "timm", *options)
    assert read_meta(tmp_path / "b.safetensors")["options"]["crop_pct"] == 0.5
    assert "crop_pct': 0.5" in (tmp_path / "b.safetensors.md").read_text()


def test_decoder_settings_survive_an_export(tmp_path):
    """Heads of the decoder, normalised pixels and what chooses the masks do not show in the weights."""
    pytest.importorskip("transformers")
    options = ["--max_steps", 1, "--decoder_num_heads", 8, "--norm_pix_loss", "--mask_ratio", 0.5]
    options += ["--teacher_keep", 0.5, "--alpha_T", 0.25]
    run("main_pretrain", *PRETRAIN, *options, "--output_dir", tmp_path / "run")
    for name in ("hf_mae", "safetensors"):
        again = tmp_path / f"{name}-again"
        path = export(name, tmp_path / "run/checkpoint-last.pth", tmp_path)
        run("export", "--checkpoint", path, "--format", "hf_mae", "--output", again)
        config = json.loads((again / "config.json").read_text())
        assert (config["decoder_num_attention_heads"], config["norm_pix_loss"], config["mask_ratio"]) == (8, True, 0.5)
    found = read_meta(tmp_path / "safetensors.safetensors")["options"]
    assert (found["teacher_keep"], found["alpha_T"], found["epochs"]) == (0.5, 0.25, 2)


def test_a_target_of_features_survives_an_export(tmp_path, capsys):
    """ViT-B has as many features as a patch has values, so that the weights alone look like those of pixels."""
    run("main_pretrain", *PRETRAIN, "--max_steps", 1, "--target", "ema", "--output_dir", tmp_path / "run")
    path = export("safetensors", tmp_path / "run/checkpoint-last.pth", tmp_path)
    assert read_meta(path)["options"]["target"] == "ema"


def test_the_crop_survives_the_quotient():
    """192 / 0.85 is 225 pixels, and 192 / (192 / 225) a bit less."""
    for size in range(16, 1025):
        for crop_pct in (0.85, 0.875, 0.9, 0.95, 1.0):
            edge = resized_side(size, crop_pct)
            assert resized_side(size, size / edge) == edge


def test_table_of_widths_is_that_of_the_models():
    sizes = {size["embed_dim"]: (name, size["num_heads"]) for name, size in models_vit.SIZES.items()}
    assert sizes == MODEL_OF_WIDTH


def test_foreign_folders_and_files(tmp_path):
    assert read_meta(empty_folder(tmp_path / "empty")) == {}
    folder = empty_folder(tmp_path / "resnet", {"model_type": "resnet", "hidden_size": 768})
    assert read_meta(folder) == {}
    config = {"model_type": "vit", "hidden_size": 768, "image_size": 384, "patch_size": 16}
    folder = empty_folder(tmp_path / "vit", config, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 384})
    found = read_meta(folder)
    assert (found["model"], found["image"]) == ("vit_base_patch16", {"mean": [0.5] * 3, "std": [0.5] * 3})
    assert found["options"] == {"input_size": 384, "patch_size": 16}
    assert read_meta(empty_folder(tmp_path / "null", config | {"architectures": None}))["options"] == {
        "input_size": 384,
        "patch_size": 16,
    }
    (tmp_path / "vit/config.json").write_text("{")
    with pytest.raises(ValueError, match=r"vit/config.json is not valid JSON"):
        read_meta(folder)


@pytest.mark.parametrize(
    ("config", "processor", "said"),
    [
        ({"image_size": None}, {}, "a value in config.json or preprocessor_config.json cannot be read"),
        ({"hidden_size": [768]}, {}, "a value in config.json or preprocessor_config.json cannot be read"),
        ({}, {"image_mean": 0.5, "image_std": 0.5}, "a value in config.json or preprocessor_config.json cannot be"),
        ({}, {"rescale_factor": 0, "do_normalize": False}, "a value in config.json or preprocessor_config.json cannot"),
        ({"image_size": [384, 224]}, {}, "config.json gives a size of .*: only squares are supported"),
    ],
)
def test_values_that_cannot_be_read_name_their_folder(tmp_path, config, processor, said):
    known = {"model_type": "vit", "hidden_size": 768, "image_size": 384, "patch_size": 16}
    folder = empty_folder(tmp_path / "vit", known | config, processor)
    with pytest.raises(ValueError, match=f"{folder}: {said}"):
        read_meta(folder)


def test_a_header_that_somebody_added_to_is_named(tmp_path, pretrained):
    path = export("safetensors", pretrained, tmp_path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file(load_file(path), path, header | {"author": "me"})
    with pytest.raises(ValueError, match=f"{path} has a value in its header that is not JSON"):
        read_meta(path)


def test_class_names_of_a_foreign_classifier(tmp_path, classifiers):
    """transformers names them in id2label, LABEL_k where nobody gave names; encoders have it, too."""
    pytest.importorskip("transformers")
    folder = export("hf_vit", classifiers["token"], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["classes"]
    names = [f"class {k}" for k in range(10)]
    for labels, found in ((names, names), ([f"LABEL_{k}" for k in range(10)], [])):
        config["id2label"] = {str(k): labels[k] for k in reversed(range(10))}
        (folder / "config.json").write_text(json.dumps(config))
        assert load_classifier(folder)[2] == found
        assert ("classes" in read_meta(folder)["options"]) == bool(found)
    config |= {"architectures": ["ViTModel"], "id2label": {"0": "cat", "1": "dog"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert "classes" not in read_meta(folder)["options"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"model_type": "vit", "num_attention_heads": 16}, "16 heads and gelu"),
        ({"model_type": "vit", "num_attention_heads": 12, "hidden_act": "quick_gelu"}, "12 heads and quick_gelu"),
        ({"pretrained_cfg": {}, "architecture": "vit_base_patch16_224", "num_features": 768,
          "model_args": {"num_heads": 16}}, "16 heads"),
    ],
)  # fmt: skip
def test_an_encoder_that_computes_something_else_is_rejected(tmp_path, more, said):
    """Its weights have the same shapes."""
    folder = empty_folder(tmp_path / "it", {"hidden_size": 768, "image_size": 224, "patch_size": 16, **more})
    with pytest.raises(ValueError, match=f"width 768 with {said}.*: here it is vit_base_patch16 with 12 heads"):
        read_meta(folder)


PROCESSORS = {  # what they do to a value v: (v * rescale_factor - mean) / std
    "plain": ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, 0.5, 0.25),
    "rescaled to -1..1": ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [0.5] * 3}, 0.5, 0.25),
    "not rescaled": ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [63.75] * 3}, 0.5, 0.25),
    "not normalised": ({"do_normalize": False, "image_mean": [9.0] * 3, "image_std": [9.0] * 3}, 0.0, 1.0),
    "neither": ({"do_normalize": False, "do_rescale": False}, 0.0, 1 / 255),
}


@pytest.mark.parametrize(("processor", "mean", "std"), PROCESSORS.values(), ids=PROCESSORS)
def test_pixels_of_a_foreign_image_processor(tmp_path, processor, mean, std):
    config = {"model_type": "vit", "hidden_size": 768, "image_size": [224, 224], "patch_size": 16}
    crop = {"do_center_crop": True, "size": {"shortest_edge": 256}}
    found = read_meta(empty_folder(tmp_path / "vit", config, processor | crop))
    assert found["image"] == {"mean": pytest.approx([mean] * 3), "std": pytest.approx([std] * 3)}
    assert found["options"] == {"input_size": 224, "patch_size": 16, "crop_pct": 0.875}


def test_folders_that_timm_saved(tmp_path):
    """As for the Hugging Face hub, by timm itself; k-NN and evaluation need no options."""
    timm = pytest.importorskip("timm")
    from timm.models import save_for_hf

    sizes = {"img_size": 16, "embed_dim": 128, "depth": 6, "num_heads": 4, "num_classes": 3, "global_pool": "token"}
    model = timm.create_model("vit_base_patch16_224", **sizes)
    given = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 16, 16], "crop_pct": 0.75}
    model.pretrained_cfg |= given
    config = {"label_names": ["cat", "cat-2", "dog"]}
    save_for_hf(model, tmp_path / "hub", config, model_args={"img_size": 16}, safe_serialization=True)
    found = read_meta(tmp_path / "hub")
    assert (found["model"], found["image"]) == ("vit_micro_patch16", {"mean": [0.5] * 3, "std": [0.25] * 3})
    assert found["options"] == {
        **{"input_size": 16, "patch_size": 16, "crop_pct": 0.75, "global_pool": False},
        "classes": {"names": ["cat", "cat-2", "dog"], "numbered": False},
    }
    data = write_tree(tmp_path / "d", members(("val",), classes=("dog",)))
    evaluation = ["--eval", "--data_path", data, "--num_workers", 0, "--output_dir", tmp_path / "eval"]
    log = run("main_finetune", *evaluation, "--resume", tmp_path / "hub")
    assert "mean 0.5 0.5 0.5 (checkpoint)" in log
    assert "3 classes, class token" in log


@pytest.mark.parametrize(
    ("pool", "norm", "said"),
    [("avgmax", None, "global_pool avgmax;"), ("avg", False, "global_pool avg without fc_norm;")],
)
def test_other_pooling_of_timm_is_rejected(tmp_path, pool, norm, said):
    config = {"pretrained_cfg": {}, "architecture": "vit_base_patch16_224", "num_features": 768, "num_classes": 3}
    folder = empty_folder(tmp_path / "it", config | {"global_pool": pool, "model_args": {"fc_norm": norm}})
    with pytest.raises(ValueError, match=f"a classifier with {said} here it is token, or avg with fc_norm"):
        read_meta(folder)


def test_a_mean_of_normed_tokens_is_rejected(tmp_path):
    """timm keeps the norm before the pooling where a model without a classifier is given one; the folder says "avg"."""
    timm = pytest.importorskip("timm")
    from timm.models import save_for_hf

    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4, "num_classes": 0}
    model = timm.create_model("vit_base_patch16_224", **sizes, global_pool="token")
    model.reset_classifier(3, global_pool="avg")
    arguments = {"img_size": 16, "patch_size": 4}
    save_for_hf(model, tmp_path / "hub", {}, model_args=arguments, safe_serialization=True)
    path = tmp_path / "hub/config.json"
    config = json.loads(path.read_text())
    config["model_args"].pop("fc_norm", None)  # a config.json need not have it
    path.write_text(json.dumps(config))
    assert read_meta(tmp_path / "hub")["options"]["patch_size"] == 4
    with pytest.raises(ValueError, match="is a classifier on the mean of normed tokens"):
        load_classifier(tmp_path / "hub")


def test_weights_named_as_transformers_does_have_the_configuration_next_to_them(tmp_path, pretrained):
    pytest.importorskip("transformers")
    folder = export("hf_vit", pretrained, tmp_path)
    torch.save({}, folder / "pytorch_model.bin")
    assert read_meta(folder / "pytorch_model.bin") == read_meta(folder)


@pytest.mark.parametrize("name", ["timm", "safetensors", "hf_vit"])
def test_a_classifier_is_evaluated_without_options(tmp_path, classifiers, name):
    """Its pooling and value range are kept, too."""
    if name.startswith("hf"):
        pytest.importorskip("transformers")
    state = torch.load(classifiers["token"], weights_only=True)
    state["image"]["value_range"] = [0, 4095]
    torch.save(state, tmp_path / "token.pth")
    metrics = {}
    evaluation = ["--eval", "--shapes_val", 8, "--num_workers", 0, "--output_dir", tmp_path / "eval"]
    for path in (tmp_path / "token.pth", export(name, tmp_path / "token.pth", tmp_path)):
        log = run("main_finetune", *evaluation, "--resume", path)
        assert "value_range 0 4095 (checkpoint)" in log
        metrics[path] = log.splitlines()[-1]
    assert len(set(metrics.values())) == 1, metrics


def empty_folder(path, config=None, processor=None):
    path.mkdir()
    for name, content in (("config.json", config), ("preprocessor_config.json", processor)):
        if content is not None:
            (path / name).write_text(json.dumps(content))
    return path


def textured(height, width):
    """A picture with detail at every scale, so that a shift by one pixel shows."""
    noise = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    coarse = Image.fromarray(noise[::8, ::8].copy()).resize((width, height), Image.Resampling.BILINEAR)
    return Image.fromarray((noise // 2 + np.asarray(coarse) // 2).astype(np.uint8))


def test_image_processor_on_photographs_of_odd_size(tmp_path, pretrained):
    """transformers gives the pixels of the evaluation, but for crops whose offset it rounds down by one pixel."""
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(export("hf_vit", pretrained, tmp_path))
    shifted = []
    for width in range(31, 79, 3):
        picture = textured(29, width)
        theirs = processor(picture, return_tensors="pt")["pixel_values"]
        left = (int(18 * width / 29) - 16) / 2  # the shorter side is resized to 18, the crop has 16 pixels
        shifted.append(round(left) != int(left))
        difference = float((theirs - evaluation_pixels(picture)).abs().max()) * 255 * min(STD)
        assert (difference > 2) == shifted[-1], (width, difference)
    assert any(shifted)
    assert not all(shifted)


def test_timm_transform_on_photographs_of_odd_size(tmp_path, pretrained):
    """timm's own transform gives the pixels of the evaluation within one level."""
    import timm

    path = export("timm", pretrained, tmp_path)
    names = {"image": photograph()}
    code = path.with_name(f"{path.name}.md").read_text().split("```python\n")[1].split("```")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        exec(code, names)
    data = timm.data.resolve_data_config(model=names["model"])
    assert (data["mean"], data["std"], data["crop_pct"]) == (tuple(MEAN), tuple(STD), 0.875)
    for width in range(31, 79, 3):
        picture = textured(29, width)
        difference = (names["transform"](picture)[None] - evaluation_pixels(picture)).abs().max()
        assert float(difference) * 255 * min(STD) <= 1.01, width
