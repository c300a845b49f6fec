"""Numbers to colours, the layout of grids, and files that are whole or not there."""

import io
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from visualize import draw as pictures


def image(side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def panel(side=8, columns=3, rows=2, name="name.jpg", words=("rank_acc 0.512", "loss_rec 0.250"), note="a note"):
    return pictures.Panel(
        titles=[(f"column {c}", note) for c in range(columns)],
        rows=[[image(side, seed=10 * r + c) for c in range(columns)] for r in range(rows)],
        captions=[(name, list(words)) for _ in range(rows)],
    )


def test_the_authors_mapping():
    """Mean off, sigmoid, over the maximum: computed number by number."""
    scores = [0.3, -1.2, 2.0, 0.7]
    mean = sum(scores) / 4
    sigmoids = [1 / (1 + math.exp(-(score - mean))) for score in scores]
    expected = [s / max(sigmoids) for s in sigmoids]
    np.testing.assert_allclose(pictures.author_scale(np.array(scores)), expected, rtol=1e-12)
    assert pictures.SCALES["author"] is pictures.author_scale


def test_scales_keep_the_order_and_survive_anything_finite():
    for scale in pictures.SCALES.values():
        scores = np.random.default_rng(0).normal(size=50)
        assert (scale(scores).argsort() == scores.argsort()).all()
        assert scale(scores).max() == 1
        for odd in (np.zeros(4), np.array([1e30, -1e30]), np.array([5.0])):
            assert np.isfinite(scale(odd)).all()
    assert pictures.rank_scale(np.array([5.0, -2.0, 9.0])).tolist() == [0.5, 0.0, 1.0]


def test_colours_grow_lighter_from_easy_to_hard():
    colours = pictures.colorize(np.linspace(0, 1, 101)).astype(float)
    lightness = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()
    assert (pictures.colorize(np.array([np.nan, 2.0])) == pictures.colorize(np.array([1.0]))).all()


def test_patches_are_where_they_belong():
    picture, mask = image(4), np.array([True, False, False, True])
    hidden = pictures.hide(picture, mask, (2, 2), 2)
    assert (hidden[:2, :2] == pictures.HIDDEN).all()
    assert (hidden[2:, 2:] == pictures.HIDDEN).all()
    assert (hidden[:2, 2:] == picture[:2, 2:]).all()
    assert (hidden[2:, :2] == picture[2:, :2]).all()
    heat = pictures.heat_map(picture, np.array([0.0, 0.0, 1.0, 0.0]), (2, 2), 2, shown=~mask)
    assert heat[:2, 2:].mean() < 100 < 150 < heat[2:, :2].mean()  # easy is dark, hard is light
    assert heat[:2, :2].min() >= 190  # no value: pale


def test_normalised_pixels_come_back():
    mean, std, original = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), image(6)
    normalised = (original.transpose(2, 0, 1) / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    assert (pictures.to_image(normalised, mean, std) == original).all()


@pytest.mark.parametrize(
    ("side", "wanted", "width"),
    [(32, 192, 192), (48, 192, 192), (40, 192, 200), (224, 192, 224), (300, 192, 192), (64, 40, 40), (50, 40, 50)],
)
def test_small_images_are_enlarged_by_whole_numbers(side, wanted, width):
    assert pictures.column_width(side, wanted) == width


@pytest.mark.parametrize(("side", "rows", "column"), [(8, 1, 192), (32, 2, 192), (32, 20, 40), (224, 2, 192)])
def test_every_image_is_in_the_grid_whole_and_nothing_lies_over_it(side, rows, column):
    drawn = panel(side, rows=rows, note="a long note, which takes more than one line of any column of this picture")
    canvas = np.asarray(pictures.draw_grid(drawn, "a heading", column))
    width = pictures.column_width(side, column)
    step = max(width, 88) + pictures.GAP
    factor, found = width // side, []
    for row in drawn.rows:
        expected = row[0].repeat(factor, 0).repeat(factor, 1)
        places = np.flatnonzero((canvas[:, pictures.MARGIN : pictures.MARGIN + width] == expected[0]).all(axis=(1, 2)))
        assert len(places) == factor  # as often as its first row of pixels is repeated
        y = places[0]
        for number, picture in enumerate(row):
            x = pictures.MARGIN + number * step
            assert (canvas[y : y + width, x : x + width] == picture.repeat(factor, 0).repeat(factor, 1)).all()
        found.append(y)
    assert all(below - above >= width + pictures.LINE for above, below in itertools.pairwise(found))
    edge = np.concatenate([canvas[:4].reshape(-1, 3), canvas[-4:].reshape(-1, 3), canvas[:, -4:].reshape(-1, 3)])
    assert (edge == 255).all()  # nothing is cut off


def test_the_scale_shows_the_colours_of_the_maps():
    with_scale = np.asarray(pictures.draw_grid(panel()))
    grey, ends = np.full((1, 2, 3), 128, np.uint8), np.array([0.0, 1.0])
    for colour in pictures.heat_map(grey, ends, (1, 2), 1)[0]:
        assert (with_scale[-40:] == colour).all(axis=2).any()
    without = pictures.Panel(**{**vars(panel()), "has_scale": False})
    assert pictures.draw_grid(without).height < len(with_scale)


def test_a_long_name_loses_its_middle_and_never_the_figures():
    font = ImageFont.load_default(12)
    words = ["rank_acc 0.512", "loss_rec 0.250", "loss_learn 0.693"]
    short = pictures._caption("cat.jpg", words, 600, font)
    assert short == ["cat.jpg    " + "    ".join(words)]
    long = pictures._caption("start" + "x" * 300 + "end.jpg", words, 300, font)
    assert long[0].startswith("startx")
    assert long[0].endswith("xend.jpg")
    assert "..." in long[0]
    assert [word for line in long[1:] for word in line.split("    ")] == words
    for width in (60, 120, 300, 2000):
        lines = pictures._caption("n" * 400, words, width, font)
        assert all(font.getlength(line) <= max(width, max(map(font.getlength, words))) for line in lines)


@pytest.mark.parametrize("name", ["日本.jpg", "line\nbreak.jpg", b"\xff.jpg".decode(errors="surrogateescape"), ""])
def test_any_file_name_can_stand_in_a_caption(name):
    assert pictures.draw_grid(panel(name=name)).size == pictures.draw_grid(panel()).size


def test_a_panel_row_by_row():
    one, two = panel().each()
    assert (one.rows[0][0] == panel().rows[0][0]).all()
    assert (two.rows[0][0] == panel().rows[1][0]).all()
    assert one.titles == panel().titles


def test_a_place_to_write_is_checked_before_the_work(tmp_path):
    pictures.check_output(tmp_path / "new/folder/a.PNG", (".png",))
    assert list((tmp_path / "new/folder").iterdir()) == []
    with pytest.raises(ValueError, match=r"a\.txt: pictures are written as \.png, \.jpg"):
        pictures.check_output(tmp_path / "a.txt", (".png", ".jpg"))
    (tmp_path / "b.png").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        pictures.check_output(tmp_path / "b.png", (".png",))
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", Path("/proc")):
        with pytest.raises(OSError, match=folder.name):
            pictures.check_output(folder / "a.png", (".png",))


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    content = pictures.encode(Image.fromarray(image()), ".png")
    assert (np.asarray(Image.open(io.BytesIO(content))) == image()).all()
    pictures.write(path, content)
    with open(path, "rb") as reader:  # who reads at this moment has the whole old file
        pictures.write(path, b"a longer one" * 100)
        assert reader.read() == content
    pictures.write(path, content)

    def full(self, data):
        self.open("wb").write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        pictures.write(path, b"other")
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
