"""Shapes: a data set of ten classes of coloured shapes on textured backgrounds, drawn by the program.

An image is a function of (seed, split, index) alone, with the same bits on every machine: pixels come from additions,
multiplications, divisions and square roots of IEEE doubles. Sines are avoided (a rotation is a rational point of the
circle), and so are NumPy's distributions other than `random`, which may change between versions.
"""

import numpy as np

from util.rng import stable_hash

CLASSES = ["arrow", "circle", "crescent", "cross", "diamond", "half", "ring", "square", "star", "triangle"]
SPLITS = {"train": 0, "val": 1}
DEFAULT_SIZES = {"train": 2000, "val": 500}

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


_DISTANCE = {
    "arrow": _arrow,
    "circle": _circle,
    "crescent": lambda x, y: np.maximum(_circle(x, y), -_circle(x - 0.5, y, 0.8)),
    "cross": lambda x, y: np.minimum(_box(x, y, 0.33, 1.0), _box(x, y, 1.0, 0.33)),
    "diamond": lambda x, y: _polygon(x, y, [(0.0, 1.0), (-0.55, 0.0), (0.0, -1.0), (0.55, 0.0)]),
    "half": lambda x, y: np.maximum(_circle(x, y), -y),
    "ring": lambda x, y: np.maximum(_circle(x, y), -_circle(x, y, 0.6)),
    "square": lambda x, y: _box(x, y, 0.8, 0.8),
    "star": _star,
    "triangle": lambda x, y: _polygon(x, y, _TRIANGLE),
}


class _Draw:
    """Random draws of one image, all derived from one stream of uniform doubles."""

    def __init__(self, *key: int) -> None:
        self._stream = np.random.Generator(np.random.PCG64(stable_hash(*key)))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(self._stream.random())

    def choice(self, count: int) -> int:
        return min(count - 1, int(self._stream.random() * count))

    def array(self, *shape: int) -> np.ndarray:
        return self._stream.random(shape)

    def rotation(self) -> tuple[float, float]:
        """(cosine, sine) of a random angle, close to uniform, as a rational point of the circle."""
        t = self.uniform(-1.0, 1.0)
        t = t * (1.2071 - 0.2071 * t * t)  # makes the angle nearly uniform
        cosine, sine = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
        return (-cosine, -sine) if self.choice(2) else (cosine, sine)


def draw_shape(seed: int, split: str, index: int, size: int = 64) -> tuple[np.ndarray, int]:
    """Image `index` of a split: (size, size, 3) uint8 and its label, an index into `CLASSES`."""
    draw = _Draw(seed, SPLITS[split], index)
    label = index % len(CLASSES)
    centres = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(centres, -centres)  # y points up
    pixel = 2 / size

    image, ground = _ground(draw, x, y)
    for _ in range(draw.choice(4)):  # clutter: small specks, squares and bars
        width, height = draw.uniform(0.03, 0.12), draw.uniform(0.03, 0.3)
        distance = _box(*_place(draw, x, y, reach=1.0, scale=1.0), width, height)
        image = _paint(image, distance / pixel, draw.array(3), draw.uniform(0.5, 1.0))

    scale = draw.uniform(0.45, 0.8)
    local_x, local_y = _place(draw, x, y, reach=0.95 - scale, scale=scale)
    distance = _DISTANCE[CLASSES[label]](local_x, local_y) * (scale / pixel)
    colour = _contrasting(draw, ground)
    shading = 1 + draw.uniform(-0.35, 0.35) * local_x[:, :, None]
    image = _paint(image, distance, colour * shading, 1.0)
    noise = (draw.array(size, size, 1) - 0.5) * draw.uniform(0.0, 0.08)
    return ((image + noise).clip(0, 1) * 255 + 0.5).astype(np.uint8), label


def _place(draw: _Draw, x: np.ndarray, y: np.ndarray, reach: float, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in the frame of a shape at a random position and angle."""
    x0, y0 = draw.uniform(-reach, reach), draw.uniform(-reach, reach)
    cosine, sine = draw.rotation()
    x, y = (x - x0) / scale, (y - y0) / scale
    return x * cosine + y * sine, y * cosine - x * sine


def _paint(image: np.ndarray, distance: np.ndarray, colour: np.ndarray, opacity: float) -> np.ndarray:
    """Paint a colour where `distance` (in pixels) is negative, with a soft edge of one pixel."""
    cover = ((0.5 - distance).clip(0, 1) * opacity)[:, :, None]
    return image * (1 - cover) + colour * cover


def _contrasting(draw: _Draw, ground: np.ndarray) -> np.ndarray:
    """Of eight random colours, the one farthest from the background colour."""
    colours = draw.array(8, 3)
    return colours[np.square(colours - ground).sum(axis=1).argmax()]


def _ground(draw: _Draw, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Background (size, size, 3) of stripes, checks or smooth noise under a gradient, and its mean colour."""
    first, second = draw.array(3), draw.array(3)
    second = first + (second - first) * 0.6
    cosine, sine = draw.rotation()
    u, v = x * cosine + y * sine, y * cosine - x * sine
    period = draw.uniform(0.25, 0.8)
    kind = draw.choice(3)
    if kind == 0:
        mix = _wave(u / period)
    elif kind == 1:
        mix = 0.5 + 2 * (_wave(u / period) - 0.5) * (_wave(v / period) - 0.5)
    else:
        mix = _smooth_noise(draw, len(x), 4 + draw.choice(5))
    gradient = 1 + draw.uniform(-0.3, 0.3) * u
    return (first + (second - first) * mix[:, :, None]) * gradient[:, :, None], (first + second) / 2


def _wave(phase: np.ndarray) -> np.ndarray:
    """Triangle wave of period 1 with clipped peaks, in [0, 1]."""
    return ((np.abs(phase - np.floor(phase) - 0.5) - 0.25) * 4 + 0.5).clip(0, 1)


def _smooth_noise(draw: _Draw, size: int, cells: int) -> np.ndarray:
    """Value noise (size, size): random values at the corners of `cells` x `cells` cells, smoothly interpolated."""
    corners = draw.array(cells + 1, cells + 1)
    place = (np.arange(size) + 0.5) / size * cells
    cell = np.minimum(place.astype(int), cells - 1)
    t = place - cell
    t = t * t * (3 - 2 * t)
    rows = corners[cell] * (1 - t)[:, None] + corners[cell + 1] * t[:, None]  # (size, cells + 1)
    return rows[:, cell] * (1 - t) + rows[:, cell + 1] * t
