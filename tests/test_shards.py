"""WebDataset shards: the same images, labels, order and resume as the folder they were made from."""

import io
import itertools
import resource
import tarfile
from pathlib import Path

import numpy as np
import pytest
from images import encode, members, picture, same_as_the_folder, write_shards, write_tar, write_tree
from programs import PRETRAIN, assert_same_training, log_lines, run

from util.data import files as files_module
from util.data.classes import class_record, count_classes, match_classes
from util.data.places import has_split
from util.data.sources import build_source
from util.data.split_names import NoSuchSplit, expand_braces, warn_of_gaps
from util.run.options import UserMistake

IMAGE = encode(picture())


def layouts(tmp_path):
    """--data_path of the same two splits as shards in different places."""
    for split in ("train", "val"):
        other = {"train": "train", "val": "validation"}[split]
        write_shards(tmp_path / f"flat/imagenet-{split}-{{}}.tar", split)
        write_shards(tmp_path / f"timm/imagenet1k-{other}-{{}}.tar", split, label="json")
        write_shards(tmp_path / f"folders/{split}/{{}}.tar", split, label="numbers")
        write_shards(tmp_path / f"single/{split}.tar", split, per_shard=99)
    flat = tmp_path / "flat"
    return {
        "flat": str(flat),
        "timm": str(tmp_path / "timm"),
        "folders": str(tmp_path / "folders"),
        "single": str(tmp_path / "single"),
        "pattern": f"{flat}/imagenet-{{train,val}}-{{0000..0002}}.tar",
        "pattern of folders": f"{tmp_path}/folders/{{train,val}}/{{0000..0002}}.tar",
        "two patterns": [f"{flat}/imagenet-train-{{0000..0002}}.tar", f"{flat}/imagenet-val-{{0000..0002}}.tar"],
        "files": sorted(map(str, flat.iterdir())),
    }


def test_every_layout_is_the_folder_it_came_from(tmp_path):
    for name, sources in same_as_the_folder(tmp_path, layouts(tmp_path)):
        named = name not in ("timm", "folders", "pattern of folders")
        assert [source.classes for source in sources] == [["cat", "cat-2", "dog"] if named else []] * 2, name
        assert [source.numbered for source in sources] == [not named] * 2, name


def test_a_run_on_shards_is_the_run_on_their_folder_and_resumes(tmp_path):
    paths = {"folder": write_tree(tmp_path / "tree"), "shards": write_shards(tmp_path / "shards/train-{}.tar")}
    given = {name: [*PRETRAIN, "--batch_size", 4, "--data_path", path] for name, path in paths.items()}
    run("main_pretrain", *given["folder"], "--output_dir", tmp_path / "a")
    log = run("main_pretrain", *given["shards"], "--output_dir", tmp_path / "b", "--max_steps", 2)
    assert "12 images, 3 steps per epoch" in log
    log = run("main_pretrain", *given["shards"], "--output_dir", tmp_path / "b")
    assert "Resuming from" in log
    assert_same_training(tmp_path / "a", tmp_path / "b")


def test_classes_are_matched_by_name(tmp_path):
    """A classifier of class folders is evaluated on shards with names, also of some of its classes."""
    record = class_record(build_source(str(write_tree(tmp_path / "tree")), "train"))
    some = members(classes=("cat-2", "dog"))
    write_shards(tmp_path / "named/val-{}.tar", "val", files=some)
    write_shards(tmp_path / "numbers/val-{}.tar", "val", files=some, label="numbers")
    matched = match_classes(record, build_source(str(tmp_path / "named"), "val"))
    assert matched.labels.tolist() == [1] * 4 + [2] * 4
    assert matched.load(0).shape == (40, 48, 3)
    numbers = build_source(str(tmp_path / "numbers"), "val")
    with pytest.raises(ValueError, match="labels cannot be matched"):
        match_classes(record, numbers)
    assert count_classes(numbers, numbers, None) == 2


def test_folders_in_the_keys_name_the_numbers(tmp_path):
    files = {"n1/a.jpg": IMAGE, "n1/a.cls": b"1", "n2/b.jpg": IMAGE, "n2/b.cls": b"0"}
    (tmp_path / "d").mkdir()
    write_tar(tmp_path / "d/train-0.tar", files)
    source = build_source(str(tmp_path / "d"), "train")
    assert (source.classes, source.numbered) == (["n2", "n1"], True)


# ------------------------------------------------------------------------------------------------ samples


def shard(tmp_path, files):
    (tmp_path / "d").mkdir(exist_ok=True)
    write_tar(tmp_path / "d/train-000000.tar", files)
    return str(tmp_path / "d")


def pairs(source):
    """(name in the archive, label) of each image, sorted."""
    return sorted(zip([name.decode() for name in source.names], source.labels.tolist(), strict=True))


def test_keys_with_dots(tmp_path, log):
    files = {f"a.{i}.jpg": IMAGE for i in (1, 2)} | {"a.1.cls": b"0", "a.2.cls": b"1"}  # the key has a dot
    files |= {"b.left.jpg": IMAGE, "b.right.jpg": IMAGE, "b.cls": b"2"}  # two images of a sample
    files |= {"c.jpg": IMAGE, "c.mask.png": IMAGE, "c.png": IMAGE, "c.cls": b"3"}  # one image, and what else it has
    files |= {"x.y/d.JPEG": IMAGE, "x.y/d.cls": b"4"}
    source = build_source(shard(tmp_path, files), "train")
    expected = [("a.1.jpg", 0), ("a.2.jpg", 1), ("b.left.jpg", 2), ("b.right.jpg", 2), ("c.jpg", 3), ("x.y/d.JPEG", 4)]
    assert pairs(source) == expected
    assert "2 further images of a sample" in log.text


def test_cls_comes_before_json_and_other_members_are_counted(tmp_path, log):
    files = {"a.jpg": IMAGE, "a.cls": b"7", "a.json": b'{"label": 3}', "a.txt": b"a caption"}
    files |= {
        "b.jpg": IMAGE,
        "b.json": b'{"cls": "4", "label_name": "dog"}',
        "b.txt": b"another",
        "__MACOSX/b.jpg": IMAGE,
    }
    assert pairs(build_source(shard(tmp_path, files), "train")) == [("a.jpg", 7), ("b.jpg", 4)]
    assert "skipped 2 files without an image extension, 1 hidden and tool folders" in log.text


MISSING = {
    "no label": {"k.jpg": IMAGE},
    "no such field": {"k.jpg": IMAGE, "k.json": b'{"caption": "cat"}'},
    "broken json": {"k.jpg": IMAGE, "k.json": b"{"},
    "several labels": {"k.jpg": IMAGE, "k.json": b'{"label": [1, 2]}'},
    "minus one": {"k.jpg": IMAGE, "k.cls": b"-1"},
    "empty": {"k.jpg": IMAGE, "k.cls": b" "},
}


@pytest.mark.parametrize("files", MISSING.values(), ids=MISSING)
def test_a_missing_label_matters_in_fine_tuning_only(tmp_path, files):
    path = shard(tmp_path, {"a.jpg": IMAGE, "a.cls": b"1", **files})
    assert len(build_source(path, "train", labels_needed=False)) == 2
    match = r"train-000000.tar/k.jpg has no label: expected k.cls .*or k.json with `label` or `cls`. 1 of 2 images"
    with pytest.raises(ValueError, match=match):
        build_source(path, "train")


def test_shards_without_any_label(tmp_path):
    write_shards(tmp_path / "d/{}.tar", label=None)
    assert len(build_source(str(tmp_path / "d"), "train", labels_needed=False)) == 12
    assert len(build_source(f"{tmp_path}/d/{{0000..0001}}.tar", "train", labels_needed=False)) == 10
    write_shards(tmp_path / "e/train-{}.tar", label=None, per_shard=99)
    with pytest.raises(ValueError, match=r"train-0000.tar/000000.jpg has no label"):
        build_source(str(tmp_path / "e"), "train")


def test_numbers_among_names_are_an_error(tmp_path):
    path = shard(tmp_path, {"a.jpg": IMAGE, "a.cls": b"1", "b.jpg": IMAGE, "b.cls": b"dog"})
    with pytest.raises(ValueError, match=r"a.jpg has the label '1' and .*b.jpg 'dog': expected numbers only, or names"):
        build_source(path, "train")
    path = shard(tmp_path, {"a.jpg": IMAGE, "a.cls": b"123456789012345678901234567890"})
    with pytest.raises(ValueError, match="a.jpg has the label 1234.*: expected numbers of classes"):
        build_source(path, "train")


def test_labels_of_any_bytes(tmp_path):
    source = build_source(
        shard(tmp_path, {"a.jpg": IMAGE, "a.cls": b"caf\xe9", "b.jpg": IMAGE, "b.cls": b"x\0y"}), "train"
    )
    assert source.classes == ["caf\\xe9", "x\\x00y"]


def test_the_last_version_of_a_member_counts(tmp_path, log):
    """As after `tar -r`, for images and labels; the order stays."""
    path = write_shards(tmp_path / "d/train-{}.tar", label="numbers")
    newer = encode(picture(seed=99))
    with tarfile.open(path / "train-0000.tar", "a") as tar:
        for name, data in (("000001.jpg", newer), ("./000000.cls", b"2")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = build_source(str(path), "train")
    assert source.read(1) == newer
    assert source.labels.tolist() == [2, 0, 0, 0] + [1] * 4 + [2] * 4
    assert "2 earlier versions of a file" in log.text


# ---------------------------------------------------------------------------------------------- ambiguity


def test_what_could_be_out_of_date_is_reported(tmp_path):
    path = write_shards(tmp_path / "d/train-{}.tar")
    assert len(build_source(str(path), "train")) == 12
    stale = {
        "train.tar": "contains both train.tar and train-0000.tar, ...",
        "imagenet-train-00.tar": "contains both imagenet-train-00.tar and train-0000.tar, ...",
        "train-000000.tar": "contains both train-0000.tar and train-000000.tar",
        "train-00000-of-00001.parquet": "contains both train-0",
    }
    for name, message in stale.items():
        write_tar(path / name, {"cat/1.jpg": IMAGE})
        for labels_needed in (True, False):
            with pytest.raises(ValueError, match=message):
                build_source(str(path), "train", labels_needed=labels_needed)
        (path / name).unlink()
    write_tree(path / "train", {"cat/1.jpg": IMAGE})
    with pytest.raises(ValueError, match=r"contains both train and train-0000.tar, \.\.\., which may differ"):
        build_source(str(path), "train")
    other = write_tree(tmp_path / "e")
    write_tree(other / "validation", {"cat/1.jpg": IMAGE})
    with pytest.raises(ValueError, match="contains both val and validation"):
        build_source(str(other), "val")


def test_archives_next_to_images_in_a_split_are_no_shards(tmp_path, log):
    tree = write_tree(tmp_path / "d")
    write_tar(tree / "train/cat.tar", {"1.jpg": IMAGE})
    assert len(build_source(str(tree), "train")) == 12
    assert "skipped 1 files without an image extension" in log.text


def test_missing_shards_are_reported(tmp_path, log):
    path = write_shards(tmp_path / "d/train-{}.tar", per_shard=2)
    (path / "train-0002.tar").unlink()
    (path / "train-0004.tar").unlink()
    assert len(build_source(str(path), "train")) == 8
    assert "train-0000.tar and 3 others: numbers 2, 4 are missing" in log.text
    warn_of_gaps([Path(f"train-{date}.tar") for date in (20240101, 20240102, 20991231235959)])  # at once
    assert "numbers 1, 2, 3, 4, 5, 6 and 20,991,231,235,950 more are missing" in log.text
    with pytest.raises(ValueError, match="train-0002.tar does not exist"):
        build_source(f"{path}/train-{{0000..0005}}.tar", "train")


def test_compressed_shards_are_not_left_out_without_a_word(tmp_path, log):
    path = write_shards(tmp_path / "d/train-{}.tar")
    write_tar(path / "train-9.tar.gz", mode="w:gz")
    assert len(build_source(str(path), "train", labels_needed=False)) == 12
    assert f"{path}: shards must be .tar files; these are not used: train-9.tar.gz" in log.text


def test_shards_are_in_the_order_of_their_numbers(tmp_path):
    (tmp_path / "d").mkdir()
    for number in range(12):
        write_tar(tmp_path / f"d/train-{number}.tar", {"a.jpg": IMAGE, "a.cls": b"%d" % number})
    assert build_source(str(tmp_path / "d"), "train").labels.tolist() == list(range(12))


def test_words_in_the_names_of_several_folders_tell_the_splits(tmp_path):
    """Without labels too, where shards that say nothing are for training; one folder may have any name."""
    for split in ("train", "val"):
        (tmp_path / f"imagenet_{split}").mkdir()
        for number in range(2):
            write_tar(tmp_path / f"imagenet_{split}/{number}.tar", {"a.jpg": IMAGE, "a.cls": b"0"})
    both = f"{tmp_path}/imagenet_{{train,val}}/{{0..1}}.tar"
    each = [f"{tmp_path}/imagenet_{split}/{{0..1}}.tar" for split in ("train", "val")]
    for patterns, labels_needed in itertools.product((both, each), (True, False)):
        train = build_source(patterns, "train", labels_needed=labels_needed)
        assert len(train) == 2
        assert all("imagenet_train" in train.name(index) for index in range(2))
    assert len(build_source(both, "val")) == 2
    assert len(build_source(f"{tmp_path}/imagenet_val/{{0..1}}.tar", "train", labels_needed=False)) == 2


def test_names_must_say_which_split_shards_are_of(tmp_path):
    write_shards(tmp_path / "d/{}.tar")
    path = str(tmp_path / "d")
    assert len(build_source(path, "train", whole=True)) == 12
    with pytest.raises(ValueError, match=r"looked for train/CLASS/\*.jpg, .*train-000000.tar, found 0000.tar"):
        build_source(path, "train")
    with pytest.raises(ValueError, match="none of d/0000.tar, d/0001.tar has train in its name"):
        build_source(f"{path}/{{0000,0001}}.tar", "train")
    with pytest.raises(ValueError, match="twice"):
        build_source([f"{path}/0000.tar"] * 2, "train", labels_needed=False)
    write_shards(tmp_path / "d/train-{}.tar")
    with pytest.raises(ValueError, match="which split is .*0000.tar. A name must contain either train or val"):
        build_source([f"{path}/0000.tar", f"{path}/train-0001.tar"], "train")
    assert not has_split(path, "val", None)


def test_patterns():
    assert expand_braces("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
    assert expand_braces("{2..0}") == ["2", "1", "0"]
    assert expand_braces("{a-{0..1},b}.tar") == ["a-0.tar", "a-1.tar", "b.tar"]
    assert expand_braces("{x,y}{0,1}") == ["x0", "x1", "y0", "y1"]
    assert expand_braces("plain") == ["plain"]
    for wrong in ("a{0..2.tar", "a{split}.tar", "{0..99999999}", "{0..99999}{0..99999}"):
        with pytest.raises(ValueError, match="--data_path"):
            expand_braces(wrong)


def test_more_shards_than_files_that_may_be_open(tmp_path, monkeypatch):
    path = write_shards(tmp_path / "d/train-{}.tar", per_shard=1)
    source = build_source(str(path), "train")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (32, 32))
    files_module._descriptors.clear()
    data = [source.read(i) for i in (*range(12), *range(12))]
    assert data[:12] == data[12:]
    assert len(files_module._descriptors) == 8


def test_without_a_split_all_shards_are_read(tmp_path):
    """As predict.py does. With a split that it names, there must be shards of it."""
    for split in ("train", "val"):
        write_shards(tmp_path / f"d/{split}-{{}}.tar", split)
    write_shards(tmp_path / "e/{}.tar")
    assert len(build_source(str(tmp_path / "d"), None)) == 24
    assert len(build_source(str(tmp_path / "e"), None)) == 12
    for path in (str(tmp_path / "e"), f"{tmp_path}/e/{{0000..0002}}.tar"):
        assert len(build_source(path, "train", labels_needed=False)) == 12
        with pytest.raises(NoSuchSplit, match="train"):
            build_source(path, "train", labels_needed=False, whole=False)


def test_several_archives_of_trees_keep_their_splits(tmp_path):
    """Pre-training on a folder of them uses their train/ parts."""
    for name in ("a", "b"):
        (tmp_path / "d").mkdir(exist_ok=True)
        write_tar(tmp_path / f"d/{name}.tar")
    source = build_source(str(tmp_path / "d"), "train", labels_needed=False)
    assert len(source) == 24
    assert "train" not in {name.split("/")[-3] for name in map(source.name, range(24))}


def test_other_files_that_end_in_cls_are_no_labels(tmp_path, log):
    path = write_tar(
        tmp_path / "a.tar", {**members(), "train/article.cls": b"LaTeX", "train/cat/0.json": b'{"label": 1}'}
    )
    assert build_source(str(path), "train").classes == ["cat", "cat-2", "dog"]
    assert "skipped 2 label files (.cls, .json)" in log.text


def parts(label):
    """Samples in folders, as some tools write them, with labels in .json files: `label` of (folder, number)."""
    keys = [(f"part{number // 4}", number) for number in range(8)]
    files = {f"{folder}/{number}.jpg": IMAGE for folder, number in keys}
    return files | {f"{folder}/{number}.json": b'{"label": "%s"}' % label(folder, number) for folder, number in keys}


def test_labels_that_contradict_the_folders_are_an_error(tmp_path, log):
    """One archive of class folders is told from one of samples by its name; not where both would make classes."""
    files = parts(lambda folder, number: b"%d" % (number % 2))
    one = write_tar(tmp_path / "one.tar", {f"train/{name}": data for name, data in files.items()})
    (tmp_path / "d").mkdir()
    train = write_tar(tmp_path / "d/train.tar", files)
    for path in (one, tmp_path / "d"):
        message = r"in class folders \(part0, part1\).* '[01]' of part./\d.jpg: .*train-000000.tar.* --delete"
        with pytest.raises(ValueError, match=message):
            build_source(str(path), "train")
        assert len(build_source(str(path), "train", labels_needed=False)) == 8
    train.rename(tmp_path / "d/train-000000.tar")
    for path in (tmp_path / "d", tmp_path / "d/train-000000.tar"):
        source = build_source(str(path), "train")
        assert (source.classes, np.bincount(source.labels).tolist()) == ([], [4, 4])
    same = write_tar(tmp_path / "same.tar", parts(lambda folder, number: folder[-1:].encode()))
    assert build_source(str(same), "train", whole=True).classes == ["part0", "part1"]
    assert "skipped 8 label files (.cls, .json)" in log.text


# ----------------------------------------------------------------------------------------------- programs

TRAIN = [
    *["--model", "vit_micro_patch16", "--input_size", "16", "--patch_size", "8"],
    *["--batch_size", "4", "--num_workers", "0", "--device", "cpu"],
]


def test_fine_tuning_and_evaluation_on_patterns(tmp_path):
    for split in ("train", "val"):
        write_shards(tmp_path / f"d/im-{split}-{{}}.tar", split)
    given = [*TRAIN, "--epochs", 1, "--output_dir", tmp_path / "run"]
    path = f"{tmp_path}/d/im-{{train-{{0000..0002}},val-{{0000..0002}}}}.tar"
    log = run("main_finetune", *given, "--data_path", path)
    assert "12 training images, 12 validation images" in log
    accuracy = log_lines(tmp_path / "run")[0]["test_acc1"]
    best = tmp_path / "run/checkpoint-best.pth"
    log = run(
        "main_finetune", *TRAIN, "--eval", "--resume", best, "--data_path", *sorted((tmp_path / "d").glob("*.tar"))
    )
    assert f"acc1 {accuracy:.4f}" in log
    log = run("main_finetune", *TRAIN, "--eval", "--resume", best, "--data_path", write_tree(tmp_path / "tree"))
    assert f"acc1 {accuracy:.4f}" in log


def test_mistakes_end_before_training(tmp_path):
    write_shards(tmp_path / "d/train-{}.tar")
    for path, message in (
        (tmp_path / "d", "without a val split, --val_fraction holds out a part of the training images"),
        (f"{tmp_path}/d/train-{{0000..0003}}.tar", "train-0003.tar does not exist"),
        (f"{tmp_path}/d/train-{{0000..0002}}.tar", "has val in its name"),
    ):
        with pytest.raises(UserMistake) as mistake:
            run("main_finetune", *TRAIN, "--data_path", path, "--output_dir", tmp_path / "run")
        assert message in mistake.value.message
    assert np.array_equal(sorted(tmp_path.iterdir()), [tmp_path / "d", tmp_path / "run"])
