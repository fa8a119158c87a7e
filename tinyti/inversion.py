"""Textual Inversion (Gal et al., 2208.01618): learn the vectors of a word, and nothing else, so that a frozen
model predicts the noise in pictures of a thing from prompts that name it.  Equation 2 of the paper:

    v* = argmin_v  E  || eps - eps_theta(x_t, t, c(prompt with v)) ||²

Equal runs on one CPU are equal to the bit, but for single samples of 16 pixels on several threads; on a GPU
attention's gradients add up in the order in which threads come."""

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Generator, Tensor

from .concept import Concept
from .data import Photo, prompt
from .diffusion import randn, send
from .model import LatentDiffusion, recorded
from .whitened import adam, whitened

STEPS, BATCH_SIZE = 50, 8
OPTIMIZERS = {"whitened": (whitened, 1e-2), "adam": (adam, 5e-3)}  # and their learning rates
AVERAGE = 10  # steps that the word is an average over
EVALUATE_EVERY = 5  # steps
EVALUATIONS = 8  # samples in the fixed batch that a word is judged by
CAP = 4.5  # how long whitened steps may make a vector, in median lengths of the vocabulary's rows
# The part of the timesteps that is drawn from.  The paper takes (0, 1), but at the low end the picture is in
# plain sight, and a prompt hardly changes the loss, which is largest there (notebook 1 has the curves).
TIMESTEPS = (0.25, 0.95)


class Examples(NamedTuple):
    """What a word is learned from: the latents of its pictures, and the prompts for each of them."""

    mean: Tensor  # (pictures, flips, C, h, w); a draw is mean + std * noise
    std: Tensor
    prompts: list[list[str]]  # for each picture, one per template


@torch.no_grad()
def make_examples(model: LatentDiffusion, word: str, photos: list[Photo], templates, flip=True) -> Examples:
    """Encode the photos once, both ways round unless told not to, and put the word into the templates."""
    images = torch.stack([photo.pixels for photo in photos])  # (N, 3, H, W)
    views = torch.stack([images, images.flip(-1)], 1) if flip else images[:, None]  # (N, flips, 3, H, W)
    moments = [model.vae.encode(view.to(model.device, model.dtype)) for view in views]  # a photo at a time
    mean, std = (torch.stack(part).float() * model.vae.config.scaling_factor for part in zip(*moments))
    return Examples(mean, std, [[prompt(t, word, photo.caption) for t in templates] for photo in photos])


class Inversion:
    """All that changes while a word is learned; `invert` takes it from step to step.

    The optimizer walks a `path`.  Single points of it are noisy, for every step has seen a few samples only,
    so the `word`, which `concept` shows, is a running average of the path, kept beside it; all are (n, D).
    `evaluations` are the losses on the fixed batch, from step 0 on; `log` has each step's loss, the norm of
    its gradient and of the word.  Nothing is changed in place, so what one keeps of a step stays as it is.
    """

    def __init__(self, model: LatentDiffusion, concept: Concept, optimizer: str = "whitened",
                 lr: float | None = None):  # fmt: skip
        function, default = OPTIMIZERS[optimizer]
        self.optimizer = partial(function, lr=lr or default)
        if function is whitened:
            lengths = model.text.table.float().norm(dim=-1)
            longest = concept.norm().max().item()  # a start may be longer than the cap
            self.optimizer = partial(self.optimizer, cap=max(CAP * lengths.median().item(), longest))
        self.concept = concept
        self.start = self.path = self.word = concept.vectors.detach().clone()
        self.memory = {}  # the optimizer's
        self.step = 0
        self.scale = 2.0**16 if model.dtype == torch.float16 else 1.0  # of the loss: gradients underflow
        self.evaluations: list[float] = []
        self.log: list[Tensor] = []

    def move(self, gradients: Tensor, losses: Tensor) -> None:
        """One step, along the gradients (B, n, D) of a batch's losses (B,)."""
        path, word, memory, scale = self.path, self.word, self.memory, self.scale
        if scale > 1 and not gradients.isfinite().all():  # fp16 overflowed: this batch is lost
            scale = scale / 2
        else:
            path, memory = self.optimizer(path, gradients, memory)
            word = word.lerp(path, max(2 / (self.step + 2), 1 / AVERAGE))
        # nan_to_num, for an overflow of fp16 is no fault of the state.
        loss, gradient = losses.mean().nan_to_num(), gradients.mean(dim=0).norm().nan_to_num()
        self.log[self.step :] = [torch.stack([loss, gradient, word.norm(dim=-1).mean()])]
        # At once: Ctrl-C finds the state before the step or after it.
        self.__dict__.update(path=path, word=word, memory=memory, scale=scale, step=self.step + 1)
        self.show(self.word)

    @torch.no_grad()
    def show(self, vectors: Tensor) -> None:
        """Make the word mean these vectors (n, D) in prompts."""
        self.concept.vectors.copy_(vectors)

    def is_finite(self) -> bool:
        """Whether the word and its last evaluation are numbers."""
        return bool(self.word.isfinite().all()) and math.isfinite(self.evaluations[-1])

    def state_dict(self) -> dict[str, Any]:
        """All that a later run needs to go on exactly from here, on the CPU."""
        names = ("start", "path", "word", "memory", "scale", "step", "evaluations")
        log = torch.cat([self.start.new_zeros(0, 3), *(row[None] for row in self.log[: self.step])])
        return _to({name: getattr(self, name) for name in names} | {"log": log}, "cpu")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave, on whichever device; the learning rate stays as it was given."""
        state = _to(state, self.start.device)
        self.__dict__.update(state, evaluations=[*state["evaluations"]], log=[*state["log"]])
        self.show(self.word)


def invert(model: LatentDiffusion, word: Inversion, examples: Examples, steps: int = STEPS,
           batch_size: int = BATCH_SIZE, seed: int = 0, accumulate: int = 1,
           span: tuple[float, float] = TIMESTEPS) -> Iterator[Inversion]:  # fmt: skip
    """Learn a word: a generator that yields it after each step, until it has taken `steps` in all.

    batch_size: samples per step, of all processes together; accumulate: parts in which each process computes
    its share.  span: the part of the timesteps, from 0 to 1, that is drawn from.  Where the evaluation is no
    number it ends early.  The draws of a step depend on `seed` and its number alone, so that a run which is
    resumed (Inversion.load_state_dict) or distributed walks the same path.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    bounds = [batch_size * i // (ranks * accumulate) for i in range(ranks * accumulate + 1)]
    parts = [slice(a, b) for a, b in pairwise(bounds)][rank * accumulate :][:accumulate]  # of this process
    compute = recorded(partial(gradients, model, word.concept.name))
    begun = word.step
    while True:
        if word.step % EVALUATE_EVERY == 0 and len(word.evaluations) <= word.step // EVALUATE_EVERY:
            value = torch.tensor(evaluate(model, examples, seed, span), device=model.device)
            if ranks > 1:  # so that all agree when to end, down to the rounding
                dist.broadcast(value, 0)
            word.evaluations.append(value.item())
        if word.step > begun:
            yield word
        if word.step >= steps or not math.isfinite(word.evaluations[-1]):
            return
        generator = Generator().manual_seed(seed * 1_000_003 + word.step + 1)
        x_0, eps, u, prompts = draw(examples, batch_size, generator)
        t = timestep_at(u, model, span)
        ids, scale = model.tokenize(prompts), x_0.new_full((), word.scale)
        vectors = word.path.expand(batch_size, -1, -1)  # a copy for each sample
        loss, gradient = x_0.new_zeros(batch_size), torch.zeros_like(vectors)
        for part in parts:
            if prompts[part]:
                inputs = vectors[part], ids[part], x_0[part], eps[part], t[part], scale
                loss[part], gradient[part] = compute(*inputs)
        if ranks > 1:  # the rows of the others are zero
            dist.all_reduce(gradient)
            dist.all_reduce(loss)
        word.move(gradient, loss)


def draw(examples: Examples, size: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """A batch: latents x_0 and noise eps (B, C, h, w), the timesteps' quantiles (B,), prompts."""
    pictures, flips, *shape = examples.mean.shape
    i = torch.randint(pictures, (size,), generator=generator)
    j = torch.randint(flips, (size,), generator=generator)
    k = torch.randint(len(examples.prompts[0]), (size,), generator=generator)
    u = torch.rand(size, generator=generator)
    z, eps = (send(randn((size, *shape), generator), examples.mean.device) for _ in range(2))
    which = send(i * flips + j, examples.mean.device)
    mean, std = (part.flatten(0, 1)[which] for part in examples[:2])
    return mean + std * z, eps, u, [examples.prompts[a][b] for a, b in zip(i.tolist(), k.tolist())]


def timestep_at(u: Tensor, model: LatentDiffusion, span: tuple[float, float]) -> Tensor:
    """The timesteps t (B,) at the quantiles u (B,) of a part of the schedule."""
    (low, high), T = span, model.schedule.num_train_timesteps
    return send(((low + (high - low) * u.double()) * T).long().clamp(max=T - 1), model.device)


def gradients(model: LatentDiffusion, word: str, vectors: Tensor, ids: Tensor, x_0: Tensor, eps: Tensor,
              t: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss of each sample, (B,), and its gradient in the sample's own copy of the vectors, (B, n, D).

    ids (B, T) of the prompts; scale: a number that the loss is multiplied by on the way, for fp16.
    """
    copies = vectors.detach().requires_grad_()
    loss = losses(model, x_0, eps, t, ids, {word: copies})  # equation 2
    (gradient,) = torch.autograd.grad(scale * loss.sum(), copies)
    return loss.detach(), gradient / scale


def losses(model: LatentDiffusion, x_0: Tensor, eps: Tensor, t: Tensor, prompts: list[str] | Tensor,
           vectors: dict[str, Tensor] | None = None) -> Tensor:  # fmt: skip
    """|| eps - eps_theta(x_t, t, c(prompt)) ||² of each sample, a mean over the latents: (B,) in fp32.

    prompts, or their ids (B, T); `vectors` {word: (B, n, D)}: a copy for each sample, in the place of what
    the word is.
    """
    x_t = model.schedule.add_noise(x_0, eps, t)
    with torch.autocast(x_0.device.type, model.dtype, enabled=model.dtype == torch.float16):
        context = model.encode_prompts(prompts, vectors)
        prediction = model.predict(x_t.to(model.dtype), t, context)
    target = model.schedule.target(x_0, eps, t)
    return F.mse_loss(prediction.float(), target, reduction="none").mean(dim=(1, 2, 3))


@torch.no_grad()
def evaluate(model: LatentDiffusion, examples: Examples, seed: int = 0, span=TIMESTEPS,
             size: int = EVALUATIONS) -> float:  # fmt: skip
    """The loss on a fixed batch: always the same pictures, prompts and noise, and timesteps spread evenly."""
    x_0, eps, _, prompts = draw(examples, size, Generator().manual_seed(seed + 2**62))  # not a step's
    t = timestep_at((torch.arange(size) + 0.5) / size, model, span)
    return losses(model, x_0, eps, t, prompts).mean().item()


def diagnose(word: Inversion) -> str | None:
    """Why the word is not to be trusted, in a line; None if it has learned something."""
    first, last = word.evaluations[0], word.evaluations[-1]
    if not word.is_finite():
        return "the vector or the loss is not a number; lower --lr, or take --precision bf16 or fp32"
    if torch.equal(word.word, word.start):
        return "the vector has not moved: its gradient was zero"
    if last >= first:
        return f"the evaluation loss has not fallen ({first:.4f}, now {last:.4f}); try another --lr or --init"
    return None


def _to(state: Any, device: str | torch.device) -> Any:
    """A copy of a state, with its tensors on a device."""
    if isinstance(state, dict):
        return {key: _to(value, device) for key, value in state.items()}
    return state.to(device) if isinstance(state, Tensor) else state
