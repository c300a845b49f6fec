"""Weighted k-NN against brute force and golden values, in bounded memory."""

import pytest
import torch
import torch.nn.functional as F
from golden import VIT_FILES, load

from util import knn


def data(train=300, test=57, width=16, classes=7):
    generator = torch.Generator().manual_seed(1)
    make = lambda n: F.normalize(torch.randn(n, width, generator=generator), dim=1)  # noqa: E731
    labels = lambda n: torch.randint(classes, (n,), generator=generator)  # noqa: E731
    return make(train), labels(train), make(test), labels(test)


def brute_force(train, train_labels, test, labels, k, T, classes):
    first = five = 0
    for query, label in zip(test, labels, strict=True):
        similarity = [(float(query @ row), int(y)) for row, y in zip(train, train_labels, strict=True)]
        votes = [0.0] * classes
        for value, y in sorted(similarity, reverse=True)[:k]:
            votes[y] += torch.tensor(value / T).exp().item()
        ranked = sorted(range(classes), key=lambda c: -votes[c])
        first += ranked[0] == int(label)
        five += int(label) in ranked[:5]
    return 100 * first / len(test), 100 * five / len(test)


@pytest.mark.parametrize("k", [1, 5, 200])
def test_it_equals_brute_force(k):
    assert knn.knn_classifier(*data(), k=k, T=0.07, num_classes=7) == pytest.approx(brute_force(*data(), k, 0.07, 7))


@pytest.mark.parametrize("T", [0.07, 0.005])
def test_similar_images_at_any_temperature(T):
    """exp(0.99 / T) is beyond float32 for T < 0.011, in votes that are decided by the temperature."""
    train, train_labels, test, labels = data()
    together = [F.normalize(x + 20 * train[:1], dim=1) for x in (train, test)]
    expected = knn.knn_classifier(together[0].double(), train_labels, together[1].double(), labels, 5, T, 7)
    assert knn.knn_classifier(together[0], train_labels, together[1], labels, 5, T, 7) == expected
    assert expected[0] < expected[1]


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_chunks_change_nothing(chunk):
    train, _, test, _ = data()
    similarity, index = knn.nearest(train, test, 20, chunk)
    expected = (test @ train.T).topk(20, dim=1)
    torch.testing.assert_close(similarity, expected.values)
    assert torch.equal(index, expected.indices)


def test_no_matrix_of_all_pairs_is_held(monkeypatch):
    largest = 0
    matmul = torch.Tensor.__matmul__

    def watch(a, b):
        nonlocal largest
        product = matmul(a, b)
        largest = max(largest, product.numel())
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", watch)
    train, train_labels, test, labels = data(train=5000, test=600)
    monkeypatch.setattr(knn.nearest, "__defaults__", (1000,))
    knn.knn_classifier(train, train_labels, test, labels, k=5, T=0.07, num_classes=7)
    assert largest <= 256 * 1000


def test_more_neighbours_than_features_is_an_error():
    with pytest.raises(ValueError, match="k = 301 exceeds the 300 training images"):
        knn.knn_classifier(*data(), k=301, T=0.07, num_classes=7)


@pytest.mark.parametrize("name", VIT_FILES)
def test_weighted_knn(name):
    golden, meta = load(name)
    features = [golden[f"knn/{key}"] for key in ("train_features", "train_labels", "val_features", "val_labels")]
    for k, top1, top5 in golden["knn/top1_top5"]:
        ours = knn.knn_classifier(
            *features, k=int(k), T=meta["knn"]["temperature"], num_classes=meta["knn"]["num_classes"]
        )
        assert ours == pytest.approx((top1, top5), abs=1e-5)
