"""Numbers and texts of every kind, in every place, give a right picture or word, or one line of error."""

import math
import time

import pytest
import safetensors.torch
import torch
from PIL import Image

import sample as sample_py
import train as train_py
from tinyti import Concept, Inversion, convert, invert, load, make_examples, sample
from tinyti.editing import attention_maps, ddim_invert, from_image, in_region
from tinyti.files.pictures import read_photos
from tinyti.files.words import read_words, write_words
from tinyti.programs import cli
from tinyti.programs.run import Run

from .conftest import CONCEPTS, TINY, last, refuses, tree

PICTURES = Run.pictures  # before "loaded" takes its place
pytestmark = pytest.mark.usefixtures("loaded")
NAN, INF = math.nan, math.inf
D = 128  # width of the miniature's words
MASK = torch.zeros(1, 16, 16)
MASK[:, :8] = 1
SMALL = ["--device", "cpu", "--size", "16"]
CAT = ["--images", str(CONCEPTS / "cat"), "--batch-size", "2", "--steps", "1", *SMALL]
DRAW = ["--steps", "1", "--count", "1", *SMALL]


@pytest.fixture
def word(tmp_path):
    """A folder with a learned word."""
    (tmp_path / "S").mkdir()
    write_words(tmp_path / "S" / "learned_embeds.safetensors", {"S*": torch.full((1, D), 0.05)})
    return tmp_path / "S"


# Numbers


BROKEN = {
    "unet": "conv_out.bias",
    "vae": "decoder.conv_out.bias",
    "vae ": "encoder.conv_out.bias",
    "text": "final_layer_norm.bias",
}


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("network", BROKEN)
def test_no_picture_and_no_word_of_broken_networks(network, value, word, tmp_path, capsys, monkeypatch):
    model = load(TINY)
    with torch.no_grad():
        dict(getattr(model, network.strip()).named_parameters())[BROKEN[network]][0] = value
    monkeypatch.setattr(cli, "load_model", lambda args: model)
    monkeypatch.setattr(Run, "pictures", PICTURES)
    out = tmp_path / "out"
    assert train_py.main([*CAT, "--token", "N*", "--out", str(out)]) == 1
    error = capsys.readouterr().err
    if network == "vae":  # the word is sound, and cannot be shown
        assert error.count("progress.png was not written: the picture is not made of finite numbers") == 1
        assert (out / "learned_embeds.safetensors").exists() and not (out / "progress.png").exists()
    else:
        assert error.count("not a number from the start") == 1 and not out.exists()
    if network != "vae ":  # which does not draw
        flags = ["a S*", "--words", str(word), *DRAW, "--out", str(tmp_path / "drawn")]
        assert sample_py.main(flags) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sample.py: ")]
        assert len(lines) == 1 and "finite" in lines[0] and not (tmp_path / "drawn").exists()


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30, 3e38])  # of the last two the length is infinite
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_no_word_of_endless_length(value, suffix, tmp_path, capsys):
    vectors = torch.full((2, D), 0.1)
    vectors[1, :7] = value
    file = tmp_path / f"N.{suffix}"
    if suffix == "pt":
        torch.save({"string_to_param": {"*": vectors}}, file)
    else:
        safetensors.torch.save_file({"N": vectors}, file)
    out = str(tmp_path / "out")
    for main, flags in (
        (sample_py.main, ["a N", "--words", str(file), *DRAW, "--out", out]),
        (convert.main, [str(file)]),
        (convert.main, [str(file), out + ".pt"]),
    ):
        assert main(flags) == 2
        assert capsys.readouterr().err.count("\n") == 1 and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("magnitude", [1e4, 1e10, 1e18])
def test_a_word_of_great_length_is_drawn_or_refused(magnitude, tmp_path, capsys):
    write_words(tmp_path / "N.pt", {"N": torch.full((1, D), magnitude)})
    flags = ["a N", "--words", str(tmp_path / "N.pt"), *DRAW, "--out", str(tmp_path / "out")]
    status = sample_py.main(flags)
    assert status in (0, 1) and (tmp_path / "out").exists() == (status == 0)
    assert "Traceback" not in capsys.readouterr().err


# Texts

TEXTS = {
    "surrogate": "\udcff\ud800",
    "half of a file name": "S\udce9",
    "escape": "\x1b[31mred\x07",
    "NUL": "a\0b",
    "blank": " \u3000\u2003",
    "lines": "a\nb\r\n\u2028c\u2029",
    "endless word": "a" * 200_000,
    "endless stars": "*" * 120_000,
    "endless brackets": "<" * 120_000,
    "endless emoji": "👩‍👩‍👧" * 20_000,
    "end": "<|endoftext|>",
    "start": "<|startoftext|><|endoftext|>",
    "mark": "\ufeffcat",
    "right to left": "\u202ecat\u202c",
    "joiners": "\u200d\u200d",
    "accents": "e" + "\u0301" * 50,
    "private": "\ue000\U0010ffff",
    "braces": "{} {0} %s $HOME",
    "own name": "S*",
    "expression": "(((((a+)+)+)+)+$",
}
REFUSED = {"surrogate", "half of a file name", "escape", "NUL", "lines"}
REFUSED |= {name for name in TEXTS if name.startswith("endless")}
HOLDERS = ("token", "init", "prompt", "second prompt", "negative", "NAME=", "template", "caption")


def program_with(holder, text, word, folder):
    """A command in which a text stands in some place: the program and its flags."""
    if holder in ("prompt", "second prompt", "negative", "NAME="):
        flags = {
            "prompt": [text],
            "second prompt": ["a cat", text],
            "negative": ["a S*", f"--words={word}", f"--negative={text}"],
            "NAME=": ["a cat", "--words", f"{text}={word}", "--negative", "a S*"],
        }[holder]
        return sample_py, [*flags, *DRAW]
    if holder in ("token", "init"):
        return train_py, [*CAT, "--token=S*", f"--{holder}={text}"]
    images, templates = folder / "images", folder / "templates.txt"
    images.mkdir()
    Image.new("RGB", (16, 16), "red").save(images / "1.png")
    place = images / "1.txt" if holder == "caption" else templates
    templates.write_text("a {}", encoding="utf-8")
    written = text if holder == "caption" else f"a {{}} {text}"
    place.write_bytes(written.encode("utf-8", "surrogatepass"))
    return train_py, [*CAT, "--token=S*", f"--images={images}", f"--templates={templates}"]


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("name", TEXTS)
def test_texts_of_every_kind_in_every_place(name, holder, word, tmp_path, capsys):
    program, flags = program_with(holder, TEXTS[name], word, tmp_path)
    before, began = tree(tmp_path), time.monotonic()
    status = program.main([*flags, "--out", str(tmp_path / "out")])
    seconds, error = time.monotonic() - began, capsys.readouterr().err
    assert seconds < 10 and len(error) < 4000 and not set(error) & {"\0", "\x1b", "\x07"}
    if status == 2:
        assert error.count("\n") == 1 and tree(tmp_path) == before and seconds < 2, error
    in_command = holder not in ("template", "caption")
    if name in REFUSED and in_command:
        assert status == 2
    if name in ("end", "start", "accents", "braces", "expression") and holder in ("prompt", "negative"):
        assert status == 0
    if name == "blank" and holder != "negative" and in_command:
        assert status == 2


CAPTIONS = {  # as bytes: what editors save
    "UTF-8": "a cät".encode(),
    "UTF-8 with a mark": "\ufeffa cät".encode(),
    "UTF-16": "a cät".encode("utf-16"),
    "UTF-16, big end first": "\ufeffa cät".encode("utf-16-be"),
    "windows-1252": "a cät".encode("cp1252"),
    "cut off": "a cät".encode()[:-2],
    "UTF-16 cut off": "a cät".encode("utf-16")[:-1],
    "too long": b"a " * 2**20,
    "noise": bytes(range(256)),
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_a_caption_is_read_as_it_was_meant_or_refused(name, tmp_path, capsys):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "1.png")
    (tmp_path / "1.txt").write_bytes(CAPTIONS[name])
    if name.startswith("UTF") and "cut" not in name:
        [photo], _ = read_photos(tmp_path, 16)
        assert photo.caption == "a cät"
    else:
        flags = [*CAT, "--token", "S*", "--images", tmp_path, "--out", tmp_path / "out"]
        refuses(train_py, flags, tmp_path, capsys, "1.txt: ")


SETTINGS = ["default dtype", "default device"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_callers_defaults_change_no_picture_and_no_word(setting, word, tmp_path):
    def everything(out):
        model = load(TINY)
        vectors = read_words(word)["S*"]
        model.add_word("S*", vectors)
        model.add_word("N*", Concept.initial(model.text.table[:2], 3))
        photos, _ = read_photos(CONCEPTS / "cat", 16)
        examples = make_examples(model, "S*", photos[:2], ["a {}"])
        state = last(invert(model, Inversion(model, model.concepts["S*"]), examples, 2, 2))
        write_words(out, {"S*": state.vectors})
        start = {"steps": 2, "generator": torch.Generator().manual_seed(0)}
        drawn = last(sample(model, "a S* N*", size=16, sampler="ddpm", **start))
        redrawn = last(in_region(model, "a S*", photos[0].pixels, MASK, **start))
        noise = last(ddim_invert(model, "a S*", photos[0].pixels, 2))
        with attention_maps(model, "a S*", "S*", (16, 16)) as heat:
            last(from_image(model, "a S*", photos[0].pixels, **start))
        return out.read_bytes(), [x.clone() for x in (drawn, redrawn, noise, heat, model.decode(drawn))]

    plain, tensors = everything(tmp_path / "a.pt")
    try:
        if setting == "default dtype":
            torch.set_default_dtype(torch.float64)
        else:
            torch.set_default_device("meta")
        other, others = everything(tmp_path / "b.pt")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert plain == other
    for a, b in zip(tensors, others):
        assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
