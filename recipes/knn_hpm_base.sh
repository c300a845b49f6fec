#!/usr/bin/env bash
# Weighted k-NN of HPM, ViT-B/16, by DINO's protocol.
#
# model      vit_base_patch16
# published  none found
# disagrees  which k the paper quotes is not known; DINO quotes 20 [M]. The official script cannot run.
source "$(dirname "$0")/_run.sh"

run main_knn.py --model vit_base_patch16 --finetune "${CKPT:-$OUT/pretrain_hpm_base_800/checkpoint-last.pth}" \
    --batch_size 128 --nb_knn 10 20 100 200 --temperature 0.07 \
    "${first[@]}"
