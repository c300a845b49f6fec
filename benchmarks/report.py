"""What the benchmarks share: medians of interleaved repeats, and tables in Markdown."""

import statistics
from collections.abc import Iterable, Sequence


def ratio(numerators: Iterable[float], denominators: Iterable[float]) -> tuple[float, float, float]:
    """Median, lowest and highest ratio of measurements that were taken pairwise, one repeat after the other."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def with_range(values: tuple[float, float, float], scale: float = 1.0, digits: int = 2) -> str:
    """0.87 [0.85..0.89]"""
    median, low, high = (f"{value * scale:.{digits}f}" for value in values)
    return f"{median} [{low}..{high}]"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its columns as wide as they need to be; the first is words, the others are numbers."""
    rows = [header, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(cells))
        return f"| {' | '.join([first, *others])} |"

    rule = "|" + "|".join("-" * (width + 1) + ("-:"[i > 0]) for i, width in enumerate(widths)) + "|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])
