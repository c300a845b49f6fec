"""Rank correlation of predicted and true patch losses: does the teacher know which patches are hard?

    python -m benchmarks.ranking --checkpoint output_dir/checkpoint-last.pth --data_path /imagenet

Without --data_path it uses Shapes. benchmarks/study.py measures every run with it.

Shapes: B batch, C channels, H, W image, L patches, M masked, E encoder width, F decoder width.
"""

import argparse
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import main_pretrain
import models_hpm
from util import masking
from util.data.datasets import ImageDataset
from util.data.sources import build_source
from util.data.transforms import CenterCrop, ToModelInput
from util.rng import generator, seed_all
from util.run import checkpoint, distributed, options
from util.run.logger import log
from util.targets import PIXEL_TARGETS
from util.weights.load import read_meta


@torch.no_grad()
def predict_at_mask_tokens(
    model: models_hpm.MaskedAutoencoderViT, imgs: Tensor, return_tokens: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """`predict_loss` at mask tokens, where the predictor was trained, one next to each patch of the whole image:
    (B, C, H, W) -> (B, L). Our own variant; HPM predicts at the visible patches."""
    latent = model.forward_encoder(imgs)  # (B, 1 + L, E)
    seen = model.decoder_embed(latent) + model.decoder_pos_embed  # (B, 1 + L, F)
    hidden = (model.mask_token + model.decoder_pos_embed[:, 1:]).expand(len(imgs), -1, -1)  # (B, L, F)
    loss_pred = model.forward_loss_predictor(torch.cat([seen, hidden.to(seen.dtype)], dim=1), num_last=hidden.shape[1])
    return (loss_pred, latent[:, 1:]) if return_tokens else loss_pred


def teacher_of(variant: str) -> AbstractContextManager:
    """Context in which the EMA teacher scores patches as the variant says: as published except for `_mask_tokens`."""
    if not variant.endswith("_mask_tokens"):
        return nullcontext()
    return mock.patch.object(models_hpm.MaskedAutoencoderViT, "predict_loss", predict_at_mask_tokens)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of each row of (N, L) and (N, L) -> (N,)."""
    ranks = [x.argsort(dim=1).argsort(dim=1).double() for x in (a, b)]
    centred = [r - r.mean(dim=1, keepdim=True) for r in ranks]
    products = (centred[0] * centred[1]).sum(dim=1)
    return products / torch.sqrt(centred[0].square().sum(dim=1) * centred[1].square().sum(dim=1))


@torch.no_grad()
def masked_errors(
    model: models_hpm.MaskedAutoencoderViT, imgs: Tensor, masks: int, ratio: float
) -> tuple[Tensor, Tensor | None]:
    """True error and predicted loss of each patch, both (B, L): means over those of `masks` random masks that hide it.
    The model sees the visible patches only, as in training. No predicted loss without a predictor."""
    num_patches = model.patch_embed.num_patches
    num_masked = masking.count_masked(num_patches, ratio)
    errors, expected, count = torch.zeros(3, len(imgs), num_patches, device=imgs.device)
    for number in range(masks):
        mask = masking.random_mask(len(imgs), num_patches, num_masked, generator(number)).to(imgs.device)
        out = model(imgs, mask, num_masked=num_masked)
        errors += torch.zeros_like(errors).masked_scatter_(mask, out["patch_loss"])  # (B, M) -> (B, L)
        if model.learning_loss:
            expected += torch.zeros_like(expected).masked_scatter_(mask, out["loss_pred"])
        count += mask
    return errors / count.clamp(min=1), expected / count.clamp(min=1) if model.learning_loss else None


@torch.no_grad()
def teacher_correlation(
    teacher: models_hpm.MaskedAutoencoderViT, imgs: Tensor, errors: Tensor, sampler: masking.MaskSampler, draws: int
) -> float:
    """Rank correlation of the scores that choose a run's masks with the true errors (B, L), over the scored patches of
    each image. Where some patches are hidden from the teacher, the mean over `draws` random choices of them, which are
    not the masks of `masked_errors`: a loss would be compared with itself."""
    found = []
    for number in range(draws if sampler.num_hidden else 1):
        hidden = None
        if sampler.num_hidden > 0:
            hidden = sampler.draw_hidden(len(imgs), generator(1, number)).to(imgs.device)
        scores, _ = teacher.score_patches(imgs, hidden, sampler.num_hidden)
        assert scores is not None, "no loss predictor"
        scored = torch.ones_like(errors, dtype=torch.bool) if hidden is None else hidden
        found.append(spearman(scores[scored].view(len(imgs), -1), errors[scored].view(len(imgs), -1)).mean())
    return float(torch.stack(found).mean())


def rank_correlations(
    args: argparse.Namespace, path: Path, device: torch.device, trained: bool = True
) -> dict[str, float]:
    """Rank correlation of predicted and true patch losses, mean over validation images. With `trained` False, those of
    the freshly initialised model that the run started from.

    With a predictor: `masked`, predicted by the student from the visible patches, as it was trained to; `student` and
    `teacher`, by the student and by the EMA teacher from the whole image; `mask_tokens`, by the teacher from the whole
    image at mask tokens. Where the run hides patches from its teacher: `hidden`, the teacher's scores of those. The
    scores that choose a run's masks are `hidden` if there is one, else `teacher`. Empty for a run without a teacher.
    """
    content = checkpoint.read_run(path)
    if content.get("ema_state_dict") is None:
        return {}
    image = content["image"]
    source = build_source(args.data_path, "val", shapes_count=args.rank_images, value_range=image.get("value_range"))
    picked = [len(source) * i // args.rank_images for i in range(min(args.rank_images, len(source)))]
    dataset = ImageDataset(source, CenterCrop(args.input_size))
    images = torch.stack([dataset[i].image for i in picked])
    imgs = ToModelInput(image["mean"], image["std"], device, flip=False)(images)
    defaults = vars(main_pretrain.get_args_parser().parse_args([]))  # of options that are newer than the checkpoint
    settings = argparse.Namespace(**{**defaults, **content["options"]})
    seed_all(settings.seed)
    model = main_pretrain.build_model(settings).to(device).eval()
    if trained:
        model.load_state_dict(content["state_dict"])
    found = {}
    errors, expected = masked_errors(model, imgs, args.rank_masks, settings.mask_ratio)
    if expected is not None:
        found["masked"] = float(spearman(expected, errors).mean())
        with torch.no_grad():
            found["student"] = float(spearman(model.predict_loss(imgs), errors).mean())
    if trained:
        model.load_state_dict(content["ema_state_dict"])
    sampler = masking.MaskSampler.from_options(content["options"], model.patch_embed.grid_size)
    if model.learning_loss:
        with torch.no_grad():
            found["teacher"] = float(spearman(model.predict_loss(imgs), errors).mean())
        found["mask_tokens"] = float(spearman(predict_at_mask_tokens(model, imgs), errors).mean())
    if sampler.num_hidden:
        found["hidden"] = teacher_correlation(model, imgs, errors, sampler, args.rank_masks)
    return {name: round(value, 4) for name, value in found.items()}


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser((__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--checkpoint", required=True, help="checkpoint of a run of main_pretrain.py with an EMA teacher"
    )
    parser.add_argument("--data_path", help="as in main_pretrain.py, with a val split (default: Shapes)")
    parser.add_argument("--rank_images", type=options.COUNT, default=100, help="number of validation images")
    parser.add_argument("--rank_masks", type=options.COUNT, default=16, help="random masks per image")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where available)")
    return parser


def main(argv: list[str] | None = None) -> tuple[float, float]:
    """Returns: the correlation of the scores that choose the masks with the true errors, before and after training."""
    with options.user_mistakes():
        args = get_args_parser().parse_args(argv)
        path, device = (
            Path(args.checkpoint),
            distributed.setup(distributed.ALONE, args.device, None, timeout_minutes=1)[0],
        )
        meta = read_meta(path)
        if meta.get("script") != main_pretrain.SCRIPT:
            raise ValueError(f"{path} is not a checkpoint of main_pretrain.py")
        if meta["options"].get("target", "pixel") not in PIXEL_TARGETS:
            raise ValueError(f"{path} was trained with --target {meta['options']['target']}: only pixels can be ranked")
        args.input_size = meta["options"]["input_size"]
        found = [rank_correlations(args, path, device, trained) for trained in (False, True)]
        before, after = (values.get("hidden", values.get("teacher")) for values in found)
        if before is None or after is None:
            raise ValueError(f"{path} has no EMA teacher that ranks patches: its run had none, or it was saved without")
    log.info("Spearman of the teacher's ranking with the true error: untrained %.3f, trained %.3f", before, after)
    return before, after


if __name__ == "__main__":
    main()
