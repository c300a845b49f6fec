"""Exports for timm, and safetensors files under MAE's names."""

import json
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
        name, settings = f"{source.name}_224", {"num_classes": source.classes}
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
        return name, settings

    def write(self, path: Path) -> None:
        if path.suffix == ".safetensors":
            write_safetensors(path, self.source.model.state_dict())
        else:
            write_file(path, self.source.model.state_dict())

    def check(self, path: Path, images: Tensor) -> Pairs:
        name, settings = self.arguments()
        theirs = timm.create_model(name, checkpoint_path=str(path), **settings).eval()
        tokens = theirs.forward_features(images)
        return compare_outputs(self.source, images, tokens, theirs.forward_head(tokens))

    def usage(self, path: str) -> str:
        name, settings = self.arguments()
        arguments = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        output = "model(images)" if self.source.classes else "model.forward_features(images)"
        return f"""import timm
model = timm.create_model("{name}", checkpoint_path="{path}", {arguments}).eval()
output = {output}  # images normalised with mean {self.source.mean}, std {self.source.std}"""


class Safetensors(Format):
    name = "safetensors"
    opens = "safetensors, and this project"
    suffixes = (".safetensors",)
    holds_decoder = True

    def keeps(self) -> dict[str, Tensor]:
        """Every tensor of the checkpoint, with the model's position embeddings, which may have been resized."""
        return self.source.weights | self.source.model.state_dict()

    def write(self, path: Path) -> None:
        source = self.source
        image = {"mean": json.dumps(source.mean), "std": json.dumps(source.std), "input_size": str(source.input_size)}
        write_safetensors(path, self.keeps(), model=source.name, **image)

    def check(self, path: Path, images: Tensor) -> Pairs:
        require_equal(load_pretrained(path), self.keeps())
        return {}

    def usage(self, path: str) -> str:
        return f"""from safetensors.torch import load_file
weights = load_file("{path}")  # MAE's names
# or, in this project's scripts: --finetune {path} --model {self.source.name} --input_size {self.source.input_size}"""
