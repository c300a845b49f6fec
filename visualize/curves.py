"""Plots of runs: what their logs say, over the epochs. Needs matplotlib, an extra."""

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Title and name in log.jsonl.
CURVES = {
    "reconstruction loss": "train_loss_rec",
    "predictor loss": "train_loss_learn",
    "rank accuracy (0.5 is chance)": "train_rank_acc",
    "learning rate": "train_lr",
    "EMA decay": "ema_decay",
    "share of masked patches chosen by hardness": "hard_ratio",
}


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl, given its folder or the file; half a line at its end is left out.

    Raises:
        ValueError: there is no log, it is damaged, or it has no epoch yet.
    """
    file = Path(path)
    file = file / "log.jsonl" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"{path} holds no log.jsonl: give folders of runs")
    lines = file.read_text(errors="replace").splitlines()
    records = [_parse(line) for line in lines]
    if records and records[-1] is None:  # a run that is going on, or was killed as it wrote
        records.pop()
    if None in records:
        number = records.index(None) + 1
        raise ValueError(f"{file}, line {number} is not a line of a log: {lines[number - 1][:60]!r}")
    if not records:
        raise ValueError(f"{file} has no epoch yet")
    return records


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("epoch"), int) else None


def short_names(paths: Sequence[str]) -> list[str]:
    """As many of the last parts of each path as tell them apart."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    depth = max(map(len, parts))
    for length in range(1, depth):
        names = [os.sep.join(p[-length:]) for p in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(path) for path in paths]


def plot(runs: dict[str, list[dict[str, Any]]], kind: str) -> bytes:
    """The curves of one or several runs in one picture, a file of `kind` (png, svg, pdf).

    Args:
        runs: lines of the log, by what the run is called in the picture.

    Raises:
        ValueError: matplotlib is missing, or there is nothing to plot.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install matplotlib") from error
    curves = {t: name for t, name in CURVES.items() if any(name in line for log in runs.values() for line in log)}
    if not curves:
        raise ValueError(f"{', '.join(runs)}: nothing to plot, these are no runs of main_pretrain")
    strokes = ("-", "--", ":", "-.")  # ten colours, then again in another stroke
    styles = [{"color": f"C{n % 10}", "linestyle": strokes[n // 10 % 4], "linewidth": 1.6} for n in range(len(runs))]
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.1 * rows + 0.25 * len(runs) + 0.3), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (title, name) in zip(axes, curves.items(), strict=False):
        for style, lines in zip(styles, runs.values(), strict=True):
            points = [(line["epoch"] + 1, line[name]) for line in lines if name in line]
            if points:
                mark = {"marker": "o", "markersize": 3.5} if len(points) < 16 else {}
                axis.plot(*zip(*points, strict=True), **style, **mark)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epochs", fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 4))
        axis.margins(x=0.03, y=0.08)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    for axis in axes[len(curves) :]:
        axis.set_axis_off()
    handles = [Line2D([], [], **style) for style in styles]
    figure.legend(handles, list(runs), loc="outside lower center", fontsize=9, frameon=False, ncols=1)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=130)
    return buffer.getvalue()
