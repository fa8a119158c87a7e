"""train.py as a user runs it: what it writes, what survives, what it refuses."""

import csv
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train as train_py
from tinyti.examples import OBJECT_TEMPLATES
from tinyti.files.words import RESERVED, read_words
from tinyti.programs import cli
from tinyti.programs.run import folder_name, write_state

from .conftest import CONCEPTS, ROOT, refuses

pytestmark = pytest.mark.usefixtures("loaded")

RUN = ["--images", str(CONCEPTS / "cat"), "--token", "S*", "--steps", "6", "--save-every", "2"]
RUN += ["--batch-size", "2", "--size", "16", "--device", "cpu"]
PICTURES = train_py.Run.pictures  # before "loaded" takes its place
VIEWS = ("learned_embeds.safetensors", "log.csv", "progress.png", "settings.json")


def train(*args):
    return train_py.main([*map(str, args)])


def start(*args, **environment):
    """A process of its own."""
    command = [sys.executable, *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **pipes)


def wait_for_state(folder, process):
    while not (folder / "state.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in VIEWS}


def read_log(folder):
    return list(csv.DictReader((folder / "log.csv").read_text().splitlines()))


def saved_step(folder):
    return torch.load(folder / "state.pt", weights_only=True)["word"]["step"]


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def word(loaded, tmp_path_factory):
    """The folder of a word learned in a few steps."""
    folder = tmp_path_factory.mktemp("words") / "S"
    train(*RUN, "--out", folder)
    return folder


def test_what_a_run_leaves(word):
    assert {p.name for p in word.iterdir()} == {*VIEWS, "state.pt"}
    vectors = load_file(word / "learned_embeds.safetensors")
    assert list(vectors) == ["S*"] and vectors["S*"].dtype == torch.float32
    rows = read_log(word)
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(float(row["loss"]) > 0 and float(row["gradient"]) > 0 for row in rows)
    assert [bool(row["evaluation"]) for row in rows] == [False, False, False, False, True, False]
    settings = json.loads((word / "settings.json").read_text())
    assert settings["optimizer"] == "whitened" and settings["token"] == "S*" and settings["init"] is None
    assert Image.open(word / "progress.png").width > 500


def test_progress_shows_the_pictures_the_path_and_the_word(tmp_path, monkeypatch):
    monkeypatch.setattr(train_py.Run, "pictures", PICTURES)
    train(*RUN, "--out", tmp_path, "--steps", "2", "--angle", "0.5")
    sheet = np.asarray(Image.open(tmp_path / "progress.png").convert("RGB")).astype(int)
    photos, copy, start, word = sheet[: 4 * 132].reshape(4, 132, -1)
    assert 0.1 < abs(photos - copy).mean() < abs(photos - start).mean()  # the autoencoder's copy is near
    assert abs(start - word).mean() > 0.1


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(word, tmp_path):
    """SIGKILL, wherever it strikes; then --resume ends where an untouched run does."""
    flags = [*RUN, "--out", tmp_path, "--save-every", "1"]
    process = start("train.py", *flags)
    wait_for_state(tmp_path, process)
    process.kill()
    process.communicate()
    for steps in (5, 6):  # and once more, from a run that ended
        assert train(*flags, "--steps", steps, "--resume") in (0, 1)
    assert contents(tmp_path) == contents(word)


def deaths(monkeypatch, folder, crashes, *flags):
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
        train(*flags, "--out", folder)
    return sorted(crashes.iterdir())


def test_killed_at_every_rename(tmp_path, monkeypatch, capsys):
    """It goes on to the same bytes; until then the old word is whole."""
    flags, out = [*RUN, "--steps", "3"], tmp_path / "S"
    train(*flags, "--seed", "1", "--out", out)
    old = contents(out)
    crashes = deaths(monkeypatch, out, tmp_path / "crashes", *flags, "--force")
    assert len(crashes) == 3 * 2 * 5
    for folder in crashes:
        capsys.readouterr()
        if train(*flags, "--out", folder, "--resume") == 2:
            assert "seed was 1 and is 0" in last_line(capsys) and contents(folder) == old
            train(*flags, "--out", folder, "--force")
        assert contents(folder) == contents(out) != old, folder.name
        assert {p.name for p in folder.iterdir()} == {*VIEWS, "state.pt"}


def test_an_interrupt_keeps_the_word(tmp_path):
    process = start("train.py", *RUN, "--out", tmp_path, "--steps", "5000")
    wait_for_state(tmp_path, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume" in err and "Traceback" not in err
    steps = [int(row["step"]) for row in read_log(tmp_path)]
    assert steps == list(range(1, len(steps) + 1)) and saved_step(tmp_path) == steps[-1]


def fails(error):
    """A function that raises an error, whatever it is given."""

    def function(*args, **kwargs):
        raise error

    return function


NOT_SAVED = ("train.read_photos", "train.make_examples", "tinyti.whitened.inverse_root")


@pytest.mark.parametrize("place", [*NOT_SAVED, "train.diagnose", "tinyti.programs.run.draw_sheet"])
def test_an_interrupt_at_any_place_is_one_line(place, word, tmp_path, capsys, monkeypatch):
    saved, out = place not in NOT_SAVED, tmp_path / "S"
    flags = [*RUN, "--out", out, "--save-every", "100"]
    with monkeypatch.context() as patch:
        patch.setattr(place, fails(KeyboardInterrupt))
        assert train(*flags) == 130
    error = capsys.readouterr().err
    assert "train.py: interrupted" in error.splitlines()[-1] and "Traceback" not in error
    assert (out / "state.pt").exists() == saved and out.exists() == saved
    if saved:
        train(*flags, "--resume")
        assert contents(out) == contents(word)


def test_two_processes_learn_what_one_learns(word, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29617")
    process = start(*torchrun, "train.py", *RUN, "--out", tmp_path, OMP_NUM_THREADS="1")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0 or "has learned nothing" in err, err  # in six steps of two samples
    one, two = (load_file(f / "learned_embeds.safetensors")["S*"] for f in (word, tmp_path))
    assert torch.allclose(one, two, atol=1e-3)
    a, b = ([float(row["loss"]) for row in read_log(f)] for f in (word, tmp_path))
    assert a == pytest.approx(b, rel=1e-3)


def test_a_rank_alone_is_no_distributed_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert train(*RUN, "--out", tmp_path, "--steps", "1") in (0, 1)
    assert (tmp_path / "learned_embeds.safetensors").exists() and "use it" in capsys.readouterr().out


def test_a_run_that_learns_nothing_says_so(tmp_path, capsys):
    flags = ("--init", "cat", "--optimizer", "adam", "--lr", "1e-30")
    assert train(*RUN, "--out", tmp_path / "S", *flags) == 1
    assert "learned nothing" in capsys.readouterr().err


def test_a_loss_that_falls_no_more_is_told(tmp_path, capsys, monkeypatch):
    """Evaluations that fell and stay: the last line of report_word's advice depends on them alone."""
    values = iter([1.0, 0.5] + 5 * [0.5])
    monkeypatch.setattr("tinyti.inversion.evaluate", lambda *args: next(values))
    monkeypatch.setattr("tinyti.inversion.EVALUATE_EVERY", 1)
    monkeypatch.setattr(train_py, "EVALUATE_EVERY", 1)
    assert train(*RUN, "--out", tmp_path, "--steps", "6") == 0
    assert "the loss has become flat" in capsys.readouterr().out


@pytest.mark.parametrize("token, folder", [
    ("S*", "S"), ("<my-cat>", "my-cat"), ("*", "u2a"), ("e\u0301", "é"), ("/../x y", "xy")])  # fmt: skip
def test_a_word_names_its_folder(token, folder):
    assert folder_name(token) == folder


def test_a_long_word_names_its_folder():
    one, two = folder_name("猫" * 40), folder_name("猫" * 41)
    assert one.startswith("猫" * 30 + "-") and one != two and max(len(x.encode()) for x in (one, two)) <= 100


def test_a_run_that_diverges_keeps_the_last_good_state(tmp_path, capsys, monkeypatch):
    real = train_py.Inversion.move

    def move(state, losses, gradients):
        real(state, losses, gradients * (float("nan") if state.step == 3 else 1))

    monkeypatch.setattr(train_py.Inversion, "move", move)
    assert train(*RUN, "--out", tmp_path, "--init", "cat") == 1
    assert "not a number" in capsys.readouterr().err
    assert saved_step(tmp_path) == 2


def test_a_full_disk_leaves_the_last_good_files(tmp_path, capsys, monkeypatch):
    fsync = iter([os.fsync] * 5 + [fails(OSError(errno.ENOSPC, "No space left on device"))])
    monkeypatch.setattr(os, "fsync", lambda handle: next(fsync)(handle))  # full at the second save's state
    assert train(*RUN, "--out", tmp_path) == 2 and "No space left" in last_line(capsys)
    assert {p.name for p in tmp_path.iterdir()} == {*VIEWS, "state.pt"} and saved_step(tmp_path) == 2


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
            status = train(*RUN, "--out", disk / "S", "--steps", "3")
            assert status in (0, 1) or (status == 2 and "No space left" in last_line(capsys))
            assert not list(disk.glob("*/.*"))
        finally:
            subprocess.run(["umount", str(disk)], check=True)


OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()]
OUT_OF_MEMORY += [RuntimeError("DefaultCPUAllocator: can't allocate memory")]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_says_what_to_lower(error, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_py, "invert", fails(error))
    assert train(*RUN, "--out", tmp_path / "S") == 2
    assert "--accumulate" in last_line(capsys) and not (tmp_path / "S").exists()


def test_other_files_and_subfolders_are_passed_over(tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(CONCEPTS / "cat", images)
    (images / ".DS_Store").write_bytes(b"\0\1")
    (images / "broken.png").write_bytes((images / "01.png").read_bytes()[:300])
    shutil.copytree(images / "heldout", images / "more" / "below")
    train(*RUN, "--images", images, "--out", tmp_path / "S", "--steps", "1")
    error = capsys.readouterr().err
    line = next(x for x in error.splitlines() if "passed over" in x)
    assert ".DS_Store" in line and "broken.png" in line and "5 pictures in the subfolder more" in line
    assert "heldout" not in line
    assert "miniature knows" in error  # these pictures are not its own


def test_the_last_line_can_be_copied(word, tmp_path, capsys):
    train(*RUN, "--images", CONCEPTS / "risograph", "--style", "--out", tmp_path / "a b")
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("use it: "))
    assert "in the style of S*" in line and 'a b"' in line


def test_a_terminal_of_few_characters(tmp_path):
    flags = [*RUN, "--token", "<猫>", "--out", tmp_path, "--steps", "1"]
    process = start("train.py", *flags, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    out, err = process.communicate(timeout=120)
    assert process.returncode in (0, 1) and "use it" in out, err


NAMES = ["clip_l", "clip_g", "emb_params", "string_to_param", "__metadata__", "emp_params_out"]
NAMES += ["*", "S*", "0", "é", "<my-cat>", "猫", "name", "format", "learned_embeds", "IN01", "a/b", ".."]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_refused_or_read_back(name, tmp_path, capsys):
    """What read_words would not give back is no name, and that is known before anything is learned."""
    out = tmp_path / "out"
    status = train(*RUN, "--token", name, "--out", out, "--steps", "1")
    if status == 2:
        assert name in last_line(capsys) and not out.exists()
    else:
        assert list(read_words(out)) == [name]
    assert (status == 2) == (name in RESERVED)


def test_as_many_vectors_as_every_prompt_has_room_for(tmp_path, capsys):
    encode = cli.load_model(train_py.arguments(RUN)).tokenizer.encode
    most = 75 - max(len(encode(template.replace("{}", ""))) for template in OBJECT_TEMPLATES)
    flags = [*RUN, "--out", tmp_path / "out", "--steps", "1", "--vectors"]
    for count in (most + 1, 75):
        refuses(train_py, [*flags, count], tmp_path, capsys, f"no room for the {count} vectors")
    assert train(*flags, most) in (0, 1)
    assert len(load_file(tmp_path / "out" / "learned_embeds.safetensors")["S*"]) == most


def test_a_template_without_the_word_is_refused(tmp_path, capsys):
    file = tmp_path / "templates.txt"
    for line, message in (("a photo of it", "line 2"), ("a photo of {}s", "does not stand alone")):
        file.write_text(f"a photo of {{}}\n{line}\n")
        flags = [*RUN, "--out", tmp_path / "S", "--templates", file]
        refuses(train_py, flags, tmp_path, capsys, message)


def test_a_word_is_never_overwritten_by_accident(word, capsys):
    for flags, message in [
        ([], "--force"),
        (["--resume", "--angle", "0.2"], "angle was 0.12 and is 0.2"),
        (["--resume", "--optimizer", "adam"], "optimizer was"),
        (["--resume", "--vectors", "2"], "vectors was 1"),
        (["--resume", "--init", "dog"], "init was"),
    ]:
        refuses(train_py, [*RUN, "--out", word, *flags], word, capsys, message)


def test_a_folder_belongs_to_one_run_at_a_time(word, capsys):
    fcntl = pytest.importorskip("fcntl")
    handle = os.open(word, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    refuses(train_py, [*RUN, "--out", word, "--force"], word, capsys, "another run")
    os.close(handle)  # as when the other process ends
    assert train(*RUN, "--out", word, "--resume") in (0, 1)


def test_each_optimizer_has_its_own_step_size(tmp_path, capsys):
    """Refused in a line, which names the flag that is meant; nothing is written."""
    for flags, message in [
        (["--lr", "0.01"], "--lr is Adam's learning rate; give a whitened step an --angle"),
        (["--optimizer", "adam", "--angle", "0.1"], "--angle is the step size of whitened steps"),
        (["--angle", "1.6"], "--angle"),
    ]:
        refuses(train_py, [*RUN, "--out", tmp_path / "S", *flags], tmp_path, capsys, message)


def test_a_whitened_run_of_an_earlier_version_is_not_gone_on_with(word, tmp_path, capsys):
    """Its steps had a rate and a cap: --resume says so; a run with Adam goes on, whose flags are the same."""
    copied = shutil.copytree(word, tmp_path / "S")
    saved = torch.load(copied / "state.pt", weights_only=True)
    saved["settings"] = {k: v for k, v in saved["settings"].items() if k != "angle"} | {"lr": 0.01}
    write_state(copied / "state.pt", saved)
    refuses(train_py, [*RUN, "--out", copied, "--resume"], copied, capsys, "begun by an earlier version")
    adam = [*RUN, "--out", tmp_path / "adam", "--optimizer", "adam"]
    train(*adam, "--steps", "2")
    saved = torch.load(tmp_path / "adam" / "state.pt", weights_only=True)
    del saved["settings"]["angle"]
    write_state(tmp_path / "adam" / "state.pt", saved)
    assert train(*adam, "--steps", "4", "--resume") in (0, 1) and saved_step(tmp_path / "adam") == 4
