"""Images per second of the input pipeline, next to the official one with Pillow and torchvision.

    python -m benchmarks.data --workers 0 2
    python -m benchmarks.data --data_path /imagenet --images 2000 --workers 0 4 8 --loop

Without --data_path it generates photographs of ImageNet's mean size (500 x 375, about 105 kB as JPEG). The same images
are read from files, from a tar by offset, and from the tar that a .tar.gz was decompressed to. All variants run
interleaved; values are medians, and ratios to the official pipeline are taken within a round. The files come from the
page cache: the CPU is measured, not the disk.
"""

import gzip
import io
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as tv

from benchmarks.report import ratio, table, with_range
from benchmarks.trainer import Case, Trainer
from util.data import decode
from util.data.datasets import ImageDataset
from util.data.files import ImageFiles
from util.data.loader import EpochSampler, build_loader
from util.data.sources import build_source
from util.data.transforms import IMAGENET_MEAN, IMAGENET_STD, RandomCrop, ToModelInput
from util.run import distributed, options
from util.run.amp import Amp
from util.run.logger import log


class OfficialDataset(Dataset):
    """The official pipeline for an image: ImageFolder's loader, then torchvision's transforms with Pillow."""

    def __init__(self, files: ImageFiles, size: int) -> None:
        self.files = files
        self.transform = tv.Compose(
            [
                tv.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=tv.InterpolationMode.BICUBIC),
                tv.RandomHorizontalFlip(),
                tv.ToTensor(),
                tv.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        _, index = key
        with open(self.files.name(index), "rb") as file:
            image = Image.open(file).convert("RGB")
        return self.transform(image), int(self.files.labels[index])


class PillowFiles(ImageFiles):
    """The same files decoded without simplejpeg."""

    def load(self, index: int) -> np.ndarray:
        return decode._read_with_pillow(self.read(index), decode.MAX_PIXELS)


def draw_photograph(seed: int, height: int = 375, width: int = 500) -> bytes:
    """A JPEG that costs as much as a photograph: texture at every scale, edges, three quarters without subsampling."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(1, 3, height, width)
    for cells in (3, 6, 12, 25, 50, 100, 200):
        shape = (1, 3, max(2, cells * height // width), cells)
        noise = torch.randn(shape, generator=generator)
        image += F.interpolate(noise, size=(height, width), mode="bicubic") * (30 / cells**0.35)
    image += torch.randn(1, 1, height, width, generator=generator) * 5.5  # grain
    image = torch.where(image[:, :1] > 20, image + 40, image)  # edges
    pixels = (image[0] + 120).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92, subsampling=0 if seed % 4 else 2)
    return buffer.getvalue()


def draw_photographs(folder: Path, count: int) -> Path:
    """A data set of one class."""
    (folder / "train/photograph").mkdir(parents=True)
    for number in range(count):
        (folder / f"train/photograph/{number:05d}.jpg").write_bytes(draw_photograph(number))
    return folder


def pack(files: ImageFiles, folder: Path) -> dict[str, ImageFiles]:
    """The same images as files, in a tar, and in a .tar.gz with its cache."""
    with tarfile.open(folder / "images.tar", "w") as tar:
        for index in range(len(files)):
            tar.add(files.path(index), f"train/{os.fsdecode(files.names[index])}", recursive=False)
    with open(folder / "images.tar", "rb") as plain, gzip.open(folder / "images.tar.gz", "wb", 1) as packed:
        shutil.copyfileobj(plain, packed)
    read: Callable[[str], Any] = partial(build_source, split="train", cache_dir=str(folder / "cache"))
    return {
        "folder": files,
        "tar": read(str(folder / "images.tar")),
        "tar.gz cache": read(str(folder / "images.tar.gz")),
    }


def each(work: Callable[[int], object], count: int) -> Callable[[], int]:
    """A function that processes every image and returns their number."""

    def run() -> int:
        for index in range(count):
            work(index)
        return count

    return run


def one_thread(sources: dict[str, ImageFiles], size: int, batch_size: int) -> dict[str, Callable[[], int]]:
    """Passes over the images in this process; the first is the official pipeline."""
    files = sources["folder"]
    data, count = [files.read(index) for index in range(len(files))], len(files)
    official, pillow = OfficialDataset(files, size), ImageDataset(PillowFiles(**vars(files)), RandomCrop(size))
    passes = {"official: Pillow, torchvision, float32": each(lambda index: official[0, index], count)}
    for name, source in sources.items():
        passes[f"this project, {name}"] = each(ImageDataset(source, RandomCrop(size)).__getitem__, count)
    if decode.simplejpeg is not None:
        passes["this project, folder, without simplejpeg"] = each(lambda index: pillow[0, index], count)
    for name, source in sources.items():
        passes[f"only reading, {name}"] = each(source.read, count)
    passes["only decoding (the limit)"] = each(lambda index: decode.decode_rgb(data[index]), count)

    to_model_input = ToModelInput(IMAGENET_MEAN, IMAGENET_STD, torch.device("cpu"), flip=True)
    batch = torch.randint(256, (batch_size, 3, size, size), dtype=torch.uint8)

    def normalise() -> int:
        to_model_input(batch)
        return len(batch)

    passes["flip and normalise, which the device does"] = normalise
    return passes


def through_loader(
    sources: dict[str, ImageFiles], size: int, batch_size: int, workers: int
) -> dict[str, Callable[[], int]]:
    """Passes of a loader that copies each batch, as pinning its memory would; the first is the official pipeline."""
    datasets: dict[str, Dataset] = {"official: Pillow, torchvision, float32": OfficialDataset(sources["folder"], size)}
    datasets |= {f"this project, {name}": ImageDataset(s, RandomCrop(size)) for name, s in sources.items()}

    def run(loader: DataLoader) -> int:
        return sum(len(images.clone()) for images, *_ in loader)

    passes: dict[str, Callable[[], int]] = {}
    for name, dataset in datasets.items():
        loader = build_loader(dataset, EpochSampler(len(dataset), batch_size), workers, pin_memory=False)
        passes[name] = partial(run, loader)
    return passes


def measure(passes: dict[str, Callable[[], int]], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds per image of each pass, wall clock and CPU time of this process, by round after a warm-up round."""
    seconds = defaultdict(list)
    for number in range(repeats + 1):
        for name, run in passes.items():
            start, worked = time.perf_counter(), time.process_time()
            count = run()
            if number:
                seconds[name].append(((time.perf_counter() - start) / count, (time.process_time() - worked) / count))
    return seconds


def show(title: str, seconds: dict[str, list[tuple[float, float]]], workers: int = 0) -> None:
    """Log a table; with CPU time, which other load disturbs less, where no worker does the work."""
    clocks = ["times the official", "by processor time"][: 1 if workers else 2]
    official = next(iter(seconds.values()))
    rows = []
    for name, values in seconds.items():
        median = statistics.median(wall for wall, _ in values)
        row = [name, f"{median * 1e3:.3f}", f"{1 / median:.0f}"]
        for clock in range(len(clocks)):
            row.append(with_range(ratio([v[clock] for v in official], [v[clock] for v in values])))
        rows.append(row)
    log.info("\n%s\n%s", title, table(["variant", "ms per image", "images/s", *clocks], rows))


def endless(loader: DataLoader, sampler: EpochSampler) -> Iterator:
    epoch = 0
    while True:
        sampler.position = (epoch, 0)
        yield from loader
        epoch += 1


def whole_loop(case: Case, files: ImageFiles, size: int, device: torch.device, workers: int, steps: int) -> None:
    """Train from the files, and on random images in memory: the cost of loading."""
    trainer = Trainer(case, device, ["--input_size", str(size)])
    sampler = EpochSampler(len(files), case.batch_size)
    dataset = ImageDataset(files, RandomCrop(size))
    batches = endless(build_loader(dataset, sampler, workers, pin_memory=device.type == "cuda"), sampler)
    next(batches)  # waits for the workers to start
    trainer.steps(2)
    waited = 0.0

    def timed() -> Iterator:
        nonlocal waited
        while True:
            start = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - start
            yield batch

    step = trainer.steps(steps, timed())["step"]
    synthetic = case.batch_size / trainer.steps(steps)["step"]
    row = [str(case), str(workers), f"{synthetic:.0f}", f"{case.batch_size / step:.0f}", f"{waited / steps / step:.1%}"]
    header = ["case", "workers", "images/s without loading", "images/s", "data_wait"]
    log.info("\nthe whole loop\n%s", table(header, [row]))


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser((__doc__ or "").split("\n")[0])
    parser.add_argument("--data_path", help="folder with train/CLASS/*.jpg (default: synthetic photographs)")
    parser.add_argument("--images", type=options.COUNT, default=256, help="number of images")
    parser.add_argument("--input_size", type=options.COUNT, default=224, help="crop size in pixels")
    parser.add_argument("--batch_size", type=options.COUNT, default=64, help="images per batch of the loader")
    parser.add_argument("--workers", nargs="+", type=options.COUNT_OR_ZERO, default=[0, 2], help="data loading workers")
    parser.add_argument("--repeats", type=options.COUNT, default=7, help="rounds, of which the median is taken")
    parser.add_argument(
        "--loop",
        action=options.SWITCH,
        default=False,
        help="also train from the files, with as many workers as --workers ends with",
    )
    parser.add_argument("--model", default="mae_vit_tiny_patch16", help="model of --loop")
    parser.add_argument("--steps", type=options.COUNT, default=20, help="steps of --loop")
    parser.add_argument("--compile", choices=["no", "yes"], default="no", help="whether --loop compiles")
    parser.add_argument("--device", help="device of --loop (default: cuda where available)")
    return parser


def choose_images(data_path: str, count: int, batch_size: int) -> ImageFiles:
    """`count` files of a data set, a fixed random choice.

    Raises:
        ValueError: an archive, or fewer images than a batch has.
    """
    files = build_source(data_path, "train")
    if not isinstance(files, ImageFiles) or files.extents is not None:
        raise ValueError(f"--data_path {data_path} is an archive: give the folder of its files, they are packed here")
    chosen = np.random.default_rng(0).permutation(len(files))[:count]
    if len(chosen) < batch_size:
        raise ValueError(f"{len(chosen)} images do not fill a batch of {batch_size}: lower --batch_size")
    return replace(files, names=files.names[chosen], labels=files.labels[chosen])


def main(argv: list[str] | None = None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with options.user_mistakes():
            args = get_args_parser().parse_args(argv)
            device = distributed.setup(distributed.ALONE, args.device, None, timeout_minutes=1)[0]
            data_path = args.data_path or str(draw_photographs(folder / "drawn", args.images))
            files = choose_images(data_path, args.images, args.batch_size)
        sources = pack(files, folder)
        weight = sum(len(files.read(index)) for index in range(len(files))) / len(files)
        decoder = "Pillow (simplejpeg is not installed)" if decode.simplejpeg is None else "simplejpeg"
        log.info(
            "%d images of %.0f kB, decoded with %s; PyTorch %s", len(files), weight / 1e3, decoder, torch.__version__
        )

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        show("one thread", measure(one_thread(sources, args.input_size, args.batch_size), args.repeats))
        for workers in args.workers:
            passes = through_loader(sources, args.input_size, args.batch_size, workers)
            show(f"loader, {workers} workers", measure(passes, args.repeats), workers)
        torch.set_num_threads(threads)
        if args.loop:
            case = Case(args.model, "hpm", Amp(None, device).name, args.compile, args.batch_size)
            whole_loop(case, files, args.input_size, device, args.workers[-1], args.steps)


if __name__ == "__main__":
    main()
