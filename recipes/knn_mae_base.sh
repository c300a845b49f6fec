#!/usr/bin/env bash
# Weighted k-NN of MAE, ViT-B/16, 1600 epochs, with DINO's protocol.
#
# model      vit_base_patch16
# published  not found
# hardware   no published wall time
# compute    1,331,167 images x 17.6 GMAC = 0.0234 EMAC
# notes      Which k the paper quotes is not known; DINO quotes 20 (from memory). The official script cannot run.
source "$(dirname "$0")/_run.sh"

knn --model vit_base_patch16 --finetune "${CKPT:-$OUT/pretrain_mae_base_1600/checkpoint-last.pth}" "$@"
