"""Command-line options of main_pretrain.py: model, target, loss predictor, masks, EMA teacher, optimizer."""

from collections.abc import Mapping

from util.losses import PREDICTOR_LOSSES
from util.masking import STRATEGIES
from util.run.options import (
    COUNT,
    COUNT_OR_ZERO,
    FRACTION,
    FRACTION_OR_ONE,
    FRACTION_OR_ZERO,
    NOT_NEGATIVE,
    SHARE,
    SWITCH,
    OptionParser,
)

PANELS = 20  # per run: enough to see masks move, about 40 MB of TensorBoard events at 224 pixels

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
    "val_fraction",
]


def add_pretraining_options(
    parser: OptionParser, models: list[str], targets: list[str], networks: Mapping[str, str]
) -> None:
    """Add the options of main_pretrain.py to `parser`.

    Args:
        models, targets: choices of --model and --target.
        networks: targets that are features of a frozen network -> what --NETWORK_path may name.
    """
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--vis_interval",
        type=COUNT_OR_ZERO,
        help="epochs between two panels in TensorBoard: masks, reconstructions and predicted hardness of eight "
        f"validation images; 0 disables them (default: at most {PANELS} panels per run)",
    )

    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        choices=models,
        metavar="MODEL",
        default="mae_vit_base_patch16",
        help="model size; micro, tiny and small are for small images and CPUs: "
        + ", ".join(name for name in models if "dec" not in name),
    )
    group.add_argument("--input_size", type=COUNT, default=224, help="image size in pixels")
    group.add_argument("--patch_size", type=COUNT, help="patch size in pixels (default: the model's)")
    group.add_argument("--token_size", type=COUNT, help="patches per side; derived, the option is only checked")
    group.add_argument("--decoder_embed_dim", type=COUNT, help="width of both decoders (default: the model's)")
    group.add_argument(
        "--decoder_depth",
        type=COUNT,
        help="blocks of each decoder (of the predictor: --predictor_depth); fewer are faster",
    )
    group.add_argument("--decoder_num_heads", type=COUNT, help="attention heads of both decoders")
    group.add_argument(
        "--grad_checkpointing",
        action=SWITCH,
        default=False,
        help="recompute activations in the backward pass to save memory",
    )
    group.add_argument(
        "--load_from", "--finetune", default="", help="initial weights of a new run (HPM's, MAE's or this project's)"
    )

    group = parser.add_argument_group("target and loss predictor")
    group.add_argument(
        "--target",
        choices=targets,
        help="reconstruction target: raw pixels (HPM's default), pixels normalised per patch (better for MAE), or "
        "features of the EMA teacher, DINO or CLIP",
    )
    group.add_argument("--norm_pix_loss", action=SWITCH, default=False, help="official name of --target norm_pixel")
    features = ["none", "ema", *networks]
    group.add_argument(
        "--learn_feature_loss", choices=features, default="none", help="official name of feature targets"
    )
    for network, file in networks.items():
        group.add_argument(f"--{network}_path", default="none", help=f"{file} (none: download)")
    group.add_argument(
        "--learning_loss",
        action=SWITCH,
        default=True,
        help="train the loss predictor; without it, and without --score_by loss, this is MAE",
    )
    group.add_argument(
        "--predictor_loss",
        choices=list(PREDICTOR_LOSSES),
        help="what the predictor learns: to rank the patches of an image by their loss (relative, default), or the "
        "value of their loss (absolute)",
    )
    group.add_argument(
        "--relative",
        action=SWITCH,
        default=None,
        help="official name of --predictor_loss relative; --no-relative is absolute",
    )
    group.add_argument("--predictor_depth", type=COUNT, help="blocks of the predictor (default: the decoder's)")

    group = parser.add_argument_group("masks")
    group.add_argument("--mask_ratio", type=FRACTION, default=0.75, help="fraction of masked patches")
    group.add_argument(
        "--vis_mask_ratio",
        type=FRACTION_OR_ZERO,
        default=0.0,
        help="fraction of the visible patches replaced by a learned token (UM-MAE)",
    )
    group.add_argument(
        "--mask_strategy",
        choices=list(STRATEGIES),
        help="how scores select the masked patches (default: easy_to_hard; random without a loss predictor, unless "
        "--score_by loss)",
    )
    group.add_argument(
        "--alpha_0",
        type=SHARE,
        help="fraction of masked patches chosen by score before the first epoch; it then changes linearly, to "
        "alpha_T in the last. For hard_to_easy the two are swapped (default: 0)",
    )
    group.add_argument(
        "--alpha_T",
        type=SHARE,
        help="fraction of masked patches chosen by score in the last epoch; with --mask_strategy constant in "
        "every epoch (default: 0.5; 1.0 does worse than random masks)",
    )
    group.add_argument("--mask_block", action=SWITCH, default=False, help="keep one square visible, no mining (UM-MAE)")
    group.add_argument(
        "--mask_regular", action=SWITCH, default=False, help="keep one patch of each 2 x 2 visible, no mining (UM-MAE)"
    )

    group = parser.add_argument_group("EMA teacher")
    group.add_argument("--ema_decay", type=SHARE, default=0.999, help="decay per step at the start")
    group.add_argument("--ema_decay_final", type=SHARE, default=0.9999, help="decay per step after the ramp")
    group.add_argument("--ema_ramp_epochs", type=COUNT_OR_ZERO, default=100, help="epochs of the linear ramp")
    group.add_argument(
        "--teacher_keep",
        type=FRACTION_OR_ONE,
        help="fraction of patches that the teacher sees; below 1 it scores the others, at their mask tokens (default: "
        "1.0, HPM's; 1 - mask_ratio with --score_by loss)",
    )
    group.add_argument(
        "--score_by",
        choices=["predictor", "loss"],
        default="predictor",
        help="score of a patch: its predicted loss, or the teacher's reconstruction loss, of patches hidden from it",
    )

    group = parser.add_argument_group("k-NN during training")
    group.add_argument(
        "--knn_interval",
        type=COUNT_OR_ZERO,
        default=0,
        help="evaluate the encoder by k-NN every N epochs, as main_knn.py does, logged as knn_acc1 and knn_acc5; 0 "
        "disables it",
    )
    group.add_argument("--knn_data_path", help="labelled images with train and val (default: --data_path)")
    group.add_argument("--knn_k", type=COUNT, help="number of neighbours (default: 20)")
    group.add_argument(
        "--knn_global_pool",
        action=SWITCH,
        default=None,
        help="use the mean of the patch tokens (default: the class token)",
    )

    group = parser.add_argument_group("optimizer (AdamW, betas 0.9 and 0.95)")
    group.add_argument("--lr", type=NOT_NEGATIVE, help="learning rate (default: --blr x global batch size / 256)")
    group.add_argument("--blr", type=NOT_NEGATIVE, default=1.5e-4, help="base learning rate per 256 images")
    group.add_argument("--min_lr", type=NOT_NEGATIVE, default=0.0, help="final learning rate of the cosine")
    group.add_argument(
        "--weight_decay", type=NOT_NEGATIVE, default=0.05, help="weight decay (not applied to biases and norms)"
    )
    group.add_argument(
        "--clip_grad",
        type=NOT_NEGATIVE,
        default=5.0,
        help="gradient clipping: max norm, 0 disables it. The official code clips at 5 without documenting it",
    )
