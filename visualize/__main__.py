"""Draw what a pre-trained model predicts for images, or plot the logs of runs.

    python -m visualize --checkpoint output_dir/checkpoint-last.pth --images photos/
    python -m visualize --runs output_dir/hpm output_dir/mae

Without --images it uses Shapes. One row per image: the image, the predicted hardness of its patches, the masks at the
start and at the end of training, the reconstruction, and the true error. docs/visualize.md explains how to read it.
"""

import argparse
import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from models_hpm import MODELS, MaskedAutoencoderViT, build_for
from models_teacher import TARGETS
from util.data import transforms
from util.data.decode import MAX_PIXELS
from util.data.files import SeveralFiles
from util.data.sources import ShapesSource, Source, build_source
from util.masking import MaskSampler
from util.pos_embed import interpolate_pos_embed
from util.run import distributed, options
from util.run.folder import create, write_atomic
from util.run.logger import log, setup_logging
from util.run.splits import data_settings
from util.targets import PIXEL_TARGETS
from util.weights.load import load_into, load_pretrained, read_meta
from util.weights.meta import classifier_name
from visualize import draw
from visualize.panel import PATCH_STATS, panel, read_crops

SCRIPT = "main_pretrain"  # which writes the checkpoints
PICTURES, PLOTS = (".png", ".jpg", ".jpeg", ".webp"), (".png", ".svg", ".pdf")
LARGEST = {"JPEG": 65_500, "WEBP": 16_383}  # pixels of a side

# Assumed for a file without metadata, unless an option says otherwise.
FOREIGN = {"model": "mae_vit_base_patch16", "input_size": 224, "mask_ratio": 0.75, "relative": True, "epochs": 200}
# Options that must agree with the metadata of a file.
FIXED = ["model", "target", "relative", "epochs"]


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser(__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", help="pre-training checkpoint: this project's, official HPM's or MAE's")
    parser.add_argument("--runs", nargs="+", help="run folders: plot their log.jsonl in one picture")
    parser.add_argument("--output", default="visualization.png", help="picture to write (plots: also .svg and .pdf)")
    group = parser.add_argument_group("pictures")
    group.add_argument("--images", nargs="+", help="image files, folders or tar archives (default: Shapes)")
    group.add_argument("--split", help="train or val, if the folder or archive has splits (default: all images)")
    group.add_argument(
        "--num_images", type=options.COUNT, help="number of images, drawn at random (default: 8, or all named files)"
    )
    group.add_argument("--one_file_each", action="store_true", help="write one file per image: OUTPUT-1.png, ...")
    group.add_argument(
        "--which",
        choices=["student", "ema"],
        default="student",
        help="weights that reconstruct; masks and predicted hardness are the EMA teacher's if the checkpoint has one",
    )
    group.add_argument(
        "--epoch", type=options.COUNT_OR_ZERO, help="epoch whose mask to draw and reconstruct from (default: the last)"
    )
    group.add_argument("--mask_ratio", type=options.FRACTION, help="default: the run's, or 0.75")
    group.add_argument("--seed", type=options.SEED, default=0, help="seed of the choice of images and masks")
    group.add_argument(
        "--patch_stats",
        choices=list(PATCH_STATS),
        default="image",
        help="models of normalised pixels: mean and variance of each masked patch from the image (reveals part of the "
        "answer), or the average over the visible patches",
    )
    group.add_argument(
        "--scale",
        choices=list(draw.SCALES),
        default="author",
        help="colours of hardness and error: as HPM's author draws them (sigmoid of the value minus its mean, divided "
        "by the maximum), or by rank",
    )
    group.add_argument("--cell", type=options.COUNT, default=draw.COLUMN, help="approximate width of an image")
    group.add_argument("--input_size", type=options.COUNT, help="input resolution (default: the run's, or 224)")
    group.add_argument(
        "--value_range",
        type=options.NUMBER,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="as in training, for images of more than 8 bits (default: the run's, or by image)",
    )
    group.add_argument("--max_image_pixels", type=options.COUNT, default=MAX_PIXELS, help="reject larger images")
    group.add_argument("--cache_dir", help="folder of decompressed .tar.gz archives (default: ~/.cache/hpm)")
    group = parser.add_argument_group("checkpoints without metadata (official HPM, MAE)")
    group.add_argument("--model", choices=list(MODELS), metavar="MODEL", help=f"default: {FOREIGN['model']}")
    group.add_argument("--target", choices=TARGETS, help="reconstruction target (default: pixel)")
    group.add_argument(
        "--norm_pix_loss", action=options.SWITCH, default=None, help="official name of --target norm_pixel"
    )
    group.add_argument(
        "--relative",
        action=options.SWITCH,
        default=None,
        help="the predictor ranks patches; otherwise it predicts loss values",
    )
    group.add_argument("--epochs", type=options.COUNT, help=f"length of the training (default: {FOREIGN['epochs']})")
    group.add_argument("--mean", type=options.NUMBER, nargs=3, help="channel means in 0..1 (default: ImageNet's)")
    group.add_argument("--std", type=options.POSITIVE, nargs=3, help="their standard deviations (default: ImageNet's)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda if available)")
    return parser


def resolve_options(args: argparse.Namespace) -> argparse.Namespace:
    """Complete the options with the checkpoint's metadata.

    Raises:
        ValueError: options that contradict each other or the checkpoint.
    """
    args = copy.copy(args)
    if bool(args.checkpoint) == bool(args.runs):
        raise ValueError("give either --checkpoint, to draw pictures, or --runs, to plot logs")
    if args.runs:
        return args
    if args.norm_pix_loss is not None:
        target = "norm_pixel" if args.norm_pix_loss else "pixel"
        if args.target not in (None, target):
            raise ValueError(f"--target {args.target} contradicts --norm_pix_loss {args.norm_pix_loss}: give only one")
        args.target = target
    meta = read_meta(args.checkpoint)
    trained = meta.get("options", {})
    image = {"mean": list(transforms.IMAGENET_MEAN), "std": list(transforms.IMAGENET_STD), **meta.get("image", {})}
    if meta.get("script", SCRIPT) != SCRIPT:
        raise ValueError(f"{args.checkpoint} was written by {meta['script']}: pictures need a pre-training checkpoint")
    if args.model is not None and classifier_name(args.model) == classifier_name(trained.get("model", "")):
        args.model = None  # another spelling of the same model
    for name in FIXED:
        given = getattr(args, name)
        if name in trained and given not in (None, trained[name]):
            raise ValueError(f"--{name} {given} contradicts {args.checkpoint} ({trained[name]}): omit the option")
    model = {"model": f"mae_{classifier_name(meta['model'])}"} if meta else {}
    for name, value in {**FOREIGN, **model, **trained, **image}.items():
        if name not in ("device", "cache_dir") and getattr(args, name, "") is None:  # those are of this machine
            setattr(args, name, value)
    transforms.check_statistics(args.mean, args.std)
    if args.value_range and args.value_range[0] >= args.value_range[1]:
        raise ValueError(f"--value_range {args.value_range[0]:g} {args.value_range[1]:g}: LOW must be below HIGH")
    args.trained, args.epochs_done = trained, meta.get("epoch")
    args.epoch = args.epochs - 1 if args.epoch is None else args.epoch
    if args.epoch >= args.epochs:
        raise ValueError(f"--epoch {args.epoch}: the run has {args.epochs} epochs, counted from 0")
    return args


def load_models(args: argparse.Namespace) -> tuple[MaskedAutoencoderViT, MaskedAutoencoderViT, tuple[str, str]]:
    """The model of --which, the one that chooses the masks (as in training the EMA teacher, if the checkpoint has one),
    and the names of the latter and the former.

    Raises:
        ValueError: no such weights, or they do not fit the model.
    """
    model = build_model(args, load_pretrained(args.checkpoint, args.which))
    if args.which == "ema":
        return model, model, ("EMA teacher", "EMA teacher")
    try:
        weights = load_pretrained(args.checkpoint, "ema")
    except ValueError:  # the file has none; it is readable, as the student was loaded
        name = "EMA teacher" if args.trained.get("which") == "ema" else "student"  # which an export holds
        return model, model, (name, name)
    return model, build_model(args, weights), ("EMA teacher", "student")


def build_model(args: argparse.Namespace, weights: dict[str, Tensor]) -> MaskedAutoencoderViT:
    """The model of --checkpoint with its student or EMA weights.

    Raises:
        ValueError: there is no decoder in the weights, they do not fit the model, or they are not for RGB images.
    """
    settings = {"img_size": args.input_size, "relative": args.relative}
    for name in ("predictor_loss", "score_by"):  # not in older checkpoints, which have the defaults
        settings[name] = args.trained.get(name)
    if args.trained.get("decoder_num_heads"):  # cannot be inferred from tensor shapes
        settings["decoder_num_heads"] = args.trained["decoder_num_heads"]
    if args.target in PIXEL_TARGETS:
        settings |= {"pixel_target": args.target, "target_dim": None}
    elif args.target and "decoder_pred.weight" in weights:  # features can be as wide as a patch of pixels
        settings["target_dim"] = len(weights["decoder_pred.weight"])
    model = build_for(args.model, weights, **settings)
    if model.in_chans != 3:
        raise ValueError(f"{args.checkpoint} takes {model.in_chans}-channel images; only RGB is supported")
    interpolate_pos_embed(model, weights, "decoder_pos_embed")
    load_into(model, weights)
    return model.to(args.device).eval()


def load_images(args: argparse.Namespace) -> tuple[Tensor, list[str]]:
    """The images (B, 3, S, S) uint8 and their names: files named one by one in their order, else a random choice.

    Raises:
        ValueError: no such images, or a named file is unreadable.
    """
    if args.images is None and args.split not in (None, "train", "val"):
        raise ValueError(f"--split {args.split}: Shapes have train and val")
    source: Source = ShapesSource(args.split or "val")
    named = False
    if args.images is not None:
        settings: dict[str, Any] = {"labels_needed": False, "whole": False, **data_settings(args)}
        try:
            source = SeveralFiles([build_source(path, args.split, **settings) for path in args.images])
        except ValueError as error:
            raise ValueError(str(error).replace("--data_path", "--images")) from error
        named = len(source) == len(args.images)  # one per path: no folder or archive of several
    if named and args.num_images is None:
        return read_crops(source, range(len(source)), range(len(source)), args.input_size, strict=True)
    order = np.random.default_rng(args.seed).permutation(len(source)).tolist()
    return read_crops(source, order, range(args.num_images or 8), args.input_size, strict=named)


def draw_pictures(args: argparse.Namespace) -> list[Image.Image]:
    """The pictures of --checkpoint: all images in one, or one each."""
    model, teacher, weights = load_models(args)
    settings = {**args.trained, "mask_ratio": args.mask_ratio, "epochs": args.epochs}
    can_score = model.target_dim is None if model.score_by == "loss" else model.learning_loss
    if not can_score:
        if settings.get("score_by") == "loss":
            log.warning(
                "The masks are random here: the run chose them by the loss of features, which need --target's network"
            )
        settings |= {"mask_strategy": "random", "teacher_keep": 1.0}
    try:
        masks = MaskSampler.from_options(settings, model.patch_embed.grid_size)
    except ValueError as error:
        if args.mask_ratio == args.trained.get("mask_ratio"):
            raise
        raise ValueError(
            f"--mask_ratio {args.mask_ratio} does not go with the checkpoint's options: {error}"
        ) from error
    images, names = load_images(args)
    has_features = args.target == "ema" and args.trained and weights[0] == "EMA teacher"
    drawn = panel(
        model,
        teacher,
        images,
        names,
        masks,
        mean=args.mean,
        std=args.std,
        epoch=args.epoch,
        other_epochs=[0, args.epochs - 1],
        seed=args.seed,
        feature_target=(lambda imgs, tokens: tokens) if has_features else None,
        patch_stats=args.patch_stats,
        scale=args.scale,
        weights=weights,
    )
    path = Path(args.checkpoint).resolve()
    done = "" if args.epochs_done is None else f", {args.epochs_done} of {args.epochs} epochs"
    heading = f"{path.parent.name}/{path.name}, {args.model}{done}"
    parts = [drawn]
    if args.one_file_each:
        rows = zip(drawn.rows, drawn.captions, strict=True)
        parts = [drawn._replace(rows=[row], captions=[caption]) for row, caption in rows]
    return [draw.draw_grid(part, heading, args.cell) for part in parts]


def main(argv: list[str] | None = None) -> None:
    setup_logging(enabled=True)
    with options.user_mistakes():
        args = resolve_options(get_args_parser().parse_args(argv))
        output, formats = Path(args.output), PLOTS if args.runs else PICTURES
        suffix = output.suffix.lower()
        if suffix not in formats or output.is_dir():
            raise ValueError(f"--output {output}: expected the name of a picture, {', '.join(formats)}")
        create(output.parent, "--output")
        if args.runs:
            try:
                from visualize import curves
            except ImportError as error:
                raise ValueError("plots require matplotlib: pip install matplotlib") from error
            runs = curves.name_runs(args.runs)
            figure = curves.plot(runs)
            if table := curves.compare_accuracy(runs):
                log.info("Top-1 accuracy in %%:\n%s", table)
            if table := curves.compare_options(runs):
                log.info("Options that differ:\n%s", table)
            savers = [partial(figure.savefig, format=suffix.removeprefix("."), dpi=130)]
        else:
            kind = Image.registered_extensions()[suffix]
            args.device, _ = distributed.setup(distributed.ALONE, args.device, "fp32", timeout_minutes=1)
            pictures = draw_pictures(args)
            largest = max(max(picture.size) for picture in pictures)
            if largest > (limit := LARGEST.get(kind, largest)):
                raise ValueError(
                    f"--output {output}: a picture of {largest:,} pixels, {kind} holds {limit:,}: name a .png, or give "
                    "--one_file_each, or a lower --num_images or --cell"
                )
            savers = [partial(picture.save, format=kind) for picture in pictures]
        digits = len(str(len(savers)))
        for number, save in enumerate(savers, start=1):
            path = output.with_stem(f"{output.stem}-{number:0{digits}}") if args.one_file_each else output
            write_atomic(path, save)
            log.info("wrote %s", path)


if __name__ == "__main__":
    main()
