"""Grids of pictures, drawn with Pillow: images, masks, heat maps, reconstructions, with titles and captions.

Shapes: H, W image, h, w grid of patches, P patch size, L = h * w. Images are (H, W, 3) uint8 arrays.
"""

import bisect
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACKGROUND, INK, FAINT = (255, 255, 255), (30, 30, 30), (110, 110, 110)
HIDDEN = (200, 200, 200)  # what stands where a patch is masked
COLOR, PALE = 0.75, 0.75  # share of the colour in a heat map; of white where a patch has no value
COLUMN, GAP, MARGIN, LINE = 192, 8, 14, 16
LEGEND = 372  # width of the colour scale with its words

# From black over purple and orange to pale yellow: lightness rises evenly, so it reads in grey too.
_SCALE = np.array(
    [
        *[(0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85)],
        *[(227, 89, 51), (249, 140, 10), (249, 201, 50), (252, 255, 164)],
    ],
    dtype=np.float64,
)


# -------------------------------------------------------------------------------------------------- numbers to pixels


def colorize(values: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 1 of any shape -> the same shape with a last axis of three, uint8."""
    place = np.clip(np.nan_to_num(values, nan=1.0), 0, 1) * (len(_SCALE) - 1)
    below = np.minimum(place.astype(int), len(_SCALE) - 2)
    part = (place - below)[..., None]
    return (_SCALE[below] * (1 - part) + _SCALE[below + 1] * part + 0.5).astype(np.uint8)


def author_scale(scores: np.ndarray) -> np.ndarray:
    """Numbers of an image's patches (L,) -> 0 to 1, as HPM's author draws predicted losses (issue 3 of his repository):
    mean taken off, sigmoid, divided by the maximum."""
    scaled = 1 / (1 + np.exp(-np.clip(scores - scores.mean(), -60, 60)))
    return scaled / scaled.max()


def rank_scale(scores: np.ndarray) -> np.ndarray:
    """Numbers of an image's patches (L,) -> 0 for the lowest to 1 for the highest, evenly: their order, which is all
    that masks depend on."""
    return scores.argsort(kind="stable").argsort(kind="stable") / max(len(scores) - 1, 1)


SCALES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"author": author_scale, "rank": rank_scale}


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
    picture = COLOR * spread(colorize(values), grid, patch) + (1 - COLOR) * grey
    if shown is not None:
        picture = np.where(spread(shown, grid, patch)[..., None], picture, PALE * 255 + (1 - PALE) * grey)
    return picture.clip(0, 255).astype(np.uint8)


def hide(image: np.ndarray, mask: np.ndarray, grid: tuple[int, int], patch: int) -> np.ndarray:
    """The image with its masked patches, (L,) bool, grey."""
    return np.where(spread(mask, grid, patch)[..., None], np.array(HIDDEN, np.uint8), image)


def to_image(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised (3, H, W) -> (H, W, 3) uint8."""
    channels = pixels * np.array(std)[:, None, None] + np.array(mean)[:, None, None]
    return (channels.transpose(1, 2, 0).clip(0, 1) * 255 + 0.5).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------ drawing


@dataclass(frozen=True)
class Panel:
    """What `draw_grid` draws.

    Attributes:
        titles: of the columns, each with a note, which may be empty.
        rows: of images, as many as there are titles, all of one size.
        captions: of the rows: a name, which may be shortened, and words, which are not.
        has_scale: whether there are heat maps.
    """

    titles: list[tuple[str, str]]
    rows: list[list[np.ndarray]]
    captions: list[tuple[str, list[str]]]
    has_scale: bool = True

    def each(self) -> list["Panel"]:
        """The rows one by one."""
        pairs = zip(self.rows, self.captions, strict=True)
        return [Panel(self.titles, [row], [caption], self.has_scale) for row, caption in pairs]


def column_width(side: int, wanted: int) -> int:
    """How wide an image of `side` pixels is drawn where about `wanted` is asked for: small ones are enlarged by a whole
    number, so that their pixels stay equal; those a little larger stay as they are; larger ones are reduced."""
    return wanted if side > wanted * 4 / 3 else side * max(1, round(wanted / side))


def draw_grid(panel: Panel, heading: str = "", column: int = COLUMN) -> Image.Image:
    """Rows of images under column titles, each row with a caption below it.

    Args:
        heading: a line above it all.
        column: about how wide an image is, in pixels.
    """
    title_font, text_font = ImageFont.load_default(14), ImageFont.load_default(12)
    height, width = panel.rows[0][0].shape[:2]
    cell_width = column_width(width, column)
    cell_height = round(cell_width * height / width)
    step = max(cell_width, 88) + GAP  # a title needs some room, however small the images are
    full = max(len(panel.titles) * step - GAP, LEGEND if panel.has_scale else 0)

    heads = [
        [(line, INK, title_font) for line in _wrap([title], step - GAP, title_font)]
        + [(line, FAINT, text_font) for line in _wrap([note], step - GAP, text_font) if line]
        for title, note in panel.titles
    ]
    feet = [_caption(name, words, full, text_font) for name, words in panel.captions]
    top = MARGIN + (LINE + 8 if heading else 0)
    head_height = LINE * max(map(len, heads)) + 6
    foot_heights = [LINE * len(lines) + GAP for lines in feet]
    total = top + head_height + sum(cell_height + foot for foot in foot_heights) + (LINE + 6) * panel.has_scale + MARGIN

    canvas = Image.new("RGB", (full + 2 * MARGIN, total), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    if heading:
        draw.text((MARGIN, MARGIN - 2), _shorten(heading, full, title_font), INK, title_font)
    for number, lines in enumerate(heads):
        y = top + LINE * (max(map(len, heads)) - len(lines))  # titles stand on the images
        for line, color, font in lines:
            draw.text((MARGIN + number * step, y), line, color, font)
            y += LINE
    y = top + head_height
    for row, lines, foot in zip(panel.rows, feet, foot_heights, strict=True):
        for number, image in enumerate(row):
            canvas.paste(_resized(image, cell_width, cell_height), (MARGIN + number * step, y))
        for number, line in enumerate(lines):
            draw.text((MARGIN, y + cell_height + 3 + LINE * number), line, INK, text_font)
        y += cell_height + foot
    if panel.has_scale:
        _draw_scale(canvas, draw, y + 4, text_font)
    return canvas


def _resized(image: np.ndarray, width: int, height: int) -> Image.Image:
    reduced = width < image.shape[1]
    return Image.fromarray(image).resize((width, height), Image.LANCZOS if reduced else Image.NEAREST)


def _draw_scale(canvas: Image.Image, draw: ImageDraw.ImageDraw, y: int, font: ImageFont.ImageFont) -> None:
    """The colours as they look over a middle grey, and what stands where a patch has no error."""
    x = MARGIN
    bar = heat_map(np.full((14, 160, 3), 128, np.uint8), np.tile(np.linspace(0, 1, 160), 14), (14, 160), 1)
    none = np.full((14, 14, 3), PALE * 255 + (1 - PALE) * 128, np.uint8)
    for word, swatch in (("easy", bar), ("hard", None), ("", none), ("visible, no error", None)):
        draw.text((x, y), word, INK, font)
        x += round(draw.textlength(word, font)) + 8
        if swatch is not None:
            canvas.paste(Image.fromarray(swatch), (x, y + 1))
            x += swatch.shape[1] + 8


# --------------------------------------------------------------------------------------------------------------- text


def _caption(name: str, words: list[str], width: int, font: ImageFont.ImageFont) -> list[str]:
    """Name and words in lines no wider than `width`; where they do not fit beside each other, the name gets its own
    line, shortened in its middle if it must be."""
    together = "    ".join([_printable(name), *words])
    if font.getlength(together) <= width:
        return [together]
    return [_shorten(name, width, font), *_wrap(words, width, font, space="    ")]


def _printable(text: str) -> str:
    """File names may hold anything."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _wrap(parts: Sequence[str], width: int, font: ImageFont.ImageFont, space: str = " ") -> list[str]:
    """Parts, or the words of a single one, in lines no wider than `width` where that can be."""
    lines = [""]
    for word in parts[0].split() if len(parts) == 1 else parts:
        longer = f"{lines[-1]}{space}{word}" if lines[-1] else word
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _shorten(text: str, width: int, font: ImageFont.ImageFont) -> str:
    """Without its middle, as far as it is wider than `width`: names differ at their ends."""
    text = _printable(text)

    def keep(count: int) -> str:
        return f"{text[: (count + 1) // 2]}...{text[len(text) - count // 2 :]}"

    if font.getlength(text) <= width:
        return text
    too_many = bisect.bisect_right(range(len(text)), width, key=lambda count: font.getlength(keep(count)))
    return keep(max(too_many - 1, 0))


# -------------------------------------------------------------------------------------------------------------- files


def check_output(path: Path, suffixes: Sequence[str]) -> None:
    """Whether a picture can be written there, before there is one; its folder is made.

    Raises:
        ValueError: the name has another ending, or is a folder's.
        OSError: the folder cannot be made or written.
    """
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"--output {path}: pictures are written as {', '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder: give the name of a picture in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.touch()
    partial.unlink()


def encode(picture: Image.Image, suffix: str) -> bytes:
    """A picture as a file of the kind that `suffix` names."""
    buffer = io.BytesIO()
    picture.save(buffer, Image.registered_extensions()[suffix.lower()])
    return buffer.getvalue()


def write(path: Path, content: bytes) -> None:
    """Write a file so that it is never seen half-written."""
    partial = _partial(path)
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
