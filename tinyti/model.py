"""A latent diffusion model whole: its parts, and the ways from pictures and prompts into it and out again."""

import os
from dataclasses import dataclass, field

import torch
from torch import nn

from . import checkpoint
from .concept import Concept
from .diffusion import Schedule, denoise, randn
from .tokenizer import Tokenizer
from .unet import UNet
from .vae import VAE


@dataclass
class LatentDiffusion:
    """The parts of a text-to-image model, frozen, and the words that it has learned since."""

    tokenizer: Tokenizer
    text: nn.Module  # CLIPText or LDMBert
    vae: VAE
    unet: UNet
    schedule: Schedule
    concepts: dict[str, Concept] = field(default_factory=dict)

    @property
    def device(self):
        return self.unet.conv_in.weight.device

    @property
    def dtype(self):
        return self.unet.conv_in.weight.dtype

    @property
    def size(self):
        """The height and width in pixels of the pictures that the model was trained on."""
        return (self.unet.config.sample_size or 64) * self.vae.factor

    def add_word(self, name, vectors):
        """Make a learned word usable in prompts: vectors [n, D] -> Concept.

        ValueError if the vectors are not as wide as the model's, or the name is taken.
        """
        width = self.text.table.shape[1]
        if vectors.shape[-1] != width:
            raise ValueError(
                f"{name!r} has vectors of width {vectors.shape[-1]}, but this model's words have {width}"
            )
        concept = Concept(name, vectors, self.tokenizer.add(name, len(vectors))).to(self.device)
        self.concepts[name] = concept
        return concept

    def encode_prompts(self, prompts):
        """Prompts -> context (B, T, D), with every learned word in its place."""
        ids = self.tokenizer(prompts).to(self.device)
        embeds = self.text.embed(ids)
        for concept in self.concepts.values():
            embeds = concept.insert(embeds, ids)
        return self.text(embeds, ids)

    def encode_images(self, images, generator=None):
        """Images (B, 3, H, W) in [-1, 1] -> latents (B, C, H/f, W/f), a draw, scaled to unit variance."""
        mean, std = self.vae.encode(images.to(self.device, self.dtype))
        return (mean + std * randn(mean.shape, generator, mean)) * self.vae.config.scaling_factor

    def decode(self, latents):
        """Latents (B, C, h, w) -> images (B, 3, f h, f w) in [-1, 1]."""
        return self.vae.decode(latents.to(self.dtype) / self.vae.config.scaling_factor).clamp(-1, 1)


def load(path, device="cpu", dtype=torch.float32, prediction=None, tokenizer=None):
    """Load a model folder or a single file as published (weights/README.md) -> LatentDiffusion.

    `prediction` ("epsilon" or "v_prediction") is needed for single files of Stable Diffusion 2 only;
    `tokenizer` is a folder, for files that have none beside them.
    FileNotFoundError where something is not there, ValueError where it is not what is supported.
    """
    if torch.device(device).type == "cpu" and dtype == torch.float16:
        raise ValueError(
            "fp16 is for GPUs; on the CPU take dtype torch.float32, or torch.bfloat16 to save memory"
        )
    parts = checkpoint.read(path, tokenizer, prediction)
    words = Tokenizer.from_folder(parts.tokenizer)
    unet, vae, text = (checkpoint.build(*part, device, dtype) for part in (parts.unet, parts.vae, parts.text))
    if words.vocab_size > text.config.vocab_size:
        raise ValueError(
            f"{parts.tokenizer} has {words.vocab_size} entries, the encoder {text.config.vocab_size} rows; "
            "they belong to different models"
        )
    return LatentDiffusion(words, text, vae, unet, Schedule.from_config(parts.schedule))


def pick_device(device="auto", precision=None):
    """The device and the dtype of the networks that a user's two words mean: -> device, dtype.

    "auto" takes cuda, mps or cpu, the first that is there; without a precision it is bf16 on GPUs that have
    it and fp32 elsewhere.  Under torchrun each process takes its own GPU.  ValueError for what is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(k for k in there if there[k]) if device == "auto" else device.split(":")[0]
    if kind not in there:
        raise ValueError(f"--device is {device}; there are auto, cuda, mps and cpu")
    if not there[kind]:
        raise ValueError(f"--device {device}: PyTorch finds none on this machine; take --device cpu")
    if kind == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    elif device == "auto":
        device = kind
    if precision is None:
        precision = "bf16" if kind == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return device, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def load_clip(path, device="cpu", dtype=torch.float32):
    """Load a CLIP folder like openai/clip-vit-base-patch32 -> CLIP, Tokenizer."""
    config, weights, preprocess = checkpoint.read_clip(path)
    clip = checkpoint.build(config, weights, device, dtype, preprocess=preprocess)
    return clip, Tokenizer.from_folder(path)


@torch.no_grad()
def sample(
    model,
    prompts,
    steps=50,
    guidance=7.5,
    sampler="ddim",
    eta=0.0,
    negative="",
    generator=None,
    size=None,
    x_T=None,
    start=0,
):
    """Draw pictures for the prompts: a generator of x_t (B, C, H, W) after each step, the last is x_0.

    `guidance` is the scale of classifier-free guidance (2207.12598), against the prompt `negative`; at 1 or
    below there is none.  `generator`: one, or a list of one per prompt, whose pictures then do not depend on
    the batch.  `size`: pixels, (height, width) or one number, multiples of the VAE's factor times what the
    UNet halves.  `x_T` (B, C, H, W) takes the place of the initial noise, or is x_t where the first
    `start` steps are skipped.  Decode with `model.decode`.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if x_T is None:
        height, width = (size, size) if size is None or isinstance(size, int) else size
        shape = [(side or model.size) // model.vae.factor for side in (height, width)]
        x_T = randn((len(prompts), model.unet.config.in_channels, *shape), generator)
    x_T = x_T.to(model.device, model.dtype)
    context = model.encode_prompts(prompts)
    if guidance > 1:
        context = torch.cat([model.encode_prompts([negative] * len(prompts)), context])

    def predict(x_t, t):
        if guidance <= 1:
            return model.unet(x_t, t, context)
        without, with_prompt = model.unet(torch.cat([x_t, x_t]), t, context).chunk(2)
        return without + guidance * (with_prompt - without)

    yield from denoise(predict, x_T, model.schedule, steps, sampler, eta, generator, start)
