#!/usr/bin/env bash
# Mask ratio ablation: 0.6. ViT-B/16, 200 epochs, then fine-tuning.
#
# model      mae_vit_base_patch16_dec512d8b
# batch      2048, then 1024
# lr         1.2e-3, then 2e-3
# published  not found
# notes      Otherwise as in pretrain_hpm_base_200 and finetune_hpm_base_200.
source "$(dirname "$0")/_run.sh"

ablation --mask_ratio 0.6
