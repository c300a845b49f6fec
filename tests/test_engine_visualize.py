"""What the pictures claim is what the model does."""

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
from visualize.panel import examine, mask_note, panel, reconstruct, whose_masks

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


def look_at(model, images, what=None, **kwargs):
    settings = {"epochs": [0, EPOCHS - 1], "epoch": EPOCHS - 1, "seed": 3, **kwargs}
    return examine(model, normalised(images), what or plan(), **settings)


def draw(model, images, what=None, **kwargs):
    settings = {"mean": MEAN, "std": STD, "epochs": [0, EPOCHS - 1], "epoch": EPOCHS - 1, "seed": 3, **kwargs}
    return panel(model, images, [f"{i}.jpg" for i in range(len(images))], what or plan(), **settings)


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
    exact = model.pixel_target(imgs)[mask].view(3, 27, -1)
    back = reconstruct(model, imgs, mask, exact) * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert (back - images / 255).abs().max() < 1 / 255
    wrong = reconstruct(model, imgs, mask, exact + 1) * torch.tensor(STD).view(3, 1, 1)
    assert (wrong + torch.tensor(MEAN).view(3, 1, 1) - images / 255).abs().max() > 10 / 255  # the test can fail


def test_without_patch_statistics_nothing_hidden_is_used(images):
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
def test_visible_patches_are_pasted_in_untouched(images, norm_pix_loss, patch_stats):
    drawn = draw(build(norm_pix_loss=norm_pix_loss), images, patch_stats=patch_stats)
    mask = pixels_of((column(drawn, "mask at the end")[:, ::PATCH, ::PATCH] == 200).all(-1).reshape(3, -1))
    original = images.permute(0, 2, 3, 1).numpy()
    assert mask.sum() == 3 * 27 * PATCH**2
    rebuilt = column(drawn, "reconstruction")
    assert (rebuilt[~mask] == original[~mask]).all()
    assert (rebuilt[mask] != original[mask]).any(-1).mean() > 0.9
    assert (column(drawn, "mask at the end")[~mask] == original[~mask]).all()


def test_the_picture_says_where_the_statistics_are_from(images):
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
def test_masks_are_those_of_pre_training(images, options):
    """As the script wires them, from the same scores and the same random numbers."""
    text = f"--model mae_vit_micro_patch16 --input_size {SIDE} --patch_size {PATCH} --epochs {EPOCHS} {options}"
    args = main_pretrain.resolve_options(main_pretrain.get_args_parser().parse_args(text.split()), World(0, 1, 0, 1))
    model, imgs = build(), normalised(images)
    masks, found = look_at(model, images, MaskSampler.from_options(vars(args), GRID), epochs=[0, 4, 9])

    def see(imgs):
        return model.predict_loss(imgs, return_tokens=True)

    assert sorted(masks) == [0, 4, 9]
    for epoch, mask in masks.items():
        _, look, draw_mask = main_pretrain.masks_of_epoch(args, epoch, GRID, see, None)
        with torch.no_grad():
            scores, _ = look(imgs)
        rng.seed_all(3)
        assert torch.equal(mask, draw_mask(scores, imgs)), epoch
    assert torch.equal(found["errors"] > 0, masks[9])


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_figures_of_an_image_are_those_of_the_model(images, norm_pix_loss):
    model = build(norm_pix_loss=norm_pix_loss)
    masks, found = look_at(model, images)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(found["hardness"], model.predict_loss(normalised(images)))
        for i, image in enumerate(normalised(images)):
            out = model(image[None], masks[9][i : i + 1])
            torch.testing.assert_close(found["loss_rec"][i], out["loss_rec"])
            torch.testing.assert_close(found["loss_learn"][i], out["loss_learn"])
            torch.testing.assert_close(found["loss_learn"][i], relative_loss(out["loss_pred"], out["patch_loss"]))
            torch.testing.assert_close(found["rank_acc"][i], rank_accuracy(out["loss_pred"], out["patch_loss"]))
            torch.testing.assert_close(found["errors"][i][masks[9][i]], out["patch_loss"][0])
    name, words = draw(model, images).captions[1]
    expected = [f"{figure} {found[figure][1]:.3f}" for figure in ("rank_acc", "loss_rec", "loss_learn")]
    assert (name, words) == ("1.jpg", expected)


def titles(drawn):
    return [title for title, _ in drawn.titles]


def test_columns(images):
    ends = ["image", "predicted hardness", "mask at the start", "mask at the end", "reconstruction", "true error"]
    assert titles(draw(build(), images)) == ends
    middle = draw(build(), images, epochs=[0, 4, 9], epoch=4)
    assert titles(middle) == [*ends[:3], "mask of epoch 4", *ends[3:]]
    assert dict(middle.titles)["reconstruction"] == "from the mask of epoch 4"
    assert dict(middle.titles)["mask of epoch 4"] == "27 of 36, 6 of them the hardest"
    assert titles(draw(build(), images, epochs=[4], epoch=4))[2:4] == ["mask of epoch 4", "reconstruction"]
    unchanging = draw(build(), images, plan(strategy="hardest"))
    assert titles(unchanging) == ["image", "predicted hardness", "mask", "reconstruction", "true error"]
    mae = draw(build(learning_loss=False), images, plan(strategy="random"))
    assert titles(mae) == ["image", "mask", "reconstruction", "true error"]
    assert [word.split()[0] for word in mae.captions[0][1]] == ["loss_rec"]


def test_features_have_no_reconstruction(images):
    model = build(target_dim=20)
    assert titles(draw(model, images))[1:] == ["predicted hardness", "mask at the start", "mask at the end"]
    features = torch.randn(3, 36, 20)
    drawn = draw(model, images, look=lambda imgs: (model.predict_loss(imgs), features))
    assert titles(drawn)[-1] == "true error of features"
    assert "reconstruction" not in titles(drawn)
    assert len(drawn.captions[0][1]) == 3


def test_notes_on_masks():
    assert mask_note(plan(), 0) == "27 of 36, 1 of them the hardest"
    assert mask_note(plan(strategy="easiest"), 9) == "27 of 36, 13 of them the easiest"
    assert mask_note(plan(strategy="random"), 9) == "27 of 36, at random"
    assert mask_note(plan(strategy="random", pattern="block"), 9) == "block pattern"
    assert whose_masks(plan(strategy="constant"), [0, 4, 9]) == [9]


def test_scores_from_elsewhere_choose_the_masks(images):
    """As in training, where the EMA teacher says what is hard and the student reconstructs."""
    student, teacher = build(), build()
    masks, found = look_at(student, images, look=lambda imgs: (teacher.predict_loss(imgs), None))
    assert torch.equal(masks[9], look_at(teacher, images)[0][9])
    out = student(normalised(images), masks[9])
    torch.testing.assert_close(found["loss_rec"].mean(), out["loss_rec"].detach())


def test_looking_leaves_no_trace(images):
    """Not in generators (the second masking draws), mode, gradients or weights; nor is anything compiled."""
    model = build(vis_mask_ratio=0.5).train()
    model.compile(backend=lambda *_: pytest.fail("compiled"))
    before, weights = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    first = look_at(model, images)[1]["reconstruction"]
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    torch.rand(5)
    assert torch.equal(first, look_at(model, images)[1]["reconstruction"])  # a function of the seed alone
    with pytest.raises(RuntimeError):
        look_at(model, images[:, :2])
    assert model.training
