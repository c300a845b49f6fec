#!/usr/bin/env bash
# Check this project on a GPU within ten minutes: the tests that need one (golden values, runs in bf16, steps without
# host synchronisation), the time of a step of MAE, HPM and seven cheaper variants, compiled, in bf16, and the input pipeline.
#   bash scripts/gpu_check.sh [gpu_check.md]
# The result is one Markdown file. Without a GPU the script says so and ends with status 0. What fails, or does not fit in
# the time, is named in the file, and the status is 1.
# PYTHON is an interpreter, used as it is if it has PyTorch and else to set up .venv (the default); BATCH is the batch size
# (default 256, for 80 GB), LIMIT the seconds after which the remaining checks are skipped (default 540, without set-up).
set -euo pipefail
report=${1:-} # paths are as seen from where it was called
[[ -z $report || $report = /* ]] || report=$PWD/$report
[[ ${PYTHON:-} != */* || $PYTHON = /* ]] || PYTHON=$PWD/$PYTHON
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
if [ -z "${PYTHON:-}" ] || ! "$python" -c 'import torch' 2> /dev/null; then
    bash scripts/setup.sh dev
    python=.venv/bin/python
fi
report=${report:-gpu_check.md}
"$python" -c 'import torch' # a broken installation is an error, not a missing GPU
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check.sh: PyTorch finds no CUDA device; nothing was checked"
    exit 0
fi

: > "$report" # fails now if it cannot be written
SECONDS=0
limit=${LIMIT:-540} # a check that does not end by itself takes ten more
logs=$(mktemp -d)
checks=""
failed=0
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name() + ", PyTorch " + torch.__version__)')

# table TITLE FILE: the table of a benchmark, under its title; of one that was stopped, what it had measured
table() {
    [ -e "$2" ] || return 0
    echo; echo "## $1"; echo
    grep '^|' "$2" || grep -E '^round|: ready after' "$2" || true
}

# The result so far. It is written after every check, for when this script is stopped.
write_report() {
    echo "# GPU check"
    echo
    echo "$device"
    echo
    printf '| check | result | seconds |\n| --- | --- | ---: |\n%s' "$checks"
    table "Steps of ViT-B" "$logs/base.log"
    table "Steps of ViT-L" "$logs/large.log"
    table "Steps of ViT-B, other methods" "$logs/base-others.log"
    table "Steps of ViT-L, other methods" "$logs/large-others.log"
    echo; echo "## Input pipeline"; echo
    cat "$logs/data.log" 2>/dev/null || true
}

# check NAME FILE COMMAND...: run it in the time that is left, keep its output in FILE, add a row to the table
check() {
    local name=$1 file=$logs/$2 start=$SECONDS left=$((limit - SECONDS)) status=0 result=passed
    shift 2
    if [ "$left" -lt 30 ]; then
        result="skipped: out of time"
        failed=1
    else
        echo; echo "== $name"
        timeout --kill-after 10 "$left" "$@" 2>&1 | tee "$file" || status=$?
        case $status in
            0) ;;
            124 | 137) result="stopped: out of time" ;;
            *) result="failed with status $status" ;;
        esac
        [ "$status" -eq 0 ] || failed=1
    fi
    checks+="| $name | $result | $((SECONDS - start)) |"$'\n'
    write_report > "$report"
}

steps=("$python" -m benchmarks.step --precision bf16 --compile yes --batch_size "${BATCH:-256}" --repeats 3 --steps 5 --memory)
workers=$(nproc)
check "tests that need a GPU" tests.log "$python" -m pytest -q -m gpu $(grep -l "mark\.gpu" tests/test_*.py)
base=("${steps[@]}" --model mae_vit_base_patch16 --method mae hpm)
large=("${steps[@]}" --model mae_vit_large_patch16 --method mae hpm)
others=(predictor predictor_2 sparse sparse_2 loss)
check "steps of ViT-B" base.log "${base[@]}" sparse_1 predictor_1
check "steps of ViT-L" large.log "${large[@]}" sparse_1 predictor_1
check "input pipeline" data.log "$python" -m benchmarks.data --images 512 --batch_size 8 \
    --workers 0 "$((workers < 16 ? workers : 16))" --repeats 3
check "steps of ViT-B, other methods" base-others.log "${base[@]}" "${others[@]}"
check "steps of ViT-L, other methods" large-others.log "${large[@]}" "${others[@]}"

echo; cat "$report"
echo; echo "Written to $report; full logs are in $logs"
exit "$failed"
