"""The rules of the layout: imports only point down, options stop in the scripts, importing does nothing."""

import ast
import importlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ["util", "util/run", "util/data", "util/weights", "export", "visualize"]
FILES = sorted([*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).glob("*.py"))])
SCRIPTS = [
    path for path in FILES if path.name.startswith(("main_", "predict")) or path.name in ("__main__.py", "status.py")
]
BELOW = [path for path in FILES if path not in SCRIPTS]

# What a module may import: modules of lower layers, and of its own but for the leaves, without a cycle.
LAYERS = {"util.data": 1, "util.weights": 1, "util.run": 2, "util": 0, "models": 3, "engine": 4}
LAYERS |= {"visualize": 5, "export": 5, "main": 6, "predict": 6, "hubconf": 6, "benchmarks": 7}


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def layer(name):
    """Layer of a module; None of other people's."""
    for package, number in LAYERS.items():
        if name == package or name.startswith((f"{package}.", f"{package}_")):
            return number
    return None


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ids(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_imports_point_down(path):
    own = layer(module(path))
    assert own is not None, f"{path.name} belongs to no layer"
    names = {module(file) for file in FILES}
    for name in names & set(imports(path)):
        assert layer(name) < own or (own > 0 and layer(name) == own), f"{path.name} imports {name}"


def test_no_cycle():
    names = {module(file) for file in FILES}
    edges = {module(file): names & set(imports(file)) for file in FILES}
    while edges:
        leaves = [name for name, targets in edges.items() if not targets & edges.keys()]
        assert leaves, f"a cycle among {sorted(edges)}"
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
    modules = [module(path) for path in FILES]
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


@pytest.mark.skipif(sys.version_info < (3, 11), reason="functions of a class have no class in their name")
def test_few_functions_lie_between_the_command_and_the_optimizer(tmp_path):
    """The default run enters at most 70 functions before its first step and 42 in it, Shapes' painter not counted."""
    program = """
        import sys, engine_pretrain, main_pretrain
        ROOT, parts, current = sys.argv.pop(1), {"start": set(), "step": set(), "end": set()}, ["start"]

        def count(frame, event, argument):
            path, name = frame.f_code.co_filename, frame.f_code.co_qualname  # Python 3.11
            inside = path.startswith(ROOT) and not path.startswith((f"{ROOT}/.venv", f"{ROOT}/util/data/shapes.py"))
            if event == "call" and inside and not name.endswith(">") and name != "ShapesSource.load":
                parts[current[0]].add((path, name))

        def train_one_epoch(*args, **kwargs):
            current[0] = "step"
            stats = engine_pretrain.train_one_epoch(*args, **kwargs)
            current[0] = "end"
            return stats

        main_pretrain.train_one_epoch = train_one_epoch
        sys.setprofile(count)
        main_pretrain.main(sys.argv[1:])
        sys.setprofile(None)
        print(*sorted(parts["start"]), "in a step:", *sorted(parts["step"]), sep="\\n")
        print(len(parts["start"]), len(parts["step"]))
    """
    options = "--model mae_vit_micro_patch16 --input_size 16 --patch_size 4 --decoder_depth 1 --shapes_train 16"
    options += " --batch_size 8 --epochs 1 --num_workers 0 --vis_interval 0 --device cpu --max_steps 1 --output_dir"
    command = [sys.executable, "-c", textwrap.dedent(program), str(ROOT), *options.split(), str(tmp_path)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    start, step = (int(number) for number in shown.split()[-2:])
    assert 40 < start <= 70, shown
    assert 20 < step <= 42, shown


OURS = ("util", "export", "visualize", "benchmarks", "demo", "models_", "engine_", "main_", "predict", "hubconf")


@pytest.mark.parametrize("folder", ["tests", "tests/stress", "benchmarks", "demo"])
def test_what_is_imported_exists(folder):
    """Also in programs that no other test starts."""
    for path in (ROOT / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith(OURS):
                imported = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(imported, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")
