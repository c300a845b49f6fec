"""Exports for the ViT backbones of Detectron2 and MMSegmentation.

Their tensors are the encoder's under other names. Patch embeddings of other sizes are resampled to 16 x 16.
Shapes: B batch, C channels, P patch side, S image side, L patches, E width.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import torch
from timm.layers import resample_patch_embed
from torch import Tensor

from export.base import Format, Pairs, require_equal
from util.run.folder import write_file
from util.weights.read import read_file

# The heads of Detectron2 expect strides from 4 to 64. MMSegmentation attends between all patches of 512 x 512 pixels:
# smaller ones need too much memory.
PATCH_SIZE = 16

BLOCK_LAYERS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")

# ViTDet's configuration of a size, and its layer-wise lr decay; smaller sizes use those of ViT-B.
VITDET_CONFIGS = {"vit_large_patch16": ("l_100ep", 0.8), "vit_huge_patch14": ("h_75ep", 0.9)}


class Backbone(Format):
    """A format that compares tensors instead of opening its library.

    Attributes:
        outside: MAE's names of parameters outside the blocks -> theirs.
        block: their prefix of a block, with {} for its index.
        layers: their names of BLOCK_LAYERS.
        under_model: the file has the tensors under the key "model".
    """

    suffixes = (".pth",)
    opened = False
    outside: ClassVar[dict[str, str]]
    block: ClassVar[str]
    layers: ClassVar[tuple[str, ...]] = BLOCK_LAYERS
    under_model: ClassVar[bool] = False

    @property
    def depth(self) -> int:
        return len(self.source.model.blocks)

    def names(self) -> dict[str, str]:
        """MAE's names of the tensors that the library has -> theirs."""
        names = dict(self.outside)
        for number in range(self.depth):
            for ours, theirs in zip(BLOCK_LAYERS, self.layers, strict=True):
                for kind in ("weight", "bias"):
                    names[f"blocks.{number}.{ours}.{kind}"] = f"{self.block.format(number)}.{theirs}.{kind}"
        return names

    def keeps(self) -> Iterable[str]:
        return self.names()

    def tensors(self) -> dict[str, Tensor]:
        weights = self.source.model.state_dict()
        patches = weights["patch_embed.proj.weight"]  # (E, C, P, P)
        if patches.shape[-1] != PATCH_SIZE:
            weights["patch_embed.proj.weight"] = resample_patch_embed(patches, [PATCH_SIZE, PATCH_SIZE])
        return {theirs: weights[ours] for ours, theirs in self.names().items()}

    def write(self, path: Path) -> None:
        write_file(path, {"model": self.tensors()} if self.under_model else self.tensors())

    def check(self, path: Path, images: Tensor) -> Pairs:
        content = read_file(path)
        require_equal(content["model"] if self.under_model else content, self.tensors())
        return {}

    def scaled(self) -> tuple[list[float], list[float]]:
        """Mean and std for pixels from 0 to 255."""
        return [round(255 * v, 3) for v in self.source.mean], [round(255 * v, 3) for v in self.source.std]

    def note(self) -> str:
        if self.source.patch_size == PATCH_SIZE:
            return ""
        return (
            f"The patch embedding is resampled from {self.source.patch_size} to {PATCH_SIZE} pixels (FlexiViT's "
            "pseudo-inverse, timm.layers.resample_patch_embed): an image resized by the same factor gives nearly the "
            "same tokens."
        )


class Detectron2(Backbone):
    """ViT inside SimpleFeaturePyramid (detectron2/modeling/backbone/vit.py), without class token and final norm.

    pos_embed keeps the row of the class token: the library expects it and drops it (pretrain_use_cls_token).
    """

    name = "detectron2"
    opens = "Detectron2's ViTDet"
    outside: ClassVar = {
        name: f"backbone.net.{name}" for name in ("pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")
    }
    block = "backbone.net.blocks.{}"
    under_model = True

    def usage(self, path: str) -> str:
        source, (mean, std) = self.source, self.scaled()
        base, lr_decay = VITDET_CONFIGS.get(source.name, ("b_100ep", 0.7))
        whole = [self.depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]  # blocks with global attention
        windowed = [number for number in range(self.depth) if number not in whole]
        return f"""# projects/ViTDet/configs/COCO/hpm.py in a clone of Detectron2
from functools import partial
from .mask_rcnn_vitdet_{base} import dataloader, get_vit_lr_decay_rate, lr_multiplier, model, optimizer, train

train.init_checkpoint = "{path}"
model.backbone.net.embed_dim = {source.model.embed_dim}
model.backbone.net.depth = {self.depth}
model.backbone.net.num_heads = {source.heads}
model.backbone.net.window_block_indexes = {windowed}
model.backbone.net.pretrain_img_size = {source.input_size // source.patch_size * PATCH_SIZE}
model.pixel_mean = {mean}
model.pixel_std = {std}
optimizer.params.lr_factor_func = partial(get_vit_lr_decay_rate, lr_decay_rate={lr_decay}, num_layers={self.depth})"""

    def note(self) -> str:
        return (
            f"{super().note()} Detectron2 initialises relative positions, pyramid and heads. ViTDet has no class "
            f"token. On random images, removing it changes the patch tokens before the final norm by "
            f"{self.without_class_token():.1e} of the largest value."
        ).strip()

    @torch.no_grad()
    def without_class_token(self) -> float:
        """Largest change of the patch tokens when the class token is removed, relative to the largest value."""
        model, size = self.source.model, self.source.input_size
        images = torch.randn(2, self.source.channels, size, size, generator=torch.Generator().manual_seed(0))
        with_token = model.patch_embed(images)  # (B, L, E)
        without = with_token + model.pos_embed[:, 1:]
        with_token = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(2, -1, -1), without], dim=1)
        with_token, without = model.blocks(with_token)[:, 1:], model.blocks(without)
        return float((with_token - without).abs().max() / with_token.abs().max())


class MMSeg(Backbone):
    """MMSegmentation's MAE backbone (mmseg/models/backbones/mae.py), which by default has no final norm."""

    name = "mmseg"
    opens = "MMSegmentation's MAE backbone"
    outside: ClassVar = {
        "cls_token": "cls_token",
        "pos_embed": "pos_embed",
        "patch_embed.proj.weight": "patch_embed.projection.weight",
        "patch_embed.proj.bias": "patch_embed.projection.bias",
    }
    block = "layers.{}"
    layers = ("ln1", "attn.qkv", "attn.proj", "ln2", "ffn.layers.0.0", "ffn.layers.1")

    def usage(self, path: str) -> str:
        source, (mean, std), width = self.source, self.scaled(), self.source.model.embed_dim
        taps = [self.depth // 3 - 1, self.depth // 2 - 1, 2 * self.depth // 3 - 1, self.depth - 1]
        return f"""# configs/mae/hpm.py in a clone of MMSegmentation
_base_ = ["./mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py"]
model = dict(
    pretrained="{path}",
    data_preprocessor=dict(mean={mean}, std={std}),
    backbone=dict(
        patch_size={PATCH_SIZE},
        embed_dims={width},
        num_layers={self.depth},
        num_heads={source.heads},
        out_indices={taps},
        init_values=1.0,
        norm_cfg=dict(type="LN", eps=1e-6),
    ),
    neck=dict(embed_dim={width}),
    decode_head=dict(in_channels={[width] * 4}, channels={width}),
    auxiliary_head=dict(in_channels={width}),
)
optim_wrapper = dict(paramwise_cfg=dict(num_layers={self.depth}))"""

    def note(self) -> str:
        return f"""{super().note()} Relative positions are initialised to zero. MMSegmentation reports neither missing \
nor unexpected tensors. These lines check that the weights are loaded:

```python
import torch, mmengine, mmseg.registry, mmseg.utils
mmseg.utils.register_all_modules()
model = mmseg.registry.MODELS.build(mmengine.Config.fromfile("configs/mae/hpm.py").model)
model.init_weights()
expected = torch.load(model.backbone.init_cfg["checkpoint"])["layers.{self.depth - 1}.ffn.layers.1.weight"]
assert torch.equal(model.backbone.layers[-1].ffn.layers[1].weight, expected)
```""".strip()
