"""Entry points of torch.hub. docs/eval.md has an example.

The modules of this project have common names (`util`), which the calling program may have too. They are imported with
its own out of the way, and are not left in `sys.modules`: `import util` finds there what it found before.
"""

import contextlib as _contextlib
import sys as _sys
from collections.abc import Iterator as _Iterator
from pathlib import Path as _Path

dependencies = ["torch", "torchvision", "timm", "numpy", "PIL", "safetensors", "tensorboard", "tqdm"]

_FOLDER = _Path(__file__).resolve().parent


@_contextlib.contextmanager
def _own_modules() -> _Iterator[None]:
    """Import from this folder only. Modules of the calling program with the same names are back afterwards."""
    names = {path.stem for path in _FOLDER.glob("*.py")} | {path.parent.name for path in _FOLDER.glob("*/__init__.py")}

    def loaded() -> list[str]:
        return [name for name in _sys.modules if name.split(".")[0] in names - {"hubconf"}]

    used = _sys.modules.get("util")
    if used is not None and _FOLDER in _Path(used.__file__ or "/").resolve().parents:
        yield  # the calling program uses this project by itself
        return
    theirs = {name: _sys.modules.pop(name) for name in loaded()}
    _sys.path.insert(0, str(_FOLDER))
    try:
        yield
    finally:
        _sys.path.remove(str(_FOLDER))
        for name in loaded():
            del _sys.modules[name]
        _sys.modules.update(theirs)


with _own_modules():
    from models_hpm import (  # noqa: F401
        mae_vit_base_patch16,
        mae_vit_huge_patch14,
        mae_vit_large_patch16,
        mae_vit_micro_patch16,
        mae_vit_small_patch16,
        mae_vit_tiny_patch16,
    )
    from models_load import load_classifier, load_encoder  # noqa: F401
    from models_vit import (  # noqa: F401
        vit_base_patch16,
        vit_huge_patch14,
        vit_large_patch16,
        vit_micro_patch16,
        vit_small_patch16,
        vit_tiny_patch16,
    )
