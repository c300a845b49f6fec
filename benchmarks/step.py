"""Time of a pre-training step of HPM, its cheaper variants and MAE, and how close it comes to what the machine can do.

    python -m benchmarks.step --precision fp32 --compile no yes --batch_size 8
    python -m benchmarks.step --model mae_vit_base_patch16 mae_vit_large_patch16 --precision bf16 --compile yes \\
        --batch_size 256 --steps 10 --parts

Steps are those of main_pretrain.py, through engine_pretrain.py, on random images. All cases run in one process,
interleaved; a product of two large matrices runs before each. Times are medians over these rounds, and ratios are taken
within a round, so that other load on the machine cancels out.
"""

import itertools
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace

import torch

import main_pretrain
import models_hpm
from benchmarks.report import ratio, table, with_range
from benchmarks.trainer import METHODS, PARTS, Case, Trainer, step_flops, synchronize
from util.run import distributed, options
from util.run.amp import Amp
from util.run.logger import log


class Product:
    """The product of two square matrices, 2 * side ** 3 operations: what the machine can do in a precision."""

    def __init__(self, precision: str, side: int, device: torch.device) -> None:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.a, self.b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        self.device, self.flops = device, 2 * side**3

    def rate(self, seconds: float = 0.3) -> float:
        """Operations per second, over at least this time."""
        count, start = 0, time.perf_counter()
        while True:
            self.a @ self.b
            count += 1
            if count % 8 == 0 or self.device.type == "cpu":
                synchronize(self.device)
                if (passed := time.perf_counter() - start) > seconds:
                    return count * self.flops / passed


def peak_on_cuda(trainer: Trainer, steps: int) -> int:
    """Peak memory of a step, without what other cases hold."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trainer.steps(steps)
    return torch.cuda.max_memory_allocated() - before + trainer.state_bytes()


# That process runs this script and reads its own peak. The one that `wait4` reports would start from our own.
_REPORT_PEAK = """
import sys
from benchmarks import step
step.main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""


def peak_of_process(case: Case, size: list[str]) -> int:
    """Peak resident memory of a process that runs this case only, interpreter and PyTorch included."""
    words = ["--device", "cpu", "--repeats", "1", *size, "--product_side", "64"]
    for name, value in vars(case).items():
        words += [f"--{name}", str(value)]
    command = [sys.executable, "-c", _REPORT_PEAK, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024


def part_shares(rounds: list[dict[str, float]]) -> list[str]:
    """A row of the table of parts: percent of the step."""
    shares = {part: statistics.median(values[part] / values["step"] for values in rounds) for part in PARTS}
    return [f"{100 * shares[part]:.1f}" if shares[part] else "-" for part in PARTS]


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser((__doc__ or "").split("\n")[0])
    known = list(models_hpm.MODELS)
    parser.add_argument(
        "--model", nargs="+", choices=known, metavar="MODEL", default=["mae_vit_base_patch16"], help="model sizes"
    )
    parser.add_argument(
        "--method", nargs="+", choices=list(METHODS), default=["hpm", "mae"], help="methods, see benchmarks/trainer.py"
    )
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16", "fp16"], help="default: main_pretrain.py's")
    parser.add_argument("--compile", nargs="+", choices=["no", "yes"], default=["no", "yes"], help="eager, compiled")
    parser.add_argument("--batch_size", nargs="+", type=options.COUNT, default=[8], help="images per step")
    parser.add_argument("--input_size", type=options.COUNT, default=224, help="image size in pixels")
    parser.add_argument("--patch_size", type=options.COUNT, help="patch size in pixels (default: the model's)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where available)")
    parser.add_argument("--repeats", type=options.COUNT, default=7, help="rounds, of which the median is taken")
    parser.add_argument("--steps", type=options.COUNT, default=1, help="consecutive steps per measurement")
    parser.add_argument("--product_side", type=options.COUNT, help="size of the matrices (default: 2048, 8192 on CUDA)")
    parser.add_argument(
        "--flops",
        action=options.SWITCH,
        default=False,
        help="print multiply-accumulates per image, and measure nothing",
    )
    parser.add_argument(
        "--parts", action=options.SWITCH, default=False, help="also print the share of each part of the step"
    )
    parser.add_argument(
        "--memory",
        action=options.SWITCH,
        default=False,
        help="also print peak memory; on the CPU each case runs again in its own process",
    )
    return parser


def measure(
    trainers: dict[Case, Trainer], products: dict[str, Product], repeats: int, steps: int
) -> tuple[dict[Case, list[dict[str, float]]], dict[Case, list[float]]]:
    """Seconds of the steps by case and round, and the throughput of the product that ran just before each."""
    seconds, rates = defaultdict(list), defaultdict(list)
    for case, trainer in trainers.items():
        start = time.perf_counter()
        trainer.steps(2)
        log.info("%s: ready after %.0f s", case, time.perf_counter() - start)
    for number in range(repeats):
        for case, trainer in trainers.items():
            rates[case].append(products[case.precision].rate())
            seconds[case].append(trainer.steps(steps))
        found = ", ".join(f"{case.method} {times[-1]['step'] * 1e3:.0f}" for case, times in seconds.items())
        log.info("round %d of %d, ms per step: %s", number + 1, repeats, found)
    return seconds, rates


def main(argv: list[str] | None = None) -> None:
    with options.user_mistakes():
        args = get_args_parser().parse_args(argv)
        device = distributed.setup(distributed.ALONE, args.device, None, timeout_minutes=1)[0]
        args.precision = args.precision or [Amp(None, device).name]
        names = ("model", "method", "precision", "compile", "batch_size")
        cases = [Case(*values) for values in itertools.product(*(getattr(args, name) for name in names))]
        size = ["--input_size", str(args.input_size)]
        size += ["--patch_size", str(args.patch_size)] if args.patch_size else []
        if args.flops:
            log.info("\n%s", operations(args.model, args.method, size))
            return
        if "yes" in args.compile:  # Dynamo counts the graphs of all models together, and fails at its limit of 8
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, len(cases))
        trainers = {case: Trainer(case, device, size) for case in cases}
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    log.info("%s, PyTorch %s", name, torch.__version__)
    side = args.product_side or (8192 if device.type == "cuda" else 2048)
    products = {precision: Product(precision, side, device) for precision in args.precision}
    seconds, rates = measure(trainers, products, args.repeats, args.steps)

    rows, steps = [], {case: [values["step"] for values in seconds[case]] for case in cases}
    flops = {case: step_flops(trainer.args, case.batch_size) for case, trainer in trainers.items()}
    compared = [base for base in ("mae", "hpm") if base in args.method and len(args.method) > 1]
    for case, trainer in trainers.items():
        share = ratio([flops[case] / step for step in steps[case]], rates[case])
        median = statistics.median(steps[case])
        row = [str(case), f"{median * 1e3:.1f}", f"{case.batch_size / median:.1f}", f"{flops[case] / 1e12:.3f}"]
        for base in compared:
            other = replace(case, method=base)
            row += [with_range(ratio(steps[case], steps[other])), f"{flops[case] / flops[other]:.2f}"]
        row += [f"{statistics.median(rates[case]) / 1e12:.3f}", with_range(share, scale=100, digits=1)]
        if args.memory:
            peak = peak_on_cuda(trainer, args.steps) if device.type == "cuda" else peak_of_process(case, size)
            row.append(f"{peak / 2**30:.2f}")
        rows.append(row)
    header = ["case", "ms per step", "images/s", "TFLOP per step"]
    for base in compared:
        header += [f"time : {base.upper()}", f"FLOPs : {base.upper()}"]
    header += ["product TFLOP/s", "share of product, %"]
    log.info("\n%s", table([*header, "peak GiB"] if args.memory else header, rows))
    if args.parts:
        rows = [[str(case), *part_shares(seconds[case])] for case in cases]
        log.info("\npercent of the step\n%s", table(["case", *PARTS], rows))
    compare(steps)


def operations(models: list[str], methods: list[str], size: list[str]) -> str:
    """A table of the multiply-accumulates of a step per image, and of their ratio to MAE's."""
    rows = []
    for model in models:
        flops = {}
        for method in dict.fromkeys(["mae", *methods]):
            words = [*Case(model, method, "fp32", "no", 1).options(), *size, "--device", "cpu"]
            given = main_pretrain.resolve_options(main_pretrain.get_args_parser().parse_args(words), distributed.ALONE)
            flops[method] = step_flops(given, 1)
        rows += [[model, name, f"{flops[name] / 2e9:.1f} G", f"{flops[name] / flops['mae']:.2f}"] for name in methods]
    return table(["model", "method", "multiply-accumulates", ": MAE"], rows)


def compare(steps: dict[Case, list[float]]) -> None:
    """Speed-up by compilation, and HPM : MAE with each at its fastest."""
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
