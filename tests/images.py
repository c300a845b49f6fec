"""Small image files and data sets, generated for tests."""

import io
import tarfile

import numpy as np
from PIL import Image


def picture(seed=0, size=(40, 48), mode="RGB"):
    """A smooth random picture; size is (height, width)."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size[::-1], Image.BICUBIC).convert(mode)


def encode(image, kind="JPEG", **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def members(splits=("train", "val"), classes=("cat", "cat-2", "dog"), per_class=4):
    """{path: bytes} of a small data set; cat and cat-2 sort differently as names and as paths."""
    return {
        f"{split}/{name}/{i}.jpg": encode(picture(seed=100 * c + 10 * i + (split == "val")), quality=90)
        for split in splits
        for c, name in enumerate(classes)
        for i in range(per_class)
    }


def write_tree(folder, files=None):
    for name, data in (members() if files is None else files).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_tar(path, files=None, mode="w", prefix=""):
    with tarfile.open(path, mode) as tar:
        for name, data in reversed(list((members() if files is None else files).items())):  # not sorted
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
