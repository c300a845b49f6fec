"""Exports for the ViT backbones of Detectron2 and MMSegmentation. Only the names of the tensors change.

Shapes: B batch, C channels, S image side.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from export.base import Format, Pairs, require_equal
from util.run.folder import write_file
from util.weights.read import read_file

BLOCK_LAYERS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


class Backbone(Format):
    """A format that differs from MAE's in names alone. Its library is not needed for the check.

    Attributes:
        outside: MAE's names of parameters outside the blocks -> theirs.
        block: their prefix of a block, with {} for its index.
        layers: their names of BLOCK_LAYERS.
        under_model: the file holds the tensors under the key "model".
    """

    suffixes = (".pth",)
    opened = False
    outside: ClassVar[dict[str, str]]
    block: ClassVar[str]
    layers: ClassVar[tuple[str, ...]] = BLOCK_LAYERS
    under_model: ClassVar[bool] = False

    def names(self) -> dict[str, str]:
        """MAE's names of the tensors that the library has -> theirs."""
        names = dict(self.outside)
        for number in range(len(self.source.model.blocks)):
            for ours, theirs in zip(BLOCK_LAYERS, self.layers, strict=True):
                for kind in ("weight", "bias"):
                    names[f"blocks.{number}.{ours}.{kind}"] = f"{self.block.format(number)}.{theirs}.{kind}"
        return names

    def keeps(self) -> Iterable[str]:
        return self.names()

    def tensors(self) -> dict[str, Tensor]:
        weights = self.source.model.state_dict()
        return {theirs: weights[ours] for ours, theirs in self.names().items()}

    def write(self, path: Path) -> None:
        write_file(path, {"model": self.tensors()} if self.under_model else self.tensors())

    def check(self, path: Path, images: Tensor) -> Pairs:
        content = read_file(path)
        require_equal(content["model"] if self.under_model else content, self.tensors())
        return {}


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
        source = self.source
        patch_size = "" if source.patch_size == 16 else f"model.backbone.net.patch_size = {source.patch_size}\n"
        return f"""# in projects/ViTDet/configs/COCO/mask_rcnn_vitdet_b_100ep.py, or that of the model's size:
train.init_checkpoint = "{path}"
{patch_size}model.backbone.net.pretrain_img_size = {source.input_size}"""

    def note(self) -> str:
        return (
            "Backbone of ViTDet. Relative positions, pyramid and heads are newly initialised by the config. The check "
            "compares names, shapes and values; it does not open the file in Detectron2."
        )


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
        source = self.source
        depth = len(source.model.blocks)
        sizes = f"patch_size={source.patch_size}, embed_dims={source.model.embed_dim}, num_layers={depth}"
        return f"""# in a config of MMSegmentation (configs/mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py):
model = dict(pretrained="{path}", backbone=dict(type="MAE",
             {sizes}, num_heads={source.heads}, init_values=1.0, norm_cfg=dict(type="LN", eps=1e-6)))"""

    def note(self) -> str:
        return (
            "`init_values=1.0` is required: any other value scales the layers. Relative positions are initialised to "
            "zero. MMSegmentation ignores missing keys: look for 'unexpected key' in its log. The check compares "
            "names, shapes and values; it does not open the file in MMSegmentation."
        )
