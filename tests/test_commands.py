"""Runs the commands of the documents: each with its own options, on small data with a small model.

Other commands run elsewhere: benchmarks in test_benchmarks.py and test_study.py, recipes and benchmarks.recipes
in test_recipes.py, SLURM and util.run.status in test_slurm.py, exports in test_export_docs.py, the evaluation of a
segmentation run in test_segment_program.py, tests/stress by hand.
"""

import shutil

import pytest
import torch
from images import members, write_tar, write_tree
from programs import ROOT, run
from segment_data import ade_files
from test_documents import DOCUMENTS, commands, program

import models_vit

OWN = [path for path in DOCUMENTS if path.name not in ("export.md", "visualize.md")]
SCRIPTS = ("main_pretrain", "main_finetune", "main_linprobe", "main_knn", "main_segment", "predict")
COMMANDS = [
    (path, script.removesuffix(".py"), options)
    for path in OWN
    for words in commands(path)
    if words[0] in ("python", "torchrun")
    for script, options, _ in [program(words)]
    if script.removesuffix(".py") in SCRIPTS and not (script == "main_segment.py" and "--eval" in options)
]

# Options added at the end of a command, which override its own: a micro model, two images a step, one step.
SMALL = "--input_size 32 --patch_size 8 --num_workers 0 --device cpu --batch_size 2"
STEPS = "--max_steps 1 --output_dir {out} --log_dir {out}"
SMALLER = {
    "main_pretrain": f"--model mae_vit_micro_patch16 --decoder_depth 1 --vis_interval 0 {SMALL} {STEPS}",
    "main_finetune": f"--model vit_micro_patch16 {SMALL} {STEPS}",
    "main_linprobe": f"--model vit_micro_patch16 {SMALL} {STEPS}",
    "main_knn": f"--model vit_micro_patch16 --nb_knn 3 {SMALL}",
    "predict": "--num_workers 0 --device cpu",
    "main_segment": f"--model vit_micro_patch16 {SMALL.removeprefix('--input_size 32 ')} --output_dir {{out}}",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Data sets for classification and segmentation, an encoder, and a classifier of the three classes."""
    folder = tmp_path_factory.mktemp("files")
    write_tree(folder / "data", members())
    write_tree(folder / "unsplit", {name[len("train/") :]: data for name, data in members(("train",)).items()})
    write_tree(folder / "segmentation", ade_files(train=4, val=2))
    for name, classes in (("encoder", 0), ("classifier", 3)):
        model = models_vit.vit_micro_patch16(img_size=32, patch_size=8, num_classes=classes, global_pool=classes > 0)
        torch.save({"model": model.state_dict()}, folder / f"{name}.pth")
    return folder


def smaller(script, options, files, out):
    """The options of a command with what makes it small added, and its placeholders filled in."""
    added = SMALLER[script].format(out=out).split()
    if script == "predict":
        checkpoint = files / ("encoder.pth" if "CKPT" in options else "classifier.pth")
        return [*options, *added, "--checkpoint", str(checkpoint), "--data_path", str(files / "data/val")]
    if script == "main_segment":
        trained = "--crop 32 --stride 21 --global_batch 2 --steps 1 --eval_interval 1 --warmup_steps 0"
        added += ["--input_size", "32"] if {"knn", "logreg"} & set(options) else trained.split()
    if "--data_path" in options:
        kind = "unsplit" if "--val_fraction" in options else "data"
        added += ["--data_path", str(files / ("segmentation" if script == "main_segment" else kind))]
    else:
        added += ["--shapes_train", "4"]
    if "--knn_data_path" in options:
        added += ["--knn_data_path", str(files / "data")]
    if "--knn_interval" in options:
        added += ["--knn_k", "3"]
    if "--finetune" in options:
        added += ["--finetune", str(files / ("classifier.pth" if "--eval" in options else "encoder.pth"))]
    if "--val_fraction" in options:
        added += ["--val_fraction", "0.25"]
    if "--token_size" in options:
        added += ["--token_size", "4"]
    if "--accum_iter" in options:
        added += ["--accum_iter", "1"]
    if "--global_batch" in options:
        added += ["--global_batch", "2"]
    return options + added


@pytest.mark.parametrize(
    ("path", "script", "options"),
    COMMANDS,
    ids=[f"{path.stem}-{script}-{number}" for number, (path, script, _) in enumerate(COMMANDS)],
)
def test_documented_command_runs(path, script, options, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = run(script, *smaller(script, options, files, tmp_path))
    if script == "predict":
        assert "wrote" in log
    elif script == "main_knn":
        assert "3-NN  top-1" in log
        assert ("logistic regression  top-1" in log) == ("--logreg" in options)
    elif script == "main_segment":
        assert "mIoU" in log
    elif "--eval" in options:
        assert "acc1" in log
    else:
        assert "step 1, saved in" in log


PICTURES = [
    options
    for path in DOCUMENTS
    for words in commands(path)
    for script, options, _ in [program(words) if words[0] == "python" else ("", [], 1)]
    if script == "visualize" and options
]


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    """A folder with all that the commands of python -m visualize name, and the sizes of the model in it."""
    folder = tmp_path_factory.mktemp("pictured")
    sizes = "--model mae_vit_micro_patch16 --input_size 16"
    training = f"{sizes} --patch_size 4 --decoder_depth 1 --vis_interval 0 --num_workers 0 --batch_size 2 --epochs 1"
    runs = ("demo", "RUN", "A", "B", "output_dir/hpm", "output_dir/mae", "DIR")
    run("main_pretrain", *training.split(), "--shapes_train", 4, "--output_dir", folder / runs[0])
    for name in runs[1:]:
        shutil.copytree(folder / runs[0], folder / name)
    shutil.copy(ROOT / "demo/hpm_micro_tiny_imagenet.pth", folder / "demo")
    weights = torch.load(folder / "demo/checkpoint-last.pth", weights_only=True)["state_dict"]
    encoder_and_decoder = {name: tensor for name, tensor in weights.items() if "losspred" not in name}
    torch.save({"model": encoder_and_decoder}, folder / "MAE.pth")
    for name in ("HPM.pth", "FILE"):
        state = {f"module.{name}": tensor for name, tensor in weights.items()}
        torch.save({"model": "mae_vit_base", "state_dict": state, "ema_state_dict": state, "epoch": 1}, folder / name)
    images = members(per_class=1)
    write_tree(folder / "photos", {name.replace("/", "_"): data for name, data in images.items()})
    write_tree(folder, dict(zip(("a.jpg", "b.jpg"), images.values(), strict=False)))
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
    write_tree(folder / "photos/skimage/data", dict(zip(names, images.values(), strict=False)))
    write_tar(folder / "data.tar", images)
    write_tar(folder / "cifar10_images.tar.gz", images, "w:gz")
    return folder, sizes.split()


@pytest.mark.parametrize("options", PICTURES, ids=" ".join)
def test_documented_picture_is_drawn(options, pictured, monkeypatch):
    folder, sizes = pictured
    monkeypatch.chdir(folder)
    more = [] if "--runs" in options else ["--cell", "16"]
    assert "wrote" in run("visualize", *options, *(sizes if "--model" in options else []), *more)


def test_every_script_is_documented():
    assert {script for _, script, _ in COMMANDS} == set(SCRIPTS)


def test_log_line_of_the_document(tmp_path):
    """PRETRAIN.md shows the names that a run logs, in their order."""
    text = (ROOT / "PRETRAIN.md").read_text()
    (shown,) = (line for line in text.splitlines() if line.startswith("epoch 1/20  step"))
    log = run("main_pretrain", *SMALLER["main_pretrain"].format(out=tmp_path).split(), "--log_interval", 1)
    (printed,) = (line for line in log.splitlines() if line.startswith("epoch 1/"))

    def names(line):
        return [pair.split(" ")[0] for pair in line.split("  ")]

    assert names(printed) == names(shown)
    for name in names(shown)[2:]:
        assert f"| `{name}` |" in text or name == "lr", name
