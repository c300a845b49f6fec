"""Listings of archives are stored, used, and never outlive a change of the archive."""

import io
import os
import tarfile

import numpy as np
import pytest
from images import encode, members, picture, write_shards, write_tar

from util.data import archives, listing_cache
from util.data.archives import list_archive
from util.data.sources import build_source

IMAGE = encode(picture())


@pytest.fixture
def opened(monkeypatch):
    """Every archive is large enough to be stored; the paths of those whose headers are read."""
    monkeypatch.setattr(archives, "FEWEST", 1)
    paths, open_tar = [], tarfile.open

    def count(path, *given, **more):
        paths.append(os.path.basename(path))
        return open_tar(path, *given, **more)

    monkeypatch.setattr(archives.tarfile, "open", count)
    return paths


def stored(folder):
    return sorted(folder.rglob("*.npz"))


def test_a_stored_listing_is_the_listing(tmp_path, opened):
    files = {"train/cat/1.jpg": IMAGE, "train/cat/caf\udce9 \n.jpg": IMAGE, "train/a.txt": b"", "val/x/1.jpg": IMAGE}
    files |= {"train/cat/1.cls": b"caf\xe9", "train/cat/2.cls": b"a\0b", "__MACOSX/1.jpg": IMAGE}
    path = write_tar(tmp_path / "a.tar", files)
    first = list_archive(path, str(tmp_path / "c"))
    count = len(opened)
    again = list_archive(path, str(tmp_path / "c"))
    assert len(opened) == count
    assert again == first
    assert list(again.images) == list(first.images)
    assert again.skipped == {"files without an image extension": 1, "hidden and tool folders": 1}
    assert sorted(again.labels.values()) == ["a\0b", "caf\udce9"]
    assert [file.parent.name for file in stored(tmp_path / "c")] == ["listings"]
    assert not list((tmp_path / "c").rglob("*.partial"))


def test_only_changed_shards_are_listed_again(tmp_path, opened):
    path = write_shards(tmp_path / "d/train-{}.tar")
    opened.clear()
    before = build_source(str(path), "train")
    assert sorted(opened) == ["train-0000.tar", "train-0001.tar", "train-0002.tar"]
    opened.clear()
    again = build_source(str(path), "train")
    assert (opened, again.read(7), again.labels.tolist()) == ([], before.read(7), before.labels.tolist())

    newer = encode(picture(seed=99))
    with tarfile.open(path / "train-0001.tar", "a") as tar:
        info = tarfile.TarInfo("000005.jpg")
        info.size = len(newer)
        tar.addfile(info, io.BytesIO(newer))
    opened.clear()
    assert build_source(str(path), "train").read(5) == newer
    assert opened == ["train-0001.tar"]
    assert len(stored(tmp_path / "cache")) == 3  # replaced, not added


def test_an_archive_of_the_same_size_and_another_time_is_listed_again(tmp_path, opened):
    path = write_tar(tmp_path / "a.tar", {"train/cat/1.jpg": IMAGE})
    list_archive(path)
    time = path.stat().st_mtime_ns
    write_tar(path, {"train/dog/1.jpg": IMAGE})
    os.utime(path, ns=(time, time + 1))
    assert list(list_archive(path).images) == ["train/dog/1.jpg"]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no zip", "truncated", "flipped", "other arrays"])
def test_a_damaged_listing_is_reported_and_replaced(tmp_path, opened, log, damage):
    path = write_tar(tmp_path / "a.tar")
    expected = list_archive(path)
    (file,) = stored(tmp_path / "cache")
    data = file.read_bytes()
    if damage == "other arrays":
        np.savez(file, identity=np.zeros(3))
    elif damage == "flipped":
        place = data.index(b"train/cat/1.jpg")
        file.write_bytes(data[:place] + b"X" + data[place + 1 :])
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "truncated" else damage)
    assert list_archive(path) == expected
    if damage != "other arrays":  # whose identity is another's
        assert "cannot be read" in log.text
        assert "a.tar again" in log.text
    log.clear()
    opened.clear()
    assert list_archive(path) == expected
    assert (opened, log.text) == ([], "")


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, opened, log):
    path = write_tar(tmp_path / "a.tar")
    (tmp_path / "file").write_bytes(b"")
    assert len(list_archive(path, str(tmp_path / "file")).images) == 24
    assert "was not stored in" in log.text


def test_small_archives_are_not_stored(tmp_path):
    write_shards(tmp_path / "d/train-{}.tar")
    build_source(str(tmp_path / "d"), "train")
    assert stored(tmp_path / "cache") == []
    path = write_tar(tmp_path / "a.tar", {f"train/a/{i}.jpg": b"x" for i in range(listing_cache.FEWEST)})
    build_source(str(path), "train")
    assert len(stored(tmp_path / "cache")) == 1
    files = {f"{i}.jpg": b"x" for i in range(-(-listing_cache.FEWEST // 3))}
    for number in range(3):  # a few small shards are not stored, but many are
        write_tar(tmp_path / f"d/train-{number:04d}.tar", files)
    build_source(str(tmp_path / "d"), "train", labels_needed=False)
    assert len(stored(tmp_path / "cache")) == 4


def test_an_archive_that_changes_while_it_is_listed_is_not_stored(tmp_path, opened, monkeypatch):
    path = write_tar(tmp_path / "a.tar")
    add = archives._add_member

    def change(*given):
        os.utime(path, ns=(1, 1))
        add(*given)

    monkeypatch.setattr(archives, "_add_member", change)
    assert len(list_archive(path).images) == len(members())
    assert stored(tmp_path / "cache") == []
