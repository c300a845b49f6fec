"""Train and evaluate semantic segmentation on a pre-trained ViT, or probe its patch features.

    python main_segment.py --data_path ADEChallengeData2016 --finetune output_dir/checkpoint-last.pth --head knn
    torchrun --nproc_per_node=8 main_segment.py --data_path ADEChallengeData2016 --finetune mae_pretrain_vit_base.pth

docs/segmentation.md has the protocols and the commands for ADE20K.
"""

import argparse
import copy
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record

import models_segment
import models_vit
from engine_finetune import train_one_epoch
from engine_probe import probe
from engine_segment import blank_padding, evaluate
from util import rng
from util.data import label_checks, segmentation
from util.data.datasets import ImageDataset
from util.data.files import ImageFiles
from util.data.joint_transforms import EvaluationResize, ProbeResize, TrainingCrop
from util.data.loader import EpochSampler, build_loader
from util.data.sources import build_source
from util.data.transforms import ToModelInput
from util.run import distributed, options, resolve
from util.run.checkpoint import Run, read_resumed
from util.run.folder import LAST, create, run_folder
from util.run.logger import log
from util.run.loop import Loop
from util.run.segment_options import FIXED, PROBES, REJECTED, add_segmentation_options
from util.run.splits import data_settings, evaluation_loader, warn_of_range
from util.weights.load import fingerprint, load_into, load_pretrained, log_loaded, read_meta
from visualize.segmentation import Report

SCRIPT = "main_segment"

# The protocols: MMSegmentation's for ADE20K, with other values on ViT-L, and DINOv3's for a frozen encoder.
UPERNET = {"steps": 160_000, "lr": 1e-4, "weight_decay": 0.05, "layer_decay": 0.65, "drop_path": 0.1}
LARGE = {**UPERNET, "lr": 9e-5, "layer_decay": 0.75, "drop_path": 0.2}
LINEAR = {"steps": 40_000, "lr": 1e-3, "weight_decay": 1e-3, "layer_decay": 1.0, "drop_path": 0.0}
GLOBAL_BATCH, WARMUP_STEPS = 16, 1500
NUM_WORKERS = 4  # default


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser((__doc__ or "").split("\n")[0])
    options.add_classifier_options(parser, list(models_vit.MODELS))
    layout = f"folder, .tar or .tar.gz in ADE20K's layout: {segmentation.LAYOUT}, and objectInfo150.txt"
    options.add_data_options(parser, num_workers=NUM_WORKERS, splits=(), layout=layout.format("{training,validation}"))
    options.add_run_options(parser)
    options.add_device_options(parser)
    add_segmentation_options(parser)
    return parser


def resolve_options(args: argparse.Namespace, world: distributed.World) -> argparse.Namespace:
    """Fill in what follows from other options, the protocol and the checkpoint, and reject impossible settings.

    Raises:
        ValueError: options that contradict each other, or a checkpoint that cannot be read.
    """
    args = copy.copy(args)
    given = [name for name, value in vars(args).items() if value is not None]
    resolve.resolve_which(args)
    if not args.data_path:
        raise ValueError(f"--data_path is missing: give data with {segmentation.LAYOUT.format('training')}")
    path = run_folder(args.output_dir, args.experiment, SCRIPT)
    args.weights, own = args.finetune, {}
    if args.eval:
        args.weights = args.resume or args.finetune or str(path / LAST)
        own = read_meta(args.weights)
    elif args.head not in PROBES:
        own = read_resumed(path, args.resume, args.auto_resume)
    if own.get("script") == SCRIPT:
        resolve.fill_in(args, {name: own["options"][name] for name in (*FIXED, "stride", "short_side")})
    meta = own or (read_meta(args.weights) if args.weights else {})
    resolve.fill_in(args, {"head": "upernet", "crop": 512, "ignore_index": 255})
    if args.eval and args.head in PROBES:
        raise ValueError(f"--head {args.head} is fitted at every start: omit --eval")
    for name in REJECTED[args.head]:
        if name in given:
            raise ValueError(f"--{name} has no effect with --head {args.head}: omit it")
    resolve.resolve_settings(args, meta)
    resolve.fill_in(args, {"stride": args.crop * 2 // 3, "short_side": args.crop})
    if args.stride > args.crop:
        raise ValueError(f"--stride {args.stride} leaves gaps between windows of --crop {args.crop}: lower it")
    try:
        args.patch_size = build_model(args, torch.device("meta")).encoder.patch_embed.patch_size[0]
    except ValueError as error:
        size = f"--input_size {args.input_size}" if args.head in PROBES else f"--crop {args.crop}"
        raise ValueError(f"{size}: {error}") from error
    if args.head in PROBES:
        resolve.fill_in(args, {"batch_size": 64, "max_patches": 4_000_000})
        resolve.resolve_workers(args, world, NUM_WORKERS)
    else:
        resolve_schedule(args, world)
    return args


def resolve_schedule(args: argparse.Namespace, world: distributed.World) -> None:
    """Steps, batch and optimizer, in place. For the loop, an epoch is the interval between two evaluations.

    Raises:
        ValueError: options that contradict each other.
    """
    large = args.model in ("vit_large_patch16", "vit_huge_patch14")
    resolve.fill_in(args, LINEAR if args.head == "linear" else LARGE if large else UPERNET)
    resolve.fill_in(args, {"decay_positions": True})
    resolve.fill_in(args, {"batch_size": max(1, (args.global_batch or GLOBAL_BATCH) // world.size)})
    if args.eval:  # of one image at a time, without an optimizer
        args.global_batch = args.batch_size * world.size
    elif args.global_batch is None:
        per_step = args.batch_size * world.size
        args.global_batch = GLOBAL_BATCH if GLOBAL_BATCH % per_step == 0 else per_step
        if args.global_batch != GLOBAL_BATCH and world.rank == 0:
            log.warning("global batch size %d, not the protocol's %d: look at --lr", args.global_batch, GLOBAL_BATCH)
    args.lr_schedule = "cosine" if args.head == "linear" else "linear"
    resolve.fill_in(args, {"warmup_steps": min(WARMUP_STEPS, args.steps // 10)})
    parts = next(n for n in range(10, 0, -1) if args.steps % n == 0)
    resolve.fill_in(args, {"eval_interval": args.steps // parts})
    if args.steps % args.eval_interval:
        raise ValueError(f"--eval_interval {args.eval_interval} does not divide --steps {args.steps}: give a divisor")
    if args.warmup_steps >= args.steps:
        raise ValueError(f"--warmup_steps {args.warmup_steps} must be less than --steps {args.steps}")
    args.epochs, args.warmup_epochs = args.steps // args.eval_interval, args.warmup_steps / args.eval_interval
    args.min_lr, args.accum_iter, args.steps_per_epoch = 0.0, None, args.eval_interval
    resolve.resolve_training(args, world, warmup_epochs=0, num_workers=NUM_WORKERS)
    alone = world.size == 1 or distributed.pick_device(args.device, world).type == "cpu"
    if args.head == "upernet" and args.batch_size == 1 and alone and not args.eval:
        raise ValueError(
            "--batch_size 1: UPerNet's batch norm needs at least two images, on CUDA over all processes: raise it"
        )


def build_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    size = args.input_size if args.head in PROBES else args.crop
    with device:
        return models_segment.build(
            args.head, args.model, size, args.patch_size, args.nb_classes or 1, args.drop_path or 0.0
        )


def load_weights(args: argparse.Namespace, model: nn.Module, weights: dict[str, Tensor] | None) -> None:
    """The encoder's weights; with --eval, those of the whole model."""
    if weights is None:
        log.info("no --finetune: starting from random weights")
        return
    with options.user_mistakes():
        report = load_into(model, weights, allow_unexpected=()) if args.eval else model.load_encoder(weights)
    log_loaded(args.weights, report)


def describe(args: argparse.Namespace, model: nn.Module, num_images: int) -> str:
    """The start of the log: what will be trained and how. Returns the protocol of the evaluation in one line."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info("model     %s on %s, %.1f M trainable parameters", args.head, args.model, trained / 1e6)
    if args.head not in PROBES and not args.eval:
        log.info(
            "steps     %d, warm-up %d, %s decay; an evaluation ends an epoch, every %d steps",
            args.steps,
            args.warmup_steps,
            args.lr_schedule,
            args.eval_interval,
        )
    resolve.describe(get_args_parser(), args)
    images = f"short side {args.short_side}, windows {args.crop}, stride {args.stride}"
    if args.head in PROBES:
        images = f"{args.input_size} x {args.input_size} pixels, one class per patch"
    frozen = "" if args.head == "upernet" else "frozen "
    return (
        f"{args.head} on {frozen}{args.model}, patch {args.patch_size}, {images}, scored at original size, "
        f"{args.nb_classes} classes, {num_images:,} images"
    )


@record
def main(argv: list[str] | None = None) -> dict[str, float]:
    """Returns: mIoU in percent, by name of the head or number of neighbours; {} if the run stopped early."""
    # Options, paths and labels: mistakes end here, before a model is built.
    with options.user_mistakes():
        world = distributed.read_environment()
        args = resolve_options(get_args_parser().parse_args(argv), world)
        device, amp = distributed.setup(world, args.device, args.precision, args.dist_timeout)
        args.device, args.precision = device.type, amp.name
        files = build_source(args.data_path, None, **data_settings(args))
        if not isinstance(files, ImageFiles):
            raise ValueError(f"--data_path {args.data_path}: give one folder or archive with images and label maps")
        label_format = segmentation.LabelFormat(args.reduce_zero_label is not False, args.ignore_index)
        sources, names = label_checks.checked_sources(
            files,
            ["val"] if args.eval else ["train", "val"],
            label_format,
            args.nb_classes,
            trust_zero=args.reduce_zero_label is True,
            on_rank_zero=distributed.from_rank_zero,
        )
        warn_of_range(args, next(iter(sources.values())))
        if args.head in PROBES and len(sources["train"]) < 2:
            raise ValueError(
                f"--head {args.head} holds out a tenth of the training images, and there is one: give more"
            )
        args.nb_classes, args.reduce_zero_label = len(names), label_format.reduce_zero
        path, pin_memory = run_folder(args.output_dir, args.experiment, SCRIPT), args.pin_mem and device.type == "cuda"
        run = None
        if args.head not in PROBES and not args.eval:
            run = Run(path, SCRIPT, args.resume, args.auto_resume)
        written = {"--output_dir": path}
        if args.save_predictions:
            written["--save_predictions"] = Path(args.save_predictions)
        for option, folder in written.items():
            distributed.from_rank_zero(partial(create, folder, option))
        resumed = run is not None and run.state is not None
        weights = load_pretrained(args.weights, args.which) if args.weights and not resumed else None
        if run is not None:
            given = partial(load_pretrained, args.weights, args.which)
            args.initial = run.check(vars(args), FIXED, args.weights, lambda: fingerprint(weights or given()))
            batch = (args.batch_size, args.accum_iter, world.rank, world.size)
            sampler = EpochSampler(len(sources["train"]), *batch, seed=args.seed, steps=args.eval_interval)

    # Model
    rng.seed_all(args.seed)
    model = build_model(args, torch.device("cpu")).to(device)
    amp.choose_attention(model)
    protocol = describe(args, model, len(sources["val"]))
    if not resumed:
        load_weights(args, model, weights)
    if device.type == "cuda" and world.size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.compile:
        model.compile()
    to_model_input = ToModelInput(args.mean, args.std, device, flip=False)

    # Evaluation
    report = Report(path, sources["val"], names, protocol, args.save_predictions, args.save_preview)

    if args.head in PROBES:
        train = evaluation_loader(args, sources["train"], ProbeResize(args.input_size, resize_labels=True), world)
        val = evaluation_loader(args, sources["val"], ProbeResize(args.input_size, resize_labels=False), world, 1)

        def encode(images: Tensor) -> Tensor:
            with torch.no_grad(), amp.autocast():
                return model(to_model_input(images)).float()

        scores, chosen = probe(
            args.head,
            encode,
            train,
            val,
            amp,
            num_images=len(sources["train"]),
            num_classes=args.nb_classes,
            ignore_index=args.ignore_index,
            max_patches=args.max_patches,
            seed=args.seed,
            on_prediction=report.save,
        )
        for name in sorted(scores, key=lambda name: name == chosen):  # the chosen one last, iou.tsv is its
            report.scores(scores[name], f"{name}  ")
        distributed.shutdown()
        return {name: score.miou for name, score in scores.items()}

    val = evaluation_loader(args, sources["val"], EvaluationResize(args.short_side), world, 1)
    score = partial(evaluate, model, val, amp, to_model_input, stride=args.stride, ignore_index=args.ignore_index)
    if args.eval:
        scores = score(on_prediction=report.save)
        report.scores(scores)
        distributed.shutdown()
        return {args.head: scores.miou}

    # Optimizer, data, loop
    assert run is not None
    student = distributed.wrap_ddp(model, device) if world.size > 1 else model
    groups = models_segment.parameter_groups(model, args.weight_decay, args.layer_decay, args.decay_positions)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    crop = TrainingCrop(args.crop, args.short_side, args.ignore_index)
    dataset = ImageDataset(sources["train"], crop, args.seed, replace=not args.strict_images)
    loader = build_loader(dataset, sampler, args.num_workers, pin_memory)
    criterion = partial(models_segment.loss, weights=model.loss_weights, ignore_index=args.ignore_index)
    stateful = {"state_dict": model, "optimizer": optimizer, "loss_scaler": amp}
    loop = Loop(run, vars(args), stateful, sampler, sources["train"], amp)

    def augment(sample: tuple[Tensor, Tensor, Tensor], _: Tensor) -> tuple[Tensor, Tensor]:
        images, labels, sizes = sample  # (B, 3, S, S), (B, S, S), (B, 2)
        images = blank_padding(to_model_input(images), sizes.to(device, non_blocking=True))
        return images, labels.to(device, non_blocking=True)

    results = {}
    for epoch in loop.epochs():
        stats = train_one_epoch(student, criterion, loader, optimizer, amp, loop, augment=augment)
        if loop.stopped:
            break
        loop.save_mid_epoch()
        last = epoch + 1 == args.epochs
        scores = score(on_prediction=report.save if last else None)
        line = report.scores(scores, f"step {(epoch + 1) * args.eval_interval}/{args.steps}  ")
        loop.end_epoch(stats, line | {"train_lr": optimizer.param_groups[-1]["lr"]})
        if last:
            results = {args.head: scores.miou}
    loop.close()
    return results


if __name__ == "__main__":
    main()
