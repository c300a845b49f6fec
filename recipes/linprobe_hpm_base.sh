#!/usr/bin/env bash
# Linear probe of HPM, ViT-B/16.
#
# model      vit_base_patch16
# batch      2048
# rate       8e-3
# published  none found
# disagrees  the official script leaves 848 of the 50,000 validation images out and ignores --weight_decay; its
#            author found LARS to give about 10 % at this batch [V, his issue 5]. Taken: SGD as he has it, on all
#            images.
source "$(dirname "$0")/_run.sh"

run main_linprobe.py --model vit_base_patch16 --finetune "${CKPT:-$OUT/pretrain_hpm_base_800/checkpoint-last.pth}" \
    --batch_size 256 --global_batch 2048 --epochs 100 --warmup_epochs 10 --optimizer sgd \
    --blr 1e-3 --weight_decay 0 --output_dir "$OUT/$name" \
    "${first[@]}"
