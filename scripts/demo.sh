#!/usr/bin/env bash
# Pre-train a small model on built-in images (Shapes), run k-NN before and after, and draw a picture. Takes about three
# minutes on two cores. All output goes to ./demo, or to the folder given as the first argument.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
out=${1:-demo}
python=.venv/bin/python
model=micro_patch16
size="--input_size 48 --patch_size 8"
knn="--nb_knn 20 --global_pool"

echo; echo "== 1/4  k-NN on the features of a randomly initialised encoder"
$python main_knn.py --model vit_$model $size $knn
echo; echo "== 2/4  pre-training with hard patches mining on 2,000 images, 16 epochs"
$python main_pretrain.py --model mae_vit_$model $size --target norm_pixel --epochs 16 --lr 1e-3 \
    --log_interval 31 --output_dir "$out"
echo; echo "== 3/4  k-NN on the features of the pre-trained encoder"
$python main_knn.py --finetune "$out/checkpoint-last.pth" $knn
echo; echo "== 4/4  a picture of predicted hardness, masks and reconstructions"
$python -m visualize --checkpoint "$out/checkpoint-last.pth" --num_images 6 --output "$out/demo.png"
echo
echo "Picture: $out/demo.png. Run folder (checkpoints, log.jsonl, TensorBoard events): $out."
