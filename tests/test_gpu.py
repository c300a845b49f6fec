"""Every script on a GPU: workers and pinned memory, compiled steps, panels, fp16, and the collectives of NCCL."""

import math

import pytest
import torch
import torch.distributed as dist
from images import write_tree
from programs import PRETRAIN, checkpoint, log_lines, ranks, run
from segment_data import ade_files
from test_evaluation_scripts import FINETUNE, KNN, MIXED, PROBE
from test_segment_program import SIZES, STEPS, mious
from torch import nn

from util.run import distributed

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
WHOLE = ["--device", DEVICE, "--num_workers", 2, "--vis_interval", 1, "--knn_interval", 1, "--knn_k", 5]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    run("main_pretrain", *PRETRAIN, "--device", DEVICE, "--output_dir", folder)
    return folder / "checkpoint-last.pth"


def assert_learned(folder):
    """Finite losses in every epoch, no skipped step, finite weights."""
    for line in log_lines(folder):
        assert math.isfinite(line["train_loss"])
        assert "bad_steps" not in line
    assert all(value.isfinite().all() for value in checkpoint(folder)["state_dict"].values())


@pytest.mark.parametrize("options", [["--compile"], ["--precision", "fp32"], ["--precision", "fp16"]], ids=" ".join)
def test_pretraining_with_workers_panels_and_knn(tmp_path, options):
    for limit in (9, 12):  # resumed in the second epoch
        run("main_pretrain", *PRETRAIN, *WHOLE, *options, "--output_dir", tmp_path, "--max_steps", limit)
    assert_learned(tmp_path)
    assert all(0 <= line["knn_acc1"] <= 100 for line in log_lines(tmp_path))


def test_classifiers_and_their_predictions(tmp_path, pretrained):
    given = ["--finetune", pretrained, "--device", DEVICE]
    run("main_finetune", *FINETUNE, *MIXED, *given, "--num_workers", 2, "--output_dir", tmp_path / "tuned")
    assert_learned(tmp_path / "tuned")
    for optimizer in ("sgd", "lars"):
        run("main_linprobe", *PROBE, *given, "--optimizer", optimizer, "--output_dir", tmp_path / optimizer)
        assert_learned(tmp_path / optimizer)
    tuned = tmp_path / "tuned/checkpoint-best.pth"
    run(
        "main_finetune", *FINETUNE, "--eval", "--finetune", tuned, "--device", DEVICE, "--output_dir", tmp_path / "eval"
    )
    log = run("main_knn", *KNN, *given, "--logreg")
    assert "logistic regression  top-1" in log
    table = tmp_path / "table.csv"
    run("predict", "--checkpoint", tuned, "--shapes_val", 10, "--num_workers", 2, "--device", DEVICE, "--output", table)
    assert len(table.read_text().splitlines()) == 11


def test_segmentation(tmp_path, pretrained):
    data = write_tree(tmp_path / "ade", ade_files(train=12, val=5))
    given = ["--data_path", data, "--finetune", pretrained, "--device", DEVICE]
    for head in ("upernet", "linear"):
        log = run("main_segment", *given, *SIZES, *STEPS, "--head", head, "--output_dir", tmp_path / head)
        assert len(mious(log)) >= 2
    for head in ("knn", "logreg"):
        probe = ["--head", head, "--input_size", 32, "--batch_size", 5, "--num_workers", 0]
        assert mious(run("main_segment", *given, *probe, "--output_dir", tmp_path / head))


def test_pictures(tmp_path, pretrained):
    run("visualize", "--checkpoint", pretrained, "--device", DEVICE, "--output", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_the_process_group_of_one_rank(tmp_path):
    """What two ranks of NCCL call, in a group of one: two cannot share a GPU."""
    device = distributed.pick_device(DEVICE, distributed.ALONE)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert distributed.from_rank_zero(lambda: "value") == "value"
        assert distributed.gather(3) == [3]
        assert distributed.all_reduce_sum(torch.ones(2, device=device)).tolist() == [1, 1]
        model = distributed.wrap_ddp(nn.Linear(4, 4).to(device), device)
        with model.no_sync():
            model(torch.ones(2, 4, device=device)).sum().backward()
        model(torch.ones(2, 4, device=device)).sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
    finally:
        distributed.shutdown()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks(tmp_path):
    ranks("main_pretrain", *PRETRAIN, *WHOLE, "--batch_size", 4, "--output_dir", tmp_path)
    assert_learned(tmp_path)
