#!/usr/bin/env bash
# Fine-tuning of pretrain_mae_base_800 on ImageNet-1K.
#
# model      vit_base_patch16
# batch      1024
# lr         2e-3
# published  83.3 top-1 (mmpretrain)
# hardware   no published wall time
# compute    1,281,167 images x 100 epochs x 52.6 GMAC = 6.74 EMAC
# notes      As in MAE's FINETUNE.md.
source "$(dirname "$0")/_run.sh"

finetune --model vit_base_patch16 --finetune "${CKPT:-$OUT/pretrain_mae_base_800/checkpoint-last.pth}" --epochs 100 \
    --layer_decay 0.65 "$@"
