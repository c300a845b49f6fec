#!/usr/bin/env bash
# Set up .venv and run the tests; options go to pytest, for example: bash scripts/test.sh -k resume
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev
.venv/bin/ruff format --check .
.venv/bin/ruff check .
exec .venv/bin/python -m pytest "$@"
