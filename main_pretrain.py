"""Pre-train HPM, or with --no-learning_loss the MAE baseline.

    python main_pretrain.py --model mae_vit_tiny_patch16 --input_size 64 --patch_size 8 --epochs 20
    torchrun --nproc_per_node=8 main_pretrain.py --data_path /imagenet --global_batch 2048 --epochs 200

Without --data_path it trains on Shapes, images that it draws itself. PRETRAIN.md has the commands for real.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

import models_hpm
import models_teacher
from engine_pretrain import Look, train_one_epoch
from util import masking, rng
from util.data.datasets import ImageDataset, Source, build_source, compressed_archive
from util.data.loader import EpochSampler, build_loader
from util.data.transforms import IMAGENET_MEAN, IMAGENET_STD, CenterCrop, RandomCrop, ToModelInput
from util.ema import EMATeacher
from util.run import checkpoint, distributed, launch, options
from util.run.logger import RunLogger, cpu_threads, log
from util.run.loop import TrainingLoop
from util.schedules import ema_decay_at
from util.weights.load import load_into, load_pretrained
from visualize import draw as pictures
from visualize.panel import panel

SCRIPT = "main_pretrain"
TARGETS = ["pixel", "norm_pixel", "ema", "dino", "clip"]
PATTERNS = {"mask_block": "block", "mask_regular": "regular"}  # option: name in util/masking

# A run cannot change these when it goes on: weights, target and schedule depend on them.
FIXED = [
    *["model", "input_size", "patch_size", "decoder_embed_dim", "decoder_depth", "decoder_num_heads"],
    *["learning_loss", "vis_mask_ratio", "target", "epochs", "global_batch"],
]

# What may be missing in weights to begin with: MAE's released encoders come without decoders, MAE has no predictor.
DECODERS = ("decoder_", "mask_token", "vis_mask_token")

PANEL_IMAGES = 8  # a picture that fits a screen
PANELS = 20  # in a run, however long it is: enough to see masks move, some 40 MB of TensorBoard events at 224 pixels


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser(__doc__.split("\n")[0])
    options.add_batch_options(parser, batch_size=64, epochs=400, warmup_epochs=40)
    options.add_data_options(parser, num_workers=8, splits=("train",))
    options.add_run_options(parser)
    options.add_device_options(parser)
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--vis_interval",
        type=options.COUNT_OR_ZERO,
        help="epochs between two panels in TensorBoard: masks, reconstructions, hardness of eight validation images; "
        f"0 = none; default: {PANELS} panels over the run",
    )

    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        type=options.one_of(list(models_hpm.MODELS), "model"),
        default="mae_vit_base_patch16",
        help="size; tiny and small are for small images and CPUs",
    )
    group.add_argument("--input_size", type=options.COUNT, default=224, help="side of the images, in pixels")
    group.add_argument("--patch_size", type=options.COUNT, help="side of a patch; default: as the model's name says")
    group.add_argument("--token_size", type=options.COUNT, help="side of the grid of patches; derived, only checked")
    group.add_argument("--decoder_embed_dim", type=options.COUNT, help="width of both decoders; default: the model's")
    group.add_argument("--decoder_depth", type=options.COUNT, help="blocks of each decoder; fewer are faster")
    group.add_argument("--decoder_num_heads", type=options.COUNT, help="attention heads of both decoders")
    options.add_switch(group, "grad_checkpointing", False, "compute activations twice, to hold fewer of them in memory")
    group.add_argument("--load_from", "--finetune", default="", help="weights to begin a new run from (HPM, MAE, ours)")

    group = parser.add_argument_group("target and loss predictor")
    group.add_argument(
        "--target",
        choices=TARGETS,
        help="what to reconstruct: raw pixels (HPM's default), pixels normalised by patch (MAE's better one), or "
        "features of the EMA teacher, of DINO or of CLIP",
    )
    options.add_switch(group, "norm_pix_loss", False, "the official name of --target norm_pixel")
    group.add_argument(
        "--learn_feature_loss", choices=["none", *TARGETS[2:]], default="none", help="the official name of these three"
    )
    for kind, what in (("dino", "DINO's backbone or full checkpoint"), ("clip", "a CLIP state dict")):
        group.add_argument(
            f"--{kind}_path", default="none", help=f"{what}, or timm's weights in a file; none: timm downloads them"
        )
    options.add_switch(group, "learning_loss", True, "train the loss predictor; without it, this is MAE")
    options.add_switch(group, "relative", True, "the predictor ranks patches; without it, it predicts their loss")

    group = parser.add_argument_group("masks")
    group.add_argument("--mask_ratio", type=options.number(float, above=0, below=1), default=0.75, help="share masked")
    group.add_argument(
        "--vis_mask_ratio",
        type=options.number(float, low=0, below=1),
        default=0.0,
        help="share of the visible patches replaced by a learned token (UM-MAE)",
    )
    group.add_argument(
        "--mask_strategy",
        choices=list(masking.STRATEGIES),
        help="which patches the predicted loss puts under the mask; default: easy_to_hard, without a predictor random",
    )
    group.add_argument("--alpha_0", type=options.SHARE, default=0.0, help="share chosen by predicted loss at the start")
    group.add_argument("--alpha_T", type=options.SHARE, default=0.5, help="and at the end; 1 is worse than random")
    options.add_switch(group, "mask_block", False, "show one square of the image, no mining (UM-MAE)")
    options.add_switch(group, "mask_regular", False, "show one patch of each 2 x 2, no mining (UM-MAE)")

    group = parser.add_argument_group("EMA teacher")
    group.add_argument("--ema_decay", type=options.SHARE, default=0.999, help="decay per step, at the start")
    group.add_argument("--ema_decay_final", type=options.SHARE, default=0.9999, help="and after the ramp")
    group.add_argument("--ema_ramp_epochs", type=options.COUNT_OR_ZERO, default=100, help="epochs of the ramp")

    group = parser.add_argument_group("optimizer (AdamW, 0.9 and 0.95)")
    group.add_argument("--lr", type=options.NOT_NEGATIVE, help="learning rate; default: --blr x images a step / 256")
    group.add_argument("--blr", type=options.NOT_NEGATIVE, default=1.5e-4, help="learning rate per 256 images")
    group.add_argument("--min_lr", type=options.NOT_NEGATIVE, default=0.0, help="where the cosine ends")
    group.add_argument("--weight_decay", type=options.NOT_NEGATIVE, default=0.05, help="on matrices, not on vectors")
    group.add_argument(
        "--clip_grad",
        type=options.NOT_NEGATIVE,
        default=5.0,
        help="largest norm of the gradient; 0 = off. The official code clips at 5 without saying so",
    )
    return parser


def resolve_options(args: argparse.Namespace, world: distributed.World) -> argparse.Namespace:
    """Fill in what follows from other options, and refuse what cannot be.

    Raises:
        ValueError: options that contradict each other.
    """
    args = copy.copy(args)
    args.accum_iter, args.global_batch = options.effective_batch(
        args.batch_size, args.accum_iter, args.global_batch, world.size
    )
    args.processes = world.size
    args.mean, args.std = args.mean or list(IMAGENET_MEAN), args.std or list(IMAGENET_STD)
    args.warmup_epochs = options.default_warmup(args.warmup_epochs, 40, args.epochs)
    args.num_workers = options.worker_count(args.num_workers, 8, world.local_size)
    if args.vis_interval is None:
        args.vis_interval = -(-args.epochs // PANELS)
    if args.lr is None:
        args.lr = args.blr * args.global_batch / 256
    resolve_target(args)
    if args.start_epoch >= args.epochs:
        raise ValueError(f"--start_epoch {args.start_epoch} leaves nothing of --epochs {args.epochs}")

    with torch.device("meta"):  # every check of the model's sizes, at no cost
        model = build_model(args)
    args.patch_size = model.patch_embed.patch_size[0]
    grid = model.patch_embed.grid_size
    if args.token_size not in (None, grid[0]):
        raise ValueError(
            f"--token_size {args.token_size}: images of {args.input_size} in patches of {args.patch_size} have "
            f"{grid[0]} x {grid[1]} patches; leave the option out"
        )
    args.token_size = grid[0]
    size = (models_teacher.IMAGE_SIZE, models_teacher.PATCH_SIZE)
    if args.target in models_teacher.KINDS and (args.input_size, args.patch_size) != size:
        raise ValueError(
            f"--target {args.target} is a network of patch {size[1]} at {size[0]} pixels: give --input_size {size[0]} "
            f"--patch_size {size[1]}"
        )
    resolve_mask_strategy(args)
    masking.MaskSampler.from_options(vars(args), grid)  # raises what the ratio, the pattern and the grid cannot be
    return args


def resolve_target(args: argparse.Namespace) -> None:
    """Settle what is reconstructed, in place; the official names say it too.

    Raises:
        ValueError: two targets at once, or a teacher of another grid.
    """
    said = {"--target": args.target, "--norm_pix_loss": "norm_pixel" if args.norm_pix_loss else None}
    said["--learn_feature_loss"] = None if args.learn_feature_loss == "none" else args.learn_feature_loss
    said = {option: target for option, target in said.items() if target is not None}
    if len(set(said.values())) > 1:
        raise ValueError(f"{' and '.join(said)} name different targets ({', '.join(said.values())}): give one")
    args.target = next(iter(said.values()), "pixel")
    paths = {"dino": args.dino_path, "clip": args.clip_path}
    for kind, path in paths.items():
        if path != "none" and args.target != kind:
            raise ValueError(f"--{kind}_path is for --target {kind}, the target is {args.target}")
    args.teacher_path = "" if paths.get(args.target) == "none" else paths.get(args.target, "")


def resolve_mask_strategy(args: argparse.Namespace) -> None:
    """Settle where the masks come from, in place.

    Raises:
        ValueError: a strategy that needs a predictor where there is none, or two kinds of masks at once.
    """
    patterns = [option for option in PATTERNS if getattr(args, option)]
    if len(patterns) == 2:
        raise ValueError("--mask_block and --mask_regular are two masks: give one")
    if patterns and args.mask_strategy not in (None, "random"):
        raise ValueError(f"--{patterns[0]} chooses the masks, --mask_strategy {args.mask_strategy} would too")
    if args.mask_strategy is None:
        args.mask_strategy = "easy_to_hard" if args.learning_loss and not patterns else "random"
    if args.mask_strategy != "random" and not args.learning_loss:
        raise ValueError(f"--mask_strategy {args.mask_strategy} needs the loss predictor: drop --no-learning_loss")


def build_model(args: argparse.Namespace) -> models_hpm.MaskedAutoencoderViT:
    widths = {kind: teacher.width for kind, teacher in models_teacher.KINDS.items()}
    widths["ema"] = models_hpm.SIZES[args.model]["embed_dim"]
    model = models_hpm.build(
        args.model,
        img_size=args.input_size,
        norm_pix_loss=args.target == "norm_pixel",
        vis_mask_ratio=args.vis_mask_ratio,
        learning_loss=args.learning_loss,
        relative=args.relative,
        target_dim=widths.get(args.target),
        patch_size=args.patch_size,
        decoder_embed_dim=args.decoder_embed_dim,
        decoder_depth=args.decoder_depth,
        decoder_num_heads=args.decoder_num_heads,
    )
    model.grad_checkpointing = args.grad_checkpointing
    return model


def build_optimizer(model: torch.nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    groups = param_groups_weight_decay(model, args.weight_decay)
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def compile_regions(
    model: torch.nn.Module, see: Callable | None, frozen: Callable | None
) -> tuple[Callable | None, Callable | None]:
    """Compile the student's forward pass with its losses in place, and the teachers' passes, each one whole graph.

    Masks are drawn between them, so that no count that changes with the epoch is part of a graph.
    """
    model.compile(fullgraph=True)  # in place: names in checkpoints stay as they are
    return see and torch.compile(see, fullgraph=True), frozen and torch.compile(frozen, fullgraph=True)


def masks_of_epoch(
    args: argparse.Namespace,
    epoch: int,
    grid: tuple[int, int],
    see: Callable[[Tensor], tuple[Tensor | None, Tensor]] | None,
    frozen: Callable[[Tensor], Tensor] | None,
) -> tuple[int, Look, Callable[[Tensor | None, Tensor], Tensor]]:
    """How masks are drawn in an epoch: patches chosen by predicted loss, the teachers' pass, and the drawing itself.

    Args:
        see: the EMA teacher's pass, images -> predicted loss (B, L) and patch tokens (B, L, E).
        frozen: a frozen network's features (B, L, D), for --target dino and clip.
    """
    plan = masking.MaskSampler.from_options(vars(args), grid)
    num_hardest = plan.num_hardest(epoch)

    def look(images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        scores = tokens = None
        if num_hardest or args.target == "ema":  # in the first epochs the schedule chooses no patch yet
            scores, tokens = see(images)
        features = frozen(images) if frozen else tokens if args.target == "ema" else None
        return scores, features

    def draw_mask(scores: Tensor | None, images: Tensor) -> Tensor:
        return plan.draw(scores, len(images), epoch, device=images.device)

    return num_hardest, look, draw_mask


def images_to_show(args: argparse.Namespace, train: Source) -> tuple[Tensor, list[str]] | None:
    """Eight images (8, 3, S, S) uint8 for the panels, always the same, and their names: of the val split where the data
    have one that can be read, else of training; None without --vis_interval. All ranks call it together."""
    if not args.vis_interval:
        return None

    def of_val() -> tuple[Tensor, list[str]]:
        if args.data_path is not None:
            packed, at_hand = (compressed_archive(Path(args.data_path), split) for split in ("val", "train"))
            if packed not in (None, at_hand):
                raise ValueError(f"{packed} would have to be decompressed for them")
        return center_crops(build_source(args.data_path, "val", cache_dir=args.cache_dir), args.input_size)

    try:
        return distributed.from_rank_zero(of_val)
    except (ValueError, OSError) as error:
        log.info("panels    of training images: %s", error)
        return distributed.from_rank_zero(lambda: center_crops(train, args.input_size))


def center_crops(source: Source, size: int) -> tuple[Tensor, list[str]]:
    """Eight images of all classes alike, and their names."""
    dataset = ImageDataset(source, CenterCrop(size))
    picked = [len(source) * i // PANEL_IMAGES for i in range(min(PANEL_IMAGES, len(source)))]
    names = ["/".join(Path(source.name(i)).parts[-2:]) for i in picked]
    return torch.stack([dataset[i].image for i in picked]), names


def panels(
    args: argparse.Namespace,
    shown: tuple[Tensor, list[str]] | None,
    model: models_hpm.MaskedAutoencoderViT,
    teacher: EMATeacher | None,
    frozen: Callable[[Tensor], Tensor] | None,
    logger: RunLogger,
) -> Callable[[int], None]:
    """What draws, at the end of an epoch whose turn it is, what the model sees in the images `shown`.

    The student reconstructs; what is hard, and so where the masks are, the EMA teacher says, as in training.

    Args:
        frozen: a frozen network's features, not compiled: panels have a batch size of their own.
        logger: where to.

    Returns:
        A function of the number of epochs that are done.
    """
    plan = masking.MaskSampler.from_options(vars(args), model.patch_embed.grid_size)

    def look(imgs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        scores, tokens = (None, None) if teacher is None else teacher.module.predict_loss(imgs, return_tokens=True)
        return scores, frozen(imgs) if frozen else tokens if args.target == "ema" else None

    def draw(done: int) -> None:
        if shown is None or (done % args.vis_interval and done != args.epochs):
            return
        stats = {"mean": args.mean, "std": args.std}
        drawn = panel(model, *shown, plan, **stats, epochs=[done - 1], epoch=done - 1, seed=args.seed, look=look)
        picture = pictures.draw_grid(drawn, f"{done} of {args.epochs} epochs")
        logger.image("panel", torch.from_numpy(np.array(picture)).permute(2, 0, 1), done)

    return draw


def describe(args: argparse.Namespace, world: distributed.World, num_images: int, model: torch.nn.Module) -> None:
    """The start of the log: what will happen, with the arithmetic of the batch."""
    data = args.data_path or "Shapes, images drawn by the program (no --data_path was given)"
    grid = model.patch_embed.grid_size
    masked = masking.count_masked(grid[0] * grid[1], args.mask_ratio)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info("data      %s: %s images, %d steps an epoch", data, f"{num_images:,}", args.steps_per_epoch)
    log.info("model     %s, %.1f M parameters to train", args.model, trained / 1e6)
    log.info("patches   %d x %d of %d pixels, %d masked", *grid, args.patch_size, masked)
    log.info("target    %s, predictor %s, masks %s", args.target, predictor_name(args), args.mask_strategy)
    factors = (args.batch_size, args.accum_iter, world.size, "es" * (world.size > 1))
    log.info("batch     %d = --batch_size %d x --accum_iter %d x %d process%s", args.global_batch, *factors)
    log.info("rate      %.3g, %g epochs of warm-up, %d epochs in all", args.lr, args.warmup_epochs, args.epochs)
    log.info("compute   %s, %s%s, %s", args.device, args.precision, ", compiled" * args.compile, cpu_threads())
    if ignored := get_args_parser().given_without_effect(vars(args)):
        log.info("without effect here: %s", ", ".join(ignored))


def predictor_name(args: argparse.Namespace) -> str:
    return ("relative" if args.relative else "absolute") if args.learning_loss else "none"


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
        source = build_source(
            args.data_path,
            "train",
            shapes_count=args.shapes_train,
            cache_dir=args.cache_dir,
            share=distributed.from_rank_zero,
        )
        sampler = EpochSampler(len(source), args.batch_size, args.accum_iter, world.rank, world.size, args.seed)
        args.steps_per_epoch = len(sampler) // args.accum_iter
        run.check(vars(args), FIXED)
        weights = load_pretrained(args.load_from) if args.load_from and not run.found else None
        frozen = None
        if args.target in models_teacher.KINDS:
            teacher_weights = models_teacher.read_teacher(args.teacher_path)
            frozen, report = models_teacher.build_teacher(args.target, teacher_weights, args.mean, args.std)
            frozen = frozen.to(device)
            log.info("teacher   %s\n%s", args.target, report)
        shown = images_to_show(args, source)

    # Model, teacher, optimizer
    rng.seed_all(args.seed)
    model = build_model(args).to(device)
    precision.choose_attention(model)
    describe(args, world, len(source), model)
    if weights is not None:
        with options.user_mistakes():
            report = load_into(model, weights, fresh=DECODERS, left_out=("head.", "fc_norm."))
        log.info("weights of %s\n%s", args.load_from, report)
    student = distributed.wrap(model, device)  # from here on, all ranks hold the same weights
    teacher = EMATeacher(model) if args.learning_loss or args.target == "ema" else None
    optimizer = build_optimizer(model, args)
    parts = {"state_dict": model, "optimizer": optimizer, "loss_scaler": precision}
    if teacher is not None:
        parts["ema_state_dict"] = teacher.module
    see = teacher and partial(teacher.module.predict_loss, return_tokens=True)
    eager_frozen = frozen
    if args.compile:
        see, frozen = compile_regions(model, see, frozen)

    # Where it goes on
    loop = TrainingLoop(run, parts, sampler, world, device)
    if loop.finished:
        return loop.leave()

    # Data and log
    num_masked = masking.count_masked(model.patch_embed.num_patches, args.mask_ratio)
    dataset = ImageDataset(source, RandomCrop(args.input_size), args.seed, replace=not args.strict_images)
    loader = build_loader(dataset, sampler, args.num_workers, args.pin_mem and device.type == "cuda")
    loop.begin(student, optimizer, precision, source, args.lr)
    show = panels(args, shown if world.rank == 0 else None, model, teacher, eager_frozen, loop.logger)

    for epoch in loop.epochs():
        num_hardest, look, draw_mask = masks_of_epoch(args, epoch, model.patch_embed.grid_size, see, frozen)
        ema_decay = ema_decay_at(epoch, args.ema_decay, args.ema_decay_final, args.ema_ramp_epochs)
        stats = train_one_epoch(
            student,
            teacher,
            loop.batches(loader),
            optimizer,
            precision,
            to_model_input=ToModelInput(args.mean, args.std, device, flip=True),
            look=look,
            draw_mask=draw_mask,
            num_masked=num_masked,
            clip_grad=args.clip_grad,
            ema_decay=ema_decay,
            **loop.for_engine(),
        )
        if not loop.complete():
            break
        figures = {"train_lr": optimizer.param_groups[0]["lr"]}
        if teacher is not None:
            figures |= {"ema_decay": ema_decay, "num_hardest": num_hardest, "hard_ratio": num_hardest / num_masked}
        loop.end_epoch(stats, figures)
        show(loop.epoch)
    loop.close()


if __name__ == "__main__":
    main()
