#!/usr/bin/env bash
# Check this project on a GPU in less than ten minutes: the tests that need one (golden values, runs in bf16, steps
# without host synchronisation), the input pipeline, and the time of a step of every method, compiled, in bf16.
#   bash scripts/gpu_check.sh [gpu_check.md]
# The result is one Markdown file. Without a GPU the script says so and ends with status 0.
# BATCH is the batch size (default 256), LIMIT the time in seconds after which the remaining checks are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev
python=.venv/bin/python
report=${1:-gpu_check.md}
if ! $python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check.sh: PyTorch finds no CUDA device; nothing was checked"
    exit 0
fi

limit=${LIMIT:-580}
logs=$(mktemp -d)
checks=""
failed=0

# check NAME FILE COMMAND...: run it in the time that is left, keep its output in FILE, add a row to the table
check() {
    local name=$1 file=$logs/$2 start=$SECONDS left=$((limit - SECONDS)) status=0 result=passed
    shift 2
    if [ "$left" -lt 30 ]; then
        checks+="| $name | skipped: out of time | 0 |"$'\n'
        return
    fi
    echo; echo "== $name"
    timeout "$left" "$@" 2>&1 | tee "$file" || status=$?
    if [ "$status" -eq 124 ]; then
        result="stopped: out of time"
    elif [ "$status" -ne 0 ]; then
        result="failed with status $status"
        failed=1
    fi
    checks+="| $name | $result | $((SECONDS - start)) |"$'\n'
}

steps="$python -m benchmarks.step --precision bf16 --compile yes --batch_size ${BATCH:-256} --repeats 3 --steps 5 --memory"
all="mae hpm predictor predictor_2 sparse sparse_2 loss"
check "tests that need a GPU" tests.log $python -m pytest -q -m gpu
check "input pipeline" data.log $python -m benchmarks.data --images 512 --workers 0 "$(nproc)" --repeats 3
check "steps of ViT-B" base.log $steps --model mae_vit_base_patch16 --method $all
check "steps of ViT-L" large.log $steps --model mae_vit_large_patch16 --method mae hpm sparse_2 loss
check "steps of ViT-L, other methods" more.log $steps --model mae_vit_large_patch16 --method mae predictor predictor_2 sparse

# rows FILE...: the table rows in their output, each once, whatever the width of the columns
rows() {
    cat "$@" 2>/dev/null | grep '^|' | sed -E 's/ +/ /g; s/-+/-/g' | awk '!seen[$0]++' || true
}
{
    echo "# GPU check"
    echo
    $python -c 'import torch; print(torch.cuda.get_device_name() + ", PyTorch " + torch.__version__)'
    echo
    printf '| check | result | seconds |\n| --- | --- | ---: |\n%s' "$checks"
    echo; echo "## Steps"; echo
    rows "$logs/base.log" "$logs/large.log" "$logs/more.log"
    echo; echo "## Input pipeline"; echo
    cat "$logs/data.log" 2>/dev/null || true
} > "$report"
echo; cat "$report"
echo; echo "Written to $report; full logs are in $logs"
exit "$failed"
