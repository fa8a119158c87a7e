"""Learned words on disk: the tests write every format that is read by hand, from the table of its keys, and
check that other programs accept what is written.
"""

import base64
import errno
import io
import json
import os
import pickle
import pickletools
import random
import re
import zipfile

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import tinyti
from tinyti.files import whole
from tinyti.files.words import UNNAMED, check_name, compatibility_warning, read_words, write_words

from .conftest import ROOT, TINY, Evil, saved


def vectors(n=2, width=768, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def save(path, contents):
    (save_file if path.suffix == ".safetensors" else torch.save)(contents, path)


def save_by_hand(path, tensors, metadata):
    """A safetensors file in the given order; the library sorts."""
    header, data = {"__metadata__": metadata}, b""
    for key, tensor in tensors.items():
        end = len(data) + 4 * tensor.numel()
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), end]}
        data += tensor.numpy().tobytes()
    header = json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def official(words, old_torch=False):
    parameters = nn.ParameterDict({word: nn.Parameter(tensor) for word, tensor in words.items()})
    if old_torch:  # torch <= 1.11 had no such attribute, and its files leave items() without it
        del parameters.__dict__["_keys"]
        with pytest.raises(AttributeError):
            parameters.items()
    tokens = {word: torch.tensor(265 + i) for i, word in enumerate(words)}
    return {"string_to_token": tokens, "string_to_param": parameters}


def a1111(tensor, name="cat"):
    about = {"step": 3000, "sd_checkpoint": "81761151", "sd_checkpoint_name": "v1-5-pruned"}
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": tensor}, "name": name, **about}


def as_text(contents):
    return base64.b64encode(json.dumps(contents).encode()).decode()


def picture(path, text=None, format="PNG"):
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_text("sd-ti-embedding", text)
    Image.new("RGB", (64, 48), "teal").save(path, format, pnginfo=info)


def expect(words, name, tensor):
    assert list(words) == [name]
    got = words[name]
    assert got.dtype == torch.float32 and got.is_contiguous() and not got.requires_grad
    assert_close(got, tensor, rtol=0, atol=0)


# reading


@pytest.mark.parametrize("old_torch", [False, True])
def test_official_file_of_one_word_or_several(tmp_path, old_torch):
    tensor = vectors(3, 1280)
    torch.save(official({"*": tensor}, old_torch), tmp_path / "embeddings.pt")
    expect(read_words(tmp_path / "embeddings.pt"), "embeddings", tensor)
    torch.save(official({"*": vectors(1, 1280), "@": tensor}, old_torch), tmp_path / "merged.pt")
    got = read_words(tmp_path / "merged.pt")
    assert list(got) == ["merged", "@"] and torch.equal(got["@"], tensor)


NAMELESS = [
    *(a1111(vectors(), inner) for inner in ("cat", "", None, 7, ["a"], torch.zeros(2))),
    {"string_to_param": {"*": nn.Parameter(vectors())}},  # HCP-Diffusion
    vectors(),
    {"emb_params": vectors()},  # kohya
    {"emp_params": vectors()},  # invoke-training, OneTrainer
    {"emp_params": vectors(), "emp_params_out": vectors(2, seed=1)},
    {"clip_l": vectors()},  # diffusers' train_dreambooth_lora_sd15_advanced.py
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("contents", NAMELESS)
def test_files_without_names_go_by_their_own(tmp_path, contents):
    torch.save(contents, tmp_path / "cat.pt")
    expect(read_words(tmp_path / "cat.pt"), "cat", vectors())
    if isinstance(contents, dict) and len(contents) < 3 and "string_to_param" not in contents:
        save_file(contents, tmp_path / "my.cat.safetensors")
        expect(read_words(tmp_path / "my.cat.safetensors"), "my.cat", vectors())


@pytest.mark.parametrize("inner, shown", [("S*", "S*"), ("a\nb", "a b")])
def test_renamed_automatic1111_file_goes_by_the_files_name(tmp_path, inner, shown):
    torch.save(a1111(vectors(), inner), tmp_path / "cat.pt")
    with pytest.warns(UserWarning) as caught:
        expect(read_words(tmp_path / "cat.pt"), "cat", vectors())
    [note] = [str(warning.message) for warning in caught]
    assert "the word is cat, after the file" in note and note.endswith(f"inside it is {shown}")


@pytest.mark.parametrize("inner, word", [("cat", "cat"), (None, "x")])
def test_automatic1111_picture_goes_by_the_name_inside(tmp_path, inner, word):
    picture(tmp_path / "x.png", as_text(a1111({"TORCHTENSOR": vectors().tolist()}, inner)))
    expect(read_words(tmp_path / "x.png"), word, vectors())


SHAPES = [vectors(1)[0], vectors(1), vectors(5), vectors(16, 2).T]


@pytest.mark.parametrize("tensor", [*SHAPES, vectors().half(), vectors().bfloat16(), vectors().double()])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_diffusers_file_and_folder(tmp_path, tensor, suffix):
    """Of any shape, type and strides; what is read is contiguous fp32."""
    path = tmp_path / f"learned_embeds{suffix}"
    save(path, {"<cat-toy>": tensor.contiguous() if suffix == ".safetensors" else tensor})
    expected = (tensor if tensor.ndim == 2 else tensor[None]).float()
    expect(read_words(path), "<cat-toy>", expected)
    expect(read_words(tmp_path), "<cat-toy>", expected)
    save_file({"preferred": vectors()}, tmp_path / "learned_embeds.safetensors")
    torch.save({"old": vectors()}, tmp_path / "learned_embeds.bin")
    expect(read_words(tmp_path), "preferred", vectors())


def test_cloneofsimo_file_without_its_lora_weights(tmp_path):
    words = {f"<s{i}>": vectors(1, seed=i)[0] for i in (3, 1, 5, 2, 4)}
    marks = {"unet": "{}", **dict.fromkeys(sorted(words), "<embed>")}
    save_by_hand(tmp_path / "final_lora.safetensors", {"unet:0:up": torch.zeros(320, 4), **words}, marks)
    got = read_words(tmp_path / "final_lora.safetensors")
    assert list(got) == list(words)  # in the file's order
    assert all(torch.equal(got[word], words[word][None]) for word in words)


def test_container_is_told_by_content_and_not_by_suffix(tmp_path):
    save_file({"a": vectors(1)}, tmp_path / "a.pt")
    torch.save({"b": vectors(1)}, tmp_path / "b.safetensors")
    torch.save({"c": vectors(1)}, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    for name, file in [("a", "a.pt"), ("b", "b.safetensors"), ("c", "c.pt")]:
        expect(read_words(tmp_path / file), name, vectors(1))


def test_width_of_the_model(tmp_path):
    save_file({"S*": vectors(2, 1024)}, tmp_path / "x.safetensors")
    read_words(tmp_path / "x.safetensors", width=1024)
    with pytest.raises(ValueError, match=r"1024 \(SD2\).* 768 \(SD1\)"):
        read_words(tmp_path / "x.safetensors", width=768)


# refusing


def refuse(path, *parts, error=ValueError):
    with pytest.raises(error) as caught:
        read_words(path)
    message = str(caught.value)
    assert message.isprintable() and str(path).split("\n")[0] in message and len(message) < 600
    for part in parts:
        assert part in message


REFUSED = [  # in every container
    ({"clip_l": vectors(2), "clip_g": vectors(2, 1280)}, "SDXL"),
    ({"clip_g": vectors(2, 1280)}, "SDXL"),
    ({"clip_l": vectors(2), "t5": vectors(2, 4096)}, "Flux"),
    ({name: vectors(1) for name in ("IN01", "IN08", "MID", "OUT03", "OUT11")}, "XTI"),
    ({"emp_params_out": vectors(2)}, "emp_params_out"),
    ({"a": vectors(1), "b": vectors(1, 1024)}, "widths [768, 1024]"),
    ({"token_embedding.weight": torch.zeros(4940, 768)}, "[4940, 768]"),
    ({"S*": torch.zeros(1, 1, 768)}, "[1, 1, 768]"),
    ({"S*": torch.zeros(0, 768)}, "[0, 768]"),
    ({"S*": torch.tensor(1.0)}, "'S*' of the shape []"),
    ({"S*": torch.ones(768, dtype=torch.long)}, "torch.int64"),
    ({"S*": torch.zeros(768).to(torch.float8_e4m3fn)}, "torch.float8_e4m3fn"),
    ({"S*": torch.full((768,), float("nan"))}, "NaN"),
    ({"S*": torch.full((768,), 1e300, dtype=torch.float64)}, "NaN or infinity"),
    ({"S\n*": torch.zeros(768)}, r"'S\n*'"),
    ({"S" * 10_000: torch.zeros(3, 3, 3)}, "SSS"),
]


@pytest.mark.parametrize("contents, found", REFUSED)
def test_refused_whatever_the_container(tmp_path, contents, found):
    for path in (tmp_path / "x.safetensors", tmp_path / "x.pt"):
        save(path, contents)
        refuse(path, found)


class Rebuilt:
    """Pickles as a tensor of one row's storage, of any size and strides."""

    def __init__(self, *size_and_strides):
        self.arguments = (vectors(1)._typed_storage(), 0, *size_and_strides, False, {})

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


REFUSED_PICKLES = [
    ({}, "no vectors"),
    ({"string_to_param": {}}, "no vectors"),
    ({"string_to_param": 3}, "no vectors"),
    (None, "a NoneType"),
    ([vectors(1)], "a list"),
    ({"string_to_param": {"*": {"clip_L": vectors(1)}}}, "dict"),  # HCP-Diffusion for SDXL
    ({7: vectors(1)}, "the key 7"),
    ({torch.zeros(9): vectors(1)}, "the key"),
    ({"S*": vectors(1).to_sparse()}, "sparse"),
    ({"S*": torch.empty(768, device="meta")}, "on meta"),
    ({"S*": Rebuilt((2, 768), (768, 1))}, "damaged"),
    ({"S*": Rebuilt((768,), (1000,))}, "damaged"),
    ({"S*": Rebuilt((75, 10**9), (0, 0))}, "[75, 1000000000]"),
]


@pytest.mark.parametrize("contents, found", REFUSED_PICKLES)
def test_refused_pickles(tmp_path, contents, found):
    torch.save(contents, tmp_path / "x.pt")
    refuse(tmp_path / "x.pt", found)


def test_files_of_a_models_size(tmp_path):
    """A thousand words at most; a pickle of 16 MiB, another file of 256 MiB at most."""
    save_file({f"S{i}": torch.zeros(1) for i in range(1001)}, tmp_path / "x.safetensors")
    refuse(tmp_path / "x.safetensors", "1,001 words")
    for megabytes, found in ((17, "a pickle of 17 MiB"), (257, "257 MiB, the size of a model")):
        with open(tmp_path / "x.pt", "wb") as file:
            file.truncate(megabytes * 2**20)
        refuse(tmp_path / "x.pt", found)


def test_pair_of_files_for_sdxl(tmp_path):
    save_file({"S*": vectors(1)}, tmp_path / "learned_embeds.safetensors")
    save_file({"S*": vectors(1, 1280)}, tmp_path / "learned_embeds_2.safetensors")
    for name in ("", "learned_embeds.safetensors", "learned_embeds_2.safetensors"):
        refuse(tmp_path / name, "SDXL")


@pytest.mark.filterwarnings("error")
def test_code_in_a_pickle_never_runs(tmp_path):
    attack = Evil(tmp_path / "proof")
    pickle.loads(pickle.dumps(attack)).close()
    (tmp_path / "proof").unlink()  # the attack is real
    contents = {"string_to_param": {"*": vectors(1)}, "x": attack}
    files = {
        "zip.pt": saved(contents),
        "legacy.bin": saved(contents, _use_new_zipfile_serialization=False),
        "raw2.pt": pickle.dumps(attack, protocol=2),
        "raw4.pt": pickle.dumps(attack, protocol=4),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        # torch's reader does not know protocol 4 and so cannot say what would be called
        refuse(tmp_path / name, *([] if name == "raw4.pt" else ["open", "was not run"]))
        assert not (tmp_path / "proof").exists()


def test_pictures_without_a_word(tmp_path):
    for format in ("PNG", "WEBP", "JPEG"):
        picture(tmp_path / "x.png", format=format)
        refuse(tmp_path / "x.png", "a picture without a word's data", "ask for the original")
    uneven = {"string_to_param": {"*": {"TORCHTENSOR": [[1.0], [1.0, 2.0]]}}}
    unnamed = {"string_to_param": {"*": 3}, "name": ["a", "list"]}
    deep = base64.b64encode(b"[" * 100_000).decode()
    for text in ("not base64!", as_text(uneven), as_text(unnamed), deep):
        picture(tmp_path / "x.png", text)
        refuse(tmp_path / "x.png", "damaged or unknown file")


def test_other_files(tmp_path):
    for name, shown in (("x.pt", "x.pt: found"), ("a\nb.pt", "a b.pt: found")):
        (tmp_path / name).write_text("just some text\n")
        refuse(tmp_path / name, shown, "expected a learned word")
    with open(tmp_path / "model.ckpt", "wb") as stream:
        stream.truncate(4 * 2**30)  # sparse: takes no room
    refuse(tmp_path / "model.ckpt", "4,096 MiB")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "learned_embeds.safetensors is missing", error=FileNotFoundError)
    os.mkfifo(tmp_path / "pipe.pt")  # is not opened
    (tmp_path / "zero.pt").symlink_to("/dev/zero")
    for name in ("none\n.pt", "pipe.pt", "zero.pt"):
        refuse(tmp_path / name, "is missing, or is a device or a pipe", error=FileNotFoundError)


def damage(data, lot):
    """A few bytes of it changed, lost or added, mostly near the beginning, where the structure is."""
    data = bytearray(data)
    for _ in range(lot.choice([1, 1, 2, 5])):
        i = lot.randrange(min(len(data), lot.choice([400, 10**6]))) if data else 0
        j = i + lot.choice([0, 1, 1, 4, 9, len(data)])
        new = [b"", lot.randbytes(j - i), b"\xff" * 4, b"\0\0\0\0", b"\xff\xff\xff\x7f"]
        data[i:j] = lot.choice([*new, bytes([lot.choice(b'\0\xff{}[]",:09()RcbsqQhtK')])])
    return bytes(data)


def damage_inside(data, lot):
    """The same behind the container's checksum or length."""
    changed = io.BytesIO()
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(changed, "w") as target:
            for entry in source.namelist():
                content = source.read(entry)
                target.writestr(entry, damage(content, lot) if entry.endswith("data.pkl") else content)
        return changed.getvalue()
    if data[8:9] == b"{":
        end = 8 + int.from_bytes(data[:8], "little")
        header = damage(data[8:end], lot)
        return len(header).to_bytes(8, "little") + header + data[end:]
    if data.startswith(b"\x89PNG"):
        text = Image.open(io.BytesIO(data)).text["sd-ti-embedding"]
        picture(changed, base64.b64encode(damage(base64.b64decode(text), lot)).decode())
        return changed.getvalue()
    return damage(data, lot)


@pytest.mark.filterwarnings("ignore:.*inside it is:UserWarning")  # after the file
@pytest.mark.parametrize("kind", ["written", "pt", "legacy", "official", "cloneofsimo", "kohya", "picture"])
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path, kind):
    path, tensor, lot = tmp_path / "x.pt", vectors(2, 16), random.Random(kind)
    marked = {"<s1>": tensor[0], "<s2>": tensor[1], "up": tensor}
    make = {
        "written": lambda: write_words(path, {"cat": tensor}),
        "pt": lambda: torch.save(a1111(tensor), path),
        "legacy": lambda: torch.save(a1111(tensor), path, _use_new_zipfile_serialization=False),
        "official": lambda: torch.save(official({"*": tensor}), path),
        "cloneofsimo": lambda: save_by_hand(path, marked, {"<s1>": "<embed>"}),
        "kohya": lambda: save_file({"emb_params": tensor}, path),
        "picture": lambda: picture(path, as_text(a1111({"TORCHTENSOR": tensor.tolist()}))),
    }
    make[kind]()
    good = path.read_bytes()
    cut_off = [good[:length] for length in (0, 1, 8, 9, 30, len(good) // 2, len(good) - 30)]
    changed = [lot.choice([damage, damage_inside])(good, lot) for _ in range(100)]
    refused = 0
    for data in cut_off + changed:
        path.write_bytes(data)
        try:
            words = read_words(path)
        except ValueError as error:
            refused += 1
            message = str(error)
            assert message.startswith(f"{path}: found ") and message.isprintable() and len(message) < 600
        else:
            assert data not in cut_off
            assert all(v.ndim == 2 and v.isfinite().all() for v in words.values())
    assert refused > 50


# writing


def test_every_name_is_refused_or_read_back(tmp_path):
    lot = random.Random(0)
    letters = [*"aZ09*_<>.-/:{}\"'\\ é猫", "🐱", "\n", "\t", "\0", "\x7f", "\u200b", "\ud800", "\u2028"]
    names = ["".join(lot.choices(letters, k=lot.randrange(6))) for _ in range(100)]
    keys = re.findall(r'"(\w+)" in keys', (ROOT / "tinyti" / "files" / "words.py").read_text())
    keys += UNNAMED
    assert len(keys) >= 5
    kept = 0
    for name in ["*", "MID", "IN01", "__metadata__", "clip_l", "clip_g", *keys, *names]:
        try:
            check_name(name)
        except ValueError as error:
            assert str(error).isprintable()
            with pytest.raises(ValueError):
                write_words(tmp_path / "x.safetensors", {name: vectors(1, 8)})
        else:
            kept += 1
            write_words(tmp_path / "x.safetensors", {name: vectors(1, 8)})
            expect(read_words(tmp_path / "x.safetensors"), name, vectors(1, 8))
            assert name not in keys
    assert 20 < kept < 100


def test_automatic1111_allows_what_is_in_a_pt(tmp_path):
    """Its modules/safe.py takes a zip with one folder, in it `data.pkl`, `version` and `data/` with numbered
    files, and a pickle that names only a few classes; it refuses the rest as possibly malicious.
    """

    def allowed(path):
        with zipfile.ZipFile(path) as file:
            folders, names = zip(*(name.split("/", 1) for name in file.namelist()))
            pickled = file.read(f"{folders[0]}/data.pkl")
        classes = {argument for op, argument, _ in pickletools.genops(pickled) if op.name == "GLOBAL"}
        assert classes == {"torch._utils _rebuild_tensor_v2", "torch FloatStorage", "collections OrderedDict"}
        return len(set(folders)) == 1 and all(re.fullmatch(r"data\.pkl|version|data/\d+", n) for n in names)

    for n in (1, 2, 8):
        write_words(tmp_path / "x.pt", {"S*": nn.Parameter(vectors(n))})
        assert allowed(tmp_path / "x.pt")
        contents = torch.load(tmp_path / "x.pt", weights_only=True)
        torch.save(contents, tmp_path / "plain.pt")
        assert not allowed(tmp_path / "plain.pt")  # of torch.save itself
        assert contents["name"] == "S*" and contents["string_to_token"] == {"*": 265}
        [(key, tensor)] = contents["string_to_param"].items()
        assert type(contents["string_to_param"]) is dict and type(tensor) is torch.Tensor
        assert key == "*" and torch.equal(tensor, vectors(n))


@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.filterwarnings("error")
def test_what_is_written_is_read_back_and_of_the_shape_that_other_programs_read(tmp_path, n):
    """AUTOMATIC1111, ComfyUI, diffusers and kohya's training take both forms, from the first tensor.

    InvokeAI's list of models looks for the width, at the end of a .pt, at the beginning of a .safetensors;
    kohya's gen_img for the number of vectors, always at the beginning: hence the README's table.
    """
    for name in ("S*.pt", "learned_embeds.safetensors"):
        write_words(tmp_path / name, {"S*": vectors(n)})
        expect(read_words(tmp_path / name), "S*", vectors(n))
    assert len(list(tmp_path.iterdir())) == 2
    [row_by_row] = torch.load(tmp_path / "S*.pt", weights_only=True)["string_to_param"].values()
    [tensor] = load_file(tmp_path / "learned_embeds.safetensors").values()
    assert row_by_row.shape == (n, 768) and tensor.shape == ((768,) if n == 1 else (n, 768))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_same_words_give_the_same_bytes(tmp_path, monkeypatch, suffix):
    table = torch.cat([vectors(2), torch.zeros(5000, 768)])
    write_words(tmp_path / f"a{suffix}", {"S*": vectors(2)})
    monkeypatch.setattr("time.time", lambda: 2e9)
    write_words(tmp_path / f"b{suffix}", {"S*": table[:2]})  # without the rest of the table
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


UNWRITABLE = [
    ("x.bin", {"S*": vectors(1)}, ".bin"),
    ("x", {"S*": vectors(1)}, "ends in .safetensors or .pt"),
    ("x.pt", {"a": vectors(1), "b": vectors(1)}, "2 words"),
    ("x.safetensors", {}, "0 words"),
    ("x.safetensors", {"S*": torch.full((1, 8), float("nan"))}, "NaN"),
    ("x.safetensors", {"S*": torch.empty(8, device="meta")}, "on meta"),
    ("x.safetensors", {"": vectors(1)}, "'' cannot be the name"),
    ("x.pt", {"emb_params": vectors(1)}, "cannot be the name"),
    ("none/x.pt", {"S*": vectors(1)}, "No such folder"),
]


@pytest.mark.parametrize("name, words, found", UNWRITABLE)
def test_refuses_to_write(tmp_path, name, words, found):
    with pytest.raises(FileNotFoundError if "folder" in found else ValueError, match=found):
        write_words(tmp_path / name, words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "x.safetensors"
    write_words(path, {"S*": vectors(1)})
    before = path.read_bytes()

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(whole if step == "open" else os, step, full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        write_words(path, {"S*": vectors(1, seed=1)})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_the_old_file_and_a_killed_process_no_obstacle(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), whole.atomic_write(path) as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    (tmp_path / ".tinyti-0.tmp").write_bytes(b"half" * 10_000)
    write_words(path, {"x": vectors(1)})
    expect(read_words(path), "x", vectors(1))
    whole.remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


# what diffusers makes of names with capitals; test_tiny.py has the pictures of the others


@pytest.fixture
def pipeline():
    pipeline = StableDiffusionPipeline.from_pretrained(TINY, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


WARNED = [("S*", 2), ("<My-cat>", 8), ("e\u0301*", 2), ("İ*", 2)]
NOT_WARNED = [("S*", 1), ("<my-cat>", 2), ("é*", 2), ("猫ß", 2)]


@pytest.mark.parametrize("name, n", WARNED + NOT_WARNED)
def test_the_warning_is_given_where_diffusers_drops_vectors(pipeline, name, n):
    warning = compatibility_warning(name, n)
    assert bool(warning) == ((name, n) in WARNED)
    if warning:
        assert f"first of the {n} vectors of {name}" in warning and f"{name} {name}_1" in warning
    if pipeline.tokenizer.is_fast and n > 1:  # transformers 5
        width = pipeline.text_encoder.config.hidden_size
        pipeline.load_textual_inversion(vectors(n, width), token=name)
        expanded = pipeline.maybe_convert_prompt(f"a {name}", pipeline.tokenizer)
        assert (f"{name}_1" in expanded) == (not warning)


WAYS = {  # the word's name, options of load_textual_inversion, the prompt, whether the picture is the same
    "as it is": ("S*", {}, "a photo of S* in the snow", False),
    "lower case": ("<my-cat>", {}, "a photo of <my-cat> in the snow", True),
    "token": ("S*", {"token": "<s>"}, "a photo of <s> in the snow", True),
    "in the prompt": ("S*", {}, "a photo of S* S*_1 in the snow", True),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_around_capitals_draw_the_picture(tmp_path, pipeline, way):
    name, options, prompt, same = WAYS[way]
    if not same and not pipeline.tokenizer.is_fast:
        pytest.skip("transformers 4 has no such trouble")
    model = tinyti.load(TINY)
    rows = model.text.table[model.tokenizer.encode("red boat")]
    write_words(tmp_path / "learned_embeds.safetensors", {name: rows})
    model.add_word("S*", rows)
    x_T = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    *_, x_0 = tinyti.sample(model, "a photo of S* in the snow", steps=6, guidance=5.0, x_T=x_T)

    pipeline.load_textual_inversion(str(tmp_path), weight_name="learned_embeds.safetensors", **options)
    drawn = pipeline(prompt, num_inference_steps=6, latents=x_T, guidance_scale=5.0, output_type="pt").images
    difference = (drawn - (model.decode(x_0) + 1) / 2).abs().max()
    assert difference <= 1 / 255 if same else difference > 20 / 255
