"""train.py and sample.py as a user runs them: what they write, what survives, what they refuse."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sample as sample_py
import train as train_py

from .conftest import CONCEPTS, ROOT

FEW = [
    "--steps",
    "4",
    "--batch-size",
    "2",
    "--init",
    "cat",
    "--save-every",
    "2",
    "--no-early-stop",
    "--device",
    "cpu",
]


def train(*args):
    return train_py.main([*map(str, args)])


def run(*args, **environment):
    """A process of its own: -> CompletedProcess."""
    command = [sys.executable, *map(str, args)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


def read_log(folder):
    with open(folder / "log.csv", newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def word(tmp_path_factory):
    """The folder of a word learned in a few steps."""
    folder = tmp_path_factory.mktemp("words") / "S"
    train("--images", CONCEPTS / "cat", "--token", "S*", "--out", folder, *FEW)
    return folder


def test_what_a_run_leaves(word):
    assert {p.name for p in word.iterdir()} == {
        "learned_embeds.safetensors",
        "log.csv",
        "progress.png",
        "settings.json",
        "state.pt",
    }
    vectors = load_file(word / "learned_embeds.safetensors")
    assert list(vectors) == ["S*"] and vectors["S*"].dtype == torch.float32
    rows = read_log(word)
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert all(float(row["loss"]) > 0 and float(row["gradient"]) > 0 for row in rows)
    settings = json.loads((word / "settings.json").read_text())
    assert settings["lr"] == 5e-3 and settings["token"] == "S*"
    assert Image.open(word / "progress.png").width > 500


def test_the_result_is_the_same_to_the_byte_when_resumed(word, tmp_path):
    half = tmp_path / "half"
    settings = ("--images", CONCEPTS / "cat", "--token", "S*", "--out", half)
    train(*settings, *FEW, "--steps", "2")
    train(*settings, *FEW, "--resume")
    assert (half / "learned_embeds.safetensors").read_bytes() == (
        word / "learned_embeds.safetensors"
    ).read_bytes()
    assert (half / "log.csv").read_bytes() == (word / "log.csv").read_bytes()


def test_killed_at_any_moment_it_goes_on(word, tmp_path):
    """SIGKILL, wherever it strikes; then --resume ends where an untouched run does."""
    out = tmp_path / "killed"
    settings = [
        "train.py",
        "--images",
        CONCEPTS / "cat",
        "--token",
        "S*",
        "--out",
        out,
        *FEW,
        "--save-every",
        "1",
    ]
    process = subprocess.Popen([sys.executable, *map(str, settings)], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (out / "state.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run(*settings, "--resume").returncode in (0, 1)
    for name in ("learned_embeds.safetensors", "log.csv"):
        assert (out / name).read_bytes() == (word / name).read_bytes()


def test_an_interrupt_keeps_the_word(tmp_path):
    out = tmp_path / "interrupted"
    settings = [
        "train.py",
        "--images",
        CONCEPTS / "cat",
        "--token",
        "S*",
        "--out",
        out,
        *FEW,
        "--steps",
        "5000",
    ]
    settings += ["--save-every", "5"]
    process = subprocess.Popen(
        [sys.executable, *map(str, settings)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while not (out / "state.pt").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in err
    steps = [int(row["step"]) for row in read_log(out)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 5
    assert torch.load(out / "state.pt", weights_only=True)["step"] == steps[-1]


def test_two_processes_learn_what_one_learns(word, tmp_path):
    out = tmp_path / "two"
    settings = ["train.py", "--images", CONCEPTS / "cat", "--token", "S*", "--out", out, *FEW]
    result = run(
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=29617",
        *settings,
        OMP_NUM_THREADS="1",
    )
    assert (out / "learned_embeds.safetensors").exists(), result.stderr
    one, two = (load_file(f / "learned_embeds.safetensors")["S*"] for f in (word, out))
    assert torch.allclose(one, two, atol=1e-4)


def test_several_words_each_in_its_folder(word, tmp_path):
    folders = [tmp_path / "D", tmp_path / "C"]
    train(
        "--images",
        CONCEPTS / "dog",
        CONCEPTS / "cat",
        "--token",
        "D*",
        "S*",
        *FEW,
        "--init",
        "dog",
        "cat",
        "--out",
        *folders,
    )
    vectors = [load_file(f / "learned_embeds.safetensors") for f in folders]
    assert [list(v) for v in vectors] == [["D*"], ["S*"]]
    alone = load_file(word / "learned_embeds.safetensors")["S*"]
    assert torch.allclose(vectors[1]["S*"], alone, atol=1e-5)


def test_a_run_that_learns_nothing_says_so(tmp_path, capsys):
    status = train(
        "--images", CONCEPTS / "cat", "--token", "S*", "--out", tmp_path / "S", *FEW, "--lr", "1e-30"
    )
    assert status == 1 and "has learned nothing" in capsys.readouterr().err


def test_a_full_disk_leaves_the_last_good_files(tmp_path, capsys, monkeypatch):
    out, real = tmp_path / "S", torch.save

    def full(state, path):
        if state["step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(state, path)

    monkeypatch.setattr(torch, "save", full)
    assert train("--images", CONCEPTS / "cat", "--token", "S*", "--out", out, *FEW) == 2
    assert "No space left" in capsys.readouterr().err
    assert torch.load(out / "state.pt", weights_only=True)["step"] == 2
    assert not list(out.glob(".*"))


def test_out_that_cannot_be_a_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = ("--images", CONCEPTS / "cat", "--token", "S*", "--out", tmp_path / "file" / "S", *FEW)
    assert train(*flags) == 2 and "file" in capsys.readouterr().err


def test_out_of_gpu_memory_says_what_to_lower(tmp_path, capsys, monkeypatch):
    def invert(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_py, "invert", invert)
    flags = ("--images", CONCEPTS / "cat", "--token", "S*", "--out", tmp_path / "S", *FEW)
    assert train(*flags) == 2 and "--accumulate" in capsys.readouterr().err


def test_other_files_are_passed_over(tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(CONCEPTS / "cat", images)
    (images / ".DS_Store").write_bytes(b"\0\1")
    (images / "broken.png").write_bytes((images / "01.png").read_bytes()[:300])
    train("--images", images, "--token", "S*", "--out", tmp_path / "S", *FEW, "--steps", "1")
    line = next(x for x in capsys.readouterr().err.splitlines() if "passed over" in x)
    assert ".DS_Store" in line and "broken.png" in line and "heldout" in line


@pytest.fixture
def bad_templates(tmp_path):
    (tmp_path / "templates.txt").write_text("a photo of {}\na photo of it\n")
    return tmp_path / "templates.txt"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--images", "no/such/folder"], "No such folder"),
        (["--images", "tinyti"], "No readable picture"),
        (["--token", "two words"], "white space"),
        (["--token", ""], "non-empty"),
        (["--token", "x" * 65], "65 characters"),
        (["--init", "zyxwvut"], "no single word"),
        (["--init", "cat", "dog"], "2 entries in --init"),
        (["--weights", "no/weights"], "no model at no/weights"),
        (["--templates", "no.txt"], "no.txt"),
        (["--steps", "0"], "--steps is 0"),
        (["--lr", "nan"], "--lr is nan"),
        (["--timesteps", "0.9", "0.2"], "--timesteps is 0.9 0.2"),
        (["--device", "tpu"], "--device is tpu"),
        (["--device", "cpu", "--precision", "fp16"], "fp16"),
        (["--resume"], "no state.pt"),
    ],
)
def test_bad_input_gets_one_line(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    defaults = [
        "--images",
        CONCEPTS / "cat",
        "--token",
        "S*",
        "--out",
        out,
        "--steps",
        "1",
        "--device",
        "cpu",
    ]
    assert train(*defaults, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("train.py: ") and message in error
    assert not out.exists()


def test_a_template_without_the_word_is_refused(bad_templates, tmp_path, capsys):
    status = train(
        "--images",
        CONCEPTS / "cat",
        "--token",
        "S*",
        "--out",
        tmp_path / "S",
        *FEW,
        "--templates",
        bad_templates,
    )
    assert status == 2 and "line 2" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_where_there_is_none(tmp_path, capsys):
    status = train(
        "--images", CONCEPTS / "cat", "--token", "S*", "--out", tmp_path / "S", *FEW, "--device", "cuda"
    )
    assert status == 2 and "--device cpu" in capsys.readouterr().err


def test_a_word_is_never_overwritten_by_accident(word, capsys):
    before = {p.name: p.read_bytes() for p in word.iterdir()}
    settings = ("--images", CONCEPTS / "cat", "--token", "S*", "--out", word, *FEW)
    assert train(*settings) == 2
    assert "--force" in capsys.readouterr().err
    assert train(*settings, "--resume", "--lr", "1e-3") == 2
    assert "lr was 0.005 and is 0.001" in capsys.readouterr().err
    assert before == {p.name: p.read_bytes() for p in word.iterdir()}


def test_two_words_in_one_folder_are_refused(tmp_path, capsys):
    status = train("--images", CONCEPTS / "cat", CONCEPTS / "dog", "--token", "S", "S*", "--steps", "1")
    assert status == 2 and "same folder" in capsys.readouterr().err


def draw(*args):
    return sample_py.main([*map(str, args), "--device", "cpu"])


def test_sample_writes_pictures_that_know_how_they_were_made(word, tmp_path):
    common = ("--words", word, "--steps", "3", "--count", "2", "--seed", "5")
    assert draw("S* at the beach", "a sketch of S*", *common, "--out", tmp_path / "a") == 0
    assert draw("S* at the beach", "a sketch of S*", *common, "--out", tmp_path / "b") == 0
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert len(files) == 5 and "grid.png" in files
    for name in files:  # the same command, the same bytes
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    picture = Image.open(tmp_path / "a" / "02-a-sketch-of-S-6.png")
    about = json.loads(picture.text["tinyti"])
    assert about["prompt"] == "a sketch of S*" and about["seed"] == 6 and about["steps"] == 3


def test_a_picture_depends_on_its_seed_alone(word, tmp_path):
    draw("S* at night", "--words", word, "--steps", "5", "--count", "3", "--out", tmp_path / "three")
    draw(
        "S* at night",
        "--words",
        word,
        "--steps",
        "5",
        "--count",
        "1",
        "--seed",
        "2",
        "--out",
        tmp_path / "one",
    )
    a, b = (
        Image.open(tmp_path / f / "01-S-at-night-2.png").convert("RGB").tobytes() for f in ("three", "one")
    )
    assert max(abs(x - y) for x, y in zip(a, b)) <= 1  # rounding in kernels for other batch sizes


def test_a_word_can_be_renamed(word, tmp_path):
    assert draw("a <calico> at night", "--words", f"<calico>={word}", "--steps", "2", "--out", tmp_path) == 0


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++"])
def test_the_other_samplers(word, tmp_path, sampler):
    assert (
        draw("S*", "--words", word, "--sampler", sampler, "--steps", "3", "--count", "1", "--out", tmp_path)
        == 0
    )


def test_sample_refuses(word, tmp_path, capsys):
    from tinyti import embeddings

    wide = tmp_path / "wide.safetensors"
    embeddings.write(wide, {"W*": torch.randn(1, 768)})
    for arguments, message in [
        (["a cat", "--words", word], "no learned word"),
        (["W*", "--words", wide], "768"),
        (["S*", "--words", "no/such"], "no/such"),
        (["S*", "--words", word, "--size", "30"], "--size 30"),
        (["S*", "--words", word, "--steps", "2000"], "steps is 2000"),
        (["S*", "--words", word, "--count", "0"], "--count is 0"),
        (["S*", "--words", word, word], "registered already"),
    ]:
        out = tmp_path / "out"
        assert draw(*arguments, "--out", out) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("sample.py: ") and message in error, error
        assert not out.exists() or not list(out.iterdir())
