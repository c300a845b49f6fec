"""What the tests of exports share: small checkpoints, and running the code of a card."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from programs import PRETRAIN, run

import models_vit
from export import __main__ as export
from util.data.transforms import CenterCrop, ToModelInput
from util.weights.load import load_into, load_pretrained

SIZES = {"img_size": 16, "patch_size": 4}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
FINETUNE = ["--shapes_train", 16, "--shapes_val", 8, "--batch_size", 8, "--epochs", 1, "--num_workers", 0]
FILES = {"timm": ".safetensors", "safetensors": ".safetensors", "detectron2": ".pth", "mmseg": ".pth", "onnx": ".onnx"}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A short run of HPM with a mean and std of its own."""
    folder = tmp_path_factory.mktemp("pretrained")
    run("main_pretrain", *PRETRAIN, "--lr", 1e-3, "--output_dir", folder, "--mean", *MEAN, "--std", *STD)
    return folder / "checkpoint-last.pth"


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory, pretrained):
    """Fine-tuned on the mean of the patches and on the class token, and a linear probe with two heads."""
    folders = {}
    for name, script, more in [
        ("mean", "main_finetune", ["--lr", 1e-3]),
        ("token", "main_finetune", ["--cls_token", "--lr", 1e-3]),
        ("probe", "main_linprobe", ["--blr", 1, 0.1]),
    ]:
        folders[name] = tmp_path_factory.mktemp(name)
        options = [*FINETUNE, "--warmup_epochs", 0, *more, "--finetune", pretrained, "--output_dir", folders[name]]
        run(script, *options)
    return {name: folder / "checkpoint-last.pth" for name, folder in folders.items()}


def parse(*options):
    return export.get_args_parser().parse_args([str(option) for option in options])


def source_of(path, name="timm"):
    """The checkpoint opened as the script opens it."""
    return export.open_source(export.resolve_options(parse("--checkpoint", path, "--format", name)))


def images(size=16, batch=3):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(5))


def photograph():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8))


def encoder_of(path, which="student", name="vit_micro_patch16", **sizes):
    """Our encoder with the weights of a file."""
    model = models_vit.MODELS[name](**(sizes or SIZES), num_classes=0).eval()
    load_into(model, load_pretrained(path, which))
    return model


def classifier_of(path, global_pool):
    model = models_vit.MODELS["vit_micro_patch16"](**SIZES, num_classes=10, global_pool=global_pool).eval()
    model.load_state_dict(load_pretrained(path), strict=True)
    return model


def assert_equal(theirs, ours, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(theirs), ours, rtol=tolerance, atol=tolerance)


def rejected(capsys, *options):
    """The script exits with status 2; returns its message."""
    with pytest.raises(SystemExit) as stop:
        run("export", *options)
    assert stop.value.code == 2
    return capsys.readouterr().err


def failed_check(*options):
    """The check of the export fails and the script exits with a message, which is returned."""
    with pytest.raises(SystemExit) as stop:
        run("export", *options)
    assert str(stop.value.code).startswith("export: error: the check of")
    return str(stop.value.code)


def evaluation_pixels(image, size=16, mean=MEAN, std=STD):
    """What the evaluation of this project feeds to the model for a PIL image: (1, 3, S, S)."""
    crop = CenterCrop(size)(np.array(image))
    return ToModelInput(mean, std, torch.device("cpu"), flip=False)(crop[None])


def from_card(path, folder, **names):
    """Run the code of a card in the folder of the export; returns its variables."""
    (code,) = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(code, names)
    return names
