"""Editing of a given picture: redraw it or a region of it, find its noise, see where a word acts.

`image` is (3, H, W) in [-1, 1] for all prompts, or (B, 3, H, W) with one per prompt (`to_tensor`).
The generators yield latents after each step; `model.decode` turns the last of them into pictures."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from .diffusion import randn
from .files.pictures import to_rgb, to_tensor
from .graphs import no_graphs
from .model import LatentDiffusion, sample
from .networks.unet import Transformer
from .tokenizer import as_list


@torch.no_grad()
def from_image(
    model: LatentDiffusion,
    prompts: str | list[str],
    image: Tensor,
    strength: float = 0.6,
    steps: int = 50,
    sampler: str = "ddim",
    generator: Generator | list[Generator] | None = None,
    **options,
) -> Iterator[Tensor]:
    """Redraw a picture by SDEdit (2108.01073, algorithm 1): a generator of x_t (B, C, H/f, W/f).

    `strength`, in 0 … 1, is the share of `steps` that is taken.  The picture is noised to the first timestep
    taken and denoised from there towards the prompts.  `options` are those of `sample`: guidance, eta,
    negative.  ValueError if no step is left, or if H or W is not a multiple of the VAE's factor f.
    """
    _refuse_options(options)
    prompts, x_0, eps, ts = _begin(model, prompts, image, strength, steps, sampler, generator)
    options |= {"x_T": model.schedule.add_noise(x_0, eps, ts[0]), "start": steps - len(ts)}
    yield from sample(model, prompts, steps, sampler=sampler, generator=generator, **options)


@torch.no_grad()
def in_region(
    model: LatentDiffusion,
    prompts: str | list[str],
    image: Tensor,
    mask: Tensor,
    strength: float = 0.75,
    steps: int = 50,
    sampler: str = "ddim",
    generator: Generator | list[Generator] | None = None,
    **options,
) -> Iterator[Tensor]:
    """Draw into a region by Blended Latent Diffusion (2206.02779, algorithm 1): a generator of x_t.

    `mask` (1, H, W), from `to_mask`, is above 0 where to draw.  As in the paper's experiment (2208.01618,
    section 4.6) the first 1 - `strength` of the steps is skipped, but the region starts from pure noise, so
    its old content does not show through.  After each step the latents outside are reset to the picture's,
    noised to the same timestep.  A latent is redrawn if any of its pixels is; `paste` restores the others.
    ValueError as in `from_image`, or if the mask's size is not the image's.
    """
    if mask.shape != (1, *image.shape[-2:]) or not ((mask >= 0) & (mask <= 1)).all():
        found, expected = ("×".join(map(str, x.shape)) for x in (mask, image))
        found = f"the mask has {found} values, the image {expected}"
        raise ValueError(f"{found}; expected (1, H, W) in 0 … 1, as to_mask makes it")
    _refuse_options(options)
    prompts, x_0, eps, ts = _begin(model, prompts, image, strength, steps, sampler, generator)
    inside = F.max_pool2d((mask > 0).to(x_0), model.vae.factor) > 0  # (1, H/f, W/f)
    options |= {"x_T": eps, "start": steps - len(ts)}
    walk = sample(model, prompts, steps, sampler=sampler, generator=generator, **options)
    for t, x in zip([*ts[1:], None], walk):
        outside = x_0 if t is None else model.schedule.add_noise(x_0, eps, t)
        yield x.copy_(torch.where(inside, x, outside))  # in place: the next step starts from it


def skipped_steps(steps: int, strength: float) -> int:
    """The number of steps to skip at a strength; ValueError if that is not in 0 … 1, or skips all steps."""
    if not (0 <= strength <= 1 and int(steps * strength)):
        raise ValueError(f"strength is {strength} of {steps} steps; it must lie in 0 … 1 and leave a step")
    return steps - int(steps * strength)


def to_mask(picture: Image.Image, size: int, feather: int = 0) -> Tensor:
    """A PIL picture of any size and mode -> mask (1, size, size): 0 (black) stays, 1 (white) is redrawn.

    It is cropped and resized as `to_tensor` does with the photo.  Grey lies in between; transparent is white.
    Levels within 5 % of black or white become black or white, for masks saved as JPEG.  `feather` is half the
    width of the soft edge, in pixels.  The edge lies inside the white, so white parts narrower than
    2 feather + 1 are lost.  ValueError for a mask that is black or white everywhere, or a negative `feather`.
    """
    levels = (to_tensor(to_rgb(picture), size).mean(dim=0, keepdim=True) + 1) / 2
    mask = ((levels - 0.05) / 0.9).clamp(0, 1)  # (1, size, size)
    if not feather >= 0:
        raise ValueError(f"feather is {feather}; it is a number of pixels, at least 0")
    if feather:
        window = {"kernel_size": 2 * feather + 1, "stride": 1, "padding": feather}
        mask = -F.max_pool2d(-mask, **window)  # shrink the white, so that the average stays inside it
        mask = F.avg_pool2d(mask, **window, count_include_pad=False)
    if mask.all() or not mask.any():
        narrow = f"black everywhere, or white in parts less than {2 * feather + 1} pixels wide"
        found = "white everywhere" if mask.all() else narrow
        raise ValueError(f"the mask is {found}; paint white what is to be redrawn, black what is to stay")
    return mask


def paste(image: Tensor, drawn: Tensor, mask: Tensor) -> Tensor:
    """Blend: drawn (B, 3, H, W) inside the mask (1, H, W), the original, unchanged to the bit, outside."""
    image = image.float()
    return image + mask.to(image) * (drawn.to(image) - image)


@torch.no_grad()
def ddim_invert(
    model: LatentDiffusion, prompts: str | list[str], image: Tensor, steps: int = 50, iterations: int = 1
) -> Iterator[Tensor]:
    """Find the noise from which DDIM draws the picture: yield x_t for rising t; the last is x_T.

    With the same prompts and steps, `sample(..., guidance=1, x_T=x_T)` returns to the picture (2010.02502,
    section 4.3).  A step needs the prediction at its end.  One iteration predicts from its beginning instead;
    more iterations approach the fixed point (2309.04907), from which sampling returns exactly.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; it must be at least 1")
    prompts, images = _batch(model, prompts, image)
    x, _ = model.encode_moments(images)
    context = model.encode_prompts(prompts)
    ts, stride = model.schedule.timesteps(steps), model.schedule.num_train_timesteps // steps
    for t in reversed(ts):
        x_t = x
        for _ in range(iterations):
            prediction = model.predict(x_t.to(model.dtype), t, context).float()
            _, eps = model.schedule.split(x_t, prediction, t)
            x_t = model.schedule.ddim_inverse_step(x, eps, t - stride, t)
        x = x_t
        yield x


@contextmanager
def attention_maps(
    model: LatentDiffusion, prompts: str | list[str], word: str, size: tuple[int, int] | None = None
) -> Iterator[Tensor]:
    """Record where the pictures attend to `word` while they are drawn: `with … as heat`, (B, H, W).

    After the block, `heat` is the mean of the probabilities softmax(q kᵀ / √d) (2208.01626, section 3.1) over
    heads, layers and steps.  Each layer's map is resized to `size`, (height, width) in pixels, as in DAAM
    (2210.04885).  The maps of a word's tokens are summed.  ValueError if a prompt lacks the word.
    """
    prompts = as_list(prompts)
    ids = torch.tensor(model.tokenizer.encode(word), device="cpu")
    at_word = torch.isin(model.tokenizer(prompts), ids).to(model.device)  # (B, T)
    if without := [prompt for prompt, found in zip(prompts, at_word.any(dim=1)) if not found]:
        raise ValueError(f"{word!r} does not stand in the prompt {without[0]!r}")
    size = (model.size, model.size) if size is None else size
    if not all(isinstance(side, int) and 1 <= side <= 4096 for side in size):
        raise ValueError(f"size is {size}; it is a height and a width in pixels")
    heat = torch.zeros(len(prompts), *size, device=model.device, dtype=torch.float32)
    shapes, hooks = [], []

    def record(attention, args, output):
        x, context = (part[-len(prompts) :] for part in args)  # under guidance, the half with the prompts
        q, k = attention.to_q(x), attention.to_k(context)
        q, k = (h.unflatten(-1, (attention.heads, -1)).transpose(1, 2).float() for h in (q, k))
        probabilities = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)  # (B, heads, HW, T)
        of_word = (probabilities * at_word[:, None, None]).sum(dim=-1).unflatten(-1, shapes[-1])
        heat.add_(F.interpolate(of_word, heat.shape[1:], mode="bilinear").mean(dim=1))

    for layer in model.unet.modules():
        if isinstance(layer, Transformer):
            hooks.append(layer.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[2:])))
            hooks.append(layer.transformer_blocks[0].attn2.register_forward_hook(record))
    try:
        with no_graphs():  # a CUDA graph replays kernels and never calls Python hooks
            yield heat
    finally:
        for hook in hooks:
            hook.remove()
    heat.div_(max(1, len(shapes)))


def overlay(pictures: Tensor, heat: Tensor) -> Tensor:
    """Tint pictures (B, 3, H, W) red by their heat (B, H, W), from the least to the most in each picture."""
    least, most = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    share = ((heat - least) / (most - least).clamp(min=1e-12))[:, None].to(pictures)  # (B, 1, H, W)
    red = pictures.new_tensor([1.0, -1.0, -1.0])[:, None, None]
    return pictures + 0.8 * share * (red - pictures)


def _refuse_options(options):
    """Raise ValueError for options of `sample` that the picture decides."""
    if given := {"x_T", "start", "size"} & options.keys():
        raise ValueError(f"{', '.join(sorted(given))} cannot be given, because the picture decides it")


def _batch(model, prompts, image):
    """A list of B prompts, and an image for each, (B, 3, H, W)."""
    prompts = as_list(prompts)
    if image.ndim not in (3, 4) or (image.ndim == 4 and len(image) != len(prompts)):
        found = f"the image has the shape {tuple(image.shape)}"
        raise ValueError(f"{found}; expected (3, H, W), or (B, 3, H, W) with B = {len(prompts)} prompts")
    return prompts, image.expand(len(prompts), *image.shape[-3:])


def _begin(model, prompts, image, strength, steps, sampler, generator):
    """A list of B prompts, latents x_0 and noise eps (B, C, H/f, W/f), and the timesteps to visit."""
    prompts, images = _batch(model, prompts, image)
    ts = model.schedule.timesteps(steps, sampler)[skipped_steps(steps, strength) :]
    x_0 = model.encode_images(images, generator)
    return prompts, x_0, randn(x_0.shape, generator, x_0), ts
