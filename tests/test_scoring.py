"""Teachers that see a part of the image, score by their own loss, or have a predictor of another depth."""

import pytest
import torch
from golden import build_hpm, load
from programs import PRETRAIN, checkpoint, log_lines, run

import models_hpm
import visualize.__main__ as visualize
from util.masking import MaskSampler, hard_mask, random_mask
from util.weights.load import load_pretrained

SMALL = {
    **{"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    **{"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2},
}


def make(**kwargs):
    torch.manual_seed(0)
    return models_hpm.MaskedAutoencoderViT(**{**SMALL, **kwargs}).eval()


def blocks_of_predictor(weights):
    return {name.split(".")[1] for name in weights if name.startswith("decoder_blocks_losspred.")}


# --------------------------------------------------------------------------------------------------------------- masks


def test_unscored_patches_are_masked_at_random_only():
    """Of 64 patches 16 are scored. Each of the other 48 is masked as often as a scored one that is not chosen."""
    scores = torch.full((4000, 64), -torch.inf)
    scores[:, :16] = torch.arange(16.0)
    mask = hard_mask(scores, 48, 10)
    assert (mask.sum(1) == 48).all()
    rate = mask.float().mean(0)
    others = torch.cat([rate[:6], rate[16:]])
    assert (rate[6:16] == 1).all()
    assert (others - 38 / 54).abs().max() < 0.04  # five standard deviations


@pytest.mark.parametrize("strategy", ["easy_to_hard", "easiest"])
def test_a_sampler_chooses_among_the_scored(strategy):
    masks = MaskSampler((8, 8), 0.75, 10, strategy, teacher_keep=0.25)
    hidden = masks.draw_hidden(500)
    assert (hidden.sum(1) == masks.num_hidden).all()
    assert masks.num_hidden == 48
    assert (hidden.float().mean(0) - 0.75).abs().max() < 0.1  # five standard deviations
    scores = torch.rand(500, 64).masked_fill(~hidden, -torch.inf)
    mask = masks.draw(scores, 500, epoch=9)
    assert (mask.sum(1) == 48).all()
    if strategy == "easiest":
        chosen = scores.masked_fill(~hidden, torch.inf).topk(24, dim=1, largest=False).indices
    else:
        chosen = scores.topk(24, dim=1).indices
    assert hidden.gather(1, chosen).all()
    assert mask.gather(1, chosen).all()
    others = torch.ones_like(mask).scatter(1, chosen, False)
    rate = (mask & others).sum() / others.sum()
    for among in (hidden, ~hidden):  # the random part takes scored and unscored patches alike
        assert ((mask & others & among).sum() / (others & among).sum()) == pytest.approx(float(rate), abs=0.03)


def test_the_published_teacher_hides_nothing():
    assert MaskSampler((8, 8), 0.75, 10).num_hidden == 0


# -------------------------------------------------------------------------------------------------------------- scores


def test_without_hidden_patches_the_scores_are_the_predicted_loss():
    golden, meta = load("hpm_relative")
    model = build_hpm(golden, meta, predictor_depth=meta["decoder_depth"])
    scores, tokens = model.score_patches(golden["images"][0])
    torch.testing.assert_close(scores, golden["teacher/loss_pred_all_visible"], rtol=1e-5, atol=1e-5)
    assert torch.equal(tokens, model.predict_loss(golden["images"][0], return_tokens=True)[1])


def test_hidden_patches_are_scored_as_in_training():
    """At their mask tokens: the predicted loss of the training forward pass, or its true loss."""
    model, images, hidden = make(), torch.randn(3, 3, 32, 32), random_mask(3, 16, 12)
    out = model(images, hidden, num_masked=12)
    for score_by, expected in (("predictor", out["loss_pred"]), ("loss", out["patch_loss"])):
        model.score_by = score_by
        scores, tokens = model.score_patches(images, hidden, 12)
        assert tokens is None
        torch.testing.assert_close(scores[hidden].view(3, 12), expected, rtol=0, atol=0)
        assert scores[~hidden].isneginf().all()


def test_hidden_patches_do_not_reach_the_scores_by_predictor():
    model, images, hidden = make(), torch.randn(2, 3, 32, 32), random_mask(2, 16, 12)
    patches = model.patchify(images)
    patches[hidden] = 9.0
    scores, _ = model.score_patches(images, hidden, 12)
    assert torch.equal(scores, model.score_patches(model.unpatchify(patches), hidden, 12)[0])


def test_features_are_scored_by_their_loss():
    model, images, hidden = make(target_dim=24, learning_loss=False), torch.randn(2, 3, 32, 32), random_mask(2, 16, 12)
    target = torch.randn(2, 16, 24)
    model.score_by = "loss"
    scores, _ = model.score_patches(images, hidden, 12, target)
    expected = model(images, hidden, target, 12)["patch_loss"]
    torch.testing.assert_close(scores[hidden].view(2, 12), expected, rtol=0, atol=0)


def test_features_are_never_scored_by_the_loss_of_pixels():
    """The features may be as wide as a patch of pixels."""
    model = make(target_dim=192, learning_loss=False, score_by="loss")
    with pytest.raises(AssertionError, match="features, not pixels"):
        model.score_patches(torch.randn(2, 3, 32, 32), random_mask(2, 16, 12), 12)


def test_scores_by_predictor_run_no_reconstructor_and_scores_by_loss_no_predictor():
    for score_by, unused in (("predictor", "decoder_blocks"), ("loss", "decoder_blocks_losspred")):
        model = make()
        model.score_by = score_by
        for block in getattr(model, unused):
            block.forward = None  # calling it would raise
        model.score_patches(torch.randn(2, 3, 32, 32), random_mask(2, 16, 12), 12)


# ----------------------------------------------------------------------------------------------------- predictor depth


def test_predictor_depth_changes_the_predictor_alone():
    names = {depth: {*make(predictor_depth=depth).state_dict()} for depth in (None, 1, 2, 3)}
    assert names[None] == names[2]  # the decoder's
    assert {len(blocks_of_predictor(names[depth])) for depth in (1, 3)} == {1, 3}
    assert {n for n in names[2] ^ names[1] if not n.startswith("decoder_blocks_losspred.1.")} == set()


@pytest.mark.parametrize("predictor_depth", [None, 1, 3])
def test_the_depth_is_read_from_weights(predictor_depth):
    weights = models_hpm.mae_vit_micro_patch16(predictor_depth=predictor_depth).state_dict()
    model = models_hpm.build_for("mae_vit_micro_patch16", weights)
    model.load_state_dict(weights, strict=True)


def test_every_parameter_of_a_shallow_predictor_gets_a_gradient():
    model = make(predictor_depth=1)
    model(torch.randn(2, 3, 32, 32), random_mask(2, 16, 12), num_masked=12)["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


# ---------------------------------------------------------------------------------------------------------------- runs


VARIANTS = {
    "sparse teacher": ["--teacher_keep", 0.25, "--predictor_depth", 2],
    "by loss": ["--score_by", "loss", "--no-learning_loss"],
    "by loss, half": ["--score_by", "loss", "--teacher_keep", 0.5, "--target", "norm_pixel"],
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_run_mines_resumes_and_is_drawn(options, tmp_path, monkeypatch):
    drawn = []
    draw = MaskSampler.draw

    def keep_scores(self, scores, *args, **kwargs):
        drawn.append(scores)
        return draw(self, scores, *args, **kwargs)

    monkeypatch.setattr(MaskSampler, "draw", keep_scores)
    log = run("main_pretrain", *PRETRAIN, *options, "--vis_interval", 1, "--output_dir", tmp_path / "whole")
    keep = options[options.index("--teacher_keep") + 1] if "--teacher_keep" in options else 0.25
    seen = int(16 * keep)
    assert f"teacher   sees {seen} patches, scores the other {16 - seen} by" in log
    scores = next(s for s in drawn if s is not None)
    assert (scores.isneginf().sum(1) == seen).all()
    last = log_lines(tmp_path / "whole")[-1]
    assert last["num_hardest"] == 6

    resumed = tmp_path / "resumed"
    run("main_pretrain", *PRETRAIN, *options, "--output_dir", resumed, "--max_steps", 9)
    run("main_pretrain", *PRETRAIN, *options, "--output_dir", resumed)
    for key in ("state_dict", "ema_state_dict"):
        expected, found = checkpoint(tmp_path / "whole")[key], checkpoint(resumed)[key]
        assert all(torch.equal(expected[name], found[name]) for name in expected), key

    path = tmp_path / "whole/checkpoint-last.pth"
    assert load_pretrained(path, "ema").keys() == load_pretrained(path).keys()
    visualize.main(["--checkpoint", str(path), "--num_images", "2", "--which", "ema", "--output", f"{tmp_path}/a.png"])
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ([], ["--score_by", "loss"], "has no EMA teacher, which --score_by loss needs"),
        (["--score_by", "loss"], [], "has an EMA teacher, which this run would lose: give --score_by loss"),
    ],
)
def test_a_run_keeps_its_teacher_or_has_none(tmp_path, capsys, before, now, message):
    options = [*PRETRAIN, "--no-learning_loss", "--output_dir", tmp_path]
    run("main_pretrain", *options, *before, "--max_steps", 1)
    with pytest.raises(SystemExit):
        run("main_pretrain", *options, *now)
    assert message in capsys.readouterr().err


def test_a_run_from_before_the_options_says_what_they_change(tmp_path):
    """And sizes that are given are those of the default."""
    run("main_pretrain", *PRETRAIN, "--output_dir", tmp_path, "--max_steps", 1)
    state = checkpoint(tmp_path)
    for name in ("teacher_keep", "score_by"):
        del state["options"][name]
    torch.save(state, tmp_path / "checkpoint-last.pth")
    given = ["--predictor_depth", 1, "--decoder_embed_dim", 64, "--decoder_num_heads", 4]
    log = run("main_pretrain", *PRETRAIN, *given, "--output_dir", tmp_path, "--max_steps", 2)
    assert [line for line in log.splitlines() if "Changed" in line] == [
        "Changed since the checkpoint: --max_steps: 1 -> 2"
    ]
    torch.save(state, tmp_path / "checkpoint-last.pth")
    log = run("main_pretrain", *PRETRAIN, "--output_dir", tmp_path, "--teacher_keep", 0.25)
    assert "Changed since the checkpoint: --teacher_keep: 1.0 -> 0.25" in log


@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], ["--no-learning_loss"], *VARIANTS.values()])
def test_a_run_on_a_gpu(options, tmp_path):
    """In its default precision, resumed in the second epoch."""
    for limit in (9, 12):
        run("main_pretrain", *PRETRAIN, *options, "--device", "cuda", "--output_dir", tmp_path, "--max_steps", limit)
    assert all(0 < line["train_loss"] < 10 and "bad_steps" not in line for line in log_lines(tmp_path))


def test_the_defaults_written_out_are_the_published_run(tmp_path):
    """`--teacher_keep 1.0 --predictor_depth 8` changes no bit; here the decoders have one block."""
    for name, options in (("default", []), ("written", ["--teacher_keep", 1.0, "--predictor_depth", 1])):
        run("main_pretrain", *PRETRAIN, *options, "--output_dir", tmp_path / name)
    for key in ("state_dict", "ema_state_dict"):
        default, written = (checkpoint(tmp_path / name)[key] for name in ("default", "written"))
        assert default.keys() == written.keys()
        assert all(torch.equal(default[name], written[name]) for name in default), key
