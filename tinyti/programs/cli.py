"""What the command lines share: the model's flags, the device, types of arguments, and errors in one line."""

import argparse
import io
import math
import os
import signal
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from ..files.tensors import one_line
from ..model import LatentDiffusion, load
from .miniature import TINY


class Parser(argparse.ArgumentParser):
    """A parser that shows defaults in its help, and raises ValueError for what it does not understand."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def parse_args(self, args: list[str] | None = None, namespace=None) -> argparse.Namespace:
        args = sys.argv[1:] if args is None else args
        for flag in (argument[:-3] for argument in args if argument.endswith("=--")):
            self.error(f"argument {flag}: '--' is no value")  # argparse before Python 3.13 takes it for none
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
    """The type of a flag: not blank, without control characters, and what Unicode can write."""
    if not given.strip() or any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in given):
        raise argparse.ArgumentTypeError(f"{given[:40]!a} is blank or has characters that are no text")
    return given


def path_type(given: str) -> str:
    """The type of a flag: not blank, and if it is there, a file or a folder; no pipe and no device."""
    if not given.strip() or "\0" in given:
        raise argparse.ArgumentTypeError(f"{given[:40]!a} is no path")
    if os.path.exists(given) and not (os.path.isfile(given) or os.path.isdir(given)):
        raise argparse.ArgumentTypeError(f"{given[:200]!a} is neither a file nor a folder")
    return given


SEED = number_type(0, 2**32 - 1, int)


def model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which model, and where it is computed."""
    add = parser.add_argument_group("the model and the machine").add_argument
    add(
        "--weights",
        type=path_type,
        default=str(TINY),
        metavar="PATH",
        help="model folder or single file, see weights/README.md",
    )
    add("--tokenizer", type=path_type, metavar="FOLDER", help="for a single file that has none beside it")
    add("--prediction", choices=("epsilon", "v_prediction"), help="for single files of Stable Diffusion 2")
    add(
        "--clip-skip",
        type=number_type(1, 99, int),
        default=1,
        metavar="N",
        help="layer of the text transformer to read, from its end; 1 is the last, anime models take 2",
    )
    add("--device", default="auto", help="cuda, mps or cpu; auto takes the first that is there")
    add(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        help="of the networks; by default bf16 on GPUs that have it, else fp32",
    )


def pick_device(device: str = "auto", precision: str | None = None) -> tuple[str, torch.dtype]:
    """Turn --device and --precision into a device and a dtype of the networks.

    "auto" takes cuda, mps or cpu, the first that is there; without a precision it is bf16 on GPUs that have
    it and fp32 elsewhere.  Under torchrun each process takes its own GPU.  ValueError for what is not there.
    """
    count = {"cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available(), "cpu": 1}
    there = [kind for kind in count if count[kind]]
    name = there[0] if device == "auto" else device
    is_cuda = name.startswith("cuda")
    if is_cuda and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name not in there + [f"{kind}:{i}" for kind in there for i in range(count[kind])]:
        raise ValueError(
            f"--device {device!r} is not on this machine, but {', '.join(there)}; "
            "take --device cpu, or auto, or one of several GPUs as cuda:1"
        )
    if is_cuda and ":" in name:
        torch.cuda.set_device(name)
    if precision is None:  # the GPUs before Ampere only imitate bf16, slowly
        native = is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native else "fp32"
    return name, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def load_model(args: argparse.Namespace) -> LatentDiffusion:
    """The model that the flags name, on its device."""
    device, dtype = pick_device(args.device, args.precision)
    return load(args.weights, device, dtype, args.prediction, args.tokenizer, args.clip_skip)


def short_path(path: str | Path) -> Path:
    """A path as the user would write it here."""
    path, here = Path(path).resolve(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def is_main_process() -> bool:
    """Whether this is the process that writes and speaks: all but one of torchrun's do not."""
    return int(os.environ.get("WORLD_SIZE", 1)) <= 1 or int(os.environ.get("RANK", 0)) == 0


def say(message: str) -> None:
    """A line for the user, above the progress bar."""
    if is_main_process():
        tqdm.write(one_line(message), file=sys.stderr)


def run_program(program: str, function: Callable[[], int]) -> int:
    """Call function() -> exit status; bad input is one line and status 2, Ctrl-C one line and 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or file in latin-1 must not end a run
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return function()
    except KeyboardInterrupt as interrupt:
        error, status = interrupt if interrupt.args else "interrupted", 130
    except (ValueError, OSError) as problem:
        error, status = problem, 2
    except (RuntimeError, MemoryError) as problem:
        if isinstance(problem, RuntimeError) and "memory" not in str(problem):
            raise
        error, status = "out of memory; take a smaller --size, --batch-size or --count, or --accumulate", 2
    print(f"{program}: {one_line(error)}", file=sys.stderr)
    return status
