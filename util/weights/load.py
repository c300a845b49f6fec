"""Loading weights of this and other projects into a model, with an account of every tensor."""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from util.data.classes import Labelled, as_named
from util.data.files import summarize
from util.pos_embed import interpolate_pos_embed
from util.weights.hugging_face import from_hugging_face, is_hugging_face
from util.weights.meta import count_blocks, meta_of_folder, meta_of_header
from util.weights.read import read_file, read_header, strip_wrappers

log = logging.getLogger("hpm")

FORMAT = "hpm"  # `format` of this project's checkpoints

# Tensors of a pre-training checkpoint outside the encoder.
DECODERS = ("decoder_", "mask_token", "vis_mask_token")


def load_pretrained(path: str | Path, which: str = "student") -> dict[str, Tensor]:
    """All weights of a file, under MAE's names.

    Reads checkpoints of this project and of official HPM, MAE's (pre-trained or fine-tuned), DINO's (the teacher), bare
    state dicts (timm), .safetensors files and Hugging Face folders. Of a foreign file in which the encoder is a part of
    a larger model (backbone., encoder., model., ...), the encoder.

    Args:
        which: "student", or "ema" for the EMA teacher of an HPM checkpoint.

    Raises:
        ValueError: no such file, no such weights in it, or a file that would run code.
    """
    content = read_file(path)
    if which == "ema":
        if not isinstance(content.get("ema_state_dict"), dict):
            raise ValueError(f"{path} has no EMA teacher (ema_state_dict): load the student (--which student)")
        return strip_wrappers(content["ema_state_dict"])
    assert which == "student", which
    is_own = content.get("format") == FORMAT
    for key in ("state_dict", "model", "teacher"):  # HPM's files have the first two, and there `model` is a name
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    state_dict = strip_wrappers(content)
    if is_hugging_face(state_dict):
        state_dict = from_hugging_face(state_dict)
    elif not is_own:
        state_dict = _select_encoder(state_dict, path)
    if not state_dict:
        raise ValueError(f"{path} contains no weights; its keys are {', '.join(map(str, list(content)[:8]))}")
    return state_dict


MOCO = ("base_encoder.", "momentum_encoder.")  # MoCo v3's two encoders


def _select_encoder(state_dict: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """The tensors of the first part with a patch embedding, if the model as such has none."""
    marker = "patch_embed.proj.weight"
    prefixes = [name.removesuffix(marker) for name in state_dict if name.endswith(marker)]
    if not prefixes or "" in prefixes:
        return state_dict
    if prefixes[0] in MOCO and len(state_dict[prefixes[0] + marker]) == 384:
        raise ValueError(
            f"{path} is MoCo v3's ViT-S, which has 12 heads; here a ViT-S has 6, and its features would be others. "
            "MoCo's ViT-B can be loaded"
        )
    selected = {k.removeprefix(prefixes[0]): v for k, v in state_dict.items() if k.startswith(prefixes[0])}
    others = [name for name in state_dict if not name.startswith(prefixes[0])]
    log.info("%s: using the part %s; other parts: %s", path, prefixes[0].rstrip("."), summarize_names(others))
    return selected


def read_meta(path: str | Path) -> dict[str, Any]:
    """What a file records about its model: model, options and image statistics; from this project's checkpoints also
    script, epoch and step. Exported .safetensors files have it in their header, Hugging Face folders in their
    configuration. Empty for other files.
    """
    path = Path(path)
    if path.is_dir():
        return meta_of_folder(path)
    if path.suffix == ".safetensors" and path.is_file():
        return meta_of_header(read_header(path), path) or meta_of_folder(path.parent)
    if path.name == "pytorch_model.bin" and (meta := meta_of_folder(path.parent)):  # of transformers or timm
        return meta
    content = read_file(path, tensors=False)
    if content.get("format") != FORMAT:
        return {}
    return {name: content[name] for name in ("script", "model", "epoch", "step", "options", "image")}


def warn_unfinished(path: str | Path, meta: dict[str, Any]) -> None:
    """Warn about weights of a pre-training that is not complete.

    Args:
        meta: as `read_meta`.
    """
    if meta.get("script") == "main_pretrain" and meta["epoch"] < meta["options"]["epochs"]:
        log.warning(
            "%s: pre-training is not complete, %d of %d epochs are done", path, meta["epoch"], meta["options"]["epochs"]
        )


@dataclass(frozen=True)
class LoadReport:
    """Names of the tensors that were loaded, of the file's unused ones, and of the model's newly initialised ones."""

    loaded: list[str]
    unused: list[str]
    newly_initialised: list[str]

    def __str__(self) -> str:
        return (
            f"loaded             {len(self.loaded)} tensors\n"
            f"unused             {summarize_names(self.unused)}\n"
            f"newly initialised  {summarize_names(self.newly_initialised)}"
        )


def log_loaded(path: str | Path, report: LoadReport) -> None:
    """Log which tensors of a file were loaded, and warn if its pre-training is not complete."""
    log.info("weights of %s\n%s", path, report)
    warn_unfinished(path, read_meta(path))


def summarize_names(names: list[str]) -> str:
    """Number of tensors by first part of the name: blocks.0.norm1.weight, ... -> "blocks (144), norm (2)"."""
    groups: dict[str, int] = {}
    for name in names:
        groups[name.split(".")[0]] = groups.get(name.split(".")[0], 0) + 1
    return ", ".join(f"{group} ({count})" for group, count in groups.items()) or "none"


def load_into(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = DECODERS,
) -> LoadReport:
    """Load weights into a model and account for every tensor. Position embeddings are interpolated to the model's grid.

    Args:
        allow_missing: prefixes of tensors that keep their initial values if the file lacks them or has them in another
            shape (a head for other classes).
        allow_unexpected: prefixes of tensors that the file may have and the model lack.

    Raises:
        ValueError: any other missing, unexpected or differently shaped tensor, with its name.
    """
    allow_missing, allow_unexpected = tuple(allow_missing), tuple(allow_unexpected)
    state_dict = dict(state_dict)
    own = model.state_dict()
    if "dist_token" in state_dict and "dist_token" not in own:
        raise ValueError("the weights are of a distilled DeiT, whose distillation token this ViT lacks: use plain DeiT")
    sizes = [weights["pos_embed"].shape[-1] for weights in (state_dict, own) if "pos_embed" in weights]
    if len(sizes) == 2 and sizes[0] == sizes[1]:
        interpolate_pos_embed(model, state_dict)

    loaded = {k: v for k, v in state_dict.items() if k in own and own[k].shape == v.shape}
    mismatched = [k for k in state_dict if k in own and k not in loaded and not k.startswith(allow_missing)]
    missing = [k for k in own if k not in state_dict and not k.startswith(allow_missing)]
    unexpected = [k for k in state_dict if k not in own and not k.startswith((*allow_missing, *allow_unexpected))]
    problems = []
    for name in mismatched[:1]:
        file_shape, own_shape = tuple(state_dict[name].shape), tuple(own[name].shape)
        problems.append(f"shape mismatch: {name} is {file_shape} in the file, {own_shape} in the model")
    if missing:
        problems.append(f"missing: {summarize(missing, 4)}")
    if unexpected:
        problems.append(f"unexpected: {summarize(unexpected, 4)}")
    if problems:
        hint = _hint(state_dict, own, missing, mismatched)
        raise ValueError(f"the weights do not fit the model ({'; '.join(problems)}): {hint}")
    model.load_state_dict(loaded, strict=False)
    return LoadReport(
        loaded=list(loaded),
        unused=[k for k in state_dict if k not in loaded],
        newly_initialised=[k for k in own if k not in loaded],
    )


def fit_head(
    weights: dict[str, Tensor], record: dict[str, Any] | None, source: Labelled, path: str | Path
) -> dict[str, Tensor]:
    """Weights for a new classifier of the classes of `source`: with the outputs of the head in their order, or without
    the head, as a line in the log then says, if it is one of other classes.

    Args:
        record: of the head's classes (`class_record`). Without names, weights are returned unchanged.
        path: whose weights they are, for the log.
    """
    if "head.weight" not in weights or not (record and record["names"]):
        return weights
    outputs = len(weights["head.weight"])
    record = as_named(record, outputs, source)
    if record is None or record["names"] == source.classes:
        return weights
    fitted = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    if sorted(record["names"]) != sorted(source.classes):
        log.info("classes   %s has a head of other classes (%s), which is not used", path, summarize(record["names"]))
        return fitted
    order = [record["names"].index(name) for name in source.classes]
    order += range(len(order), outputs)  # outputs without a class (--nb_classes)
    return fitted | {name: weights[name][order] for name in ("head.weight", "head.bias")}


def _hint(weights: dict[str, Tensor], own: dict[str, Tensor], missing: list[str], mismatched: list[str]) -> str:
    """What may help if these tensors of the model are missing in a file or have another shape there."""
    patches = "patch_embed.proj.weight"  # (E, C, P, P)
    if patches in mismatched and weights[patches].shape[1:2] != own[patches].shape[1:2]:
        return f"they take {weights[patches].shape[1]}-channel images; only RGB is supported"
    same_width = "cls_token" in weights and "cls_token" in own and weights["cls_token"].shape == own["cls_token"].shape
    if same_width and mismatched and mismatched[0].startswith("head."):
        return f"give --nb_classes {len(weights[mismatched[0]])}"
    if same_width and mismatched == [patches]:
        return f"give --patch_size {weights[patches].shape[-1]}"
    if "heads.0.weight" in weights and "cls_token" not in weights:
        return "they are the heads of a linear probe: evaluate them with main_linprobe.py --eval"
    parts = {name.split(".")[0] for name in missing}
    if not mismatched and parts == {"norm"} and "fc_norm.weight" in weights:
        if "mask_token" in own:  # a model of pre-training
            return (
                "they were fine-tuned with the mean of the patch tokens, without the norm of the encoder: take weights "
                "from pre-training, or fine-tuned with --cls_token"
            )
        return "they were fine-tuned with the mean of the patch tokens, so give --global_pool"
    if not mismatched and parts == {"fc_norm"} and "norm.weight" in weights:
        return "they belong to a classifier on the class token, so give --cls_token"
    if mismatched or count_blocks(weights, "blocks") != count_blocks(own, "blocks"):
        return "is this the right --model?"
    return "they are of another architecture"


def fingerprint(state_dict: Mapping[str, Tensor]) -> str:
    """Hash of all tensors: a run may only resume with the weights it started from."""
    sha256 = hashlib.sha256()
    for value in state_dict.values():
        sha256.update(value.detach().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()[:16]
