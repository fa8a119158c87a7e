"""What diffusers makes of names with capitals; test_tiny.py has the pictures of the others."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

import tinyti
from tinyti.files.words import compatibility_warning, write_words

from .conftest import TINY


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
        vectors = torch.randn(n, pipeline.text_encoder.config.hidden_size)
        pipeline.load_textual_inversion(vectors, token=name)
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
