#!/usr/bin/env bash
# Target ablation: features of the EMA teacher. ViT-B/16, 200 epochs, then fine-tuned.
#
# model      mae_vit_base_patch16_dec512d8b
# batch      2048, then 1024
# rate       1.2e-3, then 2e-3
# published  none found
# disagrees  the official code cannot run this one (it loads CLIP from a file called none). as in
#            pretrain_hpm_base_200 and finetune_hpm_base_200.
source "$(dirname "$0")/_run.sh"

run main_pretrain.py --model mae_vit_base_patch16_dec512d8b --batch_size 64 --global_batch 2048 \
    --epochs 200 --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 --clip_grad 5 \
    --mask_ratio 0.75 --target ema --output_dir "$OUT/$name/pretrain" \
    "${first[@]}"
run main_finetune.py --finetune "$OUT/$name/pretrain/checkpoint-last.pth" --batch_size 32 \
    --global_batch 1024 --epochs 100 --warmup_epochs 5 --blr 5e-4 --layer_decay 0.8 \
    --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --smoothing 0.1 \
    --weight_decay 0.05 --output_dir "$OUT/$name/finetune" \
    "${second[@]}"
