"""What the exports share: the opened checkpoint, the interface of a format, and the check before publishing.

Shapes: B batch, C channels, S image side, L patches, E width, K classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from torch import Tensor

from models_hpm import MaskedAutoencoderViT
from models_vit import VisionTransformer
from util.weights.meta import header_of

Pairs = dict[str, tuple[Tensor, Tensor]]  # what is compared -> (theirs, ours)

# Options of pre-training that pictures of an export need: target, masks, what the loss predictor predicts.
PICTURED = (
    *("target", "decoder_num_heads"),
    *("epochs", "mask_strategy", "mask_block", "mask_regular", "alpha_0", "alpha_T"),
    *("teacher_keep", "score_by", "predictor_loss", "relative"),
)

LAYER_NORM_EPS = 1e-6  # of every model of this project; the libraries' own defaults differ


class Mismatch(Exception):
    """An export that its library cannot open, or that computes something else there."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened checkpoint."""

    path: Path
    which: str  # the weights that were loaded: student or ema
    meta: dict[str, Any]  # what the checkpoint records about its training; {} for other projects' files
    name: str  # model size, such as vit_base_patch16
    weights: dict[str, Tensor]  # every tensor of the checkpoint, under MAE's names
    model: VisionTransformer  # the encoder, or the classifier where the weights have a head; in eval mode
    autoencoder: MaskedAutoencoderViT | None  # with the reconstructor; None without a decoder that predicts pixels
    input_size: int
    patch_size: int
    channels: int
    mean: list[float]
    std: list[float]
    crop_pct: float  # of the evaluation crop: S / shorter side
    mask_ratio: float  # of pre-training

    @property
    def classes(self) -> int:
        return self.model.num_classes

    @property
    def class_record(self) -> dict[str, Any] | None:
        """Recorded names of the classes (util/data/classes.py), of the first outputs if there are more of those; None
        without a head or a record."""
        record = self.meta.get("options", {}).get("classes") or {}
        return record if 0 < len(record.get("names", [])) <= self.classes else None

    @property
    def mean_pooled(self) -> bool:
        return self.model.global_pool == "avg"

    @property
    def heads(self) -> int:
        return self.model.blocks[0].attn.num_heads

    def header(self) -> dict[str, str]:
        """Metadata of a .safetensors file, which `read_meta` reads."""
        options: dict[str, Any] = {
            "input_size": self.input_size,
            "patch_size": self.patch_size,
            "crop_pct": self.crop_pct,
        }
        if "decoder_pred.weight" in self.weights:
            recorded = self.meta.get("options", {})
            options |= {name: recorded[name] for name in PICTURED if recorded.get(name) is not None}
            options["mask_ratio"] = self.mask_ratio
        if self.autoencoder is not None:
            options["target"] = "norm_pixel" if self.autoencoder.norm_pix_loss else "pixel"
            options["decoder_num_heads"] = self.autoencoder.decoder_blocks[0].attn.num_heads
        if self.classes:
            options["global_pool"] = self.mean_pooled
        if self.class_record:
            options["classes"] = self.class_record
        if self.which == "ema":
            options["which"] = self.which
        image = {**self.meta.get("image", {}), "mean": self.mean, "std": self.std}
        return header_of(self.name, options, image)


class Format(ABC):
    """An export format: writes a checkpoint for one library and checks it there."""

    name: ClassVar[str]  # value of --format
    opens: ClassVar[str]  # what opens the export
    suffixes: ClassVar[tuple[str, ...]] = ()  # of the file, the default first; none for a folder
    needs: ClassVar[tuple[str, ...]] = ()  # packages beyond requirements.txt
    tolerance: ClassVar[float] = 1e-5  # largest allowed difference, relative to the largest value
    holds_decoder: ClassVar[bool] = False  # the decoder is exported too, so the input size is fixed
    opened: ClassVar[bool] = True  # the check opens the export in its library, instead of comparing its tensors

    def __init__(self, source: Source) -> None:
        self.source = source

    def refuse(self) -> str | None:
        """Why this checkpoint cannot be exported, and what to do instead; None if it can."""
        return None

    def keeps(self) -> Iterable[str]:
        """MAE's names of the exported tensors."""
        return self.source.model.state_dict()

    @abstractmethod
    def write(self, path: Path) -> None:
        """Write the file or folder."""

    @abstractmethod
    def check(self, path: Path, images: Tensor) -> Pairs:
        """Open the export and return what must be equal, computed from images (B, C, S, S).

        Raises:
            Mismatch: the export differs.
        """

    @abstractmethod
    def usage(self, path: str) -> str:
        """Lines of code that load the export."""

    def note(self) -> str:
        """What a user has to know."""
        return ""

    @torch.no_grad()
    def verify(self, path: Path) -> float:
        """Run the check and return the largest difference, relative to the largest value.

        Raises:
            Mismatch: the export cannot be opened, or differs.
        """
        shape = (2, self.source.channels, self.source.input_size, self.source.input_size)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        try:
            pairs = self.check(path, images)
        except Mismatch:
            raise
        except Exception as error:  # libraries raise anything
            text = (str(error).splitlines() or [""])[0]
            raise Mismatch(f"{self.opens} cannot open it: {type(error).__name__}: {text}") from error
        worst = 0.0
        for name, (theirs, ours) in pairs.items():
            if theirs.shape != ours.shape:
                raise Mismatch(f"{name} have shape {tuple(theirs.shape)}, expected {tuple(ours.shape)}")
            difference = float((theirs - ours).abs().max() / ours.abs().max().clamp(min=1e-12))
            if not difference <= self.tolerance:  # NaN too
                raise Mismatch(f"{name} differ by {difference:.2g}, more than {self.tolerance:g}")
            worst = max(worst, difference)
        return worst


def compare_outputs(source: Source, images: Tensor, tokens: Tensor, logits: Tensor | None) -> Pairs:
    """Their tokens (B, 1 + L, E) of the encoder, and their logits (B, K) of a classifier, paired with ours."""
    ours = source.model.forward_features(images)
    pairs = {"tokens": (tokens, ours)}
    if source.classes:
        pairs["logits"] = (logits, source.model.forward_head(ours))
    return pairs


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare names, shapes and values.

    Raises:
        Mismatch: with the first name that differs.
    """
    for name in sorted(found.keys() ^ expected.keys()):
        raise Mismatch(f"{name} is {'missing' if name in expected else 'unexpected'}")
    for name, tensor in expected.items():
        if not torch.equal(found[name], tensor):
            raise Mismatch(f"{name} has another shape or other values")


def write_safetensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write a file as readable as any other of this user; `save_file` restricts it to the owner."""
    separate = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    path.write_bytes(safetensors.torch.save(separate, {"format": "pt", **header}))
