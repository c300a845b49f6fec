"""Weighted k-nearest-neighbour classification on frozen features (DINO's protocol), and logistic regression.

    python main_knn.py --finetune output_dir/checkpoint-last.pth
    torchrun --nproc_per_node=8 main_knn.py --finetune mae_pretrain_vit_base.pth --data_path /imagenet

Exact, and the same from any number of processes. docs/eval.md has the commands for ImageNet.
"""

import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

import models_load
import models_vit
from engine_finetune import extract_splits, knn_accuracy
from engine_probe import logistic_accuracy
from util import knn, rng
from util.data import transforms
from util.data.classes import count_classes
from util.data.sources import Source, build_splits
from util.run import distributed, folder, options, resolve
from util.run.amp import Amp
from util.run.logger import log
from util.run.splits import data_settings, knn_loaders, record_val_split, warn_of_range
from util.weights.load import load_pretrained, log_loaded, read_meta
from util.weights.read import read_file

# Files of --dump_features, as DINO names them.
FEATURES, LABELS = "{}feat.pth", "{}labels.pth"
# Options that say how features are computed, from which images.
OF_FEATURES = [
    *["data_path", "val_fraction", "shapes_train", "shapes_val", "value_range", "max_image_pixels", "mean", "std"],
    *["model", "input_size", "patch_size", "crop_pct", "global_pool", "which", "teacher", "compile"],
]
THUMBNAIL = 16  # pixels per side of --features pixels
SPLITS = {"train": "train", "test": "val"}
NUM_WORKERS = 4  # default

# Training options of the official script, which does not read them either.
UNREAD = (
    "epochs accum_iter weight_decay lr blr min_lr warmup_epochs output_dir log_dir resume start_epoch eval dist_eval"
)


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser((__doc__ or "").split("\n")[0])
    options.add_classifier_options(parser, list(models_vit.MODELS))
    options.add_data_options(parser, num_workers=NUM_WORKERS)
    options.add_device_options(parser)
    group = parser.add_argument_group("k-NN")
    group.add_argument("--batch_size", type=options.COUNT, default=512, help="images per process and forward pass")
    group.add_argument(
        "--nb_knn", type=options.COUNT, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours"
    )
    group.add_argument(
        "--temperature", type=options.POSITIVE, default=knn.TEMPERATURE, help="temperature of the votes (DINO: 0.07)"
    )
    options.add_pooling_options(group, "off")
    options.add_crop_option(group)
    group.add_argument(
        "--features",
        choices=["encoder", "pixels"],
        default="encoder",
        help="features of the encoder, or as a baseline without a model the pixels of the crop, at most 16 x 16",
    )
    group.add_argument(
        "--logreg",
        action="store_true",
        help="also fit a logistic regression (C chosen on a tenth of the training images)",
    )
    group.add_argument("--dump_features", help="folder to store the features in")
    group.add_argument("--load_features", help="folder written by --dump_features, instead of images")
    group.add_argument(
        "--seed",
        type=options.SEED,
        default=0,
        help="seed of random weights (without --finetune) and of the images that --logreg holds out",
    )
    parser.accept_ignored(*UNREAD.split())
    return parser


def resolve_options(args: argparse.Namespace, world: distributed.World) -> argparse.Namespace:
    """Fill in what follows from the checkpoint, and reject impossible settings.

    Raises:
        ValueError: options that contradict each other, or a checkpoint that cannot be read.
    """
    args = copy.copy(args)
    if args.load_features:
        defaults = get_args_parser().parse_args([])
        for name in OF_FEATURES:
            if getattr(args, name) != getattr(defaults, name):
                raise ValueError(f"--{name} has no effect on the stored features of --load_features: omit it")
    resolve.resolve_which(args)
    if args.load_features and (args.dump_features or args.finetune):
        raise ValueError("--load_features takes stored features: omit --dump_features and --finetune")
    if args.features == "pixels" and (args.load_features or args.compile):
        raise ValueError("--features pixels runs no encoder and reads images: omit --load_features and --compile")
    meta = read_meta(args.finetune) if args.finetune else {}
    resolve.resolve_settings(args, meta)
    crop_pct = resolve.evaluation_crop(args.input_size, meta.get("options", {}))
    resolve.fill_in(args, {"crop_pct": crop_pct, "global_pool": False})
    resolve.resolve_workers(args, world, NUM_WORKERS)
    with torch.device("meta"):  # checks the sizes of the model at no cost
        args.patch_size = build_model(args).patch_embed.patch_size[0]
    return args


def build_model(args: argparse.Namespace) -> models_vit.VisionTransformer:
    settings = {"num_classes": 0, "global_pool": args.global_pool, "pooled_norm": False}
    return models_vit.build(args.model, args.input_size, args.patch_size, **settings)


def pixels(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, E): the image, averaged down to 16 x 16 pixels where it is larger, L2-normalised."""
    small = [min(size, THUMBNAIL) for size in images.shape[-2:]]
    return F.normalize(F.adaptive_avg_pool2d(images, small).flatten(1), dim=-1)


def read_features(path: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Features and labels that --dump_features stored, by split.

    Raises:
        ValueError: a file is missing or damaged, the numbers of features and labels differ, or there is one class.
    """
    stored = {}
    for split in SPLITS:
        parts = [read_file(Path(path, name.format(split)))["tensor"] for name in (FEATURES, LABELS)]
        if len(parts[0]) != len(parts[1]):
            raise ValueError(f"{path}: {len(parts[0])} {split} features, but {len(parts[1])} labels")
        stored[split] = tuple(parts)
    if len(stored["train"][1].unique()) < 2:
        raise ValueError(
            f"{path}: all training labels are equal, so any prediction would be right: store other features"
        )
    return stored


def write_features(path: str, features: dict[str, tuple[Tensor, Tensor]]) -> None:
    for split, parts in features.items():
        for name, tensor in zip((FEATURES, LABELS), parts, strict=True):
            folder.write_file(Path(path, name.format(split)), {"tensor": tensor})


@record
def main(argv: list[str] | None = None) -> dict[int | str, tuple[float, float]]:
    """Returns: top-1 and top-5 in percent, for each number of neighbours, and with --logreg under "logreg"."""
    # Options and paths: mistakes end here, before a model is built.
    with options.user_mistakes():
        world = distributed.read_environment()
        args = resolve_options(get_args_parser().parse_args(argv), world)
        device, amp = distributed.setup(world, args.device, args.precision, args.dist_timeout)
        args.device, args.precision = device.type, amp.name
        features, sources, weights = {}, {}, None
        if args.dump_features:  # fail before the features are computed
            distributed.from_rank_zero(lambda: folder.create(Path(args.dump_features), "--dump_features"))
        if args.load_features:
            features = read_features(args.load_features)
            needed = int(max(labels.max() for _, labels in features.values())) + 1
            if args.nb_classes is not None and args.nb_classes < needed:
                raise ValueError(
                    f"--nb_classes {args.nb_classes}, but the stored labels have {needed}: omit the option"
                )
            args.nb_classes = args.nb_classes or needed
        else:
            counts = (args.shapes_train, args.shapes_val)
            splits = build_splits(args.data_path, counts, val_fraction=args.val_fraction, **data_settings(args))
            warn_of_range(args, splits[0])
            record_val_split(args, splits[1])
            sources = dict(zip(SPLITS, splits, strict=True))
            args.nb_classes = count_classes(sources["train"], sources["test"], args.nb_classes)
            weights = load_pretrained(args.finetune, args.which) if args.finetune else None
            if weights is not None:
                models_load.check_pooling(weights, args.global_pool, args.finetune)
        num_train = len(features["train"][1] if features else sources["train"])
        if max(args.nb_knn) > num_train:
            raise ValueError(f"--nb_knn {max(args.nb_knn)} of {num_train:,} training images: choose fewer neighbours")
        if args.logreg and num_train < 10:
            raise ValueError(f"--logreg holds out a tenth of the training images, and there are {num_train}: omit it")

    if not features:
        describe(args, sources)
        features = extract_all(args, world, device, amp, sources, weights)
        if args.dump_features:
            distributed.from_rank_zero(lambda: write_features(args.dump_features, features))
            log.info("features stored in %s", args.dump_features)

    mine = slice(world.rank, None, world.size)  # each rank takes its share of the queries
    by_k = knn_accuracy(features, args.nb_knn, args.temperature, args.nb_classes, device, mine)
    for k, accuracies in by_k.items():
        log.info("%d-NN  top-1 %.2f  top-5 %.2f", k, *accuracies)
    metrics: dict[int | str, tuple[float, float]] = dict(by_k.items())
    if args.logreg:
        metrics["logreg"] = distributed.from_rank_zero(
            lambda: logistic_accuracy(features["train"], features["test"], args.nb_classes, args.seed, device)
        )
        log.info("logistic regression  top-1 %.2f  top-5 %.2f", *metrics["logreg"])
    distributed.shutdown()
    return metrics


def describe(args: argparse.Namespace, sources: dict[str, Source]) -> None:
    """The start of the log: which features of which images."""
    if args.features == "pixels":
        log.info(
            "features  pixels of the %d-pixel crop, averaged to at most %d x %d", args.input_size, THUMBNAIL, THUMBNAIL
        )
    else:
        token = "mean of patch tokens" if args.global_pool else "class token"
        log.info("features  %s, %s, %d pixels in patches of %d", args.model, token, args.input_size, args.patch_size)
    images = f"{len(sources['train']):,} training images, {len(sources['test']):,} queries"
    resolve.describe(get_args_parser(), args, images)


def extract_all(
    args: argparse.Namespace,
    world: distributed.World,
    device: torch.device,
    amp: Amp,
    sources: dict[str, Source],
    weights: dict[str, Tensor] | None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Features and labels of both splits, the same on every rank."""
    if args.features == "pixels":
        encode, width = pixels, 3 * min(args.input_size, THUMBNAIL) ** 2
    else:
        rng.seed_all(args.seed)
        if weights is None:
            log.info("no --finetune: features of random weights")
            encoder = build_model(args).eval()
        else:
            shape = (args.model, args.input_size, args.patch_size)
            with options.user_mistakes():
                encoder, loaded = models_load.build_encoder(
                    weights, *shape, global_pool=args.global_pool, path=args.finetune
                )
            log_loaded(args.finetune, loaded)
        amp.choose_attention(encoder.to(device))
        if args.compile:
            encoder.compile()

        def encode(images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, E), L2-normalised
            return F.normalize(encoder(images).float(), dim=-1)

        width = encoder.embed_dim
    to_model_input = transforms.ToModelInput(args.mean, args.std, device, flip=False)
    crop = transforms.CenterCrop(args.input_size, args.crop_pct)
    loaders = knn_loaders(args, sources, crop, world)
    return extract_splits(encode, loaders, sources, amp, to_model_input, width, world.size)


if __name__ == "__main__":
    main()
