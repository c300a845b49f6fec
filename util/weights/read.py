"""Reading weight files of all kinds without running code from them, and stripping wrapper prefixes."""

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

_WRAPPERS = ("module.", "_orig_mod.")

_CONVERT_TORCHSCRIPT = """{path} is a TorchScript archive, which runs code when loaded. \
If you trust it, convert it once:
  import torch
  model = torch.jit.load("{path}", map_location="cpu")
  torch.save(model.state_dict(), "{stem}_state_dict.pth")"""

_CONVERT_PICKLE = """{path} contains pickled objects other than tensors, which run code when loaded ({name}). \
If you trust it, convert it once:
  import torch
  checkpoint = torch.load("{path}", map_location="cpu", weights_only=False)
  torch.save(checkpoint["model"], "{stem}_weights.pth")  # or the key of the weights: see checkpoint.keys()"""


def read_file(path: str | Path, tensors: bool = True) -> dict[str, Any]:
    """The content of a .pth, .pt, .bin or .safetensors file, or of a Hugging Face folder, on the CPU.

    Only tensors, plain containers and `argparse.Namespace` (in MAE's and DINO's files) are unpickled.

    Args:
        tensors: False for the rest of a large file in little time: tensors are then neither read nor verified.

    Raises:
        ValueError: no such file, a damaged one, or one that would run code (with the lines that convert it).
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_in_folder(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
    is_archive = check_archive(path, tensors)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive and not tensors)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            raise ValueError(f"{path} was not written by torch.save") from error
        raise ValueError(_CONVERT_PICKLE.format(path=path, stem=path.stem, name=found[1])) from error
    except Exception as error:  # damaged files make the unpickler raise nearly any exception
        raise ValueError(f"{path} is not a checkpoint, or is damaged: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} contains a {type(content).__name__}, not a dictionary of weights")
    return content


def read_header(path: Path) -> dict[str, str]:
    """The metadata in the header of a .safetensors file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _weights_in_folder(folder: Path) -> Path:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} is a folder without model.safetensors or pytorch_model.bin: give a checkpoint file")


def check_archive(path: Path, tensors: bool = True) -> bool:
    """Verify the checksums of a zip file (as torch.save writes); torch itself loads a flipped byte silently. Returns
    whether it is one.

    Args:
        tensors: False to verify all but the tensors.

    Raises:
        ValueError: the file is truncated or altered, or a TorchScript archive.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False  # the format before torch 1.6 has no checksums
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if tensors:
                damaged = archive.testzip()
            else:
                damaged = None
                for name in names:
                    if name.endswith("/data.pkl"):
                        archive.read(name)  # raises if it does not match its checksum
    except Exception as error:  # a damaged directory makes zipfile raise nearly any exception
        raise ValueError(f"{path} is truncated or damaged ({error})") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: {damaged} does not match its checksum")
    if any(name.split("/", 1)[-1].startswith("code/") for name in names):
        raise ValueError(_CONVERT_TORCHSCRIPT.format(path=path, stem=path.stem))
    return True


def strip_wrappers(state_dict: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Strip the prefixes that DDP and torch.compile add to names. Only tensors are kept, half precision as fp32."""
    stripped = {}
    for name, value in state_dict.items():
        while name.startswith(_WRAPPERS):
            name = name.split(".", 1)[1]
        if isinstance(value, torch.Tensor):
            stripped[name] = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    return stripped
