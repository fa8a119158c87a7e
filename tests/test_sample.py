"""sample.py as a user runs it: what it writes, what it says, what it refuses."""

import json

import pytest
import torch
from PIL import Image

import sample as sample_py
from tinyti import embeddings

pytestmark = pytest.mark.usefixtures("loaded")


def draw(*args):
    return sample_py.main([*map(str, args), "--device", "cpu", "--size", "16"])


@pytest.fixture(scope="module")
def word(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words") / "S"
    folder.mkdir()
    vectors = 0.1 * torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    embeddings.write(folder / "learned_embeds.safetensors", {"S*": vectors})
    return folder


def test_pictures_know_how_they_were_made(word, tmp_path):
    common = ("--words", word, "--steps", "3", "--count", "2", "--seed", "5")
    for out in ("a", "b"):
        assert draw("S* at the beach", "a sketch of S*", *common, "--out", tmp_path / out) == 0
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert len(files) == 5 and "grid.png" in files
    for name in files:  # the same command, the same bytes
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert str(tmp_path).encode() not in (tmp_path / "a" / name).read_bytes()
    about = json.loads(Image.open(tmp_path / "a" / "02-a-sketch-of-S-6.png").text["tinyti"])
    assert about["prompt"] == "a sketch of S*" and about["seed"] == 6 and about["steps"] == 3
    assert about["words"] == ["S*"] and about["weights"] == "tiny"


def test_a_picture_depends_on_its_seed_alone(word, tmp_path):
    flags = ("S* at night", "--words", word, "--steps", "3")
    draw(*flags, "--count", "3", "--out", tmp_path / "three")
    draw(*flags, "--count", "1", "--seed", "2", "--out", tmp_path / "one")
    a, b = (
        Image.open(tmp_path / f / "01-S-at-night-2.png").convert("RGB").tobytes() for f in ("three", "one")
    )
    assert max(abs(x - y) for x, y in zip(a, b)) <= 1  # rounding in kernels for other batch sizes


def test_a_word_can_be_renamed(word, tmp_path):
    assert draw("a <calico> at night", "--words", f"<calico>={word}", "--steps", "2", "--out", tmp_path) == 0


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++"])
def test_the_other_samplers(word, tmp_path, sampler):
    flags = ("--words", word, "--sampler", sampler, "--steps", "3", "--count", "1", "--out", tmp_path)
    assert draw("S*", *flags) == 0


def test_no_picture_takes_the_place_of_another(word, tmp_path, capsys):
    prompts = ["S*", "S*!", "S*?", "(S*)"] * 25 + ["S*"]
    assert draw(*prompts, "--words", word, "--steps", "1", "--count", "1", "--out", tmp_path) == 0
    assert len(list(tmp_path.iterdir())) == 102
    kept = (tmp_path / "001-S-0.png").read_bytes()
    flags = ("--words", word, "--steps", "2", "--count", "1", "--out", tmp_path)
    assert draw("S*", *flags) == 2 and "is there already" in capsys.readouterr().err
    assert draw("S*", *flags, "--force") == 0
    assert (tmp_path / "001-S-0.png").read_bytes() == kept


def test_long_prompts_have_names_that_fit(word, tmp_path):
    assert draw("S* 猫" + "猫" * 60, "--words", word, "--steps", "1", "--count", "1", "--out", tmp_path) == 0


def test_what_will_not_be_drawn_as_meant_is_said(word, tmp_path, capsys):
    for number, (prompt, note) in enumerate([
        ("S* and <my-dog>", "<my-dog>"), ("S* and D*", "D*"), ("S* with a newspaper", "newspaper"),
        ("S* and " + "a cat " * 40, "do not fit"), ("a photo of S* on the beach", None),
    ]):  # fmt: skip
        assert (
            draw(prompt, "--words", word, "--steps", "1", "--count", "1", "--out", tmp_path / str(number))
            == 0
        )
        notes = [
            line for line in capsys.readouterr().err.splitlines() if "note:" in line or "do not fit" in line
        ]
        assert len(notes) == (note is not None) and all(note in line for line in notes)


def test_sample_refuses(word, tmp_path, capsys):
    wide = tmp_path / "wide.safetensors"
    embeddings.write(wide, {"W*": torch.randn(1, 768)})
    for arguments, message in [
        (["a cat", "--words", word], "no learned word"), (["W*", "--words", wide], "768"),
        (["a cat " * 40 + "S*", "--words", word], "behind"), (["S*", "--words", "no/such"], "no/such"),
        (["S*", "--words", word, "--size", "30"], "30"), (["S*", "--steps", "2000"], "2000"),
        (["S*", "--count", "0"], "--count"), (["S*", "--words", word, word], "registered already"),
        (["S*", "--guidance", "nan"], "--guidance"), (["S*", "--guidance", "1e30"], "--guidance"),
        (["", "--words", word], "PROMPT"), (["S*", "--words", f"={word}"], "empty"),
    ]:  # fmt: skip
        size = [] if "--size" in arguments else ["--size", "16"]
        out = tmp_path / "out"
        assert sample_py.main([*map(str, arguments), *size, "--device", "cpu", "--out", str(out)]) == 2
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert error.startswith("sample.py: ") and message in error, error
        assert not out.exists()
