"""What a pre-trained model sees in images: hardness, masks, reconstruction, error.

Shapes: B batch, C channels, H, W image, P patch size, L patches, V visible, M masked, D prediction width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from models_hpm import MaskedAutoencoderViT, gather_tokens, split_mask
from util.data.transforms import ToModelInput
from util.masking import MaskSampler
from util.metrics import rank_accuracy
from util.rng import generator
from visualize.draw import SCALES, Panel, heat_map, hide, to_image

# What is known of images (B, C, H, W): predicted loss (B, L), feature targets (B, L, D); None where there are none.
Look = Callable[[Tensor], tuple[Tensor | None, Tensor | None]]

PATCH_STATS = {
    "image": "each patch's mean and variance taken from the image",
    "none": "no patch statistics: one mean and variance, of what is visible",
}


@contextmanager
def untouched(model: MaskedAutoencoderViT, device: torch.device, seed: int) -> Iterator[None]:
    """Look at a model in the middle of its training: no gradient, eval mode, randomness from `seed`; all as before
    afterwards."""
    training = model.training
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            model.train(training)


def examine(
    model: MaskedAutoencoderViT,
    imgs: Tensor,
    sampler: MaskSampler,
    *,
    epochs: Sequence[int],
    epoch: int,
    seed: int,
    look: Look | None = None,
    patch_stats: str = "image",
) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    """Look at normalised images (B, C, H, W).

    Args:
        sampler: where the masks come from.
        epochs: whose masks to draw, counted from 0.
        epoch: whose mask to reconstruct from.
        seed: of the masks' random part, the same for every epoch, so that what moves is what the model chooses.
        look: images -> predicted loss (B, L) and feature targets (B, L, D), each or None; the model's own prediction
            and no features if left out.
        patch_stats: see `reconstruct`.

    Returns:
        The masks (B, L) bool of `epochs` and `epoch`; and what was found, on the model's device: `errors` (B, L), 0
        where a patch is visible, and `loss_rec` (B,); with a predictor `loss_learn` and `rank_acc` (B,); with
        predicted loss `hardness` (B, L); for pixels `reconstruction` (B, C, H, W). Without their targets, models of
        features have neither errors nor losses.
    """
    with untouched(model, imgs.device, seed):
        if look is None:
            scores, target = model.predict_loss(imgs) if model.learning_loss else None, None
        else:
            scores, target = look(imgs)
        found = {} if scores is None else {"hardness": scores}
        on_cpu = None if scores is None else scores.float().cpu()  # the same masks whatever the device
        masks = {e: sampler.draw(on_cpu, len(imgs), e, generator(seed)) for e in {*epochs, epoch}}
        if model.target_dim is not None and target is None:
            return masks, found

        mask = masks[epoch].to(imgs.device)
        # Not model(...): a compiled model would be compiled anew for a batch of another size.
        out = model.forward(imgs, mask, target, sampler.num_masked)
        patch_loss = out["patch_loss"]  # (B, M)
        found["errors"] = torch.zeros(mask.shape, device=imgs.device).masked_scatter_(mask, patch_loss)
        found["loss_rec"] = patch_loss.mean(dim=1)
        if model.learning_loss:
            pairs = [(p[None], t[None]) for p, t in zip(out["loss_pred"], patch_loss, strict=True)]
            found["loss_learn"] = torch.stack([model.forward_learning_loss(*pair) for pair in pairs])
            found["rank_acc"] = torch.stack([rank_accuracy(*pair) for pair in pairs])
        if model.target_dim is None:
            found["reconstruction"] = reconstruct(model, imgs, mask, out["pred"], patch_stats)
    return masks, found


def reconstruct(
    model: MaskedAutoencoderViT, imgs: Tensor, mask: Tensor, pred: Tensor, patch_stats: str = "image"
) -> Tensor:
    """Predictions (B, M, D) in the place of the masked patches of (B, C, H, W); the visible ones stay as they are.

    Args:
        patch_stats: for models of normalised pixels. "image" takes each patch's mean and variance from the image, which
            tells part of the answer; "none" uses nothing but what the model saw, the visible patches' mean and standard
            deviation, averaged, for all.
    """
    patches = model.patchify(imgs.float())  # (B, L, D)
    ids_visible, ids_masked = split_mask(mask, pred.shape[1])
    pred = pred.float()
    if model.norm_pix_loss:
        known = gather_tokens(patches, ids_masked if patch_stats == "image" else ids_visible)
        variance, mean = torch.var_mean(known, dim=-1, keepdim=True)  # (B, M or V, 1)
        deviation = (variance + 1e-6).sqrt()
        if patch_stats == "none":
            mean, deviation = mean.mean(dim=1, keepdim=True), deviation.mean(dim=1, keepdim=True)
        pred = pred * deviation + mean
    return model.unpatchify(patches.scatter(1, ids_masked[:, :, None].expand_as(pred), pred))


def panel(
    model: MaskedAutoencoderViT,
    images: Tensor,
    names: Sequence[str],
    sampler: MaskSampler,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    epochs: Sequence[int],
    epoch: int,
    seed: int,
    look: Look | None = None,
    patch_stats: str = "image",
    scale: str = "author",
) -> Panel:
    """Pictures of images (B, 3, H, W) uint8, a row each.

    Args:
        names: of the images, for the captions.
        scale: how numbers become colours, a name in visualize/draw.SCALES.
        mean, std: of the images the model was trained on.

    The others are those of `examine`.
    """
    imgs = ToModelInput(mean, std, next(model.parameters()).device, flip=False)(images)
    masks, found = examine(
        model, imgs, sampler, epochs=epochs, epoch=epoch, seed=seed, look=look, patch_stats=patch_stats
    )
    masks = {e: mask.numpy() for e, mask in masks.items()}
    found = {name: value.cpu().float().numpy() for name, value in found.items()}
    grid, patch = sampler.grid_size, model.patch_embed.patch_size[0]
    to_scale = SCALES[scale]

    columns = {("image", ""): lambda i, image: image}
    if "hardness" in found:
        columns["predicted hardness", "all patches visible"] = lambda i, image: heat_map(
            image, to_scale(found["hardness"][i]), grid, patch
        )
    for e in whose_masks(sampler, epochs):
        columns[mask_title(sampler, e, epochs), mask_note(sampler, e)] = lambda i, image, e=e: hide(
            image, masks[e][i], grid, patch
        )
    from_mask = f"from the {mask_title(sampler, epoch, epochs)}"
    if "reconstruction" in found:
        stats = f"; {PATCH_STATS[patch_stats]}" * model.norm_pix_loss
        columns["reconstruction", from_mask + stats] = lambda i, image: to_image(found["reconstruction"][i], mean, std)
    if "errors" in found:
        columns["true error" if model.target_dim is None else "true error of features", from_mask] = lambda i, image: (
            heat_map(
                image, on_masked(to_scale, found["errors"][i], masks[epoch][i]), grid, patch, shown=masks[epoch][i]
            )
        )
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    figures = [name for name in ("rank_acc", "loss_rec", "loss_learn") if name in found]
    return Panel(
        titles=list(columns),
        rows=[[draw(i, image) for draw in columns.values()] for i, image in enumerate(pixels)],
        captions=[(name, [f"{f} {found[f][i]:.3f}" for f in figures]) for i, name in enumerate(names)],
        has_scale="hardness" in found or "errors" in found,
    )


def whose_masks(sampler: MaskSampler, epochs: Sequence[int]) -> list[int]:
    """The epochs whose masks differ in what is chosen: a strategy that does not change has one column."""
    ordered = sorted(set(epochs))
    return ordered if len({sampler.num_hardest(e) for e in ordered}) > 1 else ordered[-1:]


def mask_title(sampler: MaskSampler, epoch: int, epochs: Sequence[int]) -> str:
    if len(whose_masks(sampler, epochs)) == 1 and len(set(epochs)) > 1:
        return "mask"
    words = {0: "mask at the start", sampler.epochs - 1: "mask at the end"}
    return words.get(epoch, f"mask of epoch {epoch}")


def mask_note(sampler: MaskSampler, epoch: int) -> str:
    """How the masked patches were chosen."""
    chosen = sampler.num_hardest(epoch)
    if sampler.pattern is not None:
        return f"{sampler.pattern} pattern"
    if chosen == 0:
        return f"{sampler.num_masked} of {sampler.num_patches}, at random"
    kind = "easiest" if sampler.strategy == "easiest" else "hardest"
    return f"{sampler.num_masked} of {sampler.num_patches}, {chosen} of them the {kind}"


def on_masked(to_scale: Callable[[np.ndarray], np.ndarray], errors: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Errors (L,) of the masked patches on the colour scale, standardised first: their spread is that of the data,
    where the predictor's is its own. The visible patches have none."""
    scaled = np.zeros_like(errors)
    known = errors[mask]
    scaled[mask] = to_scale((known - known.mean()) / (known.std() + 1e-12))
    return scaled
