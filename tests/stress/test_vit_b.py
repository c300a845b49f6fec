"""Exports of a ViT-B that take long to write.

python -m pytest tests/stress/test_vit_b.py
"""

import pytest
from test_export_vit_b import vit_b, vit_b_source, written_and_verified

__all__ = ["vit_b", "vit_b_source"]  # fixtures


def test_onnx(tmp_path, vit_b_source):
    pytest.importorskip("onnxruntime")
    written_and_verified(tmp_path / "b.onnx", vit_b_source, "onnx", tolerance=1e-4)
