#!/usr/bin/env bash
# Objective ablation: no predictor and no mining, which is MAE in HPM's settings. ViT-B/16, 200 epochs, then fine-
# tuning.
#
# model      mae_vit_base_patch16_dec512d8b
# batch      2048, then 1024
# lr         1.2e-3, then 2e-3
# published  82.2 top-1 (official README)
# notes      Otherwise as in pretrain_hpm_base_200 and finetune_hpm_base_200.
source "$(dirname "$0")/_run.sh"

ablation --no-learning_loss
