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

from util.run.distributed import all_reduce_sum
from util.weights.meta import count_blocks


def image_size(img_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """(height, width) of the images that a model is built for.

    Raises:
        ValueError: the patch size does not divide it.
    """
    h, w = (img_size, img_size) if isinstance(img_size, int) else img_size
    if h % patch_size or w % patch_size or min(h, w) < patch_size:
        raise ValueError(
            f"patch size {patch_size} does not divide an image of {h} x {w}: choose a multiple of {patch_size}"
        )
    return h, w


class VisionTransformer(timm_vit.VisionTransformer):
    """timm's ViT: (B, C, H, W) -> logits (B, K).

    With `global_pool` the head reads `fc_norm` of the mean patch token, otherwise the class token after `norm`.

    Args:
        img_size: side or (height, width) of the images in pixels, a multiple of the patch size.
        num_classes: K; with 0, `forward` returns the pooled features (B, E).
        pooled_norm: with `global_pool`, pool before the norm; without, the mean is that of the normed patch tokens.
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
        pooled_norm: bool = True,
        drop_path_rate: float = 0.0,
        in_chans: int = 3,
        mlp_ratio: float = 4.0,
        norm_layer: Callable[[int], nn.Module] = partial(nn.LayerNorm, eps=1e-6),
    ) -> None:
        super().__init__(
            img_size=image_size(img_size, patch_size),
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool="avg" if global_pool else "token",
            fc_norm=global_pool and pooled_norm,
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
        """(B, C, H, W) -> input of the head (B, E)."""
        return self.forward_head(self.forward_features(imgs), pre_logits=True)


class FeatureNorm(nn.Module):
    """Batch norm without affine parameters (MAE's linear probe), for features without gradients: (B, E) -> (B, E).

    In training it uses the statistics of a micro-batch of all ranks, so a probe depends on --accum_iter, but not on how
    a micro-batch is spread over the ranks.
    """

    running_mean: Tensor
    running_var: Tensor

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
            unbiased = variance * count / (count - 1).clamp(min=1)  # a batch of one has no unbiased variance
            self.running_var.lerp_(unbiased.float(), self.momentum)
        return ((x - mean) * (variance + self.eps).rsqrt()).to(x.dtype)


class LinearProbe(nn.Module):
    """Linear heads, trained in parallel on the features of a frozen encoder: (B, C, H, W) -> logits (S, B, K).

    Args:
        encoder: kept in eval mode and without gradients. With global pooling its `fc_norm` is that of a
            fine-tuned checkpoint, else newly initialised (weight 1, bias 0).
        num_heads: S.
    """

    def __init__(self, encoder: VisionTransformer, num_heads: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.norm = FeatureNorm(encoder.embed_dim)
        self.heads = nn.ModuleList()
        for _ in range(num_heads):  # in order: the initial values of a head do not depend on the number of heads
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
            features = self.encoder(imgs)  # (B, E)
        with torch.autocast(imgs.device.type, enabled=False):
            features = self.norm(features.float())
            return torch.stack([head(features) for head in self.heads])  # (S, B, K)


SIZES = {
    "vit_micro_patch16": {"patch_size": 16, "embed_dim": 128, "depth": 6, "num_heads": 4},
    "vit_tiny_patch16": {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small_patch16": {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base_patch16": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large_patch16": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vit_huge_patch14": {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16},
}


def build(
    name: str, img_size: int | tuple[int, int] = 224, patch_size: int | None = None, **settings: Any
) -> VisionTransformer:
    """The model of size `name` (a key of `SIZES`), by default with the patch size in its name."""
    sizes = SIZES[name] if patch_size is None else {**SIZES[name], "patch_size": patch_size}
    return VisionTransformer(img_size, **{**sizes, **settings})


MODELS: dict[str, Callable[..., VisionTransformer]] = {name: partial(build, name) for name in SIZES}

vit_micro_patch16 = MODELS["vit_micro_patch16"]
vit_tiny_patch16 = MODELS["vit_tiny_patch16"]
vit_small_patch16 = MODELS["vit_small_patch16"]
vit_base_patch16 = MODELS["vit_base_patch16"]
vit_large_patch16 = MODELS["vit_large_patch16"]
vit_huge_patch14 = MODELS["vit_huge_patch14"]


def size_of(weights: dict[str, Tensor]) -> str | None:
    """The key of `SIZES` with the width and depth of `weights` (MAE's names); None if there is none."""
    found = {"embed_dim": weights["cls_token"].shape[-1], "depth": count_blocks(weights, "blocks")}
    return next((name for name, sizes in SIZES.items() if found.items() <= sizes.items()), None)


def fold_feature_norm(
    weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Fold `FeatureNorm` into a head's weight and bias: (K, E), (K,), (E,), (E,) -> (K, E), (K,)."""
    folded = weight.double() * (variance.double() + eps).rsqrt()
    return folded.float(), (bias.double() - folded @ mean.double()).float()
