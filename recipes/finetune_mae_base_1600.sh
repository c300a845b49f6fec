#!/usr/bin/env bash
# Fine-tuning of pretrain_mae_base_1600 on ImageNet-1K.
#
# model      vit_base_patch16
# batch      1024
# lr         2e-3
# published  83.6 top-1 (MAE README; 83.664, four seeds 83.57 +- 0.08)
# hardware   32 V100, about 7 h 11 min (MAE FINETUNE.md)
# compute    1,281,167 images x 100 epochs x 52.6 GMAC = 6.74 EMAC
# notes      As in MAE's FINETUNE.md.
source "$(dirname "$0")/_run.sh"

finetune --model vit_base_patch16 --finetune "${CKPT:-$OUT/pretrain_mae_base_1600/checkpoint-last.pth}" --epochs 100 \
    --layer_decay 0.65 "$@"
