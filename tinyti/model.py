"""The whole latent diffusion model: its parts, loading, encoding prompts and pictures, sampling, decoding."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Generator, Tensor

from .concept import Concept
from .diffusion import Schedule, copy_to, denoise, randn
from .files.folder import DOWNLOAD, build, find_snapshot, read_clip, read_dino, read_folder
from .files.single import read_single_file
from .files.tensors import explain_errors
from .files.words import check_vectors
from .graphs import record_graph
from .networks.clip import CLIPText
from .networks.ldmbert import LDMBert
from .networks.unet import UNet
from .networks.vae import VAE
from .networks.vision import CLIP, DINO
from .tokenizer import Tokenizer, as_list


@dataclass
class LatentDiffusion:
    """The frozen parts of a text-to-image model, and the words that it has learned."""

    tokenizer: Tokenizer
    text: CLIPText | LDMBert
    vae: VAE
    unet: UNet
    schedule: Schedule
    concepts: dict[str, Concept] = field(default_factory=dict)

    def __post_init__(self):
        self._unet_graph = record_graph(lambda x_t, t, context: self.unet(x_t, t, context))

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def size(self) -> int:
        """The height and width in pixels of the pictures that the model was trained on."""
        return (self.unet.config.sample_size or 64) * self.vae.factor

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError for pictures that the model cannot make; height and width are in pixels.

        The VAE takes multiples of its factor, up to 4096.  The UNet needs at least one latent at its
        lowest resolution.
        """
        least = self.vae.factor * 2 ** (len(self.unet.down_blocks) - 1)
        if any(side % self.vae.factor or not least <= side <= 4096 for side in (height, width)):
            takes = f"multiples of {self.vae.factor} from {least} to 4096"
            found = f"a size of {height} × {width} pixels"
            raise ValueError(f"{found}: this model takes {takes}, and was trained on {self.size}")

    def add_word(self, name: str, vectors: Tensor) -> Concept:
        """Make a learned word usable in prompts: vectors (n, D) or (D,) -> its Concept.

        ValueError if the vectors are of another width than the model's, not finite or too many for a prompt,
        or if the name is taken or cannot be a word.
        """
        vectors = check_vectors(vectors, name, "add_word")
        width, shape = self.text.table.shape[1], tuple(vectors.shape)
        if shape[1] != width or shape[0] > self.tokenizer.length - 2:
            raise ValueError(f"{name!r} has vectors of shape {shape}; this model's words have (n, {width})")
        concept = Concept(name, vectors, self.tokenizer.add(name, len(vectors))).to(self.device)
        self.concepts[name] = concept
        return concept

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Prompts -> ids (B, T) on the model's device."""
        return copy_to(self.tokenizer(prompts), self.device)

    def encode_prompts(self, prompts: list[str] | Tensor, vectors: dict[str, Tensor] | None = None) -> Tensor:
        """Prompts, or their ids (B, T) -> context (B, T, D), with the learned words inserted.

        `vectors` {name: (B, n, D)} replace a word's own vectors, one copy per prompt (Concept.insert).
        """
        ids = prompts if torch.is_tensor(prompts) else self.tokenize(prompts)
        copies = vectors or {}
        embeds = self.text.embed(ids)
        for name, concept in self.concepts.items():
            embeds = concept.insert(embeds, ids, copies.get(name))
        return self.text(embeds)

    def predict(self, x_t: Tensor, t: Tensor | float, context: Tensor) -> Tensor:
        """The UNet's prediction.  Without gradients it runs as a CUDA graph on GPUs."""
        if torch.is_grad_enabled():
            return self.unet(x_t, t, context)
        t = t if torch.is_tensor(t) else torch.full((len(x_t),), t, device=x_t.device)
        return self._unet_graph(x_t, t, context)

    def encode_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> mean and std (B, C, H/f, W/f) of scaled latents, fp32.

        ValueError for images of another shape, dtype or range.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            found = f"{images.dtype} of shape {tuple(images.shape)}"
            raise ValueError(f"images are {found}; expected floats of shape (B, 3, H, W)")
        self.check_size(*images.shape[-2:])
        if not images.abs().max() <= 1.01:  # NaN is refused, too
            raise ValueError("an image has values outside of [-1, 1]; convert it by to_tensor")
        moments = self.vae.encode(images.to(self.device, self.dtype))
        mean, std = (part.float() * self.vae.config.scaling_factor for part in moments)
        return mean, std

    def encode_images(self, images: Tensor, generator: Generator | list[Generator] | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> sampled latents (B, C, H/f, W/f) of unit variance, fp32."""
        mean, std = self.encode_moments(images)
        return mean + std * randn(mean.shape, generator, mean)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, f h, f w) in [-1, 1], NaN where the network overflows."""
        images = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.dtype))
        return torch.where(images.isfinite(), images.clamp(-1, 1), torch.nan)


def load(
    path: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    prediction: str | None = None,
    tokenizer: str | Path | None = None,
    clip_skip: int = 1,
) -> LatentDiffusion:
    """Load a model folder or a single file as published (weights/README.md).

    `prediction`, "epsilon" or "v_prediction", overrides the scheduler's configuration; single files of Stable
    Diffusion 2 need it.  `tokenizer` is a folder that replaces the one beside the weights.  The text
    transformer runs without its last `clip_skip` - 1 layers (Stable Diffusion 1 only).
    FileNotFoundError if a file is missing, ValueError if a file or an argument is not supported.
    """
    path = Path(path)
    with explain_errors(device, "device of PyTorch", "take cpu, cuda or mps"):
        device = torch.empty(0, device=device).device
    if device.type == "cpu" and dtype == torch.float16:
        raise ValueError("fp16 is for GPUs; on the CPU take torch.float32, or torch.bfloat16 to save memory")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"dtype is {dtype}; it is torch.float32, bfloat16, float16 or float64")
    if prediction not in (None, "epsilon", "v_prediction"):
        raise ValueError(f"prediction is {prediction!r}; it is epsilon, v_prediction or nothing")
    if not path.exists():
        hint = "weights/README.md has a command for each public model; this one is for Stable Diffusion 1.5"
        raise FileNotFoundError(f"there is no model at {path}; {hint}: {DOWNLOAD}")
    parts = read_folder(path) if path.is_dir() else read_single_file(path, prediction)
    folder = Path(parts.tokenizer if tokenizer is None else tokenizer)
    if not folder.is_dir():
        hint = "copy the model's tokenizer folder there, or name it with tokenizer= (--tokenizer)"
        raise FileNotFoundError(f"there is no vocabulary at {folder}, and the weights hold none; {hint}")
    vocabulary = Tokenizer.from_folder(folder)
    schedule = parts.schedule(prediction)
    networks = parts.unet, parts.vae, parts.skip_text_layers(clip_skip)
    unet, vae, text = (build(*part, device, dtype) for part in networks)
    if vocabulary.vocab_size > text.config.vocab_size:
        rows = f"{vocabulary.vocab_size} entries, the encoder {text.config.vocab_size} rows"
        raise ValueError(f"{folder} has {rows}; they belong to different models")
    positions = text.config.max_position_embeddings
    if positions < vocabulary.length:
        found = f"the text transformer has {positions} positions, the tokenizer's prompts {vocabulary.length}"
        raise ValueError(f"{path}: {found}; take the tokenizer folder of the same model")
    width, context_width = text.table.shape[1], unet.config.cross_attention_dim
    if width != context_width:
        raise ValueError(f"{path}: the text transformer's width is {width}, the UNet reads {context_width}")
    return LatentDiffusion(vocabulary, text, vae, unet, schedule)


def load_clip(
    path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[CLIP, Tokenizer]:
    """Load a CLIP folder like openai/clip-vit-base-patch32, with its tokenizer; errors as in `load`."""
    path = find_snapshot(Path(path))
    config, weights, preprocess = read_clip(path)
    clip = build(config, weights, path, device, dtype, preprocess=preprocess)
    return clip, Tokenizer.from_folder(path)


def load_dino(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> DINO:
    """Load a vision transformer's folder like facebook/dino-vits16; errors as in `load`."""
    return build(*read_dino(find_snapshot(Path(path))), device, dtype)


@torch.no_grad()
def sample(
    model: LatentDiffusion,
    prompts: str | list[str],
    steps: int = 50,
    guidance: float = 7.5,
    sampler: str = "ddim",
    eta: float = 0.0,
    negative: str = "",
    generator: Generator | list[Generator] | None = None,
    size: int | tuple[int, int] | None = None,
    x_T: Tensor | None = None,
    start: int = 0,
) -> Iterator[Tensor]:
    """Draw pictures for the prompts: yield latents x_t (B, C, H, W), fp32, after each step; the last is x_0.

    `guidance` is the scale of classifier-free guidance (2207.12598), against the prompt `negative`; at 1 or
    below there is none.  `generator`: one, or a list with one per prompt, so that a picture does not depend
    on the rest of the batch.  `size`: pixels, (height, width) or one number, as `check_size` allows.  `x_T`
    (B, C, H, W) replaces the initial noise; if the first `start` steps are skipped, it is x_t there.  Decode
    with `model.decode`.  ValueError for a size, a sampler or a number of steps that is not supported.
    """
    prompts = as_list(prompts)
    if not math.isfinite(guidance := float(guidance)):
        raise ValueError(f"guidance is {guidance}; it must be a finite number")
    channels, factor = model.unet.config.in_channels, model.vae.factor
    if x_T is None:
        size = model.size if size is None else size
        height, width = (size, size) if isinstance(size, int) else size
        model.check_size(height, width)
        x_T = randn((len(prompts), channels, height // factor, width // factor), generator)
    if x_T.shape[:-2] != (len(prompts), channels) or not x_T.isfinite().all():
        found = f"of shape {tuple(x_T.shape)}, or not finite"
        raise ValueError(f"x_T is {found}; expected ({len(prompts)}, {channels}, H, W)")
    model.check_size(*(side * factor for side in x_T.shape[-2:]))
    # x_t stays in fp32: its rounding errors would add up over the steps; those of the networks do not.
    x_T = x_T.to(model.device, torch.float32)
    context = model.encode_prompts(prompts)
    if guidance > 1:
        context = torch.cat([model.encode_prompts([negative] * len(prompts)), context])

    def predict(x_t, t):
        x_t = x_t.to(model.dtype)
        if guidance <= 1:
            return model.predict(x_t, t, context)
        without, with_prompt = model.predict(torch.cat([x_t, x_t]), t, context).float().chunk(2)
        return without + guidance * (with_prompt - without)

    yield from denoise(predict, x_T, model.schedule, steps, sampler, eta, generator, start)
