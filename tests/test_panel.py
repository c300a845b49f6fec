"""Panels show what the model does: masks, reconstruction, errors and metrics."""

import numpy as np
import pytest
import torch

import main_pretrain
from models_hpm import MaskedAutoencoderViT
from util import rng
from util.data.transforms import ToModelInput
from util.losses import relative_loss
from util.masking import STRATEGIES, MaskSampler
from util.metrics import rank_accuracy
from util.run.distributed import World
from visualize import panel as panels
from visualize.panel import mask_note, mask_titles, panel, training_panel
from visualize.score import reconstruct, reconstruct_and_score

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SIDE, PATCH, GRID, EPOCHS = 24, 4, (6, 6), 10
CPU = torch.device("cpu")


def build(**kwargs):
    model = MaskedAutoencoderViT(
        **{"img_size": SIDE, "patch_size": PATCH, "embed_dim": 32, "depth": 1, "num_heads": 2},
        **{"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, **kwargs},
    )
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def plan(**kwargs):
    return MaskSampler(**{"grid_size": GRID, "mask_ratio": 0.75, "epochs": EPOCHS, **kwargs})


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)


def normalised(images):
    return ToModelInput(MEAN, STD, CPU, flip=False)(images)


def draw(model, images, masks=None, teacher="model", **kwargs):
    settings = {"mean": MEAN, "std": STD, "other_epochs": [0], "epoch": EPOCHS - 1, "seed": 3, **kwargs}
    names = [f"{i}.jpg" for i in range(len(images))]
    return panel(model, model if teacher == "model" else teacher, images, names, masks or plan(), **settings)


@pytest.fixture
def drawn_masks(monkeypatch):
    """{epoch: mask} of the last panel, as the sampler drew them."""
    masks, original = {}, MaskSampler.draw

    def keep(self, scores, batch_size, epoch, *args, **kwargs):
        masks[epoch] = original(self, scores, batch_size, epoch, *args, **kwargs)
        return masks[epoch]

    monkeypatch.setattr(MaskSampler, "draw", keep)
    return masks


def column(drawn, title):
    number = [name for name, _ in drawn.titles].index(title)
    return np.stack([row[number] for row in drawn.rows])


def pixels_of(mask):
    return torch.as_tensor(mask).view(-1, *GRID).repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2).numpy()


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_exact_target_reconstructs_the_image(images, norm_pix_loss):
    model = build(norm_pix_loss=norm_pix_loss)
    imgs = normalised(images)
    mask = plan().draw(model.predict_loss(imgs).detach(), 3, 0)
    exact = model.make_pixel_target(imgs)[mask].view(3, 27, -1)
    back = reconstruct(model, imgs, mask, exact) * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert (back - images / 255).abs().max() < 1 / 255
    wrong = reconstruct(model, imgs, mask, exact + 1) * torch.tensor(STD).view(3, 1, 1)
    assert (wrong + torch.tensor(MEAN).view(3, 1, 1) - images / 255).abs().max() > 10 / 255  # the test can fail


def test_without_patch_statistics_masked_pixels_are_not_used(images):
    """Other pixels under the mask change nothing there; with the image's statistics they do."""
    model = build(norm_pix_loss=True)
    imgs, mask, pred = normalised(images), plan().draw(torch.rand(3, 36), 3, 0), torch.randn(3, 27, 48)
    hidden = torch.from_numpy(pixels_of(mask))[:, None]
    other = torch.where(hidden, 2 * imgs + torch.randn_like(imgs), imgs)
    none = [reconstruct(model, x, mask, pred, "none") for x in (imgs, other)]
    assert torch.equal(*none)
    assert not torch.equal(*(reconstruct(model, x, mask, pred, "image") for x in (imgs, other)))
    visible = model.patchify(imgs)[~mask].view(3, 9, 48)
    expected = pred * (visible.var(-1) + 1e-6).sqrt().mean(1).view(3, 1, 1) + visible.mean((1, 2)).view(3, 1, 1)
    torch.testing.assert_close(model.patchify(none[0])[mask].view(3, 27, 48), expected)


@pytest.mark.parametrize(("norm_pix_loss", "patch_stats"), [(False, "image"), (True, "image"), (True, "none")])
def test_visible_patches_are_unchanged(images, norm_pix_loss, patch_stats):
    drawn = draw(build(norm_pix_loss=norm_pix_loss), images, patch_stats=patch_stats)
    mask = pixels_of((column(drawn, "mask at the end")[:, ::PATCH, ::PATCH] == 200).all(-1).reshape(3, -1))
    original = images.permute(0, 2, 3, 1).numpy()
    assert mask.sum() == 3 * 27 * PATCH**2
    rebuilt = column(drawn, "reconstruction")
    assert (rebuilt[~mask] == original[~mask]).all()
    assert (rebuilt[mask] != original[mask]).any(-1).mean() > 0.9
    assert (column(drawn, "mask at the end")[~mask] == original[~mask]).all()


def test_the_note_says_where_the_statistics_come_from(images):
    notes = {
        (norm, stats): dict(draw(build(norm_pix_loss=norm), images, patch_stats=stats).titles)["reconstruction"]
        for norm in (False, True)
        for stats in ("image", "none")
    }
    assert "mean and variance taken from the image" in notes[True, "image"]
    assert "no patch statistics" in notes[True, "none"]
    assert notes[False, "image"] == notes[False, "none"] == "from the mask at the end"


OPTIONS = [f"--mask_strategy {name}" for name in STRATEGIES] + ["--alpha_0 0.3 --alpha_T 0.9", "--mask_ratio 0.5"]


@pytest.mark.parametrize("options", [*OPTIONS, "--mask_block", "--mask_regular"])
def test_masks_are_those_of_pre_training(images, options, drawn_masks):
    """From the same scores and the same random numbers."""
    text = f"--model mae_vit_micro_patch16 --input_size {SIDE} --patch_size {PATCH} --epochs {EPOCHS} {options}"
    args = main_pretrain.resolve_options(main_pretrain.get_args_parser().parse_args(text.split()), World(0, 1, 0, 1))
    model, masks = build(), MaskSampler.from_options(vars(args), GRID)
    draw(model, images, masks, other_epochs=[0, 4])
    in_panel = dict(drawn_masks)
    assert sorted(in_panel) == [0, 4, 9]
    with torch.no_grad():
        scores = model.predict_loss(normalised(images))
    for epoch, mask in in_panel.items():
        rng.seed_all(3)
        assert torch.equal(mask, masks.draw(scores, len(images), epoch)), epoch


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_metrics_of_an_image_are_those_of_the_model(images, norm_pix_loss):
    model = build(norm_pix_loss=norm_pix_loss).eval()
    imgs = normalised(images)
    with torch.no_grad():
        mask = plan().draw(model.predict_loss(imgs), 3, 9)
        result = reconstruct_and_score(model, imgs, mask)
        assert torch.equal(result["errors"] > 0, mask)
        for i, image in enumerate(imgs):
            out = model(image[None], mask[i : i + 1])
            torch.testing.assert_close(result["loss_rec"][i], out["loss_rec"])
            torch.testing.assert_close(result["loss_learn"][i], out["loss_learn"])
            torch.testing.assert_close(result["loss_learn"][i], relative_loss(out["loss_pred"], out["patch_loss"]))
            torch.testing.assert_close(result["rank_acc"][i], rank_accuracy(out["loss_pred"], out["patch_loss"]))
            torch.testing.assert_close(result["errors"][i][mask[i]], out["patch_loss"][0])


def test_captions_give_the_metrics_of_the_image(images, drawn_masks):
    model = build()
    name, metrics = draw(model, images).captions[1]
    result = reconstruct_and_score(model.eval(), normalised(images), drawn_masks[9])
    expected = [f"{metric} {result[metric][1]:.3f}" for metric in ("rank_acc", "loss_rec", "loss_learn")]
    assert (name, metrics) == ("1.jpg", "    ".join(expected))


def titles(drawn):
    return [title for title, _ in drawn.titles]


def test_columns(images):
    ends = ["image", "predicted hardness", "mask at the start", "mask at the end", "reconstruction", "true error"]
    assert titles(draw(build(), images)) == ends
    middle = draw(build(), images, other_epochs=[0, 9], epoch=4)
    assert titles(middle) == [*ends[:3], "mask of epoch 4", *ends[3:]]
    assert dict(middle.titles)["reconstruction"] == "from the mask of epoch 4"
    assert dict(middle.titles)["mask of epoch 4"] == "27 of 36, 6 of them the hardest"
    assert titles(draw(build(), images, other_epochs=[], epoch=4))[2:4] == ["mask of epoch 4", "reconstruction"]
    unchanging = draw(build(), images, plan(strategy="hardest"))
    assert titles(unchanging) == ["image", "predicted hardness", "mask", "reconstruction", "true error"]
    for teacher in ("model", None):
        mae = draw(build(learning_loss=False), images, plan(strategy="random"), teacher=teacher)
        assert titles(mae) == ["image", "mask", "reconstruction", "true error"]
        assert mae.captions[0][1].split()[::2] == ["loss_rec"]


def test_features_have_no_reconstruction(images):
    model = build(target_dim=20)
    assert titles(draw(model, images))[1:] == ["predicted hardness", "mask at the start", "mask at the end"]
    features = torch.randn(3, 36, 20)
    drawn = draw(model, images, feature_target=lambda imgs, tokens: features)
    assert titles(drawn)[-1] == "true error of features"
    assert "reconstruction" not in titles(drawn)
    assert len(drawn.captions[0][1].split()) == 6


def test_the_feature_target_sees_the_teachers_tokens(images):
    """The target of --target ema; without a teacher (--no-learning_loss --target dino) there are none."""
    model, teacher = build(target_dim=32), build(target_dim=32)
    seen = []

    def feature_target(imgs, tokens):
        seen.append((imgs, tokens))
        return torch.randn(3, 36, 32)

    draw(model, images, teacher=teacher, feature_target=feature_target)
    draw(
        build(target_dim=32, learning_loss=False), images, plan(strategy="random"), None, feature_target=feature_target
    )
    assert torch.equal(seen[0][0], normalised(images))
    with torch.no_grad():
        assert torch.equal(seen[0][1], teacher.predict_loss(normalised(images), return_tokens=True)[1])
    assert seen[1][1] is None


def test_notes_on_masks():
    assert mask_note(plan(), 0) == "27 of 36, 1 of them the hardest"
    assert mask_note(plan(strategy="easiest"), 9) == "27 of 36, 13 of them the easiest"
    assert mask_note(plan(strategy="random"), 9) == "27 of 36, at random"
    assert mask_note(plan(strategy="random", pattern="block"), 9) == "block pattern"
    assert mask_titles(plan(strategy="constant"), [0, 4, 9]) == {9: "mask"}


def test_the_teacher_chooses_the_masks_and_the_student_reconstructs(images, drawn_masks):
    student, teacher = build(), build()
    drawn = draw(student, images, teacher=teacher)
    in_panel = dict(drawn_masks)
    assert not torch.equal(in_panel[9], (draw(student, images), drawn_masks[9])[1])
    assert torch.equal(in_panel[9], (draw(teacher, images), drawn_masks[9])[1])
    result = reconstruct_and_score(student.eval(), normalised(images), in_panel[9])
    assert f"loss_rec {result['loss_rec'][2]:.3f}" in drawn.captions[2][1]


def test_the_footer_names_the_weights(images):
    both = "predicted hardness and masks: EMA teacher    reconstruction: student"
    assert draw(build(), images, teacher=build()).footer == both
    names = {"weights": ("student", "student")}
    assert draw(build(), images, **names).footer == "predicted hardness and masks: student    reconstruction: student"
    for masks in (plan(strategy="random"), plan(pattern="block")):
        assert draw(build(), images, masks).footer == "predicted hardness: EMA teacher    reconstruction: student"
    mae = draw(build(learning_loss=False), images, plan(strategy="random"), teacher=None)
    assert mae.footer == "reconstruction: student"


def test_a_panel_leaves_no_trace(images):
    """Neither in the RNG (the second masking draws), nor mode, gradients or weights; nor is anything compiled."""
    model = build(vis_mask_ratio=0.5).train()
    model.compile(backend=lambda *_: pytest.fail("compiled"))
    before, weights = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    first = column(draw(model, images), "reconstruction")
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    torch.rand(5)
    assert (first == column(draw(model, images), "reconstruction")).all()  # a function of the seed alone
    with pytest.raises(AssertionError, match="Input width"):
        draw(model, torch.zeros(1, 3, SIDE, SIDE + PATCH, dtype=torch.uint8))
    assert model.training


def test_a_training_panel_is_the_panel_of_the_last_epoch(images, monkeypatch):
    student, teacher = build(), build()
    drawn, names = draw(student, images, teacher=teacher, other_epochs=[], epoch=4), ["0.jpg", "1.jpg", "2.jpg"]
    picture = training_panel(
        student, teacher, images, names, plan(), mean=MEAN, std=STD, feature_target=None, epochs_done=5, seed=3
    )
    expected = np.asarray(panels.draw_grid(drawn, f"5 of {EPOCHS} epochs"))
    assert picture.dtype == torch.uint8
    assert (picture.permute(1, 2, 0).numpy() == expected).all()
