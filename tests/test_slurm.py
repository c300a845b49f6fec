"""The SLURM template with fake SLURM commands: signals to the job steps, and requeueing."""

import os
import signal
import socket
import stat
import subprocess
import sys

import pytest
from images import members, write_tree
from programs import ROOT, checkpoint
from torch.distributed.run import get_args_parser

# srun starts one task per node, each in its own process group. scancel --signal signals these groups, as slurmstepd
# does.
SRUN = """#!{python}
import os, subprocess, sys
assert sys.argv[1:3] == ["--cpus-per-task=3", "--kill-on-bad-exit=0"], sys.argv
words = sys.argv[3:]
tasks = [
    subprocess.Popen(words, env=os.environ | {{"SLURM_NODEID": str(node)}}, start_new_session=True)
    for node in range(int(os.environ["SLURM_JOB_NUM_NODES"]))
]
open("{folder}/tasks", "w").write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
"""
SCANCEL = """#!/bin/bash
echo "scancel $*" >>{folder}/calls
for task in $(cat {folder}/tasks); do kill -s "${{1#--signal=}}" -- -"$task"; done
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") echo localhost ;;
    "show job") echo "JobId=$3 JobState=$(cat {folder}/state) Reason=None" ;;
    *) echo "scontrol $*" >>{folder}/calls ;;
esac
"""
SBATCH = """#!/bin/bash
cd {root} && SLURM_JOB_ID=7 SLURM_SUBMIT_DIR={root} SLURM_JOB_NODELIST=localhost exec bash "$@"
"""


@pytest.fixture
def slurm(tmp_path):
    """A function that submits a recipe and returns the process of the job."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL), ("sbatch", SBATCH)):
        (tools / name).write_text(text.format(python=sys.executable, folder=tmp_path, root=ROOT))
        (tools / name).chmod(stat.S_IRWXU)
    (tmp_path / "state").write_text("RUNNING")
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]

    def submit(nodes, *words, **more):
        environment = os.environ | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PORT": str(port),
            "SLURM_JOB_NUM_NODES": str(nodes),
            "DATA": str(tmp_path / "data"),
            "OUT": str(tmp_path / "my out"),
            "SLURM_CPUS_PER_TASK": "3",
            "NPROC": "1",
            "PYTHON": sys.executable,
        }
        return subprocess.Popen(
            ["sbatch", "recipes/slurm.sh", *map(str, words)],
            env=environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return submit


@pytest.fixture
def torchrun_without_signals(tmp_path):
    """An interpreter whose torchrun has no options to ask for, in no time."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/bash\n[[ "$*" != *--help* ]] && exec {sys.executable} "$@"\nexit 0\n')
    path.chmod(stat.S_IRWXU)
    return str(path)


def calls(tmp_path):
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_a_signalled_job_saves_and_is_requeued(slurm, tmp_path):
    """Two nodes with one process each. The signal is SIGUSR1 where torchrun can forward it, otherwise SIGTERM."""
    write_tree(tmp_path / "data", members(per_class=8))
    words = ["recipes/pretrain_hpm_base_200.sh", "--model", "mae_vit_micro_patch16", "--decoder_depth", 1]
    words += ["--input_size", 32, "--batch_size", 2, "--global_batch", 4, "--num_workers", 1, "--log_interval", 1]
    words += ["--max_steps", 60]
    job = slurm(2, *words)
    shown = ""
    while shown.count("img/s") < 2:
        line = job.stdout.readline()
        assert line, shown
        shown += line
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=400)
    name = "USR1" if "--signals-to-handle" in get_args_parser().format_help() else "TERM"
    assert calls(tmp_path) == [f"scancel --signal={name} 7", "scontrol requeue 7"], shown + out
    assert job.returncode == 0
    state = checkpoint(tmp_path / "my out/pretrain_hpm_base_200")
    assert state["stopped"] == f"SIG{name}"
    taken = state["epoch"] * 6 + state["step"]
    assert 2 <= taken < 60


def test_a_completed_recipe_is_not_requeued(slurm, tmp_path, torchrun_without_signals):
    (tmp_path / "recipe.sh").write_text("exit 0\n")
    job = slurm(1, tmp_path / "recipe.sh", PYTHON=torchrun_without_signals)
    out, _ = job.communicate(timeout=300)
    assert job.returncode == 0, out
    assert calls(tmp_path) == []


@pytest.mark.parametrize(
    ("stopped", "saves", "state", "requeued"),
    [
        ("SIGUSR1", True, "RUNNING", True),
        ("SIGUSR1", False, "RUNNING", False),
        ("SIGUSR1", True, "COMPLETING", False),
        ("", True, "RUNNING", False),
    ],
    ids=["stopped by a signal", "failed after an earlier stop", "cancelled", "failed"],
)
def test_the_checkpoint_decides_about_requeueing(
    slurm, tmp_path, torchrun_without_signals, stopped, saves, state, requeued
):
    """Of a recipe that ends with status 3, its second run unfinished."""
    from util.run.checkpoint import save_run

    options = {"epochs": 2, "steps_per_epoch": 6, "max_steps": None}
    for name, epoch in (("pretrain", 2), ("finetune/x", 1)):
        (tmp_path / "my out" / name).mkdir(parents=True)
        save_run(tmp_path / "my out" / name, {"epoch": epoch, "step": 0, "options": options, "stopped": stopped})
    (tmp_path / "state").write_text(state)
    recipe = tmp_path / "recipe.sh"
    save = 'touch "$OUT/finetune/x/checkpoint-last.pth"; ' if saves else ""
    recipe.write_text(
        'if [ "${DRY:-}" = 1 ]; then\n'
        'printf "%q " main_pretrain.py --output_dir elsewhere --output_dir="$OUT/pretrain"; echo\n'
        'printf "%q " main_finetune.py --output_dir "$OUT/finetune" --experiment x --lr 1; echo\n'
        f"else {save}exit 3\nfi\n"
    )
    job = slurm(1, recipe, PYTHON=torchrun_without_signals)
    out, _ = job.communicate(timeout=300)
    assert job.returncode == (0 if requeued else 3), out
    assert calls(tmp_path) == ["scontrol requeue 7"] * requeued
