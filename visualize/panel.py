"""Panels of a few images: predicted loss, masks, reconstruction and true error, from a checkpoint or during training.

Shapes: B batch, N images, S side of the crop, H, W picture, L patches.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models_hpm import MaskedAutoencoderViT
from util.data.datasets import ImageDataset
from util.data.places import compressed_archive
from util.data.sources import Source, build_source
from util.data.transforms import CenterCrop, ToModelInput
from util.masking import STRATEGIES, MaskSampler
from util.rng import generator
from util.run.logger import log
from visualize.draw import SCALES, Panel, Scale, draw_grid, heat_map, hide, to_image
from visualize.score import FeatureTarget, reconstruct_and_score, teacher_outputs, untouched

ATTEMPTS = 20  # unreadable images after which no more are tried

PATCH_STATS = {
    "image": "each patch's mean and variance taken from the image",
    "none": "no patch statistics: one mean and variance, of the visible patches",
}


def pick_panel_images(
    data_path: str | list[str] | None,
    train: Source,
    size: int,
    cache_dir: str | None = None,
    held_out: Source | None = None,
    **settings: Any,
) -> tuple[Tensor, list[str]] | None:
    """`pick_images` of the images that are held out, else of the val split if there is one that can be read without
    decompressing another archive, else of the training images; None if they are unreadable, because pictures must not
    stop the training. `settings` are those of `build_source`."""
    try:
        if held_out is not None:
            return pick_images(held_out, size)
        for path in [data_path] if isinstance(data_path, str) else data_path or []:
            packed = compressed_archive(Path(path), "val")
            if packed not in (None, compressed_archive(Path(path), "train")):
                raise ValueError(f"{packed} is compressed")
        val = build_source(data_path, "val", labels_needed=False, cache_dir=cache_dir, **settings)
        return pick_images(val, size)
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
    return read_crops(source, range(len(source)), [len(source) * i // count for i in range(count)], size)


def read_crops(
    source: Source, order: Sequence[int], starts: Iterable[int], size: int, strict: bool = False
) -> tuple[Tensor, list[str]]:
    """Centre crops (N, 3, S, S) uint8 of the images at the positions `starts` of `order`, which holds indices, and
    their names. An unreadable image is replaced by the next one in `order`, with a warning.

    Raises:
        ValueError: no image is readable; with `strict`, one is not.
    """
    dataset = ImageDataset(source, CenterCrop(size))
    images, names, unreadable, position = [], [], 0, 0
    for start in starts:
        position = max(position, start)
        while position < len(order) and unreadable < ATTEMPTS:
            index = int(order[position])
            position += 1
            try:
                images.append(dataset[index].image)
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
    imgs = ToModelInput(tuple(mean), tuple(std), device, flip=False)(images)
    with untouched(model, device, seed):
        scores, target = teacher_outputs(teacher, imgs, masks, feature_target, seed)  # (B, L), (B, L, D)
        mask_of = {e: masks.draw(scores, len(imgs), e, generator(seed)) for e in {epoch, *other_epochs}}  # (B, L)
        result = reconstruct_and_score(model, imgs, mask_of[epoch].to(device), target, patch_stats)

    found = {name: value.float().cpu().numpy() for name, value in result.items()}
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    grid, patch, to_scale = masks.grid_size, model.patch_embed.patch_size[0], SCALES[scale]
    columns = [("image", "", list(pixels))]
    footer = f"reconstruction: {weights[1]}"
    if scores is not None:
        title, note = score_title(masks, teacher)
        values, scored_by = scores.numpy(), standardised(to_scale) if by_loss(masks, teacher) else to_scale
        columns.append((title, note, heat_maps(pixels, values, ~np.isneginf(values), scored_by, grid, patch)))
        chosen = " and masks" if any(masks.num_hardest[e] for e in mask_of) else ""
        footer = f"{title}{chosen}: {weights[0]}    {footer}"
    titles = mask_titles(masks, [epoch, *other_epochs])
    for e, title in titles.items():
        hidden = [hide(image, mask, grid, patch) for image, mask in zip(pixels, mask_of[e].numpy(), strict=True)]
        columns.append((title, mask_note(masks, e), hidden))
    note = f"from the {titles.get(epoch, 'mask')}"
    if "reconstruction" in found:
        stats = f"{note}; {PATCH_STATS[patch_stats]}" if model.norm_pix_loss else note
        columns.append(("reconstruction", stats, [to_image(x, mean, std) for x in found["reconstruction"]]))
    if "errors" in found:
        title = "true error" if model.target_dim is None else "true error of features"
        known = mask_of[epoch].numpy()
        columns.append((title, note, heat_maps(pixels, found["errors"], known, standardised(to_scale), grid, patch)))
    metrics = [name for name in ("rank_acc", "loss_rec", "loss_learn") if name in found]
    return Panel(
        titles=[(title, note) for title, note, _ in columns],
        rows=[list(row) for row in zip(*(pictures for _, _, pictures in columns), strict=True)],
        captions=[(name, "    ".join(f"{m} {found[m][i]:.3f}" for m in metrics)) for i, name in enumerate(names)],
        footer=footer,
    )


def by_loss(masks: MaskSampler, teacher: MaskedAutoencoderViT | None) -> bool:
    """Whether the scores are reconstruction losses. Of the whole image they are the predictor's."""
    return teacher is not None and teacher.score_by == "loss" and masks.num_hidden > 0


def score_title(masks: MaskSampler, teacher: MaskedAutoencoderViT | None) -> tuple[str, str]:
    """Title and note of the column of scores."""
    title = "loss of the teacher" if by_loss(masks, teacher) else "predicted hardness"
    if masks.num_hidden == 0:
        return title, "all patches visible"
    return title, f"of {masks.num_hidden} hidden patches"


def mask_titles(masks: MaskSampler, epochs: Sequence[int]) -> dict[int, str]:
    """Titles of the mask columns by epoch: one column if the strategy selects the same number in all of them."""
    epochs = sorted(set(epochs))
    if len(epochs) > 1 and len({masks.num_hardest[e] for e in epochs}) == 1:
        return {epochs[-1]: "mask"}
    ends = {0: "mask at the start", masks.epochs - 1: "mask at the end"}
    return {e: ends.get(e, f"mask of epoch {e}") for e in epochs}


def mask_note(masks: MaskSampler, epoch: int) -> str:
    """How the masked patches of an epoch are selected."""
    if masks.pattern is not None:
        return f"{masks.pattern} pattern"
    selected = masks.num_hardest[epoch]
    if selected == 0:
        return f"{masks.num_masked} of {masks.num_patches}, at random"
    return f"{masks.num_masked} of {masks.num_patches}, {selected} of them the {STRATEGIES[masks.strategy].chosen}"


def heat_maps(
    pixels: np.ndarray, values: np.ndarray, known: np.ndarray, to_scale: Scale, grid: tuple[int, int], patch: int
) -> list[np.ndarray]:
    """Values (B, L) of the `known` patches (B, L) over the images, in colours relative to the image."""
    maps = []
    for image, value, shown in zip(pixels, values, known, strict=True):
        scaled = np.zeros_like(value)
        scaled[shown] = to_scale(value[shown])
        maps.append(heat_map(image, scaled, grid, patch, shown))
    return maps


def standardised(to_scale: Scale) -> Scale:
    """A scale for errors, whose range is that of the data."""
    return lambda errors: to_scale((errors - errors.mean()) / (errors.std() + 1e-12))
