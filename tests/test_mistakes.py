"""Impossible and unlikely settings of every script: rejected before any work, in a line or two, with status 2."""

import importlib

import pytest
import torch

from util import rng

EVERYWHERE = {
    "--batch_size 0": "expected an integer >= 1, got '0'",
    "--batch_size many": "expected an integer >= 1, got 'many'",
    "--num_workers -1": "expected an integer >= 0, got '-1'",
    "--seed -1": "expected an integer >= 0 and <= 9.22337e+18, got '-1'",
    "--seed 99999999999999999999": "expected an integer >= 0 and <= ",
    "--mean nan 0 0": "expected a number, got 'nan'",
    "--mean 0.5 0.5": "expected 3 arguments",
    "--std 0.1 0 0.1": "expected a number > 0",
    "--mean 123.675 116.28 103.53": "mean 123.675 116.28 103.53 lies outside 0..1, the range of pixel values here",
    "--mean 0.5 0.5 -0.5": "mean 0.5 0.5 -0.5 lies outside 0..1",
    "--std 58.395 57.12 57.375": "std 58.395 57.12 57.375 lies outside 0..1",
    "--input_size 225": "patch size 16 does not divide an image of 225 x 225",
    "--patch_size 0": "expected an integer >= 1, got '0'",
    "--precision int8": "unknown value 'int8'",
    "--precision fp16": "--precision fp16 needs CUDA, the device is cpu",
    "--device cuda": "--device cuda: this PyTorch finds no CUDA device",
    "--dist_timeout 0": "expected a number > 0",
    "--dist_timeout 1e300": "expected a number > 0 and <= ",
    "--data_path /nowhere": "--data_path /nowhere does not exist",
    "--batchsize 4": "unrecognized arguments: --batchsize 4; did you mean --batch_size?",
}
TRAINING = {
    "--epochs 0": "expected an integer >= 1, got '0'",
    "--epochs -3": "expected an integer >= 1, got '-3'",
    "--epochs inf": "expected an integer >= 1, got 'inf'",
    "--epochs 5 --start_epoch 5": "--start_epoch 5 must be less than --epochs 5",
    "--epochs 5 --warmup_epochs 5": "--warmup_epochs 5 must be less than --epochs 5",
    "--epochs 5 --warmup_epochs 9": "--warmup_epochs 9 must be less than --epochs 5",
    "--min_lr -1": "expected a number >= 0, got '-1'",
    "--weight_decay nan": "expected a number >= 0, got 'nan'",
    "--accum_iter 0": "expected an integer >= 1, got '0'",
    "--accum_iter 2 --global_batch 64": "give one of the two, not both",
    "--batch_size 24 --global_batch 64": "--global_batch 64 is not a multiple of --batch_size 24 x 1 processes",
    "--batch_size 4096": "2,000 images do not fill one optimizer step of 4,096",
    "--shapes_train 10 --batch_size 8 --accum_iter 2": "10 images do not fill one optimizer step of 16",
    "--save_interval 0": "expected an integer >= 1, got '0'",
    "--save_every_minutes 0": "expected a number > 0",
    "--max_steps 0": "expected an integer >= 1, got '0'",
    "--max_bad_steps -1": "expected an integer >= 0, got '-1'",
    "--max_bad_images -1": "expected an integer >= 0, got '-1'",
    "--output_dir /dev/null/run": "the run folder /dev/null/run cannot be created or written to (Not a directory)",
    "--output_dir /proc/run": "the run folder /proc/run cannot be created or written to (No such file or directory)",
    "--resume /nowhere.pth": "checkpoint /nowhere.pth does not exist",
}
CLASSIFIER = {
    "--model vit_bse_patch16": "unknown value 'vit_bse_patch16'; did you mean vit_base_patch16",
    "--finetune /nowhere.pth": "checkpoint /nowhere.pth does not exist",
    "--teacher --which student": "--teacher means --which ema, which contradicts --which student",
    "--nb_classes 3": "--nb_classes 3, but the data have 10 classes",
}
TABLE = {
    "main_pretrain": {
        **EVERYWHERE,
        **TRAINING,
        "--model mae_vit_lrge_patch16": "did you mean mae_vit_large_patch16",
        "--mask_ratio 0.999": "--mask_ratio 0.999 masks 196 of 196 patches",
        "--mask_ratio 0": "expected a number > 0",
        "--input_size 16": "--mask_ratio 0.75 masks 1 of 1 patches",
        "--lr -1": "expected a number >= 0, got '-1'",
        "--ema_decay 1.5": "expected a number >= 0 and <= 1, got '1.5'",
    },
    "main_finetune": {
        **EVERYWHERE,
        **TRAINING,
        **CLASSIFIER,
        "--mixup 0.8 --batch_size 7": "--batch_size 7 is odd; mixup and cutmix mix images in pairs",
        "--cutmix_minmax 0.8 0.2": "--cutmix_minmax 0.8 0.2: the lower bound comes first",
        "--mixup -1": "expected a number >= 0, got '-1'",
        "--drop_path 1": "expected a number >= 0 and < 1, got '1'",
        "--smoothing 1": "expected a number >= 0 and < 1, got '1'",
        "--reprob 2": "expected a number >= 0 and <= 1, got '2'",
        "--layer_decay 0": "expected a number > 0",
        "--aa nonsense": "--aa 'nonsense' is not a policy that timm knows",
        "--eval": "--eval: name a checkpoint with --resume or --finetune",
    },
    "main_linprobe": {
        **EVERYWHERE,
        **TRAINING,
        **CLASSIFIER,
        "--lr 1 --blr 1": "--lr and --blr both set the learning rate",
        "--blr 0.1 0": "expected a number > 0",
        "--optimizer adam": "unknown value 'adam'",
        "--eval": "--eval",
    },
    "main_knn": {
        **EVERYWHERE,
        **CLASSIFIER,
        "--nb_knn 0": "expected an integer >= 1, got '0'",
        "--nb_knn 5000": "--nb_knn 5000 of 2,000 training images",
        "--temperature 0": "expected a number > 0",
        "--load_features /nowhere": "/nowhere",
        "--load_features x --finetune y": "--load_features takes stored features",
    },
}
CASES = [(script, text) for script, table in TABLE.items() for text in table]


@pytest.mark.parametrize(("script", "text"), CASES, ids=[" ".join(case) for case in CASES])
def test_rejected(script, text, capsys, monkeypatch, tmp_path):
    script_main = importlib.import_module(script).main  # before anything is replaced that it might import
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(rng, "seed_all", lambda *key: pytest.fail("began to build"))
    with pytest.raises(SystemExit) as stop:
        script_main(text.split())
    assert stop.value.code == 2
    written = capsys.readouterr()
    assert TABLE[script][text] in written.err
    assert written.err.count("\n") <= 2
    assert "usage" not in written.err
    assert "Traceback" not in written.err
    assert not list(tmp_path.rglob("checkpoint*"))
