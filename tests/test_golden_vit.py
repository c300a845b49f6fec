"""The official fine-tuning ViT, reproduced (tests/golden/vit_*.npz)."""

import pytest
import torch
from golden import VIT_FILES, build_vit, load, params

from util.weights.load import load_into


@pytest.mark.parametrize("name", VIT_FILES)
def test_logits_and_features(name):
    golden, meta = load(name)
    model = build_vit(meta)
    report = load_into(model, params(golden))
    assert report.unused == report.newly_initialised == []
    torch.testing.assert_close(model(golden["images"]), golden["logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.pooled_features(golden["images"]), golden["features"], rtol=1e-5, atol=1e-5)
