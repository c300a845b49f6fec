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
from util.rng import seed_all
from util.run.amp import Amp
from util.run.loop import Loop

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
    rows = []

    def read(loop):
        means = loop.meter.window(lambda tensor: tensor)
        rows.append([means[name] for name in ("loss_rec", "loss_learn", "grad_norm")])

    train_one_epoch(
        model,
        teacher,
        None,
        [(images,) for images in golden["images"]],
        optimizer,
        Amp("fp32", torch.device("cpu")),
        GivenMasks(golden["masks"], 12),
        StepsOnly(after_step=read),
        to_model_input=lambda images: images,
        clip_grad=meta["clip_grad"],
        ema_decay=meta["ema_decay"],
    )
    return np.array(rows)


class StepsOnly(Loop):
    """A loop without a run: it takes the batches as they come and calls `after_step` with itself after each step."""

    def __init__(self, after_step=lambda loop: None, accum_iter=1, seed=None):
        self.epoch, self.accum_iter, self.meter = 0, accum_iter, MeanMeter()
        self.after_step, self.seed = after_step, seed

    def steps(self, loader):
        batches = iter(loader)
        for step in range(len(loader) // self.accum_iter):
            yield self._micro_batches(batches, step)
            self.after_step(self)

    def _micro_batches(self, batches, step):
        for micro in range(self.accum_iter):
            self._last_micro_batch = micro == self.accum_iter - 1
            if self.seed is not None:
                seed_all(self.seed, step * self.accum_iter + micro)
            yield next(batches)


class GivenMasks:
    """Stands in for a MaskSampler; the teacher scores the images nevertheless."""

    num_hidden = 0
    num_hardest = (1,)

    def __init__(self, masks, num_masked):
        self.masks, self.num_masked = iter(masks), num_masked

    def draw(self, scores, batch_size, epoch, device):
        return next(self.masks)


VIT_FILES = ["vit_global_pool", "vit_cls_token"]


def build_vit(meta, **kwargs):
    """The fine-tuning ViT of a golden file."""
    names = ["img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes", "global_pool"]
    return VisionTransformer(**{**{name: meta[name] for name in names}, **kwargs}).eval()
