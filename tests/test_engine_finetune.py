"""Exact evaluation and extraction, whatever the batches."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine_finetune import evaluate, extract_features
from util.data.datasets import ImageDataset
from util.data.loader import ShardSampler, build_loader
from util.data.sources import ShapesSource
from util.data.transforms import CenterCrop, ToModelInput
from util.run.amp import Amp

CPU = torch.device("cpu")
TO_INPUT = ToModelInput((0.5,) * 3, (0.2,) * 3, CPU, flip=False)


def batches(count, batch_size):
    dataset = ImageDataset(ShapesSource("val", count), CenterCrop(16))
    return build_loader(dataset, ShardSampler(count, batch_size), 0, False), dataset


@pytest.mark.parametrize("batch_size", [1, 7, 23, 100])
def test_every_image_counts_once(batch_size):
    loader, dataset = batches(23, batch_size)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    metrics = evaluate(model, loader, Amp("fp32", CPU), TO_INPUT)
    logits = model(TO_INPUT(torch.stack([dataset[i].image for i in range(23)])))
    labels = torch.from_numpy(dataset.labels)
    assert metrics["acc1"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item(), abs=1e-4)
    five = (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item()
    assert metrics["acc5"] == pytest.approx(100 * five, abs=1e-4)
    assert metrics["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert not model.training


def test_several_heads():
    class Heads(nn.Module):
        def forward(self, images):
            right = F.one_hot(torch.arange(len(images)) % 10, 10).float()
            return torch.stack([right, 1 - right])

    loader, _ = batches(20, 20)
    metrics = evaluate(Heads(), loader, Amp("fp32", CPU), TO_INPUT, heads=[" a", " b"])
    assert (metrics["acc1 a"], metrics["acc1 b"]) == (100, 0)


def test_fewer_than_five_classes():
    loader, _ = batches(4, 4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    assert evaluate(model, loader, Amp("fp32", CPU), TO_INPUT)["acc5"] == 100


def test_features_stand_in_the_order_of_the_data():
    loader, dataset = batches(23, 5)
    shuffled = list(loader)[::-1]
    encode = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 6))
    features, reasons = extract_features(encode, shuffled, Amp("fp32", CPU), TO_INPUT, 23, 6)
    expected = encode(TO_INPUT(torch.stack([dataset[i].image for i in range(23)])))
    torch.testing.assert_close(features, expected)
    assert (reasons == -1).all()


def test_a_missing_image_is_noticed():
    loader, _ = batches(23, 5)
    with pytest.raises(AssertionError, match="each image must occur once"):
        extract_features(nn.Flatten(), list(loader)[1:], Amp("fp32", CPU), TO_INPUT, 23, 768)
