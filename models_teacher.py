"""Reconstruction targets by name, and frozen feature teachers: DINO and CLIP, ViT-B/16 at 224 pixels, from timm.

Shapes: B batch, L = 196 patches, D = 768 (DINO) or 512 (CLIP).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from util.targets import PIXEL_TARGETS
from util.weights.load import load_into
from util.weights.read import read_file, strip_wrappers

IMAGE_SIZE, PATCH_SIZE = 224, 16


@dataclass(frozen=True)
class Kind:
    """A network's name in timm, the width of its features, the mean and std it was trained with, and what its file may
    be, for --help."""

    timm_name: str
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    file: str = "timm's weights"


KINDS = {
    "dino": Kind(
        "vit_base_patch16_224.dino",
        768,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        "DINO's backbone or full checkpoint, or timm's weights",
    ),
    "clip": Kind(
        "vit_base_patch16_clip_quickgelu_224.openai",
        512,
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
        "a CLIP state dict, or timm's weights",
    ),
}

# Values of --target: functions of the pixels, features of the EMA teacher, features of frozen networks.
TARGETS = [*PIXEL_TARGETS, "ema", *KINDS]
FILES = {name: kind.file for name, kind in KINDS.items()}

# Prefixes of tensors that image features do not need: CLIP's text encoder, DINO's projection head.
_CLIP_TEXT = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection", "logit_scale")
_CLIP_UNUSED = (*_CLIP_TEXT, "input_resolution", "context_length", "vocab_size")
_DINO_HEAD = ("head.",)


class FrozenTeacher(nn.Module):
    """Patch features of whole images: (B, 3, 224, 224) -> (B, L, D). `build_teacher` loads its weights.

    DINO: tokens after the final norm. CLIP: tokens after the final norm and the projection.

    Args:
        kind: "dino" or "clip".
        mean, std: normalisation of the input; the teacher renormalises it to its own. (The official code gives CLIP
            images normalised for ImageNet.)
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, kind: str, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.kind = KINDS[kind]
        with torch.device("meta"):  # drawing initial values that are replaced takes seconds
            network = timm.create_model(self.kind.timm_name, pretrained=False)
        assert dict(network.named_buffers()).keys() <= network.state_dict().keys(), "a buffer without weights"
        self.network = network.to_empty(device="cpu")
        own_mean, own_std = torch.tensor(self.kind.mean), torch.tensor(self.kind.std)
        self.register_buffer("scale", (torch.tensor(std) / own_std).view(1, 3, 1, 1))
        self.register_buffer("shift", ((torch.tensor(mean) - own_mean) / own_std).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, imgs: Tensor) -> Tensor:
        """(B, 3, 224, 224) -> (B, L, D)."""
        tokens = self.network.forward_features(imgs * self.scale + self.shift)[:, 1:]  # (B, L, E)
        return self.network.head(tokens)  # DINO: the identity; CLIP: the projection


def read_teacher(path: str) -> dict[str, Tensor] | None:
    """The weights in a teacher's file; None for an empty path, where timm downloads them.

    Reads DINO's backbone and full checkpoints, CLIP state dicts, and files with timm's names (.pth, .safetensors).

    Raises:
        ValueError: the file is missing, or loading it would run code (OpenAI's TorchScript archive; the message shows
            the conversion).
    """
    if not path:
        return None
    content: dict[str, Any] = read_file(Path(path))
    for key in ("teacher", "state_dict", "model"):  # DINO's full checkpoint holds student and teacher
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    return {name.removeprefix("backbone."): value.float() for name, value in strip_wrappers(content).items()}


def build_teacher(
    kind: str, weights: dict[str, Tensor] | None, mean: Sequence[float], std: Sequence[float]
) -> tuple[FrozenTeacher, str]:
    """The frozen network with its weights, and a summary of what was loaded.

    Raises:
        ValueError: the weights do not fit, or timm cannot download its own.
    """
    teacher = FrozenTeacher(kind, mean, std)
    if weights is None:
        try:
            pretrained = timm.create_model(teacher.kind.timm_name, pretrained=True)
        except Exception as error:  # without a connection, the type of error varies
            raise ValueError(
                f"--target {kind}: timm's weights ({teacher.kind.timm_name}) cannot be downloaded "
                f"({type(error).__name__}): set --{kind}_path to a file that holds them"
            ) from error
        teacher.network.load_state_dict(pretrained.state_dict())
        return teacher, f"timm's {teacher.kind.timm_name}"
    text = [name for name in weights if name.startswith(_CLIP_UNUSED)] if kind == "clip" else []
    if any(name.startswith("visual.") for name in weights):  # OpenAI's names, which timm converts
        unknown = [name for name in weights if not name.startswith(("visual.", *_CLIP_UNUSED))]
        if unknown:
            raise ValueError(f"unexpected keys in the CLIP state dict: {', '.join(unknown[:4])}")
        weights = checkpoint_filter_fn(weights, teacher.network)
    report = load_into(teacher.network, weights, allow_unexpected=_DINO_HEAD if kind == "dino" else _CLIP_UNUSED)
    summary = str(report)
    if text:
        summary += f"\nunused: CLIP's text encoder ({len(text)} tensors)"
    return teacher, summary
