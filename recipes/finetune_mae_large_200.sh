#!/usr/bin/env bash
# Fine-tuning of pretrain_mae_large_200 on ImageNet-1K.
#
# model      vit_large_patch16
# batch      1024
# rate       4e-3
# published  none found for this length and target (83.3 [M] on raw pixels)
# disagrees  none: MAE's FINETUNE.md.
source "$(dirname "$0")/_run.sh"

run main_finetune.py --model vit_large_patch16 --finetune "${CKPT:-$OUT/pretrain_mae_large_200/checkpoint-last.pth}" \
    --batch_size 32 --global_batch 1024 --epochs 50 --warmup_epochs 5 --blr 1e-3 \
    --layer_decay 0.75 --drop_path 0.2 --reprob 0.25 --mixup 0.8 --cutmix 1.0 \
    --smoothing 0.1 --weight_decay 0.05 --output_dir "$OUT/$name" \
    "${first[@]}"
