"""Learned words on disk.  Every file that a tool writes is made here by hand, from the table of its keys."""

import base64
import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import tinyti
from tinyti import embeddings

ROOT = Path(__file__).parent.parent
LAYERS = ["IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{i:02}" for i in range(3, 12))]


def vectors(n=2, width=768, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def official(path, words, old_torch=False, **extra):
    parameters = nn.ParameterDict({word: nn.Parameter(tensor) for word, tensor in words.items()})
    if old_torch:  # torch <= 1.11 had no such attribute, and its files leave items() without it
        del parameters.__dict__["_keys"]
        with pytest.raises(AttributeError):
            parameters.items()
    tokens = {word: torch.tensor(265 + i) for i, word in enumerate(words)}
    torch.save({"string_to_token": tokens, "string_to_param": parameters, **extra}, path)


def picture(path, text, size=(64, 48)):
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_text("sd-ti-embedding", text)
    Image.new("RGB", size, "teal").save(path, pnginfo=info)


def as_text(contents):
    return base64.b64encode(json.dumps(contents).encode()).decode()


def a1111(tensor, name="cat"):
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": tensor},
        "name": name,
        "step": 3000,
        "sd_checkpoint": "81761151",
        "sd_checkpoint_name": "v1-5-pruned",
    }


def expect(words, name, tensor):
    assert list(words) == [name]
    got = words[name]
    assert got.dtype == torch.float32 and got.is_contiguous() and not got.requires_grad
    assert_close(got, tensor, rtol=0, atol=0)


# reading


@pytest.mark.parametrize("old_torch", [False, True])
@pytest.mark.parametrize("width", [768, 1280])
def test_official_file(tmp_path, old_torch, width):
    tensor = vectors(3, width)
    official(tmp_path / "embeddings.pt", {"*": tensor}, old_torch)
    expect(embeddings.read(tmp_path / "embeddings.pt"), "embeddings", tensor)


def test_official_file_of_several_words(tmp_path):
    words = {"*": vectors(1), "@": vectors(2, seed=1)}
    official(tmp_path / "merged.pt", words)
    got = embeddings.read(tmp_path / "merged.pt")
    assert list(got) == ["merged", "@"]
    assert_close(got["@"], words["@"], rtol=0, atol=0)


def test_automatic1111_file_is_named_inside(tmp_path):
    tensor = vectors(4, 1024)
    torch.save(a1111(tensor, "cat"), tmp_path / "renamed.pt")
    expect(embeddings.read(tmp_path / "renamed.pt"), "cat", tensor)


def test_automatic1111_picture(tmp_path):
    tensor = vectors(2)
    picture(tmp_path / "x.png", as_text(a1111({"TORCHTENSOR": tensor.tolist()})))
    expect(embeddings.read(tmp_path / "x.png"), "cat", tensor)


@pytest.mark.parametrize("tensor", [vectors(1)[0], vectors(1), vectors(5)], ids=["1-D", "one", "five"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_diffusers_file(tmp_path, tensor, suffix):
    path = tmp_path / f"learned_embeds{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)({"<cat-toy>": tensor}, path)
    expected = tensor if tensor.ndim == 2 else tensor[None]
    expect(embeddings.read(path), "<cat-toy>", expected)
    expect(embeddings.read(tmp_path), "<cat-toy>", expected)  # the folder


def test_folder_prefers_safetensors(tmp_path):
    torch.save({"old": vectors()}, tmp_path / "learned_embeds.bin")
    save_file({"new": vectors()}, tmp_path / "learned_embeds.safetensors")
    assert list(embeddings.read(tmp_path)) == ["new"]


@pytest.mark.parametrize("key", ["emb_params", "emp_params"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_kohya_and_onetrainer_files_are_named_by_the_file(tmp_path, key, suffix):
    tensor = vectors(2)
    extra = {"emp_params_out": vectors(2, seed=1)} if key == "emp_params" else {}
    path = tmp_path / f"my.cat{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)({key: tensor, **extra}, path)
    expect(embeddings.read(path), "my.cat", tensor)


def test_hcp_file(tmp_path):
    tensor = vectors(2)
    torch.save({"string_to_param": {"*": nn.Parameter(tensor)}, "name": "pt-cat"}, tmp_path / "x.pt")
    expect(embeddings.read(tmp_path / "x.pt"), "pt-cat", tensor)


def test_cloneofsimo_file_without_its_lora_weights(tmp_path):
    words = {"<s1>": vectors(1)[0], "<s2>": vectors(1, seed=1)[0]}
    lora = {"unet:0:up": torch.zeros(320, 4), "unet:0:down": torch.zeros(4, 320)}
    marks = {"<s1>": "<embed>", "<s2>": "<embed>", "unet": "{}"}
    save_file({**words, **lora}, tmp_path / "final_lora.safetensors", metadata=marks)
    got = embeddings.read(tmp_path / "final_lora.safetensors")
    assert {word: tuple(tensor.shape) for word, tensor in got.items()} == {"<s1>": (1, 768), "<s2>": (1, 768)}
    assert_close(got["<s2>"][0], words["<s2>"], rtol=0, atol=0)


def test_bare_tensor_is_named_by_the_file(tmp_path):
    tensor = vectors(2)
    torch.save(tensor, tmp_path / "cat.pt")
    expect(embeddings.read(tmp_path / "cat.pt"), "cat", tensor)


def test_container_is_told_by_content_and_not_by_suffix(tmp_path):
    tensor = vectors(1)
    save_file({"a": tensor}, tmp_path / "a.pt")
    torch.save({"b": tensor}, tmp_path / "b.safetensors")
    torch.save({"c": tensor}, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    for name, file in [("a", "a.pt"), ("b", "b.safetensors"), ("c", "c.pt")]:
        expect(embeddings.read(tmp_path / file), name, tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_fp32(tmp_path, dtype):
    tensor = vectors(2).to(dtype)
    save_file({"S*": tensor}, tmp_path / "x.safetensors")
    expect(embeddings.read(tmp_path / "x.safetensors"), "S*", tensor.float())


def test_transposed_rows_are_made_contiguous(tmp_path):
    tensor = vectors(16, 2).T  # (2, 16), strides (1, 2)
    torch.save({"S*": tensor}, tmp_path / "x.pt")
    expect(embeddings.read(tmp_path / "x.pt"), "S*", tensor)


def test_width_of_the_model(tmp_path):
    save_file({"S*": vectors(2, 1024)}, tmp_path / "x.safetensors")
    embeddings.read(tmp_path / "x.safetensors", width=1024)
    with pytest.raises(ValueError, match=r"1024 \(SD2\).* 768 \(SD1\)"):
        embeddings.read(tmp_path / "x.safetensors", width=768)


# refusing


def refuse(path, *parts, error=ValueError):
    with pytest.raises(error) as caught:
        embeddings.read(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "contents, found",
    [
        ({"clip_l": vectors(2), "clip_g": vectors(2, 1280)}, "SDXL"),
        ({"clip_g": vectors(2, 1280)}, "SDXL"),
        ({name: vectors(1) for name in LAYERS}, "XTI"),
        ({"emp_params_out": vectors(2)}, "emp_params_out"),
        ({"a": vectors(1), "b": vectors(1, 1024)}, "widths [768, 1024]"),
        ({"token_embedding.weight": torch.zeros(4940, 768)}, "[4940, 768]"),
        ({"S*": torch.zeros(1, 1, 768)}, "[1, 1, 768]"),
        ({"S*": torch.zeros(0, 768)}, "[0, 768]"),
        ({"S*": torch.tensor(1.0)}, "'S*' of the shape []"),
        ({"S*": torch.ones(768, dtype=torch.long)}, "torch.int64"),
        ({"S*": torch.full((768,), float("nan"))}, "NaN"),
        ({"S*": torch.full((768,), float("inf"))}, "NaN or infinity"),
        ({"S\n*": torch.zeros(768)}, r"'S\n*'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_whatever_the_container(tmp_path, contents, found):
    save_file(contents, tmp_path / "x.safetensors")
    refuse(tmp_path / "x.safetensors", found, "expected a learned word")
    torch.save(contents, tmp_path / "x.pt")
    refuse(tmp_path / "x.pt", found, "expected a learned word")


@pytest.mark.parametrize(
    "contents, found",
    [
        ({}, "no vectors"),
        ({"string_to_param": {}}, "no vectors"),
        ({"string_to_param": 3}, "no vectors"),
        ({"string_to_param": {"*": {"clip_L": vectors(1)}}}, "dict"),  # HCP-Diffusion for SDXL
        ({7: vectors(1)}, "the key 7"),
        ([vectors(1)], "a list"),
        ({"S*": vectors(1).to_sparse()}, "float32"),
    ],
)
def test_refused_pickles(tmp_path, contents, found):
    torch.save(contents, tmp_path / "x.pt")
    refuse(tmp_path / "x.pt", found)


def test_one_word_with_the_name_of_a_layer_is_a_word(tmp_path):
    save_file({"MID": vectors(1)}, tmp_path / "x.safetensors")
    assert list(embeddings.read(tmp_path / "x.safetensors")) == ["MID"]


def test_pair_of_files_for_sdxl(tmp_path):
    save_file({"S*": vectors(1)}, tmp_path / "learned_embeds.safetensors")
    save_file({"S*": vectors(1, 1280)}, tmp_path / "learned_embeds_2.safetensors")
    refuse(tmp_path, "SDXL")
    refuse(tmp_path / "learned_embeds.safetensors", "SDXL")
    refuse(tmp_path / "learned_embeds_2.safetensors", "SDXL")


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.filterwarnings("error")
def test_code_in_a_pickle_never_runs(tmp_path):
    target = tmp_path / "ran"
    evil = {"string_to_param": {"*": vectors(1)}, "x": Evil(target)}
    pickle.loads(pickle.dumps(Evil(target)))
    assert target.exists()  # the pickle is a loaded one
    target.unlink()

    torch.save(evil, tmp_path / "zip.pt")
    torch.save(evil, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "raw2.pt").write_bytes(pickle.dumps(Evil(target), protocol=2))
    (tmp_path / "raw4.pt").write_bytes(pickle.dumps(Evil(target), protocol=4))
    for name in ["zip.pt", "legacy.bin", "raw2.pt", "raw4.pt"]:
        # torch's reader does not know protocol 4 and so cannot say what would be called
        refuse(tmp_path / name, *([] if name == "raw4.pt" else ["system", "was not run"]))
        assert not target.exists()


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.png"])
def test_truncated_files(tmp_path, name):
    path = tmp_path / name
    tensor = vectors(2, 16)
    if name == "x.png":
        picture(path, as_text(a1111({"TORCHTENSOR": tensor.tolist()})))
    else:
        embeddings.write(path, {"cat": tensor})
    whole = path.read_bytes()
    for length in [0, 1, 8, 9, 30, len(whole) // 2, len(whole) - 30]:
        path.write_bytes(whole[:length])
        refuse(path)


@pytest.mark.parametrize(
    "text", [None, "not base64!", as_text({"string_to_param": {"*": {"TORCHTENSOR": [[1.0], [1.0, 2.0]]}}})]
)
def test_pictures_without_a_word(tmp_path, text):
    picture(tmp_path / "x.png", text)
    refuse(tmp_path / "x.png", "picture")


def test_other_files(tmp_path):
    (tmp_path / "x.pt").write_text("just some text\n")
    refuse(tmp_path / "x.pt", "expected a learned word")
    with open(tmp_path / "model.ckpt", "wb") as stream:
        stream.truncate(4 * 2**30)  # sparse: takes no room
    refuse(tmp_path / "model.ckpt", "4,096 MiB")
    refuse(tmp_path / "none.pt", "No such file", error=FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "learned_embeds.safetensors", error=FileNotFoundError)


# writing


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_what_is_written_is_read_back(tmp_path, suffix, n):
    tensor = vectors(n)
    embeddings.write(tmp_path / f"x{suffix}", {"S*": tensor})
    expect(embeddings.read(tmp_path / f"x{suffix}"), "S*", tensor)
    assert [path.name for path in tmp_path.iterdir()] == [f"x{suffix}"]


def test_a_star_alone_is_a_word_too(tmp_path):
    embeddings.write(tmp_path / "x.safetensors", {"*": vectors(1)})
    expect(embeddings.read(tmp_path / "x.safetensors"), "*", vectors(1))


def test_one_vector_is_written_flat(tmp_path):
    embeddings.write(tmp_path / "x.safetensors", {"S*": vectors(1), "two": vectors(2)})
    contents = load_file(tmp_path / "x.safetensors")
    assert contents["S*"].shape == (768,) and contents["two"].shape == (2, 768)


def test_automatic1111_form_is_plain(tmp_path):
    embeddings.write(tmp_path / "x.pt", {"cat": nn.Parameter(vectors(2))})
    contents = torch.load(tmp_path / "x.pt", weights_only=True)  # no ParameterDict, no Parameter
    assert contents["name"] == "cat" and contents["string_to_token"] == {"*": 265}
    [(key, tensor)] = contents["string_to_param"].items()
    assert type(contents["string_to_param"]) is dict and type(tensor) is torch.Tensor
    assert key == "*" and tensor.shape == (2, 768)


def test_a_row_of_a_table_is_written_without_the_table(tmp_path):
    table = torch.zeros(5000, 768)
    embeddings.write(tmp_path / "x.pt", {"S*": table[7:8]})
    assert (tmp_path / "x.pt").stat().st_size < 10_000


def test_same_words_give_the_same_bytes(tmp_path):
    for suffix in [".safetensors", ".pt"]:
        for name in ["a", "b"]:
            embeddings.write(tmp_path / f"{name}{suffix}", {"S*": vectors(2)})
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize(
    "name, words, found",
    [
        ("x.bin", {"S*": vectors(1)}, ".bin"),
        ("x", {"S*": vectors(1)}, "end the name in"),
        ("x.pt", {"a": vectors(1), "b": vectors(1)}, "2 words"),
        ("x.safetensors", {}, "0 words"),
        ("x.safetensors", {"S*": torch.full((1, 8), float("nan"))}, "NaN"),
        ("x.safetensors", {"": vectors(1)}, "the key ''"),
    ],
)
def test_refuses_to_write(tmp_path, name, words, found):
    with pytest.raises(ValueError, match=found):
        embeddings.write(tmp_path / name, words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "x.safetensors"
    embeddings.write(path, {"S*": vectors(1)})
    before = path.read_bytes()

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        embeddings.write(path, {"S*": vectors(1, seed=1)})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such folder"):
        embeddings.write(tmp_path / "none" / "x.pt", {"S*": vectors(1)})


# what diffusers makes of it


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = "abcdefghijklmnopqrstuvwxyz*<>"
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = transformers.CLIPTextConfig(
        vocab_size=len(pieces),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    # the loader of learned words uses the tokenizer and the text encoder, nothing else
    return diffusers.StableDiffusionPipeline(
        vae=None,
        unet=None,
        scheduler=None,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder),
        text_encoder=transformers.CLIPTextModel(config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_diffusers_loads_what_is_written(tmp_path, pipeline, suffix, n):
    word = f"<cat{n}{suffix[1:]}>"
    tensor = vectors(n, 16)
    embeddings.write(tmp_path / f"x{suffix}", {word: tensor})
    pipeline.load_textual_inversion(str(tmp_path), weight_name=f"x{suffix}")

    tokens = [word, *(f"{word}_{i}" for i in range(1, n))]
    prompt = pipeline.maybe_convert_prompt(f"a {word}", pipeline.tokenizer)
    assert pipeline.tokenizer.tokenize(prompt) == ["a</w>", *tokens]
    ids = pipeline.tokenizer.convert_tokens_to_ids(tokens)
    rows = pipeline.text_encoder.get_input_embeddings().weight[ids]
    assert_close(rows, tensor, rtol=0, atol=0)


# the command line


def run(*arguments):
    command = [sys.executable, "-m", "tinyti.embeddings", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_command_line_shows_and_converts(tmp_path):
    tensor = torch.zeros(2, 768)
    tensor[0, 0], tensor[1, 0] = 0.5, 2
    official(tmp_path / "cat.pt", {"*": tensor})
    result = run(tmp_path / "cat.pt", tmp_path / "out.safetensors")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0] == "cat: 2 x 768 (SD1), norm 0.500 2.000"
    expect(embeddings.read(tmp_path / "out.safetensors"), "cat", tensor)


def test_command_line_refuses_in_one_line(tmp_path):
    torch.save(Evil(tmp_path / "ran"), tmp_path / "evil.pt")
    result = run(tmp_path / "evil.pt", tmp_path / "out.pt")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "system" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pt"]


def test_command_line_overwrites_only_when_forced(tmp_path, capsys):
    embeddings.write(tmp_path / "in.pt", {"cat": vectors(1)})
    out = tmp_path / "out.pt"
    out.write_text("mine")
    assert embeddings.main([str(tmp_path / "in.pt"), str(out)]) == 2
    assert "--force" in capsys.readouterr().err and out.read_text() == "mine"
    assert embeddings.main([str(tmp_path / "in.pt"), str(out), "--force"]) == 0
    assert out.read_bytes() == (tmp_path / "in.pt").read_bytes()


def test_command_line_without_a_file(tmp_path, capsys):
    assert embeddings.main([str(tmp_path / "none.pt")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_command_line_shows_the_nearest_words_of_a_model(tmp_path, capsys, monkeypatch):
    words = ["<pad>", "dog", "cat", "kitten"]
    table = torch.tensor([[0.6, 0.8, 0], [0, 0, 5.0], [2, 0, 0], [1, 1, 0]])

    class Words:
        def word_ids(self):
            return [1, 2, 3]

        def token(self, id):
            return words[id]

    model = SimpleNamespace(text=SimpleNamespace(table=table), tokenizer=Words())
    monkeypatch.setattr(tinyti, "load", lambda path: model)
    embeddings.write(tmp_path / "x.pt", {"S*": torch.tensor([[0.5, 0, 0], [1, 1, 0]])})
    assert embeddings.main([str(tmp_path / "x.pt"), "--weights", "models/tiny"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "S*: 2 x 3, norm 0.500 1.414",
        "  near cat 1.00, kitten 0.71, dog 0.00",
        "  near kitten 1.00, cat 0.71, dog 0.00",
    ]

    embeddings.write(tmp_path / "x.pt", {"S*": vectors(1)})
    arguments = [str(tmp_path / "x.pt"), str(tmp_path / "out.pt"), "--weights", "models/tiny"]
    assert embeddings.main(arguments) == 2
    assert "768 (SD1), but the model has 3" in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()
