"""A latent diffusion model whole: its parts, and the ways from pictures and prompts into it and out again."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Generator, Tensor

from . import checkpoint, compvis
from .clip import CLIP, CLIPText
from .concept import Concept
from .diffusion import Schedule, denoise, randn, send
from .ldmbert import LDMBert
from .tokenizer import Tokenizer
from .unet import UNet
from .vae import VAE


@dataclass
class LatentDiffusion:
    """The parts of a text-to-image model, frozen, and the words that it has learned since."""

    tokenizer: Tokenizer
    text: CLIPText | LDMBert
    vae: VAE
    unet: UNet
    schedule: Schedule
    concepts: dict[str, Concept] = field(default_factory=dict)

    def __post_init__(self):
        self._recorded = recorded(lambda x_t, t, context: self.unet(x_t, t, context))

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
        """Raise ValueError for pictures that the model cannot make, height and width in pixels.

        The VAE takes multiples of its factor, and the UNet at least one latent at its lowest resolution.
        """
        least = self.vae.factor * 2 ** (len(self.unet.down_blocks) - 1)
        if any(side % self.vae.factor or not least <= side <= 4096 for side in (height, width)):
            takes = f"multiples of {self.vae.factor} from {least} to 4096"
            found = f"a size of {height} × {width} pixels"
            raise ValueError(f"{found}: this model takes {takes}, and was trained on {self.size}")

    def add_word(self, name: str, vectors: Tensor) -> Concept:
        """Make a learned word usable in prompts: vectors (n, D) -> its Concept.  The only way in for a word.

        ValueError if the vectors are not as wide as the model's, or the name is taken or cannot be a word.
        """
        width, shape = self.text.table.shape[1], tuple(vectors.shape)
        if len(shape) != 2 or shape[1] != width:
            raise ValueError(f"{name!r} has vectors of shape {shape}, this model's words have (n, {width})")
        concept = Concept(name, vectors, self.tokenizer.add(name, len(vectors))).to(self.device)
        self.concepts[name] = concept
        return concept

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Prompts -> ids (B, T) on the model's device."""
        return send(self.tokenizer(prompts), self.device)

    def encode_prompts(self, prompts: list[str] | Tensor,
                       vectors: dict[str, Tensor] | None = None) -> Tensor:  # fmt: skip
        """Prompts, or their ids (B, T) -> context (B, T, D), with every learned word in its place.

        `vectors` {word: (B, n, D)} stand in for a word's own: a copy for each prompt (Concept.insert).
        """
        ids = prompts if torch.is_tensor(prompts) else self.tokenize(prompts)
        embeds = self.text.embed(ids)
        for name, concept in self.concepts.items():
            embeds = concept.insert(embeds, ids, (vectors or {}).get(name))
        return self.text(embeds)

    def predict(self, x_t: Tensor, t: Tensor | float, context: Tensor) -> Tensor:
        """What the UNet predicts, from what it takes; where no gradient is wanted it is `recorded`."""
        if torch.is_grad_enabled():
            return self.unet(x_t, t, context)
        t = t if torch.is_tensor(t) else torch.full((len(x_t),), t, device=x_t.device)
        return self._recorded(x_t, t, context)

    def encode_images(self, images: Tensor, generator: Generator | list[Generator] | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latents (B, C, H/f, W/f), a draw, scaled to unit variance."""
        mean, std = self.vae.encode(images.to(self.device, self.dtype))
        return (mean + std * randn(mean.shape, generator, mean)) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, f h, f w) in [-1, 1]."""
        return self.vae.decode((latents / self.vae.config.scaling_factor).to(self.dtype)).clamp(-1, 1)


def load(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32,
         prediction: str | None = None, tokenizer: str | Path | None = None) -> LatentDiffusion:  # fmt: skip
    """Load a model folder or a single file as published (weights/README.md).

    `prediction`, "epsilon" or "v_prediction", overrules the scheduler's configuration, and is needed for
    single files of Stable Diffusion 2; `tokenizer` is a folder, in place of the one beside the weights.
    FileNotFoundError where something is not there, ValueError where it is not what is supported.
    """
    path = Path(path)
    if torch.device(device).type == "cpu" and dtype == torch.float16:
        raise ValueError("fp16 is for GPUs; on the CPU take torch.float32, or torch.bfloat16 to save memory")
    if prediction not in (None, "epsilon", "v_prediction"):
        raise ValueError(f"prediction is {prediction!r}; it is epsilon, v_prediction or nothing")
    if not path.exists():
        hint = "weights/README.md has a command for each public model, this one is Stable Diffusion 1.5's"
        raise FileNotFoundError(f"there is no model at {path}; {hint}: {checkpoint.DOWNLOAD}")
    parts = checkpoint.read_folder(path) if path.is_dir() else compvis.read_file(path, prediction)
    vocabulary = Path(tokenizer or parts.tokenizer)
    if not vocabulary.is_dir():
        hint = "copy the model's tokenizer folder to that place, or name it with tokenizer= (--tokenizer)"
        raise FileNotFoundError(f"there is no vocabulary at {vocabulary}, and the weights hold none; {hint}")
    words = Tokenizer.from_folder(vocabulary)
    with checkpoint.describes(parts.scheduler, "noise schedule"):
        settings = {"prediction_type": prediction} if prediction else {}
        schedule = Schedule.from_config(parts.schedule | settings)
    unet, vae, text = (checkpoint.build(*part, device, dtype) for part in (parts.unet, parts.vae, parts.text))
    if words.vocab_size > text.config.vocab_size:
        rows = f"{words.vocab_size} entries, the encoder {text.config.vocab_size} rows"
        raise ValueError(f"{vocabulary} has {rows}; they belong to different models")
    widths = text.table.shape[1], unet.config.cross_attention_dim
    if widths[0] != widths[1]:
        raise ValueError(f"{path}: the text transformer's width is {widths[0]}, the UNet reads {widths[1]}")
    return LatentDiffusion(words, text, vae, unet, schedule)


def load_clip(path: str | Path, device: str = "cpu",
              dtype: torch.dtype = torch.float32) -> tuple[CLIP, Tokenizer]:  # fmt: skip
    """Load a CLIP folder like openai/clip-vit-base-patch32, with its vocabulary; errors as of `load`."""
    config, weights, preprocess = checkpoint.read_clip(Path(path))
    clip = checkpoint.build(config, weights, path, device, dtype, preprocess=preprocess)
    return clip, Tokenizer.from_folder(path)


capture_stream = cache(torch.cuda.Stream)  # of each GPU; PyTorch's own belongs to the first that records


def recorded(function: Callable) -> Callable:
    """The same function, from tensors to a tensor or several, but that a GPU gets all its kernels at once.

    One by one, the CPU needs longer to launch them than the GPU to compute them.  So they are recorded, as a
    CUDA graph, at the first call with each shape, with the weights that are there then; the last four shapes
    are kept.  What comes out of a graph has no gradient.
    """
    graphs = {}

    def call(*inputs):
        if not inputs[0].is_cuda:
            return function(*inputs)
        key = torch.is_autocast_enabled("cuda"), *((x.shape, x.dtype) for x in inputs)
        if key not in graphs:
            if len(graphs) == 4:
                graphs.pop(next(iter(graphs)))
            own = [x.clone() for x in inputs]
            function(*own)  # whatever is done only once is done now
            graph, device = torch.cuda.CUDAGraph(), inputs[0].device
            with torch.cuda.device(device), torch.cuda.graph(graph, stream=capture_stream(device)):
                result = function(*own)
            graphs[key] = graph, own, result
        graph, own, result = graphs[key]
        for mine, given in zip(own, inputs):
            mine.copy_(given)
        graph.replay()
        # Copies, for the next call writes into the same memory.
        return result.clone() if torch.is_tensor(result) else tuple(part.clone() for part in result)

    return call


def pick_device(device: str = "auto", precision: str | None = None) -> tuple[str, torch.dtype]:
    """The device and the dtype of the networks that a user's two words mean.

    "auto" takes cuda, mps or cpu, the first that is there; without a precision it is bf16 on GPUs that have
    it and fp32 elsewhere.  Under torchrun each process takes its own GPU.  ValueError for what is not there.
    """
    count = {"cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available(), "cpu": 1}
    there = [kind for kind in count if count[kind]]
    name = there[0] if device == "auto" else device
    is_cuda = name.startswith("cuda")
    if is_cuda and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name not in there + [f"{kind}:{i}" for kind in there for i in range(count[kind])]:
        raise ValueError(f"--device {device!r} is not on this machine, but {', '.join(there)}; "
                         "take --device cpu, or auto, or one of several GPUs as cuda:1")  # fmt: skip
    if is_cuda and ":" in name:
        torch.cuda.set_device(name)
    if precision is None:  # the GPUs before Ampere only imitate bf16, slowly
        native = is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native else "fp32"
    return name, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


@torch.no_grad()
def sample(model: LatentDiffusion, prompts: str | list[str], steps: int = 50, guidance: float = 7.5,
           sampler: str = "ddim", eta: float = 0.0, negative: str = "",
           generator: Generator | list[Generator] | None = None, size: int | tuple[int, int] | None = None,
           x_T: Tensor | None = None, start: int = 0) -> Iterator[Tensor]:  # fmt: skip
    """Draw pictures for the prompts: a generator of x_t (B, C, H, W), fp32, after each step; the last is x_0.

    `guidance` is the scale of classifier-free guidance (2207.12598), against the prompt `negative`; at 1 or
    below there is none.  `generator`: one, or a list of one per prompt, whose pictures then do not depend on
    the batch.  `size`: pixels, (height, width) or one number, as `check_size` allows.  `x_T` (B, C, H, W)
    takes the place of the initial noise, or is x_t where the first `start` steps are skipped.  Decode with
    `model.decode`.  ValueError for a size, a sampler or steps that do not exist.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if x_T is None:
        height, width = (size or model.size,) * 2 if size is None or isinstance(size, int) else size
        model.check_size(height, width)
        shape = (model.unet.config.in_channels, height // model.vae.factor, width // model.vae.factor)
        x_T = randn((len(prompts), *shape), generator)
    # The state stays in fp32: its rounding would add up over the steps, while the networks' does not.
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
