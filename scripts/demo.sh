#!/usr/bin/env bash
# Pre-train MAE and HPM on drawn images (Shapes), compare their features with those of a random encoder and with raw
# pixels, measure whether the teacher knows which patches are hard, and draw pictures. The last one shows photographs,
# with a checkpoint of demo/. Three and a half minutes on two CPU cores. Output: ./output_dir/demo, or the first argument.
set -euo pipefail
out=${1:-}
[[ -z $out || $out = /* ]] || out=$PWD/$out # as seen from where it was called
cd "$(dirname "$0")/.."
bash scripts/setup.sh
out=${out:-output_dir/demo}
python=.venv/bin/python
shipped=demo/hpm_micro_tiny_imagenet.pth
if [ -e "$out/hpm" ]; then
    echo "demo.sh: $out has the runs of an earlier demo: remove it, or name another folder, bash scripts/demo.sh FOLDER" >&2
    exit 2
fi
mkdir -p "$out"

# One thread for each of two runs side by side is faster than two threads for one after the other.
export OMP_NUM_THREADS=1
size="--input_size 48 --patch_size 8"
train="--model mae_vit_micro_patch16 $size --decoder_depth 1 --epochs 12 --warmup_epochs 1 --batch_size 16 --lr 1e-3
    --num_workers 0 --vis_interval 0 --log_interval 125 --device cpu"
mining="--predictor_depth 1 --teacher_keep 0.25 --ema_decay 0.95 --ema_decay_final 0.95"

step() { echo; echo "== $*"; }
probe() { # NAME OPTIONS...: k-NN and logistic regression; the log goes to $out/NAME.txt, both accuracies to standard output
    local log="$out/$1.txt"
    $python main_knn.py --nb_knn 20 --logreg --num_workers 0 --device cpu "${@:2}" > "$log" || { cat "$log" >&2; return 1; }
    sed -n 's/^\(20-NN\|logistic regression\)  top-1 \([0-9.]*\).*/\2/p' "$log" | tr '\n' ' '
    echo
}
both() { # FIRST SECOND: two functions side by side, each with its result in a file of its name
    local failed=0
    $1 > "$out/$1.result" &
    $2 > "$out/$2.result" || failed=1
    wait $! && [ $failed = 0 ]
}

step "1/5  Baselines without training: k-NN and logistic regression on raw pixels, and on a randomly initialised encoder"
began=$SECONDS
pixels() { probe pixels --input_size 48 --features pixels; }
random() { probe random --model vit_micro_patch16 $size; }
both pixels random
baselines=$((SECONDS - began))

step "2/5  Pre-training on 2,000 images, 12 epochs: MAE (log in $out/mae.txt) and HPM side by side"
began=$SECONDS
{
    $python main_pretrain.py $train --no-learning_loss --output_dir "$out/mae" > "$out/mae.txt"
    echo $((SECONDS - began)) > "$out/mae.seconds"
} &
status=0
$python main_pretrain.py $train $mining --output_dir "$out/hpm" || status=$?
hpm_seconds=$((SECONDS - began))
wait $! || { cat "$out/mae.txt" >&2; exit 1; }
[ $status = 0 ] || exit $status

step "3/5  The same on the features of both, and Spearman correlation of the teacher's ranking with the true error"
began=$SECONDS
mae() { probe mae-features --finetune "$out/mae/checkpoint-last.pth"; }
hpm() { probe hpm-features --finetune "$out/hpm/checkpoint-last.pth"; }
both mae hpm
ranking=$($python -m benchmarks.ranking --checkpoint "$out/hpm/checkpoint-last.pth" --device cpu | tee >(cat >&2))
read -r before after < <(sed -n 's/.*untrained \([-0-9.]*\), trained \([-0-9.]*\)$/\1 \2/p' <<< "$ranking")
evaluation=$((SECONDS - began))

step "4/5  Picture of drawn shapes: $out/shapes.png"
$python -m visualize --checkpoint "$out/hpm/checkpoint-last.pth" --num_images 6 --scale rank --device cpu --output "$out/shapes.png"

step "5/5  Picture of photographs, with $shipped: $out/photographs.png"
photos="$out/scikit-image/skimage/data" # public domain and CC0; unpacked here, not installed
if [ -f "$photos/astronaut.png" ] ||
    $python -m pip install --quiet --disable-pip-version-check --no-deps --target "$out/scikit-image" scikit-image; then
    $python -m visualize --checkpoint $shipped --images "$photos"/{astronaut,chelsea,coffee}.png "$photos/rocket.jpg" \
        --cell 128 --scale rank --device cpu --output "$out/photographs.png"
else
    echo "scikit-image, whose photographs this picture shows, could not be downloaded: no picture of photographs" >&2
fi

row() { printf '| %-28s | %19s | %11s | %-31s | %7s |\n' "$@"; }
line() { # LABEL NAME SPEARMAN SECONDS
    read -r knn logreg < "$out/$2.result"
    row "$1" "$logreg" "$knn" "$3" "$4"
}
{
    row "features" "logistic regression" "20-NN" "Spearman of the teacher's ranks" "seconds"
    row "---" "--:" "--:" "---" "--:"
    line "raw pixels" pixels "" ""
    line "randomly initialised encoder" random "$before (HPM before training)" "$baselines"
    line "MAE" mae "no teacher" "$(cat "$out/mae.seconds")"
    line "HPM" hpm "$after" "$hpm_seconds"
} > "$out/table.md"
echo
cat "$out/table.md"
cat << END

Top-1 accuracy on 500 validation images of ten classes, chance is 10 %. Seconds: of both baselines, and of each pre-training next to the other.
Step 3 took $evaluation s, everything $SECONDS s.

Demo settings                         published (paper, scripts/ of the official code)
micro ViT, 48 pixels, 36 patches      ViT-B and ViT-L, 224 pixels, 196 patches
one block in both decoders            eight blocks
1,500 steps of 16 drawn images        200 or 800 epochs of ImageNet, global batch size 2,048
EMA decay 0.95                        0.999 to 0.9999 (after half of the 1,500 steps such a teacher would still be about half initial weights)
teacher sees a quarter of the         teacher sees the whole image
patches and ranks the others
The rest is as published: raw pixels as the target, ranking loss, mask ratio 0.75, easy to hard from 0 to 50 % of the masked patches.

Pictures: $out/shapes.png, $out/photographs.png. Run folders: $out/mae, $out/hpm.
END
