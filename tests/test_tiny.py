"""The bundled miniature, its world and its concepts are as described."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPModel

import tinyti
from tinyti.files import words
from tinyti.files.pictures import to_image
from weights.recipe import concepts, world

from .conftest import CONCEPTS, ROOT, TINY, last, relative_error, seeded


def draw(model, prompts, steps=20):
    return model.decode(last(tinyti.sample(model, prompts, steps, guidance=5.0, generator=seeded())))


def test_it_is_small():
    assert sum(f.stat().st_size for f in TINY.rglob("*") if f.is_file()) <= 30e6


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_diffusers_opens_it_and_draws_the_same_pictures(tmp_path, n, suffix):
    """From the same prompt and noise: before it knows a word, and of the word's file that tinyti writes."""
    model = tinyti.load(TINY)
    theirs = StableDiffusionPipeline.from_pretrained(TINY, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    x_T = torch.randn(1, 4, 16, 16, generator=seeded(3))

    def drawn():
        prompt, options = "a photo of a <boat> in the snow", {"guidance_scale": 5.0, "output_type": "pt"}
        reference = theirs(prompt, num_inference_steps=6, latents=x_T, **options).images
        x_0 = last(tinyti.sample(model, prompt, steps=6, guidance=5.0, x_T=x_T))
        assert reference.std() > 0.1
        assert (reference - (model.decode(x_0) + 1) / 2).abs().max() <= 1 / 255
        return x_0

    without = drawn()
    rows = model.text.table[model.tokenizer.encode("blue boat")][:n]
    words.write_words(tmp_path / f"word{suffix}", {"<boat>": rows})
    theirs.load_textual_inversion(str(tmp_path), weight_name=f"word{suffix}")
    [vectors] = words.read_words(tmp_path / f"word{suffix}").values()
    model.add_word("<boat>", vectors)  # a .pt is named after the file
    assert (drawn() - without).abs().max() > 0.1


def test_clip_is_a_published_clip_of_the_same_vocabulary(model):
    theirs = CLIPModel.from_pretrained(TINY / "clip", local_files_only=True).eval()
    clip, tokenizer = tinyti.load_clip(TINY / "clip")
    ids = tokenizer(["a photo of a cat", "a red boat in the snow"])
    features = theirs.get_text_features(ids)
    features = torch.nn.functional.normalize(getattr(features, "pooler_output", features), dim=-1)
    assert relative_error(features, clip.encode_text(ids)) <= 1e-5
    assert clip.text_model.config == model.text.config
    assert torch.equal(tokenizer(["S* 🐱 don't"]), model.tokenizer(["S* 🐱 don't"]))


@pytest.mark.parametrize("text", ["", "zażółć gęślą jaźń", "猫 🐈‍⬛", "\x00\ufffd", "a" * 500])
def test_any_text_tokenises(model, text):
    ids = model.tokenizer(text)
    assert ids.shape == (1, 77) and ids.max() < model.tokenizer.vocab_size == len(model.text.table)
    if text:
        assert model.tokenizer.end not in model.tokenizer.encode(text)  # nothing is unknown


def test_it_draws_what_it_is_told(model):
    """CLIP finds the caption of nearly every picture among those of all of them."""
    clip, tokenizer = tinyti.load_clip(TINY / "clip")
    lot = random.Random(0)
    prompts = [world.caption(world.attributes(lot), lot, complete=True) for _ in range(24)]
    pictures = [to_image(x) for x in draw(model, prompts)]
    likeness = clip.encode_image(pictures) @ clip.encode_text(tokenizer(prompts)).T
    assert (likeness.argmax(1) == torch.arange(len(prompts))).float().mean() >= 0.9


def test_clip_tells_things_apart(model):
    """Also where nothing else does: drawn and judged in every colour alike."""
    clip, tokenizer = tinyti.load_clip(TINY / "clip")
    prompts = [f"a photo of a {colour} {thing}" for thing in world.THINGS for colour in ("red", "blue")]
    pictures = [to_image(x) for x in draw(model, prompts)]
    nouns = clip.encode_text(tokenizer([f"a photo of a {thing}" for thing in world.THINGS]))
    found = (clip.encode_image(pictures) @ nouns.T).argmax(1)
    assert (found == torch.arange(len(prompts)) // 2).float().mean() >= 0.85


def test_the_background_has_the_colour_of_the_prompt(model):
    """Which plain noise would not bring about: the cure was offset noise (weights/tiny/README.md)."""
    colours = {"red": 0, "green": 1, "blue": 2}
    images = draw(model, [f"a photo of a white cup on a {c} background" for c in colours])
    corners = torch.cat([images[:, :, :6, :6], images[:, :, :6, -6:]], dim=3).mean((2, 3))  # (3, RGB)
    assert corners.argmax(1).tolist() == list(colours.values())


def test_the_world_is_decided_by_the_seed():
    (a, said, about), (b, said_again, _) = world.picture(7), world.picture(7)
    assert np.array_equal(np.asarray(a), np.asarray(b)) and said == said_again and a.size == (64, 64)
    assert world.picture(8)[1] != said
    assert np.array_equal(np.asarray(world.draw(about)), np.asarray(a))
    assert world.picture(7, size=128)[0].size == (128, 128)


def test_captions_say_what_is_there_and_cars_are_biased():
    lot, red, cars = random.Random(0), 0, 0
    for _ in range(2000):
        attrs = world.attributes(lot)
        full = world.caption(attrs, lot, complete=True)
        assert attrs["thing"] in full and attrs["colour"] in full
        cars += attrs["thing"] == "car"
        red += attrs["thing"] == "car" and attrs["colour"] == "red"
    assert 0.35 < red / cars < 0.65


def test_the_concepts_are_those_that_the_recipe_draws(tmp_path):
    sets = json.loads((CONCEPTS / "concepts.json").read_text())
    assert len(sets) >= 8 and sum(s["kind"] == "thing" for s in sets.values()) >= 6
    assert sum(s["kind"] == "style" for s in sets.values()) >= 2
    for name in sets:
        assert len(list((CONCEPTS / name).glob("*.png"))) == 5
        assert len(list((CONCEPTS / name / "heldout").glob("*.png"))) == 5
        assert Image.open(CONCEPTS / name / "01.png").size == (64, 64)
    assert concepts.markdown_table(sets) in (CONCEPTS / "README.md").read_text(encoding="utf-8")
    command = [sys.executable, "-m", "weights.recipe.concepts", "--out", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for made in tmp_path.rglob("*.png"):
        a, b = (np.asarray(Image.open(f), float) for f in (made, CONCEPTS / made.relative_to(tmp_path)))
        assert np.abs(a - b).mean() < 1  # other releases of Pillow round otherwise
    assert len(list(tmp_path.rglob("*.png"))) == 10 * len(sets) + len(list((CONCEPTS / "cars").iterdir()))
    assert sum(file.stat().st_size for file in (CONCEPTS / "cars").iterdir()) < 40_000
