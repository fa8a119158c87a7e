"""The converter, python -m tinyti.convert: what it shows, writes, warns of and refuses."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tinyti import convert
from tinyti.files.words import compatibility_warning, read_words, write_words

from .conftest import ROOT, Evil


def test_shows_and_converts_in_a_process_of_its_own(tmp_path):
    vectors = torch.zeros(2, 768)
    vectors[0, 0], vectors[1, 0] = 0.5, 2
    torch.save({"string_to_param": {"*": vectors}}, tmp_path / "猫.pt")
    command = [sys.executable, "-m", "tinyti.convert", tmp_path / "猫.pt", tmp_path / "out.safetensors"]
    terminal = {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}  # which has no such character
    result = subprocess.run(command, cwd=ROOT, env=os.environ | terminal, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0] == r"\u732b: 2 x 768 (SD1), norm 0.500 2.000"
    [(name, written)] = read_words(tmp_path / "out.safetensors").items()
    assert name == "猫" and torch.equal(written, vectors)


@pytest.fixture
def command_line(capsys):
    """Runs it: -> exit status, lines of output, lines of errors."""

    def run(*arguments):
        status = convert.main([*map(str, arguments)])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return run


def test_tells_what_to_mind(tmp_path, command_line):
    torch.save({"string_to_param": {"*": torch.ones(2, 768)}, "name": "S*"}, tmp_path / "Cat.pt")
    status, out, (after_the_file, capitals) = command_line(tmp_path / "Cat.pt", tmp_path / "out.safetensors")
    assert status == 0 and out[0].startswith("Cat: 2 x 768")
    assert "the word is Cat, after the file" in after_the_file and "inside it is S*" in after_the_file
    assert capitals == f"WARNING: {compatibility_warning('Cat', 2)}"


def test_refuses_in_one_line(tmp_path, command_line):
    torch.save(Evil(tmp_path / "proof"), tmp_path / "evil\n.pt")
    status, out, [error] = command_line(tmp_path / "evil\n.pt", tmp_path / "out.pt")
    assert status == 2 and not out and "open" in error
    assert [path.name for path in tmp_path.iterdir()] == ["evil\n.pt"]


def test_overwrites_only_when_forced(tmp_path, command_line):
    write_words(tmp_path / "cat.pt", {"cat": torch.ones(768)})
    (tmp_path / "out.pt").write_text("mine")
    status, _, [error] = command_line(tmp_path / "cat.pt", tmp_path / "out.pt")
    assert status == 2 and "--force" in error and (tmp_path / "out.pt").read_text() == "mine"
    assert command_line(tmp_path / "cat.pt", tmp_path / "out.pt", "--force")[0] == 0
    assert (tmp_path / "out.pt").read_bytes() == (tmp_path / "cat.pt").read_bytes()


def test_shows_the_nearest_words_of_a_model(tmp_path, command_line, monkeypatch):
    table = torch.tensor([[0.6, 0.8, 0], [0, 0, 5.0], [2, 0, 0], [1, 1, 0]])
    token = ["<pad>", "dog", "cat", "kitten"].__getitem__
    tokenizer = SimpleNamespace(word_ids=lambda: [1, 2, 3], token=token)
    model = SimpleNamespace(text=SimpleNamespace(table=table), tokenizer=tokenizer)
    monkeypatch.setattr(convert, "load", lambda path: model)
    path, weights = tmp_path / "x.safetensors", ["--weights", "models/tiny"]
    write_words(path, {"S*": torch.tensor([[0.5, 0, 0], [1, 1, 0]])})
    shown = [
        "S*: 2 x 3, norm 0.500 1.414",
        "  near cat 1.00, kitten 0.71, dog 0.00",
        "  near kitten 1.00, cat 0.71, dog 0.00",
    ]
    assert command_line(path, *weights) == (0, shown, [])
    write_words(path, {"S*": torch.ones(768)})
    status, _, [error] = command_line(path, tmp_path / "out.pt", *weights)
    assert status == 2 and "768 (SD1); expected 3, the model's" in error
    assert not (tmp_path / "out.pt").exists()
