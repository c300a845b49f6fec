"""A small data set in ADE20K's layout that tests make for themselves: three classes and void, told apart by colour."""

import numpy as np
from images import encode
from PIL import Image

NAMES = ["grass", "sky", "road"]
COLOURS = np.array([(90, 90, 90), (40, 160, 40), (90, 140, 230), (150, 110, 60)])  # void first


def labels_of(seed, size=(40, 56)):
    """(H, W) uint8 labels 0 to 3: void, sky above, grass below, and a box of road."""
    generator = np.random.default_rng(seed)
    height, width = size
    label = np.full(size, 1, dtype=np.uint8)
    label[: generator.integers(height // 4, height // 2)] = 2
    top, left = generator.integers(0, height // 2), generator.integers(0, width // 2)
    label[top : top + height // 3, left : left + width // 3] = 3
    label[:, :2] = 0
    return label


def image_of(label, seed):
    noise = np.random.default_rng(seed).normal(0, 12, (*label.shape, 3))
    return Image.fromarray((COLOURS[label] + noise).clip(0, 255).astype(np.uint8))


def info(names=NAMES):
    rows = ["Idx\tRatio\tTrain\tVal\tName", *(f"{i}\t0.1\t1\t1\t{name}" for i, name in enumerate(names, 1))]
    return "\n".join(rows).encode()


def ade_files(train=8, val=5, top=""):
    """{path: bytes}; sizes differ from image to image."""
    files = {f"{top}objectInfo3.txt": info()}
    for split, count, first in (("training", train, 0), ("validation", val, 1000)):
        for i in range(count):
            label = labels_of(first + i, size=(40 + 3 * i, 56 - 2 * i))
            files[f"{top}images/{split}/p_{i:03}.jpg"] = encode(image_of(label, first + i), quality=95)
            files[f"{top}annotations/{split}/p_{i:03}.png"] = encode(Image.fromarray(label), "PNG")
    return files
