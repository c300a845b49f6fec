"""One epoch of pre-training, as in HPM's method section (CVPR 2023, section 3).

Shapes: B micro-batch, C channels, H, W image, L patches, M masked patches, E encoder width, D target width.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from util.ema import EMATeacher
from util.masking import MaskSampler
from util.metrics import rank_accuracy
from util.run.amp import Amp
from util.run.distributed import all_reduce_sum
from util.run.loop import Loop


def train_one_epoch(
    student: nn.Module,
    teacher: EMATeacher | None,
    feature_teacher: nn.Module | EMATeacher | None,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    amp: Amp,
    masks: MaskSampler,
    loop: Loop,
    *,
    to_model_input: Callable[[Tensor], Tensor],
    clip_grad: float,
    ema_decay: float,
) -> dict[str, float]:
    """Train to the end of the epoch, or to where the run stops.

    Args:
        student: the model, wrapped by DDP where there are several processes.
        teacher: EMA of the student: scores the patches, provides features, or both. None if neither is needed (MAE).
        feature_teacher: predicts features as reconstruction targets: a frozen network, (B, C, H, W) -> (B, L, D), or
            `teacher` itself, whose patch tokens are then the target. None reconstructs pixels.
        loader: batches of `util.data.datasets.Sample`; their images are uint8.
        masks: draws the masks from the scores, by the easy-to-hard schedule.
        loop: the training loop: its steps, their micro-batches, learning rate, log and checkpoints.
        to_model_input: uint8 images -> normalised images (B, C, H, W), randomly flipped, on the device.
        clip_grad: maximum norm of the gradient; 0 disables clipping.

    Returns:
        Means over the epoch and all ranks: loss, loss_rec, grad_norm; with a loss predictor loss_learn and rank_acc.
    """
    student.train()
    parameters = [p for p in student.parameters() if p.requires_grad]
    features_from_ema = isinstance(feature_teacher, EMATeacher)
    for batches in loop.steps(loader):
        for images, *_ in batches:
            images = to_model_input(images)  # (B, C, H, W)

            # Score: the EMA teacher scores every patch of the whole image, or those hidden from it. It runs only in
            # epochs that choose patches by score, or if its features are the target.
            scores = target = None
            with torch.no_grad(), amp.autocast():
                if feature_teacher is not None and not isinstance(feature_teacher, EMATeacher):
                    target = feature_teacher(images)  # (B, L, D)
                if teacher is not None and (features_from_ema or masks.num_hardest[loop.epoch] > 0):
                    hidden = None  # or (B, L)
                    if masks.num_hidden > 0:
                        hidden = masks.draw_hidden(len(images), device=images.device)
                    scores, tokens = teacher.score(images, hidden, masks.num_hidden, target)  # (B, L), (B, L, E)
                    target = tokens if features_from_ema else target

            # Mask: `num_hardest` patches by score (by default the highest, more in every epoch), the rest at random.
            mask = masks.draw(scores, len(images), loop.epoch, device=images.device)  # (B, L), True = masked

            # Reconstruct the masked patches, and rank them by how hard they are to reconstruct.
            with loop.no_sync(student):
                with amp.autocast():
                    out = student(images, mask, target, masks.num_masked)
                amp.backward(out["loss"] / loop.accum_iter)
            loop.meter.update(**{name: out[name] for name in ("loss", "loss_rec", "loss_learn") if name in out})
            if "loss_pred" in out:
                loop.meter.update(rank_acc=rank_accuracy(out["loss_pred"], out["patch_loss"]))

        loop.meter.update(grad_norm=amp.step(optimizer, parameters, clip_grad))
        if teacher is not None:
            teacher.update(ema_decay)
    return loop.meter.mean(all_reduce_sum)
