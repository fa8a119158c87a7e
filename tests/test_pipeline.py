"""From prompt to picture: ours equal diffusers' whole pipelines, from the folders that these saved."""

from functools import partial

import pytest
import torch
from torch.cuda._utils import _get_device_index

import tinyti
from tinyti.diffusion import denoise, randn
from tinyti.programs.cli import pick_device

from . import published
from .conftest import TINY, last, relative_error, seeded

PROMPTS = ["a photo of a cat", "Dog's  photo, 猫 of 3!"]
SIZE = (16, 24)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Each family's pipeline and its folder."""
    made = {}
    for family in ("sd1", "sd2", "ldm"):
        root = tmp_path_factory.mktemp(family)
        make = published.tiny_ldm if family == "ldm" else partial(published.tiny_stable_diffusion, family)
        theirs = make(root / "vocabulary")
        theirs.set_progress_bar_config(disable=True)
        theirs.save_pretrained(root / "model")
        made[family] = theirs, root / "model"
    return made


def prepare(pipelines, family, sampler, **settings):
    """Theirs with this scheduler, and ours, loaded from the folder that says so."""
    theirs, folder = pipelines[family]
    kind, settings = published.SAMPLERS[sampler], published.SCHEDULER | settings
    known = kind().config
    theirs.scheduler = kind(**{name: value for name, value in settings.items() if name in known})
    theirs.scheduler.save_pretrained(folder / "scheduler")
    return theirs, tinyti.load(folder)


def compare(theirs, ours, seeds=5, prompts=PROMPTS, negative="", **settings):
    """The same seeds into both: equal latents after every step, and equal pictures -> the last latents."""
    settings = {"sampler": "ddim", "eta": 0.0, "steps": 6, "guidance": 7.5} | settings
    path = []

    def remember(pipeline, i, t, state):
        path.append(state["latents"].clone())
        return state

    options = {"height": SIZE[0], "width": SIZE[1], "negative_prompt": [negative] * len(prompts)}
    options |= {"num_inference_steps": settings["steps"], "guidance_scale": settings["guidance"]}
    options |= {"eta": settings["eta"], "generator": seeded(seeds)}
    wanted = theirs(prompts, output_type="pt", callback_on_step_end=remember, **options).images
    settings |= {"negative": negative, "generator": seeded(seeds), "size": SIZE}
    trajectory = list(tinyti.sample(ours, prompts, **settings))
    assert len(trajectory) == settings["steps"]
    for wanted_t, x_t in zip(path, trajectory, strict=True):
        assert relative_error(wanted_t, x_t) <= 1e-4
    assert_same_picture(wanted, ours.decode(trajectory[-1]))
    return trajectory[-1]


def assert_same_picture(wanted, images):
    picture = images / 2 + 0.5
    assert wanted.shape == picture.shape
    assert ((wanted > 0.01) & (wanted < 0.99)).float().mean() > 0.5, "few pixels that could differ"
    assert wanted.std() > 0.05
    assert (wanted - picture).abs().max() <= 1e-3
    assert ((wanted * 255).round() - (picture * 255).round()).abs().max() <= 1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 0.7), ("ddpm", 0.0), ("dpm++", 0.0)])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_stable_diffusion(pipelines, family, sampler, eta, prediction):
    theirs, ours = prepare(pipelines, family, sampler, prediction_type=prediction, timestep_spacing="leading")
    compare(theirs, ours, sampler=sampler, eta=eta)


def test_prompt_negative_prompt_and_guidance_all_matter(pipelines):
    theirs, ours = prepare(pipelines, "sd1", "ddim")
    changes = [{}, {"negative": "dog"}, {"guidance": 3.0}, {"guidance": 1.0}, {"prompts": ["dog"]}]
    latents = [compare(theirs, ours, **{"steps": 3, "prompts": PROMPTS[:1]} | change) for change in changes]
    for i, x_0 in enumerate(latents):
        assert all(relative_error(x_0, other) > 0.01 for other in latents[:i])


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.7), ("ddpm", 0.0)])
def test_a_picture_does_not_depend_on_its_batch(pipelines, sampler, eta):
    theirs, ours = prepare(pipelines, "sd1", sampler)
    batch = compare(theirs, ours, (1, 2), sampler=sampler, eta=eta)
    alone = compare(theirs, ours, 2, PROMPTS[1:], sampler=sampler, eta=eta)
    assert relative_error(batch[1:], alone) <= 1e-4


def test_initial_noise_takes_the_place_of_a_draw(pipelines):
    theirs, ours = prepare(pipelines, "sd1", "ddim")
    drawn = compare(theirs, ours, steps=2)
    noise = torch.randn(2, 4, 8, 12, generator=seeded(5))
    assert torch.equal(last(tinyti.sample(ours, PROMPTS, steps=2, x_T=noise)), drawn)


def test_sizes(pipelines):
    """A latent is 2 × 2 pixels here, and the UNet halves twice."""
    _, ours = prepare(pipelines, "sd1", "ddim")
    for size in ((8, 8), (10, 4096), (30, 14)):
        ours.check_size(*size)
    for size in ((0, 8), (-8, 8), (7, 8), (8, 9), (8, 6), (2, 8), (8, 4098), (10**30, 8)):
        with pytest.raises(ValueError, match="multiples of 2 from 8 to 4096, and was trained on 16"):
            ours.check_size(*size)
    with pytest.raises(ValueError, match="a size of 7 × 7 pixels"):
        next(tinyti.sample(ours, "a cat", size=7))
    x_0 = last(tinyti.sample(ours, "a cat", steps=1))  # the default is that of training
    assert ours.size == 16 and x_0.shape == (1, 4, 8, 8) and ours.decode(x_0).shape == (1, 3, 16, 16)


def test_bf16_with_its_state_in_fp32_is_nearer_to_fp32(model):
    """DDIM-50 of the bundled model: 45.1 dB, where a state in bf16, rounded 50 times, has 36.1."""
    rounded = tinyti.load(TINY, dtype=torch.bfloat16)
    x_T, prompts = randn((2, 4, 16, 16), seeded()), ["a photo of a cat"] * 2
    wanted, kept = (last(tinyti.sample(m, prompts, guidance=3.0, x_T=x_T)) for m in (model, rounded))
    context = rounded.encode_prompts([""] * 2 + prompts)

    @torch.no_grad()
    def predict(x, t):
        without, with_prompt = rounded.unet(torch.cat([x, x]), t, context).chunk(2)
        return without + 3 * (with_prompt - without)

    coarse = last(denoise(predict, x_T.bfloat16(), rounded.schedule))
    wanted, kept, coarse = (model.decode(x.float()) for x in (wanted, kept, coarse))
    psnr = [-10 * ((x - wanted) / 2).square().mean().log10().item() for x in (kept, coarse)]
    assert kept.dtype == torch.float32 and psnr[0] > psnr[1] + 5, psnr


def test_device_and_precision(monkeypatch):
    chosen, native = [], False
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda name: chosen.append(_get_device_index(name)))
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or native
    )
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):  # a V100 only imitates bf16  # noqa: B007
        assert pick_device() == ("cuda", dtype)
    assert pick_device("cuda:1", "fp16") == ("cuda:1", torch.float16)
    assert pick_device("cpu") == ("cpu", torch.float32)
    for device in ("cuda:2", "cpu:x", "cuda:", "gpu", "cuda:-1", ""):
        with pytest.raises(ValueError, match="--device"):
            pick_device(device)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("cuda", "fp32") == ("cuda:1", torch.float32)
    assert chosen == [1, 1]  # PyTorch refuses a "cuda" without a number


def test_latents_of_images_are_the_scaled_draw(pipelines):
    theirs, ours = prepare(pipelines, "sd1", "ddim")
    images = torch.rand(2, 3, *SIZE, generator=seeded(0)) * 2 - 1
    z = torch.randn(2, 4, 8, 12, generator=seeded(1))
    posterior = theirs.vae.encode(images).latent_dist
    wanted = (posterior.mean + posterior.std * z) * theirs.vae.config.scaling_factor
    assert relative_error(wanted, ours.encode_images(images, seeded(1))) <= 1e-5


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ldm(pipelines, eta, guidance):
    """The paper's own model; its pipeline takes a latent for 8 × 8 pixels, and draws noise unseeded."""
    theirs, ours = prepare(pipelines, "ldm", "ddim", set_alpha_to_one=True, steps_offset=0)
    x_T = torch.randn(2, 4, 8, 12, generator=seeded(5))
    settings = {"num_inference_steps": 6, "guidance_scale": guidance, "eta": eta, "output_type": "np"}
    torch.manual_seed(0)
    wanted = theirs(PROMPTS, height=64, width=96, latents=x_T, **settings).images
    torch.manual_seed(0)
    x_0 = last(tinyti.sample(ours, PROMPTS, steps=6, guidance=guidance, eta=eta, x_T=x_T))
    assert_same_picture(torch.from_numpy(wanted).permute(0, 3, 1, 2), ours.decode(x_0))
