"""Reading weight files as people have them, without running code from any, and giving their tensors MAE's names."""

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

_WRAPPERS = ("module.", "_orig_mod.")

_CONVERT_TORCHSCRIPT = """{path} is a TorchScript archive, which runs code when loaded. \
Convert it once, where you trust it:
  import torch
  model = torch.jit.load("{path}", map_location="cpu")
  torch.save(model.state_dict(), "{stem}_state_dict.pth")"""

_CONVERT_PICKLE = """{path} holds pickled objects beyond tensors, which run code when loaded ({name}). \
Convert it once, where you trust it:
  import torch
  checkpoint = torch.load("{path}", map_location="cpu", weights_only=False)
  torch.save(checkpoint["model"], "{stem}_weights.pth")  # or the key that holds the weights: see checkpoint.keys()"""


def read_file(path: str | Path) -> dict[str, Any]:
    """Everything in a .pth, .pt, .bin or .safetensors file, or in a Hugging Face folder, on the CPU.

    Only tensors, plain containers and `argparse.Namespace` (MAE's and DINO's files hold one) are unpickled.

    Raises:
        ValueError: no such file, a damaged one, or one that would run code; with the way out.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_in_folder(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
    check_archive(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            raise ValueError(f"{path} is not a checkpoint that torch.save wrote") from error
        raise ValueError(_CONVERT_PICKLE.format(path=path, stem=path.stem, name=found[1])) from error
    except Exception as error:  # damaged files make the unpickler raise nearly anything
        raise ValueError(f"{path} is not a checkpoint, or a damaged one: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _weights_in_folder(folder: Path) -> Path:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} is a folder without model.safetensors or pytorch_model.bin: give a checkpoint file")


def check_archive(path: Path) -> None:
    """Compare a zip file (what torch.save writes) with its own checksums: torch itself loads a flipped byte silently.

    Raises:
        ValueError: the file is truncated or altered, or a TorchScript archive.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return  # torch's format before 1.6 has no checksums
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            damaged = archive.testzip()
    except Exception as error:  # a damaged directory makes zipfile raise nearly anything
        raise ValueError(f"{path} is truncated or damaged ({error})") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: {damaged} does not match its checksum")
    if any(name.split("/", 1)[-1].startswith("code/") for name in names):
        raise ValueError(_CONVERT_TORCHSCRIPT.format(path=path, stem=path.stem))


def strip_wrappers(state_dict: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Take off what DDP and torch.compile put before names; keep tensors only."""
    stripped = {}
    for name, value in state_dict.items():
        while name.startswith(_WRAPPERS):
            name = name.split(".", 1)[1]
        if isinstance(value, torch.Tensor):
            stripped[name] = value
    return stripped


# ------------------------------------------------------------------------------------------------------- Hugging Face

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
# The released ViTMAE files say decoder_layers, as `to_hugging_face` does; some versions write decoder_encoder.layer.
_BLOCK = re.compile(r"(encoder\.layer|decoder\.decoder_(?:layers|encoder\.layer))\.(\d+)\.(.+)\.(weight|bias)")

_OUR_BLOCK = re.compile(r"(decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)")


def is_hugging_face(state_dict: dict[str, torch.Tensor]) -> bool:
    return any(name.removeprefix("vit.").startswith("embeddings.patch_embeddings.") for name in state_dict)


def from_hugging_face(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ViTMAE, ViTModel and ViTForImageClassification -> MAE's names, query, key and value joined.

    Raises:
        ValueError: a tensor of unknown name.
    """
    renamed, separate = {}, {}
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
        elif not bare.startswith("pooler."):  # ViTModel's pooler belongs to no MAE
            raise ValueError(f"unknown tensor {name} in a Hugging Face checkpoint")
    for name, parts in separate.items():
        if set(parts) != {"query", "key", "value"}:
            raise ValueError(f"{name}: a Hugging Face checkpoint has query, key and value, this one {sorted(parts)}")
        renamed[name] = torch.cat([parts["query"], parts["key"], parts["value"]])
    return renamed


def to_hugging_face(state_dict: dict[str, torch.Tensor], prefix: str = "vit.") -> dict[str, torch.Tensor]:
    """MAE's names -> those of released files, which every version of transformers reads; qkv in three.

    Args:
        prefix: of the encoder's tensors: "vit." in ViTMAEForPreTraining and ViTForImageClassification, "" in ViTModel.

    Raises:
        ValueError: a tensor that these models have no place for.
    """
    parts, whole = ({ours: theirs for theirs, ours in names.items()} for names in (_BLOCK_PARTS, _WHOLE))
    renamed = {}
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
            raise ValueError(f"there is no place for {name} in a Hugging Face checkpoint")
        renamed[theirs] = tensor
    return renamed
