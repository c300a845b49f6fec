"""Names that other libraries' ViT backbones give to an encoder's tensors. The tensors themselves are the same."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How a library names the tensors of a ViT backbone.

    Args:
        whole: MAE's names of parameters outside the blocks -> theirs.
        blocks: their name of a block, with {} for its number.
        parts: MAE's names of layers within a block -> theirs.
    """

    whole: dict[str, str]
    blocks: str
    parts: dict[str, str]

    def names(self, depth: int) -> dict[str, str]:
        """MAE's names -> theirs, for an encoder of `depth` blocks. What is not in there has no place in the library."""
        inside = {
            f"blocks.{number}.{ours}.{kind}": f"{self.blocks.format(number)}.{theirs}.{kind}"
            for number in range(depth)
            for ours, theirs in self.parts.items()
            for kind in ("weight", "bias")
        }
        return self.whole | inside

    def convert(self, state_dict: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
        return {theirs: state_dict[ours] for ours, theirs in self.names(depth).items()}


_PARTS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")

# Detectron2's ViT inside SimpleFeaturePyramid (detectron2/modeling/backbone/vit.py). It has neither class token nor
# final norm; the row of the class token in pos_embed is expected, and skipped there (pretrain_use_cls_token).
DETECTRON2 = Layout(
    whole={name: f"backbone.net.{name}" for name in ("pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")},
    blocks="backbone.net.blocks.{}",
    parts={name: name for name in _PARTS},
)

# MMSegmentation's MAE backbone (mmseg/models/backbones/mae.py), which reads `pretrained` without a prefix and, by
# default, has no final norm.
MMSEG = Layout(
    whole={
        "cls_token": "cls_token",
        "pos_embed": "pos_embed",
        "patch_embed.proj.weight": "patch_embed.projection.weight",
        "patch_embed.proj.bias": "patch_embed.projection.bias",
    },
    blocks="layers.{}",
    parts=dict(zip(_PARTS, ("ln1", "attn.qkv", "attn.proj", "ln2", "ffn.layers.0.0", "ffn.layers.1"), strict=True)),
)
