"""Documents: every link and path exists, and every printed command parses with its script's own options."""

import re
import shlex
from pathlib import Path

import pytest
from programs import ROOT, module_of
from torch.distributed.run import get_args_parser as torchrun_parser

from util.run.distributed import World

DOCUMENTS = sorted(path for folder in (".", "docs", "recipes", "demo") for path in (ROOT / folder).glob("*.md"))
TEXTS = [*DOCUMENTS, ROOT / "requirements.txt", *(ROOT / "scripts").glob("*.sh"), *(ROOT / "recipes").glob("*.sh")]

# Official names and commands that the documents mention as such.
FOREIGN_PATHS = {"scripts/pretrain_base.sh", "scripts/pretrain_large.sh"}
FOREIGN_MODULES = {
    "torch.distributed.launch",
    "importtime",
    "pip",
    "tools/train.py",
    "../../tools/lazyconfig_train_net.py",
}


def ids(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids(DOCUMENTS))
def test_links_lead_somewhere(path):
    for target, anchor in re.findall(r"\]\(([^)\s#]*)#?([^)\s]*)\)", path.read_text()):
        if target.startswith("http"):
            continue
        file = path.parent / target if target else path
        assert file.exists(), f"{path.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{path.name}: {target}#{anchor}"


@pytest.mark.parametrize("path", TEXTS, ids=ids(TEXTS))
def test_named_files_exist(path):
    pattern = (
        r"\b(?:util|docs|tests|recipes|scripts|benchmarks|export|visualize)/[\w/.-]+\.(?:py|sh|md|svg|png|jsonl)\b"
    )
    for name in set(re.findall(pattern, path.read_text())) - FOREIGN_PATHS:
        if "NAME" not in name:
            assert (ROOT / name).exists(), f"{path.name}: {name}"


def commands(path):
    """Every command line of a document, from its blocks and from inline code, as a list of words."""
    text = path.read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    shell = [block for language, block in blocks if language in ("", "bash")]
    lines = [line for block in shell for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`((?:time )?(?:python|torchrun|bash) [^`]*)`", prose)
    for line in lines:
        words = shlex.split(line, comments=True)
        if "--help" in words:
            continue
        while words and (words[0] == "time" or re.fullmatch(r"[A-Z]+=.*", words[0])):
            words.pop(0)
        if words and words[0] in ("python", "torchrun", "bash", "sbatch"):
            yield words


def program(words):
    """(script or module, its options, world size) of a python or torchrun command."""
    if words[0] == "torchrun":
        launch = torchrun_parser().parse_args(words[1:])
        nodes = launch.nnodes.split(":")[-1]
        return launch.training_script, launch.training_script_args, int(nodes) * int(launch.nproc_per_node)
    rest = words[1:]
    while rest[0] in ("-X", "-m"):
        flag, name, *rest = rest
        if flag == "-m":
            return name, rest, 1
    return rest[0], rest[1:], 1


def parse(script, options, world_size, monkeypatch):
    """Parse the options with the script's parser, and resolve them where the script does."""
    module = module_of(script.removesuffix(".py"))
    args = module.get_args_parser().parse_args(options)
    if script.startswith(("main_", "predict")):
        monkeypatch.setattr(module, "read_meta", lambda path: {}, raising=False)  # CKPT stands for any checkpoint
        module.resolve_options(args, World(0, world_size, 0, world_size))


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids(DOCUMENTS))
def test_commands_parse(path, monkeypatch):
    for words in commands(path):
        files = [word for word in words if word.endswith(".sh") and word.startswith(("recipes/", "scripts/"))]
        if words[0] in ("bash", "sbatch"):
            assert files
            assert all((ROOT / file).exists() for file in files), words
            continue
        script, options, world_size = program(words)
        if script in FOREIGN_MODULES:
            continue
        if script.startswith("tests/"):
            source = (ROOT / script).read_text()
            assert all(f'"{word}"' in source for word in options if word.startswith("--")), words
        elif options:
            parse(script, options, world_size, monkeypatch)
        else:  # the name of a program, in a sentence
            assert module_of(script.removesuffix(".py"))


def test_commands_are_found():
    """The search above is not empty-handed: scripts, modules and launchers."""
    found = [words for path in DOCUMENTS for words in commands(path)]
    assert len(found) > 50
    scripts = {Path(program(words)[0]).stem for words in found if words[0] in ("python", "torchrun")}
    assert {"main_pretrain", "main_finetune", "main_linprobe", "main_knn", "export", "visualize"} <= scripts


def test_unknown_options_are_found(monkeypatch):
    with pytest.raises(SystemExit):
        parse("main_pretrain.py", ["--no_such_option", "1"], 1, monkeypatch)
