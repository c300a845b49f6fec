"""Plots of runs: the values of log.jsonl over the epochs."""

import os
from collections.abc import Sequence

from matplotlib.figure import Figure

from util.run.folder import read_log

# Title: name in log.jsonl.
CURVES = {
    "reconstruction loss": "train_loss_rec",
    "predictor loss": "train_loss_learn",
    "rank accuracy (0.5 is chance)": "train_rank_acc",
    "learning rate": "train_lr",
    "EMA decay": "ema_decay",
    "fraction of masked patches chosen by predicted loss": "hard_ratio",
}


def read_runs(folders: Sequence[str]) -> dict[str, list[dict]]:
    """The log lines of runs, by folder relative to the parent they have in common.

    Raises:
        ValueError: a run has no completed epoch.
    """
    parent = os.path.commonpath([os.path.dirname(os.path.abspath(folder)) for folder in folders])
    runs = {os.path.relpath(folder, parent): read_log(folder) for folder in folders}
    for name, lines in runs.items():
        if not lines:
            raise ValueError(f"{name} contains no log.jsonl with a completed epoch: give run folders")
    return runs


def plot(runs: dict[str, list[dict]]) -> Figure:
    """The curves of one or several runs in one figure.

    Raises:
        ValueError: there is nothing to plot.
    """
    curves = {t: name for t, name in CURVES.items() if any(name in line for lines in runs.values() for line in lines)}
    if not curves:
        raise ValueError(f"{', '.join(runs)}: nothing to plot, these are not runs of main_pretrain")
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.1 * rows + 0.25 * len(runs) + 0.3), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (title, name) in zip(axes, curves.items(), strict=False):
        for number, lines in enumerate(runs.values()):
            values = {line["epoch"] + 1: line[name] for line in lines if name in line}
            style = "-" if number < 10 else "--"  # there are ten colours
            marker = "o" if len(values) < 16 else ""
            axis.plot(
                list(values), list(values.values()), style, color=f"C{number % 10}", marker=marker, markersize=3.5
            )
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
