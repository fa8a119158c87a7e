"""The notebooks run from a clean kernel; their stored outputs are small and name no machine."""

import re

import nbformat
import pytest
from nbclient import NotebookClient

from .conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE = re.compile(r"/(home|root|Users|tmp|opt|work|usr)/|\b[A-Z]:\\|site-packages")


def test_there_are_six():
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored(path):
    assert not MACHINE.search(re.sub(r'"image/png": "[^"]*"', "", path.read_text(encoding="utf-8")))
    assert path.stat().st_size < 1.5e6
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))  # executed, in order
    outputs = [output for c in cells for output in c.outputs]
    assert outputs and all(output.output_type != "error" for output in outputs)
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert figures and all(len(output.metadata["image/png"]["alt"].split()) > 5 for output in figures)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": path.parent}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=place).execute()
