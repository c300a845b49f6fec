#!/usr/bin/env bash
# Mask ablation: the easiest patches instead of the hardest. ViT-B/16, 200 epochs, then fine-tuning.
#
# model      mae_vit_base_patch16_dec512d8b
# batch      2048, then 1024
# lr         1.2e-3, then 2e-3
# published  82.36 top-1 (the paper's mask ablation, second-hand; epochs not stated, 200 inferred)
# notes      Not in the official code. That the schedule is the one of easy to hard is inferred. Otherwise as in
#            pretrain_hpm_base_200 and finetune_hpm_base_200.
source "$(dirname "$0")/_run.sh"

ablation --mask_strategy easiest
