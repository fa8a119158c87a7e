"""Bad input of every kind, and death at every moment: one line, status 2, nothing written, nothing lost."""

import hashlib
import io
import itertools
import os
import random
import shutil
import subprocess

import pytest
import torch

import sample as sample_py
import train as train_py
from tinyti.files import words
from tinyti.inversion import Inversion
from tinyti.programs import cli
from tinyti.programs.run import FORMAT

from .conftest import CONCEPTS
from .test_train import VIEWS, contents

pytestmark = pytest.mark.usefixtures("loaded")

CAT = ["--images", str(CONCEPTS / "cat"), "--token", "S*", "--device", "cpu"]
CAT += ["--batch-size", "2", "--size", "16"]

NO_NUMBER = ["", " ", "x", "nan", "inf", "-inf", "1e999", "--", "0x10", "1,5", "1 2", "9" * 5000, "½", "-1"]
NO_WHOLE = [*NO_NUMBER, "0", "1.5", "1e3", str(10**12), str(2**63), str(2**64), "-" + "9" * 30]
NO_CHOICE = ["", "x", "FP32", "None", "0", "\n", "adamw", "fp8"]
NO_TEXT = ["", " ", "\n", "a\nb", "\x00", "\x1b[31m", "\ud800", "a\u2028b"]
NO_PATH = ["", " ", "\n", "\x00", "a\x00b", "/dev/zero"]


@pytest.fixture
def paths(tmp_path):
    """Things that are no model, no folder of pictures, no list of prompts, no learned word."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    (tmp_path / "nothing").write_bytes(b"")
    (tmp_path / "noise").write_bytes(random.Random(0).randbytes(5000))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "fifo")
    names = ("empty", "text", "nothing", "noise", "loop", "fifo", "missing", "text/below", "missing\nline")
    return [*(str(tmp_path / name) for name in names), "/dev/zero", "/dev/null", "x" * 5000]


def tree(folder):
    """What is in a folder: names, and the bytes of plain files."""
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refuses(program, flags, folder, capsys, named=""):
    """Status 2, one line that says who speaks and what is `named`, and nothing written."""
    before = tree(folder)
    status = program.main([*map(str, flags)])
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1, (flags, status, error)
    assert error.startswith(program.__name__ + ".py: ") and named in error and len(error) < 2000, error
    assert tree(folder) == before, flags


TRAIN = {
    **dict.fromkeys(("--steps", "--batch-size", "--accumulate", "--save-every"), NO_WHOLE),
    **dict.fromkeys(("--vectors", "--size"), NO_WHOLE),
    "--seed": [x for x in NO_WHOLE if x != "0"],
    "--lr": [*NO_NUMBER, "0", "1e300", "-0.0"],
    **dict.fromkeys(("--optimizer", "--precision", "--prediction"), NO_CHOICE),
    "--device": ["", "x", "cpu:x", "cpu:-2", "cuda:x", "tpu", "meta", "cuda:99", "\n", "auto:1", "CPU"],
    **dict.fromkeys(("--token", "--init"), NO_TEXT),
    **dict.fromkeys(("--out", "--images", "--weights", "--templates", "--tokenizer"), NO_PATH),
}
SAMPLE = {
    **dict.fromkeys(("--steps", "--count", "--size"), NO_WHOLE),
    "--seed": [x for x in NO_WHOLE if x != "0"],
    "--guidance": [*NO_NUMBER, "1e30", "101"],
    "--eta": [*NO_NUMBER, "1.01"],
    "--strength": [*NO_NUMBER, "1.01"],
    **dict.fromkeys(("--sampler", "--precision", "--prediction"), NO_CHOICE),
    **dict.fromkeys(("--out", "--words", "--weights", "--tokenizer", "--image", "--mask"), NO_PATH),
}
PROGRAMS = {train_py: CAT, sample_py: ["a cat", "--device=cpu", "--steps=1"]}
FLAGS = [(train_py, flag, values) for flag, values in TRAIN.items()]
FLAGS += [(sample_py, flag, values) for flag, values in SAMPLE.items()]
PATHS = [(train_py, f"--{name}") for name in ("images", "weights", "tokenizer", "templates", "out")]
PATHS += [(sample_py, f"--{name}") for name in ("words", "weights", "image", "mask", "out")]


def name(value):
    return getattr(value, "__name__", None) or (value if isinstance(value, str) else "")


@pytest.mark.parametrize("program, flag, values", FLAGS, ids=name)
def test_values_are_refused(program, flag, values, tmp_path, capsys):
    out = [] if flag == "--out" else ["--out", tmp_path / "out"]
    for value in values:
        refuses(program, [*PROGRAMS[program], *out, f"{flag}={value}"], tmp_path, capsys, named=flag)


@pytest.mark.parametrize("program, flag", PATHS, ids=name)
def test_paths_are_refused(program, flag, paths, tmp_path, capsys):
    out = [] if flag == "--out" else ["--out", tmp_path / "out"]
    picture = CONCEPTS / "cat" / "01.png"
    more = {"--tokenizer": ["--weights", tmp_path / "noise"], "--mask": ["--image", picture]}.get(flag, [])
    for path in paths:
        if flag == "--out" and path.endswith(("/empty", "/missing", "missing\nline")):
            continue  # these can be folders of a run
        if flag == "--tokenizer" and path.endswith("text/below"):
            continue
        refuses(program, [*PROGRAMS[program], *more, *out, f"{flag}={path}"], tmp_path, capsys)


def test_pairs_and_prompts_are_refused(tmp_path, capsys):
    bad = [(a, b) for a in ("0", "0.5", "1", "x") for b in ("0", "-1", "1.1", "nan", "inf", "x", "")]
    for low, high in [*bad, ("0.5", "0.5"), ("nan", "nan"), ("-1e-9", "1")]:
        refuses(train_py, [*CAT, "--out", tmp_path / "out", "--timesteps", low, high], tmp_path, capsys)
    for prompt in NO_TEXT:
        refuses(sample_py, [prompt, "--out", tmp_path / "out"], tmp_path, capsys)


# A run's files


@pytest.fixture(scope="module")
def finished(loaded, tmp_path_factory):
    """The folder of an unbroken run of three steps."""
    folder = tmp_path_factory.mktemp("run") / "S"
    train_py.main([*CAT, "--steps", "3", "--save-every", "2", "--out", str(folder)])
    return folder


def try_to_resume(folder):
    """What --resume reads, without the steps: -> why it is refused, or None."""
    args = train_py.arguments([*CAT, "--steps", "3", "--out", str(folder), "--resume"])
    model = cli.load_model(args)
    word = Inversion(model, model.add_word("S*", torch.zeros(1, model.text.table.shape[1])))
    try:
        train_py.Run(args, model, word, [])
    except (ValueError, OSError) as error:
        return str(error)
    return None


def saved(state):
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def test_every_damage_of_a_state_is_found(finished, tmp_path):
    """Cut off, a bit flipped, zeros, doubled, other entries: nothing but what a run wrote is read."""
    rng, file = random.Random(0), tmp_path / "state.pt"
    good = (finished / "state.pt").read_bytes()
    state = torch.load(finished / "state.pt", weights_only=True)  # torch reads it too, and not the digest
    file.write_bytes(good)
    assert try_to_resume(tmp_path) is None
    damaged = [b"", good[:1], good[1:], good + good, good + b"\0", bytes(len(good)), b"PK\x03\x04"]
    damaged += [good[: rng.randrange(len(good))] for _ in range(60)]
    damaged += [saved(x) for x in (None, [], {}, "text", state, state | {"more": 1}, {"word": state["word"]})]
    damaged += [saved(state | {"word": state["word"] | {"step": step}}) + good[-32:] for step in (1, None)]
    for _ in range(300):
        flipped, place = bytearray(good), rng.randrange(len(good))
        flipped[place] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    for data in damaged:
        file.write_bytes(data)
        fault = try_to_resume(tmp_path)
        assert fault and "is damaged" in fault and "\n" not in fault
        assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == data


class Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_no_state_runs_code_and_no_device_is_read(finished, tmp_path, capsys):
    out = tmp_path / "S"
    flags = [*CAT, "--steps", "3", "--out", out, "--resume"]
    shutil.copytree(finished, out)
    evil = saved({"settings": Evil(tmp_path / "evil")})
    for data in (evil, evil + hashlib.sha256(FORMAT + evil).digest()):  # also of who knows the digest
        (out / "state.pt").write_bytes(data)
        refuses(train_py, flags, tmp_path, capsys)
    for make in (os.mkfifo, lambda p: p.symlink_to("/dev/zero"), lambda p: p.symlink_to(p), os.mkdir):
        (out / "state.pt").unlink()
        make(out / "state.pt")
        refuses(train_py, flags, tmp_path, capsys)
    assert not (tmp_path / "evil").exists()


def deaths(monkeypatch, folder, crashes, flags):
    """Run, and copy the folder as a kill would leave it: before, in the middle of and after every rename."""
    real, count = os.replace, itertools.count()

    def replace(source, target):
        number = next(count)
        shutil.copytree(folder, crashes / f"{number:02d}-before")
        half = shutil.copytree(folder, crashes / f"{number:02d}-half") / os.path.basename(source)
        half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
        real(source, target)
        shutil.copytree(folder, crashes / f"{number:02d}-after")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        assert train_py.main([*map(str, flags), "--out", str(folder)]) in (0, 1)
    return sorted(crashes.iterdir())


@pytest.mark.parametrize("over_an_old_word", [False, True])
def test_killed_at_every_rename(over_an_old_word, finished, tmp_path, monkeypatch, capsys):
    """It goes on to the same bytes; until then an old word is whole."""
    flags = [*CAT, "--steps", "3", "--save-every", "2"]
    if over_an_old_word:
        train_py.main([*flags, "--seed", "1", "--out", str(tmp_path / "S")])
        before = contents(tmp_path / "S")
    (tmp_path / "crashes").mkdir()
    crashes = deaths(monkeypatch, tmp_path / "S", tmp_path / "crashes", [*flags, "--force"])
    assert len(crashes) == 3 * 2 * 5
    for folder in crashes:
        capsys.readouterr()
        resume = ["--resume"] * (folder / "state.pt").exists()  # before the first state there is nothing
        if train_py.main([*flags, "--out", str(folder), *resume]) == 2:
            assert "seed was 1 and is 0" in capsys.readouterr().err and contents(folder) == before
            train_py.main([*flags, "--out", str(folder), "--force"])
        assert contents(folder) == contents(finished), folder.name
        assert {p.name for p in folder.iterdir()} == {*VIEWS, "state.pt"}


def test_every_damage_of_a_words_file_is_one_line(finished, tmp_path):
    rng, file = random.Random(0), tmp_path / "word.safetensors"
    good = (finished / "learned_embeds.safetensors").read_bytes()
    for number in range(300):
        data = bytearray(good)
        if number % 3 == 0:
            data = data[: rng.randrange(len(data))]
        else:
            for _ in range(number % 3):
                data[rng.randrange(len(data) if number % 2 else 90)] = rng.randrange(256)
        file.write_bytes(data)
        try:
            words = words.read_words(file)
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert all(vectors.isfinite().all() and vectors.ndim == 2 for vectors in words.values())


@pytest.mark.slow
@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="mounting a small disk takes root")
def test_full_disks(tmp_path, capsys):
    """A disk of every size from nothing to enough: status 2 and one line, or a whole run."""
    for kib in range(4, 400, 16):
        disk = tmp_path / str(kib)
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("no tmpfs can be mounted here")
        try:
            status = train_py.main([*CAT, "--steps", "3", "--save-every", "2", "--out", str(disk / "S")])
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert status in (0, 1) or (status == 2 and "No space left" in error)
            assert not list(disk.glob("*/.*"))
        finally:
            subprocess.run(["umount", str(disk)], check=True)
