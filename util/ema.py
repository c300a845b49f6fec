"""The exponential-moving-average teacher (HPM; the decay and its ramp are the official code's)."""

import copy

import torch
from torch import nn


class EMATeacher:
    """A copy of the student whose weights are the moving average of the student's.

    `module` is the copy, in eval mode and without gradients, and `score` its forward pass, `score_patches`. Create it
    when all ranks hold the same weights, that is after DDP has broadcast them: the official code copies earlier, and
    each rank scores patches with a teacher of its own.
    """

    def __init__(self, student: nn.Module) -> None:
        self.module = copy.deepcopy(student).eval().requires_grad_(False)
        self._teacher_parameters = list(self.module.parameters())
        self._student_parameters = list(student.parameters())
        self._buffers = list(zip(self.module.buffers(), student.buffers(), strict=True))
        self.score = self.module.score_patches

    def compile(self, fullgraph: bool) -> None:
        """torch.compile the teacher forward; `module` itself stays eager."""
        self.score = torch.compile(self.score, fullgraph=fullgraph)

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """`teacher <- decay * teacher + (1 - decay) * student`; buffers are copied. Call it after every optimizer step.

        A skipped (non-finite) step needs no special case: it leaves the student unchanged and finite, and the teacher
        moves towards it as after any other step.
        """
        torch._foreach_lerp_(self._teacher_parameters, self._student_parameters, 1.0 - decay)
        for teacher_buffer, student_buffer in self._buffers:
            teacher_buffer.copy_(student_buffer)
