"""Semantic segmentation on a ViT: UPerNet as MMSegmentation builds it on its MAE backbone, and a frozen linear head.

Shapes: B batch, C channels, H, W image, S side of the model's input, h, w grid of patches, L = h * w, E width,
K classes, D channels of a head.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from torch import Tensor, nn

import models_vit
from util import lr_decay
from util.weights.load import DECODERS, LoadReport, load_into

HEADS = ("fc_norm.", "head.")  # of classifiers, whose encoders are used here


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(B, D, h, w) -> (B, D, *size), bilinear."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def conv(in_channels: int, out_channels: int, side: int) -> nn.Sequential:
    """Convolution, batch norm and ReLU at the same size."""
    convolution = nn.Conv2d(in_channels, out_channels, side, padding=side // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


def classifier(in_channels: int, num_classes: int) -> nn.Conv2d:
    layer = nn.Conv2d(in_channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


class UPerHead(nn.Module):
    """Unified perceptual parsing: pyramid pooling on the coarsest map, then a feature pyramid.

    Four maps (B, E, h_i, w_i), finest first -> logits (B, K, h_0, w_0).
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), conv(in_channels, channels, 1)) for side in (1, 2, 3, 6)
        )
        self.bottleneck = conv(in_channels + 4 * channels, channels, 3)
        self.laterals = nn.ModuleList(conv(in_channels, channels, 1) for _ in range(3))
        self.outputs = nn.ModuleList(conv(channels, channels, 3) for _ in range(3))
        self.fuse = conv(4 * channels, channels, 3)
        self.dropout = nn.Dropout2d(0.1)
        self.classify = classifier(channels, num_classes)

    def forward(self, maps: list[Tensor]) -> Tensor:
        coarsest = maps[-1]
        pooled = [resize(pool(coarsest), coarsest.shape[2:]) for pool in self.pools]
        laterals = [lateral(fine) for lateral, fine in zip(self.laterals, maps, strict=False)]
        laterals.append(self.bottleneck(torch.cat([coarsest, *pooled], dim=1)))
        for i in (2, 1, 0):
            laterals[i] = laterals[i] + resize(laterals[i + 1], laterals[i].shape[2:])
        outputs = [output(lateral) for output, lateral in zip(self.outputs, laterals, strict=False)]
        outputs.append(laterals[-1])
        outputs = [resize(output, outputs[0].shape[2:]) for output in outputs]
        return self.classify(self.dropout(self.fuse(torch.cat(outputs, dim=1))))


class UPerNet(nn.Module):
    """UPerNet on a ViT with LayerScale and relative position biases, an auxiliary head on the third tap from the end.

    Args:
        crop: S, the only size of image that the encoder takes.
        taps: the four blocks, from 0, whose patch tokens the pyramid is made of; None spreads them over the depth.
        channels: D of the head; None for E.
    """

    loss_weights = (1.0, 0.4)  # of the head's logits and the auxiliary head's

    def __init__(
        self,
        crop: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        drop_path_rate: float = 0.1,
        taps: Sequence[int] | None = None,
        channels: int | None = None,
        aux_channels: int = 256,
    ) -> None:
        super().__init__()
        self.crop, self.num_classes, self.depth = crop, num_classes, depth
        self.taps = list(taps or (depth // 3 - 1, depth // 2 - 1, 2 * depth // 3 - 1, depth - 1))
        self.encoder = Beit(
            img_size=crop,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            num_classes=0,
            global_pool="",
            init_values=1.0,
            use_rel_pos_bias=True,
            drop_path_rate=drop_path_rate,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        self.encoder.norm = nn.Identity()  # unused, and DDP rejects parameters without a gradient
        self.up_4x = nn.Sequential(
            nn.ConvTranspose2d(embed_dim, embed_dim, 2, stride=2),
            nn.BatchNorm2d(embed_dim),
            nn.GELU(),
            nn.ConvTranspose2d(embed_dim, embed_dim, 2, stride=2),
        )
        self.up_2x = nn.ConvTranspose2d(embed_dim, embed_dim, 2, stride=2)
        self.head = UPerHead(embed_dim, channels or embed_dim, num_classes)
        self.auxiliary = nn.Sequential(
            conv(embed_dim, aux_channels, 3), nn.Dropout2d(0.1), classifier(aux_channels, num_classes)
        )
        # The position indices of the blocks are constants of 8 MB each at 512 pixels: DDP must not broadcast them.
        constants = [name for name, _ in self.named_buffers() if name.startswith("encoder.")]
        self._ddp_params_and_buffers_to_ignore = constants

    def forward(self, imgs: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, S, S) -> logits (B, K, 4 h, 4 w) and the auxiliary head's (B, K, h, w)."""
        maps = self.encoder.forward_intermediates(imgs, self.taps, norm=False, intermediates_only=True)  # (B, E, h, w)
        pyramid = [self.up_4x(maps[0]), self.up_2x(maps[1]), maps[2], F.max_pool2d(maps[3], 2)]
        return self.head(pyramid), self.auxiliary(maps[2])

    def load_encoder(self, weights: dict[str, Tensor]) -> LoadReport:
        """Load pre-trained weights (MAE's names). The key part of each qkv bias is unused: it cancels in the softmax.

        Raises:
            ValueError: the weights do not fit the encoder.
        """
        weights = dict(weights)
        unused = [*DECODERS, *HEADS, "norm."]
        for name in [name for name in weights if name.endswith("attn.qkv.bias") and name.startswith("blocks.")]:
            query, key, value = weights.pop(name).chunk(3)
            stem = name.removesuffix("qkv.bias")
            weights |= {f"{stem}q_bias": query, f"{stem}k_bias": key, f"{stem}v_bias": value}
            unused.append(f"{stem}k_bias")
        new = [n for n, _ in self.encoder.named_parameters() if "gamma_" in n or "relative_position_bias_table" in n]
        return load_into(self.encoder, weights, new, unused)


class FrozenEncoder(nn.Module):
    """Patch tokens of a frozen ViT after its final norm: (B, 3, S, S) -> (B, E, h, w)."""

    def __init__(self, encoder: models_vit.VisionTransformer) -> None:
        super().__init__()
        self.depth = len(encoder.blocks)
        self.encoder = encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "FrozenEncoder":
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, imgs: Tensor) -> Tensor:
        with torch.no_grad():
            tokens = self.encoder.forward_features(imgs)[:, 1:]  # (B, L, E)
        return tokens.transpose(1, 2).unflatten(2, self.encoder.patch_embed.grid_size)

    def load_encoder(self, weights: dict[str, Tensor]) -> LoadReport:
        """Load pre-trained weights (MAE's names).

        Raises:
            ValueError: the weights do not fit the encoder, or lack the norm of the patch tokens.
        """
        if "fc_norm.weight" in weights and "norm.weight" not in weights:
            raise ValueError(
                "these weights were fine-tuned with a norm of the pooled features (fc_norm) and have none for patch "
                "tokens: give the pre-trained checkpoint, or --head upernet, which uses no norm"
            )
        return load_into(self.encoder, weights, allow_unexpected=(*DECODERS, *HEADS))


class LinearSegmenter(FrozenEncoder):
    """Batch norm and one linear layer on the features of a frozen encoder (DINOv3)."""

    loss_weights = (1.0,)

    def __init__(self, encoder: models_vit.VisionTransformer, crop: int, num_classes: int) -> None:
        super().__init__(encoder)
        self.crop, self.num_classes, width = crop, num_classes, encoder.embed_dim
        self.head = nn.Sequential(nn.Dropout2d(0.1), nn.BatchNorm2d(width), classifier(width, num_classes))

    def forward(self, imgs: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, S, S) -> logits (B, K, h, w)."""
        return (self.head(super().forward(imgs)),)


def build(
    head: str, name: str, size: int, patch_size: int | None, num_classes: int, drop_path: float
) -> UPerNet | FrozenEncoder:
    """The model of a head ("upernet", "linear", or a probe's: features only) on a ViT of size `name` (models_vit)."""
    if head == "upernet":
        sizes: dict[str, Any] = models_vit.SIZES[name] | ({} if patch_size is None else {"patch_size": patch_size})
        models_vit.image_size(size, sizes["patch_size"])  # raises if the patch size does not divide it
        return UPerNet(size, **sizes, num_classes=num_classes, drop_path_rate=drop_path)
    encoder = models_vit.build(name, size, patch_size, num_classes=0, global_pool=False)
    return LinearSegmenter(encoder, size, num_classes) if head == "linear" else FrozenEncoder(encoder)


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float, decay_positions: bool = True
) -> list[dict[str, Any]]:
    """Groups for the optimizer: all outside the encoder counts as the head of layer-wise decay (MMSegmentation).

    Args:
        decay_positions: weight decay on positions, class token and bias tables. BEiT means to spare them, but its rule
            never matches in MMSegmentation.
    """
    positions = ("pos_embed", "cls_token", "relative_position_bias_table")
    spared = [] if decay_positions else [name for name, _ in model.named_parameters() if name.endswith(positions)]

    def layer_of(name: str, num_layers: int) -> int:
        return lr_decay.layer_of(name.removeprefix("encoder."), num_layers)

    return lr_decay.param_groups_lrd(model, weight_decay, spared, layer_decay, layer_of, model.depth + 1)


def loss(outputs: Sequence[Tensor], labels: Tensor, weights: Sequence[float], ignore_index: int) -> Tensor:
    """Weighted cross-entropies of logits (B, K, h, w), resized to the labels (B, H, W): a scalar.

    Each is the sum over the valid pixels divided by the number of all pixels, as in MMSegmentation: a batch of ignored
    pixels costs nothing.
    """
    total = outputs[0].new_zeros((), dtype=torch.float32)
    for logits, weight in zip(outputs, weights, strict=True):
        logits = resize(logits.float(), labels.shape[1:])
        pixels = F.cross_entropy(logits, labels.long(), ignore_index=ignore_index, reduction="sum")
        total = total + weight * pixels / labels.numel()
    return total


def windows(length: int, side: int, stride: int) -> list[int]:
    """Where windows of `side` begin so that they cover `length`: every `stride`, the last one moved back to fit.

    >>> windows(150, 64, 43)
    [0, 43, 86]
    """
    count = max(length - side + stride - 1, 0) // stride + 1
    return [max(min(start * stride, length - side), 0) for start in range(count)]


@torch.no_grad()
def slide(
    predict: Callable[[Tensor], Tensor], image: Tensor, side: int, stride: int, num_classes: int, batch: int = 8
) -> Tensor:
    """Logits of an image of any size from overlapping windows, averaged: (C, H, W) normalised -> (K, H, W) float32.

    Args:
        predict: (B, C, side, side) -> logits (B, K, h, w).
        batch: windows that are predicted at once.
    """
    height, width = image.shape[1:]
    image = F.pad(image, (0, max(side - width, 0), 0, max(side - height, 0)))  # zeros are the mean colour
    logits = image.new_zeros(num_classes, *image.shape[1:], dtype=torch.float32)
    count = image.new_zeros(image.shape[1:])
    places = [(top, left) for top in windows(height, side, stride) for left in windows(width, side, stride)]
    for start in range(0, len(places), batch):
        chunk = places[start : start + batch]
        crops = torch.stack([image[:, top : top + side, left : left + side] for top, left in chunk])
        for (top, left), prediction in zip(chunk, resize(predict(crops).float(), (side, side)), strict=True):
            logits[:, top : top + side, left : left + side] += prediction
            count[top : top + side, left : left + side] += 1
    return (logits / count)[:, :height, :width]
