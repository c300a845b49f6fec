#!/usr/bin/env bash
# Mask ratio ablation: 0.75 (default). ViT-B/16, 200 epochs, then fine-tuning.
#
# model      mae_vit_base_patch16_dec512d8b
# batch      2048, then 1024
# lr         1.2e-3, then 2e-3
# published  82.95 top-1 (the paper's mask ablation, second-hand; epochs not stated, 200 inferred)
# hardware   64 RTX 2080 Ti, about 2 days for the pre-training (author, issue 6 of the official repository)
# compute    1,281,167 images x 200 epochs x 67.9 GMAC = 17.4 EMAC; then 1,281,167 images x 100 epochs x 52.6 GMAC =
#            6.74 EMAC
# same as    pretrain_hpm_base_200, then finetune_hpm_base_200. This recipe writes to their folders: what they have
#            completed is not trained again.
# notes      Otherwise as in pretrain_hpm_base_200 and finetune_hpm_base_200.
source "$(dirname "$0")/_run.sh"

same_as=hpm_base_200 ablation --mask_ratio 0.75
