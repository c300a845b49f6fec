"""Pre-train HPM, or with --no-learning_loss the MAE baseline.

    python main_pretrain.py --model mae_vit_tiny_patch16 --input_size 64 --patch_size 8 --epochs 20
    torchrun --nproc_per_node=8 main_pretrain.py --data_path /imagenet --global_batch 2048 --epochs 200

Without --data_path it trains on Shapes, images that it draws itself. PRETRAIN.md has the commands for ImageNet.
"""

import argparse
import copy

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record

import models_hpm
import models_teacher
from engine_pretrain import train_one_epoch
from util import masking, rng
from util.data.datasets import ImageDataset
from util.data.loader import EpochSampler, build_loader
from util.data.sources import build_source
from util.data.transforms import IMAGENET_MEAN, IMAGENET_STD, RandomCrop, ToModelInput
from util.ema import EMATeacher
from util.run import distributed, options
from util.run.checkpoint import Run
from util.run.folder import run_folder
from util.run.logger import log
from util.run.loop import Loop
from util.schedules import ema_decay_at, initial_weights_left
from util.weights.load import fingerprint, load_into, load_pretrained
from visualize.panel import pick_panel_images, training_panel

SCRIPT = "main_pretrain"
TARGETS = ["pixel", "norm_pixel", "ema", "dino", "clip"]

# Options that must not change on resume: weights, target and schedule depend on them.
FIXED = [
    "model",
    "input_size",
    "patch_size",
    "decoder_embed_dim",
    "decoder_depth",
    "decoder_num_heads",
    "predictor_depth",
    "learning_loss",
    "vis_mask_ratio",
    "target",
    "epochs",
    "global_batch",
]

# What --load_from may lack: MAE's released encoders have no decoders, and MAE has no loss predictor.
DECODERS = ("decoder_", "mask_token", "vis_mask_token")

PANELS = 20  # per run: enough to see masks move, about 40 MB of TensorBoard events at 224 pixels


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser((__doc__ or "").split("\n")[0])
    options.add_training_options(parser, batch_size=64, epochs=400, warmup_epochs=40)
    options.add_data_options(parser, num_workers=8, splits=("train",))
    options.add_device_options(parser)
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--vis_interval",
        type=options.COUNT_OR_ZERO,
        help="epochs between two panels in TensorBoard: masks, reconstructions and predicted hardness of eight "
        f"validation images; 0 disables them (default: {PANELS} panels per run)",
    )

    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        choices=list(models_hpm.MODELS),
        metavar="MODEL",
        default="mae_vit_base_patch16",
        help="model size; micro, tiny and small are for small images and CPUs: "
        + ", ".join(name for name in models_hpm.MODELS if "dec" not in name),
    )
    group.add_argument("--input_size", type=options.COUNT, default=224, help="image size in pixels")
    group.add_argument("--patch_size", type=options.COUNT, help="patch size in pixels (default: the model's)")
    group.add_argument("--token_size", type=options.COUNT, help="patches per side; derived, the option is only checked")
    group.add_argument("--decoder_embed_dim", type=options.COUNT, help="width of both decoders (default: the model's)")
    group.add_argument("--decoder_depth", type=options.COUNT, help="blocks of each decoder; fewer are faster")
    group.add_argument("--decoder_num_heads", type=options.COUNT, help="attention heads of both decoders")
    options.add_switch(group, "grad_checkpointing", False, "recompute activations in the backward pass to save memory")
    group.add_argument("--load_from", "--finetune", default="", help="initial weights of a new run (HPM, MAE, ours)")

    group = parser.add_argument_group("target and loss predictor")
    group.add_argument(
        "--target",
        choices=TARGETS,
        help="reconstruction target: raw pixels (HPM's default), pixels normalised per patch (better for MAE), or "
        "features of the EMA teacher, DINO or CLIP",
    )
    options.add_switch(group, "norm_pix_loss", False, "official name of --target norm_pixel")
    group.add_argument(
        "--learn_feature_loss", choices=["none", *TARGETS[2:]], default="none", help="official name of feature targets"
    )
    group.add_argument(
        "--dino_path", default="none", help="DINO's backbone or full checkpoint, or timm's weights (none: download)"
    )
    group.add_argument(
        "--clip_path", default="none", help="a CLIP state dict, or timm's weights in a file (none: download)"
    )
    options.add_switch(group, "learning_loss", True, "train the loss predictor; without it, this is MAE")
    options.add_switch(group, "relative", True, "the predictor ranks patches; without it, it predicts their loss")
    group.add_argument("--predictor_depth", type=options.COUNT, help="blocks of the predictor (default: the decoder's)")

    group = parser.add_argument_group("masks")
    group.add_argument(
        "--mask_ratio", type=options.number(float, above=0, below=1), default=0.75, help="fraction of masked patches"
    )
    group.add_argument(
        "--vis_mask_ratio",
        type=options.number(float, low=0, below=1),
        default=0.0,
        help="fraction of the visible patches replaced by a learned token (UM-MAE)",
    )
    group.add_argument(
        "--mask_strategy",
        choices=list(masking.STRATEGIES),
        help="how predicted loss selects the masked patches (default: easy_to_hard; random without a loss predictor)",
    )
    group.add_argument(
        "--alpha_0",
        type=options.SHARE,
        default=0.0,
        help="fraction of masked patches chosen by predicted loss in the first epoch",
    )
    group.add_argument(
        "--alpha_T",
        type=options.SHARE,
        default=0.5,
        help="fraction of masked patches chosen by predicted loss in the last epoch (1.0 does worse than random masks)",
    )
    options.add_switch(group, "mask_block", False, "keep one square visible, no mining (UM-MAE)")
    options.add_switch(group, "mask_regular", False, "keep one patch of each 2 x 2 visible, no mining (UM-MAE)")

    group = parser.add_argument_group("EMA teacher")
    group.add_argument("--ema_decay", type=options.SHARE, default=0.999, help="decay per step at the start")
    group.add_argument("--ema_decay_final", type=options.SHARE, default=0.9999, help="decay per step after the ramp")
    group.add_argument("--ema_ramp_epochs", type=options.COUNT_OR_ZERO, default=100, help="epochs of the linear ramp")
    group.add_argument(
        "--teacher_keep",
        type=options.number(float, above=0, high=1),
        help="fraction of patches that the teacher sees; below 1 it scores the others, at their mask tokens (default: "
        "1.0, HPM's; 1 - mask_ratio with --score_by loss)",
    )
    group.add_argument(
        "--score_by",
        choices=["predictor", "loss"],
        default="predictor",
        help="score of a patch: its predicted loss, or the teacher's reconstruction loss, of patches hidden from it",
    )

    group = parser.add_argument_group("optimizer (AdamW, betas 0.9 and 0.95)")
    group.add_argument(
        "--lr", type=options.NOT_NEGATIVE, help="learning rate (default: --blr x global batch size / 256)"
    )
    group.add_argument("--blr", type=options.NOT_NEGATIVE, default=1.5e-4, help="base learning rate per 256 images")
    group.add_argument("--min_lr", type=options.NOT_NEGATIVE, default=0.0, help="final learning rate of the cosine")
    group.add_argument(
        "--weight_decay", type=options.NOT_NEGATIVE, default=0.05, help="weight decay (not applied to biases and norms)"
    )
    group.add_argument(
        "--clip_grad",
        type=options.NOT_NEGATIVE,
        default=5.0,
        help="gradient clipping: max norm, 0 disables it. The official code clips at 5 without documenting it",
    )
    return parser


def resolve_options(args: argparse.Namespace, world: distributed.World) -> argparse.Namespace:
    """Fill in what follows from other options, and reject impossible settings.

    Raises:
        ValueError: options that contradict each other.
    """
    args = copy.copy(args)
    options.resolve_training(args, world, warmup_epochs=40, num_workers=8)
    args.mean, args.std = args.mean or list(IMAGENET_MEAN), args.std or list(IMAGENET_STD)
    if args.vis_interval is None:
        args.vis_interval = -(-args.epochs // PANELS)
    if args.lr is None:
        args.lr = args.blr * args.global_batch / 256
    resolve_target_and_masks(args)

    with torch.device("meta"):  # checks the sizes of the model at no cost
        model = build_model(args)
    args.patch_size = model.patch_embed.patch_size[0]
    grid = model.patch_embed.grid_size
    if args.token_size not in (None, grid[0]):
        raise ValueError(
            f"--token_size {args.token_size}: images of {args.input_size} pixels in patches of {args.patch_size} have "
            f"{grid[0]} x {grid[1]} patches; omit the option"
        )
    args.token_size = grid[0]
    size = (models_teacher.IMAGE_SIZE, models_teacher.PATCH_SIZE)
    if args.target in models_teacher.KINDS and (args.input_size, args.patch_size) != size:
        raise ValueError(
            f"--target {args.target} is a network of patch size {size[1]} at {size[0]} pixels: give --input_size "
            f"{size[0]} --patch_size {size[1]}"
        )
    masking.MaskSampler.from_options(vars(args), grid)  # checks ratio, pattern and grid
    return args


def resolve_target_and_masks(args: argparse.Namespace) -> None:
    """The reconstruction target, from its official names too, and the mask strategy, in place.

    Raises:
        ValueError: two targets or two mask options at once, a path that belongs to another target, or a strategy that
            needs a loss predictor without one.
    """
    given = {"--target": args.target}
    if args.norm_pix_loss:
        given["--norm_pix_loss"] = "norm_pixel"
    if args.learn_feature_loss != "none":
        given["--learn_feature_loss"] = args.learn_feature_loss
    given = {option: target for option, target in given.items() if target is not None}
    if len(set(given.values())) > 1:
        raise ValueError(f"{' and '.join(given)} name different targets ({', '.join(given.values())}): give one")
    args.target = next(iter(given.values()), "pixel")
    paths = {"dino": args.dino_path, "clip": args.clip_path}
    for kind, path in paths.items():
        if path != "none" and args.target != kind:
            raise ValueError(f"--{kind}_path is for --target {kind}, the target is {args.target}")
    path = paths.get(args.target, "none")
    args.teacher_path = "" if path == "none" else path

    if args.mask_block and args.mask_regular:
        raise ValueError("--mask_block and --mask_regular are two mask patterns: give one")
    pattern = args.mask_block or args.mask_regular
    if pattern and args.mask_strategy not in (None, "random"):
        name = "--mask_block" if args.mask_block else "--mask_regular"
        raise ValueError(f"{name} and --mask_strategy {args.mask_strategy} both choose the masks: give one")
    by_loss = args.score_by == "loss"
    if args.mask_strategy is None:
        args.mask_strategy = "easy_to_hard" if (args.learning_loss or by_loss) and not pattern else "random"
    if args.mask_strategy != "random" and not (args.learning_loss or by_loss):
        raise ValueError(
            f"--mask_strategy {args.mask_strategy} needs the loss predictor: omit --no-learning_loss, or give "
            "--score_by loss"
        )
    resolve_teacher(args, by_loss)


def resolve_teacher(args: argparse.Namespace, by_loss: bool) -> None:
    """What the EMA teacher sees, in place.

    Raises:
        ValueError: options of the predictor or the teacher that do not go with the target or the masks.
    """
    if args.predictor_depth is not None and not args.learning_loss:
        raise ValueError("--predictor_depth is for the loss predictor: omit it, or omit --no-learning_loss")
    if args.mask_strategy == "random" and (by_loss or args.teacher_keep not in (None, 1.0)):
        name = "--score_by loss" if by_loss else "--teacher_keep"
        raise ValueError(f"{name} is for masks chosen by score, and the masks are random: omit it")
    if by_loss and args.teacher_keep == 1:
        raise ValueError("--score_by loss needs patches hidden from the teacher: give --teacher_keep below 1")
    if args.teacher_keep is None:
        args.teacher_keep = 1 - args.mask_ratio if by_loss else 1.0
    if args.teacher_keep < 1 and args.target == "ema":
        name = "--score_by loss" if by_loss else "--teacher_keep"
        raise ValueError(f"--target ema needs the teacher's features of the whole image: omit {name}")


def build_model(args: argparse.Namespace) -> models_hpm.MaskedAutoencoderViT:
    widths = {kind: teacher.width for kind, teacher in models_teacher.KINDS.items()}
    widths["ema"] = models_hpm.SIZES[args.model]["embed_dim"]
    model = models_hpm.MODELS[args.model](
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
        predictor_depth=args.predictor_depth,
    )
    model.grad_checkpointing, model.score_by = args.grad_checkpointing, args.score_by
    return model


def build_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    groups = param_groups_weight_decay(model, args.weight_decay)
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def describe(
    args: argparse.Namespace, num_images: int, model: models_hpm.MaskedAutoencoderViT, masks: masking.MaskSampler
) -> None:
    """The start of the log: what will be trained, on what, and how."""
    data = args.data_path or "Shapes, images drawn by the program (no --data_path was given)"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    predictor = "none"
    if args.learning_loss:
        predictor = "relative" if args.relative else "absolute"
    log.info("data      %s: %s images, %d steps per epoch", data, f"{num_images:,}", args.steps_per_epoch)
    log.info("model     %s, %.1f M trainable parameters", args.model, trained / 1e6)
    log.info("patches   %d x %d of %d pixels, %d masked", *masks.grid_size, args.patch_size, masks.num_masked)
    log.info("target    %s, loss predictor %s, masks %s", args.target, predictor, args.mask_strategy)
    if masks.num_hidden:
        seen = masks.num_patches - masks.num_hidden
        log.info("teacher   sees %d patches, scores the other %d by %s", seen, masks.num_hidden, args.score_by)
    options.describe(get_args_parser(), args)


def check_teacher(args: argparse.Namespace) -> None:
    """Warn if the EMA teacher stays close to its random initialisation for so long that its scores are chance."""
    tenth, half, end = (
        initial_weights_left(
            args.steps_per_epoch, args.epochs, args.ema_decay, args.ema_decay_final, args.ema_ramp_epochs, until
        )
        for until in (0.1, 0.5, 1.0)
    )
    if half > 0.1:
        fitting = max(0.0, 1 - 30 / (args.steps_per_epoch * args.epochs))  # 5 % left after a tenth of the steps
        log.warning(
            "The EMA teacher follows the student too slowly for %d steps: after 10 %%, 50 %% and 100 %% of training, "
            "%.0f %%, %.0f %% and %.0f %% of it are initial weights, so the patches that it scores as hard are random. "
            "Try --ema_decay %.4g --ema_decay_final %.4g",
            args.steps_per_epoch * args.epochs,
            100 * tenth,
            100 * half,
            100 * end,
            fitting,
            fitting,
        )


@record
def main(argv: list[str] | None = None) -> None:
    # Options and paths: mistakes end here, before a model is built.
    with options.user_mistakes():
        world = distributed.read_environment()
        args = resolve_options(get_args_parser().parse_args(argv), world)
        device, amp = distributed.setup(world, args.device, args.precision, args.dist_timeout)
        args.device, args.precision = device.type, amp.name
        folder = run_folder(args.output_dir, args.experiment, SCRIPT)
        run = Run(folder, SCRIPT, args.resume, args.auto_resume)
        source = build_source(
            args.data_path,
            "train",
            shapes_count=args.shapes_train,
            cache_dir=args.cache_dir,
            on_rank_zero=distributed.from_rank_zero,
        )
        sampler = EpochSampler(len(source), args.batch_size, args.accum_iter, world.rank, world.size, args.seed)
        args.steps_per_epoch = sampler.num_batches // args.accum_iter
        run.check(vars(args), FIXED)
        weights = load_pretrained(args.load_from) if args.load_from and run.state is None else None
        args.initial = run.check_initial_weights(
            args.load_from, lambda: fingerprint(weights or load_pretrained(args.load_from))
        )
        frozen = None
        if args.target in models_teacher.KINDS:
            teacher_weights = models_teacher.read_teacher(args.teacher_path)
            frozen, summary = models_teacher.build_teacher(args.target, teacher_weights, args.mean, args.std)
            frozen = frozen.to(device)
            log.info("teacher   %s\n%s", args.target, summary)
        panel_images = None
        if args.vis_interval:
            panel_images = distributed.from_rank_zero(
                lambda: pick_panel_images(args.data_path, source, args.input_size, args.cache_dir)
            )

    # Model, teacher, optimizer
    rng.seed_all(args.seed)
    model = build_model(args).to(device)
    amp.choose_attention(model)
    masks = masking.MaskSampler.from_options(vars(args), model.patch_embed.grid_size)
    describe(args, len(source), model, masks)
    if args.target == "ema" or masks.num_hardest(args.epochs - 1) or masks.num_hardest(0):
        check_teacher(args)
    if weights is not None:
        with options.user_mistakes():
            report = load_into(model, weights, allow_missing=DECODERS, allow_unexpected=("head.", "fc_norm."))
        log.info("weights of %s\n%s", args.load_from, report)
    student = distributed.wrap_ddp(model, device)  # from here on, all ranks hold the same weights
    has_teacher = args.learning_loss or args.score_by == "loss" or args.target == "ema"
    teacher = EMATeacher(model) if has_teacher else None
    feature_teacher = teacher if args.target == "ema" else frozen
    optimizer = build_optimizer(model, args)
    if args.compile:  # in place: names in checkpoints stay. Masks are drawn between the graphs
        for part in (model, teacher, frozen):
            if part is not None:
                part.compile(fullgraph=True)

    def feature_target(imgs: Tensor, tokens: Tensor) -> Tensor:  # for the panels, eager
        return tokens if frozen is None else frozen.forward(imgs)

    # Data and loop
    dataset = ImageDataset(source, RandomCrop(args.input_size), args.seed, replace=not args.strict_images)
    loader = build_loader(dataset, sampler, args.num_workers, args.pin_mem and device.type == "cuda")
    to_model_input = ToModelInput(args.mean, args.std, device, flip=True)
    stateful = {"state_dict": model, "optimizer": optimizer, "loss_scaler": amp}
    if teacher is not None:
        stateful["ema_state_dict"] = teacher.module
    loop = Loop(run, vars(args), stateful, sampler, source, amp)

    for epoch in loop.epochs():
        ema_decay = ema_decay_at(epoch, args.ema_decay, args.ema_decay_final, args.ema_ramp_epochs)
        stats = train_one_epoch(
            student,
            teacher,
            feature_teacher,
            loader,
            optimizer,
            amp,
            masks,
            loop,
            to_model_input=to_model_input,
            clip_grad=args.clip_grad,
            ema_decay=ema_decay,
        )
        if loop.stopped:
            break
        metrics = {"train_lr": optimizer.param_groups[0]["lr"]}
        if teacher is not None:
            num_hardest = masks.num_hardest(epoch)
            metrics |= {
                "ema_decay": ema_decay,
                "num_hardest": num_hardest,
                "hard_ratio": num_hardest / masks.num_masked,
            }
        loop.end_epoch(stats, metrics)
        due = args.vis_interval and (loop.epoch % args.vis_interval == 0 or loop.epoch == args.epochs)
        if due and panel_images is not None and world.rank == 0:
            images, names = panel_images
            panel = training_panel(
                model,
                None if teacher is None else teacher.module,
                images,
                names,
                masks,
                mean=args.mean,
                std=args.std,
                feature_target=feature_target if model.target_dim is not None else None,
                epochs_done=loop.epoch,
                seed=args.seed,
            )
            loop.logger.image("panel", panel, loop.epoch)
    loop.close()


if __name__ == "__main__":
    main()
