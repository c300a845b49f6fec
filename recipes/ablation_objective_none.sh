#!/usr/bin/env bash
# Objective ablation: no predictor and no mining, which is MAE in HPM's settings. ViT-B/16, 200 epochs, then fine-
# tuning.
#
# model      mae_vit_base_patch16_dec512d8b
# batch      2048, then 1024
# lr         1.2e-3, then 2e-3
# published  82.2 top-1 (official README; target not stated)
# hardware   no published wall time
# compute    1,281,167 images x 200 epochs x 29.2 GMAC = 7.47 EMAC; then 1,281,167 images x 100 epochs x 52.6 GMAC =
#            6.74 EMAC
# same as    pretrain_mae_base_200_pixel, then finetune_mae_base_200_pixel. This recipe writes to their folders: what
#            they have completed is not trained again.
# notes      Otherwise as in pretrain_hpm_base_200 and finetune_hpm_base_200.
source "$(dirname "$0")/_run.sh"

same_as=mae_base_200_pixel ablation --no-learning_loss
