"""Linear probe: batch norm without parameters and a linear head, on frozen features.

    python main_linprobe.py --finetune output_dir/checkpoint-last.pth --blr 0.01 0.1 1
    torchrun --nproc_per_node=8 main_linprobe.py --finetune mae_pretrain_vit_base.pth --optimizer lars

Each --blr trains a head of its own, all in one pass over the features. docs/eval.md has the commands for real.
"""

import argparse
import copy
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record

import models_vit
from engine_finetune import evaluate, train_one_epoch
from util import rng
from util.data import transforms
from util.data.datasets import ImageDataset, build_source, count_classes
from util.data.loader import EpochSampler, ShardSampler, build_loader
from util.lars import LARS
from util.run import checkpoint, distributed, launch, options
from util.run.logger import cpu_threads, log
from util.run.loop import TrainingLoop
from util.weights.load import DECODERS, digest, load_into, load_pretrained, read_meta
from util.weights.meta import defaults_of

SCRIPT = "main_linprobe"

# A run cannot change these when it goes on: heads, features and schedule depend on them.
FIXED = ["model", "input_size", "patch_size", "global_pool", "nb_classes", "epochs", "global_batch", "optimizer", "lr"]


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser(__doc__.split("\n")[0])
    options.add_classifier_options(parser, list(models_vit.MODELS))
    options.add_batch_options(parser, batch_size=512, epochs=90, warmup_epochs=10)
    options.add_data_options(parser, num_workers=10)
    options.add_run_options(parser)
    options.add_device_options(parser)

    group = parser.add_argument_group("linear probe")
    options.add_pooling_options(group, default=False)
    group.add_argument(
        "--eval", action="store_true", help="evaluate the heads of --resume or of the run, train nothing"
    )
    group.add_argument(
        "--optimizer",
        choices=["sgd", "lars"],
        default="sgd",
        help="sgd: HPM's script; lars: MAE's recipe, large batches",
    )
    group.add_argument(
        "--blr",
        type=options.POSITIVE,
        nargs="+",
        help="learning rates per 256 images, one head each; default: 1e-3 for sgd, 0.1 for lars",
    )
    group.add_argument("--lr", type=options.POSITIVE, nargs="+", help="learning rates as they are, in place of --blr")
    group.add_argument("--min_lr", type=options.NOT_NEGATIVE, default=0.0, help="where the cosine ends")
    group.add_argument("--weight_decay", type=options.NOT_NEGATIVE, default=0.0, help="on the heads' matrices")
    parser.accept_without_effect("dist_eval")  # evaluation is always exact
    return parser


def resolve_options(args: argparse.Namespace, world: distributed.World) -> argparse.Namespace:
    """Fill in what follows from other options and from the checkpoint, and refuse what cannot be.

    Raises:
        ValueError: options that contradict each other, or a checkpoint that cannot be read.
    """
    args = copy.copy(args)
    args.which = options.resolve_which(args.which, args.teacher)
    meta = read_meta(args.finetune) if args.finetune else {}
    options.fill_in(args, defaults_of(meta))
    args.accum_iter, args.global_batch = options.effective_batch(
        args.batch_size, args.accum_iter, args.global_batch, world.size
    )
    args.processes = world.size
    args.warmup_epochs = options.default_warmup(args.warmup_epochs, 10, args.epochs)
    args.num_workers = options.worker_count(args.num_workers, 10, world.local_size)
    if args.lr is None:
        args.blr = args.blr or [{"sgd": 1e-3, "lars": 0.1}[args.optimizer]]
        args.lr = [rate * args.global_batch / 256 for rate in args.blr]
    elif args.blr is not None:
        raise ValueError("--lr and --blr both set the learning rate: give one")
    if args.start_epoch >= args.epochs:
        raise ValueError(f"--start_epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}")
    with torch.device("meta"):  # every check of the model's sizes, at no cost
        args.patch_size = build_encoder(args).patch_embed.patch_size[0]
    return args


def build_encoder(args: argparse.Namespace) -> models_vit.VisionTransformer:
    settings = {"num_classes": 0, "global_pool": args.global_pool}
    return models_vit.build(args.model, args.input_size, args.patch_size, **settings)


def build_optimizer(args: argparse.Namespace, heads: nn.ModuleList) -> torch.optim.Optimizer:
    """One group a head, whose rate is `lr_scale` times that of the first."""
    groups = [
        {"params": list(head.parameters()), "lr_scale": rate / args.lr[0]}
        for head, rate in zip(heads, args.lr, strict=True)
    ]
    if args.optimizer == "lars":
        return LARS(groups, lr=args.lr[0], weight_decay=args.weight_decay)
    return torch.optim.SGD(groups, lr=args.lr[0], momentum=0.9, weight_decay=args.weight_decay)


def sum_over_heads(logits: Tensor, labels: Tensor) -> Tensor:
    """(S, B, K), (B,) -> scalar whose gradient trains each head as if it were alone."""
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits))) * len(logits)


def report(args: argparse.Namespace, figures: dict[str, float], names: list[str]) -> tuple[str, float]:
    """Log every head, the best one marked; the best head's name and accuracy."""
    best = max(names, key=lambda name: figures[f"acc1{name}"])
    for name, rate in zip(names, args.lr, strict=True):
        values = [figures[f"{figure}{name}"] for figure in ("acc1", "acc5", "loss")]
        mark = "  <- best" * (name == best and len(names) > 1)
        log.info("  lr %-9.4g acc1 %.2f  acc5 %.2f  loss %.4f%s", rate, *values, mark)
    return best, figures[f"acc1{best}"]


def describe(args: argparse.Namespace, world: distributed.World, num_train: int, num_val: int) -> None:
    """The start of the log: what will happen, with the arithmetic of the batch."""
    data = args.data_path or "Shapes, images drawn by the program (no --data_path was given)"
    log.info("data      %s: %s images to train, %s to validate", data, f"{num_train:,}", f"{num_val:,}")
    pooling = "layer norm of the mean of patches" if args.global_pool else "class token"
    log.info("features  %s, %s, %d pixels in patches of %d", args.model, pooling, args.input_size, args.patch_size)
    log.info("compute   %s, %s%s, %s", args.device, args.precision, ", compiled" * args.compile, cpu_threads())
    if ignored := get_args_parser().given_without_effect(vars(args)):
        log.info("without effect here: %s", ", ".join(ignored))
    if args.eval:
        return
    factors = (args.batch_size, args.accum_iter, world.size, "es" * (world.size > 1))
    log.info("batch     %d = --batch_size %d x --accum_iter %d x %d process%s", args.global_batch, *factors)
    rates = ", ".join(f"{rate:.3g}" for rate in args.lr)
    log.info("rate      %s (%s), %g of %d epochs of warm-up", rates, args.optimizer, args.warmup_epochs, args.epochs)


@record
def main(argv: list[str] | None = None) -> None:
    # Options and paths: what is wrong with them ends here, before any model or data is built.
    with options.user_mistakes():
        world = distributed.read_environment()
        args = resolve_options(get_args_parser().parse_args(argv), world)
        device, precision = launch.begin(world, args.device, args.precision, args.dist_timeout)
        args.device, args.precision = device.type, precision.name
        folder = Path(args.output_dir, args.experiment)
        run = checkpoint.Run(folder, SCRIPT, share=distributed.from_rank_zero)
        run.find(args.resume, args.auto_resume)
        if args.eval and run.found is None:
            raise ValueError(f"--eval: name the probe's checkpoint with --resume; {folder} holds none")
        if args.eval:
            for name in FIXED:  # what is evaluated is as it was trained
                setattr(args, name, run.found[1]["options"].get(name))
        train, val = (
            build_source(
                args.data_path, split, shapes_count=count, cache_dir=args.cache_dir, share=distributed.from_rank_zero
            )
            for split, count in (("train", args.shapes_train), ("val", args.shapes_val))
        )
        args.nb_classes = count_classes(train, val, args.nb_classes)
        sampler = EpochSampler(len(train), args.batch_size, args.accum_iter, world.rank, world.size, args.seed)
        args.steps_per_epoch = len(sampler) // args.accum_iter
        weights = load_pretrained(args.finetune, args.which) if args.finetune else None

    # Frozen encoder, heads, optimizer
    rng.seed_all(args.seed)
    encoder = build_encoder(args)
    describe(args, world, len(train), len(val))
    with options.user_mistakes():
        if weights is None:
            log.info("no --finetune: features of random weights")
        else:
            left_out = (*DECODERS, "head.", "norm.", "fc_norm.")
            fresh = ["fc_norm."] if args.global_pool else []
            log.info("weights of %s\n%s", args.finetune, load_into(encoder, weights, fresh, left_out))
        args.encoder = digest(encoder)
        run.check(vars(args), [*FIXED, "encoder"], report=not args.eval)
    probe = models_vit.LinearProbe(encoder, len(args.lr), args.nb_classes).to(device)
    precision.choose_attention(probe)
    if args.compile:
        encoder.compile()
    optimizer = build_optimizer(args, probe.heads)
    student = distributed.wrap(probe, device)
    trained = nn.ModuleDict({"norm": probe.norm, "heads": probe.heads})
    parts = {"state_dict": trained, "optimizer": optimizer}
    names = [f" lr {rate:g}" for rate in args.lr] if len(args.lr) > 1 else [""]
    loader_settings = (args.num_workers, args.pin_mem and device.type == "cuda")
    val_loader = build_loader(
        ImageDataset(val, transforms.CenterCrop(args.input_size)),
        ShardSampler(len(val), args.batch_size, world.rank, world.size),
        *loader_settings,
    )
    score = partial(
        evaluate,
        probe,
        val_loader,
        precision,
        transforms.ToModelInput(args.mean, args.std, device, flip=False),
        heads=names,
    )

    # Where it goes on
    loop = TrainingLoop(run, parts, sampler, world, device)
    if args.eval or loop.finished:
        report(args, score(), names)
        return loop.leave()

    # Data and log
    to_model_input = transforms.ToModelInput(args.mean, args.std, device, flip=True)
    crop = transforms.RandomCrop(args.input_size, (0.08, 1.0))
    dataset = ImageDataset(train, crop, args.seed, replace=not args.strict_images)
    loader = build_loader(dataset, sampler, *loader_settings)
    loop.begin(student, optimizer, precision, train, args.lr[0])

    for epoch in loop.epochs():
        stats = train_one_epoch(
            student,
            sum_over_heads,
            loop.batches(loader),
            optimizer,
            precision,
            augment=lambda images, labels: (to_model_input(images), labels.to(device, non_blocking=True)),
            clip_grad=0.0,
            **loop.for_engine(),
        )
        if not loop.complete():
            break
        figures = score()
        log.info("epoch %d/%d", epoch + 1, args.epochs)
        best_head, accuracy = report(args, figures, names)
        line = {f"test_{name}": value for name, value in figures.items()}
        loop.end_epoch(stats, line | {"best_head": best_head.strip()}, accuracy)
    loop.close()


if __name__ == "__main__":
    main()
