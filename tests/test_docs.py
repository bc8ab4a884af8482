"""Claims about the README and the layout: commands parse, linked files exist, facts stated twice agree."""

import ast
import json
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


@pytest.mark.parametrize(("script", "arguments"), list(commands()))
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
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
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


# ---- Notebooks and the map from papers to code ----------------------------------------------------------------------

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LESSONS = NOTEBOOKS[:-1]  # the last one is the assignment
OURS = {"dualenc": dualenc, "train": train, "eval": evaluation}


def code_of(path):
    """The code cells of a notebook, and the syntax tree of all of them."""
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    return cells, ast.parse("\n".join("".join(cell["source"]) for cell in cells))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_use_our_modules_and_define_nothing_of_theirs_again(path):
    _, tree = code_of(path)
    modules = {}  # what the notebook calls each of our modules
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules.update({alias.asname or alias.name: OURS[alias.name] for alias in node.names if alias.name in OURS})
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("__"):
            assert not [name for name, module in OURS.items() if hasattr(module, node.name)], f"{node.name} again"
    assert "dualenc" in modules or path not in LESSONS
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"{node.value.id}.{node.attr} does not exist"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_committed_as_they_ran_and_name_no_machine(path):
    """In order from a fresh kernel, with outputs and pictures, without warnings, paths or cells nobody ran."""
    cells, _ = code_of(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run notebooks/run.py --write"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert path not in LESSONS or any("image/png" in output.get("data", {}) for output in outputs), "no picture"
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    shown = json.dumps([{k: v for k, v in o.get("data", o).items() if k != "image/png"} for o in outputs])
    assert not re.search(r"/(tmp|home|root|usr|opt|Users|var)/|[A-Z]:\\\\", shown), "a path of the machine that ran it"
    assert not re.search(r"0x[0-9a-f]{6}", shown), "an address in memory"


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)
def test_lessons_ask_for_predictions_and_end_with_changes_to_predict(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    assert sum("write down" in text for text in texts) >= 3
    assert cells[-1]["cell_type"] == "markdown" and "## Change this and predict" in texts[-1]
    assert sum(line.startswith("# ") for text in texts for line in text.splitlines()) == 1, "one title, on top"


def test_the_readme_lists_every_notebook():
    assert re.findall(r"notebooks/(\w+\.ipynb)\)", README) == [path.name for path in NOTEBOOKS]


def test_notebooks_run_in_fresh_kernels_and_stop_at_the_first_error(tmp_path, capsys):
    nbclient = pytest.importorskip("nbclient", reason="needs notebooks/requirements.txt")
    pytest.importorskip("ipykernel", reason="needs notebooks/requirements.txt")
    import nbformat

    runner = {"__name__": "run", "__file__": str(ROOT / "notebooks" / "run.py")}
    exec(Path(runner["__file__"]).read_text(), runner)

    def write(name, *cells):
        cells = [nbformat.v4.new_code_cell(cell, id=f"cell-{i}") for i, cell in enumerate(cells)]
        notebook = nbformat.v4.new_notebook(cells=cells)
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "somewhere else"}
        nbformat.write(notebook, tmp_path / name)

    modules = "sorted(path.name for path in Path('..').glob('*.py'))"
    write("01_good.ipynb", "from pathlib import Path\nfile = open('left', 'w')\nprint(Path('left').resolve())", modules)
    write("02_bad.ipynb", "left = open('left')")  # another notebook's file is not there
    before = (tmp_path / "01_good.ipynb").read_text()
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="FileNotFoundError"):
        runner["main"](["--folder", str(tmp_path)])
    assert re.search(r"\d s  01_good.ipynb\n$", capsys.readouterr().out)
    assert (tmp_path / "01_good.ipynb").read_text() == before, "written without being asked"
    runner["main"](["01", "--folder", str(tmp_path), "--write"])
    assert re.search(r"\d s  01_good.ipynb\n +\d+ s  in all\n$", capsys.readouterr().out)
    written = json.loads((tmp_path / "01_good.ipynb").read_text())
    shown = "".join(written["cells"][1]["outputs"][0]["data"]["text/plain"])
    assert shown == "['dualenc.py', 'eval.py', 'train.py']", "our modules lie one folder up"
    assert written["cells"][0]["outputs"][0]["text"] == ["left\n"], "where it ran is left out"
    assert [(cell["id"], cell["metadata"]) for cell in written["cells"]] == [("cell-0", {}), ("cell-1", {})]
    assert written["metadata"] == runner["METADATA"]
    assert not (tmp_path / "left").exists()
    with pytest.raises(ValueError, match="no notebook in .* begins with 09"):
        runner["main"](["09", "--folder", str(tmp_path)])


def test_the_map_from_papers_to_code_names_what_exists():
    section = README.partition("## From paper to code")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("|")][2:]
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(rows) >= 15
    for paper, functions, claims in rows:
        assert paper.strip() and "`" in functions and "`" in claims
        for name in re.findall(r"`([\w.]+)`", functions):
            module, *path = name.split(".")
            thing = OURS[module]
            for part in path:
                thing = getattr(thing, part)
            assert path, f"{name} names a whole module"
        for name in re.findall(r"`(\w+)`", claims):
            assert f"def {name}(" in tests, name
