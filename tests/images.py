"""Small image files and data sets, generated for tests."""

import io
import pickle
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image

from util.data.sources import build_splits


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


def write_tiff(values, byte_order="<", photometric=None, extra=()):
    """Bytes of an uncompressed TIFF of any type, (H, W) or (H, W, C), of which Pillow writes few."""
    values = values.astype(values.dtype.newbyteorder(byte_order))
    channels = 1 if values.ndim == 2 else values.shape[2]
    if photometric is None:
        photometric = 2 if channels == 3 else 1
    sample_format = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    bits = values.dtype.itemsize * 8
    tags = [
        *[(256, [values.shape[1]]), (257, [values.shape[0]]), (258, [bits] * channels), (259, [1])],
        *[(262, [photometric]), (273, None), (277, [channels]), (278, [values.shape[0]]), (279, None)],
        *[(338, list(extra)), (339, [sample_format] * channels)],
    ]
    tags = [(tag, numbers) for tag, numbers in tags if numbers != []]
    end, entries, tail = 8 + 2 + 12 * len(tags) + 4, b"", b""
    size = sum(2 * len(numbers) for _, numbers in tags if numbers is not None and len(numbers) > 2)
    for tag, numbers in tags:
        if numbers is None:
            place = end + size if tag == 273 else values.nbytes
            entries += struct.pack(f"{byte_order}HHII", tag, 4, 1, place)
            continue
        packed = struct.pack(f"{byte_order}{len(numbers)}H", *numbers)
        if len(packed) > 4:
            packed, tail = struct.pack(f"{byte_order}I", end + len(tail)), tail + packed
        entries += struct.pack(f"{byte_order}HHI", tag, 3, len(numbers)) + packed.ljust(4, b"\0")
    magic = b"II*\0" if byte_order == "<" else b"MM\0*"
    head = magic + struct.pack(f"{byte_order}IH", 8, len(tags))
    return head + entries + struct.pack(f"{byte_order}I", 0) + tail + values.tobytes()


def write_png_16(values):
    """Bytes of a 16-bit PNG: grey, grey and alpha, RGB or RGBA."""
    colour_type = {(): 0, (1,): 0, (2,): 4, (3,): 2, (4,): 6}[values.shape[2:]]
    return _png(values, 16, colour_type, [row.astype(">u2").tobytes() for row in values])


def write_png_4(values):
    """Bytes of a grey PNG of 4 bits, two pixels in a byte: values (H, W) below 16, an even width."""
    return _png(values, 4, 0, [(row[::2] << 4 | row[1::2]).astype(np.uint8).tobytes() for row in values])


def _png(values, bits, colour_type, rows):
    height, width = values.shape[:2]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    parts = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write_shards(pattern, split="train", per_shard=5, label="names", files=None):
    """WebDataset shards of a split of `members`, in its order: KEY.jpg with the class's name or number in KEY.cls, or
    with the number in KEY.json. `pattern` is the path of a shard with {} for its number."""
    files = members() if files is None else files
    chosen = sorted((name.split("/")[1:], data) for name, data in files.items() if name.startswith(f"{split}/"))
    classes = sorted({name[0] for name, _ in chosen})
    for number in range(-(-len(chosen) // per_shard)):
        shard = {}
        for index in range(number * per_shard, min(len(chosen), (number + 1) * per_shard)):
            (name, *_), data = chosen[index]
            shard[f"{index:06d}.jpg"] = data
            position = classes.index(name)
            if label == "json":
                shard[f"{index:06d}.json"] = b'{"label": %d, "width": 48, "caption": "a cls"}' % position
            elif label:
                shard[f"{index:06d}.cls"] = name.encode() if label == "names" else b"%d\n" % position
        path = type(pattern)(str(pattern).replace("{}", f"{number:04d}"))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tar(path, dict(reversed(shard.items())))  # write_tar reverses them again
    return pattern.parent


def splits(path, **kwargs):
    """Both splits of --data_path, as the scripts read them."""
    return build_splits(path if isinstance(path, list) else str(path), (1, 1), None, lambda find: find(), **kwargs)


def content(source):
    return [(source.load(i).tobytes(), int(source.labels[i])) for i in range(len(source))]


def same_as_the_folder(tmp_path, layouts):
    """Check that all layouts {name: --data_path} hold the images, labels and order of `members`, also where a worker
    receives them pickled. Yields the name and the splits of each."""
    expected = [content(source) for source in splits(write_tree(tmp_path / "tree"))]
    for name, path in layouts.items():
        sources = splits(path)
        assert [content(source) for source in sources] == expected, name
        assert [content(pickle.loads(pickle.dumps(source))) for source in sources] == expected, name
        yield name, sources
