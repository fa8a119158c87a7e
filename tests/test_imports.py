"""The order of the modules: imports run one way, and every imported package is declared."""

import ast
import sys

import pytest

from .conftest import ROOT

RUNTIME = {"torch", "numpy", "PIL", "safetensors", "tokenizers", "tqdm", "huggingface_hub"}
OPTIONAL = {"files.pictures": {"pillow_heif"}}  # used where it is installed
ALONE = ("diffusion", "concept", "tokenizer", "whitened", "graphs")  # they import nothing of ours
# A row may import from all rows above it; modules in one row do not import each other.
ORDER = (
    ("networks.layers",),
    ("networks.clip", "networks.ldmbert", "networks.vae", "networks.unet"),
    ("networks.vision",),
    ("files.tensors", "files.whole", "files.hub"),
    ("files.folder", "files.words", "files.pictures"),
    ("files.single",),
    ("model",),
    ("examples", "editing", "metrics"),
    ("inversion",),
    ("",),  # the package itself: what a user imports
    ("programs.miniature", "programs.sheet"),
    ("programs.cli",),
    ("programs.run",),
    ("convert", "train", "sample"),
)
EMPTY = ("networks", "files", "programs")  # their __init__.py
PACKAGE = sorted((ROOT / "tinyti").rglob("*.py"))
FILES = [*PACKAGE, ROOT / "train.py", ROOT / "sample.py"]


def module(file):
    """The name of a file in the tables above."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part not in ("tinyti", "__init__"))


def imports(file):
    """What a file imports, inside functions too: packages of others, and modules of ours."""
    above, full = file.relative_to(ROOT).parent.parts, set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            full |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = above[: len(above) + 1 - node.level] if node.level else ()
            base = ".".join([*base, *filter(None, [node.module])])
            full |= {f"{base}.{alias.name}" for alias in node.names}
    ours = {name.removeprefix("tinyti").removeprefix(".") for name in full if name.split(".")[0] == "tinyti"}
    modules = set(map(module, PACKAGE))
    # A name is a module, or is taken out of one.
    ours = {name if name in modules else name.rpartition(".")[0] for name in ours}
    return {name.split(".")[0] for name in full} - {"tinyti", *sys.stdlib_module_names}, ours


def test_every_file_has_its_place():
    places = [*ALONE, *EMPTY, *(name for row in ORDER for name in row)]
    assert len(places) == len(set(places)) == len(FILES) == 34
    assert set(places) == set(map(module, FILES))


@pytest.mark.parametrize("file", FILES, ids=module)
def test_a_file_imports_only_what_stands_before_it(file):
    packages, ours = imports(file)
    name = module(file)
    assert packages <= RUNTIME | OPTIONAL.get(name, set())
    if name in (*ALONE, *EMPTY):
        assert not ours and packages <= {"torch", "numpy", "tokenizers"}
        return
    (place,) = (i for i, row in enumerate(ORDER) if name in row)
    allowed = {earlier for row in ORDER[:place] for earlier in row}
    if name.startswith("files."):
        allowed |= {"diffusion"}  # a scheduler's file becomes its Schedule
    elif not name.startswith("networks."):
        allowed |= set(ALONE)
    assert ours <= allowed


def test_the_walk_sees_imports_of_every_form(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "tinyti" / "files" / "probe.py"
    file.parent.mkdir(parents=True)
    lines = ["import torch.nn as nn, os", "from ..networks.vae import VAE", "from .. import model, load",
             "def f():", "    import tinyti.programs.run", "    from tinyti import editing"]  # fmt: skip
    file.write_text("\n".join(lines))
    monkeypatch.setitem(globals(), "PACKAGE", [tmp_path / "tinyti" / f"{name}.py" for name in
                        ("__init__", "networks/vae", "model", "programs/run", "editing")])  # fmt: skip
    assert imports(file) == ({"torch"}, {"networks.vae", "model", "", "programs.run", "editing"})


def test_the_declared_packages_are_exactly_those():
    text = (ROOT / "pyproject.toml").read_text().split("dependencies = [")[1].split("]")[0]
    declared = {line.split('"')[1].split(">")[0] for line in text.strip().splitlines()}
    assert declared == {name.lower().replace("pil", "pillow") for name in RUNTIME}
