"""README.md: its commands have the flags they use, its Python runs, its numbers are those of the results."""

import csv
import re
import shlex
import shutil

import pytest
import torch

import sample as sample_py
import train as train_py

from .conftest import CONCEPTS, ROOT, TINY

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in (
    "README.md", "tests/README.md", "tests/bench/README.md", "weights/README.md")}  # fmt: skip
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.M | re.S)
TREE = next(block for _, block in BLOCKS if block.startswith("train.py sample.py"))
SHELL = "".join(block for language, block in BLOCKS if not language and block != TREE)
LINES = SHELL.replace("\\\n", "").splitlines()
COMMANDS = [part.strip() for line in LINES for part in line.split("&&")]
PYTHON = [block for language, block in BLOCKS if language == "python" and "import" in block]
LINKS = sorted(set(re.findall(r"\]\(([^)#:]+)[)#]", TEXT) + re.findall(r"`(tests/\w+\.py)`", TEXT)))
RESULTS = ROOT / "tests" / "bench" / "results"
MEASURED = {  # a row of the README -> a file of results, and the first cells of our row and of theirs
    "learn a word": ("quality", ["tinyti", "400"], ["diffusers", "4,000"]),
    "pictures taken for": ("quality", ["tinyti", "400"], ["diffusers", "4,000"]),
    "a step of SD 1.5's size, 256²": ("step-sd15", *2 * [["256²", "1", "3.0"]]),
    "the same at 512² on a GPU": ("step-h100", *2 * [["SD 1.5", "512²", "1"]]),
    "its weights in memory": ("memory", *2 * [["seconds to have SD 1.5's weights in memory"]]),
    "peak memory": ("memory", *2 * [["GiB at the peak of two steps, 256², batch 1"]]),
}


def tables(text):
    """The rows of every table: lists of cells."""
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        yield [row for row in rows if not set("".join(row)) <= set("-: ")]


def read_results(name):
    with open(RESULTS / f"{name}.csv", encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_its_length():
    """All of it, code too; the first command is on the first screen."""
    assert 1000 <= len(re.findall(r"\S*\w\S*", TEXT)) <= 1300
    first = next(i for i, line in enumerate(TEXT.splitlines(), 1) if "python train.py" in line)
    assert first <= 14


@pytest.mark.parametrize("page", PAGES)
def test_every_cell_of_a_table_fits_into_a_line(page):
    text = re.sub(r"\]\([^)]*\)", "]", PAGES[page])
    assert [cell for table in tables(text) for row in table for cell in row if len(cell) > 110] == []


def test_the_two_programs_are_shown():
    assert sum(command.startswith(("python train.py", "python sample.py")) for command in COMMANDS) >= 2


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    words = shlex.split(command)
    if "train.py" in words:
        args = train_py.arguments(words[words.index("train.py") + 1 :])
        bundled = [folder for folder in [args.images] if folder.startswith("concepts/")]
        assert all((ROOT / folder).is_dir() for folder in bundled) and (bundled or args.weights != str(TINY))
    elif "sample.py" in words:
        args = sample_py.arguments(words[words.index("sample.py") + 1 :])
        assert bool(args.words) == any("S*" in text for text in args.prompts)
        assert args.mask is None or (ROOT / args.mask).is_file()
    else:
        extras = re.fullmatch(r"pip install -e \.(\[(\w+)\])?", " ".join(words))
        if extras and extras[2]:
            assert f"\n{extras[2]} = [" in (ROOT / "pyproject.toml").read_text()
        assert extras or words[:3] == ["python", "-m", "tinyti.convert"]


def test_the_flags_it_names_exist():
    known = set()
    for file in ("train.py", "sample.py", "tinyti/programs/cli.py"):
        known |= set(re.findall(r'"(--[\w-]+)"', (ROOT / file).read_text()))
    named = set(re.findall(r"`(--[\w-]+)", TEXT)) - {"--help"}
    assert named and named <= known


@pytest.mark.parametrize("block", PYTHON)
def test_python(block, monkeypatch, tmp_path):
    """As it stands there, but with one set and one step."""
    shutil.copytree(CONCEPTS / "robot", tmp_path / "concepts" / "robot")
    monkeypatch.chdir(tmp_path)
    for old, new in (('"weights/tiny"', repr(str(TINY))), (", examples)", ", examples, 1)"), ("=30", "=3")):
        assert block.count(old) == 1
        block = block.replace(old, new)
    made = {}
    exec(block, made)
    assert made["image"].shape == (1, 3, 64, 64) and torch.isfinite(made["image"]).all()
    assert made["state"].step == 1 and (tmp_path / "robot.safetensors").is_file()


def test_public_ci_runs_its_commands():
    """The first command, and the one that runs the tests, on three systems."""
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    commands = re.findall(r"run: (.* && .*)", workflow)
    assert len(commands) == 2 and all(command in TEXT for command in commands)
    assert all(f"{system}-latest" in workflow for system in ("ubuntu", "macos", "windows"))


@pytest.mark.parametrize("link", LINKS)
def test_link(link):
    assert (ROOT / link).exists()


def test_the_tree_is_complete():
    """Every file of the library stands in it, those of a room behind the room's name."""
    files = [file for file in (ROOT / "tinyti").rglob("*.py") if file.name != "__init__.py"]
    assert len(files) == 28
    for file in files:
        if file.parent.name == "tinyti":
            assert re.search(rf"^  {file.name} ", TREE, re.M)
        else:
            room = re.search(rf"^  {file.parent.name}/ (.*)", TREE, re.M)[1]
            assert file.stem in re.findall(r"\w+", room)
    for name in re.findall(r"^  (\w+(?:\.py|/))", TREE, re.M):
        assert (ROOT / "tinyti" / name).exists()


def test_the_tables_of_measurements_are_the_results():
    """Each table behind a comment with a file's name is that file, and each file is shown."""
    page = PAGES["tests/bench/README.md"]
    shown = re.findall(r"^<!-- results/([\w-]+)\.csv -->\n\n((?:\|.*\n)+)", page, re.M)
    assert {name for name, _ in shown} == {file.stem for file in RESULTS.glob("*.csv")}
    for name, text in shown:
        assert next(tables(text)) == read_results(name), name
    assert len(list(tables(page))) == len(shown)


@pytest.mark.parametrize("begin", MEASURED)
def test_every_number_of_the_summary_is_in_the_results(begin):
    file, *keys = MEASURED[begin]
    [row] = [row for table in tables(TEXT) for row in table if row[0].startswith(begin)]
    for cell, key in zip(row[1:3], keys):
        [cells] = [cells for cells in read_results(file) if cells[: len(key)] == key]
        assert cell and cell in cells[1:]


def test_the_summary_is_small():
    section = TEXT[TEXT.index("## Measured") :]
    head, *rows = next(tables(section))
    assert len(head) <= 4 and len(rows) == len(MEASURED) <= 6


def test_the_list_of_test_pages_is_complete():
    named = re.findall(r"`(test_\w+\*?)`", PAGES["tests/README.md"])
    pages = {page.stem for name in named for page in (ROOT / "tests").glob(f"{name}.py")}
    assert pages == {page.stem for page in (ROOT / "tests").glob("test_*.py")} and len(named) >= 24
