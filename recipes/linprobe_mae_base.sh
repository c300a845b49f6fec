#!/usr/bin/env bash
# Linear probe of MAE, ViT-B/16, 1600 epochs, with MAE's recipe.
#
# model      vit_base_patch16
# batch      16384
# lr         6.4
# published  67.8 top-1 (MAE FINETUNE.md, PyTorch; 68.0 in the paper)
# hardware   32 V100, about 2 h 20 min (MAE FINETUNE.md)
# compute    1,281,167 images x 90 epochs x 17.6 GMAC = 2.03 EMAC
# notes      As in MAE's FINETUNE.md.
source "$(dirname "$0")/_run.sh"

linprobe_mae --model vit_base_patch16 --finetune "${CKPT:-$OUT/pretrain_mae_base_1600/checkpoint-last.pth}" \
    --epochs 90 "$@"
