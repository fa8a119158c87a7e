"""The notebooks: they run from a clean kernel, and what is stored in them is small and names no machine."""

import re
import sys

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from tinyti.whitened import whitened

from .conftest import ROOT

sys.path.insert(0, str(ROOT / "notebooks"))
import study

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE = re.compile(r"/(home|root|Users|tmp|opt|work|usr)/|[A-Z]:\\|site-packages")


def test_the_studys_default_is_the_optimizer():
    s, generator = study.DEFAULT, torch.Generator().manual_seed(0)
    chosen = {"exponent": s["exponent"], "floor": s["floor"], "beta": s["momentum"]}
    ours = theirs = (torch.randn(2, 8, generator=generator), {})
    for _ in range(12):
        gradients = torch.randn(4, 2, 8, generator=generator)
        ours = whitened(ours[0], gradients, ours[1], lr=s["lr"], cap=4.0)
        theirs = study.variant(theirs[0], gradients, theirs[1], lr=s["lr"], cap=4.0, **chosen)
        torch.testing.assert_close(theirs[0], ours[0])


def test_there_are_five():
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored(path):
    assert not MACHINE.search(re.sub(r'"image/png": "[^"]*"', "", path.read_text(encoding="utf-8")))
    assert path.stat().st_size < 1.5e6
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))  # executed, in order
    outputs = [output for c in cells for output in c.outputs]
    assert outputs and all(output.output_type != "error" for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": path.parent}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=place).execute()
