"""Editing: redrawing a picture or a region equals diffusers', masks keep the rest, noise can be recovered."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMInverseScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

import tinyti
from tinyti.diffusion import Schedule
from tinyti.editing import attention_maps, ddim_invert, from_image, in_region, overlay, paste, to_mask
from tinyti.files.pictures import read_image, to_image, to_tensor
from tinyti.networks.unet import Transformer

from . import published
from .conftest import CONCEPTS, TINY, last, relative_error, seeded

PROMPT = "a photo of a red boat in the snow"


@pytest.fixture(scope="module")
def photo(model):
    return to_tensor(read_image(CONCEPTS / "cat" / "01.png"), model.size)


def painted(size=(64, 64), box=(16, 8, 48, 40)):
    """A black mask with a white box, which falls on whole latents."""
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def their(kind, sampler):
    plain = StableDiffusionPipeline.from_pretrained(TINY, local_files_only=True)
    pipeline = kind(**plain.components, requires_safety_checker=False)
    pipeline.scheduler = published.SAMPLERS[sampler].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 0.6), ("ddpm", 0.0), ("dpm++", 0.0)])
def test_from_image_is_diffusers_img2img(model, photo, sampler, eta, strength):
    prompts, seeds = [PROMPT, "a painting of a cat"], (3, 4)
    options = {"strength": strength, "num_inference_steps": 12, "guidance_scale": 5.0, "eta": eta}
    options |= {"generator": seeded(seeds), "output_type": "pt"}
    pipeline = their(StableDiffusionImg2ImgPipeline, sampler)
    wanted = pipeline(prompts, image=torch.stack([photo, photo]), **options).images
    settings = {"steps": 12, "guidance": 5.0, "sampler": sampler, "eta": eta}
    path = list(from_image(model, prompts, photo, strength, generator=seeded(seeds), **settings))
    assert len(path) == int(12 * strength)
    assert wanted.std() > 0.1
    assert (wanted - (model.decode(path[-1]) + 1) / 2).abs().max() <= 1 / 255


def test_a_weaker_change_stays_nearer_to_the_picture(model, photo):
    differences = []
    for strength in (0.1, 0.5, 0.9):
        drawn = model.decode(last(from_image(model, PROMPT, photo, strength, 20, generator=seeded())))
        differences.append((drawn - photo).square().mean().item())
    assert differences[0] < differences[1] < differences[2]


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_in_region_is_diffusers_inpainting_with_a_plain_unet(model, photo, sampler):
    """Which at strength 1 begins with pure noise, too; the blended latents are equal, before any paste."""
    options = {"height": 64, "width": 64, "strength": 1.0, "num_inference_steps": 10, "guidance_scale": 5.0}
    options |= {"generator": seeded(), "output_type": "pt"}
    pipeline = their(StableDiffusionInpaintPipeline, sampler)
    wanted = pipeline(PROMPT, image=photo[None], mask_image=painted(), **options).images
    settings = {"steps": 10, "guidance": 5.0, "sampler": sampler, "generator": seeded()}
    x_0 = last(in_region(model, PROMPT, photo, to_mask(painted(), 64, feather=2), 1.0, **settings))
    assert wanted.std() > 0.1
    assert (wanted - (model.decode(x_0) + 1) / 2).abs().max() <= 1 / 255


@pytest.mark.parametrize("feather", [0, 2])
def test_outside_the_mask_every_pixel_is_the_pictures(model, photo, feather):
    mask = to_mask(painted(box=(15, 9, 46, 41)), 64, feather)
    x_0 = last(in_region(model, [PROMPT] * 2, photo, mask, steps=8, sampler="dpm++", generator=seeded()))
    pasted = paste(photo, model.decode(x_0), mask)
    outside = torch.ones(64, 64, dtype=torch.bool)
    outside[9:41, 15:46] = False
    assert torch.equal(pasted[..., outside], photo[:, outside].expand(2, -1, -1))
    before, after = (torch.from_numpy(np.array(to_image(x))) for x in (photo, pasted[0]))
    assert torch.equal(before[outside], after[outside])
    assert (pasted - photo)[..., 20:36, 22:40].abs().mean() > 0.1  # a white cat made way for a red boat
    assert not torch.equal(pasted[0], pasted[1])


def test_the_outside_guides_the_inside(model, photo):
    """The same noise and prompt, another picture around: the region itself comes out otherwise."""
    mask = to_mask(painted(), 64)
    other = to_tensor(read_image(CONCEPTS / "cat" / "04.png"), 64)
    settings = {"steps": 8, "sampler": "dpm++"}
    a, b = (last(in_region(model, PROMPT, p, mask, generator=seeded(), **settings)) for p in (photo, other))
    assert (a - b)[..., 3:9, 5:11].abs().mean() > 0.05


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16"])
def test_a_mask_may_have_any_mode_and_size(mode):
    picture = painted()
    if mode == "I;16":
        picture = Image.fromarray(np.array(picture).astype(np.uint16) * 257)
    mask = to_mask(picture if picture.mode == mode else picture.convert(mode), 64)
    assert mask.shape == (1, 64, 64) and mask.unique().tolist() == [0, 1] and mask.sum() == 32 * 32
    assert mask[0, 8:40, 16:48].all()
    wide = painted((96, 64), (32, 8, 64, 40))  # of which the middle counts
    for other in (painted((256, 256), (64, 32, 192, 160)), wide):
        assert (to_mask(other, 64) - mask).abs().mean() < 0.02


def test_grey_is_half_and_what_jpeg_leaves_near_black_is_black():
    levels = Image.new("L", (64, 64))
    for left, level in ((0, 0), (16, 10), (32, 128), (48, 250)):
        levels.paste(level, (left, 0, left + 16, 64))
    assert to_mask(levels, 64)[0, 0, 8::16].tolist() == pytest.approx([0, 0, 0.5, 1], abs=0.01)


def test_a_feathered_edge_is_soft_and_lies_inside():
    hard, soft = to_mask(painted(), 64), to_mask(painted(), 64, feather=3)
    assert (soft[hard == 0] == 0).all()
    row = soft[0, 24, 16:48]  # across the box
    assert 0 < row[0] < 0.3 and row[:7].diff().gt(0).sum() >= 5 and row[10] == 1
    assert torch.equal(row, row.flip(0))
    at_the_border = to_mask(painted(box=(0, 0, 32, 64)), 64, feather=3)
    assert (at_the_border[:, :, :20] == 1).all()  # no edge where the picture ends


def psnr(a, b):
    """Of images in [-1, 1], in dB."""
    return -10 * ((a - b) / 2).square().mean().log10().item()


def test_the_picture_returns_from_its_own_noise(model, photo):
    """And more exactly with more iterations; not with another prompt, and not from other noise."""
    prompt, options = "a photo of a white cat", {"steps": 12, "guidance": 1.0}
    wanted = model.vae.decode(model.vae.encode(photo[None])[0]).clamp(-1, 1)

    def returned(x_T, prompt=prompt):
        return psnr(wanted, model.decode(last(tinyti.sample(model, prompt, x_T=x_T, **options))))

    usual, exact = (last(ddim_invert(model, prompt, photo, 12, iterations=n)) for n in (1, 4))
    assert usual.shape == (1, 4, 16, 16) and 0.7 < usual.std() < 1.2
    assert 30 < returned(usual) < returned(exact) - 10
    assert returned(usual, PROMPT) < returned(usual) - 10
    assert returned(torch.randn(usual.shape, generator=seeded())) < 15


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_step_up_undoes_a_step_down(prediction, spacing):
    schedule = Schedule(prediction_type=prediction, timestep_spacing=spacing, set_alpha_to_one=False)
    x, output = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64, generator=seeded())
    for t in schedule.timesteps(10):
        x_0, eps = schedule.split(x, output, t)
        below = schedule.ddim_step(x_0, eps, t, t - 100)
        assert relative_error(x, schedule.ddim_inverse_step(below, eps, t - 100, t)) <= 1e-12


def test_inversion_is_diffusers(model, photo):
    theirs = DDIMInverseScheduler.from_config(DDIMInverseScheduler.load_config(TINY / "scheduler"))
    theirs.set_timesteps(10)
    x = model.vae.encode(photo[None])[0] * model.vae.config.scaling_factor
    context = model.encode_prompts([PROMPT])
    for t, x_t in zip(theirs.timesteps, ddim_invert(model, PROMPT, photo, 10), strict=True):
        x = theirs.step(model.unet(x, t, context), t, x).prev_sample
        assert relative_error(x, x_t) <= 1e-4


def test_attention_maps_are_the_probabilities_of_attention(model):
    """Head by head, from the layers' own inputs, of which guidance makes the second half the prompts'."""
    prompts = ["a cat", "a photo of a cat"]
    places = (model.tokenizer(prompts) == model.tokenizer.encode("cat")[0]).int().argmax(dim=1)
    seen = []
    layers = [m.transformer_blocks[0].attn2 for m in model.unet.modules() if isinstance(m, Transformer)]
    hooks = [m.register_forward_hook(lambda layer, args, _: seen.append((layer, *args))) for m in layers]
    with attention_maps(model, prompts, "cat", (8, 8)) as heat:
        last(tinyti.sample(model, prompts, 1, 3.0, x_T=torch.randn(2, 4, 16, 16, generator=seeded())))
    for hook in hooks:
        hook.remove()
    for row, place in enumerate(places):
        maps = []
        for layer, x, context in seen:
            side = int(x.shape[1] ** 0.5)
            q, k = layer.to_q(x[2 + row]), layer.to_k(context[2 + row])
            for q, k in zip(q.chunk(layer.heads, dim=-1), k.chunk(layer.heads, dim=-1)):  # noqa: B020
                probabilities = torch.softmax(q @ k.T / q.shape[-1] ** 0.5, dim=-1)[:, place]
                one = probabilities.reshape(1, 1, side, side)
                maps.append(F.interpolate(one, (8, 8), mode="bilinear")[0, 0])
        assert relative_error(torch.stack(maps).mean(dim=0), heat[row]) <= 1e-4
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.unet.modules())


def test_attention_to_a_learned_word_is_found_and_changes_no_picture(model):
    model.add_word("S*", model.text.table[model.tokenizer.encode("red boat")])
    options = {"steps": 2, "x_T": torch.randn(1, 4, 16, 16, generator=seeded())}
    plain = last(tinyti.sample(model, "a photo of S*", **options))
    with attention_maps(model, "a photo of S*", "S*") as heat:
        assert torch.equal(last(tinyti.sample(model, "a photo of S*", **options)), plain)
    with attention_maps(model, "a photo of red boat", "red boat") as of_words:
        last(tinyti.sample(model, "a photo of red boat", **options))
    assert heat.shape == (1, 64, 64) and heat.min() > 0 and relative_error(of_words, heat) <= 1e-4


def test_an_overlay_is_red_where_the_heat_is_and_the_picture_where_there_is_least():
    pictures = torch.rand(2, 3, 4, 4, generator=seeded())
    heat = torch.zeros(2, 4, 4)
    heat[0, 1, 2], heat[0, 3, 3] = 0.3, 0.6
    drawn = overlay(pictures, heat)
    assert torch.equal(drawn[0, :, 0], pictures[0, :, 0]) and torch.equal(drawn[1], pictures[1])
    red = torch.tensor([1.0, -1.0, -1.0])
    torch.testing.assert_close(drawn[0, :, 3, 3], 0.2 * pictures[0, :, 3, 3] + 0.8 * red)
    torch.testing.assert_close(drawn[0, :, 1, 2], 0.6 * pictures[0, :, 1, 2] + 0.4 * red)


REFUSED = {
    "strength is 0.0 of 50 steps": lambda m, p: from_image(m, "a cat", p, strength=0.0),
    "strength is 1.5": lambda m, p: from_image(m, "a cat", p, strength=1.5),
    "leave a step": lambda m, p: from_image(m, "a cat", p, strength=0.1, steps=5),
    "30 × 64 pixels: this model takes multiples of 4": lambda m, p: from_image(m, "a cat", p[:, :30]),
    "mask has 1×32×64 values": lambda m, p: in_region(m, "a cat", p, torch.ones(1, 32, 64)),
    "steps is 2000": lambda m, p: ddim_invert(m, "a cat", p, steps=2000),
    "iterations is 0": lambda m, p: ddim_invert(m, "a cat", p, iterations=0),
    "black everywhere": lambda m, p: to_mask(Image.new("L", (9, 9)), 64),
    "less than 5 pixels": lambda m, p: to_mask(painted(box=(8, 8, 11, 64)), 64, feather=2),
    "white everywhere": lambda m, p: to_mask(Image.new("RGBA", (9, 9)), 64),
    "'dog' does not .* 'a cat'": lambda m, p: attention_maps(m, ["a dog", "a cat"], "dog").__enter__(),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_requests_are_named(model, photo, message):
    with pytest.raises(ValueError, match=message):
        next(REFUSED[message](model, photo))
