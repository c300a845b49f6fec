"""One epoch of pre-training, as HPM's method section tells it (CVPR 2023, section 3).

Shapes: B batch of a micro-step, C channels, H, W image, L patches, D target width.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from util.ema import EMATeacher
from util.metrics import MeanMeter, rank_accuracy
from util.run.amp import Precision
from util.run.distributed import all_reduce_sum, gradient_exchange
from util.run.logger import Progress

# What the teachers say of images (B, C, H, W): predicted loss (B, L), feature target (B, L, D); None where not asked.
Look = Callable[[Tensor], tuple[Tensor | None, Tensor | None]]


def train_one_epoch(
    student: nn.Module,
    teacher: EMATeacher | None,
    batches: Iterable,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    *,
    to_model_input: Callable[[Tensor], Tensor],
    look: Look,
    draw_mask: Callable[[Tensor | None, Tensor], Tensor],
    num_masked: int,
    accum_iter: int,
    clip_grad: float,
    adjust_lr: Callable[[float], float],
    ema_decay: float,
    seed_micro_step: Callable[[int], None],
    epoch: int,
    first_step: int,
    steps: int,
    progress: Progress,
    meter: MeanMeter,
    after_step: Callable[[int], bool],
) -> dict[str, float]:
    """Train from optimizer step `first_step` to the end of the epoch.

    Args:
        student: the model, or what DDP made of it.
        teacher: follows the student; None for the MAE baseline.
        batches: (images uint8, ...) of each micro-step from `first_step` on.
        to_model_input: uint8 images -> normalised, flipped at random, on the device.
        look: the teachers' pass over the whole images.
        draw_mask: predicted loss (or None) and the images -> mask (B, L), True = masked, `num_masked` in every row.
        clip_grad: largest norm of the gradient; 0 leaves it as it is.
        adjust_lr: sets the learning rate for a fractional epoch and returns it.
        seed_micro_step: makes what is drawn next a function of the number of the micro-step in the run.
        steps: optimizer steps of a whole epoch.
        meter: running means of the epoch, on the device.
        after_step: called with the next step of the epoch; True ends the epoch here.

    Returns:
        Means over the epoch and all ranks: loss, loss_rec, grad_norm, and with a predictor loss_learn and rank_acc.
    """
    student.train()
    parameters = [p for p in student.parameters() if p.requires_grad]
    incoming = progress.waiting(batches)
    for step in range(first_step, steps):
        lr = adjust_lr(epoch + step / steps)
        for micro in range(accum_iter):
            images, *_ = next(incoming)  # (B, C, H, W) uint8
            seed_micro_step((epoch * steps + step) * accum_iter + micro)
            images = to_model_input(images)  # (B, C, H, W)

            # Score: the teacher sees the whole image and predicts the loss of every patch.
            with torch.no_grad(), precision.autocast():
                scores, target = look(images)  # (B, L), (B, L, D)

            # Mask: the hardest patches, more of them as training goes on, and the rest at random.
            mask = draw_mask(scores, images)  # (B, L)

            # Reconstruct the masked patches, and rank them by how hard they are.
            with gradient_exchange(student, now=micro == accum_iter - 1):
                with precision.autocast():
                    out = student(images, mask, target, num_masked)
                precision.backward(out["loss"] / accum_iter)

            meter.update(**{name: out[name] for name in ("loss", "loss_rec", "loss_learn") if name in out})
            if "loss_pred" in out:
                meter.update(rank_acc=rank_accuracy(out["loss_pred"], out["patch_loss"]))

        # Step, unless the gradient is not finite, and let the teacher follow.
        meter.update(grad_norm=precision.step(optimizer, parameters, clip_grad))
        if teacher is not None:
            teacher.update(ema_decay)

        if progress.advance():
            progress.report({**meter.window(all_reduce_sum), "lr": lr})
        if after_step(step + 1):
            break
    return meter.mean(all_reduce_sum)
