#!/usr/bin/env bash
# Weighted k-NN of MAE, ViT-L/16, 1600 epochs, with DINO's protocol.
#
# model      vit_large_patch16
# published  not found
# hardware   no published wall time
# compute    1,331,167 images x 61.6 GMAC = 0.0819 EMAC
# notes      Which k the paper quotes is not known; DINO quotes 20 (from memory). The official script cannot run.
source "$(dirname "$0")/_run.sh"

knn --model vit_large_patch16 --finetune "${CKPT:-$OUT/pretrain_mae_large_1600/checkpoint-last.pth}" "$@"
