"""load_encoder and hubconf.py: the features of the evaluation, from every kind of file and from any folder."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from images import members, write_png_16, write_tiff, write_tree
from PIL import Image
from programs import PRETRAIN, ROOT, run
from test_evaluation_scripts import SIZES, formats

import models_load
from util.data.decode import decode_rgb
from util.data.transforms import CenterCrop, EvaluationTransform, ToModelInput

SMALL = ["--batch_size", 4, "--num_workers", 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pre-training run, classifiers of both poolings and a probe on it, and their data."""
    folder = tmp_path_factory.mktemp("load")
    data = write_tree(folder / "data", members(per_class=2))
    run("main_pretrain", *PRETRAIN, "--epochs", 1, "--output_dir", folder / "pretrain")
    more = ["--finetune", folder / "pretrain/checkpoint-last.pth", "--data_path", data, "--max_steps", 1]
    for name, script, pooling in (
        ("mean", "main_finetune", "--global_pool"),
        ("token", "main_finetune", "--cls_token"),
        ("probe", "main_linprobe", "--global_pool"),
    ):
        run(script, *SMALL, *more, pooling, "--output_dir", folder / name)
    return folder


def knn_features(folder, tmp_path, path, *more):
    """What main_knn.py computes for the validation images: (N, E), L2-normalised."""
    options = [*SMALL, "--finetune", path, "--data_path", folder / "data", "--nb_knn", 3]
    run("main_knn", *options, "--dump_features", tmp_path / "features", *more)
    return torch.load(tmp_path / "features/testfeat.pth")["tensor"]


@torch.no_grad()
def our_features(folder, path, *which, **settings):
    model, transform = models_load.load_encoder(path, *which, **settings)
    assert not model.training
    images = [transform(Image.open(file)) for file in sorted(folder.glob("data/val/*/*.jpg"), key=lambda p: p.parts)]
    return F.normalize(model(torch.stack(images)), dim=-1)


def test_every_format_gives_the_features_of_the_evaluation(folder, tmp_path):
    paths = formats(tmp_path, folder / "pretrain/checkpoint-last.pth")
    assert len(paths) == 7
    for path in paths.values():
        expected = knn_features(folder, tmp_path, path, *SIZES)
        torch.testing.assert_close(our_features(folder, path), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "settings"),
    [
        ("pretrain", [], {}),
        ("pretrain", ["--which", "ema"], {"which": "ema"}),
        ("pretrain", ["--global_pool"], {"global_pool": True}),
        ("pretrain", ["--input_size", 24, "--crop_pct", 1], {"input_size": 24, "crop_pct": 1.0}),
        ("mean", ["--global_pool"], {}),
        ("token", [], {}),
        ("token", ["--global_pool"], {"global_pool": True}),
    ],
)
def test_weights_and_pooling(folder, tmp_path, name, options, settings):
    path = folder / name / "checkpoint-last.pth"
    expected = knn_features(folder, tmp_path, path, *options)
    torch.testing.assert_close(our_features(folder, path, **settings), expected, rtol=1e-5, atol=1e-6)


def test_classifiers_and_probes_give_the_input_of_their_head(folder):
    for name in ("mean", "token", "probe"):
        path = folder / name / "checkpoint-last.pth"
        model, _ = models_load.load_encoder(path)
        classifier, transform, names = models_load.load_classifier(path)
        assert names == ["cat", "cat-2", "dog"]
        images = transform(Image.new("RGB", (30, 20), "red"))[None]
        torch.testing.assert_close(classifier.head(model(images)), classifier(images))


def test_a_probe_whose_encoder_has_moved(folder, tmp_path):
    for name in ("probe", "pretrain"):
        shutil.copy(folder / name / "checkpoint-last.pth", tmp_path / f"{name}.pth")
    state = torch.load(tmp_path / "probe.pth", weights_only=True)
    state["options"]["finetune"] = "gone.pth"
    torch.save(state, tmp_path / "probe.pth")
    with pytest.raises(ValueError, match=r"their encoder gone.pth is gone: use --encoder"):
        models_load.load_encoder(tmp_path / "probe.pth")
    moved = {"encoder": str(tmp_path / "pretrain.pth"), "head": 1}
    expected = our_features(folder, folder / "probe/checkpoint-last.pth")
    torch.testing.assert_close(our_features(folder, tmp_path / "probe.pth", **moved), expected)


def test_what_cannot_be_loaded(folder, tmp_path):
    with pytest.raises(ValueError, match="is an encoder without a classifier"):
        models_load.load_classifier(folder / "pretrain/checkpoint-last.pth")
    with pytest.raises(ValueError, match="fine-tuned with global pooling and has no class token norm"):
        models_load.load_encoder(folder / "mean/checkpoint-last.pth", global_pool=False)
    with pytest.raises(ValueError, match="is a linear probe on the weights of the student: omit --which ema"):
        models_load.load_encoder(folder / "probe/checkpoint-last.pth", "ema")
    for settings in ({"img_size": 96}, {"means": [0, 0, 0]}):  # no settings of this project
        with pytest.raises(TypeError):
            models_load.load_encoder(folder / "pretrain/checkpoint-last.pth", **settings)
    with pytest.raises(TypeError):
        models_load.load_classifier(folder / "mean/checkpoint-last.pth", global_pool=True)
    torch.save({"model": {"w": torch.ones(1)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth has no cls_token: it is not a ViT of this family"):
        models_load.load_encoder(tmp_path / "other.pth")


@pytest.mark.parametrize("value_range", [None, (100, 3000)])
def test_the_transform_is_that_of_the_evaluation(tmp_path, value_range):
    """Greyscale, palette, transparency, 16 bits and floats."""
    values = np.random.default_rng(0).integers(0, 4096, (20, 30))
    colours = Image.fromarray((values % 256).astype(np.uint8)).resize((30, 20))
    for number, mode in enumerate(["L", "P", "RGBA", "CMYK"]):
        colours.convert(mode).save(tmp_path / f"{number}.tif")
    (tmp_path / "8.png").write_bytes(write_png_16(values.astype(np.uint16)))
    (tmp_path / "9.tif").write_bytes(write_tiff(values.astype(np.float32)))
    transform = EvaluationTransform(16, 0.8, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4], value_range)
    to_model_input = ToModelInput([0.4, 0.5, 0.6], [0.2, 0.3, 0.4], torch.device("cpu"), flip=False)
    for path in sorted(tmp_path.iterdir()):
        crop = CenterCrop(16, 0.8)(decode_rgb(path.read_bytes(), value_range))
        assert torch.equal(transform(Image.open(path)), to_model_input(crop[None])[0]), path.name


def test_code_of_the_document(folder, tmp_path, monkeypatch):
    """docs/eval.md, with this tree as the other project and a micro model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output_dir").mkdir()
    shutil.copy(folder / "pretrain/checkpoint-last.pth", tmp_path / "output_dir")
    shutil.copy(folder / "mean/checkpoint-last.pth", tmp_path / "classifier.pth")
    Image.new("RGB", (50, 40), "red").save("photo.jpg")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/eval.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for code in blocks:
        small = code.replace("/path/to/this/project", str(ROOT)).replace("vit_base_", "vit_micro_")
        exec(small, names)
    assert names["features"].shape == (1, 128)
    assert names["tokens"].shape == (1, 17, 128)
    assert names["names"] == ["cat", "cat-2", "dog"]
    assert names["untrained"](torch.zeros(1, 3, 224, 224)).shape == (1, 10)


CLASH = """
import sys, torch
import util, util.rng
from PIL import Image
model, transform = torch.hub.load({root!r}, "load_encoder", {path!r}, which="ema", source="local")
torch.save(model(transform(Image.new("RGB", (50, 40), "red"))[None]), "features.pth")
_, _, names = torch.hub.load({root!r}, "load_classifier", {classifier!r}, source="local")
small = torch.hub.load({root!r}, "mae_vit_micro_patch16", source="local", img_size=32)
import util.more
assert (util.WHO, util.rng.WHO, util.more.WHO) == ("theirs",) * 3
assert not [name for name in sys.modules if name.startswith("models_")]
assert {root!r} not in sys.path
print(names, type(small).__name__)
"""


def test_hub_from_a_project_with_a_util_of_its_own(folder, tmp_path):
    (tmp_path / "util").mkdir()
    for name in ("__init__", "rng", "more"):
        (tmp_path / f"util/{name}.py").write_text("WHO = 'theirs'")
    path, classifier = (str(folder / name / "checkpoint-last.pth") for name in ("pretrain", "mean"))
    code = CLASH.format(root=str(ROOT), path=path, classifier=classifier)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "['cat', 'cat-2', 'dog'] MaskedAutoencoderViT\n", done.stderr
    model, transform = models_load.load_encoder(path, "ema")
    ours = model(transform(Image.new("RGB", (50, 40), "red"))[None])
    torch.testing.assert_close(torch.load(tmp_path / "features.pth"), ours)
