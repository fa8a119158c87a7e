"""One name means one thing; every attribute that a test patches exists, also in tests that need a GPU."""

import ast
import pkgutil
from collections import defaultdict

import pytest

from .conftest import ROOT

PROGRAMS = [ROOT / "train.py", ROOT / "sample.py"]
LIBRARY = [*sorted((ROOT / "tinyti").rglob("*.py")), *PROGRAMS]
RECIPE = sorted((ROOT / "weights" / "recipe").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
# Every program has the first two; the rest are layers that each network has in its own form.
MAY_BE_TWICE = {"main", "arguments", "Block", "Layer", "SelfAttention", "MidBlock"}


def public_names(file):
    """The functions, classes and constants that a file defines at its top level."""
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        else:
            targets = [*getattr(node, "targets", []), *filter(None, [getattr(node, "target", None)])]
            names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        yield from (name for name in names if not name.startswith("_"))


def test_a_public_name_is_defined_once():
    where = defaultdict(set)
    for file in [*LIBRARY, *RECIPE]:
        for name in public_names(file):
            where[name].add(str(file.relative_to(ROOT)))
    assert len(LIBRARY) == 34 and len(RECIPE) >= 12 and len(where) > 400
    assert not {name: found for name, found in where.items() if len(found) > 1 and name not in MAY_BE_TWICE}


def patched(file):
    """Each place that a file patches and that can be told without running it: its line and its whole name."""
    tree = ast.parse(file.read_text("utf-8"))
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr not in ("setattr", "delattr", "object", "patch"):
            continue
        target, *rest = node.args
        parts = [rest[0].value] if rest and isinstance(rest[0], ast.Constant) else []
        while isinstance(target, ast.Attribute):
            parts, target = [target.attr, *parts], target.value
        if isinstance(target, ast.Constant) and len(node.args) < 3 and isinstance(target.value, str):
            yield node.lineno, target.value  # monkeypatch.setattr("tinyti.inversion.evaluate", ...)
        elif isinstance(target, ast.Name) and target.id in imported and parts:
            yield node.lineno, ".".join([imported[target.id], *map(str, parts)])


def test_what_a_test_patches_is_there():
    found = [(file, *place) for file in TESTS for place in patched(file)]
    assert len(TESTS) > 20 and len(found) >= 8
    for file, line, name in found:
        try:
            pkgutil.resolve_name(name)
        except (AttributeError, ImportError) as error:
            pytest.fail(f"{file.name}, line {line} patches {name}: {error}")
