"""The official shell scripts, one after the other with the folders that they share: all of them run, and repeated, each
finds its own checkpoint again.

`pretrain_base.sh` and `finetune_base.sh` give the same --output_dir and --experiment, all the same --log_dir;
`linprob.sh` and `knn.sh` write to the default folder. Sizes are cut down by options at the end.
"""

import re

import pytest
from images import members, write_tree
from programs import checkpoint, log_lines, run

SMALL = "--input_size 16 --patch_size 4 --num_workers 0 --batch_size 4"
ENCODER = "output/exp/checkpoint-last.pth"
COMMANDS = {
    "pretrain_base.sh": (
        "main_pretrain",
        "--batch_size 32 --accum_iter 1 --model mae_vit_base_patch16_dec512d8b --input_size 224 --token_size 14 "
        "--mask_ratio 0.75 --epochs 800 --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 --data_path data "
        "--output_dir output --log_dir logs --experiment exp --learning_loss --relative",
        f"--model mae_vit_micro_patch16 --decoder_depth 1 --token_size 4 --vis_interval 0 {SMALL}",
    ),
    "finetune_base.sh": (
        "main_finetune",
        f"--batch_size 48 --accum_iter 1 --model vit_base_patch16 --finetune {ENCODER} --epochs 100 --warmup_epochs 5 "
        "--blr 5e-4 --layer_decay 0.8 --weight_decay 0.05 --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 "
        "--dist_eval --data_path data --nb_classes 1000 --output_dir output --log_dir logs --experiment exp",
        f"--model vit_micro_patch16 {SMALL}",
    ),
    "linprob.sh": (
        "main_linprobe",
        f"--batch_size 512 --model vit_base_patch16 --finetune {ENCODER} --epochs 100 --blr 1e-3 --weight_decay 0.0 "
        "--dist_eval --data_path data --nb_classes 1000 --log_dir logs",
        f"--model vit_micro_patch16 {SMALL}",
    ),
    "knn.sh": (
        "main_knn",
        f"--batch_size 128 --model vit_base_patch16 --finetune {ENCODER} --data_path data --nb_classes 1000",
        f"--model vit_micro_patch16 --nb_knn 3 {SMALL}",
    ),
}
FOLDERS = {"pretrain_base.sh": "output/exp", "finetune_base.sh": "output/exp/finetune", "linprob.sh": "output_dir"}


def start(name, *more):
    script, official, smaller = COMMANDS[name]
    return run(script, *official.split(), *smaller.split(), *more)


def test_in_sequence_with_shared_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / "data", members())
    for name, folder in FOLDERS.items():
        saved = f"{folder}/checkpoint-last.pth"
        for steps, message in ((2, f"saved in {saved}"), (4, f"Resuming from {saved} (epoch 0, step 2)")):
            log = start(name, "--max_steps", steps)
            assert f"run       {folder}\n" in log
            assert message in log
        assert checkpoint(folder)["script"] == COMMANDS[name][0]
        assert (checkpoint(folder)["epoch"], checkpoint(folder)["step"]) == (1, 1)
        assert len(log_lines(folder)) == 1
    assert re.search(r"3-NN  top-1", start("knn.sh"))
    for name, folder in FOLDERS.items():  # the whole sequence again
        log = start(name, "--max_steps", 4)
        assert f"run       {folder}\n" in log
        assert "Run already complete" in log

    events = {path.name: len(list(path.glob("*tfevents*"))) for path in (tmp_path / "logs").iterdir()}
    assert events == {
        "mae_vit_micro_patch16_exp": 2,
        "vit_micro_patch16_exp": 2,
        "vit_micro_patch16_main_linprobe": 2,
    }
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"data", "output", "output_dir", "logs"}


@pytest.mark.parametrize("first", ["finetune_base.sh", "linprob.sh"])
def test_in_another_order(tmp_path, monkeypatch, first):
    """Whichever comes first has the folder itself; the other a subfolder."""
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path / "data", members())
    random = ["--finetune", "", "--max_steps", 1, "--output_dir", "shared", "--experiment", "exp"]
    assert "run       shared/exp\n" in start(first, *random)
    pretraining = ["--output_dir", "shared", "--max_steps", 1]
    for _ in range(2):
        assert "run       shared/exp/pretrain\n" in start("pretrain_base.sh", *pretraining)
    assert checkpoint("shared/exp")["script"] == COMMANDS[first][0]
    assert checkpoint("shared/exp/pretrain")["script"] == "main_pretrain"
