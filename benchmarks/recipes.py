"""What recipes resolve to, and how much they compute.

    python -m benchmarks.recipes recipes/pretrain_hpm_base_200.sh recipes/finetune_hpm_base_200.sh

One row for each script of a recipe: its most important options as the script resolves them on eight GPUs, and images x
epochs x multiply-accumulates of the matrix products and convolutions. Training counts the forward and backward pass, a
linear probe and k-NN the forward pass. Evaluation during training is not counted. 1 GMAC is 1e9 multiply-accumulates,
1 EMAC 1e18.
"""

import argparse
import importlib
import os
import shlex
import subprocess
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import main_finetune
import main_knn
import main_segment
import models_teacher
from benchmarks.trainer import step_flops
from util.run import options
from util.run.distributed import World
from util.run.logger import log, setup_logging

TRAIN_IMAGES, VAL_IMAGES = 1_281_167, 50_000  # ImageNet-1K


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser((__doc__ or "").split("\n")[0])
    parser.add_argument("recipes", nargs="+", help="recipe files")
    return parser


def commands(recipe: Path, **environment: str) -> list[list[str]]:
    """The command lines of a recipe: script and options of each."""
    settings = {"DATA": "/imagenet", "OUT": "/out", "DRY": "1"}
    done = subprocess.run(
        ["bash", str(recipe)], env=os.environ | settings | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ValueError(f"{recipe}: {done.stderr.strip()}")
    return [shlex.split(line) for line in done.stdout.splitlines()]


def resolve(script: str, words: list[str], processes: int = 8) -> argparse.Namespace:
    """The options of a command as its script resolves them, without the checkpoint that an earlier recipe leaves."""
    module = importlib.import_module(script.removesuffix(".py"))
    if "--finetune" in words:
        at = words.index("--finetune")
        words = words[:at] + words[at + 2 :]
    world = World(rank=0, size=processes, local_rank=0, local_size=processes)
    return module.resolve_options(module.get_args_parser().parse_args(words), world)


def describe(script: str, args: argparse.Namespace) -> str:
    """The options that make a recipe what it is, in the words of the command line."""
    if script == "main_knn.py":
        return f"{args.model}, k {', '.join(map(str, args.nb_knn))}, T {args.temperature:g}"
    lr = args.lr[0] if isinstance(args.lr, list) else args.lr
    if script == "main_segment.py":
        text = f"{args.head}, {args.model}, {args.steps} steps, batch {args.global_batch}, lr {lr:g}, crop {args.crop}"
        return f"{text}, layer_decay {args.layer_decay:g}, drop_path {args.drop_path:g}"
    text = f"{args.model}, {args.epochs} epochs, batch {args.global_batch}, lr {lr:g}"
    if script == "main_pretrain.py":
        predictor = args.predictor_loss if args.learning_loss else "none"
        masks = "block" if args.mask_block else "regular" if args.mask_regular else args.mask_strategy
        if args.predictor_depth:
            predictor += f" of {args.predictor_depth} blocks"
        text += f", target {args.target}, predictor {predictor}, masks {masks} {args.mask_ratio:g}"
        if args.teacher_keep < 1:
            text += f", teacher_keep {args.teacher_keep:g}, score_by {args.score_by}"
        text += f", clip_grad {args.clip_grad:g}"
    if script == "main_finetune.py":
        text += f", layer_decay {args.layer_decay:g}, drop_path {args.drop_path:g}"
    if script == "main_linprobe.py":
        text += f", {args.optimizer}"
    return text


def macs_per_image(script: str, args: argparse.Namespace) -> float:
    """Multiply-accumulates of the matrix products for one image: forward and backward pass, or the forward pass alone
    where the encoder is frozen. Counted by PyTorch from shapes."""
    if script == "main_pretrain.py":
        flops: float = step_flops(args, 1)
        if args.target in models_teacher.KINDS:
            with torch.device("meta"):
                network = timm.create_model(models_teacher.KINDS[args.target].timm_name, pretrained=False)
            flops += _count(network, train=False)
    elif script == "main_finetune.py":
        with torch.device("meta"):
            flops = _count(main_finetune.build_model(args, num_classes=1000), train=True)
    elif script == "main_segment.py":
        args = argparse.Namespace(**{**vars(args), "nb_classes": 150})  # of ADE20K
        flops = _count(main_segment.build_model(args, torch.device("meta")), train=True, size=args.crop)
    else:
        with torch.device("meta"):
            flops = _count(main_knn.build_model(args), train=False)
    return flops / 2


def _count(model: nn.Module, train: bool, size: int = 224) -> float:
    """Floating-point operations of a model on the meta device for one image. The fused attention is excluded, since its
    backward pass recomputes a product."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        outputs = model(torch.empty(2, 3, size, size, device="meta"))  # batch norm needs more than one value
        if train:
            sum(output.sum() for output in (outputs if isinstance(outputs, tuple) else [outputs])).backward()
    return counter.get_total_flops() / 2


def compute(script: str, args: argparse.Namespace) -> str:
    """1,281,167 images x 200 epochs x 67.9 GMAC = 17.4 EMAC"""
    macs = macs_per_image(script, args)
    if script == "main_knn.py":
        images = TRAIN_IMAGES + VAL_IMAGES
        return f"{images:,} images x {macs / 1e9:.1f} GMAC = {images * macs / 1e18:.3g} EMAC"
    if script == "main_segment.py":
        total = args.steps * args.global_batch * macs / 1e18
        return f"{args.steps:,} steps x {args.global_batch} images x {macs / 1e9:.1f} GMAC = {total:.3g} EMAC"
    total = TRAIN_IMAGES * args.epochs * macs / 1e18
    return f"{TRAIN_IMAGES:,} images x {args.epochs} epochs x {macs / 1e9:.1f} GMAC = {total:.3g} EMAC"


def main(argv: list[str] | None = None) -> None:
    with options.user_mistakes():
        given = get_args_parser().parse_args(argv)
        setup_logging(enabled=True)
        rows = []
        for recipe in map(Path, given.recipes):
            for script, *words in commands(recipe):
                args = resolve(script, words)
                rows.append([recipe.name, describe(script, args), compute(script, args)])
    for row in [["recipe", "resolves to", "compute"], ["---"] * 3, *rows]:
        log.info("| %s |", " | ".join(row))


if __name__ == "__main__":
    main()
