"""Training images that cannot be read: replaced alike everywhere, listed once, counted, limited."""

import io
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from images import encode, members, picture, write_tree
from PIL import Image
from programs import PRETRAIN, assert_same_training, log_lines, run

from util.data import decode
from util.data.datasets import ImageDataset, build_dataset
from util.data.loader import EpochSampler, build_loader
from util.data.sources import build_source
from util.data.transforms import CenterCrop, RandomCrop
from util.run import watch
from util.run.amp import Amp
from util.run.watch import TooManyBadImages, Watch

JPEG = encode(picture(), quality=90)
LOADS = {
    "1x1": encode(picture(size=(1, 1))),
    "1x1 png": encode(picture(size=(1, 1)), "PNG"),
    "1 x 5000": encode(picture(size=(1, 5000)), "PNG"),
    "cmyk": encode(picture(mode="CMYK")),
    "16-bit": encode(Image.fromarray((np.arange(4096).reshape(64, 64) * 16).astype(np.uint16)), "PNG"),
    "palette with transparency": encode(picture(mode="P"), "PNG", transparency=b"\x00" * 256),
    "wrong extension": encode(picture(), "PNG"),
}
BAD = {
    "truncated": JPEG[: len(JPEG) // 2],
    "empty": b"",
    "not an image": b"<html>404</html>",
    "bomb": None,
}


def bomb():
    """A PNG of about a hundred bytes whose header claims 60,000 x 60,000 pixels."""
    data = bytearray(encode(Image.new("1", (8, 8)), "PNG"))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


BAD["bomb"] = bomb()


@pytest.mark.parametrize("data", LOADS.values(), ids=LOADS)
def test_odd_images_load_as_specified(tmp_path, data):
    tree = write_tree(tmp_path / "d", {**members(), "train/cat/0.jpg": data})
    for crop in (RandomCrop(16), CenterCrop(16)):
        sample = build_dataset(str(tree), "train", crop)[0]
        assert (tuple(sample.image.shape), sample.bad) == ((3, 16, 16), -1)
        expected = decode.decode_rgb(data).mean() / 255
        assert abs(sample.image.float().mean().item() / 255 - expected) < 0.25
    with Image.open(io.BytesIO(data)) as image:
        if not image.mode.startswith("I"):
            np.testing.assert_array_equal(decode.decode_rgb(data), np.asarray(image.convert("RGB")))


def write_bad(folder, kinds=BAD):
    files = {f"train/cat/{i}.jpg": data for i, data in enumerate(BAD[kind] for kind in kinds)}
    return write_tree(folder, {**members(), **files})


def test_the_replacement_is_the_same_in_every_process_epoch_and_batch(tmp_path):
    """The label is the replacement's."""
    source = build_source(str(write_bad(tmp_path / "d")), "train")
    dataset = ImageDataset(source, CenterCrop(16), seed=3, replace=True)
    chosen = {index: dataset[0, index] for index in range(len(BAD))}
    for index, sample in chosen.items():
        assert sample.bad == index
        assert sample.index >= len(BAD)
        assert sample.label == source.labels[sample.index]
        assert (sample.image == ImageDataset(source, CenterCrop(16))[sample.index].image).all()
    for workers, batch in ((0, 4), (2, 3)):
        sampler = EpochSampler(12, batch, seed=3)
        sampler.position = (5, 0)
        for batch in build_loader(dataset, sampler, workers, False):
            for bad, index in zip(batch.bad.tolist(), batch.index.tolist(), strict=True):
                assert bad == -1 or index == chosen[bad].index


def test_a_missing_file_counts_as_unreadable(tmp_path):
    tree = write_tree(tmp_path / "d")
    source = build_source(str(tree), "train")
    os.remove(tree / "train/dog/1.jpg")
    index = [source.name(i) for i in range(12)].index(str(tree / "train/dog/1.jpg"))
    assert ImageDataset(source, CenterCrop(16), replace=True)[index].bad == index


def test_if_no_image_is_readable_the_error_names_the_first_and_the_reason(tmp_path):
    tree = write_tree(tmp_path / "d", dict.fromkeys(members(), b"x"))
    with pytest.raises(ValueError, match=r"train/cat/0.jpg is unreadable, and so are 20 replacements: .*not a read"):
        ImageDataset(build_source(str(tree), "train"), CenterCrop(16), replace=True)[0]


def test_evaluation_replaces_nothing(tmp_path):
    """A metric of other images would be wrong: the error names the file."""
    tree = write_tree(tmp_path / "d", {**members(), "val/dog/2.jpg": b"broken"})
    options = ["--model", "vit_micro_patch16", "--input_size", 16, "--patch_size", 4, "--data_path", tree]
    options += ["--batch_size", 4, "--num_workers", 0, "--output_dir", tmp_path / "run", "--epochs", 1]
    for script in ("main_finetune", "main_linprobe"):
        with pytest.raises(ValueError, match=r"val/dog/2.jpg: not a readable image"):
            run(script, *options, "--warmup_epochs", 0, "--experiment", script)


TRAIN = [*PRETRAIN, "--batch_size", "4"]


def test_listed_once_counted_and_the_same_in_any_topology(tmp_path):
    tree = write_bad(tmp_path / "d")
    for name, more in (("a", ["--num_workers", 0]), ("b", ["--num_workers", 2])):
        log = run("main_pretrain", *TRAIN, "--data_path", tree, "--output_dir", tmp_path / name, *more)
        listed = (tmp_path / name / "bad_images.txt").read_text().splitlines()
        reasons = ["damaged", "damaged", "damaged", "over the pixel limit"]
        assert listed == [f"{tree}/train/cat/{i}.jpg: {reason}" for i, reason in enumerate(reasons)]
        assert [line["bad_images"] for line in log_lines(tmp_path / name)] == [4, 4]
        assert "unreadable training images" in log
    assert_same_training(tmp_path / "a", tmp_path / "b")
    run("main_pretrain", *TRAIN, "--data_path", tree, "--output_dir", tmp_path / "c", "--max_steps", 3)
    run("main_pretrain", *TRAIN, "--data_path", tree, "--output_dir", tmp_path / "c")
    assert len((tmp_path / "c/bad_images.txt").read_text().splitlines()) == 4  # not again after a restart


def test_over_the_limit_and_strict(tmp_path):
    tree = write_bad(tmp_path / "d")
    with pytest.raises(
        TooManyBadImages, match=r"4 images cannot be read, more than --max_bad_images 3: repair or remove those listed"
    ):
        run("main_pretrain", *TRAIN, "--data_path", tree, "--output_dir", tmp_path / "a", "--max_bad_images", 3)
    assert len((tmp_path / "a/bad_images.txt").read_text().splitlines()) == 4
    with pytest.raises(ValueError, match=r"train/cat/\d.jpg: not a readable image"):
        run("main_pretrain", *TRAIN, "--data_path", tree, "--output_dir", tmp_path / "b", "--strict_images")
    assert not (tmp_path / "b/bad_images.txt").exists()


def test_ranks_share_one_list(tmp_path, monkeypatch):
    """Two ranks met different images: one list and one count, on both; what is already listed is not counted again."""
    monkeypatch.setattr(watch, "gather", lambda mine: [mine, {7: 0, 8: 0}])

    def rank(met):
        source = SimpleNamespace(name=lambda index: f"/d/{index}.jpg")
        bare = Watch.__new__(Watch)
        bare.folder, bare.source, bare.max_bad_images, bare.unreadable = tmp_path, source, 2, met
        path = tmp_path / "bad_images.txt"
        bare._met, bare._listed = set(), path.read_text().splitlines() if path.exists() else []
        return bare

    with pytest.raises(TooManyBadImages):
        rank({3: 0, 8: 0}).check_images()
    assert (tmp_path / "bad_images.txt").read_text() == "".join(f"/d/{i}.jpg: damaged\n" for i in (3, 7, 8))
    again = rank({3: 0})
    again.check_images()
    assert len(again._listed) == 3


def test_faults_of_the_storage_do_not_count_and_are_forgotten(tmp_path):
    """docs/reliability.md: they end no run, and after a restart the images may be readable again."""
    source = SimpleNamespace(name=lambda index: f"/d/{index}.jpg")

    def start():
        sampler = EpochSampler(8, 4)
        limits = {"save_every_minutes": None, "max_bad_steps": 0, "max_bad_images": 0, "timeout_minutes": 1}
        return Watch(tmp_path, source, sampler, Amp("fp32", torch.device("cpu")), **limits)

    first = start()
    first.unreadable = {3: decode.REASONS.index("I/O error")}
    first.check_images()
    first.close()
    assert (tmp_path / "bad_images.txt").read_text() == "/d/3.jpg: I/O error\n"
    second = start()
    assert second.metrics() == {}
    second.close()
