#!/usr/bin/env bash
# Linear probe of MAE, ViT-L/16, by its own recipe.
#
# model      vit_large_patch16
# batch      16384
# rate       6.4
# published  76.0 top-1 [V] MAE FINETUNE.md (PyTorch; 75.8 in the paper)
# disagrees  none: MAE's FINETUNE.md.
source "$(dirname "$0")/_run.sh"

run main_linprobe.py --model vit_large_patch16 --finetune "${CKPT:-$OUT/pretrain_mae_large_1600/checkpoint-last.pth}" \
    --batch_size 512 --global_batch 16384 --epochs 50 --warmup_epochs 10 --optimizer lars \
    --blr 0.1 --weight_decay 0 --output_dir "$OUT/$name" \
    "${first[@]}"
