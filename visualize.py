"""Draw what a pre-trained model sees, or plot the logs of runs.

    python visualize.py --checkpoint output_dir/checkpoint-last.pth --images photos/
    python visualize.py --runs output_dir/hpm output_dir/mae

Without --images it takes Shapes. One row an image: the image, the predicted hardness of its patches, the masks at the
start and at the end of training, the reconstruction, and the true error.
"""

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import models_hpm
from engine_visualize import PATCH_STATS, panel
from util import checkpoint, masking, options, pictures, transforms
from util.datasets import ImageDataset, ShapesSource, find_images
from util.logger import log, setup_logging

# What the plots of --runs show: title and name in log.jsonl.
CURVES = {
    "reconstruction loss": "train_loss_rec",
    "predictor loss": "train_loss_learn",
    "rank accuracy (0.5 is chance)": "train_rank_acc",
    "learning rate": "train_lr",
    "EMA decay": "ema_decay",
    "share of masked patches chosen by hardness": "hard_ratio",
}


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser(__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", help="of pre-training: this project's, official HPM's or MAE's with decoder")
    parser.add_argument("--runs", nargs="+", help="folders of runs: plot their log.jsonl in one picture")
    parser.add_argument("--output", default="visualization.png", help="picture to write")
    group = parser.add_argument_group("pictures")
    group.add_argument("--images", nargs="+", help="image files, or one folder or tar archive; default: Shapes")
    group.add_argument("--split", help="train or val, where the folder or archive has them; default: all its images")
    group.add_argument("--num_images", type=options.COUNT, default=8, help="how many of them, drawn at random")
    group.add_argument("--one_file_each", action="store_true", help="a file for each image, --output with a number")
    group.add_argument("--which", choices=["student", "ema"], default="student", help="whose weights to look through")
    group.add_argument("--epoch", type=options.COUNT_OR_ZERO, help="whose mask to reconstruct from; default: the last")
    group.add_argument("--mask_ratio", type=options.number(float, above=0, below=1), help="default: the run's, or 0.75")
    group.add_argument("--seed", type=options.COUNT_OR_ZERO, default=0, help="of the choice of images and of the masks")
    group.add_argument(
        "--patch_stats",
        choices=PATCH_STATS,
        default="image",
        help="models of normalised pixels: mean and variance of each masked patch from the image (they tell part of "
        "the answer), or none (those of the visible patches, on average)",
    )
    group.add_argument("--cell", type=options.COUNT, default=176, help="width of a column in the picture, in pixels")
    group = parser.add_argument_group("files that do not say how they were trained (official HPM, MAE)")
    group.add_argument("--model", type=options.one_of(list(models_hpm.MODELS), "model"), help="default: base")
    group.add_argument("--input_size", type=options.COUNT, help="side of the images; default: the run's, or 224")
    options.add_switch(group, "norm_pix_loss", False, "the model predicts normalised pixels")
    group.add_argument("--mean", type=float, nargs=3, help="mean colour it was trained with; default: ImageNet's")
    group.add_argument("--std", type=options.POSITIVE, nargs=3, help="its standard deviation; default likewise")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return parser


def resolve_options(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what the checkpoint says of itself.

    Raises:
        ValueError: neither or both of --checkpoint and --runs, or an epoch beyond the run's.
    """
    args = copy.copy(args)
    if bool(args.checkpoint) == bool(args.runs):
        raise ValueError("give either --checkpoint, to draw pictures, or --runs, to plot logs")
    if args.runs:
        return args
    meta = checkpoint.read_meta(args.checkpoint)
    trained = meta.get("options", {})
    if meta and meta["script"] != "main_pretrain":
        raise ValueError(f"{args.checkpoint} is of {meta['script']}: pictures need a pre-training checkpoint")
    image = meta.get("image", {"mean": list(transforms.IMAGENET_MEAN), "std": list(transforms.IMAGENET_STD)})
    defaults = {
        **{"model": "mae_vit_base_patch16", "input_size": 224, "mask_ratio": 0.75},
        **{name: trained[name] for name in ("model", "input_size", "mask_ratio") if name in trained},
        **image,
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.norm_pix_loss = trained["target"] == "norm_pixel" if trained else args.norm_pix_loss
    args.relative = trained.get("relative", True)
    args.strategy = trained.get("mask_strategy", "easy_to_hard")
    args.alphas = trained.get("alpha_0", 0.0), trained.get("alpha_T", 0.5)
    args.epochs = trained.get("epochs", 200)
    args.epoch = args.epochs - 1 if args.epoch is None else args.epoch
    if args.epoch >= args.epochs:
        raise ValueError(f"--epoch {args.epoch}: the run has {args.epochs} epochs, counted from 0")
    return args


def load_images(args: argparse.Namespace) -> tuple[torch.Tensor, list[str]]:
    """The chosen images (B, 3, S, S) uint8, and their names.

    Raises:
        ValueError: no such images.
    """
    if args.images is None:
        sources = [ShapesSource(args.split or "val")]
    else:
        sources = [find_images(path, args.split) for path in args.images]
    chosen = [(source, index) for source in sources for index in range(len(source))]
    order = np.random.default_rng(args.seed).permutation(len(chosen))[: args.num_images]
    if args.images is not None and len(args.images) > 1:
        order = range(len(chosen))  # files that were named one by one: all of them, in their order
    crop = transforms.CenterCrop(args.input_size)
    picked = [chosen[place] for place in order]
    images = torch.stack([ImageDataset(source, crop)[index].image for source, index in picked])
    return images, [Path(source.name(index)).name for source, index in picked]


def draw(args: argparse.Namespace) -> list[Image.Image]:
    """The pictures of --checkpoint: all images in one, or each in its own.

    Raises:
        ValueError: the checkpoint has no decoder, or does not fit the model; no such images.
    """
    weights = checkpoint.load_pretrained(args.checkpoint, args.which)
    settings = {"img_size": args.input_size, "norm_pix_loss": args.norm_pix_loss, "relative": args.relative}
    model = models_hpm.build_for(args.model, weights, **settings)
    checkpoint.load_into(model, weights)
    model.to(args.device)
    images, names = load_images(args)
    num_masked = masking.count_masked(model.patch_embed.num_patches, args.mask_ratio)
    alphas = masking.STRATEGIES[args.strategy](*args.alphas)
    hardest = [masking.num_hardest(num_masked, e, args.epochs, *alphas) for e in (0, args.epochs - 1, args.epoch)]
    rows, titles, captions = panel(
        model,
        images,
        args.mean,
        args.std,
        names,
        moment="mask at the end" if args.epoch == args.epochs - 1 else f"mask of epoch {args.epoch}",
        patch_stats=args.patch_stats,
        num_masked=num_masked,
        num_hardest=tuple(hardest),
        sign=-1 if args.strategy == "easiest" else 1,
        seed=args.seed,
    )
    heading = f"{Path(args.checkpoint).resolve().parent.name}/{Path(args.checkpoint).name}, {args.model}, {args.which}"
    settings = {"heading": heading, "scale_label": ("easy", "hard"), "cell": args.cell}
    if args.one_file_each:
        return [pictures.draw_grid([row], titles, [text], **settings) for row, text in zip(rows, captions, strict=True)]
    return [pictures.draw_grid(rows, titles, captions, **settings)]


def plot(folders: list[str], output: Path) -> None:
    """The curves of several runs in one picture.

    Raises:
        ValueError: matplotlib is missing, or a folder has no log.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install matplotlib") from error
    logs = {}
    for folder in folders:
        path = Path(folder, "log.jsonl")
        if not path.is_file():
            raise ValueError(f"{folder} holds no log.jsonl: give folders of runs")
        logs[folder] = [json.loads(line) for line in path.read_text().splitlines()]
    curves = {
        title: name for title, name in CURVES.items() if any(name in line for log in logs.values() for line in log)
    }
    columns = min(3, len(curves))
    figure = Figure(figsize=(4.4 * columns, 3.2 * -(-len(curves) // columns)), layout="constrained")
    axes = list(figure.subplots(-(-len(curves) // columns), columns, squeeze=False).flat)
    for axis, (title, name) in zip(axes, curves.items(), strict=False):
        for folder, lines in logs.items():
            points = [(line["epoch"] + 1, line[name]) for line in lines if name in line]
            if points:
                axis.plot(*zip(*points, strict=True), label=Path(folder).resolve().name, linewidth=1.6)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epochs", fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 4))
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    for axis in axes[len(curves) :]:
        axis.set_axis_off()
    if len(folders) > 1:
        figure.axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(output, dpi=130)


def main(argv: list[str] | None = None) -> None:
    setup_logging(enabled=True)
    with options.user_mistakes():
        args = resolve_options(get_args_parser().parse_args(argv))
        output = Path(args.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        if args.runs:
            plot(args.runs, output)
            log.info("wrote %s", output)
            return
        drawn = draw(args)
    for number, picture in enumerate(drawn):
        path = output.with_stem(f"{output.stem}-{number + 1}") if args.one_file_each else output
        picture.save(path)
        log.info("wrote %s", path)


if __name__ == "__main__":
    main()
