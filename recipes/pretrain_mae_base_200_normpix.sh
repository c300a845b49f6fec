#!/usr/bin/env bash
# MAE pre-training on normalised pixels in HPM's settings, ViT-B/16, 200 epochs: a like-for-like baseline of HPM.
#
# model      mae_vit_base_patch16_dec512d8b
# batch      2048
# lr         1.2e-3
# published  not found in exactly these settings (82.88, UM-MAE: see pretrain_mae_base_200)
# hardware   no published wall time
# compute    1,281,167 images x 200 epochs x 29.2 GMAC = 7.47 EMAC
# notes      HPM's README gives 82.2 for MAE after 200 epochs and does not state the target. There is a recipe for
#            each. How much HPM gains over normalised pixels is an open question.
source "$(dirname "$0")/_run.sh"

pretrain_hpm --model mae_vit_base_patch16_dec512d8b --epochs 200 --batch_size 64 --no-learning_loss \
    --target norm_pixel "$@"
