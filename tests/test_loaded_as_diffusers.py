"""Model folders and files: equal to what diffusers' pipelines make of them, or refused in one line."""

import csv
import hashlib
import json
import os
import re
import shutil
from dataclasses import fields, replace

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, LDMTextToImagePipeline, StableDiffusionPipeline
from diffusers import UNet2DConditionModel as TheirUNet
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig as TheirBertConfig
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

import sample as sample_py
import tinyti
import train as train_py
from tinyti.diffusion import SAMPLERS, Schedule
from tinyti.files.folder import correct_sample_size, read_config, read_folder
from tinyti.files.tensors import read_tensors
from tinyti.files.words import read_words, write_words
from tinyti.networks.clip import TextConfig
from tinyti.networks.unet import UNet, UNetConfig
from tinyti.networks.vae import VAE, VAEConfig
from tinyti.programs.run import read_state, write_state

from . import published
from .conftest import CONCEPTS, TINY, Evil, last, refuses, relative_error, saved, seeded

STEPS = (10, 20, 50)
SCHEDULER = "scheduler/scheduler_config.json"
PROMPT = "a photo of a red cat"
GONE = object()  # a setting that a file lacks


def settings_file(folder, file, changes, base=None):
    """Write a configuration again with changes; its folder is a copy, not a link."""
    path = folder / file
    raw = json.loads(path.read_text()) if base is None else base
    raw = {name: value for name, value in (raw | changes).items() if value is not GONE}
    path.unlink()
    path.write_text(json.dumps(raw))
    return folder


def linked(folder, source=TINY):
    """A model folder whose files are links, to be replaced one by one."""
    shutil.copytree(source, folder, copy_function=os.symlink)
    return folder


def refused(path, words, kind=ValueError, **settings):
    """Loading fails with one line that has these words."""
    with pytest.raises(kind) as caught:
        tinyti.load(path, **settings)
    message = str(caught.value)
    assert words in message and "\n" not in message and len(message) < 1100, message


def assert_same_weights(model, wanted):
    """The same tensors in all three networks."""
    for part in ("unet", "vae", "text"):
        ours, theirs = (getattr(one, part).state_dict() for one in (model, wanted))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(weight, theirs[key]) for key, weight in ours.items()), part


def their_pipeline(theirs, raw, sampler=None):
    """Their pipeline again, as it loads this scheduler_config.json, and corrects it.

    With a sampler the file is of that one's class; the manual makes it of any other's, `made_of`.
    """
    kind = published.SAMPLERS[sampler] if sampler else getattr(diffusers, raw["_class_name"].removeprefix("Flax"))
    scheduler = kind.from_config(raw | {"_class_name": kind.__name__})
    options = {"requires_safety_checker": False} if isinstance(theirs, StableDiffusionPipeline) else {}
    pipeline = type(theirs)(**theirs.components | {"scheduler": scheduler}, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def made_of(pipeline, sampler):
    """A sampler for a pipeline, the way diffusers' manual makes it."""
    return published.SAMPLERS[sampler].from_config(pipeline.scheduler.config)


def assert_same_schedule(schedule, theirs, raw, forgets=False):
    """Of every sampler that both have.

    What a pipeline corrects where the file is silent, diffusers `forgets` with another sampler.
    """
    pipeline = their_pipeline(theirs, raw)
    for sampler in SAMPLERS:
        own = their_pipeline(theirs, raw, sampler).scheduler
        for scheduler in (own,) if forgets else (own, made_of(pipeline, sampler)):
            assert schedule.prediction_type == scheduler.config.prediction_type
            for steps in STEPS:
                scheduler.set_timesteps(steps)
                assert schedule.timesteps(steps, sampler) == scheduler.timesteps.tolist(), (sampler, steps)
    ddim = their_pipeline(theirs, raw, "ddim").scheduler
    assert (schedule.alpha_bar - ddim.alphas_cumprod).abs().max() <= 1e-6
    assert schedule._alpha_bar(-1) == pytest.approx(ddim.final_alpha_cumprod.item(), abs=1e-6)


# -- the published configurations ----------------------------------------------------------------------------

PNDM = json.loads("""{
    "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": false, "skip_prk_steps": true,
    "steps_offset": 1, "trained_betas": null}""")
SCHEDULERS = {
    "sd14": PNDM | {"_diffusers_version": "0.4.0.dev0"},
    "sd15": PNDM | {"_diffusers_version": "0.6.0", "clip_sample": False},
    "sd21-base": PNDM | {"_diffusers_version": "0.10.0.dev0", "clip_sample": False,
                         "prediction_type": "epsilon"},
    "sd21": PNDM | {"_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "clip_sample": False,
                    "prediction_type": "v_prediction"},
    "ldm": {"_class_name": "DDIMScheduler", "_diffusers_version": "0.0.4", "beta_end": 0.012,
            "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
            "num_train_timesteps": 1000, "timestep_values": None, "trained_betas": None},
}  # fmt: skip
UNETS = {  # and the side of the pictures
    "sd14": (published.UNETS["sd15"] | {"_diffusers_version": "0.2.2", "sample_size": 64}, 512),
    "sd15": (published.UNETS["sd15"] | {"_diffusers_version": "0.6.0", "sample_size": 64}, 512),
    "sd21-base": (published.UNETS["sd21"] | {"_diffusers_version": "0.10.0.dev0", "sample_size": 64}, 512),
    "sd21": (published.UNETS["sd21"] | {"_diffusers_version": "0.10.0.dev0"}, 768),
    "ldm": (published.UNETS["ldm"] | {"_diffusers_version": "0.0.4", "sample_size": 32}, 256),
}
TEXTS = {"sd14": "sd15", "sd15": "sd15", "sd21-base": "sd21", "sd21": "sd21", "ldm": "ldm"}


@pytest.fixture(scope="module")
def families(sd1, ldm):
    """Pipelines of both classes."""
    return {"sd": sd1, "ldm": ldm}


def of(families, name):
    return families["ldm" if name == "ldm" else "sd"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_published_schedulers(families, name, tmp_path):
    model = of(families, name)
    model.copy(tmp_path / "m", "scheduler")
    settings_file(tmp_path / "m", SCHEDULER, {}, SCHEDULERS[name])
    schedule = read_folder(tmp_path / "m").schedule()
    assert_same_schedule(schedule, model.theirs, SCHEDULERS[name])
    first = {sampler: schedule.timesteps(50, sampler)[0] for sampler in SAMPLERS}
    assert first == {"ddim": 980 + (name != "ldm"), "ddpm": 980 + (name != "ldm"), "dpm++": 999}


@pytest.mark.parametrize("name", UNETS)
def test_the_published_sizes(name):
    raw, side = UNETS[name]
    unet, vae = published.theirs_on_meta(TheirUNet, raw), published.theirs_on_meta(AutoencoderKL, published.VAE)
    if name == "ldm":
        theirs = LDMTextToImagePipeline(vae, None, None, unet, None)
    else:
        theirs = StableDiffusionPipeline(vae, None, None, unet, None, None, None, None, False)
    config = read_config(UNetConfig, raw, "config.json")
    config = config if name == "ldm" else correct_sample_size(config, raw)
    with torch.device("meta"):
        vae, unet = VAE(read_config(VAEConfig, published.VAE, "config.json")), UNet(config)
    ours = tinyti.LatentDiffusion(None, None, vae, unet, Schedule())
    assert ours.size == theirs.unet.config.sample_size * theirs.vae_scale_factor == side


@pytest.mark.parametrize("name", TEXTS)
def test_the_published_text_transformers(name):
    kind, _, raw = published.TEXTS[TEXTS[name]]
    theirs = (CLIPTextConfig if kind is TextConfig else TheirBertConfig).from_dict(dict(raw))
    ours = read_config(kind, raw, "config.json")
    for field in fields(kind):
        assert getattr(ours, field.name) == getattr(theirs, field.name), field.name


# -- schedulers ----------------------------------------------------------------------------------------------

V, ZERO = {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True}
DDIM = {"_class_name": "DDIMScheduler", "skip_prk_steps": GONE}
EQUAL = {  # changes of SD1.5's file
    "nothing": {},
    **{f"spacing {s}": {"timestep_spacing": s} for s in ("leading", "trailing", "linspace")},
    **{f"offset {i}": {"steps_offset": i} for i in (0, 2)},
    "no offset": {"steps_offset": GONE},
    "no offset, leading": {"steps_offset": GONE, "timestep_spacing": "leading"},
    "DDIM": DDIM,
    "DDIM as of its defaults": DDIM | {"clip_sample": GONE, "set_alpha_to_one": GONE, "steps_offset": GONE},
    "clip_sample": DDIM | {"clip_sample": True},
    "alpha to one": {"set_alpha_to_one": True},
    "linear": {"beta_schedule": "linear"},
    "v": V,
    "other betas": {"beta_start": 0.001, "beta_end": 0.01},
    "zero SNR": DDIM | V | ZERO | {"timestep_spacing": "trailing"},
    "zero SNR, leading": DDIM | V | ZERO | {"timestep_spacing": "leading"},
    "zero SNR, no spacing": DDIM | V | ZERO,
    "no zero SNR": DDIM | {"rescale_betas_zero_snr": False},
    **{name: {"_class_name": f"{name}Scheduler"} for name in (
        "DDPM", "DPMSolverMultistep", "EulerDiscrete", "EulerAncestralDiscrete", "UniPCMultistep",
        "DEISMultistep", "HeunDiscrete", "KDPM2Discrete", "LCM")},
}  # fmt: skip
SILENT = ("no offset", "no offset, leading", "DDIM as of its defaults")
NOT_LOOKED_AT = {  # choices of a sampler that is not ours
    "karras": {"use_karras_sigmas": True},
    "sde": {"algorithm_type": "sde-dpmsolver++"},
    "order 3": {"solver_order": 3},
    "sigma_min": {"final_sigmas_type": "sigma_min"},
    "flow sigmas": {"use_flow_sigmas": True},
}
REFUSED = {
    **{f"no {name}": ({name: GONE}, f"it lacks {name}") for name in ("beta_start", "beta_end", "beta_schedule")},
    "null": ({"beta_start": None}, "it lacks beta_start"),
    "trained_betas": ({"trained_betas": [0.1, 0.2]}, "trained_betas is (0.1, 0.2), expected None"),
    "thresholding": ({"thresholding": True}, "thresholding is True, expected False"),
    "cosine": ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is 'squaredcos_cap_v2', expected"),
    "sample": ({"prediction_type": "sample"}, "prediction_type is 'sample', expected 'epsilon' or"),
    "flow": ({"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction', expected"),
    "zero SNR of epsilon": (ZERO, "rescale_betas_zero_snr works with v_prediction only"),
    "zero SNR?": (V | {"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr is 'yes', expected bool"),
}  # fmt: skip


@pytest.mark.parametrize("row", EQUAL)
def test_schedulers_that_are_read_as_diffusers_reads_them(sd1, row, tmp_path):
    sd1.copy(tmp_path / "m", "scheduler")
    settings_file(tmp_path / "m", SCHEDULER, EQUAL[row], SCHEDULERS["sd15"])
    raw = json.loads((tmp_path / "m" / SCHEDULER).read_text())
    assert_same_schedule(read_folder(tmp_path / "m").schedule(), sd1.theirs, raw, forgets=row in SILENT)


@pytest.mark.parametrize("row", NOT_LOOKED_AT)
def test_settings_of_other_samplers_change_nothing(sd1, row, tmp_path):
    sd1.copy(tmp_path / "m", "scheduler")
    plain = SCHEDULERS["sd15"] | {"_class_name": "DPMSolverMultistepScheduler"}
    schedules = []
    for changes in ({}, NOT_LOOKED_AT[row]):
        settings_file(tmp_path / "m", SCHEDULER, changes, plain)
        schedules.append(read_folder(tmp_path / "m").schedule())
    assert schedules[0] == schedules[1] and torch.equal(schedules[0].alpha_bar, schedules[1].alpha_bar)


@pytest.mark.parametrize("row", REFUSED)
def test_schedulers_that_are_refused(sd1, row, tmp_path):
    changes, words = REFUSED[row]
    sd1.copy(tmp_path / "m", "scheduler")
    settings_file(tmp_path / "m", SCHEDULER, changes, SCHEDULERS["sd15"])
    refused(tmp_path / "m", words)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "EDMEuler", "CMStochasticIterative", "IPNDM", None])
def test_scheduler_files_without_betas(families, name, tmp_path):
    """Those of flow and consistency models, which other models' folders hold, and an empty one."""
    for kind, model in families.items():
        folder = tmp_path / kind
        model.copy(folder, "scheduler")
        if name:
            getattr(diffusers, f"{name}Scheduler")().save_pretrained(folder / "scheduler")
        else:
            settings_file(folder, SCHEDULER, {}, {})
        refused(folder, f"{SCHEDULER} does not describe a noise schedule (it lacks beta_start")
    assert Schedule().beta_end == 0.02 and Schedule().timesteps(50)[0] == 980  # by hand, as ever


def test_ldm_keeps_its_file(ldm, tmp_path):
    """Whose pipeline corrects neither the offset nor the clipping."""
    ldm.copy(tmp_path / "m", "scheduler")
    for offset in (0, 1, 3, GONE):
        settings_file(tmp_path / "m", SCHEDULER, {"steps_offset": offset}, SCHEDULERS["ldm"])
        raw = json.loads((tmp_path / "m" / SCHEDULER).read_text())
        assert_same_schedule(read_folder(tmp_path / "m").schedule(), ldm.theirs, raw)
    for changes, words in (
        ({"clip_sample": True}, "clip_sample is True"),
        ({"steps_offset": -1}, "steps_offset is -1"),
        ({"steps_offset": 1000}, "steps_offset 1000"),
    ):
        settings_file(tmp_path / "m", SCHEDULER, changes, SCHEDULERS["ldm"])
        refused(tmp_path / "m", words)


def test_single_files_have_the_schedule_of_the_published_ones(sd1, sd2, ldm, tmp_path):
    for model, name in ((sd1, "sd15"), (sd2, "sd21"), (ldm, None)):
        (tmp_path / model.family).mkdir()
        path = model.single(tmp_path / model.family / "m.safetensors")
        schedule = tinyti.load(path, prediction=model.ours.schedule.prediction_type).schedule
        if name:  # diffusers takes the scheduler of the published folder, too
            assert_same_schedule(schedule, sd1.theirs, SCHEDULERS[name])
        assert schedule.timesteps(50)[0] == 981 and schedule.timesteps(50, "dpm++")[0] == 999


# -- pictures ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def miniature():
    """weights/tiny in diffusers."""
    return StableDiffusionPipeline.from_pretrained(TINY, local_files_only=True)


def draw(ours, sampler, steps, guidance=5.0):
    """A picture of ours, in [0, 1], from the noise of `compare_pictures`."""
    options = {"sampler": sampler, "guidance": guidance, "x_T": noise(ours), "generator": seeded(1)}
    return (ours.decode(last(tinyti.sample(ours, PROMPT, steps, **options))) + 1) / 2


def noise(ours):
    return torch.randn(1, 4, *(ours.unet.config.sample_size,) * 2, generator=seeded(3))


def compare_pictures(pipeline, ours, sampler, steps):
    """From one prompt and noise -> our picture."""
    options = {"guidance_scale": 5.0, "output_type": "pt", "generator": seeded(1)}
    wanted = pipeline(PROMPT, num_inference_steps=steps, latents=noise(ours), **options).images
    picture = draw(ours, sampler, steps)
    assert wanted.std() > 0.05 and wanted.shape == picture.shape
    assert (wanted - picture).abs().max() <= 1 / 255, (sampler, steps)
    return picture


def compare_at(steps, theirs, ours, raw, sampler):
    """With the sampler made of the pipeline's own -> our pictures."""
    pipeline = their_pipeline(theirs, raw)
    pipeline.scheduler = made_of(pipeline, sampler)
    return [compare_pictures(pipeline, ours, sampler, n) for n in steps]


def with_file(folder, raw):
    """The miniature with another scheduler's file."""
    return tinyti.load(settings_file(linked(folder), SCHEDULER, {}, raw))


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_pictures_with_the_file_of_sd15(miniature, sampler, tmp_path):
    """Drawn by a trained model, so that a difference in timesteps shows: leading instead is another picture."""
    ours = with_file(tmp_path / "m", SCHEDULERS["sd15"])
    drawn = compare_at(STEPS, miniature, ours, SCHEDULERS["sd15"], sampler)
    ours.schedule = replace(ours.schedule, timestep_spacing="leading")
    leading = draw(ours, sampler, STEPS[0])
    assert ((leading - drawn[0]).abs().max() > 20 / 255) == (sampler == "dpm++")


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_pictures_with_the_file_of_sd21(sd2, sampler, tmp_path):
    sd2.copy(tmp_path / "m", "scheduler")
    ours = tinyti.load(settings_file(tmp_path / "m", SCHEDULER, {}, SCHEDULERS["sd21"]))
    compare_at((10, 20), sd2.theirs, ours, SCHEDULERS["sd21"], sampler)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_pictures_with_the_miniatures_own_file(miniature, model, sampler):
    compare_at((10, 20), miniature, model, json.loads((TINY / SCHEDULER).read_text()), sampler)


@pytest.mark.parametrize("row", [*SILENT, "clip_sample"])
def test_pictures_with_outdated_files(miniature, row, tmp_path):
    raw = {k: v for k, v in (SCHEDULERS["sd15"] | EQUAL[row]).items() if v is not GONE}
    compare_pictures(their_pipeline(miniature, raw, "ddim"), with_file(tmp_path / "m", raw), "ddim", 10)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_zero_terminal_snr(miniature, sampler, tmp_path):
    """2305.08891: betas, noising, target and pictures of a v-model that ends in pure noise."""
    raw = SCHEDULERS["sd15"] | DDIM | V | ZERO | {"timestep_spacing": "trailing"}
    raw = {name: value for name, value in raw.items() if value is not GONE}
    ours = with_file(tmp_path / "m", raw)
    schedule, theirs = ours.schedule, published.SAMPLERS["ddpm"].from_config(raw)
    assert schedule.timesteps(50, sampler)[0] == 999 and schedule.alpha_bar[-1] == 0
    assert (schedule.alpha_bar - theirs.alphas_cumprod).abs().max() <= 1e-6
    x_0, eps, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    assert relative_error(theirs.add_noise(x_0, eps, t), schedule.add_noise(x_0, eps, t)) <= 1e-6
    assert relative_error(theirs.get_velocity(x_0, eps, t), schedule.target(x_0, eps, t)) <= 1e-6
    assert torch.equal(schedule.add_noise(x_0, eps, t)[2], eps[2])  # nothing of the picture is left
    compare_at((10, 20), miniature, ours, raw, sampler)
