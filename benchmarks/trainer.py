"""main_pretrain.py's training step for the benchmarks: timed, on random images, and its floating-point operations."""

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import main_pretrain
from engine_pretrain import train_one_epoch
from util import rng
from util.data.transforms import ToModelInput
from util.ema import EMATeacher
from util.masking import MaskSampler, random_mask
from util.metrics import MeanMeter
from util.run import distributed
from util.run.amp import Amp
from util.run.loop import Loop

PARTS = ("data", "teacher", "mask", "forward", "backward", "optimizer", "EMA", "rest")


# Options of main_pretrain.py by method: published HPM, MAE, the predictor with random masks, and teachers that see a
# quarter of the patches; with the published predictor, with one of two blocks or one, or without any.
METHODS = {
    "hpm": [],
    "mae": ["--no-learning_loss"],
    "predictor": ["--mask_strategy", "random"],
    "predictor_2": ["--mask_strategy", "random", "--predictor_depth", "2"],
    "predictor_1": ["--mask_strategy", "random", "--predictor_depth", "1"],
    "sparse": ["--teacher_keep", "0.25"],
    "sparse_2": ["--teacher_keep", "0.25", "--predictor_depth", "2"],
    "sparse_1": ["--teacher_keep", "0.25", "--predictor_depth", "1"],
    "loss": ["--score_by", "loss", "--no-learning_loss"],
}


@dataclass(frozen=True)
class Case:
    """One way to train."""

    model: str
    method: str
    precision: str
    compile: str
    batch_size: int

    def __str__(self) -> str:
        size = self.model.removeprefix("mae_vit_").split("_")[0]
        how = "compiled" if self.compile == "yes" else "eager"
        return f"{self.method.upper()} {size}, {self.precision}, {how}, batch {self.batch_size}"

    def options(self) -> list[str]:
        """For main_pretrain.py."""
        words = ["--model", self.model, "--precision", self.precision, "--batch_size", str(self.batch_size)]
        words += [*METHODS[self.method], "--epochs", "2"]  # the second one masks by score, so the teacher runs
        return [*words, "--compile"] if self.compile == "yes" else words


class Steps(Loop):
    """A number of steps without a run: no log, no checkpoints, a constant lr."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.epoch, self.accum_iter, self.meter, self._last_micro_batch = 1, 1, MeanMeter(), True

    def steps(self, loader: Iterable) -> Iterator[Iterator]:
        batches = iter(loader)
        for number in range(self.count):
            rng.seed_all(0, number)
            yield iter([next(batches)])


class Trainer:
    """main_pretrain.py's model, teacher and optimizer for a case, and timed steps of its engine."""

    def __init__(self, case: Case, device: torch.device, size: list[str]) -> None:
        argv = [*case.options(), *size, "--device", device.type]
        self.args = args = main_pretrain.resolve_options(
            main_pretrain.get_args_parser().parse_args(argv), distributed.ALONE
        )
        rng.seed_all(args.seed)
        self.device = device
        self.amp = Amp(case.precision, device)
        self.model = main_pretrain.build_model(args).to(device)
        self.amp.choose_attention(self.model)
        self.teacher = EMATeacher(self.model) if args.learning_loss or args.score_by == "loss" else None
        self.optimizer = main_pretrain.build_optimizer(self.model, args)
        self.masks = MaskSampler.from_options(vars(args), self.model.patch_embed.grid_size)
        if case.compile == "yes":
            self.model.compile(fullgraph=True)
            if self.teacher is not None:
                self.teacher.compile(fullgraph=True)
        shape = (case.batch_size, 3, args.input_size, args.input_size)
        self.images = torch.randint(256, shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.marks: list[tuple[str, Any]] = []  # (part that ends here, time)
        self.to_model_input = self._timed("data", ToModelInput(args.mean, args.std, device, flip=True))
        setattr(self.masks, "draw", self._timed("mask", self.masks.draw))  # noqa: B010 - for mypy
        setattr(self.amp, "backward", self._timed("backward", self.amp.backward, before="forward"))  # noqa: B010
        setattr(self.amp, "step", self._timed("optimizer", self.amp.step))  # noqa: B010
        if self.teacher is not None:
            setattr(self.teacher, "score", self._timed("teacher", self.teacher.score))  # noqa: B010
            setattr(self.teacher, "update", self._timed("EMA", self.teacher.update))  # noqa: B010

    def _timed(self, part: str, function: Callable, before: str = "rest") -> Callable:
        """The function, with its time booked under `part`, and the time since the previous mark under `before`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._mark(before)
            result = function(*args, **kwargs)
            self._mark(part)
            return result

        return run

    def _mark(self, part: str) -> None:
        if self.device.type == "cuda":  # an event, which waits for nothing
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((part, now))

    def steps(self, count: int, batches: Iterable | None = None) -> dict[str, float]:
        """Optimizer steps on random images, or on `batches`. Seconds per step: of each part, and in total as `step`."""
        synchronize(self.device)
        start = time.perf_counter()
        self.marks.clear()
        self._mark("start")
        train_one_epoch(
            self.model,
            self.teacher,
            None,
            itertools.repeat((self.images,)) if batches is None else batches,
            self.optimizer,
            self.amp,
            self.masks,
            Steps(count),
            to_model_input=self.to_model_input,
            clip_grad=self.args.clip_grad,
            ema_decay=self.args.ema_decay,
        )
        self._mark("rest")
        synchronize(self.device)
        seconds: dict[str, float] = defaultdict(float, step=(time.perf_counter() - start) / count)
        for (_, before), (part, now) in itertools.pairwise(self.marks):
            passed = before.elapsed_time(now) / 1e3 if self.device.type == "cuda" else now - before
            seconds[part] += passed / count
        return seconds

    def state_bytes(self) -> int:
        """Weights, teacher and optimizer."""
        modules = [self.model] if self.teacher is None else [self.model, self.teacher.module]
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        tensors += [t for state in self.optimizer.state.values() for t in state.values()]
        return sum(t.nbytes for t in tensors)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def step_flops(args: Any, batch_size: int) -> int:
    """Floating-point operations of the matrix products in a step: the student's forward and backward pass, and the
    teacher's forward pass. Counted by PyTorch from shapes, without the fused attention, whose backward pass recomputes
    a product."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = main_pretrain.build_model(args)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        masks = MaskSampler.from_options(vars(args), model.patch_embed.grid_size)
        images = torch.empty(1, 3, *model.img_size)
        target = None if model.target_dim is None else torch.empty(1, masks.num_patches, model.target_dim)
        with FlopCounterMode(display=False) as counter:
            mask = random_mask(1, masks.num_patches, masks.num_masked)
            model(images, mask, target, masks.num_masked)["loss"].backward()
            if max(masks.num_hardest) > 0 or args.target == "ema":
                with torch.no_grad():
                    hidden = masks.draw_hidden(1) if masks.num_hidden else None
                    model.score_patches(images, hidden, masks.num_hidden, target)
    return counter.get_total_flops() * batch_size
