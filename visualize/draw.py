"""Grids of images, masks, heat maps and reconstructions with titles and captions, drawn with Pillow.

Shapes: H, W image, h, w grid of patches, P patch size, L = h * w. Images are (H, W, 3) uint8 arrays.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

BACKGROUND, INK, FAINT = (255, 255, 255), (30, 30, 30), (110, 110, 110)
HIDDEN = (200, 200, 200)  # colour of masked patches
COLOR, PALE = 0.75, 0.75  # opacity of a heat map; of white over patches without a value
COLUMN, MIN_COLUMN, GAP, MARGIN, LINE = 192, 96, 8, 14, 16
LEGEND = 372  # width of the colour scale with its labels

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

# matplotlib's inferno: lightness increases evenly, so it also reads in greyscale.
_INFERNO = ("#000004", "#1f0c48", "#550f6d", "#88226a", "#ba3655", "#e35933", "#f98c0a", "#f9c932", "#fcffa4")
_SCALE = np.array([ImageColor.getrgb(color) for color in _INFERNO], dtype=np.float64)


def colorize(values: np.ndarray) -> np.ndarray:
    """Values from 0 to 1 of any shape -> the same shape with a last axis of three, uint8. NaN counts as 1."""
    position = np.clip(np.nan_to_num(values, nan=1.0), 0, 1) * (len(_SCALE) - 1)
    below = np.minimum(position.astype(int), len(_SCALE) - 2)
    part = (position - below)[..., None]
    return (_SCALE[below] * (1 - part) + _SCALE[below + 1] * part + 0.5).astype(np.uint8)


def author_scale(scores: np.ndarray) -> np.ndarray:
    """Values of an image's patches (L,) -> 0 to 1, as HPM's author draws predicted losses (issue 3 of his repository):
    subtract the mean, apply a sigmoid, divide by the maximum."""
    scaled = 1 / (1 + np.exp(-np.clip(scores - scores.mean(), -60, 60)))
    return scaled / scaled.max()


def rank_scale(scores: np.ndarray) -> np.ndarray:
    """Values of an image's patches (L,) -> their ranks, evenly spaced from 0 (lowest) to 1. Masks depend on the ranks
    alone."""
    return scores.argsort(kind="stable").argsort(kind="stable") / max(len(scores) - 1, 1)


Scale = Callable[[np.ndarray], np.ndarray]
SCALES: dict[str, Scale] = {"author": author_scale, "rank": rank_scale}


def upsample(values: np.ndarray, grid: tuple[int, int], patch: int) -> np.ndarray:
    """One value per patch, (L, ...) -> one per pixel, (H, W, ...)."""
    values = values.reshape(*grid, *values.shape[1:])
    return values.repeat(patch, axis=0).repeat(patch, axis=1)


def heat_map(
    image: np.ndarray, values: np.ndarray, grid: tuple[int, int], patch: int, shown: np.ndarray | None = None
) -> np.ndarray:
    """Values from 0 to 1 of the patches (L,), in colour over the greyscale image.

    Args:
        shown: (L,) bool, the patches that have a value; the others are drawn pale.
    """
    grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)
    picture = COLOR * upsample(colorize(values), grid, patch) + (1 - COLOR) * grey
    if shown is not None:
        picture = np.where(upsample(shown, grid, patch)[..., None], picture, PALE * 255 + (1 - PALE) * grey)
    return picture.clip(0, 255).astype(np.uint8)


def hide(image: np.ndarray, mask: np.ndarray, grid: tuple[int, int], patch: int) -> np.ndarray:
    """The image with its masked patches, (L,) bool, in grey."""
    return np.where(upsample(mask, grid, patch)[..., None], np.array(HIDDEN, np.uint8), image)


def to_image(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised (3, H, W) -> (H, W, 3) uint8."""
    channels = pixels * np.array(std)[:, None, None] + np.array(mean)[:, None, None]
    return (channels.transpose(1, 2, 0).clip(0, 1) * 255 + 0.5).astype(np.uint8)


class Panel(NamedTuple):
    """(title, note) of each column, rows of equally sized images, (name, metrics) of each row, and a line below."""

    titles: list[tuple[str, str]]
    rows: list[list[np.ndarray]]
    captions: list[tuple[str, str]]
    footer: str


def column_width(side: int, wanted: int) -> int:
    """Width at which an image of `side` pixels is drawn if about `wanted` are requested: small images are enlarged by
    an integer factor, slightly larger ones are unchanged, larger ones are reduced."""
    return wanted if side > wanted * 4 / 3 else side * max(1, round(wanted / side))


def draw_grid(panel: Panel, heading: str = "", column: int = COLUMN) -> Image.Image:
    """Rows of images under column titles, a caption below each row, a heading above and a legend below them all.

    Args:
        column: approximate width of an image, in pixels.
    """
    title_font, text_font = ImageFont.load_default(14), ImageFont.load_default(12)
    height, width = panel.rows[0][0].shape[:2]
    cell_width = column_width(width, column)
    cell_height = round(height * cell_width / width)
    step = max(cell_width, MIN_COLUMN) + GAP
    full = max(step * len(panel.titles) - GAP, LEGEND)
    heads = []
    for title, note in panel.titles:
        lines = [(line, INK, title_font) for line in _wrap(title, step - GAP, title_font)]
        heads.append(lines + [(line, FAINT, text_font) for line in _wrap(note, step - GAP, text_font)])
    head_top = MARGIN + (LINE + 8 if heading else 0)
    top = head_top + LINE * max(map(len, heads)) + 6
    row_height = cell_height + LINE + GAP
    bottom = top + row_height * len(panel.rows)

    canvas = Image.new("RGB", (full + 2 * MARGIN, bottom + 2 * LINE + 8 + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN - 2), _shorten(heading, full, title_font), INK, title_font)
    for number, lines in enumerate(heads):
        y = top - 6 - LINE * len(lines)  # aligned at the bottom, next to the images
        for line, color, font in lines:
            draw.text((MARGIN + number * step, y), line, color, font)
            y += LINE
    for y, row, (name, metrics) in zip(range(top, bottom, row_height), panel.rows, panel.captions, strict=True):
        for number, image in enumerate(row):
            method = Image.Resampling.LANCZOS if cell_width < width else Image.Resampling.NEAREST
            picture = Image.fromarray(image).resize((cell_width, cell_height), method)
            canvas.paste(picture, (MARGIN + number * step, y))
        metrics = f"    {metrics}"
        name = _shorten(name, full - round(text_font.getlength(metrics)), text_font)
        draw.text((MARGIN, y + cell_height + 3), name + metrics, INK, text_font)
    _draw_scale(canvas, bottom + 4, text_font)
    draw.text((MARGIN, bottom + LINE + 8), _shorten(panel.footer, full, text_font), INK, text_font)
    return canvas


def _draw_scale(canvas: Image.Image, y: int, font: Font) -> None:
    """The colour scale as it looks over a middle grey, and the colour of patches without an error."""
    bar = heat_map(np.full((14, 160, 3), 128, np.uint8), np.tile(np.linspace(0, 1, 160), 14), (14, 160), 1)
    pale = np.full((14, 14, 3), PALE * 255 + (1 - PALE) * 128, np.uint8)
    draw = ImageDraw.Draw(canvas)
    for x, text in ((0, "easy"), (202, "hard"), (266, "visible, no error")):
        draw.text((MARGIN + x, y), text, INK, font)
    for x, swatch in ((34, bar), (244, pale)):
        canvas.paste(Image.fromarray(swatch), (MARGIN + x, y + 1))


def _wrap(text: str, width: int, font: Font) -> list[str]:
    """Lines no wider than `width`; a single word may be wider."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _shorten(text: str, width: int, font: Font) -> str:
    """Printable text no wider than `width`, cut in the middle because file names differ at their ends."""
    text = "".join(char if char.isprintable() else "?" for char in text)
    short, keep = text, len(text)
    while keep > 0 and font.getlength(short) > width:
        keep -= 1
        short = f"{text[: (keep + 1) // 2]}...{text[len(text) - keep // 2 :]}"
    return short
