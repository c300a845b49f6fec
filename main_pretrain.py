"""Pre-train HPM, or with --no-learning_loss the MAE baseline.

    python main_pretrain.py --model mae_vit_tiny_patch16 --input_size 64 --patch_size 8 --epochs 20
    torchrun --nproc_per_node=8 main_pretrain.py --data_path /imagenet --global_batch 2048 --epochs 200

Without --data_path it trains on Shapes, images that it draws itself. PRETRAIN.md has the commands for ImageNet.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record

import models_hpm
import models_load
import models_teacher
from engine_finetune import extract_splits, knn_accuracy
from engine_pretrain import train_one_epoch
from util import knn, masking, rng
from util.data.classes import needed_outputs
from util.data.datasets import ImageDataset
from util.data.loader import EpochSampler, build_loader
from util.data.sources import Source
from util.data.transforms import CenterCrop, RandomCrop, ToModelInput
from util.ema import EMATeacher
from util.run import distributed, options, resolve
from util.run.amp import Amp
from util.run.checkpoint import Run, read_resumed
from util.run.folder import run_folder
from util.run.logger import log
from util.run.loop import Loop
from util.run.pretrain_options import FIXED, PANELS, add_pretraining_options
from util.run.splits import knn_loaders, read_knn_splits, read_pretraining
from util.schedules import ema_decay_at, slow_teacher
from util.targets import PIXEL_TARGETS
from util.weights.load import DECODERS, fingerprint, load_into, load_pretrained, log_loaded, read_meta
from util.weights.meta import classifier_name
from visualize.panel import pick_panel_images, training_panel

SCRIPT = "main_pretrain"
WARMUP_EPOCHS, NUM_WORKERS = 40, 8  # defaults
SIZE_OPTIONS = ("patch_size", "decoder_embed_dim", "decoder_depth", "decoder_num_heads", "predictor_depth")


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser((__doc__ or "").split("\n")[0])
    options.add_training_options(parser, batch_size=64, epochs=400, warmup_epochs=WARMUP_EPOCHS)
    options.add_data_options(parser, num_workers=NUM_WORKERS, splits=("train",))
    options.add_device_options(parser)
    add_pretraining_options(parser, list(models_hpm.MODELS), models_teacher.TARGETS, models_teacher.FILES)
    return parser


def resolve_options(args: argparse.Namespace, world: distributed.World) -> argparse.Namespace:
    """Fill in what follows from other options and from the checkpoint, and reject impossible settings.

    Raises:
        ValueError: options that contradict each other, or a checkpoint that cannot be read.
    """
    args = copy.copy(args)
    resolve.resolve_training(args, world, warmup_epochs=WARMUP_EPOCHS, num_workers=NUM_WORKERS)
    folder = run_folder(args.output_dir, args.experiment, SCRIPT)
    meta = read_resumed(folder, args.resume, args.auto_resume)
    meta = meta or (read_meta(args.load_from) if args.load_from else {})
    resolve.resolve_settings(args, meta, ("mean", "std", "value_range"))
    if args.vis_interval is None:
        args.vis_interval = -(-args.epochs // PANELS)
    if args.lr is None:
        args.lr = args.blr * args.global_batch / 256
    resolve.resolve_method(args, models_teacher.KINDS)

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
    masks = masking.MaskSampler.from_options(vars(args), grid)  # checks ratio, pattern and grid
    if masks.num_hidden and max(masks.num_hardest) == 0:
        name = "--score_by loss" if args.score_by == "loss" else f"--teacher_keep {args.teacher_keep:g}"
        raise ValueError(f"{name} is for masks chosen by score, and no patch is: omit it, or give a higher --alpha_T")
    if masks.num_hidden == max(masks.num_hardest) > 0:
        raise ValueError(
            f"the teacher scores {masks.num_hidden} of {masks.num_patches} patches, and up to as many are masked by "
            "score, which is a random mask: give a lower --teacher_keep, or another --mask_strategy or --alpha_T"
        )
    return args


def build_model(args: argparse.Namespace) -> models_hpm.MaskedAutoencoderViT:
    widths = {kind: teacher.width for kind, teacher in models_teacher.KINDS.items()}
    widths["ema"] = models_hpm.SIZES[args.model]["embed_dim"]
    replaced = {name: getattr(args, name) for name in SIZE_OPTIONS if getattr(args, name) is not None}
    model = models_hpm.MODELS[args.model](
        img_size=args.input_size,
        pixel_target=args.target if args.target in PIXEL_TARGETS else None,
        vis_mask_ratio=args.vis_mask_ratio,
        learning_loss=args.learning_loss,
        predictor_loss=args.predictor_loss,
        target_dim=widths.get(args.target),
        score_by=args.score_by,
        **replaced,
    )
    model.grad_checkpointing = args.grad_checkpointing
    return model


def build_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    groups = param_groups_weight_decay(model, args.weight_decay)
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def evaluate_knn(
    args: argparse.Namespace,
    world: distributed.World,
    device: torch.device,
    amp: Amp,
    weights: dict[str, Tensor],
    sources: dict[str, Source],
) -> dict[str, float]:
    """k-NN accuracy of the encoder with these weights. Training is unaffected: the encoder is a copy, and the random
    numbers of each micro-batch are seeded anew."""
    shape = (classifier_name(args.model), args.input_size, args.patch_size)
    encoder, _ = models_load.build_encoder(weights, *shape, global_pool=args.knn_global_pool, path="the student")
    amp.choose_attention(encoder.to(device))
    crop = CenterCrop(args.input_size, resolve.evaluation_crop(args.input_size, {}))
    features = extract_splits(
        lambda images: F.normalize(encoder(images).float(), dim=-1),
        knn_loaders(args, sources, crop, world),
        sources,
        amp,
        ToModelInput(args.mean, args.std, device, flip=False),
        encoder.embed_dim,
        world.size,
    )
    mine = slice(world.rank, None, world.size)  # each rank takes its share of the queries
    outputs = needed_outputs(sources["train"])
    accuracy = knn_accuracy(features, [args.knn_k], knn.TEMPERATURE, outputs, device, mine)
    top1, top5 = accuracy[args.knn_k]
    log.info("%d-NN  top-1 %.2f  top-5 %.2f", args.knn_k, top1, top5)
    return {"knn_acc1": top1, "knn_acc5": top5}


def describe(
    args: argparse.Namespace, num_images: int, model: models_hpm.MaskedAutoencoderViT, masks: masking.MaskSampler
) -> None:
    """The start of the log: what will be trained, on what, and how."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    predictor = args.predictor_loss if args.learning_loss else "none"
    log.info("model     %s, %.1f M trainable parameters", args.model, trained / 1e6)
    log.info("patches   %d x %d of %d pixels, %d masked", *masks.grid_size, args.patch_size, masks.num_masked)
    log.info("target    %s, loss predictor %s, masks %s", args.target, predictor, args.mask_strategy)
    if masks.num_hidden:
        seen = masks.num_patches - masks.num_hidden
        log.info("teacher   sees %d patches, scores the other %d by %s", seen, masks.num_hidden, args.score_by)
    resolve.describe(get_args_parser(), args, f"{num_images:,} images, {args.steps_per_epoch} steps per epoch")


@record
def main(argv: list[str] | None = None) -> None:
    # Options and paths: mistakes end here, before a model is built.
    with options.user_mistakes():
        world = distributed.read_environment()
        args = resolve_options(get_args_parser().parse_args(argv), world)
        device, amp = distributed.setup(world, args.device, args.precision, args.dist_timeout)
        args.device, args.precision = device.type, amp.name
        run = Run(run_folder(args.output_dir, args.experiment, SCRIPT), SCRIPT, args.resume, args.auto_resume)
        source, held_out = read_pretraining(args)
        sampler = EpochSampler(len(source), args.batch_size, args.accum_iter, world.rank, world.size, args.seed)
        args.steps_per_epoch = sampler.num_batches // args.accum_iter
        weights = load_pretrained(args.load_from) if args.load_from and run.state is None else None
        sizes = models_hpm.SIZES[args.model]
        args.initial = run.check(
            vars(args),
            FIXED,
            args.load_from,
            lambda: fingerprint(weights or load_pretrained(args.load_from)),
            defaults={**sizes, "predictor_depth": args.decoder_depth or sizes["decoder_depth"]},
        )
        has_teacher = args.learning_loss or args.score_by == "loss" or args.target == "ema"
        if has_teacher and run.state is not None and run.state.get("ema_state_dict") is None:
            raise ValueError(
                f"{run.path} has no EMA teacher, which --score_by loss needs: omit it to resume the run, or choose "
                "another --output_dir for a new run"
            )
        if not has_teacher and run.state is not None and run.state.get("ema_state_dict") is not None:
            raise ValueError(
                f"{run.path} has an EMA teacher, which this run would lose: give --score_by loss to resume it, or "
                "choose another --output_dir for a new run"
            )
        frozen = None
        if args.target in models_teacher.KINDS:
            teacher_weights = models_teacher.read_teacher(args.teacher_path)
            frozen, summary = models_teacher.build_teacher(args.target, teacher_weights, args.mean, args.std)
            frozen = frozen.to(device)
            log.info("teacher   %s\n%s", args.target, summary)
        knn_sources = read_knn_splits(args) if args.knn_interval else None
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
    mining = max(masks.num_hardest) > 0
    if (mining or args.target == "ema") and (warning := slow_teacher(args.steps_per_epoch, args.epochs, *ema)):
        log.warning("%s", warning)
    if weights is not None:
        with options.user_mistakes():
            report = load_into(model, weights, allow_missing=DECODERS, allow_unexpected=("head.", "fc_norm."))
        log_loaded(args.load_from, report)
    student = distributed.wrap_ddp(model, device) if world.size > 1 else model
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
        done = epoch + 1
        if knn_sources is not None and (done % args.knn_interval == 0 or done == args.epochs):
            loop.save_mid_epoch()
            metrics |= evaluate_knn(args, world, device, amp, model.state_dict(), knn_sources)
        if teacher is not None:
            num_hardest = masks.num_hardest[epoch]
            metrics |= {
                "ema_decay": ema_decay,
                "num_hardest": num_hardest,
                "hard_ratio": num_hardest / masks.num_masked,
            }
        loop.end_epoch(stats, metrics)
        if panel_images is not None and (done % args.vis_interval == 0 or done == args.epochs) and world.rank == 0:
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
                epochs_done=done,
                seed=args.seed,
            )
            loop.logger.image("panel", panel, done)
    loop.close()


if __name__ == "__main__":
    main()
