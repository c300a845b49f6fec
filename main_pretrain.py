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
from util.data.transforms import IMAGENET_MEAN, IMAGENET_STD, RandomCrop, ToModelInput
from util.ema import EMATeacher
from util.run import distributed, options, resolve
from util.run.checkpoint import Run
from util.run.folder import run_folder
from util.run.logger import log
from util.run.loop import Loop
from util.run.pretrain_options import FIXED, PANELS, add_pretraining_options
from util.run.splits import read_pretraining
from util.schedules import ema_decay_at, slow_teacher
from util.weights.load import DECODERS, fingerprint, load_into, load_pretrained
from visualize.panel import pick_panel_images, training_panel

SCRIPT = "main_pretrain"


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser((__doc__ or "").split("\n")[0])
    options.add_training_options(parser, batch_size=64, epochs=400, warmup_epochs=40)
    options.add_data_options(parser, num_workers=8, splits=("train",))
    options.add_device_options(parser)
    add_pretraining_options(parser, list(models_hpm.MODELS))
    return parser


def resolve_options(args: argparse.Namespace, world: distributed.World) -> argparse.Namespace:
    """Fill in what follows from other options, and reject impossible settings.

    Raises:
        ValueError: options that contradict each other.
    """
    args = copy.copy(args)
    resolve.resolve_training(args, world, warmup_epochs=40, num_workers=8)
    args.origins = {name: "option" if getattr(args, name) else "default" for name in ("mean", "std", "value_range")}
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
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    predictor = "none"
    if args.learning_loss:
        predictor = "relative" if args.relative else "absolute"
    log.info(
        "data      %s: %s images, %d steps per epoch", resolve.data_name(args), f"{num_images:,}", args.steps_per_epoch
    )
    log.info("model     %s, %.1f M trainable parameters", args.model, trained / 1e6)
    log.info("patches   %d x %d of %d pixels, %d masked", *masks.grid_size, args.patch_size, masks.num_masked)
    log.info("target    %s, loss predictor %s, masks %s", args.target, predictor, args.mask_strategy)
    if masks.num_hidden:
        seen = masks.num_patches - masks.num_hidden
        log.info("teacher   sees %d patches, scores the other %d by %s", seen, masks.num_hidden, args.score_by)
    resolve.describe(get_args_parser(), args)


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
        source, held_out = read_pretraining(args)
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
            limits = {"value_range": args.value_range, "max_image_pixels": args.max_image_pixels}
            panel_images = distributed.from_rank_zero(
                lambda: pick_panel_images(args.data_path, source, args.input_size, args.cache_dir, held_out, **limits)
            )

    # Model, teacher, optimizer
    rng.seed_all(args.seed)
    model = build_model(args).to(device)
    amp.choose_attention(model)
    masks = masking.MaskSampler.from_options(vars(args), model.patch_embed.grid_size)
    describe(args, len(source), model, masks)
    ema = (args.ema_decay, args.ema_decay_final, args.ema_ramp_epochs)
    mining = masks.num_hardest(0) > 0 or masks.num_hardest(args.epochs - 1) > 0
    if (mining or args.target == "ema") and (warning := slow_teacher(args.steps_per_epoch, args.epochs, *ema)):
        log.warning("%s", warning)
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
        ema_decay = ema_decay_at(epoch, *ema)
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
