"""Turns photos and prompt templates into batches for the training loop."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .diffusion import copy_to, randn
from .files.pictures import Photo, read_text
from .files.words import check_name
from .model import LatentDiffusion


class Examples(NamedTuple):
    """The training data of a word: the latents of its pictures, and the prompts for each picture."""

    mean: Tensor  # (pictures, flips, C, h, w); a draw is mean + std * noise
    std: Tensor
    prompts: list[list[str]]  # for each picture, one per template
    weight: Tensor | None = None  # masks of the pictures, (pictures, flips, 1, h, w)


class Batch(NamedTuple):
    """The samples of one step, on the model's device."""

    x_0: Tensor  # latents (B, C, h, w)
    eps: Tensor  # the noise to predict, (B, C, h, w)
    t: Tensor  # timesteps (B,)
    ids: Tensor  # prompts as token ids (B, T)
    weight: Tensor | None = None  # of each latent in the loss, (B, 1, h, w); None: equal weights


@torch.no_grad()
def make_examples(
    model: LatentDiffusion, name: str, photos: list[Photo], templates: Sequence[str], flip: bool = True
) -> Examples:
    """Encode each photo once, and its mirror image if `flip`, and put the word into the templates.

    ValueError for no photo, no template, a size that the model cannot take, or a prompt without the word.
    """
    if not photos or not templates or isinstance(templates, str):
        raise ValueError(
            f"{len(photos)} photos and the templates {templates!r:.100}; expected lists, not empty"
        )
    check_name(name)
    masked = any(photo.mask is not None for photo in photos)
    moments, prompts, weights = [], [], []
    for photo in photos:  # one by one: a thousand of them would not fit into memory at once
        views = [photo.pixels, photo.pixels.flip(-1)] if flip else [photo.pixels]
        moments.append(model.encode_moments(torch.stack(views)))  # each (flips, C, h, w)
        if masked:  # a latent's weight is the largest of its pixels' weights
            mask = torch.ones_like(photo.pixels[:1]) if photo.mask is None else photo.mask
            pooled = F.max_pool2d(mask, model.vae.factor)  # (1, h, w)
            weights.append(torch.stack([pooled, pooled.flip(-1)] if flip else [pooled]))
        caption = photo.caption
        if caption and model.tokenizer.has_word(caption, name):  # it needs no template
            prompts.append([caption] * len(templates))
        else:
            prompts.append([fill_template(template, name, caption) for template in templates])
    for prompt in {prompt for lines in prompts for prompt in lines}:
        stands = model.tokenizer.has_word(prompt, name) if name in model.concepts else name in prompt
        if not stands:
            raise ValueError(f"{name!r} does not stand alone in {prompt!r:.200}; set {{}} apart from letters")
    mean, std = (torch.stack(part) for part in zip(*moments))
    return Examples(mean, std, prompts, torch.stack(weights).to(model.device) if masked else None)


def draw_batch(
    model: LatentDiffusion,
    examples: Examples,
    size: int,
    generator: Generator,
    span: tuple[float, float] = (0, 1),
    quantiles: Tensor | None = None,
) -> Batch:
    """Draw a picture, a flip, a prompt, a timestep and noise for each of `size` samples.

    span: timesteps are drawn from this part of the schedule, in 0 … 1.  quantiles (B,): fixed positions
    in the span, instead of random ones.
    """
    pictures, flips, *shape = examples.mean.shape
    i = torch.randint(pictures, (size,), generator=generator, device="cpu")
    j = torch.randint(flips, (size,), generator=generator, device="cpu")
    k = torch.randint(len(examples.prompts[0]), (size,), generator=generator, device="cpu")
    u = torch.rand(size, generator=generator, device="cpu", dtype=torch.float32)
    z, eps = (copy_to(randn((size, *shape), generator), model.device) for _ in range(2))
    view = copy_to(i * flips + j, model.device)
    mean, std = examples.mean.flatten(0, 1)[view], examples.std.flatten(0, 1)[view]
    prompts = [examples.prompts[picture][prompt] for picture, prompt in zip(i.tolist(), k.tolist())]
    t = timestep_at(model, u if quantiles is None else quantiles, span)
    weight = None if examples.weight is None else examples.weight.flatten(0, 1)[view]
    return Batch(mean + std * z, eps, t, model.tokenize(prompts), weight)


def timestep_at(model: LatentDiffusion, u: Tensor, span: tuple[float, float]) -> Tensor:
    """The timesteps t (B,) at the quantiles u (B,), in 0 … 1, of a part of the schedule."""
    (low, high), T = span, model.schedule.num_train_timesteps
    t = ((low + (high - low) * u.double()) * T).long().clamp(max=T - 1)
    return copy_to(t, model.device)


# The 27 neutral templates of the paper's supplement.
OBJECT_TEMPLATES = (
    "a photo of a {}", "a photo of the {}", "the photo of a {}", "a photo of my {}", "a photo of one {}",
    "a photo of a clean {}", "a photo of the clean {}", "a photo of a dirty {}", "a photo of a cool {}",
    "a photo of the cool {}", "a photo of a nice {}", "a photo of the nice {}", "a photo of a small {}",
    "a photo of the small {}", "a photo of the large {}", "a photo of the weird {}", "a good photo of a {}",
    "a good photo of the {}", "a cropped photo of a {}", "a cropped photo of the {}",
    "a close-up photo of a {}", "a close-up photo of the {}", "a bright photo of the {}",
    "a dark photo of the {}", "a rendition of a {}", "a rendition of the {}", "a rendering of a {}",
)  # fmt: skip

# The official code's templates for a style; two of them occur twice and so are drawn twice as often.
STYLE_TEMPLATES = tuple(f"{picture} in the style of {{}}" for picture in (
    "a painting", "the painting", "a picture", "a rendering", "a rendition", "a clean painting",
    "a dirty painting", "a dark painting", "a bright painting", "a cool painting", "a nice painting",
    "a good painting", "a small painting", "a large painting", "a weird painting", "a cropped painting",
    "a cropped painting", "a close-up painting", "a close-up painting",
))  # fmt: skip


def read_templates(file: str | Path) -> list[str]:
    """Prompt templates from a text file: one per line, `{}` for the word; blank and `#` lines are skipped.

    OSError if the file is missing.  ValueError for no template, or for a line without `{}` or above 1000
    characters; it names the line.
    """
    lines = [line.strip() for line in read_text(Path(file)).splitlines()]
    templates = [line for line in lines if line and not line.startswith("#")]
    if without := next((line for line in templates if "{}" not in line), None):
        number = lines.index(without) + 1
        raise ValueError(f"{file}, line {number}: '{without}' has no {{}} for the word")
    if long := next((line for line in templates if len(line) > 1000), None):
        raise ValueError(
            f"{file}, line {lines.index(long) + 1}: {len(long):,} characters; a prompt has 75 tokens"
        )
    if not templates:
        raise ValueError(f"{file}: no templates in it; write one per line, e.g. 'a photo of a {{}}'")
    return templates


def fill_template(template: str, name: str, caption: str | None = None) -> str:
    """Put the word into a template, with the picture's caption if it has one.

    A caption with `{}` replaces the template.  Any other caption is appended to it, as in AUTOMATIC1111's
    template "a photo of a [name], [filewords]".
    """
    if caption:
        template = caption if "{}" in caption else f"{template}, {caption}"
    return template.replace("{}", name)
