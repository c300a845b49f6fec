"""Every recipe: its command parses, and resolves to what its header states; some are run for two steps."""

import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest
import timm
import torch
from images import write_tree
from programs import ROOT

import models_vit
from models_teacher import KINDS
from util.run.distributed import World
from util.weights.meta import classifier_name

RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.sh") if path.name not in ("_run.sh", "slurm.sh"))
KEYS = {"model", "batch", "rate", "published", "disagrees"}


def header(path):
    """The comment block: {key: text}."""
    found, key = {}, None
    for line in path.read_text().split("source")[0].splitlines()[3:]:
        if line.startswith("#            "):
            found[key] += " " + line[13:]
        elif match := re.match(r"# (\w+) +(.*)", line):
            key = match[1]
            found[key] = match[2]
    return found


def commands(path, **environment):
    done = subprocess.run(
        ["bash", str(path)],
        env={**os.environ, "DATA": "/data", "DRY": "1", "OUT": "/out", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def resolve(script, options, monkeypatch, processes=8):
    module = importlib.import_module(script.removesuffix(".py"))
    parser = module.get_args_parser()
    # The weights that an earlier recipe will leave are not there yet.
    monkeypatch.setattr(module, "read_meta", lambda path: {}, raising=False)
    return module.resolve_options(parser.parse_args(options), World(0, processes, 0, processes))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_it_resolves_to_what_its_header_states(path, monkeypatch):
    stated = header(path)
    batches = [int(x) for x in re.findall(r"\d+", stated.get("batch", ""))]
    rates = [float(x) for x in re.findall(r"[\d.]+(?:e-?\d+)?", stated.get("rate", ""))]
    assert KEYS - stated.keys() <= ({"batch", "rate"} if path.stem.startswith("knn") else set())
    for number, (script, *options) in enumerate(commands(path)):
        args = resolve(script, options, monkeypatch)
        if number == 0:
            assert args.model == stated["model"]
        if batches:
            assert args.global_batch == batches[number]
            assert args.lr == pytest.approx([rates[number]] if script == "main_linprobe.py" else rates[number])
        assert args.data_path == "/data"
        if script != "main_knn.py":
            assert args.output_dir.startswith(f"/out/{path.stem}")


def test_names_say_what_is_run(monkeypatch):
    for path in RECIPES:
        if not path.stem.startswith("pretrain"):
            continue
        _, method, size, epochs, *_ = path.stem.split("_")
        args = resolve("main_pretrain.py", commands(path)[0][1:], monkeypatch)
        assert (f"_{size}_" in args.model, args.epochs, args.learning_loss) == (True, int(epochs), method == "hpm")
        tune = ROOT / "recipes" / path.name.replace("pretrain", "finetune")
        script, *options = commands(tune)[0]
        assert options[options.index("--finetune") + 1] == f"/out/{path.stem}/checkpoint-last.pth"
        assert resolve(script, options, monkeypatch).model == classifier_name(args.model)


def test_the_table_lists_every_recipe_and_its_figure():
    table = (ROOT / "recipes/README.md").read_text()
    for path in RECIPES:
        assert f"[{path.name}]({path.name}) | {header(path)['published']} |" in table, path.name
    assert table.count(".sh](") == len(RECIPES)


def test_the_batch_must_fit_the_processes(monkeypatch):
    (script, *options), *_ = commands(ROOT / "recipes/pretrain_hpm_base_200.sh")
    assert resolve(script, options, monkeypatch, processes=1).accum_iter == 32
    assert resolve(script, options, monkeypatch, processes=32).accum_iter == 1
    with pytest.raises(ValueError, match="--global_batch 2048 is not a multiple of --batch_size 64 x 3 processes"):
        resolve(script, options, monkeypatch, processes=3)


def test_what_is_added_goes_to_its_script_and_wins():
    path = ROOT / "recipes/ablation_mask_random.sh"
    done = subprocess.run(
        ["bash", str(path), "--max_steps", "2", "--", "--epochs", "3"],
        env={**os.environ, "DATA": "/data with a space", "DRY": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert first.endswith("--max_steps 2")
    assert second.endswith("--epochs 3")


def test_data_must_be_given():
    environment = {name: value for name, value in os.environ.items() if name != "DATA"}
    done = subprocess.run(["bash", str(RECIPES[0])], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "set DATA to the folder or archive of ImageNet-1K" in done.stderr


# What makes any recipe small enough for a CPU: two steps of four images.
TINY = {
    "main_pretrain.py": [
        *["--model", "mae_vit_micro_patch16", "--decoder_depth", "1", "--batch_size", "2", "--global_batch", "4"],
        *["--max_steps", "2", "--num_workers", "0"],
    ],
    "main_finetune.py": [
        "--model",
        "vit_micro_patch16",
        "--batch_size",
        "2",
        "--global_batch",
        "4",
        "--max_steps",
        "2",
    ],
    "main_linprobe.py": [
        "--model",
        "vit_micro_patch16",
        "--batch_size",
        "2",
        "--global_batch",
        "4",
        "--max_steps",
        "2",
    ],
    "main_knn.py": ["--model", "vit_micro_patch16", "--nb_knn", "3"],
}


def run_tiny(path, tmp_path, extra=None, **environment):
    """The recipe itself, shrunk by the options at its end."""
    data = write_tree(tmp_path / "data")
    scripts = [script for script, *_ in commands(path)]
    extra = extra or TINY[scripts[0]] + (["--", *TINY[scripts[1]]] if len(scripts) > 1 else [])
    torch.save({"model": models_vit.vit_micro_patch16(num_classes=0).state_dict()}, tmp_path / "encoder.pth")
    return subprocess.run(
        ["bash", str(path), *extra],
        env={
            **{**os.environ, "DATA": str(data), "OUT": str(tmp_path / "out"), "NPROC": "1"},
            **{"CKPT": str(tmp_path / "encoder.pth"), "PYTHON": sys.executable, **environment},
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    "name",
    [
        *["pretrain_hpm_base_200", "pretrain_mae_base_200", "ablation_target_ema", "ablation_target_dino"],
        *["ablation_target_clip", "linprobe_mae_base", "knn_hpm_base"],
    ],
)
def test_it_runs_for_two_steps(name, tmp_path):
    """One recipe of each script and target; all of them in tests/stress."""
    environment = {}
    for kind, settings in KINDS.items():
        if name.endswith(kind):
            environment[f"{kind.upper()}_PATH"] = str(tmp_path / "teacher.pth")
            torch.save(timm.create_model(settings.timm_name, pretrained=False).state_dict(), tmp_path / "teacher.pth")
    done = run_tiny(ROOT / f"recipes/{name}.sh", tmp_path, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = ["200 epochs and 2 steps", "100 epochs and 2 steps"] if name.startswith("ablation") else ["2 steps"]
    if not name.startswith("knn"):
        assert all(text in done.stdout for text in steps)
