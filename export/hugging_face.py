"""Exports for transformers: folders that `from_pretrained` opens.

Tensors keep the names of released files, which every version of transformers reads. transformers is imported only when
one of these formats is used. Shapes: B batch, C channels, S image side, L patches, M masked, E width, K classes,
D prediction width.
"""

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from export.base import LAYER_NORM_EPS, Format, Mismatch, Pairs, Source, compare_outputs, write_safetensors
from util import masking
from util.weights.hugging_face import to_hugging_face

FOLDER_CONTENTS = ("README.md", "config.json", "model.safetensors", "preprocessor_config.json")


class HuggingFace(Format):
    """What the two formats share: loading, sizes, and the image processor."""

    needs = ("transformers",)
    arguments: ClassVar[dict[str, Any]] = {}  # of from_pretrained

    @property
    @abstractmethod
    def model_class(self) -> str: ...

    def write_folder(self, folder: Path, config: Any, weights: dict[str, Tensor]) -> None:
        """Write configuration, weights (names of transformers) and image processor."""
        folder.mkdir()
        config.architectures = [self.model_class]
        config.save_pretrained(folder)
        write_safetensors(folder / "model.safetensors", weights)
        image_processor(self.source).save_pretrained(folder)

    def sizes(self) -> dict[str, Any]:
        """Arguments that ViTConfig and ViTMAEConfig share."""
        source = self.source
        return {
            "hidden_size": source.model.embed_dim,
            "num_hidden_layers": len(source.model.blocks),
            "num_attention_heads": source.heads,
            "intermediate_size": source.model.blocks[0].mlp.fc1.out_features,
            "layer_norm_eps": LAYER_NORM_EPS,
            "image_size": source.input_size,
            "patch_size": source.patch_size,
            "num_channels": source.channels,
        }

    def open_strictly(self, folder: Path) -> nn.Module:
        """`from_pretrained` that accepts no missing, unexpected or reshaped tensor.

        Raises:
            Mismatch: there is one.
        """
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        build = getattr(transformers, self.model_class).from_pretrained
        model, report = build(folder, output_loading_info=True, **self.arguments)
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if report[problem]:
                names = sorted(map(str, report[problem]))[:4]
                raise Mismatch(f"{self.model_class} has {problem.replace('_', ' ')}: {names}")
        return model.eval()

    def usage(self, path: str) -> str:
        arguments = "".join(f", {name}={value}" for name, value in self.arguments.items())
        return f"""from transformers import AutoImageProcessor, {self.model_class}
inputs = AutoImageProcessor.from_pretrained("{path}")(images=image, return_tensors="pt")
output = {self.model_class}.from_pretrained("{path}"{arguments})(**inputs)"""


class HfVit(HuggingFace):
    name = "hf_vit"
    opens = "transformers.ViTModel, or ViTForImageClassification"

    @property
    def model_class(self) -> str:
        return "ViTForImageClassification" if self.source.classes else "ViTModel"

    @property
    def arguments(self) -> dict[str, Any]:
        return {} if self.source.classes else {"add_pooling_layer": False}

    def refuse(self) -> str | None:
        if self.source.mean_pooled:
            return "the model pools the mean of the patch tokens, ViT of transformers the class token: use timm or onnx"
        return None

    def write(self, path: Path) -> None:
        from transformers import ViTConfig

        classes = {"num_labels": self.source.classes} if self.source.classes else {}
        prefix = "vit." if self.source.classes else ""
        weights = to_hugging_face(self.source.model.state_dict(), prefix)
        self.write_folder(path, ViTConfig(**self.sizes(), **classes), weights)

    def check(self, path: Path, images: Tensor) -> Pairs:
        theirs = self.open_strictly(path)
        encoder = theirs.vit if self.source.classes else theirs
        logits = theirs(images).logits if self.source.classes else None
        pairs = compare_outputs(self.source, images, encoder(images).last_hidden_state, logits)
        return pairs | check_image_processor(self.source, path)

    def note(self) -> str:
        if self.source.classes:
            return "The checkpoint has no class names; `config.json` numbers the classes."
        return "Without `add_pooling_layer=False` the library adds a pooler with random weights."


class HfMae(HuggingFace):
    name = "hf_mae"
    opens = "transformers.ViTMAEForPreTraining"
    model_class = "ViTMAEForPreTraining"
    holds_decoder = True

    def refuse(self) -> str | None:
        if self.source.autoencoder is not None:
            return None
        if "decoder_pred.weight" in self.source.weights:
            return "the decoder predicts a teacher's features, ViTMAE predicts pixels: use hf_vit for the encoder"
        return "the checkpoint has no decoder: use hf_vit for the encoder, or a full pre-training checkpoint"

    def keeps(self) -> list[str]:
        return [name for name in self.source.autoencoder.state_dict() if "losspred" not in name]

    def write(self, path: Path) -> None:
        from transformers import ViTMAEConfig

        model = self.source.autoencoder
        block = model.decoder_blocks[0]
        config = ViTMAEConfig(
            **self.sizes(),
            decoder_hidden_size=model.decoder_embed.out_features,
            decoder_num_hidden_layers=len(model.decoder_blocks),
            decoder_num_attention_heads=block.attn.num_heads,
            decoder_intermediate_size=block.mlp.fc1.out_features,
            mask_ratio=self.source.mask_ratio,
            norm_pix_loss=model.norm_pix_loss,
        )
        weights = model.state_dict()
        self.write_folder(path, config, to_hugging_face({name: weights[name] for name in self.keeps()}))

    def check(self, path: Path, images: Tensor) -> Pairs:
        """Tokens with every patch visible; predictions and loss of masked images."""
        theirs, ours = self.open_strictly(path), self.source.autoencoder
        shape = (len(images), ours.patch_embed.num_patches)
        in_order = torch.arange(shape[1], dtype=torch.float).expand(shape)  # (B, L): the patches are not shuffled
        theirs.config.mask_ratio = 0.0
        pairs = {"tokens": (theirs.vit(images, noise=in_order).last_hidden_state, ours.forward_encoder(images))}

        theirs.config.mask_ratio = self.source.mask_ratio
        masked = theirs(images, noise=torch.rand(shape, generator=torch.Generator().manual_seed(1)))
        mask = masked.mask.bool()  # (B, L)
        if int(mask[0].sum()) != masking.count_masked(shape[1], self.source.mask_ratio):
            raise Mismatch(f"{int(mask[0].sum())} masked patches at mask ratio {self.source.mask_ratio}")
        output = ours(images, mask)
        predictions = masked.logits[mask].unflatten(0, (len(images), -1))  # (B, M, D)
        pairs |= {"predictions": (predictions, output["pred"]), "losses": (masked.loss, output["loss_rec"])}
        return pairs | check_image_processor(self.source, path)

    def note(self) -> str:
        text = "The export holds encoder and reconstructor."
        if self.source.autoencoder.learning_loss:
            text += " ViTMAE has no loss predictor, so HPM's is not exported."
        return text + " ViTMAE masks at random; HPM's masks need this project's code."


def image_processor(source: Source) -> Any:
    """The evaluation transform: resize the shorter side to S / 0.875, centre crop, normalise."""
    from transformers import BitImageProcessor  # ViTImageProcessor cannot crop: it distorts the image

    return BitImageProcessor(
        size={"shortest_edge": int(source.input_size / 0.875)},
        resample=3,  # bicubic
        crop_size={"height": source.input_size, "width": source.input_size},
        image_mean=source.mean,
        image_std=source.std,
    )


def check_image_processor(source: Source, folder: Path) -> Pairs:
    """An image of one colour that has to be resized: its result is known exactly."""
    from transformers import AutoImageProcessor

    colour = torch.tensor([30.0, 120.0, 210.0])
    image = np.broadcast_to(colour.numpy().astype("uint8"), (source.input_size + 9, source.input_size + 40, 3))
    processor = AutoImageProcessor.from_pretrained(folder)
    theirs = processor(images=np.ascontiguousarray(image), return_tensors="pt")["pixel_values"]
    ours = (colour / 255 - torch.tensor(source.mean)) / torch.tensor(source.std)
    return {"preprocessed images": (theirs, ours[None, :, None, None].expand(1, 3, *theirs.shape[-2:]))}
