"""Encoders and classifiers from weight files of any format, with the preprocessing of their evaluation.

    model, transform = load_encoder("output_dir/checkpoint-last.pth")
    features = model(transform(image)[None])  # image: a PIL image; (1, E)

Shapes: B batch, H, W image, L patches, E width, K classes.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import models_vit
from util.data.transforms import EvaluationTransform, check_statistics
from util.run.classwise import output_names
from util.run.folder import read_log
from util.run.resolve import evaluation_crop
from util.weights.load import DECODERS, LoadReport, fingerprint, load_into, load_pretrained, read_meta, warn_unfinished
from util.weights.meta import DEFAULTS, settings_of

HEADS = ("head.", "fc_norm.", "norm.")


def load_encoder(
    path: str | Path,
    which: str = "student",
    *,
    global_pool: bool | None = None,
    encoder: str | None = None,
    head: int | None = None,
    **settings: Any,
) -> tuple[models_vit.VisionTransformer, EvaluationTransform]:
    """The encoder of a weight file in eval mode, and the transform of its images.

    `model(images)` gives features (B, E), `model.forward_features(images)` the normed tokens (B, 1 + L, E), class token
    first. A transform takes a PIL image and gives what evaluation feeds to the model, (3, S, S).

    Args:
        path: a checkpoint of this project (pre-training, fine-tuning, linear probe), of HPM, MAE, DINO or timm, a
            .safetensors file or a Hugging Face folder.
        which: weights of an HPM checkpoint, "student" or "ema".
        global_pool: pool by the mean of the patch tokens, or by the class token. The default is that of the classifier
            in the file, and the class token for other files, as in main_knn.py.
        encoder, head: of a linear probe, as in `read_weights`. The features are those of any head.
        settings: model, input_size, crop_pct, mean, std or value_range, for files that do not record them.

    Raises:
        ValueError: no such weights, they are not a ViT of this family, or they lack the norm of the class token.
    """
    return encoder_of(path, *read_weights(path, which, encoder, head), global_pool=global_pool, **settings)


def encoder_of(
    path: str | Path, weights: dict[str, Tensor], meta: dict[str, Any], *, global_pool: bool | None, **settings: Any
) -> tuple[models_vit.VisionTransformer, EvaluationTransform]:
    """`load_encoder` of weights that `read_weights` read from `path`."""
    shape, transform = describe_weights(path, weights, meta, **settings)
    model, _ = build_encoder(weights, *shape, global_pool=global_pool, path=path)
    return model, transform


def load_classifier(
    path: str | Path, which: str = "student", *, encoder: str | None = None, head: int | None = None, **settings: Any
) -> tuple[models_vit.VisionTransformer, EvaluationTransform, list[str]]:
    """The classifier of a weight file, (B, 3, S, S) -> logits (B, K), its transform, and the names of its classes.

    Other arguments as in `load_encoder`.

    Returns:
        The names are [] if the file records none, and numbers for the labels of a list file.

    Raises:
        ValueError: as in `load_encoder`, or the file has no head.
    """
    return classifier_of(path, *read_weights(path, which, encoder, head), **settings)


def classifier_of(
    path: str | Path, weights: dict[str, Tensor], meta: dict[str, Any], **settings: Any
) -> tuple[models_vit.VisionTransformer, EvaluationTransform, list[str]]:
    """`load_classifier` of weights that `read_weights` read from `path`."""
    if "head.weight" not in weights:
        raise ValueError(
            f"{path} is an encoder without a classifier: fine-tune it (main_finetune.py) or train a probe on it "
            "(main_linprobe.py) first"
        )
    (name, size, patch), transform = describe_weights(path, weights, meta, **settings)
    classes, pooled = len(weights["head.weight"]), "fc_norm.weight" in weights
    model = models_vit.build(name, size, patch, num_classes=classes, global_pool=pooled)
    load_into(model, weights, allow_unexpected=(*DECODERS, "norm.") if pooled else DECODERS)
    record = meta.get("options", {}).get("classes") or {"names": [], "numbered": False}
    names = output_names(record, classes) if record["names"] or record["numbered"] else []
    return model.eval(), transform, names


def build_encoder(
    weights: dict[str, Tensor], name: str, input_size: int, patch_size: int, *, global_pool: bool | None, path: Any
) -> tuple[models_vit.VisionTransformer, LoadReport]:
    """The encoder of size `name` with `weights`, in eval mode: (B, C, H, W) -> pooled features after the norm (B, E).

    Args:
        global_pool: as in `load_encoder`.
        path: whose weights they are, for error messages.

    Raises:
        ValueError: the weights do not fit, or lack the norm of the class token.
    """
    check_pooling(weights, global_pool, path)
    if global_pool is None:
        global_pool = "fc_norm.weight" in weights
    model = models_vit.build(
        name, input_size, patch_size, num_classes=0, global_pool=global_pool, pooled_norm=has_pooled_norm(weights)
    )
    report = load_into(model, weights, allow_unexpected=(*DECODERS, "head.", "fc_norm."))
    return model.eval(), report


def has_pooled_norm(weights: dict[str, Tensor]) -> bool:
    """Whether the weights were fine-tuned with global pooling: they then have `fc_norm` instead of the final norm."""
    return "fc_norm.weight" in weights and "norm.weight" not in weights


def check_pooling(weights: dict[str, Tensor], global_pool: bool | None, path: Any) -> None:
    """Raises ValueError if the class token is requested of weights that lack its norm (`has_pooled_norm`)."""
    if global_pool is False and has_pooled_norm(weights):
        raise ValueError(f"{path} was fine-tuned with global pooling and has no class token norm: --global_pool")


def describe_weights(
    path: str | Path,
    weights: dict[str, Tensor],
    meta: dict[str, Any],
    *,
    model: str | None = None,
    input_size: int | None = None,
    crop_pct: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    value_range: Sequence[float] | None = None,
) -> tuple[tuple[str, int, int], EvaluationTransform]:
    """Size name, image size and patch size of weights, and their transform; what is given replaces what is recorded.

    Raises:
        ValueError: they are not a ViT of this family and of a known size, or not of RGB images, or mean or standard
            deviation are not those of values in 0..1.
    """
    check_family(path, weights)
    name = model or settings_of(meta).get("model") or size_name(path, weights)
    channels, patch = weights["patch_embed.proj.weight"].shape[1:3]
    if channels != 3:
        raise ValueError(f"{path} takes {channels}-channel images; only RGB is supported")
    own_size = math.isqrt(weights["pos_embed"].shape[1] - 1) * patch
    size = input_size or settings_of(meta).get("input_size") or own_size
    recorded = meta.get("options", {})
    given = {"mean": mean, "std": std, "value_range": value_range}
    pixels = {**DEFAULTS, **settings_of(meta), **{key: value for key, value in given.items() if value is not None}}
    check_statistics(pixels["mean"], pixels["std"])
    transform = EvaluationTransform(
        size, crop_pct or evaluation_crop(size, recorded), pixels["mean"], pixels["std"], pixels["value_range"]
    )
    return (name, size, patch), transform


def check_family(path: str | Path, weights: dict[str, Tensor]) -> None:
    """Raises ValueError if a tensor is missing that every ViT of this family has."""
    for key in ("cls_token", "pos_embed", "patch_embed.proj.weight"):
        if key not in weights:
            raise ValueError(f"{path} has no {key}: it is not a ViT of this family")


def size_name(path: str | Path, weights: dict[str, Tensor]) -> str:
    """The name of the size with the width and depth of `weights`; ValueError if there is none."""
    name = models_vit.size_of(weights)
    if name is None:
        width, known = weights["cls_token"].shape[-1], ", ".join(models_vit.MODELS)
        raise ValueError(f"{path}: no model has its depth and width {width} (known: {known})")
    return name


# ------------------------------------------------------------------------------------------------------ linear probes


def read_weights(
    path: str | Path, which: str = "student", encoder: str | None = None, head: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All floating-point weights of a file under MAE's names, and its metadata. A linear probe, whose file holds heads
    only, is joined with its encoder, and its batch norm and one of its heads become one linear layer.

    Args:
        encoder: file that a probe was trained on; None for the one that it records.
        head: number of the probe's head, from 1; None for the best in the log next to it.

    Raises:
        ValueError: no such weights; of a probe, its encoder is missing or another one, or it has no such head.
    """
    meta = read_meta(path)
    if meta.get("script") == "main_linprobe":
        if which == "ema" and meta["options"]["which"] != "ema":
            raise ValueError(f"{path} is a linear probe on the weights of the student: omit --which ema")
        weights = join_probe(Path(path), meta, encoder, head)
    elif encoder or head:
        raise ValueError("--encoder and --head apply only to checkpoints of main_linprobe.py")
    else:
        weights = load_pretrained(path, which)
    pooled = meta.get("options", {}).get("global_pool")
    if "script" not in meta and "head.weight" in weights and pooled not in (None, "fc_norm.weight" in weights):
        raise ValueError(
            f"{path} is a classifier on the mean of normed tokens (global_pool avg without fc_norm), which is not "
            "supported: fine-tune with fc_norm, or with the class token"
        )
    warn_unfinished(path, meta)
    weights = {key: tensor.float() for key, tensor in weights.items() if tensor.is_floating_point()}
    return fold_official_probe(weights), meta


def join_probe(path: Path, meta: dict[str, Any], encoder: str | None, head: int | None) -> dict[str, Tensor]:
    """The encoder of a linear probe and one of its heads, as the weights of a classifier; see `read_weights`."""
    recorded = meta["options"]
    source = encoder or recorded["finetune"]
    if not source or not Path(source).exists():
        raise ValueError(
            f"{path} contains only heads, and their encoder {source or ''} is gone: use --encoder (in Python, encoder=)"
        )
    pooled = recorded["global_pool"]
    model = models_vit.build(
        recorded["model"], recorded["input_size"], recorded["patch_size"], num_classes=0, global_pool=pooled
    )
    weights = load_pretrained(source, recorded["which"])
    load_into(model, weights, ["fc_norm."] if pooled else [], (*DECODERS, *HEADS))
    if fingerprint(model.state_dict()) != recorded["encoder"]:
        raise ValueError(f"{source} is not the encoder that {path} was trained on: use --encoder (in Python, encoder=)")
    state = load_pretrained(path)
    head = head or best_head(path, meta)
    if f"heads.{head - 1}.weight" not in state:
        raise ValueError(f"--head {head}: {path} has {len(recorded['lr'])} heads")
    weight, bias = models_vit.fold_feature_norm(
        state[f"heads.{head - 1}.weight"],
        state[f"heads.{head - 1}.bias"],
        state["norm.running_mean"],
        state["norm.running_var"],
    )
    return {**model.state_dict(), "head.weight": weight, "head.bias": bias}


def best_head(path: Path, meta: dict[str, Any]) -> int:
    """Number of the best head of a linear probe, from 1, according to the log next to the checkpoint.

    Raises:
        ValueError: there are several heads and no log.
    """
    names = [f"lr {lr:g}" for lr in meta["options"]["lr"]]
    lines = [line for line in read_log(path.parent) if line["epoch"] < meta["epoch"]]
    best = lines[-1].get("best_head") if lines else None
    if len(names) == 1:
        return 1
    if best not in names:
        raise ValueError(f"{path} has {len(names)} heads and no log that names the best: use --head (in Python, head=)")
    return names.index(best) + 1


def fold_official_probe(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """MAE's own linear probes, whose head is a batch norm and a linear layer (head.0, head.1), as one layer."""
    if "head.0.running_mean" not in weights:
        return weights
    names = ("head.1.weight", "head.1.bias", "head.0.running_mean", "head.0.running_var")
    weight, bias = models_vit.fold_feature_norm(*(weights[name] for name in names))
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    return {**kept, "head.weight": weight, "head.bias": bias}
