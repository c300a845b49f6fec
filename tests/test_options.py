"""Options of the scripts: declared means read, and a mistake ends in one line."""

import ast
import re
from pathlib import Path

import pytest

import main_finetune
import main_knn
import main_linprobe
import main_pretrain
import main_segment
from export import __main__ as export
from models_teacher import KINDS
from util import losses, masking, targets
from util.run import checkpoint, distributed, loop, options, splits
from util.run import resolve as resolving
from visualize import __main__ as visualize

ROOT = Path(__file__).parent.parent
SCRIPTS = [main_pretrain, main_finetune, main_linprobe, main_knn, main_segment, visualize, export]
ONE = distributed.World(0, 1, 0, 1)

OFFICIAL_PRETRAIN = """--batch_size 32 --accum_iter 8 --model mae_vit_base_patch16_dec512d8b --input_size 224
--token_size 14 --mask_ratio 0.75 --epochs 200 --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 --data_path DATA
--output_dir OUT --log_dir LOG --experiment hpm_relative_in1k_ep200 --learning_loss --relative"""


def only_names(node):
    """Lists of options that may not change, or that are ignored or rejected, are no use of them."""
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("FIXED", "UNREAD", "REJECTED")


def is_given(node):
    """`given.batch_size`: what util/run/options.py resolves for several scripts."""
    return isinstance(node, ast.Attribute) and ast.unparse(node.value) == "given"


def read_from_a_mapping(module):
    """Names that a module looks up in a mapping called options: `options["epochs"]`, `options.get("alpha_0", 0.0)`."""
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        text = ast.unparse(node) if isinstance(node, ast.Subscript | ast.Call) else ""
        yield from re.findall(r"^(?:self\.)?options(?:\[|\.get\()'(\w+)'", text)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_every_declared_option_is_read(script):
    tree = ast.parse(Path(script.__file__).read_text())
    reading = [n for n in tree.body if getattr(n, "name", "") != "get_args_parser" and not only_names(n)]
    nodes = [node for part in reading for node in ast.walk(part)]
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "args"}
    keys = {id(key) for n in nodes if isinstance(n, ast.Dict) for key in n.keys}  # defaults, which are no use
    read |= {n.value for n in nodes if isinstance(n, ast.Constant) and id(n) not in keys}  # getattr(args, "name")
    read_here = set(read)
    if hasattr(script, "MaskSampler") or hasattr(script, "masking"):
        read |= set(read_from_a_mapping(masking))
    if hasattr(script, "Loop"):
        read |= set(read_from_a_mapping(loop)) | set(read_from_a_mapping(checkpoint))
    for module in (resolving, splits):
        read |= {n.attr for n in ast.walk(ast.parse(Path(module.__file__).read_text())) if is_given(n)}
    if script is main_pretrain:
        read |= {f"{network}_path" for network in KINDS}
    declared = {action.dest for action in script.get_args_parser()._actions} - {"help"}
    ignored = set(script.get_args_parser().ignored)
    assert declared - read <= ignored
    assert not ignored & read_here


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_every_option_has_help(script):
    bare = [a.dest for a in script.get_args_parser()._actions if not a.help]
    assert not bare


def test_the_official_command_parses_and_resolves():
    args = main_pretrain.get_args_parser().parse_args(OFFICIAL_PRETRAIN.split())
    args = main_pretrain.resolve_options(args, distributed.World(0, 8, 0, 8))
    assert args.global_batch == 2048
    assert args.lr == pytest.approx(1.2e-3)
    assert (args.target, args.mask_strategy, args.learning_loss, args.relative) == ("pixel", "easy_to_hard", True, True)
    assert (args.clip_grad, args.ema_decay, args.ema_decay_final, args.ema_ramp_epochs) == (5.0, 0.999, 0.9999, 100)


def resolve(text="", world=ONE):
    return main_pretrain.resolve_options(main_pretrain.get_args_parser().parse_args(text.split()), world)


def test_defaults_never_contradict_each_other():
    for epochs in (1, 2, 5, 39, 400):
        args = resolve(f"--epochs {epochs}")
        assert args.warmup_epochs < epochs
    assert resolve().warmup_epochs == 40


def test_booleans_can_be_switched_off():
    args = resolve("--no-learning_loss --no-relative")
    assert (args.learning_loss, args.relative, args.mask_strategy) == (False, False, "random")
    assert not resolve("--no_pin_mem").pin_mem
    assert not resolve("--no-pin_mem").pin_mem


def test_official_names_map_onto_ours():
    assert resolve("--norm_pix_loss").target == "norm_pixel"
    assert resolve("--mask_block").mask_strategy == "random"
    for spelling in ("--local_rank=1", "--local-rank=1"):
        parser = main_pretrain.get_args_parser()
        args = parser.parse_args([spelling, "--dist_url", "env://", "--dist_on_itp"])
        assert [name for name in parser.ignored if getattr(args, name)] == ["local_rank", "dist_on_itp", "dist_url"]


def test_objectives_of_the_predictor():
    """The official switches mean what they always did."""
    for text, name in {
        "": "relative",
        "--relative": "relative",
        "--no-relative": "absolute",
        "--predictor_loss absolute": "absolute",
        "--no-relative --predictor_loss absolute": "absolute",
    }.items():
        args = resolve(text)
        assert (args.predictor_loss, args.relative) == (name, name == "relative"), text
        model = main_pretrain.build_model(args)
        assert (model.predictor_loss, model.relative) == (name, name == "relative"), text


def test_registries_are_the_choices():
    choices = {action.dest: action.choices for action in main_pretrain.get_args_parser()._actions}
    assert choices["mask_strategy"] == list(masking.STRATEGIES)
    assert choices["predictor_loss"] == list(losses.PREDICTOR_LOSSES)
    assert choices["target"] == [*targets.PIXEL_TARGETS, "ema", *KINDS]
    assert choices["learn_feature_loss"] == ["none", "ema", *KINDS]


def test_global_batch_sets_the_accumulation():
    eight = distributed.World(0, 8, 0, 8)
    assert resolve("--global_batch 2048 --batch_size 64", eight).accum_iter == 4
    with pytest.raises(ValueError, match=r"--global_batch 2048 is not a multiple of --batch_size 60 x 8 processes"):
        resolve("--global_batch 2048 --batch_size 60", eight)
    with pytest.raises(ValueError, match="give one of the two"):
        resolve("--global_batch 2048 --accum_iter 2")


MISTAKES = {
    "--epochs 0": "argument --epochs: expected an integer >= 1, got '0'",
    "--epochs 1.5": "expected an integer >= 1, got '1.5'",
    "--epochs nan": "expected an integer >= 1, got 'nan'",
    "--batch_size -4": "expected an integer >= 1, got '-4'",
    "--lr nan": "expected a number >= 0, got 'nan'",
    "--mask_ratio 1": "expected a number > 0 and < 1, got '1'",
    "--std 0 1 1": "expected a number > 0",
    "--alpha_T 1.5": "expected a number >= 0 and <= 1, got '1.5'",
    "--model mae_vit_bse_patch16": "unknown value 'mae_vit_bse_patch16'; did you mean mae_vit_base_patch16",
    "--precision int8": "unknown value 'int8'",
    "--epoch 3": "unrecognized arguments: --epoch 3; did you mean --epochs?",
    "--warmup_epochs 400": "--warmup_epochs 400 must be less than --epochs 400",
    "--start_epoch 400": "--start_epoch 400 must be less than --epochs 400",
    "--input_size 225": "patch size 16 does not divide an image of 225 x 225",
    "--token_size 16": "--token_size 16: images of 224 pixels in patches of 16 have 14 x 14 patches",
    "--mask_ratio 0.999": "--mask_ratio 0.999 masks 196 of 196 patches",
    "--decoder_num_heads 7": "decoder width 512 is not a multiple of its 7 heads",
    "--norm_pix_loss --target pixel": "--target and --norm_pix_loss name different targets (pixel, norm_pixel)",
    "--mask_block --mask_regular": "give one",
    "--mask_block --mask_ratio 0.6": "--mask_block requires --mask_ratio 0.75, got 0.6",
    "--mask_regular --input_size 240": "even grid of patches, got 15 x 15",
    "--mask_block --mask_strategy hardest": "--mask_block and --mask_strategy hardest both choose the masks",
    "--no-learning_loss --mask_strategy hardest": "--mask_strategy hardest needs the loss predictor",
    "--relative --predictor_loss absolute": "--relative and --predictor_loss absolute name different losses: give one",
    "--no-relative --predictor_loss relative": "--no-relative and --predictor_loss relative name different losses",
    "--no-learning_loss --predictor_loss absolute": "--predictor_loss is for the loss predictor",
    "--predictor_loss relativ": "unknown value 'relativ'; did you mean relative?",
    "--no-learning_loss --predictor_depth 2": "--predictor_depth is for the loss predictor",
    "--no-learning_loss --teacher_keep 0.25": "--teacher_keep is for masks chosen by score",
    "--mask_block --score_by loss": "--score_by loss is for masks chosen by score",
    "--score_by loss --teacher_keep 1": "--score_by loss needs patches hidden from the teacher",
    "--teacher_keep 0.5 --target ema": "needs the teacher's features of the whole image: omit --teacher_keep",
    "--score_by loss --target ema": "needs the teacher's features of the whole image: omit --score_by loss",
    "--teacher_keep 0.002": "--teacher_keep 0.002 leaves the teacher none of 196 patches to see: give a larger value",
    "--teacher_keep 0.8": "--teacher_keep 0.8: the teacher scores 40 of 196 patches, and up to 73 are masked by score",
    "--mask_strategy constant --alpha_0 0.3": "--alpha_0 has no effect with --mask_strategy constant: omit it",
    "--mask_strategy hardest --alpha_T 0.7": "--alpha_T has no effect with --mask_strategy hardest: omit it",
    "--no-learning_loss --alpha_T 0.7": "--alpha_T has no effect with --mask_strategy random: omit it",
    "--mask_block --alpha_T 0.7": "--alpha_T has no effect with a mask pattern: omit it",
    "--teacher_keep 0.25 --mask_strategy hardest": "scores 147 of 196 patches, and up to as many are masked by score",
    "--teacher_keep 0.25 --alpha_T 0": "--teacher_keep 0.25 is for masks chosen by score, and no patch is: omit it",
    "--score_by loss --alpha_T 0": "--score_by loss is for masks chosen by score, and no patch is: omit it",
    "--teacher_keep 0": "expected a number > 0 and <= 1, got '0'",
    "--global_batch 100 --batch_size 64": "change --batch_size to a divisor of 100",
    "--device cuda": "this PyTorch finds no CUDA device",
    "--precision fp16": "--precision fp16 needs CUDA",
    "--data_path /nowhere": "--data_path /nowhere does not exist",
    "--shapes_train 10": "10 images do not fill one optimizer step of 64",
    "--resume /nowhere.pth": "checkpoint /nowhere.pth does not exist",
    "--load_from /nowhere.pth": "checkpoint /nowhere.pth does not exist",
    "--output_dir /proc/run": "/proc/run",
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_ends_before_any_work_in_a_line_or_two(text, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(main_pretrain.rng, "seed_all", lambda *key: pytest.fail("began to build"))
    with pytest.raises(SystemExit) as stop:
        main_pretrain.main(text.split())
    assert stop.value.code == 2
    written = capsys.readouterr()
    assert message in written.err
    assert written.err.count("\n") <= 2
    assert "usage" not in written.err
    assert "Traceback" not in written.err


def test_another_rank_names_itself(capsys, monkeypatch):
    """After a moment, in which torchrun ends it if rank 0 made the same mistake."""
    waited = []
    monkeypatch.setattr(options.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as stop:
        main_pretrain.get_args_parser().parse_args(["--epochs", "0"])
    assert stop.value.code == 2
    assert "error: rank 3: argument --epochs: expected an integer >= 1, got '0'" in capsys.readouterr().err
    assert waited == [2]


def test_number_of_workers():
    assert resolve("--num_workers 5").num_workers == 5
    assert 1 <= resolve().num_workers <= 8
    assert resolve(world=distributed.World(0, 10_000, 0, 10_000)).num_workers == 1


def test_help_states_each_default_once():
    for script in SCRIPTS:
        text = script.get_args_parser().format_help()
        assert "None)" not in text
        assert "(default: )" not in text
        assert "(default: (default" not in text
