"""python -m visualize as a whole program, on checkpoints with the options of pre-training."""

import json
import sys

import numpy as np
import pytest
import torch
from images import encode, members, picture, write_tar, write_tree
from PIL import Image
from programs import run

import main_pretrain
from util.run import checkpoint
from util.run.distributed import World
from util.weights.load import load_pretrained
from visualize import __main__ as visualize
from visualize import curves, draw
from visualize import panel as visualize_panel

SMALL = "--model mae_vit_micro_patch16 --input_size 16 --patch_size 4 --decoder_depth 1 --epochs 4"
TITLES = ["image", "predicted hardness", "mask at the start", "mask at the end", "reconstruction", "true error"]


def parts(options=""):
    """Options of a run, a student and a teacher, untrained."""
    args = main_pretrain.get_args_parser().parse_args(f"{SMALL} {options}".split())
    args = main_pretrain.resolve_options(args, World(0, 1, 0, 1))
    student, teacher = main_pretrain.build_model(args), main_pretrain.build_model(args)
    return args, student, teacher


def save(path, options="", script="main_pretrain", mean=(0.4, 0.5, 0.6), value_range=None):
    args, student, teacher = parts(options)
    content = {
        **{"format": "hpm", "version": 1, "script": script, "model": args.model, "epoch": 3, "step": 0},
        **{"state_dict": student.state_dict(), "options": vars(args), "extra": {}},
        **{"image": {"mean": list(mean), "std": [0.2, 0.25, 0.3], "value_range": value_range}},
    }
    if args.learning_loss or args.score_by == "loss" or args.target == "ema":
        content["ema_state_dict"] = teacher.state_dict()
    checkpoint.write_file(path, content)
    return path


@pytest.fixture(scope="module")
def hpm(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run") / "hpm.pth", "--target norm_pixel")


@pytest.fixture
def drawn(monkeypatch):
    """(model, other arguments, panel) of each call of `panel`."""
    calls, original = [], visualize.panel

    def keep(model, teacher, images, names, masks, **settings):
        given = {"teacher": teacher, "images": images, "names": names, "masks": masks, **settings}
        calls.append((model, given, original(model, teacher, images, names, masks, **settings)))
        return calls[-1][2]

    monkeypatch.setattr(visualize, "panel", keep)
    return calls


def titles(panel):
    return [title for title, _ in panel.titles]


def run_and_get(drawn, output, *options):
    run("visualize", "--num_images", 2, "--output", output, *options)
    return drawn[-1]


def test_a_checkpoint_is_enough(hpm, drawn, tmp_path, monkeypatch):
    """Models, mean and std, target and schedule come from the file; the images are Shapes."""
    monkeypatch.chdir(tmp_path)
    log = run("visualize", "--checkpoint", hpm)
    assert "wrote visualization.png" in log
    model, given, panel = drawn[0]
    assert (len(given["names"]), given["images"].shape) == (8, (8, 3, 16, 16))
    assert given["names"][0].startswith("Shapes val ")
    assert (given["mean"], given["other_epochs"], given["epoch"]) == ([0.4, 0.5, 0.6], [0, 3], 3)
    assert (given["patch_stats"], given["scale"]) == ("image", "author")
    assert model.norm_pix_loss
    masks = given["masks"]
    assert (masks.strategy, masks.epochs, masks.num_masked) == ("easy_to_hard", 4, 12)
    assert [masks.num_hardest[epoch] for epoch in range(4)] == [1, 3, 4, 6]
    assert titles(panel) == TITLES
    assert torch.equal(model.state_dict()["mask_token"], load_pretrained(hpm)["mask_token"])
    written = np.asarray(Image.open(tmp_path / "visualization.png"))
    heading = f"{hpm.parent.name}/hpm.pth, mae_vit_micro_patch16, 3 of 4 epochs"
    assert (written == np.asarray(draw.draw_grid(panel, heading))).all()
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["visualization.png"]


def same_weights(model, weights):
    return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_ema_teacher_chooses_the_masks_if_there_is_one(hpm, drawn, tmp_path):
    """As in training, whose weights ever reconstruct."""
    for which in ("student", "ema"):
        model, given, panel = run_and_get(drawn, tmp_path / "a.png", "--checkpoint", hpm, "--which", which)
        assert same_weights(model, load_pretrained(hpm, which))
        assert same_weights(given["teacher"], load_pretrained(hpm, "ema"))
        name = {"student": "student", "ema": "EMA teacher"}[which]
        assert panel.footer == f"predicted hardness and masks: EMA teacher    reconstruction: {name}"
    content = torch.load(hpm, weights_only=True)
    del content["ema_state_dict"]
    torch.save(content, tmp_path / "student.pth")
    model, given, panel = run_and_get(drawn, tmp_path / "a.png", "--checkpoint", tmp_path / "student.pth")
    assert same_weights(given["teacher"], load_pretrained(hpm, "student"))
    assert panel.footer == "predicted hardness and masks: student    reconstruction: student"


def test_every_option_takes_effect(hpm, drawn, tmp_path):
    output = ["--checkpoint", hpm]
    plain = run_and_get(drawn, tmp_path / "a.png", *output)
    model, given, panel = run_and_get(drawn, tmp_path / "b.png", *output, "--which", "ema", "--epoch", 1, "--seed", 5)
    assert same_weights(model, load_pretrained(hpm, "ema"))
    assert (given["epoch"], given["seed"]) == (1, 5)
    assert titles(panel) == [*TITLES[:3], "mask of epoch 1", *TITLES[3:]]
    assert given["names"] != plain[1]["names"]
    given = run_and_get(
        drawn, tmp_path / "c.png", *output, "--mask_ratio", 0.5, "--input_size", 24, "--split", "train"
    )[1]
    assert (given["masks"].num_masked, given["masks"].grid_size) == (18, (6, 6))
    assert given["names"][0].startswith("Shapes train")
    panel = run_and_get(drawn, tmp_path / "d.png", *output, "--patch_stats", "none", "--scale", "rank")[2]
    assert "no patch statistics" in dict(panel.titles)["reconstruction"]
    assert (panel.rows[0][1] != plain[2].rows[0][1]).any()
    run_and_get(drawn, tmp_path / "e.png", *output, "--cell", 100)
    assert Image.open(tmp_path / "e.png").width < Image.open(tmp_path / "a.png").width
    model, given, _ = run_and_get(drawn, tmp_path / "f.jpg", *output, "--mean", 0.1, 0.2, 0.3, "--std", 1, 1, 1)
    assert (given["mean"], given["std"]) == ([0.1, 0.2, 0.3], [1, 1, 1])
    assert Image.open(tmp_path / "f.jpg").format == "JPEG"


def test_one_file_per_image(hpm, drawn, tmp_path):
    panel = run_and_get(drawn, tmp_path / "each.png", "--checkpoint", hpm, "--one_file_each")[2]
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["each-1.png", "each-2.png"]
    heading = f"{hpm.parent.name}/hpm.pth, mae_vit_micro_patch16, 3 of 4 epochs"
    for number, (row, caption) in enumerate(zip(panel.rows, panel.captions, strict=True), start=1):
        part = draw.Panel(panel.titles, [row], [caption], panel.footer)
        written = np.asarray(Image.open(tmp_path / f"each-{number}.png"))
        assert (written == np.asarray(draw.draw_grid(part, heading))).all()


def test_a_picture_that_its_format_cannot_hold(hpm, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(visualize.LARGEST, "JPEG", 100)
    with pytest.raises(SystemExit):
        run("visualize", "--num_images", 2, "--checkpoint", hpm, "--output", tmp_path / "o.jpg")
    assert "JPEG holds 100: name a .png, or give --one_file_each" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_images_from_files_folders_and_archives(hpm, drawn, tmp_path):
    tree = write_tree(tmp_path / "tree")
    (tree / "empty").mkdir()
    archives = [write_tar(tmp_path / "a.tar"), write_tar(tmp_path / "b.tar.gz", mode="w:gz")]
    flat = write_tree(tmp_path / "flat", {f"{i}.jpg": encode(picture(i)) for i in range(3)})
    for source in (tree, *archives):
        names = run_and_get(drawn, tmp_path / "o.png", "--checkpoint", hpm, "--images", source, "--num_images", 99)[1][
            "names"
        ]
        assert len(names) == len(members())
        names = run_and_get(drawn, tmp_path / "o.png", "--checkpoint", hpm, "--images", source, "--split", "val")[1][
            "names"
        ]
        assert len(names) == 2
    run("visualize", "--checkpoint", hpm, "--images", flat, "--output", tmp_path / "o.png")
    assert sorted(drawn[-1][1]["names"]) == ["flat/0.jpg", "flat/1.jpg", "flat/2.jpg"]
    files = [flat / "2.jpg", flat / "0.jpg", tree / "val/dog/1.jpg"]
    run("visualize", "--checkpoint", hpm, "--images", *files, "--output", tmp_path / "o.png")
    assert drawn[-1][1]["names"] == ["flat/2.jpg", "flat/0.jpg", "dog/1.jpg"]  # all of them, in their order
    names = run_and_get(drawn, tmp_path / "o.png", "--checkpoint", hpm, "--images", flat, *archives[:1])[1]["names"]
    assert len(names) == 2


def test_unreadable_images(hpm, drawn, tmp_path, capsys):
    """Replaced in a random choice, with a warning; an error if the file was named."""
    folder = write_tree(tmp_path / "photos", {f"{i}.jpg": encode(picture(i)) for i in range(12)})
    damaged = [folder / f"{i}.jpg" for i in (0, 3, 4, 7, 8, 9)]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:200])
    log = run("visualize", "--checkpoint", hpm, "--images", folder, "--output", tmp_path / "o.png")
    assert sorted(drawn[-1][1]["names"]) == [
        f"photos/{name}" for name in ("1.jpg", "10.jpg", "11.jpg", "2.jpg", "5.jpg", "6.jpg")
    ]
    assert all(f"Unreadable image, replaced by the next one: {path}" in log for path in damaged)
    files = [folder / "1.jpg", folder / "3.jpg"]
    for more in ([], ["--num_images", 2]):
        with pytest.raises(SystemExit) as stop:
            run("visualize", "--checkpoint", hpm, "--images", *files, *more, "--output", tmp_path / "o.png")
        assert stop.value.code == 2
        assert f"error: {folder / '3.jpg'}: " in capsys.readouterr().err


def test_value_range_and_pixel_limit(drawn, tmp_path, capsys):
    """Of the run where it has one; 12-bit values would be nearly black otherwise."""
    values = np.random.default_rng(0).integers(0, 4096, (16, 16), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "bits12.png")
    images = ["--images", tmp_path / "bits12.png"]
    brightest = {}
    for saved in (None, [0, 4095]):
        path = save(tmp_path / "run.pth", value_range=saved)
        for given in ([], ["--value_range", 0, 2000]):
            shown = run_and_get(drawn, tmp_path / "o.png", "--checkpoint", path, *images, *given)[1]["images"]
            brightest[str(saved), len(given)] = shown.float().mean().item()
    assert brightest["None", 0] < 10
    assert 120 < brightest["[0, 4095]", 0] < 136
    assert brightest["None", 3] == brightest["[0, 4095]", 3] > 180
    for more, message in (("--max_image_pixels 255", "255"), ("--value_range 5 5", "LOW must be below HIGH")):
        with pytest.raises(SystemExit):
            run("visualize", "--checkpoint", path, *images, *more.split(), "--output", tmp_path / "o.png")
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--no-learning_loss", ["image", "mask", "reconstruction", "true error"]),
        ("--mask_strategy hardest", ["image", "predicted hardness", "mask", "reconstruction", "true error"]),
        ("--mask_regular", ["image", "predicted hardness", "mask", "reconstruction", "true error"]),
        ("--target ema", [*TITLES[:4], "true error of features"]),
        ("--score_by loss --no-learning_loss", ["image", "loss of the teacher", *TITLES[2:]]),
        ("--no-relative --vis_mask_ratio 0.5 --decoder_num_heads 2 --decoder_embed_dim 32", TITLES),
    ],
)
def test_columns_of_each_kind_of_run(drawn, tmp_path, options, expected):
    path = save(tmp_path / "run.pth", options)
    model, given, panel = run_and_get(drawn, tmp_path / "o.png", "--checkpoint", path)
    assert titles(panel) == expected
    assert model.relative == ("--no-relative" not in options)
    assert given["masks"].pattern == ("regular" if "regular" in options else None)
    if "heads" in options:
        assert model.decoder_blocks[0].attn.num_heads == 2
        assert model.vis_mask_ratio == 0


def test_random_masks_in_place_of_those_of_features_are_reported(tmp_path):
    path = save(
        tmp_path / "run.pth", "--score_by loss --no-learning_loss --target dino --input_size 224 --patch_size 16"
    )
    warning = "The masks are random here: the run chose them by the loss of features"
    assert warning in run("visualize", "--num_images", 1, "--checkpoint", path, "--output", tmp_path / "o.png")
    path = save(tmp_path / "pixels.pth", "--score_by loss --no-learning_loss")
    assert warning not in run("visualize", "--num_images", 1, "--checkpoint", path, "--output", tmp_path / "p.png")


def test_float32_is_float32(tmp_path, monkeypatch):
    """As in training; on a GPU, PyTorch would compute the patch embedding in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    run("visualize", "--checkpoint", save(tmp_path / "run.pth"), "--num_images", 1, "--output", tmp_path / "a.png")
    assert not torch.backends.cudnn.allow_tf32


def test_a_model_has_two_names(tmp_path):
    """The size alone, and with its decoder as in the recipes."""
    path = save(tmp_path / "run.pth")
    state = torch.load(path, weights_only=True)
    state["model"] = state["options"]["model"] = "mae_vit_micro_patch16_dec64d2b"
    torch.save(state, path)
    given = ["--checkpoint", str(path), "--model", "mae_vit_micro_patch16"]
    assert visualize.resolve_options(visualize.get_args_parser().parse_args(given)).model.startswith("mae_vit_micro")


def test_device_and_cache_are_those_of_this_machine(tmp_path):
    path = save(tmp_path / "run.pth", "--device cpu --cache_dir /elsewhere")
    args = visualize.resolve_options(visualize.get_args_parser().parse_args(["--checkpoint", str(path)]))
    assert (args.device, args.cache_dir) == (None, None)


def test_losses_are_coloured_relative_to_their_spread(monkeypatch, tmp_path):
    """Predicted hardness is in units of its own; losses that differ by a tenth would all have nearly one colour."""
    found = []
    monkeypatch.setattr(visualize_panel, "heat_maps", lambda *args: found.append(args[3]) or [args[0][0]] * 2)
    path = save(tmp_path / "run.pth", "--score_by loss --no-learning_loss")
    run("visualize", "--num_images", 2, "--checkpoint", path, "--output", tmp_path / "o.png")
    of_scores, of_errors = found
    losses = np.array([1.0, 1.05, 1.1])
    assert of_scores(losses).tolist() == of_errors(losses).tolist()
    assert np.ptp(of_scores(losses)) > 0.5


def test_features_as_wide_as_a_patch_are_not_pixels(drawn, tmp_path):
    """As ViT-B's: 768 is 16 * 16 * 3, so the target cannot be inferred from tensor shapes."""
    path = save(tmp_path / "run.pth", "--target ema --input_size 16 --patch_size 8")
    state = torch.load(path, weights_only=True)
    for name in ("state_dict", "ema_state_dict"):
        for suffix in ("weight", "bias"):
            wide = state[name][f"decoder_pred.{suffix}"]
            state[name][f"decoder_pred.{suffix}"] = torch.cat([wide, wide])[:192]
    del state["format"]
    torch.save(state, tmp_path / "foreign.pth")
    options = ["--checkpoint", tmp_path / "foreign.pth", "--model", "mae_vit_micro_patch16", "--input_size", 16]
    assert "reconstruction" in titles(run_and_get(drawn, tmp_path / "o.png", *options)[2])
    assert "reconstruction" not in titles(run_and_get(drawn, tmp_path / "o.png", *options, "--target", "dino")[2])


FOREIGN = ["--model", "mae_vit_micro_patch16", "--input_size", 16]


@pytest.mark.parametrize("kind", ["official HPM", "MAE with decoder"])
def test_official_checkpoints(drawn, tmp_path, kind):
    _, student, teacher = parts("--no-learning_loss" if kind.startswith("MAE") else "")
    official = {"epoch": 9, "state_dict": {f"module.{name}": value for name, value in student.state_dict().items()}}
    official |= {"ema_state_dict": teacher.state_dict(), "optimizer": {}, "model": "mae_vit_micro_patch16"}
    torch.save(official if kind == "official HPM" else {"model": student.state_dict()}, tmp_path / "file.pth")
    options = ["--checkpoint", tmp_path / "file.pth", *FOREIGN]
    model, given, panel = run_and_get(drawn, tmp_path / "o.png", *options)
    assert torch.equal(model.mask_token, student.mask_token)
    scored_by = student if kind.startswith("MAE") else teacher
    assert torch.equal(given["teacher"].mask_token, scored_by.mask_token)
    assert not model.norm_pix_loss
    assert given["mean"] == [0.485, 0.456, 0.406]
    plain = ["image", "mask", "reconstruction", "true error"]
    assert titles(panel) == (plain if kind.startswith("MAE") else TITLES)
    for switch in (["--norm_pix_loss"], ["--target", "norm_pixel"]):
        assert run_and_get(drawn, tmp_path / "o.png", *options, *switch)[0].norm_pix_loss
    more = ["--epochs", 20, "--epoch", 19, "--no-relative"]
    model, given, _ = run_and_get(drawn, tmp_path / "o.png", *options, *more)
    assert (given["epoch"], given["masks"].epochs, model.relative) == (19, 20, False)
    if kind == "official HPM":
        model, *_ = run_and_get(drawn, tmp_path / "o.png", *options, "--which", "ema")
        assert torch.equal(model.mask_token, teacher.mask_token)


def test_a_hugging_face_folder(drawn, tmp_path):
    """Model, sizes, target and mean come from its configuration."""
    path = save(tmp_path / "run.pth", "--target norm_pixel --no-learning_loss --decoder_depth 2")
    run("export", "--checkpoint", path, "--format", "hf_mae", "--output", tmp_path / "folder")
    model, given, panel = run_and_get(drawn, tmp_path / "o.png", "--checkpoint", tmp_path / "folder")
    weights = load_pretrained(path)
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters() if "pos_embed" not in name)
    assert (model.norm_pix_loss, given["mean"]) == (True, [0.4, 0.5, 0.6])
    assert titles(panel) == ["image", "mask", "reconstruction", "true error"]


MISTAKES = {
    "": "give either --checkpoint",
    "--checkpoint HPM --runs x": "give either --checkpoint",
    "--checkpoint nowhere.pth": "checkpoint nowhere.pth does not exist",
    "--checkpoint damaged.pth": "damaged.pth is not a checkpoint",
    "--checkpoint truncated.pth": "truncated.pth",
    "--checkpoint encoder.pth": "an encoder alone, without the decoder",
    "--checkpoint half.pth": "an encoder alone, without the decoder",
    "--checkpoint finetuned.pth": "an encoder alone, without the decoder",
    "--checkpoint classifier.pth": "was written by main_finetune: pictures need a pre-training checkpoint",
    "--checkpoint foreign.pth": "is this the right --model?",
    "--checkpoint grey.pth": "grey.pth takes 1-channel images; only RGB is supported",
    "--checkpoint foreign.pth --which ema": "has no EMA teacher",
    "--checkpoint HPM --model mae_vit_base_patch16": "contradicts HPM (mae_vit_micro_patch16): omit the option",
    "--checkpoint HPM --target pixel": "--target pixel contradicts HPM (norm_pixel): omit the option",
    "--checkpoint HPM --no-norm_pix_loss": "--target pixel contradicts HPM (norm_pixel): omit the option",
    "--checkpoint HPM --norm_pix_loss --target ema": "give only one",
    "--checkpoint HPM --epochs 9": "--epochs 9 contradicts HPM (4): omit the option",
    "--checkpoint HPM --epoch 4": "--epoch 4: the run has 4 epochs, counted from 0",
    "--checkpoint HPM --mask_ratio 0.999": "--mask_ratio 0.999 masks 16 of 16 patches",
    "--checkpoint sparse.pth --mask_ratio 0.9": "--mask_ratio 0.9 does not go with the checkpoint's options",
    "--checkpoint HPM --input_size 18": "patch size 4 does not divide an image of 18 x 18",
    f"--checkpoint HPM --seed {2**63}": "--seed",
    "--checkpoint HPM --mean nan 0 0": "expected a number, got 'nan'",
    "--checkpoint HPM --mean 123.675 116.28 103.53": "mean 123.675 116.28 103.53 lies outside 0..1",
    "--checkpoint HPM --split test": "--split test: Shapes have train and val",
    "--checkpoint HPM --images nowhere.jpg": "--images nowhere.jpg does not exist",
    "--checkpoint HPM --images broken.jpg": "broken.jpg",
    "--checkpoint HPM --images text.txt": "text.txt is neither a folder nor an archive",
    "--checkpoint HPM --images nothing": "nothing contains no images",
    "--checkpoint HPM --images only --split train": "--images only: looked for train/CLASS/*.jpg",
    "--checkpoint HPM --images nothing --split val": "--images nothing: looked for val/CLASS/*.jpg",
    "--checkpoint HPM --device cuda": "this PyTorch finds no CUDA device",
    "--checkpoint HPM --device gpu": "--device gpu",
    "--checkpoint HPM --output /proc/a.png": "/proc",
    "--checkpoint HPM --output a.txt": "expected the name of a picture, .png, .jpg",
    "--checkpoint HPM --output nothing": "expected the name of a picture",
    "--checkpoint HPM --outptu a.png": "did you mean --output",
    "--runs nothing": "nothing contains no log.jsonl with a completed epoch: give run folders",
    "--runs nothing --output a.jpg": "expected the name of a picture, .png, .svg, .pdf",
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes_end_with_one_line(hpm, text, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    _, student, _ = parts()
    weights = student.state_dict()
    encoder = {name: value for name, value in weights.items() if not name.startswith(("decoder", "mask_token"))}
    (tmp_path / "nothing").mkdir()
    (tmp_path / "only/val").mkdir(parents=True)
    (tmp_path / "only/val/a.jpg").write_bytes(encode(picture()))
    (tmp_path / "damaged.pth").write_bytes(b"half a file")
    (tmp_path / "truncated.pth").write_bytes(hpm.read_bytes()[:100_000])
    (tmp_path / "broken.jpg").write_bytes(encode(picture())[:200])
    (tmp_path / "text.txt").write_text("no image")
    torch.save({"model": encoder}, tmp_path / "encoder.pth")
    torch.save({"model": {**encoder, "head.weight": torch.zeros(10, 128)}}, tmp_path / "finetuned.pth")
    torch.save({"model": {**encoder, "decoder_pred.weight": weights["decoder_pred.weight"]}}, tmp_path / "half.pth")
    torch.save({"model": weights}, tmp_path / "foreign.pth")
    grey = {"patch_embed.proj.weight": weights["patch_embed.proj.weight"][:, :1]}
    torch.save({"model": {**weights, **grey}}, tmp_path / "grey.pth")
    if "classifier" in text:
        save(tmp_path / "classifier.pth", script="main_finetune")
    if "sparse" in text:
        save(tmp_path / "sparse.pth", "--teacher_keep 0.625 --mask_ratio 0.5")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        visualize.main([str(hpm) if word == "HPM" else word for word in text.split()])
    assert stop.value.code == 2
    written = capsys.readouterr().err
    assert message.replace("HPM", str(hpm)) in written
    assert written.count("\n") <= 2
    assert "Traceback" not in written
    assert sorted(tmp_path.iterdir()) == before


# ------------------------------------------------------------------------------------------------------------ plots


def write_log(folder, epochs=3, predictor=True, options=None, **values):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"script": "main_pretrain", "options": options or {}}))
    for epoch in range(epochs):
        line = {"epoch": epoch, "train_loss": 2.0, "train_loss_rec": 1 / (epoch + 1), "train_lr": 1e-3, **values}
        if predictor:
            line |= {"train_loss_learn": 0.6, "train_rank_acc": 0.7, "ema_decay": 0.999, "hard_ratio": epoch / epochs}
        with open(folder / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    return folder


LOSS, ACCURACY = list(curves.CURVES)[:2]


def test_plots_of_one_and_of_several_runs(tmp_path, monkeypatch):
    """One line per run in each plot, with all points; runs without a predictor lack some."""
    from matplotlib.figure import Figure

    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))[1])
    hpm, mae = write_log(tmp_path / "hpm", knn_acc1=20.0), write_log(tmp_path / "a/mae", epochs=1, predictor=False)
    assert "wrote" in run("visualize", "--runs", hpm, mae, "--output", tmp_path / "both.png")
    axes = {axis.get_title(): axis for axis in figures[0].axes if axis.get_title()}
    assert list(axes) == list(curves.CURVES)
    first, second = axes[LOSS].lines
    assert (first.get_xdata().tolist(), first.get_ydata().tolist()) == ([1, 2, 3], [1, 1 / 2, 1 / 3])
    assert (second.get_xdata().tolist(), second.get_marker()) == ([1], "o")  # so that a single point is visible
    assert [len(line.get_xdata()) for line in axes["rank accuracy (0.5 is chance)"].lines] == [3, 0]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["hpm", "a/mae"]
    colours = [handle.get_color() for handle in figures[0].legends[0].legend_handles]
    assert colours == [first.get_color(), second.get_color()]
    assert Image.open(tmp_path / "both.png").format == "PNG"
    run("visualize", "--runs", mae, "--output", tmp_path / "one.svg")
    assert [axis.get_title() for axis in figures[1].axes if axis.get_title()] == [
        LOSS,
        "learning rate",
    ]
    assert (tmp_path / "one.svg").read_text().startswith("<?xml")


def curves_of(*folders):
    """{title: [points of each run]}."""
    figure = curves.plot(curves.name_runs(list(map(str, folders))))
    points = {
        axis.get_title(): [list(zip(*line.get_data(), strict=True)) for line in axis.lines] for axis in figure.axes
    }
    return {title: lines for title, lines in points.items() if title}


def test_accuracy_of_fine_tuning_probes_and_pre_training(tmp_path):
    """Next to the loss; a probe shows its best head, and k-NN the epochs in which it was measured."""
    fine_tuning = write_log(tmp_path / "finetune", epochs=2, predictor=False, test_acc1=71.5)
    heads = {"test_acc1 lr 0.1": 40.0, "test_acc1 lr 1": 44.0, "test_acc5 lr 0.1": 90.0}
    probe = write_log(tmp_path / "probe", epochs=2, predictor=False, **heads)
    pre_training = write_log(tmp_path / "pretrain")
    lines = [json.loads(line) for line in (pre_training / "log.jsonl").read_text().splitlines()]
    lines[1] |= {"knn_acc1": 30.0}
    lines[2] |= {"knn_acc1": None}
    (pre_training / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = curves_of(fine_tuning, probe, pre_training)
    assert list(drawn)[:2] == [LOSS, ACCURACY]
    assert drawn[ACCURACY] == [[(1, 71.5), (2, 71.5)], [(1, 44.0), (2, 44.0)], [(2, 30.0)]]
    assert drawn[LOSS][2] == [(1, 1), (2, 1 / 2), (3, 1 / 3)]
    without = [{"epoch": 0, "train_loss": 3.0}]
    (fine_tuning / "log.jsonl").write_text(json.dumps(without[0]) + "\n")
    assert curves_of(fine_tuning) == {LOSS: [[(1, 3.0)]]}


def test_options_that_differ_between_runs(tmp_path):
    common = {"model": "mae_vit_base_patch16", "lr": 1e-3, "experiment": ""}
    hpm = write_log(tmp_path / "hpm", options={**common, "target": "pixel", "alpha_T": 0.5, "output_dir": "hpm"})
    mae = write_log(tmp_path / "mae", options={**common, "target": "norm_pixel", "output_dir": "mae"})
    log = run("visualize", "--runs", hpm, mae, "--output", tmp_path / "a.png")
    table = ["option   hpm    mae", "alpha_T  0.5    -", "target   pixel  norm_pixel"]
    assert "\n".join(["Options that differ:", *table]) in log
    for same in ([hpm], [hpm, hpm]):
        assert "Options" not in run("visualize", "--runs", *same, "--output", tmp_path / "a.png")
    (mae / "config.json").unlink()
    assert "model    mae_vit_base_patch16  -" in curves.compare_options(curves.name_runs([str(hpm), str(mae)]))


def test_runs_are_named_relative_to_their_common_parent():
    assert list(curves.name_runs(["out/x/1", "out/y/1", "out/y/2"])) == ["x/1", "y/1", "y/2"]
    assert list(curves.name_runs(["out/y/1/", "out/y/2"])) == ["1", "2"]
    assert list(curves.name_runs(["out/x/1"])) == ["1"]


def test_logs_of_killed_runs(tmp_path):
    file = write_log(tmp_path / "run") / "log.jsonl"
    whole = file.read_text()
    file.write_text(whole + whole[:20])
    assert len(curves_of(tmp_path / "run")[LOSS][0]) == 3
    file.write_text('{"epoch": 0}\n')
    with pytest.raises(ValueError, match="nothing to plot"):
        curves_of(tmp_path / "run")
    file.write_text("")
    with pytest.raises(ValueError, match="no log.jsonl with a completed epoch"):
        curves_of(tmp_path / "run")


def test_an_interrupted_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def full(self, file, **kwargs):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(SystemExit):
        run("visualize", "--runs", write_log(tmp_path / "run"), "--output", path)
    assert path.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "run"]


def test_without_matplotlib_the_message_names_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "visualize.curves", raising=False)
    monkeypatch.delattr("visualize.curves", raising=False)
    with pytest.raises(SystemExit) as stop:
        run("visualize", "--runs", write_log(tmp_path / "run"), "--output", tmp_path / "a.png")
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("error: plots require matplotlib: pip install matplotlib\n")
    assert not (tmp_path / "a.png").exists()
