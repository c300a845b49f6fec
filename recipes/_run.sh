# shellcheck shell=bash
# What all recipes share; they source it. From the environment:
#   DATA    ImageNet-1K: a folder with train/ and val/, list files, or tar archives    (required)
#   OUT     folder of all runs; a recipe's own is $OUT/NAME, after its file             (default ./output_dir)
#   NPROC   processes on this node                                                      (default: its GPUs, or 1)
#   CKPT    weights to fine-tune or evaluate          (default: what the pre-training recipe of the same name left)
#   NNODES, NODE_RANK, HEAD   number of nodes, number of this one, host:port of the first    (recipes/slurm.sh sets them)
#   TORCHRUN   further options of torchrun                                              (recipes/slurm.sh sets them)
#   DRY     1 prints the commands and runs nothing
# Options at the end of the command line are added to the recipe's, and win. Where a recipe runs two scripts, those
# after -- go to the second.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name=$(basename "$0" .sh)
: "${DATA:?set DATA to the folder or archive of ImageNet-1K}"
OUT=${OUT:-./output_dir}
gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true)
NPROC=${NPROC:-$((gpus > 0 ? gpus : 1))}
NNODES=${NNODES:-1}
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)}

read -ra torchrun <<<"${TORCHRUN:-}"

# A signal that a scheduler sends to every process of the job is for the training script: this shell waits for its end.
trap : TERM USR1

first=() second=()
for word in "$@"; do
    if [ "$word" = -- ] && [ -z "${beyond:-}" ]; then beyond=1; continue; fi
    if [ -z "${beyond:-}" ]; then first+=("$word"); else second+=("$word"); fi
done

# run SCRIPT OPTIONS...: on every process, with the data and this recipe's folder filled in
run() {
    local script=$1 launcher=("$python")
    shift
    if [ "$NNODES" -gt 1 ]; then
        launcher+=(-m torch.distributed.run "${torchrun[@]}" --nnodes "$NNODES" --node_rank "${NODE_RANK:?}"
            --nproc_per_node "$NPROC"
            --rdzv_backend c10d --rdzv_endpoint "${HEAD:?}" --rdzv_id "${SLURM_JOB_ID:-$name}")
    elif [ "$NPROC" -gt 1 ]; then
        launcher+=(-m torch.distributed.run "${torchrun[@]}" --standalone --nproc_per_node "$NPROC")
    fi
    if [ "${DRY:-}" = 1 ]; then
        echo "$script --data_path $DATA $*"
    else
        "${launcher[@]}" "$root/$script" --data_path "$DATA" "$@"
    fi
}
