"""Command-line options of main_segment.py: head, labels, evaluation, schedule."""

from util.run.options import (
    COUNT,
    COUNT_OR_ZERO,
    FRACTION_OR_ONE,
    FRACTION_OR_ZERO,
    NOT_NEGATIVE,
    SWITCH,
    OptionParser,
    number,
)

PROBES = ("knn", "logreg")

# Options that must not change on resume: weights and schedule depend on them.
FIXED = [
    *["head", "model", "patch_size", "crop", "nb_classes", "reduce_zero_label", "ignore_index"],
    *["steps", "eval_interval", "global_batch", "decay_positions"],
]

# Options that a head does not read; with it they are rejected.
WINDOWS = ["crop", "stride", "short_side"]
ENCODER = ["layer_decay", "drop_path", "decay_positions"]
TRAINING = ["steps", "warmup_steps", "eval_interval", "global_batch", "lr", "weight_decay", *ENCODER]
REJECTED = {
    "upernet": ["input_size", "max_patches"],
    "linear": ["input_size", "max_patches", *ENCODER],
    **{head: [*WINDOWS, *TRAINING] for head in PROBES},
}


def add_segmentation_options(parser: OptionParser) -> None:
    group = parser.add_argument_group("segmentation")
    group.add_argument(
        "--head",
        choices=["upernet", "linear", *PROBES],
        help="upernet (default) is trained with the encoder, linear on a frozen one, on crops of --crop pixels; knn "
        "and logreg are fitted to the patch features of whole images of --input_size pixels",
    )
    group.add_argument("--crop", type=COUNT, help="size of training crops and test windows (default: 512)")
    group.add_argument("--stride", type=COUNT, help="stride of test windows (default: 2/3 of --crop)")
    group.add_argument("--short_side", type=COUNT, help="short side of test images (default: --crop)")
    help = "label 0 is ignored and class k is label k + 1, as in ADE20K (default: on)"
    group.add_argument("--reduce_zero_label", action=SWITCH, help=help)
    ignore = number(int, low=0, high=255)
    group.add_argument("--ignore_index", type=ignore, help="ignored label, after that shift (default: 255)")
    group.add_argument("--eval", action="store_true", help="evaluate --resume, --finetune, or the run's newest weights")
    group.add_argument(
        "--save_predictions", metavar="DIR", help="write the last predictions as PNG with the data's labels"
    )
    group.add_argument("--save_preview", type=COUNT, default=0, metavar="N", help="draw N validation images")
    help = "most training patches in memory (knn, logreg; default: 4000000)"
    group.add_argument("--max_patches", type=COUNT, help=help)

    group = parser.add_argument_group("schedule (defaults depend on head and size: upernet, large, linear)")
    group.add_argument("--steps", type=COUNT, help="optimizer steps: 160000, 160000, 40000")
    group.add_argument("--warmup_steps", type=COUNT_OR_ZERO, help="1500, at most a tenth of --steps")
    group.add_argument("--eval_interval", type=COUNT, help="steps between evaluations: a tenth of --steps")
    group.add_argument("--batch_size", type=COUNT, help="images per process and micro-batch")
    group.add_argument("--global_batch", type=COUNT, help="global batch size: 16, in one micro-batch")
    group.add_argument("--lr", type=NOT_NEGATIVE, help="learning rate: 1e-4, 9e-5, 1e-3")
    group.add_argument("--layer_decay", type=FRACTION_OR_ONE, help="layer-wise lr decay: 0.65, 0.75, none")
    group.add_argument("--drop_path", type=FRACTION_OR_ZERO, help="stochastic depth: 0.1, 0.2, none")
    group.add_argument("--weight_decay", type=NOT_NEGATIVE, help="0.05, 0.05, 0.001; not on biases and norms")
    help = "weight decay on positions, class token and bias tables as well"
    group.add_argument("--decay_positions", action=SWITCH, help=f"{help} (default: on)")
