"""Which runs --resume accepts as the same, which it refuses, and that foreign files can do no harm."""

import contextlib
import copy
import json
import math
import shutil
import time
import unicodedata
import zipfile

import pytest
import torch
from PIL import Image

import train as train_py
from tinyti import Concept, Inversion, load, load_clip
from tinyti.files.pictures import read_photos
from tinyti.files.words import read_words
from tinyti.inversion import _is_state
from tinyti.programs import cli
from tinyti.programs.run import Run, _digest, read_state, write_state
from tinyti.tokenizer import Tokenizer

from .conftest import TINY, refuses, saved

pytestmark = pytest.mark.usefixtures("loaded")
NAME = unicodedata.normalize("NFC", "é.png")


@pytest.fixture(scope="module")
def begun(loaded, tmp_path_factory):
    """A folder with a run of three steps, its pictures with captions, and its templates."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "cat").mkdir()
    for i, name in enumerate(("1.png", "2.png", NAME)):
        Image.new("RGB", (32, 32), (50 * i, 90, 200 - 50 * i)).save(folder / "cat" / name)
    (folder / "cat" / "1.txt").write_text("a blue thing")
    (folder / "templates.txt").write_text("a photo of {}\na {}\n")
    assert resume(folder, steps=3, more=[]) in (0, 1)
    return folder


def flags(folder, steps=5, **given):
    given = {"images": folder / "cat", "templates": folder / "templates.txt", "out": folder / "S"} | given
    given = {"token": "é*", "batch-size": 2, "size": 16, "device": "cpu", "steps": steps} | given
    return [f"--{flag}={value}" for flag, value in given.items()]


def resume(folder, steps=5, more=("--resume",), **given):
    return train_py.main([*flags(folder, steps, **given), *more])


@pytest.fixture
def copied(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / "begun")


def edit(file, old, new):
    file.write_bytes(file.read_bytes().replace(old, new))


def paint(file, colour="red"):
    Image.new("RGB", (32, 32), colour).save(file)


def move(file, to):
    file.rename(to)


def rename_to_nfd(folder):
    move(folder / "cat" / NAME, folder / "cat" / unicodedata.normalize("NFD", NAME))


def save_anew(folder):
    """The same pixels in other bytes."""
    Image.open(folder / "cat" / "2.png").save(folder / "cat" / "2.png", compress_level=0)


SAME = {
    "nothing": lambda f: {},
    "the folder has moved": lambda f: {"folder": f.rename(f.parent / "moved")},
    "the pictures have moved": lambda f: {"images": (f / "cat").rename(f / "dog")},
    "by a link": lambda f: (f / "link").symlink_to(f / "cat") or {"images": f / "link"},
    "with a slash": lambda f: {"images": f"{f}/./cat//"},
    "the templates have moved": lambda f: {"templates": (f / "templates.txt").rename(f / "t.txt")},
    "comments": lambda f: edit(f / "templates.txt", b"a {}", b"# but\n\na {}"),
    "the same pixels": save_anew,
    "touched": lambda f: (f / "cat" / "1.png").touch(),
    "a name in NFD": rename_to_nfd,
    "the word in NFD": lambda f: {"token": unicodedata.normalize("NFD", "é*")},
    "defaults": lambda f: {"angle": 0.12, "precision": "fp32", "clip-skip": 1, "prediction": "epsilon"},
    "the model in another place": lambda f: {"weights": shutil.copytree(TINY, f / "tiny")},
    "a caption saved as UTF-16": lambda f: (f / "cat" / "1.txt").write_text("a blue thing", "utf-16") and {},
    "another file": lambda f: (f / "cat" / "notes.md").write_text("no picture") and {},
}
OTHER = {
    "a picture more": (lambda f: paint(f / "cat" / "3.png"), "3.png is new"),
    "a picture less": (lambda f: (f / "cat" / "2.png").unlink(), "2.png is missing"),
    "a picture painted": (lambda f: paint(f / "cat" / "2.png"), "2.png, or its caption"),
    "a picture renamed": (lambda f: move(f / "cat" / "2.png", f / "cat" / "4.png"), "2.png is missing"),
    "a picture damaged": (lambda f: (f / "cat" / "2.png").write_bytes(b"no") and None, "2.png is missing"),
    "a caption": (lambda f: edit(f / "cat" / "1.txt", b"blue", b"red"), "1.png, or its caption"),
    "a caption more": (lambda f: (f / "cat" / "2.txt").write_text("x") and None, "2.png, or its caption"),
    "a caption less": (lambda f: (f / "cat" / "1.txt").unlink(), "1.png, or its caption"),
    "a template": (lambda f: edit(f / "templates.txt", b"photo", b"sketch"), "--templates"),
    "the order of templates": (
        lambda f: (f / "templates.txt").write_text("a {}\na photo of {}\n") and None,
        "--templates",
    ),
    "the angle": (lambda f: {"angle": 0.2}, "angle was 0.12 and is 0.2"),
    "the word": (lambda f: {"token": "e*"}, "token was"),
    "the size": (lambda f: {"size": 32}, "size was 16 and is 32"),
    "the precision": (lambda f: {"precision": "bf16"}, "precision was"),
    "the kind of model": (lambda f: {"prediction": "v_prediction"}, "prediction was"),
}


@pytest.mark.parametrize("change", SAME)
def test_it_goes_on_where_nothing_that_counts_has_changed(change, copied, begun, capsys):
    given = SAME[change](copied) or {}
    folder = given.pop("folder", copied)
    assert resume(folder, **given) in (0, 1), capsys.readouterr().err
    [(_, vectors)] = read_words(folder / "S").items()
    assert torch.equal(vectors, unbroken(begun)), change


def unbroken(begun):
    """The word of the same run in one go."""
    if not (begun / "whole").exists():
        resume(begun, more=[], out=begun / "whole")
    return read_words(begun / "whole")["é*"]


@pytest.mark.parametrize("change", OTHER)
def test_it_refuses_another_run_and_says_what_differs(change, copied, tmp_path, capsys):
    make, message = OTHER[change]
    given = make(copied) or {}
    refuses(train_py, [*flags(copied, **given), "--resume"], tmp_path, capsys, message)


def poison(model, part, value=0.5):
    with torch.no_grad():
        next(iter(getattr(model, part).parameters())).mul_(value)


def exchange_words(model):
    """Two words of the vocabulary change places."""
    vocabulary = model.tokenizer.core.get_vocab()
    vocabulary["cat</w>"], vocabulary["dog</w>"] = vocabulary["dog</w>"], vocabulary["cat</w>"]
    model.tokenizer.core = type("Core", (), {"get_vocab": lambda _: vocabulary})()


CHANGED = [(poison, part) for part in ("unet", "vae", "text")] + [(exchange_words,)]
CHANGED += [(lambda model: setattr(model.schedule, "beta_end", 0.013),)]


class Door:
    """--resume alone, with a state that is at hand: no step is taken."""

    def __init__(self, begun):
        self.args = train_py.arguments([*flags(begun), "--resume"])
        self.args.vectors = 1  # as train.py finds out
        self.photos, _ = read_photos(begun / "cat", 16)
        self.model = load(TINY)
        self.concept = self.model.add_word("é*", Concept.initial(self.model.text.table.mean(0, keepdim=True)))
        self.folder = begun / "S"

    def open(self, folder=None):
        self.args.out = str(folder or self.folder)
        state = Inversion(self.model, self.concept)
        return Run(self.args, self.model, state, self.photos, ["a photo of {}", "a {}"])


@pytest.mark.parametrize("change", CHANGED, ids=lambda change: "-".join(map(str, change[1:])))
def test_another_model_is_another_run(change, begun):
    door = Door(begun)
    door.open()
    change[0](door.model, *change[1:])
    with pytest.raises(ValueError, match=r"--resume: the model \(--weights\) has changed"):
        door.open()


def test_a_model_that_cannot_show_pictures_is_the_same_model(begun, tmp_path):
    """NaN is NaN."""
    door = Door(begun)
    with torch.no_grad():
        door.model.vae.decoder.conv_out.bias[0] = math.nan
    fingerprint = copy.copy(read_state(begun / "S" / "state.pt"))
    door.args.resume = False
    fingerprint["fingerprint"] = door.open(tmp_path / "S").fingerprint
    (tmp_path / "T").mkdir()
    write_state(tmp_path / "T" / "state.pt", fingerprint)
    door.args.resume = True
    assert door.open(tmp_path / "T").state.step == 3


# States of strangers, and files without an end


JUNK = [None, "x", b"x", [], {}, (), True, 1.5, -1, 2**70, math.nan, math.inf, {"x": 1}, ["x"], {1: 2}]
JUNK += [torch.zeros(3), torch.tensor(1.0), torch.zeros(2, 128), torch.zeros(1, 128).long()]
JUNK += [torch.zeros(1, 128).to_sparse(), torch.zeros(0, 3)]


def places(value, path=()):
    """Every place in nested dictionaries and lists."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*path, key)
            yield from places(value[key], (*path, key))


def changed(state, path, value):
    """A copy with another value in a place; the place is taken out for `places`."""
    state = copy.deepcopy(state)
    holder = state
    for key in path[:-1]:
        holder = holder[key]
    if value is places:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return state


def test_a_forged_state_is_refused_in_a_line_or_whole(begun, tmp_path, monkeypatch, recwarn):
    """Every value of a state in turn missing or another, under a right digest; nothing is warned of."""
    state, door, file = read_state(begun / "S" / "state.pt"), Door(begun), tmp_path / "S" / "state.pt"
    ours = door.open().fingerprint
    monkeypatch.setattr("os.fsync", lambda handle: None)
    monkeypatch.setattr("tinyti.programs.run.take_fingerprint", lambda *args: ours)
    file.parent.mkdir()
    tried = refused = 0
    for path in places(state):
        for junk in [places, *JUNK]:
            write_state(file, changed(state, path, junk))
            tried += 1
            try:
                run = door.open(file.parent)
            except ValueError as error:
                assert str(error).startswith("--resume: ") and "\n" not in str(error)
                refused += 1
                continue
            saved, shape = run.state.state_dict(), run.state.start.shape
            assert _is_state(saved, *shape, True), (path, junk)
            assert all(type(k) is int and v.shape == shape for k, v in run.previews.items()), (path, junk)
    assert tried > 800 and refused > 0.75 * tried
    for junk in [*JUNK, [state], {"word": state["word"]}]:
        write_state(file, junk)
        with pytest.raises(ValueError, match=r"\A--resume: .* is damaged.*\Z"):
            door.open(file.parent)
    assert not [str(warning.message) for warning in recwarn]


def sparse(file, size):
    """A file that is all zeros and takes no place on the disk."""
    with open(file, "ab") as stream:
        stream.truncate(size)


def test_files_without_an_end_are_refused_at_once(copied, tmp_path, capsys):
    began = time.monotonic()
    (tmp_path / "out").mkdir()
    good = (copied / "S" / "state.pt").read_bytes()
    sparse(copied / "S" / "state.pt", 8 * 2**30)
    refuses(train_py, [*flags(copied), "--resume"], tmp_path / "out", capsys, "is damaged")
    (copied / "S" / "state.pt").write_bytes(good)
    for name in ("cat/1.txt", "templates.txt"):
        before = (copied / name).read_bytes()
        sparse(copied / name, 8 * 2**30)
        refuses(train_py, [*flags(copied), "--resume"], tmp_path / "out", capsys, "bytes of text")
        (copied / name).write_bytes(before)
    for name in [file.relative_to(TINY) for end in ("json", "txt") for file in TINY.rglob(f"*.{end}")]:
        model = shutil.copytree(TINY, tmp_path / "tiny", dirs_exist_ok=True)
        sparse(model / name, 8 * 2**30)
        with contextlib.nullcontext() if name.name == "model_index.json" else pytest.raises(ValueError):
            load_clip(model / "clip") if name.parts[0] == "clip" else load(model)  # the index is not read
        (model / name).unlink()
    sparse(shutil.copytree(TINY / "clip", tmp_path / "clip") / "more.safetensors", 2**30)
    load_clip(tmp_path / "clip")  # a vocabulary may lie beside large weights
    assert time.monotonic() - began < 20


def test_a_state_that_inflates_is_refused(begun, tmp_path):
    """A zip of a thousandth of what it holds, under a digest that is right."""
    plain, packed = tmp_path / "plain.zip", tmp_path / "state.pt"
    plain.write_bytes(saved({"word": torch.zeros(2**24)}))
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    packed.write_bytes(packed.read_bytes() + _digest(packed.read_bytes()))
    with pytest.raises(ValueError, match="is damaged"):
        read_state(packed)
    packed.write_bytes(packed.read_bytes()[:-32])
    with pytest.raises(ValueError, match=r"damaged or unknown"):
        read_words(packed)


def test_lists_and_texts_without_an_end_are_refused_at_once(tmp_path):
    for name, value in (("block_out_channels", [32] * 20_000), ("layers_per_block", 10**9)):
        model = shutil.copytree(TINY, tmp_path / name)
        config = json.loads((model / "unet" / "config.json").read_text())
        (model / "unet" / "config.json").write_text(json.dumps(config | {name: value}))
        began = time.monotonic()
        with pytest.raises(ValueError):
            load(model)
        assert time.monotonic() - began < 5
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    core = json.loads(load(TINY).tokenizer.core.to_str())
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    core["normalizer"] = {"type": "Sequence", "normalizers": [double] * 36}
    (folder / "tokenizer.json").write_text(json.dumps(core))
    began = time.monotonic()
    with pytest.raises(ValueError, match="normalizers"):
        Tokenizer.from_folder(folder)
    assert time.monotonic() - began < 5


def test_with_no_step_left_nothing_changes(begun, copied):
    before = {file.name: file.read_bytes() for file in (copied / "S").iterdir()}
    assert resume(begun, steps=3, out=copied / "S") in (0, 1)
    assert {file.name: file.read_bytes() for file in (copied / "S").iterdir()} == before


@pytest.mark.parametrize("message", ["connection closed by peer", "gloo: Connection reset"])
def test_the_end_of_another_process_is_a_line(message, monkeypatch, capsys, tmp_path):
    def fail():
        raise RuntimeError(message)

    monkeypatch.setenv("RANK", "1")
    assert cli.run_program("train.py", fail) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "process 1" in error


def test_torchrun_with_more_processes_than_gpus_says_so_in_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="2 processes for 1 GPUs"):
            cli.pick_device("auto", "fp32")
