#!/usr/bin/env bash
# Set up .venv with the packages this code needs. A second call returns immediately unless the requirements changed.
#   bash scripts/setup.sh          to train
#   bash scripts/setup.sh dev      to train and to run the tests
# PYTHON is the interpreter to use (3.10 or newer; default python3).
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=requirements.txt
[ "${1:-}" = dev ] && requirements=requirements-dev.txt
stamp=.venv/.installed-$requirements
wanted=$(cat requirements.txt "$requirements" | cksum)
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "setup.sh: $("$python" --version) is too old; use 3.10 or newer: PYTHON=python3.11 bash scripts/setup.sh" >&2
    exit 2
}
echo "Setting up .venv (about 6 GB with PyTorch's CUDA libraries; takes a minute or more)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r "$requirements"
# As pip would, but on all cores. Some packages hold files that do not compile.
.venv/bin/python -m compileall -qq -j 0 .venv/lib || true
.venv/bin/python -c 'import torch, torchvision, timm; print("torch", torch.__version__, "torchvision", torchvision.__version__, "timm", timm.__version__)'
echo "$wanted" > "$stamp"
