#!/usr/bin/env bash
# Linear probe of MAE, ViT-L/16, 1600 epochs, with MAE's recipe.
#
# model      vit_large_patch16
# batch      16384
# lr         6.4
# published  76.0 top-1 (MAE FINETUNE.md, PyTorch; 75.8 in the paper)
# hardware   no published wall time
# compute    1,281,167 images x 50 epochs x 61.6 GMAC = 3.94 EMAC
# notes      As in MAE's FINETUNE.md.
source "$(dirname "$0")/_run.sh"

linprobe_mae --model vit_large_patch16 --finetune "${CKPT:-$OUT/pretrain_mae_large_1600/checkpoint-last.pth}" \
    --epochs 50 "$@"
