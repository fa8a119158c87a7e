"""A run keeps its work whatever happens to its streams, signals, threads, folders and others' files."""

import contextlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest
import torch

import sample as sample_py
import train as train_py
from tinyti import convert
from tinyti.files.whole import atomic_write
from tinyti.files.words import write_words
from tinyti.programs import cli, run

from .conftest import CONCEPTS, ROOT, refuses, tree

pytestmark = pytest.mark.usefixtures("loaded")

SMALL = ["--device", "cpu", "--size", "16"]
RUN = ["--images", str(CONCEPTS / "cat"), "--token", "S*", "--batch-size", "2", *SMALL]
DRAW = ["a S*", "--steps", "2", "--count", "1", *SMALL]
PROGRAMS = {"train": train_py.main, "sample": sample_py.main, "convert": convert.main}


def status_of(name, *flags):
    """The exit status of a program in this process."""
    try:
        return PROGRAMS[name]([*map(str, flags)])
    except SystemExit as end:  # --help
        return end.code


@pytest.fixture
def word(tmp_path):
    """A folder with a learned word."""
    (tmp_path / "S").mkdir()
    write_words(tmp_path / "S" / "learned_embeds.safetensors", {"S*": torch.full((1, 128), 0.05)})
    return tmp_path / "S"


@pytest.fixture(scope="module")
def unbroken(loaded, tmp_path_factory):
    """The folder of a run of 30 steps."""
    folder = tmp_path_factory.mktemp("run") / "S"
    assert status_of("train", *RUN, "--steps", "30", "--out", folder) in (0, 1)
    return folder


# Streams


class Failing(io.StringIO):
    """A stream that fails in a way of its own."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


def broken_pipe():
    end, start = os.pipe()
    os.close(end)
    return open(start, "w")


STREAMS = {
    "None": lambda: None,
    "closed": closed,
    "full": lambda: open("/dev/full", "w"),  # noqa: SIM115
    "broken pipe": broken_pipe,
    "gone": lambda: Failing(OSError(5, "Input/output error")),
    "ASCII": lambda: io.TextIOWrapper(io.BytesIO(), "ascii"),
    "UTF-16": lambda: io.TextIOWrapper(io.BytesIO(), "utf-16"),
}
COMMANDS = {
    "train": ("train", *RUN, "--steps", "1", "--token", "猫*", "--out", "{}/out"),
    "train --help": ("train", "--help"),
    "train refused": ("train", *RUN, "--images", "{}/nothing", "--out", "{}/out"),
    "sample": ("sample", *DRAW, "a 猫 S*", "--words", "{}/S", "--out", "{}/out"),
    "sample --help": ("sample", "--help"),
    "sample refused": ("sample", "\ud800", "--out", "{}/out"),
    "convert": ("convert", "{}/S", "{}/out.pt"),
    "convert refused": ("convert", "{}/nothing", "{}/out.pt"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_stream_changes_the_status_or_the_files(command, word, tmp_path, monkeypatch):
    """Each of the streams, stdout, stderr and both, in each of the ways in which it cannot be written."""
    name, *flags = COMMANDS[command]
    flags = [str(flag).replace("{}", str(tmp_path)) for flag in flags]
    expected = status_of(name, *flags), tree(tmp_path)
    for kind, streams in ((k, s) for k in STREAMS for s in (["stdout"], ["stderr"], ["stdout", "stderr"])):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "out.pt").unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            theirs = {stream: STREAMS[kind]() for stream in streams}
            for stream in streams:
                patch.setattr(sys, stream, theirs[stream])
            assert (status_of(name, *flags), tree(tmp_path)) == expected, (kind, streams)
            assert all(getattr(sys, stream) is theirs[stream] for stream in streams)
        for stream in theirs.values():
            with contextlib.suppress(OSError, AttributeError):
                stream.close()


SHELL = {  # a process of its own: Python, too, has something to say at its end
    "closed": "{} >&- 2>&-",
    "full": "{} >/dev/full 2>/dev/full",
    "broken pipe": "{{ {}; echo $? >&3; }} 2>&1 3>status | true",
}


@pytest.mark.parametrize("kind", SHELL)
def test_no_stream_changes_a_process(kind, word, tmp_path):
    python = f"PYTHONPATH={ROOT} {sys.executable}"
    for command, status in [
        (f"{python} {ROOT}/sample.py 'a S*' --words S --steps 1 --count 1 --size 16 --device cpu", 0),
        (f"{python} -m tinyti.convert S out.pt", 0),
        (f"{python} {ROOT}/train.py --help", 0),
        (f"{python} {ROOT}/train.py --images no --token S", 2),
    ]:
        ended = subprocess.run(SHELL[kind].format(command), shell=True, cwd=tmp_path, capture_output=True)
        found = int((tmp_path / "status").read_text()) if kind == "broken pipe" else ended.returncode
        assert found == status, command
        assert b"Exception" not in ended.stderr and b"Traceback" not in ended.stderr
        assert ended.stderr.count(b"\n") <= (1 if status else 5)
    assert (tmp_path / "pictures" / "grid.png").exists() and (tmp_path / "out.pt").exists()


# Signals


PROGRAM = "import sys, {0}; from tinyti.programs import cli; print('begins', flush=True); cli.leave({0}.main)"


def start(program, *flags, **options):
    """A process of its own, whose imports are done."""
    command = [sys.executable, "-c", PROGRAM.format(program), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **pipes, **options)
    assert process.stdout.readline() == "begins\n"
    return process


def end_by(process, number, after):
    """Send a signal after some seconds: the status, and what the process said to it."""
    time.sleep(after)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert "Traceback" not in error and "Exception" not in error, error
    lines = [line for line in error.replace("\r", "\n").splitlines() if ".py: " in line]
    return process.returncode, lines


@pytest.mark.parametrize("seed", range(6))
def test_a_signal_at_any_moment_costs_nothing(seed, unbroken, tmp_path):
    number, status = [(signal.SIGINT, 130), (signal.SIGTERM, 143)][seed % 2]
    out = tmp_path / "a" / "S"
    flags = [*RUN, "--steps", "30", "--save-every", "7", "--out", out]
    moment = random.Random(seed).uniform(0.2, 4)
    found, lines = end_by(start("train", *flags), number, moment)
    if found in (0, 1):  # it was ready before
        assert views(out) == views(unbroken)
        return
    assert found == status and len(lines) == 1 and ("interrupted" in lines[0] or "terminated" in lines[0])
    assert not list(tmp_path.rglob(".*")) and (tmp_path / "a").exists() == (out / "state.pt").exists()
    if out.exists():
        assert "--resume goes on" in lines[0]
        assert status_of("train", *flags, "--resume") in (0, 1)
        assert views(out) == views(unbroken)


def views(folder):
    """What a run leaves, without the pickle, whose bytes may differ, and the sheet, which "loaded" draws."""
    left_out = ("state.pt", "progress.png")
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in left_out}


@pytest.mark.parametrize("seed", range(2))
def test_a_signal_while_drawing_leaves_no_empty_folder(seed, tmp_path):
    number, status = [(signal.SIGINT, 130), (signal.SIGTERM, 143)][seed]
    flags = ["a cat", "--steps", "900", "--count", "1", *SMALL, "--out", tmp_path / "a" / "b"]
    moment = random.Random(seed).uniform(0.2, 2.5)
    found, lines = end_by(start("sample", *flags), number, moment)
    assert found == status and len(lines) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_work_does_not_change_the_status(number):
    """The interpreter needs a moment to end, in which nothing is left to stop."""
    ends = "atexit.register(lambda: (print('ends', flush=True), time.sleep(0.5)))"
    command = f"import atexit, time; from tinyti.programs import cli; {ends}; cli.leave(lambda: 1)"
    process = subprocess.Popen([sys.executable, "-c", command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ends\n"
    process.send_signal(number)
    assert process.wait(timeout=60) == 1


def test_an_ignored_interrupt_stays_ignored(tmp_path):
    def ignore():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    process = start("train", *RUN, "--steps", "9", "--out", tmp_path / "S", preexec_fn=ignore)
    found, lines = end_by(process, signal.SIGINT, 0.5)
    assert found in (0, 1) and not lines and (tmp_path / "S" / "learned_embeds.safetensors").exists()


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL, lambda *_: None])
def test_the_callers_handlers_come_back(handler, word, tmp_path):
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for flags in (["convert", word], ["convert", "nothing"], ["convert", "--help"]):
            status_of(*flags)
            assert all(signal.getsignal(number) == handler for number in before)
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def test_main_runs_in_a_thread(word, tmp_path):
    found = []
    for flags in (
        ("train", *RUN, "--steps", "1", "--out", tmp_path / "T"),
        ("sample", *DRAW, "--words", word, "--out", tmp_path / "drawn"),
        ("convert", word),
    ):
        thread = threading.Thread(target=lambda flags=flags: found.append(status_of(*flags)))
        thread.start()
        thread.join()
    assert found[0] in (0, 1) and found[1:] == [0, 0]


# Files of others


LINKS = [".state.pt.tmp", ".learned_embeds.safetensors.tmp", ".grid.png.tmp"]
LINKS += [".tinyti-0.tmp", ".tinyti-x.tmp"]


def test_a_prepared_link_overwrites_nothing(unbroken, word, tmp_path):
    precious, out = tmp_path / "precious", tmp_path / "out"
    precious.write_text("keep")
    shutil.copytree(unbroken, out)
    for name in LINKS:
        (out / name).symlink_to(precious)
    assert status_of("train", *RUN, "--steps", "31", "--out", out, "--resume") in (0, 1)
    assert not list(out.glob(".tinyti-*"))  # swept by who holds the lock
    assert status_of("sample", *DRAW, "--words", word, "--out", out) == 0
    assert status_of("convert", word, out / "o.pt") == 0
    assert precious.read_text() == "keep" and all((out / name).is_symlink() for name in LINKS[:3])
    assert not any(file.is_symlink() for file in out.iterdir() if not file.name.startswith("."))


def writer(file, letter, times):
    for _ in range(times):
        with atomic_write(file) as stream:
            stream.write(letter * 300_000)


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    file = tmp_path / "grid.png"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=writer, args=(file, letter, 30)) for letter in (b"a", b"b", b"c", b"d")]
    for process in writers:
        process.start()
    while any(process.is_alive() for process in writers):
        if file.exists():
            data = file.read_bytes()
            assert len(data) == 300_000 and len(set(data)) == 1
    assert [process.exitcode for process in writers] == [0] * 4 and list(tmp_path.iterdir()) == [file]


def test_a_viewer_that_holds_a_file_for_a_moment(tmp_path, monkeypatch):
    """As on Windows: the file is replaced when the viewer lets go, or stays as it was."""
    file, real, refusals = tmp_path / "grid.png", os.replace, []

    def replace(source, target):
        refusals.append(target)
        if len(refusals) <= held:
            raise PermissionError(13, "used by another process", str(target))
        real(source, target)

    monkeypatch.setattr("os.replace", replace)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    held = 2
    writer(file, b"a", 1)
    assert len(refusals) == 3 and set(file.read_bytes()) == {ord("a")}
    held = 6
    with pytest.raises(PermissionError):
        writer(file, b"b", 1)
    assert set(file.read_bytes()) == {ord("a")} and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name", ["grid.png", "x" * 255, "é" * 127, "a\nb", "[*]"])
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755, None])
def test_a_file_keeps_its_mode_and_any_name(name, mode, tmp_path):
    file, umask = tmp_path / name, os.umask(0o027)
    try:
        if mode is not None:
            file.write_bytes(b"old")
            file.chmod(mode)
        writer(file, b"n", 1)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(file.stat().st_mode) == (0o640 if mode is None else mode)
    assert file.stat().st_size == 300_000 and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name", run.FILES)
@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_a_file_of_the_users_is_replaced_with_force_only(name, kind, tmp_path, capsys):
    (tmp_path / "own.txt").write_text("own")
    if kind == "file":
        (tmp_path / name).write_text("own")
    else:
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    flags = [*RUN, "--steps", "1", "--out", tmp_path]
    refuses(train_py, flags, tmp_path, capsys, "--force")
    assert status_of("train", *flags, "--force") in (0, 1)
    assert (tmp_path / "own.txt").read_text() == "own" and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, cli.Terminated, OSError("no"), MemoryError])
@pytest.mark.parametrize("program", ["train", "sample"])
def test_the_users_folder_stays_and_ours_goes(program, error, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(train_py, "invert", fail)
    monkeypatch.setattr(sample_py.Painter, "draw", fail)
    (tmp_path / "mine").mkdir()
    flags = [*RUN, "--steps", "1"] if program == "train" else ["a cat", *DRAW[1:]]
    for out in ("mine", "mine/a/b/c", "mine/é"):
        assert status_of(program, *flags, "--out", tmp_path / out) in (2, 130, 143)
        assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


@pytest.mark.parametrize("program", ["train", "sample"])
def test_a_folder_is_tried_before_the_work(program, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", fail)  # (the superuser may write everywhere)
    monkeypatch.setattr(train_py, "invert", lambda *a, **k: pytest.fail("a step was taken"))
    monkeypatch.setattr(sample_py.Painter, "draw", lambda *a, **k: pytest.fail("a step was taken"))
    flags = [*RUN, "--steps", "1"] if program == "train" else ["a cat", *DRAW[1:]]
    module = {"train": train_py, "sample": sample_py}[program]
    refuses(module, [*flags, "--out", tmp_path / "a" / "b"], tmp_path, capsys, "cannot be written to")


def test_the_state_is_saved_every_ten_steps(tmp_path, monkeypatch):
    steps, save = [], run.Run.save_state

    def save_state(self):
        save(self)
        steps.append(self.saved_step)

    monkeypatch.setattr(run.Run, "save_state", save_state)
    monkeypatch.setattr(run.time, "monotonic", iter(range(0, 10**6, 100)).__next__)  # writing is no delay
    monkeypatch.setattr(train_py.time, "monotonic", lambda: 0)
    status_of("train", *RUN, "--steps", "25", "--save-every", "100", "--out", tmp_path / "S")
    assert steps[:2] == [10, 20] and steps[-1] == 25


@pytest.mark.slow
def test_torchrun_says_what_it_refuses_once(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29631"]
    for flags, message in [
        (["--images", "no/such"], "No such folder"),
        (["--lr", "x"], "--lr"),
        (["--batch-size", "1"], "less than the 2 processes"),
    ]:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        flags = [*RUN, "--out", str(tmp_path / "S"), *flags]
        ended = subprocess.run(
            [*command, "train.py", *flags], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        lines = [line for line in ended.stderr.splitlines() if line.startswith("train.py: ")]
        assert ended.returncode and len(lines) == 1 and message in lines[0], ended.stderr
        assert not list(tmp_path.iterdir())


def test_an_error_of_our_own_is_no_line_for_the_user(monkeypatch):
    """PyTorch's errors that are not of memory or lost processes keep their traceback."""

    def fails():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        cli.run_program("train.py", fails)
    monkeypatch.setenv("RANK", "1")
    assert "process 1 stops" in cli.explain_runtime_error(RuntimeError("gloo: connection closed by peer"))
    monkeypatch.setenv("WORLD_SIZE", "2")

    def refuses_all():
        raise ValueError("no such file")

    assert cli.run_program("train.py", refuses_all) == 2


def test_a_path_is_shown_as_the_user_would_write_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(cli.short_path(tmp_path / "words" / "S")) == os.path.join("words", "S")
    assert cli.short_path("/elsewhere") == cli.Path("/elsewhere")
