"""Probes of patch features: labels of patches, k-NN, logistic regression, and the choice of hyper-parameters."""

import pytest
import torch
import torch.nn.functional as F

import engine_probe as probe
from util.miou import ConfusionMatrix
from util.run.amp import Amp

AMP = Amp("fp32", torch.device("cpu"))


def clusters(count=400, width=6, classes=3, seed=0):
    """Features around one centre per class, and labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9)) * 2
    labels = torch.randint(0, classes, (count,), generator=generator)
    return centres[labels] + torch.randn(count, width, generator=generator), labels


def test_the_label_of_a_patch_is_its_commonest():
    labels = torch.full((2, 8, 12), 7, dtype=torch.uint8)
    labels[0, :4, 4:8] = torch.tensor([[1, 1, 2, 2]] * 3 + [[2, 2, 2, 2]], dtype=torch.uint8)
    labels[1, 4:, :4] = torch.tensor([[5, 5, 3, 3]] * 4, dtype=torch.uint8)  # a tie
    patches = probe.patch_labels(labels, (2, 3))
    assert patches.tolist() == [[7, 2, 7, 7, 7, 7], [7, 7, 7, 3, 7, 7]]


def batches_of(images, labels, size=2):
    for start in range(0, len(images), size):
        index = torch.arange(start, min(start + size, len(images)))
        yield (images[index], labels[index]), torch.zeros(len(index)), index, torch.full((len(index),), -1)


def encode(images):
    """Patches of 4 pixels, averaged: (B, 3, H, W) -> (B, 3, h, w)."""
    return F.avg_pool2d(images.float(), 4)


def test_patches_are_rows_in_the_order_of_the_grid():
    images, labels = torch.randn(5, 3, 8, 12), torch.randint(0, 3, (5, 8, 12), dtype=torch.uint8)
    features, classes = probe.extract_patches(encode, batches_of(images, labels), AMP, 5, 100, seed=0)
    assert features.shape == (5, 6, 3)
    torch.testing.assert_close(features[3, 1 * 3 + 2], encode(images)[3, :, 1, 2])
    assert torch.equal(classes, probe.patch_labels(labels, (2, 3)))


def test_a_rank_without_images_takes_part(monkeypatch):
    """There may be more ranks than training images."""
    monkeypatch.setattr(probe, "gather", lambda shape: [shape, (6, 3)])
    features, classes = probe.extract_patches(encode, [], AMP, 5, 100, seed=0)
    assert (features.shape, classes.shape) == ((5, 6, 3), (5, 6))


def test_a_limit_on_memory_draws_patches_of_every_image():
    """The same ones whatever the order and the batches."""
    images, labels = torch.randn(5, 3, 8, 12), torch.randint(0, 3, (5, 8, 12), dtype=torch.uint8)
    whole, _ = probe.extract_patches(encode, batches_of(images, labels), AMP, 5, 100, seed=0)
    few, classes = probe.extract_patches(encode, batches_of(images, labels, 3), AMP, 5, 2, seed=0)
    again, _ = probe.extract_patches(encode, [*batches_of(images, labels, 1)][::-1], AMP, 5, 2, seed=0)
    assert few.shape == (5, 2, 3)
    assert classes.shape == (5, 2)
    assert torch.equal(few, again)
    for rows, all_rows in zip(few, whole, strict=True):
        assert all(any(torch.equal(row, other) for other in all_rows) for row in rows)


def test_standardization():
    features = torch.randn(5000, 3) * torch.tensor([1.0, 10.0, 0.1]) + torch.tensor([0.0, 100.0, -3.0])
    mean, std = probe.standardization(features)
    torch.testing.assert_close(mean, features.mean(0))
    torch.testing.assert_close(std, features.std(0, correction=0))


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_neighbours_equal_brute_force(distance, monkeypatch):
    monkeypatch.setattr(probe, "_ROWS", 37)  # several chunks
    features, labels = clusters(200)
    queries, _ = clusters(50, seed=1)
    if distance == "cosine":
        distances = 1 - F.cosine_similarity(queries[:, None], features[None], dim=2)
    else:
        distances = torch.cdist(queries, features)
    order = distances.argsort(dim=1)
    predictions = probe.neighbours(features, labels, [1, 3, 10], distance)(queries)
    assert list(predictions) == ["1-NN", "3-NN", "10-NN"]
    for k in (1, 3, 10):
        expected = torch.stack([torch.bincount(labels[row[:k]], minlength=3).argmax() for row in order])
        assert torch.equal(predictions[f"{k}-NN"], expected)


@pytest.mark.parametrize("cost", [1e-3, 1.0])
def test_logistic_regression_reaches_the_optimum(cost, monkeypatch):
    """The gradient of CAPI's objective vanishes, whatever the chunks."""
    monkeypatch.setattr(probe, "_ROWS", 150)
    features, labels = clusters()
    solution = probe.fit_logistic(features, labels, 3, cost).double().requires_grad_()
    logits = F.linear(features.double(), solution[:, :-1], solution[:, -1])
    loss = cost * F.cross_entropy(logits, labels, reduction="sum") + solution[:, :-1].square().sum() / 2
    loss.backward()
    assert solution.grad.abs().max() < 1e-3 * cost * len(features)
    other = probe.fit_logistic(features, labels, 3, cost, start=solution.detach().float())
    torch.testing.assert_close(other, solution.detach().float(), atol=2e-3, rtol=2e-2)


def test_logistic_regression_of_images_finds_what_a_vote_does_not():
    """Two classes that differ in a direction much smaller than the others."""
    features = torch.randn(600, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, *[10.0] * 7])
    labels = (features[:, 0] > 0).long()

    def accuracy(labels):
        train, test = (features[:400], labels[:400]), (features[400:], labels[400:])
        return probe.logistic_accuracy(train, test, 2, 0, torch.device("cpu"))

    assert accuracy(labels)[0] > 95
    assert accuracy(labels)[1] == 100  # of two classes, the first two
    shuffled = labels[torch.randperm(600, generator=torch.Generator().manual_seed(1))]
    assert 35 < accuracy(shuffled)[0] < 65


def test_less_data_weight_means_smaller_weights():
    features, labels = clusters()
    sizes = [probe.fit_logistic(features, labels, 3, cost)[:, :-1].norm().item() for cost in (1e-6, 1e-2, 1e2)]
    assert sizes[0] < 0.01 < sizes[1] < sizes[2]


@pytest.mark.parametrize("head", ["knn", "logreg"])
def test_hyper_parameters_are_chosen_on_a_tenth_of_the_images(head, caplog):
    features, labels = clusters(500)
    held = probe.held_out(50, seed=0).repeat_interleave(10)
    assert held.sum() == 50
    with caplog.at_level("INFO", "hpm"):
        classify, names, chosen = probe.build_classifier(head, features, labels, held, 3)
    assert caplog.text.count("patch_mIoU") == (8 if head == "logreg" else len(probe.KS) * len(probe.DISTANCES))
    queries, truth = clusters(200, seed=5)
    assert list(classify(queries)) == names
    assert (classify(queries)[chosen] == truth).float().mean() > 0.9


def test_the_choice_never_sees_the_held_out_patches_while_fitting(monkeypatch):
    seen = []
    original = probe.neighbours

    def neighbours(features, *others):
        seen.append(len(features))
        return original(features, *others)

    monkeypatch.setattr(probe, "neighbours", neighbours)
    features, labels = clusters(100)
    held = torch.arange(100) < 10
    probe.build_classifier("knn", features, labels, held, 3)
    assert seen == [90, 90, 100]


def test_scores_at_the_size_of_the_labels():
    """Equal to a confusion matrix of the predictions repeated over their patches; the chosen ones are handed over."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(9, 3, 8, 12, generator=generator)
    masks = (encode(images)[:, 0] > 0).to(torch.uint8)  # (9, 2, 3): what can be learned
    train = masks[:6].repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels = [torch.randint(0, 2, size, dtype=torch.uint8, generator=generator) for size in [(8, 12), (16, 24), (5, 7)]]
    labels[1][0] = 255
    val = [((images[6 + i][None], label[None]), None, i, -1) for i, label in enumerate(labels)]
    kept = {}
    scores, chosen = probe.probe(
        *("knn", encode, batches_of(images[:6], train), val, AMP),
        **{"num_images": 6, "num_classes": 2, "ignore_index": 255, "max_patches": 100, "seed": 0},
        on_prediction=lambda index, prediction: kept.update({index: prediction}),
    )
    assert set(scores) == {"1-NN", "3-NN", "10-NN", "30-NN"}
    matrix = ConfusionMatrix(2, 255, AMP.device)
    for index, label in enumerate(labels):
        rows = [int(i * 2 / label.shape[0]) for i in range(label.shape[0])]
        columns = [int(j * 3 / label.shape[1]) for j in range(label.shape[1])]
        assert len({kept[index][i, j].item() for i in range(2) for j in range(2)}) == 1  # one class per patch
        matrix.update(kept[index], label)
        assert kept[index].shape == label.shape
        patches = kept[index][:: -(-label.shape[0] // 2)][:, :: -(-label.shape[1] // 3)]
        assert torch.equal(patches[rows][:, columns], kept[index])
    assert matrix.scores(lambda tensor: tensor).miou == pytest.approx(scores[chosen].miou)
