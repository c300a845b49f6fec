"""Rank correlation of predicted and true patch losses, for benchmarks/study.py.

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
from util.rng import generator
from util.run import checkpoint


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
) -> tuple[Tensor, Tensor]:
    """True error and predicted loss of each patch, both (B, L): means over those of `masks` random masks that hide it.
    The model sees the visible patches only, as in training."""
    num_patches = model.patch_embed.num_patches
    num_masked = masking.count_masked(num_patches, ratio)
    errors, expected, count = torch.zeros(3, len(imgs), num_patches, device=imgs.device)
    for number in range(masks):
        mask = masking.random_mask(len(imgs), num_patches, num_masked, generator(number)).to(imgs.device)
        out = model(imgs, mask, num_masked=num_masked)
        for total, values in ((errors, out["patch_loss"]), (expected, out["loss_pred"])):  # values (B, M)
            total += torch.zeros_like(total).masked_scatter_(mask, values)
        count += mask
    return errors / count.clamp(min=1), expected / count.clamp(min=1)


def rank_correlations(args: argparse.Namespace, path: Path, device: torch.device) -> dict[str, float]:
    """Rank correlation of predicted and true patch losses, mean over validation images: predicted
    from the whole image by the EMA teacher, which chooses the masks so, and by the student; by the teacher from the
    whole image at mask tokens; and by the student from the visible patches, as it was trained to (`masked`). Empty
    without a predictor."""
    content = checkpoint.read_run(path)
    if not content["options"]["learning_loss"]:
        return {}
    source = build_source(args.data_path, "val", shapes_count=args.rank_images)
    picked = [len(source) * i // args.rank_images for i in range(min(args.rank_images, len(source)))]
    dataset = ImageDataset(source, CenterCrop(args.input_size))
    image = content["image"]
    images = torch.stack([dataset[i].image for i in picked])
    imgs = ToModelInput(image["mean"], image["std"], device, flip=False)(images)
    student = main_pretrain.build_model(argparse.Namespace(**content["options"])).to(device).eval()
    student.load_state_dict(content["state_dict"])
    errors, expected = masked_errors(student, imgs, args.rank_masks, content["options"]["mask_ratio"])
    found = {"masked": round(float(spearman(expected, errors).mean()), 4)}
    for name, weights in (("student", "state_dict"), ("teacher", "ema_state_dict")):
        student.load_state_dict(content[weights])
        with torch.no_grad():
            found[name] = round(float(spearman(student.predict_loss(imgs), errors).mean()), 4)
    found["mask_tokens"] = round(float(spearman(predict_at_mask_tokens(student, imgs), errors).mean()), 4)  # teacher's
    return found
