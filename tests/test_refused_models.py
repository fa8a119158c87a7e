"""A file that is no model, a damaged one or one of another family gives one clear line and runs no code."""

import json
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import save as serialize

import tinyti
from tinyti.files.folder import DOWNLOAD, build
from tinyti.files.single import read_single_file, read_text_transformer
from tinyti.files.tensors import read_tensors

from .conftest import TINY, Evil, saved


def fails(kind, path, *words, load=tinyti.load, **settings):
    """Loading fails with one error of this kind and of one line, which has all these words."""
    with pytest.raises(kind) as caught:
        load(path, **settings)
    message = str(caught.value)
    assert type(caught.value) is kind and caught.value.__cause__ is None
    assert "\n" not in message and len(message) < 1100
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def damaged(folder, file, damage):
    """The model in weights/ with one file damaged; the rest are links.

    None: the file is gone; text: its contents; a number: where it is cut off; a dictionary: other settings,
    or other shapes of tensors, None for a tensor that is gone.
    """
    shutil.copytree(TINY, folder, copy_function=os.symlink)
    path = folder / file
    if path.is_dir():
        shutil.rmtree(path)
        return folder
    content = path.read_bytes()
    path.unlink()
    if isinstance(damage, str):
        path.write_text(damage)
    elif isinstance(damage, int):
        path.write_bytes(content[:damage])
    elif damage and path.suffix == ".json":
        path.write_text(json.dumps(json.loads(content) | damage))
    elif damage:
        weights = {key.removeprefix("text_model."): w for key, w in load_file(TINY / file).items()}
        save_file(reshaped(weights, damage), path)
    return folder


def reshaped(weights, changes):
    """Weights of which some have another shape, are gone (None) or stand there twice, side by side (2)."""
    weights = dict(weights)
    for key, shape in changes.items():
        weight = weights.pop(key, None)
        if shape == 2:
            weights[key] = torch.cat([weight, weight], dim=-1)
        elif shape is not None:
            weights[key] = torch.zeros(shape)
    return weights


# -- folders -------------------------------------------------------------------------------------------------

UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
TO_K = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
SHORTCUT = "encoder.down_blocks.1.resnets.0.conv_shortcut.weight"
KEYS = [  # a file, a name in it and its shape
    ("unet/diffusion_pytorch_model.safetensors", TO_K, (128, 128)),
    ("vae/diffusion_pytorch_model.safetensors", SHORTCUT, (64, 32, 1, 1)),
    ("text_encoder/model.safetensors", "encoder.layers.2.mlp.fc1.bias", (512,)),
]
JUNK = {"{": "line 1", "[" * 100_000: "", "[]": "it holds a list", "1" * 10_000: "", "\xff": "line 1"}
SETTINGS = [  # that would change the numbers
    (UNET, {"only_cross_attention": True}, "only_cross_attention is True, expected False"),
    (UNET, {"freq_shift": 1}, "freq_shift is 1, expected 0"),
    (TEXT, {"use_attention_mask": True}, "use_attention_mask is True, expected False"),
    (VAE, {"shift_factor": 0.1}, "shift_factor is 0.1, expected None"),
    (VAE, {"latents_mean": [0.0] * 4}, "latents_mean is (0.0, 0.0, 0.0, 0.0), expected None"),
    (TEXT, {"hidden_act": "relu"}, "hidden_act is 'relu', expected 'quick_gelu' or 'gelu'"),
    (SCHEDULER, {"prediction_type": "sample"}, "prediction_type is 'sample', expected 'epsilon' or"),
    (SCHEDULER, {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is 'squaredcos_cap_v2', expected "),
    (SCHEDULER, {"timestep_spacing": "karras"}, "timestep_spacing is 'karras', expected 'leading' or"),
    (SCHEDULER, {"trained_betas": [0.1, 0.2]}, "trained_betas is (0.1, 0.2), expected None"),
    (SCHEDULER, {"thresholding": True}, "thresholding is True, expected False"),
    (SCHEDULER, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr works with v_prediction only"),
]
FOLDERS = [  # a file, its damage, and words in the error
    *((file, None, [f"m/{file} is missing", "weights/README.md"]) for file in (UNET, VAE, TEXT, SCHEDULER)),
    ("unet/diffusion_pytorch_model.safetensors", None, ["m/unet has no weights", "weights/README.md"]),
    ("text_encoder/model.safetensors", None, ["m/text_encoder has no weights", "weights/README.md"]),
    ("tokenizer", None, ["no vocabulary at", "m/tokenizer", "--tokenizer"]),
    *((file, {key: (3, 5)}, [key, "(3, 5)", str(shape)]) for file, key, shape in KEYS),
    *((file, {key: None}, [key, f"has nothing, expected floats of shape {s}"]) for file, key, s in KEYS),
    *((file, {key + "_2": (1,)}, [key + "_2", "expected nothing"]) for file, key, _ in KEYS),
    ("text_encoder/model.safetensors", {"text_model.final_layer_norm.weight": (1,)}, ["norm.weight twice"]),
    *((file, -1, [file, "does not describe a file of weights", "download it again"]) for file, *_ in KEYS),
    *((UNET, junk, [UNET, "does not describe a JSON object", found]) for junk, found in JUNK.items()),
    *((SCHEDULER, junk, [SCHEDULER, "a JSON object", found]) for junk, found in JUNK.items()),
    (UNET, {"in_channels": 9}, ["an inpainting model", "9 channels", "supported are"]),
    (UNET, {"in_channels": 5}, ["a model of another kind", "5 channels", "supported are"]),
    *((file, damage, [f"m/{file}", words, "supported are"]) for file, damage, words in SETTINGS),
]


@pytest.mark.parametrize("file, damage, words", FOLDERS)
def test_damaged_folders(file, damage, words, tmp_path):
    folder = damaged(tmp_path / "m", file, damage)
    fails(FileNotFoundError if damage is None else ValueError, folder, *words)


NONSENSE = [  # a part, a setting, and values of it that no network has
    ("unet", "block_out_channels", ["abc", [], [32, 64], [32, 64, "x"], [33, 64, 128], 5, [10**30]]),
    ("unet", "attention_head_dim", [3, 0, -1, [4], "4", {}, 10**9]),
    ("unet", "layers_per_block", [10**9, 0, 1.5, True]),
    ("unet", "norm_eps", [0, -1.0, "1e-5", [1]]),
    ("unet", "norm_num_groups", [7, 0, 10**18]),
    ("unet", "sample_size", [[16, 16]]),
    ("unet", "down_block_types", ["abc", [1, 2, 3], ["DownBlock2D"]]),
    ("unet", "cross_attention_dim", [[128], 10**19]),
    ("vae", "block_out_channels", ["abc", [], [7], [[]]]),
    ("vae", "layers_per_block", [-1, 10**9]),
    ("vae", "scaling_factor", [0, "x"]),
    ("vae", "norm_num_groups", [0, 13]),
    ("vae", "latent_channels", ["4", 10**6]),
    ("text_encoder", "num_attention_heads", [5, 0, "8"]),
    ("text_encoder", "num_hidden_layers", [10**12]),
    ("text_encoder", "vocab_size", [-1]),
    ("text_encoder", "hidden_size", [None, 1, "x"]),
    ("text_encoder", "layer_norm_eps", [float("nan"), float("inf")]),
    ("text_encoder", "max_position_embeddings", [5, [77]]),
    ("text_encoder", "hidden_act", [["gelu"], 5]),
    ("scheduler", "beta_end", [5, "0.1", [0.1], -1]),
    ("scheduler", "num_train_timesteps", [0, "x", 10**30, 1.5]),
    ("scheduler", "timestep_spacing", [1, []]),
    ("scheduler", "set_alpha_to_one", ["yes", 3.5]),
]


@pytest.mark.parametrize("part, name, values", NONSENSE)
def test_nonsense_in_a_configuration(part, name, values, tmp_path):
    file = SCHEDULER if part == "scheduler" else f"{part}/config.json"
    for i, value in enumerate(values):
        folder = damaged(tmp_path / f"two\nlines{i}", file, {name: value})
        fails(ValueError, folder, f"two lines{i}/{part}")


NO_PREPROCESSING = [("crop_size", 999), ("crop_size", {"height": 16}), ("size", "big"), ("size", [])]
NO_PREPROCESSING += [("image_std", [0, 1, 1]), ("image_mean", 5), ("resample", 99)]


@pytest.mark.parametrize("name, value", NO_PREPROCESSING)
def test_nonsense_in_a_preprocessing(name, value, tmp_path):
    folder = damaged(tmp_path / "m", "clip/preprocessor_config.json", {name: value})
    fails(ValueError, folder / "clip", "m/clip", load=tinyti.load_clip)


def test_a_folder_that_is_no_clip():
    path, load = TINY / "text_encoder", tinyti.load_clip
    fails(ValueError, path, "text_encoder/config.json lacks text_config", load=load)
    fails(FileNotFoundError, TINY / "nowhere", "nowhere/config.json is missing", load=load)


def test_nothing_there_and_folders_of_other_families(tmp_path):
    for name in ("nowhere", "nowhere/model.ckpt"):
        fails(FileNotFoundError, tmp_path / name, name, "weights/README.md", DOWNLOAD)
    fails(FileNotFoundError, tmp_path, "config.json is missing", "whole model folder")
    for part in ("transformer", "text_encoder_2"):
        (tmp_path / part).mkdir()
        fails(ValueError, tmp_path, f"it has a {part}, as Stable Diffusion XL", "supported are Stable")
        (tmp_path / part).rmdir()


def test_arguments_that_no_model_takes():
    words = ("fp16 is for GPUs", "torch.float32", "torch.bfloat16")
    fails(ValueError, TINY, *words, dtype=torch.float16)
    fails(ValueError, TINY, "prediction is 'eps'; it is epsilon, v_prediction", prediction="eps")


def test_vocabularies_that_are_not_the_models(sd1, tmp_path):
    path = sd1.single(tmp_path / "m.safetensors")
    (tmp_path / "tokenizer").unlink()
    fails(FileNotFoundError, path, "no vocabulary at", "tokenizer, ", "--tokenizer")
    fails(FileNotFoundError, path, "no vocabulary at", "nowhere", tokenizer=tmp_path / "nowhere")
    big = tmp_path / "big"
    big.mkdir()
    fails(FileNotFoundError, path, "big: found nothing, expected tok", tokenizer=big)
    words = [*(f"{i:04}" for i in range(3000)), "<|startoftext|>", "<|endoftext|>"]
    (big / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (big / "merges.txt").write_text("#version: 0.2\n")
    for target in (path, sd1.folder):
        fails(ValueError, target, "3002 entries", "523 rows", tokenizer=big)


# -- single files --------------------------------------------------------------------------------------------

UNET_MARK, VAE_MARK, TEXT_MARK = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
CLIP_MARK = TEXT_MARK + "transformer.text_model."
MISSING = {  # in the file, and in the error; the first are those that the configuration is read from
    UNET_MARK + "input_blocks.0.0.weight": "conv_in.weight",
    UNET_MARK + "input_blocks.1.0.in_layers.2.weight": "down_blocks.0.resnets.0.conv1.weight",
    UNET_MARK + "middle_block.1.proj_in.weight": "mid_block.attentions.0.proj_in.weight",
    UNET_MARK + "middle_block.1.transformer_blocks.0.attn2.to_k.weight": "attn2.to_k.weight",
    VAE_MARK + "encoder.down.1.block.0.conv1.weight": "encoder.down_blocks.1.resnets.0.conv1.weight",
    CLIP_MARK + "embeddings.token_embedding.weight": "token_embedding.weight",
    CLIP_MARK + "encoder.layers.0.mlp.fc1.weight": "layers.0.mlp.fc1.weight",
    UNET_MARK + "input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
    UNET_MARK + "output_blocks.5.2.conv.bias": "up_blocks.1.upsamplers.0.conv.bias",
    VAE_MARK + "decoder.up.1.upsample.conv.weight": "decoder.up_blocks.0.upsamplers.0.conv.weight",
    VAE_MARK + "decoder.mid.attn_1.q.bias": "decoder.mid_block.attentions.0.to_q.bias",
    CLIP_MARK + "final_layer_norm.bias": "final_layer_norm.bias",
}
LEFT_OVER = {
    UNET_MARK + "input_blocks.1.2.weight": "2.weight",
    "control_model.input_blocks.0.0.weight": "0.weight",
    VAE_MARK + "decoder.up.0.attn.0.q.weight": "q.weight",
    "model_ema_2.decay": "model_ema_2.decay",
    CLIP_MARK + "head.weight": "head.weight",
}
CHANGES = [  # what becomes of a tensor, and words in the error
    *((key, None, [words, "supported are"]) for key, words in MISSING.items()),
    *((key, 2, ["shape", "expected"]) for key in MISSING),
    *((key, (1,), [words, "expected nothing", "supported are"]) for key, words in LEFT_OVER.items()),
    (UNET_MARK + "input_blocks.0.0.weight", (32, 9, 3, 3), ["an inpainting model", "9 channels"]),
    (UNET_MARK + "input_blocks.0.0.weight", (32, 5, 3, 3), ["a model of another kind", "5 channels"]),
]


@pytest.mark.parametrize("key, change, words", CHANGES)
def test_changed_single_files(sd1, key, change, words, tmp_path):
    weights = reshaped(sd1.original, {key: change})
    fails(ValueError, sd1.single(tmp_path / "m.safetensors", weights), "m.safetensors", *words)


OTHERS = [
    "conditioner.embedders.1.model.ln_final.weight",  # Stable Diffusion XL
    "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight",  # Stable Diffusion 3
    "double_blocks.0.img_attn.proj.weight",  # Flux
    "down_blocks.0.resnets.0.conv1.weight",  # a part of a folder
]


@pytest.mark.parametrize("key", OTHERS)
@pytest.mark.parametrize("ending, save", [("safetensors", save_file), ("ckpt", torch.save)])
def test_files_of_other_families(key, ending, save, tmp_path):
    # SDXL's files have a UNet and a VAE under the same names as ours.
    keys = (UNET_MARK + "out.2.bias", VAE_MARK + "quant_conv.bias", key)
    save({key: torch.zeros(4) for key in keys}, tmp_path / f"m.{ending}")
    fails(ValueError, tmp_path / f"m.{ending}", f"m.{ending}", "no cond_stage_model.* keys", "supported are")


@pytest.mark.parametrize("unet, text", [("sd1", "sd2"), ("sd2", "ldm"), ("ldm", "sd2")])
def test_a_file_whose_parts_are_of_two_families(unet, text, tmp_path, request):
    unet, text = request.getfixturevalue(unet), request.getfixturevalue(text)
    other = {k.removeprefix(TEXT_MARK): w for k, w in text.original.items() if k.startswith(TEXT_MARK)}
    path = unet.single(tmp_path / "m.safetensors", unet.with_text(other))
    fails(ValueError, path, "does not describe a latent diffusion model", prediction="epsilon")


@pytest.mark.parametrize("width, sd2", [(768, True), (1024, False)])
def test_a_clip_of_the_other_familys_width(width, sd2):
    text = {
        "embeddings.token_embedding.weight": torch.zeros(9, width),
        "embeddings.position_embedding.weight": torch.zeros(77, width),
        "encoder.layers.0.mlp.fc1.weight": torch.zeros(1, width),
    }
    assert read_text_transformer(text, not sd2)[1].hidden_act == ("quick_gelu" if sd2 else "gelu")
    with pytest.raises(ValueError, match=f"width {width}"):
        read_text_transformer(text, sd2)


# -- files that hold something else --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.ckpt", "m.bin", "m.pt", "m.safetensors"])
def test_no_weights_at_all(name, tmp_path):
    """What git leaves for a large file, a web page, nothing, half a picture, other pickles, cut files."""
    zero = torch.zeros(1)
    contents = [b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 4265380512\n"]
    contents += [b"<!DOCTYPE html><html>", b"", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", pickle.dumps([1, 2])]
    contents += map(saved, ([zero], zero, {"state_dict": 5}, {}, {"lr": 1.0}, {0: zero}))
    weights = {"a.weight": torch.zeros(2, 2), "b": torch.ones(300)}
    whole = [saved(weights), saved(weights, _use_new_zipfile_serialization=False), serialize(weights)]
    contents += [data[:keep] for data in whole for keep in (4, len(data) // 2, -1)]
    for content in contents:
        (tmp_path / name).write_bytes(content)
        fails(ValueError, tmp_path / name, name, "does not describe a")


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "unet/config.json", "m.ckpt"])
def test_what_is_no_regular_file_is_not_opened(file, tmp_path):
    """A pipe, which would wait for ever, and a device that never ends."""
    shutil.copytree(TINY, tmp_path / "m", copy_function=os.symlink)
    path = tmp_path / "m" / file
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        path.unlink(missing_ok=True)
        make(path)
        with pytest.raises((ValueError, FileNotFoundError), match=r"unet|not a regular file"):
            tinyti.load(path if file == "m.ckpt" else tmp_path / "m")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("place", ["bin", "ckpt", "ckpt beside the weights"])
def test_code_in_a_pickle_never_runs(sd1, zipped, place, tmp_path):
    attack = Evil(tmp_path / "proof")
    path = target = tmp_path / "m.ckpt"
    content = attack if place == "ckpt" else {"state_dict": sd1.original, "callbacks": attack}
    if place == "bin":
        file = "unet/diffusion_pytorch_model.safetensors"
        target = damaged(tmp_path / "m", file, None)
        path, content = (target / file).with_suffix(".bin"), load_file(TINY / file) | {"conv_in.bias": attack}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    torch.load(path, weights_only=False)
    (tmp_path / "proof").unlink()  # the attack is real
    fails(ValueError, target, str(path), "open, which was not run", "as .safetensors")
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_bytes_changed_at_random(zipped, tmp_path):
    """Weights, or an error of ours that names the file, and nothing else."""
    rng = np.random.default_rng(0)
    weights = {"a.weight": torch.zeros(2, 2), "b": torch.ones(3)}
    clean = saved({"state_dict": weights, "epoch": 1}, _use_new_zipfile_serialization=zipped)
    outcomes = set()
    for _ in range(500):
        content = bytearray(clean)
        for place in rng.integers(0, len(content), 3):
            content[place] = rng.integers(256)
        (tmp_path / "m.bin").write_bytes(content)
        try:
            outcomes.add(type(read_tensors(tmp_path / "m.bin")))
        except ValueError as error:
            assert "m.bin" in str(error)
            outcomes.add(ValueError)
    assert outcomes == {dict, ValueError}


def random_damage(weights, dice):
    """One entry with another type, shape or name."""
    damaged, key = dict(weights), dice.choice(sorted(weights))
    weight, huge = damaged[key], key.replace("1", "9" * 5000)
    new = [5, None, "x", [], {}, torch.tensor(1.0), torch.zeros(0), torch.zeros(3, dtype=torch.int64)]
    new += [torch.zeros(2, 2).to_sparse(), torch.zeros(2, dtype=torch.complex64), weight.bool(), weight[None]]
    new += [torch.zeros(1, device="meta"), torch.zeros(1).expand(weight.shape[:1])]
    if dice.random() < 0.3:
        del damaged[key]
        damaged[dice.choice([key + ".0", "", "\n", key[:-7], key.upper(), 7, huge])] = weight
    else:
        damaged[key] = dice.choice(new)
    return damaged


def test_entries_changed_at_random(sd1, ldm, tmp_path):
    """Types, shapes and names: a model, or one line that names the file."""
    dice = random.Random(0)
    for model in (sd1, ldm):
        for _ in range(15):
            torch.save(random_damage(model.original, dice), tmp_path / "m.ckpt")
            try:
                parts = read_single_file(tmp_path / "m.ckpt", "epsilon")
                for part in (parts.unet, parts.vae, parts.text):
                    build(*part)
            except ValueError as error:
                assert "m.ckpt" in str(error) and "\n" not in str(error)
