"""The ViT classifier for fine-tuning, linear probing and k-NN, with the parameter names of MAE's (models_vit.py there).

Shapes: B batch, C channels, H, W image, L patches, E width, K classes, S heads.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm.models.vision_transformer as timm_vit
import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from util.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from util.run.distributed import all_reduce_sum


class VisionTransformer(timm_vit.VisionTransformer):
    """timm's ViT. With `global_pool` the mean of the patch tokens goes through `fc_norm`; without, all tokens go
    through `norm` and the class token is taken.

    Args:
        img_size: side of the image or (height, width), in pixels; a multiple of the patch size.
        num_classes: outputs; 0 for none, `forward` then gives the pooled features.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 at the first.

    Raises:
        ValueError: the patch size does not divide the image.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_classes: int = 1000,
        global_pool: bool = False,
        drop_path_rate: float = 0.0,
        in_chans: int = 3,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[[int], nn.Module] = partial(nn.LayerNorm, eps=1e-6),
    ) -> None:
        h, w = (img_size, img_size) if isinstance(img_size, int) else img_size
        if h % patch_size or w % patch_size or min(h, w) < patch_size:
            raise ValueError(f"patch size {patch_size} does not divide an image of {h} x {w}")
        super().__init__(
            img_size=(h, w),
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool="avg" if global_pool else "token",
            fc_norm=global_pool,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            norm_layer=norm_layer,
        )
        if num_classes:
            trunc_normal_(self.head.weight, std=2e-5)  # MAE starts fine-tuning from near-zero logits

    def pooled_features(self, imgs: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, E): what the head would see."""
        return self.forward_head(self.forward_features(imgs), pre_logits=True)


_size = partial(partial, VisionTransformer)

vit_micro_patch16 = _size(patch_size=16, embed_dim=128, depth=6, num_heads=4)
vit_tiny_patch16 = _size(patch_size=16, embed_dim=192, depth=12, num_heads=3)
vit_small_patch16 = _size(patch_size=16, embed_dim=384, depth=12, num_heads=6)
vit_base_patch16 = _size(patch_size=16, embed_dim=768, depth=12, num_heads=12)
vit_large_patch16 = _size(patch_size=16, embed_dim=1024, depth=24, num_heads=16)
vit_huge_patch14 = _size(patch_size=14, embed_dim=1280, depth=32, num_heads=16)

MODELS = {name: build for name, build in list(globals().items()) if name.startswith("vit_")}


class FeatureNorm(nn.Module):
    """Batch norm without parameters, for features that take no gradient: (B, E) -> (B, E), (MAE's linear probe).

    In training it normalises with the statistics of the batches of all ranks, so that a probe does not depend on how
    many ranks train it.
    """

    def __init__(self, width: int, eps: float = 1e-6, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        assert not x.requires_grad
        mean, variance = self.running_mean, self.running_var
        if self.training:
            sums = torch.stack([x.sum(0), x.square().sum(0), torch.full_like(x[0], len(x))]).double()
            total, squares, count = all_reduce_sum(sums)
            mean = total / count
            variance = (squares / count - mean.square()).clamp(min=0)
            self.running_mean.lerp_(mean.float(), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).float(), self.momentum)
        return ((x - mean) * (variance + self.eps).rsqrt()).to(x.dtype)


class LinearProbe(nn.Module):
    """Linear heads, trained side by side, on the features of a frozen encoder: (B, C, H, W) -> logits (S, B, K).

    Args:
        encoder: in eval mode and without gradient, always. With global pooling its `fc_norm` is as initialised, which
            makes it a layer norm without parameters.
        num_heads: S.
    """

    def __init__(self, encoder: VisionTransformer, num_heads: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.norm = FeatureNorm(encoder.embed_dim)
        self.heads = nn.ModuleList()
        for _ in range(num_heads):  # one after the other, so that a head begins alike however many there are
            head = nn.Linear(encoder.embed_dim, num_classes)
            trunc_normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
            self.heads.append(head)

    def train(self, mode: bool = True) -> "LinearProbe":
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, imgs: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.encoder.pooled_features(imgs)  # (B, E)
        with torch.autocast(imgs.device.type, enabled=False):
            features = self.norm(features.float())
            return torch.stack([head(features) for head in self.heads])  # (S, B, K)


def classifier_name(pretrained: str) -> str:
    """mae_vit_base_patch16_dec512d8b -> vit_base_patch16: the classifier on the encoder of a pre-training model."""
    return pretrained.removeprefix("mae_").split("_dec")[0]


def settings_of(meta: dict[str, Any]) -> dict[str, Any]:
    """Model, sizes, mean and std that a checkpoint says it has (read_meta); {} if it says nothing."""
    if not meta:
        return {}
    sizes = {name: meta["options"][name] for name in ("input_size", "patch_size")}
    return {"model": classifier_name(meta["model"]), **sizes, **meta["image"]}


def defaults_of(meta: dict[str, Any]) -> dict[str, Any]:
    """`settings_of`, and for what a checkpoint does not say, ViT-B at 224 pixels on ImageNet."""
    image = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    return {"model": "vit_base_patch16", "input_size": 224, **image, **settings_of(meta)}


def build(name: str, img_size: int, patch_size: int | None, **settings: Any) -> VisionTransformer:
    """The model of size `name`, with patches as the name says where `patch_size` is None."""
    patch = {} if patch_size is None else {"patch_size": patch_size}
    return MODELS[name](img_size=img_size, **patch, **settings)


def size_of(weights: dict[str, Tensor]) -> str | None:
    """Name of the size that weights (MAE's names) are of, by width and depth; None if it is none of ours."""
    depth = 0
    while f"blocks.{depth}.norm1.weight" in weights:
        depth += 1
    found = {"embed_dim": weights["cls_token"].shape[-1], "depth": depth}
    return next((name for name, build in MODELS.items() if found.items() <= build.keywords.items()), None)


def fold_feature_norm(
    weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """One linear layer in place of `FeatureNorm` and a head: (K, E), (K,), (E,), (E,) -> (K, E), (K,)."""
    folded = weight.double() * (variance.double() + eps).rsqrt()
    return folded.float(), (bias.double() - folded @ mean.double()).float()
