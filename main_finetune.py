"""Fine-tune a ViT classifier end to end, or evaluate one (--eval).

    python main_finetune.py --finetune output_dir/checkpoint-last.pth --epochs 10
    torchrun --nproc_per_node=8 main_finetune.py --finetune mae_pretrain_vit_base.pth --data_path /imagenet

Model and image size come from the checkpoint where it says them. FINETUNE.md has the commands for real.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record

import models_vit
from engine_finetune import evaluate, train_one_epoch
from util import rng
from util.data import transforms
from util.data.datasets import ImageDataset, build_source, count_classes
from util.data.loader import EpochSampler, ShardSampler, build_loader
from util.lr_decay import param_groups_lrd
from util.run import checkpoint, distributed, launch, options
from util.run.logger import cpu_threads, log
from util.run.loop import TrainingLoop
from util.weights.load import DECODERS, load_into, load_pretrained, read_meta
from util.weights.meta import defaults_of

SCRIPT = "main_finetune"

# A run cannot change these when it goes on: weights and schedule depend on them.
FIXED = ["model", "input_size", "patch_size", "global_pool", "nb_classes", "epochs", "global_batch"]


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser(__doc__.split("\n")[0])
    options.add_classifier_options(parser, list(models_vit.MODELS))
    options.add_batch_options(parser, batch_size=64, epochs=50, warmup_epochs=5)
    options.add_data_options(parser, num_workers=10)
    options.add_run_options(parser)
    options.add_device_options(parser)

    group = parser.add_argument_group("fine-tuning")
    options.add_pooling_options(group, default=True)
    group.add_argument(
        "--drop_path",
        type=options.number(float, low=0, below=1),
        default=0.1,
        help="stochastic depth; MAE: 0.1 for base, 0.2 for large, 0.3 for huge",
    )
    group.add_argument(
        "--eval", action="store_true", help="evaluate the weights of --resume or --finetune, or of the run"
    )

    group = parser.add_argument_group("optimizer (AdamW, 0.9 and 0.999)")
    group.add_argument("--lr", type=options.NOT_NEGATIVE, help="learning rate; default: --blr x images a step / 256")
    group.add_argument("--blr", type=options.NOT_NEGATIVE, default=5e-4, help="learning rate per 256 images")
    group.add_argument("--min_lr", type=options.NOT_NEGATIVE, default=1e-6, help="where the cosine ends")
    group.add_argument(
        "--layer_decay",
        type=options.number(float, above=0, high=1),
        default=0.75,
        help="factor of the rate from block to block, down from the head; HPM: 0.8; MAE: 0.65 for base, 0.75 above",
    )
    group.add_argument("--weight_decay", type=options.NOT_NEGATIVE, default=0.05, help="on matrices, not on vectors")
    group.add_argument("--clip_grad", type=options.NOT_NEGATIVE, help="largest norm of the gradient; default: none")

    group = parser.add_argument_group("augmentation")
    group.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help="timm's RandAugment or AutoAugment; '' for none")
    group.add_argument("--color_jitter", type=options.NOT_NEGATIVE, help="colour jitter, used where --aa is empty")
    group.add_argument("--smoothing", type=options.number(float, low=0, below=1), default=0.1, help="label smoothing")
    group.add_argument("--reprob", type=options.SHARE, default=0.25, help="probability of random erasing")
    group.add_argument("--remode", choices=["pixel", "rand", "const"], default="pixel", help="what erasing fills in")
    group.add_argument("--recount", type=options.COUNT, default=1, help="most boxes that are erased in an image")
    group.add_argument("--mixup", type=options.NOT_NEGATIVE, default=0.0, help="mixup alpha; the recipes use 0.8")
    group.add_argument("--cutmix", type=options.NOT_NEGATIVE, default=0.0, help="cutmix alpha; the recipes use 1.0")
    group.add_argument("--cutmix_minmax", type=options.SHARE, nargs=2, help="bounds of the box; replaces --cutmix")
    group.add_argument("--mixup_prob", type=options.SHARE, default=1.0, help="how often either is applied")
    group.add_argument("--mixup_switch_prob", type=options.SHARE, default=0.5, help="how often cutmix, if both are on")
    group.add_argument("--mixup_mode", choices=["batch", "pair", "elem"], default="batch", help="what shares a mixture")
    parser.accept_without_effect("resplit", "dist_eval")  # nothing reads the first; evaluation is always exact
    return parser


def resolve_options(args: argparse.Namespace, world: distributed.World) -> argparse.Namespace:
    """Fill in what follows from other options and from the checkpoint, and refuse what cannot be.

    Raises:
        ValueError: options that contradict each other, or a checkpoint that cannot be read.
    """
    args = copy.copy(args)
    args.which = options.resolve_which(args.which, args.teacher)
    args.weights = args.finetune
    if args.eval:
        args.weights = args.resume or args.finetune or newest_of(Path(args.output_dir, args.experiment))
    meta = read_meta(args.weights) if args.weights else {}
    options.fill_in(args, defaults_of(meta))
    if args.eval and meta.get("script") == SCRIPT:
        args.global_pool = meta["options"]["global_pool"]
    args.accum_iter, args.global_batch = options.effective_batch(
        args.batch_size, args.accum_iter, args.global_batch, world.size
    )
    args.processes = world.size
    args.warmup_epochs = options.default_warmup(args.warmup_epochs, 5, args.epochs)
    args.num_workers = options.worker_count(args.num_workers, 10, world.local_size)
    if args.lr is None:
        args.lr = args.blr * args.global_batch / 256
    if args.start_epoch >= args.epochs:
        raise ValueError(f"--start_epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}")
    if mixes(args) and args.batch_size % 2:
        raise ValueError(f"--batch_size {args.batch_size} is odd; mixup and cutmix mix images in pairs: make it even")
    if args.cutmix_minmax and args.cutmix_minmax[0] > args.cutmix_minmax[1]:
        raise ValueError("--cutmix_minmax {:g} {:g}: the lower bound comes first".format(*args.cutmix_minmax))
    with torch.device("meta"):  # every check of the model's sizes, at no cost
        args.patch_size = build_model(args, num_classes=1).patch_embed.patch_size[0]
    transforms.AugmentedCrop(args.input_size, args.aa, args.color_jitter)  # refuses what timm does not know
    return args


def newest_of(folder: Path) -> str:
    """What --eval evaluates if no file is named: the run's best checkpoint.

    Raises:
        ValueError: there is none.
    """
    for name in (checkpoint.BEST, checkpoint.LAST):
        if (folder / name).exists():
            return str(folder / name)
    raise ValueError(f"--eval: name weights with --resume or --finetune; {folder} holds no checkpoint")


def mixes(args: argparse.Namespace) -> bool:
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def build_model(args: argparse.Namespace, num_classes: int) -> models_vit.VisionTransformer:
    settings = {"num_classes": num_classes, "global_pool": args.global_pool, "drop_path_rate": args.drop_path}
    return models_vit.build(args.model, args.input_size, args.patch_size, **settings)


def build_augmentation(
    args: argparse.Namespace, device: torch.device
) -> tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], nn.Module]:
    """What happens to a batch on the device (flip, normalise, erase, mix), and the loss that fits its targets."""
    to_model_input = transforms.ToModelInput(args.mean, args.std, device, flip=True)
    erase = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=device)
    mix = None
    criterion = LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing > 0 else nn.CrossEntropyLoss()
    if mixes(args):
        mix = Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=args.nb_classes,
        )
        criterion = SoftTargetCrossEntropy()

    def augment(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = to_model_input(images), labels.to(device, non_blocking=True)
        if args.reprob > 0:
            images = erase(images)
        return (images, labels) if mix is None else mix(images, labels)

    return augment, criterion


def load_weights(args: argparse.Namespace, model: nn.Module, weights: dict[str, Tensor] | None) -> None:
    """Begin from pre-trained weights: head and pooling norm may be fresh; in evaluation nothing may."""
    if weights is None:
        log.info("no --finetune: from random weights")
        return
    fresh = [] if args.eval else ["head.", "fc_norm."]
    with options.user_mistakes():
        report = load_into(model, weights, fresh, left_out=(*DECODERS, "norm.", "fc_norm."))
    log.info("weights of %s\n%s", args.weights, report)


def describe(args: argparse.Namespace, world: distributed.World, num_train: int, num_val: int) -> None:
    """The start of the log: what will happen, with the arithmetic of the batch."""
    data = args.data_path or "Shapes, images drawn by the program (no --data_path was given)"
    log.info("data      %s: %s images to train, %s to validate", data, f"{num_train:,}", f"{num_val:,}")
    log.info(
        "model     %s, %d classes, %s",
        args.model,
        args.nb_classes,
        "mean of patches" * args.global_pool or "class token",
    )
    log.info("image     %d pixels in patches of %d", args.input_size, args.patch_size)
    log.info("compute   %s, %s%s, %s", args.device, args.precision, ", compiled" * args.compile, cpu_threads())
    if ignored := get_args_parser().given_without_effect(vars(args)):
        log.info("without effect here: %s", ", ".join(ignored))
    if args.eval:
        return
    factors = (args.batch_size, args.accum_iter, world.size, "es" * (world.size > 1))
    log.info("batch     %d = --batch_size %d x --accum_iter %d x %d process%s", args.global_batch, *factors)
    log.info("rate      %.3g, %g epochs of warm-up, %d epochs in all", args.lr, args.warmup_epochs, args.epochs)


@record
def main(argv: list[str] | None = None) -> None:
    # Options and paths: what is wrong with them ends here, before any model or data is built.
    with options.user_mistakes():
        world = distributed.read_environment()
        args = resolve_options(get_args_parser().parse_args(argv), world)
        device, precision = launch.begin(world, args.device, args.precision, args.dist_timeout)
        args.device, args.precision = device.type, precision.name
        folder = Path(args.output_dir, args.experiment)
        train, val = (
            build_source(
                args.data_path, split, shapes_count=count, cache_dir=args.cache_dir, share=distributed.from_rank_zero
            )
            for split, count in (("train", args.shapes_train), ("val", args.shapes_val))
        )
        weights = load_pretrained(args.weights, args.which) if args.weights else None
        if args.eval and args.nb_classes is None and "head.weight" in (weights or {}):
            args.nb_classes = len(weights["head.weight"])
        args.nb_classes = count_classes(train, val, args.nb_classes)
        val_loader = build_loader(
            ImageDataset(val, transforms.CenterCrop(args.input_size)),
            ShardSampler(len(val), args.batch_size, world.rank, world.size),
            args.num_workers,
            args.pin_mem and device.type == "cuda",
        )
        run = None
        if not args.eval:
            run = checkpoint.Run(folder, SCRIPT, share=distributed.from_rank_zero)
            run.find(args.resume, args.auto_resume)
            sampler = EpochSampler(len(train), args.batch_size, args.accum_iter, world.rank, world.size, args.seed)
            args.steps_per_epoch = len(sampler) // args.accum_iter
            run.check(vars(args), FIXED)

    # Model, optimizer
    rng.seed_all(args.seed)
    model = build_model(args, args.nb_classes).to(device)
    precision.choose_attention(model)
    describe(args, world, len(train), len(val))
    if run is None or run.found is None:
        load_weights(args, model, weights)
    if args.compile:
        model.compile(fullgraph=True)
    score = partial(
        evaluate, model, val_loader, precision, transforms.ToModelInput(args.mean, args.std, device, flip=False)
    )
    if args.eval:
        log.info("%s", " ".join(f"{name} {value:.4f}" for name, value in score().items()))
        distributed.stop()
        return
    student = distributed.wrap(model, device)
    optimizer = torch.optim.AdamW(
        param_groups_lrd(model, args.weight_decay, model.no_weight_decay(), args.layer_decay), lr=args.lr, fused=True
    )
    parts = {"state_dict": model, "optimizer": optimizer, "loss_scaler": precision}

    # Where it goes on
    loop = TrainingLoop(run, parts, sampler, world, device)
    if loop.finished:
        return loop.leave()

    # Data and log
    augment, criterion = build_augmentation(args, device)
    crop = transforms.AugmentedCrop(args.input_size, args.aa, args.color_jitter, args.mean)
    loader = build_loader(
        ImageDataset(train, crop, args.seed, replace=not args.strict_images),
        *(sampler, args.num_workers, args.pin_mem and device.type == "cuda"),
    )
    loop.begin(student, optimizer, precision, train, args.lr)

    for epoch in loop.epochs():
        stats = train_one_epoch(
            student,
            criterion,
            loop.batches(loader),
            optimizer,
            precision,
            augment=augment,
            clip_grad=args.clip_grad or 0.0,
            **loop.for_engine(),
        )
        if not loop.complete():
            break
        figures = score()
        line = {f"test_{name}": value for name, value in figures.items()}
        loop.end_epoch(stats, line | {"train_lr": optimizer.param_groups[-1]["lr"]}, accuracy=figures["acc1"])
        place = (epoch + 1, args.epochs)
        log.info("epoch %d/%d  acc1 %.2f  acc5 %.2f  loss %.4f  best %.2f", *place, *figures.values(), loop.best)
    loop.close()


if __name__ == "__main__":
    main()
