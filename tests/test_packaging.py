"""The wheel holds the whole package and works elsewhere; the programs find their folders from anywhere."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter

import pytest

from .conftest import ROOT, TINY

FILES = {file.relative_to(ROOT).as_posix() for file in (ROOT / "tinyti").rglob("*.py")}
PARTS = ("pyproject.toml", "README.md", "LICENSE", "train.py", "sample.py", "tinyti")  # what a build reads
LOAD = f"""
import importlib, sys
sys.path.insert(0, sys.argv[1])
for name in {sorted(file[:-3].replace("/", ".") for file in FILES)}:
    importlib.import_module(name.removesuffix(".__init__"))
import tinyti
assert tinyti.load({str(TINY)!r}).size == 64
print(*(module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "tinyti"), sep="\\n")
"""


def python(*arguments, cwd):
    """What a process of its own prints, to which nobody has shown the way to this tree."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the tree, because setuptools leaves files beside what it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, source / part)
    python("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", source, cwd=folder)
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_every_file(wheel):
    rooms = Counter(file.rpartition("/")[0] for file in FILES)
    assert rooms == {"tinyti": 12, "tinyti/files": 8, "tinyti/networks": 7, "tinyti/programs": 5}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == FILES


def test_it_works_where_it_is_installed(wheel, tmp_path):
    target = tmp_path / "installed"
    python("-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=tmp_path)
    loaded = python("-c", LOAD, target, cwd=tmp_path).splitlines()
    assert {file.removeprefix(f"{target}/") for file in loaded} == FILES


def test_programs_find_the_miniature_from_another_folder(tmp_path):
    flags = ("--steps", "1", "--count", "1", "--size", "16", "--device", "cpu", "--out", "out")
    python(ROOT / "sample.py", "a cat", *flags, cwd=tmp_path)
    assert (tmp_path / "out" / "01.png").is_file()


def test_the_study_finds_its_rows_from_another_folder(tmp_path):
    command = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from notebooks import study; study.main()"
    table = python("-c", command, "settings", "--table", cwd=tmp_path).splitlines()
    assert any("| default | 30 |" in line for line in table)
