"""Draw what a pre-trained model sees, or plot the logs of runs.

    python -m visualize --checkpoint output_dir/checkpoint-last.pth --images photos/
    python -m visualize --runs output_dir/hpm output_dir/mae

Without --images it takes Shapes. One row an image: the image, the predicted hardness of its patches, the masks at the
start and at the end of training, the reconstruction, and the true error. docs/visualize.md says how to read it.
"""

import argparse
import copy
from pathlib import Path

import numpy as np
import torch

import models_hpm
from util import masking
from util.data import transforms
from util.data.datasets import ImageDataset
from util.data.files import ImageFiles
from util.data.sources import ShapesSource, find_images
from util.pos_embed import interpolate_pos_embed
from util.run import distributed, options
from util.run.logger import log, setup_logging
from util.weights.load import load_into, load_pretrained, read_meta
from visualize import curves
from visualize import draw as pictures
from visualize.panel import PATCH_STATS, panel

SCRIPT = "main_pretrain"  # whose checkpoints these are
TARGETS = ["pixel", "norm_pixel", "ema", "dino", "clip"]
PICTURES, PLOTS = (".png", ".jpg", ".jpeg", ".webp"), (".png", ".svg", ".pdf")

# What a foreign file is taken for where no option says otherwise.
FOREIGN = {"model": "mae_vit_base_patch16", "input_size": 224, "mask_ratio": 0.75, "relative": True, "epochs": 200}
# What a file that says how it was trained cannot be told.
FIXED = ["model", "target", "relative", "epochs"]


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser(__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", help="of pre-training: this project's, official HPM's or MAE's with decoder")
    parser.add_argument("--runs", nargs="+", help="folders of runs: plot their log.jsonl in one picture")
    parser.add_argument("--output", default="visualization.png", help="picture to write (plots: .svg and .pdf too)")
    group = parser.add_argument_group("pictures")
    group.add_argument("--images", nargs="+", help="image files, folders or tar archives; default: Shapes")
    group.add_argument("--split", help="train or val, where the folder or archive has them; default: all its images")
    group.add_argument(
        "--num_images", type=options.COUNT, help="how many, drawn at random; default: 8, or all files that are named"
    )
    group.add_argument("--one_file_each", action="store_true", help="a file for each image, --output with a number")
    group.add_argument(
        "--which",
        choices=["student", "ema"],
        default="student",
        help="whose weights to look through; the EMA teacher's choose the masks in training",
    )
    group.add_argument(
        "--epoch", type=options.COUNT_OR_ZERO, help="whose mask to draw and reconstruct from; default: the last"
    )
    group.add_argument("--mask_ratio", type=options.number(float, above=0, below=1), help="default: the run's, or 0.75")
    group.add_argument("--seed", type=options.COUNT_OR_ZERO, default=0, help="of the choice of images and of the masks")
    group.add_argument(
        "--patch_stats",
        choices=list(PATCH_STATS),
        default="image",
        help="models of normalised pixels: mean and variance of each masked patch from the image (they tell part of "
        "the answer), or none (those of the visible patches, on average)",
    )
    group.add_argument(
        "--scale",
        choices=list(pictures.SCALES),
        default="author",
        help="colours of hardness and error: as HPM's author draws them (sigmoid of the value less its mean, over the "
        "maximum), or by rank",
    )
    group.add_argument("--cell", type=options.COUNT, default=pictures.COLUMN, help="about how wide an image is drawn")
    group.add_argument("--input_size", type=options.COUNT, help="side of the images; default: the run's, or 224")
    group.add_argument("--cache_dir", help="where a .tar.gz is decompressed, once; default ~/.cache/hpm")
    group = parser.add_argument_group("files that do not say how they were trained (official HPM, MAE)")
    group.add_argument(
        "--model",
        type=options.one_of(list(models_hpm.MODELS), "model"),
        help=f"default: {FOREIGN['model']}",
    )
    group.add_argument("--target", choices=TARGETS, help="what the model reconstructs; default: pixel")
    options.add_switch(group, "norm_pix_loss", None, "the official name of --target norm_pixel")
    options.add_switch(group, "relative", None, "the predictor ranks patches; without it, it predicts their loss")
    group.add_argument("--epochs", type=options.COUNT, help=f"of the whole training; default: {FOREIGN['epochs']}")
    group.add_argument("--mean", type=float, nargs=3, help="mean colour it was trained with; default: ImageNet's")
    group.add_argument("--std", type=options.POSITIVE, nargs=3, help="its standard deviation; default likewise")
    parser.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    return parser


def resolve_options(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what the checkpoint says of itself.

    Raises:
        ValueError: neither or both of --checkpoint and --runs, an option that contradicts the checkpoint, or an epoch
            beyond the run's.
    """
    args = copy.copy(args)
    if bool(args.checkpoint) == bool(args.runs):
        raise ValueError("give either --checkpoint, to draw pictures, or --runs, to plot logs")
    if args.runs:
        return args
    if args.norm_pix_loss is not None:
        said = "norm_pixel" if args.norm_pix_loss else "pixel"
        if args.target not in (None, said):
            raise ValueError(f"--target {args.target} and --norm_pix_loss {args.norm_pix_loss}: give one of the two")
        args.target = said
    meta = read_meta(args.checkpoint)
    if meta and meta["script"] != SCRIPT:
        raise ValueError(f"{args.checkpoint} is of {meta['script']}: pictures need a pre-training checkpoint")
    trained = meta.get("options", {})
    image = meta.get("image", {"mean": list(transforms.IMAGENET_MEAN), "std": list(transforms.IMAGENET_STD)})
    for name in FIXED:
        given = getattr(args, name)
        if name in trained and given not in (None, trained[name]):
            raise ValueError(f"--{name} {given}: {args.checkpoint} says {trained[name]}; leave the option out")
    for name, value in {**FOREIGN, **trained, **image}.items():
        if getattr(args, name, "") is None:
            setattr(args, name, value)
    args.trained = trained
    args.epochs_done = meta.get("epoch")
    args.epoch = args.epochs - 1 if args.epoch is None else args.epoch
    if args.epoch >= args.epochs:
        raise ValueError(f"--epoch {args.epoch}: the run has {args.epochs} epochs, counted from 0")
    return args


def build_model(args: argparse.Namespace) -> models_hpm.MaskedAutoencoderViT:
    """The model of --checkpoint with its weights.

    Raises:
        ValueError: the checkpoint has no decoder, or does not fit the model.
    """
    weights = load_pretrained(args.checkpoint, args.which)
    settings = {"img_size": args.input_size, "norm_pix_loss": args.target == "norm_pixel", "relative": args.relative}
    if args.trained.get("decoder_num_heads"):  # no tensor's shape tells it
        settings["decoder_num_heads"] = args.trained["decoder_num_heads"]
    if args.target in ("pixel", "norm_pixel"):
        settings["target_dim"] = None
    elif args.target is not None and "decoder_pred.weight" in weights:  # features can be as wide as a patch has pixels
        settings["target_dim"] = len(weights["decoder_pred.weight"])
    model = models_hpm.build_for(args.model, weights, **settings)
    interpolate_pos_embed(model, weights, "decoder_pos_embed")
    load_into(model, weights)
    return model.to(distributed.pick_device(args.device, distributed.World(0, 1, 0, 1)))


def mask_sampler(args: argparse.Namespace, model: models_hpm.MaskedAutoencoderViT) -> masking.MaskSampler:
    """The sampler of the run's masks.

    Raises:
        ValueError: the mask ratio masks all patches or none, or does not fit the run's pattern.
    """
    settings = {**args.trained, "mask_ratio": args.mask_ratio, "epochs": args.epochs}
    if not model.learning_loss:
        settings["mask_strategy"] = "random"
    return masking.MaskSampler.from_options(settings, model.patch_embed.grid_size)


def load_images(args: argparse.Namespace) -> tuple[torch.Tensor, list[str]]:
    """The chosen images (B, 3, S, S) uint8, and their names.

    Raises:
        ValueError: no such images.
    """
    if args.images is None and args.split not in (None, "train", "val"):
        raise ValueError(f"--split {args.split}: Shapes have train and val")
    if args.images is None:
        sources = [ShapesSource(args.split or "val")]
    else:
        sources = [find(path, args.split, args.cache_dir) for path in args.images]
    chosen = [(source, index) for source in sources for index in range(len(source))]
    named = (
        args.images is not None and len(chosen) == len(args.images) and all(map(Path.is_file, map(Path, args.images)))
    )
    if named and args.num_images is None:
        picked = chosen  # files that were named one by one, in their order
    else:
        order = np.random.default_rng(args.seed).permutation(len(chosen))
        picked = [chosen[place] for place in order[: args.num_images or 8]]
    crop = transforms.CenterCrop(args.input_size)
    images = torch.stack([ImageDataset(source, crop)[index].image for source, index in picked])
    return images, ["/".join(Path(source.name(index)).parts[-2:]) for source, index in picked]


def find(path: str, split: str | None, cache_dir: str | None) -> ImageFiles:
    try:
        return find_images(path, split, cache_dir)
    except ValueError as error:
        raise ValueError(str(error).replace("--data_path", "--images")) from error


def draw(args: argparse.Namespace) -> list[bytes]:
    """The pictures of --checkpoint as files: all images in one, or each in its own."""
    model = build_model(args)
    masks = mask_sampler(args, model)
    images, names = load_images(args)
    look = None
    if args.target == "ema" and args.trained:  # the features are the teacher's, which the file holds
        teacher = build_model(argparse.Namespace(**{**vars(args), "which": "ema"})).eval()

        def look(imgs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
            return model.predict_loss(imgs) if model.learning_loss else None, teacher.predict_loss(imgs, True)[1]

    drawn = panel(
        model,
        images,
        names,
        masks,
        mean=args.mean,
        std=args.std,
        epochs=[0, args.epoch, args.epochs - 1],
        epoch=args.epoch,
        seed=args.seed,
        look=look,
        patch_stats=args.patch_stats,
        scale=args.scale,
    )
    path = Path(args.checkpoint).resolve()
    done = "" if args.epochs_done is None else f", {args.epochs_done} of {args.epochs} epochs"
    heading = f"{path.parent.name}/{path.name}, {args.model}, {args.which}{done}"
    parts = drawn.each() if args.one_file_each else [drawn]
    return [pictures.encode(pictures.draw_grid(part, heading, args.cell), Path(args.output).suffix) for part in parts]


def main(argv: list[str] | None = None) -> None:
    setup_logging(enabled=True)
    with options.user_mistakes():
        args = resolve_options(get_args_parser().parse_args(argv))
        output = Path(args.output)
        pictures.check_output(output, PLOTS if args.runs else PICTURES)
        if args.runs:
            runs = dict(zip(curves.short_names(args.runs), map(curves.read_log, args.runs), strict=True))
            files = [curves.plot(runs, output.suffix.lower().removeprefix("."))]
        else:
            files = draw(args)
        digits = len(str(len(files)))
        for number, content in enumerate(files, start=1):
            path = output.with_stem(f"{output.stem}-{number:0{digits}}") if args.one_file_each else output
            pictures.write(path, content)
            log.info("wrote %s", path)


if __name__ == "__main__":
    main()
