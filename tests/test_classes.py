"""Labels are matched by class name between splits, checkpoints and data sets."""

import unicodedata

import numpy as np
import pytest
import torch
from images import encode, members, picture, write_tree
from timm.data import ImageNetInfo

from util.data.classes import class_record, count_classes, imagenet_record, label_as, match_classes
from util.data.files import ImageFiles
from util.data.sources import ShapesSource, build_source, build_splits
from util.weights.load import fit_head

IMAGE = encode(picture())


def splits(path):
    return build_splits(str(path), (1, 1), None, lambda find: find())


def source_of(classes, labels, numbered=False):
    labels = np.array(labels)
    return ImageFiles("/d", np.array([b"x"] * len(labels)), labels, classes, numbered=numbered)


def tree(path, train, val, lists=()):
    """SPLIT/CLASS/0.jpg, and for the splits in `lists` a list file with the labels of a dict."""
    files = {f"{split}/{name}/0.jpg": IMAGE for split, names in (("train", train), ("val", val)) for name in names}
    for split, labels in dict(lists).items():
        files[f"{split}.txt"] = "".join(f"{name}/0.jpg {label}\n" for name, label in labels.items()).encode()
    return write_tree(path, files)


def test_a_subset_is_labelled_with_the_outputs_of_the_model():
    record = class_record(source_of(["apple", "bread", "cheese"], [0, 1, 2]))
    matched = match_classes(record, source_of(["bread", "cheese"], [0, 1, 1]))
    assert matched.labels.tolist() == [1, 2, 2]
    assert matched.classes == ["apple", "bread", "cheese"]
    same = source_of(["apple", "bread", "cheese"], [0, 1, 2])
    assert match_classes(record, same) is same


def test_an_unknown_class_is_an_error_that_lists_the_names():
    record = class_record(source_of(["apple", "bread"], [0, 1]))
    with pytest.raises(
        ValueError, match=r"1 of 2 classes are unknown to the model: 'brioche'. .* 2 classes: 'apple', 'br"
    ):
        match_classes(record, source_of(["apple", "brioche"], [0, 1]))
    for twin in ("Apple ", "app\u200ble", "\uff41pple"):
        with pytest.raises(ValueError, match="unknown to the model") as error:
            match_classes(record, source_of([twin], [0]))
        assert ascii(twin) in str(error.value)


def test_unicode_forms_of_a_name_agree(tmp_path):
    forms = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    train, val = splits(tree(tmp_path / "d", [forms[0], "dog"], [forms[1], "dog"]))
    assert train.classes == val.classes
    assert set(val.labels.tolist()) == {0, 1}
    with pytest.raises(ValueError, match="two classes have the same name in different Unicode forms"):
        build_source(str(write_tree(tmp_path / "e", {f"train/{form}/1.jpg": IMAGE for form in forms})), "train")


def test_a_val_split_may_lack_classes_but_not_add_one(tmp_path):
    train, val = splits(tree(tmp_path / "a", ["cat", "dog", "fox"], ["dog", "fox"]))
    assert val.labels.tolist() == [1, 2]
    assert count_classes(train, val, None) == 3
    with pytest.raises(ValueError, match="1 of 2 classes are unknown to the train split: 'fox'"):
        splits(tree(tmp_path / "b", ["cat"], ["cat", "fox"]))


def test_folders_of_a_list_file_name_its_labels(tmp_path):
    """Labels of train.txt in another order than the class folders of val."""
    train, val = splits(tree(tmp_path / "d", ["2", "10"], ["2", "10"], {"train": {"2": 0, "10": 1}}))
    assert train.classes == ["2", "10"]
    assert [name.decode() for name in val.names] == ["10/0.jpg", "2/0.jpg"]
    assert val.labels.tolist() == [1, 0]


def test_list_files_that_number_their_folders_differently_are_matched_by_name(tmp_path):
    lists = {"train": {"a": 0, "b": 1}, "val": {"a": 1, "b": 0}}
    _, val = splits(tree(tmp_path / "d", ["a", "b"], ["a", "b"], lists))
    assert dict(zip([name.decode()[0] for name in val.names], val.labels.tolist(), strict=True)) == {"a": 0, "b": 1}


def test_numbers_and_folders_without_a_proof_are_an_error(tmp_path):
    files = {**members(("val",)), "train/0.jpg": IMAGE, "train/1.jpg": IMAGE, "train.txt": b"0.jpg 0\n1.jpg 1\n"}
    with pytest.raises(ValueError, match="numbers without names, the images have class names: labels cannot be"):
        splits(write_tree(tmp_path / "d", files))
    names, numbers = source_of(["a"], [0]), source_of([], [0], numbered=True)
    for model, data in ((names, numbers), (numbers, names)):
        with pytest.raises(ValueError, match="labels cannot be matched"):
            match_classes(class_record(model), data)


def test_numbers_match_numbers(tmp_path):
    files = {f"{split}/{i}.jpg": IMAGE for split in ("train", "val") for i in range(2)}
    files |= {"train.txt": b"0.jpg 0\n1.jpg 3\n", "val.txt": b"0.jpg 3\n1.jpg 3\n"}
    train, val = splits(write_tree(tmp_path / "d", files))
    assert (train.classes, val.labels.tolist(), count_classes(train, val, None)) == ([], [3, 3], 4)
    named = source_of(["a", "", "", "b"], [0, 3], numbered=True)
    assert match_classes(class_record(named), val) is val


def test_labels_from_one_are_an_error_that_says_how_to_proceed():
    train, val = (source_of([], [1, 2, 3], numbered=True) for _ in range(2))
    for given in (None, 3):
        with pytest.raises(ValueError, match="numbers from 1 to 3, expected from 0: subtract 1 .* --nb_classes 4"):
            count_classes(train, val, given)
    assert count_classes(train, val, 4) == 4
    from_zero = source_of([], [0, 1, 2], numbered=True)
    with pytest.raises(ValueError, match="val has label 3, but the training labels end at 2"):
        count_classes(from_zero, val, None)


def test_a_single_class_is_an_error(tmp_path):
    """As where a folder of images is taken for a class: any prediction would be right."""
    train, val = splits(tree(tmp_path / "d", ["images"], ["images"]))
    for given in (None, 1, 10):
        with pytest.raises(
            ValueError, match="all training images have the class 'images', so any prediction .* folder"
        ):
            count_classes(train, val, given)
    numbers = source_of([], [3, 3], numbered=True)
    with pytest.raises(ValueError, match="all training images have the class 3, so any prediction would be right"):
        count_classes(numbers, numbers, None)
    for record in (class_record(train), None):
        with pytest.raises(ValueError, match="the file has one output, so any prediction would be right"):
            label_as(record, 1, val, "the file")
    two = source_of(["cat", "dog"], [0, 1])
    assert label_as(class_record(two), 2, source_of(["dog"], [0]), "the file").labels.tolist() == [1]


def test_shapes_match_by_name_too():
    shapes = ShapesSource("val", 20)
    assert match_classes(class_record(shapes), shapes) is shapes
    more = {"names": ["another", *shapes.classes], "numbered": False}
    assert match_classes(more, shapes).labels.tolist() == [label + 1 for label in shapes.labels]
    assert shapes.labels[0] == 0


def test_imagenets_folders_name_the_outputs_of_a_foreign_classifier():
    ids = ImageNetInfo("imagenet-1k").label_names()
    subset = source_of([ids[7], ids[900]], [0, 1])
    assert match_classes(imagenet_record(1000, subset), subset).labels.tolist() == [7, 900]
    assert imagenet_record(10, subset) is None
    assert imagenet_record(1000, source_of(["cat"], [0])) is None


def test_imagenets_classes_in_words_are_those_of_its_folders():
    """As Hugging Face's classifiers and data sets name them, two of them the same or not."""
    info = ImageNetInfo("imagenet-1k")
    ids = info.label_names()
    words = [info.label_name_to_description(name) for name in ids]
    assert words[134] == words[517] == "crane"
    record = {"names": words, "numbered": False}
    folders = source_of([ids[7], ids[900]], [0, 1])
    numbers = source_of([], [7, 900], numbered=True)
    some = source_of([words[7], words[900]], [0, 1])
    whole = source_of([*words[:517], "crane2", *words[518:]], [7, 900])
    for images in (folders, numbers, some, whole):
        assert label_as(record, 1000, images, "the file").labels.tolist() == [7, 900]
    others = {"names": words[::-1], "numbered": False}
    assert label_as(others, 1000, some, "the file").labels.tolist() == [992, 99]
    with pytest.raises(ValueError, match="2 of 2 classes are unknown to the file"):
        label_as(others, 1000, folders, "the file")


def test_a_head_is_kept_for_the_classes_that_it_has(log):
    """By name; a head without names as is."""
    head = {"head.weight": torch.arange(6.0).view(3, 2), "head.bias": torch.arange(3.0), "cls_token": torch.ones(1)}
    record = {"names": ["cat", "dog"], "numbered": False}
    for names, order in ((["cat", "dog"], [0, 1, 2]), (["dog", "cat"], [1, 0, 2])):
        fitted = fit_head(head, record, source_of(names, [0, 1]), "the file")
        assert fitted["head.bias"].tolist() == order
        assert torch.equal(fitted["head.weight"], head["head.weight"][order])
    assert log.text == ""
    for names in (["ant", "zebra"], ["cat", "dog", "fox"], []):
        assert set(fit_head(head, record, source_of(names, [0, 1]), "the file")) == {"cls_token"}
        assert "the file has a head of other classes (cat, dog), which is not used" in log.text
        log.clear()
    for unnamed in (None, {"names": [], "numbered": True}):
        assert fit_head(head, unnamed, source_of(["ant", "zebra"], [0, 1]), "the file") is head
    info = ImageNetInfo("imagenet-1k")
    ids = info.label_names()
    words = {"names": [info.label_name_to_description(name) for name in ids], "numbered": False}
    head = {"head.weight": torch.arange(1000.0), "head.bias": torch.arange(1000.0)}
    assert fit_head(head, words, source_of(ids, [0]), "the file") is head


def test_a_model_without_class_names_needs_images_of_all_its_classes():
    images = source_of(["apple", "bread", "cheese"], [0, 1, 2])
    assert label_as(None, 3, images, "the file") is images
    numbers = source_of([], [0, 2], numbered=True)
    assert label_as(None, 5, numbers, "the file") is numbers
    with pytest.raises(ValueError, match="the file has 5 outputs but no class names, and the images have 3 classes"):
        label_as(None, 5, images, "the file")
    for record in (None, class_record(numbers)):
        with pytest.raises(ValueError, match="2 outputs, the images have labels up to 2"):
            label_as(record, 2, numbers, "the file")
