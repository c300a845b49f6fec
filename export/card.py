"""Model card of an export: what the model is, how it was trained, how to load it, what was not exported."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from export.base import Format
from util.run.folder import read_config, read_log
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

{pixels}

## Check

{check}
"""


def model_card(form: Format, name: str) -> str:
    """The card of the export called `name`, in Markdown."""
    source, options = form.source, form.source.meta.get("options", {})
    scored = options.get("score_by") == "loss" or "decoder_pred_losspred.weight" in source.weights
    tags = {
        "vision-transformer": True,
        "masked-autoencoder": bool(source.meta) or source.autoencoder is not None,
        "hard-patches-mining": options.get("mask_strategy") != "random" and scored,
    }
    has_teacher = source.meta.get("script") == "main_pretrain" or source.which == "ema"
    what = describe(form)
    check = "After the file was read back, names, shapes and values were compared with the checkpoint's."
    if form.opened:
        check = (
            f"The export was opened with {form.opens} and compared with the checkpoint's model on random images: the "
            f"largest difference is below {form.tolerance:g} of the largest value."
        )
    pixels = (
        f"Images are RGB, normalised with mean {source.mean} and std {source.std}. Evaluation takes the centre, "
        f"{source.crop_pct:g} of the shorter side."
    )
    if value_range := source.meta.get("image", {}).get("value_range"):
        pixels += f" Values of more than 8 bits are scaled from {value_range[0]:g}..{value_range[1]:g}."
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
        pixels=pixels,
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
    if "script" in source.meta:
        epochs = f"{source.meta['epoch']} of {options['epochs']}"
        shown = {"data_path": "Shapes, drawn by the program"} | _without_folders(options)
        metrics = metrics_of(source.path, source.meta["epoch"])
        sections |= {
            "Training": _table({"script": source.meta["script"], "epochs completed": epochs, **shown}),
            "Metrics": _table(metrics) if metrics else "There is no log next to the checkpoint.",
            "Versions at training": _table(_versions_of(source.path)),
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


def metrics_of(checkpoint: Path, epochs: int) -> dict[str, Any]:
    """Metrics in the log next to a checkpoint from when it had completed `epochs` epochs; {} without a log."""
    lines = [line for line in read_log(checkpoint.parent) if line["epoch"] < epochs]
    return {name: value for name, value in lines[-1].items() if name not in _NOT_METRICS} if lines else {}


def _versions_of(checkpoint: Path) -> dict[str, Any]:
    """Versions and commit in the config.json next to a checkpoint; {} without one."""
    found = read_config(checkpoint.parent).get("environment", {})
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
