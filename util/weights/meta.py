"""What a checkpoint's metadata and tensor names say about its model."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from util.data.transforms import IMAGENET_MEAN, IMAGENET_STD


def classifier_name(pretrained: str) -> str:
    """mae_vit_base_patch16_dec512d8b -> vit_base_patch16: the classifier on the encoder of a pre-training model."""
    return pretrained.removeprefix("mae_").split("_dec")[0]


def settings_of(meta: dict[str, Any]) -> dict[str, Any]:
    """Model, sizes, mean and std in a checkpoint's metadata (`read_meta`); {} for other people's files."""
    if not meta:
        return {}
    sizes = {name: meta["options"][name] for name in ("input_size", "patch_size")}
    return {"model": classifier_name(meta["model"]), **sizes, **meta["image"]}


def defaults_of(meta: dict[str, Any]) -> dict[str, Any]:
    """`settings_of`, with ViT-B at 224 pixels on ImageNet for what the metadata lack."""
    image = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    return {"model": "vit_base_patch16", "input_size": 224, **image, **settings_of(meta)}


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
