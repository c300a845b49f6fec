"""--val_fraction: the same part of the training images is held out everywhere, and never trained on."""

import os

import numpy as np
import pytest
from images import encode, members, picture, write_shards, write_tar, write_tree
from programs import PRETRAIN, checkpoint, log_lines, ranks, run

from util.data.held_out import Subset, fingerprint, split_off
from util.data.sources import build_source, build_splits, hold_out
from util.run.checkpoint import check_resumable
from util.run.folder import read_config
from util.run.options import UserMistake

IMAGE = encode(picture())
COUNTS = {"cat": 10, "cat-2": 4, "dog": 20, "fox": 1}


def tree(folder, prefix="train/", counts=COUNTS, seed=0):
    files = {
        f"{prefix}{name}/{i}.jpg": encode(picture(seed=seed + 100 * c + i), quality=90)
        for c, (name, count) in enumerate(counts.items())
        for i in range(count)
    }
    return write_tree(folder, files)


def splits(path, fraction=0.25):
    return build_splits(str(path), (1, 1), None, lambda find: find(), val_fraction=fraction)


def names(subset):
    return [os.fsdecode(subset.source.names[i]) for i in subset.indices]


def test_the_parts_are_stratified_disjoint_and_complete(tmp_path):
    train, val = splits(tree(tmp_path / "d"))
    assert np.bincount(val.labels, minlength=4).tolist() == [3, 1, 5, 0]  # 2.5 is rounded up
    assert np.bincount(train.labels).tolist() == [7, 3, 15, 1]
    assert set(names(train)) & set(names(val)) == set()
    assert sorted(names(train) + names(val)) == sorted(map(os.fsdecode, train.source.names))
    assert train.classes == val.classes == list(COUNTS)
    for part in (train, val):
        for i in range(len(part)):
            assert part.classes[part.labels[i]] == names(part)[i].split("/")[0]
            assert part.name(i).endswith(names(part)[i])
            assert (part.load(i) == part.source.load(int(part.indices[i]))).all()
        assert part.read(0) == part.source.read(int(part.indices[0]))


def test_each_class_keeps_an_image_for_training(tmp_path):
    train, val = splits(tree(tmp_path / "d"), 0.99)
    assert np.bincount(train.labels).tolist() == [1, 1, 1, 1]
    assert np.bincount(val.labels, minlength=4).tolist() == [9, 3, 19, 0]
    with pytest.raises(
        ValueError, match="--val_fraction 0.01 holds out no image: the largest of 4 classes has 20 images"
    ):
        splits(tree(tmp_path / "e"), 0.01)


def test_the_parts_depend_on_names_alone(tmp_path):
    """Not on the layout, on other classes, or on where the images are."""
    held_out = set(names(splits(tree(tmp_path / "d"))[1]))
    assert set(names(splits(tree(tmp_path / "no train folder", prefix=""))[1])) == held_out
    lists = tree(tmp_path / "lists")
    found = build_source(str(lists), "train")
    lines = [f"{os.fsdecode(name)} {9 - label}" for name, label in zip(found.names, found.labels, strict=True)]
    (lists / "train.txt").write_text("\n".join(reversed(lines)))
    assert set(names(splits(lists)[1])) == held_out
    files = {f"train/{os.fsdecode(name)}": found.read(i) for i, name in enumerate(found.names)}
    assert set(names(splits(write_tar(tmp_path / "a.tar", files))[1])) == held_out
    assert set(names(splits(write_tar(tmp_path / "a.tar.gz", files, "w:gz"))[1])) == held_out
    more = tree(tmp_path / "more", counts={"ape": 7, **COUNTS, "zebra": 3})
    assert {name for name in names(splits(more)[1]) if name[0] not in "az"} == held_out


def test_pre_training_holds_out_what_fine_tuning_does(tmp_path):
    """Also where there are more images, outside class folders."""
    path = write_tree(tree(tmp_path / "d"), {"train/loose.jpg": IMAGE})
    fine = splits(path)[1]
    train, val = hold_out(str(path), 0.25, labels_needed=False)
    assert names(val) == names(fine)
    assert "loose.jpg" in names(train)
    assert set(val.labels.tolist()) == {0}
    for label in ("names", "numbers"):
        shards = write_shards(tmp_path / label / "{}.tar", label=label)
        fine, pre = splits(shards)[1], hold_out(str(shards), 0.25, labels_needed=False)[1]
        assert np.array_equal(fine.indices, pre.indices)
        assert np.bincount(fine.labels).tolist() == [1, 1, 1]


def test_the_fingerprint_tells_parts_apart(tmp_path):
    first = fingerprint(splits(tree(tmp_path / "d"))[1])
    assert fingerprint(splits(tree(tmp_path / "e", seed=9))[1]) == first
    assert fingerprint(splits(tree(tmp_path / "e"), 0.3)[1]) != first
    (tmp_path / "e/train/dog/new.jpg").write_bytes(IMAGE)
    (tmp_path / "e/train/dog/0.jpg").unlink()
    (tmp_path / "e/train/dog/1.jpg").unlink()
    assert isinstance(splits(tmp_path / "e")[1], Subset)


def test_rows_are_held_out_too(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({"image": [IMAGE] * 20, "label": ["a", "b"] * 10})
    table.cast_column("image", datasets.Value("binary")).save_to_disk(tmp_path / "d")
    train, val = splits(tmp_path / "d")
    assert np.bincount(val.labels).tolist() == [3, 3]
    assert set(train.indices) | set(val.indices) == set(range(20))
    assert np.array_equal(hold_out(str(tmp_path / "d"), 0.25, labels_needed=False)[1].indices, val.indices)


def layouts_with_val(tmp_path):
    two = tmp_path / "two"
    for split in ("train", "val"):
        write_shards(tmp_path / f"shards/{split}-{{}}.tar", split)
        two.mkdir(exist_ok=True)
        write_tar(two / f"{split}.tar.gz", members((split,)), "w:gz")
    tree = write_tree(tmp_path / "tree")
    return {
        "folder": tree,
        "archive": write_tar(tmp_path / "one.tar"),
        "archives": two,
        "shards": tmp_path / "shards",
        "pattern": f"{tmp_path}/shards/{{train,val}}-0000.tar",
    }


def test_a_data_set_with_a_val_split_is_an_error(tmp_path):
    for name, path in layouts_with_val(tmp_path).items():
        for labels_needed in (True, False):
            with pytest.raises(ValueError, match=r"--val_fraction 0.25, but --data_path .* has a val split .*: omit"):
                hold_out(str(path), 0.25, labels_needed=labels_needed)
            assert name
    with pytest.raises(ValueError, match="but Shapes has a val split"):
        hold_out(None, 0.25)


# ----------------------------------------------------------------------------------------------- programs

SIZES = ["--input_size", "16", "--batch_size", "4", "--num_workers", "0", "--device", "cpu"]
TRAIN = ["--model", "vit_micro_patch16", "--patch_size", "8", *SIZES]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tree(tmp_path_factory.mktemp("data") / "d")


def held_out_of(folder):
    return checkpoint(folder)["options"]["val_split"]


def test_every_script_holds_out_the_same(data, tmp_path):
    expected = fingerprint(splits(data)[1])
    given = ["--data_path", data, "--val_fraction", 0.25]
    assert "9 images (--val_fraction 0.25)" in run("main_knn", *TRAIN, *given, "--nb_knn", 3)
    run("main_linprobe", *TRAIN, *given, "--epochs", 1, "--output_dir", tmp_path / "probe")
    run("main_finetune", *TRAIN, *given, "--epochs", 1, "--output_dir", tmp_path / "fine")
    pre = ["--epochs", 1, "--vis_interval", 1, "--output_dir", tmp_path / "pre"]
    log = run("main_pretrain", *PRETRAIN, *given, *pre)
    assert "26 images, 3 steps per epoch" in log
    assert "falling back to training images" not in log  # for the panels
    for name in ("probe", "fine", "pre"):
        assert held_out_of(tmp_path / name) == expected, name
        options = read_config(tmp_path / name)["options"]
        assert (options["val_fraction"], options["val_split"]) == (0.25, expected)


def test_evaluation_holds_out_what_training_did(data, tmp_path):
    given = ["--data_path", data, "--val_fraction", 0.25, "--epochs", 1]
    for script in ("main_finetune", "main_linprobe"):
        folder = tmp_path / script
        run(script, *TRAIN, *given, "--output_dir", folder)
        accuracy = f"{log_lines(folder)[0]['test_acc1']:.2f}"
        resume = ["--resume", folder / "checkpoint-last.pth", "--output_dir", tmp_path / "none"]
        for more in ([], ["--val_fraction", 0.25]):
            log = run(script, *TRAIN, "--eval", *resume, "--data_path", data, *more)
            assert "no training images, 9 validation images" in log
            assert f"acc1 {accuracy}" in log
            assert "WARNING" not in log
            assert "other images" not in log
        log = run(script, *TRAIN, "--eval", *resume, "--data_path", data, "--val_fraction", 0.5)
        assert "holds out other images than in training" in log
        other = write_tree(tmp_path / f"{script}-tree")  # with a val split, which counts
        assert "12 validation images" in run(script, *TRAIN, "--eval", *resume, "--data_path", other)


def test_a_resumed_run_keeps_its_parts(data, tmp_path):
    given = [*TRAIN, "--data_path", data, "--epochs", 2]
    folder = ["--output_dir", tmp_path / "run"]
    run("main_finetune", *given, *folder, "--val_fraction", 0.25, "--max_steps", 8)
    with pytest.raises(UserMistake) as mistake:
        run("main_finetune", *given, *folder, "--val_fraction", 0.3)
    assert "was trained with --val_fraction 0.25, now it is 0.3" in mistake.value.message
    state = checkpoint(tmp_path / "run")
    changed = {**state["options"], "val_split": "other"}
    with pytest.raises(ValueError, match=r"other images held out \(--val_fraction 0.25\): the data have changed"):
        check_resumable(None, state, "main_finetune", changed, [])
    before = state["options"]["val_split"]
    assert "Resuming from" in run("main_finetune", *given, *folder, "--val_fraction", 0.25)
    assert held_out_of(tmp_path / "run") == before


def test_two_processes_hold_out_what_one_does(tmp_path):
    data = write_shards(tmp_path / "shards/{}.tar", label="numbers")
    given = [*TRAIN, "--data_path", data, "--val_fraction", 0.25, "--epochs", 1]
    run("main_finetune", *given, "--output_dir", tmp_path / "one")
    ranks("main_finetune", *given, "--batch_size", 2, "--output_dir", tmp_path / "two")
    assert held_out_of(tmp_path / "one") == held_out_of(tmp_path / "two") == fingerprint(splits(data)[1])


def test_no_held_out_image_is_trained_on(data, tmp_path, monkeypatch):
    """Every image that a run loads, by split."""
    seen = {"train": set(), "val": set()}
    load = Subset.load

    def record(self, index):
        seen["train" if len(self) > 20 else "val"].add(names(self)[index])
        return load(self, index)

    monkeypatch.setattr(Subset, "load", record)
    run("main_finetune", *TRAIN, "--data_path", data, "--val_fraction", 0.25, "--epochs", 2, "--output_dir", tmp_path)
    train, val = splits(data)
    assert seen["val"] == set(names(val))
    assert seen["train"] <= set(names(train))
    assert len(seen["train"]) >= 24


def test_mistakes(tmp_path, data):
    for value in ("0", "1", "-1", "x"):
        with pytest.raises(UserMistake):
            run("main_finetune", *TRAIN, "--data_path", data, "--val_fraction", value)
    for script, more in (("main_finetune", []), ("main_knn", ["--load_features", tmp_path])):
        with pytest.raises(UserMistake) as mistake:
            run(script, *TRAIN, "--val_fraction", 0.1, *more)
        assert "--val_fraction" in mistake.value.message


def test_hashes_are_those_of_the_first_version():
    """A changed hash would train old runs' validation images."""

    class Rows:
        labels = np.arange(40) % 2
        classes = ()

        def __len__(self):
            return 40

    assert split_off(Rows(), 0.1)[1].indices.tolist() == [11, 18, 22, 39]
