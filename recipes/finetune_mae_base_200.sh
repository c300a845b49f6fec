#!/usr/bin/env bash
# Fine-tuning of pretrain_mae_base_200 on ImageNet-1K.
#
# model      vit_base_patch16
# batch      1024
# rate       2e-3
# published  82.88 top-1 [V] UM-MAE, with a decoder of 2 blocks, batch 4096 and 10 epochs of warm-up; 82.2 [V] in
#            HPM's README does not say which pixels
# disagrees  layer decay: 0.8 as HPM and UM-MAE; MAE's own recipe has 0.65.
source "$(dirname "$0")/_run.sh"

run main_finetune.py --model vit_base_patch16 --finetune "${CKPT:-$OUT/pretrain_mae_base_200/checkpoint-last.pth}" \
    --batch_size 32 --global_batch 1024 --epochs 100 --warmup_epochs 5 --blr 5e-4 \
    --layer_decay 0.8 --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 \
    --smoothing 0.1 --weight_decay 0.05 --output_dir "$OUT/$name" \
    "${first[@]}"
