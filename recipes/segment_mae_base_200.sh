#!/usr/bin/env bash
# UPerNet on ADE20K from pretrain_mae_base_200_pixel. DATA is the folder or archive of ADEChallengeData2016.
#
# model      vit_base_patch16
# batch      16
# lr         1e-4
# published  40.5 mIoU (official README; may be COCO box AP: see README.md)
# hardware   no published wall time
# compute    160,000 steps x 16 images x 1819.8 GMAC = 4.66 EMAC
# notes      As in MMSegmentation's configuration of MAE-B, which HPM's README links to. The number of steps that HPM
#            used (80k or 160k) is not known.
source "$(dirname "$0")/_run.sh"

segment --model vit_base_patch16 --finetune "${CKPT:-$OUT/pretrain_mae_base_200_pixel/checkpoint-last.pth}" "$@"
