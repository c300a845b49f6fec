"""What a checkpoint's metadata and tensor names say about its model."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from util.data.transforms import IMAGENET_MEAN, IMAGENET_STD


def classifier_name(pretrained: str) -> str:
    """mae_vit_base_patch16_dec512d8b -> vit_base_patch16: the classifier on the encoder of a pre-training model."""
    return pretrained.removeprefix("mae_").split("_dec")[0]


def settings_of(meta: dict[str, Any]) -> dict[str, Any]:
    """Model, sizes, mean and std in a checkpoint's metadata (`read_meta`), as far as it has them."""
    if not meta:
        return {}
    sizes = {name: meta["options"][name] for name in ("input_size", "patch_size") if name in meta["options"]}
    return {"model": classifier_name(meta["model"]), **sizes, **meta["image"]}


def defaults_of(meta: dict[str, Any]) -> dict[str, Any]:
    """`settings_of`, with ViT-B at 224 pixels on ImageNet for what the metadata lack."""
    image = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    return {"model": "vit_base_patch16", "input_size": 224, **image, **settings_of(meta)}


MODEL_OF_WIDTH = {
    128: "vit_micro_patch16",
    192: "vit_tiny_patch16",
    384: "vit_small_patch16",
    768: "vit_base_patch16",
    1024: "vit_large_patch16",
    1280: "vit_huge_patch14",
}


def header_of(name: str, options: dict[str, Any], image: dict[str, Any]) -> dict[str, str]:
    """Metadata of an exported .safetensors file, whose header holds strings only."""
    return {"model": name, **{key: json.dumps(value) for key, value in (options | image).items()}}


def meta_of_header(header: dict[str, str]) -> dict[str, Any]:
    """The reverse of `header_of`; {} for the header of a foreign file."""
    if not {"model", "input_size", "mean", "std"} <= header.keys():
        return {}
    values = {key: json.loads(value) for key, value in header.items() if key not in ("format", "model")}
    image = {key: values.pop(key) for key in ("mean", "std", "value_range") if key in values}
    return {"model": header["model"], "options": values, "image": image}


def meta_of_folder(folder: Path) -> dict[str, Any]:
    """Sizes, decoder, mean, std and crop in the configuration files of a Hugging Face folder; {} without them."""
    config, processor = (_read_json(folder / name) for name in ("config.json", "preprocessor_config.json"))
    known = {"model_type", "image_size", "patch_size"} <= config.keys()
    if not known or config.get("hidden_size") not in MODEL_OF_WIDTH:
        return {}
    options = {"input_size": config["image_size"], "patch_size": config["patch_size"]}
    if config["model_type"] == "vit_mae":
        options["target"] = "norm_pixel" if config.get("norm_pix_loss") else "pixel"
        options["decoder_num_heads"] = config.get("decoder_num_attention_heads", 16)
        options["mask_ratio"] = config.get("mask_ratio", 0.75)
    if "classes" in config:
        options["classes"] = config["classes"]
    image = {}
    if processor.get("do_normalize", True) and {"image_mean", "image_std"} <= processor.keys():
        image = {"mean": processor["image_mean"], "std": processor["image_std"]}
    edge = processor.get("size", {})
    if processor.get("do_center_crop") and isinstance(edge, dict) and "shortest_edge" in edge:
        options["crop_pct"] = config["image_size"] / edge["shortest_edge"]
    return {"model": MODEL_OF_WIDTH[config["hidden_size"]], "options": options, "image": image}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
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
