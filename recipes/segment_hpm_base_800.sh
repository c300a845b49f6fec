#!/usr/bin/env bash
# UPerNet on ADE20K from pretrain_hpm_base_800. DATA is the folder or archive of ADEChallengeData2016.
#
# model      vit_base_patch16
# batch      16
# lr         1e-4
# published  48.5 mIoU (official README)
# notes      MMSegmentation's configuration for MAE-B; HPM links to it and states no other. The official schedule
#            (80k or 160k steps) is not known.
source "$(dirname "$0")/_run.sh"

segment --model vit_base_patch16 --finetune "${CKPT:-$OUT/pretrain_hpm_base_800/checkpoint-last.pth}" "$@"
