"""Layer-wise decay of the official fine-tuning (tests/golden/vit_*.npz)."""

import json

import pytest
from golden import VIT_FILES, build_vit, load

from util.lr_decay import param_groups_lrd


@pytest.mark.parametrize("name", VIT_FILES)
def test_layer_decay(name):
    golden, meta = load(name)
    model = build_vit(meta)
    groups = param_groups_lrd(model, meta["weight_decay"], model.no_weight_decay(), meta["layer_decay"])
    ours = {name: [g["lr_scale"], g["weight_decay"]] for g in groups for name in g["names"]}
    expected = json.loads(str(golden["layer_decay"]))
    assert ours.keys() == expected.keys()
    for key, values in expected.items():
        assert ours[key] == pytest.approx(values), key
