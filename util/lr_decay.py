"""Layer-wise lr decay (BEiT, as in MAE's util/lr_decay.py)."""

from collections.abc import Callable, Collection
from typing import Any

from torch import nn


def layer_of(name: str, num_layers: int) -> int:
    """0 for the embeddings, i + 1 for block i, `num_layers` for all that follows the blocks."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return num_layers


def param_groups_lrd(
    model: nn.Module,
    weight_decay: float = 0.05,
    no_weight_decay_list: Collection[str] = (),
    layer_decay: float = 0.75,
    layer_of: Callable[[str, int], int] = layer_of,
    num_layers: int | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups whose `lr_scale` is 1 at the head and falls by `layer_decay` per block towards the input.

    Vectors and the parameters in `no_weight_decay_list` get no weight decay. Each group lists its parameters' `names`.

    Args:
        layer_of: the layer of a parameter, from its name and `num_layers`.
        num_layers: default: the number of blocks of `model` + 1.
    """
    num_layers = len(model.blocks) + 1 if num_layers is None else num_layers
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, num_layers)
        decayed = parameter.ndim > 1 and name not in no_weight_decay_list
        group = groups.setdefault(
            (layer, decayed),
            {
                "lr_scale": layer_decay ** (num_layers - layer),
                "weight_decay": weight_decay if decayed else 0.0,
                "params": [],
                "names": [],
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
