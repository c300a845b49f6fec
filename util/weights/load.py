"""Loading weights from this project's and everybody else's files into a model, with an account of every tensor."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from util.pos_embed import interpolate_pos_embed
from util.weights.hugging_face import from_hugging_face, is_hugging_face
from util.weights.read import read_file, strip_wrappers

FORMAT = "hpm"  # what this project's checkpoints call themselves

# What a pre-training checkpoint holds beyond the encoder.
DECODERS = ("decoder_", "mask_token", "vis_mask_token")


def load_pretrained(path: str | Path, which: str = "student") -> dict[str, Tensor]:
    """All weights of a file, under MAE's names.

    Reads this project's and official HPM checkpoints, MAE's (pre-trained or fine-tuned), bare state dicts (timm),
    .safetensors files and Hugging Face folders.

    Args:
        which: "student", or "ema" for the EMA teacher of an HPM checkpoint.

    Raises:
        ValueError: no such file, no such weights in it, or a file that would run code.
    """
    content = read_file(path)
    if which == "ema":
        if not isinstance(content.get("ema_state_dict"), dict):
            raise ValueError(f"{path} holds no EMA teacher (ema_state_dict): load the student (--which student)")
        return strip_wrappers(content["ema_state_dict"])
    assert which == "student", which
    for key in ("state_dict", "model"):  # HPM's files have both, and there `model` is a name
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    state_dict = strip_wrappers(content)
    if is_hugging_face(state_dict):
        state_dict = from_hugging_face(state_dict)
    if not state_dict:
        raise ValueError(f"{path} holds no weights; its keys are {', '.join(map(str, list(content)[:8]))}")
    return state_dict


def read_meta(path: str | Path) -> dict[str, Any]:
    """What a file says of how it was made: script, model, epoch, options, image; empty for other people's files."""
    content = read_file(path)
    if content.get("format") != FORMAT:
        return {}
    return {name: content[name] for name in ("script", "model", "epoch", "step", "options", "image")}


@dataclass(frozen=True)
class LoadReport:
    """Tensors that were loaded, tensors of the file that were left out, tensors of the model that are fresh."""

    loaded: list[str]
    left_out: list[str]
    fresh: list[str]

    def __str__(self) -> str:
        lines = [f"loaded    {len(self.loaded)} tensors", f"left out  {summarize_names(self.left_out)}"]
        return "\n".join([*lines, f"fresh     {summarize_names(self.fresh)}"])


def summarize_names(names: list[str]) -> str:
    """blocks.0.norm1.weight, ... -> "blocks (144), norm (2)": how many tensors of each part."""
    groups: dict[str, int] = {}
    for name in names:
        groups[name.split(".")[0]] = groups.get(name.split(".")[0], 0) + 1
    return ", ".join(f"{group} ({count})" for group, count in groups.items()) or "nothing"


def load_into(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    fresh: Iterable[str] = (),
    left_out: Iterable[str] = DECODERS,
) -> LoadReport:
    """Load weights into a model and account for every tensor. Position embeddings are fitted to the model's grid.

    Args:
        fresh: prefixes of the model's tensors that may keep their initial values: the file lacks them, or has them of
            another shape (a head of other classes).
        left_out: prefixes of the file's tensors that the model may have no use for.

    Raises:
        ValueError: any other missing, unexpected or differently shaped tensor, with its name.
    """
    fresh, left_out = tuple(fresh), tuple(left_out)
    state_dict = dict(state_dict)
    own = model.state_dict()
    if (
        "pos_embed" in state_dict
        and "pos_embed" in own
        and state_dict["pos_embed"].shape[-1] == own["pos_embed"].shape[-1]
    ):
        interpolate_pos_embed(model, state_dict)

    loaded = {k: v for k, v in state_dict.items() if k in own and own[k].shape == v.shape}
    misshaped = [k for k, v in state_dict.items() if k in own and own[k].shape != v.shape and not k.startswith(fresh)]
    missing = [k for k in own if k not in state_dict and not k.startswith(fresh)]
    unexpected = [k for k in state_dict if k not in own and not k.startswith((*fresh, *left_out))]
    problems = [
        f"of another shape: {name} {tuple(state_dict[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in misshaped[:1]
    ]
    problems += [f"missing: {_some(missing)}"] * bool(missing) + [f"unexpected: {_some(unexpected)}"] * bool(unexpected)
    if problems:
        raise ValueError(f"the weights do not fit the model ({'; '.join(problems)}): is this the right --model?")
    model.load_state_dict(loaded, strict=False)
    return LoadReport(
        loaded=list(loaded),
        left_out=[k for k in state_dict if k not in loaded],
        fresh=[k for k in own if k not in loaded],
    )


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def digest(module: nn.Module) -> str:
    """Tells encoders apart: heads go on only with the one they were trained on."""
    summary = hashlib.sha256()
    for value in module.state_dict().values():
        summary.update(value.detach().cpu().contiguous().numpy().tobytes())
    return summary.hexdigest()[:16]
