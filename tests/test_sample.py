"""sample.py as a user runs it: what it writes, what it says, what it refuses."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import sample as sample_py
from tinyti.files.pictures import read_image, to_image, to_tensor
from tinyti.files.words import write_words

from .conftest import CONCEPTS, refuses

pytestmark = pytest.mark.usefixtures("loaded")


def pixels(file):
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def draw(*args):
    return sample_py.main([*map(str, args), "--device", "cpu", "--size", "16"])


@pytest.fixture(scope="module")
def word(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words") / "S"
    folder.mkdir()
    vectors = 0.1 * torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    write_words(folder / "learned_embeds.safetensors", {"S*": vectors})
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
    a, b = pixels(tmp_path / "three" / "01-S-at-night-2.png"), pixels(tmp_path / "one" / "01.png")
    assert abs(a - b).max() <= 1  # rounding in kernels for other batch sizes


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++"])
def test_the_other_samplers_of_a_renamed_word_in_a_long_prompt(word, tmp_path, sampler):
    flags = ("--words", f"<calico>={word}", "--sampler", sampler, "--steps", "3", "--count", "1")
    assert draw("<calico> 猫" + "猫" * 60, *flags, "--out", tmp_path) == 0


def test_no_picture_takes_the_place_of_another(word, tmp_path, capsys):
    flags = ("--words", word, "--steps", "1", "--count", "1", "--out", tmp_path)
    assert draw("S*", "S*!", "S*?", "(S*)", *flags) == 0
    assert len(list(tmp_path.iterdir())) == 5
    kept = (tmp_path / "01.png").read_bytes()
    assert draw("S*", *flags, "--steps", "2") == 2 and "is there already" in capsys.readouterr().err
    assert (tmp_path / "01.png").read_bytes() == kept
    assert draw("S*", *flags, "--steps", "2", "--force") == 0
    assert (tmp_path / "01.png").read_bytes() != kept


@pytest.fixture
def room(tmp_path):
    """A picture, what is seen of it at 16 pixels, and a mask of half of it in another size."""
    Image.open(CONCEPTS / "cat" / "01.png").convert("RGB").resize((96, 64)).save(tmp_path / "room.png")
    mask = Image.new("L", (192, 128))
    mask.paste(255, (96, 0, 192, 128))
    mask.save(tmp_path / "mask.png")
    cropped = to_image(to_tensor(read_image(tmp_path / "room.png"), 16))
    return tmp_path / "room.png", tmp_path / "mask.png", np.asarray(cropped).astype(int)


def test_from_a_picture(word, room, tmp_path):
    """The less strength, the nearer; the file knows from what it was made."""
    image, _, cropped = room
    far = []
    for strength in ("0.1", "1"):
        flags = ("--words", word, "--steps", "10", "--count", "1", "--image", image, "--strength", strength)
        assert draw("S*", *flags, "--out", tmp_path / strength) == 0
        far.append(abs(pixels(tmp_path / strength / "01.png") - cropped).mean())
    assert far[0] < far[1]
    about = json.loads(Image.open(tmp_path / "1" / "01.png").text["tinyti"])
    assert (about["image"], about["strength"]) == ("room.png", 1.0) and "mask" not in about


def test_outside_the_mask_every_pixel_is_the_pictures(word, room, tmp_path):
    image, mask, cropped = room
    flags = ("--words", word, "--steps", "2", "--count", "2", "--image", image, "--mask", mask)
    assert draw("S*", *flags, "--sampler", "dpm++", "--out", tmp_path / "out") == 0
    one, two = (pixels(tmp_path / "out" / f"01-S-{seed}.png") for seed in (0, 1))
    for drawn in (one, two):
        assert (drawn[:, :7] == cropped[:, :7]).all() and (drawn[:, 10:] != cropped[:, 10:]).any()
    assert (one != two).any()


def test_attention_shows_every_learned_word_in_every_picture(word, tmp_path):
    common = ("--words", word, f"D*={word}", "--steps", "1", "--count", "2")
    assert draw("S* and D*", "S* at night", *common, "--attention", "--out", tmp_path / "a") == 0
    assert draw("S* and D*", "S* at night", *common, "--out", tmp_path / "b") == 0
    sheet, plain = pixels(tmp_path / "a" / "attention.png"), pixels(tmp_path / "a" / "grid.png")
    assert sheet.shape[0] * 2 == plain.shape[0] * 3 and sheet.shape[1] == plain.shape[1]
    assert (plain == pixels(tmp_path / "b" / "grid.png")).all()
    reds = (sheet[..., 0] - sheet[..., 1:].max(-1)).reshape(3, -1, *sheet.shape[1:2])  # a row for each word
    assert all((row > 60).any() for row in reds) and not (tmp_path / "b" / "attention.png").exists()
    assert draw("S*", *common, "--out", tmp_path / "a") == 2


def test_what_will_not_be_drawn_as_meant_is_said(word, tmp_path, capsys):
    flags = ("--words", word, "--steps", "1", "--count", "1")
    expected = {"S* and <my-dog>": "<my-dog>", "S* and D*": "D*", "S* with a newspaper": "newspaper"}
    expected |= {"S* and " + "a cat " * 40: "do not fit", "a photo of S* on the beach": None}
    for number, (prompt, note) in enumerate(expected.items()):
        assert draw(prompt, *flags, "--out", tmp_path / str(number)) == 0
        lines = capsys.readouterr().err.splitlines()
        notes = [line for line in lines if "note:" in line or "do not fit" in line]
        assert len(notes) == (note is not None) and all(note in line for line in notes)
    write_words(tmp_path / "cat.pt", {"cat": torch.ones(1, 128)})
    (tmp_path / "cat.pt").rename(tmp_path / "dog.pt")
    flags = ("--words", tmp_path / "dog.pt", *flags[2:], "--out", tmp_path / "out")
    assert draw("a photo of dog", *flags) == 0
    (note,) = (line for line in capsys.readouterr().err.splitlines() if "note:" in line)
    assert "cat" in note and "dog" in note
    assert draw("a photo of dog", *flags, "--strength", "0.5", "--force") == 0
    assert "note: --strength is for --image only" in capsys.readouterr().err


def test_sample_refuses(word, room, tmp_path, capsys):
    write_words(tmp_path / "wide.safetensors", {"W*": torch.randn(1, 768)})
    image, mask, _ = room
    for name, size, level in (("tall", (64, 96), 128), ("black", (96, 64), 0), ("white", (96, 64), 255)):
        Image.new("L", size, level).save(tmp_path / f"{name}.png")
    flags, wide = ["S*", "--words", word], tmp_path / "wide.safetensors"
    two = tmp_path / "two.safetensors"
    write_words(two, {"S*": torch.ones(1, 128), "T*": torch.ones(1, 128)})
    masked = [*flags, "--image", image, "--mask"]
    for arguments, message in [
        (["a cat", "--words", word], "no learned word"),
        (["W*", "--words", wide], "768"),
        (["a cat " * 40 + "S*", "--words", word], "comes after"),
        (["S*", "--words", "no/such"], "no/such"),
        ([*flags, "--size", "30"], "30"),
        ([*flags, "--size", "16", "16", "16"], "--size has 3 numbers"),
        (["S*", "--words", f"D*={two}"], "D*= cannot rename them all"),
        (["S*", "--steps", "2000"], "2000"),
        ([*flags, word], "registered already"),
        (["", "--words", word], "PROMPT"),
        (["S*", "--words", f"={word}"], "empty"),
        (["a cat", "--attention"], "--words loads them"),
        (["S*", "--mask", mask], "--image"),
        ([*masked, tmp_path / "tall.png"], "same ratio"),
        ([*masked, "no.png"], "no.png: no such file"),
        ([*masked, tmp_path / "black.png"], "black"),
        ([*masked, tmp_path / "white.png"], "white"),
        ([*masked, mask, "--strength", "0.01"], "leave a step"),
        ([*masked, mask, "--size", "16", "32"], "square"),
        (["a cat", "--image", word], "not a file"),
        (["a cat", "--image", "no.png"], "no such file"),
        (["a cat", "--image", wide], "not a picture"),
    ]:
        size = [] if "--size" in arguments else ["--size", "16"]
        out = ["--device", "cpu", "--out", tmp_path / "out"]
        refuses(sample_py, [*arguments, *size, *out], tmp_path, capsys, message)


def test_names_of_pictures(tmp_path):
    """One picture a prompt has a name that one types; several say what they are, also of endless prompts."""
    assert sample_py.picture_files(tmp_path, 1, "a dog", range(7, 8)) == [tmp_path / "01.png"]
    names = [file.name for file in sample_py.picture_files(tmp_path, 2, "a photo of S*, " * 9, range(2))]
    assert names == [f"02-a-photo-of-S-a-photo-of-S-a-photo-of-S-a-{seed}.png" for seed in (0, 1)]
    assert sample_py.picture_files(tmp_path, 3, "?!", range(2))[0] == tmp_path / "03-picture-0.png"
