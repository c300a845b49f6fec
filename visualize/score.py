"""What the models compute for a picture: the teacher's scores, and the student's reconstruction and losses.

Shapes: B batch, C channels, H, W image, L patches, V visible, M masked, D prediction width, E encoder width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from models_hpm import MaskedAutoencoderViT
from util.masking import MaskSampler, gather_tokens, split_mask
from util.metrics import rank_accuracy
from util.rng import generator

# Images (B, C, H, W) and the teacher's tokens (B, L, E; None without a teacher) -> feature targets (B, L, D).
FeatureTarget = Callable[[Tensor, Tensor | None], Tensor | None]


@contextmanager
def untouched(model: MaskedAutoencoderViT, device: torch.device, seed: int) -> Iterator[None]:
    """Use a model in eval mode, without gradients, with the RNG seeded by `seed`; then restore its mode and the RNG."""
    training = model.training
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            model.train(training)


def teacher_outputs(
    teacher: MaskedAutoencoderViT | None,
    imgs: Tensor,
    masks: MaskSampler,
    feature_target: FeatureTarget | None,
    seed: int,
) -> tuple[Tensor | None, Tensor | None]:
    """The teachers of a training step: scores (B, L) on the CPU, so that masks do not depend on the device, and feature
    targets (B, L, D); None without."""
    scores = tokens = hidden = None
    if masks.num_hidden > 0:
        hidden = masks.draw_hidden(len(imgs), generator(seed, 1))  # (B, L)
    if teacher is not None and hidden is None:
        scores, tokens = teacher.score_patches(imgs)  # (B, L), (B, L, E)
    target = feature_target(imgs, tokens) if feature_target else None
    if teacher is not None and hidden is not None:
        scores, _ = teacher.score_patches(imgs, hidden.to(imgs.device), masks.num_hidden, target)
    return None if scores is None else scores.float().cpu(), target


def reconstruct_and_score(
    model: MaskedAutoencoderViT, imgs: Tensor, mask: Tensor, target: Tensor | None = None, patch_stats: str = "image"
) -> dict[str, Tensor]:
    """Reconstruct images (B, C, H, W) under masks (B, L) and compute the losses of each image.

    Returns:
        `errors` (B, L), 0 for visible patches; `loss_rec` (B,); with a loss predictor `loss_learn` and `rank_acc` (B,);
        for pixels `reconstruction` (B, C, H, W). Nothing for a model of features without its `target` (B, L, D).
    """
    if model.target_dim is not None and target is None:
        return {}
    # Not model(...): a compiled model would be recompiled for this batch size
    out = model.forward(imgs, mask, target)
    patch_loss = out["patch_loss"]  # (B, M)
    result = {
        "errors": torch.zeros(mask.shape, device=imgs.device).masked_scatter_(mask, patch_loss),
        "loss_rec": patch_loss.mean(dim=1),
    }
    if model.learning_loss:
        pairs = [(p[None], t[None]) for p, t in zip(out["loss_pred"], patch_loss, strict=True)]  # (1, M)
        result["loss_learn"] = torch.stack([model.forward_learning_loss(*pair) for pair in pairs])
        result["rank_acc"] = torch.stack([rank_accuracy(*pair) for pair in pairs])
    if model.target_dim is None and (model.target_transform is None or model.norm_pix_loss):
        result["reconstruction"] = reconstruct(model, imgs, mask, out["pred"], patch_stats)
    return result


def reconstruct(
    model: MaskedAutoencoderViT, imgs: Tensor, mask: Tensor, pred: Tensor, patch_stats: str = "image"
) -> Tensor:
    """Images (B, C, H, W) with predictions (B, M, D) in place of the masked patches (B, L); visible ones are unchanged.

    Args:
        patch_stats: of models of normalised pixels. "image" takes each patch's mean and variance from the image, which
            reveals part of the answer; "none" uses the averages of mean and standard deviation over the visible ones.
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
