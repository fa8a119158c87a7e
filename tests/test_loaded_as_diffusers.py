"""Model folders and files load as in diffusers' pipelines, or are refused in one line."""

import csv
import hashlib
import json
import os
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

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
    kind = published.SAMPLERS[sampler] if sampler else getattr(diffusers, raw["_class_name"])
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
    "sd21-base": PNDM
    | {"_diffusers_version": "0.10.0.dev0", "clip_sample": False, "prediction_type": "epsilon"},
    "sd21": PNDM
    | {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.8.0",
        "clip_sample": False,
        "prediction_type": "v_prediction",
    },
    "ldm": {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.0.4",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "timestep_values": None,
        "trained_betas": None,
    },
}
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
    unet = published.theirs_on_meta(TheirUNet, raw)
    vae = published.theirs_on_meta(AutoencoderKL, published.VAE)
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
CLASSES = """DDPM DPMSolverMultistep EulerDiscrete EulerAncestralDiscrete UniPCMultistep DEISMultistep
    HeunDiscrete KDPM2Discrete LCM"""
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
    **{name: {"_class_name": f"{name}Scheduler"} for name in CLASSES.split()},
}
SILENT = ("no offset", "no offset, leading", "DDIM as of its defaults")
NOT_LOOKED_AT = {  # choices of a sampler that is not ours
    "karras": {"use_karras_sigmas": True},
    "sde": {"algorithm_type": "sde-dpmsolver++"},
    "order 3": {"solver_order": 3},
    "sigma_min": {"final_sigmas_type": "sigma_min"},
    "flow sigmas": {"use_flow_sigmas": True},
}
REFUSED = {
    "no beta_start": ({"beta_start": GONE}, "it lacks beta_start"),
    "no beta_end": ({"beta_end": GONE}, "it lacks beta_end"),
    "no beta_schedule": ({"beta_schedule": GONE}, "it lacks beta_schedule"),
    "null": ({"beta_start": None}, "it lacks beta_start"),
    "trained_betas": ({"trained_betas": [0.1, 0.2]}, "trained_betas is (0.1, 0.2), expected None"),
    "thresholding": ({"thresholding": True}, "thresholding is True, expected False"),
    "cosine": ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is 'squaredcos_cap_v2', expected"),
    "sample": ({"prediction_type": "sample"}, "prediction_type is 'sample', expected 'epsilon' or"),
    "flow": ({"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction', expected"),
    "zero SNR of epsilon": (ZERO, "rescale_betas_zero_snr works with v_prediction only"),
    "zero SNR?": (V | {"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr is 'yes', expected bool"),
}


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


WITHOUT_BETAS = ["FlowMatchEulerDiscrete", "EDMEuler", "CMStochasticIterative", "IPNDM", None]


@pytest.mark.parametrize("name", WITHOUT_BETAS)
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
    """By a trained model, so that a difference in timesteps shows: with leading it is another picture."""
    ours = with_file(tmp_path / "m", SCHEDULERS["sd15"])
    drawn = compare_at(STEPS, miniature, ours, SCHEDULERS["sd15"], sampler)
    ours.schedule = replace(ours.schedule, timestep_spacing="leading")
    leading = draw(ours, sampler, STEPS[0])
    assert ((leading - drawn[0]).abs().max() > 20 / 255) == (sampler == "dpm++")


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_pictures_with_the_file_of_sd21(sd2, sampler, tmp_path):
    sd2.copy(tmp_path / "m", "scheduler")
    ours = tinyti.load(settings_file(tmp_path / "m", SCHEDULER, {}, SCHEDULERS["sd21"]))
    compare_at((10,), sd2.theirs, ours, SCHEDULERS["sd21"], sampler)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_pictures_with_the_miniatures_own_file(miniature, model, sampler):
    compare_at((10,), miniature, model, json.loads((TINY / SCHEDULER).read_text()), sampler)


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
    compare_at((10,), miniature, ours, raw, sampler)


# -- networks ------------------------------------------------------------------------------------------------

UNET, TEXT = "unet/config.json", "text_encoder/config.json"
SIZES = [  # the version and the sample_size of a file, and what is read
    ("0.6.0", 8, 64),
    ("0.3.0.dev0", 32, 64),
    ("0.8.1", 63, 64),
    ("0.9.0", 8, 8),
    ("0.9.0.dev0", 8, 8),
    ("0.10.2", 8, 8),
    (GONE, 8, 8),
    ("0.6.0", 64, 64),
    ("0.6.0", 96, 96),
]


@pytest.mark.parametrize("version, size, wanted", SIZES)
def test_sizes_of_old_unets(sd1, version, size, wanted, tmp_path):
    sd1.copy(tmp_path / "m", "unet")
    settings_file(tmp_path / "m", UNET, {"_diffusers_version": version, "sample_size": size})
    unet = TheirUNet.from_pretrained(tmp_path / "m" / "unet", local_files_only=True)
    parts = sd1.theirs.components | {"unet": unet, "requires_safety_checker": False}
    assert StableDiffusionPipeline(**parts).unet.config.sample_size == wanted
    assert read_folder(tmp_path / "m").unet.config.sample_size == wanted


def test_sizes_that_stay(sd1, ldm, tmp_path):
    """LDM's as written, whatever the version; the miniature's; that of a file without any is 64 in both."""
    ldm.copy(tmp_path / "ldm", "unet")
    settings_file(tmp_path / "ldm", UNET, {"_diffusers_version": "0.0.4"})
    assert read_folder(tmp_path / "ldm").unet.config.sample_size == 8 and tinyti.load(TINY).size == 64
    sd1.copy(tmp_path / "sd1", "unet")
    settings_file(tmp_path / "sd1", UNET, {"_diffusers_version": "0.6.0", "sample_size": GONE})
    assert tinyti.load(tmp_path / "sd1").size == 64 * 2


def test_an_attention_mask_is_refused(tmp_path):
    """diffusers' pipelines hide the padding then."""
    for value in (False, None, GONE):
        read_folder(settings_file(linked(tmp_path / str(value)), TEXT, {"use_attention_mask": value}))
    folder = settings_file(linked(tmp_path / "m"), TEXT, {"use_attention_mask": True})
    refused(folder, f"{TEXT} does not describe a TextConfig (use_attention_mask is True, expected False)")


def test_fewer_positions_than_prompts_are_long(tmp_path):
    folder = settings_file(linked(tmp_path / "m"), TEXT, {"max_position_embeddings": 64})
    path, key = folder / "text_encoder/model.safetensors", "text_model.embeddings.position_embedding.weight"
    weights = load_file(path)
    path.unlink()
    save_file(weights | {key: weights[key][:64].clone()}, path)
    refused(folder, "the text transformer has 64 positions, the tokenizer's prompts 77")


def test_a_text_transformer_of_another_width_than_the_unet_reads(tmp_path):
    """The miniature's UNet with its projections of the prompt cut to half the width."""
    folder = settings_file(linked(tmp_path / "m"), UNET, {"cross_attention_dim": 64})
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    path.unlink()
    reads_prompt = re.compile(r"attn2\.to_[kv]\.weight$")
    save_file({k: v[:, :64].clone() if reads_prompt.search(k) else v for k, v in weights.items()}, path)
    refused(folder, "the text transformer's width is 128, the UNet reads 64")


# -- clip skip -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [1, 2, 3])
def test_clip_skip_is_the_hidden_state_that_users_count(sd1, skip, tmp_path):
    """N is diffusers' clip_skip of N - 1: the N-th last hidden state, through the last norm."""
    prompts, text = ["a photo of a cat", ""], sd1.theirs.text_encoder
    theirs = text(sd1.ours.tokenizer(prompts), output_hidden_states=True).hidden_states[-skip]
    wanted = getattr(text, "text_model", text).final_layer_norm(theirs)
    for path in (sd1.folder, sd1.single(tmp_path / "m.safetensors")):
        ours = tinyti.load(path, clip_skip=skip)
        assert relative_error(wanted, ours.encode_prompts(prompts)) <= 1e-5
    assert (relative_error(wanted, sd1.ours.encode_prompts(prompts)) > 0.1) == (skip > 1)


def test_clip_skips_that_no_model_has(sd1, sd2, ldm, tmp_path):
    for skip in (-1, 0, 4, 99):
        refused(sd1.folder, f"clip skip is {skip}; it is 1 (none) to 3, all layers", clip_skip=skip)
    for model in (sd2, ldm, Single(sd2, tmp_path)):
        words = "clip skip is 2, but it is for Stable Diffusion 1 only"
        refused(model.folder, words, clip_skip=2, prediction=model.ours.schedule.prediction_type)


class Single:
    """A family's single file in the place of its folder."""

    def __init__(self, model, root):
        self.ours, self.folder = model.ours, model.single(root / "m.safetensors")


# -- shards, variants and the cache --------------------------------------------------------------------------


def parts_of(folder):
    """The files of weights in a folder."""
    names = ("unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model")
    return [folder / f"{name}.safetensors" for name in names]


def shard(path, index, name, save=save_file, dtype=None):
    """A file of weights as two, by transformers' names, and the list of what is in which."""
    weights = {key: w.to(dtype or w.dtype, copy=True) for key, w in load_file(path).items()}
    keys, places = sorted(weights), {}
    for i, some in enumerate((keys[::2], keys[1::2]), 1):
        file = name.format(f"{i:05}-of-00002")
        save({key: weights[key] for key in some}, path.with_name(file))
        places |= dict.fromkeys(some, file)
    path.with_name(index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    path.unlink()


SHARDS = {  # of a stem: the list's name, and a shard's
    "safetensors": ("{}.safetensors.index.json", "{}-{{}}.safetensors", {}),
    "bin": ("{}.bin.index.json", "{}-{{}}.bin", {"save": torch.save}),
    "fp16": ("{}.safetensors.index.fp16.json", "{}.fp16-{{}}.safetensors", {"dtype": torch.float16}),
    "fp16 behind": ("{}.fp16.safetensors.index.json", "{}-{{}}.fp16.safetensors", {"dtype": torch.float16}),
    "bin, non_ema": ("{}.bin.index.non_ema.json", "{}.non_ema-{{}}.bin", {"save": torch.save}),
}


@pytest.mark.parametrize("form", SHARDS)
def test_shards(model, form, tmp_path):
    index, name, options = SHARDS[form]
    folder = linked(tmp_path / "m")
    for path in parts_of(folder):
        stem = "pytorch_model" if "bin" in form and path.stem == "model" else path.stem
        shard(path, index.format(stem), name.format(stem), **options)
    assert not list(folder.glob("[tuv]*/*model.safetensors"))
    assert_same_weights(tinyti.load(folder), model)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_as_diffusers_writes_them(miniature, model, variant, tmp_path):
    half = variant and torch.float16
    unet = TheirUNet.from_pretrained(TINY / "unet", local_files_only=True, dtype=half or torch.float32)
    folder = linked(tmp_path / "m")
    shutil.rmtree(folder / "unet")  # they write through links
    unet.save_pretrained(folder / "unet", max_shard_size="3MB", variant=variant)
    shards = sorted(path.name for path in (folder / "unet").glob("*.safetensors"))
    assert len(shards) > 1 and all(("fp16" in name) == bool(variant) for name in shards)
    assert_same_weights(tinyti.load(folder), model)


def test_shards_that_are_not_there(tmp_path):
    folder = linked(tmp_path / "m")
    unet, index = parts_of(folder)[0], "diffusion_pytorch_model.safetensors.index.json"
    shard(unet, index, "diffusion_pytorch_model-{}.safetensors")
    gone = folder / "unet/diffusion_pytorch_model-00002-of-00002.safetensors"
    gone.unlink()
    refused(folder, f"{gone} is missing, which {index} names", FileNotFoundError)
    save_file({"conv_in.weight": torch.zeros(32, 4, 3, 3)}, gone)
    refused(folder, "it has nothing, expected floats")
    (tmp_path / "x.safetensors").write_bytes(gone.read_bytes())
    outside = [".", "../x.safetensors", "../../x.safetensors", str(tmp_path / "x.safetensors"), "a/../../x"]
    for name in outside:
        (folder / "unet" / index).write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
        refused(folder, "it names files outside of its folder")
    for junk in (
        "{",
        "[]",
        "{}",
        *(json.dumps({"weight_map": found}) for found in (5, {"a": 5}, {"a": []})),
    ):
        (folder / "unet" / index).write_text(junk)
        refused(folder, f"unet/{index}")
    for name in ("..", "", "a\0b"):
        (folder / "unet" / index).write_text(json.dumps({"weight_map": {"a": name}}))
        refused(folder, "is missing, which", FileNotFoundError)


@pytest.mark.parametrize("variant", ["non_ema", "bf16", "fp16"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_variants_where_they_are_all_there_is(model, variant, suffix, tmp_path):
    """The miniature's numbers are of fp16."""
    folder, dtype = linked(tmp_path / "m"), {"bf16": torch.bfloat16, "fp16": torch.float16}.get(variant)
    for path in parts_of(folder):
        weights = {key: w.to(dtype or torch.float32) for key, w in load_file(path).items()}
        stem = "pytorch_model" if (path.stem, suffix) == ("model", "bin") else path.stem
        (torch.save if suffix == "bin" else save_file)(weights, path.with_name(f"{stem}.{variant}.{suffix}"))
        path.unlink()
    ours = tinyti.load(folder)
    if variant == "bf16":
        assert torch.equal(ours.unet.conv_in.weight, model.unet.conv_in.weight.bfloat16().float())
    else:
        assert_same_weights(ours, model)


def test_what_is_read_first(model, tmp_path):
    """Full precision before variants, whatever the format; .safetensors before .bin; fp16, bf16, non_ema."""
    path = parts_of(linked(tmp_path / "m"))[0]
    order = (
        "safetensors bin fp16.safetensors fp16.bin bf16.safetensors bf16.bin non_ema.safetensors non_ema.bin"
    )
    files = [path.with_name(f"{path.stem}.{ending}") for ending in order.split()]
    weights = load_file(path)
    path.unlink()
    for i, file in enumerate(files):
        numbered = weights | {"conv_in.bias": torch.full_like(weights["conv_in.bias"], i)}
        (torch.save if file.suffix == ".bin" else save_file)(numbered, file)
    for i, file in enumerate(files):
        assert read_folder(tmp_path / "m").unet.weights["conv_in.bias"][0] == i
        file.unlink()
    refused(tmp_path / "m", "unet has no weights: found config.json, expected", FileNotFoundError)


def cache(root, snapshots=("0a1b",), main=None, source=TINY):
    """A model as huggingface_hub keeps it: snapshots of links to files that are named by their hash."""
    (root / "blobs").mkdir(parents=True)
    for file in filter(Path.is_file, source.rglob("*")):
        blob = root / "blobs" / hashlib.sha256(str(file).encode()).hexdigest()
        shutil.copyfile(file, blob)
        for name in snapshots:
            link = root / "snapshots" / name / file.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    if main:
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(main)
    return root


def test_a_folder_of_the_hugging_face_cache(model, tmp_path):
    one = cache(tmp_path / "models--org--one")
    ref = cache(tmp_path / "models--org--ref", ("0a1b", "2c3d"), "2c3d\n")
    shutil.rmtree(ref / "snapshots/0a1b/unet")  # an earlier download, not all of it
    for folder in (one, one / "snapshots/0a1b", ref):
        assert_same_weights(tinyti.load(folder), model)
        assert tinyti.load(folder).tokenizer.vocab_size == model.tokenizer.vocab_size
    clip, tokenizer = tinyti.load_clip(cache(tmp_path / "models--openai--clip", source=TINY / "clip"))
    assert len(clip.state_dict()) > 100 and len(tokenizer(["a cat"])[0]) == 77
    two = cache(tmp_path / "models--org--two", ("0a1b", "2c3d"))
    refused(two, "must hold one snapshot, found 0a1b, 2c3d; name one, as")
    (ref / "refs/main").write_text("4e5f")
    refused(ref, "4e5f", FileNotFoundError)
    shutil.rmtree(one / "blobs")  # the cache was cleaned
    refused(one, "is missing; download the whole model folder", FileNotFoundError)
    shutil.rmtree(one / "snapshots/0a1b")
    refused(one, "none", ValueError)


# -- bytes ---------------------------------------------------------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265146304\n"
OTHERS = {
    "git-lfs": (LFS, "it is a pointer of git-lfs, not the file itself; run git lfs pull"),
    "page": (b"<!DOCTYPE html>\n<html><body>Please log in", "it is a web page (HTML), not the file itself"),
    "page, spelled otherwise": (b"\xef\xbb\xbf \r\n<HTML lang='en'>", "it is a web page (HTML)"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_came_in_the_place_of_weights(name, tmp_path):
    content, words = OTHERS[name]
    for suffix in ("safetensors", "ckpt", "bin", "CKPT"):
        (tmp_path / f"m.{suffix}").write_bytes(content)
        refused(tmp_path / f"m.{suffix}", words)
    for file in parts_of(linked(tmp_path / "m")):
        file.unlink()
        file.write_bytes(content)
    refused(tmp_path / "m", words)


NAMES = ["m.safetensors", "m.SAFETENSORS", "m.Safetensors", "m.ckpt", "m.bin", "m.pt", "m.pth", "m", "m.txt"]


@pytest.mark.parametrize("form", ["safetensors", "zip", "before torch 1.6"])
def test_single_files_are_told_by_their_bytes(sd1, form, tmp_path):
    source = tmp_path / "source"
    if form == "safetensors":
        save_file({key: w.contiguous() for key, w in sd1.original.items()}, source)
    else:
        source.write_bytes(saved({"state_dict": sd1.original}, _use_new_zipfile_serialization=form == "zip"))
    for name in NAMES:
        os.replace(source, tmp_path / name)
        assert read_tensors(tmp_path / name).keys() == sd1.original.keys(), name
        if name == "m.SAFETENSORS":
            assert_same_weights(tinyti.load(tmp_path / name, tokenizer=sd1.tokenizer), sd1.ours)
        os.replace(tmp_path / name, source)


@pytest.mark.parametrize("suffix, save", [("bin", save_file), ("safetensors", torch.save)])
def test_weights_in_a_folder_are_told_by_their_bytes(model, suffix, save, tmp_path):
    folder = linked(tmp_path / "m")
    for path in parts_of(folder):
        weights = load_file(path)
        path.unlink()
        stem = "pytorch_model" if (path.stem, suffix) == ("model", "bin") else path.stem
        save(weights, path.with_name(f"{stem}.{suffix}"))
    assert_same_weights(tinyti.load(folder), model)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["m.safetensors", "m.SAFETENSORS", "m.ckpt"])
def test_a_pickle_under_any_name_runs_nothing(sd1, name, zipped, tmp_path):
    content = saved(sd1.original | {"x": Evil(tmp_path / "proof")}, _use_new_zipfile_serialization=zipped)
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, "open, which was not run")
    assert not (tmp_path / "proof").exists()


# -- the miniature's text encoder ----------------------------------------------------------------------------

VALUES = "a200dfaed01b6afe77c7a369d0958009ba2674a8e1775d12a71e52269a8be0b6"  # before the names had a prefix


def test_the_miniatures_text_encoder_is_one_for_both_transformers(model):
    """4 wants the prefix, 5 takes it away; the numbers are those that were there before."""
    file = TINY / "text_encoder/model.safetensors"
    assert all(key.startswith("text_model.") for key in load_file(file))
    weights, found = {k.removeprefix("text_model."): w for k, w in load_file(file).items()}, hashlib.sha256()
    for key in sorted(weights):
        found.update(key.encode() + weights[key].numpy().tobytes())
    assert len(weights) == 68 and found.hexdigest() == VALUES
    text, info = CLIPTextModel.from_pretrained(file.parent, local_files_only=True, output_loading_info=True)
    assert not any(info[f"{what}_keys"] for what in ("missing", "unexpected", "mismatched"))
    ids = model.tokenizer(["a photo of a cat", "S* 猫"])
    with torch.no_grad():
        wanted = text.float()(ids).last_hidden_state
    assert relative_error(wanted, model.encode_prompts(ids)) <= 1e-5


# -- the programs --------------------------------------------------------------------------------------------

RUN = ["--images", str(CONCEPTS / "cat" / "heldout"), "--token", "S*", "--batch-size", "2", "--size", "16"]
RUN += ["--device", "cpu", "--steps"]


@pytest.fixture(scope="module")
def word(loaded, tmp_path_factory):
    """A word learned with clip skip 2, in two steps."""
    folder = tmp_path_factory.mktemp("words") / "S"
    train_py.main([*RUN, "2", "--clip-skip", "2", "--out", str(folder)])
    return folder


def test_a_run_keeps_its_clip_skip(word, tmp_path, capsys):
    assert json.loads((word / "settings.json").read_text())["clip_skip"] == 2
    assert read_state(word / "state.pt")["settings"]["clip_skip"] == 2
    log = list(csv.DictReader((word / "log.csv").read_text().splitlines()))
    train_py.main([*RUN, "2", "--out", str(tmp_path)])
    other = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert log[0]["loss"] != other[0]["loss"]  # it is another text transformer
    capsys.readouterr()
    for folder, before, now in ((word, 2, 1), (word, 2, 3), (tmp_path, 1, 2)):
        flags = [*RUN, "4", "--clip-skip", now, "--resume", "--out", folder]
        refuses(train_py, flags, folder, capsys, f"clip_skip was {before} and is {now}")
    assert train_py.main([*RUN, "3", "--clip-skip", "2", "--resume", "--out", str(word)]) in (0, 1)
    assert len(read_state(word / "state.pt")["word"]["log"]) == 3


def test_a_state_of_before_there_was_a_clip_skip_counts_as_1(loaded, tmp_path, capsys):
    train_py.main([*RUN, "2", "--out", str(tmp_path)])
    state = read_state(tmp_path / "state.pt")
    del state["settings"]["clip_skip"]
    write_state(tmp_path / "state.pt", state)
    flags = [*RUN, "3", "--resume", "--out", str(tmp_path)]
    capsys.readouterr()
    refuses(train_py, [*flags, "--clip-skip", "2"], tmp_path, capsys, "clip_skip was 1 and is 2")
    assert train_py.main(flags) in (0, 1)
    assert read_state(tmp_path / "state.pt")["settings"]["clip_skip"] == 1


def test_the_command_at_the_end_names_the_clip_skip(loaded, tmp_path, capsys):
    train_py.main([*RUN, "1", "--clip-skip", "2", "--out", str(tmp_path)])
    assert "--clip-skip 2" in capsys.readouterr().out
    train_py.main([*RUN, "1", "--out", str(tmp_path), "--force"])
    assert "--clip-skip" not in capsys.readouterr().out


def test_a_word_of_another_clip_skip_is_noted(word, tmp_path, capsys):
    """Not where it is the same, or not known: a file alone, or a folder of before."""
    vectors = read_words(word)
    alone = tmp_path / "S.safetensors"
    write_words(alone, vectors)
    old = tmp_path / "old"
    old.mkdir()
    write_words(old / "learned_embeds.safetensors", vectors)
    (old / "settings.json").write_text('{"token": "S*"}')
    for path, skip, notes in ((word, 1, 1), (word, 3, 1), (word, 2, 0), (alone, 2, 0), (old, 2, 0)):
        flags = ["S* at night", "--words", path, "--clip-skip", skip, "--steps", 1, "--count", 1]
        flags += ["--size", 16, "--device", "cpu", "--out", tmp_path / f"{skip}", "--force"]
        assert sample_py.main([*map(str, flags)]) == 0
        said = re.findall(r"learned with --clip-skip (\d+), now it is (\d+)", capsys.readouterr().err)
        assert said == [("2", f"{skip}")] * notes


def test_clip_skips_that_the_programs_refuse(loaded, word, tmp_path, capsys):
    for program, flags in ((train_py, [*RUN, "1"]), (sample_py, ["a cat", "--device", "cpu"])):
        for skip, words in (("0", "--clip-skip"), ("two", "--clip-skip"), ("5", "it is 1 (none) to 4")):
            refuses(program, [*flags, "--clip-skip", skip, "--out", tmp_path], tmp_path, capsys, words)
