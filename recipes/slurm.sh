#!/usr/bin/env bash
#SBATCH --job-name=hpm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH --signal=B:USR1@600
# A recipe under SLURM, on as many nodes as asked for, started again until it is done:
#   DATA=/imagenet sbatch --nodes 4 recipes/slurm.sh recipes/pretrain_hpm_base_800.sh [OPTIONS...]
# Ten minutes before the time limit SLURM tells this script (--signal, B: this shell alone), and this script tells the
# job's steps. The training scripts save inside the epoch and end; what they saved then says whether to requeue:
# util/run/status.py answers 75 if a signal ended a run that is not done. A run that fails otherwise stays ended.
#   GRACE   seconds that torchrun gives its processes to save (default 300; --signal must leave more than that)
set -uo pipefail

: "${1:?give a recipe: sbatch recipes/slurm.sh recipes/NAME.sh}"
root=$(cd "${SLURM_SUBMIT_DIR:-.}" && pwd)
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)}
nodes=${SLURM_JOB_NUM_NODES:-1}

# torchrun passes on only the signals it is told of, and kills after half a minute unless it is told otherwise. Releases
# that know neither option (2.6 has none) pass on SIGTERM, and have that half minute.
signal=TERM
torchrun=()
known=$("$python" -m torch.distributed.run --help)
if [[ $known == *--signals-to-handle* ]]; then
    signal=USR1
    torchrun+=(--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1)
fi
[[ $known == *--shutdown-timeout* ]] && torchrun+=(--shutdown-timeout="${GRACE:-300}")

# Each node's task starts the recipe; _run.sh reads these.
HEAD=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" | head -n 1):${PORT:-29500}
export HEAD NNODES=$nodes TORCHRUN="${torchrun[*]}"

told=
tell() {
    told=1
    echo "slurm.sh: time is nearly up, SIG$signal to the steps"
    scancel --signal="$signal" "$SLURM_JOB_ID"
}
trap tell USR1 TERM

# shellcheck disable=SC2016  # SLURM_NODEID is each task's own
srun --kill-on-bad-exit=0 bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' _ "$@" &
step=$!
while true; do # a signal ends `wait` before the step has ended
    wait "$step"
    status=$?
    kill -0 "$step" 2>/dev/null || break
done
[ "$status" = 0 ] && exit 0

# The folders that the recipe's scripts write to, in their order; of options given twice the last one holds.
mapfile -t folders < <(DRY=1 NNODES=1 bash "$@" | awk '{
    folder = name = ""
    for (i = 1; i < NF; i++) { if ($i == "--output_dir") folder = $(i + 1); if ($i == "--experiment") name = "/" $(i + 1) }
    if (folder != "") print folder name }')
PYTHONPATH="$root" "$python" -m util.run.status "${folders[@]}"
left=$?
if [ "$left" = 75 ] || { [ "$left" = 1 ] && [ -n "$told" ]; }; then
    echo "slurm.sh: requeued, to go on where it stopped"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
echo "slurm.sh: ended with status $status, not requeued (util/run/status.py: $left)"
exit "$status"
