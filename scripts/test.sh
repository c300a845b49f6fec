#!/usr/bin/env bash
# Set up .venv and run the tests. Options go to pytest, for example: bash scripts/test.sh -k resume
# JOBS is the number of test processes (default 2; many tests start two processes of their own).
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
exec .venv/bin/python -m pytest -n "${JOBS:-2}" --dist loadgroup "$@"
