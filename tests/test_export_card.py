"""Model cards of exports."""

import json
import re

import pytest
import torch
from exports import pretrained
from programs import log_lines, run

from export.card import metrics_of

__all__ = ["pretrained"]  # fixture


def test_card_reports_checkpoint_and_log(tmp_path, pretrained):
    run("export", "--checkpoint", pretrained, "--format", "mmseg", "--output", tmp_path / "m.pth")
    card = (tmp_path / "m.pth.md").read_text()
    last = log_lines(pretrained.parent)[-1]
    for expected in [
        "Made from the student weights of `checkpoint-last.pth`",
        "| data_path | Shapes, drawn by the program |",
        "| epochs completed | 2 of 2 |",
        f"| train_loss_rec | {last['train_loss_rec']:.5g} |",
        "MMSegmentation reports neither missing nor unexpected tensors",
        f"| torch | {torch.__version__.split('+')[0]}",
        "| lr | 0.001 |",
        "- hard-patches-mining",
    ]:
        assert expected in card, expected
    not_exported = re.findall(r"## Not exported\n\n(.*)", card)[0]
    assert "decoder_blocks_losspred (12)" in not_exported
    assert re.search(r"(^|, )norm \(2\)", not_exported)
    assert "cls_token" not in not_exported
    assert str(pretrained.parent) not in card
    assert f"| output_dir | {pretrained.parent.name} |" in card


def test_metrics_are_those_of_the_checkpoint_not_of_later_epochs(tmp_path):
    lines = [json.dumps({"epoch": epoch, "test_acc1": 10.0 * epoch}) for epoch in range(5)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"epoch": 5, "tes')
    assert metrics_of(tmp_path / "checkpoint-3.pth", 3) == {"test_acc1": 20.0}
    assert metrics_of(tmp_path / "elsewhere/checkpoint-3.pth", 3) == {}


@pytest.mark.parametrize(("options", "mined"), [({"mask_strategy": "random"}, False), ({"score_by": "loss"}, True)])
def test_tagged_as_hard_patches_mining_if_masks_were_chosen_by_score(tmp_path, pretrained, options, mined):
    """By a predictor or by the teacher's loss."""
    state = torch.load(pretrained, weights_only=True)
    state["options"] |= options
    if mined:
        state["state_dict"] = {name: value for name, value in state["state_dict"].items() if "losspred" not in name}
    torch.save(state, tmp_path / "a.pth")
    run("export", "--checkpoint", tmp_path / "a.pth", "--format", "timm", "--output", tmp_path / "b.safetensors")
    assert ("- hard-patches-mining" in (tmp_path / "b.safetensors.md").read_text()) == mined
