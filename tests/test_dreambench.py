"""DreamBench on the miniature: it reads published data, writes true rows, and loses nothing if killed."""

import csv
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from transformers import ViTConfig, ViTModel

import tinyti
from tinyti.files.pictures import read_image, to_image
from tinyti.files.words import read_words
from tinyti.metrics import clip_i, clip_t

from .bench import dreambench
from .bench.__main__ import main
from .conftest import CONCEPTS, ROOT, TINY, randomise, seeded

# As in google/dreambooth's file, with prompts of our own.
FILE = """Classes

subject_name,class
cat,cat
toy_robot,tin toy

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a sketch of a {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} at night'.format(unique_token, class_token),
"a {0} {1} in somebody's meadow".format(unique_token, class_token)
]
"""
SETS = {"cat": "cat", "toy_robot": "robot"}
FEW = ("--pictures", "2", "--draw-steps", "2", "--batch", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of two subjects as it is cloned, and a random DINO as it is published."""
    folder = tmp_path_factory.mktemp("dreambench")
    for subject, concept in SETS.items():
        (folder / "data" / "dataset" / subject).mkdir(parents=True)
        for name in ("01.png", "02.png", "03.png"):
            shutil.copy(CONCEPTS / concept / name, folder / "data" / "dataset" / subject)
    (folder / "data" / "dataset" / "prompts_and_classes.txt").write_text(FILE)
    size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    randomise(ViTModel(ViTConfig(**size, image_size=32, patch_size=8))).save_pretrained(folder / "dino")
    return folder


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setitem(dreambench.DEFAULT, "steps", 1)
    monkeypatch.setattr(dreambench, "FEW", tuple(SETS))
    monkeypatch.setattr(dreambench, "GRID", [{"angle": 0.06, "span": (0.5, 0.9)}, {"recipe": 1}])


def command(folder, out, *flags):
    """The arguments of a run."""
    places = ("--data", folder / "data", "--dino", folder / "dino", "--out", out)
    return ["dreambench", *map(str, (*places, *FEW, *flags))]


def rows(out):
    """The rows of a run's file, but the commit."""
    with (out / "rows.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "commit"} for row in csv.DictReader(file)]


def test_a_killed_run_goes_on_to_the_same_rows(folder, tmp_path, capsys):
    assert main(command(folder, tmp_path / "whole")) == 0
    killed = f"""
import os
from tests.bench import __main__ as program, dreambench as bench
bench.DEFAULT["steps"], add = 1, bench.Rows.add
def add_three(self, *row):
    if len(self.found) == 3:
        self.stream.write('"angle 0.12, le')
        self.stream.flush()
        os.kill(os.getpid(), {int(signal.SIGKILL)})
    add(self, *row)
bench.Rows.add = add_three
program.main({command(folder, tmp_path / "killed")!r})"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", killed], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (word,) = (tmp_path / "killed" / "words").rglob("*.safetensors")
    before = word.stat().st_mtime_ns
    assert (tmp_path / "killed" / "rows.csv").read_bytes().endswith(b'\n"angle 0.12, le')
    capsys.readouterr()
    assert main(command(folder, tmp_path / "killed")) == 0
    assert word.stat().st_mtime_ns == before and capsys.readouterr().out.count(": learned in") == 1
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    data = (tmp_path / "killed" / "rows.csv").read_bytes()
    assert main(command(folder, tmp_path / "killed")) == 0  # there is nothing left to do
    assert (tmp_path / "killed" / "rows.csv").read_bytes() == data


@pytest.mark.parametrize("flag, prompt", [("--no-class-word", "S*"), ("--class-word", "S* tin toy")])
def test_a_row_is_what_the_library_measures(folder, tmp_path, flag, prompt, capsys):
    flags = (flag, "--subjects", "toy_robot", "--seeds", "4", "--batch", "1")
    assert main(command(folder, tmp_path, *flags)) == 0
    found = rows(tmp_path)
    assert [(row["prompt"], row["picture"]) for row in found] == [(i, j) for i in "12" for j in "12"]
    assert {row["seed"] for row in found} == {"4"}
    model, (clip, tokenizer) = tinyti.load(TINY), tinyti.load_clip(TINY / "clip")
    dino = tinyti.load_dino(folder / "dino")
    (word,) = tmp_path.rglob("*-4.safetensors")
    model.add_word("S*", read_words(word)["S*"])
    with torch.no_grad():
        *_, x_0 = tinyti.sample(model, f"a sketch of a {prompt}", 2, 3.0, generator=seeded([2002]))
        picture = [to_image(model.decode(x_0)[0])]
    real = [read_image(file) for file in sorted((folder / "data/dataset/toy_robot").iterdir())]
    measured = clip_i(dino, picture, real), clip_i(clip, picture, real)
    measured += (clip_t(clip, tokenizer, picture, "a sketch of a tin toy"),)
    assert [float(found[3][score]) for score in dreambench.SCORES] == pytest.approx(measured, abs=2e-6)
    out = capsys.readouterr().out
    assert f"'a {prompt} in the snow'" in out and "'a tin toy in the snow'" in out
    means = [sum(float(row[score]) for row in found) / 4 for score in dreambench.SCORES]
    assert f"| toy_robot | 4 of 4 | {' | '.join(f'{mean:.4g}' for mean in means)} |" in out


def test_the_grid_has_rows_of_ours_and_of_the_recipe(folder, tmp_path, capsys):
    assert main(command(folder, tmp_path, "--grid", "--pictures", "1")) == 0
    runs = ["angle 0.06, length 1, span 0.5-0.9, steps 1", "diffusers, 4 samples"]
    assert [row["run"] for row in rows(tmp_path)] == [run for run in runs for _ in range(4)]
    words = [next(iter(read_words(file).values())) for file in (tmp_path / "words").rglob("*.safetensors")]
    assert len({tuple(word.flatten().tolist()) for word in words}) == 4
    out = capsys.readouterr().out
    assert all(f"\n| {run} | 2 | " in out for run in runs) and "| Textual Inversion, Dream" in out


def test_the_check_draws_nothing(folder, tmp_path, capsys):
    flags = ("--check", "--clip", TINY / "clip", "--weights", "nowhere")
    assert main(command(folder, tmp_path / "out", *flags)) == 0
    assert not (tmp_path / "out").exists()
    clip, found = tinyti.load_clip(TINY / "clip")[0], []
    for subject in SETS:
        real = [read_image(f) for f in sorted((folder / "data/dataset" / subject).iterdir())]
        pairs = [(a, b) for a in real for b in real if a is not b]
        found += [clip_i(clip, [a], [b]) for a, b in pairs]
    lines = capsys.readouterr().out.splitlines()
    assert "2 of 2 subjects" in lines[2] and lines[2].endswith(f" | {sum(found) / len(found):.4g} |")
    assert lines[4].endswith("| 0.774 | 0.885 |") and "unverified" in lines[-2]


def test_the_data_are_read_without_being_run(folder):
    place, data = dreambench.read_data(folder / "data")
    assert place == folder / "data" / "dataset" and dreambench.read_data(place) == (place, data)
    objects = ["a {0} {1} in the snow", "a sketch of a {0} {1}"]
    live = ["a {0} {1} at night", "a {0} {1} in somebody's meadow"]
    assert data == {"cat": ("cat", live), "toy_robot": ("tin toy", objects)}


NO_DATA = [
    ("cat,cat", "cat;cat", "line 4: 'cat;cat' is not a class"),
    ("toy_robot,tin", "../robot,tin", "line 5"),
    ("'a {0} {1} at night'.format(unique_token, class_token)", "open('x', 'w')", "line 19: \"open('x'"),
    ("a {0} {1} at", "a {0} at", "line 19"),
    ("a {0} {1} at", "a {0.x} {1} at", "line 19"),
    ("Live Subject Prompts", "", "0 of live subjects"),
    ("cat,cat\ntoy_robot,tin toy", "", "0 classes"),
]


@pytest.mark.parametrize("old, new, message", NO_DATA)
def test_other_data_are_refused(old, new, message, tmp_path):
    (tmp_path / "prompts_and_classes.txt").write_text(FILE.replace(old, new))
    with pytest.raises(ValueError) as refusal:
        dreambench.read_data(tmp_path)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_bad_input_is_a_line_and_status_2(folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "rows.csv").write_text("set,seed\ncat,0\n")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "rows.csv").write_text(",".join(dreambench.COLUMNS) + "\na,b\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prompts_and_classes.txt").write_text(FILE)
    cases = [
        (["--dino", TINY / "clip"], "model_type is 'clip', expected 'vit'"),
        (["--dino", tmp_path], "config.json is missing"),
        (["--clip", folder / "dino"], "lacks text_config"),
        (["--data", tmp_path], "git clone"),
        (["--data", tmp_path / "data"], "cat is missing"),
        (["--data", ""], "is no path"),
        (["--subjects", "dog"], "dog is not in the data; there are cat, toy_robot"),
        (["--weights", tmp_path / "nowhere", "--clip", TINY / "clip"], "no model at"),
        (["--out", tmp_path / "file"], "file"),
        (["--out", tmp_path / "other"], "has the columns"),
        (["--out", tmp_path / "odd"], "line 2, is no row"),
        (["--pictures", "0"], "not a whole number"),
    ]
    for flags, message in cases:
        assert main(command(folder, tmp_path / "out", *flags)) == 2, flags
        error = capsys.readouterr().err
        assert error.startswith("python -m tests.bench: ") and error.count("\n") == 1, error
        assert message in error, error
    assert main(["dreambench"]) == 2 and "needs --data and --dino" in capsys.readouterr().err
