"""What follows from options: values that depend on others, on the number of processes, or on a checkpoint."""

import argparse
import logging
import os
from collections.abc import Iterable
from typing import Any

import torch

from util.data.files import summarize
from util.data.transforms import check_statistics
from util.masking import STRATEGIES
from util.run.distributed import World
from util.run.options import OptionParser
from util.weights.meta import DEFAULTS, settings_of

log = logging.getLogger("hpm")


def fill_in(given: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Set the options that were not given to these values, in place."""
    for name, value in defaults.items():
        if getattr(given, name) is None:
            setattr(given, name, value)


def resolve_settings(given: argparse.Namespace, meta: dict[str, Any], names: Iterable[str] = tuple(DEFAULTS)) -> None:
    """Fill in model, sizes and image statistics that were not given, in place: from a checkpoint's metadata
    (`read_meta`), else the defaults. `origins` then tells which: "option", "checkpoint" or "default".

    Args:
        names: of the settings, `mean` and `std` among them.

    Raises:
        ValueError: mean or standard deviation outside 0..1.
    """
    recorded = settings_of(meta)
    given.origins = {}
    for name in names:
        if getattr(given, name, None) is not None:
            given.origins[name] = "option"
        elif recorded.get(name) is not None:
            given.origins[name] = "checkpoint"
            setattr(given, name, recorded[name])
        else:
            given.origins[name] = "default"
            setattr(given, name, DEFAULTS[name])
    if {given.origins["mean"], given.origins["std"]} != {"default"}:
        check_statistics(given.mean, given.std)


def reject_changes(
    given: argparse.Namespace, parser: argparse.ArgumentParser, recorded: dict[str, Any], names: Iterable[str]
) -> None:
    """Reject options of an evaluation that differ from its checkpoint.

    Raises:
        ValueError: another value was given.
    """
    for name in names:
        value, trained = getattr(given, name), recorded.get(name)
        if name in recorded and value not in (parser.get_default(name), trained):
            raise ValueError(f"--eval: --{name} is {value}, the checkpoint was trained with {trained}: omit the option")


def resolve_which(given: argparse.Namespace) -> None:
    """Resolve --which from the official --teacher, in place.

    Raises:
        ValueError: they contradict each other.
    """
    if given.teacher and given.which == "student":
        raise ValueError("--teacher means --which ema, which contradicts --which student")
    given.which = "ema" if given.teacher else given.which or "student"


def evaluation_crop(input_size: int, recorded: dict[str, Any]) -> float:
    """The default of --crop_pct: the recorded one if it was for images of this size, else MAE's.

    Args:
        recorded: options of the checkpoint that is evaluated or resumed; {} without one.
    """
    same = recorded.get("input_size") == input_size
    return (recorded.get("crop_pct") if same else None) or (224 / 256 if input_size <= 224 else 1.0)


def resolve_workers(given: argparse.Namespace, world: World, official: int) -> None:
    """Data loading workers: as given, or the official number limited by the CPU cores of each process, in place."""
    if given.num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        given.num_workers = min(official, max(1, cores // world.local_size))


def resolve_training(given: argparse.Namespace, world: World, *, warmup_epochs: int, num_workers: int) -> None:
    """Batch, schedule and workers of a training run, in place.

    Args:
        warmup_epochs, num_workers: the official defaults. The warm-up is capped, so that no default is an error.

    Raises:
        ValueError: options that contradict each other, or leave nothing to train.
    """
    per_step = given.batch_size * world.size
    if given.global_batch is None:
        given.global_batch = per_step * (given.accum_iter or 1)
    elif given.accum_iter is not None:
        raise ValueError(f"--global_batch {given.global_batch} sets --accum_iter: give one of the two, not both")
    elif given.global_batch % per_step:
        fix = f"change --batch_size to a divisor of {given.global_batch // world.size}"
        if given.global_batch % world.size:
            fix = f"give a --global_batch that is a multiple of {world.size}"
        raise ValueError(
            f"--global_batch {given.global_batch} is not a multiple of --batch_size {given.batch_size} x {world.size} "
            f"processes: {fix}"
        )
    given.accum_iter = given.global_batch // per_step
    given.processes = world.size
    if given.warmup_epochs is None:
        given.warmup_epochs = min(warmup_epochs, given.epochs // 5)
    elif given.warmup_epochs >= given.epochs and given.warmup_epochs > 0:
        raise ValueError(f"--warmup_epochs {given.warmup_epochs:g} must be less than --epochs {given.epochs}")
    if given.start_epoch >= given.epochs:
        raise ValueError(f"--start_epoch {given.start_epoch} must be less than --epochs {given.epochs}")
    resolve_workers(given, world, num_workers)


def resolve_method(given: argparse.Namespace, networks: Iterable[str]) -> None:
    """The reconstruction target, the objective of the predictor, both from their official names too, the mask strategy,
    and what the EMA teacher sees, in place.

    Args:
        networks: targets that are features of a frozen network, whose file --NETWORK_path names.

    Raises:
        ValueError: two targets, objectives or mask options at once, a path that belongs to another target, a strategy
            that needs a loss predictor without one, or options of the predictor or the teacher that do not go with the
            target or the masks.
    """
    named = {"--target": given.target}
    if given.norm_pix_loss:
        named["--norm_pix_loss"] = "norm_pixel"
    if given.learn_feature_loss != "none":
        named["--learn_feature_loss"] = given.learn_feature_loss
    named = {option: target for option, target in named.items() if target is not None}
    if len(set(named.values())) > 1:
        raise ValueError(f"{' and '.join(named)} name different targets ({', '.join(named.values())}): give one")
    given.target = next(iter(named.values()), "pixel")
    given.teacher_path = ""
    for network in networks:
        path = getattr(given, f"{network}_path")
        if path != "none" and given.target != network:
            raise ValueError(f"--{network}_path is for --target {network}, the target is {given.target}")
        if path != "none":
            given.teacher_path = path

    if given.predictor_loss is not None and not given.learning_loss:
        raise ValueError("--predictor_loss is for the loss predictor: omit it, or omit --no-learning_loss")
    official = {None: None, True: "relative", False: "absolute"}[given.relative]
    if official and given.predictor_loss not in (None, official):
        name = "--relative" if given.relative else "--no-relative"
        raise ValueError(f"{name} and --predictor_loss {given.predictor_loss} name different losses: give one")
    given.predictor_loss = given.predictor_loss or official or "relative"
    given.relative = given.predictor_loss == "relative"

    for name in ("knn_data_path", "knn_k", "knn_global_pool"):
        if getattr(given, name) is not None and not given.knn_interval:
            raise ValueError(f"--{name} is for k-NN during training: give --knn_interval N, or omit it")
    if given.knn_interval:
        fill_in(given, {"knn_k": 20, "knn_global_pool": False})

    if given.mask_block and given.mask_regular:
        raise ValueError("--mask_block and --mask_regular are two mask patterns: give one")
    pattern = given.mask_block or given.mask_regular
    if pattern and given.mask_strategy not in (None, "random"):
        name = "--mask_block" if given.mask_block else "--mask_regular"
        raise ValueError(f"{name} and --mask_strategy {given.mask_strategy} both choose the masks: give one")
    by_loss = given.score_by == "loss"
    if given.mask_strategy is None:
        given.mask_strategy = "easy_to_hard" if (given.learning_loss or by_loss) and not pattern else "random"
    if given.mask_strategy != "random" and not (given.learning_loss or by_loss):
        raise ValueError(
            f"--mask_strategy {given.mask_strategy} needs the loss predictor: omit --no-learning_loss, or give "
            "--score_by loss"
        )

    strategy = STRATEGIES[given.mask_strategy]
    for name, default in (("alpha_0", 0.0), ("alpha_T", 0.5)):
        if getattr(given, name) is None:
            setattr(given, name, default)
        elif name not in (strategy.start, strategy.end):
            masks = "a mask pattern" if pattern else f"--mask_strategy {given.mask_strategy}"
            raise ValueError(f"--{name} has no effect with {masks}: omit it")

    if given.predictor_depth is not None and not given.learning_loss:
        raise ValueError("--predictor_depth is for the loss predictor: omit it, or omit --no-learning_loss")
    if given.mask_strategy == "random" and (by_loss or given.teacher_keep not in (None, 1.0)):
        name = "--score_by loss" if by_loss else "--teacher_keep"
        raise ValueError(f"{name} is for masks chosen by score, and the masks are random: omit it")
    if by_loss and given.teacher_keep == 1:
        raise ValueError("--score_by loss needs patches hidden from the teacher: give --teacher_keep below 1")
    if given.teacher_keep is None:
        given.teacher_keep = 1 - given.mask_ratio if by_loss else 1.0
    if given.teacher_keep < 1 and given.target == "ema":
        name = "--score_by loss" if by_loss else "--teacher_keep"
        raise ValueError(f"--target ema needs the teacher's features of the whole image: omit {name}")


def resolve_val_fraction(given: argparse.Namespace, recorded: dict[str, Any]) -> None:
    """--val_fraction of an evaluation, in place: the recorded one if none is given.

    Args:
        recorded: options of the checkpoint that is evaluated or resumed; {} without one.
    """
    given.val_split = recorded.get("val_split")
    given.origins["val_fraction"] = "option"
    if given.eval and given.val_fraction is None:
        given.val_fraction, given.origins["val_fraction"] = recorded.get("val_fraction"), "checkpoint"


def describe(parser: OptionParser, given: argparse.Namespace, images: str = "") -> None:
    """Log what all scripts have in common: the data, the arithmetic of the batch, the schedule, the device, ignored
    options.

    Args:
        images: numbers of images, for the log; "" where the script logs its data itself.
    """
    if images:
        path = "Shapes, images drawn by the program (no --data_path was given)"
        if given.data_path is not None:
            path = given.data_path if isinstance(given.data_path, str) else summarize(given.data_path)
        log.info("data      %s: %s", path, images)
    if "processes" in given and not getattr(given, "eval", False):
        processes = "1 process" if given.processes == 1 else f"{given.processes} processes"
        log.info(
            "batch     %d = --batch_size %d x --accum_iter %d x %s",
            given.global_batch,
            given.batch_size,
            given.accum_iter,
            processes,
        )
        lr = ", ".join(f"{lr:.3g}" for lr in (given.lr if isinstance(given.lr, list) else [given.lr]))
        log.info("schedule  lr %s, %g warm-up epochs, %d epochs in total", lr, given.warmup_epochs, given.epochs)
    statistics = []
    for name in ("mean", "std", "value_range"):
        value = getattr(given, name)
        text = "by image" if value is None else " ".join(f"{number:g}" for number in value)
        statistics.append(f"{name} {text} ({given.origins[name]})")
    log.info("pixels    %s", ", ".join(statistics))
    compiled = ", compiled" if given.compile else ""
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    log.info("compute   %s, %s%s, %s", given.device, given.precision, compiled, threads)
    if ignored := [f"--{name}" for name in parser.ignored if getattr(given, name) is not None]:
        log.info("ignored options: %s", ", ".join(ignored))
