"""Command-line options that several scripts share, and how a mistake in them ends.

A mistake is a `ValueError` (or an `OSError` of a path) before training starts: the scripts show it in a line or two on
standard error, on rank 0, and end with status 2, with neither usage text nor traceback.
"""

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

# Official options that mean nothing here: torchrun says what the first four said, the fifth named an in-house loader.
LAUNCHER_OPTIONS = ("world_size", "local_rank", "dist_on_itp", "dist_url", "dataloader_type")


class Refused(SystemExit):
    """End of a script over a user's mistake: status 2, the message already written."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message
        if os.environ.get("RANK", "0") == "0":
            program = sys.argv[0].removesuffix("/__main__.py")  # of python -m export
            sys.stderr.write(f"{os.path.basename(program)}: error: {message}\n")


class OptionParser(argparse.ArgumentParser):
    """argparse without abbreviations, that answers a mistake in one line with the nearest name."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        self.without_effect: list[str] = []

    def accept_without_effect(self, *names: str) -> None:
        """Accept official options that nothing reads, with a value or without, so that documented commands work."""
        for name in names:
            spellings = {f"--{name}", f"--{name.replace('_', '-')}"} if name == "local_rank" else {f"--{name}"}
            self.add_argument(*sorted(spellings), nargs="?", const=True, help="accepted without effect")
            self.without_effect.append(name)

    def given_without_effect(self, options: dict[str, Any]) -> list[str]:
        """Which of these the user gave, to be reported."""
        return [f"--{name}" for name in self.without_effect if options.get(name) is not None]

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:"):
            known = list(self._option_string_actions)
            for word in message.split(":", 1)[1].split():
                near = difflib.get_close_matches(word.split("=")[0], known, n=1)
                message += f"; did you mean {near[0]}?" if near else ""
        raise Refused(message)


@contextmanager
def user_mistakes() -> Iterator[None]:
    """Around everything before training: a ValueError or OSError in here is the user's; it ends the script politely."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise Refused(str(error)) from error


def number(
    kind: type, low: float = -math.inf, high: float = math.inf, above: float = -math.inf, below: float = math.inf
) -> Callable[[str], Any]:
    """An argparse type: a finite number with low <= it <= high and above < it < below."""
    article = {int: "a whole number", float: "a number"}[kind]
    bounds = [f"above {above:g}"] * (above > -math.inf) + [f"of {low:g} or more"] * (low > -math.inf)
    bounds += [f"below {below:g}"] * (below < math.inf) + [f"of {high:g} or less"] * (high < math.inf)

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high and above < value < below):
            raise argparse.ArgumentTypeError(f"{text!r} is not {article} {' and '.join(bounds)}".rstrip())
        return value

    return parse


COUNT = number(int, low=1)
COUNT_OR_ZERO = number(int, low=0)
SHARE = number(float, low=0, high=1)
NOT_NEGATIVE = number(float, low=0)
POSITIVE = number(float, above=0)
MINUTES = number(float, above=0, high=60 * 24 * 365)
SEED = number(int, low=0, high=2**63 - 1)


def one_of(names: list[str], what: str) -> Callable[[str], str]:
    """An argparse type: one of `names`, with the nearest of them suggested."""

    def parse(text: str) -> str:
        if text not in names:
            near = difflib.get_close_matches(text, names, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentTypeError(f"there is no {what} {text!r}{hint} (known: {', '.join(names)})")
        return text

    return parse


def add_switch(group: argparse._ArgumentGroup, name: str, default: bool, help: str) -> None:
    """A boolean that can be switched on and off: --NAME, --no-NAME."""
    group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default, help=help)


def add_data_options(parser: OptionParser, *, num_workers: int, splits: tuple[str, ...] = ("train", "val")) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path",
        help="folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or with train.txt and val.txt (lines of PATH LABEL), "
        "or with train.tar and val.tar; or one .tar or .tar.gz of such a tree. Left out: Shapes, images that the "
        "program draws itself, which need no file",
    )
    for split, count, use in (("train", 2000, "train"), ("val", 500, "validate")):
        if split in splits:
            help = f"without --data_path: images to {use} on"
            group.add_argument(f"--shapes_{split}", type=COUNT, default=count, help=help)
    group.add_argument("--cache_dir", help="where a .tar.gz is decompressed, once; default ~/.cache/hpm")
    group.add_argument(
        "--mean", type=number(float), nargs=3, help="mean colour, 0 to 1; default: the checkpoint's, or ImageNet's"
    )
    group.add_argument("--std", type=POSITIVE, nargs=3, help="its standard deviation; default likewise")
    group.add_argument(
        "--num_workers",
        type=COUNT_OR_ZERO,
        help=f"processes that load images, per process that trains; default {num_workers}, or the CPU cores there are. "
        "One core decodes about 800 full-size photographs a second; raise it while the log says 'waiting for data'",
    )
    add_switch(group, "pin_mem", True, "copy batches to the GPU from pinned memory")
    group.add_argument("--no_pin_mem", dest="pin_mem", action="store_false", help=argparse.SUPPRESS)


def add_run_options(parser: OptionParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default="./output_dir", help="folder of the run: checkpoints, log, options")
    group.add_argument("--experiment", default="", help="name of a subfolder of --output_dir for this run")
    group.add_argument("--log_dir", help="folder of the TensorBoard events; default: the run's folder")
    group.add_argument("--resume", default="", help="checkpoint to go on from; the run's own newest one comes first")
    add_switch(group, "auto_resume", True, "go on from the newest checkpoint in the run's folder")
    group.add_argument("--start_epoch", type=COUNT_OR_ZERO, default=0, help="epoch to begin a new run at, from 0")
    group.add_argument("--save_interval", type=COUNT, default=100, help="keep a checkpoint every so many epochs")
    group.add_argument("--save_every_minutes", type=MINUTES, help="save inside an epoch, too, every so many minutes")
    group.add_argument("--log_interval", type=COUNT, default=20, help="steps between two lines of the log")
    group.add_argument("--max_steps", type=COUNT, help="end after so many optimizer steps in all, to try a recipe out")
    group.add_argument("--seed", type=SEED, default=0, help="seed of weights, order, augmentation and masks")
    group.add_argument(
        "--max_bad_steps",
        type=COUNT_OR_ZERO,
        default=10,
        help="steps with a loss or gradient that is not finite are skipped; end after more than so many in a row",
    )
    group.add_argument(
        "--max_bad_images",
        type=COUNT_OR_ZERO,
        default=100,
        help="training images that cannot be read are replaced and listed in bad_images.txt; end after more than these",
    )
    add_switch(group, "strict_images", False, "end at the first training image that cannot be read")


def add_device_options(parser: OptionParser) -> None:
    group = parser.add_argument_group("device")
    group.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    group.add_argument(
        "--precision",
        choices=["fp32", "bf16", "fp16"],
        help="default: bf16 where the GPU has it, fp16 on older ones, fp32 on the CPU",
    )
    add_switch(group, "compile", False, "compile the model with torch.compile: minutes to start, then faster")
    group.add_argument("--dist_timeout", type=MINUTES, default=30, help="minutes a process waits for the others")
    parser.accept_without_effect(*LAUNCHER_OPTIONS)


def add_classifier_options(parser: OptionParser, models: list[str]) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--finetune",
        default="",
        help="weights to begin with: a checkpoint of this project, of HPM, of MAE (pre-trained or fine-tuned) or of "
        "timm, a .safetensors file or a Hugging Face folder; left out: random weights",
    )
    group.add_argument(
        "--which",
        choices=["student", "ema"],
        help="weights of an HPM checkpoint: the student's (default) or the EMA teacher's",
    )
    group.add_argument("--teacher", action="store_true", help="the official name of --which ema")
    group.add_argument(
        "--model",
        type=one_of(models, "model"),
        help="size; default: what the checkpoint says, or vit_base_patch16 where it does not say",
    )
    group.add_argument("--input_size", type=COUNT, help="side of the images; default: the checkpoint's, or 224")
    group.add_argument("--patch_size", type=COUNT, help="side of a patch; default: the checkpoint's, or the model's")
    group.add_argument(
        "--nb_classes", type=COUNT, help="number of classes; default: as many as the data have. More are allowed"
    )


def resolve_which(which: str | None, teacher: bool) -> str:
    """student or ema, from --which and the official --teacher.

    Raises:
        ValueError: they contradict each other.
    """
    if teacher and which == "student":
        raise ValueError("--teacher is --which ema, which contradicts --which student")
    return "ema" if teacher else which or "student"


def fill_in(given: argparse.Namespace, defaults: dict[str, Any]) -> None:
    """Options that were left out, from what else is known of them, in place."""
    for name, value in defaults.items():
        if getattr(given, name) is None:
            setattr(given, name, value)


def add_pooling_options(group: argparse._ArgumentGroup, default: bool) -> None:
    add_switch(group, "global_pool", default, "take the mean of the patch tokens")
    group.add_argument("--cls_token", dest="global_pool", action="store_false", help="take the class token")


def add_batch_options(parser: OptionParser, *, batch_size: int, epochs: int, warmup_epochs: int) -> None:
    group = parser.add_argument_group("schedule")
    group.add_argument("--batch_size", type=COUNT, default=batch_size, help="images per process and micro-step")
    group.add_argument("--accum_iter", type=COUNT, help="micro-steps per optimizer step; default 1")
    group.add_argument(
        "--global_batch",
        type=COUNT,
        help="images per optimizer step over all processes; sets --accum_iter so that the recipe's batch holds on "
        "whatever hardware there is",
    )
    group.add_argument("--epochs", type=COUNT, default=epochs, help="passes over the data")
    group.add_argument(
        "--warmup_epochs",
        type=NOT_NEGATIVE,
        help=f"epochs of linear warm-up; default {warmup_epochs}, or a fifth of --epochs if that is less",
    )


def default_warmup(warmup_epochs: float | None, official: int, epochs: int) -> float:
    """The official warm-up, capped so that a default never takes up the training; refuse one as long as the training.

    Raises:
        ValueError: a given warm-up leaves no epoch after it.
    """
    if warmup_epochs is None:
        return min(official, epochs // 5)
    if warmup_epochs >= epochs and warmup_epochs > 0:
        raise ValueError(f"--warmup_epochs {warmup_epochs:g} leaves nothing of --epochs {epochs}: lower it")
    return warmup_epochs


def effective_batch(
    batch_size: int, accum_iter: int | None, global_batch: int | None, world_size: int
) -> tuple[int, int]:
    """(accumulation steps, images per optimizer step) from what was given.

    Raises:
        ValueError: both --accum_iter and --global_batch, or a --global_batch that the processes do not divide.
    """
    if global_batch is None:
        accum_iter = accum_iter or 1
        return accum_iter, batch_size * accum_iter * world_size
    if accum_iter is not None:
        raise ValueError(f"--global_batch {global_batch} sets --accum_iter: give one of the two, not both")
    if global_batch % (batch_size * world_size):
        raise ValueError(
            f"--global_batch {global_batch} is not a multiple of --batch_size {batch_size} x {world_size} processes: "
            f"change --batch_size to a divisor of {global_batch / world_size:g}"
        )
    return global_batch // (batch_size * world_size), global_batch


def worker_count(num_workers: int | None, official: int, local_size: int) -> int:
    """Loader processes of one training process: as given, or the official number as far as there are cores."""
    if num_workers is not None:
        return num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(official, max(1, cores // local_size))
