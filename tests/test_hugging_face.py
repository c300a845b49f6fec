"""Hugging Face data sets: the same images, labels, order and resume as the folder they were made from."""

import sys

import numpy as np
import pytest
from images import content, encode, members, picture, same_as_the_folder, write_tar, write_tree
from programs import PRETRAIN, assert_same_training, run

from util.data.classes import class_record, match_classes
from util.data.decode import UnreadableImage
from util.data.places import has_split
from util.data.sources import build_source, check_value_range
from util.run.options import UserMistake

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()

CLASSES = ["cat", "cat-2", "dog"]
IMAGE = encode(picture())


def rows(split, label=None):
    """A data set of a split of `members`, in the order of the folder; `label` makes the label of a class's number."""
    chosen = sorted((name.split("/")[1:], data) for name, data in members((split,)).items())
    numbers = [CLASSES.index(name[0]) for name, _ in chosen]
    columns = {
        "image": [{"bytes": data, "path": "/".join(name)} for name, data in chosen],
        "label": numbers if label is None else [label(number) for number in numbers],
        "caption": ["something else"] * len(chosen),
    }
    features = {"image": datasets.Image(), "caption": datasets.Value("string")}
    first = columns["label"][0]
    features["label"] = (
        datasets.ClassLabel(names=CLASSES)
        if label is None
        else datasets.Value("string" if isinstance(first, str) else "int32")
    )
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def write_parquet(folder, names=("train", "validation"), parts=2, data=rows):
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in zip(names, ("train", "val"), strict=False):
        whole = data(split)
        for part in range(parts):
            shard = whole.shard(parts, part, contiguous=True)
            shard.to_parquet(folder / f"{name}-{part:05d}-of-{parts:05d}.parquet")
    return folder


def layouts(tmp_path):
    saved = datasets.DatasetDict({"train": rows("train"), "validation": rows("val")})
    saved.save_to_disk(tmp_path / "saved", num_shards={"train": 3, "validation": 1})
    write_parquet(tmp_path / "flat")
    write_parquet(tmp_path / "hub/data")
    for split in ("train", "val"):
        write_parquet(tmp_path / f"folders/{split}", names=("0", "0"), parts=1, data=lambda _, s=split: rows(s))
    flat = tmp_path / "flat"
    return {
        "saved": tmp_path / "saved",
        "parquet": flat,
        "parquet as on the Hub": tmp_path / "hub",
        "folders of parquet": tmp_path / "folders",
        "pattern": f"{flat}/{{train,validation}}-{{00000,00001}}-of-00002.parquet",
        "files": sorted(map(str, flat.iterdir())),
    }


def test_every_layout_is_the_folder_it_came_from(tmp_path):
    for name, sources in same_as_the_folder(tmp_path, layouts(tmp_path)):
        assert [source.classes for source in sources] == [CLASSES] * 2, name
        assert check_value_range(sources[0]) is None
        assert sources[0].name(3).endswith("row 3")


def test_a_run_on_rows_is_the_run_on_their_folder_and_resumes(tmp_path):
    write_parquet(tmp_path / "rows")
    paths = {"folder": write_tree(tmp_path / "tree"), "rows": tmp_path / "rows"}
    given = {name: [*PRETRAIN, "--batch_size", 4, "--data_path", path] for name, path in paths.items()}
    run("main_pretrain", *given["folder"], "--output_dir", tmp_path / "a")
    run("main_pretrain", *given["rows"], "--output_dir", tmp_path / "b", "--max_steps", 2)
    assert "Resuming from" in run("main_pretrain", *given["rows"], "--output_dir", tmp_path / "b")
    assert_same_training(tmp_path / "a", tmp_path / "b")


def test_labels_are_names_or_numbers(tmp_path):
    record = class_record(build_source(str(write_tree(tmp_path / "tree")), "train"))
    for name, label in (("names", lambda number: CLASSES[number]), ("numbers", lambda number: number)):
        rows("val", label).save_to_disk(tmp_path / name / "val")
        source = build_source(str(tmp_path / name), "val")
        assert source.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert (source.classes, source.numbered) == ((CLASSES, False) if name == "names" else ([], True))
        if name == "names":
            some = {"names": ["bird", *CLASSES], "numbered": False}
            assert match_classes(some, source).labels.tolist() == [1] * 4 + [2] * 4 + [3] * 4
            assert match_classes(record, source) is source
        else:
            with pytest.raises(ValueError, match="labels cannot be matched"):
                match_classes(record, source)


def table(columns, features=None):
    return datasets.Dataset.from_dict(columns, features=features and datasets.Features(features))


BINARY, IMAGES = {"image": datasets.Value("binary")}, {"image": datasets.Image()}
WRONG = {
    "columns": (lambda: table({"img": [1], "label": [1]}), "has the columns img, label, expected `image`"),
    "no label": (lambda: table({"image": [IMAGE]}, BINARY), "has the columns image, expected `image` and `label`"),
    "paths": (lambda: table({"image": ["a.jpg"], "label": [0]}), "column `image` is Value.*expected an Image"),
    "minus one": (
        lambda: rows("train", lambda number: number - 1),
        r"4 of 12 rows have no label, the first is 0 \(-1\)",
    ),
    "null": (
        lambda: table({"image": [IMAGE] * 2, "label": [0, None]}, BINARY | {"label": datasets.Value("int64")}),
        r"1 of 2 rows have no label, the first is 1 \(None\)",
    ),
    "floats": (lambda: table({"image": [IMAGE], "label": [0.5]}), "column `label` is Value.*expected ClassLabel"),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_what_fine_tuning_cannot_use_is_an_error(tmp_path, make, message):
    make().save_to_disk(tmp_path / "d/train")
    with pytest.raises(ValueError, match=message):
        build_source(str(tmp_path / "d"), "train")


def test_pre_training_needs_no_labels(tmp_path):
    for name in ("no label", "minus one", "null", "floats"):
        WRONG[name][0]().save_to_disk(tmp_path / name)
        source = build_source(str(tmp_path / name), "train", labels_needed=False)
        assert source.load(0).shape == (40, 48, 3)
        assert source.classes == []
    assert not has_split(str(tmp_path / "null"), "val", None)
    with pytest.raises(ValueError, match="looked for train/CLASS"):
        build_source(str(tmp_path / "null"), "train")


def test_rows_without_an_image_are_unreadable_images(tmp_path):
    (tmp_path / "there.jpg").write_bytes(IMAGE)
    given = [None, {"bytes": None, "path": str(tmp_path / "there.jpg")}, {"bytes": b"x"}, {"bytes": IMAGE}]
    kept = [row and {"path": None, **row} for row in given]
    table({"image": kept}, {"image": datasets.Image(decode=False)}).to_parquet(tmp_path / "train-0.parquet")
    source = build_source(str(tmp_path / "train-0.parquet"), "train", labels_needed=False)
    for row, reason in ((0, "missing"), (1, "missing"), (2, "damaged")):
        with pytest.raises(UnreadableImage) as error:
            source.load(row)
        assert error.value.reason == reason
    assert source.load(3).shape == (40, 48, 3)


def test_parquet_is_converted_once_and_again_after_a_change(tmp_path):
    folder = write_parquet(tmp_path / "d", parts=1)
    first = build_source(str(folder), "train", cache_dir=str(tmp_path / "c"))
    files = sorted(file.stat().st_mtime_ns for file in (tmp_path / "c/parquet").rglob("*.arrow"))
    assert content(build_source(str(folder), "train", cache_dir=str(tmp_path / "c"))) == content(first)
    assert sorted(file.stat().st_mtime_ns for file in (tmp_path / "c/parquet").rglob("*.arrow")) == files
    write_parquet(folder, parts=1, data=lambda split: rows(split).select(range(11, -1, -1)))
    again = build_source(str(folder), "train", cache_dir=str(tmp_path / "c"))
    assert again.labels.tolist() == first.labels.tolist()[::-1]
    assert (again.load(11) == first.load(0)).all()


def test_damaged_files_are_named(tmp_path):
    for name, files in {
        "a": {"train-0.parquet": b"x"},
        "b/train": {"state.json": b"{", "dataset_info.json": b"{"},
    }.items():
        write_tree(tmp_path / name, files)
        with pytest.raises(ValueError, match=r"train.* cannot be read by `datasets`"):
            build_source(str(tmp_path / name.split("/")[0]), "train")


def test_metadata_next_to_shards_is_no_data_set(tmp_path):
    """img2dataset writes a .parquet of captions next to each shard."""
    (tmp_path / "d").mkdir()
    for number in range(2):
        write_tar(tmp_path / f"d/{number:05d}.tar", {f"{number:05d}0001.jpg": IMAGE, f"{number:05d}0001.txt": b"a cat"})
        (tmp_path / f"d/{number:05d}.parquet").write_bytes(b"captions")
    assert len(build_source(str(tmp_path / "d"), "train", labels_needed=False)) == 2


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    write_parquet(tmp_path / "d", parts=1)
    monkeypatch.setitem(sys.modules, "datasets", None)
    given = [*PRETRAIN, "--data_path", tmp_path / "d", "--output_dir", tmp_path / "run"]
    with pytest.raises(UserMistake) as mistake:
        run("main_pretrain", *given)
    assert "is a Hugging Face data set: pip install datasets" in mistake.value.message


def test_images_as_plain_bytes(tmp_path):
    columns = {"image": [IMAGE, IMAGE], "label": ["a", "b"]}
    table(columns, BINARY | {"label": datasets.Value("string")}).to_parquet(tmp_path / "train-0.parquet")
    nested = [{"bytes": IMAGE, "path": "x"}] * 2
    table({"image": nested, "label": [0, 1]}).to_parquet(tmp_path / "val-0.parquet")
    for split in ("train", "val"):
        source = build_source(str(tmp_path), split)
        assert np.array_equal(source.load(1), source.load(0))
        assert source.labels.tolist() == [0, 1]


def test_without_a_split_every_row_is_read(tmp_path):
    """As predict.py does; a data set that is no DatasetDict has no splits to choose from."""
    rows("train").save_to_disk(tmp_path / "saved")
    write_parquet(tmp_path / "flat")
    patterns = [f"{tmp_path}/flat/{name}-{{00000..00001}}-of-00002.parquet" for name in ("train", "validation")]
    for path, count in ((str(tmp_path / "saved"), 12), (str(tmp_path / "flat"), 24), (patterns[0], 12), (patterns, 24)):
        source = build_source(path, None)
        assert len(source) == count
        assert source.load(count - 1).shape == (40, 48, 3)
