"""Per-class results of an evaluation: accuracies and the confusion matrix, as CSV files.

Shapes: K classes.
"""

import csv
import io
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from util.run.folder import write_text

log = logging.getLogger("hpm")

PER_CLASS, CONFUSION = "eval_classes.csv", "eval_confusion.csv"


def output_names(record: dict[str, Any] | None, num_classes: int) -> list[str]:
    """Names of the outputs of a classifier (`class_record`), the number of the output where there is none."""
    names = (record or {}).get("names", [])
    return [names[k] if k < len(names) and names[k] else str(k) for k in range(num_classes)]


def report(folder: Path, counts: Tensor, names: Sequence[str], worst: int = 5) -> None:
    """Write both files and log the classes of lowest accuracy. On rank 0 only.

    Args:
        counts: (K, K) images by label and prediction, of all ranks.
    """
    counts = counts.cpu()
    rows: list[list[Any]] = []
    accuracies: dict[int, float] = {}
    for k, name in enumerate(names):
        images, correct = int(counts[k].sum()), int(counts[k, k])
        others = counts[k].clone()
        others[k] = 0
        confused = names[int(others.argmax())] if others.any() else ""
        if images:
            accuracies[k] = 100 * correct / images
        accuracy = f"{accuracies[k]:.4f}" if images else ""
        rows.append([k, name, images, correct, accuracy, confused, int(others.max()) if confused else ""])
    header = ["class", "name", "images", "correct", "acc1", "most_confused_with", "times"]
    write_csv(folder / PER_CLASS, [header, *rows])
    matrix = ([name, *row] for name, row in zip(names, counts.tolist(), strict=True))
    write_csv(folder / CONFUSION, [["label \\ prediction", *names], *matrix])
    mean = sum(accuracies.values()) / len(accuracies)
    log.info("classes   %d with images, mean accuracy %.2f %%; the worst:", len(accuracies), mean)
    for k in sorted(accuracies, key=lambda k: (accuracies[k], k))[:worst]:
        _, name, images, _, _, confused, times = rows[k]
        mistaken = f", {times} taken for {confused}" if confused else ""
        log.info("  %6.2f %%  %s (%d images%s)", accuracies[k], name, images, mistaken)
    log.info("wrote     %s and %s in %s", PER_CLASS, CONFUSION, folder)


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file in UTF-8, atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())
