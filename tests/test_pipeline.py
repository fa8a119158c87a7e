"""Whole pipelines: what diffusers draws from a prompt and a noise, we draw, from the same folder."""

import json

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    LDMTextToImagePipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BertTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import tinyti

from .conftest import randomise

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpm++": DPMSolverMultistepScheduler}


def unet_and_vae(width, prediction="epsilon"):
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
    )
    return randomise(unet), randomise(vae)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A byte-pair vocabulary of single bytes and a few merges, as CLIP publishes it."""
    folder = tmp_path_factory.mktemp("vocabulary")
    letters = sorted(ByteLevel.alphabet())
    merges = ["c a", "ca t</w>", "p h", "ph o", "pho t", "phot o</w>", "o f</w>"]
    entries = [*letters, *(x + "</w>" for x in letters), *(m.replace(" ", "") for m in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return folder


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def stable_diffusion(request, clip_folder, tmp_path_factory):
    """Theirs, and ours loaded from the folder that theirs saved."""
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder, model_max_length=77, local_files_only=True)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet, vae = unet_and_vae(32)
    theirs = StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=randomise(CLIPTextModel(config)),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            **SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=request.param
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("sd")
    theirs.save_pretrained(folder)
    return theirs, tinyti.load(folder)


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 0.6), ("ddpm", 0.0), ("dpm++", 0.0)])
def test_stable_diffusion(stable_diffusion, sampler, eta):
    theirs, model = stable_diffusion
    theirs.scheduler = SCHEDULERS[sampler].from_config(theirs.scheduler.config, timestep_spacing="leading")
    prompts, negative = ["a photo of a cat", "Cat's  photo, 猫 of!"], "bad"
    seeds = [torch.Generator().manual_seed(i) for i in (1, 2)]
    x_T = tinyti.diffusion.randn((2, 4, 8, 8), seeds)
    options = {"num_inference_steps": 8, "guidance_scale": 3.0, "eta": eta, "output_type": "pt"}
    reference = theirs(
        prompts,
        negative_prompt=[negative] * 2,
        latents=x_T,
        generator=torch.Generator().manual_seed(5),
        **options,
    ).images
    *_, x_0 = tinyti.sample(
        model,
        prompts,
        steps=8,
        guidance=3.0,
        sampler=sampler,
        eta=eta,
        negative=negative,
        x_T=x_T,
        generator=torch.Generator().manual_seed(5),
    )
    ours = (model.decode(x_0) + 1) / 2
    assert reference.std() > 0.02 and (reference[0] - reference[1]).abs().max() > 0.02
    assert (reference - ours).abs().max() <= 1 / 255


def test_without_guidance(stable_diffusion):
    theirs, model = stable_diffusion
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    x_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    reference = theirs("cat", num_inference_steps=5, guidance_scale=1.0, latents=x_T, output_type="pt").images
    *_, x_0 = tinyti.sample(model, "cat", steps=5, guidance=1.0, x_T=x_T)
    assert (reference - (model.decode(x_0) + 1) / 2).abs().max() <= 1 / 255


def test_latents_of_images_are_the_scaled_draw(stable_diffusion):
    theirs, model = stable_diffusion
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    reference = theirs.vae.encode(images).latent_dist
    ours = model.encode_images(images, torch.Generator().manual_seed(1))
    wanted = (reference.mean + reference.std * z) * theirs.vae.config.scaling_factor
    assert torch.allclose(ours, wanted, atol=1e-4)


def test_latent_diffusion(tmp_path):
    """The paper's own model: `unet vqvae bert tokenizer scheduler`."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "##s", ","]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizer.from_pretrained(tmp_path, local_files_only=True)
    config = LDMBertConfig(
        vocab_size=len(words),
        encoder_layers=2,
        encoder_ffn_dim=64,
        encoder_attention_heads=8,
        head_dim=4,
        d_model=40,
    )
    unet, vae = unet_and_vae(40)
    scheduler = DDIMScheduler(**SD, clip_sample=False)
    theirs = LDMTextToImagePipeline(vae, randomise(LDMBertModel(config)), tokenizer, unet, scheduler)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path / "ldm")
    model = tinyti.load(tmp_path / "ldm")
    x_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompt = "A photo of cats, unseen"
    # It divides by 8 whatever its VAE does: 64 means our 8×8 latents.
    options = {
        "height": 64,
        "width": 64,
        "num_inference_steps": 6,
        "guidance_scale": 4.0,
        "output_type": "np",
    }
    reference = theirs([prompt], latents=x_T, **options).images
    *_, x_0 = tinyti.sample(model, prompt, steps=6, guidance=4.0, x_T=x_T)
    ours = (model.decode(x_0) + 1) / 2
    assert (torch.from_numpy(reference).permute(0, 3, 1, 2) - ours).abs().max() <= 1 / 255
