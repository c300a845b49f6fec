"""Predict the classes of images: images in, a CSV file out.

    python predict.py --checkpoint output_dir/finetune/checkpoint-best.pth --data_path photos/
    python predict.py --checkpoint output_dir/finetune/checkpoint-best.pth --data_path a.jpg more.tar --features a.npz

Images need no labels; --data_path takes any number of folders, archives and files. It runs in one process. FINETUNE.md
describes the output.
"""

import argparse
import copy
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import ImageNetInfo
from torch import Tensor

import models_load
import models_vit
from util.data.datasets import MarkUnreadable, report_unreadable
from util.data.decode import REASONS
from util.data.sources import Source, build_source
from util.data.transforms import ToModelInput
from util.run import distributed, options, resolve
from util.run.amp import Amp
from util.run.classwise import write_csv
from util.run.folder import create, write_atomic
from util.run.logger import track
from util.run.splits import data_settings, evaluation_loader, warn_of_range

log = logging.getLogger("hpm")

TOP = 5
NUM_WORKERS = 10  # default
PIXELS = ("mean", "std", "value_range")


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser((__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a classifier: a checkpoint of main_finetune.py or main_linprobe.py, MAE's, timm's, a .safetensors file "
        "or a Hugging Face folder; with --features and no --output, any encoder",
    )
    parser.add_argument("--output", help="CSV file to write (default: predictions.csv)")
    parser.add_argument(
        "--features", help="also store the features, the input of the classifier: .npz (features, files) or .npy"
    )
    parser.add_argument("--split", help="train or val, if the folder or archive has splits (default: all images)")
    parser.add_argument(
        "--class_names", help="names of the classes, one per line, or imagenet (default: those in the checkpoint)"
    )
    parser.add_argument("--batch_size", type=options.COUNT, default=64, help="images per forward pass")
    options.add_data_options(parser, num_workers=NUM_WORKERS, splits=("val",), layout=options.IMAGES)
    options.add_device_options(parser)
    group = parser.add_argument_group("checkpoint")
    group.add_argument("--which", choices=["student", "ema"], default="student", help="weights of an HPM checkpoint")
    group.add_argument("--input_size", type=options.COUNT, help="image size in pixels (default: the checkpoint's)")
    options.add_crop_option(group)
    group.add_argument(
        "--model", choices=list(models_vit.MODELS), metavar="MODEL", help="size (default: by width and depth)"
    )
    options.add_pooling_options(group, "the classifier's, off for encoders")
    group.add_argument("--encoder", help="of a linear probe: the file it was trained on (default: its recorded path)")
    group.add_argument(
        "--head", type=options.COUNT, help="of a linear probe: number of the head, from 1 (default: best)"
    )
    return parser


def resolve_options(args: argparse.Namespace, world: distributed.World) -> argparse.Namespace:
    """Fill in what follows from other options, and reject impossible settings.

    Raises:
        ValueError: options that contradict each other, or outputs that cannot be written.
    """
    args = copy.copy(args)
    if world.size > 1:
        raise ValueError(f"predict.py runs in one process, not {world.size}: start it with python, without torchrun")
    args.paths = {}
    if args.data_path is None and args.split not in (None, "train", "val"):
        raise ValueError(f"--split {args.split}: Shapes have train and val")
    for name, path, suffixes in (
        ("output", args.output or "predictions.csv", (".csv",)),
        ("features", args.features, (".npz", ".npy")),
    ):
        if path is None:
            continue
        args.paths[name] = Path(path)
        if Path(path).suffix not in suffixes or Path(path).is_dir():
            raise ValueError(f"--{name} {path}: expected the name of a file, {' or '.join(suffixes)}")
    resolve.resolve_workers(args, world, NUM_WORKERS)
    return args


def open_checkpoint(args: argparse.Namespace) -> tuple[models_vit.VisionTransformer, Any, list[str]]:
    """The model, its transform and the names of its classes; [] for an encoder without classes.

    Raises:
        ValueError: no such weights, no classifier and no --features to store, or a classifier of one class.
    """
    weights, meta = models_load.read_weights(args.checkpoint, args.which, args.encoder, args.head)
    resolve.resolve_settings(args, meta, PIXELS)
    settings = {name: getattr(args, name) for name in ("input_size", "crop_pct", "model", *PIXELS)}
    if "head.weight" not in weights and args.features and not args.output and not args.class_names:
        model, transform = models_load.encoder_of(
            args.checkpoint, weights, meta, global_pool=args.global_pool, **settings
        )
        return model, transform, []
    if args.global_pool is not None:
        raise ValueError("--global_pool and --cls_token are for encoders, a classifier has its own pooling: omit them")
    model, transform, names = models_load.classifier_of(args.checkpoint, weights, meta, **settings)
    if model.num_classes == 1:
        raise ValueError(
            f"{args.checkpoint} has one output, whose probability is always 1: there is nothing to predict"
        )
    if args.class_names:
        names = read_names(args.class_names, model.num_classes)
    if not names:
        log.info("classes   %s stores no names: predictions are numbers (--class_names)", args.checkpoint)
    return model, transform, names or [str(k) for k in range(model.num_classes)]


def read_names(path: str, num_classes: int) -> list[str]:
    """Names of the classes: lines of a file, or WordNet id and description of ImageNet's classes.

    Raises:
        ValueError: no such file, or another number of names than classes.
    """
    if path == "imagenet":
        info = ImageNetInfo("imagenet-1k")
        names = [f"{name} {info.label_name_to_description(name)}" for name in info.label_names()]
    elif not Path(path).is_file():
        raise ValueError(f"--class_names {path}: no such file; give a file with one name per line, or imagenet")
    else:
        names = Path(path).read_text(encoding="utf-8-sig", errors="backslashreplace").splitlines()
    if len(names) != num_classes:
        raise ValueError(f"--class_names {path} has {len(names):,} names, the checkpoint {num_classes:,} classes")
    return names


@torch.no_grad()
def predict(
    model: models_vit.VisionTransformer, batches: Any, amp: Amp, to_model_input: ToModelInput, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features (N, E), probabilities and classes of the best five (N, 5), and why an image is unreadable (N,), -1 if it
    is not. Rows of unreadable images are NaN."""
    top = min(TOP, model.num_classes)
    features = torch.full((count, model.num_features), torch.nan)
    shares, classes = torch.full((count, top), torch.nan), torch.zeros(count, top, dtype=torch.long)
    reasons = torch.full((count,), -1)
    for images, _, index, _, reason in batches:
        with amp.autocast():
            pooled = model.pooled_features(to_model_input(images))  # (B, E)
            logits = model.head(pooled).float()  # (B, K)
        good, kept = reason < 0, index[reason < 0]
        reasons[index] = reason
        features[kept] = pooled.float().cpu()[good]
        if top:
            best = logits.softmax(dim=-1).topk(top, dim=-1)
            shares[kept], classes[kept] = best.values.cpu()[good], best.indices.cpu()[good]
    return features, shares, classes, reasons


def write_features(path: Path, features: Tensor, files: list[str]) -> None:
    """.npy: (N, E) float32; .npz: the same as `features`, and the names of the images as `files`."""
    if path.suffix == ".npy":
        write_atomic(path, partial(np.save, arr=features.numpy()))
    else:
        write_atomic(path, partial(np.savez, features=features.numpy(), files=np.array(files)))


def read_images(args: argparse.Namespace) -> Source:
    """The images of --data_path, of all its splits unless --split names one.

    Raises:
        ValueError: there are none.
    """
    split = args.split or ("val" if args.data_path is None else None)
    settings = {"labels_needed": False, "whole": False, "shapes_count": args.shapes_val, **data_settings(args)}
    try:
        return build_source(args.data_path, split, **settings)
    except ValueError as error:
        if split is not None:
            raise
        raise ValueError(f"{error}. A Hugging Face DatasetDict needs --split train or val") from error


def main(argv: list[str] | None = None) -> None:
    with options.user_mistakes():
        world = distributed.read_environment()
        args = resolve_options(get_args_parser().parse_args(argv), world)
        device, amp = distributed.setup(world, args.device, args.precision, args.dist_timeout)
        model, transform, names = open_checkpoint(args)
        source = read_images(args)
        if not names:
            del args.paths["output"]
        for name, path in args.paths.items():
            create(path.parent, f"--{name}")

    log.info("model     %s, %d classes, %d pixels", args.checkpoint, len(names), model.patch_embed.img_size[0])
    args.device, args.precision = device.type, amp.name
    resolve.describe(get_args_parser(), args, f"{len(source):,} images")
    warn_of_range(args, source)
    model = model.to(device)
    amp.choose_attention(model)
    if args.compile:
        model.pooled_features = torch.compile(model.pooled_features)
    loader = evaluation_loader(args, source, transform.crop, world, dataset=MarkUnreadable)
    to_model_input = ToModelInput(transform.mean, transform.std, device, flip=False)
    batches = track(loader, len(source), "predictions")
    features, shares, classes, reasons = predict(model, batches, amp, to_model_input, len(source))

    report_unreadable(source, reasons, "no predictions")
    files = [source.name(index) for index in range(len(source))]
    if "features" in args.paths:
        write_features(args.paths["features"], features, files)
    if "output" in args.paths:
        ranks = range(1, shares.shape[1] + 1)
        rows: list[list[str]] = [["file", *(f"{what}{k}" for k in ranks for what in ("class", "prob")), "unreadable"]]
        for file, row, best, reason in zip(files, shares.tolist(), classes.tolist(), reasons.tolist(), strict=True):
            pairs = [(names[k], f"{share:.6f}") if reason < 0 else ("", "") for k, share in zip(best, row, strict=True)]
            rows.append([file, *(value for pair in pairs for value in pair), "" if reason < 0 else REASONS[reason]])
        write_csv(args.paths["output"], rows)
    for path in args.paths.values():
        log.info("wrote     %s", path)


if __name__ == "__main__":
    main()
