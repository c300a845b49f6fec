"""The rules of the layout: imports only point down, options stop in the scripts, importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {"util": 0, "models": 1, "engine": 2, "main": 3, "visualize": 3, "export": 3, "benchmarks": 4}
FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "util").glob("*.py")])
BELOW = [path for path in FILES if path.parent.name == "util" or path.name.startswith(("models_", "engine_"))]


def layer(name):
    return LAYERS.get(name.split(".")[0].split("_")[0])


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            if node.module == "util":
                yield from (f"util.{alias.name}" for alias in node.names)


def ids(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_imports_point_down(path):
    own = 0 if path.parent.name == "util" else layer(path.stem)
    assert own is not None, f"{path.name} belongs to no layer"
    for name in imports(path):
        other = layer(name)
        if other is not None:
            assert other < own or (own in (0, 1) and other == own), f"{path.name} imports {name}"


def test_no_circle_inside_util():
    edges = {
        p.stem: {n.split(".")[1] for n in imports(p) if n.startswith("util.")} for p in (ROOT / "util").glob("*.py")
    }
    while edges:
        leaves = [name for name, targets in edges.items() if not targets & edges.keys()]
        assert leaves, f"a circle among {sorted(edges)}"
        for name in leaves:
            del edges[name]


@pytest.mark.parametrize("path", BELOW, ids=ids(BELOW))
def test_options_stop_in_the_scripts(path):
    names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
    names |= {n.arg for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.arg)}
    assert "args" not in names


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_no_print_and_no_exit(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name != "print", f"{path.name}:{node.lineno}"
            of_a_worker = (path.name, name) == ("loader.py", "os._exit")  # the end of a process that loads data
            assert of_a_worker or name not in ("exit", "sys.exit", "os._exit") or path not in BELOW, (
                f"{path.name}:{node.lineno}"
            )


def test_importing_does_nothing():
    """No output, no seed, no process group, no environment variable."""
    modules = [p.stem for p in FILES if p.parent == ROOT] + [f"util.{p.stem}" for p in FILES if p.parent != ROOT]
    code = f"""
import os, random, torch, torchvision, timm
import numpy as np
def state():
    return dict(os.environ), random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
before = state()
for name in {modules!r}:
    __import__(name)
assert before == state()
assert not torch.distributed.is_initialized()
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
