"""What a checkpoint's metadata and tensor names say about its model."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from util.data.transforms import IMAGENET_MEAN, IMAGENET_STD

# Defaults for what metadata lack: ViT-B at 224 pixels on ImageNet.
DEFAULTS = {
    "model": "vit_base_patch16",
    "input_size": 224,
    "patch_size": None,  # the model's
    "mean": list(IMAGENET_MEAN),
    "std": list(IMAGENET_STD),
    "value_range": None,  # by image
}


def classifier_name(pretrained: str) -> str:
    """mae_vit_base_patch16_dec512d8b -> vit_base_patch16: the classifier on the encoder of a pre-training model."""
    return pretrained.removeprefix("mae_").split("_dec")[0]


def settings_of(meta: dict[str, Any]) -> dict[str, Any]:
    """Model, sizes, mean, std and value range in a checkpoint's metadata (`read_meta`), as far as it has them."""
    if not meta:
        return {}
    sizes = {name: meta["options"][name] for name in ("input_size", "patch_size") if name in meta["options"]}
    return {"model": classifier_name(meta["model"]), **sizes, **meta["image"]}


# Width of an encoder -> its model and number of heads, which no tensor shows.
MODEL_OF_WIDTH = {
    128: ("vit_micro_patch16", 4),
    192: ("vit_tiny_patch16", 3),
    384: ("vit_small_patch16", 6),
    768: ("vit_base_patch16", 12),
    1024: ("vit_large_patch16", 16),
    1280: ("vit_huge_patch14", 16),
}


def _model_of(width: int, heads: int | None, activation: str = "gelu") -> str:
    """The model of a foreign encoder.

    Raises:
        ValueError: that encoder computes something else with weights of the same shapes.
    """
    name, expected = MODEL_OF_WIDTH[width]
    if heads not in (None, expected) or activation != "gelu":
        raise ValueError(
            f"config.json describes an encoder of width {width} with {heads} heads and {activation}: here it is {name} "
            f"with {expected} heads and gelu, and its features would be others"
        )
    return name


def header_of(name: str, options: dict[str, Any], image: dict[str, Any]) -> dict[str, str]:
    """Metadata of an exported .safetensors file, whose header holds strings only."""
    return {"model": name, **{key: json.dumps(value) for key, value in (options | image).items()}}


def meta_of_header(header: dict[str, str], path: Path) -> dict[str, Any]:
    """The reverse of `header_of`; {} for the header of a foreign file.

    Raises:
        ValueError: the header of `path` has a value that is not JSON.
    """
    if not {"model", "input_size", "mean", "std"} <= header.keys():
        return {}
    try:
        values = {key: json.loads(value) for key, value in header.items() if key not in ("format", "model")}
    except ValueError as error:
        raise ValueError(f"{path} has a value in its header that is not JSON ({error}): export it again") from error
    image = {key: values.pop(key) for key in ("mean", "std", "value_range") if key in values}
    return {"model": header["model"], "options": values, "image": image}


def meta_of_folder(folder: Path) -> dict[str, Any]:
    """Sizes, decoder, mean, std, crop and class names in the configuration files of a folder that transformers or timm
    saved; {} without them.

    Raises:
        ValueError: they are damaged, or describe a network that computes something else than ours.
    """
    config, processor = (_read_json(folder / name) for name in ("config.json", "preprocessor_config.json"))
    try:
        if isinstance(config.get("pretrained_cfg"), dict):
            return _meta_of_timm(config)
        return _meta_of_transformers(config, processor)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{folder}: a value in config.json or preprocessor_config.json cannot be read, correct it "
            f"({type(error).__name__}: {error})"
        ) from error


def _meta_of_transformers(config: dict[str, Any], processor: dict[str, Any]) -> dict[str, Any]:
    known = {"model_type", "image_size", "patch_size"} <= config.keys()
    if not known or config.get("hidden_size") not in MODEL_OF_WIDTH:
        return {}
    options: dict[str, Any] = {"input_size": _side(config["image_size"]), "patch_size": _side(config["patch_size"])}
    if config["model_type"] == "vit_mae":
        options["target"] = "norm_pixel" if config.get("norm_pix_loss") else "pixel"
        options["decoder_num_heads"] = config.get("decoder_num_attention_heads", 16)
        options["mask_ratio"] = config.get("mask_ratio", 0.75)
    elif "ViTForImageClassification" in (config.get("architectures") or []):
        options["global_pool"] = False
        if names := _label_names(config):
            options["classes"] = {"names": names, "numbered": False}
    if "classes" in config:  # of our own exports
        options["classes"] = config["classes"]
    image = _pixels_of(processor)
    if config.get("value_range"):
        image["value_range"] = config["value_range"]
    edge = processor.get("size", {})
    if processor.get("do_center_crop") and isinstance(edge, dict) and "shortest_edge" in edge:
        options["crop_pct"] = min(1.0, options["input_size"] / edge["shortest_edge"])
    model = _model_of(config["hidden_size"], config.get("num_attention_heads"), config.get("hidden_act", "gelu"))
    return {"model": model, "options": options, "image": image}


def _label_names(config: dict[str, Any]) -> list[str]:
    """Names of a Hugging Face classifier's outputs; [] for transformers' placeholders LABEL_0, LABEL_1, ..."""
    labels = config.get("id2label") or {}
    names = [labels[number] for number in sorted(labels, key=int)]
    return [] if names == [f"LABEL_{number}" for number in range(len(names))] else names


def _pixels_of(processor: dict[str, Any]) -> dict[str, Any]:
    """Mean and std for values in 0..1 that do what a Hugging Face image processor does to values in 0..255."""
    scale = 255 * processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 255
    if not processor.get("do_normalize", True):
        return {"mean": [0.0] * 3, "std": [1 / scale] * 3}
    if not {"image_mean", "image_std"} <= processor.keys():
        return {}
    return {name: [x / scale for x in processor[f"image_{name}"]] for name in ("mean", "std")}


def _meta_of_timm(config: dict[str, Any]) -> dict[str, Any]:
    """`config.json` of a folder that timm saved for the Hugging Face hub; {} for a network that is no ViT of ours."""
    given, patch = config["pretrained_cfg"], re.search(r"_patch(\d+)", config.get("architecture", ""))
    arguments = config.get("model_args", {})
    if patch is None or config.get("num_features") not in MODEL_OF_WIDTH:
        return {}
    size = arguments.get("img_size") or given.get("input_size", [3, 224, 224])[-1]
    options: dict[str, Any] = {
        "input_size": _side(size),
        "patch_size": _side(arguments.get("patch_size", int(patch[1]))),
    }
    if "crop_pct" in given:
        options["crop_pct"] = given["crop_pct"]
    if config.get("num_classes"):
        pool, norm = config.get("global_pool", "token"), arguments.get("fc_norm")
        if pool not in ("token", "avg") or (pool == "avg" and norm is False):
            without = " without fc_norm" if pool == "avg" else ""
            raise ValueError(
                f"config.json describes a classifier with global_pool {pool}{without}; here it is token, or avg with "
                "fc_norm, and its predictions would be others"
            )
        options["global_pool"] = pool == "avg"
    if isinstance(names := config.get("label_names"), list):
        options["classes"] = {"names": names, "numbered": False}
    image = {name: list(given[name]) for name in ("mean", "std") if name in given}
    model = _model_of(config["num_features"], arguments.get("num_heads"))
    return {"model": model, "options": options, "image": image}


def _side(size: int | list[int]) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) > 1:
        raise ValueError(f"config.json gives a size of {size}: only squares are supported")
    return sides.pop()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def autoencoder_settings(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Settings of the `MaskedAutoencoderViT` that `weights` (official names) fit, but for encoder size and heads.

    Raises:
        ValueError: the weights hold an encoder without its decoder.
    """
    if not {"patch_embed.proj.weight", "decoder_embed.weight", "decoder_pred.weight"} <= weights.keys():
        raise ValueError(
            "these weights are an encoder alone, without the decoder that reconstructs: use the full checkpoint "
            "(MAE calls it mae_visualize or mae_pretrain_full)"
        )
    channels, patch = weights["patch_embed.proj.weight"].shape[1:3]
    outputs = len(weights["decoder_pred.weight"])
    return {
        "patch_size": patch,
        "in_chans": channels,
        "decoder_embed_dim": len(weights["decoder_embed.weight"]),
        "decoder_depth": count_blocks(weights, "decoder_blocks"),
        "vis_mask_ratio": 0.5 if "vis_mask_token" in weights else 0.0,
        "learning_loss": "decoder_pred_losspred.weight" in weights,
        "predictor_depth": count_blocks(weights, "decoder_blocks_losspred") or None,
        "target_dim": None if outputs == patch * patch * channels else outputs,
    }


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """Number of transformer blocks PREFIX.0, PREFIX.1, ... among the tensor names of a state dict."""
    return len({name.split(".")[1] for name in names if name.startswith(f"{prefix}.")})
