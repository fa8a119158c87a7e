"""Starting from a word, custom previews, whether a run is done, negative words, notes on prompts."""

import csv
import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sample as sample_py
import tinyti
import train as train_py
from tinyti import convert
from tinyti.concept import word_length
from tinyti.files.words import read_words
from tinyti.inversion import is_flat
from tinyti.programs.run import PREVIEWS
from tinyti.programs.sheet import add_curve

from .conftest import CONCEPTS, TINY, seeded

CAT = ["--images", str(CONCEPTS / "cat"), "--size", "32"]


def word_file(path, n, scale=0.1):
    """A file of a word of n vectors for the miniature, as kohya writes it."""
    save_file({"emb_params": scale * torch.randn(n, 128, generator=seeded())}, path)
    return path


@pytest.mark.usefixtures("loaded")
def test_a_word_begins_where_another_ended(tmp_path, capsys):
    first = [*CAT, "--token", "<a>", "--steps", "3", "--vectors", "2", "--out", str(tmp_path / "a")]
    assert train_py.main(first) == 0
    [ended] = read_words(tmp_path / "a").values()
    for how in (tmp_path / "a", tmp_path / "a" / "learned_embeds.safetensors"):
        flags = [*CAT, "--token", "<b>", "--angle", "0.2", "--init", str(how), "--steps", "1"]
        train_py.main([*flags, "--out", str(tmp_path / "b"), "--force"])
        state = torch.load(tmp_path / "b" / "state.pt", weights_only=True)["word"]
        assert torch.equal(state["start"], ended) and not torch.equal(state["word"], ended)
    assert json.loads((tmp_path / "b" / "settings.json").read_text())["vectors"] == 2
    capsys.readouterr()


@pytest.mark.usefixtures("loaded")
def test_what_does_not_fit_as_a_beginning_is_one_line(tmp_path, capsys):
    three = word_file(tmp_path / "three.safetensors", 3)
    save_file({"emb_params": torch.ones(1, 768)}, tmp_path / "sd1.safetensors")
    save_file({"<a>": torch.ones(128), "<b>": torch.ones(128)}, tmp_path / "two.safetensors")
    for init, flags, words in (
        (three, ["--vectors", "2"], "has 3 vectors, --vectors is 2"),
        (tmp_path / "sd1.safetensors", [], "768"),
        (tmp_path / "two.safetensors", [], "holds 2 words"),
        ("qxqx", [], "no single word of the model's vocabulary, and no file"),
    ):  # fmt: skip
        out = ["--out", str(tmp_path / "out"), "--init", str(init), *flags]
        assert train_py.main([*CAT, "--token", "<c>", "--steps", "1", *out]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.usefixtures("loaded")
def test_previews_of_ones_own(tmp_path, capsys):
    flags = [*CAT, "--token", "<p>", "--steps", "1", "--out", str(tmp_path / "p")]
    assert train_py.main([*flags, "--preview", "a red {} at night", "<p>"]) in (0, 1)
    two = Image.open(tmp_path / "p" / "progress.png").size
    train_py.main([*flags, "--force"])
    five = Image.open(tmp_path / "p" / "progress.png").size
    assert (five[0] - two[0]) / (len(PREVIEWS) - 2) == 132  # a column for each prompt
    capsys.readouterr()
    assert train_py.main([*flags, "--force", "--preview", "a red cat"]) == 2
    assert "lacks the word <p>" in capsys.readouterr().err


CURVES = {  # of stored runs, and made ones
    "falling": ([0.0842, 0.0727, 0.0698, 0.0671, 0.0656, 0.0644, 0.0633], False),
    "flat": ([0.0842, 0.0620, 0.0560, 0.05501, 0.05499, 0.05499, 0.05498, 0.05498], True),
    "noisy and falling": ([0.10, 0.09, 0.092, 0.08, 0.083, 0.07, 0.066], False),
    "noisy and flat": ([0.10, 0.06, 0.0555, 0.0551, 0.0556, 0.0549, 0.0553, 0.05515], True),
    "rising again": ([0.10, 0.06, 0.05, 0.051, 0.052, 0.053, 0.054], True),
    "too short to tell": ([0.10, 0.05, 0.05, 0.05, 0.05], False),
}


@pytest.mark.parametrize("curve, flat", CURVES.values(), ids=CURVES)
def test_flat_is_told_from_falling(curve, flat):
    assert is_flat(curve) is flat


def test_a_real_run_falls_at_first_and_is_flat_in_the_end(tmp_path, capsys):
    flags = [*CAT[:2], "--token", "<d>", "--out", str(tmp_path / "d"), "--batch-size", "4"]
    assert train_py.main([*flags, "--steps", "25"]) == 0
    said = capsys.readouterr().out
    with open(tmp_path / "d" / "log.csv") as file:
        curve = [float(row["evaluation"]) for row in csv.DictReader(file) if row["evaluation"]]
    assert ("still falling; go on: python train.py" in said) == (not is_flat(curve))
    if "go on:" in said:
        command = said.split("go on:")[1].splitlines()[0]
        assert "--steps 50 --resume" in command and "--steps 25" not in command
    assert "times a real word's" in said


def test_the_curve_stands_below_the_sheet():
    sheet = Image.new("RGB", (400, 100), "red")
    drawn = add_curve(sheet, [0.1, 0.08, 0.07], 5)
    assert drawn.crop((0, 0, 400, 100)).tobytes() == sheet.tobytes() and drawn.height > 150
    below = drawn.crop((130, 100, 330, drawn.height)).convert("L")
    assert below.getextrema() == (0, 255)  # a black line on white
    assert add_curve(sheet, [0.1], 5) is sheet


def test_the_length_of_a_word():
    """Real words of the miniature are 1.24 long (a median of nouns); most of its rows are of no word."""
    model = tinyti.load(train_py.ROOT / "weights" / "tiny")
    nouns = "cat dog fish robot car boat house tree flower rabbit mushroom".split()
    ids = [model.tokenizer.single(noun) for noun in nouns]
    rows = model.text.table[[i for i in ids if i is not None]].norm(dim=-1)
    assert word_length(model.text.table) == pytest.approx(rows.median().item(), rel=0.15)
    assert word_length(torch.full((100, 4), 0.5)) == pytest.approx(1.0)
    table = torch.cat([torch.full((60, 4), 0.1), torch.full((40, 4), 0.5)])  # 60 % were never trained
    assert word_length(table) == pytest.approx(1.0)


def test_a_word_that_is_too_long_is_told(tmp_path, capsys):
    flags = [*CAT, "--token", "<l>", "--optimizer", "adam", "--lr", "0.2", "--steps", "20"]
    train_py.main([*flags, "--batch-size", "1", "--out", str(tmp_path / "l")])
    assert "so long that prompts may be ignored" in capsys.readouterr().err


@pytest.mark.usefixtures("loaded")
def test_photos_on_the_miniature_and_panoramas_are_told(tmp_path, capsys):
    Image.effect_noise((300, 60), 50).convert("RGB").save(tmp_path / "wide.png")
    flags = ["--images", str(tmp_path), "--token", "<w>", "--steps", "1", "--size", "32"]
    train_py.main([*flags, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert "80% of wide.png, outside of its middle square" in said
    assert "knows its own drawn world only, so expect no likeness; for photos take a real model" in said


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("n", [8, 75])
def test_negative_words(n, tmp_path, capsys):
    """As EasyNegative and its like, from 8 to 75 vectors, are used: in the negative prompt alone."""
    bad = word_file(tmp_path / "badpic.safetensors", n)
    flags = ["a photo of a cat", "--words", str(bad), "--steps", "2", "--count", "1", "--guidance", "3"]
    assert sample_py.main([*flags, "--negative", "badpic", "--out", str(tmp_path / "with")]) == 0
    assert "note" not in capsys.readouterr().err
    assert sample_py.main([*flags[:1], *flags[3:], "--out", str(tmp_path / "without")]) == 0
    pictures = [Image.open(tmp_path / folder / "01.png").tobytes() for folder in ("with", "without")]
    assert pictures[0] != pictures[1]


@pytest.mark.usefixtures("loaded")
def test_weights_in_prompts_are_told_to_be_text(tmp_path, capsys):
    word = word_file(tmp_path / "some.safetensors", 1)
    common = ["--words", str(word), "--steps", "1", "--count", "1", "--force", "--out", str(tmp_path / "o")]
    for prompt, found in (("(some:1.3), a beach", "(some:1.3)"), ("((some)) BREAK snow", "((some)), BREAK"),
                          ("[some:0.5]", "[some:0.5]")):  # fmt: skip
        assert sample_py.main([prompt, *common]) == 0
        said = capsys.readouterr().err
        assert said.count("is read as text") == 1 and found in said and "letter by letter" not in said
    assert sample_py.main(["some (a cat), at 12:30", *common]) == 0
    assert "read as text" not in capsys.readouterr().err


@pytest.mark.parametrize("main", [train_py.main, sample_py.main, convert.main])
def test_help_is_plain(main, capsys, monkeypatch):
    """Every flag is explained; no default that is none, and no path of this machine."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert "None" not in said and "False" not in said and "[]" not in said and str(TINY) not in said
    for flag in re.findall(r"^  (--[\w-]+)", said, re.M):
        assert re.search(rf"^  {flag}\b.*(  \S.*|\n {{15,}}\S)", said, re.M), flag
