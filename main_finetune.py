"""Fine-tune a ViT classifier end to end, or evaluate one (--eval).

    python main_finetune.py --finetune output_dir/checkpoint-last.pth --epochs 10
    torchrun --nproc_per_node=8 main_finetune.py --finetune mae_pretrain_vit_base.pth --data_path /imagenet

Model and image size default to those of the checkpoint. FINETUNE.md has the commands for ImageNet.
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
from util.data.datasets import ImageDataset
from util.data.loader import EpochSampler, build_loader
from util.data.sources import Source
from util.lr_decay import param_groups_lrd
from util.run import classwise, distributed, options, resolve
from util.run.checkpoint import Run, read_resumed
from util.run.folder import BEST, LAST, create, run_folder
from util.run.logger import log
from util.run.loop import Loop
from util.run.splits import evaluation_loader, read_splits
from util.weights.load import DECODERS, fingerprint, fit_head, load_into, load_pretrained, log_loaded, read_meta

SCRIPT = "main_finetune"
WARMUP_EPOCHS, NUM_WORKERS = 5, 10  # defaults

# Options that must not change on resume: weights and schedule depend on them.
FIXED = ["model", "input_size", "patch_size", "global_pool", "nb_classes", "epochs", "global_batch", "val_fraction"]


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser((__doc__ or "").split("\n")[0])
    options.add_classifier_options(parser, list(models_vit.MODELS))
    options.add_training_options(parser, batch_size=64, epochs=50, warmup_epochs=WARMUP_EPOCHS)
    options.add_data_options(parser, num_workers=NUM_WORKERS)
    options.add_device_options(parser)

    group = parser.add_argument_group("fine-tuning")
    options.add_pooling_options(group, "on; with --eval the classifier's")
    options.add_crop_option(group, "that of the classifier that is evaluated or resumed")
    group.add_argument(
        "--drop_path",
        type=options.FRACTION_OR_ZERO,
        default=0.1,
        help="stochastic depth; MAE: 0.1 for base, 0.2 for large, 0.3 for huge",
    )
    group.add_argument(
        "--eval", action="store_true", help="evaluate the weights of --resume, of --finetune, or of the run folder"
    )

    group = parser.add_argument_group("optimizer (AdamW, betas 0.9 and 0.999)")
    group.add_argument("--lr", type=options.NOT_NEGATIVE, help="learning rate (default: --blr x global batch / 256)")
    group.add_argument("--blr", type=options.NOT_NEGATIVE, default=5e-4, help="base learning rate per 256 images")
    group.add_argument("--min_lr", type=options.NOT_NEGATIVE, default=1e-6, help="final learning rate of the cosine")
    group.add_argument(
        "--layer_decay",
        type=options.FRACTION_OR_ONE,
        default=0.75,
        help="layer-wise lr decay: multiplier per block from head to patch embedding; HPM: 0.8; MAE: 0.65 for base, "
        "0.75 for large and huge",
    )
    group.add_argument(
        "--weight_decay", type=options.NOT_NEGATIVE, default=0.05, help="weight decay (not applied to biases and norms)"
    )
    group.add_argument("--clip_grad", type=options.NOT_NEGATIVE, help="gradient clipping: max norm (default: none)")

    group = parser.add_argument_group("augmentation")
    group.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help="timm's RandAugment or AutoAugment; '' disables it")
    group.add_argument("--color_jitter", type=options.NOT_NEGATIVE, help="colour jitter, used if --aa is empty")
    group.add_argument("--smoothing", type=options.FRACTION_OR_ZERO, default=0.1, help="label smoothing")
    group.add_argument("--reprob", type=options.SHARE, default=0.25, help="probability of random erasing")
    group.add_argument("--remode", choices=["pixel", "rand", "const"], default="pixel", help="fill of random erasing")
    group.add_argument("--recount", type=options.COUNT, default=1, help="maximum number of erased boxes per image")
    group.add_argument("--mixup", type=options.NOT_NEGATIVE, default=0.0, help="mixup alpha; the recipes use 0.8")
    group.add_argument("--cutmix", type=options.NOT_NEGATIVE, default=0.0, help="cutmix alpha; the recipes use 1.0")
    group.add_argument("--cutmix_minmax", type=options.SHARE, nargs=2, help="bounds of the box; replaces --cutmix")
    group.add_argument("--mixup_prob", type=options.SHARE, default=1.0, help="probability of mixup or cutmix")
    group.add_argument(
        "--mixup_switch_prob", type=options.SHARE, default=0.5, help="probability of cutmix if both are enabled"
    )
    group.add_argument(
        "--mixup_mode",
        choices=["batch", "pair", "elem"],
        default="batch",
        help="whether mixup is applied per batch, pair or element",
    )
    parser.accept_ignored("resplit", "dist_eval")  # nothing reads the first; evaluation is always exact
    return parser


def resolve_options(args: argparse.Namespace, world: distributed.World) -> argparse.Namespace:
    """Fill in what follows from other options and from the checkpoint, and reject impossible settings.

    Raises:
        ValueError: options that contradict each other, or a checkpoint that cannot be read.
    """
    args = copy.copy(args)
    resolve.resolve_which(args)
    path = run_folder(args.output_dir, args.experiment, SCRIPT)
    args.weights = args.finetune
    if args.eval:
        args.weights = args.resume or args.finetune or best_checkpoint(path)
    meta = {} if args.eval else read_resumed(path, args.resume, args.auto_resume)
    trained = bool(meta) or args.eval
    if not meta and args.weights:
        meta = read_meta(args.weights)
    recorded = meta.get("options", {}) if trained else {}  # of this classifier, not of its pre-training
    args.classes = recorded.get("classes")
    resolve.resolve_settings(args, meta)
    resolve.resolve_val_fraction(args, recorded)
    resolve.fill_in(args, {"crop_pct": resolve.evaluation_crop(args.input_size, recorded)})
    if args.eval and meta.get("script", SCRIPT) == SCRIPT:  # an export names no script
        resolve.reject_changes(args, get_args_parser(), recorded, ["global_pool"])
        args.global_pool = recorded.get("global_pool", args.global_pool)
    resolve.fill_in(args, {"global_pool": True})
    resolve.resolve_training(args, world, warmup_epochs=WARMUP_EPOCHS, num_workers=NUM_WORKERS)
    if args.lr is None:
        args.lr = args.blr * args.global_batch / 256
    if mixes(args) and args.batch_size % 2:
        raise ValueError(f"--batch_size {args.batch_size} is odd; mixup and cutmix mix images in pairs: make it even")
    if args.cutmix_minmax and args.cutmix_minmax[0] > args.cutmix_minmax[1]:
        low, high = args.cutmix_minmax
        raise ValueError(f"--cutmix_minmax {low:g} {high:g}: the lower bound comes first")
    with torch.device("meta"):  # checks the sizes of the model at no cost
        args.patch_size = build_model(args, num_classes=1).patch_embed.patch_size[0]
    transforms.AugmentedCrop(args.input_size, args.aa, args.color_jitter)  # raises if timm does not know --aa
    return args


def best_checkpoint(path: Path) -> str:
    """The checkpoint that --eval evaluates if no file is named: the run's best.

    Raises:
        ValueError: there is none.
    """
    for name in (BEST, LAST):
        if (path / name).exists():
            return str(path / name)
    raise ValueError(f"--eval: name a checkpoint with --resume or --finetune; {path} holds none")


def mixes(args: argparse.Namespace) -> bool:
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def build_model(args: argparse.Namespace, num_classes: int) -> models_vit.VisionTransformer:
    settings = {"num_classes": num_classes, "global_pool": args.global_pool, "drop_path_rate": args.drop_path}
    return models_vit.build(args.model, args.input_size, args.patch_size, **settings)


def build_augmentation(
    args: argparse.Namespace, device: torch.device
) -> tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], Callable[[Tensor, Tensor], Tensor]]:
    """Augmentation of a batch on the device (flip, normalise, erase, mix), and the loss that fits its targets."""
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

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return criterion(logits.float(), targets)

    return augment, loss


def load_weights(
    args: argparse.Namespace, model: nn.Module, weights: dict[str, Tensor] | None, train: Source | None
) -> None:
    """Load pre-trained weights: head and pooling norm may be newly initialised, but not for evaluation."""
    if weights is None:
        log.info("no --finetune: starting from random weights")
        return
    if train is not None:
        weights = fit_head(weights, read_meta(args.weights).get("options", {}).get("classes"), train, args.weights)
    allow_missing = [] if args.eval else ["head.", "fc_norm."]
    with options.user_mistakes():
        report = load_into(model, weights, allow_missing, allow_unexpected=(*DECODERS, "norm.", "fc_norm."))
    log_loaded(args.weights, report)


def describe(args: argparse.Namespace, train: Source | None, val: Source) -> None:
    """The start of the log: what will be trained, on what, and how."""
    pooling = "mean of patch tokens" if args.global_pool else "class token"
    count = "no" if train is None else f"{len(train):,}"
    origin = args.origins
    log.info("model     %s (%s), %d classes, %s", args.model, origin["model"], args.nb_classes, pooling)
    log.info("image     %d pixels (%s) in patches of %d", args.input_size, origin["input_size"], args.patch_size)
    resolve.describe(get_args_parser(), args, f"{count} training images, {len(val):,} validation images")
    if args.aa and args.color_jitter is not None and train is not None:
        log.info("ignored: --color_jitter %g, in favour of --aa %s ('' disables that)", args.color_jitter, args.aa)


@record
def main(argv: list[str] | None = None) -> None:
    # Options and paths: mistakes end here, before a model is built.
    with options.user_mistakes():
        world = distributed.read_environment()
        args = resolve_options(get_args_parser().parse_args(argv), world)
        device, amp = distributed.setup(world, args.device, args.precision, args.dist_timeout)
        args.device, args.precision = device.type, amp.name
        pin_memory = args.pin_mem and device.type == "cuda"
        folder = run_folder(args.output_dir, args.experiment, SCRIPT)
        run = None
        if args.eval:
            distributed.from_rank_zero(lambda: create(folder, "--output_dir"))
        else:
            run = Run(folder, SCRIPT, args.resume, args.auto_resume)
        resumed = run is not None and run.state is not None
        weights = load_pretrained(args.weights, args.which) if args.weights and not resumed else None
        outputs = len(weights["head.weight"]) if weights is not None and "head.weight" in weights else None
        train, val = read_splits(args, outputs, args.weights)
        val_loader = evaluation_loader(args, val, transforms.CenterCrop(args.input_size, args.crop_pct), world)
        if run is not None and train is not None:
            sampler = EpochSampler(len(train), args.batch_size, args.accum_iter, world.rank, world.size, args.seed)
            args.steps_per_epoch = sampler.num_batches // args.accum_iter
            given = partial(load_pretrained, args.weights, args.which)
            args.initial = run.check(vars(args), FIXED, args.weights, lambda: fingerprint(weights or given()))

    # Model
    rng.seed_all(args.seed)
    model = build_model(args, args.nb_classes).to(device)
    amp.choose_attention(model)
    describe(args, train, val)
    if not resumed:
        load_weights(args, model, weights, train)
    if args.compile:
        model.compile(fullgraph=True)
    to_model_input = transforms.ToModelInput(args.mean, args.std, device, flip=False)
    score = partial(evaluate, model, val_loader, amp, to_model_input)
    if args.eval:
        confusion = torch.zeros(1, args.nb_classes, args.nb_classes, dtype=torch.long, device=device)
        metrics = score(confusion=confusion)
        log.info("%s", " ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        names = classwise.output_names(args.classes, args.nb_classes)
        distributed.from_rank_zero(lambda: classwise.report(folder, confusion[0], names))
        distributed.shutdown()
        return

    # Optimizer, data, loop
    assert run is not None
    assert train is not None
    student = distributed.wrap_ddp(model, device) if world.size > 1 else model
    groups = param_groups_lrd(model, args.weight_decay, model.no_weight_decay(), args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    augment, criterion = build_augmentation(args, device)
    crop = transforms.AugmentedCrop(args.input_size, args.aa, args.color_jitter, args.mean)
    dataset = ImageDataset(train, crop, args.seed, replace=not args.strict_images)
    loader = build_loader(dataset, sampler, args.num_workers, pin_memory)
    stateful = {"state_dict": model, "optimizer": optimizer, "loss_scaler": amp}
    loop = Loop(run, vars(args), stateful, sampler, train, amp)

    for epoch in loop.epochs():
        stats = train_one_epoch(
            student, criterion, loader, optimizer, amp, loop, augment=augment, clip_grad=args.clip_grad or 0.0
        )
        if loop.stopped:
            break
        loop.save_mid_epoch()
        metrics = score()
        line = {f"test_{name}": value for name, value in metrics.items()}
        loop.end_epoch(stats, line | {"train_lr": optimizer.param_groups[-1]["lr"]}, accuracy=metrics["acc1"])
        log.info(
            "epoch %d/%d  acc1 %.2f  acc5 %.2f  loss %.4f  best %.2f",
            epoch + 1,
            args.epochs,
            metrics["acc1"],
            metrics["acc5"],
            metrics["loss"],
            loop.best,
        )
    loop.close()


if __name__ == "__main__":
    main()
