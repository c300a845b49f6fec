"""Shapes: a data set of ten classes of shapes, drawn by the program.

An image shows five shapes (rarely four) of one class on a ground of which a part may be striped or checked. The class
is the shape alone: colours, sizes, places, tilts and texture are drawn independently of it, a shape is bright or dark
at random, and all classes cover the same area, so the pixels of an image say little about its class. Plain background
is easy to reconstruct; outlines and texture are hard.

An image is a function of (seed, split, index) alone, with the same bits on every machine: pixels come from additions,
multiplications, divisions and square roots of IEEE doubles. Sines are avoided (a rotation is a rational point of the
circle), and so are NumPy's distributions other than `random`, which may change between versions.
"""

import numpy as np

from util.rng import stable_hash

CLASSES = ["arrow", "circle", "crescent", "cross", "diamond", "half", "ring", "square", "star", "triangle"]
SPLITS = {"train": 0, "val": 1}
DEFAULT_SIZES = {"train": 2000, "val": 500}

# Most shapes of an image, the least distance of their centres, and the number of trials to place them.
_MOST, _APART, _TRIALS = 5, 0.578, 40

# Corners on the unit circle, counter-clockwise, as literals: no sine is computed.
_TRIANGLE = [(0.0, 1.0), (-0.8660254037844386, -0.5), (0.8660254037844386, -0.5)]
_PENTAGRAM = [
    (0.0, 1.0),
    (-0.5877852522924731, -0.8090169943749475),
    (0.9510565162951535, 0.3090169943749474),
    (-0.9510565162951535, 0.3090169943749474),
    (0.5877852522924731, -0.8090169943749475),
]


def _edge_distances(x: np.ndarray, y: np.ndarray, corners: list[tuple[float, float]]) -> np.ndarray:
    """Signed distance to the line through each edge, negative on the left of it; (edges, *x.shape)."""
    distances = []
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        dx, dy = x1 - x0, y1 - y0
        distances.append(((x - x0) * dy - (y - y0) * dx) / np.sqrt(dx * dx + dy * dy))
    return np.stack(distances)


def _polygon(x: np.ndarray, y: np.ndarray, corners: list[tuple[float, float]]) -> np.ndarray:
    """Signed distance to a convex polygon (negative inside), corners counter-clockwise."""
    return _edge_distances(x, y, corners).max(axis=0)


def _box(x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - width, np.abs(y) - height)


def _circle(x: np.ndarray, y: np.ndarray, radius: float = 1.0) -> np.ndarray:
    return np.sqrt(x * x + y * y) - radius


def _arrow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_polygon(x, y, [(0.0, 1.0), (-0.9, 0.0), (0.9, 0.0)]), _box(x, y + 0.5, 0.33, 0.55))


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points: inside at least four of the five edges of the pentagram."""
    return np.sort(_edge_distances(x, y, _PENTAGRAM), axis=0)[3]  # the second largest


# Shapes about as large as the unit circle: signed distances, negative inside, and their areas, to draw all of them
# equally large.
_SHAPES = {
    "arrow": (_arrow, 1.59),
    "circle": (_circle, 3.14),
    "crescent": (lambda x, y: np.maximum(_circle(x, y), -_circle(x - 0.5, y, 0.8)), 1.53),
    "cross": (lambda x, y: np.minimum(_box(x, y, 0.33, 1.0), _box(x, y, 1.0, 0.33)), 2.21),
    "diamond": (lambda x, y: _polygon(x, y, [(0.0, 1.0), (-0.55, 0.0), (0.0, -1.0), (0.55, 0.0)]), 1.1),
    "half": (lambda x, y: np.maximum(_circle(x, y), -y), 1.57),
    "ring": (lambda x, y: np.maximum(_circle(x, y), -_circle(x, y, 0.6)), 2.01),
    "square": (lambda x, y: _box(x, y, 0.8, 0.8), 2.56),
    "star": (_star, 1.13),
    "triangle": (lambda x, y: _polygon(x, y, _TRIANGLE), 1.3),
}


class _Draw:
    """Random draws of one image, all derived from one stream of uniform doubles."""

    def __init__(self, *key: int) -> None:
        self._stream = np.random.Generator(np.random.PCG64(stable_hash(*key)))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(self._stream.random())

    def choice(self, count: int) -> int:
        return min(count - 1, int(self._stream.random() * count))

    def rotation(self, most: float = 1.0) -> tuple[float, float]:
        """(cosine, sine) of a random angle between -a and a, where tan(a / 2) is `most`, as a rational point of the
        circle; 1 for a right angle."""
        t = self.uniform(-most, most)
        return (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)

    def tint(self) -> np.ndarray:
        """A small change of colour, (3,)."""
        return 0.3 * (self._stream.random(3) - 0.5)


def draw_shape(seed: int, split: str, index: int, size: int = 64) -> tuple[np.ndarray, int]:
    """Image `index` of a split: (size, size, 3) uint8 and its label, an index into `CLASSES`."""
    draw = _Draw(seed, SPLITS[split], index)
    label = index % len(CLASSES)
    centres = (np.arange(size) + 0.5) / size * 2 - 1  # of the pixels, from left to right; y points up
    image = np.empty((size, size, 3))
    image[:] = draw.uniform(0.4, 0.6) + draw.tint()
    if draw.uniform(0, 1) < 0.5:
        _paint_texture(draw, image, centres)
    places: list[tuple[float, float]] = []
    for _ in range(_TRIALS):
        x0, y0 = draw.uniform(-0.95, 0.95), draw.uniform(-0.95, 0.95)  # the border may cut a part off
        if all((x0 - x) ** 2 + (y0 - y) ** 2 >= _APART**2 for x, y in places):
            places.append((x0, y0))
            _paint_shape(draw, image, centres, CLASSES[label], x0, y0)
        if len(places) == _MOST:
            break
    return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8), label


def _paint_shape(draw: _Draw, image: np.ndarray, centres: np.ndarray, name: str, x0: float, y0: float) -> None:
    """One shape with its centre at (x0, y0), in place, bright or dark."""
    distance_to, area = _SHAPES[name]
    scale = draw.uniform(0.24, 0.34) * np.sqrt(1.6 / area)
    cosine, sine = draw.rotation(0.2)  # up to 23 degrees either way
    sign = 1 - 2 * draw.choice(2)
    reach = 1.2 * scale + 2 / len(centres)  # no shape is larger; the rest of the image stays as it is
    near = [slice(*np.searchsorted(centres, (middle - reach, middle + reach))) for middle in (-y0, x0)]
    image = image[tuple(near)]  # a view
    x, y = (centres[near[1]] - x0) / scale, ((-centres[near[0]] - y0) / scale)[:, None]
    distance = distance_to(x * cosine + y * sine, y * cosine - x * sine) * (scale * len(centres) / 2)  # in pixels
    colour = 0.5 + sign * draw.uniform(0.3, 0.5) + draw.tint()
    image += (colour - image) * _cover(distance)


def _cover(distance: np.ndarray) -> np.ndarray:
    """Opacity of a shape from distances in pixels, with a soft edge of one pixel: (H, W) -> (H, W, 1)."""
    return (0.5 - distance).clip(0, 1)[:, :, None]


def _paint_texture(draw: _Draw, image: np.ndarray, centres: np.ndarray) -> None:
    """Stripes or checks over a part of the background, in place, behind a straight line."""
    x, y = np.meshgrid(centres, -centres)
    cosine, sine = draw.rotation()
    side = 1 - 2 * draw.choice(2)
    u, v = (x * cosine + y * sine) * side, y * cosine - x * sine
    period = draw.uniform(0.15, 0.35)
    mix = _wave(u / period)
    if draw.choice(2):
        mix = 0.5 + 2 * (mix - 0.5) * (_wave(v / period) - 0.5)
    image -= 0.2 * mix[:, :, None] * _cover((draw.uniform(0.0, 0.6) - u) * (len(centres) / 2))


def _wave(phase: np.ndarray) -> np.ndarray:
    """Triangle wave of period 1 with clipped peaks, in [0, 1]."""
    return ((np.abs(phase - np.floor(phase) - 0.5) - 0.25) * 4 + 0.5).clip(0, 1)
