"""Grids of pictures, drawn with Pillow: images, masks, heat maps, reconstructions, with titles and captions.

Shapes: H, W image, h, w grid of patches, P patch size, L = h * w. Images are (H, W, 3) uint8 arrays.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACKGROUND, INK, FAINT = (255, 255, 255), (30, 30, 30), (120, 120, 120)
HIDDEN = (200, 200, 200)  # what stands where a patch is masked

# From black over purple and orange to pale yellow: lightness rises evenly, so it reads in grey too.
_SCALE = np.array(
    [
        *[(0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85)],
        *[(227, 89, 51), (249, 140, 10), (249, 201, 50), (252, 255, 164)],
    ],
    dtype=np.float64,
)


def colorize(values: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 1 of any shape -> the same shape with a last axis of three, uint8."""
    place = np.clip(np.nan_to_num(values, nan=1.0), 0, 1) * (len(_SCALE) - 1)
    below = np.minimum(place.astype(int), len(_SCALE) - 2)
    part = (place - below)[..., None]
    return (_SCALE[below] * (1 - part) + _SCALE[below + 1] * part + 0.5).astype(np.uint8)


def hardness_scale(scores: np.ndarray) -> np.ndarray:
    """Predicted losses of an image's patches (L,) -> 0 to 1, as HPM's author draws them (issue 3 of his repository):
    mean taken off, sigmoid, divided by the maximum."""
    scaled = 1 / (1 + np.exp(-np.clip(scores - scores.mean(), -60, 60)))
    return scaled / scaled.max()


def error_scale(errors: np.ndarray) -> np.ndarray:
    """True errors of an image's patches -> 0 to 1: standardised first, since their spread is that of the data, then
    as `hardness_scale`."""
    return hardness_scale((errors - errors.mean()) / (errors.std() + 1e-12))


def spread(values: np.ndarray, grid: tuple[int, int], patch: int) -> np.ndarray:
    """One value a patch, (L, ...) -> one a pixel, (H, W, ...)."""
    values = values.reshape(*grid, *values.shape[1:])
    return values.repeat(patch, axis=0).repeat(patch, axis=1)


def heat_map(
    image: np.ndarray, values: np.ndarray, grid: tuple[int, int], patch: int, shown: np.ndarray | None = None
) -> np.ndarray:
    """Values from 0 to 1 of each patch (L,) in colour over the grey image.

    Args:
        shown: (L,) bool, the patches that have a value; the others are left pale.
    """
    grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)
    picture = 0.35 * grey + 0.65 * spread(colorize(values), grid, patch)
    if shown is not None:
        picture = np.where(spread(shown, grid, patch)[..., None], picture, 0.25 * grey + 0.75 * 255)
    return picture.clip(0, 255).astype(np.uint8)


def hide(image: np.ndarray, mask: np.ndarray, grid: tuple[int, int], patch: int) -> np.ndarray:
    """The image with its masked patches, (L,) bool, grey."""
    return np.where(spread(mask, grid, patch)[..., None], np.array(HIDDEN, np.uint8), image)


def to_image(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised (3, H, W) -> (H, W, 3) uint8."""
    channels = pixels * np.array(std)[:, None, None] + np.array(mean)[:, None, None]
    return (channels.transpose(1, 2, 0).clip(0, 1) * 255 + 0.5).astype(np.uint8)


def draw_grid(
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str],
    captions: Sequence[str],
    heading: str = "",
    scale_label: tuple[str, str] | None = None,
    cell: int = 176,
) -> Image.Image:
    """Rows of images under column titles, each row with a caption below it.

    Args:
        heading: a line above it all.
        scale_label: words at the low and the high end of the colour scale; None draws no scale.
        cell: width of a column in pixels; images are enlarged or reduced to it.
    """
    gap, margin = 8, 14
    title_font, text_font = ImageFont.load_default(13), ImageFont.load_default(12)
    wrapped = [_wrap(title, cell, title_font) for title in titles]
    title_height = 17 * max(len(lines) for lines in wrapped) + 4
    top = margin + (22 if heading else 0)
    heights = [round(cell * row[0].shape[0] / row[0].shape[1]) for row in rows]
    caption_height = 24 if any(captions) else gap
    width = 2 * margin + len(titles) * (cell + gap) - gap
    height = top + title_height + sum(heights) + len(rows) * caption_height + (34 if scale_label else 0) + margin
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    if heading:
        draw.text((margin, margin - 2), _fit(heading, width - 2 * margin, title_font), INK, title_font)
    for column, lines in enumerate(wrapped):
        for number, line in enumerate(lines):
            draw.text((margin + column * (cell + gap), top + 17 * number), line, INK, title_font)
    y = top + title_height
    for row, caption, row_height in zip(rows, captions, heights, strict=True):
        for column, image in enumerate(row):
            canvas.paste(_resized(image, cell, row_height), (margin + column * (cell + gap), y))
        draw.text((margin, y + row_height + 3), _fit(caption, width - 2 * margin, text_font), FAINT, text_font)
        y += row_height + caption_height
    if scale_label:
        _draw_scale(canvas, draw, margin, y + 6, scale_label, text_font)
    return canvas


def _resized(image: np.ndarray, width: int, height: int) -> Image.Image:
    enlarged = width > image.shape[1]  # small images keep their pixels visible
    return Image.fromarray(image).resize((width, height), Image.NEAREST if enlarged else Image.LANCZOS)


def _draw_scale(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    x: int,
    y: int,
    words: tuple[str, str],
    font: ImageFont.ImageFont,
) -> None:
    draw.text((x, y), words[0], INK, font)
    x += round(draw.textlength(words[0], font)) + 8
    bar = colorize(np.linspace(0, 1, 160))[None].repeat(14, axis=0)
    canvas.paste(Image.fromarray(bar), (x, y + 1))
    draw.text((x + 168, y), words[1], INK, font)


def _wrap(text: str, width: int, font: ImageFont.ImageFont) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _fit(text: str, width: int, font: ImageFont.ImageFont) -> str:
    """Shortened with dots until it is no wider than `width`."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text} ...") > width:
        text = text[:-1]
    return f"{text.rstrip()} ..."
