"""Exports for timm, and safetensors files under MAE's names."""

from pathlib import Path
from typing import Any

import timm
from torch import Tensor

from export.base import Format, Pairs, compare_outputs, require_equal, write_safetensors
from util.run.folder import write_file
from util.weights.load import load_pretrained


class Timm(Format):
    name = "timm"
    opens = "timm.create_model"
    suffixes = (".safetensors", ".pth")

    def arguments(self) -> tuple[str, dict[str, Any]]:
        """Name and arguments of `timm.create_model`. A size that timm has no name for is spelled out."""
        source = self.source
        name = f"{source.name}_224"
        settings: dict[str, Any] = {"num_classes": source.classes}
        if source.mean_pooled:
            settings["global_pool"] = "avg"
        if not timm.is_model(name):
            name = "vit_base_patch16_224"
            sizes = {"embed_dim": source.model.embed_dim, "depth": len(source.model.blocks), "num_heads": source.heads}
            settings |= sizes
        if source.input_size != 224:
            settings["img_size"] = source.input_size
        if f"patch{source.patch_size}_" not in name:
            settings["patch_size"] = source.patch_size
        if source.channels != 3:
            settings["in_chans"] = source.channels
        settings["pretrained_cfg_overlay"] = {  # what timm's own transform is made from
            "input_size": (source.channels, source.input_size, source.input_size),
            "mean": tuple(source.mean),
            "std": tuple(source.std),
            "crop_pct": source.crop_pct,
        }
        return name, settings

    def write(self, path: Path) -> None:
        if path.suffix == ".safetensors":
            write_safetensors(path, self.source.model.state_dict(), self.source.header())
        else:
            write_file(path, self.source.model.state_dict())

    def check(self, path: Path, images: Tensor) -> Pairs:
        name, settings = self.arguments()
        theirs = timm.create_model(name, checkpoint_path=str(path), **settings).eval()
        tokens = theirs.forward_features(images)
        return compare_outputs(self.source, images, tokens, theirs.forward_head(tokens))

    def usage(self, path: str) -> str:
        name, settings = self.arguments()
        arguments = "".join(f"    {key}={value!r},\n" for key, value in settings.items())
        output = "model(images)" if self.source.classes else "model.forward_features(images)"
        return f"""import timm
model = timm.create_model(
    "{name}",
    checkpoint_path="{path}",
{arguments}).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
images = transform(image)[None]  # image: a PIL image
output = {output}"""


class Safetensors(Format):
    name = "safetensors"
    opens = "safetensors, and this project"
    suffixes = (".safetensors",)
    holds_decoder = True

    def keeps(self) -> dict[str, Tensor]:
        """Every tensor of the checkpoint, with the model's position embeddings, which may have been resized."""
        return self.source.weights | self.source.model.state_dict()

    def write(self, path: Path) -> None:
        write_safetensors(path, self.keeps(), self.source.header())

    def check(self, path: Path, images: Tensor) -> Pairs:
        require_equal(load_pretrained(path), self.keeps())
        return {}

    def usage(self, path: str) -> str:
        return f"""from safetensors.torch import load_file
weights = load_file("{path}")  # MAE's names
# or, in this project's scripts: --finetune {path}; its header records model, sizes, mean and std"""
