"""What a checkpoint can be exported to: one table of formats, each with its writer and with its check.

A check opens what was written in the library it is for, as its user would, and compares with our own model.

Shapes: B batch, C channels, S image side, L patches, M masked, E width, K classes, D prediction width.
"""

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from export import layouts
from models_hpm import MaskedAutoencoderViT
from models_vit import VisionTransformer
from util import masking
from util.run.checkpoint import write_file
from util.weights.hugging_face import to_hugging_face
from util.weights.load import load_pretrained
from util.weights.read import read_file

Pairs = dict[str, tuple[Tensor, Tensor]]

LAYER_NORM_EPS = 1e-6  # of every model here; the libraries' own defaults differ

# A protobuf file ends at 2 GiB; the weights of larger models go to a file beside it.
ONNX_LIMIT = 1.9e9


class Mismatch(Exception):
    """What was written is not what was meant: the library cannot open it, or computes something else."""


@dataclass(frozen=True)
class Source:
    """A checkpoint, opened.

    Args:
        name: the size, such as vit_base_patch16.
        weights: every tensor of the checkpoint, MAE's names.
        model: the encoder, or the classifier where the weights have a head; in eval mode.
        autoencoder: encoder and reconstructor; None where the weights have no decoder, or one that predicts features.
        mean, std: of the images.
        mask_ratio: of the pre-training.
    """

    name: str
    weights: dict[str, Tensor]
    model: VisionTransformer
    autoencoder: MaskedAutoencoderViT | None
    mean: list[float]
    std: list[float]
    mask_ratio: float

    @property
    def input_size(self) -> int:
        return self.model.patch_embed.img_size[0]

    @property
    def patch_size(self) -> int:
        return self.model.patch_embed.patch_size[0]

    @property
    def classes(self) -> int:
        return self.model.num_classes

    @property
    def mean_pooled(self) -> bool:
        return self.model.global_pool == "avg"

    @property
    def depth(self) -> int:
        return len(self.model.blocks)

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """What our model computes: all tokens of the encoder (B, 1 + L, E), and the logits (B, K) of a classifier."""
        tokens = self.model.forward_features(images)
        return {"tokens": tokens} | ({"logits": self.model.forward_head(tokens)} if self.classes else {})


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format of the table.

    Args:
        opens: what opens it.
        keeps: MAE's names of the tensors that go into it.
        write: makes the file or folder.
        check: pairs (theirs, ours) that must be equal, from images (B, C, S, S).
        usage: the lines of code that load it from a path.
        suffixes: of the file, the default first; none for a folder.
        needs: packages beyond requirements.txt.
        refuse: why a checkpoint cannot be exported so, with the way out; None if it can.
        note: what a user has to know.
        tolerance: largest difference, relative to the largest value.
        whole: it holds the decoder too, so the size of the images cannot change.
        opened: the check opens it with the library; otherwise it compares names and shapes with the library's.
    """

    opens: str
    keeps: Callable[[Source], Iterable[str]]
    write: Callable[[Source, Path], None]
    check: Callable[[Source, Path, Tensor], Pairs]
    usage: Callable[[Source, str], str]
    suffixes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    refuse: Callable[[Source], str | None] = lambda source: None
    note: Callable[[Source], str] = lambda source: ""
    tolerance: float = 1e-5
    whole: bool = False
    opened: bool = True


FOLDER_CONTENTS = ("README.md", "config.json", "model.safetensors", "preprocessor_config.json")


@torch.no_grad()
def verify(form: Format, source: Source, path: Path) -> float:
    """Open an export in the library it is for, and compare; the largest difference, relative to the largest value.

    Raises:
        Mismatch: it does not open, or differs.
    """
    shape = (2, source.model.patch_embed.proj.in_channels, source.input_size, source.input_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    try:
        pairs = form.check(source, path, images)
    except Mismatch:
        raise
    except Exception as error:  # whatever a library raises, the file is not what it should be
        text = (str(error).splitlines() or [""])[0]
        raise Mismatch(f"{form.opens} cannot open it: {type(error).__name__}: {text}") from error
    worst = 0.0
    for name, (theirs, ours) in pairs.items():
        if theirs.shape != ours.shape:
            raise Mismatch(f"{name} of shape {tuple(theirs.shape)}, ours {tuple(ours.shape)}")
        difference = float((theirs - ours).abs().max() / ours.abs().max().clamp(min=1e-12))
        if not difference <= form.tolerance:  # NaN too
            raise Mismatch(f"{name} differ from our model's by {difference:.2g}, more than {form.tolerance:g}")
        worst = max(worst, difference)
    return worst


def _pairs(source: Source, images: Tensor, tokens: Tensor, logits: Tensor | None) -> Pairs:
    theirs = {"tokens": tokens, "logits": logits}
    return {name: (theirs[name], ours) for name, ours in source.outputs(images).items()}


def _require_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Names, shapes and values.

    Raises:
        Mismatch: with the first name that differs.
    """
    for name in sorted(found.keys() ^ expected.keys()):
        raise Mismatch(f"{name} is {'missing' if name in expected else 'not expected'}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise Mismatch(f"{name} has shape {tuple(found[name].shape)}, not {tuple(tensor.shape)}")
        if not torch.equal(found[name], tensor):
            raise Mismatch(f"{name} has other values")


def _for_file(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each with memory of its own, as files of tensors want it."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _model_keeps(source: Source) -> Iterable[str]:
    return source.model.state_dict()


# --------------------------------------------------------------------------------------------------------------- timm


def timm_settings(source: Source) -> tuple[str, dict[str, Any]]:
    """Name and arguments of `timm.create_model` for this model. Sizes that timm does not name are spelled out."""
    name, settings = f"{source.name}_224", {"num_classes": source.classes}
    if source.mean_pooled:
        settings["global_pool"] = "avg"
    if not timm.is_model(name):
        name = "vit_base_patch16_224"
        heads = source.model.blocks[0].attn.num_heads
        settings |= {"embed_dim": source.model.embed_dim, "depth": source.depth, "num_heads": heads}
    if source.input_size != 224:
        settings["img_size"] = source.input_size
    if f"patch{source.patch_size}_" not in name:
        settings["patch_size"] = source.patch_size
    if (channels := source.model.patch_embed.proj.in_channels) != 3:
        settings["in_chans"] = channels
    return name, settings


def write_timm(source: Source, path: Path) -> None:
    weights = _for_file(source.model.state_dict())
    if path.suffix == ".safetensors":
        save_file(weights, path, metadata={"format": "pt"})
    else:
        write_file(path, weights)


def check_timm(source: Source, path: Path, images: Tensor) -> Pairs:
    name, settings = timm_settings(source)
    theirs = timm.create_model(name, checkpoint_path=str(path), **settings).eval()
    tokens = theirs.forward_features(images)
    return _pairs(source, images, tokens, theirs.forward_head(tokens))


def use_timm(source: Source, path: str) -> str:
    name, settings = timm_settings(source)
    arguments = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    output = "model(images)" if source.classes else "model.forward_features(images)"
    return f"""import timm
model = timm.create_model("{name}", checkpoint_path="{path}", {arguments}).eval()
output = {output}  # images normalised with mean {source.mean}, std {source.std}"""


# -------------------------------------------------------------------------------------------------------- safetensors


def all_weights(source: Source) -> dict[str, Tensor]:
    """Everything in the checkpoint; what the model has, as the model has it (positions fitted to its grid)."""
    return source.weights | source.model.state_dict()


def write_safetensors(source: Source, path: Path) -> None:
    image = {"mean": json.dumps(source.mean), "std": json.dumps(source.std), "input_size": str(source.input_size)}
    save_file(_for_file(all_weights(source)), path, metadata={"format": "pt", "model": source.name, **image})


def check_safetensors(source: Source, path: Path, images: Tensor) -> Pairs:
    found = load_pretrained(path)
    _require_same(found, all_weights(source))
    return _through_our_model(source, found, images)


def _through_our_model(source: Source, weights: dict[str, Tensor], images: Tensor) -> Pairs:
    """Our model with those of its tensors replaced that a file holds, against our model."""
    own = source.model.state_dict()
    theirs = copy.deepcopy(source.model)
    theirs.load_state_dict(own | {name: tensor for name, tensor in weights.items() if name in own})
    return {"tokens": (theirs.forward_features(images), source.model.forward_features(images))}


def use_safetensors(source: Source, path: str) -> str:
    return f"""from safetensors.torch import load_file
weights = load_file("{path}")  # MAE's names
# or, in this project's scripts: --finetune {path} --model {source.name} --input_size {source.input_size}"""


# ------------------------------------------------------------------------------------------------------- Hugging Face


def hugging_face_sizes(source: Source) -> dict[str, Any]:
    """What config.json says of the encoder, under the names of ViTConfig and ViTMAEConfig."""
    block = source.model.blocks[0]
    return {
        "hidden_size": source.model.embed_dim,
        "num_hidden_layers": source.depth,
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": source.input_size,
        "patch_size": source.patch_size,
        "num_channels": source.model.patch_embed.proj.in_channels,
        "qkv_bias": True,
        "torch_dtype": "float32",
    }


def write_preprocessor(source: Source, folder: Path) -> None:
    """The evaluation's view of an image: shorter side to S / 0.875, the middle, normalised."""
    content = {
        "image_processor_type": "BitImageProcessor",  # ViTImageProcessor cannot crop, it would squeeze the image
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": int(source.input_size / 0.875)},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": source.input_size, "width": source.input_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": source.mean,
        "image_std": source.std,
    }
    _write_json(folder / "preprocessor_config.json", content)


def open_hugging_face(library: str, folder: Path, **settings: Any) -> nn.Module:
    """`from_pretrained`, strictly.

    Raises:
        Mismatch: a tensor is missing, not expected or of another shape.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, report = getattr(transformers, library).from_pretrained(folder, output_loading_info=True, **settings)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            raise Mismatch(f"{library} has {problem.replace('_', ' ')}: {sorted(map(str, report[problem]))[:4]}")
    return model.eval()


def check_preprocessor(source: Source, folder: Path) -> Pairs:
    """An image of one colour, whose size has to change: what comes out is known exactly."""
    import numpy as np
    import transformers

    colour = torch.tensor([30.0, 120.0, 210.0])
    image = np.broadcast_to(colour.numpy().astype("uint8"), (source.input_size + 9, source.input_size + 40, 3))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    theirs = processor(images=np.ascontiguousarray(image), return_tensors="pt")["pixel_values"]
    ours = (colour / 255 - torch.tensor(source.mean)) / torch.tensor(source.std)
    return {"preprocessed images": (theirs, ours[None, :, None, None].expand(1, 3, *theirs.shape[-2:]))}


def vit_class(source: Source) -> str:
    return "ViTForImageClassification" if source.classes else "ViTModel"


def refuse_hf_vit(source: Source) -> str | None:
    if source.mean_pooled:
        return "the model takes the mean of the patch tokens, ViT of transformers the class token: take timm or onnx"
    return None


def write_hf_vit(source: Source, folder: Path) -> None:
    folder.mkdir()
    config = {"model_type": "vit", "architectures": [vit_class(source)], **hugging_face_sizes(source)}
    if source.classes:
        labels = {str(number): f"LABEL_{number}" for number in range(source.classes)}
        config |= {"id2label": labels, "label2id": {label: int(number) for number, label in labels.items()}}
    _write_json(folder / "config.json", config)
    renamed = to_hugging_face(source.model.state_dict(), prefix="vit." if source.classes else "")
    save_file(_for_file(renamed), folder / "model.safetensors", metadata={"format": "pt"})
    write_preprocessor(source, folder)


def check_hf_vit(source: Source, folder: Path, images: Tensor) -> Pairs:
    theirs = open_hugging_face(vit_class(source), folder, **({} if source.classes else {"add_pooling_layer": False}))
    encoder = theirs.vit if source.classes else theirs
    logits = theirs(images).logits if source.classes else None
    return _pairs(source, images, encoder(images).last_hidden_state, logits) | check_preprocessor(source, folder)


def use_hf_vit(source: Source, path: str) -> str:
    no_pooler = "" if source.classes else ", add_pooling_layer=False"
    return f"""from transformers import AutoImageProcessor, {vit_class(source)}
inputs = AutoImageProcessor.from_pretrained("{path}")(images=image, return_tensors="pt")
output = {vit_class(source)}.from_pretrained("{path}"{no_pooler})(**inputs)"""


def note_hf_vit(source: Source) -> str:
    if source.classes:
        return "The names of the classes are not in the checkpoint; `config.json` numbers them."
    return "Without `add_pooling_layer=False` the library adds a pooler with random weights."


def refuse_hf_mae(source: Source) -> str | None:
    if source.autoencoder is not None:
        return None
    if "decoder_pred.weight" in source.weights:
        return "the decoder predicts a teacher's features, ViTMAE of transformers pixels: take hf_vit for the encoder"
    return "there is no decoder in the checkpoint: take hf_vit for the encoder, or a full pre-training checkpoint"


def mae_keeps(source: Source) -> list[str]:
    return [name for name in source.autoencoder.state_dict() if "losspred" not in name]


def write_hf_mae(source: Source, folder: Path) -> None:
    model = source.autoencoder
    block = model.decoder_blocks[0]
    folder.mkdir()
    config = {
        "model_type": "vit_mae",
        "architectures": ["ViTMAEForPreTraining"],
        **hugging_face_sizes(source),
        "decoder_hidden_size": model.decoder_embed.out_features,
        "decoder_num_hidden_layers": len(model.decoder_blocks),
        "decoder_num_attention_heads": block.attn.num_heads,
        "decoder_intermediate_size": block.mlp.fc1.out_features,
        "mask_ratio": source.mask_ratio,
        "norm_pix_loss": model.norm_pix_loss,
    }
    _write_json(folder / "config.json", config)
    weights = model.state_dict()
    renamed = to_hugging_face({name: weights[name] for name in mae_keeps(source)})
    save_file(_for_file(renamed), folder / "model.safetensors", metadata={"format": "pt"})
    write_preprocessor(source, folder)


def check_hf_mae(source: Source, folder: Path, images: Tensor) -> Pairs:
    """Encoder and prediction with every patch visible, in an order that `noise` gives; then prediction and loss of a
    masked image."""
    theirs, ours = open_hugging_face("ViTMAEForPreTraining", folder), source.autoencoder
    num_patches = ours.patch_embed.num_patches
    noise = torch.rand(len(images), num_patches, generator=torch.Generator().manual_seed(1))
    theirs.config.mask_ratio = 0.0
    encoded = theirs.vit(images, noise=noise)
    patches = encoded.last_hidden_state[:, 1:]  # in the order of the noise
    patches = patches.gather(1, encoded.ids_restore[:, :, None].expand_as(patches))
    tokens = torch.cat([encoded.last_hidden_state[:, :1], patches], dim=1)
    latent = ours.forward_encoder(images)
    x = ours.decoder_embed(latent) + ours.decoder_pos_embed
    for block in ours.decoder_blocks:
        x = block(x)
    prediction = ours.decoder_pred(ours.decoder_norm(x))[:, 1:]  # (B, L, D)
    pairs = {"tokens": (tokens, latent), "predictions": (theirs(images, noise=noise).logits, prediction)}

    theirs.config.mask_ratio = source.mask_ratio
    masked = theirs(images, noise=noise)
    mask = masked.mask.bool()
    output = ours(images, mask)
    hidden = masked.logits[mask].unflatten(0, (len(images), -1))  # (B, M, D)
    pairs |= {"masked predictions": (hidden, output["pred"]), "losses": (masked.loss, output["loss_rec"])}
    if int(mask[0].sum()) != masking.count_masked(num_patches, source.mask_ratio):
        raise Mismatch(f"{int(mask[0].sum())} masked patches at mask ratio {source.mask_ratio}")
    return pairs | check_preprocessor(source, folder)


def use_hf_mae(source: Source, path: str) -> str:
    return f"""from transformers import AutoImageProcessor, ViTMAEForPreTraining
inputs = AutoImageProcessor.from_pretrained("{path}")(images=image, return_tensors="pt")
output = ViTMAEForPreTraining.from_pretrained("{path}")(**inputs)"""


def note_hf_mae(source: Source) -> str:
    lost = " The loss predictor, which HPM trains beside it, has no place in ViTMAE." * source.autoencoder.learning_loss
    return f"Encoder and reconstructor.{lost} ViTMAE masks at random: HPM's masks need this project's code."


# ------------------------------------------------------------------------------------------ Detectron2, MMSegmentation


def _check_layout(layout: layouts.Layout, found: dict[str, Tensor], source: Source, images: Tensor) -> Pairs:
    """The library is not at hand: names, shapes and values, and features through our model with the names undone."""
    own, names = source.model.state_dict(), layout.names(source.depth)
    _require_same(found, {theirs: own[ours] for ours, theirs in names.items()})
    return _through_our_model(source, {ours: found[theirs] for ours, theirs in names.items()}, images)


def write_detectron2(source: Source, path: Path) -> None:
    write_file(path, {"model": _for_file(layouts.DETECTRON2.convert(source.model.state_dict(), source.depth))})


def check_detectron2(source: Source, path: Path, images: Tensor) -> Pairs:
    return _check_layout(layouts.DETECTRON2, read_file(path)["model"], source, images)


def use_detectron2(source: Source, path: str) -> str:
    size = "" if source.patch_size == 16 else f"model.backbone.net.patch_size = {source.patch_size}\n"
    return f"""# in projects/ViTDet/configs/COCO/mask_rcnn_vitdet_b_100ep.py, or that of the model's size:
train.init_checkpoint = "{path}"
{size}model.backbone.net.pretrain_img_size = {source.input_size}"""


def note_detectron2(source: Source) -> str:
    return (
        "Backbone of ViTDet. The relative positions, the pyramid and the heads are not in it: they begin as the config "
        "says. Checked by names, shapes and values, not in Detectron2 itself."
    )


def write_mmseg(source: Source, path: Path) -> None:
    write_file(path, _for_file(layouts.MMSEG.convert(source.model.state_dict(), source.depth)))


def check_mmseg(source: Source, path: Path, images: Tensor) -> Pairs:
    return _check_layout(layouts.MMSEG, read_file(path), source, images)


def use_mmseg(source: Source, path: str) -> str:
    heads = source.model.blocks[0].attn.num_heads
    sizes = f"patch_size={source.patch_size}, embed_dims={source.model.embed_dim}, num_layers={source.depth}"
    return f"""# in a config of MMSegmentation (configs/mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py):
model = dict(pretrained="{path}", backbone=dict(type="MAE",
             {sizes}, num_heads={heads}, init_values=1.0, norm_cfg=dict(type="LN", eps=1e-6)))"""


def note_mmseg(source: Source) -> str:
    return (
        "`init_values=1.0` matters: with another value the layers are scaled. The relative positions begin at zero. "
        "The library loads it without complaint whatever is missing: look for 'unexpected key' in its log. Checked by "
        "names, shapes and values, not in MMSegmentation itself."
    )


# --------------------------------------------------------------------------------------------------------------- ONNX


class OnnxOutputs(nn.Module):
    """(B, C, S, S) -> tokens (B, 1 + L, E), or logits (B, K): what `Source.outputs` gives, as a graph."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) if self.model.num_classes else self.model.forward_features(images)


def onnx_output(source: Source) -> str:
    return "logits" if source.classes else "tokens"


def write_onnx(source: Source, path: Path) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in source.model.state_dict().values())
    images = torch.zeros(2, source.model.patch_embed.proj.in_channels, source.input_size, source.input_size)
    torch.onnx.export(
        OnnxOutputs(source.model).eval(),
        (images,),
        path,
        dynamo=True,
        input_names=["images"],
        output_names=[onnx_output(source)],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        external_data=size > ONNX_LIMIT,
        verbose=False,
    )


def check_onnx(source: Source, path: Path, images: Tensor) -> Pairs:
    """Batches of another size than it was traced with, too."""
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    pairs = {}
    for batch in (images, images[:1], torch.cat([images, images[:1]])):
        theirs = session.run([onnx_output(source)], {"images": batch.numpy()})[0]
        pairs[f"{onnx_output(source)} of a batch of {len(batch)}"] = (
            torch.from_numpy(theirs),
            source.outputs(batch)[onnx_output(source)],
        )
    return pairs


def use_onnx(source: Source, path: str) -> str:
    return f"""import onnxruntime
session = onnxruntime.InferenceSession("{path}")
output = session.run(["{onnx_output(source)}"], {{"images": images}})[0]  # (B, 3, {source.input_size}, \
{source.input_size}) float32, mean {source.mean}, std {source.std}"""


def note_onnx(source: Source) -> str:
    return "" if source.classes else "`tokens` are all tokens after the last norm: the class token, then the patches."


# -------------------------------------------------------------------------------------------------------------- table

FORMATS = {
    "timm": Format(
        opens="timm.create_model",
        suffixes=(".safetensors", ".pth"),
        keeps=_model_keeps,
        write=write_timm,
        check=check_timm,
        usage=use_timm,
    ),
    "safetensors": Format(
        opens="safetensors, and this project",
        suffixes=(".safetensors",),
        keeps=all_weights,
        write=write_safetensors,
        check=check_safetensors,
        usage=use_safetensors,
        whole=True,
    ),
    "hf_mae": Format(
        opens="transformers.ViTMAEForPreTraining",
        needs=("transformers",),
        refuse=refuse_hf_mae,
        keeps=mae_keeps,
        write=write_hf_mae,
        check=check_hf_mae,
        usage=use_hf_mae,
        note=note_hf_mae,
        whole=True,
    ),
    "hf_vit": Format(
        opens="transformers.ViTModel, or ViTForImageClassification",
        needs=("transformers",),
        refuse=refuse_hf_vit,
        keeps=_model_keeps,
        write=write_hf_vit,
        check=check_hf_vit,
        usage=use_hf_vit,
        note=note_hf_vit,
    ),
    "detectron2": Format(
        opens="Detectron2's ViTDet",
        suffixes=(".pth",),
        keeps=lambda source: layouts.DETECTRON2.names(source.depth),
        write=write_detectron2,
        check=check_detectron2,
        usage=use_detectron2,
        note=note_detectron2,
        opened=False,
    ),
    "mmseg": Format(
        opens="MMSegmentation's MAE backbone",
        suffixes=(".pth",),
        keeps=lambda source: layouts.MMSEG.names(source.depth),
        write=write_mmseg,
        check=check_mmseg,
        usage=use_mmseg,
        note=note_mmseg,
        opened=False,
    ),
    "onnx": Format(
        opens="onnxruntime",
        suffixes=(".onnx",),
        needs=("onnx", "onnxscript", "onnxruntime"),
        keeps=_model_keeps,
        write=write_onnx,
        check=check_onnx,
        usage=use_onnx,
        note=note_onnx,
        tolerance=1e-4,
    ),
}
