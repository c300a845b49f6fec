"""Values to colours, and the layout of grids."""

import itertools
import math

import numpy as np
import pytest
from PIL import ImageFont

from visualize import draw


def image(side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def panel(side=8, columns=3, rows=2, name="name.jpg", metrics="rank_acc 0.512    loss_rec 0.250", note="a note"):
    return draw.Panel(
        titles=[(f"column {c}", note) for c in range(columns)],
        rows=[[image(side, seed=10 * r + c) for c in range(columns)] for r in range(rows)],
        captions=[(name, metrics) for _ in range(rows)],
        footer="reconstruction: student",
    )


def test_author_scale():
    """Subtract the mean, sigmoid, divide by the maximum: computed value by value."""
    scores = [0.3, -1.2, 2.0, 0.7]
    mean = sum(scores) / 4
    sigmoids = [1 / (1 + math.exp(-(score - mean))) for score in scores]
    expected = [s / max(sigmoids) for s in sigmoids]
    np.testing.assert_allclose(draw.author_scale(np.array(scores)), expected, rtol=1e-12)
    assert draw.SCALES["author"] is draw.author_scale


def test_scales_keep_the_order_and_accept_all_finite_values():
    for scale in draw.SCALES.values():
        scores = np.random.default_rng(0).normal(size=50)
        assert (scale(scores).argsort() == scores.argsort()).all()
        assert scale(scores).max() == 1
        for odd in (np.zeros(4), np.array([1e30, -1e30]), np.array([5.0])):
            assert np.isfinite(scale(odd)).all()
    assert draw.rank_scale(np.array([5.0, -2.0, 9.0])).tolist() == [0.5, 0.0, 1.0]


def test_lightness_increases_from_easy_to_hard():
    colours = draw.colorize(np.linspace(0, 1, 101)).astype(float)
    lightness = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()
    assert (draw.colorize(np.array([np.nan, 2.0])) == draw.colorize(np.array([1.0]))).all()


def test_patches_are_drawn_in_place():
    picture, mask = image(4), np.array([True, False, False, True])
    hidden = draw.hide(picture, mask, (2, 2), 2)
    assert (hidden[:2, :2] == draw.HIDDEN).all()
    assert (hidden[2:, 2:] == draw.HIDDEN).all()
    assert (hidden[:2, 2:] == picture[:2, 2:]).all()
    assert (hidden[2:, :2] == picture[2:, :2]).all()
    heat = draw.heat_map(picture, np.array([0.0, 0.0, 1.0, 0.0]), (2, 2), 2, shown=~mask)
    assert heat[:2, 2:].mean() < 100 < 150 < heat[2:, :2].mean()  # easy is dark, hard is light
    assert heat[:2, :2].min() >= 190  # no value: pale


def test_to_image_inverts_normalisation():
    mean, std, original = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), image(6)
    normalised = (original.transpose(2, 0, 1) / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    assert (draw.to_image(normalised, mean, std) == original).all()


@pytest.mark.parametrize(
    ("side", "wanted", "width"),
    [(32, 192, 192), (48, 192, 192), (40, 192, 200), (224, 192, 224), (300, 192, 192), (64, 40, 40), (50, 40, 50)],
)
def test_small_images_are_enlarged_by_integer_factors(side, wanted, width):
    assert draw.column_width(side, wanted) == width


@pytest.mark.parametrize(("side", "rows", "column"), [(8, 1, 192), (32, 2, 192), (32, 20, 40), (224, 2, 192)])
def test_every_image_is_drawn_completely_and_nothing_covers_it(side, rows, column):
    content = panel(side, rows=rows, note="a long note, which takes more than one line of any column of this picture")
    canvas = np.asarray(draw.draw_grid(content, "a heading", column))
    width = draw.column_width(side, column)
    step = max(width, draw.MIN_COLUMN) + draw.GAP
    factor, found = width // side, []
    for row in content.rows:
        expected = row[0].repeat(factor, 0).repeat(factor, 1)
        places = np.flatnonzero((canvas[:, draw.MARGIN : draw.MARGIN + width] == expected[0]).all(axis=(1, 2)))
        assert len(places) == factor  # as often as its first row of pixels is repeated
        y = places[0]
        for number, picture in enumerate(row):
            x = draw.MARGIN + number * step
            assert (canvas[y : y + width, x : x + width] == picture.repeat(factor, 0).repeat(factor, 1)).all()
        found.append(y)
    assert all(below - above >= width + draw.LINE for above, below in itertools.pairwise(found))
    edge = np.concatenate([canvas[:4].reshape(-1, 3), canvas[-4:].reshape(-1, 3), canvas[:, -4:].reshape(-1, 3)])
    assert (edge == 255).all()  # nothing is cut off


def test_the_legend_shows_the_colours_of_the_heat_maps():
    grid = np.asarray(draw.draw_grid(panel()))
    grey, ends = np.full((1, 2, 3), 128, np.uint8), np.array([0.0, 1.0])
    for colour in draw.heat_map(grey, ends, (1, 2), 1)[0]:
        assert (grid[-60:] == colour).all(axis=2).any()


def test_a_long_name_is_cut_in_the_middle():
    font = ImageFont.load_default(12)
    assert draw._shorten("cat.jpg", 600, font) == "cat.jpg"
    short = draw._shorten("start" + "x" * 300 + "end.jpg", 300, font)
    assert short.startswith("startx")
    assert short.endswith("xend.jpg")
    assert "..." in short
    for width in (30, 60, 300):
        assert font.getlength(draw._shorten("n" * 400, width, font)) <= width


def test_metrics_are_complete_after_a_long_name():
    """The last pixels of the caption are those of the metrics, whatever the name."""
    short, long = (np.asarray(draw.draw_grid(panel(name=name))) for name in ("a.jpg", "a" * 400 + ".jpg"))
    assert short.shape == long.shape
    metrics = draw.ImageDraw.Draw(draw.Image.new("RGB", (1, 1))).textlength(
        "rank_acc 0.512    loss_rec 0.250", ImageFont.load_default(12)
    )
    y = draw.MARGIN + 2 * draw.LINE + 6 + draw.column_width(8, draw.COLUMN)  # first caption
    ink = (long[y : y + draw.LINE] != 255).any(axis=(0, 2)).nonzero()[0]
    assert ink.max() - ink.min() > metrics
    assert ink.max() < long.shape[1] - draw.MARGIN


@pytest.mark.parametrize("name", ["日本.jpg", "line\nbreak.jpg", b"\xff.jpg".decode(errors="surrogateescape"), ""])
def test_captions_accept_any_file_name(name):
    assert draw.draw_grid(panel(name=name)).size == draw.draw_grid(panel()).size
