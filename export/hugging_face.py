"""Exports for transformers: folders that `from_pretrained` opens.

Tensors keep the names of released files, which every version of transformers reads. transformers is imported only when
one of these formats is used. Shapes: B batch, C channels, S image side, L patches, M masked, E width, K classes,
D prediction width.
"""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export.base import LAYER_NORM_EPS, Format, Mismatch, Pairs, Source, compare_outputs, write_safetensors
from models_hpm import MaskedAutoencoderViT
from util import masking
from util.data.transforms import CenterCrop, resized_side
from util.run.classwise import output_names
from util.weights.hugging_face import to_hugging_face

CROP_NOTE = (
    "The processor's centre crop starts at an offset that is rounded down, where this project rounds to the nearest "
    "pixel: about one photograph in seven is shifted by one pixel."
)

FOLDER_CONTENTS = ("README.md", "config.json", "model.safetensors", "preprocessor_config.json")


class HuggingFace(Format):
    """What the two formats share: loading, sizes, and the image processor."""

    needs = ("transformers",)

    @property
    @abstractmethod
    def model_class(self) -> str: ...

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`."""
        return {}

    def write_folder(self, folder: Path, config: Any, weights: dict[str, Tensor]) -> None:
        """Write configuration, weights (names of transformers) and image processor."""
        folder.mkdir()
        config.architectures = [self.model_class]
        config.save_pretrained(folder)
        write_safetensors(folder / "model.safetensors", weights, {})
        image_processor(self.source).save_pretrained(folder)

    def sizes(self) -> dict[str, Any]:
        """Arguments that ViTConfig and ViTMAEConfig share."""
        source = self.source
        value_range = source.meta.get("image", {}).get("value_range")
        return {
            **({"value_range": value_range} if value_range else {}),  # for this project's scripts
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

        settings = self.sizes()
        if self.source.classes:
            settings["num_labels"] = self.source.classes
        if record := self.source.class_record:
            names = output_names(record, self.source.classes)
            settings["id2label"] = {k: f"LABEL_{k}" if name == str(k) else name for k, name in enumerate(names)}
            settings["label2id"] = {label: number for number, label in settings["id2label"].items()}
            settings["classes"] = record  # for this project's scripts
        weights = to_hugging_face(self.source.model.state_dict(), "vit." if self.source.classes else "")
        self.write_folder(path, ViTConfig(**settings), weights)

    def check(self, path: Path, images: Tensor) -> Pairs:
        theirs = self.open_strictly(path)
        encoder = theirs.vit if self.source.classes else theirs
        logits = theirs(images).logits if self.source.classes else None
        check_image_processor(self.source, path)
        return compare_outputs(self.source, images, encoder(images).last_hidden_state, logits)

    def note(self) -> str:
        if self.source.class_record:
            return CROP_NOTE
        if self.source.classes:
            return f"{CROP_NOTE} The checkpoint has no class names; `config.json` numbers the classes."
        return f"{CROP_NOTE} Without `add_pooling_layer=False` the library adds a pooler with random weights."


class HfMae(HuggingFace):
    name = "hf_mae"
    opens = "transformers.ViTMAEForPreTraining"
    holds_decoder = True

    @property
    def model_class(self) -> str:
        return "ViTMAEForPreTraining"

    @property
    def autoencoder(self) -> MaskedAutoencoderViT:
        assert self.source.autoencoder is not None  # `refuse` was called
        return self.source.autoencoder

    def refuse(self) -> str | None:
        if self.source.autoencoder is not None:
            return None
        if "decoder_pred.weight" in self.source.weights:
            return "the decoder predicts another target than ViTMAE's pixels: use hf_vit for the encoder"
        return "the checkpoint has no decoder: use hf_vit for the encoder, or a full pre-training checkpoint"

    def keeps(self) -> list[str]:
        return [name for name in self.autoencoder.state_dict() if "losspred" not in name]

    def write(self, path: Path) -> None:
        from transformers import ViTMAEConfig

        model = self.autoencoder
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
        theirs, ours = self.open_strictly(path), self.autoencoder
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
        check_image_processor(self.source, path)
        return pairs

    def note(self) -> str:
        text = f"{CROP_NOTE} The export holds encoder and reconstructor."
        if self.autoencoder.learning_loss:
            text += " ViTMAE has no loss predictor, so HPM's is not exported."
        return text + " ViTMAE masks at random; HPM's masks need this project's code."


def image_processor(source: Source) -> Any:
    """The evaluation transform: resize the shorter side, crop the centre, normalise."""
    from transformers import BitImageProcessor  # ViTImageProcessor cannot crop: it distorts the image

    return BitImageProcessor(
        size={"shortest_edge": resized_side(source.input_size, source.crop_pct)},
        resample=3,  # bicubic
        crop_size={"height": source.input_size, "width": source.input_size},
        image_mean=source.mean,
        image_std=source.std,
    )


def check_image_processor(source: Source, folder: Path) -> None:
    """Compare with the evaluation transform on a textured picture of odd size, but for the offset of the crop, which
    transformers rounds down.

    Raises:
        Mismatch: some pixel differs by more than two levels, as far as Pillow's and PyTorch's resizing do.
    """
    from transformers import AutoImageProcessor

    size = source.input_size
    sides = (2 * size + 9, 3 * size + 8)
    picture = torch.randint(256, (3, *sides), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor(images=picture.permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"][0]
    theirs = (pixels.permute(1, 2, 0) * torch.tensor(source.std) + torch.tensor(source.mean)) * 255
    resized = CenterCrop(size, source.crop_pct).resize(picture)
    top, left = ((side - size) // 2 for side in resized.shape[-2:])
    ours = resized[:, top : top + size, left : left + size].permute(1, 2, 0)
    if (difference := float((theirs - ours).abs().max())) > 2:
        raise Mismatch(f"preprocessed images differ by {difference:.1f} of 255 levels")
