"""Mixed precision: autocast, the loss scaler of fp16, and the optimizer step with gradient clipping.

A step whose loss or gradient is not finite is skipped. Skipping is decided and counted on the device, where the log
reads the counters at its own interval. The norm of the reduced gradient is the same on all ranks, and so are the
counters: no communication is needed.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFinite(FloatingPointError):
    """End of a run with too many consecutive skipped steps."""


class SkippedSteps(NamedTuple):
    """Skipped optimizer steps.

    Attributes:
        total: number since the start of the process.
        in_a_row, first, loss: the longest sequence since the counters were last read: its length, its first step
            (counted by this process) and the loss of this rank there.
    """

    total: int
    in_a_row: int
    first: int
    loss: float


class Amp:
    """Forward and backward passes in a precision. Weights, gradients and losses are always float32.

    Args:
        name: fp32, bf16 or fp16. None is bf16 where the GPU supports it natively, fp16 on older GPUs, fp32 on the CPU.

    Raises:
        ValueError: fp16 without CUDA.
    """

    def __init__(self, name: str | None, device: torch.device) -> None:
        if name is None and device.type == "cuda":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        name = name or "fp32"
        if name == "fp16" and device.type != "cuda":
            raise ValueError(f"--precision fp16 needs CUDA, the device is {device}: give bf16 or fp32")
        self.name = name
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        self.steps = 0
        self._loss = torch.zeros((), device=device)
        self._total = torch.zeros((), device=device)
        self._row = torch.zeros(3, device=device)  # consecutive skipped steps: number, first step, loss there
        self._longest = self._row

    def choose_attention(self, model: nn.Module) -> None:
        """PyTorch's fused attention, except for bf16 on the CPU, where its kernel is slower than plain products."""
        fused = not (self.name == "bf16" and self.device.type == "cpu")
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=_DTYPES[self.name], enabled=self.name != "fp32")

    def backward(self, loss: Tensor) -> None:
        """Back-propagate. A non-finite loss turns every gradient NaN, so that all ranks see it in the gradient norm."""
        self._loss = self._loss + loss.detach()
        poison = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        self.scaler.scale(loss * poison).backward()

    def step(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], clip_grad: float) -> Tensor:
        """Clip the gradient to norm `clip_grad` (0 disables), take an optimizer step, clear the gradients.

        If the norm is not finite, neither weights nor optimizer state change. fp16 overflows that a lower loss scale
        cures are skipped as well, but not counted.

        Args:
            optimizer: one that takes `found_inf` as a tensor on the device (fused AdamW and SGD, LARS).

        Returns:
            The norm before clipping, a scalar on the device.
        """
        assert getattr(optimizer, "_step_supports_amp_scaling", False), "the optimizer cannot skip steps on the device"
        self.scaler.unscale_(optimizer)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if clip_grad > 0:
            torch._foreach_mul_(gradients, (clip_grad / (norm + 1e-6)).clamp(max=1.0))
        skipped = 1.0 - norm.isfinite().float()
        optimizer.grad_scale, optimizer.found_inf = None, skipped  # where found_inf is 1, nothing is updated
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf

        # The counters, without reading the device: 0-dimensional tensors made by a fill, not copied from the host.
        incurable = self.scaler.scale(torch.ones_like(norm)) <= 1.0 if self.scaler.is_enabled() else 1.0
        bad = skipped * incurable
        number = torch.full((), float(self.steps), device=self.device)
        begins = torch.stack([torch.ones_like(norm), number, self._loss.float()])
        grows = torch.cat([self._row[:1] + 1, self._row[1:]])
        self._row = torch.where(self._row[0] > 0, grows, begins)
        self._row = torch.where(bad > 0, self._row, torch.zeros_like(self._row))
        self._longest = torch.where(self._row[0] > self._longest[0], self._row, self._longest)
        self._total = self._total + bad
        self.steps += 1
        self._loss = torch.zeros((), device=self.device)
        self.scaler.update()
        if self.scaler.is_enabled():  # non-finite losses lower the scale, too, and it doubles only every 2000 steps
            self.scaler.update(self.scaler.scale(torch.ones_like(norm)).clamp(min=1.0))
        optimizer.zero_grad(set_to_none=True)
        return norm

    def read_skipped(self) -> SkippedSteps:
        """The counters. Waits for the device."""
        total, in_a_row, first, loss = torch.cat([self._total.view(1), self._longest]).tolist()
        self._longest = self._row
        return SkippedSteps(int(total), int(in_a_row), int(first), loss)

    def state_dict(self) -> dict:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        if state:
            self.scaler.load_state_dict(state)
