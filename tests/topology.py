"""Twenty steps of the engine with given masks, on a named topology (see test_engine_pretrain)."""

import torch
from golden import GivenMasks, StepsOnly

import engine_pretrain
from models_hpm import MaskedAutoencoderViT
from util.ema import EMATeacher
from util.masking import random_mask
from util.run import distributed
from util.run.amp import Amp

STEPS, IMAGES = 20, 8
CPU = torch.device("cpu")


def main(argv):
    """NAME OUTPUT"""
    name, output = argv
    world = distributed.read_environment()
    distributed.setup(world, "cpu", "fp32", 1)
    micro_batches = {"once": 1, "accumulated": 2, "two ranks": 2}[name]
    per_rank = IMAGES // world.size // micro_batches

    torch.manual_seed(0)
    model = MaskedAutoencoderViT(
        **{"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2},
        **{"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    )
    images, masks = torch.randn(STEPS * IMAGES, 3, 16, 16), random_mask(STEPS * IMAGES, 16, 12)

    def mine(tensor):
        """What this rank gets of the images or masks, by micro-batch, as EpochSampler shards them."""
        return tensor.view(STEPS * micro_batches, world.size, per_rank, *tensor.shape[1:])[:, world.rank]

    student = distributed.wrap_ddp(model, CPU) if world.size > 1 else model
    teacher = EMATeacher(model)
    losses, first, syncs = [], {}, []

    class Watched(Amp):
        def backward(self, loss):
            syncs.append(getattr(student, "require_backward_grad_sync", True))
            super().backward(loss)

        def step(self, optimizer, parameters, clip_grad):
            first.update({} if first else {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
            return super().step(optimizer, parameters, clip_grad)

    def read(loop):
        losses.append(loop.meter.window(distributed.all_reduce_sum)["loss"])

    engine_pretrain.train_one_epoch(
        student,
        teacher,
        None,
        [(batch,) for batch in mine(images)],
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True),
        Watched("fp32", CPU),
        GivenMasks(mine(masks), 12),
        StepsOnly(after_step=read, accum_iter=micro_batches),
        to_model_input=lambda batch: batch,
        clip_grad=5.0,
        ema_decay=0.99,
    )
    if world.rank == 0:
        torch.save({"gradients": first, "losses": torch.tensor(losses), "syncs": syncs}, output)
    distributed.shutdown()
