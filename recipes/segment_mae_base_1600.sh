#!/usr/bin/env bash
# UPerNet on ADE20K from pretrain_mae_base_1600. DATA is the folder or archive of ADEChallengeData2016.
#
# model      vit_base_patch16
# batch      16
# lr         1e-4
# published  48.1 mIoU (official README; 48.13 MMSegmentation, 48.15 and 48.20 other runs)
# notes      MMSegmentation's configuration for MAE-B; HPM links to it and states no other. The official schedule
#            (80k or 160k steps) is not known.
source "$(dirname "$0")/_run.sh"

segment --model vit_base_patch16 --finetune "${CKPT:-$OUT/pretrain_mae_base_1600/checkpoint-last.pth}" "$@"
