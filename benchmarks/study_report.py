"""Tables and plots of benchmarks/study.py's results, each metric with its spread over the seeds.

    python -m benchmarks.study_report docs/study/study.jsonl --plots docs/study

The tables go to standard output, in Markdown. Runs of different data, budgets, machines or PyTorch versions share no
table. ± is the standard deviation over seeds (n - 1). Compute is that of pre-training by FLOPs, in epochs of MAE: it
does not depend on what else ran, as minutes do. Plots need matplotlib.
"""

import functools
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import main_pretrain
from benchmarks.ranking import teacher_of
from benchmarks.report import table
from benchmarks.study import BUDGET, MACHINE, SEGMENT, VARIANTS, read_results
from benchmarks.trainer import step_flops
from util.run import distributed, options
from util.run.logger import setup_logging

Row = dict[str, Any]

# Column title: the metric of a run; of RANKING, None if it has none.
METRICS: dict[str, Callable[[Row], float]] = {
    "k-NN (20)": lambda row: row["knn"]["20"],
    "linear": lambda row: row["linear"],
    "fine-tuning": lambda row: row["finetune"],
}
SEGMENTATION: dict[str, Callable[[Row], float | None]] = {
    "mIoU, linear": lambda row: row.get("segment_linear"),
    "mIoU, 10-NN": lambda row: row.get("segment_knn"),
}
RANKING: dict[str, Callable[[Row], float | None]] = {
    "loss_rec, last epoch": lambda row: row["loss_rec"][-1],
    "rank_acc, first epoch": lambda row: row["rank_acc"][0] if row["rank_acc"] else None,
    "rank_acc, last epoch": lambda row: row["rank_acc"][-1] if row["rank_acc"] else None,
    "Spearman, student, masked image": lambda row: row["spearman"].get("masked"),
    "Spearman, student, whole image": lambda row: row["spearman"].get("student"),
    "Spearman, teacher, whole image": lambda row: row["spearman"].get("teacher"),
    "the same at mask tokens": lambda row: row["spearman"].get("mask_tokens"),
    "Spearman, teacher, hidden patches": lambda row: row["spearman"].get("hidden"),
}


# Below that table, whose columns measure different things.
SPEARMAN = (
    "Spearman correlations are with the true error of the student, a mean over random masks. Masked image: predictions "
    "averaged over the same masks. Whole image: one prediction, over all patches. Hidden patches: the teacher's scores "
    "in a single draw, over the patches it scores then; the mean over draws."
)


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser((__doc__ or "").split("\n")[0])
    parser.add_argument("results", nargs="?", default="study_runs/study.jsonl", help="what benchmarks.study wrote")
    parser.add_argument("--plots", help="folder for the plots (default: tables only)")
    return parser


def columns_of(budget: Row) -> dict[str, Callable[[Row], float | None]]:
    """The metrics of runs with this budget, by column title."""
    return METRICS | SEGMENTATION if budget["segment_data"] else dict(METRICS)


def by_budget(rows: Sequence[Row]) -> list[tuple[Row, dict[str, list[Row]]]]:
    """The runs of each data set, budget and machine, by variant in the order of the grid. `_long` variants are named
    with how much longer they are.

    Raises:
        ValueError: two lines of one run.
    """
    groups: dict[str, tuple[Row, dict[str, list[Row]]]] = {}
    for row in rows:
        budget = {name: row[name] for name in [*BUDGET, *SEGMENT, *MACHINE]}
        name = row["variant"] + (f" x{row['long_factor']:g}" if row["variant"].endswith("_long") else "")
        runs = groups.setdefault(str(budget), (budget, defaultdict(list)))[1][name]
        if row["seed"] in [other["seed"] for other in runs]:
            raise ValueError(f"two lines of {name}, seed {row['seed']}, on {row['data']}: remove one")
        runs.append(row)
    order = list(VARIANTS)
    return [
        (budget, dict(sorted(found.items(), key=lambda v: order.index(v[0].split()[0]))))
        for budget, found in groups.values()
    ]


def spread(values: Sequence[float | None], digits: int = 2) -> str:
    """45.13 ± 0.21; for a single run, the value and that it has no spread."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    if len(known) == 1:
        return f"{known[0]:.{digits}f} (one run)"
    return f"{statistics.mean(known):.{digits}f} ± {statistics.stdev(known):.{digits}f}"


def differences(runs: dict[str, list[Row]], a: str, b: str, metric: Callable[[Row], float | None]) -> str:
    """a - b, seed by seed: mean and standard deviation of the differences, and how many are above zero."""
    values = [{row["seed"]: value for row in runs[name] if (value := metric(row)) is not None} for name in (a, b)]
    found = [values[0][seed] - values[1][seed] for seed in values[0].keys() & values[1].keys()]
    if len(found) < 2:
        return f"{found[0]:+.2f} (one run)" if found else "-"
    return (
        f"{statistics.mean(found):+.2f} ± {statistics.stdev(found):.2f} ({sum(d > 0 for d in found)} of {len(found)})"
    )


@functools.cache
def image_flops(variant: str, model: str, input_size: int, patch_size: int) -> int:
    """FLOPs of a variant's training step, per image."""
    size = ["--model", model, "--input_size", str(input_size), "--patch_size", str(patch_size), "--device", "cpu"]
    given = main_pretrain.get_args_parser().parse_args([*size, *VARIANTS[variant]])
    with teacher_of(variant):
        return step_flops(main_pretrain.resolve_options(given, distributed.ALONE), 1)


def compute_of(row: Row) -> float:
    """Compute of a run's pre-training, in epochs of MAE on the same model and images."""
    size = (row["model"], row["input_size"], row["patch_size"])
    return len(row["loss_rec"]) * image_flops(row["variant"], *size) / image_flops("mae_norm", *size)


def relative_time(a: Sequence[Row], b: Sequence[Row]) -> str:
    """Median pre-training time of runs `a`, as a multiple of that of runs `b`."""
    first, second = (statistics.median(row["seconds"] for row in found) for found in (a, b))
    return f"{first / second:.2f}"


def pairs(runs: dict[str, list[Row]]) -> list[tuple[str, str]]:
    """Pairs of variants to compare: what each part of the method adds, for either target."""
    wanted = [("mae_norm", "mae_pixel"), ("hpm_norm", "mae_pixel")]
    for target in ("pixel", "norm"):
        mae, predictor, hpm = (f"{name}_{target}" for name in ("mae", "predictor", "hpm"))
        long = [name for name in runs if name.startswith(f"{mae}_long")]
        wanted += [(predictor, mae), (hpm, predictor), *((hpm, other) for other in (mae, *long))]
        wanted += [(f"{hpm}_mask_tokens", predictor)]
        wanted += [(name, hpm) for name in VARIANTS if name.startswith(f"{hpm}_")]
        for cheap in ("sparse_1", "loss", "predictor_1"):
            wanted += [(f"{cheap}_{target}", other) for other in (hpm, predictor, mae, *long)]
        wanted += [(f"sparse_1_{target}", f"predictor_1_{target}")]  # what mining adds to that predictor
    return [(a, b) for a, b in wanted if a in runs and b in runs]


def limits(rows: Sequence[Row]) -> str:
    """The standard error of an accuracy, and the time spent waiting for data."""
    waits = [100 * row["data_wait"] for row in rows]
    text = f"Waiting for data: {min(waits):.1f} to {max(waits):.1f} % of a run's pre-training."
    images = rows[0]["val_images"]
    if images:  # a line does not record the size of a whole data set
        shares = [metric(row) / 100 for row in rows for metric in METRICS.values()]
        errors = [100 * math.sqrt(share * (1 - share) / images) for share in shares]
        text += f" Standard error of an accuracy on {images} images: {min(errors):.2f} to {max(errors):.2f}."
    return text


def tables(budget: Row, runs: dict[str, list[Row]]) -> str:
    """Tables and comparisons of one data set and budget."""
    some = next(iter(runs.values()))[0]
    text = [
        f"### {budget['data']}: {budget['model']}, {budget['input_size']} pixels in patches of {budget['patch_size']}, "
        f"{budget['epochs']} epochs",
        f"{some['device']}, PyTorch {some['torch']}, {budget['precision']}.",
    ]
    columns = columns_of(budget)
    if budget["segment_data"]:
        lr = budget["segment_lr"]
        text.append(
            f"mIoU: {budget['segment_data']}, {budget['segment_size']} pixels, a frozen linear head trained for "
            f"{budget['segment_steps']} steps (lr {lr:g}), and the 10 nearest patches; scored at "
            "original size."
        )
    rows = []
    for name, found in runs.items():
        minutes = [row["seconds"] / 60 for row in found]
        metrics = [spread([metric(row) for row in found]) for metric in columns.values()]
        time = [spread(minutes, 1), f"{min(minutes):.1f}"]
        rows.append(
            [name, str(len(found)), *metrics, *time, str(len(found[0]["loss_rec"])), f"{compute_of(found[0]):.1f}"]
        )
    header = ["variant", "seeds", *columns, "minutes of pre-training", "fastest", "epochs", "compute"]
    text.append(table(header, rows))
    text.append(limits([row for found in runs.values() for row in found]))
    compared = [
        [
            f"{a} - {b}",
            *(differences(runs, a, b, metric) for metric in columns.values()),
            relative_time(runs[a], runs[b]),
        ]
        for a, b in pairs(runs)
    ]
    if compared:
        text.append(table(["difference, seed by seed", *columns, "time of the first : second"], compared))
    ranked = {name: found for name, found in runs.items() if any(row["spearman"] for row in found)}
    if ranked:
        every = [row for found in ranked.values() for row in found]
        shown = {title: of for title, of in RANKING.items() if any(of(row) is not None for row in every)}
        rows = [
            [name, *(spread([metric(row) for row in found], 3) for metric in shown.values())]
            for name, found in ranked.items()
        ]
        text.append(table(["variant", *shown], rows))
        text.append(SPEARMAN)
    return "\n\n".join(text)


def plot(budget: Row, runs: dict[str, list[Row]], path: Path) -> None:
    """Each metric of every run by variant, and against the compute of pre-training; rank accuracy over the epochs.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install matplotlib") from error
    columns = columns_of(budget)
    figure = Figure(figsize=(3.6 * (len(columns) + 1), 7.5), layout="constrained")
    axes = figure.subplots(2, len(columns) + 1)
    for place, (name, found) in enumerate(runs.items()):
        color = f"C{place % 10}"
        compute = compute_of(found[0])
        for (by_variant, by_compute), of in zip(axes.T, columns.values(), strict=False):
            values = [value for row in found if (value := of(row)) is not None]
            if not values:
                continue
            by_variant.plot([place] * len(values), values, "o", color=color, alpha=0.7)
            by_variant.plot([place - 0.3, place + 0.3], [statistics.mean(values)] * 2, color=color)
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            by_compute.errorbar(compute, statistics.mean(values), deviation, fmt="o", color=color)
        axes[0][-1].plot([], [], "o", color=color, label=name)
        curves = [row["rank_acc"] for row in found if row["rank_acc"]]
        if curves:
            means = [statistics.mean(values) for values in zip(*curves, strict=True)]
            axes[1][-1].plot(range(1, len(means) + 1), means, color=color)
    for (by_variant, by_compute), title in zip(axes.T, columns, strict=False):
        by_variant.set_title(title + ("" if title in SEGMENTATION else ", top-1 in percent"), fontsize=10)
        by_variant.set_xticks(range(len(runs)), list(runs), rotation=40, ha="right", fontsize=8)
        by_compute.set_xlabel("compute of pre-training, in epochs of MAE\nbar: one standard deviation", fontsize=9)
        for axis in (by_variant, by_compute):
            axis.grid(alpha=0.25)
    axes[0][-1].legend(loc="center", fontsize=9)
    axes[0][-1].axis("off")
    axes[1][-1].set_title("rank accuracy of the predictor\n(0.5 is chance)", fontsize=10)
    axes[1][-1].set_xlabel("epochs", fontsize=9)
    axes[1][-1].grid(alpha=0.25)
    figure.suptitle(f"{budget['data']}, {budget['epochs']} epochs", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main(argv: list[str] | None = None) -> None:
    setup_logging(True)
    with options.user_mistakes():
        args = get_args_parser().parse_args(argv)
        groups = by_budget(read_results(args.results))
        if not groups:
            raise ValueError(f"{args.results} holds no results: python -m benchmarks.study writes them")
        names: list[str] = []
        for number, (budget, runs) in enumerate(groups):
            sys.stdout.write(("\n\n" if number else "") + tables(budget, runs) + "\n")
            names.append(f"{Path(budget['data']).stem}-{budget['epochs']}-{budget['precision']}")
            if args.plots:
                again = names.count(names[-1])
                plot(budget, runs, Path(args.plots, names[-1] + (f"-{again}" if again > 1 else "") + ".png"))


if __name__ == "__main__":
    main()
