"""Time of a pre-training step, HPM's and MAE's, and how close it comes to what the machine can multiply.

    python -m benchmarks.step --precision fp32 --compile no yes --batch_size 8
    python -m benchmarks.step --model mae_vit_base_patch16 mae_vit_large_patch16 --precision bf16 --compile yes \\
        --batch_size 256 --steps 10 --parts

Steps are those of main_pretrain.py, through engine_pretrain.py, on random images. All cases that are asked for run in
one process, one after the other, again and again; a product of two large matrices runs before each. Figures are
medians over these rounds, and ratios are taken within a round, so that what else the machine does drops out of them.
"""

import itertools
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

import main_pretrain
import models_hpm
from benchmarks.arithmetic import step_flops
from benchmarks.report import ratio, table, with_range
from engine_pretrain import train_one_epoch
from util import masking, rng
from util.data.transforms import ToModelInput
from util.ema import EMATeacher
from util.metrics import MeanMeter
from util.run import distributed, options
from util.run.amp import Precision, default_precision
from util.run.logger import Progress, RunLogger, cpu_threads, log, setup_logging

ALONE = distributed.World(rank=0, size=1, local_rank=0, local_size=1)
PARTS = ("data", "teacher", "student", "encoder", "decoders", "losses", "optimizer", "EMA", "rest")


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
        options = ["--model", self.model, "--precision", self.precision, "--batch_size", str(self.batch_size)]
        options += ["--compile"] * (self.compile == "yes") + ["--no-learning_loss"] * (self.method == "mae")
        return [*options, "--epochs", "2"]  # the second masks by predicted loss; the teacher runs


class Laps:
    """A stopwatch: a call books the time since the last one under a name. On CUDA by events, which wait for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, Any]] = []

    def __call__(self, name: str) -> None:
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((name, now))

    def timed(self, name: str, function: Callable, before: str = "rest") -> Callable:
        """The function, with its time booked under `name`, and what passed since the last call under `before`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self(before)
            result = function(*args, **kwargs)
            self(name)
            return result

        return run

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call of this."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (_, before), (name, now) in itertools.pairwise(self.marks):
            seconds[name] += before.elapsed_time(now) / 1e3 if self.device.type == "cuda" else now - before
        self.marks.clear()
        return seconds


class Trainer:
    """main_pretrain.py's model, teacher and optimizer for a case, and steps of its engine with a stopwatch on them."""

    def __init__(self, case: Case, device: torch.device, size: list[str]) -> None:
        argv = [*case.options(), *size, "--device", device.type]
        self.args = args = main_pretrain.resolve_options(main_pretrain.get_args_parser().parse_args(argv), ALONE)
        rng.seed_all(args.seed)
        self.device = device
        self.laps = Laps(device)
        self.precision = Precision(case.precision, device)
        self.model = main_pretrain.build_model(args).to(device)
        self.precision.choose_attention(self.model)
        self.teacher = EMATeacher(self.model) if args.learning_loss else None
        self.optimizer = main_pretrain.build_optimizer(self.model, args)
        self.see = self.teacher and partial(self.teacher.module.predict_loss, return_tokens=True)
        if case.compile == "yes":
            self.see, _ = main_pretrain.compile_regions(self.model, self.see, None)
            self.precision.backward = self.laps.timed("student", self.precision.backward, before="student")
        else:
            self._watch_inside()
        self.precision.step = self.laps.timed("optimizer", self.precision.step)
        if self.teacher:
            self.teacher.update = self.laps.timed("EMA", self.teacher.update)
        self.num_masked = masking.count_masked(self.model.patch_embed.num_patches, args.mask_ratio)
        shape = (case.batch_size, 3, args.input_size, args.input_size)
        self.images = torch.randint(256, shape, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def _watch_inside(self) -> None:
        """Book the student's time by encoder, decoders and losses, forward and backward; not where it is one graph."""
        encode, decode, laps = self.model.forward_encoder, self.model.forward_decoder, self.laps

        def forward_decoder(latent: torch.Tensor, *ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            out = decode(latent, *ids)
            laps("decoders")
            latent.register_hook(lambda _: laps("decoders"))  # its gradient is there: both decoders are through
            first_back = out[0] if out[1] is None else out[1]  # the predictor's backward pass comes before the other
            first_back.register_hook(lambda _: laps("losses"))
            return out

        self.model.forward_encoder = laps.timed("encoder", encode)
        self.model.forward_decoder = forward_decoder
        self.precision.backward = laps.timed("encoder", self.precision.backward, before="losses")

    def steps(self, count: int, batches: Any = None, progress: Progress | None = None) -> dict[str, float]:
        """Run optimizer steps on random images, or on `batches`; seconds of each part, and of a step as `step`."""
        args, laps = self.args, self.laps
        grid = self.model.patch_embed.grid_size
        _, look, draw_mask = main_pretrain.masks_of_epoch(args, 1, grid, self.see, None)
        synchronize(self.device)
        start = time.perf_counter()
        laps("start")
        train_one_epoch(
            self.model,
            self.teacher,
            itertools.repeat((self.images,)) if batches is None else batches,
            self.optimizer,
            self.precision,
            to_model_input=laps.timed("data", ToModelInput(args.mean, args.std, self.device, flip=True), before="data"),
            look=laps.timed("teacher", look) if self.teacher else look,
            draw_mask=laps.timed("mask", draw_mask),
            num_masked=self.num_masked,
            accum_iter=1,
            clip_grad=args.clip_grad,
            adjust_lr=lambda epoch: 1e-5,
            ema_decay=args.ema_decay,
            seed_micro_step=lambda number: rng.seed_all(args.seed, number),
            epoch=0,
            first_step=0,
            steps=count,
            progress=progress or Progress(RunLogger(None, None, 0), 0, 1, 0, count + 1, args.batch_size, count + 1),
            meter=MeanMeter(),
            after_step=lambda step: False,
        )
        synchronize(self.device)
        laps("rest")
        step = (time.perf_counter() - start) / count
        return {"step": step, **{name: seconds / count for name, seconds in laps.take().items()}}

    def state_bytes(self) -> int:
        """Weights, teacher and optimizer."""
        modules = [self.model, *([self.teacher.module] if self.teacher else [])]
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        tensors += [t for state in self.optimizer.state.values() for t in state.values()]
        return sum(t.nbytes for t in tensors)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Product:
    """The product of two square matrices in a precision: what the machine can do, 2 * side ** 3 operations."""

    def __init__(self, precision: str, side: int, device: torch.device) -> None:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.a, self.b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        self.device, self.flops = device, 2 * side**3

    def rate(self, seconds: float = 0.3) -> float:
        """Operations a second, over at least this time."""
        count, start = 0, time.perf_counter()
        while True:
            self.a @ self.b
            count += 1
            if count % 8 == 0 or self.device.type == "cpu":
                synchronize(self.device)
                if (passed := time.perf_counter() - start) > seconds:
                    return count * self.flops / passed


def peak_on_cuda(trainer: Trainer, steps: int) -> int:
    """Most memory that a step takes, without what belongs to other cases."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trainer.steps(steps)
    return torch.cuda.max_memory_allocated() - before + trainer.state_bytes()


# What that process runs: this script, then a look at its own record. What `wait4` tells would begin with our own peak.
_REPORTING_ITS_PEAK = """
import sys
from benchmarks import step
step.main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""


def peak_of_process(case: Case, size: list[str]) -> int:
    """Most memory that a process running nothing but this case has resident, the interpreter and PyTorch included."""
    options = ["--device", "cpu", "--repeats", "1", *size, "--product_side", "64"]
    for name, value in vars(case).items():
        options += [f"--{name}", str(value)]
    command = [sys.executable, "-c", _REPORTING_ITS_PEAK, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024


def part_shares(rounds: list[dict[str, float]]) -> list[str]:
    """A row of the table of parts: per cent of the step. What is inside a compiled student cannot be told apart."""
    inside = ("encoder", "decoders", "losses")
    rounds = [{"student": sum(values.get(name, 0.0) for name in inside), **values} for values in rounds]
    shares = {name: statistics.median(v.get(name, 0.0) / v["step"] for v in rounds) for name in PARTS}
    return [f"{100 * shares[name]:.1f}" if shares[name] else "-" for name in PARTS]


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser(__doc__.split("\n")[0])
    known = list(models_hpm.MODELS)
    parser.add_argument(
        "--model", nargs="+", type=options.one_of(known, "model"), default=["mae_vit_base_patch16"], help="sizes"
    )
    parser.add_argument(
        "--method", nargs="+", choices=["hpm", "mae"], default=["hpm", "mae"], help="with predictor or not"
    )
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16", "fp16"], help="default: main_pretrain's")
    parser.add_argument("--compile", nargs="+", choices=["no", "yes"], default=["no", "yes"], help="eager, compiled")
    parser.add_argument("--batch_size", nargs="+", type=options.COUNT, default=[8], help="images per step")
    parser.add_argument("--input_size", type=options.COUNT, default=224, help="side of the images, in pixels")
    parser.add_argument("--patch_size", type=options.COUNT, help="side of a patch; default: as the model's name says")
    parser.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    parser.add_argument("--repeats", type=options.COUNT, default=7, help="rounds, of which the median is taken")
    parser.add_argument("--steps", type=options.COUNT, default=1, help="steps in a row that count as one measurement")
    parser.add_argument("--product_side", type=options.COUNT, help="of the matrices; default 2048, on CUDA 8192")
    options.add_switch(parser, "parts", False, "also the share of each part of the step")
    options.add_switch(parser, "memory", False, "also peak memory; on the CPU each case runs again, alone")
    return parser


def measure(
    trainers: dict[Case, Trainer], products: dict[str, Product], repeats: int, steps: int
) -> tuple[dict[Case, list[dict[str, float]]], dict[Case, list[float]]]:
    """Seconds of the steps by case, round by round, and the rate of the product that ran just before each."""
    seconds, rates = defaultdict(list), defaultdict(list)
    for case, trainer in trainers.items():
        start = time.perf_counter()
        trainer.steps(2)
        log.info("%s: ready after %.0f s", case, time.perf_counter() - start)
    for number in range(repeats):
        for case, trainer in trainers.items():
            rates[case].append(products[case.precision].rate())
            seconds[case].append(trainer.steps(steps))
        log.info("round %d of %d", number + 1, repeats)
    return seconds, rates


def main(argv: list[str] | None = None) -> None:
    with options.user_mistakes():
        args = get_args_parser().parse_args(argv)
        device = distributed.pick_device(args.device, ALONE)
        setup_logging(True)
        args.precision = args.precision or [default_precision(device)]
        names = ("model", "method", "precision", "compile", "batch_size")
        cases = [Case(*values) for values in itertools.product(*(getattr(args, name) for name in names))]
        size = ["--input_size", str(args.input_size)]
        size += ["--patch_size", str(args.patch_size)] if args.patch_size else []
        trainers = {case: Trainer(case, device, size) for case in cases}
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu_threads()
    log.info("%s, PyTorch %s", name, torch.__version__)
    side = args.product_side or (8192 if device.type == "cuda" else 2048)
    products = {precision: Product(precision, side, device) for precision in args.precision}
    seconds, rates = measure(trainers, products, args.repeats, args.steps)

    rows, steps = [], {case: [values["step"] for values in seconds[case]] for case in cases}
    for case, trainer in trainers.items():
        flops = step_flops(trainer.model, trainer.num_masked, case.batch_size)
        share = ratio([flops / step for step in steps[case]], rates[case])
        median = statistics.median(steps[case])
        row = [str(case), f"{median * 1e3:.1f}", f"{case.batch_size / median:.1f}", f"{flops / 1e12:.3f}"]
        row += [f"{statistics.median(rates[case]) / 1e12:.3f}", with_range(share, scale=100, digits=1)]
        if args.memory:
            peak = peak_on_cuda(trainer, args.steps) if device.type == "cuda" else peak_of_process(case, size)
            row.append(f"{peak / 2**30:.2f}")
        rows.append(row)
    header = ["case", "ms a step", "images/s", "TFLOP a step", "product TFLOP/s", "share of product rate, %"]
    log.info("\n%s", table([*header, *["peak GiB"] * args.memory], rows))
    if args.parts:
        rows = [[str(case), *part_shares(seconds[case])] for case in cases]
        log.info("\nper cent of the step\n%s", table(["case", *PARTS], rows))
    compare(steps)


def compare(steps: dict[Case, list[float]]) -> None:
    """What compiling gains, and HPM : MAE with each at its best."""
    for case in steps:
        eager = replace(case, compile="no")
        if case.compile == "yes" and eager in steps:
            log.info("%s: %s times as fast as eager", case, with_range(ratio(steps[eager], steps[case])))
    best: dict[Case, Case] = {}
    for case in steps:
        group = replace(case, compile="no")
        if group not in best or statistics.median(steps[case]) < statistics.median(steps[best[group]]):
            best[group] = case
    for group, case in best.items():
        mae = best.get(replace(group, method="mae"))
        if group.method == "hpm" and mae is not None:
            log.info("%s : %s = %s", case, mae, with_range(ratio(steps[case], steps[mae])))


if __name__ == "__main__":
    main()
