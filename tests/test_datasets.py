"""Every source gives the same images; every wrong layout is an error that names the fix."""

import io
import os
import re
import tarfile

import numpy as np
import pytest
import torch
from images import encode, members, picture, write_tar, write_tree

from util.data.datasets import ImageDataset, build_dataset
from util.data.sources import ShapesSource, build_source, hold_out
from util.data.transforms import RandomCrop


def content(source):
    return [(source.load(i).tobytes(), int(source.labels[i])) for i in range(len(source))]


def list_files(folder):
    """The tree of `members` with the official list files, whose labels are numbers."""
    files = members()
    labels = {"cat": 0, "cat-2": 1, "dog": 2}
    for split in ("train", "val"):
        names = [name.removeprefix(f"{split}/") for name in files if name.startswith(split)]
        (folder / f"{split}.txt").write_text("".join(f"{name} {labels[name.split('/')[0]]}\n" for name in names))
    return write_tree(folder, files)


def layouts(tmp_path):
    tree = write_tree(tmp_path / "tree")
    lists = tmp_path / "lists"
    lists.mkdir()
    two = tmp_path / "two"
    two.mkdir()
    for split in ("train", "val"):
        write_tar(two / f"{split}.tar", {k.removeprefix(f"{split}/"): v for k, v in members((split,)).items()})
    packed = tmp_path / "packed"
    packed.mkdir()
    for split in ("train", "val"):
        write_tar(packed / f"{split}.tar.gz", members((split,)), "w:gz")
    return {
        "folder": tree,
        "list files": list_files(lists),
        "one tar": write_tar(tmp_path / "one.tar"),
        "one tar with a top folder": write_tar(tmp_path / "top.tar", prefix="./imagenet/"),
        "train.tar and val.tar": two,
        "tar.gz": write_tar(tmp_path / "one.tar.gz", mode="w:gz"),
        "tgz": write_tar(tmp_path / "one.tgz", mode="w:gz"),
        "train.tar.gz and val.tar.gz": packed,
    }


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_layout_gives_the_same_images_labels_and_order(tmp_path, split):
    paths = layouts(tmp_path)
    expected = content(build_source(str(paths["folder"]), split))
    assert len(expected) == 12
    assert [label for _, label in expected] == [0] * 4 + [1] * 4 + [2] * 4
    for name, path in paths.items():
        source = build_source(str(path), split)
        assert content(source) == expected, name
        assert source.classes == ["cat", "cat-2", "dog"], name
        assert source.numbered == (name == "list files")


def test_an_archive_is_decompressed_once(tmp_path):
    path = write_tar(tmp_path / "a.tar.gz", mode="w:gz")
    first = build_source(str(path), "train", cache_dir=str(tmp_path / "c"))
    made = os.stat(first.root).st_mtime_ns
    assert build_source(str(path), "val", cache_dir=str(tmp_path / "c")).root == first.root
    assert os.stat(first.root).st_mtime_ns == made
    assert not list((tmp_path / "c").rglob("*.partial"))


def test_a_cache_that_another_user_filled_needs_no_lock(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar.gz", mode="w:gz")
    first = build_source(str(path), "train", cache_dir=str(tmp_path / "c"))
    monkeypatch.setattr("util.data.archives._decompress", lambda *_: pytest.fail("opened the lock"))
    assert build_source(str(path), "train", cache_dir=str(tmp_path / "c")).root == first.root


def test_a_changed_archive_is_decompressed_again(tmp_path):
    path = write_tar(tmp_path / "a.tar.gz", mode="w:gz")
    first = build_source(str(path), "train")
    write_tar(path, members(per_class=2), mode="w:gz")
    second = build_source(str(path), "train")
    assert first.root != second.root
    assert len(second) == 6


def test_hidden_and_other_files_are_skipped(tmp_path):
    tree = write_tree(tmp_path / "d")
    (tree / "train/cat/._0.jpg").write_bytes(b"x")
    (tree / "train/cat/notes.txt").write_bytes(b"x")
    (tree / "train/.cache").mkdir()
    assert len(build_source(str(tree), "train")) == 12


def test_nested_folders_belong_to_their_class(tmp_path):
    tree = write_tree(tmp_path / "d", {**members(), "train/dog/puppies/a.JPEG": encode(picture())})
    source = build_source(str(tree), "train")
    assert len(source) == 13
    assert source.classes == ["cat", "cat-2", "dog"]


def test_without_a_split_every_image_is_found(tmp_path):
    files = {name.removeprefix("train/"): data for name, data in members(("train",)).items()}
    assert len(build_source(str(write_tar(tmp_path / "a.tar", files)), None)) == 12
    assert len(build_source(str(write_tree(tmp_path / "d", files)), None)) == 12
    assert len(build_source(str(write_tree(tmp_path / "e", {"a.jpg": encode(picture())})), None)) == 1


WRONG = {
    "missing": (lambda p: p / "nowhere", "does not exist: give a folder or a .tar archive"),
    "empty": (lambda p: write_tree(p / "d", {"readme": b""}).parent / "empty", "found an empty folder"),
    "a level too high": (
        lambda p: write_tree(p / "d", {f"imagenet/{k}": v for k, v in members().items()}),
        "looked for train/CLASS/.*found imagenet/; give the folder that holds train/",
    ),
    "a level too low": (lambda p: write_tree(p / "d") / "train", "found cat-2/, cat/, dog/"),
    "flat": (
        lambda p: write_tree(p / "d", {f"train/{i}.jpg": encode(picture()) for i in range(3)}),
        "no class folders.*found 3 images; move the images into one folder per class, or list them in train.txt",
    ),
    "empty class": (
        lambda p: write_tree(p / "d", {**members(), "train/fox/x.txt": b""}),
        "train/fox contains no images",
    ),
    "text file": (lambda p: write_tree(p / "d", {"data.zip": b"x"}) / "data.zip", "neither a folder nor an archive"),
    "not a tar": (lambda p: write_tree(p / "d", {"a.tar": b"x" * 2000}) / "a.tar", "not a readable tar archive"),
    "not gzip": (lambda p: write_tree(p / "d", {"a.tar.gz": b"x" * 99}) / "a.tar.gz", "not a complete gzip file"),
    "tar without the split": (
        lambda p: write_tar(p / "a.tar", members(("val",))),
        r"a.tar: looked for train/CLASS/\*.jpg, found val at the top level",
    ),
    "flat tar": (
        lambda p: write_tar(p / "a.tar", {"train/1.jpg": encode(picture())}),
        "no class folders.*found 1 images",
    ),
    "list with a missing file": (
        lambda p: write_tree(p / "d", {"train.txt": b"cat/nine.jpg 0\n"}),
        "lists 'cat/nine.jpg', but .* does not exist",
    ),
    "list without labels": (
        lambda p: write_tree(p / "d", {"train.txt": b"cat/0.jpg\n"}),
        "line 1: expected 'RELATIVE/PATH LABEL', found 'cat/0.jpg'",
    ),
    "list that points outside": (
        lambda p: write_tree(p / "d", {"train.txt": b"../../etc/passwd 0\n"}),
        "line 1: '../../etc/passwd' points outside",
    ),
    "list with ids instead of labels": (
        lambda p: write_tree(p / "d", {"train.txt": b"cat/0.jpg 99999999999999999999\n"}),
        "line 1: label 99999999999999999999 is too large",
    ),
    "empty list": (lambda p: write_tree(p / "d", {"train.txt": b"\n"}), "lists no images"),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_layout_error_names_what_was_found_and_the_fix(tmp_path, make, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        build_source(str(make(tmp_path)), "train")


def test_a_truncated_archive_is_rejected(tmp_path):
    path = write_tar(tmp_path / "a.tar")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(ValueError, match=r"truncated|unexpected end"):
        build_source(str(path), "train")
    for end in range(0, len(data) * 2 // 3, 512):  # also at the header of a member, and within it
        path.write_bytes(data[: end + 100])
        with pytest.raises(ValueError, match=r"truncated|not a readable tar"):
            build_source(str(path), "train")
    packed = write_tar(tmp_path / "b.tar.gz", mode="w:gz")
    packed.write_bytes(packed.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a complete gzip file"):
        build_source(str(packed), "train")
    assert not list((tmp_path / "cache").rglob("*.tar"))


def test_an_archive_that_ends_early_or_is_damaged_inside(tmp_path, log):
    """tarfile takes a header that it cannot read for the end; where the file ends between members, nobody can tell."""
    path = write_tar(tmp_path / "a.tar")
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[20].offset
    path.write_bytes(data[:offset] + b"?" + data[offset + 1 :])
    with pytest.raises(ValueError, match=rf"damaged or truncated: after 20 members, none begins at byte {offset:,}"):
        build_source(str(path), "train")
    path.write_bytes(data[:offset])
    assert len(build_source(str(path), None)) == 20
    assert "has no end marker: it may be truncated after 20 members" in log.text


def test_classes_below_another_folder_are_not_one_class(tmp_path):
    """`tar cf photos.tar photos/` would make everything the class photos."""
    files = {f"photos/{kind}/{i}.jpg": encode(picture(i)) for kind in ("cat", "dog") for i in range(3)}
    message = r"one class folder, photos, and no images in it but in its folders \(photos/cat, photos/dog\)"
    for path in (write_tar(tmp_path / "photos.tar", files), write_tree(tmp_path / "tree", files)):
        with pytest.raises(ValueError, match=message):
            build_source(str(path), "train", whole=True)
        assert len(build_source(str(path), "train", labels_needed=False)) == 6


SPLIT_FOLDERS = [("Training", "Testing"), ("Train", "Val"), ("training_set", "test_set"), ("TEST", "valid", "other")]


@pytest.mark.parametrize("folders", SPLIT_FOLDERS)
@pytest.mark.parametrize("kind", ["folder", "archive"])
@pytest.mark.parametrize("below", ["cat/", ""])
def test_folders_spelled_like_splits_are_no_classes(tmp_path, log, folders, kind, below):
    """Those of Kaggle would give a classifier that tells training images from test images."""
    files = {f"{folder}/{below}{i}.jpg": encode(picture(i)) for folder in folders for i in range(2)}
    path = write_tree(tmp_path / "d", files) if kind == "folder" else write_tar(tmp_path / "a.tar", files)
    like = r"\W+".join(sorted(folder for folder in folders if folder != "other"))
    with pytest.raises(
        ValueError, match=rf"folders that are spelled like splits.*{like}.* rename them to train/ and val/"
    ):
        hold_out(str(path), 0.5)
    assert len(build_source(str(path), None)) == len(files)
    assert "split" not in log.text
    assert len(build_source(str(path), "train", labels_needed=False)) == len(files)
    assert re.search(rf"all folders of {path} are used, also those that are spelled like splits \({like}\)", log.text)


def test_class_folders_with_the_same_folders_are_reported(tmp_path, log):
    """They may be sessions or domains, with the classes below; Tiny ImageNet has an images/ in each class."""
    for name, folders, warns in (("domains", ("cat", "dog"), True), ("tiny", ("images",), False)):
        files = {f"{top}/{below}/0.jpg": encode(picture()) for top in ("Art", "Clipart") for below in folders}
        assert build_source(str(write_tree(tmp_path / name, files)), "train", whole=True).classes == ["Art", "Clipart"]
        assert (f"{tmp_path}/{name}: the classes are Art, Clipart, and all have the same folders" in log.text) == warns
    files["Art/more/0.jpg"] = encode(picture())
    log.clear()
    build_source(str(write_tree(tmp_path / "others", files)), "train", whole=True)
    assert "the same folders" not in log.text


def test_a_class_named_like_a_split(tmp_path, log):
    """As in CIFAR-100."""
    files = {f"{kind}/{i}.jpg": encode(picture(i)) for kind in ("apple", "bus", "train") for i in range(2)}
    source = build_source(str(write_tar(tmp_path / "train.tar", files)), "train")
    assert (source.classes, len(source)) == (["apple", "bus", "train"], 6)
    tree = write_tree(tmp_path / "tree", files)
    assert len(build_source(str(tree), "train", labels_needed=False)) == 2
    assert f"images come from {tree}/train alone; folders next to it hold some, too: apple, bus" in log.text
    path = write_tar(tmp_path / "all.tar", files)
    assert len(build_source(str(path), "train", labels_needed=False)) == 2
    assert f"images come from train/ in {path} alone; folders next to it hold some, too: apple, bus" in log.text


def test_links_devices_and_members_that_point_outside_are_skipped(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, members(("train",)))
    with tarfile.open(path, "a") as tar:
        for name, kind in [
            ("train/cat/link.jpg", tarfile.SYMTYPE),
            ("train/cat/hard.jpg", tarfile.LNKTYPE),
            ("train/cat/device.jpg", tarfile.CHRTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("/train/cat/absolute.jpg", "train/cat/../../../escape.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    names = build_source(str(path), "train").names.tolist()
    assert len(names) == 12
    assert all(b".." not in name and not name.startswith(b"/") for name in names)


def test_names_and_labels_are_arrays(tmp_path):
    """The reference counts of Python lists would copy their memory into every worker."""
    for path in (write_tree(tmp_path / "d"), write_tar(tmp_path / "a.tar")):
        files = build_source(str(path), "train")
        assert files.names.dtype.kind == "S"
        assert files.labels.dtype == np.int64


def test_shapes_have_the_requested_sizes():
    assert (len(build_source(None, "train")), len(build_source(None, "val"))) == (2000, 500)
    assert len(build_source(None, "train", shapes_count=7)) == 7


def test_a_sample_is_a_function_of_seed_epoch_and_index():
    dataset = ImageDataset(ShapesSource("train"), RandomCrop(16), seed=1)
    torch.manual_seed(5)
    first = dataset[2, 7].image
    torch.manual_seed(6)
    assert torch.equal(first, dataset[2, 7].image)
    assert not torch.equal(first, dataset[3, 7].image)
    assert not torch.equal(first, ImageDataset(ShapesSource("train"), RandomCrop(16), seed=2)[2, 7].image)
    assert torch.equal(dataset[7].image, dataset[0, 7].image)
    assert dataset[2, 7].label == 7
    assert dataset[2, 7].index == 7


def test_an_unreadable_image_is_named(tmp_path):
    tree = write_tree(tmp_path / "d", {**members(), "train/cat/0.jpg": b"broken"})
    with pytest.raises(ValueError, match=r"train/cat/0.jpg: not a readable image"):
        build_dataset(str(tree), "train", RandomCrop(16))[0]


def test_listing_runs_on_rank_zero_only(tmp_path):
    calls = []

    def on_rank_zero(find):
        calls.append(1)
        return find()

    build_source(str(write_tar(tmp_path / "a.tar.gz", mode="w:gz")), "train", on_rank_zero=on_rank_zero)
    assert calls == [1]
