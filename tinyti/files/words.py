"""Learned words on disk: read every format in use for SD1, SD2 and LDM; write two of them.

A learned word is a name and n vectors of width D, the rows that take the word's place in an embedded prompt.
`python -m tinyti.convert IN` shows what a file holds, `... IN OUT` converts it."""

import base64
import io
import json
import re
import unicodedata
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from .tensors import UnsafePickleError, one_line, unpickle
from .whole import atomic_write

MODELS = {768: "SD1", 1024: "SD2", 1280: "LDM"}  # the model that a width belongs to
MOST_VECTORS = 75  # a prompt has 77 places; its start and its end take two
MOST_WIDTH = 8192  # a damaged file can describe a tensor far larger than itself
MOST_FILE_BYTES = 256 * 2**20  # a learned word is a few KiB; a larger file is a model
MOST_PICKLE = 16 * 2**20  # a safetensors file may hold LoRA weights beside the word, a pickle does not
MOST_WORDS = 1000  # in one file
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WORD = f"a learned word of SD1, SD2 or LDM: [D] or [n, D] floats, n up to {MOST_VECTORS}"

# The keys of a word without a name, from kohya, invoke-training, OneTrainer and diffusers' advanced script.
UNNAMED = ("emb_params", "emp_params", "clip_l")
# Keys that mark the format of a file, so they cannot be names of words.
RESERVED = (*UNNAMED, "clip_g", "emp_params_out", "string_to_param", "__metadata__")

PICTURES = (b"\x89PNG", b"RIFF", b"\xff\xd8\xff")  # RIFF is WebP


def read_words(
    path: str | Path, width: int | None = None, warn: Callable[[str], None] = warnings.warn
) -> dict[str, Tensor]:
    """Read the learned words in a file, or in a folder that train.py wrote: {name: (n, D)}, fp32, on the CPU.

    It reads the official `embeddings.pt`, AUTOMATIC1111's `.pt` and PNG, and the files of diffusers, kohya,
    invoke-training, OneTrainer, HCP-Diffusion and cloneofsimo.  Formats that store no name take the file's,
    as in AUTOMATIC1111; `warn` is called if the file holds another name.  The code of a pickle never runs.
    `width`, if given, is the D that the words must have.

    FileNotFoundError if there is no such file, or the folder holds no `learned_embeds`; ValueError if the
    file holds no learned word for these models, or one of another width.
    """
    file = _find(Path(path))
    found = _find_words(_load(file), file, warn)
    if len(found) > MOST_WORDS:
        raise _refusal(file, f"{len(found):,} words", f"at most {MOST_WORDS:,} words")
    words = {word: _check(tensor, word, file) for word, tensor in found.items()}
    widths = sorted({vectors.shape[1] for vectors in words.values()})
    if len(widths) > 1:
        raise _refusal(file, f"tensors of the widths {widths}")
    if width is not None and widths != [width]:
        advice = "a word works only with the model it was learned for"
        expected = f"{name_width(width)}, the model's"
        raise _refusal(file, f"vectors of width {name_width(widths[0])}", expected, advice)
    return words


def write_words(path: str | Path, words: dict[str, Tensor]) -> None:
    """Write words {name: (n, D) or (D,)} atomically in fp32; the same words give the same bytes.

    `.safetensors` is diffusers' form: the key is the word; one vector is [D], several are [n, D].  diffusers
    itself takes one word per file.  `.pt` is AUTOMATIC1111's form, for one word.

    ValueError for another suffix, no word, several words for a `.pt`, a name that `check_name` refuses, or
    values that are not finite; OSError if the folder is missing, not writable or full.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt"):
        raise _refusal(path, f"the suffix '{path.suffix}'", "a file name that ends in .safetensors or .pt")
    if not words or (path.suffix == ".pt" and len(words) > 1):
        raise _refusal(path, f"{len(words)} words to write", "one for a .pt, one or more for a .safetensors")
    for word in words:
        check_name(word)

    # clone, because torch.save would write the whole table that a row is a view of
    words = {word: _check(tensor, word, path).clone() for word, tensor in words.items()}
    with atomic_write(path) as stream:
        if path.suffix == ".safetensors":
            tensors = {word: vectors[0] if len(vectors) == 1 else vectors for word, vectors in words.items()}
            stream.write(safetensors.torch.save(tensors, metadata={"format": "pt"}))
        else:
            [(word, vectors)] = words.items()
            _save_pt(word, vectors, stream)


def check_name(word: str) -> None:
    """Raise ValueError for a name that `read_words` would not give back."""
    if not _is_name(word) or any(c.isspace() for c in word) or word in RESERVED:
        raise ValueError(
            f"{word!r:.80} cannot be the name of a learned word; expected printable characters, no white "
            f"space, and not a key of the file formats ({', '.join(RESERVED)})"
        )


def compatibility_warning(word: str, n: int) -> str | None:
    """One line that warns if diffusers would use only the first of a word's n vectors, or None.

    The tokenizers of transformers 5 give a new token back in lower case.  So diffusers does not recognise a
    name with capitals in a prompt, and does not replace it by the n tokens of its vectors.
    """
    if n == 1 or word == unicodedata.normalize("NFC", word).lower():
        return None
    return (
        f"diffusers with transformers 5 will use only the first of the {n} vectors of {word}, because there "
        "are capitals in its name; "
        'what works: a name in lower case such as <my-cat>, or load_textual_inversion(..., token="<s>"), '
        f"or in the prompt {word} {word}_1{' ...' if n > 2 else ''}"
    )


def _save_pt(word: str, vectors: Tensor, stream: io.BytesIO) -> None:
    """Write AUTOMATIC1111's form: plain tensors in plain dictionaries, in a zip of three kinds of entries.

    AUTOMATIC1111 refuses other entries (its modules/safe.py), and current versions of torch.save write some.
    """
    star = 265  # its id in CLIP's vocabulary
    saved = io.BytesIO()
    torch.save({"string_to_token": {"*": star}, "string_to_param": {"*": vectors}, "name": word}, saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(stream, "w") as target:
        for entry in source.namelist():
            if re.fullmatch(r"archive/(data\.pkl|data/\d+|version)", entry):
                target.writestr(zipfile.ZipInfo(entry), source.read(entry))  # always dated 1980


def _find(path: Path) -> Path:
    """Find the file that `path` means, without opening it."""
    names = ("learned_embeds.safetensors", "learned_embeds.bin")
    files = [path / name for name in names] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        found = f"{files[0]} is missing, or is a device or a pipe"
        raise FileNotFoundError(one_line(f"{found}; give a word's file, or the folder that train.py wrote"))
    # diffusers writes an SDXL word as a pair of files, each of which looks like a word of SD1 or LDM
    second = file.with_name(file.name.replace("learned_embeds", "learned_embeds_2", 1))
    if file.name.startswith("learned_embeds_2") or (second != file and second.exists()):
        raise _refusal(file, "one of the two files of an SDXL word")
    return file


def _load(file: Path):
    """Read and parse the file; ValueError if it is too large, damaged or unsafe."""
    if (size := file.stat().st_size) > MOST_FILE_BYTES:
        raise _refusal(file, f"{size / 2**20:,.0f} MiB, the size of a model")
    data = file.read_bytes()
    if size > MOST_PICKLE and data[8:9] != b"{" and not data.startswith(PICTURES):
        raise _refusal(file, f"a pickle of {size / 2**20:,.0f} MiB, the size of a model")
    if data.startswith(PICTURES) and b"sd-ti-embedding" not in data:
        advice = "saving a picture anew loses it; ask for the original, or a .pt"
        raise _refusal(file, "a picture without a word's data", advice=advice)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on old pickles and large pictures
            return _parse(data)
    except Exception as error:  # damaged bytes make parsers raise almost anything
        if isinstance(error, UnsafePickleError):
            found = f"a pickle that {str(error).removeprefix('it ')}"
            raise _refusal(file, found, advice="ask for a .safetensors file") from error
        raise _refusal(file, "a damaged or unknown file", advice="fetch it again") from error


def _parse(data: bytes):
    """Parse bytes.  The first of them decide the container, because the file's suffix is often wrong."""
    if data[8:9] == b"{":
        tensors = safetensors.torch.load(data)  # in any order; the header has the file's
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        # cloneofsimo's files hold LoRA weights too and mark the words in the metadata
        marks = header.pop("__metadata__", {})
        words = [key for key in header if marks.get(key) == "<embed>"]
        return {key: tensors[key] for key in words or header}

    if data.startswith(PICTURES):  # AUTOMATIC1111's PNG: base64 of JSON in a text chunk
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            text = base64.b64decode(image.text["sd-ti-embedding"])
        tensor = "TORCHTENSOR"
        contents = json.loads(
            text, object_hook=lambda x: torch.tensor(x[tensor], dtype=torch.float32) if tensor in x else x
        )
        words = contents["string_to_param"]
        if "*" in words and contents.get("name"):
            words[contents["name"]] = words.pop("*")  # for a picture the name inside counts
        return {"string_to_param": words}

    return unpickle(data)


def _find_words(contents, file: Path, warn: Callable[[str], None]) -> dict[str, Tensor]:
    """Find the words in a file's contents by the keys that each tool writes; "*" is the file's own name."""
    if isinstance(contents, Tensor):
        contents = {"string_to_param": {"*": contents}}
    if not isinstance(contents, dict):
        raise _refusal(file, f"a {type(contents).__name__}")
    name = file.stem
    keys = [str(key) for key in contents]
    if "string_to_param" in keys:  # the official code, AUTOMATIC1111, HCP-Diffusion
        inner = contents.get("name")
        if isinstance(inner, str) and inner not in ("", name):
            note = f"{file}: the word is {name}, after the file, as in AUTOMATIC1111; inside it is {inner}"
            warn(one_line(note))
        contents = contents["string_to_param"]
        if isinstance(contents, nn.ParameterDict):
            # items() fails on what torch <= 1.11 wrote; the tensors of old and new files are here
            contents = contents.__dict__.get("_parameters")
    elif {"clip_l", "clip_g"} & set(keys) and keys != ["clip_l"]:
        raise _refusal(file, f"the keys {', '.join(keys)}, as SDXL, SD3 and Flux have them")
    elif len(keys) > 1 and all(re.fullmatch(r"IN\d\d|MID|OUT\d\d", key) for key in keys):
        raise _refusal(file, f"one vector per layer of the UNet (XTI): {', '.join(keys)}")
    elif unnamed := [key for key in UNNAMED if key in keys]:
        contents = {"*": contents[unnamed[0]]}
    elif "emp_params_out" in keys:
        raise _refusal(file, "only OneTrainer's emp_params_out, which replaces outputs of the text encoder")
    else:
        name = "*"  # diffusers, cloneofsimo: every key is a word, even "*"
    if not isinstance(contents, dict) or not contents:
        raise _refusal(file, "no vectors")
    return {name if word == "*" else word: tensor for word, tensor in contents.items()}


def _check(tensor: Tensor, word: str, file: Path) -> Tensor:
    """Check a word's name, and its vectors with `check_vectors`."""
    if not _is_name(word):
        raise _refusal(file, f"the key {word!r}")
    return check_vectors(tensor, word, file)


def check_vectors(tensor: Tensor, word: str, file: Path | str) -> Tensor:
    """Return a word's vectors as (n, D), fp32, on the CPU, contiguous; ValueError names `file`."""
    if not isinstance(tensor, Tensor):
        raise _refusal(file, f"'{word}' of the type {type(tensor).__name__}")
    kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
    if tensor.is_nested:  # checked first, because it has no single shape
        raise _refusal(file, f"'{word}' of several shapes ({kind})")
    vectors = tensor.detach()[None] if tensor.ndim == 1 else tensor.detach()  # (n, D)
    n, width = vectors.shape if vectors.ndim == 2 else (0, 0)
    is_plain = tensor.dtype in FLOATS and tensor.layout == torch.strided and not tensor.is_meta
    if not (is_plain and 1 <= n <= MOST_VECTORS and 1 <= width <= MOST_WIDTH):
        raise _refusal(file, f"'{word}' of the shape {list(tensor.shape)} ({kind})")
    vectors = vectors.to("cpu", torch.float32).contiguous()
    if not vectors.norm(dim=1).isfinite().all():  # finite numbers may also have an infinite norm
        raise _refusal(file, f"NaN or infinity in '{word}'", advice="learn it again at a lower rate")
    return vectors


def _is_name(word) -> bool:
    return isinstance(word, str) and word != "" and word.isprintable()


def _refusal(file: Path | str, found: str, expected: str = WORD, advice: str = "") -> ValueError:
    message = f"{file}: found {found:.200}; expected {expected}" + (f"; {advice}" if advice else "")
    return ValueError(one_line(message))


def name_width(width: int) -> str:
    """Say a width, with the model that has it if one is known."""
    return f"{width} ({MODELS[width]})" if width in MODELS else str(width)
