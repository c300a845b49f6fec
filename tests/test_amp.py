import pytest
import torch
from torch import nn

from util.run.amp import Amp
from util.run.distributed import World, setup

CPU = torch.device("cpu")


def one_step(clip_grad, name="fp32"):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    amp = Amp(name, CPU)
    amp.backward(model(torch.ones(2, 4)).square().sum() * 10)
    before, gradient = model.weight.detach().clone(), model.weight.grad.clone()
    norm = amp.step(optimizer, list(model.parameters()), clip_grad)
    return norm, before - model.weight.detach(), gradient, model


def test_clipping_scales_to_the_norm_and_reports_the_one_before():
    norm, step, gradient, model = one_step(5.0)
    assert norm > 5
    torch.testing.assert_close(step, gradient * 5 / norm)
    assert model.weight.grad is None


def test_zero_leaves_the_gradient_alone():
    norm, step, gradient, _ = one_step(0.0)
    assert norm > 5
    torch.testing.assert_close(step, gradient)


def test_default_precision(monkeypatch):
    assert Amp(None, CPU).name == "fp32"
    for native, name in [(True, "bf16"), (False, "fp16")]:
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native or including_emulation
        )
        monkeypatch.setattr(torch, "zeros", lambda *shape, device: torch.empty(*shape))  # there may be no GPU
        assert Amp(None, torch.device("cuda")).name == name


def test_the_default_precision_is_that_of_the_chosen_gpu(monkeypatch):
    """`is_bf16_supported` answers for the current device."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(str(device)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bool(calls.append("bf16")))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: torch.empty(*shape))
    setup(World(0, 1, 0, 1), "cuda:1", None, 1)
    assert calls == ["cuda:1", "bf16"]


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_computes_in_what_was_asked_for(name, dtype):
    with Amp(name, CPU).autocast():
        assert nn.Linear(3, 3)(torch.ones(1, 3)).dtype == dtype


def test_fp16_needs_cuda():
    with pytest.raises(ValueError, match="--precision fp16 needs CUDA, the device is cpu"):
        Amp("fp16", CPU)


def test_attention_without_the_fused_kernel_where_that_is_faster():
    from timm.models.vision_transformer import Attention

    model = nn.Sequential(Attention(8, num_heads=2), Attention(8, num_heads=2))
    x = torch.randn(2, 5, 8)
    expected = model(x)
    Amp("bf16", CPU).choose_attention(model)
    assert not any(block.fused_attn for block in model)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    Amp("fp32", CPU).choose_attention(model)
    assert all(block.fused_attn for block in model)


def test_float32_is_float32(monkeypatch):
    """PyTorch lets convolutions run in TF32 unless told otherwise."""
    torch.set_float32_matmul_precision("high")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    setup(World(0, 1, 0, 1), "cpu", "fp32", 1)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32
