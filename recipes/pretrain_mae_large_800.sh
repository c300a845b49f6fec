#!/usr/bin/env bash
# MAE pre-training on normalised pixels in MAE's settings, ViT-L/16, 800 epochs.
#
# model      mae_vit_large_patch16_dec512d8b
# batch      4096
# lr         2.4e-3
# published  fine-tuned 85.5 top-1 (MAE PRETRAIN.md; 85.4 in its paper)
# hardware   64 V100, about 42 h (MAE PRETRAIN.md)
# compute    1,281,167 images x 800 epochs x 62.1 GMAC = 63.6 EMAC
# notes      HPM's README gives 85.1 for its ViT-L baseline. This equals MAE on raw pixels after 1600 epochs (from
#            memory). MAE's README gives 85.9 on normalised pixels, above HPM's 85.8.
source "$(dirname "$0")/_run.sh"

pretrain_mae --model mae_vit_large_patch16_dec512d8b --epochs 800 --batch_size 32 "$@"
