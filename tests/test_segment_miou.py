"""The metric of segmentation: against sets of pixels, over ranks, and where classes or labels are missing."""

import math

import numpy as np
import pytest
import torch

from util.miou import ConfusionMatrix, iou_table


def alone(tensor):
    return tensor


def score(pairs, num_classes, ignore_index=255, reduce=alone):
    matrix = ConfusionMatrix(num_classes, ignore_index, torch.device("cpu"))
    for prediction, label in pairs:
        matrix.update(torch.from_numpy(prediction), torch.from_numpy(label))
    return matrix.scores(reduce)


@pytest.fixture
def pairs():
    """Images of different sizes, with ignored pixels; class 4 is in no label, but predicted."""
    generator = np.random.default_rng(0)
    made = []
    for height, width in [(5, 7), (31, 12), (1, 9), (64, 64)]:
        label = generator.integers(0, 4, (height, width)).astype(np.uint8)
        guess = generator.integers(0, 5, (height, width))
        prediction = np.where(generator.random((height, width)) < 0.6, label, guess)
        label[generator.random((height, width)) < 0.2] = 255
        made.append((prediction, label))
    return made


def test_equal_to_sets_of_pixels(pairs):
    """Computed per class from the definition, over all images at once."""
    scores = score(pairs, 5)
    prediction, label = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    prediction, label = prediction[label != 255], label[label != 255]
    expected = []
    for k in range(4):
        a, b = set(np.flatnonzero(prediction == k)), set(np.flatnonzero(label == k))
        expected.append(100 * len(a & b) / len(a | b))
        assert scores.accuracy[k].item() == pytest.approx(100 * len(a & b) / len(b))
    assert scores.iou[:4].tolist() == pytest.approx(expected)
    assert scores.miou == pytest.approx(np.mean(expected))
    assert scores.pixel_accuracy == pytest.approx(100 * np.mean(prediction == label))
    assert scores.pixels.tolist() == [*np.bincount(label), 0]


def test_a_class_that_no_label_has_is_left_out_and_named(pairs):
    scores = score(pairs, 5)
    assert scores.absent == [4]
    assert math.isnan(scores.iou[4])
    lines = iou_table(scores, ["wall", "sky", "tree", "road", "flag"]).splitlines()
    assert lines[0] == "index\tname\tpixels\tiou\taccuracy"
    assert lines[1].split("\t")[1] == "wall"
    assert lines[1].split("\t")[3] == f"{scores.iou[0]:.4f}"
    assert lines[5] == "4\tflag\t0\tabsent\tabsent"


def test_ranks_add_up_to_one(pairs):
    """However the images are split, exactly: counts are whole numbers."""
    whole = score(pairs, 5)
    counts = []
    for part in (pairs[:1], pairs[1:]):
        score(part, 5, reduce=lambda tensor: counts.append(tensor) or tensor)
    together = score([], 5, reduce=lambda tensor: tensor.copy_(sum(counts)))
    assert together.miou == whole.miou
    assert torch.equal(together.iou[:4], whole.iou[:4])


def test_an_image_without_labels_does_no_harm(pairs):
    nothing = (np.zeros((8, 8), dtype=np.int64), np.full((8, 8), 255, dtype=np.uint8))
    assert score([*pairs, nothing], 5).miou == score(pairs, 5).miou
    only = score([nothing], 5)
    assert math.isnan(only.miou)
    assert only.absent == [0, 1, 2, 3, 4]


def test_the_ignored_label_may_be_any():
    label = np.array([[0, 1, 2], [2, 2, 1]])
    scores = score([(np.array([[1, 1, 2], [0, 2, 1]]), label)], 3, ignore_index=0)
    assert scores.absent == [0]
    assert scores.iou[1:].tolist() == pytest.approx([100.0, 100 * 2 / 3])
