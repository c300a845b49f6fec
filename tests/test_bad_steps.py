"""A non-finite loss or gradient: the step is skipped on the device and counted; too many in a row abort the run."""

import copy
import json

import pytest
import torch
from programs import PRETRAIN, checkpoint, log_lines, on_ranks, run
from test_distributed import in_a_group
from test_ema import student_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from main_linprobe import sgd_with_momentum
from util.ema import EMATeacher
from util.lars import LARS
from util.losses import absolute_loss, feature_loss, relative_loss
from util.metrics import MeanMeter
from util.run import distributed
from util.run.amp import Amp, NonFinite

CPU = torch.device("cpu")
OPTIMIZERS = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "fused SGD": lambda p: sgd_with_momentum([{"params": list(p)}], lr=0.1, weight_decay=0.0),
    "LARS": lambda p: LARS(p, lr=0.1, weight_decay=0.1),
}
FAULTS = {
    "loss is nan": lambda loss, x: loss * torch.nan,
    "loss is inf with a finite gradient": lambda loss, x: loss + torch.inf,
    "gradient alone is inf": lambda loss, x: loss + (x.sum() * 0).sqrt(),
}


def train(build, faults):
    """A few steps with the losses of some replaced; weights, optimizer state and amp."""
    torch.manual_seed(0)
    model = student_of(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    teacher, optimizer, amp = EMATeacher(model), build(model.parameters()), Amp("fp32", CPU)
    for fault in faults:
        if fault == "skipped batch":
            continue
        images = torch.ones(2, 4)
        out = model(images)
        loss = out.square().sum()
        amp.backward(fault(loss, out) if fault else loss)
        amp.step(optimizer, list(model.parameters()), 1.0)
        teacher.update(0.9)
    state = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
    assert all(value.isfinite().all() for value in teacher.module.state_dict().values())
    return [*model.state_dict().values(), *state], amp


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_bad_step_changes_nothing_at_all(build, fault):
    """At the very first step, and among others: weights, moments, and the optimizer's count of steps."""
    faulty, amp = train(build, [fault, None, fault, fault, None])
    clean, _ = train(build, ["skipped batch", None, "skipped batch", "skipped batch", None])
    assert all(torch.equal(a, b) for a, b in zip(faulty, clean, strict=True))
    assert amp.read_skipped()[:2] == (3, 2)
    assert amp.read_skipped()[:2] == (3, 0)


def test_finite_losses_go_through_untouched():
    """What watches them changes no bit."""
    x = torch.randn(5, requires_grad=True)
    Amp("fp32", CPU).backward(x.exp().sum())
    watched = x.grad.clone()
    x.grad = None
    x.exp().sum().backward()
    assert torch.equal(watched, x.grad)


class NothingIsRead(TorchDispatchMode):
    """Fails where a number is taken from a tensor, which on a GPU would wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_step_reads_no_number_off_the_device(build, monkeypatch):
    """On any machine: from the loss to the teacher and the meter, the step is a fixed list of kernels."""
    model = student_of(nn.Linear(4, 1))
    teacher, optimizer = EMATeacher(model), build(model.parameters())
    amp, meter, parameters = Amp("fp32", CPU), MeanMeter(), list(model.parameters())
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: pytest.fail("read"))  # which the mode does not see
    with NothingIsRead():
        for factor in (1.0, torch.nan, 1.0):
            loss = model(torch.ones(2, 4)).sum() * factor
            amp.backward(loss)
            meter.update(loss=loss, grad_norm=amp.step(optimizer, parameters, 1.0))
            teacher.update(0.9)
    with pytest.raises(AssertionError), NothingIsRead():  # it does notice
        amp._total.item()


@pytest.mark.gpu
def test_a_step_waits_for_no_device():
    device = torch.device("cuda")
    model = student_of(nn.Linear(4, 4)).to(device)
    teacher, optimizer = EMATeacher(model), torch.optim.AdamW(model.parameters(), fused=True)
    amp, images = Amp("fp32", device), torch.ones(2, 4, device=device)
    try:
        for attempt in range(3):
            torch.cuda.set_sync_debug_mode("error" if attempt else "default")
            amp.backward(model(images).square().sum())
            amp.step(optimizer, list(model.parameters()), 1.0)
            teacher.update(0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_overflows_in_fp16_do_not_count_until_the_scale_cannot_fall_further():
    weight = nn.Parameter(torch.ones(2))
    optimizer, amp = torch.optim.AdamW([weight], fused=True), Amp("fp32", CPU)
    amp.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    counted = []
    for _ in range(6):  # at scales 8, 4, 2, 1, 1, 1
        amp.backward(weight.sum() * torch.inf)
        amp.step(optimizer, [weight], 0.0)
        counted.append(amp.read_skipped().total)
    assert counted == [0, 0, 0, 1, 2, 3]
    assert amp.state_dict()["scale"] == 1.0
    assert torch.equal(weight.detach(), torch.ones(2))


def poisoned(monkeypatch, steps):
    """Let the losses of these steps of the run (counted from its start) be NaN."""
    from models_hpm import MaskedAutoencoderViT

    forward, calls = MaskedAutoencoderViT.forward, []

    def faulty(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        calls.append(1)
        if len(calls) - 1 in steps:
            out["loss"] = out["loss"] * torch.nan
        return out

    monkeypatch.setattr(MaskedAutoencoderViT, "forward", faulty)


def test_a_run_skips_and_counts_them(tmp_path, monkeypatch):
    poisoned(monkeypatch, {1, 2, 7})
    log = run("main_pretrain", *PRETRAIN, "--output_dir", tmp_path, "--max_bad_steps", 2, "--log_interval", 1)
    assert "Skipped 1 steps with a non-finite loss or gradient (2 in total)" in log
    first, second = log_lines(tmp_path)
    assert (first["bad_steps"], second["bad_steps"]) == (2, 3)
    assert 0 < first["train_loss"] < 10  # one NaN does not hide the other losses
    state = checkpoint(tmp_path)
    assert all(value.isfinite().all() for key in ("state_dict", "ema_state_dict") for value in state[key].values())
    assert {int(s["step"]) for s in state["optimizer"]["state"].values()} == {12 - 3}


def test_too_many_in_a_row_end_the_run_with_a_report_and_the_last_good_checkpoint(tmp_path, monkeypatch):
    poisoned(monkeypatch, range(7, 99))
    run("main_pretrain", *PRETRAIN, "--output_dir", tmp_path / "good", "--epochs", 4, "--max_steps", 6)
    before = copy.deepcopy(checkpoint(tmp_path / "good"))
    with pytest.raises(NonFinite, match=r"4 consecutive steps, more than --max_bad_steps 3, from epoch 1, step 1 on"):
        # the model is counted from 6 on again: calls 0 to 5 were of the run above
        run(
            *["main_pretrain", *PRETRAIN, "--output_dir", tmp_path / "good", "--epochs", 4],
            *["--max_bad_steps", 3, "--log_interval", 1],
        )
    after = checkpoint(tmp_path / "good")
    assert (after["epoch"], after["step"]) == (1, 0)
    assert all(torch.equal(before["state_dict"][k], v) for k, v in after["state_dict"].items())
    report = json.loads((tmp_path / "good/bad_steps.json").read_text())
    assert (report["epoch"], report["step"], report["steps_in_a_row"]) == (1, 1, 4)
    assert str(report["losses"]) == "[nan]"
    assert len(report["files"]) == len(set(report["files"])) == 8
    assert report["files"][0].startswith("Shapes train ")


def test_a_short_run_says_that_it_learned_nothing(tmp_path, monkeypatch):
    """--max_steps ends before the first line of the log is due."""
    poisoned(monkeypatch, range(99))
    with pytest.raises(NonFinite, match=r"4 consecutive steps, more than --max_bad_steps 3"):
        run("main_pretrain", *PRETRAIN, "--output_dir", tmp_path, "--max_bad_steps", 3, "--max_steps", 4,
            "--log_interval", 99)  # fmt: skip
    log = run("main_pretrain", *PRETRAIN, "--output_dir", tmp_path / "b", "--max_steps", 2, "--log_interval", 99)
    assert "epoch 1/2  step 2/6  loss" in log
    assert "Skipped 2 steps with a non-finite loss or gradient" in log


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_safe_in_half_precision(dtype):
    """The largest values of the format, equal ones and tiny ones give finite losses and gradients."""
    largest = torch.finfo(dtype).max
    for values in ([largest, -largest, 0.0], [1.0, 1.0, 1.0], [torch.finfo(dtype).tiny, 0.0, 1e-3]):
        pred = torch.tensor([values], dtype=dtype, requires_grad=True)
        target = torch.tensor([values[::-1]], dtype=dtype)
        for loss in (relative_loss, absolute_loss):
            result = loss(pred, target)
            assert result.dtype == torch.float32
            assert result.isfinite()
            (gradient,) = torch.autograd.grad(result, pred)
            assert gradient.float().isfinite().all() or loss is absolute_loss  # whose true gradient may not fit
    features = torch.tensor([[[3e4, 1e-4], [0.0, 0.0]]], dtype=dtype, requires_grad=True)
    result = feature_loss(features, features.detach().flip(1))
    assert result.isfinite().all()
    (gradient,) = torch.autograd.grad(result.sum(), features)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_safe_in_half_precision(dtype, fused):
    """Scores that overflow fp16 unless they are scaled before they are multiplied."""
    from timm.layers import Attention

    attention = Attention(64, num_heads=1).to(dtype)
    attention.fused_attn = fused
    with torch.no_grad():
        attention.qkv.weight.copy_(torch.eye(64, dtype=dtype).repeat(3, 1) * 60)
    x = torch.ones(1, 5, 64, dtype=dtype, requires_grad=True)  # q k = 64 * 60 * 60 = 230400, over 65504; / 8 is not
    out = attention(x)
    out.float().sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()


def test_a_step_leaves_no_switch_behind():
    weight = nn.Parameter(torch.ones(2))
    optimizer, amp = torch.optim.AdamW([weight], fused=True), Amp("fp32", CPU)
    amp.backward(weight.sum())
    amp.step(optimizer, [weight], 0.0)
    assert not hasattr(optimizer, "found_inf")
    assert (weight < 1).all()


def test_the_longest_row_is_the_one_that_is_reported():
    """Two steps in a row, a good one, one more: the first two, and later rows are compared with what was not read."""
    weight = nn.Parameter(torch.ones(2))
    optimizer, amp = torch.optim.AdamW([weight], fused=True), Amp("fp32", CPU)
    for step in range(8):
        amp.backward(weight.sum() * (torch.nan if step in (1, 2, 4, 7) else 1.0) + step)
        amp.step(optimizer, [weight], 0.0)
        if step == 5:
            read = amp.read_skipped()
            assert read[:3] == (3, 2, 1)
            assert str(read.loss) == "nan"
    assert amp.read_skipped()[:3] == (4, 1, 7)
    assert amp.read_skipped()[:3] == (4, 1, 7)  # the row may continue


def faults_of_rank_one(world):
    model = distributed.wrap_ddp(nn.Linear(4, 1), CPU)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    amp, before = Amp("fp32", CPU), model.module.weight.clone()
    for fault in (torch.nan, torch.inf):
        loss = model(torch.ones(2, 4)).sum() + (fault if world.rank == 1 else 0.0)
        amp.backward(loss)
        amp.step(optimizer, list(model.parameters()), 1.0)
    read = amp.read_skipped()
    return read[:3], torch.equal(before, model.module.weight), read.loss == read.loss


def test_ranks_skip_alike_when_one_of_them_sees_the_fault():
    """A loss of NaN, and one of inf with a finite gradient, on rank 1 alone: the reduced gradient shows it."""
    assert on_ranks(in_a_group, faults_of_rank_one) == [((2, 2, 0), True, True), ((2, 2, 0), True, False)]
