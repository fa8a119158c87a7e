"""Shared by the command lines: the model's flags, the device, types of arguments, and one-line errors."""

import argparse
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import torch
from tqdm import tqdm

from ..files.hub import find_model
from ..files.pictures import MOST_LETTERS
from ..files.tensors import one_line
from ..model import LatentDiffusion, load
from .miniature import TINY


class HelpFormatter(argparse.HelpFormatter):
    """Help that adds a flag's default, if it has one and the text does not name it."""

    def _get_help_string(self, action):
        text, default = action.help, action.default
        nothing = isinstance(default, bool) or default in (None, "", [], argparse.SUPPRESS)
        if nothing or "default" in text:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        return f"{text} (default: {shown})"


class Parser(argparse.ArgumentParser):
    """A parser with plain help that raises ValueError for arguments it does not understand."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=HelpFormatter)

    def parse_args(self, args: list[str] | None = None, namespace=None) -> argparse.Namespace:
        args = sys.argv[1:] if args is None else args
        for flag in (argument[:-3] for argument in args if argument.endswith("=--")):
            self.error(f"argument {flag}: '--' is not a value")  # argparse before Python 3.13 drops it
        return super().parse_args(args, namespace)

    def error(self, message: str):
        raise ValueError(message)


def number_type(low: float, high: float, kind: type = float) -> Callable[[str], float]:
    """The type of a flag: a finite number from `low` to `high`, a whole one if `kind` is int."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            a = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {a} from {low} to {high}")
        return value

    return convert


def text_type(given: str) -> str:
    """The type of a flag: like `any_text_type`, and not blank."""
    if not given.strip():
        raise argparse.ArgumentTypeError(f"{given[:40]!a} is blank")
    return any_text_type(given)


def any_text_type(given: str) -> str:
    """The type of a flag: at most MOST_LETTERS characters, without control characters or surrogates."""
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in given):
        raise argparse.ArgumentTypeError(f"{given[:40]!a} has control characters or is not Unicode text")
    if len(given) > MOST_LETTERS:
        raise argparse.ArgumentTypeError(f"{given[:40]!a}... has {len(given):,} letters; take fewer")
    return given


def path_type(given: str) -> str:
    """The type of a flag: not blank, and a file or a folder if it exists, not a pipe or a device."""
    if not given.strip() or "\0" in given:
        raise argparse.ArgumentTypeError(f"{given[:40]!a} is no path")
    if os.path.exists(given) and not (os.path.isfile(given) or os.path.isdir(given)):
        raise argparse.ArgumentTypeError(f"{given[:200]!a} is neither a file nor a folder")
    return given


SEED = number_type(0, 2**32 - 1, int)


def model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the model and of the device."""
    add = parser.add_argument_group("the model and the machine").add_argument
    add(
        "--weights",
        type=path_type,
        default=str(TINY),
        metavar="PATH",
        help="diffusion model: folder, single file or name on the Hugging Face hub (weights/README.md); "
        "by default the bundled miniature",
    )
    add("--download", action="store_true", help="download models and words that the hub's cache lacks")
    add(
        "--tokenizer",
        type=path_type,
        metavar="FOLDER",
        help="vocabulary of a single-file model, if none is beside it",
    )
    add(
        "--prediction",
        choices=("epsilon", "v_prediction"),
        help="what the UNet predicts, the noise or v; needed for single files of Stable Diffusion 2",
    )
    add(
        "--clip-skip",
        type=number_type(1, 99, int),
        default=1,
        metavar="N",
        help="layer of the text transformer, counted from its end; 1 is the last, anime models take 2",
    )
    add("--device", default="auto", help="cuda, mps or cpu; auto takes the first available")
    add(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        help="dtype of the networks; by default bf16 on GPUs that support it, else fp32",
    )


def pick_device(device: str = "auto", precision: str | None = None) -> tuple[str, torch.dtype]:
    """Turn --device and --precision into a device and a dtype of the networks.

    "auto" takes the first available of cuda, mps and cpu.  The default precision is bf16 on GPUs that have
    it and fp32 elsewhere.  Under torchrun each process takes its own GPU.  ValueError if there is no such
    device, or if torchrun starts more processes than there are GPUs.
    """
    count = {"cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available(), "cpu": 1}
    there = [kind for kind in count if count[kind]]
    name = there[0] if device == "auto" else device
    is_cuda = name.startswith("cuda")
    if is_cuda and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if is_cuda and 0 < count["cuda"] < (ranks := int(os.environ.get("LOCAL_WORLD_SIZE", 1))):
        raise ValueError(f"torchrun has started {ranks} processes for {count['cuda']} GPUs; start one each")
    if name not in there + [f"{kind}:{i}" for kind in there for i in range(count[kind])]:
        raise ValueError(
            f"--device {device!r} is not on this machine, which has {', '.join(there)}; "
            "take --device cpu, or auto, or one of several GPUs as cuda:1"
        )
    if is_cuda and ":" in name:
        torch.cuda.set_device(name)
    if precision is None:  # GPUs before Ampere only emulate bf16, slowly
        native = is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native else "fp32"
    return name, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def load_model(args: argparse.Namespace) -> LatentDiffusion:
    """Load the model that the flags name on its device.  Sets args.weights to its path."""
    device, dtype = pick_device(args.device, args.precision)
    args.weights = str(find_model(args.weights, args.download))
    return load(args.weights, device, dtype, args.prediction, args.tokenizer, args.clip_skip)


def short_path(path: str | Path) -> Path:
    """A path as the user would write it here."""
    path = Path(os.path.abspath(path))
    with suppress(OSError):  # the working folder may be gone
        if path.is_relative_to(Path.cwd()):
            return path.relative_to(Path.cwd())
    return path


def shell_command(words: list[str]) -> str:
    """A command line that the platform's shell reads as these words, in double quotes where possible."""
    return " ".join(_quote(word) for word in words)


def _quote(word):
    if re.fullmatch(r"[\w./:=@+,-]+", word, re.ASCII):
        return word
    if not re.search(r"""["'`$\\!%^&|<>\n]""", word):
        return f'"{word}"'
    return subprocess.list2cmdline([word]) if os.name == "nt" else shlex.quote(word)


def is_main_process() -> bool:
    """Whether this process writes files and messages; under torchrun only one does."""
    return int(os.environ.get("WORLD_SIZE", 1)) <= 1 or int(os.environ.get("RANK", 0)) == 0


def say(message: object) -> None:
    """Print a line for the user on stderr, above the progress bar."""
    if is_main_process():
        tqdm.write(one_line(message), file=sys.stderr)


class Terminated(KeyboardInterrupt):
    """SIGTERM: a queue, a container or a notebook service ends the process."""


class Tolerant:
    """A stream for messages.  If it is closed or full, the work goes on without it."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"  # a terminal may know latin-1 only
        written = text.encode(encoding, "backslashreplace").decode(encoding)
        self._try(lambda: self.stream.write(written))
        return len(text)

    def flush(self) -> None:
        self._try(lambda: self.stream.flush())

    def isatty(self) -> bool:
        return bool(self._try(lambda: self.stream.isatty()))

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def _try(self, action):
        try:
            return action() if self.stream is not None else None
        except (OSError, ValueError):  # full, closed by its reader, or closed here
            if self.stream in (sys.__stdout__, sys.__stderr__):
                with suppress(OSError, ValueError):  # else Python reports the same error at exit
                    null = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(null, self.stream.fileno())
                    os.close(null)


@contextmanager
def tolerant_streams() -> Iterator[None]:
    """Keep working if stdout or stderr is closed or full."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Tolerant(stream) for stream in streams)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams


@contextmanager
def interrupting_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM interrupt the work, unless the caller ignores or handles them."""

    def terminate(*_):
        raise Terminated

    before = {}
    if threading.current_thread() is threading.main_thread():
        wanted = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: terminate}
        for number, handler in wanted.items():
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_program(program: str, function: Callable[[], int]) -> int:
    """Call function() -> exit status; turn an error or an interrupt into one line and a status.

    2: bad input, a file error or too little memory; 1: an unusable result; 130: Ctrl-C; 143: SIGTERM.
    """
    with tolerant_streams():
        try:
            with interrupting_signals():
                return function()
        except Terminated as interrupt:
            error, status = interrupt if interrupt.args else "terminated", 143
        except KeyboardInterrupt as interrupt:
            error, status = interrupt if interrupt.args else "interrupted", 130
        except FloatingPointError as problem:
            error, status = problem, 1
        except (ValueError, OSError) as problem:
            error, status = problem, 2
            if not is_main_process():  # the main process says the same
                return status
        except (RuntimeError, MemoryError) as problem:
            error, status = explain_runtime_error(problem), 2
            if error is None:
                raise
        print(f"{program}: {one_line(error)}", file=sys.stderr)
        return status


def leave(main: Callable[[], int]) -> NoReturn:
    """End the process with the status of main(); after main() Ctrl-C and SIGTERM are ignored."""
    try:
        status = main()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except KeyboardInterrupt:  # after the last line of main()
        status = 130
    sys.exit(status)


def explain_runtime_error(error: Exception) -> str | None:
    """Explain PyTorch's out-of-memory and lost-process errors in a line; None for any other error."""
    text = str(error)
    if isinstance(error, MemoryError) or "memory" in text:
        size = re.search(r"allocate ([\d.]+ (?:bytes|[KMGT]iB))", text)
        found = f"out of memory ({size[1]} more were asked for)" if size else "out of memory"
        return f"{found}; take a smaller --size, --batch-size or --count, or --accumulate"
    if re.search(r"gloo|nccl|connection|peer|store", text, re.IGNORECASE) and "RANK" in os.environ:
        return f"process {os.environ['RANK']} stops, because another process of torchrun has ended"
    return None
