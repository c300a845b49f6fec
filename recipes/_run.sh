# shellcheck shell=bash
# Sourced by every recipe: environment, launcher, and the options that recipes share. Environment variables:
#   DATA    ImageNet-1K: a folder with train/ and val/, list files, or tar archives    (required)
#           segment_*: ADE20K, the folder or archive of ADEChallengeData2016
#   OUT     folder of all runs; a recipe writes to $OUT/NAME, NAME being its file       (default ./output_dir)
#   NPROC   processes on this node                                                      (default: number of GPUs, or 1)
#   CKPT    weights to fine-tune or evaluate          (default: checkpoint of the pre-training recipe of the same name)
#   NNODES, NODE_RANK, HEAD   number of nodes, rank of this node, host:port of the first node  (set by recipes/slurm.sh)
#   TORCHRUN   additional torchrun options                                              (set by recipes/slurm.sh)
#   DRY     1 prints the commands and runs nothing
# Options at the end of the command line override the recipe's. If a recipe runs two scripts, options after -- go to
# the second.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name=$(basename "$0" .sh)
: "${DATA:?set DATA to the folder or archive of ImageNet-1K (segment_*: of ADE20K)}"
OUT=${OUT:-./output_dir}
NNODES=${NNODES:-1}
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python)}
if [ "${DRY:-}" != 1 ]; then # PyTorch knows which GPUs this process may use
    NPROC=${NPROC:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
fi

read -ra torchrun <<<"${TORCHRUN:-}"

# Schedulers signal every process of a job. The training script handles the signal; this shell waits until it exits.
trap : TERM USR1

first=() second=()
for word in "$@"; do
    if [ "$word" = -- ] && [ -z "${separated:-}" ]; then separated=1; continue; fi
    if [ -z "${separated:-}" ]; then first+=("$word"); else second+=("$word"); fi
done

# run SCRIPT OPTIONS...: run the script on every process
run() {
    local script=$1 launcher=("$python")
    shift
    if [ "${DRY:-}" = 1 ]; then
        printf '%q ' "$script" --data_path "$DATA" "${@:1:$#-1}"
        printf '%q\n' "${@: -1}"
        return
    fi
    if [ "$NNODES" -gt 1 ]; then
        launcher+=(-m torch.distributed.run "${torchrun[@]}" --nnodes "$NNODES" --node_rank "${NODE_RANK:?}"
            --nproc_per_node "$NPROC"
            --rdzv_backend c10d --rdzv_endpoint "${HEAD:?}" --rdzv_id "${SLURM_JOB_ID:-$name}")
    elif [ "$NPROC" -gt 1 ]; then
        launcher+=(-m torch.distributed.run "${torchrun[@]}" --standalone --nproc_per_node "$NPROC")
    fi
    "${launcher[@]}" "$root/$script" --data_path "$DATA" "$@"
}

# Pre-training in HPM's settings. MAE in the same settings: add --no-learning_loss.
pretrain_hpm() {
    run main_pretrain.py --batch_size 64 --global_batch 2048 --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 \
        --clip_grad 5 --mask_ratio 0.75 --output_dir "$OUT/$name" "$@"
}

# Pre-training of MAE in MAE's settings.
pretrain_mae() {
    run main_pretrain.py --no-learning_loss --target norm_pixel --global_batch 4096 --warmup_epochs 40 --blr 1.5e-4 \
        --weight_decay 0.05 --clip_grad 0 --mask_ratio 0.75 --output_dir "$OUT/$name" "$@"
}

# Fine-tuning in HPM's settings, which are UM-MAE's.
finetune() {
    run main_finetune.py --batch_size 32 --global_batch 1024 --warmup_epochs 5 --blr 5e-4 --layer_decay 0.8 \
        --weight_decay 0.05 --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --smoothing 0.1 \
        --output_dir "$OUT/$name" "$@"
}

# [same_as=NAME] ablation OPTIONS...: pre-train ViT-B for 200 epochs in HPM's settings with these options, then
# fine-tune. Where pretrain_NAME.sh and finetune_NAME.sh are the same two runs, it uses their folders.
ablation() {
    local pretrained=$OUT/$name/pretrain finetuned=$OUT/$name/finetune word
    for word in "${first[@]}"; do
        case $word in
            --output_dir* | --experiment*)
                echo "$name: the fine-tuning would not find the weights in another folder: set OUT instead of $word" >&2
                exit 2 ;;
        esac
    done
    if [ -n "${same_as:-}" ]; then
        pretrained=$OUT/pretrain_$same_as finetuned=$OUT/finetune_$same_as
    fi
    pretrain_hpm --model mae_vit_base_patch16_dec512d8b --epochs 200 --output_dir "$pretrained" "$@" "${first[@]}"
    finetune --finetune "$pretrained/checkpoint-last.pth" --epochs 100 --output_dir "$finetuned" "${second[@]}"
}

linprobe_hpm() {
    run main_linprobe.py --batch_size 256 --global_batch 2048 --epochs 100 --warmup_epochs 10 --optimizer sgd \
        --blr 1e-3 --weight_decay 0 --output_dir "$OUT/$name" "$@"
}

linprobe_mae() {
    run main_linprobe.py --batch_size 512 --global_batch 16384 --warmup_epochs 10 --optimizer lars --blr 0.1 \
        --weight_decay 0 --output_dir "$OUT/$name" "$@"
}

knn() {
    run main_knn.py --batch_size 128 --nb_knn 10 20 100 200 --temperature 0.07 "$@"
}

# UPerNet in MMSegmentation's settings; what depends on the size (lr, layer decay, drop path) is the script's default.
segment() {
    run main_segment.py --head upernet --global_batch 16 --steps 160000 --warmup_steps 1500 --crop 512 --stride 341 \
        --weight_decay 0.05 --output_dir "$OUT/$name" "$@"
}
