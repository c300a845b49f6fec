#!/usr/bin/env bash
# Target ablation: features of CLIP ViT-B/16. ViT-B/16, 200 epochs, then fine-tuning.
#
# model      mae_vit_base_patch16_dec512d8b
# batch      2048, then 1024
# lr         1.2e-3, then 2e-3
# published  not found
# hardware   no published wall time
# compute    1,281,167 images x 200 epochs x 85.4 GMAC = 21.9 EMAC; then 1,281,167 images x 100 epochs x 52.6 GMAC =
#            6.74 EMAC
# notes      CLIP_PATH is the file of its weights; without it, timm downloads them. The official code feeds CLIP
#            images normalised with ImageNet's mean and std; here CLIP gets its own. Otherwise as in
#            pretrain_hpm_base_200 and finetune_hpm_base_200.
source "$(dirname "$0")/_run.sh"

ablation --target clip --clip_path "${CLIP_PATH:-none}"
