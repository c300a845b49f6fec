"""The benchmarks' arithmetic against PyTorch's counter, and the scripts as a person runs them."""

import pytest
import torch
from images import write_tar
from programs import run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import models_hpm
from benchmarks import arithmetic
from benchmarks.step import PARTS, Case, Trainer, peak_of_process
from util.masking import count_masked, random_mask

SIZES = [("mae_vit_micro_patch16", 32, 8, 0.6), ("mae_vit_base_patch16", 224, 16, 0.75)]


@pytest.mark.parametrize("learning_loss", [True, False])
@pytest.mark.parametrize(("name", "size", "patch", "ratio"), SIZES)
def test_the_formula_is_what_torch_counts(name, size, patch, ratio, learning_loss):
    """Without the fused attention, whose backward pass computes a product again."""
    with FakeTensorMode(allow_non_fake_inputs=True):  # shapes alone: nothing is computed
        check_counts(models_hpm.MODELS[name](img_size=size, patch_size=patch, learning_loss=learning_loss), ratio)


def check_counts(model, ratio):
    for block in (module for module in model.modules() if hasattr(module, "fused_attn")):
        block.fused_attn = False
    images = torch.empty(2, 3, *model.img_size)
    num_patches = model.patch_embed.num_patches
    num_masked = count_masked(num_patches, ratio)
    with FlopCounterMode(display=False) as student:
        model(images, random_mask(2, num_patches, num_masked), num_masked=num_masked)["loss"].backward()
    assert student.get_total_flops() == 2 * 2 * arithmetic.student_macs(model, num_masked)
    if model.learning_loss:
        with FlopCounterMode(display=False) as teacher:
            model.predict_loss(images)
        assert teacher.get_total_flops() == 2 * 2 * arithmetic.teacher_macs(model)


def test_a_step_of_the_base_model():
    """67.9 G multiply-accumulates an image, 2.33 times MAE's."""
    with torch.device("meta"):
        hpm, mae = (models_hpm.mae_vit_base_patch16(learning_loss=on) for on in (True, False))
    hpm, mae = (arithmetic.step_flops(model, 147, 8) / 16 for model in (hpm, mae))
    assert round(hpm / 1e9, 1) == 67.9
    assert round(hpm / mae, 2) == 2.33


def test_step_prints_its_tables():
    """Eager and both methods; the parts are those that the engine has."""
    tiny = ["--model", "mae_vit_micro_patch16", "--input_size", "16", "--patch_size", "4", "--device", "cpu"]
    log = run(
        "benchmarks.step", *tiny, "--compile", "no", "--batch_size", 2, "--repeats", 2, "--product_side", 64, "--parts"
    )
    rows = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in log.splitlines() if row.startswith("| ")}
    assert [name for name in rows if name != "case"] == [f"{m} micro, fp32, eager, batch 2" for m in ("HPM", "MAE")]
    parts = dict(zip(PARTS, rows["MAE micro, fp32, eager, batch 2"], strict=True))
    assert [name for name, share in parts.items() if share.strip() == "-"] == ["teacher", "EMA"]
    assert "HPM micro, fp32, eager, batch 2 : MAE micro, fp32, eager, batch 2 = " in log


def test_parts_add_up_to_the_step():
    """Whatever the stopwatch books, it books all of it once."""
    size = ["--input_size", "16", "--patch_size", "4"]
    trainer = Trainer(Case("mae_vit_micro_patch16", "hpm", "fp32", "no", 2), torch.device("cpu"), size)
    seconds = trainer.steps(3)
    step = seconds.pop("step")
    assert set(seconds) == {"data", "teacher", "encoder", "decoders", "losses", "optimizer", "EMA", "mask", "rest"}
    assert all(value > 0 for value in seconds.values())
    assert sum(seconds.values()) == pytest.approx(step, rel=1e-3)


def test_peak_memory_is_that_of_the_case_alone():
    """A process starts with the record of the one that it was forked from: not with that of 3 GiB here."""
    size = ["--input_size", "16", "--patch_size", "4"]
    small = Case("mae_vit_micro_patch16", "mae", "fp32", "no", 2)
    held = torch.ones(3 * 2**28)
    assert 2**28 < peak_of_process(small, size) < held.nbytes / 2


def test_data_prints_its_tables():
    options = ["--images", 4, "--batch_size", 2, "--input_size", 32, "--workers", 0, "--repeats", 1, "--loop"]
    log = run("benchmarks.data", *options, "--steps", 1, "--model", "mae_vit_micro_patch16", "--device", "cpu")
    for name in ("official: Pillow, torchvision, float32", "this project, folder", "this project, tar", "tar.gz cache"):
        assert log.count(name) >= 2  # on one thread, and through the loader
    assert "only decoding (the limit)" in log
    assert "HPM micro, fp32, eager, batch 2 |" in log


def test_data_refuses_an_archive(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("benchmarks.data", "--data_path", write_tar(tmp_path / "data.tar"))
    assert "is an archive: give the folder of its files" in capsys.readouterr().err
