"""Which files are images: the same rules for folders and archives, and nothing is skipped without a word."""

import io
import logging
import os
import shutil
import tarfile

import numpy as np
import pytest
from images import encode, members, picture, write_tar, write_tree

from util.data import files as files_module
from util.data import listing
from util.data.decode import UnreadableImage
from util.data.files import printable
from util.data.sources import build_source

IMAGE = encode(picture())


def names(source):
    return [os.fsdecode(name) for name in source.names]


@pytest.fixture
def log(caplog):
    logging.getLogger("hpm").propagate = True
    caplog.set_level(logging.INFO, "hpm")
    return caplog


TOOLS = [".ipynb_checkpoints", "@eaDir", "__MACOSX", ".thumbnails/large", "$RECYCLE.BIN"]


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_hidden_and_tool_folders_are_skipped_at_any_depth(tmp_path, kind, log):
    extra = {f"train/cat/{tool}/{i}.jpg": IMAGE for tool in TOOLS for i in range(2)}
    extra |= {f"train/cat/deep/{TOOLS[1]}/1.jpg": IMAGE, f"train/{TOOLS[1]}/1.jpg": IMAGE}
    extra |= {"train/dog/._1.jpg": b"x", "train/dog/Thumbs.db": b"x", "train/dog/notes.txt": b"x"}
    everything = {**members(), **extra}
    path = write_tree(tmp_path / "d", everything) if kind == "folder" else write_tar(tmp_path / "a.tar", everything)
    source = build_source(str(path), "train")
    assert names(source) == [name.removeprefix("train/") for name in members(("train",))]
    assert source.classes == ["cat", "cat-2", "dog"]
    assert "skipped 2 files without an image extension, 7 hidden and tool folders, 1 hidden files" in log.text


@pytest.mark.parametrize("target", ["train", "train/dog", ".", "train/cat"])
def test_each_real_folder_is_listed_once(tmp_path, target, log):
    """A link to a folder above, beside or below does not multiply images, nor give them another label."""
    tree = write_tree(tmp_path / "d")
    (tree / "train/cat/back").symlink_to(tree / target, target_is_directory=True)
    source = build_source(str(tree), "train")
    assert names(source) == [name.removeprefix("train/") for name in members(("train",))]
    assert "1 links to folders that are listed elsewhere" in log.text


def test_links_to_other_places_are_followed_once(tmp_path):
    elsewhere = write_tree(tmp_path / "elsewhere", {"1.jpg": IMAGE, "sub/2.jpg": IMAGE})
    (elsewhere / "sub/up").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "self.jpg").symlink_to(elsewhere / "self.jpg")
    tree = write_tree(tmp_path / "d")
    (tree / "train/fox").symlink_to(elsewhere, target_is_directory=True)
    (tree / "train/dog/9.jpg").symlink_to(elsewhere / "1.jpg")
    source = build_source(str(tree), "train")
    assert [name for name in names(source) if "fox" in name] == ["fox/1.jpg", "fox/self.jpg", "fox/sub/2.jpg"]
    assert "dog/9.jpg" in names(source)


def test_an_unreadable_folder_is_an_error_that_names_it(tmp_path, monkeypatch):
    tree = write_tree(tmp_path / "d", {**members(), "train/dog/private/1.jpg": IMAGE})
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("private/"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    for split, labels_needed in (("train", True), ("train", False), (None, True)):
        with pytest.raises(ValueError, match=r"train/dog/private/? cannot be read: Permission denied"):
            build_source(str(tree), split, labels_needed=labels_needed)


def test_the_last_version_of_a_member_counts(tmp_path, log):
    path = write_tar(tmp_path / "a.tar")
    newer, removed = encode(picture(seed=99)), "train/dog/2.jpg"
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("./train/cat/1.jpg")
        info.size = len(newer)
        tar.addfile(info, io.BytesIO(newer))
        link = tarfile.TarInfo(removed)
        link.type, link.linkname = tarfile.SYMTYPE, "1.jpg"
        tar.addfile(link)
    source = build_source(str(path), "train")
    assert names(source) == sorted(
        {n.removeprefix("train/") for n in members(("train",))} - {"dog/2.jpg"}, key=by_parts
    )
    assert source.read(names(source).index("cat/1.jpg")) == newer
    assert "2 earlier versions of a file" in log.text


def by_parts(name):
    return name.split("/")


def test_the_packed_folder_itself_is_no_hidden_folder(tmp_path, log):
    tree = write_tree(tmp_path / "d")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:  # as by tar -cf a.tar -C d .
        tar.add(tree, ".")
    assert len(build_source(str(tmp_path / "a.tar"), "train")) == 12
    assert "skipped" not in log.text


def test_hard_links_in_an_archive_are_files_as_in_a_folder(tmp_path, log):
    """tar stores the second name of a file as a link to the first."""
    tree = write_tree(tmp_path / "d")
    names_of_links = ("dog/again.jpg", "cat/again.jpg", "cat/again.txt", "cat/@eaDir/again.jpg")
    for name in names_of_links:
        (tree / "train" / name).parent.mkdir(exist_ok=True)
        os.link(tree / "train/cat/0.jpg", tree / "train" / name)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("cat/0.jpg", *names_of_links, "dog/1.jpg", "cat-2/1.jpg"):
            tar.add(tree / "train" / name, f"./train/{name}")
        assert sum(member.islnk() for member in tar) == 4
    source = build_source(str(tmp_path / "a.tar"), "train")
    assert names(source) == ["cat/0.jpg", "cat/again.jpg", "cat-2/1.jpg", "dog/1.jpg", "dog/again.jpg"]
    assert source.read(1) == source.read(4) == members()["train/cat/0.jpg"]
    assert source.labels.tolist() == [0, 0, 1, 2, 2]
    assert "skipped 1 files without an image extension, 1 hidden and tool folders" in log.text


def test_links_that_lead_nowhere_are_named_as_such(tmp_path, log):
    """A link to a class folder on storage that is not mounted; one into a folder of somebody else is an error."""
    tree = write_tree(tmp_path / "d")
    (tree / "train/fox").symlink_to(tmp_path / "not mounted")
    assert build_source(str(tree), "train").classes == ["cat", "cat-2", "dog"]
    assert "skipped 1 broken links" in log.text

    class Denied:
        path = str(tree / "train/fox")

        def is_dir(self):
            raise PermissionError(13, "Permission denied", self.path)

    with pytest.raises(ValueError, match="train/fox cannot be read: Permission denied"):
        listing._is_folder(Denied())


def test_an_error_says_what_was_skipped(tmp_path, log):
    absolute = write_tar(tmp_path / "a.tar", members(), prefix="/")
    hidden = write_tree(tmp_path / "d", {"train/.x/1.jpg": IMAGE, "train/cat/.1.jpg": IMAGE})
    for path, skipped in ((absolute, "24 links, devices and names that point outside"), (hidden, "1 hidden files")):
        with pytest.raises(ValueError, match="no images"):
            build_source(str(path), "train")
        assert skipped in log.text


def test_images_outside_class_folders_are_counted(tmp_path, log):
    everything = {**members(), "train/preview.jpg": IMAGE}
    for path in (write_tree(tmp_path / "d", everything), write_tar(tmp_path / "a.tar", everything)):
        log.clear()
        assert len(build_source(str(path), "train")) == 12
        assert "skipped 1 images outside class folders" in log.text


def test_a_folder_next_to_its_archive_is_ambiguous(tmp_path):
    tree = write_tree(tmp_path / "d")
    write_tar(tree / "train.tar", {"cat/1.jpg": IMAGE})
    for labels_needed in (True, False):
        with pytest.raises(ValueError, match="contains both train and train.tar, which may differ"):
            build_source(str(tree), "train", labels_needed=labels_needed)
    assert len(build_source(str(tree), "val")) == 12


# ----------------------------------------------------------------------------------- images without labels


def flat(prefix=""):
    return {f"{prefix}{name}.jpg": encode(picture(seed=i)) for i, name in enumerate(["b", "a", "x/c", "x/y y/d", "é"])}


def unlabelled(path):
    return build_source(path if isinstance(path, list) else str(path), "train", labels_needed=False)


@pytest.mark.parametrize("prefix", ["", "train/", "photos/"])
def test_any_folder_or_archive_is_a_training_set_without_labels(tmp_path, prefix):
    expected = sorted(flat().values())
    folder = write_tree(tmp_path / "d", flat(prefix))
    archives = [write_tar(tmp_path / "a.tar", flat(prefix)), write_tar(tmp_path / "a.tar.gz", flat(prefix), "w:gz")]
    for path in (folder, *archives):
        source = unlabelled(path)
        assert sorted(source.read(i) for i in range(len(source))) == expected
        assert source.labels.tolist() == [0] * 5


def test_a_train_split_is_taken_where_there_is_one(tmp_path):
    tree = write_tree(tmp_path / "tree")
    lists = write_tree(tmp_path / "lists")
    (lists / "train.txt").write_text("cat/1.jpg\ndog/2.jpg 7\n")
    archives = tmp_path / "archives"
    archives.mkdir()
    write_tar(archives / "train.tar", {k.removeprefix("train/"): v for k, v in members(("train",)).items()})
    for path, count in ((tree, 12), (tree / "train", 12), (lists, 2), (archives, 12), (archives / "train.tar", 12)):
        assert len(unlabelled(path)) == count, path
    assert len(unlabelled(write_tar(tmp_path / "one.tar", prefix="imagenet/"))) == 12
    with pytest.raises(ValueError, match="looked for val/CLASS"):
        build_source(str(write_tree(tmp_path / "flat", flat())), "val", labels_needed=False)


def test_labels_are_the_only_difference(tmp_path):
    """The same images in the same order, so that a run continues as before."""
    tree = str(write_tree(tmp_path / "d"))
    with_labels, without = build_source(tree, "train"), build_source(tree, "train", labels_needed=False)
    assert names(with_labels) == names(without)
    assert without.classes == []


def test_several_paths_follow_each_other(tmp_path):
    first, second = write_tree(tmp_path / "a", flat()), write_tar(tmp_path / "b.tar", flat())
    image = write_tree(tmp_path / "c", {"one.jpg": IMAGE}) / "one.jpg"
    source = unlabelled([str(first), str(second), str(image)])
    assert len(source) == len(source.labels) == 11
    assert source.read(10) == IMAGE
    assert [source.read(i) for i in range(5)] == [source.read(i) for i in range(5, 10)]
    assert (source.load(0) == source.load(5)).all()
    assert source.name(5).startswith(str(second))
    (tmp_path / "link").symlink_to(first)
    same = [[str(first), str(name)] for name in (first, first / "x", tmp_path / "link", first / ".." / first.name)]
    for paths in (*same, [str(first / "x"), str(first)]):
        with pytest.raises(ValueError, match="overlap, so images would be used twice"):
            unlabelled(paths)
    with pytest.raises(ValueError, match="2 paths were given, but labels can only come from one"):
        build_source([str(first), str(second)], "train")


def test_a_link_into_a_hidden_folder_is_a_class(tmp_path):
    """Content stores and volumes of Kubernetes keep the files there."""
    tree = write_tree(tmp_path / "d", {"train/.store/1/a.jpg": IMAGE, "train/bus/b.jpg": IMAGE})
    (tree / "train/apple").symlink_to(".store/1")
    (tree / "train/bus/up").symlink_to("..")
    source = build_source(str(tree), "train")
    assert names(source) == ["apple/a.jpg", "bus/b.jpg"]


def test_no_images_is_an_error(tmp_path):
    for path in (write_tree(tmp_path / "d", {"notes.txt": b""}), write_tar(tmp_path / "a.tar", {"notes.txt": b""})):
        with pytest.raises(ValueError, match="contains no images"):
            unlabelled(path)


# ------------------------------------------------------------------------------------------ names and bytes


NAMES = [b"caf\xe9", "日本".encode(), b"new\nline", "e\u0301".encode()]


def test_names_of_any_bytes_are_read_and_can_be_logged(tmp_path):
    for name in NAMES:
        folder = os.fsencode(tmp_path) + b"/d/train/" + name
        os.makedirs(folder)
        with open(folder + b"/" + name + b".jpg", "wb") as file:
            file.write(IMAGE)
    source = build_source(str(tmp_path / "d"), "train")
    assert len(source) == 4
    assert sorted(source.classes) == sorted(["caf\\xe9", "日本", "new\\nline", "é"])
    for index in range(4):
        assert source.read(index) == IMAGE
        source.name(index).encode()
        assert "\n" not in source.name(index)
    assert printable("日本/é.jpg") == "日本/é.jpg"
    archive = shutil.make_archive(str(tmp_path / "packed"), "gztar", tmp_path / "d")
    packed = build_source(archive, "train")
    assert [packed.classes, packed.read(0)] == [source.classes, IMAGE]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_list_files_may_have_a_byte_order_mark_and_windows_line_ends(tmp_path, encoding):
    tree = write_tree(tmp_path / "d")
    (tree / "train.txt").write_bytes("cat/0.jpg 0\r\ndog/1.jpg 1\r\n".encode(encoding))
    source = build_source(str(tree), "train")
    assert names(source) == ["cat/0.jpg", "dog/1.jpg"]
    assert source.labels.tolist() == [0, 1]


def test_an_image_that_is_listed_twice(tmp_path, log):
    """With two labels (several per image, one a line) it is no example of either; with one it may be weighted."""
    tree = write_tree(tmp_path / "d", {**members(), "train.txt": b"cat/0.jpg 0\ndog/1.jpg 1\ncat/0.jpg 2\n"})
    with pytest.raises(ValueError, match=r"train.txt, line 3: 'cat/0.jpg' has the label 2, and 0 in an earlier line"):
        build_source(str(tree), "train")
    message = f"{tree}/train.txt lists 1 of 3 images again, the first is cat/0.jpg: they count more often"
    assert len(build_source(str(tree), "train", labels_needed=False)) == 3
    assert message in log.text
    log.clear()
    (tree / "train.txt").write_text("cat/0.jpg 0\ndog/1.jpg 1\ncat/0.jpg 0\n")
    assert len(build_source(str(tree), "train")) == 3
    assert message in log.text


def test_a_list_file_that_cannot_be_decoded_is_named(tmp_path):
    tree = write_tree(tmp_path / "d", {**members(), "train.txt": "cat/0.jpg 0\n".encode("utf-16")[:-1]})
    with pytest.raises(ValueError, match=r"d/train.txt cannot be read as UTF-16 .*: save it as UTF-8"):
        build_source(str(tree), "train")


def test_invisible_characters_of_a_list_file_are_shown(tmp_path):
    tree = write_tree(tmp_path / "d", {**members(), "train.txt": "\u200bcat/0.jpg 0\n".encode()})
    with pytest.raises(ValueError, match=r"lists '\\u200bcat/0.jpg', but .*u200bcat/0.jpg does not exist"):
        build_source(str(tree), "train")


# ----------------------------------------------------------------------------------------------- I/O errors


@pytest.fixture
def waits(monkeypatch):
    slept = []
    monkeypatch.setattr(files_module.time, "sleep", slept.append)
    return slept


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_reading_is_tried_again_while_storage_is_gone(tmp_path, kind, waits, monkeypatch):
    path = write_tree(tmp_path / "d") if kind == "folder" else write_tar(tmp_path / "d.tar")
    source = build_source(str(path), "train")
    content = source.read(0)
    files_module._descriptors.clear()
    away = path.rename(tmp_path / "away")
    monkeypatch.setattr(
        files_module.time, "sleep", lambda s: waits.append(s) or (len(waits) == 3 and away.rename(path))
    )
    assert source.read(0) == content
    assert len(waits) == 3


def test_an_io_error_that_remains_is_no_damage(tmp_path, waits, monkeypatch):
    source = build_source(str(write_tree(tmp_path / "d")), "train")

    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.open", fails)
    with pytest.raises(UnreadableImage, match=r"I/O error \(Input/output error\)") as error:
        source.read(0)
    assert error.value.reason == "I/O error"
    assert 5 < sum(waits) < 10


def test_a_missing_file_is_not_waited_for(tmp_path, waits):
    tree = write_tree(tmp_path / "d")
    source = build_source(str(tree), "train")
    os.remove(tree / "train/cat/0.jpg")
    with pytest.raises(UnreadableImage, match="does not exist") as error:
        source.load(0)
    assert (error.value.reason, waits) == ("missing", [])


def test_an_archive_that_was_replaced_by_a_shorter_one_is_an_io_error(tmp_path, waits):
    path = write_tar(tmp_path / "a.tar")
    source = build_source(str(path), "train")
    os.truncate(path, 600)
    with pytest.raises(UnreadableImage, match="has become shorter"):
        source.load(int(np.argmax(source.extents[:, 0])))
