#!/usr/bin/env bash
# Linear probe of HPM, ViT-B/16, 800 epochs, with HPM's recipe.
#
# model      vit_base_patch16
# batch      2048
# lr         8e-3
# published  not found
# hardware   no published wall time
# compute    1,281,167 images x 100 epochs x 17.6 GMAC = 2.25 EMAC
# notes      The official script drops 848 of the 50,000 validation images and ignores --weight_decay. Its author
#            found that LARS gives about 10 % top-1 at this batch (issue 5 of the official repository). This recipe
#            uses his SGD settings and evaluates all images.
source "$(dirname "$0")/_run.sh"

linprobe_hpm --model vit_base_patch16 --finetune "${CKPT:-$OUT/pretrain_hpm_base_800/checkpoint-last.pth}" "$@"
