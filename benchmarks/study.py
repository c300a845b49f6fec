"""Does hard-patch mining help? Train a grid of variants under one budget, evaluate each, and keep a line of results.

    python -m benchmarks.study --data_path cifar10_images.tar.gz --patch_size 4 --input_size 32 --jobs 2
    python -m benchmarks.study_report study_runs/study.jsonl

A run is one variant with one seed: pre-training, then k-NN, linear probe and fine-tuning of its encoder, and the rank
correlation of predicted and true patch losses. Every stage is one of the scripts; each run has its own process. A
complete run appends one line to --results. Started again, the study skips the runs that have a line there and resumes
those that were stopped.
"""

import argparse
import datetime
import fcntl
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import main_finetune
import main_knn
import main_linprobe
import main_pretrain
import main_segment
import models_hpm
from benchmarks.ranking import rank_correlations, teacher_of
from benchmarks.subset import subset
from util.data.transforms import check_statistics
from util.run import distributed, options
from util.run.folder import LAST, read_log
from util.run.logger import log, setup_logging

PIXEL, NORM = ["--target", "pixel"], ["--target", "norm_pixel"]
MAE, PREDICTOR = ["--no-learning_loss"], ["--mask_strategy", "random"]

# The options of main_pretrain.py that a variant changes. `_long` trains --long_factor times the epochs, `_slow` has the
# paper's EMA decay, which is meant for runs of many more steps; `_mask_tokens` has the teacher read its predictions at
# mask tokens of the whole image (`predict_at_mask_tokens`). `sparse_1`, `loss` and `predictor_1` are the cheap ones: a
# teacher that sees a quarter of the patches with a predictor of one block, a teacher that scores by its own loss and
# needs no predictor, and a predictor of one block with random masks.
VARIANTS = {
    "mae_pixel": [*MAE, *PIXEL],
    "mae_norm": [*MAE, *NORM],
    "predictor_pixel": [*PREDICTOR, *PIXEL],
    "predictor_norm": [*PREDICTOR, *NORM],
    "hpm_pixel": PIXEL,
    "hpm_norm": NORM,
    "mae_pixel_long": [*MAE, *PIXEL],
    "mae_norm_long": [*MAE, *NORM],
    "hpm_pixel_mask_tokens": PIXEL,
    "hpm_norm_mask_tokens": NORM,
    "hpm_norm_absolute": [*NORM, "--no-relative"],
    "hpm_norm_hardest": [*NORM, "--mask_strategy", "hardest"],
    "hpm_norm_hard_to_easy": [*NORM, "--mask_strategy", "hard_to_easy"],
    "sparse_1_norm": [*NORM, "--teacher_keep", "0.25", "--predictor_depth", "1"],
    "loss_norm": [*MAE, *NORM, "--score_by", "loss"],
    "predictor_1_norm": [*PREDICTOR, *NORM, "--predictor_depth", "1"],
    "hpm_norm_slow": [*NORM, "--ema_decay", "0.999", "--ema_decay_final", "0.9999", "--ema_ramp_epochs", "100"],
}
MAIN = list(VARIANTS)[:6]

# Options that identify a run, in addition to its variant, its seed and the machine: two lines with the same values are
# the same run.
BUDGET = [
    *["data", "train_images", "val_images", "mean", "std", "model", "input_size", "patch_size"],
    *["epochs", "batch_size", "blr", "precision", "ema_decay", "ema_decay_final"],
    *["probe_epochs", "probe_blr", "finetune_epochs", "finetune_blr", "rank_images", "rank_masks"],
]

# Those that identify a run of a `_long` variant as well.
LONG = ["long_factor"]

# Those of the segmentation; None without one.
SEGMENT = ["segment_data", "segment_size", "segment_steps", "segment_lr"]

# Times compare on one machine only, and versions of PyTorch round differently.
MACHINE = ["device", "torch"]


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser((__doc__ or "").split("\n")[0])
    group = parser.add_argument_group("what to run")
    group.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=MAIN, help="variants to run")
    group.add_argument("--seeds", nargs="+", type=options.SEED, default=[0, 1, 2], help="seeds of each variant")
    group.add_argument("--results", default="study_runs/study.jsonl", help="results file, one line per run")
    group.add_argument("--work_dir", default="study_runs", help="folder of checkpoints and logs; needed to resume only")
    group.add_argument("--jobs", type=options.COUNT, default=1, help="parallel runs, which share the CPU cores")
    group.add_argument("--device", help="cuda or cpu (default: cuda where available)")

    group = parser.add_argument_group("data")
    group.add_argument("--data_path", help="as in main_pretrain.py (default: Shapes)")
    group.add_argument(
        "--train_images", type=options.COUNT, help="number of training images, evenly chosen (default: all)"
    )
    group.add_argument("--val_images", type=options.COUNT, help="number of validation images (default: all)")
    group.add_argument("--mean", type=options.NUMBER, nargs=3, help="channel means in 0..1 (default: ImageNet's)")
    group.add_argument("--std", type=options.POSITIVE, nargs=3, help="their standard deviations (default: ImageNet's)")
    group.add_argument("--segment_path", help="as in main_segment.py: adds the mIoU of a linear head and of 10-NN")

    group = parser.add_argument_group("budget")
    known = list(models_hpm.MODELS)
    group.add_argument("--model", choices=known, metavar="MODEL", default="mae_vit_micro_patch16", help="model size")
    group.add_argument("--input_size", type=options.COUNT, default=32, help="image size in pixels")
    group.add_argument("--patch_size", type=options.COUNT, default=4, help="patch size in pixels")
    group.add_argument("--epochs", type=options.COUNT, default=20, help="epochs of pre-training")
    group.add_argument("--batch_size", type=options.COUNT, default=128, help="global batch size of every stage")
    group.add_argument("--blr", type=options.POSITIVE, default=2e-3, help="base learning rate of pre-training")
    group.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="precision of every stage")
    group.add_argument(
        "--ema_decay",
        type=options.SHARE,
        default=0.99,
        help="EMA decay at the start (the paper's 0.999 is for long runs)",
    )
    group.add_argument("--ema_decay_final", type=options.SHARE, default=0.999, help="EMA decay at the end")
    group.add_argument(
        "--long_factor",
        type=options.number(float, low=1),
        default=2.0,
        help="epochs of the _long variants as a multiple of --epochs: HPM's time over MAE's, as the report shows",
    )
    group.add_argument("--probe_epochs", type=options.COUNT, default=10, help="epochs of the linear probe")
    group.add_argument(
        "--probe_blr",
        type=options.POSITIVE,
        nargs="+",
        default=[0.03, 0.1, 0.3],
        help="base learning rates of the linear probe; the best counts",
    )
    group.add_argument("--finetune_epochs", type=options.COUNT, default=5, help="epochs of fine-tuning")
    group.add_argument("--finetune_blr", type=options.POSITIVE, default=2e-3, help="base learning rate of fine-tuning")
    group.add_argument("--segment_size", type=options.COUNT, default=128, help="image size of the segmentation")
    group.add_argument("--segment_steps", type=options.COUNT, default=600, help="steps of its linear head")
    group.add_argument(
        "--segment_lr", type=options.POSITIVE, default=1e-2, help="learning rate of that head; 1e-3 is for long runs"
    )
    group.add_argument(
        "--rank_images", type=options.COUNT, default=256, help="validation images of the rank correlation"
    )
    group.add_argument("--rank_masks", type=options.COUNT, default=32, help="random masks per image")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SEED"), help="run only this one, in this process")
    return parser


# ------------------------------------------------------------------------------------------------------------ the runs


def threads_of(args: argparse.Namespace) -> int:
    """CPU threads of a run."""
    return max(1, (os.cpu_count() or 1) // args.jobs)


def machine(args: argparse.Namespace) -> dict[str, str]:
    """What computes a run."""
    name = f"{threads_of(args)} threads of {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    if distributed.pick_device(args.device, distributed.ALONE).type == "cuda":
        name = torch.cuda.get_device_name()
    return {"device": name, "torch": torch.__version__}


def key(args: argparse.Namespace, variant: str, seed: int) -> dict[str, Any]:
    """What identifies a run."""
    values = {**vars(args), "data": Path(args.data_path).name if args.data_path else "Shapes"}
    values["segment_data"] = Path(args.segment_path).name if args.segment_path else None
    segment = {name: values[name] if args.segment_path else None for name in SEGMENT}
    budget = {name: values[name] for name in BUDGET + LONG * variant.endswith("_long")}
    return {"variant": variant, "seed": seed, **budget, **segment, **machine(args)}


def run_folder(args: argparse.Namespace, variant: str, seed: int) -> Path:
    """Folder of a run's checkpoints: runs on other data or machines, or with another budget, have other folders."""
    run = key(args, variant, seed)
    budget = {name: value for name, value in run.items() if name in BUDGET + LONG + MACHINE}
    digest = hashlib.sha256(json.dumps(budget).encode()).hexdigest()[:8]
    return Path(args.work_dir, f"{Path(budget['data']).stem}-{digest}", f"{variant}-{seed}")


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Lines of a results file; none if there is no file. Raises ValueError for a line that is not JSON."""
    try:
        return [json.loads(line) for line in Path(path).read_text().splitlines()] if Path(path).exists() else []
    except ValueError as error:
        raise ValueError(f"{path} has a line that is not JSON ({error}): remove it") from error


def has_line(rows: list[dict[str, Any]], run: dict[str, Any]) -> bool:
    """Whether one of the lines is that of a run (`key`)."""
    return any(all(row.get(name) == value for name, value in run.items()) for row in rows)


def append_result(path: Path, row: dict[str, Any]) -> None:
    """Append a line; several runs may write to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        file.write(json.dumps(row) + "\n")


def run_all(args: argparse.Namespace, argv: list[str], done: list[dict[str, Any]]) -> int:
    """Do the runs that have no line in `done`, `args.jobs` at a time. Returns the exit status."""
    grid = itertools.product(args.seeds, args.variants)  # a seed of all variants before the next seed
    pending = [(variant, seed) for seed, variant in grid if not has_line(done, key(args, variant, seed))]
    already = len(args.seeds) * len(args.variants) - len(pending)
    counts = (len(pending), args.jobs, threads_of(args), already)
    log.info("%d runs to do, %d at a time (threads: %d); %d have a line in %s", *counts, args.results)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads_of(args))}
    running: dict[tuple[str, int], subprocess.Popen] = {}
    failed, began, count = [], time.monotonic(), len(pending)
    try:
        while pending or running:
            while pending and len(running) < args.jobs:
                variant, seed = pending.pop(0)
                folder = run_folder(args, variant, seed)
                folder.mkdir(parents=True, exist_ok=True)
                command = [sys.executable, "-m", "benchmarks.study", *argv, "--one", variant, str(seed)]
                with open(folder / "output.txt", "a") as output:
                    running[variant, seed] = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
            time.sleep(0.5)
            for run, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[run]
                failed += [run] * (process.returncode != 0)
                ended = count - len(pending) - len(running)
                how = "done" if process.returncode == 0 else f"failed, see {run_folder(args, *run)}/output.txt"
                minutes = (time.monotonic() - began) / 60
                log.info("%s, seed %d: %s; %d of %d after %.0f minutes", *run, how, ended, count, minutes)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return 1 if failed else 0


def run_one(args: argparse.Namespace, variant: str, seed: int) -> dict[str, Any]:
    """Pre-train and evaluate. Returns the line of results."""
    folder = run_folder(args, variant, seed)
    epochs = round(args.epochs * (args.long_factor if variant.endswith("_long") else 1))
    shared = ["--data_path", args.data_path] if args.data_path else []
    shared += ["--precision", args.precision, "--num_workers", "0"]
    shared += ["--device", args.device] if args.device else []
    trained = [*shared, "--seed", seed, "--batch_size", args.batch_size, "--log_interval", 50]
    image = [word for name in ("mean", "std") if getattr(args, name) for word in (f"--{name}", *getattr(args, name))]

    schedule = ["--epochs", epochs, "--warmup_epochs", epochs / 10, "--blr", args.blr, "--vis_interval", 0]
    ema = ["--ema_decay", args.ema_decay, "--ema_decay_final", args.ema_decay_final, "--ema_ramp_epochs", epochs]
    model = ["--model", args.model, "--input_size", args.input_size, "--patch_size", args.patch_size]
    pretrain = [*model, *trained, *image, *schedule, *ema, *VARIANTS[variant], "--output_dir", folder / "pretrain"]
    with teacher_of(variant):
        main_pretrain.main([str(word) for word in pretrain])
    epochs_log = read_log(folder / "pretrain")

    weights = ["--finetune", folder / "pretrain" / LAST, "--global_pool"]
    knn = main_knn.main([str(word) for word in [*shared, *weights, "--batch_size", args.batch_size]])
    probe = ["--epochs", args.probe_epochs, "--warmup_epochs", 0, "--blr", *args.probe_blr]
    main_linprobe.main([str(w) for w in [*trained, *weights, *probe, "--output_dir", folder / "linprobe"]])
    tune = ["--epochs", args.finetune_epochs, "--warmup_epochs", args.finetune_epochs / 5, "--blr", args.finetune_blr]
    tune += ["--aa=", "--reprob", 0, "--drop_path", 0, "--layer_decay", 0.75]
    main_finetune.main([str(w) for w in [*trained, *weights, *tune, "--output_dir", folder / "finetune"]])

    segmented = segment(args, folder, [*shared, "--seed", seed]) if args.segment_path else {}
    setup_logging(True)
    device = distributed.pick_device(args.device, distributed.ALONE)
    row = key(args, variant, seed) | segmented
    row["knn"] = {str(k): round(top1, 3) for k, (top1, _) in knn.items()}
    last = read_log(folder / "linprobe")[-1]
    row["linear"] = max(value for name, value in last.items() if name.startswith("test_acc1"))
    row["finetune"] = read_log(folder / "finetune")[-1]["test_acc1"]
    for name in ("loss_rec", "rank_acc"):
        row[name] = [round(line[f"train_{name}"], 5) for line in epochs_log if f"train_{name}" in line]
    timed = [line for line in epochs_log if "images_per_s" in line]  # resumed epochs are not
    rate = statistics.median(line["images_per_s"] for line in timed)  # robust to other load during some epochs
    images = json.loads((folder / "pretrain/config.json").read_text())["options"]["steps_per_epoch"] * args.batch_size
    row["images_per_s"], row["seconds"] = round(rate, 1), round(epochs * images / rate, 1)
    row["data_wait"] = round(sum(line["data_wait"] for line in timed) / len(timed), 4)
    row["spearman"] = rank_correlations(args, folder / "pretrain" / LAST, device)
    row["date"] = datetime.date.today().isoformat()
    return row


def segment(args: argparse.Namespace, folder: Path, shared: list[Any]) -> dict[str, float]:
    """mIoU in percent of a frozen linear head and of the 10 nearest patches, on the encoder of a run."""
    size, steps, lr = args.segment_size, args.segment_steps, args.segment_lr
    path = folder / f"segment-{Path(args.segment_path).name.split('.')[0]}-{size}-{steps}-{lr:g}"
    given = [*shared, "--data_path", args.segment_path, "--finetune", folder / "pretrain" / LAST, "--output_dir", path]
    linear = ["--head", "linear", "--crop", size, "--steps", steps, "--lr", lr, "--eval_interval", steps]
    main_segment.main([str(word) for word in [*given, *linear]])
    knn = main_segment.main([str(word) for word in [*given, "--head", "knn", "--input_size", size]])
    return {"segment_linear": read_log(path)[-1]["test_mIoU"], "segment_knn": knn["10-NN"]}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    setup_logging(True)
    with options.user_mistakes():
        args = get_args_parser().parse_args(argv)
        check_statistics(args.mean or (), args.std or ())
        if args.data_path and (args.train_images or args.val_images):
            counts = {"train": args.train_images, "val": args.val_images}
            whole, args.data_path = args.data_path, subset(args.data_path, counts, Path(args.work_dir))
            log.info("data      %s of %s", args.data_path, whole)
        done = read_results(args.results) if args.one is None else []
    if args.one is None:
        return run_all(args, argv, done)
    variant, seed = args.one[0], int(args.one[1])
    append_result(Path(args.results), run_one(args, variant, seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
