#!/usr/bin/env bash
# Fine-tuning of pretrain_mae_base_200 on ImageNet-1K.
#
# model      vit_base_patch16
# batch      1024
# lr         2e-3
# published  82.88 top-1 (UM-MAE, with a decoder of 2 blocks, batch 4096 and 10 warm-up epochs); 82.2 in HPM's README
#            does not state the target
# hardware   no published wall time
# compute    1,281,167 images x 100 epochs x 52.6 GMAC = 6.74 EMAC
# notes      Layer decay: 0.8 as in HPM and UM-MAE; MAE's own recipe uses 0.65.
source "$(dirname "$0")/_run.sh"

finetune --model vit_base_patch16 --finetune "${CKPT:-$OUT/pretrain_mae_base_200/checkpoint-last.pth}" --epochs 100 \
    "$@"
