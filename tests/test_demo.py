"""The files of demo/: the shipped checkpoint, how it is made, and the notebook."""

import ast
import json
import re

import pytest
import torch
from programs import PRETRAIN, ROOT, run

from util.run.checkpoint import read_run
from util.weights.load import load_pretrained, read_meta

SHIPPED = ROOT / "demo" / "hpm_micro_tiny_imagenet.pth"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run of a few steps, and the file that demo.shrink makes of its checkpoint."""
    folder = tmp_path_factory.mktemp("demo")
    run("main_pretrain", *PRETRAIN, "--target", "norm_pixel", "--output_dir", folder)
    run("demo.shrink", "--checkpoint", folder / "checkpoint-last.pth", "--output", folder / "small.pth")
    return folder / "checkpoint-last.pth", folder / "small.pth"


def test_half_precision_keeps_weights_and_metadata(small):
    checkpoint, shrunk = small
    before, after = load_pretrained(checkpoint), load_pretrained(shrunk)
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name].half().float()), name
    assert shrunk.stat().st_size < 0.15 * checkpoint.stat().st_size  # without teacher and optimizer
    assert read_meta(shrunk)["image"] == read_meta(checkpoint)["image"]
    assert not [v for v in read_meta(shrunk)["options"].values() if isinstance(v, str) and "/" in v]


def test_every_program_reads_it(small, tmp_path):
    data = ["--shapes_train", 16, "--shapes_val", 8, "--num_workers", 0, "--batch_size", 8]
    log = run("main_knn", "--finetune", small[1], *data, "--nb_knn", 3)
    assert "3-NN  top-1" in log
    run("main_pretrain", *PRETRAIN, "--load_from", small[1], "--max_steps", 1, "--output_dir", tmp_path / "run")
    run("main_finetune", "--finetune", small[1], *data, "--max_steps", 1, "--output_dir", tmp_path / "tuned")
    run("visualize", "--checkpoint", small[1], "--num_images", 1, "--output", tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_it_cannot_be_resumed_from(small, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("main_pretrain", *PRETRAIN, "--resume", small[1], "--output_dir", tmp_path)
    assert stopped.value.code == 2
    assert "holds weights only and cannot be resumed from" in capsys.readouterr().err


def test_the_shipped_checkpoint():
    assert SHIPPED.stat().st_size <= 3_000_000
    assert read_run(SHIPPED)["options"]["data_path"] == "tiny_imagenet_50.tar.gz"
    weights = load_pretrained(SHIPPED)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert {"decoder_pred.weight", "decoder_pred_losspred.weight", "norm.weight"} <= weights.keys()


@pytest.mark.parametrize("shipped", [True, False])
def test_notebook_runs(small, shipped, monkeypatch):
    """Cell by cell in one namespace, as Jupyter does; the second time with another model."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    shown = []
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: shown.append(True))
    monkeypatch.chdir(ROOT / "demo")
    cells = json.loads((ROOT / "demo" / "hpm_visualize.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code")  # results live in the documents
    namespace = {"__name__": "__main__"}
    for number, source in enumerate(code):
        if not shipped:
            source = source.replace('ROOT / "demo" / "hpm_micro_tiny_imagenet.pth"', repr(str(small[1])))
        exec(compile(ast.parse(source), f"cell {number}", "exec"), namespace)
    namespace["plt"].close("all")
    assert len(shown) == 6
    assert all(result.isfinite().all() for result in namespace["result"].values())


def test_lines_of_the_readme(monkeypatch):
    """They load the shipped checkpoint and give features."""
    monkeypatch.chdir(ROOT)
    (lines,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    namespace = {}
    exec(lines, namespace)
    assert namespace["features"].shape == (1, 128)


def test_what_the_demo_runs_is_documented_as_such():
    """scripts/demo.sh and results.md give the same settings."""
    script, text = (ROOT / "scripts" / "demo.sh").read_text(), (ROOT / "docs" / "results.md").read_text()
    for option in ("--ema_decay 0.95", "--teacher_keep 0.25", "--epochs 12", "--batch_size 16"):
        assert option in script
        assert option in text
