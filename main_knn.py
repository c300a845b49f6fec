"""Weighted k-nearest-neighbour classification on frozen features (DINO's protocol).

    python main_knn.py --finetune output_dir/checkpoint-last.pth
    torchrun --nproc_per_node=8 main_knn.py --finetune mae_pretrain_vit_base.pth --data_path /imagenet

Exact, and the same from any number of processes. docs/eval.md has the commands for real.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

import models_vit
from engine_finetune import extract_features
from util import rng
from util.data import transforms
from util.data.datasets import ImageDataset, Source, build_source, count_classes
from util.data.loader import ShardSampler, build_loader
from util.knn import knn_correct
from util.run import checkpoint, distributed, launch, options
from util.run.amp import Precision
from util.run.logger import cpu_threads, log, track
from util.weights.load import DECODERS, load_into, load_pretrained, read_meta
from util.weights.meta import defaults_of
from util.weights.read import read_file

# Files of --dump_features, as DINO names them.
FEATURES, LABELS = "{}feat.pth", "{}labels.pth"
SPLITS = {"train": "train", "test": "val"}

# Training options of the official script, which it reads no more than this one does.
UNREAD = (
    *("epochs", "accum_iter", "weight_decay", "lr", "blr", "min_lr", "warmup_epochs", "output_dir", "log_dir"),
    *("resume", "start_epoch", "eval", "dist_eval"),
)


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser(__doc__.split("\n")[0])
    options.add_classifier_options(parser, list(models_vit.MODELS))
    options.add_data_options(parser, num_workers=4)
    options.add_device_options(parser)
    group = parser.add_argument_group("k-NN")
    group.add_argument("--batch_size", type=options.COUNT, default=512, help="images per process and pass")
    group.add_argument(
        "--nb_knn", type=options.COUNT, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours"
    )
    group.add_argument("--temperature", type=options.POSITIVE, default=0.07, help="of the votes; DINO: 0.07")
    options.add_pooling_options(group, default=False)
    group.add_argument("--dump_features", help="folder to store the features in")
    group.add_argument("--load_features", help="folder that --dump_features filled: no images are read")
    group.add_argument("--seed", type=options.SEED, default=0, help="of the weights, where --finetune is left out")
    parser.accept_without_effect(*UNREAD)
    return parser


def resolve_options(args: argparse.Namespace, world: distributed.World) -> argparse.Namespace:
    """Fill in what follows from the checkpoint, and refuse what cannot be.

    Raises:
        ValueError: options that contradict each other, or a checkpoint that cannot be read.
    """
    args = copy.copy(args)
    args.which = options.resolve_which(args.which, args.teacher)
    if args.load_features and (args.dump_features or args.finetune):
        raise ValueError("--load_features takes stored features: drop --dump_features and --finetune")
    meta = read_meta(args.finetune) if args.finetune else {}
    options.fill_in(args, defaults_of(meta))
    args.num_workers = options.worker_count(args.num_workers, 4, world.local_size)
    with torch.device("meta"):  # every check of the model's sizes, at no cost
        args.patch_size = build_encoder(args).patch_embed.patch_size[0]
    return args


def build_encoder(args: argparse.Namespace) -> models_vit.VisionTransformer:
    """The encoder with its final norm, whichever tokens are used."""
    return models_vit.build(args.model, args.input_size, args.patch_size, num_classes=0, global_pool=False)


def build_encode(args: argparse.Namespace, encoder: models_vit.VisionTransformer) -> Callable[[Tensor], Tensor]:
    """(B, C, H, W) -> (B, E): class token or mean of the patch tokens, after the final norm, of length one."""

    def encode(images: Tensor) -> Tensor:
        tokens = encoder.forward_features(images).float()  # (B, 1 + L, E)
        return F.normalize(tokens[:, 1:].mean(dim=1) if args.global_pool else tokens[:, 0], dim=-1)

    return encode


def read_features(folder: str) -> dict[str, tuple[Tensor, Tensor]]:
    """What --dump_features stored, by split.

    Raises:
        ValueError: a file is missing or damaged, or features and labels are of different numbers.
    """
    stored = {}
    for split in SPLITS:
        parts = [read_file(Path(folder, name.format(split)))["tensor"] for name in (FEATURES, LABELS)]
        if len(parts[0]) != len(parts[1]):
            raise ValueError(
                f"{folder}: {len(parts[0])} {split} features and {len(parts[1])} labels do not go together"
            )
        stored[split] = tuple(parts)
    return stored


def write_features(folder: str, features: dict[str, tuple[Tensor, Tensor]]) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for split, parts in features.items():
        for name, tensor in zip((FEATURES, LABELS), parts, strict=True):
            checkpoint.write_file(Path(folder, name.format(split)), {"tensor": tensor})


@record
def main(argv: list[str] | None = None) -> dict[int, tuple[float, float]]:
    """Returns: top-1 and top-5 in percent, for each number of neighbours."""
    # Options and paths: what is wrong with them ends here, before any model or data is built.
    with options.user_mistakes():
        world = distributed.read_environment()
        args = resolve_options(get_args_parser().parse_args(argv), world)
        device, precision = launch.begin(world, args.device, args.precision, args.dist_timeout)
        args.device, args.precision = device.type, precision.name
        features, sources, weights = {}, {}, None
        if args.load_features:
            features = read_features(args.load_features)
            args.nb_classes = args.nb_classes or int(max(labels.max() for _, labels in features.values())) + 1
        else:
            counts = {"train": args.shapes_train, "test": args.shapes_val}
            for name, split in SPLITS.items():
                settings = {"shapes_count": counts[name], "cache_dir": args.cache_dir}
                sources[name] = build_source(args.data_path, split, **settings, share=distributed.from_rank_zero)
            args.nb_classes = count_classes(sources["train"], sources["test"], args.nb_classes)
            weights = load_pretrained(args.finetune, args.which) if args.finetune else None
        num_train = len(features["train"][1] if features else sources["train"])
        if max(args.nb_knn) > num_train:
            raise ValueError(f"--nb_knn {max(args.nb_knn)} of {num_train:,} training images: choose fewer neighbours")

    if not features:
        describe(args, sources)
        features = extract_all(args, world, device, precision, sources, weights)
        if args.dump_features:
            distributed.from_rank_zero(lambda: write_features(args.dump_features, features))
            log.info("features stored in %s", args.dump_features)

    # Each rank takes its share of the queries.
    (train, train_labels), (test, labels) = (
        [part.to(device) for part in features[split]] for split in ("train", "test")
    )
    mine = slice(world.rank, None, world.size)
    correct = knn_correct(train, train_labels, test[mine], labels[mine], args.nb_knn, args.temperature, args.nb_classes)
    counts = torch.tensor([correct[k] for k in args.nb_knn], dtype=torch.double, device=device)
    shares = (100 * distributed.all_reduce_sum(counts) / len(labels)).tolist()
    figures = {k: (top1, top5) for k, (top1, top5) in zip(args.nb_knn, shares, strict=True)}
    for k, accuracies in figures.items():
        log.info("%d-NN  top-1 %.2f  top-5 %.2f", k, *accuracies)
    distributed.stop()
    return figures


def describe(args: argparse.Namespace, sources: dict[str, Source]) -> None:
    data = args.data_path or "Shapes, images drawn by the program (no --data_path was given)"
    log.info("data      %s: %s images, queries %s", data, *(f"{len(sources[name]):,}" for name in SPLITS))
    token = "mean of the patch tokens" if args.global_pool else "class token"
    log.info("features  %s, %s, %d pixels in patches of %d", args.model, token, args.input_size, args.patch_size)
    log.info("compute   %s, %s%s, %s", args.device, args.precision, ", compiled" * args.compile, cpu_threads())
    if ignored := get_args_parser().given_without_effect(vars(args)):
        log.info("without effect here: %s", ", ".join(ignored))


def extract_all(
    args: argparse.Namespace,
    world: distributed.World,
    device: torch.device,
    precision: Precision,
    sources: dict[str, Source],
    weights: dict[str, Tensor] | None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Features and labels of both splits, the same on every rank."""
    rng.seed_all(args.seed)
    encoder = build_encoder(args).to(device).eval()
    precision.choose_attention(encoder)
    if weights is None:
        log.info("no --finetune: features of random weights")
    else:
        with options.user_mistakes():
            loaded = load_into(encoder, weights, left_out=(*DECODERS, "head."))
        log.info("weights of %s\n%s", args.finetune, loaded)
    if args.compile:
        encoder.compile()
    encode = build_encode(args, encoder)
    to_model_input = transforms.ToModelInput(args.mean, args.std, device, flip=False)
    features = {}
    for split, source in sources.items():
        loader = build_loader(
            ImageDataset(source, transforms.CenterCrop(args.input_size)),
            ShardSampler(len(source), args.batch_size, world.rank, world.size),
            args.num_workers,
            args.pin_mem and device.type == "cuda",
        )
        batches = track(loader, -(-len(source) // world.size), f"{split} features")
        rows = extract_features(encode, batches, precision, to_model_input, len(source), encoder.embed_dim)
        features[split] = rows, torch.from_numpy(source.labels)
    return features


if __name__ == "__main__":
    main()
