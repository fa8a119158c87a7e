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
COMMANDS = [
    part.strip()
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
    for part in line.split("&&")
]


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
        assert bool(args.words) == any("S*" in prompt for prompt in args.prompts)
    else:
        extras = re.fullmatch(r"pip install -e \.(\[(\w+)\])?", " ".join(words))
        if extras and extras[2]:
            assert f"\n{extras[2]} = [" in (ROOT / "pyproject.toml").read_text()
        assert extras or words[:3] in (["python", "-m", "pytest"], ["python", "-m", "tinyti.embeddings"])


def test_the_flags_it_names_exist():
    known = set()
    for file in ("train.py", "sample.py", "tinyti/cli.py"):
        known |= set(re.findall(r'"(--[\w-]+)"', (ROOT / file).read_text()))
    named = set(re.findall(r"`(--[\w-]+)", TEXT)) - {"--help"}
    assert named and named <= known


@pytest.mark.parametrize(
    "block", [block for language, block in BLOCKS if language == "python" and "import" in block]
)
def test_python(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    made = {}
    exec(block, made)
    assert made["image"].shape == (1, 3, 64, 64) and torch.isfinite(made["image"]).all()


@pytest.mark.parametrize(
    "link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", TEXT) + re.findall(r"`(tests/\w+\.py)`", TEXT)))
)
def test_link(link):
    assert (ROOT / link).exists()


def test_reading_order_is_complete():
    files = {path.name for path in (ROOT / "tinyti").glob("*.py")} - {"__init__.py"}
    order = TEXT[TEXT.index("## Reading order") :]
    assert all(f"{name}`" in order for name in files)
