"""Linear probe: batch norm without parameters and a linear head, on frozen features.

    python main_linprobe.py --finetune output_dir/checkpoint-last.pth --blr 0.01 0.1 1
    torchrun --nproc_per_node=8 main_linprobe.py --finetune mae_pretrain_vit_base.pth --optimizer lars

Each --blr trains a head of its own, all in one pass over the features. docs/eval.md has the commands for ImageNet.
"""

import argparse
import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record

import models_load
import models_vit
from engine_finetune import evaluate, train_one_epoch
from util import rng
from util.data import transforms
from util.data.datasets import ImageDataset
from util.data.loader import EpochSampler, build_loader
from util.data.sources import Source
from util.lars import LARS
from util.run import classwise, distributed, options, resolve
from util.run.checkpoint import Run, find_resume, read_run
from util.run.folder import create, run_folder
from util.run.logger import log
from util.run.loop import Loop
from util.run.splits import evaluation_loader, read_splits
from util.weights.load import DECODERS, fingerprint, load_into, load_pretrained, log_loaded, read_meta

SCRIPT = "main_linprobe"
WARMUP_EPOCHS, NUM_WORKERS = 10, 10  # defaults

# Options that must not change on resume: heads, features and schedule depend on them.
FIXED = ["model", "input_size", "patch_size", "global_pool", "nb_classes", "epochs", "global_batch", "optimizer", "lr"]


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser((__doc__ or "").split("\n")[0])
    options.add_classifier_options(parser, list(models_vit.MODELS))
    options.add_training_options(parser, batch_size=512, epochs=90, warmup_epochs=WARMUP_EPOCHS)
    options.add_data_options(parser, num_workers=NUM_WORKERS)
    options.add_device_options(parser)

    group = parser.add_argument_group("linear probe")
    options.add_pooling_options(group, "off; with --eval the probe's")
    options.add_crop_option(group, "that of the probe that is evaluated or resumed")
    group.add_argument("--eval", action="store_true", help="evaluate the heads of --resume or of the run folder")
    group.add_argument(
        "--optimizer", choices=["sgd", "lars"], default="sgd", help="sgd: HPM's script; lars: MAE's, for large batches"
    )
    group.add_argument(
        "--blr",
        type=options.POSITIVE,
        nargs="+",
        help="base learning rates per 256 images, one head each (default: 1e-3 for sgd, 0.1 for lars)",
    )
    group.add_argument("--lr", type=options.POSITIVE, nargs="+", help="absolute learning rates, instead of --blr")
    group.add_argument("--min_lr", type=options.NOT_NEGATIVE, default=0.0, help="final learning rate of the cosine")
    group.add_argument(
        "--weight_decay", type=options.NOT_NEGATIVE, default=0.0, help="weight decay of the heads (lars: not of biases)"
    )
    parser.accept_ignored("dist_eval")  # evaluation is always exact
    return parser


def resolve_options(args: argparse.Namespace, world: distributed.World) -> argparse.Namespace:
    """Fill in what follows from other options and from the checkpoint, and reject impossible settings.

    Raises:
        ValueError: options that contradict each other, or a checkpoint that cannot be read.
    """
    args = copy.copy(args)
    resolve.resolve_which(args)
    meta = read_meta(args.finetune) if args.finetune else {}
    resolve.resolve_settings(args, meta)
    resolve.fill_in(args, {"global_pool": False})
    resolve.resolve_training(args, world, warmup_epochs=WARMUP_EPOCHS, num_workers=NUM_WORKERS)
    if args.lr is None:
        args.blr = args.blr or [{"sgd": 1e-3, "lars": 0.1}[args.optimizer]]
        args.lr = [blr * args.global_batch / 256 for blr in args.blr]
    elif args.blr is not None:
        raise ValueError("--lr and --blr both set the learning rate: give one")
    if args.min_lr > 0 and len(args.lr) > 1:  # the schedule scales it with the learning rate of a head
        raise ValueError(f"--min_lr {args.min_lr:g} is for one learning rate, {len(args.lr)} were given: omit it")
    with torch.device("meta"):  # checks the sizes of the model at no cost
        args.patch_size = build_model(args).patch_embed.patch_size[0]
    return args


def build_model(args: argparse.Namespace) -> models_vit.VisionTransformer:
    settings = {"num_classes": 0, "global_pool": args.global_pool}
    return models_vit.build(args.model, args.input_size, args.patch_size, **settings)


def build_optimizer(args: argparse.Namespace, heads: nn.ModuleList) -> torch.optim.Optimizer:
    """One parameter group per head, whose lr is `lr_scale` times that of the first."""
    groups = [
        {"params": list(head.parameters()), "lr_scale": lr / args.lr[0]}
        for head, lr in zip(heads, args.lr, strict=True)
    ]
    if args.optimizer == "lars":
        return LARS(groups, lr=args.lr[0], weight_decay=args.weight_decay)
    return sgd_with_momentum(groups, args.lr[0], args.weight_decay)


def sgd_with_momentum(groups: list[dict[str, Any]], lr: float, weight_decay: float) -> torch.optim.SGD:
    """Fused SGD, which can skip steps on the device; if that is the first, the momentum must be initialised already."""
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=weight_decay, fused=True)
    for group in groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def sum_over_heads(logits: Tensor, labels: Tensor) -> Tensor:
    """(S, B, K), (B,) -> scalar whose gradient trains each head as if it were the only one."""
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits))) * len(logits)


def report(args: argparse.Namespace, metrics: dict[str, float], names: list[str]) -> tuple[str, float]:
    """Log every head and mark the best one; its name and accuracy."""
    best = max(names, key=lambda name: metrics[f"acc1{name}"])
    for name, lr in zip(names, args.lr, strict=True):
        mark = "  <- best" if name == best and len(names) > 1 else ""
        acc1, acc5, loss = (metrics[f"{metric}{name}"] for metric in ("acc1", "acc5", "loss"))
        log.info("  lr %-9.4g acc1 %.2f  acc5 %.2f  loss %.4f%s", lr, acc1, acc5, loss, mark)
    return best, metrics[f"acc1{best}"]


def describe(args: argparse.Namespace, train: Source | None, val: Source) -> None:
    """The start of the log: what will be trained, on what, and how."""
    pooling = "layer norm of the mean of patch tokens" if args.global_pool else "class token"
    count = "no" if train is None else f"{len(train):,}"
    log.info("features  %s, %s, %d pixels in patches of %d", args.model, pooling, args.input_size, args.patch_size)
    resolve.describe(get_args_parser(), args, f"{count} training images, {len(val):,} validation images")


@record
def main(argv: list[str] | None = None) -> None:
    # Options and paths: mistakes end here, before a model is built.
    with options.user_mistakes():
        world = distributed.read_environment()
        given = get_args_parser().parse_args(argv)
        args = resolve_options(given, world)
        device, amp = distributed.setup(world, args.device, args.precision, args.dist_timeout)
        args.device, args.precision = device.type, amp.name
        pin_memory = args.pin_mem and device.type == "cuda"
        folder = run_folder(args.output_dir, args.experiment, SCRIPT)
        run, trained = None, None
        if args.eval:  # reads the run, and writes its per-class results
            named = args.resume and Path(args.resume)
            found = distributed.from_rank_zero(lambda: (named, read_run(named)) if named else find_resume(folder))
            if found is None:
                raise ValueError(f"--eval: name the probe's checkpoint with --resume; {folder} holds none")
            trained = found[1]
            if trained["script"] != SCRIPT:
                raise ValueError(f"--eval: {found[0]} is of a run of {trained['script']}, not of {SCRIPT}")
            log.info("probe     %s", found[0])
            distributed.from_rank_zero(lambda: create(folder, "--output_dir"))
            resolve.reject_changes(given, get_args_parser(), trained["options"], [*FIXED, "blr"])
            for name in (*FIXED, "classes"):  # the probe is evaluated as it was trained
                setattr(args, name, trained["options"].get(name))
        else:
            run = Run(folder, SCRIPT, args.resume, args.auto_resume)
            args.classes = run.state["options"].get("classes") if run.state is not None else None
        recorded = trained or (run.state if run is not None else None) or {}
        for name, value in recorded.get("image", {}).items():  # the probe's, which may not be those of its encoder
            if args.origins[name] != "option":
                setattr(args, name, value)
                args.origins[name] = "checkpoint"
        transforms.check_statistics(args.mean, args.std)
        crop_pct = resolve.evaluation_crop(args.input_size, recorded.get("options", {}))
        resolve.fill_in(args, {"crop_pct": crop_pct})
        resolve.resolve_val_fraction(args, recorded.get("options", {}))
        weights = load_pretrained(args.finetune, args.which) if args.finetune else None
        if weights is not None:
            models_load.check_pooling(weights, args.global_pool, args.finetune)
        train, val = read_splits(args, args.nb_classes, "the probe")
        if train is not None:
            sampler = EpochSampler(len(train), args.batch_size, args.accum_iter, world.rank, world.size, args.seed)
            args.steps_per_epoch = sampler.num_batches // args.accum_iter

    # Frozen encoder, heads
    rng.seed_all(args.seed)
    encoder = build_model(args)
    describe(args, train, val)
    with options.user_mistakes():
        if weights is None:
            log.info("no --finetune: features of random weights")
        else:
            allow_missing = ["fc_norm."] if args.global_pool else []
            allow_unexpected = (*DECODERS, "head.", "norm.", "fc_norm.")
            log_loaded(args.finetune, load_into(encoder, weights, allow_missing, allow_unexpected))
        args.encoder = fingerprint(encoder.state_dict())
        if trained is not None and trained["options"].get("encoder") != args.encoder:
            raise ValueError(
                "--eval: the probe was trained on another encoder: give --finetune and --which of its training"
            )
    probe = models_vit.LinearProbe(encoder, len(args.lr), args.nb_classes).to(device)
    amp.choose_attention(probe)
    if args.compile:
        encoder.compile(fullgraph=True)
    heads = nn.ModuleDict({"norm": probe.norm, "heads": probe.heads})
    names = [f" lr {lr:g}" for lr in args.lr] if len(args.lr) > 1 else [""]
    val_loader = evaluation_loader(args, val, transforms.CenterCrop(args.input_size, args.crop_pct), world)
    to_model_input = transforms.ToModelInput(args.mean, args.std, device, flip=False)
    score = partial(evaluate, probe, val_loader, amp, to_model_input, heads=names)
    if trained is not None:
        heads.load_state_dict(trained["state_dict"])
        confusion = torch.zeros(len(names), args.nb_classes, args.nb_classes, dtype=torch.long, device=device)
        best_head, _ = report(args, score(confusion=confusion), names)
        counts, classes = confusion[names.index(best_head)], classwise.output_names(args.classes, args.nb_classes)
        distributed.from_rank_zero(lambda: classwise.report(folder, counts, classes))
        distributed.shutdown()
        return

    # Optimizer, data, loop
    assert run is not None
    assert train is not None
    with options.user_mistakes():
        if run.state is not None and run.state["options"].get("encoder") != args.encoder:
            raise ValueError(
                f"{run.path} was trained on another encoder: give --finetune and --which of its training, or choose "
                "another --output_dir for a new run"
            )
        run.check(vars(args), [*FIXED, "val_fraction"])
    student = distributed.wrap_ddp(probe, device) if world.size > 1 else probe
    optimizer = build_optimizer(args, probe.heads)
    crop = transforms.RandomCrop(args.input_size, (0.08, 1.0), one_draw=True)
    dataset = ImageDataset(train, crop, args.seed, replace=not args.strict_images)
    loader = build_loader(dataset, sampler, args.num_workers, pin_memory)
    flipped = transforms.ToModelInput(args.mean, args.std, device, flip=True)
    loop = Loop(run, vars(args), {"state_dict": heads, "optimizer": optimizer}, sampler, train, amp)
    if loop.finished:
        report(args, score(), names)

    def augment(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return flipped(images), labels.to(device, non_blocking=True)

    for epoch in loop.epochs():
        stats = train_one_epoch(student, sum_over_heads, loader, optimizer, amp, loop, augment=augment)
        if loop.stopped:
            break
        loop.save_mid_epoch()
        metrics = score()
        log.info("epoch %d/%d", epoch + 1, args.epochs)
        best_head, accuracy = report(args, metrics, names)
        line = {f"test_{name}": value for name, value in metrics.items()}
        loop.end_epoch(stats, line | {"best_head": best_head.strip()}, accuracy)
    loop.close()


if __name__ == "__main__":
    main()
