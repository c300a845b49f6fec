#!/usr/bin/env bash
# MAE baseline in HPM's own settings, normalised pixels, ViT-B/16, 200 epochs: what HPM is to be compared with.
#
# model      mae_vit_base_patch16_dec512d8b
# batch      2048
# rate       1.2e-3
# published  none found in exactly these settings (82.88 [V] UM-MAE: pretrain_mae_base_200)
# disagrees  HPM's README says 82.2 for MAE after 200 epochs and not on which pixels. Both are here: HPM's gain
#            over normalised pixels is an open question.
source "$(dirname "$0")/_run.sh"

run main_pretrain.py --model mae_vit_base_patch16_dec512d8b --batch_size 64 --global_batch 2048 \
    --epochs 200 --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 --mask_ratio 0.75 \
    --target norm_pixel --no-learning_loss --clip_grad 5 --output_dir "$OUT/$name" \
    "${first[@]}"
