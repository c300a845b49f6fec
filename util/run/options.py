"""Command-line options that several scripts share, and how a mistake in them ends.

A user's mistake is a `ValueError` (or an `OSError` of a path) before training starts: the scripts print it in a line or
two on standard error and exit with status 2, without usage text or traceback.
"""

import argparse
import difflib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from util.data.decode import MAX_PIXELS

# Official options that nothing reads here: torchrun replaces the first four, the fifth chose an in-house loader.
LAUNCHER_OPTIONS = ("world_size", "local_rank", "dist_on_itp", "dist_url", "dataloader_type")


class UserMistake(SystemExit):
    """Exit with status 2. The message goes to standard error here, so that nobody has to catch this."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(2)  # torchrun ends this rank meanwhile if rank 0 failed too, so a common mistake is printed once
            message = f"rank {rank}: {message}"
        program = sys.argv[0].removesuffix("/__main__.py")  # of python -m export
        sys.stderr.write(f"{os.path.basename(program)}: error: {message}\n")


@contextmanager
def user_mistakes() -> Iterator[None]:
    """Around everything before training: a ValueError or OSError in here is the user's mistake."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserMistake(str(error)) from error


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends defaults, except for None, empty strings and those that the help text states itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "") or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class OptionParser(argparse.ArgumentParser):
    """argparse without abbreviations, which answers a mistake in one line with the nearest name."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False, formatter_class=HelpFormatter)
        self.ignored: list[str] = []

    def accept_ignored(self, *names: str) -> None:
        """Accept official options that nothing reads, with or without a value, so that official commands work."""
        if not self.ignored:
            self._ignored_group = self.add_argument_group("official options that are accepted and ignored")
        for name in names:
            spellings = [f"--{name}"]
            if name == "local_rank":
                spellings.append("--local-rank")
            self._ignored_group.add_argument(*spellings, nargs="?", const=True, help="ignored")
            self.ignored.append(name)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentError(action, f"unknown value {value!r}{hint} (choose from {', '.join(known)})")

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:"):
            known = list(self._option_string_actions)
            for word in message.split(":", 1)[1].split():
                near = difflib.get_close_matches(word.split("=")[0], known, n=1)
                message += f"; did you mean {near[0]}?" if near else ""
        raise UserMistake(message)


def number(
    kind: type, low: float = -math.inf, high: float = math.inf, above: float = -math.inf, below: float = math.inf
) -> Callable[[str], Any]:
    """An argparse type: a finite number with low <= it <= high and above < it < below."""
    limits = ((">", above), (">=", low), ("<", below), ("<=", high))
    bounds = " and ".join(f"{sign} {limit:g}" for sign, limit in limits if math.isfinite(limit))
    expected = f"expected {'an integer' if kind is int else 'a number'} {bounds}".rstrip()

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high and above < value < below):
            raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")
        return value

    return parse


COUNT = number(int, low=1)
COUNT_OR_ZERO = number(int, low=0)
SHARE = number(float, low=0, high=1)
NOT_NEGATIVE = number(float, low=0)
POSITIVE = number(float, above=0)
MINUTES = number(float, above=0, high=60 * 24 * 365)
SEED = number(int, low=0, high=2**63 - 1)
NUMBER = number(float)
FRACTION = number(float, above=0, below=1)
FRACTION_OR_ZERO = number(float, low=0, below=1)
FRACTION_OR_ONE = number(float, above=0, high=1)

SWITCH = argparse.BooleanOptionalAction  # --NAME, --no-NAME


class OneOrMore(argparse.Action):
    """One value, or a list of several."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


DATA_LAYOUT = (
    "folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or with train.txt and val.txt (lines of PATH LABEL), or with "
    "train.tar and val.tar; or one .tar or .tar.gz of such a tree; or WebDataset shards (a folder with train-000.tar, "
    "..., or a pattern such as 'imagenet-{train-{000..123},val-{00..07}}.tar'); or a Hugging Face data set (a saved "
    "folder, or parquet files) (default: Shapes, images that the program draws itself, which need no file)"
)

IMAGES = "image files, folders and archives of images, with or without labels (default: Shapes)"
UNLABELLED = ". Labels are not needed; several paths are allowed"


def add_data_options(
    parser: OptionParser,
    *,
    num_workers: int,
    splits: tuple[str, ...] = ("train", "val"),
    layout: str = DATA_LAYOUT,
) -> None:
    group = parser.add_argument_group("data")
    if splits == ("train",):
        group.add_argument("--data_path", nargs="+", action=OneOrMore, help=layout + UNLABELLED)
    elif splits:
        group.add_argument("--data_path", nargs="+", action=OneOrMore, help=layout)
    else:
        group.add_argument("--data_path", help=layout)
    if "train" in splits:
        group.add_argument(
            "--val_fraction",
            type=FRACTION,
            help="hold out this fraction of the training images of each class as the val split, for data without one",
        )
    for split, count, use in (("train", 2000, "training"), ("val", 500, "validation")):
        if split in splits:
            help = f"number of {use} images without --data_path"
            group.add_argument(f"--shapes_{split}", type=COUNT, default=count, help=help)
    group.add_argument(
        "--value_range",
        type=NUMBER,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="stored values that become black and white, for images of more than 8 bits (default: the checkpoint's, or "
        "by image, from 0 to the first of 255, 65535 and 4294967295, for floats also 1, that no value exceeds; "
        "PGM and PPM files that state another maximum than 65535 use that)",
    )
    group.add_argument(
        "--max_image_pixels", type=COUNT, default=MAX_PIXELS, help="reject larger images (decompression bombs)"
    )
    group.add_argument(
        "--cache_dir",
        help="folder of decompressed .tar.gz archives, converted parquet files and listings of archives (default: "
        "$XDG_CACHE_HOME/hpm, or ~/.cache/hpm)",
    )
    group.add_argument(
        "--mean", type=NUMBER, nargs=3, help="channel means in 0..1 (default: the checkpoint's, or ImageNet's)"
    )
    group.add_argument(
        "--std", type=POSITIVE, nargs=3, help="channel standard deviations (default: the checkpoint's, or ImageNet's)"
    )
    group.add_argument(
        "--num_workers",
        type=COUNT_OR_ZERO,
        help=f"data loading workers per process (default: {num_workers}, or fewer on fewer CPU cores). A core "
        "decodes about 800 full-size photographs a second; raise it while the log shows a high data_wait",
    )
    group.add_argument("--pin_mem", action=SWITCH, default=True, help="pin CPU memory for faster transfer to the GPU")
    group.add_argument("--no_pin_mem", dest="pin_mem", action="store_false", help=argparse.SUPPRESS)


def add_training_options(parser: OptionParser, *, batch_size: int, epochs: int, warmup_epochs: int) -> None:
    group = parser.add_argument_group("schedule")
    group.add_argument("--batch_size", type=COUNT, default=batch_size, help="images per process and micro-batch")
    group.add_argument("--accum_iter", type=COUNT, help="micro-batches per optimizer step (default: 1)")
    group.add_argument(
        "--global_batch",
        type=COUNT,
        help="global batch size: images per optimizer step over all processes. Sets --accum_iter, so that a recipe's "
        "batch size holds on any number of GPUs",
    )
    group.add_argument("--epochs", type=COUNT, default=epochs, help="number of epochs")
    group.add_argument(
        "--warmup_epochs",
        type=NOT_NEGATIVE,
        help=f"epochs of linear warm-up (default: {warmup_epochs}, or a fifth of --epochs if that is less)",
    )
    add_run_options(parser)


def add_run_options(parser: OptionParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default="./output_dir", help="run folder: checkpoints, log, options")
    group.add_argument("--experiment", default="", help="name of a subfolder of --output_dir for this run")
    group.add_argument("--log_dir", help="TensorBoard events go to LOG_DIR/MODEL_EXPERIMENT (default: the run folder)")
    group.add_argument(
        "--resume", default="", help="checkpoint to resume from (ignored if the run folder has checkpoint-last.pth)"
    )
    group.add_argument(
        "--auto_resume",
        action=SWITCH,
        default=True,
        help="resume from the newest checkpoint in the run folder; without it, --resume may name an earlier one of it",
    )
    group.add_argument("--start_epoch", type=COUNT_OR_ZERO, default=0, help="first epoch of a new run, from 0")
    group.add_argument("--save_interval", type=COUNT, default=100, help="keep a checkpoint every N epochs")
    group.add_argument("--save_every_minutes", type=MINUTES, help="also save mid-epoch, every N minutes")
    group.add_argument("--log_interval", type=COUNT, default=20, help="optimizer steps between two log lines")
    group.add_argument("--max_steps", type=COUNT, help="stop after N optimizer steps in total (smoke test)")
    group.add_argument("--seed", type=SEED, default=0, help="seed of weights, data order, augmentation and masks")
    group.add_argument(
        "--max_bad_steps",
        type=COUNT_OR_ZERO,
        default=10,
        help="abort after more than N consecutive skipped steps (loss or gradient not finite)",
    )
    group.add_argument(
        "--max_bad_images",
        type=COUNT_OR_ZERO,
        default=100,
        help="abort when more than N training images cannot be read; up to then they are replaced and listed in "
        "bad_images.txt",
    )
    group.add_argument(
        "--strict_images", action=SWITCH, default=False, help="abort at the first training image that cannot be read"
    )


def add_device_options(parser: OptionParser) -> None:
    group = parser.add_argument_group("device")
    group.add_argument("--device", help="cuda or cpu (default: cuda where available)")
    precision = group.add_mutually_exclusive_group()
    precision.add_argument(
        "--precision",
        choices=["fp32", "bf16", "fp16"],
        help="default: bf16 where the GPU supports it natively, fp16 on older GPUs, fp32 on the CPU",
    )
    precision.add_argument(
        "--bf16", dest="precision", action="store_const", const="bf16", help="official name of --precision bf16"
    )
    group.add_argument(
        "--compile", action=SWITCH, default=False, help="torch.compile the model: minutes to start, then faster"
    )
    group.add_argument(
        "--dist_timeout", type=MINUTES, default=30, help="minutes after which a process stops waiting for the others"
    )
    parser.accept_ignored(*LAUNCHER_OPTIONS)


def add_classifier_options(parser: OptionParser, models: list[str]) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--finetune",
        default="",
        help="pre-trained weights: a checkpoint of this project, of HPM, of MAE (pre-trained or fine-tuned) or of "
        "timm, a .safetensors file or a Hugging Face folder (default: random weights)",
    )
    group.add_argument(
        "--which", choices=["student", "ema"], help="weights of an HPM checkpoint: student (default) or EMA teacher"
    )
    group.add_argument("--teacher", action="store_true", help="official name of --which ema")
    group.add_argument(
        "--model",
        choices=models,
        metavar="MODEL",
        help="model size (default: the checkpoint's, or vit_base_patch16): " + ", ".join(models),
    )
    group.add_argument("--input_size", type=COUNT, help="image size in pixels (default: the checkpoint's, or 224)")
    group.add_argument(
        "--patch_size", type=COUNT, help="patch size in pixels (default: the checkpoint's, or the model's)"
    )
    group.add_argument(
        "--nb_classes",
        "--num_classes",
        type=COUNT,
        help="number of classes (default: the data set's; a larger number is allowed)",
    )


def add_crop_option(group: argparse._ActionsContainer, whose: str = "the checkpoint's") -> None:
    group.add_argument(
        "--crop_pct",
        type=FRACTION_OR_ONE,
        help="side of the evaluation crop as a fraction of the shorter side of the image (default: "
        f"{whose}, if for this image size, else 0.875 up to 224 pixels and 1.0 above, as in MAE)",
    )


def add_pooling_options(group: argparse._ActionsContainer, default: str) -> None:
    group.add_argument("--global_pool", action=SWITCH, help=f"use the mean of the patch tokens (default: {default})")
    group.add_argument("--cls_token", dest="global_pool", action="store_const", const=False, help="use the class token")
