#!/usr/bin/env bash
# Mask ablation: half of the masked patches are the hardest, from start to end. ViT-B/16, 200 epochs, then fine-
# tuning.
#
# model      mae_vit_base_patch16_dec512d8b
# batch      2048, then 1024
# lr         1.2e-3, then 2e-3
# published  not found
# hardware   no published wall time
# compute    1,281,167 images x 200 epochs x 67.9 GMAC = 17.4 EMAC; then 1,281,167 images x 100 epochs x 52.6 GMAC =
#            6.74 EMAC
# definition ours: the share chosen by score is 0.5 in every epoch.
# notes      Not in the official code. Otherwise as in pretrain_hpm_base_200 and finetune_hpm_base_200.
source "$(dirname "$0")/_run.sh"

ablation --mask_strategy constant --alpha_T 0.5
