"""Models and words by name: first a path, then the cache without a network; a download only on request."""

import shutil
import socket
from fnmatch import fnmatch

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import sample as sample_py
import tinyti
import train as train_py
from tinyti.files import hub
from tinyti.files.words import write_words

from .conftest import CONCEPTS, ROOT, TINY

MODEL, WORD, COMMIT = "someone/tiny-model", "someone/a-word", "0123456789abcdef0123456789abcdef01234567"


def cached(cache, name, source):
    """A repository in the layout of the cache: blobs, and a snapshot of links to them."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    (root / "blobs").mkdir()
    for i, file in enumerate(file for file in sorted(source.rglob("*")) if file.is_file()):
        blob = root / "blobs" / f"{i:040x}"
        shutil.copy(file, blob)
        link = root / "snapshots" / COMMIT / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache with the miniature and a word of it, in which no socket may be opened."""
    folder = tmp_path_factory.mktemp("hub")
    word = tmp_path_factory.mktemp("word")
    write_words(word / "learned_embeds.safetensors", {"<w>": torch.full((2, 128), 0.1)})
    cached(folder, MODEL, TINY)
    cached(folder, WORD, word)

    def no_network(*_, **__):
        raise AssertionError("a network was used")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(folder))
        patch.setattr(socket.socket, "connect", no_network)
        yield folder


def test_names_are_found_in_the_cache(cache):
    found = hub.find_model(MODEL)
    assert found.is_dir() and found.name == COMMIT
    model = tinyti.load(found)
    assert torch.equal(model.unet.conv_in.weight, tinyti.load(TINY).unet.conv_in.weight)
    assert (hub.find_word(WORD) / "learned_embeds.safetensors").is_file()
    assert tinyti.load(cache / f"models--{MODEL.replace('/', '--')}").size == model.size  # the root itself


def test_a_path_that_exists_wins(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / MODEL).mkdir(parents=True)
    assert str(hub.find_model(MODEL)) == MODEL
    assert hub.find_model("weights/x.ckpt/y") == hub.Path("weights/x.ckpt/y")  # no name: for others to refuse


def test_what_is_not_there_is_one_line_with_the_flag_and_the_size(cache):
    with pytest.raises(FileNotFoundError, match=r"--download fetches the model of that name \(4.3 GB\)"):
        hub.find_model("stable-diffusion-v1-5/stable-diffusion-v1-5")
    with pytest.raises(FileNotFoundError, match="--download fetches the word"):
        hub.find_word("sd-concepts-library/cat-toy")


def test_a_download_takes_the_files_of_weights_readme_only(cache, monkeypatch):
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **how: asked.append((name, how)) or ""
    )
    hub.find_model("CompVis/ldm-text2im-large-256", download=True)
    hub.find_word(WORD, download=True)
    (model, how), (_, of_word) = asked
    assert model == "CompVis/ldm-text2im-large-256" and how["allow_patterns"] == ["*.json", "*.txt", "*.bin"]
    assert not how["local_files_only"] and of_word["allow_patterns"] == ["learned_embeds.*"]


def test_a_download_that_fails_is_one_line(cache, monkeypatch, tmp_path, capsys):
    def fail(*_, **__):
        raise ValueError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    flags = ["a cat", "--weights", "someone/elses", "--download", "--out", str(tmp_path / "p")]
    assert sample_py.main(flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "could not be downloaded (no network)" in error


def test_the_patterns_are_those_of_weights_readme():
    text = (ROOT / "weights" / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
    for name, (patterns, size) in hub.PATTERNS.items():
        commands = [line for line in text.splitlines() if line.startswith(f"hf download {name} ")]
        [command] = [line for line in commands if "-file" not in line]
        assert [f'"{pattern}"' for pattern in patterns] == [
            part.strip() for part in command.split("--include ")[1:]
        ]
        assert f"{size} GB" in text


# What the repositories hold, as published.
LISTED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (
        "model_index.json feature_extractor/preprocessor_config.json scheduler/scheduler_config.json "
        "text_encoder/config.json text_encoder/model.safetensors tokenizer/merges.txt tokenizer/vocab.json "
        "tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json unet/config.json "
        "unet/diffusion_pytorch_model.safetensors vae/config.json vae/diffusion_pytorch_model.safetensors",
        "v1-5-pruned.ckpt v1-5-pruned-emaonly.safetensors unet/diffusion_pytorch_model.bin "
        "unet/diffusion_pytorch_model.fp16.safetensors "
        "unet/diffusion_pytorch_model.non_ema.safetensors "
        "safety_checker/model.safetensors text_encoder/pytorch_model.bin "
        "vae/diffusion_pytorch_model.fp16.bin",
    ),
    "CompVis/ldm-text2im-large-256": (
        "model_index.json bert/config.json bert/pytorch_model.bin scheduler/scheduler_config.json "
        "tokenizer/vocab.txt unet/config.json unet/diffusion_pytorch_model.bin vqvae/config.json "
        "vqvae/diffusion_pytorch_model.bin",
        "README.md .gitattributes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTED)
def test_the_patterns_take_what_is_needed_and_no_other_weights(name):
    patterns, _ = hub.PATTERNS[name]
    needed, others = (files.split() for files in LISTED[name])
    assert all(any(fnmatch(file, pattern) for pattern in patterns) for file in needed)
    assert not [file for file in others if any(fnmatch(file, pattern) for pattern in patterns)]


def test_the_programs_take_names(cache, tmp_path, capsys):
    common = ["--weights", MODEL, "--steps"]
    flags = [
        "--images",
        str(CONCEPTS / "cat"),
        "--token",
        "<n>",
        "--out",
        str(tmp_path / "run"),
        "--size",
        "32",
    ]
    assert train_py.main([*flags, "--init", WORD, *common, "1"]) == 0
    flags = ["<w> <n>", "--words", WORD, str(tmp_path / "run"), "--count", "1", "--out", str(tmp_path / "p")]
    assert sample_py.main([*flags, *common, "2"]) == 0
    assert "its drawn world" not in capsys.readouterr().err
    assert sample_py.main(["a cat", "--weights", "weights/nowhere", "--out", str(tmp_path / "q")]) == 2
    assert "--download" in capsys.readouterr().err
