"""Position embeddings of the official code (tests/golden/pos_embed.npz, vit_*.npz)."""

import numpy as np
import pytest
import torch
from golden import VIT_FILES, build_vit, load, params

from models_vit import VisionTransformer
from util.pos_embed import get_2d_sincos_pos_embed, interpolate_pos_embed


@pytest.mark.parametrize(("width", "grid"), [(48, 4), (64, 7), (192, 14)])
def test_pos_embed(width, grid):
    golden = np.load("tests/golden/pos_embed.npz")[f"d{width}_g{grid}"]
    np.testing.assert_allclose(get_2d_sincos_pos_embed(width, grid, cls_token=True), golden, atol=1e-6)


@pytest.mark.parametrize("name", VIT_FILES)
def test_interpolated_position_embedding(name):
    golden, meta = load(name)
    weights = params(golden)
    interpolate_pos_embed(build_vit(meta, img_size=meta["big_img_size"]), weights)
    torch.testing.assert_close(weights["pos_embed"], golden["pos_embed_interpolated"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (16, "pos_embed has 16 positions, those of patches alone: the weights are of another architecture"),
        (36, "pos_embed has 36 positions, those of patches alone"),
        (21, "pos_embed has 20 patches, which is not a square grid, and cannot be interpolated to 4 x 4"),
    ],
)
def test_tables_that_fit_no_grid(positions, message):
    """Those of DeiT-III and of timm's `no_embed_class`, and of images that are not square."""
    model = VisionTransformer(16, 4, embed_dim=16, depth=1, num_heads=1, num_classes=0, global_pool=False)
    with pytest.raises(ValueError, match=message):
        interpolate_pos_embed(model, {"pos_embed": torch.zeros(1, positions, 16)})
