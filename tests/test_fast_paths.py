"""What makes a step fast changes nothing: compiled regions, and a step that never synchronises with the device."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from golden import StepsOnly
from programs import PRETRAIN, checkpoint, log_lines, run
from torch.utils._python_dispatch import TorchDispatchMode

from engine_pretrain import train_one_epoch
from models_hpm import MaskedAutoencoderViT
from util.data.transforms import ToModelInput
from util.ema import EMATeacher
from util.masking import MaskSampler, random_mask
from util.metrics import MeanMeter
from util.run.amp import Amp

SMALL = {
    **{"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2},
    **{"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
}


# The teacher sees the whole image (HPM); scores the patches hidden from it by predicted or by true loss.
TEACHERS = [{}, {"teacher_keep": 0.25}, {"teacher_keep": 0.25, "score_by": "loss"}]


class Masks(MaskSampler):
    """Masks of a run whose epochs have three steps: 2, 3, 4, 6 of 12 by score."""

    steps = 0

    def __init__(self, strategy, teacher_keep):
        super().__init__((4, 4), 0.75, 4, strategy, alphas=(0.1, 0.5), teacher_keep=teacher_keep)

    def draw(self, scores, batch_size, epoch, device):
        self.steps += 1
        return super().draw(scores, batch_size, (self.steps - 1) // 3, device=device)


def train(
    steps,
    device="cpu",
    compiled=False,
    precision="fp32",
    guard=nullcontext,
    after_step=None,
    strategy="easy_to_hard",
    teacher_keep=1.0,
    score_by="predictor",
):
    """Steps of HPM on random images, every third with another number of hardest patches.

    Returns:
        The loss of each; none where a `guard` or `after_step` watches the steps.
    """
    device = torch.device(device)
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(**SMALL).to(device)
    model.score_by, masks = score_by, Masks(strategy, teacher_keep)
    teacher = EMATeacher(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    if compiled:
        model.compile(fullgraph=True)
        teacher.compile(fullgraph=True)
    images = torch.randint(256, (steps, 4, 3, 16, 16), dtype=torch.uint8)
    losses = []

    def read(loop):  # as on a step of the log
        losses.append(loop.meter.window(lambda tensor: tensor)["loss"])

    if guard is not nullcontext:
        after_step = lambda loop: None  # noqa: E731
    loop = StepsOnly(seed=0, after_step=after_step or read)
    if after_step:
        loop.meter = Unread()
    to_model_input, amp = ToModelInput((0.5,) * 3, (0.25,) * 3, device, flip=True), Amp(precision, device)
    with guard():
        train_one_epoch(
            model,
            teacher,
            None,
            [(batch,) for batch in images],
            optimizer,
            amp,
            masks,
            loop,
            to_model_input=to_model_input,
            clip_grad=5.0,
            ema_decay=0.99,
        )
    return losses


# ------------------------------------------------------------------------------------------------------------ compiled


@pytest.fixture
def compiled_once(monkeypatch):
    """Graphs as torch.compile cuts them, run without building kernels; compiling one a second time is an error."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


@pytest.mark.compile
@pytest.mark.parametrize("teacher", TEACHERS)
def test_compiled_and_eager_steps_agree_over_ten_steps(compiled_once, teacher):
    """The graphs; that the kernels built for them compute the same, tests/stress/test_compiled.py shows."""
    compiled = train(10, compiled=True, **teacher)
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(train(10, **teacher)), rtol=0, atol=1e-4)


@pytest.mark.compile
def test_a_compiled_run_is_the_eager_one(tmp_path, compiled_once):
    """Over two epochs, of which the second masks more of the hardest patches: one graph a region, compiled once."""
    common = [*PRETRAIN, "--accum_iter", 2, "--target", "ema", "--grad_checkpointing", "--output_dir"]
    run("main_pretrain", *common, tmp_path / "compiled", "--compile")
    run("main_pretrain", *common, tmp_path / "eager")
    for compiled, eager in zip(log_lines(tmp_path / "compiled"), log_lines(tmp_path / "eager"), strict=True):
        for name in ("train_loss", "train_loss_rec", "train_loss_learn"):
            assert compiled[name] == pytest.approx(eager[name], abs=1e-4)
    compiled, eager = checkpoint(tmp_path / "compiled"), checkpoint(tmp_path / "eager")
    for part in ("state_dict", "ema_state_dict"):
        assert compiled[part].keys() == eager[part].keys()


@pytest.mark.compile
@pytest.mark.parametrize("script", ["main_linprobe", "main_knn", "main_finetune"])
def test_compiled_means_that_the_encoder_runs_in_a_graph(tmp_path, monkeypatch, script):
    """In every script whose log says so, and its numbers are the eager ones."""
    calls = []

    def backend(graph, _):
        return lambda *inputs: calls.append(1) or graph(*inputs)

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    options = ["--model", "vit_micro_patch16", "--input_size", 16, "--patch_size", 4, "--num_workers", 0]
    options += ["--shapes_train", 8, "--shapes_val", 8, "--batch_size", 8]
    options += ["--nb_knn", 3] if script == "main_knn" else ["--epochs", 1, "--warmup_epochs", 0]
    found = {}
    for more in ("--no-compile", "--compile"):
        folder = [] if script == "main_knn" else ["--output_dir", tmp_path / more]
        log = run(script, *options, more, *folder)
        assert (", compiled, " in log) == (more == "--compile")
        assert (len(calls) >= 2) == (more == "--compile")  # training and validation images
        found[more] = [line for line in log.splitlines() if "acc1" in line or "top-1" in line]
    assert found["--compile"] == found["--no-compile"]
    torch.compiler.reset()


# ------------------------------------------------------------------------------------------- no waiting for the device


class Unread(MeanMeter):
    """Numbers of steps that are not logged: nobody reads them."""

    def mean(self, reduce):
        return {}


class NoWaiting(TorchDispatchMode):
    """Fails on what a GPU would have to be waited for: reading a value, and shapes that depend on one."""

    waits = ("_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        if name in self.waits or by_mask:
            raise RuntimeError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("teacher", [*TEACHERS, {"teacher_keep": 0.25, "strategy": "easiest"}])
def test_a_step_never_waits_for_the_device(teacher):
    train(4, guard=NoWaiting, **teacher)


@pytest.mark.parametrize(
    "wait", [lambda x: x[0].item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: float(x.sum())]
)
def test_waiting_would_be_noticed(wait):
    with pytest.raises(RuntimeError, match="waits for the device"), NoWaiting():
        wait(torch.randn(4))


def test_reading_the_number_of_masked_patches_would_be_noticed():
    model, images, mask = MaskedAutoencoderViT(**SMALL), torch.rand(2, 3, 16, 16), random_mask(2, 16, 12)
    with pytest.raises(RuntimeError, match="waits for the device"), NoWaiting():
        model(images, mask)


class RandomDraws(TorchDispatchMode):
    """Records the shapes of all random draws on the device."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        attention = "scaled_dot_product" in str(func)  # tagged for its dropout, which is 0
        if torch.Tag.nondeterministic_seeded in func.tags and not attention:
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_step_draws_the_flips_and_the_mask_alone(teacher):
    """One draw more in a published step would change every mask of a run. A sparse teacher also draws what it sees."""
    draws = RandomDraws()
    train(2, guard=lambda: draws, **teacher)
    hidden = [(4, 16)] if teacher else []
    assert draws.shapes == [(4, 1, 1, 1), *hidden, (4, 16)] * 2


@pytest.mark.gpu
def test_waiting_for_a_gpu_would_be_noticed():
    values = torch.ones(2, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            values.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_step_on_a_gpu_never_synchronises(teacher, compiled):
    """From the third step on: the first two build kernels and the optimizer's state."""
    steps = []

    def forbid(loop):
        steps.append(1)
        if len(steps) == 2:
            torch.cuda.set_sync_debug_mode("error")

    try:
        train(6, device="cuda", compiled=compiled, precision="bf16", after_step=forbid, **teacher)
    finally:
        torch.cuda.set_sync_debug_mode("default")
