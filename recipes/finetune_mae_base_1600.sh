#!/usr/bin/env bash
# Fine-tuning of pretrain_mae_base_1600 on ImageNet-1K.
#
# model      vit_base_patch16
# batch      1024
# rate       2e-3
# published  83.6 top-1 [V] MAE README (83.664; four seeds 83.57 +- 0.08)
# disagrees  none: MAE's FINETUNE.md.
source "$(dirname "$0")/_run.sh"

run main_finetune.py --model vit_base_patch16 --finetune "${CKPT:-$OUT/pretrain_mae_base_1600/checkpoint-last.pth}" \
    --batch_size 32 --global_batch 1024 --epochs 100 --warmup_epochs 5 --blr 5e-4 \
    --layer_decay 0.65 --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 \
    --smoothing 0.1 --weight_decay 0.05 --output_dir "$OUT/$name" \
    "${first[@]}"
