"""Comparison of runs: the options that differ, and the values of log.jsonl over the epochs."""

import os
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from util.run.checkpoint import DERIVED
from util.run.folder import read_config, read_log

# Title: names in log.jsonl; a run shows the first one it has. A linear probe has one accuracy per head: the best.
CURVES = {
    "training loss (pre-training: reconstruction)": ("train_loss_rec", "train_loss"),
    "top-1 accuracy in % (pre-training: k-NN)": ("test_acc1", "knn_acc1"),
    "predictor loss": ("train_loss_learn",),
    "rank accuracy (0.5 is chance)": ("train_rank_acc",),
    "learning rate": ("train_lr",),
    "EMA decay": ("ema_decay",),
    "fraction of masked patches chosen by score": ("hard_ratio",),
}
PLACES = ("output_dir", "experiment", "log_dir")  # options that differ between any two runs


def name_runs(folders: Sequence[str]) -> dict[str, str]:
    """Run folders by their path relative to the parent they have in common."""
    parent = os.path.commonpath([os.path.dirname(os.path.abspath(folder)) for folder in folders])
    return {os.path.relpath(folder, parent): folder for folder in folders}


def compare_options(folders: dict[str, str]) -> str:
    """A table of the options in config.json that differ between the runs; empty if none do."""
    options = {run: read_config(folder).get("options", {}) for run, folder in folders.items()}
    rows = [["option", *folders]]
    for name in sorted({name for given in options.values() for name in given} - {*PLACES, *DERIVED}):
        values = [str(given.get(name, "-")) for given in options.values()]
        if len(set(values)) > 1:
            rows.append([name, *values])
    return _table(rows) if len(rows) > 1 else ""


def compare_accuracy(folders: dict[str, str]) -> str:
    """A table of the last and the best top-1 accuracy in percent of each run, and after how many epochs; "" if no run
    has one."""
    (names,) = (names for title, names in CURVES.items() if title.startswith("top-1"))
    rows = [["run", "last", "epochs", "best", "epochs"]]
    for run, folder in folders.items():
        values = points(read_log(folder), names)
        if values:
            last, best = max(values), max(values, key=lambda epoch: values[epoch])
            rows.append([run, f"{values[last]:.2f}", str(last), f"{values[best]:.2f}", str(best)])
        else:
            rows.append([run, *"----"])
    return _table(rows) if any(row[1] != "-" for row in rows[1:]) else ""


def _table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def plot(folders: dict[str, str]) -> Figure:
    """The curves of one or several runs in one figure.

    Raises:
        ValueError: a run has no completed epoch, or there is nothing to plot.
    """
    runs = {run: read_log(folder) for run, folder in folders.items()}
    for run, log in runs.items():
        if not log:
            raise ValueError(f"{run} contains no log.jsonl with a completed epoch: give run folders")
    curves = {}
    for title, names in CURVES.items():
        of_runs = [points(log, names) for log in runs.values()]
        if any(of_runs):
            curves[title] = of_runs
    if not curves:
        raise ValueError(f"{', '.join(runs)}: nothing to plot, these are not training runs")
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.1 * rows + 0.25 * len(runs) + 0.3), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (title, of_runs) in zip(axes, curves.items(), strict=False):
        for number, curve in enumerate(of_runs):
            style = "-" if number < 10 else "--"  # there are ten colours
            marker = "o" if len(curve) < 16 else ""
            axis.plot(list(curve), list(curve.values()), style, color=f"C{number % 10}", marker=marker, markersize=3.5)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epochs", fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 4))
        axis.margins(x=0.03, y=0.08)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    for axis in axes[len(curves) :]:
        axis.set_axis_off()
    figure.legend(axes[0].lines, list(runs), loc="outside lower center", fontsize=9, frameon=False)
    return figure


def points(log: list[dict[str, Any]], names: Sequence[str]) -> dict[int, float]:
    """Completed epochs -> value of the first of `names` that the log line has."""
    values = {}
    for line in log:
        for name in reversed(names):
            heads = [value for key, value in line.items() if key.split(" ")[0] == name and value is not None]
            if heads:
                values[line["epoch"] + 1] = max(heads)
    return values
