"""Plots of runs: the values of log.jsonl over the epochs. Requires matplotlib, an optional dependency."""

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Title: name in log.jsonl.
CURVES = {
    "reconstruction loss": "train_loss_rec",
    "predictor loss": "train_loss_learn",
    "rank accuracy (0.5 is chance)": "train_rank_acc",
    "learning rate": "train_lr",
    "EMA decay": "ema_decay",
    "share of masked patches selected by predicted loss": "hard_ratio",
}
STROKES = ("-", "--", ":", "-.")


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl, given it or its folder. An incomplete last line is ignored.

    Raises:
        ValueError: there is no log, it is damaged, or it contains no completed epoch.
    """
    file = Path(path)
    file = file / "log.jsonl" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"{path} contains no log.jsonl: give run folders")
    lines = file.read_text(errors="replace").splitlines()
    records = [_parse(line) for line in lines]
    if records and records[-1] is None:  # the run is still writing, or was killed while writing
        records.pop()
    if None in records:
        number = records.index(None) + 1
        raise ValueError(f"{file}, line {number} is not a log line: {lines[number - 1][:60]!r}")
    if not records:
        raise ValueError(f"{file} contains no completed epoch")
    return records


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("epoch"), int) else None


def short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of each path, as many as distinguish the paths."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = [os.sep.join(p[-length:]) for p in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def plot(paths: Sequence[str], kind: str) -> bytes:
    """The curves of one or several runs in one picture, a file of `kind` (png, svg, pdf).

    Raises:
        ValueError: matplotlib is missing, or there is nothing to plot.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install matplotlib") from error
    runs = dict(zip(short_names(paths), map(read_log, paths), strict=True))
    curves = {t: name for t, name in CURVES.items() if any(name in line for log in runs.values() for line in log)}
    if not curves:
        raise ValueError(f"{', '.join(runs)}: nothing to plot, these are not runs of main_pretrain")
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.1 * rows + 0.25 * len(runs) + 0.3), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (title, name) in zip(axes, curves.items(), strict=False):
        for number, log in enumerate(runs.values()):
            values = {line["epoch"] + 1: line[name] for line in log if name in line}
            marker = "o" if len(values) < 16 else ""
            style = STROKES[number // 10 % len(STROKES)]  # ten colours, then again with another stroke
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
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=130)
    return buffer.getvalue()
