"""Recipes: every command resolves to what its header states, and some are run for two steps."""

import functools
import math
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from images import write_tree
from programs import ROOT, run
from segment_data import ade_files

import models_vit
from benchmarks.recipes import TRAIN_IMAGES, VAL_IMAGES, commands, compute, describe, resolve

FILES = sorted(path for path in (ROOT / "recipes").glob("*.sh") if path.name not in ("_run.sh", "slurm.sh"))
SEGMENTATION = [path for path in FILES if path.name.startswith("segment_")]
RECIPES = [path for path in FILES if path not in SEGMENTATION]
FIELDS = {"model", "batch", "lr", "published", "hardware", "compute", "notes"}
OPTIONAL_FIELDS = {"same as", "definition"}
TARGETS = {"hpm": "pixel", "mae": "norm_pixel", "pixel": "pixel", "normpix": "norm_pixel"}
OWN_STRATEGIES = {"hard_to_easy", "constant", "hardest", "easiest"}  # not in the official code


def header(path):
    """The comment block of a recipe as {field: text}."""
    found, field = {}, None
    for line in path.read_text().split("source")[0].splitlines()[3:]:
        if line.startswith("# "):
            name, text = line[2:13].strip(), line[13:]
            field = name or field
            found[field] = f"{found[field]} {text}" if field in found else text
    return found


def numbers(text):
    return [float(number.replace(",", "")) for number in re.findall(r"[\d.,]*\d(?:e-?\d+)?", text)]


@functools.cache
def resolved(path):
    """Script and options of every command of a recipe."""
    return [(script, resolve(script, words)) for script, *words in commands(path)]


@pytest.mark.parametrize("path", SEGMENTATION, ids=lambda p: p.stem)
def test_segmentation_recipe_resolves_to_its_header(path):
    ((script, args),) = resolved(path)
    stated = header(path)
    assert script == "main_segment.py"
    assert args.model == stated["model"]
    assert [args.global_batch, args.lr] == [*numbers(stated["batch"]), *numbers(stated["lr"])]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_resolves_to_its_header(path):
    stated = header(path)
    without_training = {"batch", "lr"} if path.stem.startswith("knn") else set()
    assert FIELDS - without_training <= stated.keys() <= FIELDS | OPTIONAL_FIELDS
    batches, lrs = numbers(stated.get("batch", "")), numbers(stated.get("lr", ""))
    steps = stated["compute"].split("; then ")
    for number, (script, args) in enumerate(resolved(path)):
        if number == 0:
            assert args.model == stated["model"]
        if batches:
            assert args.global_batch == batches[number]
            assert args.lr == pytest.approx([lrs[number]] if script == "main_linprobe.py" else lrs[number])
        check_arithmetic(script, args, steps[number])
        if script != "main_knn.py":
            folders = [path.stem, *re.findall(r"\w+_\w+", stated.get("same as", "").split(".")[0])]
            assert args.output_dir.split("/")[2] in folders


def check_arithmetic(script, args, stated):
    """images x epochs x GMAC = EMAC; the GMAC themselves are counted below and in tests/stress."""
    *factors, gmacs, emacs = numbers(stated)
    expected = [TRAIN_IMAGES, getattr(args, "epochs", None)]
    if script == "main_knn.py":
        expected = [TRAIN_IMAGES + VAL_IMAGES]
    if script == "main_segment.py":
        expected = [args.steps, args.global_batch]
    assert factors == expected
    assert emacs == pytest.approx(math.prod(factors) * gmacs / 1e9, rel=0.01)


@pytest.mark.parametrize("name", ["pretrain_hpm_base_200", "finetune_hpm_base_200", "segment_hpm_base_200"])
def test_multiply_accumulates(name):
    check_compute(ROOT / f"recipes/{name}.sh")


def check_compute(path):
    assert header(path)["compute"] == "; then ".join(compute(script, args) for script, args in resolved(path))


def test_names_match_the_options():
    for path in RECIPES:
        if not path.stem.startswith("pretrain"):
            continue
        _, method, size, epochs, *target = path.stem.split("_")
        ((_, args),) = resolved(path)
        assert (f"_{size}_" in args.model, args.epochs, args.learning_loss) == (True, int(epochs), method == "hpm")
        assert args.target == TARGETS[target[0] if target else method]
        assert args.global_batch == (4096 if method == "mae" and not target else 2048)
        tune = ROOT / "recipes" / path.name.replace("pretrain", "finetune")
        ((script, *words),) = commands(tune)
        assert words[words.index("--finetune") + 1] == f"/out/{path.stem}/checkpoint-last.pth"
        assert resolve(script, words).model == args.model.removeprefix("mae_").removesuffix("_dec512d8b")


def test_every_hpm_recipe_has_a_baseline_in_its_settings():
    """Raw-pixel MAE of the same size and length, which differs in the predictor and the masks alone."""
    for path in RECIPES:
        if path.stem.startswith("pretrain_hpm"):
            baseline = ROOT / "recipes" / f"{path.stem.replace('hpm', 'mae')}_pixel.sh"
            assert baseline.stem in header(path)["notes"]
            (_, ours), (_, theirs) = resolved(path)[0], resolved(baseline)[0]
            differ = {name for name, value in vars(ours).items() if vars(theirs)[name] != value}
            assert differ == {"learning_loss", "mask_strategy", "output_dir"}


def test_no_model_is_trained_twice():
    """Recipes whose pre-training resolves to the same options say so, and share a folder."""
    folders = {}
    for path in RECIPES:
        script, args = resolved(path)[0]
        if script == "main_pretrain.py":
            options = {k: v for k, v in vars(args).items() if k not in ("output_dir", "batch_size", "accum_iter")}
            folders.setdefault(str(sorted(options.items())), set()).add(args.output_dir)
    assert all(len(shared) == 1 for shared in folders.values()), folders.values()
    same = {path.stem for path in RECIPES if "same as" in header(path)}
    assert same == {"ablation_mask_easy_to_hard", "ablation_ratio_075", "ablation_objective_none"}


def test_own_definitions_are_called_so():
    for path in RECIPES:
        script, args = resolved(path)[0]
        own = script == "main_pretrain.py" and args.mask_strategy in OWN_STRATEGIES
        assert header(path).get("definition", "").startswith("ours:") == own, path.stem


def test_the_tables_list_every_recipe():
    text = (ROOT / "recipes/README.md").read_text()
    for path in RECIPES:
        row = next(line for line in text.splitlines() if f"[{path.name}]({path.name})" in line)
        assert row.endswith(f"| {header(path)['published']} |"), path.name
    assert text.count(".sh](") == len(FILES)
    for name in re.findall(r"^\| (\w+)\.sh \|", text, re.MULTILINE):
        path = ROOT / f"recipes/{name}.sh"
        ((script, args),) = resolved(path)
        assert f"| {path.name} | {describe(script, args)} | {header(path)['compute']} |" in text
    official = re.findall(r"`((?:pretrain|finetune|segment)_\w+)`", text.split("## Official")[1].split("resolve to")[0])
    assert all((ROOT / f"recipes/{name}.sh").exists() for name in official)


def test_the_world_size_must_divide_the_global_batch():
    ((script, *words),) = commands(ROOT / "recipes/pretrain_hpm_base_200.sh")
    assert resolve(script, words, processes=1).accum_iter == 32
    assert resolve(script, words, processes=32).accum_iter == 1
    with pytest.raises(ValueError, match="--global_batch 2048 is not a multiple of --batch_size 64 x 3 processes"):
        resolve(script, words, processes=3)


def test_options_at_the_end_override_the_recipe():
    path = ROOT / "recipes/ablation_mask_random.sh"
    done = subprocess.run(
        ["bash", str(path), "--max_steps", "2", "--", "--epochs", "3"],
        env={**os.environ, "DATA": "/data with a space", "DRY": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = map(shlex.split, done.stdout.splitlines())
    assert first[-2:] == ["--max_steps", "2"]
    assert second[-2:] == ["--epochs", "3"]
    assert first[2] == second[2] == "/data with a space"


@pytest.mark.parametrize("option", ["--output_dir=x", "--experiment"])
def test_an_ablation_trains_and_fine_tunes_in_its_folder(option):
    """Fine-tuning would load the weights of another run."""
    environment = {**os.environ, "DATA": "/data", "DRY": "1"}
    command = ["bash", str(ROOT / "recipes/ablation_mask_random.sh"), option, "x"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"set OUT instead of {option}" in done.stderr


def test_data_is_required():
    environment = {name: value for name, value in os.environ.items() if name != "DATA"}
    done = subprocess.run(["bash", str(RECIPES[0])], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "set DATA to the folder or archive of ImageNet-1K" in done.stderr


# Options that make any recipe small enough for a CPU: two steps of four images.
TINY_BATCH = "--batch_size 2 --global_batch 4 --max_steps 2"
TINY = {
    "main_pretrain.py": f"--model mae_vit_micro_patch16 --decoder_depth 1 --num_workers 0 {TINY_BATCH}".split(),
    "main_finetune.py": f"--model vit_micro_patch16 {TINY_BATCH}".split(),
    "main_linprobe.py": f"--model vit_micro_patch16 {TINY_BATCH}".split(),
    "main_knn.py": ["--model", "vit_micro_patch16", "--nb_knn", "3"],
    "main_segment.py": f"--model vit_micro_patch16 --crop 32 --stride 21 {TINY_BATCH}".split(),
}


def tiny_settings(path, tmp_path):
    """Environment of a recipe: a few images, and an encoder to start from."""
    data = write_tree(tmp_path / "data", ade_files() if path.stem.startswith("segment") else None)
    torch.save({"model": models_vit.vit_micro_patch16(num_classes=0).state_dict()}, tmp_path / "encoder.pth")
    return {"DATA": str(data), "OUT": str(tmp_path / "out"), "CKPT": str(tmp_path / "encoder.pth")}


def run_tiny(path, tmp_path, extra=None, **environment):
    """Run the recipe itself, made small by options at its end."""
    scripts = [script for script, *_ in commands(path)]
    extra = extra or TINY[scripts[0]] + (["--", *TINY[scripts[1]]] if len(scripts) > 1 else [])
    return subprocess.run(
        ["bash", str(path), *extra],
        env=os.environ | tiny_settings(path, tmp_path) | {"NPROC": "1", "PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_recipe_runs_for_two_steps(tmp_path):
    done = run_tiny(ROOT / "recipes/pretrain_hpm_base_200.sh", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2, saved in" in done.stdout


ONE_OF_EACH = [
    "pretrain_mae_base_200",
    "ablation_target_ema",
    "linprobe_mae_base",
    "knn_hpm_base",
    "segment_mae_base_200",
]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_commands_of_a_recipe_run_for_two_steps(name, tmp_path):
    """One recipe of each script. tests/stress runs all of them as they are."""
    settings = tiny_settings(ROOT / f"recipes/{name}.sh", tmp_path)
    for script, *words in commands(ROOT / f"recipes/{name}.sh", **settings):
        log = run(script.removesuffix(".py"), *words, *TINY[script])
        assert "step 2, saved in" in log or script == "main_knn.py"
