"""Claims about the README and the layout: commands parse, linked files exist, facts stated twice agree."""

import ast
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import dualenc
import eval as evaluation
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = {"README.md": README, "train.py": train.__doc__, "eval.py": evaluation.__doc__}


def commands():
    """Every `python train.py ...`, `torchrun ... train.py ...` and `python eval.py ...` in README and docstrings."""
    for name, text in DOCUMENTS.items():
        for script, arguments in re.findall(r"(?:python|torchrun [^`\n]*) (train|eval)\.py([^`\n&]*)", text):
            if "--help" in arguments:
                continue
            yield pytest.param(script, arguments.partition("   ")[0], id=f"{name}: {script}{arguments[:40]}")


@pytest.mark.parametrize(("script", "arguments"), commands())
def test_documented_commands_have_flags_that_exist(script, arguments):
    parser = dualenc.flag_parser(train.TrainConfig if script == "train" else evaluation.EvalConfig, "")
    if script == "eval":
        parser.add_argument("run")
    parser.parse_args(shlex.split(arguments))


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_readmes_python_compiles_and_names_what_exists():
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dualenc":
                assert hasattr(dualenc, node.attr), node.attr


def test_the_tests_that_the_reliability_table_names_exist():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in tests, name


def test_ci_runs_the_readmes_test_command():
    command = re.search(r"test command is `(.*?)`", README)[1]
    assert command == "pip install -r requirements.txt && pytest"
    assert "pip install -q -r requirements.txt && pytest" in (ROOT / ".ci" / "run").read_text()


def test_the_readme_lists_every_data_set_kind_and_no_other():
    named = set(re.findall(r"`([a-z0-9]+)`", README)) & (set(dualenc.TORCHVISION_SETS) | {"shapes"})
    assert {"shapes", "cifar10", "cifar100", "fashionmnist", "food101", "flowers102", "pets", "eurosat"} <= named
    for suffix in dualenc.CAPTION_SUFFIXES:
        assert suffix in README


def test_the_layout_is_the_one_promised():
    """Top-level entries, the six requirements, and no import of ours in the wrong direction."""
    allowed = {"dualenc.py", "train.py", "eval.py", "tests", "notebooks", "requirements.txt", "README.md", "LICENSE"}
    if shutil.which("git"):
        listing = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
        entries = {line.split("/")[0] for line in listing.stdout.splitlines()}  # none where this is no checkout
        assert entries <= allowed | {".gitignore", ".ci", "pyproject.toml"}
    names = {re.split(r"[><=~!]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()}
    assert names == {"torch", "timm", "tokenizers", "torchvision", "numpy", "pytest"}
    for file, forbidden in (("dualenc.py", ("train", "eval")), ("eval.py", ("train",))):
        text = (ROOT / file).read_text()
        for module in (*forbidden, "transformers"):
            assert not re.search(rf"^\s*(import|from) {module}\b", text, re.MULTILINE), f"{file} imports {module}"


def test_public_names_of_the_contract_are_there():
    names = "TextConfig VisionConfig DualEncoderConfig DualEncoder DualEncoderOutput TowerOutput TextEncoder Processor "
    names += "clip_loss siglip_loss multi_positive_clip_loss train_tokenizer load_pairs ShapesPairs"
    for name in names.split():
        assert getattr(dualenc, name).__doc__, name


def test_the_lesson_comes_first():
    """Configurations, losses and DualEncoder stand in that order before any tower, in the first quarter of the file."""
    text = (ROOT / "dualenc.py").read_text()
    order = ["class TextConfig", "class DualEncoderConfig", "def clip_loss", "class DualEncoder(", "class TextEncoder"]
    places = [
        text.index(word)
        for word in [*order, "class VisionEncoder", "class Processor", "def load_pairs", "def flag_parser"]
    ]
    assert places == sorted(places) and text[: text.index("# 4  Text tower")].count("\n") < text.count("\n") / 4
