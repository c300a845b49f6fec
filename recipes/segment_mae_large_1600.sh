#!/usr/bin/env bash
# UPerNet on ADE20K from pretrain_mae_large_1600. DATA is the folder or archive of ADEChallengeData2016.
#
# model      vit_large_patch16
# batch      16
# lr         9e-5
# published  53.6 mIoU (official README)
# hardware   no published wall time
# compute    160,000 steps x 16 images x 3745.7 GMAC = 9.59 EMAC
# notes      MMSegmentation has no configuration of MAE-L: lr, layer decay 0.75 and drop path 0.2 are ColorMAE's.
source "$(dirname "$0")/_run.sh"

segment --model vit_large_patch16 --finetune "${CKPT:-$OUT/pretrain_mae_large_1600/checkpoint-last.pth}" "$@"
