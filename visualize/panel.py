"""Panels of a few images: predicted loss, masks, reconstruction and true error, from a checkpoint or during training.

Shapes: B batch, C channels, H, W image, S crop, L patches, V visible, M masked, D prediction width, E encoder width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models_hpm import MaskedAutoencoderViT
from util.data.datasets import ImageDataset
from util.data.sources import Source, build_source, compressed_archive
from util.data.transforms import CenterCrop, ToModelInput
from util.masking import MaskSampler, gather_tokens, split_mask
from util.metrics import rank_accuracy
from util.rng import generator
from util.run.logger import log
from visualize.draw import SCALES, Panel, draw_grid, heat_map, hide, to_image

# Images (B, C, H, W) and the teacher's tokens (B, L, E; None without a teacher) -> feature targets (B, L, D).
FeatureTarget = Callable[[Tensor, Tensor | None], Tensor | None]

ATTEMPTS = 20  # unreadable images after which no more are tried

PATCH_STATS = {
    "image": "each patch's mean and variance taken from the image",
    "none": "no patch statistics: one mean and variance, of the visible patches",
}


def pick_panel_images(
    data_path: str | list[str] | None, train: Source, size: int, cache_dir: str | None = None
) -> tuple[Tensor, list[str]] | None:
    """`pick_images` of the val split if there is one that can be read without decompressing another archive, else of
    the training images; None if they are unreadable, because pictures must not stop the training."""
    try:
        if isinstance(data_path, list):
            raise ValueError("there are several --data_path")
        if data_path is not None:
            packed, present = (compressed_archive(Path(data_path), split) for split in ("val", "train"))
            if packed not in (None, present):
                raise ValueError(f"{packed} is compressed")
        return pick_images(build_source(data_path, "val", cache_dir=cache_dir), size)
    except (ValueError, OSError) as error:
        log.info("No usable val split for the panels, falling back to training images: %s", error)
    try:
        return pick_images(train, size)
    except ValueError as error:
        log.warning("No panels: %s", error)
        return None


def pick_images(source: Source, size: int, count: int = 8) -> tuple[Tensor, list[str]]:
    """Centre crops (N, 3, S, S) uint8 of `count` images, evenly spaced over the source, and their names. Unreadable
    images are replaced as in `read_crops`."""
    candidates = [(source, index) for index in range(len(source))]
    return read_crops(candidates, [len(source) * i // count for i in range(count)], size)


def read_crops(
    candidates: Sequence[tuple[Source, int]], starts: Iterable[int], size: int, strict: bool = False
) -> tuple[Tensor, list[str]]:
    """Centre crops (N, 3, S, S) uint8 of the images at the positions `starts` of `candidates`, and their names. An
    unreadable image is replaced by the next candidate, with a warning.

    Raises:
        ValueError: no image is readable; with `strict`, one is not.
    """
    crop = CenterCrop(size)
    images, names, unreadable, position = [], [], 0, 0
    for start in starts:
        position = max(position, start)
        while position < len(candidates) and unreadable < ATTEMPTS:
            source, index = candidates[position]
            position += 1
            try:
                images.append(ImageDataset(source, crop)[index].image)
                names.append("/".join(Path(source.name(index)).parts[-2:]))
                break
            except ValueError as error:
                if strict:
                    raise
                unreadable += 1
                log.warning("Unreadable image, replaced by the next one: %s", error)
    if not images:
        raise ValueError(f"none of the images can be read ({unreadable} tried)")
    return torch.stack(images), names


def training_panel(
    student: MaskedAutoencoderViT,
    teacher: MaskedAutoencoderViT | None,
    images: Tensor,
    names: Sequence[str],
    masks: MaskSampler,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    feature_target: FeatureTarget | None,
    epochs_done: int,
    seed: int,
) -> Tensor:
    """The `panel` of a run after `epochs_done` epochs, with the masks of the last of them: (3, H, W) uint8."""
    settings: dict[str, Any] = {"mean": mean, "std": std, "epoch": epochs_done - 1, "seed": seed}
    drawn = panel(student, teacher, images, names, masks, feature_target=feature_target, **settings)
    picture = draw_grid(drawn, f"{epochs_done} of {masks.epochs} epochs")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def panel(
    model: MaskedAutoencoderViT,
    teacher: MaskedAutoencoderViT | None,
    images: Tensor,
    names: Sequence[str],
    masks: MaskSampler,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    epoch: int,
    seed: int,
    other_epochs: Sequence[int] = (),
    feature_target: FeatureTarget | None = None,
    patch_stats: str = "image",
    scale: str = "author",
    weights: tuple[str, str] = ("EMA teacher", "student"),
) -> Panel:
    """One row of pictures for each image (B, 3, H, W) uint8. The state of the model is untouched.

    Args:
        model: reconstructs the images and predicts the loss of the masked patches.
        teacher: scores the patches, by which the masks are chosen; None for random masks.
        epoch: whose mask to reconstruct from, counted from 0. The masks of `other_epochs` are drawn as well.
        seed: of the random part of the masks, the same in all epochs, so that only the chosen patches differ.
        feature_target: of models that reconstruct features. Without it they have neither error nor losses.
        patch_stats: see `reconstruct`.
        scale: how values become colours, a name in `SCALES`.
        weights: names of `teacher` and `model`, for the line that says whose predictions are shown.
    """
    device = next(model.parameters()).device
    imgs = ToModelInput(mean, std, device, flip=False)(images)
    scores = tokens = None
    unseen = masks.draw_hidden(len(imgs), generator(seed, 1))  # (B, L); None if the teacher sees the whole image
    with untouched(model, device, seed):
        if teacher is not None and unseen is None:
            scores, tokens = teacher.score_patches(imgs)  # (B, L), (B, L, E)
        target = feature_target(imgs, tokens) if feature_target else None  # (B, L, D)
        if teacher is not None and unseen is not None:
            scores, _ = teacher.score_patches(imgs, unseen.to(device), masks.num_hidden, target)
        scores = None if scores is None else scores.float().cpu()  # so that the masks do not depend on the device
        mask_of = {e: masks.draw(scores, len(imgs), e, generator(seed)) for e in {epoch, *other_epochs}}  # (B, L)
        result = reconstruct_and_score(model, imgs, mask_of[epoch].to(device), target, patch_stats)

    found = {name: value.float().cpu().numpy() for name, value in result.items()}
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    grid, patch, to_scale = masks.grid_size, model.patch_embed.patch_size[0], SCALES[scale]
    columns = [("image", "", list(pixels))]
    if scores is not None:
        maps = []
        for x, s in zip(pixels, scores.numpy(), strict=True):
            scored = ~np.isneginf(s)
            values = np.zeros_like(s)
            values[scored] = to_scale(s[scored])
            maps.append(heat_map(x, values, grid, patch, shown=scored))
        columns.append((*score_title(masks, teacher), maps))
    titles = mask_titles(masks, [epoch, *other_epochs])
    for e, title in titles.items():
        hidden = [hide(x, mask, grid, patch) for x, mask in zip(pixels, mask_of[e].numpy(), strict=True)]
        columns.append((title, mask_note(masks, e), hidden))
    note = f"from the {titles.get(epoch, 'mask')}"
    if "reconstruction" in found:
        stats = f"{note}; {PATCH_STATS[patch_stats]}" if model.norm_pix_loss else note
        columns.append(("reconstruction", stats, [to_image(x, mean, std) for x in found["reconstruction"]]))
    if "errors" in found:
        title = "true error" if model.target_dim is None else "true error of features"
        triples = zip(pixels, found["errors"], mask_of[epoch].numpy(), strict=True)
        maps = [heat_map(x, masked_scale(to_scale, e, mask), grid, patch, shown=mask) for x, e, mask in triples]
        columns.append((title, note, maps))
    footer = f"reconstruction: {weights[1]}"
    if scores is not None:
        chosen = any(masks.num_hardest(e) for e in mask_of)
        footer = f"predicted hardness{' and masks' if chosen else ''}: {weights[0]}    {footer}"
    metrics = [name for name in ("rank_acc", "loss_rec", "loss_learn") if name in found]
    return Panel(
        titles=[(title, note) for title, note, _ in columns],
        rows=[list(row) for row in zip(*(pictures for _, _, pictures in columns), strict=True)],
        captions=[(name, "    ".join(f"{m} {found[m][i]:.3f}" for m in metrics)) for i, name in enumerate(names)],
        footer=footer,
    )


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
    if model.target_dim is None:
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


def score_title(masks: MaskSampler, teacher: MaskedAutoencoderViT | None) -> tuple[str, str]:
    """Title and note of the column of scores."""
    by_loss = teacher is not None and teacher.score_by == "loss"
    title = "loss of the teacher" if by_loss else "predicted hardness"
    if masks.num_hidden == 0:
        return title, "all patches visible"
    return title, f"of {masks.num_hidden} patches hidden from the teacher"


def mask_titles(masks: MaskSampler, epochs: Sequence[int]) -> dict[int, str]:
    """Titles of the mask columns by epoch: one column if the strategy selects the same number in all of them."""
    epochs = sorted(set(epochs))
    if len(epochs) > 1 and len({masks.num_hardest(e) for e in epochs}) == 1:
        return {epochs[-1]: "mask"}
    ends = {0: "mask at the start", masks.epochs - 1: "mask at the end"}
    return {e: ends.get(e, f"mask of epoch {e}") for e in epochs}


def mask_note(masks: MaskSampler, epoch: int) -> str:
    """How the masked patches of an epoch are selected."""
    if masks.pattern is not None:
        return f"{masks.pattern} pattern"
    selected = masks.num_hardest(epoch)
    if selected == 0:
        return f"{masks.num_masked} of {masks.num_patches}, at random"
    kind = "easiest" if masks.strategy == "easiest" else "hardest"
    return f"{masks.num_masked} of {masks.num_patches}, {selected} of them the {kind}"


def masked_scale(scale: Callable[[np.ndarray], np.ndarray], errors: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Errors (L,) of the masked patches -> 0 to 1, standardised first because their range is that of the data."""
    known = errors[mask]
    scaled = np.zeros_like(errors)
    scaled[mask] = scale((known - known.mean()) / (known.std() + 1e-12))
    return scaled
