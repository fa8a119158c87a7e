"""README.md: its commands have the flags they use, its Python runs, and what it points to is there."""

import re
import shlex

import pytest
import torch

import sample as sample_py
import train as train_py

from .conftest import ROOT, TINY

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.M | re.S)
LINES = [line for language, block in BLOCKS if not language for line in block.splitlines()]
COMMANDS = [part.strip() for line in LINES for part in line.split("&&")]
PYTHON = [block for language, block in BLOCKS if language == "python" and "import" in block]
LINKS = sorted(set(re.findall(r"\]\(([^)#:]+)\)", TEXT) + re.findall(r"`(tests/\w+\.py)`", TEXT)))


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
        texts = [*args.prompts, args.negative]
        assert bool(args.words) == any(word in text for text in texts for word in ("S*", "easynegative"))
    else:
        extras = re.fullmatch(r"pip install -e \.(\[(\w+)\])?", " ".join(words))
        if extras and extras[2]:
            assert f"\n{extras[2]} = [" in (ROOT / "pyproject.toml").read_text()
        assert extras or words[:3] in (["python", "-m", "pytest"], ["python", "-m", "tinyti.convert"])


def test_the_flags_it_names_exist():
    known = set()
    for file in ("train.py", "sample.py", "tinyti/programs/cli.py"):
        known |= set(re.findall(r'"(--[\w-]+)"', (ROOT / file).read_text()))
    named = set(re.findall(r"`(--[\w-]+)", TEXT)) - {"--help"}
    assert named and named <= known


@pytest.mark.parametrize("block", PYTHON)
def test_python(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    made = {}
    exec(block, made)
    assert made["image"].shape == (1, 3, 64, 64) and torch.isfinite(made["image"]).all()


@pytest.mark.parametrize("link", LINKS)
def test_link(link):
    assert (ROOT / link).exists()


def test_reading_order_is_complete():
    files = [file for file in (ROOT / "tinyti").rglob("*.py") if file.name != "__init__.py"]
    order = TEXT[TEXT.index("## Reading order") :]
    assert len(files) == 28
    assert all(f"]({file.relative_to(ROOT).as_posix()})" in order for file in files)


def test_the_list_of_test_pages_is_complete():
    named = re.findall(r"`(test_\w+\*?)`", (ROOT / "tests" / "README.md").read_text())
    pages = {page.stem for name in named for page in (ROOT / "tests").glob(f"{name}.py")}
    assert pages == {page.stem for page in (ROOT / "tests").glob("test_*.py")} and len(named) >= 24
