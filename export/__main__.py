"""Export a checkpoint for another library, with a model card, and check it there: python -m export.

    python -m export --checkpoint output_dir/checkpoint-last.pth --format timm
    python -m export --checkpoint mae_visualize_vit_base.pth --format hf_mae --output vit-mae-base

The export is read back and compared with the checkpoint before it is put in place. docs/export.md describes
the formats.
"""

import argparse
import copy
import importlib
import math
import sys
from functools import partial
from pathlib import Path

from torch import Tensor

import models_hpm
import models_load
import models_vit
from export.base import Format, Mismatch, Source
from export.card import describe, model_card
from export.detection import Detectron2, MMSeg
from export.encoders import Safetensors, Timm
from export.hugging_face import FOLDER_CONTENTS, HfMae, HfVit
from export.onnx_graph import Onnx
from export.publish import check_target, publish
from util.data.transforms import check_statistics
from util.run import options, resolve
from util.run.logger import log, setup_logging
from util.weights.load import load_into, read_meta
from util.weights.meta import DEFAULTS, settings_of

FORMATS = {form.name: form for form in (Timm, Safetensors, HfMae, HfVit, Detectron2, MMSeg, Onnx)}


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser(__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="file or Hugging Face folder with the weights")
    formats = "; ".join(f"{name}: {form.opens}" for name, form in FORMATS.items())
    parser.add_argument("--format", required=True, choices=list(FORMATS), metavar="FORMAT", help=formats)
    parser.add_argument("--output", help="file or folder to write; default: CHECKPOINT-FORMAT next to the checkpoint")
    parser.add_argument("--overwrite", action=options.SWITCH, default=False, help="replace an existing export")
    parser.add_argument("--which", choices=["student", "ema"], default="student", help="weights to export")
    parser.add_argument(
        "--input_size", type=options.COUNT, help="input resolution; position embeddings are resized if it differs"
    )
    options.add_crop_option(parser)
    group = parser.add_argument_group("files that do not record how they were trained (official HPM, MAE, timm)")
    group.add_argument("--model", choices=list(models_vit.MODELS), help="size; default: by width and depth")
    group.add_argument("--mean", type=options.NUMBER, nargs=3, help="channel means in 0..1; default: ImageNet's")
    group.add_argument("--std", type=options.POSITIVE, nargs=3, help="their standard deviations; default: ImageNet's")
    group.add_argument(
        "--norm_pix_loss", action=options.SWITCH, default=None, help="hf_mae: the model predicts normalised pixels"
    )
    group.add_argument("--mask_ratio", type=options.FRACTION, help="hf_mae: mask ratio; default: the run's, or 0.75")
    group = parser.add_argument_group("linear probes, which are exported as classifiers")
    group.add_argument("--encoder", help="checkpoint that the probe was trained on; default: its recorded path")
    group.add_argument("--head", type=options.COUNT, help="number of the head, from 1; default: the best in log.jsonl")
    return parser


def resolve_options(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what the checkpoint records, and check the rest.

    Raises:
        ValueError: a package is missing, the output cannot be written, or options contradict each other.
    """
    args = copy.copy(args)
    form = FORMATS[args.format]
    for package in form.needs:
        try:
            importlib.import_module(package)
        except ImportError as error:
            install = f"pip install {' '.join(form.needs)}"
            raise ValueError(f"--format {args.format} needs {package} ({error}): {install}") from error
    source = Path(args.checkpoint)
    args.output = Path(args.output) if args.output else default_output(source, args.format, args.which)
    if form.suffixes and args.output.suffix not in form.suffixes:
        raise ValueError(f"--output {args.output}: a {args.format} file ends in {' or '.join(form.suffixes)}")
    replaced = source if form.suffixes or not source.is_file() else source.parent  # a folder replaces the file's
    if args.output.exists() and replaced.exists() and args.output.samefile(replaced):
        raise ValueError(f"--output {args.output} is the checkpoint itself: choose another name")
    check_target(args.output, () if form.suffixes else FOLDER_CONTENTS, args.overwrite)

    args.meta = read_meta(args.checkpoint)
    recorded = args.meta.get("options", {})
    args.model = args.model or settings_of(args.meta).get("model")
    defaults = DEFAULTS | settings_of(args.meta)
    resolve.fill_in(args, {name: defaults[name] for name in ("mean", "std")})
    check_statistics(args.mean, args.std)
    resolve.fill_in(args, {"mask_ratio": recorded.get("mask_ratio", 0.75)})
    norm_pix_loss = recorded["target"] == "norm_pixel" if "target" in recorded else bool(args.norm_pix_loss)
    if args.norm_pix_loss not in (None, norm_pix_loss):
        switch = "--norm_pix_loss" if args.norm_pix_loss else "--no-norm_pix_loss"
        raise ValueError(f"{switch} contradicts {args.checkpoint} (target {recorded['target']}): omit it")
    args.norm_pix_loss = norm_pix_loss
    return args


def default_output(checkpoint: Path, name: str, which: str) -> Path:
    """CHECKPOINT[-ema]-FORMAT.SUFFIX next to the checkpoint; without -FORMAT where the suffix says it."""
    suffixes = FORMATS[name].suffixes
    suffix = suffixes[0] if suffixes else ""
    stem = checkpoint.stem if checkpoint.suffix in (".pth", ".pt", ".bin", ".safetensors") else checkpoint.name
    stem += "-ema" if which == "ema" else ""
    stem += "" if suffix == f".{name}" else f"-{name}"
    return checkpoint.with_name(stem + suffix)


# -------------------------------------------------------------------------------------------------------- checkpoints


def open_source(args: argparse.Namespace) -> Source:
    """The checkpoint as models in eval mode.

    Raises:
        ValueError: the weights are not a ViT of this family and of a known size, or not those of --model.
    """
    weights, _ = models_load.read_weights(args.checkpoint, args.which, args.encoder, args.head)
    models_load.check_family(args.checkpoint, weights)
    name = args.model or models_load.size_name(args.checkpoint, weights)

    channels, patch = weights["patch_embed.proj.weight"].shape[1:3]
    own_size = math.isqrt(weights["pos_embed"].shape[1] - 1) * patch
    args.input_size = size = args.input_size or own_size
    resolve.fill_in(args, {"crop_pct": resolve.evaluation_crop(size, args.meta.get("options", {}))})
    has_decoder = "decoder_pred.weight" in weights
    if size != own_size and has_decoder and FORMATS[args.format].holds_decoder:
        raise ValueError(
            f"--input_size {size}: the decoder's position embeddings are for {own_size} pixels, and --format "
            f"{args.format} contains the decoder: omit --input_size"
        )
    classes = len(weights["head.weight"]) if "head.weight" in weights else 0
    shape = {"img_size": size, "patch_size": patch, "in_chans": channels, "num_classes": classes}
    model = models_vit.MODELS[name](**shape, global_pool="fc_norm.weight" in weights)
    load_into(model, weights)
    return Source(
        path=Path(args.checkpoint),
        which=args.which,
        meta=args.meta,
        name=name,
        weights=weights,
        model=model.eval(),
        input_size=size,
        patch_size=patch,
        channels=channels,
        autoencoder=build_autoencoder(args, name, size, weights) if has_decoder else None,
        mean=list(args.mean),
        std=list(args.std),
        crop_pct=args.crop_pct,
        mask_ratio=args.mask_ratio,
    )


def build_autoencoder(
    args: argparse.Namespace, name: str, size: int, weights: dict[str, Tensor]
) -> models_hpm.MaskedAutoencoderViT | None:
    """Encoder and decoders; None if the decoder predicts anything but pixels or belongs to another input size."""
    if args.meta.get("options", {}).get("target", "pixel") not in ("pixel", "norm_pixel"):
        return None
    weights = {name: tensor for name, tensor in weights.items() if name != "vis_mask_token"}  # used in training only
    heads = args.meta.get("options", {}).get("decoder_num_heads")
    settings = {"img_size": size, "norm_pix_loss": args.norm_pix_loss, "decoder_num_heads": heads}
    model = models_hpm.build_for(f"mae_{name}", weights, **settings)
    if model.target_dim is not None or model.decoder_pos_embed.shape != weights["decoder_pos_embed"].shape:
        return None
    load_into(model, weights, (), ("head.", "fc_norm."))
    return model.eval()


# -------------------------------------------------------------------------------------------------------------- export


def build(form: Format, path: Path) -> None:
    """Write the export, check it, then write its card: README.md in a folder, NAME.SUFFIX.md next to a file.

    Raises:
        Mismatch: the check fails.
    """
    form.write(path)
    difference = form.verify(path)
    how = "opened with" if form.opened else "names, shapes and values for"
    log.info("check     %s %s: largest difference %.2g (limit %g)", how, form.opens, difference, form.tolerance)
    place = path.with_name(f"{path.name}.md") if form.suffixes else path / "README.md"
    place.write_text(model_card(form, path.name), "utf-8", "backslashreplace")


def main(argv: list[str] | None = None) -> None:
    setup_logging(enabled=True)
    with options.user_mistakes():
        args = resolve_options(get_args_parser().parse_args(argv))
        form = FORMATS[args.format](open_source(args))
        if reason := form.refuse():
            raise ValueError(f"--format {args.format} cannot hold {args.checkpoint}: {reason}")
        log.info("model     %s", describe(form))
        try:
            publish(args.output, partial(build, form), args.overwrite)
        except Mismatch as error:
            sys.exit(f"export: error: the check of {args.output} failed, nothing was written: {error}")
    log.info("wrote     %s", args.output)


if __name__ == "__main__":
    main()
