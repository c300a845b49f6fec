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
# Run a recipe under SLURM on any number of nodes, and requeue it until it is complete:
#   DATA=/imagenet sbatch --nodes 4 recipes/slurm.sh recipes/pretrain_hpm_base_800.sh [OPTIONS...]
# Ten minutes before the time limit SLURM signals this script (--signal, B: this shell only), and this script signals the
# job steps. The training scripts save mid-epoch and exit. util/run/status.py then reads the checkpoint: exit status 75
# means that a signal stopped an incomplete run, and the job is requeued. A run that fails otherwise is not requeued, nor
# is a job that was cancelled.
#   GRACE   seconds that torchrun gives its processes to save (default 300; --signal must leave more than that)
set -uo pipefail

: "${1:?give a recipe: sbatch recipes/slurm.sh recipes/NAME.sh}"
root=$(cd "${SLURM_SUBMIT_DIR:-.}" && pwd)
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)}
nodes=${SLURM_JOB_NUM_NODES:-1}

# torchrun forwards only the signals listed in --signals-to-handle, and kills after --shutdown-timeout (30 s). Releases
# without these options (2.6 has neither) forward SIGTERM and kill after 30 s.
signal=TERM
torchrun=()
known=$("$python" -m torch.distributed.run --help)
if [[ $known == *--signals-to-handle* ]]; then
    signal=USR1
    torchrun+=(--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1)
fi
[[ $known == *--shutdown-timeout* ]] && torchrun+=(--shutdown-timeout="${GRACE:-300}")

# The task of each node starts the recipe, and _run.sh reads these variables.
HEAD=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" | head -n 1):${PORT:-29500}
export HEAD NNODES=$nodes TORCHRUN="${torchrun[*]}"

# Output folders of the recipe's scripts, in order. If an option is repeated, the last one counts.
folders=()
while IFS= read -r command; do
    eval "words=($command)" # DRY=1 prints quoted words
    folder='' name=''
    for i in "${!words[@]}"; do
        case ${words[i]} in
            --output_dir) folder=${words[i + 1]} ;;
            --output_dir=*) folder=${words[i]#*=} ;;
            --experiment) name=/${words[i + 1]} ;;
            --experiment=*) name=/${words[i]#*=} ;;
        esac
    done
    [ -n "$folder" ] && folders+=("$folder$name")
done < <(DRY=1 NNODES=1 bash "$@")
# The checkpoints there: names, sizes and times.
saved() { for folder in ${folders[@]+"${folders[@]}"}; do stat -c '%n %s %y' "$folder/checkpoint-last.pth" 2>/dev/null; done; }
before=$(saved)

signalled=
signal_steps() {
    signalled=1
    echo "slurm.sh: time limit is near, sending SIG$signal to the job steps"
    scancel --signal="$signal" "$SLURM_JOB_ID"
}
trap signal_steps USR1 TERM

# From release 22.05 on, srun does not take --cpus-per-task from the job: everything would run on one core.
# shellcheck disable=SC2016  # each task expands its own SLURM_NODEID
srun ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=0 bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' _ "$@" &
step=$!
while true; do # a signal interrupts `wait` while the step is still running
    wait "$step"
    status=$?
    kill -0 "$step" 2>/dev/null || break
done
[ "$status" = 0 ] && exit 0

PYTHONPATH="$root" "$python" -m util.run.status "${folders[@]}"
left=$?
# Requeue what a signal stopped: through this script, or through another way, where this job has saved the run. A run that
# fails before it saves still has the checkpoint of an earlier stop. A job that is not running is being cancelled.
state=$(scontrol show job "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z_]*')
if [ -n "$state" ] && [ "$state" != JobState=RUNNING ]; then
    echo "slurm.sh: not requeued: $state"
elif { [ "$left" = 75 ] && [ "$(saved)" != "$before" ]; } || { [[ $left = 75 || $left = 1 ]] && [ -n "$signalled" ]; }; then
    echo "slurm.sh: requeued, the run will resume"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
echo "slurm.sh: exited with status $status, not requeued (util/run/status.py: $left)"
exit "$status"
