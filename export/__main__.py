"""Write a checkpoint's weights for another library, with a model card, and check that they are the same there.

    python -m export --checkpoint output_dir/checkpoint-last.pth --format timm
    python -m export --checkpoint mae_visualize_vit_base.pth --format hf_mae --output vit-mae-base

It reads this project's checkpoints and everybody's who uses MAE's names, timm's or those of transformers. What is
written is opened in the library it is for and compared before it is there. docs/export.md has the formats.
"""

import argparse
import copy
import importlib
import math
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

import models_hpm
import models_vit
from export.card import model_card, read_environment, read_log, without_folders
from export.formats import FOLDER_CONTENTS, FORMATS, Format, Mismatch, Source, verify
from export.publish import check_target, publish
from util.run import options
from util.run.logger import describe_environment, log, setup_logging
from util.weights.load import DECODERS, digest, load_into, load_pretrained, read_meta, summarize_names
from util.weights.meta import defaults_of, settings_of


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser(__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="file or Hugging Face folder with the weights")
    formats = "; ".join(f"{name}: {form.opens}" for name, form in FORMATS.items())
    parser.add_argument("--format", required=True, type=options.one_of(list(FORMATS), "format"), help=formats)
    parser.add_argument("--output", help="file or folder to write; default: CHECKPOINT-FORMAT beside the checkpoint")
    options.add_switch(parser, "overwrite", False, "replace another output")
    parser.add_argument("--which", choices=["student", "ema"], default="student", help="whose weights to export")
    parser.add_argument(
        "--input_size", type=options.COUNT, help="side of the images; another than the checkpoint's fits its positions"
    )
    group = parser.add_argument_group("files that do not say how they were trained (official HPM, MAE, timm)")
    group.add_argument(
        "--model", type=options.one_of(list(models_vit.MODELS), "model"), help="size; default: by width and depth"
    )
    group.add_argument("--mean", type=float, nargs=3, help="mean colour it was trained with; default: ImageNet's")
    group.add_argument("--std", type=options.POSITIVE, nargs=3, help="its standard deviation; default likewise")
    options.add_switch(group, "norm_pix_loss", False, "hf_mae: the model predicts normalised pixels")
    ratio = options.number(float, above=0, below=1)
    group.add_argument("--mask_ratio", type=ratio, help="hf_mae: default: the run's, or 0.75")
    group = parser.add_argument_group("linear probes, which are exported as classifiers")
    group.add_argument("--encoder", help="checkpoint that the probe was trained on; default: where it was then")
    group.add_argument("--head", type=options.COUNT, help="which head, from 1; default: the best one of log.jsonl")
    return parser


def resolve_options(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what the checkpoint says of itself, and refuse what cannot be.

    Raises:
        ValueError: a package is missing, the output cannot be written, or options do not go together.
    """
    args = copy.copy(args)
    form = FORMATS[args.format]
    for package in form.needs:
        require(package, args.format)
    source = Path(args.checkpoint)
    stem = source.stem if source.suffix in (".pth", ".pt", ".bin", ".safetensors") else source.name
    suffix = (*form.suffixes, "")[0]
    kind = "-ema" * (args.which == "ema") + f"-{args.format}" * (suffix != f".{args.format}")
    args.output = Path(args.output or source.with_name(stem + kind + suffix))
    if form.suffixes and args.output.suffix not in form.suffixes:
        raise ValueError(f"--output {args.output}: a file of {args.format} ends in {' or '.join(form.suffixes)}")
    if args.output.exists() and source.exists() and args.output.samefile(source):
        raise ValueError(f"--output {args.output} is the checkpoint itself: choose another name")
    check_target(args.output, None if form.suffixes else FOLDER_CONTENTS, args.overwrite)

    args.meta = meta = read_meta(args.checkpoint)
    trained = meta.get("options", {})
    said = {**defaults_of(meta), "model": settings_of(meta).get("model")}
    options.fill_in(args, {name: said[name] for name in ("model", "mean", "std")})
    options.fill_in(args, {"mask_ratio": trained.get("mask_ratio", 0.75)})
    args.norm_pix_loss = trained.get("target") == "norm_pixel" if trained else args.norm_pix_loss
    if meta.get("script") != "main_linprobe" and (args.encoder or args.head):
        raise ValueError("--encoder and --head are for the checkpoints of main_linprobe.py")
    return args


def require(package: str, name: str) -> None:
    """Import a package that only an export needs.

    Raises:
        ValueError: it is not installed, with the command that does.
    """
    try:
        importlib.import_module(package)
    except ImportError as error:
        needed = " ".join(FORMATS[name].needs)
        raise ValueError(f"--format {name} needs {package} ({error}): pip install {needed}") from error


# -------------------------------------------------------------------------------------------------------- checkpoints


def open_source(args: argparse.Namespace) -> Source:
    """The checkpoint as models that compute.

    Raises:
        ValueError: the weights are no ViT of this family, of a size that is not ours, or not those of --model.
    """
    if args.meta.get("script") == "main_linprobe":
        weights = join_probe(args)
    else:
        weights = load_pretrained(args.checkpoint, args.which)
    weights = {name: tensor.float() for name, tensor in weights.items() if tensor.is_floating_point()}
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight"):
        if name not in weights:
            raise ValueError(f"{args.checkpoint} holds no {name}: it is no ViT of this family")
    weights = fold_official_probe(weights)
    name = args.model or models_vit.size_of(weights)
    if name is None:
        width = weights["cls_token"].shape[-1]
        raise ValueError(f"{args.checkpoint}: no size of ours has width {width} and its depth: {', '.join(SIZES)}")

    channels, patch = weights["patch_embed.proj.weight"].shape[1:3]
    side = math.isqrt(weights["pos_embed"].shape[1] - 1)
    own_size = args.meta["options"]["input_size"] if args.meta else side * patch
    size = args.input_size or own_size
    has_decoder = "decoder_pred.weight" in weights
    if size != own_size and has_decoder and FORMATS[args.format].whole:
        raise ValueError(
            f"--input_size {size}: the decoder's positions are those of {own_size} pixels, and --format {args.format} "
            "holds the decoder: leave it out"
        )
    shape = {"img_size": size, "patch_size": patch, "in_chans": channels}
    classes = len(weights["head.weight"]) if "head.weight" in weights else 0
    model = models_vit.MODELS[name](**shape, num_classes=classes, global_pool="fc_norm.weight" in weights)
    load_into(model, weights)
    autoencoder = build_autoencoder(args, name, size, weights) if has_decoder else None
    return Source(name, weights, model.eval(), autoencoder, list(args.mean), list(args.std), args.mask_ratio)


SIZES = [f"{name} ({sizes['embed_dim']})" for name, sizes in models_vit.SIZES.items()]


def build_autoencoder(
    args: argparse.Namespace, name: str, size: int, weights: dict[str, Tensor]
) -> models_hpm.MaskedAutoencoderViT | None:
    """Encoder and decoders with their weights; None where they predict features, or are fitted to another size."""
    weights = {name: tensor for name, tensor in weights.items() if name != "vis_mask_token"}  # of training alone
    heads = args.meta.get("options", {}).get("decoder_num_heads")
    settings = {"img_size": size, "norm_pix_loss": args.norm_pix_loss}
    settings |= {"decoder_num_heads": heads} if heads else {}
    model = models_hpm.build_for(f"mae_{name}", weights, **settings)
    if model.target_dim is not None or model.decoder_pos_embed.shape != weights["decoder_pos_embed"].shape:
        return None
    load_into(model, weights, left_out=["head.", "fc_norm."])
    return model.eval()


def join_probe(args: argparse.Namespace) -> dict[str, Tensor]:
    """A linear probe's encoder and one of its heads, as the weights of a classifier.

    Raises:
        ValueError: the encoder is not there, or not the one that the probe was trained on; no such head.
    """
    trained = args.meta["options"]
    path = args.encoder or trained["finetune"]
    if not path or not Path(path).exists():
        raise ValueError(f"{args.checkpoint} holds heads alone, and their encoder {path or ''} is gone: give --encoder")
    encoder = models_vit.MODELS[trained["model"]](
        img_size=trained["input_size"],
        patch_size=trained["patch_size"],
        num_classes=0,
        global_pool=trained["global_pool"],
    )
    fresh = ["fc_norm."] if trained["global_pool"] else []
    left_out = (*DECODERS, "head.", "norm.", "fc_norm.")
    load_into(encoder, load_pretrained(path, trained["which"]), fresh, left_out)
    if digest(encoder) != trained["encoder"]:
        raise ValueError(f"{path} is not the encoder that {args.checkpoint} was trained on: give it with --encoder")
    state = load_pretrained(args.checkpoint)
    chosen = args.head or best_head(args)
    if f"heads.{chosen - 1}.weight" not in state:
        raise ValueError(f"--head {chosen}: {args.checkpoint} has {len(trained['lr'])} heads")
    layer = [state[f"heads.{chosen - 1}.{kind}"] for kind in ("weight", "bias")]
    weight, bias = models_vit.fold_feature_norm(*layer, state["norm.running_mean"], state["norm.running_var"])
    return {**encoder.state_dict(), "head.weight": weight, "head.bias": bias}


def best_head(args: argparse.Namespace) -> int:
    """Number of the best head, from 1, by the log beside the checkpoint.

    Raises:
        ValueError: there are several, and no log.
    """
    rates = args.meta["options"]["lr"]
    names = [f"lr {rate:g}" for rate in rates]
    best = read_log(Path(args.checkpoint), args.meta["epoch"]).get("best_head")
    if len(rates) > 1 and best not in names:
        raise ValueError(f"{args.checkpoint} has {len(rates)} heads, and no log that says which is best: give --head")
    return names.index(best) + 1 if len(rates) > 1 else 1


def fold_official_probe(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """MAE's own linear probes: their head is a batch norm and a linear layer (head.0, head.1)."""
    if "head.0.running_mean" not in weights:
        return weights
    names = ("head.1.weight", "head.1.bias", "head.0.running_mean", "head.0.running_var")
    weight, bias = models_vit.fold_feature_norm(*(weights[name] for name in names))
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    return {**kept, "head.weight": weight, "head.bias": bias}


# --------------------------------------------------------------------------------------------------------------- card


def describe(source: Source, form: Format) -> str:
    """What the export is, in a few words."""
    pooled = "mean of the patch tokens" if source.mean_pooled else "class token"
    kind = f"classifier of {source.classes} classes on the {pooled}" if source.classes else "encoder"
    if not form.opened:
        kind = "backbone"
    elif form.whole and source.autoencoder is not None:
        kind = "masked autoencoder"
    return f"{kind}, {source.name}, {source.input_size} pixels in patches of {source.patch_size}"


def describe_training(meta: dict[str, Any]) -> dict[str, Any]:
    """What it was trained on and how; {} if the checkpoint does not say."""
    if not meta:
        return {}
    trained = meta["options"]
    data = trained.get("data_path")
    shapes = f"Shapes, {trained.get('shapes_train')} images drawn by the program"
    rows = {
        "data": Path(data).name if data else shapes,
        "script": f"{meta['script']}.py",
        "epochs": f"{meta['epoch']} of {trained['epochs']}",
        "images per step": trained.get("global_batch"),
        "size of the images": trained["input_size"],
        "mean of the images": meta["image"]["mean"],
        "their standard deviation": meta["image"]["std"],
    }
    said = ("target", "mask_strategy", "mask_ratio", "alpha_0", "alpha_T", "learning_loss", "relative", "nb_classes")
    return rows | {name: trained[name] for name in said if trained.get(name) is not None}


def card(args: argparse.Namespace, form: Format, source: Source, path: Path) -> str:
    kept = set(form.keeps(source))
    meta, original = args.meta, Path(args.checkpoint)
    whose = f"{args.which} weights" if meta.get("script") == "main_pretrain" or args.which == "ema" else "weights"
    what = describe(source, form)
    summary = f"{what[0].upper()}{what[1:]}, for {form.opens}. Made from the {whose} of `{original.name}`."
    how = f"Opened with {form.opens}" if form.opened else "Names, shapes and values compared, then the file read back"
    check = (
        f"{how} and compared with the model it was made from on random images: the largest difference is below "
        f"{form.tolerance:g} of the largest value."
    )
    tags = {
        "vision-transformer": True,
        "masked-autoencoder": bool(meta) or source.autoencoder is not None,
        "hard-patches-mining": "decoder_pred_losspred.weight" in source.weights,
    }
    here = describe_environment()
    packages = {name: installed(name) for name in ("torch", "timm", "safetensors", *form.needs)}
    return model_card(
        path.name,
        tags=[tag for tag, fits in tags.items() if fits],
        library={"hf_mae": "transformers", "hf_vit": "transformers"}.get(args.format, args.format),
        summary=summary,
        usage=form.usage(source, path.name),
        notes=[form.note(source), f"Images are RGB, normalised with mean {source.mean} and std {source.std}."],
        training=describe_training(meta),
        figures=read_log(original, meta["epoch"]) if meta else {},
        left_out=summarize_names([name for name in source.weights if name not in kept]),
        check=check,
        versions={
            "of the training": read_environment(original) if meta else {},
            "of the export": {"git_commit": here["git_commit"], "python": here["python"], **packages},
        },
        options=without_folders(meta.get("options", {})),
    )


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def build(args: argparse.Namespace, form: Format, source: Source, path: Path) -> None:
    """Write the export and check it, then its card: README.md in a folder, NAME.SUFFIX.md beside a file.

    Raises:
        Mismatch: the export is not what it should be.
    """
    form.write(source, path)
    difference = verify(form, source, path)
    how = "opened with" if form.opened else "names, shapes and values for"
    log.info("check     %s %s: differs by %.2g at most (limit %g)", how, form.opens, difference, form.tolerance)
    place = path.with_name(f"{path.name}.md") if form.suffixes else path / "README.md"
    place.write_text(card(args, form, source, path))


def main(argv: list[str] | None = None) -> None:
    setup_logging(enabled=True)
    with options.user_mistakes():
        args = resolve_options(get_args_parser().parse_args(argv))
        form = FORMATS[args.format]
        source = open_source(args)
        if reason := form.refuse(source):
            raise ValueError(f"--format {args.format} cannot hold {args.checkpoint}: {reason}")
        log.info("model     %s", describe(source, form))
        try:
            written = publish(args.output, partial(build, args, form, source), args.overwrite)
        except Mismatch as error:
            sys.exit(f"export.py: error: the check of {args.output} failed, nothing was written: {error}")
    log.info("%s %s", "wrote    " if written else "unchanged", args.output)


if __name__ == "__main__":
    main()
