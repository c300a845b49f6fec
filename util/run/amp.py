"""Compute precision: autocast, the loss scaler that fp16 needs, and the optimizer step with clipped gradients."""

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from util.run.bad_steps import BadSteps, step_unless

NAMES = ("fp32", "bf16", "fp16")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_precision(device: torch.device) -> str:
    """bf16 where the GPU has it natively, fp16 on older ones, fp32 on the CPU."""
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


class Precision:
    """How a step computes. Weights, gradients and losses are float32 always; autocast picks what runs lower.

    Making one settles for the process that float32 means float32: PyTorch's convolutions would use TF32 otherwise.

    Raises:
        ValueError: fp16 without CUDA.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name == "fp16" and device.type != "cuda":
            raise ValueError(f"--precision fp16 needs CUDA, the device is {device}: give bf16 or fp32")
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        self.name = name
        self.device = device
        self.bad_steps = BadSteps(device)
        self.skipped = self._loss = torch.zeros((), device=device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def choose_attention(self, model: nn.Module) -> None:
        """PyTorch's fused attention, except under bf16 on the CPU: its kernel is there slower than plain products."""
        fused = not (self.name == "bf16" and self.device.type == "cpu")
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=_DTYPES[self.name], enabled=self.name != "fp32")

    def backward(self, loss: Tensor) -> None:
        """Back-propagate. A loss that is not finite makes every gradient so: their norm then tells it to all ranks."""
        self._loss = self._loss + loss.detach()
        poison = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        self.scaler.scale(loss * poison).backward()

    def step(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], clip_grad: float) -> Tensor:
        """Clip to the norm `clip_grad` (0 = do not), step, clear. Returns the norm before clipping, on the device.

        If the norm is not finite, no weight and no state changes; `skipped` is then 1, else 0, on the device.
        `bad_steps` counts these, but for overflows that a lower loss scale can still cure.
        """
        self.scaler.unscale_(optimizer)
        numbered = [(i, p.grad) for i, p in enumerate(parameters) if p.grad is not None]
        with_gradient, gradients = [i for i, _ in numbered], [gradient for _, gradient in numbered]
        norms = torch.stack(torch._foreach_norm(gradients))
        norm = torch.linalg.vector_norm(norms)
        if clip_grad > 0:
            torch._foreach_mul_(gradients, (clip_grad / (norm + 1e-6)).clamp(max=1.0))
        self.skipped = 1.0 - norm.isfinite().float()
        step_unless(optimizer, self.skipped)
        incurable = self.scaler.scale(torch.ones_like(norm)) <= 1.0 if self.scaler.is_enabled() else 1.0
        self.bad_steps.update(self.skipped * incurable, self._loss, norms, with_gradient)
        self._loss = torch.zeros((), device=self.device)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        if state:
            self.scaler.load_state_dict(state)
