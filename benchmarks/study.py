"""Does hard-patch mining help? Train a grid of variants under one budget, evaluate each, and keep a line of results.

    python -m benchmarks.study --data_path cifar10_images.tar.gz --patch_size 4 --input_size 32 --jobs 2
    python -m benchmarks.study_report docs/study/study.jsonl

A run is one variant with one seed: pre-training, then k-NN, linear probe and fine-tuning of its encoder, and how well
the predicted loss of patches orders their true one. Every stage is one of the scripts, in a process of the run's own. A
run that ends appends one line to --results; started again, the study leaves out what has a line there, and a run that
was stopped goes on from its checkpoint.
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
import tarfile
import time
from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import main_finetune
import main_knn
import main_linprobe
import main_pretrain
import models_hpm
from benchmarks.step import ALONE
from util import masking
from util.data.datasets import ImageDataset, build_source, find_images
from util.data.transforms import CenterCrop, ToModelInput
from util.rng import generator
from util.run import checkpoint, distributed, options
from util.run.logger import cpu_threads, log, setup_logging
from visualize.curves import read_log

PIXEL, NORM = ["--target", "pixel"], ["--target", "norm_pixel"]
MAE, PREDICTOR = ["--no-learning_loss"], ["--mask_strategy", "random"]

# What a variant changes in main_pretrain's options. `_long` trains --long_factor times the epochs, `_slow` has the
# paper's EMA decay, which is made for runs of many more steps; `_mask_tokens` has the teacher read its predictions at
# mask tokens (`predict_at_mask_tokens`).
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
    "hpm_norm_slow": [*NORM, "--ema_decay", "0.999", "--ema_decay_final", "0.9999", "--ema_ramp_epochs", "100"],
}
MAIN = list(VARIANTS)[:6]

# Options that make a run what it is: two lines with the same values of these are of the same run.
BUDGET = [
    *["data", "train_images", "val_images", "model", "input_size", "patch_size", "epochs", "batch_size", "blr"],
    *["precision", "ema_decay", "ema_decay_final", "long_factor"],
    *["probe_epochs", "probe_blr", "finetune_epochs", "finetune_blr"],
]


def get_args_parser() -> options.OptionParser:
    parser = options.OptionParser(__doc__.split("\n")[0])
    group = parser.add_argument_group("what to run")
    group.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=MAIN, help="which of the grid")
    group.add_argument(
        "--seeds", nargs="+", type=options.SEED, default=[0, 1, 2], help="a run of each variant for each"
    )
    group.add_argument("--results", default="docs/study/study.jsonl", help="file of one line a finished run")
    group.add_argument("--work_dir", default="study_runs", help="folder of checkpoints and logs; needed to go on only")
    group.add_argument("--jobs", type=options.COUNT, default=1, help="runs at a time; they share out the CPU's cores")
    group.add_argument("--device", help="cuda or cpu; default: cuda where there is one")

    group = parser.add_argument_group("data")
    group.add_argument("--data_path", help="as main_pretrain's; left out: Shapes")
    group.add_argument(
        "--train_images", type=options.COUNT, help="so many training images, evenly chosen; default: all"
    )
    group.add_argument("--val_images", type=options.COUNT, help="so many validation images; default: all")
    group.add_argument("--mean", type=options.number(float), nargs=3, help="mean colour; default: ImageNet's")
    group.add_argument("--std", type=options.POSITIVE, nargs=3, help="its standard deviation; default likewise")

    group = parser.add_argument_group("budget")
    known = list(models_hpm.MODELS)
    group.add_argument("--model", type=options.one_of(known, "model"), default="mae_vit_micro_patch16", help="size")
    group.add_argument("--input_size", type=options.COUNT, default=32, help="side of the images, in pixels")
    group.add_argument("--patch_size", type=options.COUNT, default=4, help="side of a patch")
    group.add_argument("--epochs", type=options.COUNT, default=20, help="of pre-training")
    group.add_argument("--batch_size", type=options.COUNT, default=128, help="images a step, in every stage")
    group.add_argument(
        "--blr", type=options.POSITIVE, default=2e-3, help="learning rate of pre-training per 256 images"
    )
    group.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of every stage")
    group.add_argument(
        "--ema_decay", type=options.SHARE, default=0.99, help="of the teacher; the paper's 0.999 is for long runs"
    )
    group.add_argument("--ema_decay_final", type=options.SHARE, default=0.999, help="and at the end of the run")
    group.add_argument(
        "--long_factor",
        type=options.number(float, low=1),
        default=2.0,
        help="epochs of the _long variants, times --epochs: HPM's time over MAE's, which the report shows",
    )
    group.add_argument("--probe_epochs", type=options.COUNT, default=10, help="of the linear probe")
    group.add_argument(
        "--probe_blr", type=options.POSITIVE, nargs="+", default=[0.03, 0.1, 0.3], help="its learning rates, best taken"
    )
    group.add_argument("--finetune_epochs", type=options.COUNT, default=5, help="of fine-tuning")
    group.add_argument("--finetune_blr", type=options.POSITIVE, default=2e-3, help="its learning rate")
    group.add_argument(
        "--rank_images", type=options.COUNT, default=256, help="validation images of the rank correlation"
    )
    group.add_argument("--rank_masks", type=options.COUNT, default=32, help="random masks of each")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SEED"), help="do this run here, whatever has a line")
    return parser


# ------------------------------------------------------------------------------------------------------------ the runs


def key(args: argparse.Namespace, variant: str, seed: int) -> dict[str, Any]:
    """What a run is."""
    values = {**vars(args), "data": Path(args.data_path).name if args.data_path else "Shapes"}
    return {"variant": variant, "seed": seed, **{name: values[name] for name in BUDGET}}


def run_folder(args: argparse.Namespace, variant: str, seed: int) -> Path:
    """Where a run keeps its checkpoints: runs of other data or another budget have other folders."""
    budget = {name: value for name, value in key(args, variant, seed).items() if name in BUDGET}
    digest = hashlib.sha256(json.dumps(budget).encode()).hexdigest()[:8]
    return Path(args.work_dir, f"{Path(budget['data']).stem}-{digest}", f"{variant}-{seed}")


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Lines of a results file; none if there is no file."""
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append_result(path: Path, row: dict[str, Any]) -> None:
    """One line more; several runs may write to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        file.write(json.dumps(row) + "\n")


def subset(data_path: str, counts: dict[str, int | None], folder: Path) -> str:
    """An archive of evenly chosen images of both splits, as many of each class as of any other; made once.

    Raises:
        ValueError: there are fewer images than asked for.
    """
    path = folder / f"{Path(data_path).name.split('.')[0]}-{'-'.join(str(n or 'all') for n in counts.values())}.tar"
    if path.exists():
        return str(path)
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with tarfile.open(partial, "w") as tar:
        for split, count in counts.items():
            files = find_images(data_path, split)
            if count is not None and count > len(files):
                raise ValueError(f"--{split}_images {count}: {data_path} has {len(files)}")
            for i in range(count or len(files)):
                index = i * len(files) // (count or len(files))
                content = files.read(index)
                name = os.fsdecode(files.names[index])
                member = tarfile.TarInfo(f"{split}/{name}" if "/" in name else f"{split}/{files.labels[index]}/{name}")
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
    partial.replace(path)
    return str(path)


def run_all(args: argparse.Namespace, argv: list[str]) -> int:
    """The runs that have no line yet, `args.jobs` at a time; the exit status."""
    done = [{name: row[name] for name in ("variant", "seed", *BUDGET)} for row in read_results(args.results)]
    grid = itertools.product(args.seeds, args.variants)  # a seed of all variants before the next seed
    pending = [(variant, seed) for seed, variant in grid if key(args, variant, seed) not in done]
    log.info("%d runs to do, %d at a time", len(pending), args.jobs)
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
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
    """Pre-train and evaluate; the line of results."""
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

    weights = ["--finetune", folder / "pretrain" / checkpoint.LAST, "--global_pool"]
    knn = main_knn.main([str(word) for word in [*shared, *weights, "--batch_size", args.batch_size]])
    probe = ["--epochs", args.probe_epochs, "--warmup_epochs", 0, "--blr", *args.probe_blr]
    main_linprobe.main([str(w) for w in [*trained, *weights, *probe, "--output_dir", folder / "linprobe"]])
    tune = ["--epochs", args.finetune_epochs, "--warmup_epochs", args.finetune_epochs / 5, "--blr", args.finetune_blr]
    tune += ["--aa=", "--reprob", 0, "--drop_path", 0, "--layer_decay", 0.75]
    main_finetune.main([str(w) for w in [*trained, *weights, *tune, "--output_dir", folder / "finetune"]])

    setup_logging(True)
    device = distributed.pick_device(args.device, ALONE)
    row = key(args, variant, seed)
    row["knn"] = {str(k): round(top1, 3) for k, (top1, _) in knn.items()}
    last = read_log(folder / "linprobe")[-1]
    row["linear"] = max(value for name, value in last.items() if name.startswith("test_acc1"))
    row["finetune"] = read_log(folder / "finetune")[-1]["test_acc1"]
    for name in ("loss_rec", "rank_acc"):
        row[name] = [round(line[f"train_{name}"], 5) for line in epochs_log if f"train_{name}" in line]
    rate = statistics.median(line["images_per_s"] for line in epochs_log)  # whatever disturbed some of the epochs
    images = json.loads((folder / "pretrain/config.json").read_text())["options"]["steps_per_epoch"] * args.batch_size
    row["images_per_s"], row["seconds"] = round(rate, 1), round(epochs * images / rate, 1)
    row["data_wait"] = round(sum(line["data_wait"] for line in epochs_log) / len(epochs_log), 4)
    row["spearman"] = rank_correlations(args, folder / "pretrain" / checkpoint.LAST, device)
    row["device"] = torch.cuda.get_device_name() if device.type == "cuda" else cpu_threads()
    row["torch"] = torch.__version__
    row["date"] = datetime.date.today().isoformat()
    return row


# --------------------------------------------------------------------------------------- predicted and true patch error


@torch.no_grad()
def predict_at_mask_tokens(
    model: models_hpm.MaskedAutoencoderViT, imgs: Tensor, return_tokens: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """`predict_loss`, but read where the predictor was trained to answer: at mask tokens, one beside each patch of the
    whole image. (B, C, H, W) -> (B, L). Our own; HPM reads it at the patches themselves."""
    latent = model.forward_encoder(imgs)  # (B, 1 + L, E)
    seen = model.decoder_embed(latent) + model.decoder_pos_embed  # (B, 1 + L, F)
    hidden = (model.mask_token + model.decoder_pos_embed[:, 1:]).expand(len(imgs), -1, -1)  # (B, L, F)
    loss_pred = model.forward_loss_predictor(torch.cat([seen, hidden.to(seen.dtype)], dim=1), num_last=hidden.shape[1])
    return (loss_pred, latent[:, 1:]) if return_tokens else loss_pred


def teacher_of(variant: str) -> AbstractContextManager:
    """How the EMA teacher of a variant scores the patches: as published, but for `_mask_tokens`."""
    if not variant.endswith("_mask_tokens"):
        return nullcontext()
    return mock.patch.object(models_hpm.MaskedAutoencoderViT, "predict_loss", predict_at_mask_tokens)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of each row of (N, L) and (N, L) -> (N,)."""
    ranks = [x.argsort(dim=1).argsort(dim=1).double() for x in (a, b)]
    centred = [r - r.mean(dim=1, keepdim=True) for r in ranks]
    products = (centred[0] * centred[1]).sum(dim=1)
    return products / torch.sqrt(centred[0].square().sum(dim=1) * centred[1].square().sum(dim=1))


@torch.no_grad()
def masked_errors(
    model: models_hpm.MaskedAutoencoderViT, imgs: Tensor, masks: int, ratio: float
) -> tuple[Tensor, Tensor]:
    """Of each patch, averaged over those of `masks` random masks that hide it: its true error (B, L), and what the
    predictor expects of it (B, L) when it sees the other patches only, as in training."""
    num_patches = model.patch_embed.num_patches
    num_masked = masking.count_masked(num_patches, ratio)
    errors, expected, count = torch.zeros(3, len(imgs), num_patches, device=imgs.device)
    for number in range(masks):
        mask = masking.random_mask(len(imgs), num_patches, num_masked, generator(number)).to(imgs.device)
        out = model(imgs, mask, num_masked=num_masked)
        for total, values in ((errors, out["patch_loss"]), (expected, out["loss_pred"])):  # values (B, M)
            total += torch.zeros_like(total).masked_scatter_(mask, values)
        count += mask
    return errors / count.clamp(min=1), expected / count.clamp(min=1)


def rank_correlations(args: argparse.Namespace, path: Path, device: torch.device) -> dict[str, float]:
    """How predicted losses of an image's patches follow their true errors, mean over validation images: predicted
    from the whole image by the EMA teacher, which chooses the masks so, and by the student; by the teacher from the
    whole image at mask tokens; and by the student from the visible patches, as it was trained to (`masked`). Empty
    without a predictor."""
    content = checkpoint.read_run(path)
    if not content["options"]["learning_loss"]:
        return {}
    source = build_source(args.data_path, "val", shapes_count=args.rank_images)
    picked = [len(source) * i // args.rank_images for i in range(min(args.rank_images, len(source)))]
    dataset = ImageDataset(source, CenterCrop(args.input_size))
    image = content["image"]
    images = torch.stack([dataset[i].image for i in picked])
    imgs = ToModelInput(image["mean"], image["std"], device, flip=False)(images)
    student = main_pretrain.build_model(argparse.Namespace(**content["options"])).to(device).eval()
    student.load_state_dict(content["state_dict"])
    errors, expected = masked_errors(student, imgs, args.rank_masks, content["options"]["mask_ratio"])
    found = {"masked": round(float(spearman(expected, errors).mean()), 4)}
    for name, weights in (("student", "state_dict"), ("teacher", "ema_state_dict")):
        student.load_state_dict(content[weights])
        with torch.no_grad():
            found[name] = round(float(spearman(student.predict_loss(imgs), errors).mean()), 4)
    found["mask_tokens"] = round(float(spearman(predict_at_mask_tokens(student, imgs), errors).mean()), 4)  # teacher's
    return found


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    setup_logging(True)
    with options.user_mistakes():
        args = get_args_parser().parse_args(argv)
        if args.data_path and (args.train_images or args.val_images):
            counts = {"train": args.train_images, "val": args.val_images}
            whole, args.data_path = args.data_path, subset(args.data_path, counts, Path(args.work_dir))
            log.info("data      %s of %s", args.data_path, whole)
    if args.one is None:
        return run_all(args, argv)
    variant, seed = args.one[0], int(args.one[1])
    append_result(Path(args.results), run_one(args, variant, seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
