"""The official LARS (tests/golden/vit_*.npz)."""

import pytest
import torch
from golden import VIT_FILES, load

from util.lars import LARS


@pytest.mark.parametrize("name", VIT_FILES)
def test_four_steps_of_lars(name):
    golden, meta = load(name)
    weight, bias = (torch.nn.Parameter(golden[f"lars/{key}0"].clone()) for key in "wb")
    optimizer = LARS([weight, bias], **meta["lars"])
    for weight.grad, bias.grad in zip(golden["lars/w_grads"], golden["lars/b_grads"], strict=True):
        optimizer.step()
    torch.testing.assert_close(weight.data, golden["lars/w4"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias.data, golden["lars/b4"], rtol=1e-5, atol=1e-6)
