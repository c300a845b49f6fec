#!/usr/bin/env bash
# Fine-tuning of pretrain_mae_large_1600 on ImageNet-1K.
#
# model      vit_large_patch16
# batch      1024
# lr         4e-3
# published  85.9 top-1 (MAE README; 85.952)
# hardware   32 V100, about 8 h 52 min (MAE FINETUNE.md)
# compute    1,281,167 images x 50 epochs x 184.5 GMAC = 11.8 EMAC
# notes      As in MAE's FINETUNE.md.
source "$(dirname "$0")/_run.sh"

finetune --model vit_large_patch16 --finetune "${CKPT:-$OUT/pretrain_mae_large_1600/checkpoint-last.pth}" \
    --epochs 50 --blr 1e-3 --layer_decay 0.75 --drop_path 0.2 "$@"
