#!/usr/bin/env bash
# Fine-tuning of pretrain_mae_large_800 on ImageNet-1K.
#
# model      vit_large_patch16
# batch      1024
# lr         4e-3
# published  85.5 top-1 (MAE PRETRAIN.md; 85.4 in its paper)
# hardware   no published wall time
# compute    1,281,167 images x 50 epochs x 184.5 GMAC = 11.8 EMAC
# notes      As in MAE's FINETUNE.md.
source "$(dirname "$0")/_run.sh"

finetune --model vit_large_patch16 --finetune "${CKPT:-$OUT/pretrain_mae_large_800/checkpoint-last.pth}" --epochs 50 \
    --blr 1e-3 --layer_decay 0.75 --drop_path 0.2 "$@"
