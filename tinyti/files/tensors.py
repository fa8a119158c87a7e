"""Read tensors from untrusted files: no code of a pickle runs, and every failure is one line."""

import io
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

SUPPORTED = "supported are Stable Diffusion 1.x, 2.0 and 2.1, the LDM text2img model, and weights/tiny"

# Packages whose objects training code saves in a .ckpt beside the weights; they are read as empty stubs.
BOOKKEEPING = ("pytorch_lightning.", "lightning.", "numpy.")


def one_line(message: object) -> str:
    """Put a message in one line of at most 1,000 characters, with control characters made visible."""
    line = " ".join(str(message).split())
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return line if len(line) <= 1000 else line[:1000] + " ..."


@contextmanager
def explain_errors(path: str | Path, what: str, hint: str = SUPPORTED) -> Iterator[None]:
    """Turn every error of the block into a one-line ValueError: `path` does not describe a `what`.

    Damaged files make their readers raise almost anything, so we catch everything.
    """
    try:
        yield
    except Exception as error:
        found = f"it lacks {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        found = f"{path} does not describe a {what} ({' '.join(found.split()):.500}); {hint}"
        raise ValueError(one_line(found)) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors in a file of safetensors or torch.save, memory-mapped if possible; no code runs.

    The first bytes decide which of the two it is, not the suffix.  ValueError if it is damaged, holds
    something else, or is not a regular file.
    """
    with explain_errors(path, "file of weights", "download it again, or as .safetensors"):
        if not path.is_file():  # a device or a pipe may never end
            raise ValueError("it is not a regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns of odd pickles
            contents = load_file(path) if is_safetensors(path) else unpickle(path)
        if isinstance(contents, dict):
            contents = contents.get("state_dict", contents)
        entries = contents.items() if isinstance(contents, dict) else ()
        weights = {str(key): tensor.detach() for key, tensor in entries if torch.is_tensor(tensor)}
        if not weights:
            raise ValueError("it holds no dictionary of tensors")
        for name, w in weights.items():
            if w.layout is not torch.strided or w.device.type != "cpu" or w.is_quantized:
                raise ValueError(f"{name!r:.200} is sparse, quantised or without numbers")
    return weights


def is_safetensors(path: Path) -> bool:
    """Whether the first bytes are those of safetensors; ValueError for web pages and git-lfs pointers."""
    with open(path, "rb") as file:
        head = file.read(256)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError("it is a pointer of git-lfs, not the file itself; run git lfs pull")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError("it is a web page (HTML), not the file itself")
    return head[8:9] == b"{"


class UnsafePickleError(ValueError):
    """A pickle would call a function, which the message names; it was not called."""


def unpickle(source: Path | bytes):
    """Read what torch.save wrote, from a file or bytes: tensors and plain containers; no code runs.

    Objects of BOOKKEEPING packages are read as empty stubs; any other object is an UnsafePickleError.
    ValueError if the contents are damaged or compressed.
    """
    if isinstance(source, Path) and source.suffix.lower() == ".safetensors":  # torch.load goes by the suffix
        source = source.read_bytes()

    def stream():
        return io.BytesIO(source) if isinstance(source, bytes) else source

    zipped = zipfile.is_zipfile(stream())  # files of torch before 1.6 are not, and cannot be mapped
    if zipped:
        with zipfile.ZipFile(stream()) as archive:
            entries = archive.infolist()
        if any(entry.file_size > entry.compress_size + 2**20 for entry in entries):
            raise ValueError("its contents are compressed, as torch.save never does")
    names = []
    with suppress(Exception):  # the file is damaged; torch.load says how
        names = torch.serialization.get_unsafe_globals_in_checkpoint(stream()) if zipped else []
    stubs = [_stub(name) for name in names if name.startswith(BOOKKEEPING)]
    try:
        # The official files of words hold an nn.ParameterDict.
        with torch.serialization.safe_globals([*stubs, nn.ParameterDict]):
            mmap = zipped and isinstance(source, Path)
            return torch.load(stream(), map_location="cpu", weights_only=True, mmap=mmap)
    except UnpicklingError as error:  # its text advises running the file's code
        call = re.search(r"GLOBAL (\S+)", str(error))
        if call:
            raise UnsafePickleError(f"it would call {call[1]}, which was not run") from None
        raise ValueError("it is damaged") from None


def _stub(name):
    """Make a class of this full name, as torch.load looks it up; its objects stay empty."""

    def ignore(*args):
        pass

    module, _, kind = name.rpartition(".")
    return type(kind, (), {"__module__": module, "__init__": ignore, "__setstate__": ignore})
