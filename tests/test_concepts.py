"""The main job on every set in concepts/, as the README says it: slow, run on demand (-m slow)."""

import json
import sys
import time

import pytest
import torch
from PIL import Image

import tinyti
import train as train_py
from tinyti import embeddings
from tinyti.data import to_image
from tinyti.metrics import clip_i

from .conftest import CONCEPTS, TINY

SETS = json.loads((CONCEPTS / "concepts.json").read_text())


def pictures(model, prompt, count=16):
    generator = torch.Generator().manual_seed(1)
    *_, x_0 = tinyti.sample(model, [prompt] * count, steps=30, guidance=5.0, generator=generator)
    return [to_image(x) for x in model.decode(x_0)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_the_word_beats_the_best_caption(name, tmp_path):
    """All defaults: the evaluation loss falls, and pictures of the word are nearer to the held-out ones than
    pictures of the best caption that the model's own language has.  The time taken is printed (aim: 90 s)."""
    style = SETS[name]["kind"] == "style"
    began = time.time()
    flags = ["--images", str(CONCEPTS / name), "--token", "S*", "--out", str(tmp_path / "S")]
    assert train_py.main(flags + (["--style"] if style else [])) == 0
    seconds = time.time() - began
    model = tinyti.load(TINY)
    clip, _ = tinyti.load_clip(TINY / "clip")
    for word, vectors in embeddings.read(tmp_path / "S").items():
        model.add_word(word, vectors)
    heldout = [Image.open(p).convert("RGB") for p in sorted((CONCEPTS / name / "heldout").glob("*.png"))]
    prompt = "a painting in the style of S*" if style else "a photo of S*"
    learned = clip_i(clip, pictures(model, prompt), heldout)
    caption = clip_i(clip, pictures(model, SETS[name]["caption"]), heldout)
    print(f"{name}: word {learned:.3f}, caption {caption:.3f}, {seconds:.0f} s", file=sys.stderr)
    assert learned > caption
