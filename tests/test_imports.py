"""Imports run one way, and nothing is imported that the package does not declare."""

import ast
import sys

import pytest

from .conftest import ROOT

ALONE = {"layers", "diffusion", "concept", "tokenizer", "data", "embeddings", "whitened"}
NETWORKS = {"clip", "ldmbert", "vae", "unet"}
MAY_IMPORT = {
    **{name: set() for name in ALONE},
    **{name: {"layers"} for name in NETWORKS},
    "checkpoint": NETWORKS,
    "compvis": {"checkpoint", *NETWORKS},
    "model": {"checkpoint", "compvis", "concept", "diffusion", "tokenizer", *NETWORKS},
    "inversion": {"model", *ALONE - {"layers"}},
    "editing": {"model", "unet", *ALONE - {"layers"}},
    "metrics": {"model", "clip", "tokenizer"},
    "run": {"cli", "inversion", "model", *ALONE - {"layers"}},
    "cli": {"model", "inversion", "editing", "metrics", *ALONE - {"layers"}},
}
RUNTIME = {"torch", "numpy", "PIL", "safetensors", "tokenizers", "tqdm"}
FILES = sorted((ROOT / "tinyti").glob("*.py"))


def imports(file, top_level_only=False):
    """Names of the modules that a file imports: "torch", ".layers"."""
    tree = ast.parse(file.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield from (f".{node.module or alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("file", [f for f in FILES if f.stem != "__init__"], ids=lambda f: f.stem)
def test_a_file_imports_only_what_stands_before_it(file):
    ours = {name[1:] for name in imports(file, top_level_only=True) if name.startswith(".")}
    assert ours <= MAY_IMPORT[file.stem]


@pytest.mark.parametrize("file", [*FILES, ROOT / "train.py", ROOT / "sample.py"], ids=lambda f: f.stem)
def test_only_declared_packages_are_imported(file):
    names = {name for name in imports(file) if not name.startswith(".")}
    assert names - set(sys.stdlib_module_names) - {"tinyti"} <= RUNTIME


def test_the_declared_packages_are_exactly_those():
    text = (ROOT / "pyproject.toml").read_text().split("dependencies = [")[1].split("]")[0]
    declared = {line.strip().strip('",').split(">")[0] for line in text.strip().splitlines()}
    assert declared == {name.lower().replace("pil", "pillow") for name in RUNTIME}
