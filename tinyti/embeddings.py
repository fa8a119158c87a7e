"""Learned words on disk: reads every format in use for SD1, SD2 and LDM, writes the two that most tools read.

A learned word is a name and n vectors of width D, the rows that take the word's place in an embedded prompt.
`python -m tinyti.embeddings IN` shows what a file holds, `... IN OUT` converts it.
"""

import argparse
import base64
import io
import json
import os
import pickle
import re
import struct
import sys
import warnings
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

MODELS = {768: "SD1", 1024: "SD2", 1280: "LDM"}  # the model that a width belongs to
MOST_VECTORS = 75  # a prompt has 77 places; its start and its end take two
MOST_BYTES = 256 * 2**20  # a learned word is a few KiB; a larger file is a model

# What torch.load raises for damaged files, beside pickle.UnpicklingError.
DAMAGED = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


def read(path: str | Path, width: int | None = None) -> dict[str, Tensor]:
    """Read the learned words in a file, or in a folder that train.py wrote.

    Understood are the official `embeddings.pt`, AUTOMATIC1111's `.pt` and PNG, and the files of diffusers,
    kohya, invoke-training, OneTrainer, HCP-Diffusion and cloneofsimo.  Where the format has no room for a
    name, or "*" in its place, the word is named after the file.  A pickle never gets to run code.

    Args:
        path: the file or folder.
        width: the D of the model, if the words are for one; a word of another width is refused.

    Returns:
        {word: [n, D]}, fp32, on the CPU, contiguous.

    Raises:
        FileNotFoundError: there is no such file, or the folder holds no `learned_embeds`.
        ValueError: what the file holds is not a learned word for these models.
    """
    file = _find(Path(path))
    words = {word: _check(tensor, word, file) for word, tensor in _find_words(_load(file), file).items()}
    widths = sorted({vectors.shape[1] for vectors in words.values()})
    if len(widths) > 1:
        raise _refusal(file, f"tensors of the widths {widths}")
    if width is not None and widths != [width]:
        raise ValueError(
            f"{file}: found vectors of width {_name(widths[0])}, but the model has {_name(width)}; "
            "a word works only with the model it was learned for"
        )
    return words


def write(path: str | Path, words: dict[str, Tensor]) -> None:
    """Write learned words, atomically: after a failure the file is as it was before.

    `.safetensors` is diffusers' form: the key is the word; one vector is [D], which every tool reads, several
    are [n, D].  diffusers itself takes one word per file.  `.pt` is AUTOMATIC1111's form, for one word.

    Args:
        path: ends in `.safetensors` or `.pt`.
        words: {word: [n, D] or [D]} of any float type and device; saved as fp32.

    Raises:
        ValueError: another suffix, no word, several words for a `.pt`, or values that are not finite.
        OSError: the folder is missing, not writable or full.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt"):
        raise ValueError(f"{path}: cannot write '{path.suffix}' files; end the name in .safetensors or .pt")
    if not words or (path.suffix == ".pt" and len(words) > 1):
        raise ValueError(f"{path}: {len(words)} words to write; a .pt holds one, a .safetensors one or more")

    # a clone, because torch.save would write out the whole table that a row is a view of
    words = {word: _check(tensor, word, path).clone() for word, tensor in words.items()}
    if path.suffix == ".safetensors":
        tensors = {word: vectors[0] if len(vectors) == 1 else vectors for word, vectors in words.items()}
        data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    else:
        [(word, vectors)] = words.items()
        star = 265  # its id in CLIP's vocabulary
        buffer = io.BytesIO()
        torch.save({"string_to_token": {"*": star}, "string_to_param": {"*": vectors}, "name": word}, buffer)
        data = buffer.getvalue()
    _replace(path, data)


def _replace(path: Path, data: bytes) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"No such folder: {path.parent}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _find(path: Path) -> Path:
    """The file that `path` means."""
    file = path
    if path.is_dir():
        file = path / "learned_embeds.safetensors"
        if not file.exists():
            file = path / "learned_embeds.bin"
    if not file.is_file():
        missing = f"{path} holds no learned_embeds.safetensors" if path.is_dir() else f"No such file: {path}"
        raise FileNotFoundError(f"{missing}; give a word's file, or the folder that train.py wrote")

    # diffusers writes an SDXL word as a pair of files, each of which looks like a word of SD1 or LDM
    second = file.with_name(file.name.replace("learned_embeds", "learned_embeds_2", 1))
    if file.name.startswith("learned_embeds_2") or (second != file and second.exists()):
        raise _refusal(file, "one of the two files of an SDXL word")
    return file


def _load(file: Path):
    """What the file holds.  Its first bytes say which container it is; the suffix is often wrong."""
    size = file.stat().st_size
    if size > MOST_BYTES:
        raise _refusal(file, f"{size / 2**20:,.0f} MiB, the size of a model")
    with open(file, "rb") as stream:
        start = stream.read(9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on old pickles and large pictures
        if start.startswith(b"\x89PNG"):
            return _load_png(file)
        if start[8:] == b"{":
            return _load_safetensors(file)
        return _load_pickle(file)


def _load_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(file, framework="pt") as tensors:
            # cloneofsimo's files hold LoRA weights too and mark the words in the metadata
            words = [key for key, mark in (tensors.metadata() or {}).items() if mark == "<embed>"]
            return {key: tensors.get_tensor(key) for key in words or tensors.keys()}
    except safetensors.SafetensorError as error:
        raise _refusal(file, f"a damaged safetensors file ({error})", "fetch it again") from error


def _load_pickle(file: Path):
    try:
        # a stream, since torch goes by the suffix of a path; ParameterDict is in the official files
        with open(file, "rb") as stream, torch.serialization.safe_globals([nn.ParameterDict]):
            return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            found = f"a pickle that would call {code[1]}, which was not run"
            raise _refusal(file, found, "ask for a .safetensors file") from error
        raise _refusal(file, "an unknown or damaged file") from error
    except DAMAGED as error:
        raise _refusal(file, "a damaged or truncated file", "fetch it again") from error


def _load_png(file: Path):
    """AUTOMATIC1111's picture: base64 of JSON in a text chunk, with tensors as {"TORCHTENSOR": lists}."""
    try:
        with Image.open(file, formats=["PNG"]) as image:
            text = image.text.get("sd-ti-embedding")
        if text is not None:
            return json.loads(base64.b64decode(text), object_hook=_decode_tensor)
    except (OSError, SyntaxError, ValueError, TypeError, struct.error, Image.DecompressionBombError) as error:
        raise _refusal(file, f"a damaged picture ({error})", "fetch it again") from error
    raise _refusal(file, "a picture without a text chunk 'sd-ti-embedding'")


def _decode_tensor(entry: dict):
    return torch.tensor(entry["TORCHTENSOR"]) if "TORCHTENSOR" in entry else entry


def _find_words(contents, file: Path) -> dict[str, Tensor]:
    """The words in what a file holds, by the keys that each tool writes."""
    if isinstance(contents, Tensor):
        contents = {"string_to_param": {"*": contents}}
    if not isinstance(contents, dict):
        raise _refusal(file, f"a {type(contents).__name__}")

    name = file.stem
    keys = [str(key) for key in contents]
    shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
    if "string_to_param" in contents:  # the official code, AUTOMATIC1111, HCP-Diffusion
        name = contents.get("name") or name
        contents = contents["string_to_param"]
        if isinstance(contents, nn.ParameterDict):
            # items() fails on what torch <= 1.11 wrote; the tensors of old and new files are here
            contents = contents.__dict__.get("_parameters")
    elif {"clip_l", "clip_g"} & set(keys):
        raise _refusal(file, f"{shown}, as SDXL, SD3 and Flux have them")
    elif len(keys) > 1 and all(re.fullmatch(r"IN\d\d|MID|OUT\d\d", key) for key in keys):
        raise _refusal(file, f"one vector per layer of the UNet ({shown}: XTI)")
    elif "emb_params" in contents:  # kohya, invoke-training
        contents = {"*": contents["emb_params"]}
    elif "emp_params" in contents:  # OneTrainer
        contents = {"*": contents["emp_params"]}
    elif "emp_params_out" in contents:
        raise _refusal(file, "only OneTrainer's emp_params_out, which replaces outputs of the text encoder")
    else:
        name = "*"  # diffusers, cloneofsimo: every key is a word, also this one
    if not isinstance(contents, dict) or not contents:
        raise _refusal(file, "no vectors")
    return {name if word == "*" else word: tensor for word, tensor in contents.items()}


def _check(tensor: Tensor, word: str, file: Path) -> Tensor:
    """One word's vectors as [n, D], fp32, on the CPU, contiguous."""
    if not isinstance(word, str) or not word or not word.isprintable():
        raise _refusal(file, f"the key {word!r}")
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise _refusal(file, f"'{word}' of the type {kind}")
    vectors = tensor.detach()[None] if tensor.ndim == 1 else tensor.detach()  # (n, D)
    if vectors.ndim != 2 or not vectors.numel() or len(vectors) > MOST_VECTORS:
        raise _refusal(file, f"'{word}' of the shape {list(tensor.shape)}")
    vectors = vectors.to("cpu", torch.float32).contiguous()
    if not vectors.isfinite().all():
        raise _refusal(file, f"NaN or infinity in '{word}'", "learn it again at a lower rate")
    return vectors


def _refusal(file: Path, found: str, advice: str = "") -> ValueError:
    expected = f"a learned word of SD1, SD2 or LDM: [D] or [n, D] floats, n up to {MOST_VECTORS}"
    return ValueError(f"{file}: found {found}; expected {expected}" + (f"; {advice}" if advice else ""))


def _name(width: int) -> str:
    return f"{width} ({MODELS[width]})" if width in MODELS else str(width)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for whatever was refused."""
    parser = argparse.ArgumentParser(prog="python -m tinyti.embeddings", description="Show or convert words.")
    parser.add_argument("IN", help="a word's file, or the folder that train.py wrote")
    parser.add_argument("OUT", nargs="?", help="write this .safetensors (diffusers) or .pt (AUTOMATIC1111)")
    parser.add_argument("--force", action="store_true", help="overwrite OUT if it exists (default: refuse)")
    parser.add_argument("--weights", help="the words' model, to show the nearest vocabulary words too")
    options = parser.parse_args(arguments)
    lines = []
    try:
        model = None
        if options.weights:
            import tinyti  # only here: files are read and written without a model

            model = tinyti.load(options.weights)
        words = read(options.IN, width=model and model.text.table.shape[1])
        for word, vectors in words.items():
            norms = " ".join(f"{norm:.3f}" for norm in vectors.norm(dim=1).tolist())
            lines.append(f"{word}: {len(vectors)} x {_name(vectors.shape[1])}, norm {norms}")
            if model:
                lines += _nearest(tinyti.Concept(word, vectors, [*range(len(vectors))]), model)
        if options.OUT:
            if Path(options.OUT).exists() and not options.force:
                raise ValueError(f"{options.OUT} exists; give another name, or --force to overwrite it")
            write(options.OUT, words)
            lines.append(f"written to {options.OUT}")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


def _nearest(concept, model) -> list[str]:
    """One line per vector: the vocabulary words nearest in direction, with the cosine."""
    token, known = model.tokenizer.token, model.tokenizer.word_ids()
    near = concept.nearest(model.text.table, among=known)
    return ["  near " + ", ".join(f"{token(id)} {cosine:.2f}" for id, cosine in row) for row in near]


if __name__ == "__main__":
    sys.exit(main())
