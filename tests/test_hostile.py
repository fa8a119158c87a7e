"""Bad input and damaged run files of every kind give one line and status 2; no file changes, no code runs."""

import hashlib
import os
import random
import shutil

import pytest

import sample as sample_py
import train as train_py
from tinyti.programs.run import FORMAT, read_state

from .conftest import CONCEPTS, Evil, refuses, saved

pytestmark = pytest.mark.usefixtures("loaded")

CAT = ["--images", str(CONCEPTS / "cat"), "--token", "S*", "--device", "cpu"]
CAT += ["--batch-size", "2", "--size", "16"]

NO_NUMBER = ["", " ", "x", "nan", "inf", "-inf", "1e999", "--", "0x10", "1,5", "1 2", "9" * 5000, "½", "-1"]
NO_WHOLE = [*NO_NUMBER, "0", "1.5", "1e3", str(10**12), str(2**63), str(2**64), "-" + "9" * 30]
NO_SEED = [value for value in NO_WHOLE if value != "0"]
NO_CHOICE = ["", "x", "FP32", "None", "0", "\n", "adamw", "fp8"]
NO_DEVICE = ["", "x", "cpu:x", "cpu:-2", "cuda:x", "tpu", "meta", "cuda:99", "\n", "auto:1", "CPU"]
NO_TEXT = ["", " ", "\n", "a\nb", "\x00", "\x1b[31m", "\ud800", "a\u2028b"]
NO_PATH = ["", " ", "\n", "\x00", "a\x00b", "/dev/zero"]
# Things that are no model, no folder of pictures, no list of prompts, no learned word; {} is a folder.
NO_FOLDER = [f"{{}}/{name}" for name in ("text", "nothing", "noise", "loop", "fifo", "text/below")]
NO_FOLDER += ["/dev/null", "x" * 5000]
NO_FILE = [*NO_FOLDER, "{}/empty", "{}/missing", "{}/missing\nline", "/dev/zero"]


def rows(program, names, values, message=None, *more):
    """Flags that refuse each of the values with a message, which by default names the flag."""
    flags = [f"--{name}" for name in names.split()]
    return [(program, flag, values, flag if message is None else message, more) for flag in flags]


REFUSED = [
    *rows(train_py, "steps batch-size accumulate save-every vectors size", NO_WHOLE),
    *rows(train_py, "seed", NO_SEED),
    *rows(train_py, "lr", [*NO_NUMBER, "0", "1e300", "-0.0"], None, "--optimizer=adam"),
    *rows(train_py, "angle", [*NO_NUMBER, "0", "1.6", "-0.0"]),
    *rows(train_py, "optimizer precision prediction", NO_CHOICE),
    *rows(train_py, "device", NO_DEVICE),
    *rows(train_py, "token init", NO_TEXT),
    *rows(train_py, "out images weights templates tokenizer", NO_PATH),
    *rows(train_py, "images weights templates", NO_FILE, ""),
    *rows(train_py, "tokenizer", [path for path in NO_FILE if "below" not in path], "", "--weights={}/noise"),
    *rows(train_py, "out", NO_FOLDER, ""),
    *rows(train_py, "images", ["no/such/folder"], "No such folder"),
    *rows(train_py, "images", ["tinyti"], "No readable picture"),
    *rows(train_py, "weights templates", ["no/it.txt"], "no/it.txt"),
    *rows(train_py, "token", ["a b"], "white"),
    *rows(train_py, "token", ["x" * 65], "65"),
    *rows(train_py, "init", ["zyxwvut"], "no single word"),
    *rows(train_py, "size", ["30"], "30"),
    *rows(train_py, "device", ["cuda:99"], "--device cpu"),
    *rows(train_py, "precision", ["fp16"], "fp16"),
    *rows(train_py, "out", [CONCEPTS / "cat"], "where the pictures are"),
    *rows(train_py, "out", ["{}/missing"], "no state.pt", "--resume"),
    *rows(sample_py, "steps count size", NO_WHOLE),
    *rows(sample_py, "seed", NO_SEED),
    *rows(sample_py, "guidance", [*NO_NUMBER, "1e30", "101"]),
    *rows(sample_py, "eta strength", [*NO_NUMBER, "1.01"]),
    *rows(sample_py, "sampler precision prediction", NO_CHOICE),
    *rows(sample_py, "out words weights tokenizer image mask", NO_PATH),
    *rows(sample_py, "words weights image", NO_FILE, ""),
    *rows(sample_py, "mask", NO_FILE, "", f"--image={CONCEPTS}/cat/01.png"),
    *rows(sample_py, "out", NO_FOLDER, ""),
]
COMPLETE = {train_py: [*CAT, "--steps=1"], sample_py: ["a cat", "--device=cpu", "--steps=1"]}


@pytest.fixture
def folder(tmp_path):
    """A folder with things that are no use to a program."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    (tmp_path / "nothing").write_bytes(b"")
    (tmp_path / "noise").write_bytes(random.Random(0).randbytes(5000))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row[0].__name__ + row[1])
def test_bad_values_are_refused(row, folder, capsys):
    program, flag, values, message, more = row
    for value in values:
        flags = [*COMPLETE[program], f"--out={folder}/out", *more, f"{flag}={value}"]
        refuses(program, [text.replace("{}", str(folder)) for text in flags], folder, capsys, message)


def test_pairs_and_prompts_are_refused(tmp_path, capsys):
    bad = [(a, b) for a in ("0", "0.5", "1", "x") for b in ("0", "-1", "1.1", "nan", "inf", "x", "")]
    for low, high in [*bad, ("0.5", "0.5"), ("nan", "nan"), ("-1e-9", "1")]:
        refuses(train_py, [*CAT, "--out", tmp_path / "out", "--timesteps", low, high], tmp_path, capsys)
    reversed_pair = [*CAT, "--out", tmp_path / "out", "--timesteps", "0.9", "0.2"]
    refuses(train_py, reversed_pair, tmp_path, capsys, "--timesteps is 0.9 0.2")
    for prompt in NO_TEXT:
        refuses(sample_py, [prompt, "--out", tmp_path / "out"], tmp_path, capsys)


@pytest.fixture(scope="module")
def finished(loaded, tmp_path_factory):
    """The folder of an unbroken run of three steps."""
    folder = tmp_path_factory.mktemp("run") / "S"
    train_py.main([*CAT, "--steps", "3", "--save-every", "2", "--out", str(folder)])
    return folder


def test_every_damage_of_a_state_is_found(finished, tmp_path):
    """Cut off, a bit flipped, zeros, doubled, other entries: nothing but what a run wrote is read."""
    rng, file = random.Random(0), tmp_path / "state.pt"
    good = (finished / "state.pt").read_bytes()
    state = read_state(finished / "state.pt")
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
        with pytest.raises(ValueError, match=r"\A--resume: .* is damaged.*\Z"):  # a line
            read_state(file)
        assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == data


def test_no_state_runs_code_and_no_device_is_read(finished, tmp_path, capsys):
    out = tmp_path / "S"
    flags = [*CAT, "--steps", "3", "--out", out, "--resume"]
    shutil.copytree(finished, out)
    evil = saved({"settings": Evil(tmp_path / "evil")})
    for data in (evil, evil + hashlib.sha256(FORMAT + evil).digest()):  # also of who knows the digest
        (out / "state.pt").write_bytes(data)
        refuses(train_py, flags, tmp_path, capsys, "is damaged")
    for make in (os.mkfifo, lambda p: p.symlink_to("/dev/zero"), lambda p: p.symlink_to(p), os.mkdir):
        (out / "state.pt").unlink()
        make(out / "state.pt")
        refuses(train_py, flags, tmp_path, capsys)
    assert not (tmp_path / "evil").exists()
