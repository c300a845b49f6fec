"""What a pre-trained model sees in images: hardness, masks, reconstruction, error.

Shapes: B batch, C channels, H, W image, P patch size, L patches, M masked, D prediction width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models_hpm import MaskedAutoencoderViT, gather_tokens, split_mask
from util.losses import absolute_loss, relative_loss
from util.masking import hard_mask, random_mask
from util.metrics import rank_accuracy
from util.pictures import error_scale, hardness_scale, heat_map, hide, to_image
from util.transforms import ToModelInput

PATCH_STATS = ("image", "none")


@torch.no_grad()
def examine(
    model: MaskedAutoencoderViT,
    imgs: Tensor,
    *,
    num_masked: int,
    num_hardest: tuple[int, int, int],
    sign: int,
    seed: int,
    patch_stats: str = "image",
) -> dict[str, Tensor]:
    """Look at normalised images (B, C, H, W).

    Args:
        num_hardest: patches chosen by predicted loss in the mask of the start, of the end, and in the one to
            reconstruct from.
        sign: -1 where the strategy chooses the easiest patches.
        seed: of the masks' random part, the same for the three.
        patch_stats: for models of normalised pixels: "image" takes each patch's mean and variance from the image, which
            tells the answer in part; "none" takes those of the visible patches for all.

    Returns:
        `mask_start`, `mask_end`, `mask` (B, L) bool; `errors` (B, L), 0 where a patch is visible; `loss_rec` (B,);
        with a predictor `hardness` (B, L), `loss_learn`, `rank_acc` (B,); for pixels `reconstruction` (B, C, H, W).
    """
    model.eval()
    found = {}
    scores = None
    if model.learning_loss:
        scores = found["hardness"] = model.predict_loss(imgs)
    masks = []
    for count in num_hardest:
        generator = torch.Generator(imgs.device).manual_seed(seed)
        if scores is None:
            shape = (len(imgs), model.patch_embed.num_patches)
            masks.append(random_mask(*shape, num_masked, generator, imgs.device))
        else:
            masks.append(hard_mask(sign * scores, num_masked, count, generator))
    found["mask_start"], found["mask_end"], found["mask"] = masks
    mask = found["mask"]
    if model.target_dim is not None:
        return found  # features: there is nothing to draw but the masks

    out = model(imgs, mask, num_masked=num_masked)
    patch_loss = out["patch_loss"]
    found["errors"] = torch.zeros(mask.shape, device=imgs.device).masked_scatter_(mask, patch_loss)
    found["loss_rec"] = patch_loss.mean(dim=1)
    if model.learning_loss:
        objective = relative_loss if model.relative else absolute_loss
        pairs = [(p[None], t[None]) for p, t in zip(out["loss_pred"], patch_loss, strict=True)]
        found["loss_learn"] = torch.stack([objective(*pair) for pair in pairs])
        found["rank_acc"] = torch.stack([rank_accuracy(*pair) for pair in pairs])
    found["reconstruction"] = reconstruct(model, imgs, mask, out["pred"], patch_stats)
    return found


def reconstruct(
    model: MaskedAutoencoderViT, imgs: Tensor, mask: Tensor, pred: Tensor, patch_stats: str = "image"
) -> Tensor:
    """Predictions (B, M, D) in the place of the masked patches of (B, C, H, W); the visible ones stay as they are."""
    patches = model.patchify(imgs.float())  # (B, L, D)
    ids_visible, ids_masked = split_mask(mask, pred.shape[1])
    pred = pred.float()
    if model.norm_pix_loss:
        shown = gather_tokens(patches, ids_masked if patch_stats == "image" else ids_visible)
        variance, mean = torch.var_mean(shown, dim=-1, keepdim=True)  # (B, M or V, 1)
        deviation = (variance + 1e-6).sqrt()
        if patch_stats == "none":
            mean, deviation = mean.mean(dim=1, keepdim=True), deviation.mean(dim=1, keepdim=True)
        pred = pred * deviation + mean
    return model.unpatchify(patches.scatter(1, ids_masked[:, :, None].expand_as(pred), pred))


def panel(
    model: MaskedAutoencoderViT,
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    names: Sequence[str],
    moment: str,
    patch_stats: str = "image",
    **examination: int | tuple[int, int, int],
) -> tuple[list[list[np.ndarray]], list[str], list[str]]:
    """Columns of pictures of images (B, 3, H, W) uint8, for util/pictures.draw_grid: rows, titles, captions.

    Args:
        moment: the epoch whose mask is reconstructed from, in words.
        examination: what `examine` asks for.
    """
    device = next(model.parameters()).device
    imgs = ToModelInput(mean, std, device, flip=False)(images)
    found = {k: v.cpu() for k, v in examine(model, imgs, patch_stats=patch_stats, **examination).items()}
    grid, patch = tuple(model.patch_embed.grid_size), model.patch_embed.patch_size[0]
    stats = {"image": "patch mean and variance from the image", "none": "no patch statistics"}[patch_stats]
    titles = {
        "image": "image",
        "hardness": "predicted hardness",
        "mask_start": "mask at the start" if "hardness" in found else "mask",
        "mask_end": "mask at the end",
        "reconstruction": f"reconstruction ({moment})" + f", {stats}" * model.norm_pix_loss,
        "errors": f"true error ({moment})",
    }
    if "hardness" not in found:
        del titles["mask_end"]
    shown = [name for name in titles if name == "image" or name in found]

    rows, captions = [], []
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        mask = found["mask"][i].numpy()
        draw = {
            "image": lambda image=image: image,
            "hardness": lambda i=i, image=image: heat_map(
                image, hardness_scale(found["hardness"][i].numpy()), grid, patch
            ),
            "mask_start": lambda i=i, image=image: hide(image, found["mask_start"][i].numpy(), grid, patch),
            "mask_end": lambda i=i, image=image: hide(image, found["mask_end"][i].numpy(), grid, patch),
            "reconstruction": lambda i=i: to_image(found["reconstruction"][i].numpy(), mean, std),
            "errors": lambda i=i, image=image, mask=mask: heat_map(
                image, spread_errors(found["errors"][i].numpy(), mask), grid, patch, shown=mask
            ),
        }
        rows.append([draw[name]() for name in shown])
        figures = [f"{name} {found[name][i]:.3f}" for name in ("rank_acc", "loss_rec", "loss_learn") if name in found]
        captions.append("   ".join([names[i], *figures]))
    return rows, [titles[name] for name in shown], captions


def spread_errors(errors: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Errors of the masked patches on the colour scale; the visible ones have none."""
    scaled = np.zeros_like(errors)
    scaled[mask] = error_scale(errors[mask])
    return scaled
