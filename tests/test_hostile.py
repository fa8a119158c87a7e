"""Bad input of every kind, and death at every moment: one line, status 2, nothing written, nothing lost."""

import io
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import sample as sample_py
import train as train_py
from tinyti import cli, embeddings
from tinyti.inversion import Inversion

from .conftest import CONCEPTS, ROOT

pytestmark = pytest.mark.usefixtures("loaded")

CAT = ["--images", str(CONCEPTS / "cat"), "--token", "S*", "--device", "cpu"]
CAT += ["--batch-size", "2", "--size", "16"]
VIEWS = ("learned_embeds.safetensors", "log.csv", "progress.png", "settings.json")

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


def refuses(program, flags, folder, capsys):
    """Status 2, one line that says who speaks, and nothing written."""
    before = tree(folder)
    status = program.main([*map(str, flags)])
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1, (flags, status, error)
    assert error.startswith(program.__name__ + ".py: ") and len(error) < 2000, error
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


@pytest.mark.parametrize("flag", TRAIN)
def test_train_refuses(flag, tmp_path, capsys):
    for value in TRAIN[flag]:
        out = [] if flag == "--out" else ["--out", tmp_path / "out"]
        refuses(train_py, [*CAT, *out, f"{flag}={value}"], tmp_path, capsys)


@pytest.mark.parametrize("flag", ["--images", "--weights", "--tokenizer", "--templates", "--out"])
def test_train_refuses_paths(flag, paths, tmp_path, capsys):
    for path in paths:
        if flag == "--out" and path.endswith(("/empty", "/missing", "missing\nline")):
            continue  # these can be folders of a run
        if flag == "--tokenizer" and path.endswith("text/below"):
            continue
        out = [] if flag == "--out" else ["--out", tmp_path / "out"]
        weights = ["--weights", tmp_path / "noise"] if flag == "--tokenizer" else []
        refuses(train_py, [*CAT, *weights, *out, f"{flag}={path}"], tmp_path, capsys)


def test_train_refuses_timesteps(tmp_path, capsys):
    bad = [(a, b) for a in ("0", "0.5", "1", "x") for b in ("0", "-1", "1.1", "nan", "inf", "x", "")]
    for low, high in [*bad, ("0.5", "0.5"), ("nan", "nan"), ("-1e-9", "1")]:
        refuses(train_py, [*CAT, "--out", tmp_path / "out", "--timesteps", low, high], tmp_path, capsys)


SAMPLE = {
    **dict.fromkeys(("--steps", "--count", "--size"), NO_WHOLE),
    "--seed": [x for x in NO_WHOLE if x != "0"],
    "--guidance": [*NO_NUMBER, "1e30", "101"],
    "--eta": [*NO_NUMBER, "1.01"],
    **dict.fromkeys(("--sampler", "--precision", "--prediction"), NO_CHOICE),
    **dict.fromkeys(("--out", "--words", "--weights", "--tokenizer"), NO_PATH),
}


@pytest.mark.parametrize("flag", SAMPLE)
def test_sample_refuses(flag, tmp_path, capsys):
    for value in SAMPLE[flag]:
        out = [] if flag == "--out" else ["--out", tmp_path / "out"]
        refuses(sample_py, ["a cat", "--device=cpu", *out, f"{flag}={value}"], tmp_path, capsys)


@pytest.mark.parametrize("flag", ["--words", "--weights", "--out"])
def test_sample_refuses_paths(flag, paths, tmp_path, capsys):
    for path in paths:
        if flag == "--out" and path.endswith(("/empty", "/missing", "missing\nline")):
            continue
        out = [] if flag == "--out" else ["--out", tmp_path / "out"]
        refuses(sample_py, ["a cat", "--device=cpu", "--steps=1", *out, f"{flag}={path}"], tmp_path, capsys)


@pytest.mark.parametrize("prompt", NO_TEXT)
def test_sample_refuses_prompts(prompt, tmp_path, capsys):
    refuses(sample_py, [prompt, "--out", tmp_path / "out"], tmp_path, capsys)


# A run's files


@pytest.fixture(scope="module")
def finished(loaded, tmp_path_factory):
    """The folder of an unbroken run of three steps."""
    folder = tmp_path_factory.mktemp("run") / "S"
    train_py.main([*CAT, "--steps", "3", "--save-every", "2", "--out", str(folder)])
    return folder


def contents(folder):
    return {name: (folder / name).read_bytes() for name in VIEWS}


def variants(value, rng):
    """A value of a state, and everything in it, in turn replaced by something else or left out."""
    for other in (None, [], {}, "text", -1, 10**9, 0.5, float("nan"), True, b"", torch.zeros(2), (1, 2)):
        if type(other) is not type(value) or isinstance(value, (list, dict, torch.Tensor)):
            yield other
    if isinstance(value, torch.Tensor) and value.numel():
        bad = value.clone()
        bad.view(-1)[rng.randrange(bad.numel())] = rng.choice([float("nan"), float("inf")])
        yield from (
            bad,
            value.double(),
            value[..., :0],
            value[None],
            value.to_sparse(),
            value.half(),
            value.to("meta"),
        )
    elif isinstance(value, list):
        yield from (value[:-2] if len(value) > 1 else [1.0, 2.0, 3.0], [*value, 1.0, 2.0])
        for i in range(len(value)):
            yield from ([*value[:i], other, *value[i + 1 :]] for other in variants(value[i], rng))
    elif isinstance(value, dict):
        yield value | {"more": 1}
        for key in value:
            yield {k: v for k, v in value.items() if k != key}
            yield from (value | {key: other} for other in variants(value[key], rng))


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


def test_every_change_of_a_states_entries_is_found(finished, tmp_path):
    """Hundreds of states that torch.load reads, each with a thing in it that no run would have written."""
    rng, count, file = random.Random(0), 0, tmp_path / "state.pt"
    state = torch.load(finished / "state.pt", weights_only=True)
    file.write_bytes(saved(state))
    assert try_to_resume(tmp_path) is None
    for bad in variants(state, rng):
        file.write_bytes(data := saved(bad))
        fault = try_to_resume(tmp_path)
        assert fault and "\n" not in cli.one_line(fault), bad
        assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == data
        count += 1
    assert count > 300


def test_every_damage_of_a_states_bytes_is_found_or_harmless(finished, tmp_path):
    """Cut off, bits flipped, zeros, doubled: refused, or read as what it was, if only padding is hit."""
    rng, file = random.Random(0), tmp_path / "state.pt"
    good = (finished / "state.pt").read_bytes()
    whole = torch.load(finished / "state.pt", weights_only=True)
    damaged = [b"", good[:1], good[1:], good + good, bytes(len(good)), b"PK\x03\x04" + bytes(100)]
    damaged += [good[: rng.randrange(len(good))] for _ in range(60)]
    for _ in range(200):
        flipped, place = bytearray(good), rng.randrange(len(good))
        flipped[place] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    refused = 0
    for data in damaged:
        file.write_bytes(data)
        if try_to_resume(tmp_path):
            refused += 1
        else:
            read = torch.load(file, weights_only=True)
            assert (
                torch.equal(read["word"]["path"], whole["word"]["path"])
                and read["settings"] == whole["settings"]
            )
        assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == data
    assert refused > 0.9 * len(damaged)


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
    (out / "state.pt").write_bytes(saved({"settings": Evil(tmp_path / "evil")}))
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


def test_killed_at_every_rename_it_goes_on_to_the_same_bytes(finished, tmp_path, monkeypatch, capsys):
    flags = [*CAT, "--steps", "3", "--save-every", "2"]
    (tmp_path / "crashes").mkdir()
    crashes = deaths(monkeypatch, tmp_path / "S", tmp_path / "crashes", flags)
    assert len(crashes) == 3 * 2 * 5
    for folder in crashes:
        resume = (
            ["--resume"] if (folder / "state.pt").exists() else []
        )  # before the first state there is nothing
        assert train_py.main([*flags, "--out", str(folder), *resume]) in (0, 1), capsys.readouterr().err
        assert contents(folder) == contents(finished), folder.name
        assert {p.name for p in folder.iterdir()} == {*VIEWS, "state.pt"}


def test_killed_at_every_rename_over_an_old_word_one_of_the_two_is_whole(
    finished, tmp_path, monkeypatch, capsys
):
    flags = [*CAT, "--steps", "3", "--save-every", "2"]
    old = [*flags, "--seed", "1"]
    train_py.main([*old, "--out", str(tmp_path / "S")])
    before = contents(tmp_path / "S")
    (tmp_path / "crashes").mkdir()
    for folder in deaths(monkeypatch, tmp_path / "S", tmp_path / "crashes", [*flags, "--force"]):
        capsys.readouterr()
        if train_py.main([*flags, "--out", str(folder), "--resume"]) == 2:
            assert "seed was 1 and is 0" in capsys.readouterr().err
            assert contents(folder) == before
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
            words = embeddings.read(file)
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert all(vectors.isfinite().all() and vectors.ndim == 2 for vectors in words.values())


@pytest.mark.slow
def test_killed_at_random_moments(finished, tmp_path):
    """Real processes, real SIGKILLs."""
    rng = random.Random(0)
    flags = ["train.py", *CAT, "--steps", "3", "--save-every", "1"]
    unbroken = tmp_path / "unbroken"
    subprocess.run([sys.executable, *flags, "--out", str(unbroken)], cwd=ROOT, check=True)
    for number in range(20):
        out = tmp_path / str(number)
        process = subprocess.Popen([sys.executable, *flags, "--out", str(out)], cwd=ROOT)
        time.sleep(rng.uniform(1, 10))
        process.send_signal(signal.SIGKILL)
        process.wait()
        resume = ["--resume"] if (out / "state.pt").exists() else []
        subprocess.run([sys.executable, *flags, "--out", str(out), *resume], cwd=ROOT, check=True)
        assert contents(out) == contents(unbroken)


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk takes root"
)
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
