"""Reading the golden files, and the training step they record."""

import json
from pathlib import Path

import numpy as np
import torch
from timm.optim import param_groups_weight_decay

from engine_pretrain import train_one_epoch
from models_hpm import MaskedAutoencoderViT
from models_vit import VisionTransformer
from util.metrics import MeanMeter
from util.run.amp import Precision
from util.run.logger import Progress, RunLogger

FOLDER = Path(__file__).parent / "golden"


def load(name):
    """Arrays of a golden file as tensors (numbers as arrays), and its settings."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files if key != "meta"}
        meta = json.loads(str(file["meta"])) if "meta" in file.files else {}
    golden = {k: torch.from_numpy(a) if a.dtype in (np.float32, np.bool_, np.int64) else a for k, a in arrays.items()}
    return golden, meta


def params(golden):
    return {key.removeprefix("param/"): value for key, value in golden.items() if key.startswith("param/")}


def build_hpm(golden, meta, **kwargs):
    names = ["img_size", "patch_size", "embed_dim", "depth", "num_heads", "norm_pix_loss"]
    names += ["decoder_embed_dim", "decoder_depth", "decoder_num_heads"]
    settings = {name: meta[name] for name in names}
    model = MaskedAutoencoderViT(**settings, relative=meta.get("relative", True), **kwargs)
    model.load_state_dict(params(golden), strict=True)
    return model


def run_engine(model, teacher, golden, meta):
    """The recorded steps through the engine -> (5, 3): reconstruction loss, predictor loss, norm before clipping."""
    optimizer = torch.optim.AdamW(
        param_groups_weight_decay(model, meta["weight_decay"]), lr=meta["lr"], betas=meta["betas"], fused=True
    )
    masks, meter, rows = iter(golden["masks"]), MeanMeter(), []

    def end_of_step(step):
        means = meter.window(lambda tensor: tensor)
        rows.append([means[name] for name in ("loss_rec", "loss_learn", "grad_norm")])

    train_one_epoch(
        model,
        teacher,
        [(images,) for images in golden["images"]],
        optimizer,
        Precision("fp32", torch.device("cpu")),
        to_model_input=lambda images: images,
        look=lambda images: (teacher.module.predict_loss(images), None),
        draw_mask=lambda scores, images: next(masks),
        num_masked=12,
        accum_iter=1,
        clip_grad=meta["clip_grad"],
        adjust_lr=lambda epoch: meta["lr"],
        ema_decay=meta["ema_decay"],
        seed_micro_step=lambda number: None,
        epoch=0,
        first_step=0,
        steps=meta["steps"],
        progress=silent_progress(),
        meter=meter,
        after_step=end_of_step,
    )
    return np.array(rows)


def silent_progress():
    """One that never asks for the numbers of a step, so that tests read those of each."""
    never = 10**9
    return Progress(
        RunLogger(None, None, 0),
        **{"epoch": 0, "epochs": 1, "first_step": 0, "total_steps": never, "images_per_step": 1, "interval": never},
    )


VIT_FILES = ["vit_global_pool", "vit_cls_token"]


def build_vit(meta, **kwargs):
    """The fine-tuning ViT of a golden file."""
    names = ["img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes", "global_pool"]
    return VisionTransformer(**{**{name: meta[name] for name in names}, **kwargs}).eval()
