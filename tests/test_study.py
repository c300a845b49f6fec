"""The study: which runs count as done, its metrics, its tables."""

import json
import os

import pytest
import torch
from images import write_tar

from benchmarks import ranking, study, study_report
from benchmarks.subset import subset
from models_hpm import mae_vit_micro_patch16
from util.data.sources import build_source
from util.masking import MaskSampler
from util.run.checkpoint import save_run


def row(variant, seed, knn, **more):
    args = study.get_args_parser().parse_args([])
    metrics = {"knn": {"20": knn}, "linear": knn + 5, "finetune": knn + 6, "rank_acc": [], "loss_rec": [1.0, 0.5]}
    rest = {"seconds": 60.0 + seed, "data_wait": 0.05, "spearman": {}}
    return {**study.key(args, variant, seed), **metrics, **rest, **more}


def report(tmp_path, rows, *options):
    (tmp_path / "study.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    study_report.main([str(tmp_path / "study.jsonl"), *options])


def test_rank_correlation():
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    others = torch.tensor([[0.1, 10.0, 11.0, 500.0], [4.0, 3.0, 2.0, 1.0], [2.0, 1.0, 4.0, 3.0]])
    assert ranking.spearman(values, others).tolist() == pytest.approx([1.0, -1.0, 0.6])


def test_errors_are_means_over_the_masks_that_hide_a_patch():
    """One mask hides 3 of 4 patches: the fourth has no value. Many masks: the mean over the masks."""
    model = mae_vit_micro_patch16(img_size=16, patch_size=8, decoder_depth=1).eval()
    imgs = torch.randn(5, 3, 16, 16)
    errors, expected = ranking.masked_errors(model, imgs, 1, 0.75)
    assert (errors > 0).sum(dim=1).tolist() == [3] * 5
    assert (expected[errors == 0] == 0).all()
    mask = errors > 0
    out = model(imgs, mask)
    torch.testing.assert_close(errors[mask].view(5, 3), out["patch_loss"].detach())
    torch.testing.assert_close(expected[mask].view(5, 3), out["loss_pred"].detach())
    many, _ = ranking.masked_errors(model, imgs, 32, 0.75)
    assert (many > 0).all()
    assert 0.5 < many.mean() / errors[mask].mean() < 2


def test_correlation_of_the_scores_that_choose_the_masks():
    """Over all patches, or over those hidden from the teacher: a teacher that scores by its own loss ranks it well."""
    model = mae_vit_micro_patch16(img_size=16, patch_size=4, decoder_depth=1, learning_loss=False).eval()
    model.score_by = "loss"
    imgs = torch.randn(4, 3, 16, 16) * torch.linspace(0.2, 2, 16)[:, None]  # harder from top to bottom
    errors, expected = ranking.masked_errors(model, imgs, 16, 0.75)
    assert expected is None
    hidden = MaskSampler((4, 4), 0.75, 10, teacher_keep=0.25)
    assert ranking.teacher_correlation(model, imgs, errors, hidden, 4) > 0.9
    assert ranking.teacher_correlation(model, imgs, -errors, hidden, 4) < -0.9

    model = mae_vit_micro_patch16(img_size=16, patch_size=4, decoder_depth=1).eval()
    scores = model.predict_loss(imgs).detach()
    assert ranking.teacher_correlation(model, imgs, scores, MaskSampler((4, 4), 0.75, 10), 4) == pytest.approx(1)


def test_reading_at_mask_tokens():
    """Without blocks, what is read at a mask token is a function of its place alone, in the order of the patches."""
    model = mae_vit_micro_patch16(img_size=16, patch_size=4, decoder_depth=0).eval()
    imgs = torch.randn(3, 3, 16, 16)
    scores, tokens = ranking.predict_at_mask_tokens(model, imgs, return_tokens=True)
    hidden = model.mask_token[0] + model.decoder_pos_embed[0, 1:]
    expected = model.decoder_pred_losspred(model.decoder_norm_losspred(hidden)).mean(dim=1)  # (16,)
    torch.testing.assert_close(scores, expected.expand(3, -1))
    torch.testing.assert_close(tokens, model.predict_loss(imgs, return_tokens=True)[1])
    deep = mae_vit_micro_patch16(img_size=16, patch_size=4, decoder_depth=1).eval()
    assert ranking.predict_at_mask_tokens(deep, imgs).std(dim=0).min() > 0  # and with blocks, of the image


def test_only_variants_of_that_name_read_at_mask_tokens():
    published = type(mae_vit_micro_patch16()).predict_loss
    for variant, expected in (("hpm_norm", published), ("hpm_norm_mask_tokens", ranking.predict_at_mask_tokens)):
        with ranking.teacher_of(variant):
            assert type(mae_vit_micro_patch16()).predict_loss is expected
    assert type(mae_vit_micro_patch16()).predict_loss is published


def test_runs_of_another_budget_have_folders_of_their_own():
    """They would resume from each other's checkpoints."""
    parse = study.get_args_parser().parse_args
    given = [[], ["--epochs", "3"], ["--data_path", "a.tar"], ["--data_path", "b.tar"]]
    folders = {study.run_folder(parse(words), "hpm_norm", seed) for words in given for seed in (0, 1)}
    assert len(folders) == 8


def test_results_are_not_added_to_the_published_ones():
    """Unless --results says so. The report reads what the study writes."""
    given, report = study.get_args_parser().parse_args([]), study_report.get_args_parser().parse_args([])
    assert given.results == report.results == f"{given.work_dir}/study.jsonl" == "study_runs/study.jsonl"


def test_a_run_is_done_if_a_line_of_the_same_budget_says_so(tmp_path, monkeypatch):
    results = tmp_path / "results" / "study.jsonl"
    for line in (row("mae_norm", 0, 41.0), row("mae_norm", 1, 41.0, epochs=3)):
        study.append_result(results, line)
    started = []

    class Process:
        returncode = 0

        def __init__(self, command, **options):
            started.append(command[-2:])

        def poll(self):
            return 0

    monkeypatch.setattr(study.subprocess, "Popen", Process)
    options = ["--results", str(results), "--work_dir", str(tmp_path / "runs"), "--variants", "mae_norm", "hpm_norm"]
    assert study.main([*options, "--seeds", "0", "1"]) == 0
    assert started == [["hpm_norm", "0"], ["mae_norm", "1"], ["hpm_norm", "1"]]


def test_a_subset_has_as_many_images_of_each_class(tmp_path):
    whole = write_tar(tmp_path / "whole.tar")
    part = subset(str(whole), {"train": 3, "val": None}, tmp_path / "work")
    files = build_source(part, "train")
    assert sorted(set(files.labels)) == [0, 1, 2]
    assert len(files) == 3
    with pytest.raises(ValueError, match="--train_images 9999"):
        subset(str(whole), {"train": 9999, "val": None}, tmp_path / "work")
    assert subset(str(whole), {"train": 3, "val": None}, tmp_path / "work") == part
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"has images of .*/whole.tar: remove it, or give another --work_dir"):
        subset(str(whole.rename(tmp_path / "other/whole.tar")), {"train": 3, "val": None}, tmp_path / "work")


def test_targets_that_are_no_pixels_cannot_be_ranked(tmp_path, capsys):
    options = {"target": "dino", "input_size": 16}
    about = {"model": "m", "epoch": 1, "step": 0, "image": {}, "script": "main_pretrain"}
    save_run(tmp_path, {"options": options, **about})
    with pytest.raises(SystemExit):
        ranking.main(["--checkpoint", str(tmp_path / "checkpoint-last.pth")])
    assert "was trained with --target dino: only pixels can be ranked" in capsys.readouterr().err


def test_statistics_of_bytes_end_the_study_before_its_first_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        study.main(["--mean", "123.7", "116.3", "103.5", "--work_dir", str(tmp_path), "--results", str(tmp_path / "r")])
    assert "mean 123.7 116.3 103.5 lies outside 0..1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--mean", "0", "0", "0"], ["--rank_masks", "8"], ["--jobs", "2"]])
def test_what_identifies_a_run(words, monkeypatch):
    """Pixels, evaluation and threads: other lines do not count, and the run has a folder of its own."""
    monkeypatch.setattr(study.os, "cpu_count", lambda: 4)
    given = [study.get_args_parser().parse_args(more) for more in ([], words)]
    keys = [study.key(args, "mae_norm", 0) for args in given]
    assert [study.has_line([keys[0]], key) for key in keys] == [True, False]
    assert len({study.run_folder(args, "mae_norm", 0) for args in given}) == 2


def test_limits():
    rows = [row("mae_norm", 0, 50.0, val_images=2500), row("mae_norm", 1, 44.0, val_images=2500, data_wait=0.1)]
    assert study_report.limits(rows) == (
        "Waiting for data: 5.0 to 10.0 % of a run's pre-training. Standard error of an accuracy on 2500 images: "
        "0.99 to 1.00."
    )


def test_tables(tmp_path, capsys):
    rows = [row("mae_norm", seed, 41.0 + seed) for seed in range(3)]
    rows += [row("hpm_norm", seed, 42.0 + 2 * seed, rank_acc=[0.5, 0.7]) for seed in range(3)]
    rows += [row("mae_norm", 0, 99.0, epochs=3)]
    report(tmp_path, rows)
    first, second = capsys.readouterr().out.split("\n\n\n")
    assert "42.00 ± 1.00" in first  # MAE: 41, 42, 43
    assert "44.00 ± 2.00" in first  # HPM: 42, 44, 46
    assert "+2.00 ± 1.00 (3 of 3)" in first  # 1, 2, 3
    assert "1.0 ± 0.0 |     1.0 |" in first  # 60, 61 and 62 seconds
    assert first.count("(3 of 3) |") == 3
    assert "| 2 | 2.0 | | hpm_norm" in " ".join(first.split())  # MAE's compute is its epochs
    assert "| 2 | 4.7 |" in " ".join(first.split())  # HPM: 2.33 times as much per image
    assert "(3 of 3) | 1.00 |" in " ".join(first.split())  # as long as each other
    assert "Waiting for data: 5.0 to 5.0 %" in first
    assert "Standard error" not in first  # of how many images is not known
    assert "99.00 (one run)" in second
    assert "99.00" not in first


def test_runs_of_different_machines_share_no_table(tmp_path, capsys):
    report(tmp_path, [row("mae_norm", 0, 41.0), row("mae_norm", 1, 43.0, device="a GPU", torch="2")])
    first, second = capsys.readouterr().out.split("\n\n\n")
    assert (
        f"threads of {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, PyTorch {torch.__version__}"
        in first
    )
    assert "a GPU, PyTorch 2" in second


def test_runs_on_other_pixels_share_no_table(tmp_path, capsys):
    report(tmp_path, [row("mae_norm", 0, 41.0), row("hpm_norm", 0, 43.0, mean=[0.0, 0.0, 0.0])])
    first, second = capsys.readouterr().out.split("\n\n\n")
    assert "hpm_norm - mae_norm" not in first + second


def test_mining_is_compared_at_the_same_predictor(tmp_path, capsys):
    report(tmp_path, [row("sparse_1_norm", 0, 43.0), row("predictor_1_norm", 0, 41.0)])
    assert "| sparse_1_norm - predictor_1_norm | +2.00 (one run)" in " ".join(capsys.readouterr().out.split())


def test_a_line_that_was_cut_off_is_named(tmp_path, capsys):
    path = tmp_path / "study.jsonl"
    path.write_text('{"variant": "hpm_')
    for command in (lambda: study_report.main([str(path)]), lambda: study.main(["--results", str(path)])):
        with pytest.raises(SystemExit):
            command()
        assert f"{path} has a line that is not JSON" in capsys.readouterr().err


def test_two_lines_of_a_run_are_rejected(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report(tmp_path, [row("mae_norm", 0, 41.0), row("mae_norm", 0, 43.0)])
    assert "two lines of mae_norm, seed 0" in capsys.readouterr().err


def test_longer_runs_are_named_and_identified_by_their_factor(tmp_path, capsys):
    """--long_factor is no part of other runs: they are not repeated for another value, and share its table."""
    parse = study.get_args_parser().parse_args
    longer = parse(["--long_factor", "1.4"])
    assert study.key(longer, "mae_norm", 0) == study.key(parse([]), "mae_norm", 0)
    long = row("mae_norm_long", 0, 42.0)
    assert study.has_line([long], study.key(parse([]), "mae_norm_long", 0))
    assert not study.has_line([long], study.key(longer, "mae_norm_long", 0))
    report(
        tmp_path,
        [row("hpm_norm", 0, 43.0), long, row("mae_norm_long", 0, 41.0) | study.key(longer, "mae_norm_long", 0)],
    )
    (out,) = capsys.readouterr().out.split("\n\n\n")
    assert "| hpm_norm - mae_norm_long x2 " in out
    assert "| hpm_norm - mae_norm_long x1.4 " in out


def test_plots_do_not_overwrite_each_other(tmp_path):
    pytest.importorskip("matplotlib")
    budgets = ({"precision": "fp32"}, {"precision": "bf16"}, {"precision": "bf16", "blr": 1.0})
    report(tmp_path, [row("mae_norm", 0, 41.0, **budget) for budget in budgets], "--plots", str(tmp_path))
    found = sorted(path.name for path in tmp_path.glob("*.png"))
    assert found == ["Shapes-20-bf16-2.png", "Shapes-20-bf16.png", "Shapes-20-fp32.png"]


def test_segmentation_is_a_budget_and_two_columns_of_its_own(tmp_path, capsys):
    with_it = study.get_args_parser().parse_args(["--segment_path", "x/msrc.tar"])
    assert study.key(with_it, "mae_norm", 0)["segment_data"] == "msrc.tar"
    found = {"segment_linear": 30.5, "segment_knn": 23.25}
    rows = [
        row("mae_norm", 0, 41.0),
        *(row("mae_norm", seed, 41.0) | study.key(with_it, "mae_norm", seed) | found for seed in (0, 1)),
    ]
    report(tmp_path, rows)
    first, second = capsys.readouterr().out.split("\n\n\n")
    assert "mIoU" not in first
    assert "30.50 ± 0.00 |  23.25 ± 0.00" in " ".join(second.split()).replace(" | ", " |  ")
    assert "msrc.tar, 128 pixels, a frozen linear head trained for 600 steps (lr 0.01)" in second


def test_segmentation_of_a_run(tmp_path, monkeypatch):
    args = study.get_args_parser().parse_args(["--segment_path", "msrc.tar", "--segment_steps", "50"])
    calls = []

    def main(argv):
        calls.append(dict(zip(argv[::2], argv[1::2], strict=True)))
        return {"10-NN": 23.0} if "knn" in argv else {}

    monkeypatch.setattr(study.main_segment, "main", main)
    monkeypatch.setattr(study, "read_log", lambda path: [{"test_mIoU": 30.0}])
    assert study.segment(args, tmp_path, ["--seed", 3]) == {"segment_linear": 30.0, "segment_knn": 23.0}
    assert [call["--head"] for call in calls] == ["linear", "knn"]
    assert calls[0]["--lr"] == "0.01"
    assert all(call["--finetune"] == str(tmp_path / "pretrain/checkpoint-last.pth") for call in calls)
    assert (calls[0]["--crop"], calls[1]["--input_size"]) == ("128", "128")
