"""Tensor names of a ViT in Hugging Face and in MAE, converted both ways."""

import re

import torch

_BLOCK_PARTS = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_WHOLE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "classifier": "head",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "decoder.decoder_embed": "decoder_embed",
    "decoder.decoder_norm": "decoder_norm",
    "decoder.decoder_pred": "decoder_pred",
}
# Released ViTMAE files use decoder_layers, as does `to_hugging_face`; some versions write decoder_encoder.layer.
_BLOCK = re.compile(r"(encoder\.layer|decoder\.decoder_(?:layers|encoder\.layer))\.(\d+)\.(.+)\.(weight|bias)")

_OUR_BLOCK = re.compile(r"(decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)")


def is_hugging_face(state_dict: dict[str, torch.Tensor]) -> bool:
    return any(name.removeprefix("vit.").startswith("embeddings.patch_embeddings.") for name in state_dict)


def from_hugging_face(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ViTMAE, ViTModel and ViTForImageClassification -> MAE's names; query, key and value are concatenated.

    Raises:
        ValueError: a tensor with an unknown name.
    """
    renamed: dict[str, torch.Tensor] = {}
    separate: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state_dict.items():
        bare = name.removeprefix("vit.")
        stem, _, kind = bare.rpartition(".")
        if match := _BLOCK.fullmatch(bare):
            where, number, part, kind = match.groups()
            block = f"{'blocks' if where.startswith('encoder') else 'decoder_blocks'}.{number}"
            if part in _BLOCK_PARTS:
                renamed[f"{block}.{_BLOCK_PARTS[part]}.{kind}"] = tensor
            elif part.startswith("attention.attention."):
                separate.setdefault(f"{block}.attn.qkv.{kind}", {})[part.rsplit(".", 1)[1]] = tensor
            else:
                raise ValueError(f"unknown tensor {name} in a Hugging Face checkpoint")
        elif bare in _WHOLE:
            renamed[_WHOLE[bare]] = tensor
        elif stem in _WHOLE:
            renamed[f"{_WHOLE[stem]}.{kind}"] = tensor
        elif not bare.startswith("pooler."):  # ViTModel's pooler has no counterpart in MAE
            raise ValueError(f"unknown tensor {name} in a Hugging Face checkpoint")
    for name, parts in separate.items():
        if set(parts) != {"query", "key", "value"}:
            raise ValueError(
                f"{name}: expected query, key and value in a Hugging Face checkpoint, found {sorted(parts)}"
            )
        renamed[name] = torch.cat([parts["query"], parts["key"], parts["value"]])
    return renamed


def to_hugging_face(state_dict: dict[str, torch.Tensor], prefix: str = "vit.") -> dict[str, torch.Tensor]:
    """MAE's names -> those of released files, which every version of transformers reads; qkv is split in three.

    Args:
        prefix: prefix of encoder tensors: "vit." in ViTMAEForPreTraining and ViTForImageClassification, "" in ViTModel.

    Raises:
        ValueError: a tensor that these models do not have.
    """
    parts, whole = ({ours: theirs for theirs, ours in names.items()} for names in (_BLOCK_PARTS, _WHOLE))
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in state_dict.items():
        stem, _, kind = name.rpartition(".")
        if match := _OUR_BLOCK.fullmatch(name):
            decoder, number, part, kind = match.groups()
            block = f"decoder.decoder_layers.{number}" if decoder else f"{prefix}encoder.layer.{number}"
            if part == "attn.qkv":
                thirds = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
                renamed |= {f"{block}.attention.attention.{which}.{kind}": third for which, third in thirds}
                continue
            theirs = f"{block}.{parts[part]}.{kind}" if part in parts else None
        elif name in whole or stem in whole:
            theirs = whole.get(name) or f"{whole[stem]}.{kind}"
            theirs = theirs if theirs.startswith(("decoder.", "classifier.")) else prefix + theirs
        else:
            theirs = None
        if theirs is None:
            raise ValueError(f"{name} has no counterpart in a Hugging Face checkpoint")
        renamed[theirs] = tensor
    return renamed
