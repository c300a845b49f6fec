"""The text that goes with an export: what the model is, how it was trained, how to load it, what is not in it."""

import json
from pathlib import Path
from typing import Any

# Columns of log.jsonl that are not about the model.
_NOT_FIGURES = ("epoch", "epoch_seconds", "images_per_s", "data_wait")


def read_log(checkpoint: Path, epochs: int) -> dict[str, Any]:
    """The line of the log.jsonl beside a checkpoint that was written when it was; {} if there is none.

    Args:
        epochs: how many the checkpoint has behind it.
    """
    path = checkpoint.parent / "log.jsonl"
    found: dict[str, Any] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # half a line, of a run that was killed as it wrote
        if record.get("epoch", epochs) < epochs:
            found = record
    return {name: value for name, value in found.items() if name not in _NOT_FIGURES}


def read_environment(checkpoint: Path) -> dict[str, Any]:
    """Versions and commit that the config.json beside a checkpoint says it was trained with; {} if there is none."""
    path = checkpoint.parent / "config.json"
    try:
        found = json.loads(path.read_text()).get("environment", {})
    except (OSError, ValueError, AttributeError):
        return {}
    return {name: value for name, value in found.items() if value is not None and name not in ("command", "device")}


def without_folders(options: dict[str, Any]) -> dict[str, Any]:
    """Options that have a value, paths cut to their last part: where things lay is of no use to others."""
    return {
        name: Path(value).name if isinstance(value, str) and "/" in value else value
        for name, value in options.items()
        if value not in (None, "")
    }


def _table(rows: dict[str, Any], head: tuple[str, str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {_cell(value)} |" for name, value in rows.items())])


def _cell(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def model_card(
    name: str,
    *,
    library: str,
    tags: list[str],
    summary: str,
    usage: str,
    notes: list[str],
    training: dict[str, Any],
    figures: dict[str, Any],
    left_out: str,
    check: str,
    versions: dict[str, dict[str, Any]],
    options: dict[str, Any],
) -> str:
    """The card, in Markdown.

    Args:
        library, tags: for the header that model hubs read.
        usage: lines of Python that load it.
        training: what it was trained on and how, in a few words each; {} if the checkpoint does not say.
        figures: of the log; {} if there is none.
        left_out: which of the checkpoint's tensors are not in the export.
        check: how the export was checked.
        versions: by what they are the versions of.
        options: every option of the training; {} if the checkpoint does not say.
    """
    unknown = "The checkpoint does not say: it is not of this project's scripts."
    parts = [
        "\n".join(["---", f"library_name: {library}", "tags:", *(f"- {tag}" for tag in tags), "---"]),
        f"# {name}\n\n{summary}",
        f"## How to load it\n\n```python\n{usage}\n```",
        *["\n".join(note for note in notes if note)] * any(notes),
        "## What it was trained on\n\n" + (_table(training, ("", "")) if training else unknown),
        "## Figures of the log\n\n"
        + (_table(figures, ("figure", "value")) if figures else "There is no log beside it."),
        f"## What was left out\n\n{left_out}",
        f"## How it was checked\n\n{check}",
        *(f"## Versions, {what}\n\n{_table(rows, ('', ''))}" for what, rows in versions.items() if rows),
    ]
    if options:
        lines = ",\n".join(f"  {json.dumps(option)}: {json.dumps(value)}" for option, value in options.items())
        parts.append(f"## Options of the training\n\n```json\n{{\n{lines}\n}}\n```")
    return "\n\n".join(parts) + "\n"
