"""Model card of an export: what the model is, how it was trained, how to load it, what was not exported."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from export.base import Format
from util.run.logger import describe_environment
from util.weights.load import summarize_names

# Columns of log.jsonl that say nothing about the model.
_NOT_METRICS = ("epoch", "epoch_seconds", "images_per_s", "data_wait")

_TEMPLATE = """---
library_name: {library}
tags:
{tags}
---

# {name}

{what}, for {opens}. Made from the {weights} of `{checkpoint}`.

## How to load it

```python
{usage}
```

{note}
Images are RGB, normalised with mean {mean} and std {std}.

## Check

{check}
"""


def model_card(form: Format, name: str) -> str:
    """The card of the export called `name`, in Markdown."""
    source = form.source
    tags = {
        "vision-transformer": True,
        "masked-autoencoder": bool(source.meta) or source.autoencoder is not None,
        "hard-patches-mining": "decoder_pred_losspred.weight" in source.weights,
    }
    has_teacher = source.meta.get("script") == "main_pretrain" or source.which == "ema"
    what = describe(form)
    check = "After the file was read back, names, shapes and values were compared with the checkpoint's."
    if form.opened:
        check = (
            f"The export was opened with {form.opens} and compared with the checkpoint's model on random images: the "
            f"largest difference is below {form.tolerance:g} of the largest value."
        )
    card = _TEMPLATE.format(
        library="transformers" if form.needs == ("transformers",) else form.name,
        tags="\n".join(f"- {tag}" for tag, applies in tags.items() if applies),
        name=name,
        what=what[0].upper() + what[1:],
        opens=form.opens,
        weights=f"{source.which} weights" if has_teacher else "weights",
        checkpoint=source.path.name,
        usage=form.usage(name),
        note=form.note(),
        mean=source.mean,
        std=source.std,
        check=check,
    )
    kept = set(form.keeps())
    environment = describe_environment()
    packages = {package: version(package) for package in ("torch", "timm", "safetensors", *form.needs)}
    sections = {
        "Not exported": summarize_names([name for name in source.weights if name not in kept]),
        "Versions at export": _table({name: environment[name] for name in ("git_commit", "python")} | packages),
        "Training": "The checkpoint does not record it: it was not written by this project's scripts.",
    }
    if source.meta:
        epochs = f"{source.meta['epoch']} of {source.meta['options']['epochs']}"
        options = {"data_path": "Shapes, drawn by the program"} | _without_folders(source.meta["options"])
        metrics = read_log(source.path, source.meta["epoch"])
        sections |= {
            "Training": _table({"script": source.meta["script"], "epochs completed": epochs, **options}),
            "Metrics": _table(metrics) if metrics else "There is no log next to the checkpoint.",
            "Versions at training": _table(read_environment(source.path)),
        }
    return card + "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items())


def describe(form: Format) -> str:
    """What the export is, in a few words."""
    source = form.source
    kind = "encoder"
    if not form.opened:
        kind = "backbone"
    elif form.holds_decoder and source.autoencoder is not None:
        kind = "masked autoencoder"
    elif source.classes:
        pooled = "mean of the patch tokens" if source.mean_pooled else "class token"
        kind = f"classifier of {source.classes} classes on the {pooled}"
    return f"{kind}, {source.name}, {source.input_size} pixels in patches of {source.patch_size}"


def read_log(checkpoint: Path, epochs: int) -> dict[str, Any]:
    """Metrics in the log.jsonl next to a checkpoint from when it was written; {} without a log.

    Args:
        epochs: number of epochs that the checkpoint has completed.
    """
    path = checkpoint.parent / "log.jsonl"
    found: dict[str, Any] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed while writing it
        if record.get("epoch", epochs) < epochs:
            found = record
    return {name: value for name, value in found.items() if name not in _NOT_METRICS}


def read_environment(checkpoint: Path) -> dict[str, Any]:
    """Versions and commit in the config.json next to a checkpoint; {} without one."""
    try:
        found = json.loads((checkpoint.parent / "config.json").read_text()).get("environment", {})
    except (OSError, ValueError, AttributeError):
        return {}
    return {name: value for name, value in found.items() if value is not None and name not in ("command", "device")}


def _without_folders(options: dict[str, Any]) -> dict[str, Any]:
    """Options that have a value. Paths are cut to their last part: local folders mean nothing to others."""
    return {
        name: Path(value).name if isinstance(value, str) and "/" in value else value
        for name, value in options.items()
        if value not in (None, "")
    }


def _table(rows: dict[str, Any]) -> str:
    cells = {name: f"{value:.5g}" if isinstance(value, float) else str(value) for name, value in rows.items()}
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {cell} |" for name, cell in cells.items())])
