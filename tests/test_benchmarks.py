"""The arithmetic of the benchmarks, and the scripts as a person runs them."""

import os
import re
import subprocess
import sys

import pytest
import torch
from images import write_tar
from programs import ROOT, run

import main_pretrain
from benchmarks.step import peak_of_process
from benchmarks.trainer import METHODS, PARTS, Case, Trainer, step_flops
from util.run import distributed


def options_of(method):
    argv = Case("mae_vit_base_patch16", method, "fp32", "no", 8).options()
    return main_pretrain.resolve_options(main_pretrain.get_args_parser().parse_args(argv), distributed.ALONE)


def test_operations_of_a_step_of_the_base_model():
    """67.9 G multiply-accumulates per image for HPM, and cheaper methods relative to MAE."""
    ratios = {"hpm": 2.33, "mae": 1.0, "predictor_2": 1.14, "sparse": 1.88, "loss": 1.33}
    flops = {method: step_flops(options_of(method), 8) for method in ratios}
    assert round(flops["hpm"] / 8 / 2 / 1e9, 1) == 67.9
    assert {method: round(count / flops["mae"], 2) for method, count in flops.items()} == ratios


def test_step_prints_operations_without_measuring(monkeypatch):
    monkeypatch.setattr("benchmarks.step.Trainer", None)
    size = ["--model", "mae_vit_micro_patch16", "--input_size", 32, "--patch_size", 8]
    log = run("benchmarks.step", "--flops", "--method", "hpm", "predictor", *size)
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in log.splitlines() if line.startswith("| mae_")]
    assert [row[0] for row in rows] == ["hpm", "predictor"]
    assert 1 < float(rows[1][2]) < float(rows[0][2]) < 3


def test_step_prints_its_tables():
    """Two methods, eager; the parts are those of the engine."""
    tiny = ["--model", "mae_vit_micro_patch16", "--input_size", "16", "--patch_size", "4", "--device", "cpu"]
    log = run(
        "benchmarks.step", *tiny, "--compile", "no", "--batch_size", 2, "--repeats", 2, "--product_side", 64, "--parts"
    )
    rows = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in log.splitlines() if row.startswith("| ")}
    assert [name for name in rows if name != "case"] == [f"{m} micro, fp32, eager, batch 2" for m in ("HPM", "MAE")]
    parts = dict(zip(PARTS, rows["MAE micro, fp32, eager, batch 2"], strict=True))
    assert [name for name, share in parts.items() if share.strip() == "-"] == ["teacher", "EMA"]
    assert "HPM micro, fp32, eager, batch 2 : MAE micro, fp32, eager, batch 2 = " in log


def test_all_methods_and_models_can_be_compiled_in_one_run(monkeypatch):
    """Dynamo counts the graphs of all instances of a class together; above its limit, fullgraph=True is an error."""

    class Stop(Exception):
        pass

    def measure(trainers, *rest):
        raise Stop(len(trainers), torch._dynamo.config.recompile_limit)

    monkeypatch.setattr("benchmarks.step.Trainer", lambda *arguments: None)
    monkeypatch.setattr("benchmarks.step.measure", measure)
    models = ["--model", "mae_vit_base_patch16", "mae_vit_large_patch16", "--method", *METHODS]
    with torch._dynamo.config.patch(recompile_limit=8), pytest.raises(Stop) as stopped:
        run("benchmarks.step", *models, "--compile", "yes", "--product_side", 64)
    cases, limit = stopped.value.args
    assert cases == 18 <= limit


def test_parts_add_up_to_the_step():
    """All of the time is booked once."""
    size = ["--input_size", "16", "--patch_size", "4"]
    trainer = Trainer(Case("mae_vit_micro_patch16", "hpm", "fp32", "no", 2), torch.device("cpu"), size)
    seconds = trainer.steps(3)
    step = seconds.pop("step")
    assert set(seconds) == set(PARTS)
    assert all(value > 0 for value in seconds.values())
    assert sum(seconds.values()) == pytest.approx(step, rel=1e-3)


def test_peak_memory_is_that_of_the_case_alone():
    """Not that of the process it was forked from, which holds 2 GiB here."""
    size = ["--input_size", "16", "--patch_size", "4"]
    small = Case("mae_vit_micro_patch16", "mae", "fp32", "no", 2)
    held = torch.ones(2 * 2**28)
    assert 2**28 < peak_of_process(small, size) < held.nbytes / 2


def test_data_prints_its_tables():
    options = ["--images", 4, "--batch_size", 2, "--input_size", 32, "--workers", 0, "--repeats", 1, "--loop"]
    log = run("benchmarks.data", *options, "--steps", 1, "--model", "mae_vit_micro_patch16", "--device", "cpu")
    for name in ("official: Pillow, torchvision, float32", "this project, folder", "this project, tar", "tar.gz cache"):
        assert log.count(name) >= 2  # on one thread, and through the loader
    assert "only decoding (the limit)" in log
    assert "HPM micro, fp32, eager, batch 2 |" in log


def test_data_rejects_an_archive(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("benchmarks.data", "--data_path", write_tar(tmp_path / "data.tar"))
    assert "is an archive: give the folder of its files" in capsys.readouterr().err


def test_the_check_of_a_gpu_ends_well_without_one(tmp_path):
    command = ["bash", str(ROOT / "scripts/gpu_check.sh"), str(tmp_path / "report.md")]
    env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert found.stdout == "gpu_check.sh: PyTorch finds no CUDA device; nothing was checked\n"
    assert not (tmp_path / "report.md").exists()


def test_the_check_of_a_gpu_times_every_method():
    """Of ViT-B and of ViT-L: the methods that the commands of either name."""
    script = (ROOT / "scripts/gpu_check.sh").read_text()
    others = re.search(r"^others=\((.*)\)", script, re.MULTILINE)[1]
    for size in ("base", "large"):
        methods = re.search(rf"^{size}=.*--method (.*)\)", script, re.MULTILINE)[1]
        for more in re.findall(rf'^check .*"\${{{size}\[@\]}}" (.*)', script, re.MULTILINE):
            methods += " " + more.replace('"${others[@]}"', others)
        assert set(methods.split()) == set(METHODS), size
