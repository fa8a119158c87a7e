"""CLIP-I and CLIP-T are the formulas of the paper (2208.01618, section 5.1), written out pair by pair."""

import numpy as np
import pytest
from PIL import Image
from torch.nn.functional import cosine_similarity

from tinyti import load
from tinyti.metrics import clip_i, clip_t
from tinyti.networks.clip import TextConfig
from tinyti.networks.vision import CLIP, CLIPConfig, Preprocessing, VisionConfig

from .conftest import TINY, randomise

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return load(TINY).tokenizer


@pytest.fixture(scope="module")
def clip(tokenizer):
    """A tiny CLIP of random weights, whose pictures have 16 pixels a side."""
    size = len(tokenizer.core.get_vocab())
    text = TextConfig(vocab_size=size, eos_token_id=size - 1, **TOWER)
    config = CLIPConfig(text, VisionConfig(image_size=16, patch_size=8, **TOWER), projection_dim=12)
    return randomise(CLIP(config, Preprocessing(resize=16, crop=16)))


def noise(count, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in pixels]


def features(clip, picture):
    """What the image tower makes of one picture, at whatever length."""
    return clip.visual_projection(clip.vision_model(clip.preprocess([picture])))[0].detach()


def test_clip_i_is_the_mean_cosine_of_all_pairs(clip):
    pictures, references = noise(3, seed=0), noise(2, seed=1)
    pairs = [(features(clip, a), features(clip, b)) for a in pictures for b in references]
    cosines = [cosine_similarity(a, b, dim=0).item() for a, b in pairs]
    assert max(cosines) - min(cosines) > 1e-3
    assert clip_i(clip, pictures, references) == pytest.approx(sum(cosines) / 6, abs=1e-5)
    assert clip_i(clip, pictures[:1], pictures[:1]) == pytest.approx(1, abs=1e-5)


def test_clip_t_is_the_mean_cosine_of_pictures_with_a_prompt(clip, tokenizer):
    pictures, found = noise(3, seed=0), []
    for prompt in ("a photo of a cat", "a red car on the beach"):
        ids = tokenizer(prompt)
        end = ids[0].tolist().index(clip.config.text_config.eos_token_id)
        text = clip.text_projection(clip.text_model(clip.text_model.embed(ids))[0, end]).detach()
        expected = [cosine_similarity(features(clip, each), text, dim=0).item() for each in pictures]
        assert clip_t(clip, tokenizer, pictures, prompt) == pytest.approx(sum(expected) / 3, abs=1e-5)
        found.append(sum(expected) / 3)
    assert abs(found[0] - found[1]) > 1e-3
