#!/usr/bin/env bash
# MAE pre-training on raw pixels in HPM's settings, ViT-L/16, 800 epochs: a like-for-like baseline of HPM.
#
# model      mae_vit_large_patch16_dec512d8b
# batch      2048
# lr         1.2e-3
# published  not found for these settings (84.9 in MAE's, from memory)
# hardware   no published wall time
# compute    1,281,167 images x 800 epochs x 62.1 GMAC = 63.6 EMAC
# notes      HPM's README has no MAE row at 800 epochs. This recipe is the baseline of pretrain_hpm_large_800 at the
#            same length and target.
source "$(dirname "$0")/_run.sh"

pretrain_hpm --model mae_vit_large_patch16_dec512d8b --epochs 800 --batch_size 32 --no-learning_loss --target pixel \
    "$@"
